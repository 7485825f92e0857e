"""Nothing that no run of ours wrote is overwritten, and nothing that is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from run_kit import contents, finished, recipe

from finetune.errors import UserError
from finetune.recipe.file import check, to_yaml
from finetune.recipe.stages import Recipe
from finetune.run.directory import ASIDE, CONTENTS, is_marked
from finetune.run.guards import check_inputs, check_output
from finetune.run.opening import open_run

INPUTS = {
    "model.name": "run/model", "model.adapter": "run", "model.chat_template": "run/adapter/t.jinja",
    "data.train": "run/adapter/*.jsonl", "eval.data": ".", "reward.model": "run/reward",
    "reward.functions": "run/start/rule.py:f", "reward.train": "run/samples.jsonl",
}  # fmt: skip


def reading(folder: Path, key: str, value: Any) -> Recipe:
    stage = "ppo" if key.startswith("reward") else "sft"
    values: dict[str, Any] = {
        "version": 1, "stage": stage, "model": {"name": "m"}, "data": {"train": "d"}, "output": {"dir": str(folder)},
        **({"reward": {}} if stage == "ppo" else {}),
    }  # fmt: skip
    section, _, name = key.partition(".")
    values.setdefault(section, {})[name] = value
    return check(values, stage)


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with open_run(recipe(folder)) as run:
        run.finish({"stage": "sft"})
    assert json.loads(run.result.read_text())["versions"]["torch"]
    with pytest.raises(UserError, match="already holds the results"):
        check_output(folder, overwrite=False, resume=False)
    with pytest.raises(UserError, match="nothing to resume"):
        check_output(folder, overwrite=False, resume=True)
    (folder / "mine.txt").write_text("keep")
    with open_run(recipe(folder), overwrite=True):
        assert not run.result.exists()
    assert (folder / "mine.txt").read_text() == "keep"


def test_foreign_files_block_a_run(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="already holds files"):
        check_output(tmp_path, overwrite=False, resume=False)
    with pytest.raises(UserError, match="is a file"):
        check_output(tmp_path / "x", overwrite=False, resume=False)


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_overwrite_takes_nothing_of_a_folder_that_is_no_run(tmp_path: Path, name: str, kind: str) -> None:
    mine = tmp_path / name if kind == "file" else tmp_path / name / "mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="no run of ft wrote"), open_run(recipe(tmp_path), overwrite=True):
        pass
    assert contents(tmp_path) == {str(mine.relative_to(tmp_path)): b"mine"}


def test_a_recipe_in_a_folder_does_not_make_it_a_run(tmp_path: Path) -> None:
    """A user's own, also one that `ft recipes new` wrote or that is the copy of a run's."""
    finished(tmp_path / "run")
    copied = (tmp_path / "run" / "recipe.yaml").read_text()
    project = tmp_path / "project"
    (project / "model").mkdir(parents=True)
    (project / "model" / "mine").write_text("mine")
    own = to_yaml(recipe(project), "# ft sft --recipe recipe.yaml\n")
    for text in (copied, own, "", "- 1", "{", "output: x"):
        (project / "recipe.yaml").write_text(text)
        with pytest.raises(UserError, match="no run of ft wrote"), open_run(recipe(project), overwrite=True):
            pass
        assert contents(project) == {"model/mine": b"mine", "recipe.yaml": text.encode()}


def test_a_moved_run_is_still_a_run(tmp_path: Path) -> None:
    finished(tmp_path / "run", adapter__x="old")
    (tmp_path / "run").rename(tmp_path / "moved")
    with open_run(recipe(tmp_path / "moved"), overwrite=True) as run:
        run.finish({"stage": "sft"})
    assert set(contents(tmp_path / "moved")) == {"recipe.yaml", "result.json"}


def test_a_conversion_beside_the_weights_is_not_taken(tmp_path: Path) -> None:
    finished(tmp_path / "run", model__config="{}", **{"model__x.gguf": "mine"})
    (tmp_path / "run" / "model" / "config").unlink()
    with pytest.raises(UserError, match=r"x\.gguf"), open_run(recipe(tmp_path / "run"), overwrite=True):
        pass


@pytest.mark.parametrize("key", INPUTS)
@pytest.mark.parametrize("spelling", ["as it is", "through a link"])
def test_inputs_are_never_replaced(tmp_path: Path, key: str, spelling: str) -> None:
    finished(
        tmp_path / "run", adapter__adapter_config="{}", model__config="{}", reward__x="", samples="", start__rule="",
        **{"adapter__t.jinja": "", "adapter__rows.jsonl": "", "start__rule.py": "", "samples.jsonl": ""},
    )  # fmt: skip
    (tmp_path / "link").symlink_to(tmp_path)
    text = str(tmp_path / ("link" if spelling == "through a link" else "") / INPUTS[key])
    value: Any = [text] if key == "reward.functions" else text
    read = reading(tmp_path / "run", key, value)
    before = contents(tmp_path / "run")
    with pytest.raises(UserError, match="would be deleted by --overwrite") as caught:
        check_inputs(read)
    assert [problem.key for problem in caught.value.problems] == [key]
    with pytest.raises(UserError), open_run(read, overwrite=True):
        pass
    assert contents(tmp_path / "run") == before
    if key == "eval.data":
        for several in (["d", text], {"x": "d", "y": text}, {"y": {"path": text, "general": True}}):
            with pytest.raises(UserError, match="would be deleted by --overwrite"):
                check_inputs(reading(tmp_path / "run", key, several))
    check_inputs(reading(tmp_path / "other", key, value) if key != "eval.data" else recipe(tmp_path / "other"))


def test_a_folder_of_links_reads_what_they_lead_to(tmp_path: Path) -> None:
    finished(tmp_path / "run", **{"model__w.safetensors": "x"})
    base = tmp_path / "base"
    base.mkdir()
    (base / "w.safetensors").symlink_to(tmp_path / "run" / "model" / "w.safetensors")
    for key in ("model.name", "data.train"):
        with pytest.raises(UserError, match="would be deleted"):
            check_inputs(reading(tmp_path / "run", key, str(base)))


def test_the_recipe_file_is_an_input(tmp_path: Path) -> None:
    finished(tmp_path / "run", **{"start__r.yaml": "mine"})
    check_inputs(recipe(tmp_path / "run"), tmp_path / "run" / "recipe.yaml")  # its own, which is written again
    with pytest.raises(UserError, match="--recipe: would be deleted"):
        check_inputs(recipe(tmp_path / "run"), tmp_path / "run" / "start" / "r.yaml")


@pytest.mark.parametrize("name", [*CONTENTS, ".lock", ASIDE, "adapter/x", "checkpoints/checkpoint-1"])
def test_a_run_holds_no_links(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "x").write_text("mine")
    finished(tmp_path / "run")
    link = tmp_path / "run" / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(mine)
    for how in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(UserError, match="is a link"), open_run(recipe(tmp_path / "run"), **how):
            pass
    assert link.is_symlink()
    assert contents(mine) == {"x": b"mine"}


def test_advice_is_what_works(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(UserError) as caught:
        check_output(tmp_path, overwrite=False, resume=False)
    assert caught.value.problems[0].fix == "use --output DIR"
    assert os.listdir(tmp_path) == ["x"]


def test_a_pipe_for_a_recipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "run"
    finished(path)
    (path / "recipe.yaml").unlink()
    os.mkfifo(path / "recipe.yaml")
    with pytest.raises(UserError, match="no run of ft wrote"):
        check_output(path, overwrite=True, resume=False)
    assert not is_marked(path)


@pytest.mark.parametrize("report", [{"stage": "dpo", "versions": {"ft": "0"}}, {"stage": "sft", "versions": {}}])
def test_a_result_of_another_stage_or_tool_does_not_make_a_run(tmp_path: Path, report: dict[str, Any]) -> None:
    finished(tmp_path / "run", adapter__x="mine")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "moved" / "result.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="no run of ft wrote"):
        check_output(tmp_path / "moved", overwrite=True, resume=False)


def test_a_recipe_nested_without_end_does_not_make_a_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("[" * 50_000)
    with pytest.raises(UserError, match="no run of ft wrote"):
        check_output(tmp_path, overwrite=True, resume=False)


def test_a_link_for_the_run_is_told_before_its_inputs(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is a link"):
        check_inputs(recipe(tmp_path / "run"))
    with pytest.raises(UserError, match="is a link"):
        check_output(tmp_path / "run", overwrite=False, resume=False)


def test_going_on_and_starting_anew_exclude_each_other(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    with pytest.raises(UserError, match="exclude each other"):
        check_output(tmp_path / "run", overwrite=True, resume=True)
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        check_output(tmp_path / "run", overwrite=False, resume=True)


def test_what_a_user_put_where_the_old_run_goes_stays(tmp_path: Path) -> None:
    finished(tmp_path / "run")
    (tmp_path / "run" / ASIDE).mkdir()
    (tmp_path / "run" / ASIDE / "mine").write_text("mine")
    with pytest.raises(UserError, match="is nothing that ft wrote"):
        check_output(tmp_path / "run", overwrite=True, resume=False)


def test_inputs_in_the_run_beside_what_it_writes(tmp_path: Path) -> None:
    """What lies where the old run is put aside, the run's own directory as data, and links deep in a folder of data."""
    run, data = tmp_path / "run", tmp_path / "data" / "deep"
    finished(run, adapter__rows="x", **{"mine.jsonl": "x"})
    (run / ASIDE).mkdir()
    (run / ASIDE / "rows.jsonl").write_text("x")
    data.mkdir(parents=True)
    (data / "rows.jsonl").symlink_to(run / "adapter" / "rows")
    for value in (run / ASIDE / "rows.jsonl", run, tmp_path / "data"):
        with pytest.raises(UserError, match="would be deleted by --overwrite"):
            check_inputs(reading(run, "data.train", str(value)))
