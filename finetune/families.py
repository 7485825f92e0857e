"""Facts about model families, as data: docs/models.md and `ft models list` are made of them. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    name: str
    """What people call it."""
    models: str = ""
    """Published models of this kind."""
    tested: str = ""
    """What the tests do with it: a key of TESTED."""
    note: str = ""
    """What is special."""
    template: str | None = None
    """File under data_templates/chat_templates/ used when the tokenizer has no template."""
    tokenizer: str = ""
    """`sentencepiece`: Llama's kind of tokenizer.model, which is rebuilt where no tokenizer.json stands beside it."""
    positions: str = "rotary"
    """`rotary`, `alibi`, or `learned`: rows of a table, behind whose end there is nothing."""
    left_padding: bool = True
    """Whether padding before the text is invisible. Where it is not, rows of one length are answered together."""
    bias_slots: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Which linear layers' biases its checkpoints can hold: those that all have one when this flag of config.json is
    set; under "" those that always have one."""
    layout: str = ""
    """Row of models/layouts.py: how its checkpoints lie on disk, where that is not as transformers writes them."""

    @property
    def biased(self) -> set[str]:
        """Last names of the layers in `bias_slots`."""
        return {name for group in self.bias_slots.values() for name in group}


TESTED = {
    "base": "the built-in bases tiny-llama and tiny-qwen: pre-trained, fine-tuned, evaluated, merged; and "
    "everything of “random”",
    "golden": "logits, generations, token, chat and label ids recorded from the published code on random checkpoints; "
    "the built-in base tiny-chatglm3, in the original layout: pre-trained, fine-tuned, evaluated, merged",
    "random": "random tiny model: strict loading, LoRA steps with falling loss, save and reload, batched generation "
    "equal to one by one, merge parity; missing, unexpected and misshapen weights refused",
    "shrunk": "random tiny model made of the type's own config: everything of “random”; and other methods, gradient "
    "checkpointing, the trainers' log-probabilities, packing, int8 and int4, `ft sft`, `ft eval` and `ft merge` in a "
    "row; what of it is limited stands in the table of all types",
    "text part": "random tiny model of the whole, of which the text part is loaded, trained, saved and merged",
    "layout": "random tiny checkpoint in the published layout computes bit for bit what its Llama does; missing, "
    "unexpected and misshapen weights refused; the tokenizer gives sentencepiece's ids",
}
"""How a family is tested; which ran with published weights, docs/models.md says. None ran on a GPU."""

SHARED = "all-linear adapters train attention and the shared expert; the other experts stay frozen; int4, no int8"
QKV = ("q_proj", "k_proj", "v_proj")
QWEN2_BIASES = {"": QKV}
GLM_BIASES = {"attention_bias": QKV}
QWEN3_BIASES = {"attention_bias": (*QKV, "o_proj")}
LLAMA_BIASES = {**QWEN3_BIASES, "mlp_bias": ("gate_proj", "up_proj", "down_proj")}
EXPERTS = "all-linear LoRA trains attention, router and every expert (3-D parameters); int4 packs experts, too, no int8"
HYBRID = "linear attention beside full: packing switches itself off"
MAMBA = "packing switches itself off; Mamba's x, dt and out projections stay frozen"
INDEXER = "the indexers, which choose what is attended to, stay frozen"
TEXT_ONLY = "the text part is loaded, trained and merged, what reads images is left out"
WHOLE = "loaded and merged whole; what reads images and sounds stays frozen, and all-linear passes it over"

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LLaMA", "Llama 2, 3, 3.1, 3.2, 3.3; Llama-Chinese, Linly, Chinese-Alpaca, Yi, Vicuna, DeepSeek-LLM", "base",
        tokenizer="sentencepiece", bias_slots=LLAMA_BIASES),
    "qwen2": Family("Qwen", "Qwen1.5, Qwen2, Qwen2.5, QwQ", "base", template="chatml.jinja", bias_slots=QWEN2_BIASES),
    "qwen2_moe": Family("Qwen MoE", "Qwen1.5-MoE, Qwen2-57B-A14B", "random", SHARED, template="chatml.jinja"),
    "qwen3": Family("Qwen", "Qwen3 dense", "random", template="chatml.jinja", bias_slots=QWEN3_BIASES),
    "qwen3_moe": Family(
        "Qwen MoE", "Qwen3-30B-A3B, Qwen3-235B-A22B", "random", EXPERTS, template="chatml.jinja",
        bias_slots=QWEN3_BIASES),
    "chatglm": Family(
        "ChatGLM", "ChatGLM3-6B (8k, 32k, 128k), ChatGLM2-6B, GLM-4-9B, CodeGeeX2 and 4, original layout", "golden",
        "loads into transformers' own Glm network while it is read; ft merge --format chatglm writes it back",
        bias_slots=GLM_BIASES, layout="chatglm"),
    "glm": Family("GLM", "GLM-4-9B-chat-hf", "random", bias_slots=GLM_BIASES),
    "glm4": Family("GLM", "GLM-4-9B-0414, GLM-4-32B-0414, GLM-Z1", "random", bias_slots=GLM_BIASES),
    "mistral": Family("Mistral", "Mistral-7B, Zephyr", "random", tokenizer="sentencepiece"),
    "mixtral": Family("Mixtral", "Mixtral-8x7B", "random", EXPERTS, tokenizer="sentencepiece"),
    "gemma": Family("Gemma", "Gemma 1", "random", template="gemma.jinja"),
    "gemma2": Family("Gemma", "Gemma 2", "random", template="gemma.jinja"),
    "gemma3_text": Family("Gemma", "Gemma 3, text only", "random", template="gemma3.jinja"),
    "phi": Family("Phi", "Phi-1.5, Phi-2", "random"),
    "phi3": Family("Phi", "Phi-3, Phi-3.5, Phi-4", "random", "fused qkv_proj and gate_up_proj"),
    "falcon": Family("Falcon", "Falcon-7B, 40B, 180B", "random"),
    "gpt2": Family(
        "GPT-2", "GPT-2, CPM-like Chinese GPT-2", "random", "learned positions: no rope_scaling", positions="learned"),
    "bloom": Family(
        "BLOOM", "BLOOM, BLOOMZ", "random", "ALiBi: no rope_scaling; packing switches itself off", positions="alibi"),
    "baichuan": Family(
        "Baichuan", "Baichuan-7B, Baichuan2-7B", "layout",
        "fused W_pack split into Llama's q, k and v while it is read, Baichuan2's normalised head folded in; the "
        "tokenizer is rebuilt from tokenizer.model and refused unless its ids are the same",
        tokenizer="sentencepiece", bias_slots=LLAMA_BIASES, layout="baichuan"),
    # --- shrunk: everything that tests/models/test_every_family.py does ---
    "qwen3_next": Family(
        "Qwen MoE", "Qwen3-Next-80B-A3B", "shrunk", HYBRID, template="chatml.jinja"),
    "qwen3_5": Family(
        "Qwen", "Qwen3.5 dense, e.g. Qwen3.5-27B, as it is published: with images", "shrunk", f"{TEXT_ONLY}; {HYBRID}"),
    "qwen3_5_text": Family("Qwen", "Qwen3.5 dense, text only, and what ft merge writes of it", "shrunk", HYBRID),
    "qwen3_5_moe": Family(
        "Qwen MoE", "Qwen3.5-35B-A3B and larger, as they are published: with images", "shrunk",
        f"{TEXT_ONLY}; {HYBRID}"),
    "qwen3_5_moe_text": Family("Qwen MoE", "Qwen3.5 MoE, text only", "shrunk", HYBRID),
    "gemma3": Family("Gemma", "Gemma 3 4B to 27B, as they are published: with images", "shrunk", WHOLE),
    "gemma3n_text": Family("Gemma", "Gemma 3n E2B, E4B, text only", "shrunk", "AltUp's layers stay frozen"),
    "gemma4": Family("Gemma", "Gemma 4, as it is published: with images and sounds", "shrunk", WHOLE),
    "gemma4_text": Family("Gemma", "Gemma 4, text only", "shrunk"),
    "glm4_moe": Family("GLM", "GLM-4.5, GLM-4.5-Air, GLM-4.6", "shrunk"),
    "glm4_moe_lite": Family("GLM", "GLM-4.7-Flash", "shrunk"),
    "glm_moe_dsa": Family("GLM", "GLM-5", "shrunk", INDEXER),
    "gpt_oss": Family("gpt-oss", "gpt-oss-20b, gpt-oss-120b", "shrunk", "packing switches itself off"),
    "deepseek_v2": Family("DeepSeek", "DeepSeek-V2, V2-Lite, DeepSeek-Coder-V2", "shrunk"),
    "deepseek_v3": Family("DeepSeek", "DeepSeek-V3, V3.1, R1", "shrunk"),
    "deepseek_v32": Family("DeepSeek", "DeepSeek-V3.2", "shrunk", INDEXER, left_padding=False),
    "llama4": Family("LLaMA", "Llama 4 Scout, Maverick, as they are published: with images", "shrunk", TEXT_ONLY),
    "llama4_text": Family("LLaMA", "Llama 4, text only", "shrunk"),
    "mistral3": Family(
        "Mistral", "Mistral Small 3.1, 3.2; Ministral 3, as they are published: with images", "text part", TEXT_ONLY),
    "ministral": Family("Mistral", "Ministral-8B-Instruct-2410", "shrunk"),
    "ministral3": Family("Mistral", "Ministral 3, text only", "shrunk"),
    "smollm3": Family("SmolLM", "SmolLM3-3B", "shrunk"),
    "ernie4_5": Family("ERNIE", "ERNIE-4.5-0.3B-PT", "shrunk"),
    "ernie4_5_moe": Family("ERNIE", "ERNIE-4.5-21B-A3B-PT", "shrunk"),
    "hunyuan_v1_dense": Family("Hunyuan", "Hunyuan-0.5B, 1.8B, 4B, 7B-Instruct", "shrunk"),
    "hunyuan_v1_moe": Family("Hunyuan", "Hunyuan-A13B-Instruct", "shrunk"),
    "seed_oss": Family("Seed", "Seed-OSS-36B", "shrunk"),
    "internlm3": Family(
        "InternLM", "InternLM3-8B-Instruct", "shrunk", "loads as Llama, without the code beside it",
        tokenizer="sentencepiece"),
    "minimax_m2": Family("MiniMax", "MiniMax-M2", "shrunk"),
    "olmo2": Family("OLMo", "OLMo 2", "shrunk"),
    "olmo3": Family("OLMo", "Olmo 3", "shrunk"),
    "granite": Family("Granite", "Granite 3.0 to 3.3", "shrunk"),
    "granitemoehybrid": Family("Granite", "Granite 4.0, hybrid and dense", "shrunk", MAMBA),
    "exaone4": Family("EXAONE", "EXAONE-4.0-32B, 1.2B", "shrunk"),
    "cohere2": Family("Cohere", "Command R7B, Command A", "shrunk"),
    "falcon_h1": Family("Falcon", "Falcon-H1", "shrunk", MAMBA),
    "nemotron_h": Family("Nemotron", "Nemotron-H, Nemotron 3 Nano", "shrunk", MAMBA),
    "mamba2": Family("Mamba", "Mamba 2", "shrunk", MAMBA),
    # Not tested; known here for their positions only.
    **{kind: Family(kind, positions="learned")
       for kind in ("opt", "gpt_neo", "gpt_bigcode", "openai-gpt", "biogpt", "xglm", "ctrl")},
    # Recurrent states that padding goes into; caches of sparse attention that choose among it.
    **{kind: Family(kind, left_padding=False)
       for kind in ("rwkv", "recurrent_gemma", "xlnet", "deepseek_v4", "axk2")},
}  # fmt: skip


@cache
def record() -> dict[str, Any]:
    """What tests/models/family_checks.py found last: date, versions, and for each type of transformers {check: what is
    limited or fails}, or {"cannot": why}."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("families_tested.json").read_text(encoding="utf-8"))
    return found


