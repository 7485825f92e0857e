"""Ten jobs of a new user, by README and docs alone: own files, another folder, the very commands.

Rows are made here, in the formats people have. A job fails where a command refuses, or leaves out what one needs next.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, ft, write_rows

SMALL = ("--set", "train.max_steps=2", "--set", "train.effective_batch_size=4")
TEMPLATES = {
    "llama": (
        "{{ bos_token }}{% for m in messages %}{{ '### ' + m['role'] + ': ' + m['content'] }}"
        "{{ eos_token if m['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
    ),
    "qwen3": CHATML,
    "gemma3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}"
        "{{ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
}
SPECIALS = {
    "llama": ["<s>", "</s>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gemma3": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
}
NAMED = {
    "llama": {"bos_token": "<s>", "eos_token": "</s>"},
    "qwen3": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "gemma3": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder of the user's own, with a space in its name and nothing of the project in it."""
    place = tmp_path / "my work"
    place.mkdir()
    return place


def done(desk: Path, *words: Any, stdin: str | None = None) -> str:
    """A command that must not refuse; all it said."""
    run = ft(*words, cwd=desk, stdin=stdin)
    assert run.returncode == 0, f"ft {' '.join(map(str, words))}\n{run.stdout}{run.stderr}"
    assert "bug" not in run.stderr
    return run.stdout + run.stderr


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "result.json").read_text("utf-8"))
    assert found["steps"] == 2
    return found


def questions(count: int) -> list[tuple[str, str]]:
    return [(f"{n} 加 {n % 7} 等于多少？", f"{n} 加 {n % 7} 等于 {n + n % 7}。") for n in range(count)]


def test_chinese_alpaca(desk: Path) -> None:
    """Check, look, train, evaluate, talk, merge: each one command, with the recipe that `ft recipes new` wrote."""
    rows = [{"instruction": ask, "input": "", "output": said} for ask, said in questions(12)]
    write_json(desk / "我的数据.json", rows)
    write_json(desk / "test.json", rows[:2])
    assert "12 rows, 12 usable" in done(desk, "data", "check", "--data", "我的数据.json")
    done(desk, "recipes", "new", "mine.yaml", "--data", "我的数据.json")
    said = done(desk, "sft", "mine.yaml", *SMALL)
    assert "ft eval runs/mine" in said
    assert "held-out loss" in said, "the recipe holds rows out"
    assert result(desk / "runs" / "mine")["data"]["used"] == 12
    assert "exact match" in done(desk, "eval", "runs/mine", "--data", "test.json")
    assert done(desk, "chat", "--adapter", "runs/mine", "--max-new-tokens", "4", stdin="你好\n") is not None
    assert "proven" in done(desk, "merge", "runs/mine", "--output", "merged model")
    assert (desk / "merged model" / "model.safetensors").is_file()


def test_sharegpt_with_tools(desk: Path) -> None:
    """Calls are trained, what the tools return is not."""
    tools = [{"name": "price", "description": "商品的价格", "parameters": {"type": "object", "properties": {}}}]
    rows = [
        {
            "conversations": [
                {"from": "human", "value": f"商品 {n} 多少钱？"},
                {"from": "function_call", "value": json.dumps({"name": "price", "arguments": {"id": n}})},
                {"from": "observation", "value": json.dumps({"yuan": n * 3})},
                {"from": "gpt", "value": f"{n * 3} 元。"},
            ],
            "tools": json.dumps(tools, ensure_ascii=False),
        }
        for n in range(8)
    ]
    write_json(desk / "tools.json", rows)
    done(desk, "recipes", "new", "tools.yaml", "--data", "tools.json")
    shown = json.loads(ft("data", "preview", "--recipe", "tools.yaml", "--limit", "1", "--json", "-", cwd=desk).stdout)
    (sample,) = shown["samples"]
    trained = "".join(text for text, label in zip(sample["tokens"], sample["labels"], strict=True) if label != -100)
    assert '"price"' in trained
    assert "0 元。" in trained
    assert "yuan" not in trained
    done(desk, "sft", "tools.yaml", *SMALL)
    assert result(desk / "runs" / "tools")["data"]["used"] == 8


