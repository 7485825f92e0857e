"""Where training starts: the base in memory, with what is trained on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from finetune import child, ranks
from finetune.adapters.load import apply, as_score_task, loads_trainable, prepare, weights_dtype
from finetune.adapters.methods import without_head
from finetune.adapters.multiple import HEAD_WEIGHTS
from finetune.base import Base
from finetune.errors import RunError, UserError
from finetune.models import attach, loading, sources, tensor_parallel
from finetune.models.score_head import with_score_head
from finetune.recipe.resolve import Hardware
from finetune.recipe.stages import DpoRecipe, KtoRecipe, Recipe, RewardRecipe
from finetune.run.directory import Run
from finetune.terminal.progress import command
from finetune.training import sharded


def seed_everything(recipe: Recipe) -> None:
    """Before any weight is drawn."""
    set_seed(recipe.train.seed)


def policy(recipe: Recipe, base: Base, machine: Hardware) -> Any:
    """The model to train: the base with a fresh adapter, or with that of model.adapter."""

    def adapted(network: Any) -> Any:
        if base.model.adapter is None:
            return apply(network, recipe.adapter, base.tokenizer, base.folder)
        start = sources.adapter_folder(base.model.adapter)
        model = attach.attach_adapter(network, start, base.model, trainable=loads_trainable(start))
        prepare(model)
        return model

    return begun(recipe, base, loaded(recipe, base, machine), adapted)


def reward_model(recipe: RewardRecipe, base: Base, machine: Hardware) -> Any:
    """The base with a score head and an adapter: fresh, or started from that of model.adapter."""

    def scored(network: Any) -> Any:
        return scoring(recipe, base, with_score_head(network, base.model.name))

    return begun(recipe, base, loaded(recipe, base, machine), scored)


def scoring(recipe: RewardRecipe, base: Base, scored: Any) -> Any:
    if base.model.adapter is None:
        section = without_head(recipe.adapter)  # that of the scores is always trained
        return apply(scored, section, base.tokenizer, base.folder, as_score_task)
    start = sources.adapter_folder(base.model.adapter)
    weight = scored.score.weight.detach().cpu()  # the adapter brings none
    head = {HEAD_WEIGHTS[not loads_trainable(start)]: weight}
    model = attach.attach_adapter(scored, start, base.model, loads_trainable(start), as_score_task, head)
    for name, parameter in model.named_parameters():
        if name.endswith("score.modules_to_save.default.weight"):
            parameter.requires_grad = True
    prepare(model)
    return model


def begun(recipe: Recipe, base: Base, network: Any, adapted: Callable[[Any], Any]) -> Any:
    """`adapted(network)`, with the same start however many processes share it out."""
    if not ranks.side_by_side() or recipe.adapter.method == "full":
        return adapted(network)
    with torch.random.fork_rng():
        whole = loading.without_weights(base.model, weights_dtype(recipe))
    return tensor_parallel.with_adapter(network, adapted, whole)


def loaded(recipe: Recipe, base: Base, machine: Hardware) -> Any:
    """The network of the base, which can be trained on."""
    if sharded.read_once(recipe, base):
        if ranks.local_rank():
            return loading.without_weights(base.model, weights_dtype(recipe))
        machine = loading.CPU  # they need not fit one card
    network = loading.load_model(base.model, weights_dtype(recipe), machine, **tensor_parallel.options())
    loading.refuse_training(network, base.model.name)
    return network


def check_start(recipe: DpoRecipe | KtoRecipe) -> None:
    """UserError where there is nothing that dpo.start or kto.start could merge."""
    if recipe.model.adapter is None and getattr(recipe, recipe.stage).start == "merge":
        key = f"{recipe.stage}.start"
        raise UserError("there is no adapter to merge", key=key, fix="set model.adapter, or leave it out")


def merged_start(recipe: DpoRecipe | KtoRecipe, run: Run) -> Base:
    """The base with model.adapter merged into it in its original precision, in the run directory."""
    target = run.path / "start"
    ranks.from_first(lambda: merge_start(recipe, target))
    return Base.open(recipe.model.at(str(target), adapter=None), treatment=recipe.data.thinking)


def merge_start(recipe: DpoRecipe | KtoRecipe, target: Path) -> None:
    if not (target / "merge.json").exists():
        assert recipe.model.adapter is not None
        arguments = ["merge", f"--adapter={recipe.model.adapter}", f"--output={target}"]
        code, said = child.run(*arguments)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise RunError(f"{command(*arguments)} failed: {said[-400:]}")
