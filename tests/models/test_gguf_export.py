"""Models and adapters as GGUF files, read by transformers and by llama.cpp itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import adapter, ft, write_rows
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from finetune.errors import Interrupted, RunError, UserError
from finetune.resources import BUILTIN_MODELS

gguf = pytest.importorskip("gguf")
from gguf_tiny import prompt_of, said  # noqa: E402

from finetune.models.gguf import export, layout, vocabulary  # noqa: E402
from finetune.models.gguf.adapter import write_adapter  # noqa: E402
from finetune.models.gguf.conversion import read  # noqa: E402
from finetune.models.gguf.export import portable, write_model  # noqa: E402
from finetune.models.gguf.header import read_header  # noqa: E402

TINY = BUILTIN_MODELS / "tiny-llama"
SHAPE: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
ROPE: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        "attention_factor": 1.3,
    },
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
NETWORKS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama untied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": False, "rope_parameters": ROPE["plain"]}),
    "llama linear": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": ROPE["linear"]}),
    "llama yarn": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": ROPE["yarn"]}),
    "llama 3": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True, "rope_parameters": ROPE["llama3"]}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"hidden_size": 128, "vocab_size": 1040, "tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"tie_word_embeddings": True, "rope_parameters": ROPE["plain"]}),
    "gemma3": (
        Gemma3ForCausalLM, Gemma3TextConfig,
        {"num_hidden_layers": 7, "query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def folder_of(name: str, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random network, norms and biases included, with the built-in tokenizer."""
    kind, config, more = NETWORKS[name]
    torch.manual_seed(0)
    model = kind(config(**SHAPE | more)).to(dtype)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.normal_(0, 0.2).add_(0 if "gemma" in name or key.endswith("bias") else 1)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(out)
    return out


def ours(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def theirs(path: Path, ids: list[int], **options: Any) -> torch.Tensor:
    """llama.cpp's logits, with keys and values kept in float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    more = {"logits_all": True, "type_k": 0, "type_v": 0, "verbose": False, **options}
    model = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, **more)
    model.eval(ids)
    return torch.tensor(np.array(model.scores[: len(ids)]))


IDS = torch.randint(4, 1000, (150,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize("name", NETWORKS)
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    """Largest difference of a logit seen here: 1e-4 of logits up to 10, for Gemma 4e-3: llama.cpp's GELU is a table in
    float16. docs/gguf.md has the table."""
    folder = folder_of(name, tmp_path / "model")
    written = write_model(folder, tmp_path / "x.gguf", "f32")
    assert written.error == 0
    header = read_header(tmp_path / "x.gguf")
    assert ("output.weight" in header.tensors) == (name == "llama untied")
    assert header.get("attention.key_length") == 32
    torch.testing.assert_close(ours(folder, IDS), theirs(tmp_path / "x.gguf", IDS), atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_precision(kind: str, tmp_path: Path) -> None:
    """Vectors stay float32; rows that are no whole number of blocks are not quantized; the rounding is told."""
    folder = folder_of("qwen3", tmp_path / "model", torch.bfloat16)
    written = write_model(folder, tmp_path / "x.gguf", kind)
    header = read_header(tmp_path / "x.gguf")
    assert all(stored == 0 for shape, stored, _ in header.tensors.values() if len(shape) == 1)
    assert header.kinds == {int(gguf.GGMLQuantizationType[kind.upper()])}
    assert (written.error > 0) == (kind == "q8_0")
    limit = {"f16": 0.02, "bf16": 0.2, "q8_0": 0.9}[kind]
    off = (ours(folder, IDS) - theirs(tmp_path / "x.gguf", IDS)).abs().mean()
    assert off < limit, f"a logit differs by {off:.3g} in the mean"
    assert export.stored_as((8, 40), "q8_0") == "F16"


def test_a_number_too_large_for_f16(tmp_path: Path) -> None:
    folder = folder_of("qwen3", tmp_path / "model", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="numbers that f16 has no place for → use bf16 or f32"):
        write_model(folder, tmp_path / "x.gguf", "f16")


def test_a_file_of_another_model_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks there first, whatever folder it is given."""
    monkeypatch.chdir(tmp_path)
    write_model(folder_of("llama untied", tmp_path / "one"), tmp_path / "model.gguf", "f32")
    other = folder_of("llama linear", tmp_path / "two")
    write_model(other, tmp_path / "x.gguf", "f32")
    network, _ = read(read_header(tmp_path / "x.gguf"))
    wanted = AutoModelForCausalLM.from_pretrained(other).state_dict()
    for name, weight in network.state_dict().items():
        assert torch.equal(weight, wanted[name])


def test_what_is_written_wrong_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("llama untied", tmp_path / "model")
    monkeypatch.setattr(layout, "side_by_side", lambda weight, heads: weight)
    with pytest.raises(UserError, match=r"[qk]_proj.weight does not come back from the GGUF file as it was"):
        write_model(folder, tmp_path / "x.gguf", "f32")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "is a mistral, and GGUF files are written of llama, qwen2, qwen3, gemma3_text"),
        ({"attention_bias": True}, "biases on attention"),
        ({"mlp_bias": True}, "biases on the feed-forward part"),
        ({"hidden_act": "gelu"}, "the activation gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "by dynamic"),
        ({"rope_parameters": {**ROPE["yarn"], "beta_fast": 16.0}}, "by yarn with beta_fast"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "holds quantized weights"),
    ],
)
def test_refused_before_weights_are_read(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=words):
        export.check_folder(folder, "f32", folder)


