"""Recipe's data section -> tokenised datasets, or one UserError that lists every problem.

load_sft(config, encoder, seed=…) -> SftData           conversations, labels on the trained turns
load_samples(config, kind) -> list                     checked samples of any kind, not tokenised (DPO, KTO, reward)
load_held_out(spec, config) -> list[HeldRow]           rows to evaluate on, of whatever kind they are
load_eval_rows(spec, config) -> list[Conversation]     rows for generation; the last assistant turn is the reference
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.data import checks, formats, sources, token_cache
from finetune.data.audit import Audit, problem_of
from finetune.data.chat import Encoded
from finetune.data.samples import Item, all_text, as_held_out, content_hash, read_samples, specs, watched
from finetune.data.types import Conversation, RowProblem, Sample, attempted
from finetune.errors import Problem, UserError
from finetune.terminal.progress import warn


@dataclass
class SftData:
    train: Any
    """datasets.Dataset with input_ids, labels and, where turns are weighted, weights."""
    eval: Any | None
    """The rows held out by eval_split."""
    counts: dict[str, int]
    """rows, used, dropped, truncated, cut_away, duplicates, leaked, tokens, trained_tokens, eval_rows."""
    warnings: list[str] = field(default_factory=list)
    """One line per kind of thing that was found and did not stop the run."""


def load_sft(config: Any, encoder: Any, *, seed: int = 42, eval_data: Any = None, cache: Path | None = None) -> SftData:
    """Read, check, encode. UserError with every problem of every row.

    eval_data: held-out rows, only looked at for leakage. cache: where tokenised rows of large files are kept.
    """
    path = cache_file(config, encoder, eval_data, seed, cache)
    meta = path.with_suffix(".json") if path else None
    if path is not None and meta is not None and path.is_file() and meta.is_file():
        import datasets

        table = datasets.Dataset.from_file(str(path))
        noted = json.loads(meta.read_text(encoding="utf-8"))
        counts, warnings, weighted = noted["counts"], noted["warnings"], noted["weighted"]
    else:
        audit = Audit(config, encoder, "sft", eval_data)
        writer = token_cache.Writer(path)
        sample: list[bool] = []
        try:
            for item, encoded in watched(audit.rows(seed), config):
                assert isinstance(encoded, Encoded)
                assert item.sample is not None
                if len(sample) < SAMPLED:
                    sample += begins_with_prompt(encoder, item.sample, encoded)
                writer.add(encoded, content_hash(item.sample), item.weight)
            audit.settle()
        except BaseException:
            writer.discard()
            raise
        table, weighted = writer.table(), writer.weighted
        counts, warnings = dict(audit.counts), audit.warnings()
        if not all(sample):
            merged = f"{sample.count(False)} of {len(sample)} sampled rows"
            warnings.append(
                f"in {merged} the tokenizer merges the end of the prompt with the answer: generation will begin with "
                "other tokens than training; use a chat template whose header does not run into the answer"
            )
        if meta is not None:
            noted = {"counts": counts, "warnings": warnings, "weighted": weighted}
            meta.write_text(json.dumps(noted), encoding="utf-8")
    if encoder.notice is not None:
        warnings = [encoder.notice, *warnings]
    return split(table, weighted, config, counts, warnings)


SAMPLED = 64


def begins_with_prompt(encoder: Any, sample: Sample, encoded: Encoded) -> list[bool]:
    """[whether the ids begin with the prompt that generation will see]; [] where no answer comes last or is left."""
    if not isinstance(sample, Conversation) or sample.messages[-1]["role"] != "assistant":
        return []
    prompt = encoder.prompt_ids(sample.messages[:-1], sample.tools)
    return [encoded.input_ids[: len(prompt)] == prompt] if len(prompt) < len(encoded.input_ids) else []


def split(table: Any, weighted: bool, config: Any, counts: dict[str, int], warnings: list[str]) -> SftData:
    """Hold rows out and repeat rows of weighted sources, by row numbers: nothing is copied."""
    columns = ["input_ids", "labels"] + (["weights"] if weighted else [])
    marks = table.select_columns(["content_hash", "repeat"]).with_format("numpy")[:]
    hashes, repeat = np.asarray(marks["content_hash"], np.uint64), np.asarray(marks["repeat"])
    held = held_out(hashes, config.eval_split)
    times = times_used(hashes, repeat)
    times[held] = 0
    rows = table.select_columns(columns)
    counts = {**counts, "eval_rows": int(held.sum())}
    warnings = [*warnings, *uneven(held, config.eval_split)]
    if not times.any():
        raise UserError("every row is held out", key="data.eval_split", fix="hold out fewer rows")
    train = rows if (times == 1).all() else rows.select(np.repeat(np.arange(len(times)), times))
    return SftData(train, rows.select(np.flatnonzero(held)) if held.any() else None, counts, warnings)


def held_out(hashes: np.ndarray, share: float | int | None) -> np.ndarray:
    """Which rows are held out: by hash alone, so more data never moves a row; a number takes the lowest hashes, and so
    does a share of so few rows that it would take none."""
    if not share or not len(hashes):
        return np.zeros(len(hashes), bool)
    if isinstance(share, float):
        return hashes < max(np.uint64(share * 2**64), np.sort(hashes)[0] + np.uint64(1))  # one row at least
    limit = np.sort(hashes)[min(share, len(hashes)) - 1]
    return hashes <= limit


def uneven(held: np.ndarray, share: float | int | None) -> list[str]:
    """A warning where much more or less was held out than was asked."""
    if not share or not len(held):
        return []
    wanted, got = share * len(held) if isinstance(share, float) else share, int(held.sum())
    if got and abs(got - wanted) <= 5 * max(1.0, wanted) ** 0.5:
        return []
    return [f"data.eval_split holds out {got:,} of {len(held):,} rows: rows with the same first question stay together"]


def times_used(hashes: np.ndarray, repeat: np.ndarray) -> np.ndarray:
    """How often each row is used: weight 2.5 is twice, and for half of the rows, by hash, once more."""
    whole = np.floor(repeat).astype(np.int64)
    order = np.argsort(hashes, kind="stable")
    again = np.empty(len(hashes), np.uint64)  # 0, 1, 2, … for the rows of one question, which differ in this
    again[order] = np.arange(len(hashes)) - np.searchsorted(hashes[order], hashes[order], "left")
    mixed = ((hashes + again) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)  # not the bits that hold rows out
    return whole + (mixed / 2.0**53 < repeat - whole)


def cache_file(config: Any, encoder: Any, eval_data: Any, seed: int, folder: Path | None) -> Path | None:
    """Where the tokenised rows of this very configuration are kept; None for small or remote data."""
    if not getattr(config, "cache", False):
        return None
    listed = specs(config) + [sources.held_out(spec) for spec in specs(eval_data) if eval_data is not None]
    if any(sources.is_hub(spec) or spec.get("source") == "modelscope" for spec in listed):
        return None
    files = [file for spec in listed for file in sources.files_of(spec["path"], spec.get("split"))]
    if folder is None and sum(file.stat().st_size for file in files) < token_cache.LARGE:
        return None
    settings = (
        config.model_dump(exclude={"eval_split", "packing", "cache"}) if hasattr(config, "model_dump") else config
    )
    return (
        folder or token_cache.cache_folder()
    ) / f"{token_cache.cache_key(files, settings, encoder.identity(), seed)}.arrow"


def screen(config: Any, kind: str) -> None:
    """UserError with every structural problem, before torch is imported: a second instead of ten.

    Large or remote data is left to the pass that also tokenises; reading it twice would cost more than it saves.
    """
    listed = specs(config)
    if any(sources.is_hub(spec) or spec.get("source") == "modelscope" for spec in listed):
        return
    files = [file for spec in listed for file in sources.files_of(spec["path"], spec.get("split"))]
    if sum(file.stat().st_size for file in files) < token_cache.LARGE:
        load_samples(config, kind)


def load_samples(config: Any, kind: str, *, encoder: Any = None, seed: int = 42, eval_data: Any = None) -> list[Sample]:
    """All usable samples of `kind` (sft, preference, unpaired, text). UserError with every problem of every row."""
    audit = Audit(config, encoder, kind, eval_data)
    samples = [item.sample for item, _ in audit.rows(seed) if item.sample is not None]
    audit.settle()
    return samples


class HeldRow(NamedTuple):
    """A row to evaluate on, with its place."""

    file: str
    row: int
    sample: Sample
    group: str | None = None
    """What its column `group` says. Metrics are given per group, too."""


def load_held_out(spec: Any, config: Any = None, kind: str | None = None, *, encoder: Any = None) -> list[HeldRow]:
    """The rows of a file to evaluate on, of the kind that they are (or of `kind` alone), all of one kind. Conversations
    with only a prompt are fine. UserError with every unusable row, and with an encoder also with those that it cannot
    encode."""
    rows: list[HeldRow] = []
    errors: list[Problem] = []
    columns = as_held_out(config)
    for source in map(sources.held_out, specs(spec)):
        for item in read_samples(source, columns, kind):
            if item.problem is not None and item.problem.kind == "empty_file":
                warn(f"{item.file}: {item.problem.message}")
                continue
            if item.problem is not None:
                errors.append(problem_of(item.file, item.row, item.problem))
                continue
            assert item.sample is not None
            found = checks.check(item.sample, all_text(item.sample))
            bad: list[checks.Finding | RowProblem] = [f for f in found if f.level == "error" and f.kind != "no_answer"]
            if encoder is not None and not bad:
                problem = attempted(encoder.encode, item.sample, "last")
                bad = [problem] if isinstance(problem, RowProblem) else []
            errors += [problem_of(item.file, item.row, f) for f in bad]
            if not bad:
                rows.append(held_row(item, source.get("columns") or columns.columns))
    if errors:
        raise UserError(errors)
    if not rows:
        raise UserError("no rows", path=str(spec), fix="name a file with rows")
    other = next((row for row in rows if type(row.sample) is not type(rows[0].sample)), None)
    if other is not None:
        raise UserError(
            f"row {other.row} is of another kind than {rows[0].file}, row {rows[0].row}", path=other.file,
            fix="evaluate them one after the other",
        )  # fmt: skip
    return rows


def held_row(item: Item, columns: dict[str, str] | None) -> HeldRow:
    group = formats.shaped(item.data, columns).get("group")
    named = str(group) if isinstance(group, str | int | float) and group != "" else None  # a list names no group
    assert item.sample is not None
    sample = replace(item.sample, group=named) if isinstance(item.sample, Conversation) else item.sample
    return HeldRow(item.file, item.row, sample, named)


def load_eval_rows(spec: Any, config: Any = None, *, encoder: Any = None) -> list[Conversation]:
    """Conversations for generation; as `load_held_out`."""
    found = load_held_out(spec, config, "sft", encoder=encoder)
    return [row.sample for row in found if isinstance(row.sample, Conversation)]