def types_tested() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = record()["types"]
    return found


def verdict(found: Mapping[str, str]) -> str:
    """passes, limits or cannot"""
    return "cannot" if "cannot" in found else "limits" if found else "passes"


@dataclass(frozen=True)
class Refused:
    name: str
    why: str
    instead: str


CHATGLM1 = Refused(
    "ChatGLM-6B (the first one)", "is another network with two-dimensional positions and no native counterpart",
    "use THUDM/chatglm3-6b")  # fmt: skip
GLM1 = Refused(
    "the first GLM generation (GLM-10B, GLM-130B)",
    "fills blanks with two-dimensional positions and has no native counterpart",
    "use THUDM/chatglm3-6b or GLM-4-9B")  # fmt: skip
ENCODER = Refused(
    "BERT, RoBERTa and other encoders", "fill gaps and do not continue text",
    "use a causal model, e.g. Qwen/Qwen2.5-0.5B")  # fmt: skip
SEQ2SEQ = Refused(
    "T5, BART and other encoder-decoders", "read with one network and write with another, recipes describe one",
    "use a causal model, e.g. Qwen/Qwen2.5-0.5B")  # fmt: skip
ALIBI13 = Refused(
    "Baichuan-13B", "has ALiBi positions, which no native network combines with its blocks",
    "use Baichuan2-7B, or a Qwen2.5-14B")  # fmt: skip
