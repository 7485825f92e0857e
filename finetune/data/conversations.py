"""Conversations as token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from finetune.cache import cache_folder
from finetune.data import sources, token_cache
from finetune.data.audit import Audit
from finetune.data.encoder import Encoder
from finetune.data.rows import Places, Rows, divided
from finetune.data.samples import specs, watched
from finetune.data.templates import A, U
from finetune.data.types import IGNORED, Conversation, Encoded, Sample
from finetune.recipe.sections import DataConfig

SAMPLED = 64


def load_sft(
    config: DataConfig, encoder: Encoder, *, seed: int = 42, eval_data: Any = None, cache: Path | None = None
) -> Rows:
    """input_ids, labels and, where turns are weighted, weights of `data.train`, split by `data.eval_split`. UserError
    with every problem of every row.

    eval_data: held-out rows, only looked at for leakage. cache: where tokenised rows of large files are kept.
    """
    path = cache_file(config, encoder, eval_data, seed, cache)
    found = None if path is None else token_cache.read(path)
    table, noted = found or tokenised(config, encoder, seed, eval_data, path)
    marks = table.select_columns(["content_hash", "repeat", "file", "row"]).with_format("numpy")[:]
    rows = table.select_columns(["input_ids", "labels", *(["weights"] if noted["weighted"] else [])])
    everything = np.arange(len(rows))

    def pick(numbers: np.ndarray) -> Any:
        """By row numbers: nothing is copied."""
        return rows if np.array_equal(numbers, everything) else rows.select(numbers)

    said = [*([encoder.notice] if encoder.notice else []), *noted["warnings"], *of_thinking(encoder, noted["counts"])]
    hashes = np.asarray(marks["content_hash"], np.uint64)
    places = Places(noted["files"], marks["file"], marks["row"])
    counts, seen = noted["counts"], noted.get("seen") or {}  # which caches of earlier versions do not have
    return divided(pick, hashes, np.asarray(marks["repeat"]), config.eval_split, counts, said, places, seen)


def of_thinking(encoder: Encoder, counts: dict[str, int]) -> list[str]:
    """What a user should know whose rows have no thinking, and whose chat template writes an empty block for that."""
    if encoder.treatment != "keep" or encoder.thinking.switch is None or encoder.plain is not None:
        return []
    plainest = encoder.encode(Conversation([U, A]))
    learned = encoder.tokenizer.decode([token for token in plainest.labels if token != IGNORED])
    if counts.get("thinking") or encoder.thinking.end not in learned:
        return []
    how = "data.thinking: empty trains the answers alone"
    return [f"no row has thinking, and the empty block that the chat template writes for that is trained, too ({how})"]


def tokenised(
    config: DataConfig, encoder: Encoder, seed: int, eval_data: Any, path: Path | None
) -> tuple[Any, dict[str, Any]]:
    """(the table of token_cache.Writer, counts, warnings and whether turns are weighted)."""
    audit = Audit(config, encoder, "sft", eval_data)
    sample: list[bool] = []
    with token_cache.Writer(path) as writer:
        for item, encoded in watched(audit.rows(seed), config):
            assert isinstance(encoded, Encoded)
            if len(sample) < SAMPLED:
                sample += begins_with_prompt(encoder, item.usable, encoded, config.train_on)
            writer.add(encoded, item.usable.content_hash, item.weight, (item.file, item.row))
        audit.settle()
    warnings = audit.warnings()
    if not all(sample):
        merged = f"{sample.count(False)} of {len(sample)} sampled rows"
        warnings.append(
            f"in {merged} the tokenizer merges the end of the prompt with the answer: generation will begin with "
            "other tokens than training; use a chat template whose header does not run into the answer"
        )
    return writer.finish({"counts": dict(audit.counts), "warnings": warnings, "seen": audit.seen()})


def begins_with_prompt(encoder: Encoder, sample: Sample, encoded: Encoded, train_on: str) -> list[bool]:
    """[whether the ids begin with the prompt that generation will see]; [] where no answer comes last or is left."""
    if not isinstance(sample, Conversation) or sample.reference is None:
        return []
    prompt = encoder.prompt_ids(sample.asked, sample.tools, encoder.mode(sample, train_on)[1])
    return [encoded.input_ids[: len(prompt)] == prompt] if len(prompt) < len(encoded.input_ids) else []


def cache_file(config: DataConfig, encoder: Encoder, eval_data: Any, seed: int, folder: Path | None) -> Path | None:
    """Where the tokenised rows of this very configuration are kept; None for small or remote data."""
    held = [] if eval_data is None else [sources.held_out(spec) for spec in sources.as_dicts(eval_data)]
    files = sources.local_files([*specs(config), *held]) if config.cache else None
    if files is None or (folder is None and sum(file.stat().st_size for file in files) < token_cache.LARGE):
        return None
    settings = config.model_dump(exclude={"eval_split", "packing", "cache"})
    key = token_cache.cache_key(files, settings, encoder.identity(), seed)
    return (folder or cache_folder()) / f"{key}.arrow"
