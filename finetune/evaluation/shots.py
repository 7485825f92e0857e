"""Examples before held-out rows (`eval.shots`): whole rows with their answers, as earlier turns of the conversation.

Drawn for each row by seed and by the row's own text: not by its place, nor by which rows stand beside it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.data import sources
from finetune.data.encoder import Encoder
from finetune.data.held_out import HeldOut, HeldRow, held_hashes
from finetune.data.samples import read_samples, section_of, specs
from finetune.data.text import is_endless
from finetune.data.types import Conversation, Preference, Sample, Unpaired, folded
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig

MOST = 1000  # rows of a large file that shots are drawn from, themselves drawn at random
OWN = "the other rows"
KEYS = ("eval.shots", "eval.shots_from")


@dataclass(frozen=True)
class Shots:
    """What each row gets."""

    number: int
    pool: Sequence[Conversation]
    source: str
    seed: int
    keys: tuple[str, str]
    """Where the number and the file are said."""

    def of(self, row: HeldRow) -> list[Conversation]:
        """UserError where there are too few whose questions are others than the row's."""
        own = question_of(row.sample)
        others = [one for one in self.pool if question_of(one) != own]
        if len(others) < self.number:
            what = f"{self.number} shots are wanted, and of {self.source} {len(others)} others have answers"
            fix = f"set fewer, or name another file with {self.keys[1]}"
            raise UserError(what, path=row.file, row=row.row, key=self.keys[0], fix=fix)
        return random.Random(f"{self.seed} {row.sample.content_hash} {own}").sample(others, self.number)


def question_of(sample: Sample) -> str:
    """Equal for rows that ask the same, whatever their system turns say."""
    return sample.questions or folded(sample.prompt_text)


def find(
    number: int, held: HeldOut, path: str | None, recipe: Any = None, seed: int = 0, keys: tuple[str, str] = KEYS
) -> Shots:
    """Of the file `path`, else of a run's training rows, else of the held-out rows themselves.

    recipe: of the run; None without one.
    """
    config: DataConfig | None = None if recipe is None else recipe.data
    if path is not None:
        return Shots(number, read(section_of(sources.as_dicts(path), config), seed, keys[1]), path, seed, keys)
    if config is not None and config.train != "-" and not is_endless(config):
        apart = held_hashes(config, recipe.train.seed) if held.hashes is None else held.hashes
        pool = [one for one in read(config, seed, keys[1]) if one.content_hash not in apart]
        return Shots(number, pool, "data.train", seed, keys)
    own = [one for sample in held.others or held.samples for one in usable(sample)]
    return Shots(number, own, OWN, seed, keys)


def read(config: DataConfig, seed: int, key: str) -> list[Conversation]:
    """What the rows of a data section, at most MOST of each source, can show. UserError when there are none."""
    found: list[Conversation] = []
    drawn = config.model_copy(update={"max_samples": MOST, "shuffle": True})
    for spec in specs(config):
        if not sources.is_remote(spec):
            sources.files_of(spec["path"], spec.get("split"))
        for item in read_samples(spec, drawn, None, seed=seed):
            found += [] if item.sample is None else usable(item.sample)
    if not found:
        raise UserError(
            "no row there has a question and an answer", path=str(specs(config)[0]["path"]), key=key,
            fix="name a file with conversations",
        )  # fmt: skip
    return found


def usable(sample: Any) -> list[Conversation]:
    """[the sample as turns of user and assistant], of a pair with the chosen answer; [] where it is none."""
    if isinstance(sample, Preference):
        sample = sample.conversations()["chosen"]
    elif isinstance(sample, Unpaired) and sample.label:
        sample = sample.conversations()[""]
    if not isinstance(sample, Conversation) or sample.tools or not sample.reference:
        return []
    turns = [turn for turn in sample.messages if turn["role"] != "system"]
    in_turn = all(turn["role"] == ("user", "assistant")[i % 2] for i, turn in enumerate(turns))
    return [Conversation(turns)] if in_turn and len(turns) % 2 == 0 else []


def asked(
    rows: Sequence[HeldRow], encoder: Encoder, max_new_tokens: int, limit: int | None
) -> tuple[list[HeldRow], list[str]]:
    """(the rows with their shots in the conversation, what is to be said of those that got fewer).

    limit: tokens that prompt and answer may have.
    """
    found, fewer = [], 0
    for row in rows:
        for number in range(len(row.shots), -1, -1):
            sample = together(row.sample, row.shots[:number])
            size = len(encoder.prompt_ids(sample.asked, sample.tools)) if number and limit is not None else 0
            if limit is None or size + max_new_tokens <= limit or not number:
                break
        fewer += number < len(row.shots)
        found.append(row._replace(sample=sample, shots=row.shots[:number]))
    what = f"{fewer} rows are asked with fewer shots: prompt and answer would have over {limit} tokens"
    return found, [what] * bool(fewer)


def together(sample: Conversation, shots: Sequence[Conversation]) -> Conversation:
    """The shots between the system turn and the rest."""
    if not shots:
        return sample
    first = 1 if sample.messages and sample.messages[0]["role"] == "system" else 0
    turns = [turn for shot in shots for turn in shot.messages]
    return replace(sample, messages=[*sample.messages[:first], *turns, *sample.messages[first:]])
