"""One pass over the data that finds everything wrong with it; training, `ft data check` and `--fix` all run this pass.

    audit = Audit(config, encoder, kind, eval_data)
    for item, encoded in audit.rows(seed): …      the usable rows (encoded is None without an encoder)
    audit.settle()                                UserError for what must stop a run
    audit.report() -> Report                      what `ft data check --json` prints

check(config, encoder, …) does it all. Without an encoder only the structure is looked at. Kinds are those of formats.py
and `prompts` (conversations that need no answer, for PPO); None takes anything.
"""

from __future__ import annotations

import gc
import itertools
import operator
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from finetune.data import checks, leakage, sources
from finetune.data.chat import IGNORED, Encoded
from finetune.data.messages import is_plain
from finetune.data.report import CONTROL, Report, histogram, language
from finetune.data.samples import (
    Item,
    all_text,
    as_held_out,
    identity,
    prompt_text,
    questions,
    read_samples,
    specs,
    watched,
)
from finetune.data.types import Conversation, Message, Preference, RowProblem, Text, Unpaired
from finetune.errors import Problem, UserError

BATCH = 512
LISTED = 1000  # warnings that are kept one by one; the counts are always complete
LISTED_ERRORS = 20_000  # likewise for rows with errors
SHORT = re.compile(r"^.*: |^the chat template leaves out (the )?| of turn \d+$")  # what a warning counts as
Encoding = Encoded | dict[str, Encoded] | None
"""What a row became: a conversation's ids, or those of the answers of a pair by name."""