BLUELM = Refused(
    "BlueLM",
    "normalises its embeddings, scales RoPE its own way in the 32K models, and brings code of its own for this and for "
    "the tokenizer: no exact native counterpart", "use Qwen/Qwen2.5-7B-Instruct")  # fmt: skip
QWEN1 = Refused(
    "Qwen (the first one)", "needs its own code for attention scaling and tokenizer",
    "use Qwen/Qwen1.5-7B or later, the same network made native")  # fmt: skip
PICTURES = Refused(
    "Llama 3.2 Vision and Emu3", "have text parts that transformers writes as types it cannot read back",
    "use meta-llama/Llama-3.1-8B, or a Qwen3 model")  # fmt: skip
INTERN = Refused("InternLM 1 and 2", "needs its own code for network and tokenizer", "use a Qwen2.5 or Llama model")

REFUSED: dict[str, Refused] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "xlm-roberta-xl", "electra", "albert", "deberta", "deberta-v2", "distilbert",
         "ernie", "modernbert", "camembert", "rembert", "roformer", "roc_bert", "megatron-bert", "big_bird", "xlm",
         "data2vec-text", "mpnet", "nezha", "bert-generation", "roberta-prelayernorm", "xmod"), ENCODER),
    **dict.fromkeys(
        ("t5", "mt5", "umt5", "longt5", "bart", "mbart", "pegasus", "blenderbot", "marian", "led", "prophetnet",
         "m2m_100", "plbart", "t5gemma", "switch_transformers"), SEQ2SEQ),
    "BlueLM": BLUELM, "bluelm": BLUELM, "qwen": QWEN1, "internlm": INTERN, "internlm2": INTERN,
    "mllama": PICTURES, "emu3": PICTURES,
}  # fmt: skip

