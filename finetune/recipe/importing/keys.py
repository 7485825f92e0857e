"""Keys of other tools that are more than another name of ours, each with its function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.errors import UserError
from finetune.recipe.adapters import ADAPTERS
from finetune.recipe.importing.source import Source
from finetune.recipe.importing.tables import ATTENTION, METHODS, OPTIMIZERS
from finetune.recipe.problems import fields_of

NOTHING: tuple[Any, ...] = (None, "", False, [], {}, "none", "null")


class Work:
    """The recipe while it is made."""

    def __init__(self, source: Source, stage: str) -> None:
        self.source, self.stage, self.keys = source, stage, dict(source.keys)
        self.flat: dict[str, Any] = {}
        self.made_of: dict[str, str] = {}
        self.left_out: list[tuple[str, Any, str]] = []
        self.notes: list[str] = []
        self.micro: int | None = None
        self.accumulation: int | None = None

    def put(self, key: str, value: Any, theirs: str) -> None:
        self.flat[key] = value
        self.made_of[key] = theirs

    def leave(self, theirs: str, value: Any, why: str) -> None:
        if value not in NOTHING:  # says that there is to be none of it
            self.left_out.append((theirs, value, why))


def quantized(work: Work, theirs: str, value: Any) -> None:
    bits = {"load_in_4bit": 4, "load_in_8bit": 8}.get(theirs) if value is True else value
    if bits in (4, 8, "4", "8"):
        work.put("model.quantization", f"int{bits}", theirs)
    else:
        work.leave(theirs, value, "the base is held in int8 or int4 (bitsandbytes), or whole")


def precision(work: Work, theirs: str, value: Any) -> None:
    words = {
        "bf16": "bfloat16",
        "pure_bf16": "bfloat16",
        "fp16": "float16",
        "float16": "float16",
        "bfloat16": "bfloat16",
    }
    if isinstance(value, str) and value.removeprefix("torch.") in ("bfloat16", "float16", "float32", "bf16", "fp16"):
        value = value.removeprefix("torch.")
        work.put("model.dtype", words.get(value, value), theirs)
    elif value is True:
        work.put("model.dtype", words[theirs], theirs)


def attention(work: Work, theirs: str, value: Any) -> None:
    if theirs == "flash_attention":
        value = "flash_attention_2" if value is True else value
    if value in ATTENTION:
        work.put("model.attn_implementation", ATTENTION[value], theirs)
    elif value != "auto":
        work.leave(theirs, value, "kernels are eager, sdpa and flash_attention_2")


def method(work: Work, theirs: str, value: Any) -> None:
    name = METHODS.get("" if value is None else str(value).lower())
    if name is None:
        raise UserError(f"{value} has no equivalent here", path=work.source.path, key=theirs,
                        fix=f"methods are {', '.join(ADAPTERS)}")  # fmt: skip
    work.put("adapter.method", name, theirs)


def targets(work: Work, theirs: str, value: Any) -> None:
    names = [one.strip() for one in value.split(",")] if isinstance(value, str) and "(" not in value else value
    if value is True or names in (["all"], ["all-linear"]):
        names = "all-linear"
    if names not in NOTHING:
        work.put("adapter.target_modules", names, theirs)


def warmup(work: Work, theirs: str, value: Any) -> None:
    work.put("train.warmup_steps", float(value), theirs)


def micro(work: Work, theirs: str, value: Any) -> None:
    work.micro = int(value)


def accumulation(work: Work, theirs: str, value: Any) -> None:
    work.accumulation = int(value) if str(value).isdigit() else None


def optimizer(work: Work, theirs: str, value: Any) -> None:
    if value in OPTIMIZERS:
        work.put("train.optim", OPTIMIZERS[value], theirs)
    else:
        work.leave(theirs, value, f"optimizers are {', '.join(dict.fromkeys(OPTIMIZERS.values()))}")


def reported(work: Work, theirs: str, value: Any) -> None:
    known = ("tensorboard", "wandb", "swanlab", "trackio", "mlflow")
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if theirs in ("wandb_project", "swanlab_project", "use_swanlab", "use_wandb"):
        names = ["swanlab" if "swanlab" in theirs else "wandb"] if value else []
        if names and theirs.endswith("project"):
            work.notes.append(f"set {theirs.upper()}={value} in the environment")
    found = [name for name in names if name in known]
    if found:
        work.put("train.report_to", [*work.flat.get("train.report_to", []), *found], theirs)
    for name in names:
        if name not in (*known, "none"):
            work.leave(theirs, name, f"trackers are {', '.join(known)}")


def positive(ours: str) -> Callable[[Work, str, Any], None]:
    """A number that means nothing at 0 and below."""

    def put(work: Work, theirs: str, value: Any) -> None:
        if isinstance(value, int | float) and value > 0:
            work.put(ours, int(value) if ours != "data.eval_split" or value >= 1 else value, theirs)

    return put


def loss(work: Work, theirs: str, value: Any) -> None:
    if work.stage == "dpo":
        work.put("dpo.loss_type", value[0] if isinstance(value, list) and len(value) == 1 else value, theirs)
    else:
        work.leave(theirs, value, f"ft {work.stage} has one loss")


def of_objective(name: str) -> Callable[[Work, str, Any], None]:
    def put(work: Work, theirs: str, value: Any) -> None:
        if work.stage in ("dpo", "kto") and name in fields_of(work.stage)[work.stage]:
            work.put(f"{work.stage}.{name}", value, theirs)
        else:
            work.leave(theirs, value, f"is nothing in ft {work.stage}")

    return put


def flag(ours: str, wanted: Any, when: Any = True) -> Callable[[Work, str, Any], None]:
    """A switch that means `wanted` here."""

    def put(work: Work, theirs: str, value: Any) -> None:
        if value == when:
            work.put(ours, wanted, theirs)

    return put


def checkpointing(work: Work, theirs: str, value: Any) -> None:
    work.put("train.gradient_checkpointing", bool(value), theirs)


def trained_turns(work: Work, theirs: str, value: Any) -> None:
    word = {"all": "all", "last_round": "last", "default": None}.get(str(value), "?")
    if word == "?":
        work.leave(theirs, value, "turns are trained or not (data.train_on); weights of single words are not here")
    elif word is not None:
        work.put("data.train_on", word, theirs)


def rewarded(work: Work, theirs: str, value: Any) -> None:
    if work.stage == "ppo" and isinstance(value, str):
        work.put("reward.model", value, theirs)


def overlong(work: Work, theirs: str, value: Any) -> None:
    word = {"delete": "drop", "drop": "drop", "raise": "error", "right": "truncate", "left": None, "split": None}.get(
        str(value)
    )
    if word is not None:
        work.put("data.on_overlong", word, theirs)
    else:
        work.leave(theirs, value, "a row that is too long is cut at its end, left out, or an error")


SPECIAL: dict[str, Callable[[Work, str, Any], None]] = {
    **dict.fromkeys(("quantization_bit", "quant_bits", "load_in_4bit", "load_in_8bit"), quantized),
    **dict.fromkeys(("bf16", "fp16", "pure_bf16", "float16", "bfloat16", "torch_dtype", "dtype"), precision),
    **dict.fromkeys(("flash_attn", "attn_impl", "attn_implementation", "flash_attention"), attention),
    **dict.fromkeys(("finetuning_type", "tuner_type", "train_type", "adapter"), method),
    **dict.fromkeys(("lora_target", "target_modules", "lora_target_modules", "lora_target_linear",
        "oft_target"), targets),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), warmup),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size"), micro),
    "gradient_accumulation_steps": accumulation,
    **dict.fromkeys(("optim", "optimizer"), optimizer),
    **dict.fromkeys(("report_to", "wandb_project", "swanlab_project", "use_swanlab", "use_wandb"), reported),
    **dict.fromkeys(("val_size", "val_set_size", "split_dataset_ratio"), positive("data.eval_split")),
    "max_steps": positive("train.max_steps"), "save_steps": positive("train.save_steps"),
    "eval_steps": positive("train.eval_steps"), "max_samples": positive("data.max_samples"),
    "logging_steps": positive("train.logging_steps"),
    **dict.fromkeys(("pref_loss", "loss_type"), loss), "use_muon": flag("train.optim", "muon"),
    **dict.fromkeys(("pref_beta", "rl_beta", "beta"), of_objective("beta")),
    **dict.fromkeys(("pref_ftx", "rpo_alpha"), of_objective("sft_weight")), "simpo_gamma": of_objective("simpo_gamma"),
    **dict.fromkeys(("train_on_prompt", "train_on_inputs"), flag("data.train_on", "all")),
    "mask_history": flag("data.train_on", "last"), "loss_scale": trained_turns,
    "pissa_init": flag("adapter.init_lora_weights", "pissa"), "truncation_strategy": overlong,
    "gradient_checkpointing": checkpointing,
    "disable_gradient_checkpointing": flag("train.gradient_checkpointing", False), "reward_model": rewarded,
    **dict.fromkeys(("packing", "sample_packing", "neat_packing"), flag("data.packing", True)),
}  # fmt: skip
