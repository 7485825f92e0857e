"""What `ft plan` says of peak memory, against what training takes.

python benchmarks/memory.py [NAME …]

Each case is a random model (the shape of a published one where it is named after one) and two optimizer steps of real
training through ft, with rows of about one length. The peak is that of the bytes that torch's allocator has handed
out, as torch.profiler's memory events tell it, beside the weights that were there before: tensor bytes, not those of
the process. The plan is made of config.json and the recipe alone, before. `DEVELOPMENT` are the cases that planning
was written with; `HELD_OUT` were first run when it was done, and again since (docs/plan.md says what was found then).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import string
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback

from finetune.commands import dpo, kto, ppo, pretrain, reward, sft
from finetune.models import hardware
from finetune.planning import fits
from finetune.planning.memory import Estimate, estimate
from finetune.planning.network import Network, build
from finetune.planning.source import skeleton
from finetune.recipe.file import load
from finetune.recipe.resolve import resolve
from finetune.recipe.stages import RECIPES
from finetune.rl.ppo import Ppo

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from byte_tokenizer import make_tokenizer

COMMANDS: dict[str, Any] = {"sft": sft, "dpo": dpo, "kto": kto, "reward": reward, "ppo": ppo, "pretrain": pretrain}
RESULTS = Path(__file__).parent / "memory.json"
LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": True}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-102m": {**LLAMA, "hidden_size": 640, "num_hidden_layers": 12, "intermediate_size": 1792, "vocab_size": 32000,
                   "num_attention_heads": 10, "num_key_value_heads": 10, "tie_word_embeddings": False},
    "smollm2-135m": {**LLAMA, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
                     "vocab_size": 49152, "num_attention_heads": 9, "num_key_value_heads": 3},
    "deep-111m": {**LLAMA, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "vocab_size": 8000,
                  "num_attention_heads": 9, "num_key_value_heads": 3},
    "gpt2-124m": {"model_type": "gpt2", "vocab_size": 50257},
    "gemma3-270m": {"model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 18, "intermediate_size": 2048,
                    "vocab_size": 262144, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
                    "sliding_window": 512},
    "qwen2.5-0.5b": {"model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864,
                     "vocab_size": 151936, "num_attention_heads": 14, "num_key_value_heads": 2,
                     "tie_word_embeddings": True},
    "qwen3-moe-370m": {"model_type": "qwen3_moe", "hidden_size": 768, "num_hidden_layers": 10,
                       "intermediate_size": 2048, "moe_intermediate_size": 512, "num_experts": 16,
                       "num_experts_per_tok": 4, "vocab_size": 32000,
                       "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
                       "tie_word_embeddings": True},
    "llama3.2-1b": {**LLAMA, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
                    "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama3.2-3b": {**LLAMA, "hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192,
                    "vocab_size": 128256, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
    "pythia-160m": {"model_type": "gpt_neox", "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072,
                    "vocab_size": 50304, "num_attention_heads": 12},
    "mistral-330m": {"model_type": "mistral", "hidden_size": 1024, "num_hidden_layers": 20, "intermediate_size": 3584,
                     "vocab_size": 32000, "num_attention_heads": 16, "num_key_value_heads": 4, "sliding_window": 128},
    "qwen2.5-1.5b": {"model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960,
                     "vocab_size": 151936, "num_attention_heads": 12, "num_key_value_heads": 2,
                     "tie_word_embeddings": True},
    "glm-300m": {"model_type": "glm", "hidden_size": 1024, "num_hidden_layers": 16, "intermediate_size": 3072,
                 "vocab_size": 65024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128,
                 "pad_token_id": 0},
    "qwen3-0.6b": {"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072,
                   "vocab_size": 151936, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
                   "tie_word_embeddings": True},
}  # fmt: skip
# (shape, stage, rows of a pass, tokens, settings)
Case = tuple[str, str, int, int, dict[str, Any]]
BF16, FP32 = {"model.dtype": "bfloat16"}, {"model.dtype": "float32"}
RECOMPUTED = {"train.gradient_checkpointing": True}
INT4, INT8 = {**BF16, "model.quantization": "int4"}, {**BF16, "model.quantization": "int8"}


def method(name: str, **more: Any) -> dict[str, Any]:
    return {"adapter.method": name, **{f"adapter.{key}": value for key, value in more.items()}}


DEVELOPMENT: dict[str, Case] = {
    "smol lora fp32": ("smollm2-135m", "sft", 2, 128, FP32),
    "smol lora bf16": ("smollm2-135m", "sft", 4, 128, BF16),
    "smol full fp32": ("smollm2-135m", "sft", 2, 128, {**FP32, **method("full")}),
    "smol full bf16 recomputed": ("smollm2-135m", "sft", 2, 128, {**BF16, **RECOMPUTED, **method("full")}),
    "smol dpo": ("smollm2-135m", "dpo", 2, 128, FP32),
    "smol packed": ("smollm2-135m", "sft", 2, 160, {**FP32, "data.packing": True}),
    "smol eager": ("smollm2-135m", "sft", 2, 384, {**FP32, "model.attn_implementation": "eager"}),
    "deep lora recomputed": ("deep-111m", "sft", 8, 384, {**BF16, **RECOMPUTED}),
    "deep lora": ("deep-111m", "sft", 4, 256, BF16),
    "llama lora recomputed": ("llama-102m", "sft", 4, 192, {**BF16, **RECOMPUTED}),
    "llama bitfit": ("llama-102m", "sft", 4, 128, {**FP32, **method("bitfit", bias="add")}),
    "llama prompt tuning": ("llama-102m", "sft", 4, 128, {**BF16, **method("prompt_tuning")}),
    "llama ppo": ("llama-102m", "ppo", 4, 128, FP32),
    "llama adamw_8bit full": ("llama-102m", "sft", 2, 128, {**FP32, **method("full"), "train.optim": "adamw_8bit"}),
    "gemma lora": ("gemma3-270m", "sft", 2, 160, BF16),
    "gemma full": ("gemma3-270m", "sft", 1, 128, {**FP32, **method("full")}),
    "gemma int8": ("gemma3-270m", "sft", 2, 128, INT8),
    "qwen int4": ("qwen2.5-0.5b", "sft", 2, 128, INT4),
    "qwen reward": ("qwen2.5-0.5b", "reward", 2, 96, BF16),
    "gpt2 lora": ("gpt2-124m", "sft", 4, 128, FP32),
    "moe lora": ("qwen3-moe-370m", "sft", 2, 128, BF16),
    "llama 1b int4 recomputed": ("llama3.2-1b", "sft", 2, 96, {**INT4, **RECOMPUTED}),
    "llama 3b lora": ("llama3.2-3b", "sft", 2, 64, BF16),
    "qwen3 ppo recomputed": ("qwen3-0.6b", "ppo", 2, 96, {**BF16, **RECOMPUTED}),  # was held out, see docs/plan.md
}
HELD_OUT: dict[str, Case] = {
    "pythia lora": ("pythia-160m", "sft", 4, 128, BF16),
    "mistral sliding window dora": ("mistral-330m", "sft", 2, 192, {**FP32, **method("lora", use_dora=True, r=32)}),
    "gemma dpo recomputed": ("gemma3-270m", "dpo", 1, 128, {**BF16, **RECOMPUTED}),
    "qwen 1.5b int4 recomputed": ("qwen2.5-1.5b", "sft", 2, 96, {**INT4, **RECOMPUTED}),
    "glm full": ("glm-300m", "sft", 1, 192, {**BF16, **method("full")}),
    "llama 1b ia3": ("llama3.2-1b", "sft", 1, 128, {**BF16, **method("ia3")}),
    "smol kto prefix tuning": ("smollm2-135m", "kto", 2, 128, {**FP32, **method("prefix_tuning")}),
    "pythia ppo recomputed": ("pythia-160m", "ppo", 4, 128, {**BF16, **RECOMPUTED}),
}
REPLY = 32  # tokens of PPO
WITHIN = 0.15


def storages(model: Any) -> int:
    """Bytes of all weights and buffers, packed ones with their scales."""
    found: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        parts = [tensor]
        if (state := getattr(tensor, "quant_state", None)) is not None:
            parts += [state.absmax, state.code]
            parts += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        parts += [scales] if (scales := getattr(tensor, "SCB", None)) is not None else []
        for part in parts:
            found[part.untyped_storage()._cdata] = part.untyped_storage().nbytes()
    return sum(found.values())


@contextmanager
def watched(found: list[int], models: Any) -> Any:
    """The peak of what is handed out meanwhile, beside the models."""
    gc.collect()
    before = sum(storages(model) for model in models)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watch:
        yield
    events = [e for e in watch.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    found.append(before + peak)


@contextmanager
def measured(found: list[int]) -> Any:
    """Training is watched, from its first step to its last."""
    train, step = Trainer.train, Ppo.step
    doing: list[Any] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 0:
                doing.append(watched(found, [model]))
                doing[0].__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                doing.pop().__exit__(None, None, None)

    def watched_train(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(Watch())
        return train(self, *args, **kwargs)

    def watched_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.step:
            return step(self, *args, **kwargs)
        with watched(found, [*self.models.networks(), self.models.value_head]):
            return step(self, *args, **kwargs)

    Trainer.train, Ppo.step = watched_train, watched_step  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Trainer.train, Ppo.step = train, step  # type: ignore[method-assign]


def config_of(shape: str) -> Any:
    config = AutoConfig.for_model(**SHAPES[shape])
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 2, 0
    config.dtype = torch.bfloat16
    return config


def write_model(shape: str, folder: Path) -> None:
    """Random weights in bfloat16, and a tokenizer of bytes."""
    config = config_of(shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    template = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"  # next to nothing is untrained
    make_tokenizer(template).save_pretrained(folder)


def write_rows(stage: str, length: int, file: Path) -> None:
    draw = Random(0)

    def text(size: int) -> str:
        return "".join(draw.choices(string.ascii_letters, k=size))

    whole, rows = length, list[dict[str, Any]]()
    for i in range(16):
        prompt, length = text(2), whole - 6 - i % 5  # not all alike: a pass has padding, as it nearly always has
        if stage == "ppo":
            rows.append({"messages": [{"role": "user", "content": text(length)}]})
        elif stage in ("dpo", "reward"):
            rows.append({"prompt": prompt, "chosen": text(length), "rejected": text(length)})
        elif stage == "kto":
            rows.append({"prompt": prompt, "completion": text(length), "label": i % 2 == 0})
        else:
            rows.append(
                {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text(length)}]}
            )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_recipe(case: Case, model: Path, folder: Path) -> Path:
    _, stage, rows, length, settings = case
    values: dict[str, Any] = {
        "version": 1, "stage": stage, "model": {"name": str(model), "sanity_check": False},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": length},
        "train": {"effective_batch_size": rows, "per_device_train_batch_size": rows, "max_steps": 2, "warmup_steps": 0},
        "output": {"dir": str(folder / "run")},
    }  # fmt: skip
    if stage == "ppo":
        (folder / "rules.py").write_text(
            "def length(prompts, completions, **_):\n    return [float(len(c)) for c in completions]\n"
        )
        values |= {"reward": {"functions": [f"{folder / 'rules.py'}:length"]}}
        values |= {"ppo": {"max_new_tokens": REPLY, "num_mini_batches": 1}}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        values.setdefault(section, {})[name] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def planned(name: str, case: Case, scratch: Path) -> tuple[Any, Network, Estimate]:
    """(recipe, network, plan), of config.json alone."""
    shape, stage, rows, _, _ = case
    model, folder = scratch / shape, scratch / name.replace(" ", "-")
    folder.mkdir(parents=True)
    if not model.exists():
        config_of(shape).save_pretrained(model)
    raw = load(str(write_recipe(case, model, folder)), RECIPES[stage])
    recipe = resolve(raw, hardware.detect())
    network = build(recipe, skeleton(recipe.model))
    return raw, network, estimate(network, recipe, rows, fits.length_of(recipe), "cpu", fits.accumulation(recipe))


def run(name: str, case: Case, scratch: Path) -> dict[str, Any]:
    shape, stage, rows, length, settings = case
    begun = time.perf_counter()
    raw, network, plan = planned(name, case, scratch)
    took = time.perf_counter() - begun
    if not list((scratch / shape).glob("*.safetensors")):
        write_model(shape, scratch / shape)
    write_rows(stage, length, scratch / name.replace(" ", "-") / "rows.jsonl")
    found: list[int] = []
    with measured(found):
        COMMANDS[stage].run(raw)
    gc.collect()
    return {
        "case": name, "model": shape, "parameters": network.total, "stage": stage, "rows": rows, "tokens": plan.length,
        "settings": settings, "planned": plan.tensors, "measured": max(found), "when": plan.when,
        "parts": plan.parts, "seconds_planned": round(took, 2),
        "error": round(plan.tensors / max(found) - 1, 4),
    }  # fmt: skip


def table(group: dict[str, Case], results: dict[str, dict[str, Any]]) -> str:
    """As docs/plan.md shows it."""
    lines = ["| case | planned GB | measured GB | error |", "|---|---|---|---|"]
    listed = {name: results[name] for name in group if name in results}
    for name, row in listed.items():
        sizes = f"{row['planned'] / 1e9:.3f} | {row['measured'] / 1e9:.3f} | {row['error']:+.1%}"
        lines.append(f"| {name} | {sizes} |")
    errors = [abs(row["error"]) for row in listed.values()]
    mean, largest, within = sum(errors) / len(errors), max(errors), sum(e <= WITHIN for e in errors)
    said = f"mean error {mean:.1%}, largest {largest:.1%}, {within} within {WITHIN:.0%}"
    return "\n".join([*lines, "", f"{len(errors)} of {len(group)} cases run: {said}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", help="cases; development, held-out; all of them by default")
    names = parser.parse_args().names or ["development", "held-out"]
    groups = {"development": DEVELOPMENT, "held-out": HELD_OUT}
    wanted = [name for given in names for name in (groups.get(given) or [given])]
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in wanted:
            case = DEVELOPMENT.get(name) or HELD_OUT[name]
            found = run(name, case, Path(scratch))
            results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}  # others may add, too
            results[name] = found
            results[name]["machine"] = f"{platform.machine()}, torch {torch.__version__}"
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            planned, peak = (results[name][key] / 1e9 for key in ("planned", "measured"))
            print(
                f"{name}: planned {planned:.3f} GB, measured {peak:.3f} GB, {results[name]['error']:+.1%}", flush=True
            )
    for title, group in groups.items():
        if results.keys() & group.keys():
            print(f"\n{title}\n\n{table(group, results)}")


if __name__ == "__main__":
    main()
