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
    elif value != "auto":
        work.leave(theirs, value, "model.dtype is auto, float32, bfloat16 or float16; trainable weights are float32")


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
    before = work.flat.get("adapter.target_modules", names)
    if "all-linear" in (names, before) and names != before:  # axolotl takes both
        work.leave(theirs, next(one for one in (names, before) if one != "all-linear"), "all-linear is asked for, too")
        names = "all-linear"
    if names not in NOTHING:
        work.put("adapter.target_modules", names, theirs)


def modules(work: Work, theirs: str, value: Any) -> None:
    """Names in a list, or with commas between them."""
    names = [one.strip() for one in value.split(",")] if isinstance(value, str) else value
    if names not in NOTHING:
        work.put("adapter.modules_to_save", names, theirs)


def adapters(work: Work, theirs: str, value: Any) -> None:
    """LLaMA-Factory writes several with commas, and merges all but the last."""
    names = [one.strip() for one in value.split(",")] if isinstance(value, str) else value
    if names in NOTHING:
        return
    names = names if isinstance(names, list) else [names]
    work.put("model.adapter", names[-1], theirs)
    if len(names) > 1:
        work.leave(
            theirs, names[:-1], "a run goes on from one adapter: merge the others into the base first (ft merge)"
        )


def warmup(work: Work, theirs: str, value: Any) -> None:
    """Of both keys the steps count where they are given, and 0 gives nothing, as in transformers."""
    steps = work.keys.get("warmup_steps")
    if float(value or 0) > 0 and (theirs == "warmup_steps" or not float(steps or 0)):
        work.put("train.warmup_steps", float(value), theirs)
    elif value and steps:
        work.leave(theirs, value, "warmup_steps are given, and count")


def micro(work: Work, theirs: str, value: Any) -> None:
    work.micro = int(value)


def accumulation(work: Work, theirs: str, value: Any) -> None:
    if str(value).isdigit():
        work.accumulation = int(value)
    else:
        work.leave(theirs, value, "a number is needed: train.effective_batch_size is rows of an optimizer step")


def optimizer(work: Work, theirs: str, value: Any) -> None:
    if value in OPTIMIZERS:
        work.put("train.optim", OPTIMIZERS[value], theirs)
    else:
        work.leave(theirs, value, f"optimizers are {', '.join(dict.fromkeys(OPTIMIZERS.values()))}")


def reported(work: Work, theirs: str, value: Any) -> None:
    known = ("tensorboard", "wandb", "swanlab", "trackio", "mlflow")
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    if theirs.startswith("use_") or theirs.endswith("project"):
        names = [theirs.removeprefix("use_").removesuffix("_project")] if value else []
        if names and theirs.endswith("project"):
            work.notes.append(f"set {theirs.upper()}={value} in the environment")
    if found := [name for name in names if name in known]:
        work.put("train.report_to", list(dict.fromkeys([*work.flat.get("train.report_to", []), *found])), theirs)
    for name in names:
        if name not in (*known, "none"):
            work.leave(theirs, name, f"trackers are {', '.join(known)}")


def positive(ours: str) -> Callable[[Work, str, Any], None]:
    """A number that means nothing at 0 and below."""

    def put(work: Work, theirs: str, value: Any) -> None:
        if not isinstance(value, int | float):
            work.leave(theirs, value, "a number is needed")
        elif ours != "data.eval_split" and 0 < value < 1:
            work.leave(theirs, value, f"a share of all steps is no number of them: set {ours}")
        elif value > 0:
            work.put(ours, int(value) if value >= 1 else value, theirs)

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
        elif value is not True:
            work.leave(theirs, value, f"means nothing known here; {ours} says it")

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
    elif isinstance(value, str):
        work.leave(theirs, value, "a reward model is asked in ft ppo")


def spoken(work: Work, theirs: str, value: Any) -> None:
    """trl's switch: the assistant's turns alone are trained."""
    if value is True:
        work.put("data.train_on", "assistant", theirs)


def smoothing(work: Work, theirs: str, value: Any) -> None:
    """Of wrongly labelled pairs in DPO, over the vocabulary elsewhere."""
    if value:
        work.put("dpo.label_smoothing" if work.stage == "dpo" else "train.label_smoothing_factor", value, theirs)


def frozen(work: Work, theirs: str, value: Any) -> None:
    if isinstance(value, int) and value > 0:
        work.put("adapter.num_layers", value, theirs)
    else:
        work.leave(theirs, value, "below 0 the first layers are meant; adapter.num_layers are the last ones")


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
    **dict.fromkeys((
        "report_to", "wandb_project", "swanlab_project", "use_swanlab", "use_wandb", "use_tensorboard", "use_mlflow",
        "use_trackio", "use_comet", "trackio_project",
    ), reported),
    **dict.fromkeys(("modules_to_save", "additional_target", "lora_modules_to_save"), modules),
    **dict.fromkeys(("adapter_name_or_path", "adapters", "lora_model_dir"), adapters),
    **dict.fromkeys(("label_smoothing", "dpo_label_smoothing", "label_smoothing_factor"), smoothing),
    "freeze_trainable_layers": frozen, "assistant_only_loss": spoken, "excess_length_strategy": overlong,
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