def test_gsm8k(desk: Path) -> None:
    """Question and answer, as the set is published; the answer with its #### is trained as it stands."""
    rows = [
        {"question": f"Ann has {n} pens and buys 3. How many?", "answer": f"<<{n}+3={n + 3}>>{n + 3}\n#### {n + 3}"}
        for n in range(12)
    ]
    write_rows(desk / "gsm.jsonl", rows[:10])
    write_rows(desk / "gsm_test.jsonl", rows[10:])
    told = ("--set", "data.train=gsm.jsonl", "--set", "eval.data=gsm_test.jsonl", "--output", "runs/gsm")
    said = done(desk, "sft", "quickstart.yaml", *told, *SMALL)
    assert "ft eval runs/gsm" in said
    assert "n=2" in done(desk, "eval", "runs/gsm")


def pairs(count: int) -> list[dict[str, Any]]:
    """As LLaMA-Factory's pairs: sharegpt turns, then one turn each."""
    return [
        {
            "conversations": [{"from": "human", "value": ask}],
            "chosen": {"from": "gpt", "value": said},
            "rejected": {"from": "gpt", "value": "不知道。"},
        }
        for ask, said in questions(count)
    ]


def test_dpo(desk: Path) -> None:
    write_json(desk / "dpo.json", pairs(8))
    told = ("--set", "model.name=tiny-llama", "--set", "data.train=dpo.json", "--set", "eval.data=null")
    said = done(desk, "dpo", "dpo_llama.yaml", *told, *SMALL, "--output", "runs/dpo zh")
    assert "'runs/dpo zh'" in said, "what it says to run next can be pasted"
    assert result(desk / "runs" / "dpo zh")["data"]["used"] == 8


def test_reward_model_and_ppo_with_a_rule(desk: Path) -> None:
    """A reward model from pairs, judged on pairs; then PPO with that model and a rule file, and with the rule alone."""
    write_json(desk / "pairs.json", pairs(8))
    tiny = ("--set", "model.name=tiny-llama", "--set", "data.train=pairs.json")
    done(desk, "reward", "reward_llama.yaml", *tiny, "--set", "eval.data=null", *SMALL, "--output", "runs/reward")
    assert "preference accuracy" in done(desk, "eval", "runs/reward", "--data", "pairs.json")
    rule = "def short(prompts, completions, **columns):\n    return [-float(len(text)) for text in completions]\n"
    (desk / "rules.py").write_text(rule, encoding="utf-8")
    little = ("--set", "ppo.max_new_tokens=4", "--set", "ppo.num_mini_batches=1", "--set", "eval.data=null")
    by_rule = ("--set", "reward.train=null", "--set", "reward.functions=[rules.py:short]", "--output", "runs/ppo")
    done(desk, "ppo", "ppo_llama.yaml", *tiny, *by_rule, *little, *SMALL)
    assert result(desk / "runs" / "ppo")["status"] == "done"


def test_chatglm3_in_int4_there_and_back(desk: Path) -> None:
    """Trained in int4, merged in ChatGLM's own layout, and that folder is a model like any other."""
    tiny = ("--set", "model.name=tiny-chatglm3", "--set", "data.max_samples=8")
    done(desk, "sft", "lora_chatglm3.yaml", *tiny, *SMALL, "--output", "runs/glm")
    done(desk, "merge", "runs/glm", "--output", "merged glm", "--format", "chatglm")
    config = json.loads((desk / "merged glm" / "config.json").read_text("utf-8"))
    assert config["model_type"] == "chatglm"
    assert "padded_vocab_size" in config
    rows = [{"instruction": ask, "output": said} for ask, said in questions(2)]
    write_json(desk / "test.json", rows)
    before, after = (
        json.loads(ft("eval", *of, "--data", "test.json", "--json", "-", cwd=desk).stdout)["runs"][0]["metrics"]
        for of in (["runs/glm"], ["--model", "merged glm"])
    )
    assert after["loss"] == pytest.approx(before["loss"], rel=0.1), "int4 rounds, and nothing else differs"


