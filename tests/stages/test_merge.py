"""`ft merge`: the written model computes what base and adapter compute together, or it is not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import train
from safetensors.torch import load_file, save_file

from finetune.errors import RunError, UserError
from finetune.stages import merge

Recipe = Callable[..., Path]


def merged(run: Path, output: Path, dtype: str | None = None, **more: object) -> dict[str, object]:
    merge.run(str(run), str(output), None, dtype, "5GB", bool(more.get("overwrite")))
    report: dict[str, object] = json.loads((output / "merge.json").read_text())
    return report


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merged_equals_unmerged(
    recipe: Recipe, base: Path, tmp_path: Path, adapter: dict[str, object], dtype: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(recipe(adapter=adapter, train={"max_steps": 12}))
    report = merged(run.path, tmp_path / "merged", dtype)
    kind = getattr(torch, dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == kind
    pair = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=kind), run.adapter)
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("another text", return_tensors="pt")["input_ids"]
    difference = (plain(ids).logits - pair(ids).logits).abs().max().item()
    assert difference < {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}[dtype]
    assert report["max_logit_diff"] <= report["adapter_effect"] / 10
    assert report["dtype"] == dtype


def test_template_and_stop_tokens_come_along(recipe: Recipe, base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    run = train(recipe())
    merged(run.path, tmp_path / "merged")
    template = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert template == AutoTokenizer.from_pretrained(base).chat_template
    assert 2 in GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id


def test_a_wrong_merge_is_not_written(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(recipe())

    def forget_the_adapter(model: torch.nn.Module) -> torch.nn.Module:
        return model.unload()  # type: ignore[operator, no-any-return]

    monkeypatch.setattr(merge, "merge_in_float32", forget_the_adapter)
    with pytest.raises(RunError, match="differs from base"):
        merged(run.path, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir() if "merged" in p.name] == []


def test_results_are_not_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe())
    merged(run.path, tmp_path / "merged")
    with pytest.raises(UserError, match="already holds files"):
        merged(run.path, tmp_path / "merged")
    (tmp_path / "merged" / "model.gguf").write_text("mine")
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    report = merged(run.path, tmp_path / "merged", overwrite=True)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == files == {*report["files"], "model.gguf"}  # type: ignore[misc]
    assert (tmp_path / "merged" / "model.gguf").read_text() == "mine"


def snapshot(folder: Path) -> dict[str, object]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else p.is_symlink() for p in folder.rglob("*")}


def test_overwrite_takes_nothing_that_no_merge_wrote(
    recipe: Recipe, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Foreign folders, the run itself, what holds it, the base, links; and a foreign folder where it would be built."""
    run = train(recipe())
    project, place = tmp_path / "project", tmp_path / "place"
    for folder in (project, place, tmp_path / "new.part"):
        folder.mkdir()
        (folder / "mine").write_text("mine")
    (place / "merge.json").write_text('{"models": [], "merge_method": "slerp"}')  # another tool's
    (tmp_path / "link").symlink_to(project)
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(project)
    before, of_base = snapshot(tmp_path), snapshot(base)
    targets = [project, place, run.path, run.adapter, run.checkpoints, tmp_path, base, base.parent, "/", ".", "..", "~"]
    for target in (*targets, tmp_path / "link", tmp_path / "lost", tmp_path / "new", place / "mine"):
        for overwrite in (True, False):
            with pytest.raises(UserError) as caught:
                merged(run.path, Path(target), overwrite=overwrite)
            assert caught.value.problems[0].key == "--output", target
    assert snapshot(tmp_path) == before
    assert snapshot(base) == of_base


def test_a_merge_is_no_place_for_what_is_merged(recipe: Recipe, tmp_path: Path) -> None:
    """The base is an earlier merge, and would be replaced by its own child."""
    first = train(recipe())
    merged(first.path, tmp_path / "merged")
    second = train(recipe(model={"name": str(tmp_path / "merged")}, output={"dir": str(tmp_path / "second")}))
    before = snapshot(tmp_path / "merged")
    with pytest.raises(UserError, match="is what is merged"):
        merged(second.path, tmp_path / "merged", overwrite=True)
    assert snapshot(tmp_path / "merged") == before


def test_a_failed_merge_leaves_the_one_before(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(recipe())
    merged(run.path, tmp_path / "merged")
    before = snapshot(tmp_path / "merged")

    def unproven(*_: object) -> None:
        assert snapshot(tmp_path / "merged") == before
        raise RunError("differs")

    monkeypatch.setattr(merge, "prove", unproven)
    with pytest.raises(RunError, match="differs"):
        merged(run.path, tmp_path / "merged", overwrite=True)
    assert snapshot(tmp_path / "merged") == before
    assert [path.name for path in tmp_path.iterdir() if "merged." in path.name] == []


def test_other_base_is_refused(recipe: Recipe, base: Path, tmp_path: Path) -> None:
    run = train(recipe())
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="was trained on another base"):
        merge.run(str(run.path), str(tmp_path / "merged"), str(other), None, "5GB", False)


def test_changed_template_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe())
    template = run.adapter / "chat_template.jinja"
    template.write_text(template.read_text().replace("im_start", "im_begin"))
    with pytest.raises(UserError, match="not the chat template"):
        merged(run.path, tmp_path / "merged")


def test_adapter_folder_of_plain_peft(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert merged(tmp_path / "adapter", tmp_path / "merged")["adapter_effect"] > 0.01  # type: ignore[operator]
