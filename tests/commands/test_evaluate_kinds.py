"""`ft eval` of every kind of run and rows. Right values are those that training itself measured on the same rows."""

from __future__ import annotations

import importlib
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import write_rows

from finetune import cli
from finetune.commands import evaluate
from finetune.errors import UserError
from finetune.recipe.file import load
from finetune.recipe.stages import RECIPES
from finetune.run.directory import Run

DATA = {
    "sft": lambda i: {"prompt": f"say {i}", "completion": f"{i} {i * 7 % 10}"},
    "dpo": lambda i: {"prompt": f"say {i}", "chosen": f"{i} yes please", "rejected": f"{i} no"},
    "kto": lambda i: {"prompt": f"say {i}", "completion": f"{i} {'yes' if i % 2 else 'no'}", "label": bool(i % 2)},
    "reward": lambda i: {"prompt": f"say {i}", "chosen": f"{i} no", "rejected": f"{i} yes please"},
    "pretrain": lambda i: {"text": " ".join(f"{(i + 1) * n * 7919 % 99991}" for n in range(1, 12))},
}
# What training measured on the rows that it held out -> what `ft eval` calls it.
SAME = {
    "sft": {"loss": "loss"},
    "dpo": {"rewards/accuracies": "reward_accuracy", "rewards/margins": "reward_margin"},
    "kto": {"rewards/margins": "reward_margin"},
    "reward": {"accuracy": "preference_accuracy", "margin": "margin"},
    "pretrain": {"loss": "loss"},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a space in its name."""
    folder = tmp_path / "my work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def trained(stage: str, here: Path, base: Path, **sections: Any) -> Run:
    """A few steps of a stage on 32 rows, 8 of them held out."""
    rows = write_rows(here / f"{stage} rows.jsonl", [DATA[stage](i) for i in range(32)])
    values: dict[str, Any] = {
        "version": 1, "stage": stage, "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "max_length": 64, "eval_split": 8},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
        "train": {"max_steps": 6, "effective_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 3},
        "eval": {} if stage == "reward" else {"max_new_tokens": 4}, "output": {"dir": f"my {stage} run"},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = section if name == "adapter" else {**values.get(name, {}), **section}
    path = here / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    loaded: Any = load(str(path), RECIPES[stage])
    importlib.import_module(f"finetune.commands.{stage}").run(loaded)
    return Run(Path(loaded.output.dir))


def result(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.result.read_text())
    return found


def measured(here: Path, runs: list[str], **options: Any) -> dict[str, Any]:
    file = here / "out.json"
    given = {"recipe": None, "model": None, "adapter": None, "data": None, "compare_base": False, "limit": None}
    evaluate.run(runs, **{**given, **options}, json_file=str(file))
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def next_commands(said: str) -> list[list[str]]:
    """The commands after `next`."""
    lines = said.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("next "))
    found = [lines[start].removeprefix("next").strip()]
    for line in lines[start + 1 :]:
        if not line.startswith("        ft "):
            break
        found.append(line.strip())
    return [shlex.split(line) for line in found]


@pytest.mark.parametrize("stage", DATA)
def test_the_next_commands_run_and_measure_the_rows_that_were_held_out(
    here: Path, base: Path, stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(stage, here, base)
    commands = next_commands(capsys.readouterr().err)
    assert commands[0][:3] == ["ft", "eval", f"my {stage} run"]
    for number, (_, *arguments) in enumerate(commands):
        monkeypatch.setattr(sys, "stdin", io.StringIO("say 1\n"))
        cli.app(args=[*arguments, *(["--json", "eval.json"] if not number else [])], standalone_mode=False)
    shown = capsys.readouterr()
    assert "held-out by data.eval_split, n=" in shown.out
    written = json.loads((here / "eval.json").read_text())
    metrics = written["runs"][-1]["metrics"]
    assert written["data"] == "data.eval_split"
    assert metrics.get("trained_on", 0) == 0
    for theirs, ours in SAME[stage].items():
        # ft kto counts what the template writes behind the end of turn to the answer.
        near = {"rel": 0.03} if stage == "kto" else {"abs": 2e-4}
        assert metrics[ours] == pytest.approx(result(run)["eval"][theirs], **near), ours
    if stage != "reward":
        loss = written["comparisons"][-1]
        assert loss["metric"] == "loss"
        assert loss["wins"] + loss["losses"] + loss["ties"] == sum(
            row["loss"] is not None and row.get("label") is not False for row in predicted(here, f"my {stage} run")
        )


def predicted(here: Path, run: str, **options: Any) -> list[dict[str, Any]]:
    measured(here, [run], predictions=str(here / "rows out.jsonl"), **options)
    return [json.loads(line) for line in (here / "rows out.jsonl").read_text().splitlines()]


def test_pairs_by_hand(here: Path, base: Path) -> None:
    """Summed log-probabilities of the answers and their ends through plain transformers, one at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = [{**DATA["dpo"](i), "group": "ab"[i % 2]} for i in range(6)]
    data = write_rows(here / "pairs.jsonl", rows)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)

    def summed(prompt: str, answer: str) -> tuple[float, int]:
        start = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer.encode(f"{start}{answer}<|im_end|>")])
        n = ids.shape[1] - len(tokenizer.encode(start))
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1)
        return float(logps.gather(1, ids[0, 1:, None])[-n:].sum()), n

    chosen, rejected = ([summed(r["prompt"], r[side]) for r in rows] for side in ("chosen", "rejected"))
    margins = [a - b for (a, _), (b, _) in zip(chosen, rejected, strict=True)]
    (found,) = measured(here, [], model=str(base), data=str(data))["runs"]
    metrics = found["metrics"]
    assert (found["kind"], found["n"]) == ("pairs", 6)
    assert metrics["margin"] == pytest.approx(sum(margins) / 6, abs=0.05)  # bfloat16 on some machines
    assert metrics["preference_accuracy"] == sum(m > 0 for m in margins) / 6
    assert metrics["groups"] == {"a": 3, "b": 3}
    assert metrics["loss"] == pytest.approx(-sum(a for a, _ in chosen) / sum(n for _, n in chosen), abs=0.01)
    assert "reward_accuracy" not in metrics


