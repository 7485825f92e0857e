"""What some families have that others have not: layers that adapters pass over, parts that read images, scores of their
own, states that padding reaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families_tiny as tiny
import family_checks
import pytest
import torch
from conftest import ft, make_tokenizer, train, write_rows
from family_checks import Checkpoint
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from finetune.adapters import targets
from finetune.adapters.load import apply
from finetune.adapters.methods import sees_padding
from finetune.data import conversations
from finetune.errors import UserError
from finetune.evaluation.generation import generate
from finetune.evaluation.likelihood import negative_log_likelihoods
from finetune.models import native
from finetune.recipe.adapters import BitFitAdapter, FullAdapter, Ia3Adapter, LnTuningAdapter, LoraAdapter
from finetune.recipe.sections import DataConfig, ModelConfig
from finetune.training import loss_parts


def network(kind: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny.shrunk(kind))


PASSED = {
    "mamba2": ("out_proj", "in_proj"), "jamba": ("dt_proj", "in_proj"), "falcon_h1": ("mamba.out_proj", "o_proj"),
    "glm_moe_dsa": ("indexer.wk", "kv_b_proj"), "llama4_text": ("router", "q_proj"),
    "gemma3": ("vision_tower.encoder.layers.0.mlp.fc1", "language_model.layers.0.mlp.up_proj"),
    "gemma3n_text": ("altup.correction_coefs", "up_proj"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PASSED)
def test_all_linear_leaves_out_what_an_adapter_would_be_passed_over_on(kind: str) -> None:
    out, within = PASSED[kind]
    model = network(kind)
    trained = {
        n.rpartition(".lora_")[0] for n, p in apply(model, LoraAdapter(r=2)).named_parameters() if p.requires_grad
    }
    assert any(name.endswith(within) for name in trained)
    assert not any(name.endswith(out) for name in trained)
    with pytest.raises(UserError, match=r"passed over|no module that text goes through"):
        apply(network(kind), LoraAdapter(r=2, target_modules=[out]))


EVERY_WAY: dict[str, Any] = {
    "lora": LoraAdapter(r=2, target_modules=["q_proj", "v_proj"]), "pattern": LoraAdapter(target_modules=".*q_proj"),
    "ia3": Ia3Adapter(), "ln_tuning": LnTuningAdapter(), "bitfit": BitFitAdapter(bias="add", targets="all"),
    "full": FullAdapter(),
}  # fmt: skip


@pytest.mark.parametrize("way", EVERY_WAY)
def test_what_reads_images_stays_frozen(way: str) -> None:
    """Its layers have the names of the text's; no text reaches them, and a run stops where no gradient does."""
    trained = [n for n, p in apply(network("gemma3"), EVERY_WAY[way]).named_parameters() if p.requires_grad]
    assert trained
    assert [name for name in trained if "language_model" not in name and "lm_head" not in name] == []


@pytest.mark.parametrize("kind", ["gemma4", "gemma4_text", "gemma3n_text", "modernbert-decoder", "bloom"])
def test_the_norm_after_the_last_block(kind: str) -> None:
    """Gemma's norm of the per-layer embeddings, which are what goes in, is registered after it."""
    assert targets.final_norm(network(kind)).endswith((".norm", ".final_norm", ".ln_f"))


def test_a_pattern_stands_for_every_layer() -> None:
    assert targets.as_pattern(["a.layers.0.b", "a.layers.12.b"]) == r"a\.layers\.\d+\.b"


def test_blocks_are_those_of_the_text() -> None:
    assert targets.blocks(network("gemma3"))[0][0] == "model.language_model.layers.0"


@pytest.mark.parametrize("kind", ["llama4", "mistral3"])
def test_the_text_part_of_a_larger_model(kind: str, tmp_path: Path) -> None:
    """The same logits as the whole gives; what reads images is not there, and any other stray weight is an error."""
    whole = AutoModelForImageTextToText.from_config(tiny.shrunk(kind), dtype=torch.float32)
    whole.save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    checkpoint = Checkpoint(tmp_path / "whole")
    text, ids = checkpoint.load(), torch.arange(3, 40)[None]
    assert not any("vision" in name or "projector" in name for name, _ in text.named_parameters())
    with torch.inference_mode():
        assert torch.allclose(text(input_ids=ids).logits, whole.eval()(input_ids=ids).logits, atol=1e-5)
    family_checks.learns(checkpoint)
    with pytest.raises(UserError, match="unexpected"):
        Checkpoint(family_checks.damaged(checkpoint.folder, tmp_path / "damaged", "unexpected")).load()


