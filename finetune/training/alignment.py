"""Learning from preferences: what `ft dpo`, `ft kto` and `ft reward` share before and around the training loop.

    run_stage(recipe, …)     a whole run, given how to load rows and make the trainer
    check(recipe)            tokenizer and encoder, after everything that can be checked without weights
    policy(recipe, …)        the model to train
    reward_model(recipe, …)  the model to train, with a score head
    dpo_trainer, kto_trainer, reward_trainer

The reference is the policy before its first step: its log-probabilities are computed then, and kept (`reference`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trl import DPOConfig, KTOConfig, RewardConfig

from finetune.adapters import compatibility, soft_prompts
from finetune.adapters.load import apply, as_score_task, loads_trainable, prepare
from finetune.adapters.lora_init import rewrites_base
from finetune.adapters.methods import check as check_targets
from finetune.adapters.multiple import HEAD_WEIGHTS
from finetune.data.chat import make_encoder
from finetune.data.conversations import SftData
from finetune.data.token_cache import cache_folder
from finetune.errors import RunError, UserError
from finetune.families import family
from finetune.models import hardware, loading
from finetune.models.adapter_files import weights
from finetune.models.identity import fingerprint
from finetune.models.quantization import is_held_quantized
from finetune.models.rope import check_length
from finetune.models.score_head import with_score_head
from finetune.recipe.adapters import LastLayersAdapter
from finetune.recipe.resolve import Hardware
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import DpoRecipe, KtoRecipe, PpoRecipe, RewardRecipe
from finetune.run import Run, check_resumable, open_run
from finetune.terminal.progress import command, warn
from finetune.training import preference_trainers, reference, session
from finetune.training.preference import PairCollator, ScoreCollator, with_other_answers


@dataclass(frozen=True)
class Parts:
    tokenizer: Any
    encoder: Any
    config: dict[str, Any]
    """config.json of the base."""


R = TypeVar("R", DpoRecipe, KtoRecipe, RewardRecipe)
Maker = Callable[[R, Run, Parts, SftData, session.Layout, Hardware], tuple[Any, ModelConfig, Any]]


def check(recipe: DpoRecipe | KtoRecipe | RewardRecipe | PpoRecipe) -> Parts:
    """UserError for what recipe, config.json and tokenizer can be wrong in."""
    compatibility.check(recipe)
    config = loading.read_config(recipe.model)
    compatibility.check_base(recipe, config)
    if recipe.stage == "reward" and recipe.data.train_on != "assistant":
        what = "has no effect in ft reward: an answer is scored at its end"
        raise UserError(what, key="data.train_on", fix="leave it out")
    if recipe.stage == "kto" and recipe.data.train_on == "all":
        what = "KTO measures its KL term on other prompts' answers, and with `all` a prompt is part of the answer"
        raise UserError(what, key="data.train_on", fix="leave it out")
    if recipe.model.adapter is None:
        if getattr(getattr(recipe, recipe.stage), "start", "continue") == "merge":
            key = f"{recipe.stage}.start"
            raise UserError("there is no adapter to merge", key=key, fix="set model.adapter, or leave it out")
        check_targets(loading.skeleton(recipe.model), recipe.adapter, is_held_quantized(recipe.model, config))
    tokenizer = loading.load_tokenizer(recipe.model)
    return Parts(tokenizer, make_encoder(tokenizer, family(config["model_type"])), config)


def run_stage(
    raw: R, resume: bool, overwrite: bool, dry_run: bool, load: Callable[[R, Parts], SftData], make: Maker[R],
    look: Callable[[Run], str | None] = lambda run: None,
) -> None:  # fmt: skip
    """What the three stages do alike: check recipe, output and pairs -> make model and trainer -> train, save, report.

    Args:
        load: the rows to train on.
        make: the model, the base its adapter sits on, and the trainer.
        look: what the finished run's metrics should warn of.
    """
    machine = hardware.detect()
    recipe = session.resolved(raw, machine)
    if resume:
        check_resumable(recipe)
    parts = check(recipe)
    data = load(recipe, parts)
    too_long = check_length(parts.config, recipe.model, session.longest_row(data.train))
    plan = session.layout(recipe, len(data.train), len(data.train), machine)
    check_step(recipe, plan, data.train)
    inputs = session.known_inputs(recipe, parts.tokenizer, parts.encoder.template, resume, dry_run)
    few = session.few_rows(recipe, len(data.train))
    notes = session.announce(data.warnings, plan.total_steps, too_long, few, session.other_devices(recipe))
    if dry_run:
        session.show_plan(recipe, data.counts, plan)
        return

    with open_run(recipe, overwrite, resume) as folder:
        session.start(recipe)
        with session.memory_advice("data.max_length"):  # the reference's pass comes with the trainer
            model, base, trainer = make(recipe, folder, parts, data, plan, machine)
        outcome = session.fit(trainer, folder, resume, inputs)
        weights = session.save(recipe, folder, model, parts.tokenizer, parts.encoder.template, base)
        if (reason := look(folder)) is not None:
            warn(reason)
            notes.append(reason)
        session.finish(recipe, folder, trainer, outcome, data.counts, notes, base)
        session.summary(recipe, folder, weights)


def check_step(recipe: DpoRecipe | KtoRecipe | RewardRecipe, plan: session.Layout, rows: Any) -> None:
    """UserError for an objective that needs several rows or prompts beside each other, where there is one."""
    if recipe.stage == "kto" and plan.rows_per_pass * plan.accumulation < 2:
        what = "KTO's KL term is a mean over the rows of a step, and one is alone in it"
        raise UserError(what, key="train.effective_batch_size", fix="set it to 2 or more")
    if recipe.stage == "kto" and len({tuple(ids) for ids in rows["prompt_ids"]}) < 2:
        what = "every answer is to the same prompt, and KTO's KL term is measured on answers to others"
        raise UserError(what, key="data.train", fix="give rows with other prompts, too")
    if isinstance(recipe, DpoRecipe) and recipe.dpo.loss_type in preference_trainers.SORTED and plan.accumulation > 1:
        pairs = plan.rows_per_pass * plan.accumulation
        what = f"{recipe.dpo.loss_type} sorts the pairs of a step, and a pass holds {plan.rows_per_pass} of {pairs}"
        fix = f"set it to {pairs} and train.gradient_accumulation_steps to 1, or use another dpo.loss_type"
        raise UserError(what, key="train.per_device_train_batch_size", fix=fix)


def merged_start(recipe: DpoRecipe | KtoRecipe, run: Run) -> ModelConfig:
    """The base with model.adapter merged into it in its original precision, in the run directory."""
    target = run.path / "start"
    if not (target / "merge.json").exists():
        assert recipe.model.adapter is not None
        arguments = ["merge", f"--adapter={recipe.model.adapter}", f"--output={target}"]
        done = subprocess.run(
            [sys.executable, "-m", "finetune", *arguments], capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            raise RunError(f"{command(*arguments)} failed: {done.stderr.strip()[-400:]}")
    return recipe.model.model_copy(update={"name": str(target), "adapter": None, "revision": None, "source": None})


def policy(recipe: DpoRecipe | KtoRecipe | PpoRecipe, base: ModelConfig, parts: Parts, machine: Hardware) -> Any:
    """The model to train: `base` with a fresh adapter, or with its own."""
    network = loading.load_model(base, session.weights_dtype(recipe), machine)
    loading.refuse_training(network, base.name)
    if base.adapter is None:
        return apply(network, recipe.adapter, parts.tokenizer, loading.folder(base))
    start = loading.adapter_folder(base.adapter)
    model = loading.attach_adapter(network, start, base, trainable=loads_trainable(start))
    prepare(model)
    return model


def reward_model(recipe: RewardRecipe, parts: Parts, machine: Hardware) -> Any:
    """The base with a score head and an adapter: fresh, or started from that of model.adapter."""
    network = loading.load_model(recipe.model, session.weights_dtype(recipe), machine)
    loading.refuse_training(network, recipe.model.name)
    scored = with_score_head(network, recipe.model.name)
    if recipe.model.adapter is None:
        section, where = recipe.adapter, loading.folder(recipe.model)
        if isinstance(section, LastLayersAdapter):
            section = section.model_copy(update={"head": False})  # that of the scores is always trained
        return apply(scored, section, parts.tokenizer, where, as_score_task)
    start = loading.adapter_folder(recipe.model.adapter)
    weight = scored.score.weight.detach().cpu()  # the adapter brings none
    head = {HEAD_WEIGHTS[not loads_trainable(start)]: weight}
    model = loading.attach_adapter(scored, start, recipe.model, loads_trainable(start), as_score_task, head)
    for name, parameter in model.named_parameters():
        if name.endswith("score.modules_to_save.default.weight"):
            parameter.requires_grad = True
    prepare(model)
    return model


# Of what is kept: 1 had other references where an adapter was continued, 2 rounded adapters on quantized bases and one
# name for every precision of `full`.
REFERENCE_VERSION = "3"


def moves_reference(section: Any) -> bool:
    """Whether a fresh adapter's start is not the base as it is held."""
    return rewrites_base(section) or getattr(section, "init_lora_weights", None) == "loftq"


