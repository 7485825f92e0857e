"""`ft generate`: every row whole and in its place, however it is read, and after any interruption."""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ft, train, write_rows

from finetune.commands import generate
from finetune.data import asking
from finetune.data.asking import Converter, Prompter, windows
from finetune.data.types import Row
from finetune.errors import Interrupted, UserError
from finetune.evaluation import answering
from finetune.run import appending

Rows = list[dict[str, Any]]
SHORT = {"max_new_tokens": 6, "batch_size": 4}


def lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def answered(base: Path, rows: Rows | Path, where: Path, **options: Any) -> Rows:
    """What `ft generate` makes of rows."""
    data = rows if isinstance(rows, Path) else write_rows(where / "rows.jsonl", rows)
    out = where / "out.jsonl"
    generate.run([str(base)], data=str(data), output=str(out), **{**SHORT, **options})
    return lines(out)


PROMPTS = [{"id": i, "prompt": "ab" * (n + 1)} for i, n in enumerate((5, 0, 17, 3, 9, 1, 30))]


def test_rows_stay_whole_and_in_order_and_answers_are_those_of_eval(base: Path, tmp_path: Path) -> None:
    from finetune.commands import evaluate

    rows = [{**row, "note": {"a": [1, None, "é\u2028"]}, "answer": "not shown"} for row in PROMPTS]
    found = answered(base, rows, tmp_path)
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in found] == rows
    file = tmp_path / "eval.jsonl"
    evaluate.run([], model=str(base), data=str(tmp_path / "rows.jsonl"), predictions=str(file), show=0)
    assert [row["prediction"].startswith(mine["prediction"]) for row, mine in zip(lines(file), found, strict=True)]
    assert len({row["prediction"] for row in found}) > 3


ASKED = {"role": "user", "content": "who"}
FORMS: list[tuple[dict[str, Any], list[dict[str, str]]]] = [
    ({"prompt": "who"}, [ASKED]),
    ({"prompt": "who", "completion": "me", "system": "Be short."}, [{"role": "system", "content": "Be short."}, ASKED]),
    ({"instruction": "say", "input": "who"}, [{"role": "user", "content": "say\nwho"}]),
    ({"question": "who", "answer": "me"}, [ASKED]),
    ({"messages": [ASKED]}, [ASKED]),
    ({"messages": [ASKED, {"role": "assistant", "content": "me"}]}, [ASKED]),
    ({"conversations": [{"from": "human", "value": "who"}, {"from": "gpt", "value": "me"}]}, [ASKED]),
    ({"prompt": "who", "chosen": "me", "rejected": "you"}, [ASKED]),
    ({"prompt": "who", "completion": "me", "label": True}, [ASKED]),
    ({"prompt": "who", "responses": ["me", "you", "they"]}, [ASKED]),
]


@pytest.mark.parametrize(("row", "asked"), FORMS, ids=lambda value: " ".join(value) if isinstance(value, dict) else "")
def test_what_is_asked_of_a_row(row: dict[str, Any], asked: list[dict[str, str]]) -> None:
    read = Row(row, "rows.jsonl", 1)
    assert Converter([read], None, "rows.jsonl").sample(read).asked == asked


