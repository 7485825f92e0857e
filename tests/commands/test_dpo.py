"""`ft dpo` and `ft kto`: trl's own numbers, the right reference, real files, exact resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import SHARED, tensors, train, write_rows
from rl_kit import here

from finetune import child
from finetune.commands import dpo, kto
from finetune.errors import UserError
from finetune.evaluation import targets
from finetune.models import attach, loading
from finetune.recipe.file import load
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import DpoRecipe, KtoRecipe
from finetune.run.directory import Run

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Reference log-probabilities of a test stay with the test."""
    monkeypatch.setattr("finetune.training.reference.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "reference"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"say {i}", "chosen": f"{i} yes please", "rejected": f"{i} no"} for i in range(32)
    ]  # a property that is easy to prefer
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def unpaired(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"say {i}", "completion": f"{i} {'yes please' if i % 2 else 'no'}", "label": bool(i % 2)}
        for i in range(32)
    ]
    return write_rows(tmp_path / "kto.jsonl", rows)


@pytest.fixture
def aligned(tmp_path: Path, base: Path, pairs: Path) -> Write:
    def write(stage: str = "dpo", **sections: Any) -> Path:
        values: dict[str, Any] = {
            "version": 1,
            "stage": stage,
            "model": {"name": str(base), "dtype": "float32"},
            "data": {"train": str(pairs), "max_length": 64},
            "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
            "train": {"max_steps": 6, "effective_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1},
            "output": {"dir": str(tmp_path / stage)},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    return write


def run(path: Path, resume: bool = False) -> Run:
    stage = yaml.safe_load(path.read_text())["stage"]
    kind, module = {"dpo": (DpoRecipe, dpo), "kto": (KtoRecipe, kto)}[stage]
    loaded: Any = load(str(path), kind)
    module.run(loaded, resume=resume)
    return Run(Path(loaded.output.dir))


def logged(found: Run, key: str) -> list[float]:
    return [row[key] for row in found.read_metrics() if key in row]


def test_kto_without_padding_has_the_figures_of_padded_rows(
    aligned: Write, unpaired: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers, those to other prompts, their references and held-out rows: each pass is one row."""
    from transformers.models.llama.modeling_llama import LlamaModel

    from finetune.models import documents

    passes, plain = [], LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda self, **given: passes.append(given) or plain(self, **given))
    settings = {"data": {"train": str(unpaired), "eval_split": 6}, "train": {"max_steps": 2}}
    one = run(aligned("kto", **settings))
    assert passes
    assert all(given.get("attention_mask") is None and len(given["input_ids"]) == 1 for given in passes)
    monkeypatch.setattr(documents, "use", lambda model: False)
    shutil.rmtree(tmp_path / "cache")
    rows = run(aligned("kto", **settings, output={"dir": str(tmp_path / "rows")}))
    assert passes[-1]["attention_mask"] is not None
    for key in ("loss", "eval_loss", "rewards/margins", "eval_logps/chosen", "num_tokens", "entropy"):
        assert logged(one, key) == pytest.approx(logged(rows, key), rel=1e-5, abs=1e-5), key
    assert logged(one, "grad_norm") == pytest.approx(logged(rows, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_losses_equal_those_of_trl(
    aligned: Write, base: Path, pairs: Path, unpaired: Path, tmp_path: Path, stage: str
) -> None:
    """The same rows in the same order through trl's own trainer with its own tokenisation."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    source = {"dpo": pairs, "kto": unpaired}[stage]
    settings = {"effective_batch_size": 32, "max_steps": 4, "lr_scheduler_type": "constant", "warmup_steps": 0}
    ours = logged(run(aligned(stage, train=settings, data={"train": str(source)})), "loss")

    def turns(row: dict[str, Any]) -> dict[str, Any]:
        roles = {"prompt": "user"}
        return {
            key: value if key == "label" else [{"role": roles.get(key, "assistant"), "content": value}]
            for key, value in row.items()
        }

    rows = [turns(json.loads(line)) for line in source.read_text().splitlines()]
    set_seed(42)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    start = {k: v for k, v in get_peft_model(model, config).state_dict().items() if "lora" in k}
    model = AutoModelForCausalLM.from_pretrained(base)
    made, arguments = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}[stage]
    trainer = made(
        model=model,
        args=arguments(
            output_dir=str(tmp_path / "trl"), per_device_train_batch_size=32, max_steps=4, learning_rate=5e-3,
            lr_scheduler_type="constant", logging_steps=1, bf16=False, use_cpu=True, report_to="none", max_length=64,
            activation_checkpointing=False, beta=0.1, save_strategy="no", disable_tqdm=True, weight_decay=0.0,
        ),
        train_dataset=Dataset.from_list(rows), processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=config,
    )  # fmt: skip
    names = {
        k.replace("base_model.model.", "base_model.model.", 1).replace(".default", ""): v for k, v in start.items()
    }
    set_peft_model_state_dict(trainer.model, names)
    trainer.train()
    theirs = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert ours[0] == pytest.approx({"dpo": 0.6931, "kto": 0.5}[stage], abs=1e-4)
    assert ours[-1] < ours[0] - 0.01


def test_learns_the_preference(aligned: Write) -> None:
    found = run(aligned(train={"max_steps": 25}, data={"eval_split": 8}))
    assert logged(found, "eval_rewards/accuracies")[-1] == 1.0
    assert logged(found, "loss")[-1] < 0.4
    assert {p.name for p in found.adapter.iterdir()} >= {"adapter_model.safetensors", "base_identity.json"}
    assert not [path for path in found.adapter.iterdir() if path.is_dir()], "there is one adapter"


@pytest.mark.parametrize("loss", ["ipo", "hinge", "robust", "apo_zero", "simpo", "orpo", "sigmoid_norm"])
def test_objectives_widen_the_margin(aligned: Write, loss: str) -> None:
    settings = {"loss_type": loss, "label_smoothing": 0.1 if loss == "robust" else 0.0}
    margins = logged(run(aligned(dpo=settings, train={"max_steps": 15})), "rewards/margins")
    assert margins[-1] > margins[0]


def test_sft_weight_raises_the_chosen_answers(aligned: Write, tmp_path: Path) -> None:
    plain = run(aligned(train={"max_steps": 12}))
    weighted = run(
        aligned(train={"max_steps": 12}, dpo={"sft_weight": 1.0}, output={"dir": str(tmp_path / "weighted")})
    )
    assert logged(weighted, "logps/chosen")[-1] > logged(plain, "logps/chosen")[-1]


def test_reference_is_computed_once(
    aligned: Write, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import DPOTrainer

    calls = []
    whole = DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(
        DPOTrainer, "compute_ref_log_probs", lambda self, *a, **k: calls.append(1) or whole(self, *a, **k)
    )
    first = run(aligned())
    computed = len(calls)
    again = run(aligned(output={"dir": str(tmp_path / "again")}))
    assert computed > 0
    assert len(calls) == computed
    assert len(list(cache.iterdir())) == 1
    assert logged(first, "loss") == logged(again, "loss")
    run(aligned(output={"dir": str(tmp_path / "other")}, model={"dtype": "bfloat16"}))
    assert len(calls) > computed


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_only_rows_that_are_trained_are_scored(
    aligned: Write, unpaired: Path, tmp_path: Path, cache: Path, stage: str
) -> None:
    """In two steps of four rows; a run of more steps scores the others, and has the same first steps."""
    sections: dict[str, Any] = {"data": {"train": str(unpaired)}} if stage == "kto" else {}

    def trained(steps: int) -> tuple[Run, set[int]]:
        settings = {"max_steps": steps, "effective_batch_size": 4, "logging_steps": 1}
        found = run(aligned(stage, train=settings, output={"dir": str(tmp_path / f"{steps}")}, **sections))
        [file] = cache.iterdir()
        columns = list(json.loads(file.read_text()).values())
        scored = {i for i, value in enumerate(columns[0]) if value is not None}
        assert all({i for i, value in enumerate(column) if value is not None} == scored for column in columns)
        return found, scored

    few, eight = trained(2)
    more, twenty = trained(5)
    assert (len(eight), len(twenty)) == (8, 20)
    assert eight < twenty
    assert logged(few, "grad_norm") == pytest.approx(logged(more, "grad_norm")[:2], rel=1e-6)
    _, every = trained(9)  # one more than an epoch has
    assert every == set(range(32))


@pytest.mark.parametrize("start", ["continue", "merge"])
def test_from_an_sft_run(aligned: Write, recipe: Write, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy and reference begin as the SFT model, whichever way; merged, the base is a new one."""
    monkeypatch.setattr(child, "run", here)
    sft = train(recipe(train={"max_steps": 20}))
    found = run(aligned(model={"adapter": str(sft.path)}, dpo={"start": start}, data={"eval_split": 8}))
    assert logged(found, "loss")[0] == pytest.approx(0.6931, abs=1e-3)
    identity = json.loads((found.adapter / "base_identity.json").read_text())
    assert (identity["base"] == str(found.path / "start")) == (start == "merge")
    target = targets.run_target(str(found.path))  # what `ft eval RUN` loads
    assert target.model.name == identity["base"]
    before = tensors(sft.adapter)
    after = tensors(found.adapter)
    if start == "continue":
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    "section",
    [
        {"method": "bitfit"}, {"method": "ia3"}, {"method": "vera", "r": 16}, {"method": "lokr", "r": 4},
        {"method": "last_layers", "num_layers": 1}, {"method": "prompt_tuning", "num_virtual_tokens": 4},
        {"method": "prefix_tuning", "num_virtual_tokens": 4}, {"method": "adalora", "init_r": 4, "target_r": 3},
    ],
    ids=lambda section: section["method"],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_reference_of_every_method_is_where_it_starts(
    aligned: Write, recipe: Write, unpaired: Path, stage: str, section: dict[str, Any]
) -> None:
    """Also of those that stand on a base only once, or keep their weights under other names than LoRA's."""

    def with_section(path: Path) -> Path:
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "adapter": section}))
        return path

    sft = train(with_section(recipe(train={"max_steps": 5, "learning_rate": 3e-2})))
    sections: dict[str, Any] = {"model": {"adapter": str(sft.path)}, "train": {"max_steps": 3, "warmup_steps": 0}}
    if stage == "kto":
        sections["data"] = {"train": str(unpaired)}
    found = run(with_section(aligned(stage, **sections)))
    first = found.read_metrics()[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    if stage == "dpo" and section["method"] != "adalora":  # whose loss has a penalty in it
        assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    before, after = tensors(sft.adapter), tensors(found.adapter)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_merge_without_an_adapter(aligned: Write) -> None:
    with pytest.raises(UserError, match="there is no adapter to merge"):
        run(aligned(dpo={"start": "merge"}))


@pytest.mark.parametrize("method", ["bottleneck", "bitfit", "prompt_tuning", "prefix_tuning", "adalora", "full"])
def test_other_methods_as_policy(aligned: Write, tmp_path: Path, method: str) -> None:
    path = aligned(train={"max_steps": 15})
    values = yaml.safe_load(path.read_text())
    values["adapter"] = {"method": method}
    path.write_text(yaml.safe_dump(values))
    margins = logged(run(path), "rewards/margins")
    assert margins[-1] > margins[0]


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_a_start_that_rewrites_the_base_rewrites_it_once(
    aligned: Write, unpaired: Path, base: Path, stage: str
) -> None:
    """Learning nothing, the saved adapter is the base."""
    settings = {"max_steps": 1, "learning_rate": 1e-12, "warmup_steps": 0}
    data = {"train": str(unpaired)} if stage == "kto" else {}
    found = run(aligned(stage, data=data, train=settings, adapter={"init_lora_weights": "pissa"}))
    if stage == "dpo":
        assert logged(found, "loss")[0] == pytest.approx(0.6931, abs=1e-4)
    ids = torch.arange(3, 20)[None]
    config = ModelConfig(name=str(base), sanity_check=False)
    bare = loading.load_model(config, torch.float32)(ids).logits
    tuned = attach.attach_adapter(loading.load_model(config, torch.float32), found.adapter, config)(ids).logits
    torch.testing.assert_close(tuned, bare, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_on_quantized_bases(aligned: Write, kind: str) -> None:
    found = run(aligned(model={"quantization": kind}, train={"max_steps": 15}, data={"eval_split": 8}))
    assert all(norm > 0 for norm in logged(found, "grad_norm"))
    assert logged(found, "rewards/margins")[-1] > 0


def test_resume_is_exact(aligned: Write, tmp_path: Path) -> None:
    settings = {"max_steps": 8, "save_steps": 2, "save_total_limit": 9}
    whole = run(aligned(train=settings, output={"dir": str(tmp_path / "whole")}))
    path = aligned(train=settings, output={"dir": str(tmp_path / "broken")})
    broken = run(path)
    broken.result.unlink()
    for step in (6, 8):
        (broken.checkpoints / f"checkpoint-{step}" / "complete").unlink()
    resumed = run(path, resume=True)
    assert logged(resumed, "loss") == logged(whole, "loss")
    a, b = tensors(whole.adapter), tensors(resumed.adapter)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    ("stage", "start", "kind"),
    [
        ("dpo", "adapter", None), ("kto", "adapter", None), ("dpo", "adapter", "int4"), ("kto", "adapter", "int8"),
        ("dpo", "pissa", None), ("dpo", "full", None), ("kto", "prompt_tuning", None),
    ],
)  # fmt: skip
def test_a_run_that_goes_on_has_the_references_it_began_with(
    aligned: Write, recipe: Write, unpaired: Path, cache: Path, stage: str, start: str, kind: str | None
) -> None:
    """Not those of the half-trained policy in its checkpoint; with what was kept of them gone, too."""
    sections: dict[str, Any] = {"model": {"quantization": kind}, "data": {"eval_split": 8}}
    if stage == "kto":
        sections["data"]["train"] = str(unpaired)
    if start == "adapter":
        sft = train(recipe(train={"max_steps": 4}, model={"quantization": kind}))
        sections["model"]["adapter"] = str(sft.path)
    elif start == "pissa":
        sections["adapter"] = {"init_lora_weights": "pissa"}
    path = aligned(stage, train={"max_steps": 6, "save_steps": 2, "eval_steps": 3, "save_total_limit": 9}, **sections)
    if start in ("full", "prompt_tuning"):
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "adapter": {"method": start}}))
    found = run(path)
    keys = ("loss", "rewards/chosen", "rewards/rejected", "eval_loss", "eval_rewards/margins")
    whole, kept = {key: logged(found, key) for key in keys}, {f.name: f.read_bytes() for f in cache.iterdir()}
    assert len(kept) == 2
    assert min(map(len, whole.values())) >= 2
    found.result.unlink()
    for step in (4, 6):
        (found.checkpoints / f"checkpoint-{step}" / "complete").unlink()
    shutil.rmtree(cache)
    resumed = run(path, resume=True)
    assert {f.name: f.read_bytes() for f in cache.iterdir()} == kept
    assert {key: logged(resumed, key) for key in keys} == whole


