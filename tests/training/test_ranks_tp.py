"""Two processes that hold half of every layer train as one does: real ones, on CPUs over gloo, each with all rows."""

from __future__ import annotations

import json
import re
import shutil
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

PACKAGE = Path(tensor_parallel.__file__).parents[1]
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


def run(folder: Path, commands: Sequence[Sequence[str]]) -> Together:
    """What two processes see of these."""
    by_rank = launched(folder, [["tp", *words] for words in commands], TORCHRUN)
    return folder, {Path(words[4]).name: [own[i] for own in by_rank] for i, words in enumerate(commands)}


def alone(*words: str) -> None:
    done = ft(*words)
    assert done.returncode == 0, (words, done.stderr)


def check_alike(together: Together, one: str, name: str) -> None:
    """Losses, the result's own weights; and each process had half of them."""
    folder, seen = together
    check_codes(together, name)
    full = (folder / one / "model").is_dir()
    assert_alike(folder / one, folder / name, norms=1e-3)  # that reach 4.4, after 16 steps
    for own in seen[name]:
        frozen, trained = own["shares"]
        assert (trained if full else frozen) < 0.52
    kept = "model" if full else "adapter"
    whole, found = tensors(folder / one / kept), tensors(folder / name / kept)
    assert {name: value.shape for name, value in whole.items()} == {name: v.shape for name, v in found.items()}
    for key, value in whole.items():  # AdamW steps by 0.01, also where a gradient is next to nothing
        assert (value - found[key]).abs().mean() < 1e-4, key


def steps(number: int) -> tuple[str, str]:
    return "--set", f"train.max_steps={number}"


@pytest.fixture(scope="module")
def daily(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Three steps of one process and of two, and a fourth of two after three of one."""
    base, folder = made(tmp_path_factory.mktemp("base"), LlamaForCausalLM, LlamaConfig), tmp_path_factory.mktemp("tp")
    recipe = recipes(folder, base)["sft"]
    alone(*command(recipe, folder / "one", *steps(3)))
    shutil.copytree(folder / "one", folder / "from_one")
    further = command(recipe, folder / "from_one", "--resume", *steps(4))
    return run(folder, [command(recipe, folder / "two", *steps(3)), further])


def test_half_of_every_layer_is_one(daily: Together) -> None:
    check_alike(daily, "one", "two")


def test_the_number_of_processes_may_change(daily: Together) -> None:
    """Three steps by one and another by two processes, and the other way round, are four steps of one."""
    folder, _ = daily
    check_codes(daily, "from_one")
    for name in ("one", "two"):
        shutil.copytree(folder / name, folder / f"{name}.further")
        alone(*command(folder / "sft.yaml", folder / f"{name}.further", "--resume", *steps(4)))
    whole = {row["step"]: row["loss"] for row in metrics(folder / "one.further") if "loss" in row}
    assert [*whole] == [1, 2, 3, 4]
    for name in ("from_one", "two.further"):
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
    folder = tmp_path_factory.mktemp("tp")
    written = recipes(folder, base)
    for stage in stages:
        alone(*command(written[stage], folder / f"{stage}.one"))
    together = run(folder, [command(written[stage], folder / f"{stage}.tp") for stage in stages])
    for stage in stages:
        check_alike(together, f"{stage}.one", f"{stage}.tp")


@pytest.mark.slow
def test_two_go_on_from_two(tmp_path_factory: pytest.TempPathFactory) -> None:
    """And from an adapter of another run."""
    base, folder = made(tmp_path_factory.mktemp("base"), LlamaForCausalLM, LlamaConfig), tmp_path_factory.mktemp("tp")
    written = recipes(folder, base)
    alone(*command(written["sft"], folder / "whole", *steps(4)))
    more = ("--set", f"model.adapter={folder / 'whole' / 'adapter'}")
    alone(*command(written["dpo"], folder / "dpo.one", *more))
    together = run(
        folder,
        [
            command(written["sft"], folder / "two", *steps(3)),
            command(written["sft"], folder / "two", "--resume", *steps(4)),
            command(written["dpo"], folder / "dpo.tp", *more),
        ],
    )
    check_alike(together, "whole", "two")
    check_alike(together, "dpo.one", "dpo.tp")


def test_nobody_computes_a_pass_alone() -> None:
    """What is tried on the model is tried by all (`ranks.of_all`): with a part of every layer, the first would wait for
    ever."""
    asked = re.compile(r"from_first\(lambda: [\w.]+\(.*\bmodel\b")
    lines = [line for file in PACKAGE.rglob("*.py") for line in file.read_text("utf-8").splitlines()]
    assert [line for line in lines if asked.search(line)] == []
    assert asked.search("x = ranks.from_first(lambda: draws(self.model))")


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        ("llama", {"num_key_value_heads": 1}, "num_key_value_heads of 1 cannot be shared out evenly over 2"),
        ("llama", {"attention_dropout": 0.1}, "llama has dropout (attention_dropout: 0.1)"),
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
    if "num_key_value_heads" in values:
        tensor_parallel.check(network, config, "m", 1)
    with pytest.raises(UserError) as caught:
        tensor_parallel.check(network, config, "m", 2, full="full" in values)
    assert f"m: model.name: {said}" in str(caught.value)