def test_bad_rows_are_lines_of_their_own(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "rows.jsonl"
    turns = [[], [{"role": "assistant", "content": "x"}], [ASKED, ASKED], [{"role": "system", "content": "x"}], [ASKED]]
    written = [json.dumps({"messages": m, "error": "mine"}) for m in turns]
    data.write_text("\n".join([written[4], "{broken", *written[:4], "\n", json.dumps({"other": 1}), written[4]]) + "\n")
    found = answered(base, data, tmp_path)
    assert len(found) == 8
    assert isinstance(found[0]["prediction"], str)
    assert isinstance(found[7]["prediction"], str)
    for row in found[1:7]:
        assert row["prediction"] is None
    assert found[1]["error"].startswith("rows.jsonl, row 2: not valid JSON")
    assert [row["error"] for row in found[2:6]] == ["mine"] * 4
    assert "user after user" in found[4]["prediction_error"]
    assert "nothing is asked" in found[5]["prediction_error"]
    said = capsys.readouterr().err
    assert "2 of 8 rows answered" in said
    assert "6 rows could not be asked" in said


def test_csv_json_and_parquet_keep_their_columns(base: Path, tmp_path: Path) -> None:
    """Empty cells and nulls, too; what JSON has no word for becomes text."""
    import pyarrow as pa
    import pyarrow.parquet

    (tmp_path / "a.csv").write_text("id,question,answer,tag\n1,who,,\n2,what is it,x,y\n")
    for found in (answered(base, tmp_path / "a.csv", tmp_path),):
        assert [list(row) for row in found] == [["id", "question", "answer", "tag", "prediction"]] * 2
        assert (found[0]["answer"], found[1]["tag"]) == ("", "y")
    rows = [{"prompt": "who", "day": datetime.date(2024, 3, 5), "more": None}, {"prompt": "ab", "day": None, "more": 1}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    found = answered(base, tmp_path / "b.parquet", tmp_path, overwrite=True)
    assert [(row["prompt"], row["day"], row["more"]) for row in found] == [("who", "2024-03-05", None), ("ab", None, 1)]
    assert isinstance(found[0]["prediction"], str)
    (tmp_path / "c.json").write_text(json.dumps(PROMPTS[:3], indent=1))
    assert [row["id"] for row in answered(base, tmp_path / "c.json", tmp_path, overwrite=True)] == [0, 1, 2]


def test_drawn_answers_depend_on_row_and_seed_alone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"options": {"temperature": 1.0, "seed": 3}, "n": 3}
    found = answered(base, PROMPTS, tmp_path, **options)
    assert all(len(set(row["prediction"])) == 3 for row in found)
    again = []
    for size, window in ((1, 256), (7, 2)):
        monkeypatch.setattr(answering, "WINDOW", window)
        again.append(answered(base, PROMPTS, tmp_path, **options, **{"overwrite": True}, **{"batch_size": size}))
    assert again == [found, found]
    other = {**options, "options": {"temperature": 1.0, "seed": 4}}
    assert answered(base, PROMPTS, tmp_path, **other, overwrite=True) != found


def test_it_goes_on_behind_the_last_whole_row(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answered(base, PROMPTS, tmp_path)
    out, text = tmp_path / "out.jsonl", (tmp_path / "out.jsonl").read_bytes()
    asked: list[int] = []
    real = answering.written
    monkeypatch.setattr(
        answering, "written", lambda model, prompts, *a: asked.append(len(prompts)) or real(model, prompts, *a)
    )
    ends = [i + 1 for i, byte in enumerate(text) if byte == 10]
    for cut, left in ((ends[2] + 9, 4), (ends[2], 4), (0, 7), (ends[5], 1)):
        out.write_bytes(text[:cut])
        assert answered(base, PROMPTS, tmp_path) == whole
        assert asked.pop() == left
    out.write_bytes(text)
    assert answered(base, PROMPTS, tmp_path) == whole
    assert "nothing is left to answer" in capsys.readouterr().err
    more = [*PROMPTS, {"id": 7, "prompt": "b"}]
    assert answered(base, more, tmp_path)[:7] == whole
    assert asked == [1]


def test_what_cannot_be_gone_on_with_is_refused_and_left_alone(base: Path, tmp_path: Path) -> None:
    answered(base, PROMPTS, tmp_path)
    out = tmp_path / "out.jsonl"
    before = out.read_bytes()
    changed = [*PROMPTS[:3], {"id": 3, "prompt": "another"}, *PROMPTS[4:]]
    for rows, options, expected in (
        (PROMPTS, {"max_new_tokens": 7}, r"max_new_tokens: 7 now, and 6 in the rows"),
        (PROMPTS, {"options": {"temperature": 0.5}}, r"temperature: 0.5 now, and 0.0"),
        (PROMPTS, {"system": "Be short."}, 'system: "Be short." now, and null in the rows'),
        (changed, {}, r"out.jsonl, line 4: --output: holds another row than .*rows.jsonl has here"),
        (PROMPTS[:5], {}, r"line 6: --output: holds more rows than are asked for .*another file$"),
        (PROMPTS, {"limit": 5}, r"line 6: --output: holds more rows than are asked for .*or raise --limit"),
        (PROMPTS, {"resume": True, "overwrite": True}, "exclude each other"),
    ):
        with pytest.raises(UserError, match=expected):
            answered(base, rows, tmp_path, **options)  # type: ignore[arg-type]
        assert out.read_bytes() == before
    out.write_bytes(before[: before.index(b"\n") + 1] + b"[1]\n")
    with pytest.raises(UserError, match=r"line 2: --output: is no row that ft wrote"):
        answered(base, PROMPTS, tmp_path)
    appending.beside(out).unlink()
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match="exists, and is nothing that ft wrote"):
            answered(base, PROMPTS, tmp_path, **options)
    with pytest.raises(UserError, match="no such file to go on with"):
        generate.run([str(base)], data=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "new.jsonl"), resume=True)


