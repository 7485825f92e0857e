"""`model.rope_scaling`: what it computes, what it refuses, and a passkey far past the trained length."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import families_tiny as tiny
import pytest
import torch
from chatglm_reference import original_config, random_state, reference_logits, write_checkpoint
from conftest import ft, train, write_rows
from pydantic import ValidationError

from finetune.errors import UserError
from finetune.models import loading, tokenizers
from finetune.models.config import read_config
from finetune.recipe.sections import ModelConfig, RopeScaling

ROTARY = ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3", "falcon", "glm", "glm4", "mixtral"]


def load(folder: Path | str, **scaling: Any) -> Any:
    model = ModelConfig(name=str(folder), sanity_check=False, rope_scaling=RopeScaling(**scaling) if scaling else None)
    return loading.load_model(model, torch.float32)


@torch.inference_mode()
def logits(model: Any, ids: list[int], positions: list[int] | None = None) -> torch.Tensor:
    where = None if positions is None else torch.tensor([positions])
    return model(input_ids=torch.tensor([ids]), position_ids=where).logits[0]


@pytest.mark.parametrize("name", ROTARY)
def test_linear_divides_positions(tmp_path: Path, name: str) -> None:
    folder = tiny.write(tmp_path / name, name)
    ids = list(range(5, 45))
    plain, scaled = load(folder), load(folder, rope_type="linear", factor=4.0)
    stretched = [4 * i for i in range(len(ids))]
    assert (logits(scaled, ids, stretched) - logits(plain, ids)).abs().max() < 1e-4
    assert (logits(scaled, ids) - logits(plain, ids)).abs().max() > 1e-3
    assert scaled.config.max_position_embeddings == 4 * 512


@pytest.mark.parametrize("name", ["llama", "glm"])
def test_dynamic_leaves_short_texts_alone(tmp_path: Path, name: str) -> None:
    folder = tiny.write(tmp_path / name, name)
    plain = load(folder)
    scaled = load(folder, rope_type="dynamic", factor=4.0, original_max_position_embeddings=32)
    short, long = list(range(5, 35)), list(range(5, 85))
    assert torch.equal(logits(scaled, short), logits(plain, short))
    assert (logits(scaled, long) - logits(plain, long)).abs().max() > 1e-3
    assert torch.equal(logits(scaled, short), logits(plain, short))  # and again after a long one


@pytest.mark.parametrize("name", ["llama", "qwen2", "glm"])
def test_yarn_keeps_fast_frequencies_and_divides_slow_ones(tmp_path: Path, name: str) -> None:
    folder = tiny.write(tmp_path / name, name, head_dim=32)
    plain = load(folder).model.rotary_emb
    scaled = load(folder, rope_type="yarn", factor=4.0).model.rotary_emb
    ratio = plain.inv_freq / scaled.inv_freq
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(4.0)
    assert (ratio.diff() >= -1e-6).all()
    assert scaled.attention_scaling == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1)
    own = load(folder, rope_type="yarn", factor=4.0, attention_factor=1.0).model.rotary_emb
    assert own.attention_scaling == 1.0


def test_a_scaled_model_says_so_in_its_config(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "qwen2", "qwen2")
    scaled = load(folder, rope_type="yarn", factor=2.0)
    scaled.save_pretrained(tmp_path / "saved")
    ids = list(range(5, 65))
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again, ids), logits(scaled, ids))
    assert again.config.max_position_embeddings == 1024
    # The same key once more changes nothing, another one is refused.
    assert torch.equal(logits(load(tmp_path / "saved", rope_type="yarn", factor=2.0), ids), logits(scaled, ids))
    with pytest.raises(UserError, match="already scaled"):
        load(tmp_path / "saved", rope_type="linear", factor=2.0)
    assert torch.equal(logits(load(tmp_path / "saved", rope_type="default"), ids), logits(load(folder), ids))


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
def test_without_rotary_positions(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="has no rotary positions"):
        load(tiny.write(tmp_path / name, name), rope_type="linear", factor=2.0)


def test_what_cannot_be_scaled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"already scaled \(llama3, factor 8.0\)"):
        load(tiny.write(tmp_path / "llama3", "llama3-gqa-tied"), rope_type="yarn", factor=2.0)
    with pytest.raises(UserError, match="several rotary embeddings"):
        load(tiny.write(tmp_path / "gemma3", "gemma3_text"), rope_type="linear", factor=2.0)
    with pytest.raises(UserError, match=r"rope_scaling\.factor: missing"):
        load(tiny.write(tmp_path / "llama", "llama"), rope_type="linear")


def test_the_key_in_a_recipe() -> None:
    assert RopeScaling.model_validate({"type": "linear", "factor": 2}).rope_type == "linear"
    for wrong in ({"rope_type": "yarn"}, {"rope_type": "ntk", "factor": 2.0}, {"rope_type": "linear", "factor": 0.5}):
        with pytest.raises(ValidationError):
            RopeScaling.model_validate(wrong)


# --- ChatGLM's rope_ratio, whose meaning config.json does not say ---


@pytest.fixture
def ambiguous(tmp_path: Path) -> Path:
    config = original_config(rope_ratio=8, padded_vocab_size=64, _name_or_path="mine")
    return write_checkpoint(tmp_path / "checkpoint", config, random_state(config, 0))


def test_an_ambiguous_rope_ratio_asks(ambiguous: Path) -> None:
    with pytest.raises(UserError, match=r"set model\.rope_scaling to"):
        read_config(ModelConfig(name=str(ambiguous)))


@pytest.mark.parametrize(("kind", "theta", "factor"), [("default", 80000.0, None), ("linear", 10000.0, 8.0)])
@pytest.mark.parametrize("with_factor", [False, True])
def test_and_is_settled_by_the_key(
    ambiguous: Path, kind: str, theta: float, factor: float | None, with_factor: bool
) -> None:
    scaling = {"rope_type": kind, **({"factor": 8.0} if with_factor else {})}
    model = load(ambiguous, **scaling)
    assert model.config.rope_parameters["rope_theta"] == theta
    assert model.config.rope_parameters.get("factor") == factor
    ids = list(range(5, 35))
    config = read_config(ModelConfig(name=str(ambiguous), rope_scaling=RopeScaling(**scaling)))
    state = random_state(config, 0)
    expected = reference_logits(config, state, torch.tensor([ids]), interpolate=kind == "linear")
    assert (logits(model, ids) - expected[0]).abs().max() < 1e-3


def test_chatglm_is_stretched_like_any_other(tmp_path: Path) -> None:
    config = original_config(padded_vocab_size=64)
    folder = write_checkpoint(tmp_path / "chatglm3", config, random_state(config, 0))
    scaled = load(folder, rope_type="yarn", factor=4.0)
    assert scaled.config.rope_parameters["rope_type"] == "yarn"
    assert scaled.config.rope_parameters["partial_rotary_factor"] == 0.5
    assert scaled.config.max_position_embeddings == 4 * config["seq_length"]


# --- a passkey ---

FILLER = (
    "Nobody has told me what the reason is.", "We are sorry.", "Please reply soon.", "This is not the first time.",
    "I want a refund.", "The phone case has not arrived yet.", "请尽快处理。", "谢谢。",
)  # fmt: skip
TRAINED = 192  # tokens per row in pre-training
SCALINGS: dict[str, tuple[dict[str, Any], int]] = {
    # name: (scaling, tokens up to the question)
    "yarn": ({"rope_type": "yarn", "factor": 4.0}, 3 * TRAINED),
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, 400),
}


def passkey(tokenizer: Any, rng: random.Random, length: int) -> tuple[list[int], list[int]]:
    """(text with a code in its first quarter and, at its end, the question for it; the code)."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    code = rng.choice("ABCDEFGHKLMNPQRSTUVWXYZ") + "".join(rng.choices("0123456789", k=4))
    said, asked, answer = ids(f"The order is {code}.\n"), ids("The order is"), ids(f" {code}")
    text: list[int] = []
    while len(text) < length:
        text += ids(rng.choice(FILLER) + "\n")
    text = text[: length - len(said) - len(asked) - len(answer)]
    at = int(rng.random() * 0.25 * len(text))
    return [tokenizer.bos_token_id, *text[:at], *said, *text[at:], *asked], answer


