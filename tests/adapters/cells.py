"""One cell of the matrix: a method on a base, through the project's own commands, with every promise checked."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import make_tokenizer, tensors, train, write_rows

from finetune.commands import merge
from finetune.data.chat import make_encoder
from finetune.errors import UserError
from finetune.evaluation.generation import generate
from finetune.families import family
from finetune.models import attach, loading, tokenizers
from finetune.models.config import read_config
from finetune.recipe.sections import ModelConfig
from finetune.training import session

GLM = Path(__file__).parent.parent / "fixtures" / "chatglm" / "chatglm3" / "checkpoint"

# name -> (adapter section, learning rate)
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"method": "lora", "r": 4}, 1e-2),
    "lora+": ({"method": "lora", "r": 4, "loraplus_lr_ratio": 8}, 2e-3),
    "dora, rslora": ({"method": "lora", "r": 4, "use_dora": True, "use_rslora": True}, 1e-2),
    "pissa": ({"method": "lora", "r": 4, "init_lora_weights": "pissa"}, 5e-3),
    "olora": ({"method": "lora", "r": 4, "init_lora_weights": "olora", "use_rslora": True}, 2e-3),
    "loftq": ({"method": "lora", "r": 4, "init_lora_weights": "loftq"}, 1e-2),
    "adalora": ({"method": "adalora", "init_r": 6, "target_r": 3, "deltaT": 2, "orth_reg_weight": 0.1}, 3e-2),
    "vera": ({"method": "vera", "r": 16}, 1e-1),
    "oft": ({"method": "oft", "oft_block_size": 8}, 1e-2),
    "loha": ({"method": "loha", "r": 4}, 3e-2),
    "lokr": ({"method": "lokr", "r": 4}, 3e-2),
    "bottleneck houlsby": ({"method": "bottleneck", "bottleneck_size": 8}, 1e-2),
    "bottleneck pfeiffer": ({"method": "bottleneck", "bottleneck_size": 8, "variant": "pfeiffer"}, 1e-2),
    "bottleneck parallel": (
        {"method": "bottleneck", "bottleneck_size": 8, "variant": "parallel", "scaling": 4.0}, 1e-2),
    "ia3": ({"method": "ia3"}, 1e-1),
    "prompt_tuning": ({"method": "prompt_tuning", "num_virtual_tokens": 4}, 1e-1),
    "prompt_tuning text": (
        {"method": "prompt_tuning", "num_virtual_tokens": 4, "prompt_tuning_init": "text",
         "prompt_tuning_init_text": "say a number"}, 1e-1),
    "p_tuning MLP": ({"method": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 16}, 3e-2),
    "p_tuning LSTM": (
        {"method": "p_tuning", "num_virtual_tokens": 4, "encoder_hidden_size": 16,
         "encoder_reparameterization_type": "LSTM"}, 3e-2),
    "prefix_tuning": ({"method": "prefix_tuning", "num_virtual_tokens": 4}, 3e-1),
    "prefix_tuning v2": (
        {"method": "prefix_tuning", "num_virtual_tokens": 4, "prefix_projection": True, "encoder_hidden_size": 16},
        3e-2),
    "bitfit": ({"method": "bitfit"}, 1e-1),
    "bitfit all": ({"method": "bitfit", "targets": "all"}, 1e-1),
    "last_layers": ({"method": "last_layers", "num_layers": 1}, 3e-3),
    "last_layers head": ({"method": "last_layers", "num_layers": 1, "head": True}, 3e-3),
    "ln_tuning": ({"method": "ln_tuning"}, 1e-1),
    "full": ({"method": "full"}, 3e-3),
}  # fmt: skip
UNMERGEABLE = ("bottleneck", "prompt_tuning", "p_tuning", "prefix_tuning")


def make_base(family_name: str, folder: Path) -> Path:
    """A random two-layer base on disk; chatglm3 in its original layout."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    path = folder / family_name
    if path.exists():
        return path
    if family_name == "chatglm3":
        shutil.copytree(GLM, path)
        return path
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None,
        "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.1,
    }  # fmt: skip
    if family_name == "llama":
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(path)
    else:
        Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@dataclass
class Cell:
    """What was measured; `refused` when the combination is turned down before anything is loaded."""

    refused: str | None = None
    losses: list[float] = field(default_factory=list)
    reload_diff: float = 0.0
    off_diff: float = 0.0
    batch_equal: bool = False
    resume_equal: bool = False
    declared: bool = False
    merge_diff: float | None = None
    unmerged: str | None = None
    trainable: int = 0


def logits(model: Any, vocabulary: int) -> torch.Tensor:
    ids = torch.arange(40, 60)[None] % vocabulary
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -20:].float()


