"""What ft does on a CUDA machine, and how fast, in under eight minutes on one card: `make gpu-check`.

python benchmarks/gpu_check.py [NAME …] [--shape 8b|7b|1b|tiny] [--output docs/gpu.md] [--any-device]

Each check runs in a process of its own with a limit of time, so one that fails, hangs or runs out of memory is one row
of the table and the next goes on; when all the time is gone, the rest are rows that say so. Without a GPU every row
says "not run". `--any-device` runs them wherever it is, with tiny shapes: that tries this script, and its figures mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from gpu_kit import ROOT, Row, apart, ft, ft_apart, losses
from gpu_speed import NOTE, SPEED

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
LIMIT, MOST = 460.0, 110.0
"""Seconds of all checks together, and of one of them."""


class Check:
    """Where a check works, and with what."""

    def __init__(self, folder: Path, shape: str) -> None:
        self.folder, self.shape = folder, shape

    @property
    def smaller(self) -> str:
        """The shape for what takes longer than a step."""
        return "1b" if self.shape in ("7b", "8b") else self.shape

    def model(self, shape: str) -> Path:
        """A random model with the built-in tokenizer; kept for the checks that follow."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from finetune.builtin import tokenizers, world
        from finetune.training.new_base import world_texts

        path = self.folder / shape
        if (path / "done").exists():
            return path
        tokenizer = tokenizers.build_tokenizer(world_texts(), world.HAN)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        size = SHAPES[shape].get("vocab_size", 32_000) if shape != "tiny" else 0
        config = LlamaConfig(
            **{**SHAPES[shape], "vocab_size": max(size, len(tokenizer))}, max_position_embeddings=4096,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            built = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        built.save_pretrained(path)
        tokenizer.save_pretrained(path)
        (path / "done").touch()
        return path

    def recipe(self, name: str, stage: str, shape: str, length: int = 128, **sections: Any) -> tuple[Path, Path]:
        """(recipe, run directory) of a few steps on rows that fill `length` tokens."""
        text = " ".join(str(i % 10) for i in range(length))
        rows = {
            "sft": [{"instruction": f"say {i}", "output": text} for i in range(64)],
            "dpo": [{"prompt": f"say {i}", "chosen": text, "rejected": f"no {text}"} for i in range(64)],
            "ppo": [{"instruction": f"say {i}", "output": "x"} for i in range(64)],
        }[stage]
        data = self.folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values: dict[str, Any] = {
            "version": 1, "stage": stage, "model": {"name": str(self.model(shape)), "sanity_check": False},
            "data": {"train": str(data), "max_length": length}, "adapter": {"method": "lora", "r": 16},
            "train": {"max_steps": 6, "effective_batch_size": 8, "logging_steps": 1, "warmup_steps": 0.0,
                      "lr_scheduler_type": "constant", "learning_rate": 1e-3},
            "output": {"dir": str(self.folder / f"{name}.run")},
        }  # fmt: skip
        for key, section in sections.items():
            values[key] = {**values.get(key, {}), **section}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return path, Path(values["output"]["dir"])


def kernels(check: Check) -> Row:
    """bitsandbytes' 4 and 8 bits forward and backward, against the weights that they stand for."""
    import bitsandbytes as bnb
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    found = {}
    for name, kind in (("nf4", "nf4"), ("fp4", "fp4")):
        layer = bnb.nn.Linear4bit(256, 128, bias=False, compute_dtype=torch.float32, quant_type=kind).to(device)
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        whole = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        x = torch.randn(32, 256, device=device, requires_grad=True)
        layer(x).square().sum().backward()
        own = x.grad.clone()  # type: ignore[union-attr]
        x.grad = None
        (x @ whole.T).square().sum().backward()
        found[name] = float((own - x.grad).norm() / x.grad.norm())  # type: ignore[operator,union-attr]
    if max(found.values()) > 0.01:
        raise RuntimeError(f"gradients are off by {found}")
    return {"figures": ", ".join(f"{name}: gradient off by {value:.1e}" for name, value in found.items())}


def precision(check: Check) -> Row:
    """bfloat16 and float16 with loss scaling, against float32."""
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        recipe, run = check.recipe(f"precision-{dtype}", "sft", "tiny", model={"dtype": dtype})
        ft("sft", recipe)
        found[dtype] = losses(run)
    off = {dtype: apart(found["float32"], values) for dtype, values in found.items() if dtype != "float32"}
    if max(off.values()) > 0.05:
        raise RuntimeError(f"losses are off by {off}")
    return {"figures": ", ".join(f"{dtype}: losses off by {value:.1e}" for dtype, value in off.items())}


def flash(check: Check) -> Row:
    """Packed rows with flash attention (documents of any length) against sdpa."""
    from transformers.utils import is_flash_attn_2_available

    if not is_flash_attn_2_available():
        return {"result": "not run", "figures": "flash_attn is not installed"}
    found = []
    for kind in ("sdpa", "flash_attention_2"):
        recipe, run = check.recipe(
            f"flash-{kind}", "sft", "tiny", 512, model={"attn_implementation": kind, "dtype": "bfloat16"},
            data={"packing": True}, train={"effective_batch_size": 16},
        )  # fmt: skip
        ft("sft", recipe)
        found.append(losses(run))
    off = apart(*found)
    if off > 0.05:
        raise RuntimeError(f"losses are off by {off}")
    return {"figures": f"losses off by {off:.1e}"}


def generation(check: Check) -> Row:
    """Answers of a random model with the adapter of a run."""
    recipe, run = check.recipe("generation", "sft", check.smaller)
    if not (run / "result.json").exists():
        ft("sft", recipe)
    asked = check.folder / "asked.jsonl"
    asked.write_text("".join(json.dumps({"instruction": f"say {i}"}) + "\n" for i in range(32)))
    begun = time.perf_counter()
    ft("generate", run, "--data", asked, "--output", check.folder / "answers.jsonl", "--max-new-tokens", 64)
    return {"figures": f"32 answers of up to 64 tokens in {time.perf_counter() - begun:.0f} s, loading included"}


def resuming(check: Check) -> Row:
    """Three steps and three more are six, to the last bit."""
    recipe, run = check.recipe("whole", "sft", "tiny")
    ft("sft", recipe)
    parts = check.folder / "parts.run"
    ft("sft", recipe, "--output", parts, "--set", "train.max_steps=3")
    ft("sft", recipe, "--output", parts, "--resume", "--set", "train.max_steps=6")
    same = [
        path.read_bytes() == (parts / "adapter" / path.name).read_bytes()
        for path in (run / "adapter").glob("*.safetensors")
    ]
    if not same or not all(same):
        raise RuntimeError(f"the weights differ; losses by {apart(losses(run), losses(parts)):.1e}")
    return {"figures": "bit for bit"}


def merging(check: Check) -> Row:
    """A merged model answers as the base with its adapter does."""
    recipe, run = check.recipe("merging", "sft", "tiny")
    ft("sft", recipe)
    target = check.folder / "merged"
    ft("merge", run, "--output", target)
    found = json.loads((target / "merge.json").read_text())
    return {"figures": f"largest difference of a logit {found['max_logit_diff']:.1e}"}


def two_cards(check: Check) -> Row:
    """DDP and FSDP on two cards train as one card does."""
    import torch

    if torch.cuda.device_count() < 2:
        return {"result": "not run", "figures": f"{torch.cuda.device_count()} card here"}
    recipe, run = check.recipe("cards", "sft", "tiny", adapter={"lora_dropout": 0.0}, model={"dtype": "float32"})
    ft("sft", recipe)
    said = []
    for kind in ("ddp", "fsdp"):
        ft_apart("sft", recipe, "--output", check.folder / kind, "--launch", kind, "--num-processes", 2)
        off = apart(losses(run), losses(check.folder / kind))
        said.append(f"{kind}: losses off by {off:.1e}")
        if off > 1e-3:
            raise RuntimeError("; ".join(said))
    return {"figures": ", ".join(said)}


CHECKS: dict[str, Callable[[Any], Row]] = {
    "kernels": kernels, "precision": precision, "flash": flash, "resuming": resuming, "merging": merging,
    "generation": generation, "two_cards": two_cards,
}  # fmt: skip
ALL = CHECKS | SPEED


def one(name: str, folder: Path, shape: str) -> Row:
    """A check in this process."""
    try:
        return {"result": "passed", **ALL[name](Check(folder, shape))}
    except Exception as error:
        text = " ".join(str(error).split())
        return {"result": "FAILED", "figures": f"{type(error).__name__}: {text}"[:300]}


def apart_from_us(command: Sequence[str], seconds: float) -> Row:
    """What a check in a process of its own printed last; a row also when it hangs or is ended."""
    begun = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"result": "FAILED", "figures": f"not done in {seconds:.0f} s", "seconds": round(seconds)}
    took = {"seconds": round(time.perf_counter() - begun)}
    try:
        return {**json.loads(done.stdout.strip().splitlines()[-1]), **took}
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return {"result": "FAILED", "figures": f"ended with {done.returncode}: {last}"[:300], **took}


