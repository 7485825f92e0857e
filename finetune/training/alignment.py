"""The trainers of `ft dpo`, `ft kto` and `ft reward`, and what their reference is.

    policy(recipe, …)        the model to train, and whether its reference is a frozen copy of where it starts
    dpo_trainer, kto_trainer, reward_trainer

Where the reference comes from: a fresh adapter starts as the base, so the base with the adapter off is the reference;
an adapter that is trained on (model.adapter) has a frozen copy of itself beside it, and so has a fresh one whose start
rewrites the base (pissa, olora) or makes up for its rounding (loftq). Its log-probabilities are computed once and kept
on disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import DPOConfig, KTOConfig, RewardConfig

from finetune.adapters.load import adapter_config
from finetune.adapters.lora_init import rewrites_base
from finetune.adapters.methods import of
from finetune.base import Base
from finetune.data.rows import Rows
from finetune.data.token_cache import cache_folder
from finetune.errors import UserError
from finetune.models import loading
from finetune.models.adapter_files import weights
from finetune.models.identity import fingerprint
from finetune.recipe.resolve import Hardware
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import DpoRecipe, KtoRecipe, PpoRecipe, RewardRecipe
from finetune.run.directory import Run
from finetune.training import start, trainers
from finetune.training.fit import callbacks, finish_setup
from finetune.training.plan import Layout, arguments, one_device, pad_multiple
from finetune.training.preference import PairCollator, ScoreCollator


def policy(recipe: DpoRecipe | KtoRecipe | PpoRecipe, base: Base, machine: Hardware) -> tuple[Any, bool]:
    """(the model to train, whether its reference is a frozen copy of it)."""
    return start.policy(recipe, base, machine), base.model.adapter is not None or moves_reference(recipe.adapter)


def check_continues(recipe: DpoRecipe | KtoRecipe) -> None:
    """UserError where model.adapter cannot be what dpo.start or kto.start says."""
    key, how = f"{recipe.stage}.start", getattr(recipe, recipe.stage).start
    if recipe.model.adapter is None and how == "merge":
        raise UserError("there is no adapter to merge", key=key, fix="set model.adapter, or leave it out")
    if recipe.model.adapter is not None and how == "continue":
        folder = loading.adapter_folder(recipe.model.adapter)
        if of(adapter_config(folder)["peft_type"]).cuts_ranks:
            what = "AdaLoRA can stand on a base only once, and the reference would be a second copy of this adapter"
            raise UserError(what, path=folder, key="model.adapter", fix=f"set {key}: merge")


# Of what is kept: 1 had other references where an adapter was continued, 2 rounded adapters on quantized bases and one
# name for every precision of `full`.
REFERENCE_VERSION = "3"


def moves_reference(section: Any) -> bool:
    """Whether a fresh adapter's start, and not the base with the adapter off, is the reference."""
    return rewrites_base(section) or getattr(section, "init_lora_weights", None) == "loftq"


def reference_key(recipe: DpoRecipe | KtoRecipe, base: ModelConfig) -> str:
    """What identifies the reference: base, quantization, precision, and the adapter it starts from."""
    parts = [REFERENCE_VERSION, fingerprint(loading.folder(base)), str(base.quantization), base.quantization_type]
    parts += [recipe.model.dtype, str(start.weights_dtype(recipe))]  # what computes, and what holds the weights
    parts += [str(base.rope_scaling), str(base.attn_implementation)]
    if base.adapter is not None:
        parts.append(fingerprint_of_adapter(loading.adapter_folder(base.adapter)))
    elif moves_reference(recipe.adapter):
        parts.append(f"{recipe.adapter!r} {recipe.train.seed}")
    return " ".join(parts)


def fingerprint_of_adapter(folder: Path) -> str:
    import hashlib

    files = [folder / "adapter_config.json", weights(folder)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def dpo_trainer(
    recipe: DpoRecipe, run: Run, model: Any, copy: bool, base: ModelConfig, parts: Base, data: Rows,
    plan: Layout, machine: Hardware,
) -> Any:  # fmt: skip
    """trl's DPOTrainer with the recipe's objective."""
    dpo = recipe.dpo
    loss = "sigmoid" if dpo.loss_type in trainers.REFERENCE_FREE else dpo.loss_type
    config = DPOConfig(
        **arguments(recipe, run, plan, machine, data.eval is not None),
        loss_type=[loss],
        beta=dpo.beta,
        label_smoothing=dpo.label_smoothing,
        precompute_ref_log_probs=True,
        max_length=None,
    )
    one_device(config)
    trainer = trainers.Dpo(
        dpo=dpo,
        copy=copy,
        reference=reference_key(recipe, base),
        cache=cache_folder() / "reference",
        model=model,
        args=config,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=parts.tokenizer,
        data_collator=PairCollator(parts.tokenizer.pad_token_id, pad_multiple(machine)),
        callbacks=callbacks(recipe, run, data.eval is not None),
    )
    return finish_setup(trainer, recipe)


def kto_trainer(
    recipe: KtoRecipe, run: Run, model: Any, copy: bool, parts: Base, data: Rows, plan: Layout,
    machine: Hardware,
) -> Any:  # fmt: skip
    """trl's KTOTrainer with the recipe's objective."""
    kto = recipe.kto
    config = KTOConfig(
        **arguments(recipe, run, plan, machine, data.eval is not None),
        beta=kto.beta,
        desirable_weight=kto.desirable_weight,
        undesirable_weight=kto.undesirable_weight,
        max_length=None,
    )
    one_device(config)
    trainer = trainers.Kto(
        copy=copy,
        model=model,
        args=config,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=parts.tokenizer,
        callbacks=callbacks(recipe, run, data.eval is not None),
    )
    return finish_setup(trainer, recipe)


def reward_trainer(
    recipe: RewardRecipe, run: Run, model: Any, parts: Base, data: Rows, plan: Layout, machine: Hardware
) -> Any:
    """trl's RewardTrainer with the recipe's objective."""
    config = RewardConfig(
        **arguments(recipe, run, plan, machine, data.eval is not None),
        center_rewards_coefficient=recipe.reward.center_rewards_coefficient,
        disable_dropout=False,
        max_length=None,
    )
    one_device(config)
    trainer = trainers.Reward(
        model=model,
        args=config,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=parts.tokenizer,
        data_collator=ScoreCollator(parts.tokenizer.pad_token_id, recipe.reward.margin, pad_multiple(machine)),
        callbacks=callbacks(recipe, run, data.eval is not None),
    )
    return finish_setup(trainer, recipe)
