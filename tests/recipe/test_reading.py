"""Any file is read, or refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_kit import GOOD, complaint, load

from finetune.errors import UserError
from finetune.recipe import file
from finetune.recipe.sections import held_sets
from finetune.recipe.stages import SftRecipe

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("名: 1".encode("gbk"))
    with pytest.raises(UserError, match="not UTF-8"):
        file.load(str(path), SftRecipe)


def test_missing_recipe_suggests_a_shipped_one() -> None:
    with pytest.raises(UserError, match=r"did you mean the shipped recipe quickstart.yaml"):
        file.load("quickstrt", SftRecipe)


def test_yaml_reads_plain_exponents_as_numbers(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD + "train: {learning_rate: 2e-4}\n").train.learning_rate == 2e-4


def test_byte_order_mark(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff" + GOOD).model.name == "tiny-llama"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            BOMB,
            "line 4: not readable as YAML: more than 20,000 values, as every alias (*name) repeats all that it names",
        ),
        (BOMB, "→ use fewer aliases, or write out the values that are needed"),
        ("data: &d {train: *d}\n", "line 1: not readable as YAML: an alias stands inside what it names"),
        ("data: &d [1, *d]\n", "an alias stands inside what it names → write the values out in its place"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "[" * 900 + "]" * 900, ""),
        ("a: " + "9" * 5000, "not readable as YAML"),
        ("a: 2024-13-45\n", "not readable as YAML"),
        ("a: \x00\n", "not readable as YAML"),
        ("? [a, b]\n: 1\n", "not readable as YAML"),
        ("? {a: b}\n: 1\n", "not readable as YAML"),
        ("1: 2\n", "1 is no name of a section"),
        ("data: {\tx: 1\n", "line"),
        ("a: !!python/object:os.system x\n", "not readable as YAML"),
        ("just text", "not a mapping of sections"),
        ("x" * (2 << 20), "is larger than 1 MiB"),
        (GOOD + "data: {train: x}\n", "line 6: data: key stands twice"),
        (GOOD.replace("{train: builtin:tickets/train}", "{train: a, train: b}"), "data.train: key stands twice"),
        (GOOD + "train: {1: 2}\n", "train: 1 is no name of a key"),
        (GOOD + "train: {null: 2}\n", "train"),
        (GOOD + "train: {[1]: 2}\n", "not readable as YAML"),
        (GOOD + "train: 5\n", "train"),
        (GOOD + "train: [1]\n", "train"),
        (GOOD.replace("{name: tiny-llama}", ""), "model"),
    ],
)
def test_no_file_is_too_odd(tmp_path: Path, text: str, expected: str) -> None:
    said = complaint(tmp_path, text)
    assert expected in said
    assert str(tmp_path / "r.yaml") in said


def test_an_alias_is_what_it_names_and_no_more(tmp_path: Path) -> None:
    text = GOOD.replace("{train: builtin:tickets/train}", "{train: &t builtin:tickets/train}") + "eval: {data: *t}\n"
    assert load(tmp_path, text).eval.data == "builtin:tickets/train"
    shared = GOOD + "train: &t {}\neval: *t\n"
    assert load(tmp_path, shared, "train.max_steps=3").train.max_steps == 3


@pytest.mark.parametrize("value", ["&a [*a]", "[" * 5000, "9" * 5000])
def test_set_takes_no_bombs_either(tmp_path: Path, value: str) -> None:
    assert "train.max_steps" in complaint(tmp_path, GOOD, f"train.max_steps={value}")


def test_a_recipe_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        file.load(str(tmp_path / "r.yaml"), SftRecipe)


SETS: dict[str, tuple[Any, list[tuple[str, str, bool]]]] = {
    "a path": ("a.jsonl", [("a.jsonl", "a.jsonl", False)]),
    "a list": (["a", {"path": "b", "general": True}], [("a", "a", False), ("b", "b", True)]),
    "by name": ({"zh": "a", "old": {"path": "b", "general": True}}, [("zh", "a", False), ("old", "b", True)]),
    "the watched first": ([{"path": "b", "general": True}, "a"], [("b", "b", True), ("a", "a", False)]),
    "one that is watched": ({"path": "b", "general": True}, [("b", "b", True)]),
}


@pytest.mark.parametrize("name", SETS)
def test_held_out_sets_of_every_shape(tmp_path: Path, name: str) -> None:
    given, expected = SETS[name]
    recipe = load(tmp_path, GOOD + yaml.safe_dump({"eval": {"data": given}}, sort_keys=False))
    assert recipe.eval.sets == expected
    assert recipe.eval.paths == [path for _, path, _ in expected]
    assert recipe.eval.first == expected[name == "the watched first"], "one that is trained for, where there is one"
    assert held_sets(given) == expected, "as they stand in a file, too"
    again = yaml.safe_load(file.to_yaml(recipe))["eval"]["data"]
    assert held_sets(again) == expected
    if isinstance(given, dict) and "zh" in given:
        assert list(again) == ["zh", "old"], "the first one stays the first"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "eval.data: names no set"),
        (["a", "a"], "eval.data: two sets are called a"),
        ({"zh": {"path": "a", "genral": True}}, "eval.data.zh.genral: unknown key, there are path, general"),
        ({"zh": {"general": True}}, "eval.data.zh: a path and"),
        ([{"path": "a", "general": 1}], "eval.data.0: a path and"),
        (3, "eval.data: 3 is no path"),
        ("", "eval.data: '' is no path"),
        ({"zh": {"path": ""}}, "eval.data.zh: a path and, where"),
        ({"zh": 3}, "eval.data.zh: 3 is no path"),
    ],
)
def test_what_no_held_out_set_can_be_is_one_line(tmp_path: Path, given: Any, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, GOOD + yaml.safe_dump({"eval": {"data": given}}, sort_keys=False))
    (line,) = caught.value.lines()
    assert told in line
