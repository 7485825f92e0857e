"""The life of a training run, the same for every stage: prepare -> plan -> run -> train.

    session = prepare(recipe, resume)       the resolved recipe and its open base, after every check that needs no rows
    rows = load_…(session.recipe.data, session.base.encoder, …)
    session.plan(rows, longest)             steps, and what is to be said of them
    session.show()                          --dry-run, or
    with session.run(overwrite) as run:     the run directory, seeded
        session.train(trainer)              fit, save, finish, and say what to type next

A stage adds its rows, its model and its trainer (`commands/`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

import torch
import yaml
from accelerate.utils.memory import should_reduce_batch_size

from finetune import ranks
from finetune.adapters import compatibility
from finetune.adapters.compatibility import AnyRecipe
from finetune.adapters.load import adapter_config
from finetune.adapters.methods import METHODS, check, check_targets
from finetune.base import Base
from finetune.data import thinking
from finetune.data.rows import Rows
from finetune.errors import OutOfMemory, RunError, UserError
from finetune.models import attach, hardware, loading, sources, tensor_parallel
from finetune.models.quantization import check_network, is_held_quantized, planned_bytes
from finetune.models.rope import check_length
from finetune.planning import fits, precision, sizing, threads
from finetune.planning.memory import Estimate
from finetune.planning.network import Network
from finetune.recipe.file import to_yaml
from finetune.recipe.resolve import Hardware, resolve
from finetune.recipe.stages import HELD_OUT_FIGURES, Recipe
from finetune.run.checkpoints import known_of
from finetune.run.directory import Run
from finetune.run.opening import open_run
from finetune.run.resuming import begun_with, check_resumable, goes_further, other_rounding, value_at
from finetune.run.writing import write_json
from finetune.terminal.progress import encodable, note, say, shown_path, warn
from finetune.training import memory, sharded
from finetune.training.audited import audited
from finetune.training.finish import Words, finish, save, summary
from finetune.training.fit import callbacks
from finetune.training.fit import fit as fit_trainer
from finetune.training.health import in_batch
from finetune.training.held_out_figures import During
from finetune.training.inputs import Stamps, asked_of_all, check_still, known_inputs, stamps
from finetune.training.packing import packed_rows
from finetune.training.plan import Layout, arguments, few_rows, few_updates, layout, other_devices
from finetune.training.start import seed_everything
from finetune.training.tracking import Trackers

REPLIES = {"ppo": "ppo.max_new_tokens"}
"""stage -> the key of how long its replies may be, where it writes some."""


@dataclass
class Session(Generic[AnyRecipe]):
    recipe: AnyRecipe
    """Resolved; nothing changes it."""
    base: Base
    machine: Hardware
    resume: bool
    stamps: Stamps
    """Of the data, before it is read."""
    rows: Rows = field(init=False)
    layout: Layout = field(default_factory=lambda: Layout(0, 0, 0, 0))
    packed: Layout | None = None
    """Where the rows are to be packed and it turns out that they can be."""
    notes: list[str] = field(default_factory=list)
    """What was found and did not stop the run; they go to result.json."""
    during: During | None = None
    """Answers held-out rows while the run trains, where the recipe asks for it."""
    folder: Run = field(init=False)
    trackers: Trackers | None = None
    known: dict[str, str] = field(init=False)
    """What the run reads, by content."""
    longest: int = 0
    """Tokens of the longest row, replies included."""
    recomputed: list[str] = field(default_factory=list)
    """Keys that a run that goes on has another value of, and that change how a step is computed, not what."""
    timed: Sequence[str] = ()
    """Why the computation is in bfloat16 or float32, and in so many threads, where that was timed."""
    further: bool = False
    """Whether it goes on for longer than it was begun."""
    network: Network | None = None
    """That which said how many rows fit."""

    @property
    def template(self) -> str | None:
        """The chat template that rows are written in, where they are conversations."""
        return None if self.recipe.stage == "pretrain" else self.base.encoder.template

    def plan(
        self, rows: Rows, longest: int, cut: Layout | None = None, updates: int | None = None, also: str | None = None
    ) -> None:
        """How the rows are cut into steps. UserError for a schedule that does not fit them, or rows too long.

        Args:
            longest: tokens of the longest row, replies included.
            cut, updates: of PPO, whose steps are rollouts with several updates each; also: what else is to be said.
        """
        self.rows, self.longest = rows, longest
        too_long: str | None = None
        if not self.recipe.model.is_new:
            too_long = check_length(self.base.config, self.recipe.model, longest, REPLIES.get(self.recipe.stage))
        few = few_rows(self.recipe, len(rows.train)) if cut is None else None
        self.layout = cut or layout(self.recipe, len(rows.train), len(rows.train), self.machine)
        if packed := packed_rows(self.recipe, rows.train):  # what does not fit those is said before the model loads
            self.packed = layout(self.recipe, len(rows.train), packed, self.machine)
        few_steps = few_updates(updates or self.layout.total_steps)
        said: tuple[str | None, ...] = (too_long, few, other_devices(self.recipe), also, few_steps)
        self.notes = [*rows.warnings, *(line for line in said if line)]

    def repack(self, rows: int) -> None:
        """The same samples in fewer rows."""
        before = few_updates(self.layout.total_steps)
        self.layout = layout(self.recipe, len(self.rows.train), rows, self.machine)
        if before is None:
            self.note(few_updates(self.layout.total_steps))

    @property
    def has_eval(self) -> bool:
        return self.rows.eval is not None or self.during is not None

    @property
    def best(self) -> tuple[str, bool]:
        """What the best checkpoint is best in, and whether higher is better."""
        name = self.recipe.best_in
        if self.during is None or not self.recipe.best_in_answers:
            return str(name), HELD_OUT_FIGURES[self.recipe.stage].get(str(name), False)
        metric = next(one for one in self.during.metrics if name in (None, one.name))
        return metric.name, not metric.lower_is_better

    def arguments(self) -> dict[str, Any]:
        once = sharded.read_once(self.recipe, self.base)
        return arguments(self.recipe, self.folder, self.layout, self.machine, self.has_eval, self.best, once)

    def callbacks(self) -> list[Any]:
        found: list[Any] = callbacks(self.recipe, self.folder, self.has_eval)
        return found if self.trackers is None else [*found, self.trackers]

    def note(self, line: str | None) -> None:
        if line is not None:
            warn(line)
            self.notes.append(line)

    def inputs(self, dry_run: bool = False) -> dict[str, str]:
        """What the run reads, by content; the notes are said."""
        found = ranks.once(lambda: known_inputs(self.recipe, self.base, self.template, self.resume, dry_run))
        files = "put the same files on every machine, or use a folder that all of them share"
        ranks.same(found, "what the run reads", files)
        ranks.same(asked_of_all(self.recipe), "the recipe", "give all the same one, and set in it what machines decide")
        check_still(self.recipe, self.stamps)
        for line in self.timed:
            note(line)
        for line in self.notes:
            warn(line)
        return found

    def show(self, steps: str = "steps") -> None:
        """--dry-run: what would be done, as YAML that can be run."""
        self.inputs(dry_run=True)
        text = to_yaml(self.recipe)
        say(text if encodable(text) else yaml.safe_dump(yaml.safe_load(text), sort_keys=False), end="")
        counts, cut = self.rows.counts, self.layout
        tokens = counts["trained_tokens"]  # none in prompts
        trained = f", {tokens:,} trained tokens" if tokens else ""
        note(f"{counts['rows']:,} rows{trained}, {counts['dropped']} dropped")
        if self.recipe.model.quantization is not None:
            name, kind = self.recipe.model.dtype, self.recipe.model.quantization
            held, plain = (planned_bytes(self.base.skeleton, k, getattr(torch, name)) / 1e9 for k in (kind, None))
            note(f"the base's weights take {held:,.3g} GB in {kind}, where they would take {plain:,.3g} GB in {name}")
        several = f" x {ranks.shares()} processes" if ranks.shares() > 1 else ""
        if self.packed is not None:
            note(f"packed: {self.packed.total_steps} {steps} of {shown(self.packed)}{several}")
        note(f"{cut.total_steps} {steps} of {shown(cut)}{several}; nothing was written")

    @contextmanager
    def run(self, overwrite: bool) -> Iterator[Run]:
        """The run directory, where weights are drawn and trained."""
        self.known = self.inputs()
        if self.resume:
            folder = Run.of(self.recipe)
            self.recomputed = other_rounding(self.recipe, folder)
            self.further = goes_further(self.recipe)
        with open_run(self.recipe, overwrite, self.resume) as self.folder:
            if ranks.first():
                write_json(self.folder.data_audit, audited(self.recipe, self.base, self.rows))
            trackers = self.trackers = Trackers(self.recipe, self.folder, self.arguments(), self.resume)
            try:
                seed_everything(self.recipe)
                with ranks.broken():
                    yield self.folder
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise self.out_of_memory(error) from None
            finally:
                trackers.finish(None)

    @cached_property
    def planned(self) -> Estimate | None:
        """What a pass takes by `ft plan`, with the longest rows that there are, to the next 64 tokens; None where it
        cannot say."""
        most = fits.length_of(self.recipe)
        longest = most if self.recipe.data.packing else -(-self.longest // fits.STEP) * fits.STEP
        length = min(longest, most)
        return memory.planned(self.recipe, self.machine, self.layout.rows_per_pass, length, self.network)

    def out_of_memory(self, error: BaseException) -> OutOfMemory:
        """What was tried, what it takes, and the cheapest ways out."""
        said = (str(error).splitlines() or [""])[0]
        found = self.planned
        peak = f"{hardware.peak_memory_gb():.3g} GB were in use at most"
        text = peak if found is None else f"{memory.figures(found, self.machine)}; {peak}"
        smaller = fewer_rows(self.recipe, self.layout)
        if smaller is None:
            ways = memory.ways_out(self.recipe, self.machine, self.layout.rows_per_pass, found)
            text = f"{text}. Ways out: {'; '.join(ways)}"
        return OutOfMemory(f"out of memory ({said}): {text}", smaller)

    def train(
        self, trainer: Any, base: Base | None = None, *, fit: Callable[..., dict[str, Any]] | None = None,
        save: Callable[..., Path] = save, look: Callable[[Run], str | None] = lambda run: None, words: Words = Words(),
    ) -> None:  # fmt: skip
        """Train, save, report.

        Args:
            base: what the adapter sits on, where that is not the recipe's.
            fit: trains and returns what result.json says, for other trainers than those of transformers.
            save: writes the weights.
            look: what the run's metrics should warn of; words: what the summary says.
        """
        base = base or self.base
        checkpoint = ranks.from_first(lambda: self.folder.start) if self.resume else None
        if checkpoint is not None:
            sharded.check_zero(known_of(checkpoint).get("rounding") or {}, hardware.rounding())
            self.note(not_to_the_bit(known_of(checkpoint), self.recomputed))
            if self.further:
                self.note(f"the learning rate follows the longer schedule from {checkpoint.name} on")
        trainer.during, trainer.samples = self.during, self.folder.samples
        length, decode = self.recipe.data.max_length, self.base.tokenizer.decode
        trainer.in_batch = in_batch(trainer, self.folder, self.rows, length, decode)
        outcome = (fit or fit_trainer)(trainer, self.folder, checkpoint, self.known)
        if ranks.sharded():
            sharded.bring_together(trainer.model)
        if not ranks.first():
            return
        if "failed" in outcome:
            self.folder.keep_apart()
        weights = save(self.recipe, self.folder, trainer.model, base, self.template)
        self.note(look(self.folder))
        notes = [*self.notes, *self.timed]
        counts = self.rows.counts
        result = finish(self.recipe, self.folder, trainer.model, outcome, counts, notes, base, self.planned)
        if self.trackers is not None:
            self.trackers.finish(result)
        if "failed" in outcome:
            raise RunError(f"{outcome['failed']}; the weights are kept in {shown_path(weights)}, to be looked at")
        summary(self.recipe, self.folder, weights, result, words)


def shown(cut: Layout) -> str:
    return f"{cut.rows_per_pass} rows x {cut.accumulation} passes"


def prepare(raw: AnyRecipe, resume: bool, open_base: Callable[[Any], Base] = Base.open) -> Session[AnyRecipe]:
    """UserError for what recipe, config.json and adapter can be wrong in, before rows are read.

    open_base: opens the recipe's model, for models that are new.
    """
    machine = hardware.detect()
    sources.check(raw.model)
    before = value_at(begun_with(Run.of(raw)), "model.dtype") if resume else None
    machine, said = precision.timed(raw, machine, before)
    machine, network = sizing.sized(raw, machine)
    recipe = resolved(raw, machine)
    if resume:
        check_resumable(recipe)
        if goes_further(recipe) and METHODS[recipe.adapter.method].cuts_ranks:
            what = f"{recipe.adapter.method} shares out its ranks over all steps, and there cannot be more of them now"
            raise UserError(what, key="train", fix="leave the steps as they were, or use --output DIR")
    compatibility.check(recipe)
    base = replace(open_base(recipe.model), treatment=recipe.data.thinking)
    if not recipe.model.is_new:
        compatibility.check_base(recipe, base.config)
        if recipe.model.quantization is not None:
            check_network(base.skeleton, recipe.model)
        if recipe.model.adapter is None:
            check(base.skeleton, recipe.adapter, is_held_quantized(recipe.model, base.config))
        if ranks.side_by_side():
            full = recipe.adapter.method == "full"
            tensor_parallel.check(base.skeleton, base.config, recipe.model.name, ranks.count(), full)
    if raw.train.gradient_checkpointing and not base.skeleton.supports_gradient_checkpointing:
        what = f"transformers cannot recompute the activations of {base.config['model_type']}"
        raise UserError(what, key="train.gradient_checkpointing", fix="leave it out, or set it to false")
    if recipe.eval.thinking is not None and recipe.stage != "pretrain":
        thinking.asked(base.encoder, thinking.switched(recipe.eval.thinking), "eval.thinking")
    if machine.device == "cpu":
        hardware.keep_freed_memory()
    known = Run.of(raw).known() if resume else {}
    before_it = threads.before(known) if known else None
    many = None if recipe.model.is_new else threads.choose(recipe, machine, before_it)
    timed = [line for line in (said, many) if line is not None]
    return Session(recipe, base, machine, resume, stamps(recipe), timed=timed, network=network)


def resolved(raw: AnyRecipe, machine: Hardware) -> AnyRecipe:
    """The complete recipe. UserError when it says something else of model.adapter than that adapter's own files."""
    recipe = resolve(raw, machine)
    start = getattr(getattr(recipe, recipe.stage, None), "start", "continue")
    if recipe.model.adapter is None or start == "merge":
        return recipe
    folder = sources.adapter_folder(recipe.model.adapter)
    fitted = attach.check_adapter(folder, recipe.model, trainable=True)
    if fitted is not None and "adapter" in recipe.model_fields_set:
        check_targets(loading.skeleton(recipe.model), fitted, recipe.adapter, folder)
    return compatibility.continued(recipe, adapter_config(folder), folder)


def not_to_the_bit(known: dict[str, Any], keys: list[str]) -> str | None:
    """A warning where a run that goes on will not equal the uninterrupted one to the last bit.

    Args:
        known: of its checkpoint; keys: of the recipe, that say otherwise how a step is computed.
    """
    then, now = known.get("rounding") or {}, hardware.rounding()
    found = [
        f"{name} {now[name]} where it was {then[name]}" for name in then if name in now and then[name] != now[name]
    ]
    found += [f"another {key}" for key in keys]
    return f"not equal to the last bit to the run without a stop: {'; '.join(found)}" if found else None


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def fewer_rows(recipe: Recipe, cut: Layout) -> dict[str, int] | None:
    """Settings for half the rows per pass, or the next number below that divides a step; None when there is one row,
    or the passes of packed rows are fixed."""
    step, passes = cut.rows_per_pass * cut.accumulation, recipe.train.gradient_accumulation_steps
    rows = fits.half(cut.rows_per_pass, step)
    if not recipe.train.auto_find_batch_size or not rows or (recipe.data.packing and passes is not None):
        return None
    found = {"train.per_device_train_batch_size": rows}
    return found if recipe.data.packing else {**found, "train.gradient_accumulation_steps": step // rows}
