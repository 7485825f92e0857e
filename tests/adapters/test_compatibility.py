"""What cannot be is refused before anything is loaded, with the reason and what to do instead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import train
from safetensors.torch import save_file

from finetune.adapters import methods, targets
from finetune.commands import merge
from finetune.errors import RunError, UserError
from finetune.models import loading
from finetune.models.config import read_config
from finetune.recipe.adapters import BitFitAdapter, LastLayersAdapter, LnTuningAdapter, LoraAdapter
from finetune.training.weight_check import Proof

Recipe = Callable[..., Path]
CHATGLM = Path(__file__).parent.parent / "fixtures" / "chatglm" / "chatglm3" / "checkpoint"


def only(section: dict[str, Any]) -> dict[str, Any]:
    """An adapter section that does not inherit the fixture's keys."""
    return {"r": None, "lora_alpha": None, **section}


@pytest.mark.parametrize(
    ("adapter", "more", "expected"),
    [
        ({"method": "full"}, {"model": {"quantization": "int4"}}, "model.quantization: quantized weights are integers"),
        ({"method": "loha"}, {"model": {"quantization": "int4"}}, "LoHa and LoKr add their update"),
        ({"method": "lora", "init_lora_weights": "pissa"}, {"model": {"quantization": "int8"}}, "pissa and olora take"),
        ({"method": "lora", "init_lora_weights": "loftq"}, {}, "not in int4 → set model.quantization: int4"),
        ({"method": "lora", "loraplus_lr_ratio": 4.0}, {"train": {"optim": "muon"}}, "B would not learn faster"),
        ({"method": "ia3"}, {"train": {"optim": "muon"}}, "muon is for matrices"),
        ({"method": "adalora", "target_r": 8, "init_r": 8}, {}, "target_r must be below init_r"),
        ({"method": "prompt_tuning", "prompt_tuning_init": "text"}, {}, "go together"),
        ({"method": "bitfit", "bias": "existing"}, {}, "this base has no biases to train → set adapter.bias"),
        ({"method": "last_layers", "num_layers": 9}, {}, "adapter.num_layers: 9 blocks of 2 → at most 2"),
        ({"method": "ln_tuning", "target_modules": "nothing"}, {}, "matches no module: nothing → there are down_proj"),
        ({"method": "lora", "target_modules": ["q_projj"]}, {}, "adapter.target_modules: matches no module: q_projj"),
        ({"method": "lora", "modules_to_save": ["embed"]}, {}, "adapter.modules_to_save: matches no module: embed"),
        ({"method": "lora", "target_modules": "q_proj("}, {}, "is no regular expression"),
        ({"method": "lora", "target_modules": []}, {}, "matches no module: an empty list"),
        ({"method": "lora", "target_modules": "model.*"}, {}, "model is LlamaModel: not for this method"),
        ({"method": "ln_tuning", "target_modules": ["q_proj"]}, {}, "q_proj is Linear: not for this method"),
        ({"method": "bitfit", "targets": ["mlp"]}, {}, "mlp is LlamaMLP: not for this method"),
        ({"method": "lora", "target_modules": ["lm_head"]}, {}, "an adapter on the output head would never be trained"),
        (
            {"method": "lora", "modules_to_save": ["q_proj"]}, {"model": {"quantization": "int8"}},
            "adapter.modules_to_save: model.layers.0.self_attn.q_proj is held as integers here",
        ),
        (
            {"method": "lora", "modules_to_save": ["mlp"]}, {"model": {"quantization": "int4"}},
            "adapter.modules_to_save: model.layers.0.mlp is held as integers here",
        ),
        ({"method": "other"}, {}, "adapter.method: other is what an adapter of another tool is called"),
        ({"method": "lora", "r": 64, "init_lora_weights": "pissa"}, {}, "adapter.r: pissa has only"),
        ({"method": "lora", "r": 3, "init_lora_weights": "orthogonal"}, {}, "adapter.r: an orthogonal start"),
        ({"method": "oft", "oft_block_size": 33}, {}, "adapter.oft_block_size: does not divide"),
        ({"method": "ia3", "feedforward_modules": ["gate_proj"]}, {}, "→ give target_modules, too"),
        (
            {"method": "prompt_tuning", "prompt_tuning_init": "text", "prompt_tuning_init_text": ""}, {}, "go together",
        ),
        (
            {"method": "lora", "init_lora_weights": "loftq"},
            {"model": {"name": str(CHATGLM), "quantization": "int4", "sanity_check": False}},
            "ChatGLM's original layout has other names",
        ),
    ],
)  # fmt: skip
def test_refused_before_loading(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any], more: dict[str, Any], expected: str
) -> None:
    def must_not_load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_model", must_not_load)
    import yaml

    path = recipe(**more)
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "adapter": adapter}))
    with pytest.raises(UserError) as caught:
        train(path)
    [line] = caught.value.lines()
    assert expected in line
    assert "→" in line


