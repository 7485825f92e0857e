"""How fast and in how much memory ft trains a random model on a GPU: the rows of speed of `gpu_check.py`."""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_kit import Row, ft, losses, metrics

NOTE = (
    "Published by others: torchtune, Llama 3 8B, QLoRA: 7.4 GiB and 2,413 tokens/s on an RTX 4090; NeMo Automodel, "
    "Llama 3 8B, LoRA: 12,473 tokens/s on an H100; LLaMA-Factory, 7B, QLoRA: 6 GB. The share of the peak rate is of "
    "that in the card's data sheet, over the whole run but loading."
)


def measured(check: Any, name: str, stage: str, shape: str | None = None, **sections: Any) -> Row:
    """Tokens a second, share of the card's peak and memory, beside what `ft plan` said."""
    length = 1024 if check.shape != "tiny" else 128
    recipe, run = check.recipe(name, stage, shape or check.shape, length, **sections)
    plan = json.loads(ft("plan", recipe, "--json", "-"))
    ft(stage, recipe)
    peak = json.loads((run / "result.json").read_text())["peak_memory_gb"]
    planned = plan.get("peak_memory_gb")
    share = share_of_peak(plan, run)
    said = [f"{rate(run):,.0f} tok/s", *([f"{share:.0%} of the peak rate"] if share else []), f"{peak:.1f} GB"]
    return {"figures": ", ".join(said) + (f", planned {planned:.1f}" if planned else "")}


def rate(run: Path) -> float:
    """Tokens a second, the median of the steps after the first."""
    return statistics.median([row["tokens_per_second"] for row in metrics(run) if "tokens_per_second" in row][1:])


def share_of_peak(plan: Row, run: Path) -> float | None:
    """Of the rate that the data sheet names; None for cards that are not known."""
    import torch

    from finetune.planning.cards import CARDS

    if not torch.cuda.is_available() or not (work := plan.get("step_flops")):
        return None
    name = torch.cuda.get_device_name()
    card = next((card for key, card in reversed(CARDS.items()) if key in name and card.tflops), None)
    result = json.loads((run / "result.json").read_text())
    return work * result["steps"] / result["seconds"] / (card.tflops * 1e12) if card and card.tflops else None


def recomputing(quantization: str | None) -> dict[str, Any]:
    model = {"dtype": "bfloat16", **({"quantization": quantization} if quantization else {})}
    return {"model": model, "train": {"gradient_checkpointing": True}}


def sft_bf16(check: Any) -> Row:
    """SFT of a random model, LoRA in bfloat16."""
    return measured(check, "sft_bf16", "sft", **recomputing(None))


def sft_int4(check: Any) -> Row:
    """SFT of a random model, int4 with LoRA."""
    return measured(check, "sft_int4", "sft", **recomputing("int4"))


def dpo(check: Any, name: str, quantization: str | None) -> Row:
    row = measured(check, name, "dpo", check.smaller, **recomputing(quantization))
    first = losses(check.folder / f"{name}.run")[0]
    if abs(first - 0.6931) > 0.02:
        raise RuntimeError(f"the first loss is {first}, not ln 2")
    return row


def dpo_bf16(check: Any) -> Row:
    """DPO of a random model, LoRA in bfloat16; its first loss is ln 2."""
    return dpo(check, "dpo_bf16", None)


def dpo_int4(check: Any) -> Row:
    """DPO of a random model, int4 with LoRA; its first loss is ln 2."""
    return dpo(check, "dpo_int4", "int4")


def ppo(check: Any, name: str, quantization: str | None) -> Row:
    rule = check.folder / "rule.py"
    rule.write_text("def length(prompts, completions, **_):\n    return [float(len(c)) for c in completions]\n")
    sections = recomputing(quantization)
    sections["train"] |= {"max_steps": 3, "learning_rate": 1e-5}
    row = measured(
        check, name, "ppo", check.smaller, ppo={"max_new_tokens": 32}, reward={"functions": [f"{rule}:length"]},
        **sections,
    )  # fmt: skip
    first = metrics(check.folder / f"{name}.run")[0]["first_log_ratio"]
    if first > 0.05:
        raise RuntimeError(f"ratios before any update are off by {first}")
    return {"figures": f"{row['figures']}, first log ratio {first:.1e}"}


def ppo_bf16(check: Any) -> Row:
    """PPO on one base in memory, LoRA in bfloat16: three rollouts, rewarded by a rule."""
    return ppo(check, "ppo_bf16", None)


def ppo_int4(check: Any) -> Row:
    """PPO on one base in memory, int4 with LoRA: three rollouts, rewarded by a rule."""
    return ppo(check, "ppo_int4", "int4")


def with_liger() -> None:
    """Every Llama of this process has Liger's kernels for norms, positions and gates from now on."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )


def packed(check: Any, kind: str, **sections: Any) -> float:
    """Tokens a second of packed SFT in bfloat16."""
    length = 1024 if check.shape != "tiny" else 128
    model = {"dtype": "bfloat16", **sections.get("model", {})}
    train = {"max_steps": 12, **sections.get("train", {})}
    recipe, run = check.recipe(
        f"packed-{kind}", "sft", check.smaller, length, data={"packing": True}, model=model, train=train
    )
    if not (run / "result.json").exists():
        ft("sft", recipe)
    return rate(run)


def faster(check: Any) -> Row:
    """Packed SFT in bfloat16: sdpa, flash attention, Liger's kernels, and how many times as fast."""
    plain = packed(check, "sdpa")
    found, flash = {"sdpa": f"{plain:,.0f} tok/s"}, {"attn_implementation": "flash_attention_2"}
    for kind, package, sections in (("flash", "flash_attn", {"model": flash}), ("Liger", "liger_kernel", {})):
        if importlib.util.find_spec(package) is None:
            found[kind] = f"{package} is not installed"
            continue
        try:
            if kind == "Liger":
                with_liger()
            fast = packed(check, kind, **sections)
            found[kind] = f"{fast:,.0f} tok/s ({fast / plain:.2f})"
        except RuntimeError as error:
            found[kind] = f"fails: {error}"[:80]
    return {"figures": "; ".join(f"{kind}: {said}" for kind, said in found.items())}


def compiled(check: Any) -> Row:
    """The same with torch.compile, its compiling left out, and how many times as fast as sdpa without."""
    plain = packed(check, "sdpa")
    fast = packed(check, "compiled", train={"torch_compile": True})
    return {"figures": f"{fast:,.0f} tok/s ({fast / plain:.2f})"}


SPEED: dict[str, Callable[[Any], Row]] = {
    "sft_bf16": sft_bf16, "sft_int4": sft_int4, "dpo_bf16": dpo_bf16, "dpo_int4": dpo_int4, "ppo_bf16": ppo_bf16,
    "ppo_int4": ppo_int4, "faster": faster, "compiled": compiled,
}  # fmt: skip