def machine() -> str | None:
    """The cards here; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; torch {torch.__version__}, CUDA {torch.version.cuda}"


def table(rows: dict[str, Row]) -> str:
    lines = ["| check | what | result | figures | s |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        what = str(ALL[name].__doc__).split("\n")[0]
        figures = str(row.get("figures", "")).replace("|", "/")
        lines.append(f"| {name} | {what} | {row['result']} | {figures} | {row.get('seconds', '')} |")
    return "\n".join(lines)


def page(rows: dict[str, Row], where: str | None, shape: str) -> str:
    said = f"On {where}; random models of the shape `{shape}`." if where else (
        "**Not run on hardware**: no GPU has been at hand. `make gpu-check` on a machine with one fills the table in."
    )  # fmt: skip
    text = ("`make gpu-check` runs these on one card in under eight minutes and writes this page. A check that fails, "
            "or for which no time is left, is a row, not the end.")  # fmt: skip
    checks, speed = ({name: row for name, row in rows.items() if (name in SPEED) is fast} for fast in (False, True))
    parts = [f"# On GPUs\n\n{text}\n\n{said}", table(checks)] + (
        [f"## Speed and memory\n\n{NOTE}", table(speed)] if speed else []
    )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("names", nargs="*", choices=[[], *ALL], metavar="NAME", help=", ".join(ALL))
    parser.add_argument("--shape", choices=SHAPES, help="of the large models; by the card's memory")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--any-device", action="store_true", help="try this script without a GPU, writing nothing")
    parser.add_argument("--one", choices=ALL, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.one, given.folder, given.shape)))
        return
    where, wanted = machine(), given.names or list(ALL)
    if where is None and not given.any_device:
        rows = {name: {"result": "not run", "figures": "no GPU"} for name in wanted}
    else:
        shape = given.shape or fitting(where)
        folder, rows, end = Path(tempfile.mkdtemp(prefix="ft-gpu-")), {}, time.perf_counter() + LIMIT
        try:
            for name in wanted:
                command = [sys.executable, __file__, "--one", name, "--folder", str(folder), "--shape", shape]
                none = {"result": "not run", "figures": f"no time left of {LIMIT:.0f} s"}
                left = end - time.perf_counter()
                rows[name] = apart_from_us(command, min(left, MOST)) if left > 5 else none
                print(f"{name}: {rows[name]['result']}  {rows[name].get('figures', '')}", file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(rows))
    if not given.any_device:
        given.output.write_text(page(rows, where, given.shape or fitting(where)), encoding="utf-8")
    sys.exit(any(row["result"] == "FAILED" for row in rows.values()))


def fitting(where: str | None) -> str:
    """The largest shape that a card holds in bfloat16 with room to train."""
    import torch

    if where is None:
        return "tiny"
    return "8b" if torch.cuda.get_device_properties(0).total_memory > 35e9 else "1b"


if __name__ == "__main__":
    main()