def test_a_tokenizer_that_llama_cpp_cannot_follow(tmp_path: Path) -> None:
    made = json.loads((TINY / "tokenizer.json").read_text())
    plain = {**made, "normalizer": {"type": "Lowercase"}}
    with pytest.raises(UserError, match="changes text before it reads it"):
        vocabulary.rule_of(plain, tmp_path)
    other = Tokenizer.from_str(json.dumps(made))
    halves = [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    other.pre_tokenizer = pre_tokenizers.Sequence(halves)
    with pytest.raises(UserError, match="cuts text into words as no rule of"):
        vocabulary.rule_of(json.loads(other.to_str()), tmp_path)
    made["added_tokens"][1]["lstrip"] = True
    with pytest.raises(UserError, match="takes the white space beside it"):
        vocabulary.check_added(made["added_tokens"], tmp_path)


def test_the_tags_of_training_are_taken_out() -> None:
    import jinja2

    text = "a {%- generation -%} b {%+ endgeneration %} c"
    assert portable(text) == "a {%- if true -%} b {%+ endif %} c"
    assert jinja2.Environment().from_string(portable(text)).render() == "ab  c"


def lora(folder: Path, out: Path, **more: Any) -> tuple[Path, Any]:
    """A random adapter of peft's, and the network with it."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]} | more
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.05)
    adapted.save_pretrained(out, save_embedding_layers=False)
    return out, adapted


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama untied", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 2}}),
        ("gemma3", {"use_rslora": True}),
    ],
)
def test_an_adapter_in_llama_cpp(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """With --lora on the base's file: what peft computes."""
    folder = folder_of(name, tmp_path / "model")
    adapter, adapted = lora(folder, tmp_path / "adapter", **more)
    write_model(folder, tmp_path / "base.gguf", "f32")
    assert write_adapter(adapter, folder, tmp_path / "lora.gguf") == (28 if name == "gemma3" else 8)
    with torch.no_grad():
        wanted = adapted(torch.tensor([IDS])).logits[0]
    found = theirs(tmp_path / "base.gguf", IDS, lora_path=str(tmp_path / "lora.gguf"))
    torch.testing.assert_close(wanted, found, atol=5e-3, rtol=1e-3)
    assert (wanted - ours(folder, IDS)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"use_dora": True}, "is DoRA"),
        ({"modules_to_save": ["lm_head"]}, "trains whole modules"),
        ({"bias": "all"}, "trains biases"),
        (
            {"target_modules": ["embed_tokens"]},
            "embed_tokens.*, and llama.cpp|embed_tokens.*which llama.cpp has no place for",
        ),
    ],
)
def test_adapters_that_llama_cpp_refuses(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = folder_of("llama untied", tmp_path / "model")
    adapter, _ = lora(folder, tmp_path / "adapter", **more)
    with pytest.raises(UserError, match=words):
        write_adapter(adapter, folder, tmp_path / "lora.gguf")


QUESTIONS = [f"{word} {n}" for n, word in enumerate(["Say", "Count to", "What is", "订单", "Name"])]


def test_merge_for_ollama(tmp_path: Path, recipe: Any) -> None:
    """Trained, merged, written: llama.cpp gives the greedy answers that transformers gives of base and adapter."""
    from peft import PeftModel

    llama_cpp = pytest.importorskip("llama_cpp")
    rows = [{"prompt": question, "completion": f"answer {n}"} for n, question in enumerate(QUESTIONS)]
    data = write_rows(tmp_path / "r.jsonl", rows)
    made = recipe(
        model={"name": "tiny-llama", "sanity_check": False}, data={"train": str(data)}, train={"max_steps": 4}
    )
    assert ft("sft", "--recipe", made).returncode == 0
    target = tmp_path / "mine.gguf"
    done = ft(
        "merge", tmp_path / "run", "--output", target, "--format", "gguf", "--gguf-type", "f32", "--dtype", "float32"
    )
    assert done.returncode == 0, done.stderr
    assert "proven: transformers reads all" in done.stderr
    assert not [line for line in done.stderr.splitlines() if line.startswith("next") and ".part" in line]
    assert (tmp_path / "mine.Modelfile").read_text().count("FROM ./mine.gguf\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir() if "part" in p.name) == []
    again = ft("merge", tmp_path / "run", "--output", target, "--format", "gguf")
    assert again.returncode == 2
    assert "exists → choose another name, or --overwrite" in again.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "run" / "adapter")).eval()
    other = llama_cpp.Llama(str(target), n_ctx=512, n_threads=1, verbose=False, type_k=0, type_v=0)
    for question in QUESTIONS:
        here, there = said(model, tokenizer, other, prompt_of(tokenizer, other, question), 12)
        assert here == there