class Audit:
    def __init__(self, config: Any, encoder: Any = None, kind: str | None = "sft", eval_data: Any = None) -> None:
        self.config, self.kind = config, kind
        if getattr(config, "streaming", False) and not any(map(sources.is_hub, specs(config))):
            raise UserError("only hub datasets are streamed", key="data.streaming", fix="leave it out")
        if getattr(config, "text_unit", "line") != "line" and not any(map(sources.has_plain_text, specs(config))):
            what = "says how plain text is read, and data.train has none"
            raise UserError(what, key="data.text_unit", fix="leave it out")
        self.encoder: Any = None if kind == "prompts" else encoder
        self.problems: list[tuple[str, str, int, checks.Finding | RowProblem]] = []
        self.listed = (LISTED, LISTED_ERRORS)
        self.kinds: Counter[str] = Counter()
        self.named: dict[str, Counter[str]] = {"unread_key": Counter(), "lost_content": Counter()}
        self.bad_rows: set[tuple[str, int]] = set()
        self.cut_off: list[Problem] = []  # files that could not be read to their end
        names = ("rows", "used", "dropped", "truncated", "cut_away", "duplicates", "leaked", "tokens", "trained_tokens")
        self.counts: Counter[str] = Counter(dict.fromkeys(names, 0))
        self.languages: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        self.token_lengths: Counter[int] = Counter()
        self.files: list[str] = []
        self._seen = (array("q"), array("I"), array("I"))  # identity, number of the file, row
        self._control = getattr(getattr(encoder, "guard", None), "any", CONTROL)
        self._held = self._index(eval_data)
        self.limit = getattr(config, "max_length", None)

    # --- the pass ---

    def rows(self, seed: int = 42) -> Iterator[tuple[Item, Encoding]]:
        """Every usable row, checked and with an encoder encoded; the others are noted."""
        if self.encoder is None:
            for batch in self._batches(seed):
                good = self._structure(batch)
                self.counts["used"] += len(good)
                yield from zip(good, itertools.repeat(None))
            return
        train_on = getattr(self.config, "train_on", "assistant")
        # While one batch is tokenised (in parallel, outside of Python's lock) the next is read, checked and rendered.
        with ThreadPoolExecutor(1) as beside:
            waiting: tuple[Any, ...] | None = None
            for batch in self._batches(seed):
                good = self._structure(batch)
                parts = [conversations(item.sample) for item in good]
                plans = self.encoder.plan_batch([c for part in parts for c in part.values()], train_on)
                future = beside.submit(self.encoder.tokenize_batch, plans)
                if waiting is not None:
                    yield from self._encoded(*waiting)
                waiting = (good, parts, plans, future)
            if waiting is not None:
                yield from self._encoded(*waiting)

    def _batches(self, seed: int) -> Iterator[list[Item]]:
        for spec in specs(self.config):
            kind = None if self.kind == "prompts" else self.kind  # an answer, good or bad, is no obstacle
            items = read_samples(spec, self.config, kind, seed=seed)
            yield from batched(apart(items) if kind == "unpaired" else items, BATCH)

    def _structure(self, batch: list[Item]) -> list[Item]:
        """The rows without structural errors."""
        for item in batch:
            if item.problem is not None and item.problem.kind == "empty_file":
                self._note("warning", item, checks.Finding("warning", "empty_file", item.problem.message))
        batch = [item for item in batch if item.problem is None or item.problem.kind != "empty_file"]
        self.counts["rows"] += len(batch)
        good: list[Item] = []
        texts: list[str] = []
        for item in batch:
            sample = item.sample
            if sample is None:
                assert item.problem is not None
                self._note("error", item, item.problem)
                if item.problem.ends_file:
                    self.cut_off.append(problem_of(item.file, item.row, item.problem))
                continue
            usable, text = True, all_text(sample)
            for finding in itertools.chain(checks.check(sample, text), checks.unread(item.data, text)):
                if finding.kind == "no_answer":
                    if self.kind == "prompts":
                        continue
                    if not any(name in item.data for name in ("messages", "conversations")):
                        what = f"no answer (columns: {', '.join(item.data)})"
                        finding = finding._replace(message=what, fix="add its column, or map it with data.columns")
                self._note(finding.level, item, finding)
                usable &= finding.level != "error"
            if usable:
                good.append(item)
                texts.append(text)
                if "<" in text or "[" in text:  # every control token holds one of the two
                    self._note_control(item, text)
        self._describe(good, texts)
        if self._held is not None:
            index, places = self._held
            prompts = [prompt_text(item.sample) for item in good]  # type: ignore[arg-type]
            leaks = index.search(prompts)
            known = {row for row, *_ in leaks}
            for row, item in enumerate(good):
                match = index.questions.get(questions(item.sample))  # type: ignore[arg-type]
                if match is not None and row not in known:
                    what = f"the question is in the held-out data ({places[match]}), under another system turn"
                    self._note("warning", item, checks.Finding("warning", "same_question", what))
            for row, match, similarity in leaks:
                self.counts["leaked"] += 1
                how = "is in the held-out data" if similarity == 1 else f"is {similarity:.0%} in the held-out data"
                what = f"the prompt {how} ({places[match]})"
                finding = checks.Finding("warning", "leakage", what, "take it out of one of the two")
                self._note("warning", good[row], finding)
        return good

    def _note_control(self, item: Item, text: str) -> None:
        found = self._control.search(text)
        hit = None if found is None else found[0]
        guard = getattr(self.encoder, "guard", None)
        if hit is not None and guard is not None:  # names like <think> are tokens where the assistant writes them
            messages = [m for c in conversations(item.sample).values() for m in c.messages]
            hit = next((token for m in messages for token in guard.found(m["content"], m["role"])), None)
        if hit is not None:
            what = f"{hit!r} in the content looks like a control token; it is trained as plain text"
            self._note("warning", item, checks.Finding("warning", "control_token", what))

    def _describe(self, items: list[Item], texts: list[str]) -> None:
        """Histograms, the fingerprints for duplicates; for a whole batch, which spares calls for every row."""
        self.languages.update(map(language, texts))
        self.lengths.update(map(int.bit_length, map(len, texts)))
        identities, files, rows = self._seen
        identities.extend([identity(item.sample) for item in items])  # type: ignore[arg-type]
        rows.extend([item.row for item in items])
        for file, group in itertools.groupby(items, operator.attrgetter("file")):
            if not self.files or self.files[-1] != file:
                self.files.append(file)
            files.extend([len(self.files) - 1 for _ in group])

    def _encoded(
        self, items: list[Item], parts: list[dict[str, Conversation]], plans: Any, future: Future[Any]
    ) -> Iterator[tuple[Item, Encoding]]:
        """The rows that keep a trained token within max_length, encoded."""
        results = iter(self.encoder.label_batch(plans, future.result()))
        for item, part in zip(items, parts, strict=True):
            encoded = dict(zip(part, results, strict=False))  # as many of the results as the part has names
            problem = next((e for e in encoded.values() if isinstance(e, RowProblem)), None) or self._forged(part)
            problem = problem or self._lost(item, part, encoded)
            if problem is not None:
                self._note("error", item, problem)
                continue
            kept = self._fit(item, encoded)
            if kept is not None:
                self.counts["used"] += 1
                yield item, kept.get("", kept)

    def _lost(self, item: Item, part: dict[str, Conversation], encoded: dict[str, Encoded]) -> RowProblem | None:
        """What the chat template leaves out: an error where it would be trained, elsewhere a warning."""
        found = dict.fromkeys(lost for row in encoded.values() for lost in row.lost)
        for what, trained in found:
            if trained:
                last = any(what.endswith(f" {len(c.messages)}") for c in part.values())
                fix = "set model.chat_template to one with a place for it, or take it out of the row"
                if "thinking" in what and not last:
                    fix = "set data.train_on: last, or give each turn a row of its own"
                return RowProblem("lost_content", f"the chat template leaves out {what}, which would be trained", fix)
        self.left_out(item, [what for what, _ in found])
        if getattr(self.encoder, "template", None) is not None and getattr(self.config, "train_on", "") != "all":
            for number in {n: None for c in part.values() for n in flagged_in_vain(c.messages)}:
                what = f"turn {number}: not read: train (only turns of the assistant are trained)"
                self._note("warning", item, checks.Finding("warning", "unread_key", what))
        return None

    def left_out(self, item: Item, fields: Iterable[str]) -> None:
        for field in fields:
            what = f"the chat template leaves out {field}"
            self._note("warning", item, checks.Finding("warning", "lost_content", what))

    def _forged(self, part: dict[str, Conversation]) -> RowProblem | None:
        """Turn markers that are plain text to the tokenizer, written in content."""
        for conversation in part.values():
            found = self.encoder.forged_markers(conversation.messages)
            if found and getattr(self.config, "on_forged_marker", "error") == "error":
                turn, marker = found[0]
                what = f"turn {turn}: {marker!r} is a turn marker of this model, and plain text to its tokenizer"
                return RowProblem("forged_marker", what, "remove it, or set data.on_forged_marker: allow")
            self.counts["forged_markers"] += len(found)
        return None

    def _fit(self, item: Item, encoded: dict[str, Encoded]) -> dict[str, Encoded] | None:
        """Apply max_length; None when the row is out."""
        cut: dict[str, Encoded] = {}
        for name, row in encoded.items():
            trained = len(row.labels) - row.labels.count(IGNORED)
            if not trained:
                what = "no token would be trained: every label is masked"
                self._note("error", item, RowProblem("no_trained_token", what, "train a turn, or remove the row"))
                return None
            length = len(row.input_ids)
            self.token_lengths[length.bit_length()] += 1
            if self.limit is not None and length > self.limit:
                fitted = self._overlong(item, row, trained)
                if fitted is None:
                    return None
                row, trained = fitted
            cut[name] = row
            self.counts["tokens"] += len(row.input_ids)
            self.counts["trained_tokens"] += trained
        if "chosen" in cut and cut["chosen"].input_ids == cut["rejected"].input_ids:
            what = f"chosen and rejected are the same within {self.limit} tokens"
            self._note("error", item, RowProblem("same_answers", what, "raise data.max_length, or remove the row"))
            return None
        return cut

    def _overlong(self, item: Item, row: Encoded, trained: int) -> tuple[Encoded, int] | None:
        """The row cut to max_length and its trained tokens; None when it is out."""
        length, policy = len(row.input_ids), getattr(self.config, "on_overlong", "truncate")
        what = f"{length} tokens, over data.max_length {self.limit}"
        if policy == "error":
            fix = "raise data.max_length, or set data.on_overlong: truncate or drop"
            self._note("error", item, RowProblem("overlong", what, fix))
            return None
        if policy == "drop":
            self.counts["overlong_dropped"] += 1
            self.counts["dropped"] += 1
            self._note("warning", item, checks.Finding("warning", "overlong", f"{what}: left out"))
            return None
        shorter = cut(self.encoder.tokenizer, row, int(self.limit or length))
        kept = len(shorter.labels) - shorter.labels.count(IGNORED)
        if not kept:
            self.counts["cut_away"] += 1
            what += ": nothing that is trained is left, the row is left out"
            self._note("warning", item, checks.Finding("warning", "cut_away", what, "raise data.max_length"))
            return None
        self.counts["truncated"] += 1
        what += f": cut at the end, {trained - kept} of {trained} trained tokens lost"
        self._note("warning", item, checks.Finding("warning", "overlong", what, "raise data.max_length"))
        return shorter, kept

    # --- the outcome ---

    def refuse(self, item: Item, problem: RowProblem) -> None:
        """Take back a row that `rows` gave: its reader cannot use it."""
        self.counts["used"] -= 1
        self._note("error", item, problem)

    def _note(self, level: str, item: Item, finding: checks.Finding | RowProblem) -> None:
        self.kinds[finding.kind] += 1
        if level == "warning" and finding.kind in self.named:
            self.named[finding.kind][SHORT.sub("", finding.message)] += 1
        if level == "error":
            self.bad_rows.add((item.file, item.row))
            if len(self.bad_rows) > self.listed[1]:
                return
        elif self.kinds[finding.kind] > self.listed[0]:
            return
        self.problems.append((level, item.file, item.row, finding))

    def duplicates(self) -> list[tuple[str, int, str, int]]:
        """(file, row, file and row of the first like it) of every repeated row."""
        keys, files, rows = (np.frombuffer(a, dtype=a.typecode) if a else np.empty(0, int) for a in self._seen)
        order = np.argsort(keys, kind="stable")
        same = np.flatnonzero(np.diff(keys[order]) == 0)
        found: list[tuple[int, tuple[str, int, str, int]]] = []
        first: dict[int, int] = {}
        for at in same.tolist():
            head = first.get(int(keys[order[at]]))
            if head is None:
                head = first[int(keys[order[at]])] = int(order[at])
            again = int(order[at + 1])
            place = (self.files[files[again]], int(rows[again]), self.files[files[head]], int(rows[head]))
            if place[:2] != place[2:]:  # several samples of one row may well be alike
                found.append((again, place))
        return [place for _, place in sorted(found)]

    def settle(self) -> None:
        """Raise what must stop a run: any unusable row, or with on_error: drop too many of them."""
        self.counts["duplicates"] = len(self.duplicates())
        counts, rows = self.counts, max(1, self.counts["rows"])
        allowed = getattr(self.config, "max_dropped", 0.05)
        errors = [problem_of(file, row, found) for level, file, row, found in self.problems if level == "error"]
        if errors and getattr(self.config, "on_error", "stop") == "stop":
            raise UserError(errors)
        if self.cut_off:
            raise UserError(self.cut_off)  # leaving out the rest of a file is not leaving out a row
        counts["dropped"] += len(self.bad_rows)
        if len(self.bad_rows) > allowed * rows:
            what = f"{len(self.bad_rows)} of {rows} rows cannot be used, over data.max_dropped ({allowed:.0%})"
            raise UserError([Problem(what, key="data.max_dropped", fix="mend the rows below"), *errors])
        if counts["cut_away"] > allowed * rows:
            what = f"{counts['cut_away']} of {rows} rows have no trained token within {self.limit} tokens"
            fix = "raise it, or set data.on_overlong: drop"
            raise UserError([Problem(what, key="data.max_length", fix=fix), *self._listed("cut_away")])
        counts["dropped"] += counts["cut_away"]
        if not counts["used"]:
            what, fix = "no rows to train on", "check the files and data.max_length"
            raise UserError([Problem(what, key="data.train", fix=fix), *self._listed("cut_away", "overlong")])

    def _listed(self, *kinds: str) -> list[Problem]:
        return [problem_of(file, row, found) for _, file, row, found in self.problems if found.kind in kinds]

    def warnings(self) -> list[str]:
        """One line per kind of warning, for the start of a training run."""
        lines = sources.left_out(specs(self.config), offer=self._held is None)
        told = {"duplicates": "duplicate rows", "leaked": "rows whose prompt is in the held-out data"}
        told |= {
            "truncated": "rows cut to data.max_length",
            "cut_away": "rows left out: nothing trained within max_length",
        }
        told |= {
            "overlong_dropped": "rows left out: over data.max_length",
            "forged_markers": "turn markers inside content",
        }
        for name, what in told.items():
            if self.counts[name]:
                lines.append(f"{self.counts[name]:,} {what}")
        told = {"empty_file": "files are empty"}
        told |= {"control_token": "rows with control tokens in content (trained as plain text)"}
        told |= {"same_question": "rows whose question is in the held-out data, under another system turn"}
        for kind, what in told.items():
            if self.kinds[kind]:
                lines.append(f"{self.kinds[kind]:,} {what}")
        told = {"unread_key": "keys that are not read", "lost_content": "fields that the chat template leaves out"}
        for kind, what in told.items():
            if self.kinds[kind]:
                names = [name for name, _ in self.named[kind].most_common(6)]
                lines.append(f"{self.kinds[kind]:,} {what}: {', '.join([*names[:5], *('…' for _ in names[5:])])}")
        if self.bad_rows:
            lines.append(f"{len(self.bad_rows):,} rows left out: they cannot be used")
        return lines

    def rejects(self) -> dict[tuple[str, int], list[str]]:
        """(file, row) -> why, of every row that --fix takes out: errors, duplicates, leaks, nothing left to train."""
        taken = ("leakage", "cut_away")
        out: dict[tuple[str, int], list[str]] = {}
        for level, file, row, found in self.problems:
            if level == "error" or found.kind in taken:
                out.setdefault((file, row), []).append(found.message)
        for file, row, first_file, first in self.duplicates():
            out.setdefault((file, row), []).append(f"the same as {first_file}, row {first}")
        return out

    def report(self) -> Report:
        repeated = self.duplicates()
        self.counts["duplicates"] = len(repeated)
        self.kinds["duplicate"] = len(repeated)
        listed = [self._entry(*problem) for problem in self.problems]
        for file, row, first_file, first in repeated[:LISTED]:
            where = f"row {first}" if file == first_file else f"{first_file}, row {first}"
            listed.append(
                {"level": "warning", "file": file, "row": row, "kind": "duplicate", "message": f"the same as {where}"}
            )
        listed.sort(key=lambda problem: problem["level"])
        return Report(
            rows=self.counts["rows"],
            trained_tokens=self.counts["trained_tokens"] if self.encoder is not None else None,
            problems=listed,
            kinds=dict(self.kinds),
            counts=dict(self.counts),
            languages=dict(self.languages.most_common()),
            characters=histogram(self.lengths),
            tokens=histogram(self.token_lengths),
        )

    def _entry(self, level: str, file: str, row: int, found: checks.Finding | RowProblem) -> dict[str, Any]:
        message = found.message + (f" → {found.fix}" if found.fix else "")
        if isinstance(found, RowProblem) and found.line is not None:
            message = f"line {found.line}: {message}"
        return {"level": level, "file": file, "row": row, "kind": found.kind, "message": message}

    def _index(self, eval_data: Any) -> tuple[leakage.Index, list[str]] | None:
        """The held-out prompts and their places."""
        if eval_data is None:
            return None
        prompts, asked, places = [], [], []
        for spec in specs(eval_data):
            for item in read_samples(sources.held_out(spec), as_held_out(self.config), None):
                if item.sample is not None:
                    prompts.append(prompt_text(item.sample))
                    asked.append(questions(item.sample))
                    places.append(f"{item.file}, row {item.row}")
        return leakage.Index(prompts, asked), places


