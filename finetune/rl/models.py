"""Who computes in PPO: policy, reference, reward and value, on one base in memory or each on its own.

    check(recipe)                   what cannot share a base, before anything is loaded
    build(recipe, …) -> Actors      shared: adapters of one type on one base; separate: a model for each

The reward model is a run of `ft reward` on the same base; the value model starts as a copy of it, or without one as a
copy of the policy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.adapters.load import loads_trainable, prepare
from finetune.adapters.lora_init import rewrites_base
from finetune.adapters.methods import METHODS
from finetune.adapters.multiple import (
    POLICY,
    REFERENCE,
    REWARD,
    VALUE,
    Seat,
    add_adapter,
    as_causal,
    copy_adapter,
    train_only,
)
from finetune.errors import UserError
from finetune.evaluation.rewards import RewardModel, check_model, checkpoint_of, is_reward_run, peft_type_of
from finetune.models import loading
from finetune.models.hardware import input_device
from finetune.models.identity import check_identity
from finetune.recipe.adapters import Adapter
from finetune.recipe.resolve import Hardware
from finetune.recipe.stages import PpoRecipe
from finetune.training import alignment, session


@dataclass
class Actors:
    policy: Seat
    reference: Seat
    value: Seat
    value_head: nn.Linear
    reward: Seat | None = None
    reward_head: nn.Linear | None = None
    judge: RewardModel | None = None
    """The reward model where it is not on the policy's base."""

    def trained_models(self) -> list[Any]:
        """The models with something to train in them, once each."""
        models = [self.policy.model]
        return models if self.value.model is self.policy.model else [*models, self.value.model]

    def all_models(self) -> Iterator[Any]:
        seen: set[int] = set()
        for seat in (self.policy, self.reference, self.value, self.reward):
            if seat is not None and id(seat.model) not in seen:
                seen.add(id(seat.model))
                yield seat.model


def check(recipe: PpoRecipe) -> None:
    """UserError for what cannot stand on one base, and for AdaLoRA."""
    if recipe.adapter.method == "adalora":
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
    check_identity(reward, loading.folder(recipe.model), recipe.model.name)
    if recipe.model.adapter is not None:
        ours = peft_type_of(loading.adapter_folder(recipe.model.adapter))
    else:
        made: Any = METHODS[recipe.adapter.method](loading.skeleton(recipe.model), recipe.adapter)
        ours = str(made.peft_type.value)
    theirs = peft_type_of(reward)
    if ours != theirs:
        raise UserError(
            f"the reward model is {theirs}, the policy {ours}: peft holds adapters of one type on a base",
            path=reward, key="ppo.models", fix=f"train it with {ours.lower()}, or set ppo.models: separate",
        )  # fmt: skip


def build(recipe: PpoRecipe, parts: alignment.Parts, machine: Hardware, reward: str | None) -> Actors:
    """Load and place everything. `reward`: a run of `ft reward` or a classification model; None with rules only."""
    make = _shared if recipe.ppo.models == "shared" else _separate
    actors = make(recipe, parts, machine, reward)
    for model in actors.all_models():
        no_dropout(model)
        if recipe.train.gradient_checkpointing and model in actors.trained_models():
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    return actors


def _shared(recipe: PpoRecipe, parts: alignment.Parts, machine: Hardware, reward: str | None) -> Actors:
    model = alignment.policy(recipe, recipe.model, parts, machine)
    copied = recipe.model.adapter is not None or not starts_as_base(recipe.adapter)
    if copied:
        copy_adapter(model, POLICY, REFERENCE)
    actors = Actors(
        Seat(model, POLICY), Seat(model, REFERENCE if copied else None), Seat(model, VALUE), new_head(model)
    )
    if reward is not None:
        folder = loading.adapter_folder(reward)
        check_shared(recipe, folder)
        weight = add_adapter(model, folder, REWARD)
        actors.reward, actors.reward_head = Seat(model, REWARD), frozen_head(model, weight, folder)
    copy_adapter(model, REWARD if reward is not None else POLICY, VALUE)
    train_only(model, [POLICY, VALUE])
    freeze_unread(actors.value)
    return actors


def _separate(recipe: PpoRecipe, parts: alignment.Parts, machine: Hardware, reward: str | None) -> Actors:
    def policy() -> Any:
        session.start(recipe)  # every copy starts from the same draw
        return alignment.policy(recipe, recipe.model, parts, machine)

    model, reference = policy(), policy()
    judge, value = None, None
    if reward is not None:
        dtype = session.weights_dtype(recipe)
        judge = RewardModel.load(reward, dtype, machine)
        folder = Path(reward) / "adapter"
        if folder.is_dir() and same_base(recipe, folder):
            network = loading.load_model(recipe.model, dtype, machine)
            value = loading.attach_adapter(network, folder, recipe.model, loads_trainable(folder), as_causal)
            prepare(value)
    value = policy() if value is None else value
    for frozen in (reference, *([judge.model] if judge else [])):
        frozen.requires_grad_(False)
    actors = Actors(_own(model), _own(reference), _own(value), new_head(value), judge=judge)
    freeze_unread(actors.value)
    return actors


def starts_as_base(section: Adapter) -> bool:
    """Whether a fresh adapter computes what the base does."""
    if section.method in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        return False
    return not alignment.moves_reference(section)


def freeze_unread(value: Seat) -> None:
    """Values are read before the output head: what is trained of it for them would never see a gradient."""
    head = value.model.get_output_embeddings()
    embeddings = {id(p) for p in value.model.get_input_embeddings().parameters()}  # the same, where they are tied
    for name, parameter in head.named_parameters():
        if value.adapter in (None, *name.split(".")) and id(parameter) not in embeddings:
            parameter.requires_grad = False


def _own(model: Any) -> Seat:
    return Seat(model, POLICY if hasattr(model, "peft_config") else None)


def same_base(recipe: PpoRecipe, reward: Path) -> bool:
    try:
        check_identity(reward, loading.folder(recipe.model), recipe.model.name)
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
    """Dropout 0: of 0.05 alone the ratios of an unchanged policy run from 0.84 to 1.33."""
    for module in model.modules():
        if "Dropout" in type(module).__name__ and hasattr(module, "p"):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
            elif "dropout" in name and isinstance(value, dict):  # by adapter
                value.update({adapter: 0.0 for adapter, p in value.items() if isinstance(p, float)})
            elif name == "bottleneck_settings":
                value.update({a: dataclasses.replace(config, bottleneck_dropout=0.0) for a, config in value.items()})
