"""Several LoRA adapters as one, by peft, and how far that is from the weighted sum of what they do.

What an adapter does to a layer is scale · B A. All is compared as products of thin matrices: no layer is ever formed.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters.weighted import KINDS, OF_FACTORS, ONE_BY_ONE, Combination, Part
from finetune.errors import RunError, UserError
from finetune.models import adapter_files, attach, loading, tokenizers
from finetune.models.config import read_config
from finetune.models.identity import check_identity
from finetune.models.sources import folder as base_folder
from finetune.recipe.sections import ModelConfig

NAME = "combined"
EXACT = 1e-5
"""What cat may miss of the weighted sum, of its size: float32 in and out."""
ROUNDED = 1e-3
"""What svd may miss beside what it cuts off, at right angles to that: the root of what float32 rounds."""

Thin = tuple[torch.Tensor, torch.Tensor]
"""B [out, r] and A [r, in], in float64, with the scale in B."""


@dataclass(frozen=True)
class Outcome:
    kind: str
    difference: float
    """|combined - weighted sum| / |weighted sum|, over all layers (Frobenius norm)."""
    worst: float
    """The same in the layer where it is largest."""
    rank: int
    cut: float | None
    """Of svd: what the best matrices of that rank must miss."""

    def said(self) -> str:
        """One sentence for people."""
        what = f"combined by {self.kind}: {KINDS[self.kind]}"
        far = f"differs from the weighted sum by {self.difference:.2g} of its size (worst layer {self.worst:.2g})"
        if self.cut is not None:
            far += f", of which {self.cut:.2g} is what rank {self.rank} cuts off"
        return f"{what}; it {far}"


def combine(parts: Sequence[Part], how: Combination, model: ModelConfig, out: Path) -> Outcome:
    """Write into `out` an adapter that stands for all parts, with the tokenizer and the records of the first.

    UserError for adapters that do not fit the base or each other; RunError when cat or svd is not the sum.
    """
    check_tokenizers(parts, model)
    for part in parts:
        attach.check_adapter(part.folder, model)
        check_identity(part.folder, base_folder(model), model.name)
        if held := adapter_files.own_embeddings(part.folder):
            what = f"holds embeddings whole ({next(iter(held))}), which cannot be weighed"
            raise UserError(what, path=part.folder, key="--adapter", fix="merge it by itself, without a weight")
    adapted, names = stacked(parts, model)
    if how.kind in OF_FACTORS:
        check_shapes(adapted, parts, names, how.kind)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(how.seed or 0)
        adapted.base_model.add_weighted_adapter(
            names, [part.weight for part in parts], NAME, combination_type=how.kind, svd_rank=how.svd_rank,
            svd_full_matrices=False, density=how.density,
        )  # fmt: skip
    outcome = compared(adapted, parts, names, how)
    save(adapted, parts[0].folder, out)
    return outcome


def check_tokenizers(parts: Sequence[Part], model: ModelConfig) -> None:
    """UserError for other tokens or another chat template than those of the first."""
    first = tokenizers.load_tokenizer(model, parts[0].folder)
    for part in parts[1:]:
        other = tokenizers.load_tokenizer(model, part.folder)
        same_words = len(first) == len(other) and first.get_vocab() == other.get_vocab()
        what = None if same_words else "other tokens"
        what = what or (None if first.chat_template == other.chat_template else "another chat template")
        if what:
            said = f"has {what} than {parts[0].folder}"
            raise UserError(said, path=part.folder, key="--adapter", fix=ONE_BY_ONE)


def stacked(parts: Sequence[Part], model: ModelConfig) -> tuple[Any, list[str]]:
    """All adapters on the base without its weights, and their names there."""
    from peft import PeftModel

    network = loading.skeleton(model)
    attach.resize_for(network, parts[0].folder, model)
    hollow(network)
    config, names = read_config(model), [f"part{number}" for number in range(len(parts))]
    with tempfile.TemporaryDirectory() as scratch, attach.as_adapter_error(parts[0].folder, model.name):
        folders = [
            attach.native(part.folder, config, Path(scratch) / name) for part, name in zip(parts, names, strict=True)
        ]
        adapted = PeftModel.from_pretrained(network, str(folders[0]), adapter_name=names[0])
        for name, folder in zip(names[1:], folders[1:], strict=True):
            adapted.load_adapter(str(folder), adapter_name=name)
    for name in names:  # in words that can be united: a pattern and a list cannot, nor layers of one and all of another
        stored = adapted.peft_config[name]
        stored.target_modules = {key for key, layer in layers_of(adapted).items() if thin(layer, name) is not None}
        stored.layers_to_transform = stored.layers_pattern = stored.exclude_modules = None
    # peft takes over the first's config: what the new one computes has no scale of its own, and starts from nothing.
    adapted.peft_config[names[0]].use_rslora = False
    adapted.peft_config[names[0]].init_lora_weights = True
    return adapted, names


def hollow(network: nn.Module) -> None:
    """Give the weights of a network on the meta device a place in memory: one number each, seen at its full shape."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=torch.float32).expand(weight.shape)
            made.setdefault(weight, nn.Parameter(zero, requires_grad=False))
            setattr(module, name, made[weight])


