"""What a family goes through, a function a check, by the code that a user's folder goes through.

    python tests/models/family_checks.py [TYPE …]     runs all of them and writes finetune/families_tested.json

A check raises (AssertionError, or what a library raises) where the family fails it, and returns a line where something
is limited and said so.
"""

from __future__ import annotations

import inspect
import json
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # conftest

import families_tiny as tiny
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune import families
from finetune.adapters.load import apply
from finetune.adapters.merge import largest_difference, logits_of, merge_in_float32
from finetune.base import Base
from finetune.errors import FinetuneError, UserError
from finetune.evaluation.generation import answer, left_pad, up_to_stop, written
from finetune.models import attach, loading
from finetune.recipe.adapters import (
    BitFitAdapter,
    BottleneckAdapter,
    Ia3Adapter,
    LastLayersAdapter,
    LnTuningAdapter,
    LoraAdapter,
)  # fmt: skip
from finetune.recipe.sections import ModelConfig
from finetune.training.loss_parts import scores_are_its_own
from finetune.training.packing import documents_isolated
from finetune.training.weight_check import Proof

RECORD = Path(__file__).parents[2] / "finetune" / "families_tested.json"
TEXTS = ["say 7", "tell me about the weather 天气", "a", "订单号 A7301 在哪里？"]


@dataclass
class Checkpoint:
    """A folder, and what a command opens of it."""

    folder: Path

    def config(self, **keys: Any) -> ModelConfig:
        return ModelConfig(name=str(self.folder), **{"sanity_check": False, **keys})

    def load(self, **keys: Any) -> Any:
        return loading.load_model(self.config(**keys), torch.float32)

    @cached_property
    def base(self) -> Base:
        return Base.open(self.config())

    @cached_property
    def samples(self) -> list[list[int]]:
        return [self.base.encoder.prompt_ids([{"role": "user", "content": text}]) for text in TEXTS]


def arrives(checkpoint: Checkpoint) -> None:
    """Every weight bit for bit as transformers reads it."""
    from transformers import AutoModelForCausalLM

    ours = checkpoint.load()
    plain = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    assert type(ours) is type(plain)
    state = ours.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert not ours.training


