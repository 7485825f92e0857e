"""One pass over the data that finds everything wrong with it; training, `ft data check` and `--fix` all run this pass.

    audit = Audit(config, encoder, kind, eval_data)
    for item, encoded in audit.rows(seed): …      the usable rows (encoded is None without an encoder)
    audit.settle()                                UserError for what must stop a run
    audit.report() -> Report                      what `ft data check --json` prints

Without an encoder only the structure is looked at. Kinds are those of formats.py and `prompts` (conversations that need
no answer, for PPO); None takes anything.
"""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from finetune.data import checks, leakage, sources, thinking, token_cache
from finetune.data.duplicates import Duplicates
from finetune.data.encoder import Encoder, cut
from finetune.data.report import CONTROL, Noted, Notes, Report, histogram, language
from finetune.data.samples import Item, held_out_section, read_samples, specs, watched
from finetune.data.types import Conversation, Encoded, Message, RowProblem, Sample
from finetune.errors import Problem, UserError
from finetune.recipe.sections import DataConfig

BATCH = 512
LISTED = 1000  # warnings that are kept one by one; the counts are always complete
LISTED_ERRORS = 20_000  # likewise for rows with errors
Encoding = Encoded | dict[str, Encoded] | None
"""What a row became: a conversation's ids, or those of the answers of a pair by name."""
COUNTS = ("rows", "used", "dropped", "truncated", "cut_away", "duplicates", "leaked", "tokens", "trained_tokens")


