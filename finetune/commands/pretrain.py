"""`ft pretrain`: next-token training on raw text, of any model or of a new one (`model.config`).

check recipe, output and text -> pack the text into blocks -> load or build the model -> train -> save and report.
Blocks are taken in the order of the text (a curriculum stays one), each exactly data.max_length tokens.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainingArguments

from finetune import ranks
from finetune.adapters.load import apply
from finetune.base import Base
from finetune.builtin import initial, tokenizers, world
from finetune.data import text
from finetune.models import loading
from finetune.models.chatglm.export import export_original, original_config
from finetune.recipe.stages import PretrainRecipe
from finetune.run.directory import Run
from finetune.training.finish import save, whole
from finetune.training.fit import finish_setup
from finetune.training.new_base import WORLD_CHATGLM3, open_base, world_texts
from finetune.training.plan import one_device
from finetune.training.session import Session, prepare
from finetune.training.start import policy
from finetune.training.trainers import Extras


class BlockTrainer(Extras, Trainer):
    """Keeps the order of the blocks."""

    block_length: int
    _total_train_tokens = 0  # trl's name, which `training.fit` reads

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        blocks = self.state.global_step * self.args.gradient_accumulation_steps * self.args.train_batch_size
        self._total_train_tokens = blocks * self.block_length  # of this process
        logs["num_tokens"] = ranks.total(self._total_train_tokens)
        super().log(logs, *args, **kwargs)


def run(raw: PretrainRecipe, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    session = prepare(raw, resume, open_base)
    recipe = session.recipe
    steps = recipe.train.max_steps
    load = partial(
        text.load_blocks, seed=recipe.train.seed, eval_data=recipe.eval.paths,
        wanted=steps and steps * recipe.train.effective_batch_size, is_new=recipe.model.is_new,
    )  # fmt: skip
    rows = ranks.once(lambda: load(recipe.data, session.base.tokenizer))
    session.plan(rows, recipe.data.max_length)
    if dry_run:
        session.show()
        return
    with session.run(overwrite):
        if recipe.model.is_new:
            model = new_model(recipe, session.base)
        else:
            model = policy(recipe, session.base, session.machine)
        written = partial(save_new, seen=rows.train.ids) if recipe.model.is_new else save
        session.train(make_trainer(session, model), save=written)


def new_model(recipe: PretrainRecipe, base: Base) -> Any:
    """A network with random weights that knows the tokenizer's ids."""
    tokenizer = base.tokenizer
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = {"vocab_size": len(tokenizer), **ids, **base.config}
    model = apply(loading.new_model(config, torch.float32), recipe.adapter)
    initial.calm_residuals(model)
    return model


def save_new(
    recipe: PretrainRecipe, run: Run, model: Any, base: Base, template: str | None, seen: torch.Tensor
) -> Path:
    """As `save`; with ChatGLM3's tokenizer in ChatGLM3's original layout."""
    initial.separate_unseen(model, seen)
    if recipe.model.tokenizer != WORLD_CHATGLM3:
        return save(recipe, run, model, base, template)
    model.to(getattr(torch, recipe.model.dtype))
    if model.config.tie_word_embeddings:  # the layout has a matrix for each
        model.get_output_embeddings().weight = nn.Parameter(model.get_output_embeddings().weight.detach().clone())
        model.config.tie_word_embeddings = False
    with whole(run.model) as folder:
        export_original(model, original_config(model.config), folder)
        (folder / "tokenizer.model").write_bytes(tokenizers.build_sentencepiece(world_texts(), world.HAN))
    return run.model


def make_trainer(session: Session[PretrainRecipe], model: Any) -> BlockTrainer:
    trainer = BlockTrainer(
        model=model,
        args=one_device(TrainingArguments(**session.arguments())),
        train_dataset=session.rows.train,
        eval_dataset=session.rows.eval,
        callbacks=session.callbacks(),
    )
    trainer.block_length = session.recipe.data.max_length
    return finish_setup(trainer, session.recipe)
