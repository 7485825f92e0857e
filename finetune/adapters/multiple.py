"""Several adapters of one type on one base: policy, reference, reward and value of PPO."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, TaskType, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from finetune.errors import UserError
from finetune.models.quantization import for_experts

POLICY = "default"  # the name under which peft saves into the folder itself
REFERENCE, REWARD, VALUE = "ppo_reference", "ppo_reward", "ppo_value"
SCORE_HEADS = ("score", "classifier")
HEAD_WEIGHTS = ("base_model.model.score.weight", "base_model.score.weight")  # the latter with soft prompts


@dataclass(frozen=True)
class ActiveAdapter:
    """A model, and which of its adapters computes."""

    model: Any
    adapter: str | None = None
    """None: with a PEFT model all adapters are off; otherwise the model as it is."""


def layers_of(model: Any) -> list[Any] | None:
    """The layers with adapters, where choosing an adapter concerns nothing else; None for soft prompts, whole modules
    that are trained beside adapters, and layers that do more when they are told."""
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return None
    modules = list(model.modules())
    found = [module for module in modules if isinstance(module, BaseTunerLayer)]
    plain = type(model.base_model).set_adapter is BaseTuner.set_adapter and all(
        type(layer).set_adapter is BaseTunerLayer.set_adapter
        and type(layer).enable_adapters is BaseTunerLayer.enable_adapters
        and not layer.merged
        for layer in found
    )
    return found if plain and not any(isinstance(m, AuxiliaryTrainingWrapper) for m in modules) else None


@contextmanager
def activated(active: ActiveAdapter, layers: Sequence[Any] | None = None) -> Iterator[Any]:
    """The model with that adapter active.

    peft's `set_adapter` and `disable_adapter` make the active adapter trainable and all others frozen; here every
    requires_grad stays what it was.

    Args:
        layers: of `layers_of`, from whoever switches often: peft looks at every module and parameter of the model each
            time (with 42 adapted layers 11 ms to choose and 170 to turn off, where this takes a tenth of one).
    """
    model = active.model
    if not isinstance(model, PeftModel) or active.adapter == model.active_adapter:
        yield model
        return
    if layers is not None and (active.adapter is None or active.adapter in model.peft_config):
        before, off = model.active_adapter, any(layer.disable_adapters for layer in layers)
        try:
            _choose(model, layers, active.adapter, before)
            yield model
        finally:
            _choose(model, layers, None if off else before, before)
        return
    flags = [(p, p.requires_grad) for p in model.parameters()]
    before = model.active_adapter
    try:
        with ExitStack() as stack:
            if active.adapter is None:
                stack.enter_context(model.disable_adapter())
            else:
                model.set_adapter(active.adapter)
                stack.callback(model.set_adapter, before)
            _restore(flags)
            yield model
    finally:
        _restore(flags)


def _choose(model: Any, layers: Sequence[Any], adapter: str | None, before: str) -> None:
    """What peft's `set_adapter` and, without an adapter, `disable_adapter_layers` do, but for requires_grad."""
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [adapter or before], adapter is None
    model.active_adapter = model.base_model.active_adapter = adapter or before


def _restore(flags: list[tuple[torch.nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad = flag


def named(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    """Parameters and buffers of one adapter, by name with `*` for the adapter's."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    parts = ((name.split("."), tensor) for name, tensor in tensors)
    return {".".join("*" if p == adapter else p for p in name): tensor for name, tensor in parts if adapter in name}


@torch.no_grad()
def copy_adapter(model: Any, source: str, name: str) -> None:
    """A second adapter `name` that computes what `source` does."""
    config = copy.deepcopy(model.peft_config[source])
    _add(model, name, config, finished=config.is_prompt_learning and config.inference_mode)
    theirs, ours = named(model, source), named(model, name)
    # Buffers follow from the config (VeRA's projections), and peft may keep those of a second adapter elsewhere.
    missing = sorted(key for key in theirs.keys() ^ ours.keys() if isinstance({**theirs, **ours}[key], nn.Parameter))
    if missing:
        raise UserError(
            f"an adapter of this kind cannot stand twice on one base ({', '.join(missing[:3])})", key="adapter.method",
            fix="set ppo.models: separate",
        )  # fmt: skip
    for key, tensor in theirs.items():
        if key in ours:
            ours[key].data = tensor.detach().clone()


def add_adapter(model: Any, folder: Path, name: str) -> torch.Tensor | None:
    """The adapter in `folder` as `name`; returns the weight [1, hidden] of its score head, if it has one."""
    config = for_experts(as_causal(PeftConfig.from_pretrained(str(folder))), model.get_base_model())
    weights = load_peft_weights(str(folder), device="cpu")
    head = next((weights.pop(key) for key in HEAD_WEIGHTS if key in weights), None)
    _add(model, name, config, finished=config.is_prompt_learning)
    for parameter in named(model, name).values():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()  # as it was trained
    result = set_peft_model_state_dict(model, weights, adapter_name=name)
    lost = [key for key in getattr(result, "unexpected_keys", None) or [] if key != "prompt_embeddings"]
    if lost:
        what = f"{len(lost)} weights of the adapter fit nothing ({lost[0]})"
        raise UserError(what, path=folder, fix="train it again")
    return head


def as_causal(config: Any) -> Any:
    """The adapter of a reward model, without its head."""
    config.task_type = TaskType.CAUSAL_LM
    if getattr(config, "modules_to_save", None):
        config.modules_to_save = [m for m in config.modules_to_save if m not in SCORE_HEADS] or None
    return config


def _add(model: Any, name: str, config: Any, finished: bool) -> None:
    """finished: a soft prompt as it is saved, without the network that made it."""
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # starts that look at the base would rewrite it again; weights are copied next
    config.inference_mode = finished
    try:
        model.add_adapter(name, config)
    except (ValueError, TypeError) as error:
        raise UserError(str(error).splitlines()[0], key="adapter.method", fix="set ppo.models: separate") from None


def train_only(model: Any, adapters: list[str]) -> None:
    """requires_grad, and float32, for what peft trains of these adapters and for nothing else."""
    trained: set[int] = set()
    for adapter in adapters:
        model.set_adapter(adapter)  # peft knows which of an adapter's tensors learn
        trained |= {id(p) for n, p in model.named_parameters() if p.requires_grad and adapter in n.split(".")}
        trained |= {id(p) for n, p in model.named_parameters() if n.startswith(f"prompt_encoder.{adapter}.")}
    model.set_adapter(POLICY)
    for parameter in model.parameters():
        parameter.requires_grad = id(parameter) in trained
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
