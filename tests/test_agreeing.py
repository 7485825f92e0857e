"""One row is a row: numbers agree with their nouns in all that is said."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from conftest import ft, write_rows

from finetune.errors import Problem, RunError, UserError, render
from finetune.language.agreeing import BETWEEN, UNITS, agreed

PACKAGE = Path(__file__).parent.parent / "finetune"
TABLE = Path(__file__).parent / "fixtures" / "bad_inputs.txt"
NO_NOUNS = (
    "adds as begins builds cuts differs does drops ends gets gives has holds is keeps lacks leaves lets looks "
    "loss moves ms needs occurs packs pass reads rewrites says shards shares shows sorts stands takes types "
    "uses votes wants was works writes"
)
"""What else follows on a value in a message."""
PLURAL = re.compile(r"(?<![\w.,:/=^-])1 ((?:[a-z-]+ )?[a-zA-Z]+s)\b(?![\w/=])")


@pytest.mark.parametrize(
    ("many", "one"),
    [
        ("1 rows cut", "1 row cut"), ("1 rows are cut", "1 row is cut"), ("in 1 files, 2 rows", "in 1 file, 2 rows"),
        ("1 replies", "1 reply"), ("1 passes a step", "1 pass a step"), ("1 processes do not", "1 process does not"),
        ("1 more problems", "1 more problem"), ("(1 others)", "(1 other)"), ("1 entries", "1 entry"),
    ],
)  # fmt: skip
def test_one(many: str, one: str) -> None:
    assert agreed(many) == one
    assert agreed(one) == one


@pytest.mark.parametrize(
    "text",
    ["21 rows", "0.1 rows", "1,1 rows", "step 1/1 rows", "1 of 1 and rows", "v1 rows", "1 rows.jsonl", "1 is",
     "=1 rows", "2 rows", "1 row", "1 steps_per_epoch", "1 rows-of-mine"],
)  # fmt: skip
def test_others_stay(text: str) -> None:
    assert agreed(text) == text


def test_errors_agree() -> None:
    assert str(UserError("1 rows cannot be used")) == "1 row cannot be used"
    assert str(RunError("1 files are missing")) == "1 file is missing"
    assert render(RunError("1 files are missing")) == ["1 file is missing"]
    assert render(UserError([Problem("1 tokens are too many", fix="keep 1 answers")])) == [
        "1 token is too many → keep 1 answer"
    ]


def written(tree: ast.AST) -> list[str]:
    """Of f-strings what follows on a value: `{n:,} usable rows are …`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for value, after in zip(node.values, node.values[1:], strict=False):
                if isinstance(value, ast.FormattedValue) and isinstance(after, ast.Constant):
                    found.append(str(after.value))
    return found


def test_every_unit_that_is_counted_is_known() -> None:
    """A word in s after a number in a message, which the table does not have, would stay `1 <plural>`."""
    unit = re.compile(rf" (?:(?:{BETWEEN}) )*([a-z]+s)\b(?![\w/=-])")
    counted: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for after in written(ast.parse(path.read_text("utf-8"))):
            if found := unit.match(after):
                counted.setdefault(found[1], f"{path.relative_to(PACKAGE)}: {after!r}")
    unknown = {
        word: place for word, place in counted.items() if word not in (*UNITS.split("|"), "others", *NO_NOUNS.split())
    }
    assert unknown == {}


def test_what_is_said_of_one_row(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "one.jsonl", [{"instruction": "a", "output": "b"}])
    said = [ft("data", "check", str(rows)), ft("data", "check", str(rows), "--model", "tiny-llama")]
    settings = ("--set", f"data.train={rows}", "--set", "eval=null", "--set", "train.max_steps=1",
                "--set", "train.effective_batch_size=1")  # fmt: skip
    said.append(ft("sft", "quickstart.yaml", *settings, "--dry-run"))
    assert all(one.returncode == 0 for one in said), [one.stderr for one in said]
    assert [found for one in said for found in PLURAL.findall(one.stdout + one.stderr) if found != "pass"] == []
    assert "1 row, 1 usable" in said[0].stdout
    assert "1 row, " in said[2].stderr


def test_what_is_said_of_bad_inputs() -> None:
    assert PLURAL.findall(TABLE.read_text("utf-8").replace("1 is ", "")) == []