def reference_key(recipe: DpoRecipe | KtoRecipe, base: ModelConfig) -> str:
    """What identifies the reference: base, quantization, precision, and the adapter it starts from."""
    parts = [REFERENCE_VERSION, fingerprint(loading.folder(base)), str(base.quantization), base.quantization_type]
    parts += [recipe.model.dtype, str(session.weights_dtype(recipe))]  # what computes, and what holds the weights
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


def add_reference(trainer: Any, recipe: DpoRecipe | KtoRecipe, base: ModelConfig) -> None:
    """The reference's log-probabilities beside the rows of a new trainer."""
    bare = base.adapter is None and soft_prompts.peft_type(trainer.model) in soft_prompts.TYPES
    reference.add(trainer, reference_key(recipe, base), cache_folder() / "reference", bare)


def dpo_trainer(
    recipe: DpoRecipe, run: Run, model: Any, base: ModelConfig, parts: Parts, data: SftData, plan: session.Layout,
    machine: Hardware,
) -> Any:  # fmt: skip
    """trl's DPOTrainer with the recipe's objective."""
    dpo = recipe.dpo
    free = dpo.loss_type in preference_trainers.REFERENCE_FREE
    config = DPOConfig(
        **session.arguments(recipe, run, plan, machine, data.eval is not None),
        loss_type=["sigmoid" if free else dpo.loss_type],
        beta=dpo.beta,
        label_smoothing=dpo.label_smoothing,
        max_length=None,
    )
    session.one_device(config)
    trainer = preference_trainers.Dpo(
        dpo=dpo,
        model=model,
        args=config,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=parts.tokenizer,
        data_collator=PairCollator(parts.tokenizer.pad_token_id, session.pad_multiple(machine)),
        callbacks=session.callbacks(recipe, run, data.eval is not None),
    )
    if not free:
        add_reference(trainer, recipe, base)
    return session.finish_setup(trainer, recipe)