def test_two_at_once(base: Path, tmp_path: Path) -> None:
    with appending.opened(tmp_path / "out.jsonl", 0, 0, {}, {}), pytest.raises(UserError, match="another process"):
        appending.opened(tmp_path / "out.jsonl", 0, 0, {}, {})
    (tmp_path / "out.jsonl").write_text("x\n")
    with pytest.raises(UserError, match="another process has written here"):
        appending.opened(tmp_path / "out.jsonl", 0, 0, {}, {})
    assert (tmp_path / "out.jsonl").read_text() == "x\n"


def test_texts_are_continued(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of a text file, and with --raw prompts: the ids of the text alone, and every character that follows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "a.txt").write_text("one two\n\nthree\n")
    found = answered(base, tmp_path / "a.txt", tmp_path)
    assert "continued as they stand" in capsys.readouterr().err
    raw = answered(base, [{"prompt": row["text"]} for row in found], tmp_path, raw=True, overwrite=True)
    assert [row["prediction"] for row in raw] == [row["prediction"] for row in found]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    for row in found:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(row["text"], add_special_tokens=False)]])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0]
        assert row["text"] + row["prediction"] == tokenizer.decode(written, skip_special_tokens=True)
    asked = answered(base, tmp_path / "a.txt", tmp_path, columns={"prompt": "text"}, overwrite=True)
    plain = answered(base, [{"prompt": row["text"]} for row in found], tmp_path, overwrite=True)
    assert [row["prediction"] for row in asked] == [row["prediction"] for row in plain]
    with pytest.raises(UserError, match="--system: has no effect"):
        answered(base, tmp_path / "a.txt", tmp_path, system="x", overwrite=True)
    chat = answered(
        base, [{"messages": [ASKED, {"role": "assistant", "content": "a"}, ASKED]}], tmp_path, raw=True, overwrite=True
    )
    assert "--raw continues single texts" in chat[0]["error"]


def test_a_system_turn_for_those_without(base: Path, tmp_path: Path) -> None:
    from finetune.data.chat import make_encoder
    from finetune.models.tokenizers import load_tokenizer
    from finetune.recipe.sections import ModelConfig

    encoder = make_encoder(load_tokenizer(ModelConfig(name=str(base))))
    prompter = Prompter(encoder, system="Be short.")
    own = {"messages": [{"role": "system", "content": "Be long."}, ASKED]}
    for row, system in (({"messages": [ASKED]}, "Be short."), (own, "Be long.")):
        read = Row(row, "x", 1)
        text = encoder.tokenizer.decode(prompter.ids(Converter([read], None, "x").sample(read)))
        assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>")


def test_prompts_beyond_what_the_model_was_made_for(base: Path, tmp_path: Path) -> None:
    """512 positions: what leaves room for three tokens gets three, what leaves none is a bad row."""
    found = answered(base, [{"prompt": "a" * n} for n in (3, 600, 512 - 33)], tmp_path, max_new_tokens=9)
    assert "the model was made for 512" in found[1]["error"]
    assert isinstance(found[2]["prediction"], str)


