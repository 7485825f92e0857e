# ruff: noqa: E501  (one case per line reads best)
"""A corpus of broken files: each stops the run, and says in one line per problem where it is and how to mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_kit import encoder

from finetune.data import audit
from finetune.errors import UserError
from finetune.recipe.sections import DataConfig

U = '{"role": "user", "content": "q"}'
A = '{"role": "assistant", "content": "a"}'
GOOD = '{"messages": [' + U + ", " + A + "]}\n"


def rows(*turns: str, more: str = "") -> str:
    """A good row, then one of these turns."""
    return GOOD + '{"messages": [' + ", ".join(turns) + "]" + more + "}\n"


def call(arguments: str, name: str = '"f"') -> str:
    function = f'{{"name": {name}, "arguments": {arguments}}}'
    return f'{{"role": "assistant", "content": null, "tool_calls": [{{"function": {function}}}]}}'


G = '{"instruction": "i", "output": "o"}\n'
P = '{"prompt": "p", "chosen": "c", "rejected": "r"}\n'
K = '{"prompt": "p", "completion": "c", "label": true}\n'
R = '{"prompt": "p", "responses": ["a", "b"]}\n'
# fmt: off
# name, file, content, settings, the lines on stderr (FILE stands for the path)
CASES: list[tuple[str, str, str | bytes, dict[str, Any], list[str]]] = [
    # files
    ("empty file", "x.jsonl", "", {}, ['FILE: the file is empty → name a file with rows']),
    ("only blank lines", "x.jsonl", "\n \n\n", {}, ['FILE: the file is empty → name a file with rows']),
    ("empty list", "x.json", "[]", {}, ['FILE: the list is empty → name a file with rows']),
    ("empty list, spaced", "x.json", " [ \n ] ", {}, ['FILE: the list is empty → name a file with rows']),
    ("binary", "x.bin", b"\x00\x01\x02\x03" * 50, {}, ['FILE: not a data file (binary content) → use one of .arrow, .csv, .feather, .gz, .json, .jsonl, .ndjson, .parquet, .text, .tsv, .txt, .zst']),
    ("broken parquet", "x.parquet", b"PAR1 nothing", {}, ['FILE: not a readable parquet file: Parquet magic bytes not found in footer. Either the file is corrupted or this is not a parquet file. → write it again']),
    ("broken arrow", "x.arrow", b"ARROW1\x00\x00 nothing", {}, ['FILE: not a readable arrow file: File is too small: 16 → write it again']),
    ("broken gzip", "x.jsonl.gz", b"\x1f\x8b\x08\x00 nothing here", {}, ['FILE: cannot be unpacked: Error -3 while decompressing data: invalid block type → download it again']),
    ("zip archive", "x.zip", b"PK\x03\x04rest", {}, ['FILE: a zip archive or an Excel file → unpack it, or export it as csv']),
    ("utf-16", "x.jsonl", GOOD.encode("utf-16"), {}, ['FILE: UTF-16 text → convert it: iconv -f utf-16 -t utf-8']),
    ("gbk line", "x.jsonl", GOOD.encode() + '{"messages": [{"role": "user", "content": "你好世界"}]}\n'.encode("gbk"), {}, ['FILE, row 2: not UTF-8 at byte 44 → convert it: iconv -f gb18030 -t utf-8']),
    ("latin-1 line", "x.jsonl", GOOD.encode() + b'{"text": "caf\xe9 "}\n', {}, ['FILE, row 2: not UTF-8 at byte 14 → save the file as UTF-8']),
    ("gbk list", "x.json", '[{"instruction": "你好", "output": "o"}]'.encode("gbk"), {}, ['FILE, row 1, line 1: not UTF-8 → convert it: iconv -f gb18030 -t utf-8']),
    ("a row of another kind", "x.jsonl", GOOD + '{"foo": 1}\n', {}, ["FILE, row 2: no 'messages' (columns: foo) → fill it in, or map it with data.columns"]),
    # json
    ("cut line", "x.jsonl", GOOD + GOOD[:30] + "\n", {}, ['FILE, row 2: not valid JSON: Expecting property name enclosed in double quotes at column 31 → mend or remove the line']),
    ("line with single quotes", "x.jsonl", GOOD + "{'messages': []}\n", {}, ['FILE, row 2: not valid JSON: Expecting property name enclosed in double quotes at column 2 → mend or remove the line']),
    ("two objects in a line", "x.jsonl", GOOD + GOOD.strip() + GOOD, {}, ['FILE, row 2: not valid JSON: Extra data at column 88 → mend or remove the line']),
    ("trailing comma", "x.jsonl", GOOD + '{"messages": [' + U + ",]}\n", {}, ['FILE, row 2: not valid JSON: Expecting value at column 48 → mend or remove the line']),
    ("first line broken", "x.jsonl", "{oops}\n" + GOOD, {}, ['FILE, row 1: not valid JSON: Expecting property name enclosed in double quotes at column 2 → mend or remove the line']),
    ("list in a line", "x.jsonl", GOOD + "[1, 2]\n", {}, ['FILE, row 2: the row is a list, not an object → write {"column": value, …}']),
    ("number in a line", "x.jsonl", GOOD + "42\n", {}, ['FILE, row 2: the row is a number, not an object → write {"column": value, …}']),
    ("text in a line", "x.jsonl", GOOD + '"hello"\n', {}, ['FILE, row 2: the row is text, not an object → write {"column": value, …}']),
    ("null in a line", "x.jsonl", GOOD + "null\n", {}, ['FILE, row 2: the row is null, not an object → write {"column": value, …}']),
    ("bare newline in a string", "x.jsonl", GOOD + '{"messages": "a\nb"}\n', {}, ['FILE, row 2: not valid JSON: Unterminated string starting at column 14 → mend or remove the line', 'FILE, row 3: not valid JSON: Expecting value at column 1 → mend or remove the line']),
    ("list without end", "x.json", '[\n{"instruction": "i", "output": "o"}\n', {}, ["FILE, row 1, line 3: not valid JSON: the list has no closing ']' after item 1 → mend the file"]),
    ("list without comma", "x.json", '[\n{"instruction": "i", "output": "o"}\n{"instruction": "i", "output": "o"}]', {}, ["FILE, row 1, line 3: not valid JSON: expected ',' or ']' after item 1 → mend the file"]),
    ("list, broken item", "x.json", '[\n{"instruction": "i", "output": "o"},\n{"instruction" "i"}\n]', {}, ["FILE, row 2, line 3: not valid JSON: Expecting ':' delimiter → mend the file"]),
    ("list of texts", "x.json", '["a", "b"]', {}, ['FILE, row 1: the row is text, not an object → write {"column": value, …}', 'FILE, row 2: the row is text, not an object → write {"column": value, …}']),
    ("list with a number", "x.json", '[{"instruction": "i", "output": "o"}, 7]', {}, ['FILE, row 2: the row is a number, not an object → write {"column": value, …}']),
    ("half surrogate pair", "x.jsonl", rows(U, '{"role": "assistant", "content": "a \\ud83d b"}'), {}, ['FILE, row 2: turn 2: half a surrogate pair (\\ud83d) → mend the \\u escapes']),
    ("not a number", "x.jsonl", GOOD + '{"messages": NaN}\n', {}, ['FILE, row 2: not valid JSON: NaN is no JSON number → mend or remove the line']),
    ("nested too deeply", "x.jsonl", GOOD + '{"messages": ' + '[' * 100_000 + "\n", {}, ['FILE, row 2: nested too deeply → remove the line']),
    ("list nested too deeply", "x.json", '[{"text": ' + '[' * 100_000, {}, ['FILE, row 1, line 1: nested too deeply → mend the file']),
    # csv
    ("csv with a short row", "x.csv", "question,answer\nq,a\nonly\n", {}, ['FILE, row 2: 1 cell, but the header has 2 → quote cells that hold the delimiter']),
    ("csv with a long row", "x.csv", "question,answer\nq,a,b\n", {}, ['FILE, row 1: 3 cells, but the header has 2 → quote cells that hold the delimiter']),
    ("csv with an open quote", "x.csv", 'question,answer\nq,a\n"open,b\n', {}, ['FILE, row 2: not valid csv: unexpected end of data → mend the quotes']),
    ("csv with a column twice", "x.csv", "question,question\nq,a\n", {}, ['FILE, line 1: a column name occurs twice → give every column its own name']),
    ("csv not utf-8", "x.csv", "question,answer\n你好,世界\n".encode("gbk"), {}, ['FILE, row 1: not UTF-8 → convert it: iconv -f gb18030 -t utf-8']),
    ("csv without known columns", "x.csv", "name,age\nbob,7\n", {}, ['FILE: no known format has the columns age, name → set data.columns, or data.format to one of preference, unpaired, ranked, self_instruct, sharegpt, chatglm3, messages, alpaca, prompt_completion, question_answer, inputs_targets, text']),
    # columns
    ("unknown columns", "x.jsonl", '{"foo": 1, "bar": 2}\n', {}, ['FILE: no known format has the columns bar, foo → set data.columns, or data.format to one of preference, unpaired, ranked, self_instruct, sharegpt, chatglm3, messages, alpaca, prompt_completion, question_answer, inputs_targets, text']),
    ("alpaca, misspelt output", "x.jsonl", G + '{"instruction": "i", "ouput": "o"}\n', {}, ["FILE, row 2: no 'output' or 'response' (columns: instruction, ouput) → rename 'ouput' or set data.columns: {output: ouput}"]),
    ("alpaca, no output", "x.jsonl", G + '{"instruction": "i"}\n', {}, ['FILE, row 2: no answer (columns: instruction) → add its column, or map it with data.columns']),
    ("alpaca, null output", "x.jsonl", G + '{"instruction": "i", "output": null}\n', {}, ['FILE, row 2: no answer (columns: instruction, output) → add its column, or map it with data.columns']),
    ("alpaca, list as output", "x.jsonl", G + '{"instruction": "i", "output": ["o"], "n": 1}\n', {}, ['FILE, row 2: output is a list of texts → make it one string']),
    ("alpaca, object as instruction", "x.jsonl", G + '{"instruction": {"a": 1}, "output": "o"}\n', {}, ['FILE, row 2: instruction is an object, not text → make it a string']),
    ("alpaca, empty output", "x.jsonl", G + '{"instruction": "i", "output": "  "}\n', {}, ["FILE, row 2: turn 2: the assistant's answer is empty → fill it in, or remove the row"]),
    ("alpaca, empty instruction", "x.jsonl", G + '{"instruction": "", "output": "o"}\n', {}, ["FILE, row 2: turn 1: the user's turn is empty → fill it in, or remove the row"]),
    ("alpaca, bad history", "x.jsonl", G + '{"instruction": "i", "output": "o", "history": ["q"]}\n', {}, ['FILE, row 2: history, item 1 is not a [question, answer] pair → write [[question, answer], …]']),
    ("alpaca, number as history", "x.jsonl", G + '{"instruction": "i", "output": "o", "history": 3}\n', {}, ['FILE, row 2: history is a number, not a list → write [[question, answer], …]']),
    ("seed task without output", "x.jsonl", '{"instruction": "i", "instances": [{"input": "x"}]}\n', {}, ["FILE, row 1: instances, item 1 has no 'output' → write {input, output}"]),
    ("question without answer", "x.jsonl", '{"question": "q", "answer": "a"}\n{"question": "q"}\n', {}, ['FILE, row 2: no answer (columns: question) → add its column, or map it with data.columns']),
    ("prompt without completion", "x.jsonl", '{"prompt": "p", "completion": "c"}\n{"prompt": "p", "complettion": "c"}\n', {}, ['FILE, row 2: no answer (columns: prompt, complettion) → add its column, or map it with data.columns']),
    # turns
    ("messages is text", "x.jsonl", GOOD + '{"messages": "hello"}\n', {}, ['FILE, row 2: messages is text, not a list of turns → make it a list of {role, content}']),
    ("messages is null", "x.jsonl", GOOD + '{"messages": null}\n', {}, ['FILE, row 2: messages is null → fill it in, or remove the row']),
    ("no turns", "x.jsonl", GOOD + '{"messages": []}\n', {}, ['FILE, row 2: the conversation has no turns → remove the row']),
    ("a turn is text", "x.jsonl", rows(U, '"a"'), {}, ['FILE, row 2: messages, turn 2 is text, not an object → write {role, content}']),
    ("no role", "x.jsonl", rows(U, '{"content": "a"}'), {}, ['FILE, row 2: messages, turn 2 has no role → add role (or from): system, user, assistant or tool']),
    ("unknown role", "x.jsonl", rows(U, '{"role": "narrator", "content": "a"}'), {}, ["FILE, row 2: messages, turn 2: unknown role 'narrator' → use system, user, assistant or tool"]),
    ("no content", "x.jsonl", rows(U, '{"role": "assistant"}'), {}, ['FILE, row 2: messages, turn 2 has no content → add content (or value)']),
    ("content is a number", "x.jsonl", rows(U, '{"role": "assistant", "content": 7}'), {}, ['FILE, row 2: messages, turn 2 is a number, not text → make it a string']),
    ("content is an object", "x.jsonl", rows(U, '{"role": "assistant", "content": {"text": "a"}}'), {}, ['FILE, row 2: messages, turn 2 is an object, not text → make it a string']),
    ("image part", "x.jsonl", rows('{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}', A), {}, ["FILE, row 2: messages, turn 1: a content part of type 'image_url' → keep text parts only"]),
    ("empty answer", "x.jsonl", rows(U, '{"role": "assistant", "content": ""}'), {}, ["FILE, row 2: turn 2: the assistant's answer is empty → fill it in, or remove the row"]),
    ("blank answer", "x.jsonl", rows(U, '{"role": "assistant", "content": " \\n\\t"}'), {}, ["FILE, row 2: turn 2: the assistant's answer is empty → fill it in, or remove the row"]),
    ("null answer", "x.jsonl", rows(U, '{"role": "assistant", "content": null}'), {}, ["FILE, row 2: turn 2: the assistant's answer is empty → fill it in, or remove the row"]),
    ("empty question", "x.jsonl", rows('{"role": "user", "content": ""}', A), {}, ["FILE, row 2: turn 1: the user's turn is empty → fill it in, or remove the row"]),
    ("only a question", "x.jsonl", rows(U), {}, ['FILE, row 2: no turn of the assistant, nothing to learn → add the answer']),
    ("only a system turn", "x.jsonl", rows('{"role": "system", "content": "s"}'), {}, ['FILE, row 2: no turn of the assistant, nothing to learn → add the answer']),
    ("assistant first", "x.jsonl", rows(A, U, A), {}, ['FILE, row 2: turn 1: the conversation begins with the assistant → add the user\'s turn before it, or remove it']),
    ("assistant after system", "x.jsonl", rows('{"role": "system", "content": "s"}', A), {}, ['FILE, row 2: turn 2: the conversation begins with the assistant → add the user\'s turn before it, or remove it']),
    ("two questions", "x.jsonl", rows(U, U, A), {}, ['FILE, row 2: turn 2: user after user → join the two into one turn, or add the answer between them']),
    ("two answers", "x.jsonl", rows(U, A, A), {}, ['FILE, row 2: turn 3: assistant after assistant → join the two into one turn, or add the user\'s turn between them']),
    ("late system turn", "x.jsonl", rows(U, '{"role": "system", "content": "s"}', A), {}, ['FILE, row 2: turn 2: a system turn that is not the first → move it to the beginning, or into the user\'s turn']),
    ("tool after question", "x.jsonl", rows(U, '{"role": "tool", "content": "r"}', A), {}, ['FILE, row 2: turn 2: tool after user → put the assistant\'s turn with the call before it']),
    ("bad loss flag", "x.jsonl", rows(U, '{"role": "assistant", "content": "a", "loss": "yes"}'), {}, ["FILE, row 2: messages, turn 2, loss is 'yes' → use true, false or a weight of at least 0"]),
    ("negative weight", "x.jsonl", rows(U, '{"role": "assistant", "content": "a", "weight": -1}'), {}, ['FILE, row 2: messages, turn 2, weight is -1 → use true, false or a weight of at least 0']),
    ("every turn masked", "x.jsonl", rows(U, '{"role": "assistant", "content": "a", "train": false}'), {}, ['FILE, row 2: no token would be trained: every label is masked → train a turn, or remove the row']),
    # tools
    ("arguments no json", "x.jsonl", rows(U, call('"{broken"')), {}, ['FILE, row 2: messages, turn 2, arguments of f: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)) → write valid JSON']),
    ("arguments a list", "x.jsonl", rows(U, call("[1]")), {}, ['FILE, row 2: messages, turn 2: the arguments of f are a list, not an object → make them an object']),
    ("call without a name", "x.jsonl", rows(U, call("{}", "null")), {}, ['FILE, row 2: messages, turn 2: the tool call has no name → write {name, arguments}']),
    ("function_call no json", "x.jsonl", '{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f(x)"}]}\n', {}, ['FILE, row 1: conversations, turn 2, tool call: not JSON (Expecting value: line 1 column 1 (char 0)) → write valid JSON']),
    ("function_call a number", "x.jsonl", '{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "7"}]}\n', {}, ['FILE, row 1: conversations, turn 2: the tool call is a number, not an object → write {name, arguments}']),
    ("tools no json", "x.jsonl", rows(U, A, more=', "tools": "[{broken"'), {}, ['FILE, row 2: tools: not JSON (Expecting property name enclosed in double quotes: line 1 column 3 (char 2)) → write valid JSON']),
    ("tools of numbers", "x.jsonl", rows(U, A, more=', "tools": [1]'), {}, ['FILE, row 2: tools: a number where a function description belongs → list {name, parameters}']),
    ("tool without a name", "x.jsonl", rows(U, A, more=', "tools": [{"description": "d"}]'), {}, ['FILE, row 2: tools: a function without a name → give each function a name']),
    ("half surrogate pair in a call", "x.jsonl", rows(U, call('{"a": "\\ud83d"}')), {}, ['FILE, row 2: half a surrogate pair (\\ud83d) in a tool call or description → mend the \\u escapes']),
    ("half surrogate pair in a tool", "x.jsonl", rows(U, A, more=', "tools": [{"name": "f", "description": "\\ud83d"}]'), {}, ['FILE, row 2: half a surrogate pair (\\ud83d) in a tool call or description → mend the \\u escapes']),
    # length
    ("over max_length", "x.jsonl", rows(U, '{"role": "assistant", "content": "' + "long " * 30 + '"}'), {"max_length": 64, "on_overlong": "error"}, ['FILE, row 2: 172 tokens, over data.max_length 64 → raise data.max_length, or set data.on_overlong: truncate or drop']),
    ("question fills max_length", "x.jsonl", rows('{"role": "user", "content": "' + "long " * 30 + '"}', A), {"max_length": 64}, ['data.max_length: 1 of 2 rows have no trained token within 64 tokens → raise it, or set data.on_overlong: drop', 'FILE, row 2: 172 tokens, over data.max_length 64: nothing that is trained is left, the row is left out → raise data.max_length']),
    ("all dropped", "x.jsonl", rows(U, A), {"max_length": 8, "on_overlong": "drop"}, ['data.train: no rows to train on → check the files and data.max_length', 'FILE, row 1: 23 tokens, over data.max_length 8: left out', 'FILE, row 2: 23 tokens, over data.max_length 8: left out']),
    # other kinds
    ("preference for sft", "x.jsonl", P, {}, ['FILE: the rows are preference data (preference), but this stage needs sft data → use ft dpo or ft reward, or set data.format']),
    ("chosen is rejected", "x.jsonl", P + '{"prompt": "p", "chosen": "c", "rejected": "c"}\n', {"kind": "preference"}, ['FILE, row 2: chosen and rejected are the same → remove the row']),
    ("empty chosen", "x.jsonl", P + '{"prompt": "p", "chosen": "", "rejected": "r"}\n', {"kind": "preference"}, ['FILE, row 2: chosen is empty → fill it in, or remove the row']),
    ("no prompt", "x.jsonl", P + '{"chosen": "c", "rejected": "r"}\n', {"kind": "preference"}, ["FILE, row 2: no 'prompt' (columns: chosen, rejected) → fill it in, or map it with data.columns"]),
    ("no rejected", "x.jsonl", P + '{"prompt": "p", "chosen": "c"}\n', {"kind": "preference"}, ["FILE, row 2: no 'rejected' (columns: chosen, prompt) → fill it in, or map it with data.columns"]),
    ("transcripts of different prompts", "x.jsonl", '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: x\\n\\nAssistant: y"}\n', {"kind": "preference"}, ['FILE, row 1: chosen and rejected have no common beginning → add a prompt column']),
    ("chosen ends with the user", "x.jsonl", P + '{"prompt": "p", "chosen": [{"role": "user", "content": "c"}], "rejected": "r"}\n', {"kind": "preference"}, ["FILE, row 2: chosen does not begin with the assistant's turn → mend the row"]),
    ("ranking of one", "x.jsonl", R + '{"prompt": "p", "responses": ["a"]}\n', {"kind": "preference"}, ['FILE, row 2: responses: no answer is better than another → list at least two of different rank']),
    ("ranking of equals", "x.jsonl", R + '{"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]}\n', {"kind": "preference"}, ['FILE, row 2: responses: no answer is better than another → list at least two of different rank']),
    ("ranking with too few scores", "x.jsonl", R + '{"prompt": "p", "responses": ["a", "b"], "scores": [1]}\n', {"kind": "preference"}, ['FILE, row 2: responses: 2 answers, but not as many scores or ranks → give each a number']),
    ("label is a word", "x.jsonl", K + '{"prompt": "p", "completion": "c", "label": "maybe"}\n', {"kind": "unpaired"}, ["FILE, row 2: label is 'maybe' → use true (good) or false (bad)"]),
    ("label is missing", "x.jsonl", K + '{"prompt": "p", "completion": "c"}\n', {"kind": "unpaired"}, ["FILE, row 2: no 'label' or 'kto_tag' (columns: completion, prompt) → fill it in, or map it with data.columns"]),
    ("text is a number", "x.jsonl", '{"text": "t"}\n{"text": 7}\n', {"kind": "text"}, ['FILE, row 2: text is a number, not text → make it a string']),
    ("text is empty", "x.jsonl", '{"text": "t"}\n{"text": " "}\n', {"kind": "text"}, ['FILE, row 2: the text is empty → remove the row']),
]
# fmt: on


def test_the_corpus_is_large() -> None:
    assert len({case[0] for case in CASES}) == len(CASES) >= 60


def run(pass_: audit.Audit) -> int:
    usable = sum(1 for _ in pass_.rows())
    pass_.settle()
    return usable


@pytest.mark.parametrize(("file", "content", "settings", "expected"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_says_what_is_wrong(
    tmp_path: Path, file: str, content: str | bytes, settings: dict[str, Any], expected: list[str]
) -> None:
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    kind = settings.get("kind", "sft")
    config = DataConfig(train=str(path), **{k: v for k, v in settings.items() if k != "kind"})
    pass_ = audit.Audit(config, None if kind == "text" else encoder(), kind)
    with pytest.raises(UserError) as caught:
        run(pass_)
    assert [line.replace(str(path), "FILE") for line in caught.value.lines()] == expected
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("case", [c for c in CASES if len(c[4]) == 1 and "row 2" in c[4][0]], ids=lambda c: c[0])
def test_bad_rows_can_be_left_out(tmp_path: Path, case: Any) -> None:
    """With on_error: drop the good first row is trained on and the bad one is counted."""
    _, file, content, settings, _ = case
    if settings.get("max_length") or not file.endswith(".jsonl"):
        pytest.skip("lengths have their own policy, and what is behind a break in a file is never left out")
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    kind = settings.get("kind", "sft")
    config = DataConfig(train=str(path), on_error="drop", max_dropped=0.9)
    pass_ = audit.Audit(config, None if kind == "text" else encoder(), kind)
    assert run(pass_) == 1
    assert pass_.counts["dropped"] == 1