def test_what_is_merged_from_a_text_part_is_a_text_model(tmp_path: Path) -> None:
    AutoModelForImageTextToText.from_config(tiny.shrunk("mistral3")).save_pretrained(tmp_path / "whole")
    make_tokenizer().save_pretrained(tmp_path / "whole")
    family_checks.runs(Checkpoint(tmp_path / "whole"))
    model = Checkpoint(tmp_path / "whole").load()
    model.save_pretrained(tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "mistral"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)[1]["missing_keys"] == set()


def test_what_reads_no_text_is_still_refused() -> None:
    with pytest.raises(UserError, match="no language model"):
        native.check(ModelConfig(name="m"), {"model_type": "vit", "text_config": {"model_type": "bert_x"}})


@pytest.mark.parametrize(("kind", "own"), [("llama", True), ("granite", True), ("modernbert-decoder", False)])
def test_scores_of_their_own(kind: str, own: bool, tmp_path: Path) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = Checkpoint(tiny.write_config(tmp_path / kind, tiny.shrunk(kind))).load()
    add_fused_lm_head(model)
    assert loss_parts.scores_are_its_own(model) is own


def test_then_sft_takes_the_loss_from_the_logits(tmp_path: Path, recipe: Any) -> None:
    """All 64 rows in one step that changes nothing: the loss is that of the evaluation, which reads the logits."""
    base = tiny.write_config(tmp_path / "base", tiny.shrunk("modernbert-decoder"))
    asked = {"max_steps": 1, "learning_rate": 1e-12, "effective_batch_size": 64}
    run = train(recipe(model={"name": str(base)}, train=asked))
    (trained,) = [row["loss"] for row in run.read_metrics() if "loss" in row]
    rows = conversations.load_sft(
        DataConfig(train=str(tmp_path / "rows.jsonl"), max_length=64), Checkpoint(base).base.encoder, seed=0
    ).train
    model = Checkpoint(base).load()
    scored = negative_log_likelihoods(model, [*zip(rows["input_ids"], rows["labels"], strict=True)], 0, 64)
    assert trained == pytest.approx(sum(row.total for row in scored) / sum(row.tokens for row in scored), rel=1e-4)


def test_and_dpo_refuses(tmp_path: Path) -> None:
    base = tiny.write_config(tmp_path / "base", tiny.shrunk("modernbert-decoder"))
    pairs = [{"prompt": f"say {i}", "chosen": f"{i}", "rejected": "no"} for i in range(8)]
    settings = {
        "version": 1,
        "stage": "dpo",
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(write_rows(tmp_path / "pairs.jsonl", pairs)), "max_length": 64},
        "train": {"max_steps": 1},
        "output": {"dir": str(tmp_path / "dpo")},
    }
    (tmp_path / "dpo.yaml").write_text(json.dumps(settings))
    refused = ft("dpo", "--recipe", tmp_path / "dpo.yaml")
    assert refused.returncode == 2
    assert "trl computes other log-probabilities for modernbert-decoder" in refused.stderr


@pytest.mark.parametrize(("kind", "balanced"), [("llama", True), ("qwen3_moe", True), ("granitemoe", False)])
def test_balancing_loss_where_trl_can_compute_it(kind: str, balanced: bool) -> None:
    model = AutoModelForCausalLM.from_config(tiny.shrunk(kind), dtype=torch.float32)
    assert loss_parts.balances(model) is balanced


def test_gradient_checkpointing_that_is_not_there_is_refused_by_name(tmp_path: Path, recipe: Any) -> None:
    base = tiny.write_config(tmp_path / "base", tiny.shrunk("openai-gpt"))
    asked = {"max_steps": 1, "gradient_checkpointing": True}
    refused = ft("sft", "--recipe", recipe(model={"name": str(base)}, train=asked))
    assert refused.returncode == 2
    assert "train.gradient_checkpointing: transformers cannot recompute" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_padding_that_is_seen_is_not_there(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.write_config(tmp_path / "rwkv", tiny.shrunk("rwkv")))
    assert sees_padding(checkpoint.load())
    assert not sees_padding(network("llama"))
    with pytest.raises(AssertionError, match="logits differ"):
        family_checks.pads(checkpoint)
    model, encoder = checkpoint.load(), checkpoint.base.encoder
    together, alone = (generate(model, encoder, checkpoint.samples, max_new_tokens=12, batch_size=n) for n in (4, 1))
    assert together == alone