def check(
    config: Any, encoder: Any = None, *, kind: str | None = "sft", eval_data: Any = None, seed: int = 42
) -> Report:
    """Read everything, report everything. UserError only where a source cannot be read at all."""
    audit = Audit(config, encoder, kind, eval_data)
    with seldom_collecting():
        for _ in watched(audit.rows(seed), config, "reading" if encoder is None else "tokenising"):
            pass
    return audit.report()


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


def problem_of(file: str, row: int, found: checks.Finding | RowProblem) -> Problem:
    line = found.line if isinstance(found, RowProblem) else None
    return Problem(found.message, path=file, row=row, line=line, fix=found.fix)


def flagged_in_vain(messages: list[Message]) -> list[int]:
    """Numbers of the turns that ask to be trained and are not the assistant's."""
    if is_plain(messages):
        return []
    return [n for n, m in enumerate(messages, 1) if m["role"] != "assistant" and m.get("train")]


LONGEST = 4  # bytes of a character, each of which may be a token


def whole(tokenizer: Any, ids: list[int], end: int) -> int:
    """`end`, or the place before it where no character is cut in half."""
    for place in range(end, max(end - LONGEST, 0), -1):
        if not tokenizer.decode(ids[max(place - 2 * LONGEST, 0) : place]).endswith("\ufffd"):
            return place
    return end


