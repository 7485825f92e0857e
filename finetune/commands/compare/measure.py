"""What a finished run costs and brings; `ft compare` runs it in a process of its own.

python -m finetune.commands.compare.measure RUN OUT.json

RUN with no more than a recipe.yaml stands for the bare base.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune.adapters import compatibility
from finetune.adapters.load import adapter_config, loads_trainable, prepare
from finetune.base import Base
from finetune.data import held_out
from finetune.data.encoder import Encoder
from finetune.data.thinking import switched
from finetune.errors import UserError
from finetune.evaluation import generation as evaluation
from finetune.models import attach, hardware, loading
from finetune.recipe.file import check
from finetune.recipe.resolve import compute_dtype
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import SftRecipe
from finetune.run.writing import write_json

TOKENS, PROMPTS, ROUNDS = 32, 32, 3


def measure(where: Path) -> dict[str, Any]:
    """Held-out metrics, size, memory and speed of the run in `where`, against its bare base."""
    machine = hardware.detect()
    recipe = check(yaml.safe_load((where / "recipe.yaml").read_text(encoding="utf-8")), "sft")
    assert isinstance(recipe, SftRecipe)
    assert recipe.eval.first is not None
    trained = next((folder for folder in (where / "adapter", where / "model") if folder.is_dir()), None)
    opened = Base.open(recipe.model, trained, recipe.data.thinking)
    encoder = opened.asking(switched(recipe.eval.thinking), "eval.thinking")  # as it was trained
    rows = held_out.load_eval_rows(recipe.eval.first.path, recipe.data)[: recipe.eval.limit]
    prompts = [encoder.prompt_ids(row.asked, row.tools) for row in rows[:PROMPTS]]

    kind = getattr(torch, compute_dtype(recipe.model.dtype, machine))  # `auto` as training resolves it
    base = loading.load_model(recipe.model, kind, machine)
    generation, how = (recipe.eval.max_new_tokens, recipe.eval.batch_size), recipe.eval.generation
    if not (where / "result.json").exists():
        scored = evaluation.evaluate(where.name, base, encoder, rows, *generation, how=how)
        return {"metrics": scored.metrics, "row_losses": scored.losses}
    result = json.loads((where / "result.json").read_text(encoding="utf-8"))
    bare = seconds_per_token(base, encoder, prompts)
    if recipe.adapter.method == "full":
        model = loading.load_model(ModelConfig(name=str(where / "model")), kind, machine)
        weights, mergeable = (where / "model").glob("*.safetensors"), "is the model"
    else:
        adapter = where / "adapter"
        model = attach.attach_adapter(base, adapter, recipe.model, trainable=loads_trainable(adapter))
        prepare(model)
        weights, mergeable = adapter.glob("adapter_model*"), "yes"
        try:
            compatibility.check_merge(adapter_config(adapter), opened.config["model_type"])
        except UserError:
            mergeable = "no"
    scored = evaluation.evaluate(where.name, model, encoder, rows, *generation, how=how)
    speed, backward_share = training_speed(model, [encoder.encode(row, "last").input_ids for row in rows[:16]])
    return {
        "metrics": scored.metrics,
        "row_losses": scored.losses,
        "rows": result["data"]["used"],
        "trainable_parameters": result["trainable_parameters"],
        "total_parameters": result["total_parameters"],
        "adapter_bytes": sum(path.stat().st_size for path in weights),
        "peak_memory_gb": result["peak_memory_gb"],
        "train_seconds": result["seconds"],
        "train_tokens_per_second": speed,
        "backward_share": backward_share,
        "inference_overhead": seconds_per_token(model, encoder, prompts) / bare - 1,
        "mergeable": mergeable,
    }


def now(model: Any) -> float:
    """Seconds, when the device has done its work."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds_per_token(model: Any, encoder: Encoder, prompts: list[list[int]]) -> float:
    """Seconds per generated token, the best of some rounds after one to warm up; every row writes as many."""
    ids, mask = evaluation.left_pad(prompts, encoder.tokenizer.pad_token_id, model.device)
    model.eval()
    best = math.inf
    with torch.inference_mode():
        for _ in range(ROUNDS + 1):
            begun = now(model)
            evaluation.answer(model, ids, mask, TOKENS, [], encoder.tokenizer.pad_token_id)  # nothing ends it
            best = min(best, now(model) - begun)
    return best / TOKENS


def training_speed(model: Any, rows: list[list[int]]) -> tuple[float, float]:
    """(tokens per second of forward + backward, the share of it that the backward pass takes).

    On a batch of rows cut to the same length, the best of some rounds after one to warm up: a whole run's seconds would
    tell what else the machine was doing.
    """
    length = min(map(len, rows))
    ids = torch.tensor([row[:length] for row in rows], device=model.device)
    model.train()
    forward = whole = math.inf
    for _ in range(ROUNDS + 1):
        begun = now(model)
        loss = model(input_ids=ids, labels=ids).loss
        middle = now(model)
        loss.backward()
        ended = now(model)
        model.zero_grad(set_to_none=True)
        forward, whole = min(forward, middle - begun), min(whole, ended - begun)
    model.eval()
    return ids.numel() / whole, 1 - forward / whole


if __name__ == "__main__":
    from finetune.terminal import noise

    noise.silence()
    write_json(Path(sys.argv[2]), measure(Path(sys.argv[1])))
