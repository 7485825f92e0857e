"""The models of PPO: policy, reference, reward and value, on one base in memory or each on its own.

The reward model is a run of `ft reward` on the same base; the value model starts as a copy of it, or without one as a
copy of the policy.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters import multiple
from finetune.adapters.load import loads_trainable, prepare, weights_dtype
from finetune.adapters.lora_init import rewrites_base
from finetune.adapters.methods import METHODS
from finetune.adapters.multiple import POLICY, REFERENCE, REWARD, VALUE, ActiveAdapter
from finetune.base import Base
from finetune.errors import UserError
from finetune.evaluation.rewards import RewardModel, check_model, checkpoint_of, is_reward_run
from finetune.models import adapter_files, attach, documents, loading, sources
from finetune.models.hardware import input_device
from finetune.models.identity import check_identity
from finetune.recipe.resolve import Hardware
from finetune.recipe.stages import PpoRecipe
from finetune.training import start


@dataclass
class PpoModels:
    policy: ActiveAdapter
    ref: ActiveAdapter
    value: ActiveAdapter
    value_head: nn.Linear
    reward: tuple[ActiveAdapter, nn.Linear] | None = None
    """Adapter and score head of a reward model on the policy's base."""
    reward_model: RewardModel | None = None
    """One with a base of its own."""
    dtype: torch.dtype = torch.float32
    """Of the computation."""

    @functools.cached_property
    def layers(self) -> list[Any] | None:
        """Those that hold the adapters, where the models share a base: a rollout switches hundreds of times."""
        return multiple.layers_of(self.policy.model)

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    @contextmanager
    def active(self, which: ActiveAdapter) -> Iterator[Any]:
        """One of the models, in training mode and in the precision of the computation."""
        enabled = self.dtype != torch.float32
        layers = self.layers if which.model is self.policy.model else None
        with torch.autocast(self.device.type, self.dtype, enabled=enabled), multiple.activated(which, layers) as model:
            if not model.training:
                model.train()
            yield model

    def trained(self) -> list[Any]:
        """The networks with something to train in them, once each."""
        return [self.policy.model, *([] if self.value.model is self.policy.model else [self.value.model])]

    def networks(self) -> list[Any]:
        """All that policy, reference and values are computed with, once each."""
        return list({id(m): m for m in (self.policy.model, self.ref.model, self.value.model)}.values())


def check(recipe: PpoRecipe) -> None:
    """UserError for what cannot stand on one base, and for AdaLoRA."""
    if METHODS[recipe.adapter.method].cuts_ranks:
        why = "AdaLoRA shares out its ranks over a number of updates that must be known, and PPO may leave some out"
        raise UserError(why, key="adapter.method", fix="use lora")
    if recipe.ppo.models == "separate":
        if recipe.reward.model is not None:
            check_model(recipe.reward.model)
        return
    section, key, fix = recipe.adapter, "ppo.models", "set ppo.models: separate"
    if section.method == "full":
        raise UserError("full fine-tuning changes the base that reference and value model stand on", key=key, fix=fix)
    model = recipe.reward.model
    if rewrites_base(section) and recipe.model.adapter is None and (model or recipe.reward.train):
        what = f"init_lora_weights: {section.init_lora_weights} rewrites the base that the reward model stands on"  # type: ignore[union-attr]
        raise UserError(what, key=key, fix=fix)
    if model is None:
        return
    if not Path(model).exists():
        checkpoint_of(model)  # says so when it is a path to nowhere
        raise UserError("a reward model from a hub has a base of its own", path=model, key=key, fix=fix)
    if not is_reward_run(model) or not (Path(model) / "adapter").is_dir():
        raise UserError(
            "is no run of `ft reward` with an adapter, and has a base of its own", path=model, key=key, fix=fix
        )
    check_shared(recipe, Path(model) / "adapter")


def check_shared(recipe: PpoRecipe, reward: Path) -> None:
    """UserError unless the reward adapter is of the policy's type and base."""
    check_identity(reward, sources.folder(recipe.model), recipe.model.name)
    if recipe.model.adapter is not None:
        ours = adapter_files.described(sources.adapter_folder(recipe.model.adapter))["peft_type"]
    else:
        ours = recipe.adapter.method.upper()
    theirs = adapter_files.described(reward)["peft_type"]
    if ours != theirs:
        raise UserError(
            f"the reward model is {theirs}, the policy {ours}: peft holds adapters of one type on a base",
            path=reward, key="ppo.models", fix=f"train it with {ours.lower()}, or set ppo.models: separate",
        )  # fmt: skip


