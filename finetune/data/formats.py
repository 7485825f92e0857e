"""Row formats: one line of FORMATS each. `detect` looks at the rows' fields, never at file names.

To add a format: a converter (row -> samples) in converters.py and a line in FORMATS, whose order is
the order of recognition: the more specific stands first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from finetune.data import converters
from finetune.data.converters import RANKED, Fields, is_turns, label_of, listed
from finetune.data.types import Sample
from finetune.errors import UserError


class Format(NamedTuple):
    kind: str  # sft | preference | unpaired | text
    recognise: Callable[[Fields], bool]
    convert: Callable[[Fields], Sequence[Sample]]
    columns: str
    """The columns as the documentation shows them; [brackets] mark optional ones."""
    about: str
    sample: str
    """A shipped file of this format."""


def is_ranked(row: Fields) -> bool:
    listed = any(isinstance(row.get(n), list) and len(row[n]) > 1 and not is_turns(row[n]) for n in RANKED)
    return listed and any(n in row for n in ("prompt", "question", "query", "instruction")) and "instances" not in row


TURNS = ("conversations", "messages")
UNPAIRED = (*TURNS, "completion", "response", "output", "answer")


def is_unpaired(row: Fields) -> bool:
    return label_of(row.get("label", row.get("kto_tag"))) is not None and any(column in row for column in UNPAIRED)


def has(*names: str) -> Callable[[Fields], bool]:
    return lambda row: all(name in row for name in names)


FORMATS: dict[str, Format] = {
    "preference": Format(
        "preference", has("chosen", "rejected"), converters.preference_pair,
        "[prompt|conversations|instruction], chosen (or chosen_messages), rejected, [system], [tools]",
        "a better and a worse answer: text, turns, sharegpt turns, or two full transcripts without a prompt",
        "preference.jsonl",
    ),
    "unpaired": Format(
        "unpaired", is_unpaired, converters.unpaired,
        "messages (or prompt, completion), label", "one answer, good (true) or bad (false), for KTO", "unpaired.jsonl",
    ),
    "ranked": Format(
        "preference", is_ranked, converters.ranked, "prompt (or instruction), responses, [scores|ranks]",
        "several answers, best first or with scores; every pair of different rank becomes a preference", "ranked.jsonl",
    ),
    "self_instruct": Format(
        "sft", lambda row: "instruction" in row and isinstance(row.get("instances"), list), converters.self_instruct,
        "instruction, instances: [{input, output}]", "self-instruct seed tasks; one sample per instance",
        "self_instruct.jsonl",
    ),
    "sharegpt": Format(
        "sft", lambda row: any(is_turns(row.get(t)) and "from" in row[t][0] for t in TURNS), converters.turns,
        "conversations: [{from, value}], [system], [tools]",
        "turns from human, gpt, system, function_call, observation, tool", "sharegpt.json",
    ),
    "chatglm3": Format(
        "sft", lambda row: is_turns(row.get("conversations")), converters.turns,
        "conversations: [{role, content, [loss]}], [tools]",
        "ChatGLM3's fine-tuning demo, tool turns and per-turn loss included", "chatglm3.json",
    ),
    "messages": Format(
        "sft", lambda row: any(isinstance(row.get(t), list) for t in TURNS), converters.turns,
        "messages: [{role, content, [tool_calls], [train]}], [tools]",
        "OpenAI's chat form, with tool calls and content parts", "messages.jsonl",
    ),
    "alpaca": Format(
        "sft", has("instruction"), converters.alpaca, "instruction, [input], output, [history], [system]",
        "Stanford Alpaca and its many children", "alpaca.json",
    ),
    "prompt_completion": Format(
        "sft", lambda row: "prompt" in row or "query" in row, converters.prompt_completion,
        "prompt, completion (or response), [system], [tools]", "text or turns in both columns",
        "prompt_completion.jsonl",
    ),
    "question_answer": Format(
        "sft", lambda row: "question" in row or has("problem", "solution")(row), converters.question_answer,
        "question (or problem), answer (or solution), [context]", "GSM8K and other question sets",
        "question_answer.csv",
    ),
    "inputs_targets": Format(
        "sft", lambda row: any(has(*pair)(row) for pair in converters.PAIRS), converters.inputs_targets,
        "inputs, targets (or input, output; source, target)", "FLAN and T5 style", "inputs_targets.tsv",
    ),
    "text": Format(
        "text", has("text"), converters.raw_text, "text",
        "raw text, for pre-training; in a text file every line is a document (or see data.text_unit)", "text.txt",
    ),
}  # fmt: skip


def rename(row: Fields, columns: Mapping[str, str] | None) -> Fields:
    """Apply data.columns ({the format's name: the file's name}); a column under its own name stays where it is."""
    if not columns:
        return row
    taken = set(columns.values())
    out = {name: value for name, value in row.items() if name not in taken}
    return out | {name: row[theirs] for name, theirs in columns.items() if theirs in row}


LISTED = {*TURNS, "history", "instances", *RANKED, "scores", "ratings", "ranks", "ranking"} - {"output"}
"""Columns of lists. Text there is JSON, from a csv file or written by those who keep every column text."""
PEERS = {"chosen_messages": "chosen", "rejected_messages": "rejected"}


def shaped(row: Fields, columns: Mapping[str, str] | None = None) -> Fields:
    """The row under the names of the formats, lists as lists."""
    row = rename(row, columns)
    changed: Fields = {}
    for name, value in row.items():
        if name in LISTED and type(value) is str:
            changed[name] = listed(value)
        elif name in PEERS and PEERS[name] not in row:
            changed[PEERS[name]] = value
    return {**row, **changed} if changed else row


def detect(rows: Iterable[Fields], columns: Mapping[str, str] | None = None) -> str:
    """The first format that recognises most of these rows (a sample is enough). UserError when none does."""
    renamed = [shaped(row, columns) for row in rows]
    counts = {name: sum(map(form.recognise, renamed)) for name, form in FORMATS.items()}
    best = max(counts, key=lambda name: counts[name])
    if not counts[best]:
        have = sorted({str(key) for row in renamed for key in row})
        what = f"no known format has the columns {', '.join(have) or '(none)'}"
        raise UserError(what, fix=f"set data.columns, or data.format to one of {', '.join(FORMATS)}")
    # Not simply the best: every preference row also looks like a bare prompt, and one broken row must not decide.
    often = (name for name in FORMATS if 2 * counts[name] >= len(renamed))
    return next(often, best)
