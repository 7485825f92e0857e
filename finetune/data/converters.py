"""One function per row format: the columns of a row -> its samples. Raises RowProblem where a row does not fit."""

from __future__ import annotations

import difflib
import re
from typing import Any

from finetune.data.messages import answer_text, is_parts, kind_of, parse_tools, text_of, to_messages
from finetune.data.types import Conversation, Message, Preference, RowProblem, Text, Unpaired, is_plain
from finetune.json_text import decode, same

Fields = dict[str, Any]


def is_turns(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and ("role" in first or "from" in first)


def listed(value: Any) -> Any:
    """The list that a text spells, where only a list makes sense; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            return decode(value)
        except ValueError:
            return value
    return value


def field(row: Fields, *names: str) -> Any:
    """The first of these columns the row has; RowProblem when it has none."""
    if (value := maybe(row, *names)) is not None:
        return value
    null = next((name for name in names if name in row), None)
    if null is not None:
        raise RowProblem("missing_column", f"{null} is null", "fill it in, or remove the row")
    have = ", ".join(sorted(map(str, row))) or "none"
    near = difflib.get_close_matches(names[0], map(str, row), n=1)
    rename = f"rename {near[0]!r} or set data.columns: {{{names[0]}: {near[0]}}}" if near else None
    fix = rename or "fill it in, or map it with data.columns"
    raise RowProblem("missing_column", f"no {' or '.join(map(repr, names))} (columns: {have})", fix)


def maybe(row: Fields, *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def with_system(row: Fields, messages: list[Message]) -> list[Message]:
    system = maybe(row, "system", "system_prompt")
    if system is not None:
        system = text_of(system, "system")
        if system.strip() and (not messages or messages[0]["role"] != "system"):
            return [{"role": "system", "content": system}, *messages]
    return messages


def tools_of(row: Fields) -> list[dict[str, Any]] | None:
    return parse_tools(maybe(row, "tools", "functions"))


def lifted(row: Fields, *lists: list[Message]) -> list[dict[str, Any]] | None:
    """The row's tools, also where a turn holds them, which loses them."""
    tools = tools_of(row)
    for messages in lists:
        for i, message in enumerate(messages):
            if "tools" in message:
                messages[i] = message = dict(message)
                found = parse_tools(message.pop("tools"))
                if tools and found and not same(tools, found):
                    raise RowProblem("bad_tools", "different tools in one row", "write them once, in the column tools")
                tools = tools or found
    return tools


def as_prompt(value: Any, column: str) -> list[Message]:
    """A prompt: text becomes one user turn, a list is a list of turns."""
    if isinstance(value, list) and (is_turns(value) or not value):
        return to_messages(value, column)
    return [{"role": "user", "content": answer_text(value, column)}]


def as_answer(value: Any, column: str) -> list[Message]:
    """An answer: text, one turn, or a list of turns."""
    turns = [value] if isinstance(value, dict) else value
    if is_turns(turns):
        return to_messages(turns, column)
    if is_parts(value):
        return to_messages([{"role": "assistant", "content": value}], column)
    return [{"role": "assistant", "content": answer_text(value, column)}]


def flat(row: Fields, prompt: Any, answer: Any, name: str) -> list[Conversation]:
    """Prompt and answer columns -> one conversation; without an answer, only the prompt (for generation)."""
    messages = with_system(row, as_prompt(prompt, "prompt"))
    if answer is not None:
        messages = messages + as_answer(answer, name)
    return [Conversation(messages, tools_of(row))]


# --- SFT ---


def alpaca_prompt(row: Fields) -> list[Message]:
    instruction = answer_text(field(row, "instruction"), "instruction")
    extra = answer_text(maybe(row, "input", "context"), "input")
    messages = with_system(row, [])
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowProblem("wrong_type", f"history is {kind_of(history)}, not a list", "write [[question, answer], …]")
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowProblem(
                "wrong_type",
                f"history, item {number} is not a [question, answer] pair",
                "write [[question, answer], …]",
            )
        messages.append({"role": "user", "content": text_of(pair[0], f"history, item {number}")})
        messages.append({"role": "assistant", "content": text_of(pair[1], f"history, item {number}")})
    messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra.strip() else instruction})
    return messages


