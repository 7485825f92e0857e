"""Peak memory of tensors: `ft ppo` with policy, reference, reward and value on one base, against `ft sft` on that base.

python benchmarks/ppo_memory.py [--hidden 512] [--layers 8] [--rows 8]

Both train LoRA on the same random llama in float32, with as many rows of as many tokens per forward pass. Every storage
that a tensor operation reads or writes is counted from then until it is freed, so the figure does not depend on the
allocator, and weights, activations, optimizer states and the cache of generation are all in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.commands import ppo, reward, sft
from finetune.models import tokenizers
from finetune.recipe.file import load
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import PpoRecipe, RewardRecipe, SftRecipe

STAGES: dict[str, Any] = {"sft": (SftRecipe, sft), "reward": (RewardRecipe, reward), "ppo": (PpoRecipe, ppo)}
REPLY = 32  # tokens


class Peak(TorchDispatchMode):
    """Bytes of all storages seen and not yet freed, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in tree_iter((args, kwargs, result)):
            if isinstance(item, torch.Tensor):
                self.see(item.untyped_storage())
        return result

    def see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.now -= self.live.pop(key)


def peak_of(folder: Path, values: dict[str, Any]) -> int:
    kind, stage = STAGES[values["stage"]]
    path = folder / f"{values['stage']}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    recipe: Any = load(str(path), kind)
    gc.collect()
    with Peak() as memory:
        stage.run(recipe)
    return memory.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="rows of a forward pass")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # A vocabulary of real size: logits, and the buffer that trl computes them in, weigh what they weigh elsewhere.
        tokenizer = tokenizers.load_tokenizer(ModelConfig(name="tiny-llama"))
        config = LlamaConfig(
            vocab_size=32_768, hidden_size=args.hidden, intermediate_size=2 * args.hidden,
            num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64, max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        size = sum(p.numel() for p in model.parameters())
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        del model
        prompt, answer = "1 2 3 4 5 6 7 8 " * 6, "9 8 7 6 5 4 3 2 " * 2
        pairs = [{"prompt": prompt + str(i), "chosen": answer, "rejected": answer[2:]} for i in range(4 * args.rows)]
        rows = [{"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["chosen"]}]}
                for p in pairs]  # fmt: skip
        for file, data in (("pairs.jsonl", pairs), ("rows.jsonl", rows)):
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
        shared = {
            "version": 1,
            "model": {"name": str(folder / "base"), "dtype": "float32", "sanity_check": False},
            "adapter": {"method": "lora", "r": 16},
        }
        train = {"max_steps": 2, "effective_batch_size": args.rows, "per_device_train_batch_size": args.rows}
        data = {"train": str(folder / "pairs.jsonl"), "max_length": 512}

        def recipe(stage: str, **more: Any) -> dict[str, Any]:
            return {
                **shared,
                "stage": stage,
                "data": data,
                "train": train,
                "output": {"dir": str(folder / stage)},
                **more,
            }

        sft_peak = peak_of(folder, recipe("sft", data={**data, "train": str(folder / "rows.jsonl")}))
        peak_of(folder, recipe("reward"))
        ppo_peak = peak_of(folder, recipe(
            "ppo", reward={"model": str(folder / "reward")},
            ppo={"max_new_tokens": REPLY, "num_mini_batches": 2, "num_ppo_epochs": 1},
            train={**train, "effective_batch_size": 2 * args.rows}, eval={"batch_size": args.rows},
        ))  # fmt: skip
    weights = 4 * size
    print(
        f"\nllama of {size / 1e6:.1f}M parameters, float32: weights {weights / 2**20:.0f} MiB, {args.rows} rows a pass"
    )
    print(f"sft {sft_peak / 2**20:.0f} MiB   ppo {ppo_peak / 2**20:.0f} MiB   ratio {ppo_peak / sft_peak:.2f}")


if __name__ == "__main__":
    main()