@torch.inference_mode()
def found(model: Any, tokenizer: Any, length: int, n: int = 20) -> float:
    """Share of passkeys whose every token is the likeliest."""
    rng, right = random.Random(0), 0
    for _ in range(n):
        prompt, answer = passkey(tokenizer, rng, length)
        likeliest = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        right += likeliest.tolist() == answer
    return right / n


@pytest.mark.parametrize("name", SCALINGS)
def test_a_passkey_past_the_trained_length(name: str) -> None:
    """Without any fine-tuning; linear scaling needs some and is in the slow tests."""
    scaling, length = SCALINGS[name]
    tokenizer = tokenizers.load_tokenizer(ModelConfig(name="tiny-llama"))
    scaled = load("tiny-llama", **scaling, original_max_position_embeddings=TRAINED)
    plain = load("tiny-llama")
    assert found(plain, tokenizer, 100) > 0.8  # it can do it at all
    assert found(plain, tokenizer, length) <= 0.2
    assert found(scaled, tokenizer, length) >= 0.8


# --- samples longer than the base was made for ---


def test_a_long_sample_is_named_before_training(
    recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {"messages": [{"role": "user", "content": "x " * 300}, {"role": "assistant", "content": "y"}]}
    rows = write_rows(tmp_path / "long.jsonl", [long] * 4)
    keys = {"data": {"train": str(rows), "max_length": 1024}, "train": {"max_steps": 1, "effective_batch_size": 1}}
    train(recipe(**keys))
    assert "was made for 512: set model.rope_scaling: {rope_type: yarn, factor: 2}" in flat(capsys)
    train(
        recipe(
            **keys, model={"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, output={"dir": str(tmp_path / "2")}
        )
    )
    assert "was made for" not in flat(capsys)
    gpt2 = tiny.write(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UserError, match=r"this model has 512 positions → set data\.max_length: 512"):
        train(recipe(**keys, model={"name": str(gpt2)}, output={"dir": str(tmp_path / "3")}))


@pytest.mark.parametrize("stage", ["dpo", "kto", "reward", "ppo"])
def test_a_long_pair_is_named_too(stage: str, tmp_path: Path) -> None:
    """A model with a table of positions cannot take it at all; PPO counts the reply that is yet to be written."""
    words = 300 if stage != "ppo" else 200
    row: dict[str, Any] = {"prompt": "x " * words, "chosen": "y", "rejected": "z"}
    if stage == "kto":
        row = {"prompt": row["prompt"], "completion": "y", "label": True}
    rows = write_rows(tmp_path / "long.jsonl", [row, *([{**row, "label": False}] if stage == "kto" else [row])])
    more = {"ppo": {"max_new_tokens": 500, "num_mini_batches": 1}, "reward": {"functions": ["rule.py:length"]}}
    values = {
        "version": 1, "stage": stage, "model": {"name": str(tiny.write(tmp_path / "gpt2", "gpt2"))},
        "data": {"train": str(rows), "max_length": 1024}, "adapter": {"method": "lora"},
        "output": {"dir": str(tmp_path / "run")}, **(more if stage == "ppo" else {}),
    }  # fmt: skip
    (tmp_path / "rule.py").write_text(
        "def length(prompts, completions, **columns):\n    return [0.0 for _ in prompts]\n"
    )
    (tmp_path / "long.yaml").write_text(json.dumps(values), encoding="utf-8")
    done = ft(stage, "--recipe", "long.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "this model has 512 positions" in " ".join(done.stderr.split())


def flat(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_linear_scaling_wants_training(tmp_path: Path) -> None:
    """Last result: passkeys found at 100 tokens 0.00 before, 0.95 after 700 steps of 5 x 384 tokens; at 300 tokens 0.80
    (0.35 after 300 steps), where the unscaled base finds none."""
    recipe: dict[str, Any] = {
        "version": 1,
        "stage": "pretrain",
        "model": {
            "name": "tiny-llama",
            "rope_scaling": {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": TRAINED},
        },
        "data": {"train": "builtin:world", "max_length": 2 * TRAINED},
        "train": {
            "optim": "muon", "learning_rate": 0.008, "muon_adamw_learning_rate": 0.002, "adam_beta2": 0.95,
            "lr_scheduler_type": "warmup_stable_decay", "lr_min_ratio": 0.02, "max_grad_norm": 0.0, "warmup_steps": 10,
            "effective_batch_size": 5, "max_steps": 700, "logging_steps": 50,
        },
        "output": {"dir": str(tmp_path / "run")},
    }  # fmt: skip
    (tmp_path / "linear.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    done = ft("pretrain", "--recipe", tmp_path / "linear.yaml")
    assert done.returncode == 0, done.stderr
    tokenizer = tokenizers.load_tokenizer(ModelConfig(name="tiny-llama"))
    untrained = load("tiny-llama", **recipe["model"]["rope_scaling"])
    assert found(untrained, tokenizer, 100) <= 0.2
    trained = load(tmp_path / "run" / "model")
    assert found(trained, tokenizer, 100) >= 0.9
    assert found(trained, tokenizer, 300) >= 0.6