def alpaca(row: Fields) -> list[Conversation]:
    messages = alpaca_prompt(row)
    answer = maybe(row, "output", "response", "answer", "completion")
    if answer is not None:
        messages.append({"role": "assistant", "content": answer_text(answer, "output")})
    elif "output" not in row and any(name not in PROMPT_ONLY for name in row):
        field(row, "output", "response")  # a misspelt answer column must not turn the row into a prompt
    return [Conversation(messages, tools_of(row))]


PROMPT_ONLY = {
    "instruction", "input", "context", "history", "system", "system_prompt", "tools", "id", "prompt", "category",
}  # fmt: skip


def self_instruct(row: Fields) -> list[Conversation]:
    instruction = answer_text(field(row, "instruction"), "instruction")
    samples = []
    for number, instance in enumerate(field(row, "instances"), 1):
        if not isinstance(instance, dict) or "output" not in instance:
            raise RowProblem("missing_column", f"instances, item {number} has no 'output'", "write {input, output}")
        samples += alpaca({"instruction": instruction, "input": instance.get("input"), "output": instance["output"]})
    return samples


def turns(row: Fields) -> list[Conversation]:
    column = "conversations" if "conversations" in row else "messages"
    messages = to_messages(field(row, column), column)
    if len(row) == 1 and is_plain(messages):
        return [Conversation(messages)]
    tools = lifted(row, messages)
    return [Conversation(with_system(row, messages), tools)]


def prompt_completion(row: Fields) -> list[Conversation]:
    return flat(row, field(row, "prompt", "query"), maybe(row, "completion", "response", "answer"), "completion")


def question_answer(row: Fields) -> list[Conversation]:
    question = answer_text(field(row, "question", "problem"), "question")
    context = answer_text(maybe(row, "context"), "context")
    prompt = f"{context}\n{question}" if context.strip() else question
    return flat(row, prompt, maybe(row, "answer", "solution", "response"), "answer")


PAIRS = [("inputs", "targets"), ("input", "output"), ("input", "target"), ("source", "target")]


def inputs_targets(row: Fields) -> list[Conversation]:
    question, answer = next((pair for pair in PAIRS if pair[0] in row and pair[1] in row), PAIRS[0])
    return flat(row, field(row, question), maybe(row, answer), answer)


# --- Preference ---


def split_answers(prompt: list[Message], chosen: list[Message], rejected: list[Message], row: Fields) -> Preference:
    """Full transcripts share their beginning: what both begin with moves into the prompt."""
    if not prompt:
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and same(chosen[shared], rejected[shared]):
            shared += 1
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise RowProblem("no_shared_prompt", "chosen and rejected have no common beginning", "add a prompt column")
    else:
        chosen, rejected = (a[len(prompt) :] if same(a[: len(prompt)], prompt) else a for a in (chosen, rejected))
    tools = lifted(row, prompt, chosen, rejected)
    return Preference(with_system(row, prompt), chosen, rejected, tools)


def preference_pair(row: Fields) -> list[Preference]:
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    prompt = maybe(row, "prompt", "question", "conversations", "messages")
    if prompt is None and isinstance(row.get("instruction"), str):
        messages = alpaca_prompt(row)
    elif prompt is None and isinstance(chosen, str) and TRANSCRIPT.match(chosen):
        return [split_answers([], transcript(chosen), transcript(str(rejected)), row)]
    elif prompt is None:
        messages = []
        chosen, rejected = listed(chosen), listed(rejected)  # a csv file has only text for them
        if not is_turns(chosen):
            field(row, "prompt")
    else:
        messages = as_prompt(prompt, "prompt")
    return [split_answers(messages, as_answer(chosen, "chosen"), as_answer(rejected, "rejected"), row)]


TRANSCRIPT = re.compile(r"\s*(Human|Assistant): ")


def transcript(text: str) -> list[Message]:
    """The "Human: … Assistant: …" transcripts of the hh-rlhf data -> messages."""
    pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text.lstrip("\n"))
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[pieces[i]], "content": pieces[i + 1].strip()} for i in range(1, len(pieces), 2)]