def kto_trainer(
    recipe: KtoRecipe, run: Run, model: Any, base: ModelConfig, parts: Parts, data: SftData, plan: session.Layout,
    machine: Hardware,
) -> Any:  # fmt: skip
    """trl's KTOTrainer with the recipe's objective."""
    kto = recipe.kto
    config = KTOConfig(
        **session.arguments(recipe, run, plan, machine, data.eval is not None),
        beta=kto.beta,
        desirable_weight=kto.desirable_weight,
        undesirable_weight=kto.undesirable_weight,
        max_length=None,
    )
    session.one_device(config)
    train, held_out = (
        rows if rows is None else with_other_answers(rows, data.train, recipe.train.seed)
        for rows in (data.train, data.eval)
    )
    trainer = preference_trainers.Kto(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=parts.tokenizer,
        callbacks=session.callbacks(recipe, run, data.eval is not None),
    )
    add_reference(trainer, recipe, base)
    return session.finish_setup(trainer, recipe)


def reward_trainer(
    recipe: RewardRecipe, run: Run, model: Any, parts: Parts, data: SftData, plan: session.Layout, machine: Hardware
) -> Any:
    """trl's RewardTrainer with the recipe's objective."""
    config = RewardConfig(
        **session.arguments(recipe, run, plan, machine, data.eval is not None),
        center_rewards_coefficient=recipe.reward.center_rewards_coefficient,
        disable_dropout=False,
        max_length=None,
    )
    session.one_device(config)
    trainer = preference_trainers.Reward(
        model=model,
        args=config,
        train_dataset=data.train,
        eval_dataset=data.eval,
        processing_class=parts.tokenizer,
        data_collator=ScoreCollator(parts.tokenizer.pad_token_id, recipe.reward.margin, session.pad_multiple(machine)),
        callbacks=session.callbacks(recipe, run, data.eval is not None),
    )
    return session.finish_setup(trainer, recipe)
