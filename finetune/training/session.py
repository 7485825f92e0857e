"""What every training stage shares: batches, the trainer and its arguments, the end of a run.

A stage reads top to bottom: check -> load -> make the trainer -> `fit` -> `save` -> `finish`. The trainers are those of
trl with a few additions (`trainers`); what happens beside training is in `callbacks`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from finetune import places
from finetune.adapters import compatibility, soft_prompts
from finetune.adapters.compatibility import AnyRecipe
from finetune.adapters.load import adapter_config
from finetune.adapters.load import save as save_adapter
from finetune.adapters.methods import check_targets
from finetune.data import sources as data_sources
from finetune.data import text as raw
from finetune.errors import Interrupted, RunError, UserError
from finetune.models import loading, sources
from finetune.models.chatglm.weights import is_chatglm_layout
from finetune.models.hardware import peak_memory_gb
from finetune.models.identity import fingerprint, write_identity
from finetune.models.quantization import parameter_counts
from finetune.recipe.adapters import AdaLoraAdapter
from finetune.recipe.file import to_yaml
from finetune.recipe.resolve import Hardware, batch_layout, resolve
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import Recipe
from finetune.run.checkpoints import known_of
from finetune.run.directory import Run
from finetune.run.resuming import check_unchanged, to_go_on
from finetune.run.writing import write_atomically
from finetune.terminal.progress import Progress, command, duration, encodable, note, say, shown_path, task, warn
from finetune.training import model_card, report
from finetune.training.callbacks import Guard, Proven, Ranks, Recorder
from finetune.training.optim import OPTIMIZERS, check_schedule, scheduler_kwargs, warmup_steps
from finetune.training.trainers import Collator, CountOn, Sft
from finetune.training.weight_check import check_finite, trained

FEW_UPDATES = 50  # below this a learning-rate schedule has hardly begun


def resolved(raw: AnyRecipe, machine: Hardware) -> AnyRecipe:
    """The complete recipe. UserError when it says something else of model.adapter than that adapter's own files."""
    sources.check(raw.model)
    recipe = resolve(raw, machine)
    start = getattr(getattr(recipe, recipe.stage, None), "start", "continue")
    if recipe.model.adapter is None or start == "merge":
        return recipe
    folder = loading.adapter_folder(recipe.model.adapter)
    fitted = loading.check_adapter(folder, recipe.model, trainable=True)
    if fitted is not None and "adapter" in recipe.model_fields_set:
        check_targets(loading.skeleton(recipe.model), fitted, recipe.adapter, folder)
    return compatibility.continued(recipe, adapter_config(folder), folder)


@dataclass(frozen=True)
class Layout:
    """How many rows make a step."""

    rows_per_pass: int
    accumulation: int
    steps_per_epoch: int
    total_steps: int


def layout(recipe: Recipe, samples: int, rows: int, hardware: Hardware) -> Layout:
    """Rows per pass and accumulation, so that a step holds effective_batch_size original samples.

    Args:
        samples: original samples; rows: rows of the dataset, fewer than samples when packed.
    """
    train = recipe.train
    if rows < samples:  # a packed row holds several samples: fewer rows make a step
        per_row = samples / rows
        wanted = max(1, round(train.effective_batch_size / per_row))
        train = train.model_copy(update={"effective_batch_size": wanted})
    micro, accumulation = batch_layout(train, recipe.data.max_length, hardware)
    per_epoch = max(1, math.ceil(math.ceil(rows / (micro * hardware.processes)) / accumulation))
    total = train.max_steps or math.ceil(per_epoch * train.num_train_epochs)
    check_schedule(train, total)
    every = train.eval_steps
    if recipe.data.eval_split is not None and every is not None and every > total:
        raise UserError(
            f"{every} steps between evaluations, and the run has {total}: there would be none", key="train.eval_steps",
            fix="lower it, or leave it out (then it is at the end of every epoch)",
        )  # fmt: skip
    return Layout(micro, accumulation, per_epoch, total)


def few_updates(updates: int) -> str | None:
    """A warning when the run is too short to learn from."""
    if updates >= FEW_UPDATES:
        return None
    return f"only {updates} updates; {FEW_UPDATES} or more want more data or epochs, or a smaller batch"