def ranked(row: Fields) -> list[Preference]:
    """A list of answers, best first or with scores or ranks -> every pair in which one is better than the other."""
    if "instruction" in row:
        prompt = alpaca_prompt(row)
    else:
        prompt = as_prompt(field(row, "prompt", "question", "query"), "prompt")
    name = next((n for n in RANKED if isinstance(row.get(n), list)), None)
    if name is None:
        what = f"no list of answers under {', '.join(RANKED)} (columns: {', '.join(row)})"
        raise RowProblem("missing_column", what, "write responses: [best, …]")
    answers = row[name]
    grades = maybe(row, "scores", "score", "ratings")
    ranks = maybe(row, "ranks", "rank", "ranking")
    if answers and isinstance(answers[0], dict):
        key = next((k for k in SCORES if k in answers[0]), None)
        if key is not None and grades is None and ranks is None:
            sign = -1 if key == "rank" else 1
            grades = [sign * a[key] if isinstance(a, dict) and numbers([a.get(key)]) else None for a in answers]
        if not is_turns(answers):
            keys = ("response", "text", "output", "answer", "content")
            answers = [maybe(a, *keys) if isinstance(a, dict) else a for a in answers]
    if grades is None:
        grades = [-float(r) for r in ranks] if numbers(ranks) else [-i for i in range(len(answers))]
    if not numbers(grades) or len(grades) != len(answers):
        what = f"{name}: {len(answers)} answers, but not as many scores or ranks"
        raise RowProblem("bad_ranking", what, "give each a number")
    if len(answers) < 2 or len(set(grades)) < 2:
        what = f"{name}: no answer is better than another"
        raise RowProblem("bad_ranking", what, "list at least two of different rank")
    messages = with_system(row, prompt)
    order = sorted(range(len(answers)), key=lambda i: -grades[i])
    return [
        Preference(messages, as_answer(answers[a], name), as_answer(answers[b], name), tools_of(row))
        for position, a in enumerate(order)
        for b in order[position + 1 :]
        if grades[a] > grades[b]
    ]


RANKED = ("responses", "answers", "outputs", "completions", "candidates", "output")
SCORES = ("overall_score", "score", "rating", "reward", "rank")


def numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def unpaired(row: Fields) -> list[Unpaired]:
    given = field(row, "label", "kto_tag")
    label = label_of(given)
    if label is None:
        raise RowProblem("bad_label", f"label is {given!r}", "use true (good) or false (bad)")
    column = next((c for c in ("messages", "conversations") if c in row), None)
    if column:
        messages = to_messages(row[column], column)
        cut = len(messages)
        while cut and messages[cut - 1]["role"] == "assistant":
            cut -= 1
        prompt, completion = messages[:cut], messages[cut:]
    elif "instruction" in row:
        prompt, completion = alpaca_prompt(row), as_answer(field(row, "output", "completion", "response"), "output")
    else:
        prompt = as_prompt(field(row, "prompt", "question"), "prompt")
        completion = as_answer(field(row, "completion", "response", "answer"), "completion")
    tools = lifted(row, prompt, completion)
    return [Unpaired(with_system(row, prompt), completion, label, tools)]


GOOD = ("true", "good", "desirable", "yes", "y", "t", "positive", "chosen", "like", "1", "+1", "1.0")
BAD = ("false", "bad", "undesirable", "no", "n", "f", "negative", "rejected", "dislike", "0", "0.0", "-1", "-1.0")
LABELS = {**dict.fromkeys(GOOD, True), **dict.fromkeys(BAD, False)}


def label_of(value: Any) -> bool | None:
    """Whether a label says good or bad, as people write it; None when it is no label."""
    if isinstance(value, bool | int | float):
        return value == 1 if value in (0, 1, -1) else None
    return LABELS.get(value.strip().lower()) if isinstance(value, str) else None


def raw_text(row: Fields) -> list[Text]:
    text = field(row, "text", "content")
    if not isinstance(text, str):
        raise RowProblem("wrong_type", f"text is {kind_of(text)}, not text", "make it a string")
    return [Text(text)]
