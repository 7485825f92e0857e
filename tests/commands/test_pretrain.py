"""ft pretrain: a model from a config, and any model continued on raw text."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.commands import pretrain
from finetune.errors import UserError
from finetune.recipe.file import load
from finetune.recipe.stages import PretrainRecipe

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 64, "tie_word_embeddings": True, "initializer_range": 0.05,
}  # fmt: skip


def write(path, **sections):
    recipe = {"version": 1, "stage": "pretrain", "output": {"dir": str(path.parent / "run")}, **sections}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A new model after 60 steps on the built-in world."""
    folder = tmp_path_factory.mktemp("new")
    recipe = write(
        folder / "recipe.yaml",
        model={"name": "new", "tokenizer": "builtin:world", "config": CONFIG},
        data={"train": "builtin:world", "max_length": 64, "eval_split": 8},
        train={
            "optim": "muon", "learning_rate": 0.02, "muon_adamw_learning_rate": 0.01, "max_steps": 60,
            "logging_steps": 10, "effective_batch_size": 8, "eval_steps": 30, "save_steps": 30, "warmup_steps": 5,
        },
    )  # fmt: skip
    pretrain.run(load(recipe, PretrainRecipe))
    return folder / "run"


def test_a_new_model_learns_and_is_a_plain_model(base):
    rows = [json.loads(line) for line in (base / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0] - 1.5
    assert [row["num_tokens"] for row in rows if "loss" in row][-1] == 60 * 8 * 64
    assert json.loads((base / "result.json").read_text())["eval"]["loss"] < losses[0] - 1.5
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base / "model"),
        AutoTokenizer.from_pretrained(base / "model"),
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer) == model.config.vocab_size


def test_tokens_that_never_occurred_can_be_told_apart(base):
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    table = AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32).get_input_embeddings().weight
    a, b = (table[tokenizer.convert_tokens_to_ids(t)] for t in ("<|im_start|>", "<|im_end|>"))
    assert torch.cosine_similarity(a, b, dim=0).abs() < 0.5


# peft 0.21 asks transformers 5.23 by a deprecated name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_any_model_is_continued_on_raw_text(base, tmp_path, method):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"The kettle number {i} is blue and late."}) + "\n" for i in range(300))
    )
    recipe = write(
        tmp_path / "recipe.yaml",
        model={"name": str(base / "model")},
        data={"train": str(text), "max_length": 48, "eval_split": 0.1},
        adapter={"method": method},
        train={"learning_rate": 0.005, "num_train_epochs": 2.0, "effective_batch_size": 4, "logging_steps": 5},
    )
    pretrain.run(load(recipe, PretrainRecipe))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result["eval"]["loss"] < rows[0]["loss"] - 0.5
    assert (tmp_path / "run" / ("model" if method == "full" else "adapter")).is_dir()


def test_what_cannot_work_is_said_before_anything_is_written(tmp_path):
    new = {"name": "new", "config": CONFIG}
    for model, data, message in (
        ({**new, "tokenizer": "builtin:world"}, {"train": "builtin:world"}, "endless"),
        (new, {"train": "builtin:world"}, "model.tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain.run(load(write(tmp_path / "recipe.yaml", model=model, data=data), PretrainRecipe))
    assert not (tmp_path / "run").exists()