def few_rows(recipe: Recipe, samples: int) -> str | None:
    """A note when a step cannot hold as many samples as it should."""
    wanted = recipe.train.effective_batch_size
    if samples >= wanted:
        return None
    return f"{samples} training rows are fewer than train.effective_batch_size {wanted}: a step holds {samples}"


def one_device(config: Any) -> Any:
    """transformers' arguments for one process on one device: it would split batches over all GPUs that it sees
    (DataParallel), each with a whole batch of its own."""
    config._n_gpu = min(1, config.n_gpu)
    return config


def other_devices(recipe: Recipe) -> str | None:
    """A note when there are GPUs that are not used."""
    count = torch.cuda.device_count()
    if count < 2 or recipe.model.device_map is not None:
        return None
    return f"{count} GPUs are here and one is used (CUDA_VISIBLE_DEVICES chooses which)"


def arguments(recipe: Recipe, run: Run, plan: Layout, hardware: Hardware, has_eval: bool) -> dict[str, Any]:
    """transformers' TrainingArguments of a resolved recipe."""
    train = recipe.train
    steps = "steps" if train.eval_steps else "epoch"
    return {
        "output_dir": str(run.checkpoints),
        "per_device_train_batch_size": plan.rows_per_pass,
        "per_device_eval_batch_size": train.per_device_eval_batch_size or plan.rows_per_pass,
        "gradient_accumulation_steps": plan.accumulation,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps or -1,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "lr_scheduler_kwargs": scheduler_kwargs(train, plan.total_steps),
        "warmup_steps": warmup_steps(train, plan.total_steps),
        "max_grad_norm": train.max_grad_norm,
        "weight_decay": train.weight_decay,
        "optim": "adamw_torch_fused"
        if train.optim == "adamw" and hardware.device == "cuda"
        else OPTIMIZERS[train.optim],
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "neftune_noise_alpha": train.neftune_noise_alpha,
        "label_smoothing_factor": train.label_smoothing_factor,
        "activation_checkpointing": bool(train.gradient_checkpointing),
        # Re-entrant checkpointing gives "element 0 does not require grad" on frozen bases.
        "activation_checkpointing_kwargs": {"use_reentrant": False} if train.gradient_checkpointing else None,
        "torch_compile": train.torch_compile,
        "bf16": recipe.model.dtype == "bfloat16",
        "fp16": recipe.model.dtype == "float16",
        "use_cpu": hardware.device == "cpu",
        "seed": train.seed,
        "logging_steps": train.logging_steps,
        "logging_nan_inf_filter": False,  # a NaN must be seen, not averaged away
        "eval_strategy": steps if has_eval else "no",
        "eval_steps": train.eval_steps,
        "prediction_loss_only": True,  # accumulated logits are how evaluation runs out of memory
        "save_strategy": "steps" if train.save_steps else "epoch",
        "save_steps": train.save_steps or 500,
        "save_total_limit": None,  # `trainers.Extras` takes old ones away, once the new one is complete
        "load_best_model_at_end": train.load_best_model_at_end and has_eval,
        "metric_for_best_model": "eval_loss" if train.load_best_model_at_end and has_eval else None,
        "greater_is_better": False if train.load_best_model_at_end and has_eval else None,
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "report_to": "none",
    }


def make_trainer(
    recipe: Recipe,
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Any,
    eval_rows: Any | None,
    plan: Layout,
    hardware: Hardware,
) -> SFTTrainer:
    """trl's SFTTrainer over encoded rows (input_ids, labels and, when packed, seq_lengths)."""
    packed = "seq_lengths" in train_rows.column_names
    config = SFTConfig(
        **arguments(recipe, run, plan, hardware, eval_rows is not None),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
    )
    one_device(config)
    trainer = Sft(
        model=model,
        args=config,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        data_collator=Collator(
            pad_token_id=tokenizer.pad_token_id,
            padding_free=packed,
            pad_to_multiple_of=None if packed else pad_multiple(hardware),
        ),
        callbacks=callbacks(recipe, run, eval_rows is not None),
    )
    return finish_setup(trainer, recipe)


