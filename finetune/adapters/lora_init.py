"""Starts of LoRA that look at the base's weights.

pissa, olora    W = W_rest + s B0 A0: the base is rewritten to W_rest, so it is another model with the adapter off.
                Saved is plain LoRA for W itself: W_rest + s B A = W + s (B A - B0 A0), of twice the rank
loftq           B0 A0 = the best low-rank fit of W - int4(W); the quantized base stays as it is
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune.adapters.methods import rewrites
from finetune.errors import UserError
from finetune.models import weight_files

PEFT_NAMES: dict[str, Any] = {"default": True, "loftq": True}  # the others have peft's own names
INITIAL = "_finetune_initial_lora"


def rewrites_base(section: Any) -> bool:
    return rewrites(getattr(section, "init_lora_weights", None))


def start(model: Any, section: Any, folder: Path | None) -> None:
    """Args: folder: the base's own weights, for loftq."""
    if section.init_lora_weights == "loftq":
        assert folder is not None
        loftq(model, folder)
    if rewrites_base(section):
        remember(model)


def remember(model: Any) -> None:
    """Keep A0 and B0 (in main memory) with the model, for `plain_lora`.

    peft's config forgets the start: a second adapter of this config would have the base rewritten once more, under the
    first one.
    """
    model.peft_config["default"].init_lora_weights = True
    state = {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    setattr(model, INITIAL, state)


def plain_lora(model: Any, folder: Path) -> None:
    """Rewrite the adapter just saved in `folder` so that it fits the base as it was: A' = [A; A0], B' = [B, -B0]."""
    initial: dict[str, torch.Tensor] | None = getattr(model, INITIAL, None)
    if initial is None:
        return
    weights = load_file(folder / "adapter_model.safetensors")
    for name, start in initial.items():
        key = name.replace(".default.", ".")
        if ".lora_A." in key:
            weights[key] = torch.cat([weights[key], start.to(weights[key])], dim=0)
        else:
            weights[key] = torch.cat([weights[key], -start.to(weights[key])], dim=1)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["init_lora_weights"] = True
    config["r"] *= 2
    config["lora_alpha"] *= math.sqrt(2) if config.get("use_rslora") else 2  # the scale stays
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def loftq(model: Any, folder: Path) -> None:
    """LoftQ (Li et al. 2023, arXiv:2310.08659, algorithm 1 with T = 1): B A = truncated SVD of W - int4(W).

    Args:
        folder: the base's own unquantized weights, read one matrix at a time.
    """
    files = {key: path for path in sorted(folder.glob("*.safetensors")) for key in weight_files.shapes(path)}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            key = name.removeprefix("base_model.model.") + ".weight"
            if key not in files:
                raise UserError(
                    f"loftq finds no {key} among the base's weights", path=folder, key="adapter.init_lora_weights",
                    fix="use init_lora_weights: default (ChatGLM's original layout has other names)",
                )  # fmt: skip
            with safe_open(files[key], framework="pt") as file:
                weight = file.get_tensor(key)
            base = module.get_base_layer()
            rounded = dequantize_module_weight(base)
            a, b, scale = module.lora_A["default"].weight, module.lora_B["default"].weight, module.scaling["default"]
            lost = weight.to(rounded.device).float() - rounded.float()
            u, s, v = torch.linalg.svd(lost, full_matrices=False)
            root = s[: a.shape[0]].sqrt()
            a.copy_(root[:, None] * v[: a.shape[0]])
            b.copy_(u[:, : a.shape[0]] * root / scale)