def damaged(checkpoint: Path, folder: Path, kind: str) -> Path:
    """A copy with one matrix of the first block taken away, cut, or added."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(checkpoint / "model.safetensors")
    name = next(key for key, value in state.items() if value.ndim == 2 and ".0." in key and "expert" not in key)
    if kind == "missing":
        state.pop(name)
    elif kind == "misshapen":
        state[name] = state[name][:-1].contiguous()
    else:
        state[name.replace(".0.", ".7.")] = state[name].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def refuses(checkpoint: Checkpoint, kinds: Sequence[str] = ("missing", "unexpected", "misshapen")) -> None:
    """Such weights are an error that says so."""
    for kind in kinds:
        with tempfile.TemporaryDirectory() as scratch, pytest.raises(UserError, match=kind):
            Checkpoint(damaged(checkpoint.folder, Path(scratch) / "damaged", kind)).load()


def learns(checkpoint: Checkpoint) -> None:
    """LoRA on all linear layers: every tensor learns and nothing else changes, the loss falls; saved and read again the
    logits are the same, without it they are the base's; merged they are the adapter's."""
    samples = checkpoint.samples
    model = apply(checkpoint.load(), LoraAdapter(r=4, lora_alpha=8))
    ids = torch.tensor([samples[1]])
    proof = Proof(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        proof.look()
        optimizer.step()
        proof.count(1e-2)
        optimizer.zero_grad()
        losses.append(loss.item())
    proof.finish()
    assert losses[-1] < losses[0] - 0.05, losses
    unmerged = logits_of(model, samples)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        again = attach.attach_adapter(checkpoint.load(), Path(scratch), checkpoint.config())
    assert largest_difference(unmerged, logits_of(again, samples))[0] == 0.0
    plain = logits_of(checkpoint.load(), samples)
    with again.disable_adapter():
        assert largest_difference(plain, logits_of(again, samples))[0] == 0.0
    difference, _ = largest_difference(unmerged, logits_of(merge_in_float32(again), samples))
    assert difference < 1e-4, f"merged: {difference}"
    assert largest_difference(unmerged, plain)[0] > 100 * difference


def writes_alike(checkpoint: Checkpoint) -> None:
    """Answers written together, where rows come and go, are those of a call for each."""
    model, pad = checkpoint.load().eval(), checkpoint.base.tokenizer.pad_token_id
    stops = list(range(0, len(checkpoint.base.tokenizer), 24))  # many, so that answers end at different times
    prompts = [ids[-n:] for ids in checkpoint.samples for n in (len(ids), 7)]
    together = dict(one for ended in written(model, prompts, 24, 3, stops, pad) for one in ended)
    for number, prompt in enumerate(prompts):
        ids, mask = left_pad([prompt], pad, model.device)
        with torch.inference_mode():
            output = answer(model, ids, mask, 24, stops, pad)
        assert together[number] == up_to_stop(output[0, len(prompt) :].tolist(), stops), number


def pads(checkpoint: Checkpoint) -> None:
    """Logits behind left padding are those without. (A random model may say the same to everything.)"""
    model, samples = checkpoint.load(), checkpoint.samples
    ids, mask = left_pad(samples, checkpoint.base.tokenizer.pad_token_id, model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate makes them
    kinds = {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
    with torch.inference_mode():
        padded = model(input_ids=ids, attention_mask=mask, **kinds).logits[:, -1]
    alone = torch.stack([rows[-1] for rows in logits_of(model, samples)])
    difference = ((padded - alone).abs().max() / alone.abs().max()).item()
    assert difference < 1e-4, f"logits differ by {difference:.1g}"


def scores(checkpoint: Checkpoint) -> str | None:
    """trl's fused head, on which SFT, DPO and KTO train, gives the log-probabilities of the model's own logits."""
    from trl.trainer.utils import add_fused_lm_head

    model = checkpoint.load()
    add_fused_lm_head(model)
    own = scores_are_its_own(model)
    return None if own else "trl computes other log-probabilities: SFT takes them from the logits, DPO and KTO refuse"


def checkpoints(checkpoint: Checkpoint) -> str | None:
    """Gradients with gradient checkpointing are those without."""
    ids = torch.tensor([checkpoint.samples[1]])
    found = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = apply(checkpoint.load(), LoraAdapter(r=4, lora_alpha=8))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        if recomputed:
            if not model.supports_gradient_checkpointing:
                return "no gradient checkpointing"
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    difference = max((found[0][n] - g).abs().max().item() for n, g in found[1].items())
    assert difference < 1e-4 * max(g.abs().max().item() for g in found[0].values()), f"differ by {difference:.2g}"
    return None


def packs(checkpoint: Checkpoint) -> str | None:
    """Documents in one row are apart, or packing switches itself off."""
    sample = [i for ids in checkpoint.samples for i in ids][:64]
    return None if documents_isolated(checkpoint.load(), sample) else "packing switches itself off"


def quantizes(kind: str) -> Callable[[Checkpoint], str | None]:
    """Held as integers it computes nearly the same, and gradients reach every adapter after an evaluation."""

    def check(checkpoint: Checkpoint) -> str | None:
        ids = torch.tensor([checkpoint.samples[1]])
        try:
            model = checkpoint.load(quantization=kind)
        except UserError as error:
            return f"{kind} refused: {error.problems[0].message}"
        with torch.inference_mode():
            exact, close = checkpoint.load()(input_ids=ids).logits, model(input_ids=ids).logits
        error = ((exact - close).abs().mean() / exact.std()).item()
        assert 0 < error < (0.1 if kind == "int8" else 1.0), f"logits differ by {error:.2g} of their spread"
        without = tiny.without_gradient(apply(model, LoraAdapter(r=4, lora_alpha=8)), ids)
        dead = [name for name in without if "expert" not in name]
        assert not dead, f"no gradient reaches {', '.join(dead[:3])}"
        return None

    return check


def runs(checkpoint: Checkpoint) -> None:
    """`ft sft` with packing, gradient checkpointing and held-out rows, `ft eval`, `ft merge`: the loss falls and the
    merged folder is proven."""
    from conftest import ft, write_rows

    said = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} {i * 7 % 10}"}]}
        for i in range(24)
    ]
    limited = not checkpoint.base.skeleton.supports_gradient_checkpointing
    with tempfile.TemporaryDirectory() as scratch:
        rows, run = write_rows(Path(scratch) / "rows.jsonl", said), Path(scratch) / "run"
        settings = {
            "version": 1,
            "stage": "sft",
            "model": {"name": str(checkpoint.folder), "dtype": "float32"},
            "data": {"train": str(rows), "max_length": 64, "packing": True, "eval_split": 4},
            "eval": {"max_new_tokens": 4},
            "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
            "train": {
                "max_steps": 6, "gradient_checkpointing": not limited, "effective_batch_size": 4,
                "learning_rate": 1e-2, "logging_steps": 1,
            },
            "output": {"dir": str(run)},
        }  # fmt: skip
        (Path(scratch) / "recipe.yaml").write_text(json.dumps(settings))
        for words in (
            ("sft", "--recipe", f"{scratch}/recipe.yaml"),
            ("eval", run),
            ("merge", "--adapter", run, "--output", f"{scratch}/merged"),
        ):
            result = ft(*words)
            assert result.returncode == 0, f"ft {words[0]}: {result.stderr.strip().splitlines()[-1]}"
        metrics = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses = [row["loss"] for row in metrics if "loss" in row]
        assert min(losses[1:]) < losses[0], losses
        result = json.loads((run / "result.json").read_text())
        assert result["trained"]["changed_equals_declared"] or result["trained"]["unrouted_experts"]


def learns_to_train_experts(checkpoint: Checkpoint) -> str | None:
    """Whether LoRA on all linear layers reaches the experts, which are 3-D parameters and no layers."""
    network = checkpoint.base.skeleton
    if not any(p.ndim == 3 and "expert" in name for name, p in network.named_parameters()):
        return None
    adapted = apply(network, LoraAdapter(r=4, lora_alpha=8))
    reached = any(p.requires_grad and ".experts." in name for name, p in adapted.named_parameters())
    return None if reached else "all-linear leaves the experts frozen"


OTHERS: dict[str, Any] = {
    "bottleneck": BottleneckAdapter(bottleneck_size=8), "ia3": Ia3Adapter(), "ln_tuning": LnTuningAdapter(),
    "bitfit": BitFitAdapter(bias="add", targets="all"), "last_layers": LastLayersAdapter(num_layers=1),
}  # fmt: skip


def adapts(checkpoint: Checkpoint) -> str | None:
    """Methods that look for their places in the network find them, and learn there; or they say that there are none."""
    ids, refused = torch.tensor([checkpoint.samples[1]]), []
    for name, section in OTHERS.items():
        try:
            model = apply(checkpoint.load(), section)
        except UserError:
            refused.append(name)
            continue
        try:
            model.train()(input_ids=ids, labels=ids).loss.backward()
        except Exception as error:
            raise AssertionError(f"{name}: {line(error)}") from error
        learning = [p for p in model.parameters() if p.requires_grad and p.grad is not None and p.grad.any()]
        assert learning, f"nothing learns with {name}"
    return f"no {', '.join(refused)}" if refused else None


CHECKS: dict[str, Callable[[Checkpoint], str | None]] = {
    "weights arrive": arrives,
    "wrong weights refused": refuses,
    "LoRA": learns,
    "experts": learns_to_train_experts,
    "other methods": adapts,
    "batches": writes_alike,
    "left padding": pads,
    "scores": scores,
    "gradient checkpointing": checkpoints,
    "packing": packs,
    "int8": quantizes("int8"),
    "int4": quantizes("int4"),
    "sft, eval, merge": runs,
}
SECONDS = 120
"""A check may take."""


def outcome(kind: str, folder: Path) -> dict[str, str]:
    """{check: what is limited or fails}, nothing for what passes; {"cannot": why} for a type that goes no further."""
    try:
        with timed():
            config = CONFIG_MAPPING[kind]().to_dict()
            if (row := families.refused(config)) is not None:
                return {"cannot": f"refused: {row.name} {row.why}"}
            checkpoint = Checkpoint(tiny.write_config(folder / kind, tiny.shrunk(kind)))
    except Exception as error:
        return {"cannot": f"no tiny model of it could be made ({line(error)})"}
    found = {}
    for name, check in CHECKS.items():
        try:
            with timed(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                said = check(checkpoint)
        except (Exception, pytest.fail.Exception) as error:
            if "-v" in sys.argv:
                traceback.print_exc()
            said = f"fails: {line(error)}"
        if said is not None:
            found[name] = said
    if found.get("LoRA", "").startswith("fails") or found.get("weights arrive", "").startswith("fails"):
        why = found.get("weights arrive") or found["LoRA"]
        return {"cannot": why.removeprefix("fails: ")}
    return found


def line(error: BaseException) -> str:
    """Without what differs from run to run."""
    said = error.problems[0].message if isinstance(error, UserError) else str(error)
    said = re.sub(r"/tmp/\S*/", "", " ".join(said.split()))[:160]
    plain = isinstance(error, AssertionError | FinetuneError | pytest.fail.Exception)
    return said if plain else f"{type(error).__name__}: {said}"


@contextmanager
def timed() -> Iterator[None]:
    """TimeoutError after SECONDS."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main(kinds: list[str]) -> None:
    """Run types and keep what is found; without any all of them, in the order of their names."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    known = json.loads(RECORD.read_text(encoding="utf-8"))["types"] if RECORD.exists() and kinds else {}
    for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        begun = time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            known[kind] = outcome(kind, Path(scratch))
        print(kind, f"{time.process_time() - begun:.1f}s", json.dumps(known[kind], ensure_ascii=False), flush=True)
        versions = {package: version(package) for package in ("transformers", "peft", "trl", "torch", "bitsandbytes")}
        record = {"date": f"{date.today()}", "versions": versions, "types": dict(sorted(known.items()))}
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if not word.startswith("-")])