def test_all_limits_at_once(recipe: Recipe) -> None:
    import yaml

    path = recipe(model={"quantization": "int8"}, train={"optim": "muon"})
    adapter = {"method": "lora", "init_lora_weights": "loftq", "loraplus_lr_ratio": 2.0, "use_dora": True}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "adapter": adapter}))
    with pytest.raises(UserError) as caught:
        train(path)
    assert len(caught.value.lines()) == 4


@pytest.mark.parametrize(
    ("config", "model_type", "expected"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "llama", "prefix_tuning cannot be merged: its keys and values stand before"),
        ({"peft_type": "BOTTLENECK"}, "llama", "non-linear"),
        (
            {"peft_type": "BITFIT", "target_modules": ["a.0.o_proj", "a.0.q_proj"]}, "glm",
            "glm checkpoints cannot hold a bias on o_proj",
        ),
    ],
)  # fmt: skip
def test_merges_refused_before_loading(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], model_type: str, expected: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    read = read_config
    monkeypatch.setattr("finetune.base.read_config", lambda model: {**read(model), "model_type": model_type})
    with pytest.raises(UserError, match=expected):
        merge.run(str(tmp_path), str(tmp_path / "merged"))


def test_loftq_is_merged_into_rounded_weights_only(recipe: Recipe, tmp_path: Path) -> None:
    import yaml

    path = recipe(model={"quantization": "int4"}, train={"max_steps": 4})
    adapter = {"method": "lora", "r": 4, "init_lora_weights": "loftq"}
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "adapter": adapter}))
    run = train(path)
    with pytest.raises(UserError, match="use --base dequantized"):
        merge.run(str(run.path), str(tmp_path / "merged"))
    merge.run(str(run.path), str(tmp_path / "merged"), base="dequantized")
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["diff_to_trained_model"] < 1e-4


def test_bitfit_on_a_model_that_cannot_store_biases() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig(vocab_size=50, num_hidden_layers=2, **sizes))
    with pytest.raises(UserError, match=r"no place for any → set adapter.targets: all"):
        methods.check(model, BitFitAdapter())
    methods.check(model, BitFitAdapter(targets="all"))
    methods.check(model, BitFitAdapter(targets=["q_proj"]))
    methods.check(model, LnTuningAdapter())
    methods.check(model, LoraAdapter(target_modules=r"model\.layers\.1\..*proj"))
    assert targets.find(model, ["layers.0.mlp.up_proj"]) == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(UserError, match="3 blocks of 2"):
        methods.check(model, LastLayersAdapter(num_layers=3))


class TestProof:
    """The callback's figures, on a network of two layers."""

    @staticmethod
    def network() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))

    @staticmethod
    def steps(model: torch.nn.Module, proof: Proof, count: int, only: int | None = None) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(count):
            layer = model if only is None else model[only]  # type: ignore[index]
            layer(torch.ones(2, 4)).pow(2).sum().backward()
            proof.look()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            proof.count(0.1)

    def test_all_is_well(self) -> None:
        model = self.network()
        model[0].requires_grad_(False)
        proof = Proof(model)
        self.steps(model, proof, 4)
        assert proof.finish() == {
            "tensors": {"1.weight": 1, "1.bias": 1},
            "changed_equals_declared": True,
            "frozen_tensors_unchanged": 2,
            "zero_gradient_at_first": {},
            "unrouted_experts": {},
            "cut_to_rank_zero": {},
        }

    def test_nothing_to_train(self) -> None:
        with pytest.raises(RunError, match="nothing would be trained"):
            Proof(self.network().requires_grad_(False))

    def test_no_gradient(self) -> None:
        model = self.network()
        with pytest.raises(RunError, match=r"no gradient reaches 1\.bias, 1\.weight"):
            self.steps(model, Proof(model), 1, only=0)

    def test_gradient_of_zero(self) -> None:
        model = self.network()
        with torch.no_grad():
            model[1].weight.zero_()
            model[1].bias.zero_()
        with pytest.raises(RunError, match=r"after 3 steps the gradient of .* is still exactly zero"):
            self.steps(model, Proof(model), 3)

    def test_frozen_weights_change(self) -> None:
        model = self.network()
        model[0].requires_grad_(False)
        proof = Proof(model)
        self.steps(model, proof, 3)
        with torch.no_grad():
            model[0].weight[0, 0] += 1e-3
        with pytest.raises(RunError, match=r"frozen weights have changed: 0\.weight"):
            proof.finish()

    def test_trained_weights_do_not_change(self) -> None:
        model = self.network()
        proof = Proof(model)
        kept = model[1].weight.detach().clone()
        self.steps(model, proof, 3)
        model[1].weight.data = kept
        with pytest.raises(RunError, match=r"trained weights are what they were: 1\.weight"):
            proof.finish()
