"""`ft pretrain`: next-token training on raw text, of any model or of a new one (`model.config`).

check recipe, output and text -> pack the text into blocks -> load or build the model -> train -> save and report.
Blocks are taken in the order of the text (a curriculum stays one), each exactly data.max_length tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import (
    GlmConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from finetune.adapters import compatibility
from finetune.adapters.load import apply, loads_trainable, prepare
from finetune.adapters.methods import check
from finetune.builtin import initial, tokenizers, world
from finetune.data import text as raw
from finetune.data.audit import Audit
from finetune.data.offsets import check_embedded
from finetune.data.samples import watched
from finetune.errors import UserError
from finetune.models import hardware, loading
from finetune.models.chatglm import export
from finetune.models.chatglm import tokenizer as chatglm_tokenizer
from finetune.models.rope import check_length
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import PretrainRecipe
from finetune.run.directory import Run
from finetune.run.opening import open_run
from finetune.run.resuming import check_resumable
from finetune.terminal.progress import task
from finetune.training import session
from finetune.training.trainers import Extras

WORLD_CHATGLM3 = "builtin:world/chatglm3"  # model.tokenizer: the world's tokenizer as a ChatGLM3 tokenizer.model


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Rows of one tensor (blocks, max_length) of token ids; every token is a label."""

    def __init__(self, blocks: list[list[int]]) -> None:
        self.ids = torch.tensor(blocks, dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index].long()
        return {"input_ids": ids, "labels": ids}


class _Trainer(Extras, Trainer):
    """Keeps the order of the blocks."""

    block_length: int
    _total_train_tokens = 0  # trl's name, which `training.fit` reads

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        blocks = self.state.global_step * self.args.gradient_accumulation_steps * self.args.train_batch_size
        logs["num_tokens"] = self._total_train_tokens = blocks * self.args.world_size * self.block_length
        super().log(logs, *args, **kwargs)