def layers_of(adapted: Any) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {n: m for n, m in adapted.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def thin(layer: Any, name: str) -> Thin | None:
    """What an adapter does to a layer; None where it does not reach it."""
    if name in layer.lora_A:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    elif name in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        return None
    return b.detach().double() * layer.scaling[name], a.detach().double()


def check_shapes(adapted: Any, parts: Sequence[Part], names: list[str], kind: str) -> None:
    for key, layer in layers_of(adapted).items():
        ranks = {part.folder: len(found[1]) for part, n in zip(parts, names, strict=True) if (found := thin(layer, n))}
        if len(set(ranks.values())) > 1:
            said = ", ".join(f"{folder}: {rank}" for folder, rank in ranks.items())
            what = f"adds matrices of one shape, and the ranks on {key} differ ({said})"
            raise UserError(f"{kind} {what}", key="--combine", fix="use cat or svd")


def compared(adapted: Any, parts: Sequence[Part], names: list[str], how: Combination) -> Outcome:
    """How far the combination is from the weighted sum. RunError when it should be that sum and is not."""
    squares = {"difference": 0.0, "size": 0.0, "cut": 0.0}
    worst, rank = 0.0, 0
    for key, layer in layers_of(adapted).items():
        found = [(part.weight, pair) for part, name in zip(parts, names, strict=True) if (pair := thin(layer, name))]
        made = thin(layer, NAME)
        if not found or made is None:
            continue
        total = beside([(weight * b, a) for weight, (b, a) in found])
        rank = max(rank, len(made[1]))
        size = values(total)
        difference = values(beside([made, (-total[0], total[1])])).norm().item()
        cut = size[len(made[1]) :].norm().item() if how.kind == "svd" else 0.0
        whole = size.norm().item()
        allowed = EXACT * whole if how.kind == "cat" else math.hypot(cut, ROUNDED * whole)
        if how.kind in ("cat", "svd") and not difference <= allowed:
            raise RunError(
                f"{how.kind} does not give the weighted sum: in {key} it misses {difference:.3g}, where {allowed:.3g} "
                "would be allowed; nothing was written"
            )
        worst = max(worst, difference / whole if whole else 0.0)
        for name, value in (("difference", difference), ("size", whole), ("cut", cut)):
            squares[name] += value**2
    whole = squares["size"] ** 0.5
    if not whole:
        raise UserError("the adapters do nothing, or cancel each other", key="--adapter", fix="give other weights")
    cut_off = squares["cut"] ** 0.5 / whole if how.kind == "svd" else None
    return Outcome(how.kind, squares["difference"] ** 0.5 / whole, worst, rank, cut_off)


def beside(pairs: Sequence[Thin]) -> Thin:
    """The sum of products B A, as one product."""
    return torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs], 0)


def values(pair: Thin) -> torch.Tensor:
    """Singular values of B A, largest first, from matrices no larger than its rank."""
    b, a = (torch.linalg.qr(x, mode="r").R for x in (pair[0], pair[1].T))
    return torch.linalg.svdvals(b @ a.T)


def save(adapted: Any, first: Path, out: Path) -> None:
    """The combination as peft writes adapters, with what lies beside the first one's weights."""
    from peft import get_peft_model_state_dict

    config = adapted.peft_config[NAME]
    ranks = {key: len(pair[1]) for key, layer in layers_of(adapted).items() if (pair := thin(layer, NAME))}
    config.rank_pattern = {key: rank for key, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)  # a scale of 1 everywhere
    weights = get_peft_model_state_dict(adapted, adapter_name=NAME, save_embedding_layers=False)
    adapter_files.save_adapter(config, weights, out)
    for file in first.iterdir():
        if file.is_file() and not file.name.startswith("adapter_") and file.name != "README.md":
            shutil.copyfile(file, out / file.name)
