"""Rules and reward models: what they are given, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer

from finetune.data.prompts import Prompt
from finetune.data.types import Conversation
from finetune.errors import RunError, UserError
from finetune.evaluation.rewards import RewardModel, checked, load_rule, scored_reply
from finetune.models import hardware


def prompt(text: str, **columns: Any) -> Prompt:
    return Prompt([1], [{"role": "system", "content": "s"}, {"role": "user", "content": text}], None, columns)


def rule(folder: Path, text: str) -> str:
    path = folder / "r.py"
    path.write_text(text, encoding="utf-8")
    return f"{path}:f"


def test_rules_get_the_rows_columns(tmp_path: Path) -> None:
    spec = rule(
        tmp_path,
        "def f(prompts, completions, messages, answer, reference, **more):\n"
        "    assert 'other' not in more and 'bad name' not in more and more['n'] == [1, 2]\n"
        "    assert [len(m) for m in messages] == [2, 2]\n"
        "    return [p + a == c + (r or '') for p, c, a, r in zip(prompts, completions, answer, reference)]\n",
    )
    rows = [prompt("x", answer="1", reference=None, n=1, other=3), prompt("y", answer="2", reference="2", n=2)]
    rows[1].columns["bad name"] = rows[0].columns["bad name"] = 1
    assert load_rule(spec)(rows, ["x1", "z"]) == [1.0, 0.0]


def test_rules_may_ask_for_less(tmp_path: Path) -> None:
    spec = rule(tmp_path, "def f(completions):\n    return [len(c) for c in completions]\n")
    with pytest.raises(RunError, match="unexpected keyword argument 'prompts'"):
        load_rule(spec)([prompt("x")], ["ab"])
    spec = rule(tmp_path, "def f(prompts, completions):\n    return [len(c) for c in completions]\n")
    assert load_rule(spec)([prompt("x", n=1)], ["ab"]) == [2.0]


def test_rules_may_hold_dataclasses_and_tensors(tmp_path: Path) -> None:
    text = (
        "from __future__ import annotations\nimport torch\nfrom dataclasses import dataclass, field\n"
        "@dataclass\nclass A:\n    x: int = field(default=2)\n"
        "def f(prompts, completions, **_):\n    return torch.full((len(completions),), A().x)\n"
    )
    assert load_rule(rule(tmp_path, text))([prompt("x")], ["ab"]) == [2.0]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (None, "no such file"),
        ("def g(prompts, completions):\n    return []\n", "has no function f"),
        ("import nothing_like_this\ndef f(prompts, completions):\n    return []\n", "cannot be imported"),
        ("def f(:\n", "is no Python"),
        ("f = 3\n", "has no function f"),
    ],
)
def test_unusable_files(tmp_path: Path, text: str | None, what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        load_rule(f"{tmp_path / 'absent.py'}:f" if text is None else rule(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("spec", ["rule.py", "", ":f", "rule.py:not a name"])
def test_not_a_rule(spec: str) -> None:
    with pytest.raises(UserError, match=r"file\.py:function"):
        load_rule(spec)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("return [1.0]", "1 score for 2 replies"),
        ("return None", "a list of numbers is wanted"),
        ("return ['a', 'b']", "a list of numbers is wanted"),
        ("return [1.0, float('nan')]", "reply 2 of 2 the score nan"),
        ("return [float('inf'), 0]", "reply 1 of 2 the score inf"),
        ("raise KeyError('x')", "failed: KeyError"),
    ],
)
def test_unusable_scores(tmp_path: Path, body: str, what: str) -> None:
    spec = rule(tmp_path, f"def f(prompts, completions, **_):\n    {body}\n")
    with pytest.raises(RunError, match=what):
        load_rule(spec)([prompt("x"), prompt("y")], ["a", "b"])


def test_checked() -> None:
    assert checked(iter([1, True, torch.tensor(0.5)]), 3, "x") == [1.0, 1.0, 0.5]


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A sequence-classification checkpoint whose config knows no padding."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, bos_token_id=None, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def test_stock_reward_models(stock: Path) -> None:
    """Several rows at once score as each alone, up to the end of the turn."""
    reward_model = RewardModel.load(str(stock), torch.float32, hardware.detect())
    rows, replies = [prompt("x"), prompt("a longer one")], ["yes", "no, not at all"]
    alone = [reward_model.score([p], [r])[0] for p, r in zip(rows, replies, strict=True)]
    assert reward_model.score(rows, replies) == pytest.approx(alone, abs=1e-5)
    asked = Conversation([*rows[0].messages, {"role": "assistant", "content": "yes"}])
    ids = scored_reply(reward_model.encoder, asked)
    assert reward_model.encoder.tokenizer.decode(ids).endswith("<|im_start|>assistant\nyes<|im_end|>")
    assert torch.isfinite(torch.tensor(reward_model.score(rows[:1], [""]))).all(), "an empty reply has a score, too"


def test_encoders_read_prompt_and_reply_as_two_texts(encoder: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    reward_model = RewardModel.load(str(encoder), torch.float32, hardware.detect())
    rows, replies = [prompt("a b"), prompt("a longer one " * 30)], ["no", "it is so"]
    model = AutoModelForSequenceClassification.from_pretrained(encoder).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    with torch.no_grad():
        alone = [
            model(**tokenizer(f"s\n{p.text}", r, truncation=True, max_length=47, return_tensors="pt")).logits.item()
            for p, r in zip(rows, replies, strict=True)
        ]
    assert reward_model.score(rows, replies) == pytest.approx(alone, abs=1e-5)
    assert reward_model.score(rows[:1], ["yes"]) != pytest.approx(alone[:1], abs=1e-3)


def test_more_than_one_output(stock: Path) -> None:
    import json

    config = json.loads((stock / "config.json").read_text())
    config["id2label"] = {"0": "a", "1": "b"}
    config.pop("num_labels", None)
    (stock / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has 2 outputs"):
        RewardModel.load(str(stock), torch.float32, hardware.detect())