def test_any_run_on_any_rows(here: Path, base: Path) -> None:
    """What is measured follows the rows, whatever the run was trained on."""
    trained("sft", here, base)
    for stage, kind in (("dpo", "pairs"), ("kto", "unpaired"), ("pretrain", "text")):
        data = write_rows(here / f"{stage}.jsonl", [DATA[stage](i) for i in range(100, 106)])
        found = measured(here, ["my sft run"], data=str(data), compare_base=True)
        assert [run["kind"] for run in found["runs"]] == [kind, kind]
        assert {"loss", "perplexity"} <= found["runs"][1]["metrics"].keys()
        assert "loss" in {item["metric"] for item in found["comparisons"]}
        with pytest.raises(UserError, match="--temperature: has no effect"):
            measured(here, ["my sft run"], data=str(data), temperature=0.5)
    mixed = write_rows(here / "mixed.jsonl", [DATA["sft"](1), DATA["sft"](2)])
    trained("reward", here, base)
    with pytest.raises(UserError, match="measured on preference pairs"):
        measured(here, ["my reward run"], data=str(mixed))
    with pytest.raises(UserError, match="is a reward model, and the others write answers"):
        measured(here, ["my reward run", "my sft run"])


def test_long_pairs_are_cut_as_in_training(here: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reward model and a policy read data.max_length tokens; pairs that are the same within it say nothing."""
    rows = [{"prompt": "say", "chosen": f"{'yes ' * 900}{i}", "rejected": f"no {i}"} for i in range(3)]
    rows.append({"prompt": "say " * 40, "chosen": "a", "rejected": "b"})
    data = write_rows(here / "long.jsonl", rows)
    for stage in ("reward", "dpo"):
        trained(stage, here, base)
        (found,) = measured(here, [f"my {stage} run"], data=str(data))["runs"]
        assert found["n"] == 3
        assert "1 row is left out: nothing to compare within data.max_length 64" in capsys.readouterr().err


def test_text_is_read_in_blocks_of_what_the_model_was_made_for(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the run says more, and then that is said."""
    trained("pretrain", here, base)
    data = write_rows(here / "texts.jsonl", [DATA["pretrain"](i) for i in range(100, 106)])
    written = here / "my pretrain run" / "recipe.yaml"
    said = "the text is read in blocks of {} tokens, for which the model was made, and not of data.max_length {}"
    for length, told in ((64, False), (1 << 20, True)):
        values = yaml.safe_load(written.read_text("utf-8"))
        values["data"]["max_length"] = length
        written.write_text(yaml.safe_dump(values), encoding="utf-8")
        measured(here, ["my pretrain run"], data=str(data))
        limit = json.loads((base / "config.json").read_text("utf-8"))["max_position_embeddings"]
        assert (said.format(limit, length) in capsys.readouterr().err) is told


def test_rows_are_computed_by_length_and_few_at_once_where_they_are_long() -> None:
    from finetune.evaluation.likelihood import ROOM, by_length

    lengths = [5, ROOM * 2, 3, ROOM // 2, ROOM // 2, 4]
    assert list(by_length(lengths, 2)) == [[2, 5], [0, 3], [4], [1]]
    assert list(by_length([5, 3, 4], 2, room=9)) == [[1, 2], [0]]


def test_predictions_and_wrong_answers(here: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"say {i}\x1b[31m " + "x" * 300, "completion": f"never {i}\nmore"} for i in range(5)]
    data = write_rows(here / "rows.jsonl", rows)
    file = here / "answers out.jsonl"
    measured(here, [], model=str(base), data=str(data), predictions=str(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["run"] == base.name
    assert lines[0]["messages"] == [{"role": "user", "content": rows[0]["prompt"]}]
    assert (lines[0]["reference"], lines[0]["correct"]) == ("never 0\nmore", 0.0)
    assert {"prediction", "loss"} <= lines[0].keys()
    shown = capsys.readouterr().out
    assert f"{base.name}: 3 of 5 wrong answers" in shown
    assert "reference  never 2⏎more" in shown
    assert "never 3" not in shown
    assert "\x1b" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines() if line.startswith("    "))
    measured(here, [], model=str(base), data=str(data), predictions=str(file), show=0)  # an earlier one is ours
    assert "wrong answers" not in capsys.readouterr().out
    (here / "notes.txt").write_text("mine")
    for given, name, message in (
        (file, file, "is the file of --data"),
        (data, data, "nothing that ft wrote"),
        (data, here / "notes.txt", "nothing that ft wrote"),
    ):
        with pytest.raises(UserError, match=message):
            measured(here, [], model="no-such-model", data=str(given), predictions=str(name))
    assert (here / "notes.txt").read_text() == "mine"


def test_a_plain_argument_may_be_a_model_or_an_adapter(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.commands import merge

    run = trained("sft", here, base)
    capsys.readouterr()
    merge.run(str(run.path), "my merged")
    for number, (_, *arguments) in enumerate(next_commands(capsys.readouterr().err[-1000:])):
        monkeypatch.setattr(sys, "stdin", io.StringIO("say 1\n"))
        assert arguments[0] == ("chat" if number else "eval")
        cli.app(args=arguments, standalone_mode=False)
    tuned, merged = (measured(here, [name])["runs"][0]["metrics"] for name in (str(run.path), "my merged"))
    assert merged["loss"] == pytest.approx(tuned["loss"], abs=1e-3)
    base_too = measured(here, ["my merged"], compare_base=True)
    assert [r["name"] for r in base_too["runs"]] == ["base", "my merged"]
    data = str(write_rows(here / "other.jsonl", [DATA["sft"](i) for i in range(90, 94)]))
    for name in (str(run.adapter), str(base), "tiny-llama"):
        assert measured(here, [name], data=data, limit=1)["runs"][0]["n"] == 1
    with pytest.raises(UserError, match="no such run or adapter"):
        measured(here, ["my mergd"], data=data)
