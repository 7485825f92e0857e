"""The models that answer: one, or several adapters beside each other on one base in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from finetune.adapters.methods import rewrites
from finetune.adapters.multiple import POLICY, ActiveAdapter, add_adapter
from finetune.base import Base
from finetune.data.asking import Prompter
from finetune.data.thinking import switched
from finetune.errors import UserError
from finetune.evaluation.answering import Writer
from finetune.evaluation.generation import not_followed, notice
from finetune.evaluation.targets import Target, model_target, plain_target, run_target
from finetune.models import adapter_files, hardware, sources, tokenizers
from finetune.models.identity import check_identity
from finetune.models.layouts import layout_of
from finetune.models.rope import context
from finetune.recipe.resolve import compute_dtype
from finetune.recipe.sections import ModelConfig
from finetune.terminal.progress import note


def targets_of(runs: Sequence[str], model: str | None, adapters: dict[str, str]) -> list[Target]:
    """The models and adapters by name. UserError where several do not sit on one base."""
    found = [plain_target(run, model) for run in runs]
    found += [replace(run_target(reference, model), name=name) for name, reference in adapters.items()]
    found = found or [model_target(str(model))]
    scorer = next((target for target in found if target.scores is not None), None)
    if scorer is not None:
        what = "is a reward model: it scores answers and gives none"
        raise UserError(what, path=scorer.name, fix="give a run of another stage")
    if len(found) == 1:
        return found
    if twice := next((name for name, count in Counter(t.name for t in found).items() if count > 1), None):
        raise UserError(f"two are called {twice}", key="--adapter", fix="name them: --adapter NAME=PATH")
    one, kinds = found[0], set()
    for target in found:
        fix = "take them one after another"
        if target.adapter is None:
            what = "is no adapter, and only adapters of one base answer together"
            raise UserError(what, path=target.name, fix=fix)
        if held_as(target.model) != held_as(one.model):
            raise UserError(f"has another base, or holds it otherwise, than {one.name}", path=target.name, fix=fix)
        kinds.add(adapter_files.described(target.adapter)["peft_type"])
        check_shares(target)
    if len(kinds) > 1:
        what = f"adapters of different kinds ({', '.join(sorted(kinds))}) cannot stand on one base in memory"
        raise UserError(what, key="--adapter", fix="take them one after another")
    return found


def held_as(model: ModelConfig) -> tuple[Any, ...]:
    """What must be equal for two to share a base in memory."""
    return sources.folder(model).resolve(), model.quantization, model.quantization_type, model.rope_scaling


def check_shares(target: Target) -> None:
    """UserError for an adapter that changes the base that others share."""
    base = Base.open(target.model)
    assert target.adapter is not None
    if changes_base(target) or layout_of(base.config).adapter(target.adapter, base.config) is not None:
        what = "has embeddings, a layout or a start of its own, and cannot share its base with other adapters"
        raise UserError(what, path=target.adapter, key="--adapter", fix="take it alone")
    check_identity(target.adapter, base.folder, target.model.name)


def changes_base(target: Target) -> bool:
    """Whether its base with the adapter off is another one than without it: there are embeddings of its own, or a start
    that peft takes out of the base's weights when it loads the adapter."""
    assert target.adapter is not None
    if rewrites(adapter_files.described(target.adapter).get("init_lora_weights")):
        return True
    native = layout_of(Base.open(target.model).config)
    grown = native.tokenizer is None and bool(tokenizers.added_tokens(target.model, target.adapter))
    return grown or bool(adapter_files.own_embeddings(target.adapter))


def writer_of(target: Target, system: str | None = None, raw: bool = False, thinking: str | None = None) -> Writer:
    """In the chat format that was trained."""
    base = Base.open(target.model, target.adapter or target.template, target.treatment)
    encoder = base.asking(switched(thinking or target.eval.thinking), "--thinking" if thinking else "eval.thinking")
    longest = context(base.config, target.model)
    forged = target.data.on_forged_marker == "allow"
    return Writer(target, base, Prompter(encoder, system, raw, longest, forged))


def load(writers: Sequence[Writer]) -> None:
    """The base once, with all adapters on it."""
    machine, first = hardware.detect(), writers[0]
    dtype = getattr(torch, compute_dtype(first.target.model.dtype, machine))
    network = replace(first.base, adapter=first.target.adapter).load(dtype, machine).eval()
    first.network = ActiveAdapter(network, None if first.target.adapter is None else POLICY)
    for number, writer in enumerate(writers[1:], 1):
        assert writer.target.adapter is not None
        try:
            add_adapter(network, writer.target.adapter, name := f"beside_{number}")
        except UserError as error:
            raise UserError(error.problems[0].message, path=writer.target.adapter, fix="take it alone") from None
        writer.network = ActiveAdapter(network, name)
    network.eval()
    if (ignored := notice(not_followed(network))) is not None:
        note(ignored)


def share(loaded: Writer, base: Writer) -> None:
    """Let the base answer on what is loaded already, with all adapters off."""
    assert loaded.network is not None
    base.network = replace(loaded.network, adapter=None)
