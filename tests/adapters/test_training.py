"""What the methods need of training and evaluation: optimizer groups, batches, starts, and plain peft beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tensors, train
from test_methods import make

from finetune.adapters import compatibility, load, lora_init, methods
from finetune.errors import UserError
from finetune.evaluation.generation import batches
from finetune.recipe import file, reading
from finetune.recipe.adapters import LoraAdapter, PromptTuningAdapter
from finetune.recipe.stages import SftRecipe
from finetune.training.optim import faster_b

Recipe = Callable[..., Path]


def with_adapter(path: Path, **section: Any) -> Path:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "adapter": section}))
    return path


def test_loraplus_groups() -> None:
    model = load.apply(make("llama"), LoraAdapter())
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decayed = [p for n, p in named.items() if "layers.0" in n]
    rest = [p for n, p in named.items() if "layers.0" not in n]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest}], lr=0.01)
    faster_b(optimizer, model, 16)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(named)
    for name, parameter in named.items():
        rate, decay = rates[id(parameter)]
        assert rate == (0.16 if "lora_B" in name else 0.01)
        assert decay == (0.1 if "layers.0" in name else 0.01)


def test_loraplus_learns_faster_by_its_ratio(recipe: Recipe, tmp_path: Path) -> None:
    """After one step of plain SGD, B has moved 8 times as far, A not at all (its gradient is zero)."""
    moved = {}
    settings = {"max_steps": 1, "optim": "sgd", "warmup_steps": 0, "max_grad_norm": 0.0, "learning_rate": 1e-2}
    for ratio in (None, 8):
        path = recipe(train=settings, output={"dir": str(tmp_path / str(ratio))})
        run = train(with_adapter(path, method="lora", r=4, loraplus_lr_ratio=ratio))
        moved[ratio] = sum(t.norm().item() for name, t in tensors(run.adapter).items() if "lora_B" in name)
    assert moved[8] == pytest.approx(8 * moved[None], rel=1e-4)


def test_batches_of_equal_length() -> None:
    prompts = [[1] * n for n in (3, 5, 3, 4, 3, 5)]
    assert list(batches(prompts, 2, equal_length=True)) == [[0, 2], [4], [3], [1, 5]]
    assert list(batches(prompts, 4, equal_length=False)) == [[0, 2, 4, 3], [1, 5]]


def test_soft_prompts_are_not_packed(recipe: Recipe) -> None:
    path = recipe(data={"packing": True})
    run = train(with_adapter(path, method="prefix_tuning", num_virtual_tokens=2))
    [reason] = [d for d in json.loads(run.result.read_text())["decisions"] if "packing" in d]
    assert reason == "packing is off: documents in one row would share the virtual tokens and see each other"


def test_prompt_starts() -> None:
    """From text: its embeddings, repeated; at random: as wide as the base's embeddings."""
    base = make("llama")

    class Tokenizer:
        all_special_ids = (0, 1, 2)

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [7, 8, 9]}

    section = PromptTuningAdapter(num_virtual_tokens=4, prompt_tuning_init="text", prompt_tuning_init_text="x y z")
    model = load.apply(base, section, Tokenizer())
    expected = base.get_input_embeddings().weight[[7, 8, 9, 7]]
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, expected)
    section = PromptTuningAdapter(num_virtual_tokens=200, prompt_tuning_init="random")
    wide = load.apply(make("llama"), section).prompt_encoder["default"].embedding.weight.std().item()
    assert wide == pytest.approx(base.get_input_embeddings().weight.std().item(), rel=0.1)
    assert methods.is_before_text(model)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_rewrites_the_base(init: str, tmp_path: Path) -> None:
    """The saved adapter is plain LoRA of twice the rank; untrained, it changes nothing on the base as it was."""
    from peft import PeftModel

    section = LoraAdapter(r=4, init_lora_weights=init)  # type: ignore[arg-type]
    assert lora_init.rewrites_base(section)
    load.save(load.apply(make("llama"), section), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 64.0, True)
    base, ids = make("llama"), torch.arange(3, 20)[None]
    before = base(ids).logits
    torch.testing.assert_close(PeftModel.from_pretrained(base, tmp_path)(ids).logits, before, atol=1e-5, rtol=0)