def build(recipe: PpoRecipe, base: Base, machine: Hardware, reward: str | None) -> PpoModels:
    """Load and place everything. `reward`: a run of `ft reward` or a classification model; None with rules only."""
    make = _shared if recipe.ppo.models == "shared" else _separate
    models = make(recipe, base, machine, reward)
    models.dtype = getattr(torch, recipe.model.dtype)
    freeze_unread(models.value)
    for network in models.networks():
        no_dropout(network)
        documents.use(network)
    if recipe.train.gradient_checkpointing:
        for network in models.trained():
            if not network.supports_gradient_checkpointing:
                continue
            network.gradient_checkpointing_enable({"use_reentrant": False})
            network.enable_input_require_grads()
    return models


def _shared(recipe: PpoRecipe, base: Base, machine: Hardware, reward: str | None) -> PpoModels:
    model = start.policy(recipe, base, machine)
    starts_as_base = METHODS[recipe.adapter.method].starts_as_base(recipe.adapter)
    ref = None if starts_as_base and recipe.model.adapter is None else REFERENCE
    if ref is not None:
        multiple.copy_adapter(model, POLICY, ref)
    scored = None
    if reward is not None:
        folder = sources.adapter_folder(reward)
        check_shared(recipe, folder)
        weight = multiple.add_adapter(model, folder, REWARD)
        scored = ActiveAdapter(model, REWARD), frozen_head(model, weight, folder)
    multiple.copy_adapter(model, REWARD if reward is not None else POLICY, VALUE)
    multiple.train_only(model, [POLICY, VALUE])
    return PpoModels(
        ActiveAdapter(model, POLICY), ActiveAdapter(model, ref), ActiveAdapter(model, VALUE), new_head(model), scored
    )


def _separate(recipe: PpoRecipe, base: Base, machine: Hardware, reward: str | None) -> PpoModels:
    def policy() -> Any:
        start.seed_everything(recipe)  # every copy starts from the same draw
        return start.policy(recipe, base, machine)

    def alone(network: Any) -> ActiveAdapter:
        return ActiveAdapter(network, POLICY if hasattr(network, "peft_config") else None)

    model, ref = policy(), policy()
    reward_model, value = None, None
    if reward is not None:
        dtype = weights_dtype(recipe)
        reward_model = RewardModel.load(reward, dtype, machine)
        reward_model.model.requires_grad_(False)
        folder = Path(reward) / "adapter"
        if folder.is_dir() and same_base(recipe, folder):
            network = loading.load_model(recipe.model, dtype, machine)
            value = attach.attach_adapter(network, folder, recipe.model, loads_trainable(folder), multiple.as_causal)
            prepare(value)
    value = policy() if value is None else value
    ref.requires_grad_(False)
    return PpoModels(alone(model), alone(ref), alone(value), new_head(value), reward_model=reward_model)


def freeze_unread(value: ActiveAdapter) -> None:
    """Values are read before the output head: what is trained of it for them would never see a gradient."""
    head = value.model.get_output_embeddings()
    embeddings = {id(p) for p in value.model.get_input_embeddings().parameters()}  # the same, where they are tied
    for name, parameter in head.named_parameters():
        if value.adapter in (None, *name.split(".")) and id(parameter) not in embeddings:
            parameter.requires_grad = False


def same_base(recipe: PpoRecipe, reward: Path) -> bool:
    try:
        check_identity(reward, sources.folder(recipe.model), recipe.model.name)
    except UserError:
        return False
    return True


def hidden_size(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def new_head(model: Any) -> nn.Linear:
    """Values start at zero: the first advantages are then the rewards themselves."""
    head = nn.Linear(hidden_size(model), 1, device=input_device(model), dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def frozen_head(model: Any, weight: torch.Tensor | None, folder: Path) -> nn.Linear:
    if weight is None:
        raise UserError("holds no score head", path=folder, key="reward.model", fix="give a run of `ft reward`")
    head = nn.Linear(hidden_size(model), 1, bias=False, device=input_device(model), dtype=torch.float32)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head.requires_grad_(False)


def no_dropout(model: Any) -> None:
    """Dropout 0, and no noise on what chooses experts: of 0.05 alone the ratios of an unchanged policy run from 0.84 to
    1.33."""
    for module in model.modules():
        if "Dropout" in type(module).__name__ and hasattr(module, "p"):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
            elif "dropout" in name and isinstance(value, dict):  # by adapter
                value.update({adapter: 0.0 for adapter, p in value.items() if isinstance(p, float)})
            elif name == "bottleneck_settings":
                value.update({a: dataclasses.replace(config, bottleneck_dropout=0.0) for a, config in value.items()})
