"""The same work for everyone: Llamas with random weights, ragged chats in English and Chinese, pairs, prompts.

    python benchmarks/peers/workload.py DIR

Deterministic. Needs torch, transformers and tokenizers.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

VOCABULARY = 6144
SMOLLM2 = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
           "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
           "tie_word_embeddings": True}  # fmt: skip
"""SmolLM2-135M's config.json; the weights are random."""
FEW = 12
"""Rows of a workload for it."""
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
         "num_key_value_heads": 6, "head_dim": 64, "max_position_embeddings": 2048}  # fmt: skip
THINGS = [("lantern", "灯笼"), ("bicycle", "自行车"), ("kettle", "水壶"), ("violin", "小提琴"), ("compass", "指南针")]
PLACES = [("Lanzhou", "兰州"), ("Porto", "波尔图"), ("Osaka", "大阪"), ("Quito", "基多"), ("Bergen", "卑尔根")]
# Without the newline that usually stands behind a turn: some train it, some do not, and the work would not be the same.
TEMPLATE = (
    "{%- for m in messages %}{%- if m['role']=='assistant' %}{{- '<|im_start|>assistant\n' }}{% generation %}"
    "{{- m['content'] + '<|im_end|>' }}{% endgeneration %}{%- else %}"
    "{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


class Writer:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def sentence(self, chinese: bool) -> str:
        thing, place, n = self.random.choice(THINGS), self.random.choice(PLACES), self.random.randint(2, 97)
        if chinese:
            return f"在{place[1]}，第{n}个{thing[1]}被修理好了，因为天气变了。"
        return f"In {place[0]} the {thing[0]} number {n} was repaired before the market opened. "

    def answer(self, chinese: bool) -> str:
        """Of one sentence to 40, few of them long."""
        count = min(40, max(1, int(self.random.lognormvariate(1.5, 1.0))))
        return "".join(self.sentence(chinese) for _ in range(count)).strip()

    def question(self, chinese: bool) -> str:
        thing, place = self.random.choice(THINGS), self.random.choice(PLACES)
        if chinese:
            return f"请写一段关于{place[1]}的{thing[1]}的文字。"
        return f"Write about the {thing[0]} market in {place[0]}."


def rows(seed: int, chats: int, pairs: int, prompts: int) -> dict[str, list[dict[str, Any]]]:
    """By file name, each in the shapes that the contestants read."""
    writer = Writer(seed)

    def turn() -> list[dict[str, str]]:
        chinese = writer.random.random() < 0.5
        asked, told = writer.question(chinese), writer.answer(chinese)
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]

    found: dict[str, list[dict[str, Any]]] = {"sft.jsonl": []}
    for _ in range(chats):
        turns = 1 if writer.random.random() < 0.8 else writer.random.randint(2, 4)
        found["sft.jsonl"].append({"messages": [message for _ in range(turns) for message in turn()]})
    made = []
    for _ in range(pairs):
        (question, chosen), rejected = turn(), turn()[1]
        made.append((question["content"], chosen["content"][:600], rejected["content"][:600]))
    found["dpo.jsonl"] = [
        {"prompt": [{"role": "user", "content": q}], "chosen": [{"role": "assistant", "content": c}],
         "rejected": [{"role": "assistant", "content": r}]} for q, c, r in made
    ]  # fmt: skip
    found["dpo_lf.jsonl"] = [{"instruction": q, "input": "", "chosen": c, "rejected": r} for q, c, r in made]
    found["dpo_swift.jsonl"] = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": c}], "rejected_response": r}
        for q, c, r in made
    ]
    found["ppo.jsonl"] = [{"messages": [{"role": "user", "content": turn()[0]["content"]}]} for _ in range(prompts)]
    return found


def tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False, max_token_length=8,
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], model_max_length=2048,
    )  # fmt: skip
    found.chat_template = TEMPLATE
    return found


def main() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    made = rows(42, chats=32, pairs=32, prompts=16)
    for name, listed in made.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in listed)
        (folder / name).write_text(text, encoding="utf-8")
    writer = Writer(7)
    words = ["".join(chr(writer.random.randint(97, 122)) for _ in range(4)) for _ in range(4000)]
    texts = [writer.answer(bool(i % 2)) for i in range(2000)]
    encoder = tokenizer([*texts, *(" ".join(writer.random.choices(words, k=12)) for _ in range(4000))])
    torch.manual_seed(0)
    ids = {"pad_token_id": encoder.pad_token_id, "eos_token_id": encoder.eos_token_id, "bos_token_id": None}
    shapes = {"base": {"vocab_size": VOCABULARY, "tie_word_embeddings": False, **SHAPE}, "base-135m": SMOLLM2}
    sizes = {}
    for name, shape in shapes.items():
        model = LlamaForCausalLM(LlamaConfig(dtype="float32", **ids, **shape)).float()
        for key, value in ids.items():
            setattr(model.generation_config, key, value)
        model.save_pretrained(folder / name)
        encoder.save_pretrained(folder / name)
        sizes[name] = sum(p.numel() for p in model.parameters())
    (folder / "few").mkdir(exist_ok=True)
    lines = (folder / "sft.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "few" / "sft.jsonl").write_text("".join(lines[:FEW]), encoding="utf-8")
    lengths = sorted(len(encoder.apply_chat_template(row["messages"])["input_ids"]) for row in made["sft.jsonl"])
    told = {
        "parameters": sizes["base"],
        "chats": len(lengths),
        "tokens": sum(lengths),
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
    }
    (folder / "workload.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
