"""A source's keys as a recipe that passes our own checks. What does not pass is taken out again, with what was said."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import UserError
from finetune.recipe.adapters import ADAPTERS
from finetune.recipe.file import with_settings
from finetune.recipe.foreign_keys import ADVICE, FOREIGN_KEYS
from finetune.recipe.importing import datasets
from finetune.recipe.importing.keys import SPECIAL, Work
from finetune.recipe.importing.source import AXOLOTL, LLAMA_FACTORY, SWIFT, TRL, Source
from finetune.recipe.importing.tables import NAMES, REASONS, USUAL
from finetune.recipe.problems import fields_of

ORDER = ("version", "stage", "model", "data", "adapter", "train", "eval", "dpo", "kto", "reward", "ppo", "output")
STAGES = {
    "pt": "pretrain", "pretrain": "pretrain", "sft": "sft", "rm": "reward", "reward": "reward", "ppo": "ppo",
    "dpo": "dpo", "ipo": "dpo", "simpo": "dpo", "orpo": "dpo", "kto": "kto",
}  # fmt: skip
LOSSES = {"ipo": "ipo", "simpo": "simpo", "orpo": "orpo"}
GAMMA = {LLAMA_FACTORY: 0.5, AXOLOTL: 0.5, SWIFT: 1.0}
"""Of SimPO, where a config is silent; ms-swift's beta is 2 then."""


@dataclass
class Imported:
    stage: str
    values: dict[str, Any]
    """The recipe, sections in their order."""
    left_out: list[tuple[str, Any, str]] = field(default_factory=list)
    """(their key, its value, why it is nothing here)"""
    notes: list[str] = field(default_factory=list)
    """What should be looked at."""


def translate(source: Source) -> Imported:
    """UserError for stages that are not here, and for a recipe that lacks what every recipe has."""
    work = Work(source, stage_of(source))
    for theirs, value in list(work.keys.items()):
        one(work, theirs, value)
    datasets.put(work)
    settle(work)
    return checked(work)


def stage_of(source: Source) -> str:
    keys = source.keys
    plain = "pt" if keys.get("pretraining_dataset") else "sft"
    word = {
        LLAMA_FACTORY: keys.get("stage", "sft"),
        AXOLOTL: keys.get("rl") or ("rm" if keys.get("reward_model") else plain),
        SWIFT: keys.get("rlhf_type", "dpo") if source.word == "rlhf" or "rlhf_type" in keys else source.word or "sft",
        TRL: source.word or "sft",
    }[source.tool]  # fmt: skip
    if source.tool == LLAMA_FACTORY and (
        keys.get("do_train") is False or ("do_train" not in keys and not keys.get("stage"))
    ):
        raise UserError("does not train (do_train is missing)", path=source.path, fix="give a training config")
    if keys.get("task_type") not in (None, "causal_lm", "CAUSAL_LM") or "megatron" in str(source.word):
        raise UserError(f"task_type {keys['task_type']} has no equivalent here", path=source.path)
    stage = STAGES.get(str(word).lower())
    if stage is None:
        what = f"{word} has no equivalent here; there are {', '.join(dict.fromkeys(STAGES.values()))}"
        raise UserError(what, path=source.path, key="stage")
    return stage


def one(work: Work, theirs: str, value: Any) -> None:
    """A key of theirs: by its own function, by its name here, or left out with the reason."""
    if (special := SPECIAL.get(theirs)) is not None:
        special(work, theirs, value)
        return
    if theirs in datasets.KEYS[work.source.tool] or theirs in SAID:
        return
    if (reason := REASONS.get(theirs)) is not None:
        work.leave(theirs, value, reason)
        return
    ours = NAMES.get(theirs) or FOREIGN_KEYS.get(theirs) or same_name(work.stage, theirs)
    if ours is None:
        work.leave(theirs, value, ADVICE.get(theirs) or f"no equivalent of {work.source.tool}'s key is known here")
    elif value not in (None, "", []):
        work.put(ours, value, theirs)


def same_name(stage: str, key: str) -> str | None:
    sections = fields_of(stage)
    places = [name for name in ("train", "adapter", stage, "model", "data") if key in sections.get(name, ())]
    return f"{places[0]}.{key}" if places else None


SAID = ("stage", "rl", "rlhf_type", "pretraining_dataset", "quantization_method", "quant_method")
"""Keys that other functions read."""

# --- the whole ---