def run(raw_recipe: PretrainRecipe, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    machine = hardware.detect()
    recipe = session.resolved(raw_recipe, machine)
    if resume:
        check_resumable(recipe)
    compatibility.check(recipe)
    too_long = _check_base(recipe)
    tokenizer = _tokenizer(recipe)
    audit = None if raw.is_endless(recipe.data) else Audit(recipe.data, None, "text", recipe.eval.data)
    train, held_out = _blocks(recipe, tokenizer, audit)
    counts = {"rows": len(train), "dropped": 0, **(dict(audit.counts) if audit is not None else {})}
    counts |= {"blocks": len(train), "trained_tokens": len(train) * (recipe.data.max_length - 1)}
    plan = session.layout(recipe, len(train), len(train), machine)
    found = audit.warnings() if audit is not None else []
    few = session.few_rows(recipe, len(train))
    inputs = session.known_inputs(recipe, tokenizer, None, resume, dry_run)
    notes = session.announce(found, plan.total_steps, too_long, few, session.other_devices(recipe))
    if dry_run:
        session.show_plan(recipe, counts, plan)
        return

    session.start(recipe)
    model = _model(recipe, tokenizer, machine)

    with open_run(recipe, overwrite, resume) as folder:
        trainer = _make_trainer(recipe, folder, model, train, held_out, plan, machine)
        outcome = session.fit(trainer, folder, resume, inputs)
        if recipe.model.config is not None:
            initial.separate_unseen(model, train.ids)
        weights = _save(recipe, folder, model, tokenizer)
        session.finish(recipe, folder, trainer, outcome, counts, notes)
        session.summary(recipe, folder, weights)


def _tokenizer(recipe: PretrainRecipe) -> PreTrainedTokenizerBase:
    """The model's own, or that of `model.tokenizer` for a new model."""
    if recipe.model.config is None:
        return loading.load_tokenizer(recipe.model)
    name = recipe.model.tokenizer
    if name is None:
        raise UserError(
            "is needed with model.config", key="model.tokenizer", fix=f"give a folder, a hub id or {raw.WORLD}"
        )
    if name == raw.WORLD:
        with task("making the tokenizer", after=1.0):
            return cast(PreTrainedTokenizerBase, tokenizers.build_tokenizer(_world_texts(), world.HAN))
    if name == WORLD_CHATGLM3:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tokenizer.model").write_bytes(tokenizers.build_sentencepiece(_world_texts(), world.HAN))
            return chatglm_tokenizer.build_tokenizer(folder, version=3)
    return loading.load_tokenizer(ModelConfig(name=name, chat_template=recipe.model.chat_template))


def _world_texts() -> Iterator[str]:
    return islice(world.documents(0, 8_000), 8_000)


def _check_base(recipe: PretrainRecipe) -> str | None:
    """UserError for what can be wrong with base and adapter, before text is read or weights are loaded; a warning for
    blocks longer than the base was made for."""
    if recipe.model.config is not None:
        if recipe.adapter.method != "full":
            raise UserError("a new model has nothing to adapt", key="adapter.method", fix="use method: full")
        return None
    config = loading.read_config(recipe.model)
    compatibility.check_base(recipe, config)
    if recipe.model.adapter is None:
        check(loading.skeleton(recipe.model), recipe.adapter)
    return check_length(config, recipe.model, recipe.data.max_length)


def _blocks(
    recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase, audit: Audit | None
) -> tuple[Blocks, Blocks | None]:
    """(training blocks, held-out blocks) of the recipe's text; `audit` sees its rows."""
    data, train = recipe.data, recipe.train
    separator = raw.separator(tokenizer)

    def encode(text: str) -> list[int]:
        ids = cast(list[int], tokenizer.encode(text, add_special_tokens=False))
        if recipe.model.config is None:
            check_embedded(tokenizer, ids)
        return ids

    def packed(texts: Iterator[str]) -> Iterator[list[int]]:
        return raw.pack(texts, encode, data.max_length, separator)

    if raw.is_endless(data):
        if train.max_steps is None:
            raise UserError(f"{raw.WORLD} is endless", key="train.max_steps", fix="set a number of steps")
        if isinstance(data.eval_split, float):
            raise UserError(
                f"{raw.WORLD} is endless", key="data.eval_split", fix="give a number of blocks, not a share"
            )
        wanted = train.max_steps * train.effective_batch_size
        with task("making", wanted, "blocks of text") as advance:
            total = _documents_for(wanted, packed, recipe)
            blocks = list(counted(islice(packed(raw.documents(data, train.seed, total)), wanted), advance))
        other = raw.documents(data, train.seed + raw.EVAL_SEED, 1)
        held = list(islice(packed(other), data.eval_split)) if data.eval_split else []
    else:
        texts = watched(raw.documents(data, train.seed, 1, audit), data)
        kept: list[str] = []
        if data.eval_split is not None:
            kept, texts = raw.held_out(texts, data.eval_split)
        wanted_blocks = train.max_steps * train.effective_batch_size if train.max_steps else None
        blocks = list(islice(packed(texts), wanted_blocks))
        held = list(packed(iter(kept)))
        if audit is not None:
            audit.settle()
    if not blocks:
        raise UserError(
            f"the text does not fill one block of {data.max_length} tokens", path=str(data.train),
            key="data.max_length", fix="give more text or a smaller data.max_length",
        )  # fmt: skip
    if data.eval_split is not None and not held:
        raise UserError(
            f"the texts held out do not fill one block of {data.max_length} tokens", key="data.eval_split",
            fix="hold out more, or leave it out",
        )  # fmt: skip
    return Blocks(blocks), Blocks(held) if held else None


def counted(blocks: Iterator[list[int]], advance: Callable[[int], None]) -> Iterator[list[int]]:
    for block in blocks:
        advance(1)
        yield block


def _documents_for(blocks: int, packed: Any, recipe: PretrainRecipe) -> int:
    """How many documents of the endless world fill `blocks` blocks, measured on a thousandth of them."""
    sample, used = max(50, blocks // 1000), 0

    def drawn() -> Iterator[str]:
        nonlocal used
        for text in raw.documents(recipe.data, recipe.train.seed, 1):
            used += 1
            yield text

    found = len(list(islice(packed(drawn()), sample)))
    return blocks * used // found


def _model(recipe: PretrainRecipe, tokenizer: PreTrainedTokenizerBase, machine: Any) -> Any:
    """What is trained: the base with its adapter, fresh or continued, or a new model."""
    if recipe.model.config is None:
        loaded = loading.load_model(recipe.model, session.weights_dtype(recipe), machine)
        loading.refuse_training(loaded, recipe.model.name)
        if recipe.model.adapter is None:
            return apply(loaded, recipe.adapter, tokenizer, loading.folder(recipe.model))
        start = loading.adapter_folder(recipe.model.adapter)
        model = loading.attach_adapter(loaded, start, recipe.model, trainable=loads_trainable(start))
        prepare(model)
        return model
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = apply(loading.new_model({**ids, **recipe.model.config}, torch.float32), recipe.adapter)
    initial.calm_residuals(model)
    return model


def _save(recipe: PretrainRecipe, run: Run, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """As `training.save`; a new model with ChatGLM3's tokenizer is stored in ChatGLM3's original layout."""
    if recipe.model.tokenizer != WORLD_CHATGLM3:
        return session.save(recipe, run, model, tokenizer, None)
    model.to(getattr(torch, recipe.model.dtype))
    if model.config.tie_word_embeddings:  # the layout has a matrix for each
        model.get_output_embeddings().weight = nn.Parameter(model.get_output_embeddings().weight.detach().clone())
        model.config.tie_word_embeddings = False
    export.export_original(model, export.original_config(cast(GlmConfig, model.config)), run.model)
    (run.model / "tokenizer.model").write_bytes(tokenizers.build_sentencepiece(_world_texts(), world.HAN))
    return run.model


def _make_trainer(
    recipe: PretrainRecipe,
    run: Run,
    model: PreTrainedModel,
    train: Blocks,
    held_out: Blocks | None,
    plan: Any,
    machine: Any,
) -> _Trainer:
    config = TrainingArguments(**session.arguments(recipe, run, plan, machine, held_out is not None))
    trainer = _Trainer(
        model=model,
        args=session.one_device(config),
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=session.callbacks(recipe, run, held_out is not None),
    )
    trainer.block_length = recipe.data.max_length
    return cast(_Trainer, session.finish_setup(trainer, recipe))