def test_the_recipe_says_what_is_trained_on(recipe: Recipe, tmp_path: Path) -> None:
    """With model.adapter another method or size would be ignored; left out, recipe.yaml names those of the adapter."""
    first = train(with_adapter(recipe(train={"max_steps": 2}), method="bottleneck", bottleneck_size=8))

    def more(name: str, **section: Any) -> Any:
        path = recipe(model={"adapter": str(first.path)}, train={"max_steps": 2}, output={"dir": str(tmp_path / name)})
        values = yaml.safe_load(path.read_text())
        values.pop("adapter")
        path.write_text(yaml.safe_dump({**values, **({"adapter": section} if section else {})}))
        return train(path)

    for section, key in (
        ({"method": "lora"}, "adapter.method"), ({"method": "full"}, "adapter.method"),
        ({"method": "bottleneck", "bottleneck_size": 16}, "adapter.bottleneck_size"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            more("wrong", **section)
        assert error.value.problems[0].key == key
        assert not (tmp_path / "wrong").exists()
    written = yaml.safe_load((more("second").path / "recipe.yaml").read_text())["adapter"]
    assert (written["method"], written["bottleneck_size"]) == ("bottleneck", 8)


STORED = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_dora": False, "use_rslora": False,
    "target_modules": ["q_proj", "v_proj"], "modules_to_save": None, "init_lora_weights": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"r": 4, "lora_alpha": 8.0, "use_dora": False, "loraplus_lr_ratio": 4.0, "modules_to_save": []}, None),
        ({"r": 8}, "adapter.r"), ({"lora_dropout": 0.1}, "adapter.lora_dropout"),
        ({"use_dora": True}, "adapter.use_dora"), ({"use_rslora": True}, "adapter.use_rslora"),
        ({"modules_to_save": ["lm_head"]}, "adapter.modules_to_save"),
        ({"init_lora_weights": "gaussian"}, "adapter.init_lora_weights"),
    ],
)  # fmt: skip
def test_no_key_of_the_section_is_ignored_beside_model_adapter(section: dict[str, Any], key: str | None) -> None:
    values = {
        "version": 1, "stage": "sft", "model": {"name": "x", "adapter": "a"}, "data": {"train": "x"},
        "adapter": {"method": "lora", **section}, "output": {"dir": "x"},
    }  # fmt: skip
    raw = SftRecipe.model_validate(values)
    if key is not None:
        with pytest.raises(UserError) as caught:
            compatibility.continued(raw, STORED, "a")
        assert [problem.key for problem in caught.value.problems] == [key]
        return
    found = compatibility.continued(raw, STORED, "a")
    assert isinstance(found.adapter, LoraAdapter)
    assert (found.adapter.r, found.adapter.loraplus_lr_ratio) == (4, 4.0)
    assert found.adapter.target_modules == ["q_proj", "v_proj"]
    assert compatibility.continued(found, STORED, "a") == found  # as it is read back from recipe.yaml


def test_other_targets_beside_model_adapter(recipe: Recipe, tmp_path: Path) -> None:
    first = train(recipe(train={"max_steps": 1}))
    again = {"model": {"adapter": str(first.path)}, "train": {"max_steps": 1}, "output": {"dir": str(tmp_path / "b")}}
    with pytest.raises(UserError, match=r"adapter\.target_modules: model\.adapter also reaches .*down_proj"):
        train(recipe(adapter={"target_modules": ["q_proj"]}, **again))
    train(recipe(adapter={"target_modules": "all-linear"}, **again))


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({"method": "PROMPT_TUNING", "prompt_tuning_init": "TEXT"}, "prompt_tuning_init", "text"),
        ({"method": "prompt_tuning", "prompt_tuning_init": "RANDOM"}, "prompt_tuning_init", "random"),
        ({"method": "prompt_tuning", "prompt_tuning_init": "SAMPLE_VOCAB"}, "prompt_tuning_init", "vocabulary"),
        ({"method": "LoRA", "init_lora_weights": True}, "init_lora_weights", "default"),
        ({"method": "lora", "init_lora_weights": "PiSSA"}, "init_lora_weights", "pissa"),
        ({"method": "p_tuning", "encoder_reparameterization_type": "lstm"}, "encoder_reparameterization_type", "LSTM"),
        ({"method": "bottleneck", "non_linearity": "ReLU"}, "non_linearity", "relu"),
    ],
)  # fmt: skip
def test_pefts_spellings(given: dict[str, Any], field: str, expected: str) -> None:
    values = {"version": 1, "stage": "sft", "model": {"name": "x"}, "data": {"train": "x"}, "output": {"dir": "x"}}
    found = file.check({**values, "adapter": given}, "sft", Path("recipe.yaml"))
    assert getattr(found.adapter, field) == expected


def test_modules_to_save_are_merged(recipe: Recipe, tmp_path: Path) -> None:
    from finetune.commands import merge

    run = train(with_adapter(recipe(), method="lora", r=4, modules_to_save=["lm_head"]))
    merge.run(str(run.path), str(tmp_path / "merged"))
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["relative_diff"] < 1e-5


METHOD_RECIPES = [
    name
    for name, path in reading.shipped().items()
    if name.endswith("_llama.yaml") and "name: tiny-llama" in path.read_text() and "pretrain" not in name
]


def test_every_method_has_a_recipe() -> None:
    named = {yaml.safe_load(path.read_text()).get("adapter", {}).get("method") for path in reading.shipped().values()}
    assert {name for name, row in methods.METHODS.items() if row.make_config} | {"full"} <= named


@pytest.mark.slow
@pytest.mark.parametrize("name", METHOD_RECIPES)
def test_shipped_recipe_trains(name: str, recipe: Recipe, base: Path, rows: Path, tmp_path: Path) -> None:
    """With its own adapter and learning rate, on a random base: the loss falls."""
    path = reading.find(name)
    run = train(
        path, f"model.name={base}", f"data.train={rows}", "train.max_steps=40", f"output.dir={tmp_path / 'run'}",
        "model.sanity_check=false", "train.logging_steps=1", "train.warmup_steps=2",
    )  # fmt: skip
    losses = [row["loss"] for row in run.read_metrics() if "loss" in row]
    assert sum(losses[-5:]) / 5 < losses[0]