class Audit:
    def __init__(
        self, config: DataConfig, encoder: Encoder | None = None, kind: str | None = "sft", eval_data: Any = None, *,
        list_all: bool = False,
    ) -> None:  # fmt: skip
        """list_all: keep every problem with its place, not only the first thousands."""
        self.config, self.kind = config, kind
        if config.streaming and not any(map(sources.is_hub, specs(config))):
            raise UserError("only hub datasets are streamed", key="data.streaming", fix="leave it out")
        if config.text_unit != "line" and not any(map(sources.has_plain_text, specs(config))):
            what = "says how plain text is read, and data.train has none"
            raise UserError(what, key="data.text_unit", fix="leave it out")
        self._control = CONTROL if encoder is None or encoder.guard is None else encoder.guard.any
        self.encoder = None if kind == "prompts" else encoder
        self.notes = Notes(*(() if list_all else (LISTED, LISTED_ERRORS)))
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self.languages: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.token_lengths: Counter[int] = Counter()
        self.duplicates = Duplicates()
        self.held_out = None if eval_data is None else leakage.HeldOut(held_out_section(eval_data, config))

    # --- the pass ---

    def rows(self, seed: int = 42) -> Iterator[tuple[Item, Encoding]]:
        """Every usable row, checked and with an encoder encoded; the others are noted."""
        if self.encoder is None:
            for batch in self._batches(seed):
                usable = self._structure(batch)
                self.counts["used"] += len(usable)
                yield from zip(usable, itertools.repeat(None))
            return
        # While one batch is tokenised (in parallel, outside of Python's lock) the next is read, checked and rendered.
        with ThreadPoolExecutor(1) as beside:
            waiting: tuple[Any, ...] | None = None
            for batch in self._batches(seed):
                usable = self._structure(batch)
                parts = [item.usable.conversations() for item in usable]
                plans = self.encoder.plan_batch([c for part in parts for c in part.values()], self.config.train_on)
                future = beside.submit(self.encoder.tokenize_batch, plans)
                if waiting is not None:
                    yield from self._encoded(*waiting)
                waiting = (usable, parts, plans, future)
            if waiting is not None:
                yield from self._encoded(*waiting)

    def _batches(self, seed: int) -> Iterator[list[Item]]:
        for spec in specs(self.config):
            kind = None if self.kind == "prompts" else self.kind  # an answer of any kind is no obstacle
            yield from batched(read_samples(spec, self.config, kind, seed=seed), BATCH)

    def _structure(self, batch: list[Item]) -> list[Item]:
        """The rows without structural errors."""
        usable: list[Item] = []
        texts: list[str] = []
        self.counts["rows"] += len(batch)
        for item in batch:
            if item.problem is not None:
                if item.problem.kind == "empty_file":
                    self.counts["rows"] -= 1
                    self.notes.warn(item, "empty_file", item.problem.message)
                else:
                    self.notes.add("error", item, item.problem)
                continue
            sample, sound = item.usable, True
            text = sample.whole_text
            for finding in itertools.chain(checks.check(sample, text), checks.unread(item.data, text)):
                if finding.kind == "no_answer":
                    if self.kind == "prompts":
                        continue
                    if not any(name in item.data for name in ("messages", "conversations")):
                        what = f"no answer (columns: {', '.join(item.data)})"
                        finding = finding._replace(message=what, fix="add its column, or map it with data.columns")
                self.notes.add(finding.level, item, finding)
                sound &= finding.level != "error"
            if sound:
                usable.append(item)
                texts.append(text)
                if "<" in text or "[" in text:  # every control token holds one of the two
                    self._look_for_control(item, text)
        self.languages.update(map(language, texts))
        self.lengths.update(map(int.bit_length, map(len, texts)))
        self.duplicates.add(usable)
        if self.held_out is not None:
            for row, finding in self.held_out.findings([item.usable for item in usable]):
                self.counts["leaked"] += finding.kind == "leakage"
                self.notes.add("warning", usable[row], finding)
        return usable

    def _look_for_control(self, item: Item, text: str) -> None:
        found = self._control.search(text)
        hit = None if found is None else found[0]
        guard = None if self.encoder is None else self.encoder.guard
        if hit is not None and guard is not None:  # names like <think> are tokens where the assistant writes them
            messages = [m for c in item.usable.conversations().values() for m in c.messages]
            hit = next((token for m in messages for token in guard.found(m["content"], m["role"])), None)
        if hit is not None:
            what = f"{hit!r} in the content looks like a control token; it is trained as plain text"
            self.notes.warn(item, "control_token", what)

    def _encoded(
        self, items: list[Item], parts: list[dict[str, Conversation]], plans: Any, future: Future[Any]
    ) -> Iterator[tuple[Item, Encoding]]:
        """The rows that keep a trained token within max_length, encoded."""
        assert self.encoder is not None
        results = iter(self.encoder.label_batch(plans, future.result()))
        for item, part in zip(items, parts, strict=True):
            encoded: dict[str, Any] = {name: next(results) for name in part}
            try:
                for row in encoded.values():
                    if isinstance(row, RowProblem):
                        raise row
                for conversation in part.values():
                    self.check_forged(self.encoder, conversation.messages)
                self._check_lost(item, part, encoded)
                kept = self._fit(item, encoded)
            except RowProblem as problem:
                self.notes.add("error", item, problem)
                continue
            if kept is not None:
                self.counts["used"] += 1
                self._note_thinking(item, part, encoded)
                yield item, kept.get("", kept)

    def _check_lost(self, item: Item, part: dict[str, Conversation], encoded: dict[str, Encoded]) -> None:
        """What the chat template leaves out: an error where it would be trained, elsewhere a warning."""
        found = dict.fromkeys(lost for row in encoded.values() for lost in row.lost)
        for what, trained in found:
            if trained:
                last = any(what.endswith(f" {len(c.messages)}") for c in part.values())
                fix = "set model.chat_template to one with a place for it, or take it out of the row"
                if "thinking" in what and not last:
                    fix = "set data.train_on: last, or give each turn a row of its own"
                raise RowProblem("lost_content", f"the chat template leaves out {what}, which would be trained", fix)
        self.left_out(item, [what for what, _ in found])
        for turn in sorted({turn for row in encoded.values() for turn in row.unprompted}):
            what = (
                f"turn {turn + 1} does not begin as the prompt for it does: the model is asked otherwise than trained"
            )
            self.notes.warn(item, "other_prompt", what)
        assert self.encoder is not None
        if self.encoder.template is not None and self.config.train_on != "all":
            for finding in dict.fromkeys(f for c in part.values() for f in checks.trained_in_vain(c.messages)):
                self.notes.add("warning", item, finding)

    def _note_thinking(self, item: Item, part: dict[str, Conversation], encoded: dict[str, Encoded]) -> None:
        assert self.encoder is not None
        marks = self.encoder.thinking
        for turn in dict.fromkeys(turn for c in part.values() for turn in thinking.unfinished(c.messages, marks)):
            what = f"turn {turn}: its thinking does not end (no {marks.end}), which teaches to think for ever"
            self.notes.warn(item, "unfinished_thinking", what, f"add {marks.end} and the answer, or remove the row")
        if self.config.thinking != "drop":
            turns = [message for c in part.values() for message in c.messages]
            self.counts["thinking_moved"] += any(thinking.moves(message, marks) for message in turns)
        if any(row.thinks for row in encoded.values()):
            self.counts["thinking"] += 1
            if self.config.thinking == "drop":
                self.counts["thinking_dropped"] += 1
        for turn in dict.fromkeys(turn for row in encoded.values() for turn in row.passed):
            what = f"turn {turn} is not trained: the chat template writes it without the empty block of thinking"
            fix = "give each turn a row of its own, or set data.thinking: keep"
            self.notes.warn(item, "untrained_turn", what, fix)

    def left_out(self, item: Item, fields: Iterable[str]) -> None:
        for field in fields:
            self.notes.warn(item, "lost_content", f"the chat template leaves out {field}")

    def check_forged(self, encoder: Encoder, messages: list[Message]) -> None:
        """RowProblem for turn markers that are plain text to the tokenizer, written in content; or they are counted."""
        found = encoder.forged_markers(messages)
        if found and self.config.on_forged_marker == "error":
            turn, marker = found[0]
            what = f"turn {turn}: {marker!r} is a turn marker of this model, and plain text to its tokenizer"
            raise RowProblem("forged_marker", what, "remove it, or set data.on_forged_marker: allow")
        self.counts["forged_markers"] += len(found)

    def _fit(self, item: Item, encoded: dict[str, Encoded]) -> dict[str, Encoded] | None:
        """The row within max_length; None when it is out."""
        kept: dict[str, Encoded] = {}
        for name, row in encoded.items():
            trained = row.trained
            if not trained:
                what = "no token would be trained: every label is masked"
                raise RowProblem("no_trained_token", what, "train a turn, or remove the row")
            length = len(row.input_ids)
            self.token_lengths[length.bit_length()] += 1
            if length > self.config.max_length:
                shorter = self._overlong(item, row)
                if shorter is None:
                    return None
                row, trained = shorter, shorter.trained
            kept[name] = row
            self.counts["tokens"] += len(row.input_ids)
            self.counts["trained_tokens"] += trained
        if "chosen" in kept and kept["chosen"].input_ids == kept["rejected"].input_ids:
            what = f"chosen and rejected are the same within {self.config.max_length} tokens"
            raise RowProblem("same_answers", what, "raise data.max_length, or remove the row")
        return kept

    def _overlong(self, item: Item, row: Encoded) -> Encoded | None:
        """The row cut to max_length; None when it is out."""
        what = f"{len(row.input_ids)} tokens, over data.max_length {self.config.max_length}"
        if self.config.on_overlong == "error":
            raise RowProblem("overlong", what, "raise data.max_length, or set data.on_overlong: truncate or drop")
        if self.config.on_overlong == "drop":
            self.counts["overlong_dropped"] += 1
            self.counts["dropped"] += 1
            self.notes.warn(item, "overlong", f"{what}: left out")
            return None
        assert self.encoder is not None
        shorter = cut(self.encoder.tokenizer, row, self.config.max_length)
        if not shorter.trained:
            self.counts["cut_away"] += 1
            what += ": nothing that is trained is left, the row is left out"
            self.notes.warn(item, "cut_away", what, "raise data.max_length")
            return None
        self.counts["truncated"] += 1
        what += f": cut at the end, {row.trained - shorter.trained} of {row.trained} trained tokens lost"
        self.notes.warn(item, "overlong", what, "raise data.max_length")
        return shorter

    # --- the outcome ---

    def refuse(self, item: Item, problem: RowProblem) -> None:
        """Take back a row that `rows` gave: its reader cannot use it."""
        self.counts["used"] -= 1
        self.notes.add("error", item, problem)

    def settle(self) -> None:
        """Raise what must stop a run: any unusable row, or with on_error: drop too many of them."""
        self.counts["duplicates"] = len(self.duplicates.found())
        counts, rows, allowed = self.counts, max(1, self.counts["rows"]), self.config.max_dropped
        errors, bad = self.notes.errors(), len(self.notes.bad_rows)
        if errors and self.config.on_error == "stop":
            raise UserError(errors)
        if self.notes.cut_off:
            raise UserError(self.notes.cut_off)  # leaving out the rest of a file is not leaving out a row
        counts["dropped"] += bad
        if bad > allowed * rows:
            what = f"{bad} of {rows} rows cannot be used, over data.max_dropped ({allowed:.0%})"
            raise UserError([Problem(what, key="data.max_dropped", fix="mend the rows below"), *errors])
        if counts["cut_away"] > allowed * rows:
            what = f"{counts['cut_away']} of {rows} rows have no trained token within {self.config.max_length} tokens"
            fix = "raise it, or set data.on_overlong: drop"
            raise UserError([Problem(what, key="data.max_length", fix=fix), *self.notes.of("cut_away")])
        counts["dropped"] += counts["cut_away"]
        if not counts["used"]:
            what, fix = "no rows to train on", "check the files and data.max_length"
            raise UserError([Problem(what, key="data.train", fix=fix), *self.notes.of("cut_away", "overlong")])

    def warnings(self) -> list[str]:
        """One line per kind of warning, for the start of a training run."""
        lines = sources.left_out(specs(self.config), offer=self.held_out is None)
        return lines + self.notes.lines(self.counts)

    def report(self) -> Report:
        repeated = self.duplicates.found()
        self.counts["duplicates"] = self.notes.kinds["duplicate"] = len(repeated)
        listed = list(self.notes.problems)
        for (file, row), (first_file, first) in repeated[:LISTED]:
            where = f"row {first}" if file == first_file else f"{first_file}, row {first}"
            listed.append(Noted("warning", file, row, checks.warning("duplicate", f"the same as {where}")))
        return Report(
            rows=self.counts["rows"],
            trained_tokens=self.counts["trained_tokens"] if self.encoder is not None else None,
            problems=[noted.as_json() for noted in sorted(listed, key=lambda noted: noted.level)],
            kinds=dict(self.notes.kinds),
            counts=dict(self.counts),
            languages=dict(self.languages.most_common()),
            characters=histogram(self.lengths),
            tokens=histogram(self.token_lengths),
        )