def test_going_on_from_an_adapter(desk: Path) -> None:
    """A second round of SFT, and DPO, both from the first run."""
    write_json(desk / "rows.json", [{"instruction": ask, "output": said} for ask, said in questions(8)])
    write_json(desk / "pairs.json", pairs(8))
    done(desk, "recipes", "new", "mine.yaml", "--data", "rows.json")
    done(desk, "sft", "mine.yaml", *SMALL)
    on = ("--set", "model.adapter=runs/mine")
    done(desk, "sft", "mine.yaml", *on, *SMALL, "--output", "runs/second round")
    done(desk, "recipes", "new", "pairs.yaml", "--data", "pairs.json")
    done(desk, "dpo", "pairs.yaml", *on, *SMALL, "--set", "train.logging_steps=1")
    lines = (desk / "runs" / "pairs" / "metrics.jsonl").read_text("utf-8").splitlines()
    first = next(line for line in map(json.loads, lines) if "rewards/margins" in line)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-3), "the reference is that run"


@pytest.mark.parametrize("method", ["bitfit", "prefix_tuning"])
def test_another_method_by_one_flag(desk: Path, method: str) -> None:
    """A recipe of LoRA with the keys of LoRA, and one flag."""
    little = ("--set", "data.max_samples=8", "--set", "model.name=tiny-llama")
    said = done(desk, "sft", "lora_llama.yaml", "--set", f"adapter.method={method}", *little, *SMALL, "-o", "runs/it")
    assert "loraplus_lr_ratio" in said, "what was left out is named"
    adapter = json.loads((desk / "runs" / "it" / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert adapter["peft_type"] == {"bitfit": "BITFIT", "prefix_tuning": "PREFIX_TUNING"}[method]


def test_folder_of_texts(desk: Path) -> None:
    """Continued pre-training on a folder of .txt, and the loss on another text."""
    texts = desk / "my texts"
    texts.mkdir()
    for part in range(3):
        (texts / f"part {part}.txt").write_text("\n".join(ask for ask, _ in questions(12)[part::3]), encoding="utf-8")
    (desk / "other.txt").write_text("一加一等于二。\n", encoding="utf-8")
    done(desk, "recipes", "new", "texts.yaml", "--data", "my texts")
    done(desk, "pretrain", "texts.yaml", "--set", "train.max_steps=2", "--set", "data.max_length=32")
    assert "perplexity" in done(desk, "eval", "runs/texts", "--data", "other.txt")


def own_model(folder: Path, family: str, template: bool) -> None:
    """A random model and a tokenizer trained on a few lines, as a user makes them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

    letters = Tokenizer(models.BPE())
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS[family], initial_alphabet=alphabet, show_progress=False
    )
    letters.train_from_iterator([said for _, said in questions(20)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, **NAMED[family])
    if template:
        tokenizer.chat_template = TEMPLATES[family]
    torch.manual_seed(0)
    made = {"llama": LlamaConfig, "qwen3": Qwen3Config, "gemma3": Gemma3TextConfig}[family]
    config = made(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("llama", True),
        ("qwen3", True),
        ("gemma3", True),
        pytest.param("llama", False, marks=pytest.mark.slow),
        pytest.param("qwen3", False, marks=pytest.mark.slow),
        ("gemma3", False),
    ],
)
def test_own_model(desk: Path, family: str, template: bool) -> None:
    """A folder made with transformers trains and merges; without a chat template it says which one it uses."""
    own_model(desk / "own model", family, template)
    write_json(desk / "rows.json", [{"instruction": ask, "output": said} for ask, said in questions(8)])
    done(desk, "recipes", "new", "own.yaml", "--data", "rows.json", "--model", "own model")
    said = done(desk, "sft", "own.yaml", *SMALL, "--set", "data.max_length=256")
    assert ("the tokenizer has none" in said) == (not template), said
    if template:
        assert "proven" in done(desk, "merge", "runs/own", "--output", "merged model")