def test_kto_wants_two_rows_per_step(aligned: Write, unpaired: Path) -> None:
    """In one pass or in two."""
    alone = aligned("kto", data={"train": str(unpaired)}, train={"effective_batch_size": 1})
    with pytest.raises(UserError, match=r"alone in it.*set it to 2"):
        run(alone)
    settings = {"per_device_train_batch_size": 1, "effective_batch_size": 2, "max_steps": 2}
    assert len(logged(run(aligned("kto", data={"train": str(unpaired), "eval_split": 4}, train=settings)), "loss")) == 2


def test_kto_learns(aligned: Write, unpaired: Path) -> None:
    found = run(aligned("kto", data={"train": str(unpaired)}, train={"max_steps": 20}))
    assert logged(found, "rewards/margins")[-1] > 0


def test_kto_reads_a_pair_as_a_good_and_a_bad_answer(aligned: Write) -> None:
    found = run(aligned("kto", train={"max_steps": 20}))
    assert json.loads(found.result.read_text())["data"]["used"] == 64
    assert logged(found, "rewards/margins")[-1] > 0


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "chosen": "same", "rejected": "same"}, "row 2"),
        ({"prompt": "p", "chosen": "a"}, "row 2"),
    ],
)
def test_unusable_pairs(aligned: Write, tmp_path: Path, row: dict[str, str], expected: str) -> None:
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    data = {"train": str(write_rows(tmp_path / "bad.jsonl", [good, row]))}
    with pytest.raises(UserError, match=expected):
        run(aligned(data=data))
    assert not (tmp_path / "dpo").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real preference file")
def test_real_file(aligned: Write) -> None:
    data = {
        "train": str(SHARED / "data" / "dpo_zh_demo.json"),
        "max_length": 512,
        "on_overlong": "drop",
    }
    assert len(logged(run(aligned(data=data, train={"max_steps": 2})), "loss")) == 2