def check(
    config: DataConfig, encoder: Encoder | None = None, *, kind: str | None = "sft", eval_data: Any = None
) -> Report:
    """Read everything, report everything. UserError only where a source cannot be read at all."""
    audit = Audit(config, encoder, kind, eval_data)
    with seldom_collecting():
        for _ in watched(audit.rows(), config, "reading" if encoder is None else "tokenising"):
            pass
    return audit.report()


def load_samples(config: DataConfig, kind: str, *, encoder: Encoder | None = None) -> list[Sample]:
    """All usable samples of `kind` (sft, preference, unpaired, text). UserError with every problem of every row."""
    audit = Audit(config, encoder, kind)
    samples = [item.usable for item, _ in audit.rows()]
    audit.settle()
    return samples


def screen(config: DataConfig, kind: str) -> None:
    """UserError with every structural problem, before torch is imported: a second instead of ten.

    Large or remote data is left to the pass that also tokenises; reading it twice would cost more than it saves.
    """
    files = sources.local_files(specs(config))
    if files is not None and sum(file.stat().st_size for file in files) < token_cache.LARGE:
        load_samples(config, kind)


@contextmanager
def seldom_collecting() -> Iterator[None]:
    """Rows are gone without the collector as soon as their batch is done; at its usual threshold it would still look
    through them, and again and again through all that the libraries hold. It is not off: memory stays bounded."""
    usual = gc.get_threshold()
    gc.set_threshold(max(usual[0], 50_000), *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