def pad_multiple(hardware: Hardware) -> int:
    """Rows are padded to a multiple of this: few different shapes. On CPUs oneDNN compiles a kernel per shape, on GPUs
    8 fits the tensor cores."""
    return 32 if hardware.device == "cpu" else 8


def callbacks(recipe: Recipe, run: Run, has_eval: bool) -> list[TrainerCallback]:
    """What happens beside training, for any trainer."""
    may_stop = bool(recipe.train.early_stopping_patience and has_eval)
    found: list[TrainerCallback] = [Recorder(run, Progress(recipe.stage), may_stop), Guard(), Proven()]
    if isinstance(recipe.adapter, AdaLoraAdapter):
        found.append(Ranks(recipe.adapter))
    if may_stop:
        found.append(EarlyStoppingCallback(early_stopping_patience=recipe.train.early_stopping_patience))
    return found


def finish_setup(trainer: Any, recipe: Recipe) -> Any:
    """What a trainer of trl needs after it is made."""
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # trl casts those on quantized bases to bfloat16, where small updates round away
            parameter.data = parameter.data.float()
    trainer.recipe, trainer.recipe_train = recipe, recipe.train
    trainer.loraplus_lr_ratio = getattr(recipe.adapter, "loraplus_lr_ratio", None)
    trainer.remove_callback(PrinterCallback)  # Recorder prints
    return trainer


def longest_row(rows: Any) -> int:
    """Tokens of the longest sample; of an unpaired one, prompt and completion."""
    import pyarrow.compute

    names = [name for name in rows.column_names if name.endswith("_ids")]
    lengths = [pyarrow.compute.list_value_length(rows.data.column(name)) for name in names]
    if "completion_ids" in names:
        lengths = [pyarrow.compute.add(*lengths)]
    return max(int(pyarrow.compute.max(column).as_py() or 0) for column in lengths)


def announce(warnings: list[str], updates: int, *more: str | None) -> list[str]:
    """Say what was found before training; the same lines go to result.json."""
    lines = [*warnings, *(line for line in (*more, few_updates(updates)) if line)]
    for line in lines:
        warn(line)
    return lines


@contextmanager
def memory_advice(length: str) -> Iterator[None]:
    """RunError that says what to do when memory runs out. `length`: the key of how long rows may be."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(f"out of memory ({str(error).splitlines()[0]}): set train.per_device_train_batch_size: 1, "
                       f"train.gradient_checkpointing: true, or a shorter {length}") from None  # fmt: skip


def known_inputs(
    recipe: Recipe, tokenizer: Any, template: str | None, resume: bool, dry_run: bool = False
) -> dict[str, str]:
    """{key: digest} of what a run reads, by content: base, tokenizer, template, adapter and data.

    UserError naming what is not as it was, when the run is to go on; a dry run that is not to go on reads nothing.
    """
    if dry_run and not resume:
        return {}
    model, found = recipe.model, {}
    fresh = getattr(model, "config", None) is not None  # a new model
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    with task("reading the base for its fingerprint", after=1.0):
        base = "" if fresh else fingerprint(loading.folder(model))
    found["model.tokenizer" if fresh else "model.name"] = digest([base, vocabulary])
    if template is not None:
        found["model.chat_template"] = digest([template])
    if model.adapter is not None:
        found["model.adapter"] = digest(_weights(loading.adapter_folder(model.adapter)))
    found["data.train"] = digest(_rows(recipe.data.train))
    if recipe.eval.data is not None:
        found["eval.data"] = digest(_rows(recipe.eval.data))
    if recipe.stage == "ppo":
        found |= _reward_inputs(recipe.reward)
    if resume:
        check_unchanged(recipe, found)
    return found


def _reward_inputs(reward: Any) -> dict[str, str]:
    """Pairs, the reward model where it is on this machine, and the rules' files."""
    found = {}
    if reward.train is not None:
        found["reward.train"] = digest(_rows(reward.train))
    if reward.model is not None:
        adapter = loading.find_adapter(reward.model)
        place = Path(reward.model).expanduser()
        folder = adapter or next((p for p in (place / "model", place) if p.is_dir()), None)
        found["reward.model"] = digest([reward.model] if folder is None else _weights(folder))
    if reward.functions:
        rules = [rule.rpartition(":")[::2] for rule in reward.functions]
        found["reward.functions"] = digest(part for file, name in rules for part in (Path(file).read_bytes(), name))
    return found