def run(
    variant: str, base: Path, quantization: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch, steps: int = 8
) -> Cell:
    """Train, save, reload, switch off, generate, resume and merge."""
    section, rate = VARIANTS[variant]
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} {i * 7 % 10}"}]}
        for i in range(64)
    ]
    model_values: dict[str, Any] = {"name": str(base), "dtype": "float32", "sanity_check": False}
    if quantization:
        model_values["quantization"] = quantization
    recipe = folder / "recipe.yaml"
    values = {
        "version": 1,
        "stage": "sft",
        "model": model_values,
        "data": {"train": str(write_rows(folder / "rows.jsonl", rows)), "max_length": 64},
        "adapter": section,
        "train": {
            "max_steps": steps, "save_steps": steps // 2, "effective_batch_size": 8, "learning_rate": rate,
            "logging_steps": 1, "lr_scheduler_type": "constant",
        },
        "output": {"dir": str(folder / "run")},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")

    kept: dict[str, Any] = {}
    finish = session.finish

    def keep_model(recipe: Any, run: Any, model: Any, *rest: Any) -> Any:
        kept["model"] = model
        return finish(recipe, run, model, *rest)

    monkeypatch.setattr(session, "finish", keep_model)
    try:
        done = train(recipe)
    except UserError as error:
        assert not (folder / "run").exists(), "refused before anything is written"
        return Cell(refused=error.lines()[0])
    cell = Cell(losses=[row["loss"] for row in done.read_metrics() if "loss" in row])
    result = json.loads(done.result.read_text())
    cell.declared, cell.trainable = result["trained"]["changed_equals_declared"], result["trainable_parameters"]

    config = ModelConfig.model_validate(model_values)
    vocabulary = read_config(config).get("vocab_size") or 65024
    trained = logits(kept.pop("model"), vocabulary)
    if section["method"] == "full":
        again = loading.load_model(ModelConfig(name=str(done.model), sanity_check=False), torch.float32)
        cell.reload_diff = (logits(again, vocabulary) - trained).abs().max().item()
    else:
        bare = logits(loading.load_model(config, torch.float32), vocabulary)
        again = attach.attach_adapter(loading.load_model(config, torch.float32), done.adapter, config)
        cell.reload_diff = (logits(again, vocabulary) - trained).abs().max().item()
        with again.disable_adapter():
            cell.off_diff = (logits(again, vocabulary) - bare).abs().max().item()
    cell.batch_equal = batched_equals_single(again, config)
    del again
    cell.resume_equal = resumes(recipe, done, steps)
    if section["method"] != "full":
        try:
            # What loftq has made up for is part of the adapter: it belongs to the rounded weights.
            merge.run(str(done.path), str(folder / "merged"), base="dequantized" if variant == "loftq" else "original")
            cell.merge_diff = json.loads((folder / "merged" / "merge.json").read_text())["relative_diff"]
        except UserError as error:
            cell.unmerged = error.lines()[0]
    return cell


def batched_equals_single(model: Any, config: ModelConfig) -> bool:
    """Greedy answers to prompts of different lengths, together and one by one.

    LLM.int8 takes a column out of the product when any row of the batch has an outlier there (Dettmers et al. 2022,
    arXiv:2208.07339, section 3.2): what a row gives depends on its neighbours by design. Without it they are equal.
    """
    for module in model.modules():
        if hasattr(module, "state") and hasattr(module.state, "threshold"):
            module.state.threshold = 0.0
    tokenizer = tokenizers.load_tokenizer(config)
    encoder = make_encoder(tokenizer, family(read_config(config)["model_type"]))
    prompts = [
        encoder.prompt_ids([{"role": "user", "content": text}]) for text in ("say 1", "say 22", "say 4 now", "x")
    ]
    together = generate(model, encoder, prompts, 6, 4)
    return together == [generate(model, encoder, [prompt], 6, 1)[0] for prompt in prompts]


def resumes(recipe: Path, done: Any, steps: int) -> bool:
    """Whether a run that stopped half-way ends with the same weights."""
    folder = done.adapter if done.adapter.exists() else done.model
    whole = tensors(folder)
    done.result.unlink()
    (done.checkpoints / f"checkpoint-{steps}" / "complete").unlink()
    resumed = tensors(train(recipe, resume=True).path / folder.name)
    return whole.keys() == resumed.keys() and all(torch.equal(t, resumed[k]) for k, t in whole.items())


def complaints(variant: str, cell: Cell) -> list[str]:
    """What is wrong with a cell that was not refused."""
    method = VARIANTS[variant][0]["method"]
    found = []
    if not sum(cell.losses[-3:]) / 3 < cell.losses[0]:
        found.append(f"loss {cell.losses}")
    if cell.reload_diff > 1e-4:
        found.append(f"reload differs by {cell.reload_diff:.2g}")
    if cell.off_diff > 0:
        found.append(f"adapter off is not the base: {cell.off_diff:.2g}")
    for name in ("batch_equal", "resume_equal", "declared"):
        if not getattr(cell, name):
            found.append(f"not {name}")
    if (method in UNMERGEABLE) != (cell.unmerged is not None) and variant != "bitfit all":
        found.append(f"merge: {cell.unmerged or cell.merge_diff}")
    return found