def test_several_adapters_on_one_load(recipe: Callable[..., Path], base: Path, tmp_path: Path) -> None:
    """Each answers as it does alone, by its name."""
    path, data = recipe(), write_rows(tmp_path / "ask.jsonl", PROMPTS)
    for name, rate in (("one", "1e-2"), ("two", "3e-2")):
        train(path, f"output.dir={tmp_path / name}", f"train.learning_rate={rate}")
    alone = {}
    for name in ("one", "two"):
        generate.run([str(tmp_path / name)], data=str(data), output=str(tmp_path / f"{name}.jsonl"), **SHORT)
        alone[name] = [row["prediction"] for row in lines(tmp_path / f"{name}.jsonl")]
    assert alone["one"] != alone["two"]
    out = tmp_path / "both.jsonl"
    done = ft("generate", base, "--adapter", "A=one", "--adapter", "two", "--data", data, "-o", out, "--max-new-tokens",
              "6", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("loading random-llama") == 1
    found = [row["prediction"] for row in lines(out)]
    assert [row["A"] for row in found] == alone["one"]
    assert [row["two"] for row in found] == alone["two"]
    (tmp_path / "one" / "adapter" / "adapter_model.safetensors").write_bytes(
        (tmp_path / "two" / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(UserError, match=r'models.one.adapter: "\w+" now'):  # trained again, in the same place
        generate.run([str(tmp_path / "one")], data=str(data), output=str(tmp_path / "one.jsonl"), **SHORT)
    with pytest.raises(UserError, match="is no adapter, and only adapters of one base"):
        generate.run([str(tmp_path / "one"), str(base)], data=str(data), output=str(out), **SHORT)


def test_pipes(base: Path, tmp_path: Path) -> None:
    """Only rows on stdout; nothing in, nothing out."""
    rows = "".join(json.dumps(row) + "\n" for row in PROMPTS[:3])
    command = ("generate", base, "--data", "-", "--output", "-", "--max-new-tokens", "4")
    done = ft(*command, stdin=rows, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [0, 1, 2]
    empty = ft(*command, stdin="", cwd=tmp_path)
    assert (empty.returncode, empty.stdout) == (0, "")
    cut = ft(*command, stdin='[{"prompt": "a"}, {"pro', cwd=tmp_path)
    assert cut.returncode == 2
    assert "stdin" in cut.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_whoever_reads_may_stop_reading(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"a{n}"} for n in range(600)])
    command = [sys.executable, "-m", "finetune", "generate", str(base), "--data", str(data), "--output", "-",
               "--max-new-tokens", "4", "--batch-size", "8"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["prompt"] == "a0"
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(120) == 0
    assert "Broken" not in said
    assert "Traceback" not in said


def test_a_slow_pipe_is_not_waited_for() -> None:
    """What has come is answered before more comes."""
    import threading

    go_on: threading.Event = threading.Event()
    seen: list[int] = []

    def slow() -> Any:
        yield 1
        yield 2
        assert go_on.wait(60)
        yield 3
        raise UserError("broken")

    def use() -> None:
        for window in windows(slow(), 10, live=True):
            seen.extend(window)
            if 2 in seen:
                go_on.set()

    with pytest.raises(UserError, match="broken"):
        use()
    assert seen == [1, 2, 3]


def test_interrupted_in_the_middle(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole lines are left, in order, and the next run goes on."""
    monkeypatch.setattr(answering, "WINDOW", 2)
    calls: list[int] = []
    real = answering.written

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(answering, "written", interrupted)
    with pytest.raises(Interrupted, match="stay in") as caught:
        answered(base, PROMPTS, tmp_path, batch_size=1)
    assert (caught.value.add, caught.value.drop) == (("--resume",), ("--overwrite",))
    assert [row["id"] for row in lines(tmp_path / "out.jsonl")] == [0, 1, 2, 3]
    monkeypatch.setattr(answering, "written", real)
    assert [row["id"] for row in answered(base, PROMPTS, tmp_path)] == list(range(7))


def test_no_more_than_a_window_is_read_ahead(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten times the rows no more are held: rows are written before others are read."""
    monkeypatch.setattr(answering, "WINDOW", 4)
    read, ahead = [0], []

    def counted(data: str) -> Any:
        for n in range(40):
            read[0] += 1
            yield Row({"prompt": f"a{n}"}, "x", n + 1)

    monkeypatch.setattr(asking, "rows_of", counted)
    real = appending.to

    def writing(file: Any) -> Any:
        write, count = real(file), [0]

        def one(row: Any) -> None:
            ahead.append(read[0] - count[0])
            count[0] += 1
            write(row)

        return one

    monkeypatch.setattr(appending, "to", writing)
    generate.run([str(base)], data="x", output=str(tmp_path / "out.jsonl"), max_new_tokens=1, batch_size=4)
    assert len(ahead) == 40
    assert max(ahead) <= 5  # a window, and the row that shows whether there is any


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("tiny-llama",), "--data is missing"),
        (("tiny-llama", "--data", "rows.jsonl"), "--output is missing"),
        (("--data", "rows.jsonl", "-o", "x"), "no model to answer"),
        (("tiny-llama", "--data", "rows.jsonL", "-o", "x"), "did you mean rows.jsonl?"),
        (("tiny-lama", "--data", "rows.jsonl", "-o", "x"), "did you mean tiny-llama?"),
        (("tiny-llama", "--data", "rows.jsonl", "-o", "rows.jsonl"), "rows.jsonl: --output: is what is read"),
        (("tiny-llama", "--data", "*.jsonl", "-o", "x.jsonl"), "x.jsonl: --output: is among what is read (*.jsonl)"),
        (("tiny-llama", "--data", "**/*.js*", "-o", "x.txt"), "x.txt: --output: is among what is read (**/*.js*)"),
        (("tiny-llama", "--data", "rows.jsonl", "-o", "mine.txt"), "exists, and is nothing that ft wrote"),
        (("tiny-llama", "--data", "rows.jsonl", "-o", "no/x"), "no such folder"),
        (("tiny-llama", "--data", "rows.jsonl", "-o", "-", "--resume"), "--resume: has no effect on stdout"),
        (("tiny-llama", "--data", "rows.jsonl", "-o", "x", "--n", "4", "--temperature", "0"), "greedy answers are all"),
        (("tiny-llama", "--data", "rows.jsonl", "-o", "x", "--temperature", "0", "--top-k", "4"), "answers are greedy"),
        (("tiny-llama", "--data", "rows.jsonl", "-o", "x", "--raw", "--system", "a"), "--raw writes no turns"),
        (("tiny-llama", "--data", "rows.jsonl", "-o", "x", "--columns", "prompt"), "is no NAME=COLUMN"),
        (("tiny-llama", "--data", "rows.jsonl", "-o", "x", "--top-p", "0"), "must be above 0"),
    ],
)
def test_what_is_wrong_is_said_at_once(tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "mine.txt").write_text("mine")
    done = ft("generate", *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert done.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "rows.jsonl"]


def test_a_column_of_ours_and_options_of_a_run(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"row 1: has a column 'prediction' already"):
        answered(base, [{"prompt": "a", "prediction": "b"}], tmp_path)
    with pytest.raises(UserError, match="--n: greedy answers are all the same"):
        answered(base, PROMPTS, tmp_path, n=2)
    with pytest.raises(UserError, match="no known format has the columns"):
        answered(base, [{"nothing": 1}], tmp_path)
    with pytest.raises(UserError, match="--columns: no row has a column 'nothing' → their columns: id, prompt"):
        answered(base, PROMPTS, tmp_path, columns={"prompt": "nothing"})


def test_what_differs_is_said_in_a_line_each(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    models = {"a": {"model": "x", "base": "y"}}
    appending.opened(path, 0, 0, {"models": models, "system": None, "columns": None}, {}).close()
    now = {"models": {"b": models["a"]}, "system": "s" * 999, "columns": {"prompt": "p"}}
    with pytest.raises(UserError) as caught:
        appending.check_settings(path, now)
    assert [line.removeprefix(f"{path}: ").partition(" →")[0] for line in caught.value.lines()] == [
        'columns: {"prompt": "p"} now, and null in the rows that are there',
        "models.a: wrote the rows that are there, and is not asked now",
        "models.b: is asked now, and did not write the rows that are there",
        f'system: "{"s" * 59}… now, and null in the rows that are there',
    ]