def cut(tokenizer: Any, row: Encoded, limit: int | None) -> Encoded:
    """The first `limit` tokens of a row, less those of a character that would be cut in half."""
    if limit is None or len(row.input_ids) <= limit:
        return row
    end = whole(tokenizer, row.input_ids, limit)
    return Encoded(row.input_ids[:end], row.labels[:end], row.weights and row.weights[:end])


def conversations(sample: Any) -> dict[str, Conversation]:
    """What is encoded of a sample, by name; "" for the only one."""
    if isinstance(sample, Conversation):
        return {"": sample}
    if isinstance(sample, Preference):
        prompt = [{**m, "train": False} if m["role"] == "assistant" else m for m in sample.prompt]
        answers = {"chosen": sample.chosen, "rejected": sample.rejected}
        return {name: Conversation(prompt + answer, sample.tools) for name, answer in answers.items()}
    if isinstance(sample, Unpaired):
        prompt = [{**m, "train": False} if m["role"] == "assistant" else m for m in sample.prompt]
        return {"": Conversation(prompt + sample.completion, sample.tools)}
    assert isinstance(sample, Text)
    return {}


def apart(items: Iterable[Item]) -> Iterator[Item]:
    """A pair as one good and one bad answer."""
    for item in items:
        pair = item.sample
        if isinstance(pair, Preference):
            for answer, label in ((pair.chosen, True), (pair.rejected, False)):
                yield item._replace(sample=Unpaired(pair.prompt, answer, label, pair.tools))
        else:
            yield item


def batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
