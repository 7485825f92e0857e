"""Keys that do something only beside another key or in some stages: set where they do nothing, they are refused.

A resolved recipe holds every default; the keys that do nothing are left out of it, so that it can be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from finetune.recipe.sections import DuringConfig, GenerationConfig, Section, SourceConfig, as_list


@dataclass(frozen=True)
class Idle:
    keys: tuple[str, ...]
    """Dotted; `source.KEY` stands for the mappings in data.train."""
    when: Callable[[Any], bool]
    """Of the recipe: whether the keys do nothing in it."""
    why: str
    fix: str = "leave it out"


def keys(section: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


def in_stage(*stages: str) -> Callable[[Any], bool]:
    return lambda r: r.stage in stages


def rope_type(r: Any) -> str | None:
    return None if r.model.rope_scaling is None else str(r.model.rope_scaling.rope_type)


def may_cut(r: Any) -> bool:
    """Whether truncation may leave nothing of a row; such rows are left out up to data.max_dropped."""
    return r.stage in ("sft", "dpo", "kto", "reward") and r.data.on_overlong == "truncate"


PREFERENCE = ("dpo", "kto", "reward")
NO_PPO = "has no effect in ft ppo"
DROPOUTS = keys("adapter", "lora_dropout", "vera_dropout", "module_dropout", "bottleneck_dropout", "encoder_dropout")
MODEL = (
    "adapter", "gguf_file", "source", "revision", "rope_scaling", "sanity_check", "device_map", "max_memory",
    "offload_folder", "quantization", "quantization_type", "attn_implementation",
)  # fmt: skip

DURING = ("eval.during", *keys("eval.during", *DuringConfig.model_fields))

IDLE: tuple[Idle, ...] = (
    # stages
    Idle(
        keys("train", "neftune_noise_alpha", "label_smoothing_factor", "torch_compile", "eval_steps",
             "early_stopping_patience", "load_best_model_at_end", "metric_for_best_model", "group_by_length",
             "per_device_eval_batch_size"),
        in_stage("ppo"), NO_PPO),
    Idle(("train.optim",), lambda r: r.stage == "ppo" and r.train.optim == "muon", NO_PPO),
    Idle(keys("data", "packing", "eval_split", "train_on", "cache"), in_stage("ppo"), NO_PPO),
    Idle(
        ("data.on_overlong",), lambda r: r.stage == "ppo" and r.data.on_overlong == "truncate",
        "prompts are never cut: one longer than data.max_length would lose its question", "set drop or error"),
    Idle(
        ("source.weight",), in_stage("ppo"), "every prompt is asked equally often", "leave it out, or use max_samples"),
    Idle(
        ("train.label_smoothing_factor",), in_stage(*PREFERENCE), "is for next-token targets, and here answers compete",
        "leave it out (ft dpo has dpo.label_smoothing)"),
    Idle(("data.packing",), in_stage(*PREFERENCE), "pairs and labelled answers are compared whole, one to a row"),
    Idle(("data.packing",), in_stage("pretrain"), "text always fills whole blocks of data.max_length"),
    Idle(("data.text_unit",), in_stage("sft", "ppo", *PREFERENCE), "is for documents, and only ft pretrain reads them"),
    Idle(("train.group_by_length",), in_stage("pretrain"), "all blocks have the same length, and keep their order"),
    Idle(
        keys("data", "train_on", "on_forged_marker", "thinking"), in_stage("pretrain"),
        "raw text has no turns: all of it is trained on"),
    Idle(("data.on_overlong",), in_stage("pretrain"), "a text longer than a block goes on in the next one"),
    Idle(
        ("source.weight",), in_stage("pretrain"), "text is read once, in its order",
        "name the source twice, or use max_samples"),
    Idle(("data.train_on",), in_stage("reward"), "an answer is scored once, at its end"),
    Idle(("data.cache",), in_stage("pretrain", *PREFERENCE), "only ft sft keeps tokenised rows on disk"),
    Idle(
        (*keys("eval", "max_new_tokens", "batch_size", "thinking", "shots", "shots_from"),
         *keys("eval.generation", *GenerationConfig.model_fields)),
        in_stage("reward"), "a reward model scores and writes nothing"),
    Idle(DURING, in_stage("reward"), "a reward model scores and writes nothing"),
    Idle(DURING, in_stage("pretrain"), "raw text is not answered"),
    Idle(
        keys("eval.generation", "top_k", "top_p"), lambda r: not r.eval.generation.drawn, "answers are greedy",
        "set eval.generation.temperature above 0"),
    Idle(
        ("eval.generation.seed",), lambda r: not r.eval.generation.drawn and not r.eval.shots, "answers are greedy",
        "set eval.generation.temperature above 0"),
    Idle(("eval.shots_from",), lambda r: not r.eval.shots, "no shots are given", "set eval.shots"),
    Idle(
        ("eval.generation.num_beams",), lambda r: r.eval.generation.drawn, "beams are not drawn",
        "leave it out, or set eval.generation.temperature: 0"),
    Idle(
        DROPOUTS, in_stage("dpo", "kto", "ppo"),
        "dropout is off here: with it the policy would differ from its own reference before it has learned anything"),
    # held-out rows
    Idle(
        DURING, lambda r: r.data.eval_split is None and r.eval.data is None, "no rows are held out to be answered",
        "set data.eval_split, for example 5%, or eval.data"),
    Idle(
        keys("train", "eval_steps", "per_device_eval_batch_size"), lambda r: r.data.eval_split is None,
        "no rows are held out to measure a loss on", "set data.eval_split, for example 5%"),
    Idle(
        keys("train", "load_best_model_at_end", "early_stopping_patience", "metric_for_best_model"),
        lambda r: r.data.eval_split is None and r.eval.during is None, "no rows are held out to measure a loss on",
        "set data.eval_split, for example 5%"),
    Idle(
        ("train.metric_for_best_model",), lambda r: not r.keeps_best, "the last weights are kept",
        "set train.load_best_model_at_end: true, or leave it out"),
    # optimisation
    Idle(
        ("train.lr_min_ratio",),
        lambda r: r.train.lr_scheduler_type not in ("cosine_with_min_lr", "warmup_stable_decay"),
        "this schedule has no floor", "set train.lr_scheduler_type: cosine_with_min_lr or warmup_stable_decay"),
    Idle(
        ("train.lr_decay_ratio",), lambda r: r.train.lr_scheduler_type != "warmup_stable_decay",
        "this schedule has no final decay of its own", "set train.lr_scheduler_type: warmup_stable_decay"),
    Idle(
        ("train.warmup_steps",), lambda r: r.train.lr_scheduler_type == "constant", "this schedule has no warm-up",
        "set train.lr_scheduler_type: constant_with_warmup"),
    Idle(
        keys("train", "muon_momentum", "muon_adamw_learning_rate"), lambda r: r.train.optim != "muon",
        "is muon's", "set train.optim: muon"),
    Idle(
        keys("train", "adam_beta1", "adam_beta2"), lambda r: r.train.optim in ("adafactor", "sgd"),
        "this optimizer has no such moments", "set train.optim: adamw"),
    Idle(
        ("train.muon_adamw_learning_rate",),
        lambda r: (r.train.optim == "muon" and r.adapter.trains == "matrices" and not r.adapter.modules_to_save
                   and not getattr(r.adapter, "use_dora", False)),
        "this method trains only matrices, and AdamW is for the rest"),
    Idle(
        ("train.weight_decay",),
        lambda r: r.adapter.trains == "vectors" and not getattr(r.adapter, "modules_to_save", None),
        "matrices decay, and this method trains only vectors"),
    # data
    Idle(
        ("data.max_dropped",), lambda r: r.data.on_error != "drop" and not may_cut(r), "unusable rows stop the run",
        "set data.on_error: drop"),
    Idle(
        ("data.shuffle",), lambda r: r.data.max_samples is None and not any(s.max_samples for s in mappings(r)),
        "draws data.max_samples rows at random, and all rows are used (their order in training is always shuffled)",
        "set data.max_samples, or leave it out"),
    Idle(
        keys("data", "format", "columns", "text_unit", "max_samples", "shuffle", "streaming", "on_error",
             "max_dropped"),
        lambda r: r.stage == "pretrain" and "builtin:world" in as_list(r.data.train),
        "builtin:world is made as it is read, without rows"),
    # model
    Idle(
        ("model.quantization_type",), lambda r: r.model.quantization != "int4", "is the data type of int4",
        "set model.quantization: int4"),
    Idle(
        keys("model", "max_memory", "offload_folder"), lambda r: r.model.device_map is None,
        "the model is not spread over devices", "set model.device_map: auto"),
    Idle(
        ("model.rope_scaling.factor",), lambda r: rope_type(r) == "default", "default means no scaling",
        "leave it out, or set rope_type: linear, dynamic or yarn"),
    Idle(
        ("model.rope_scaling.original_max_position_embeddings",), lambda r: rope_type(r) == "default",
        "default means no scaling"),
    Idle(
        keys("model.rope_scaling", "attention_factor", "beta_fast", "beta_slow"),
        lambda r: rope_type(r) not in (None, "yarn"), "is yarn's", "set rope_type: yarn"),
    Idle(keys("model", *MODEL), lambda r: r.model.is_new, "a new model is made from model.config"),
    Idle(
        ("model.tokenizer",), lambda r: not r.model.is_new, "the base brings its own",
        "set model.config for a new model"),
    Idle(
        ("model.chat_template",), lambda r: r.model.is_new and str(r.model.tokenizer).startswith("builtin:"),
        "the built-in tokenizers have their own"),
    # adapters
    Idle(
        ("adapter.encoder_dropout",),
        lambda r: r.adapter.method == "p_tuning" and r.adapter.encoder_reparameterization_type == "MLP",
        "is inside the LSTM", "set adapter.encoder_reparameterization_type: LSTM"),
    Idle(
        ("adapter.encoder_hidden_size",),
        lambda r: r.adapter.method == "prefix_tuning" and not r.adapter.prefix_projection,
        "is the width of the network that makes the prefix", "set adapter.prefix_projection: true"),
    Idle(
        ("adapter.prefix_init",), lambda r: r.adapter.method == "prefix_tuning" and r.adapter.prefix_projection,
        "with prefix_projection the prefix comes out of a network, which starts at random",
        "leave it out, or set prefix_projection: false"),
    Idle(
        ("adapter.prefix_init_text",),
        lambda r: r.adapter.method == "prefix_tuning" and r.adapter.prefix_init != "text",
        "is the text of prefix_init: text", "set adapter.prefix_init: text"),
    Idle(
        ("adapter.prompt_tuning_init_text",),
        lambda r: r.adapter.method == "prompt_tuning" and r.adapter.prompt_tuning_init != "text",
        "is the text of prompt_tuning_init: text", "set adapter.prompt_tuning_init: text"),
    Idle(
        ("adapter.targets",),
        lambda r: r.adapter.method == "bitfit" and r.adapter.bias == "existing" and isinstance(r.adapter.targets, str),
        "with bias: existing all biases that the base has are trained", "give names, or set adapter.bias: add"),
    # objectives
    Idle(
        ("dpo.simpo_gamma",), lambda r: r.stage == "dpo" and r.dpo.loss_type != "simpo", "is simpo's",
        "set dpo.loss_type: simpo"),
    Idle(
        keys("reward", "learning_rate", "num_train_epochs", "center_rewards_coefficient"),
        lambda r: r.stage == "ppo" and r.reward.train is None, "no reward model is trained here", "set reward.train"),
    Idle(
        ("ppo.kl_horizon",), lambda r: r.stage == "ppo" and r.ppo.kl_target is None, "kl_coef is fixed",
        "set ppo.kl_target"),
)  # fmt: skip


def mappings(recipe: Any) -> list[SourceConfig]:
    """The sources of data.train that are given as mappings."""
    return [source for source in as_list(recipe.data.train) if isinstance(source, SourceConfig)]


def idle(recipe: Any) -> dict[str, Idle]:
    return {key: row for row in reversed(IDLE) if row.when(recipe) for key in row.keys}


def refused(recipe: Any) -> list[tuple[str, str, str]]:
    found = idle(recipe)
    return [(key, found[name].why, found[name].fix) for key, name in given(recipe) if name in found]


def given(recipe: Any) -> Iterator[tuple[str, str]]:
    """(dotted key, its name in IDLE) of every key that the recipe sets to something."""

    def walk(section: BaseModel, at: str, name: str) -> Iterator[tuple[str, str]]:
        for key in type(section).model_fields:
            value = getattr(section, key)
            if key in section.model_fields_set and not is_off(section, key):
                yield f"{at}{key}", f"{name}{key}"
            if isinstance(value, Section) and key in section.model_fields_set:
                yield from walk(value, f"{at}{key}.", f"{name}{key}.")

    yield from walk(recipe, "", "")
    for index, source in enumerate(as_list(recipe.data.train)):
        if isinstance(source, SourceConfig):
            at = f"data.train.{index}." if isinstance(recipe.data.train, list) else "data.train."
            yield from walk(source, at, "source.")


def is_off(section: BaseModel, key: str) -> bool:
    """Whether a key says in so many words that there is nothing of it: null, 0, or a default of false."""
    value = getattr(section, key)
    return value is None or (not value and (value is not False or type(section).model_fields[key].default is False))


def without(values: dict[str, Any], recipe: Any) -> dict[str, Any]:
    """`values` (a dump of the recipe) less the keys that do nothing in it, in place."""
    for key in idle(recipe):
        *sections, last = key.split(".")
        if sections == ["source"]:
            for source in as_list(values["data"]["train"]):
                if isinstance(source, dict):
                    source.pop(last, None)
            continue
        node: Any = values
        for part in sections:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.pop(last, None)
    return values
