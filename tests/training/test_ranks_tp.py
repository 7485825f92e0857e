"""Two processes that hold half of every layer train as one does: real ones, on CPUs over gloo, each with all rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import make_tokenizer
from conftest import ft, tensors
from test_ranks import TORCHRUN, Together, assert_alike, check_codes, command, launched, metrics, recipes
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from finetune.errors import UserError
from finetune.models import tensor_parallel
from finetune.models.loading import skeleton
from finetune.recipe.sections import ModelConfig

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
SLOW = ("packed", "full", "dpo", "simpo", "kto", "reward", "pretrain")


def made(path: Path, model: type[Any], config: type[Any], **values: Any) -> Path:
    """A random network whose biases are not zero, and whose vocabulary is odd."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    network = model(config(vocab_size=len(tokenizer), **{**SIZES, **values}))
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def trained(folder: Path, base: Path, stages: Sequence[str], resumed: bool = False) -> Together:
    """A folder with each stage trained by one process and by two, and what the two saw."""
    written = recipes(folder, base)
    five, three = (("--set", f"train.max_steps={steps}") for steps in (5, 3))
    for name in stages:
        done = ft(*command(written[name], folder / f"{name}.one"))
        assert done.returncode == 0, (name, done.stderr)
    commands = [["tp", *command(written[name], folder / f"{name}.tp")] for name in stages]
    if resumed:
        assert ft(*command(written["sft"], folder / "tp.from_one", *three)).returncode == 0
        commands.append(["tp", *command(written["sft"], folder / "tp.from_one", "--resume", *five)])
        commands.append(["tp", *command(written["sft"], folder / "tp.to_one", *three)])
        four = ("--set", "train.max_steps=4")
        commands.append(["tp", *command(written["sft"], folder / "tp.to_one", "--resume", *four)])
    by_rank = launched(folder, commands, TORCHRUN)
    return folder, {Path(words[5]).name: [own[i] for own in by_rank] for i, words in enumerate(commands)}


def check_alike(together: Together, stage: str) -> None:
    """Losses, the result's own weights; and each process had half of them."""
    folder, seen = together
    check_codes(together, f"{stage}.tp")
    assert_alike(folder / f"{stage}.one", folder / f"{stage}.tp")
    for own in seen[f"{stage}.tp"]:
        assert max(own["shares"][0], own["shares"][1] if stage == "full" else 0) < 0.52
    kept = "model" if stage == "full" else "adapter"
    whole, found = tensors(folder / f"{stage}.one" / kept), tensors(folder / f"{stage}.tp" / kept)
    assert {name: value.shape for name, value in whole.items()} == {name: v.shape for name, v in found.items()}
    for name, value in whole.items():
        assert (value - found[name]).abs().max() < 1e-4, name


@pytest.fixture(scope="module")
def daily(tmp_path_factory: pytest.TempPathFactory) -> Together:
    base = made(tmp_path_factory.mktemp("base"), LlamaForCausalLM, LlamaConfig)
    return trained(tmp_path_factory.mktemp("tp"), base, ("sft",), resumed=True)


def test_half_of_every_layer_is_one(daily: Together) -> None:
    check_alike(daily, "sft")


def test_the_number_of_processes_may_change(daily: Together) -> None:
    """Three steps by one and two more by two processes, and the other way round, are five steps of one."""
    folder, _ = daily
    check_codes(daily, "tp.from_one")
    check_codes(daily, "tp.to_one")
    done = ft(*command(folder / "sft.yaml", folder / "tp.to_one", "--resume", "--set", "train.max_steps=5"))
    assert done.returncode == 0, done.stderr
    whole = {row["step"]: row["loss"] for row in metrics(folder / "sft.one") if "loss" in row and row["step"] <= 5}
    for name in ("tp.from_one", "tp.to_one"):
        found = {row["step"]: row["loss"] for row in metrics(folder / name) if "loss" in row}
        assert found == pytest.approx(whole, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "config", "values"),
    [
        (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    ],
)
def test_every_stage_is_one(
    tmp_path_factory: pytest.TempPathFactory, model: type[Any], config: type[Any], values: dict[str, Any]
) -> None:
    base = made(tmp_path_factory.mktemp("base"), model, config, **values)
    stages = [stage for stage in SLOW if stage != "full" or config is LlamaConfig]
    together = trained(tmp_path_factory.mktemp("tp"), base, stages)
    for stage in stages:
        check_alike(together, stage)


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("llama", {"num_key_value_heads": 1}, "1 heads (num_key_value_heads) cannot be shared out evenly over 2"),
        ("llama", {"attention_dropout": 0.1}, "llama drops out (attention_dropout: 0.1)"),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "the checkpoint is quantized"),
        ("gpt2", {}, "transformers has no plan to share out the layers of gpt2"),
        ("mixtral", {"num_local_experts": 2}, "mixtral has not been found to learn the same"),
        ("chatglm", {}, "checkpoints in the original layout of chatglm are read whole"),
        ("qwen3", {"full": True}, "transformers sums the gradients of qwen3's norms wrongly"),
    ],
)
def test_a_network_that_cannot_be_cut_is_refused_by_name(kind: str, values: Any, said: str, tmp_path: Path) -> None:
    config = {"model_type": kind, "vocab_size": 64, **SIZES, **values}
    shown = "llama" if kind == "chatglm" else kind
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": shown}))
    network = skeleton(ModelConfig(name=str(tmp_path)), with_weights=False)
    if kind == "llama" and "quantization_config" not in values:
        tensor_parallel.check(network, config, "m", 1)
    with pytest.raises(UserError) as caught:
        tensor_parallel.check(network, config, "m", 2, full="full" in values)
    assert f"m: model.name: {said}" in str(caught.value)