def settle(work: Work) -> None:
    """What depends on several keys, and what the tool takes where its config is silent."""
    usual, flat, tool = USUAL[work.source.tool], work.flat, work.source.tool
    for key in ("quantization_method", "quant_method"):
        if work.keys.get(key) not in (None, "bnb", "bitsandbytes"):
            work.leave(key, work.keys[key], "bitsandbytes is used")
            flat.pop("model.quantization", None)
    if "adapter.method" not in flat:
        lora = tool in (LLAMA_FACTORY, SWIFT) or bool(work.keys.get("use_peft"))
        work.put("adapter.method", "lora" if lora else "full", "")
    name = flat["adapter.method"]
    known = ADAPTERS[name].model_fields
    for key in [key for key in flat if key.startswith("adapter.") and key.partition(".")[2] not in known]:
        theirs = work.made_of[key]
        work.leave(theirs, flat.pop(key), f"is no key of {name}")
    for key, value in usual.items():
        section, _, field_ = key.partition(".")
        if field_ and field_ in (known if section == "adapter" else fields_of(work.stage).get(section, ())):
            flat.setdefault(key, value)
    if tool == LLAMA_FACTORY and "lora_alpha" in known:
        flat.setdefault("adapter.lora_alpha", 2 * flat["adapter.r"])
    if tool == SWIFT and name == "full" and "learning_rate" not in work.keys:
        flat["train.learning_rate"] = 1e-5
    if tool == TRL and "learning_rate" not in work.keys and work.stage in ("dpo", "kto", "reward"):
        flat["train.learning_rate"] = 1e-4 if work.stage == "reward" else 1e-6
    rows = work.micro or usual.get("micro")
    times = work.accumulation or usual.get("accumulation") or -(-16 // (rows or 1))
    if rows:
        flat.setdefault("train.effective_batch_size", rows * times)
        flat["train.per_device_train_batch_size"] = rows
        if any(key in work.keys for key in ("deepspeed", "fsdp", "nproc_per_node", "fsdp_config")):
            work.notes.append("train.effective_batch_size is that of one GPU: multiply it by how many you had")
    alignment = str(work.keys.get({AXOLOTL: "rl", SWIFT: "rlhf_type"}.get(tool, "")))
    if alignment in LOSSES:
        flat["dpo.loss_type"] = LOSSES[alignment]
    if flat.get("dpo.loss_type") == "simpo":  # the margin is a share of beta here
        beta = flat.setdefault("dpo.beta", 2.0 if tool == SWIFT else 0.1)
        flat["dpo.simpo_gamma"] = flat.get("dpo.simpo_gamma", GAMMA.get(tool, 0.5)) / beta
    if flat.get("train.warmup_steps", 0) >= 1:
        flat["train.warmup_steps"] = int(flat["train.warmup_steps"])
    work.notes += differences(work)
    flat.setdefault("output.dir", f"runs/{work.source.path.stem}")


def differences(work: Work) -> list[str]:
    """What is called the same, and is not."""
    flat, keys, tool, found = work.flat, work.keys, work.source.tool, []
    if flat.get("data.packing") and "train.effective_batch_size" in flat:
        found.append("train.effective_batch_size counts samples here, and packed rows there: multiply it by how many "
                     "samples fit into data.max_length")  # fmt: skip
    if flat.get("data.packing") and tool == LLAMA_FACTORY and not keys.get("neat_packing"):
        found.append("data.packing keeps samples apart; LLaMA-Factory does so with neat_packing only")
    if tool == TRL and work.stage == "sft" and "assistant_only_loss" not in keys:
        found.append("trl trains all text of messages without assistant_only_loss; data.train_on: all does so here")
    if tool == TRL and flat.get("adapter.method") == "lora" and "adapter.target_modules" not in flat:
        found.append("adapter.target_modules are peft's for the model there (often q_proj and v_proj), all-linear here")
    if str(keys.get("template", "")).endswith("nothink") or keys.get("enable_thinking") is False:
        found.append("thinking is off there: data.thinking: empty writes and trains rows so here")
    if tool == SWIFT and "data.max_length" not in flat:
        found.append("data.max_length is the model's own there, and 2048 here")
    return found


def checked(work: Work) -> Imported:
    """Keys that our own checks refuse are taken out with what they say."""
    flat = {"version": 1, "stage": work.stage, **work.flat}
    for _ in range(len(flat)):
        try:
            with_settings(copy.deepcopy(nested(flat)), work.stage, ())
            break
        except UserError as error:
            wrong = [(p, key) for p in error.problems if (key := nearest(str(p.key), work.flat)) in flat]
            if not wrong or any(key in ("model.name", "data.train", "output.dir") for _, key in wrong):
                raise UserError(error.problems) from None
            for problem, key in wrong:
                if key in flat:
                    why = problem.message + (f"; {problem.fix}" if problem.fix else "")
                    theirs = work.made_of.get(key)
                    value = flat.pop(key)
                    if theirs:
                        work.left_out.append((theirs, value, why))
    else:
        raise UserError("no recipe could be made of it", path=work.source.path)
    whole = nested(flat)
    return Imported(work.stage, {key: whole[key] for key in ORDER if key in whole}, work.left_out, work.notes)


def nearest(key: str, flat: dict[str, Any]) -> str:
    """The key that a problem is of: itself, or the one that it stands inside."""
    parts = key.split(".")
    return next((found for n in range(len(parts), 0, -1) if (found := ".".join(parts[:n])) in flat), key)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        if name:
            found.setdefault(section, {})[name] = value
        else:
            found[section] = value
    return found