def test_files_of_others_stay(tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(b"mine")
    for more in ((), ("--overwrite",)):
        done = ft("merge", "--model", "tiny-llama", "--output", target, "--format", "gguf", *more)
        assert done.returncode == 2
        assert "exists, and is nothing that ft wrote" in done.stderr
    assert target.read_bytes() == b"mine"
    target.unlink()
    (tmp_path / "x.Modelfile").write_text("FROM llama3\n")
    done = ft("merge", "--model", "tiny-llama", "--output", target, "--format", "gguf", "--gguf-type", "q3")
    assert "x.Modelfile" in done.stderr
    assert "unknown type 'q3' → one of f32, f16, bf16, q8_0" in done.stderr
    assert "is no name of a GGUF file" in ft("merge", "--model", "tiny-llama", "-o", "x", "--format", "gguf").stderr


@pytest.mark.parametrize(("code", "error"), [(130, Interrupted), (1, RunError), (2, UserError)])
def test_a_merge_that_does_not_end_leaves_nothing(
    code: int, error: type[Exception], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what an earlier one left that was killed is gone: gigabytes, under a name that nobody looks for."""
    from finetune import child, places
    from finetune.commands import gguf as command

    made = adapter(base, tmp_path / "adapter", 0)
    left = tmp_path / "x.gguf.part"
    left.mkdir()
    for name in (places.UNFINISHED, "x.gguf", "merged"):
        (left / name).write_text("of one that was killed")

    def ends(*words: str, **_: Any) -> tuple[int, str]:
        assert [path.name for path in left.iterdir()] == [places.UNFINISHED]
        with (
            pytest.raises(UserError, match="another process is writing here"),
            places.unfinished(tmp_path / "x.gguf", ""),
        ):
            pass
        return code, ""

    monkeypatch.setattr(child, "run", ends)
    with pytest.raises(error):
        command.run(str(made), str(tmp_path / "x.gguf"), kind="f32")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    left.mkdir()
    (left / "mine").write_text("a user's")
    with pytest.raises(UserError, match="is in the way, and is nothing that ft wrote"):
        command.run(str(made), str(tmp_path / "x.gguf"), kind="f32")
    assert (left / "mine").read_text() == "a user's"