# Beginnings of a hub id's last part. Only for ids that name a refused model without doubt.
NAMES: dict[str, Refused] = {
    r"chatglm-6b": CHATGLM1, r"visualglm": CHATGLM1, r"glm-130b": GLM1, r"glm-(10b|2b|large|roberta)": GLM1,
    r"baichuan2?-13b": ALIBI13, r"bluelm-": BLUELM, r"qwen-(1_8b|7b|14b|72b)": QWEN1, r"internlm2?(_5)?-": INTERN,
    r"(distil|chinese-)?(bert|roberta|electra|albert|deberta|macbert)-": ENCODER,
    r"(flan-|mengzi-|byt|m|um)?t5-": SEQ2SEQ, r"(chinese-)?bart-": SEQ2SEQ,
}  # fmt: skip


def family(model_type: str) -> Family:
    """A model without a row goes through the same door: own template, no quirks."""
    return FAMILIES.get(model_type, Family(model_type))


def refused(config: Mapping[str, Any]) -> Refused | None:
    """The row of REFUSED that a config.json belongs to."""
    kind = str(config.get("model_type"))
    if kind == "chatglm" and ("position_encoding_2d" in config or "inner_hidden_size" in config):
        return CHATGLM1
    # transformers' own `glm` is GLM-4; the first GLM used the same word.
    if kind == "glm" and ("block_position_encoding" in config or "GLMModel" in (config.get("architectures") or ())):
        return GLM1
    if kind == "baichuan" and not config.get("max_position_embeddings"):  # the 13B's say only model_max_length
        return ALIBI13
    if kind in REFUSED:
        return REFUSED[kind]
    return SEQ2SEQ if config.get("is_encoder_decoder") else None


def refused_name(name: str) -> Refused | None:
    """The same for a hub id, before anything is downloaded."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return next((row for pattern, row in NAMES.items() if re.match(pattern, last)), None)