def digest(parts: Iterable[str | bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def _weights(folder: Path) -> Iterator[str | bytes]:
    """Of a model or an adapter."""
    files = sorted(folder.glob("adapter_*"))
    yield from (file.read_bytes() for file in files)
    if not files:
        yield fingerprint(folder)


def _rows(data: Any) -> Iterator[str | bytes]:
    """What sources hold: the bytes of their files, or the rows of a hub."""
    for source in data if isinstance(data, list) else [data]:
        spec = data_sources.as_dict(source)
        if str(spec["path"]) == raw.WORLD:
            yield raw.WORLD
        elif data_sources.is_hub(spec) or spec.get("source") == "modelscope":
            yield from (repr(row.data) for row in data_sources.read_rows(source))
        else:
            for file in data_sources.files_of(spec["path"]):
                with file.open("rb") as stream:
                    yield from iter(lambda stream=stream: stream.read(1 << 22), b"")  # type: ignore[misc]


def fit(trainer: SFTTrainer, run: Run, resume: bool, inputs: dict[str, str] | None = None) -> dict[str, Any]:
    """Train; returns what result.json says about it. Interrupted after a signal, with a checkpoint on disk.

    inputs: what the run reads, of `known_inputs`; it is kept in the checkpoints.
    """
    checkpoint = run.usable_checkpoint() if resume else None
    if checkpoint is not None:
        run.forget_after(int(checkpoint.name.rpartition("-")[2]))
    trainer.inputs = inputs or {}
    trainer.add_callback(CountOn(trainer, checkpoint))
    found = trainer.callback_handler.callbacks
    guard, proven, recorder = (next(c for c in found if isinstance(c, kind)) for kind in (Guard, Proven, Recorder))
    recorder.tokens = known_of(checkpoint).get("counters", {}).get("tokens", 0) if checkpoint is not None else 0
    try:
        with memory_advice("data.max_length"):
            output = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            step = trainer.state.global_step
            if guard.stopped:
                where = f"checkpoint saved in {run.checkpoints}"
                raise Interrupted(f"stopped at step {step}; {where}; go on with {to_go_on(trainer.recipe)}")
            if proven.left_out and not proven.steps:
                what = f"loss scaling has left out all {proven.left_out} steps: nothing was trained"
                raise RunError(f"{what}; take more steps, or set model.dtype: bfloat16 or float32")
            check_finite(trained(trainer.model), "at the end")
            held_out = of_the_saved_weights(trainer, run)
    finally:
        guard.restore()  # a trainer that raises calls no on_train_end
    return {
        "trained": proven.proof.finish() if proven.proof is not None and proven.proof.seen else None,
        "train_loss": output.training_loss,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "seconds": round(time.perf_counter() - trainer.begun, 2),
        "seen_tokens": int(trainer.state.num_input_tokens_seen or trainer._total_train_tokens),
        "best_checkpoint": trainer.state.best_model_checkpoint,
        "eval": held_out,
    }


def of_the_saved_weights(trainer: Any, run: Run) -> dict[str, float]:
    """The evaluation of the weights that the model holds now: the best or the last; {} without held-out rows."""
    if trainer.eval_dataset is None:
        return {}
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    step = int(best.rpartition("-")[2]) if best else trainer.state.global_step
    rows = [row for row in run.read_metrics() if row.get("step") == step and "eval_loss" in row]
    row = rows[-1] if rows else trainer.evaluate()
    timed = ("_runtime", "_per_second", "_time")
    return {k.removeprefix("eval_"): v for k, v in row.items() if k.startswith("eval_") and not k.endswith(timed)}


def start(recipe: Recipe) -> None:
    """Seed everything; before any weight is initialised."""
    set_seed(recipe.train.seed)


def weights_dtype(recipe: Recipe) -> torch.dtype:
    """Dtype in which the base is held: that of the computation, but float32 where all of it is trained."""
    return torch.float32 if recipe.adapter.method == "full" else getattr(torch, recipe.model.dtype)


@torch.no_grad()
def documents_isolated(model: PreTrainedModel, ids: list[int]) -> bool:
    """Whether documents packed into one row are invisible to each other, found by trying.

    Two documents share a row, told apart by position ids alone. If changing the first changes the logits of the
    second, attention (or virtual tokens, or ALiBi) leaks, whatever the documentation says.
    """
    half = len(ids) // 2
    positions = torch.tensor([[*range(half), *range(len(ids) - half)]], device=model.device)
    changed = [(i + 1) % 256 for i in ids[:half]] + ids[half:]
    was_training = model.training
    model.eval()
    try:
        rows = [torch.tensor([row], device=model.device) for row in (ids, changed)]
        # As in training: what is trained is float32, also on a bfloat16 base.
        with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
            a, b = (model(input_ids=row, position_ids=positions, use_cache=False).logits for row in rows)
    finally:
        model.train(was_training)
    return bool(a.shape[1] == len(ids)) and bool(torch.equal(a[:, half:], b[:, half:]))


SHARED_TOKENS = "packing is off: documents in one row would share the virtual tokens and see each other"


def pack_if_isolated(recipe: Recipe, model: PreTrainedModel, tokenizer: Any, rows: Any) -> tuple[Any, str | None]:
    """(rows, packed if asked for and safe; one line saying why not)."""
    if not recipe.data.packing:
        return rows, None
    if soft_prompts.peft_type(model) in soft_prompts.TYPES:
        return rows, SHARED_TOKENS
    from finetune.data.packing import pack

    sample = [i for ids in rows[: min(len(rows), 64)]["input_ids"] for i in ids][:64]
    sample = (sample * 64)[:32] if len(sample) < 32 else sample
    with task("looking whether packed documents see each other", after=1.0):
        isolated = documents_isolated(model, sample)
    if not isolated:
        return rows, "packing is off: documents in one row would see each other with this model and adapter"
    with task(f"packing {len(rows):,} rows", after=1.0):
        return pack(rows, recipe.data.max_length), None


def packing_outlook(recipe: Recipe) -> str | None:
    """What a dry run can say of packing."""
    if not recipe.data.packing:
        return None
    if recipe.adapter.method.upper() in soft_prompts.TYPES:
        return SHARED_TOKENS
    return "packing: whether documents in one row are apart is tried when the model is loaded; steps are those without"


def save(
    recipe: Recipe,
    run: Run,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    base: ModelConfig | None = None,
) -> Path:
    """adapter/ in PEFT's format, or model/ after full fine-tuning, with tokenizer, template and the base's identity.

    base: what the adapter sits on, where that is not recipe.model.
    """
    base = base or recipe.model
    if template is not None:
        tokenizer.chat_template = template
    if recipe.adapter.method == "full":
        model.to(getattr(torch, recipe.model.dtype))
        check_finite(model.named_parameters(), f"in {recipe.model.dtype}")
        model.save_pretrained(run.model)
        tokenizer.save_pretrained(run.model)
        return run.model
    save_adapter(model, run.adapter)
    tokenizer.save_pretrained(run.adapter)
    write_identity(run.adapter, base, fingerprint(loading.folder(base)), template)
    return run.adapter


def finish(
    recipe: Recipe, run: Run, trainer: SFTTrainer, outcome: dict[str, Any], counts: dict[str, Any], notes: list[str],
    base: ModelConfig | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The model card, loss.png, report.html and, last, result.json.

    base: as for `save`.
    """
    trainable, total = parameter_counts(trainer.model)
    result = {
        "stage": recipe.stage,
        "status": "done",
        "eval": {},
        **outcome,
        "trainable_parameters": trainable,
        "total_parameters": total,
        "trained_tokens": counts["trained_tokens"],
        "dropped_rows": counts["dropped"],
        "data": counts,
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "decisions": notes,
    }
    write_card(recipe, run, result, base or recipe.model)
    report.write(run, result)
    run.finish(result)
    return result


def write_card(recipe: Recipe, run: Run, result: dict[str, Any], base: ModelConfig) -> None:
    """README.md beside the weights, in the place of peft's empty form; all of it as the umask has it."""
    full = recipe.adapter.method == "full"
    weights = run.model if full else run.adapter
    config = places.read_json(weights / "config.json") if full else loading.read_config(base)
    name = licence = place = None
    if getattr(recipe.model, "config", None) is None:
        name, folder = recipe.model.name, loading.folder(recipe.model)
        with suppress(UserError):  # a hub's snapshot may be without it, and the hub away by now
            sources.file(recipe.model, "README.md")
        licence = model_card.licence_of(name, folder)
        place = model_card.place_of(name, folder) if base.name == name else os.path.relpath(base.name, weights)
    values = yaml.safe_load(to_yaml(recipe))
    original = is_chatglm_layout(config)
    text = model_card.card(values, result, name, licence, place=place, original_layout=original)
    write_atomically(weights / "README.md", text)
    places.as_umask(weights)


def gist(result: dict[str, Any]) -> str:
    """The figure of a run that says most."""
    held_out = result["eval"]
    if "reward_difference" in held_out:
        low, high = held_out["reward_difference_ci"]
        change = f"{held_out['reward_difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        return f"held-out reward {held_out['reward_before']:.3f} -> {held_out['reward_mean']:.3f} ({change})"
    if "accuracy" in held_out:
        return f"held-out pair accuracy {held_out['accuracy']:.3f}"
    loss = f", held-out loss {held_out['loss']:.4f}" if "loss" in held_out else ""
    return f"training loss {result['train_loss']:.4f}{loss}"


def summary(recipe: Recipe, run: Run, weights: Path) -> None:
    """What was done, where it is, and what to type next."""
    result = json.loads(run.result.read_text(encoding="utf-8"))
    share = result["trainable_parameters"] / result["total_parameters"]
    note(f"done in {duration(result['seconds'])}: {result['steps']:,} steps, {gist(result)}")
    note(f"trained {result['trainable_parameters']:,} of {result['total_parameters']:,} parameters ({share:.2%})")
    note(f"weights {shown_path(weights)}   report {shown_path(run.path / 'report.html')}")
    lines = [command(*parts) for parts in next_commands(recipe, shown_path(run.path))]
    for number, line in enumerate(lines):
        note(f"{'' if number else 'next':7} {line}")
    if recipe.eval.data is None and recipe.data.eval_split is None:
        note("no rows were held out: for figures give ft eval a file with --data, or set data.eval_split")
    if recipe.stage == "reward":
        note(f"for ft ppo set reward.model: {shown_path(run.path)}; ft eval --reward scores the answers of other runs")


def next_commands(recipe: Recipe, name: str) -> list[list[str]]:
    """What can be done with a run, as it stands: each of these can be typed."""
    found = []
    if recipe.eval.data is not None or recipe.data.eval_split is not None:
        is_new = getattr(recipe.model, "config", None) is not None
        alone = recipe.stage == "reward" or is_new  # scores only, or nothing that it started from
        found.append(["eval", name, *([] if alone else ["--compare-base"])])
    if recipe.stage == "reward":
        return found
    return [*found, ["chat", "--model" if recipe.adapter.method == "full" else "--adapter", name]]


def show_plan(recipe: Recipe, counts: dict[str, Any], plan: Layout, steps: str = "steps") -> None:
    """--dry-run: what would be done, as YAML that can be run."""
    text = to_yaml(recipe)
    say(text if encodable(text) else yaml.safe_dump(yaml.safe_load(text), sort_keys=False), end="")
    trained = f", {counts['trained_tokens']:,} trained tokens" if counts["trained_tokens"] else ""  # none in prompts
    note(f"{counts['rows']:,} rows{trained}, {counts['dropped']} dropped")
    note(f"{plan.total_steps} {steps} of {plan.rows_per_pass} rows x {plan.accumulation} passes; nothing was written")
