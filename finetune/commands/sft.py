"""`ft sft`: supervised fine-tuning of a recipe."""

from __future__ import annotations

from functools import partial
from typing import Any

from trl import SFTConfig

from finetune import ranks
from finetune.data import conversations
from finetune.evaluation import during
from finetune.recipe.stages import SftRecipe
from finetune.training.fit import finish_setup
from finetune.training.packing import one_row, pack_if_isolated, packing_outlook
from finetune.training.plan import longest_row, one_device, pad_multiple
from finetune.training.session import Session, prepare
from finetune.training.sft_trainer import Collator, Sft
from finetune.training.side_by_side import allow
from finetune.training.start import policy


def run(raw: SftRecipe, *, resume: bool = False, overwrite: bool = False, dry_run: bool = False) -> None:
    session = prepare(raw, resume)
    recipe, base = session.recipe, session.base
    load = partial(conversations.load_sft, seed=recipe.train.seed, eval_data=recipe.eval.paths)
    rows = ranks.once(lambda: load(recipe.data, base.encoder))
    session.during = during.prepare(recipe, session.base)
    session.plan(rows, longest_row(rows.train), also=packing_outlook(recipe) if dry_run else None)
    if dry_run:
        session.show()
        return
    with session.run(overwrite):
        model = policy(recipe, base, session.machine)
        allow(model, recipe, session.machine)
        train, reason = pack_if_isolated(recipe, model, rows.train)
        session.note(reason)
        session.train(make_trainer(session, model, train))


def make_trainer(session: Session[SftRecipe], model: Any, train: Any) -> Sft:
    """trl's SFTTrainer over encoded rows (input_ids, labels and, when packed, seq_lengths)."""
    packed = "seq_lengths" in train.column_names
    flat = one_row(model, packed)
    if packed:
        session.repack(len(train))
    config = SFTConfig(**session.arguments(), dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
    trainer = Sft(
        model=model,
        args=one_device(config),
        train_dataset=train,
        eval_dataset=session.rows.eval,
        processing_class=session.base.tokenizer,
        data_collator=Collator(
            pad_token_id=session.base.tokenizer.pad_token_id,
            padding_free=flat,
            return_position_ids=packed and not flat,
            boundaries=session.machine.device != "cpu",
            pad_to_multiple_of=None if flat else pad_multiple(session.machine),
        ),
        callbacks=session.callbacks(),
    )
    return finish_setup(trainer, session.recipe)
