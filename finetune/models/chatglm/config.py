"""What an original config.json of ChatGLM2, ChatGLM3 or GLM-4-9B means, as a GlmConfig; everything else is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GlmConfig

from finetune.errors import Problem, UserError
from finetune.models import rope
from finetune.models.weight_files import read_json
from finetune.recipe.sections import ModelConfig, RopeScaling


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint as it is; AutoConfig would ask to run the checkpoint's code."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise UserError("no config.json", path=folder, fix="name the folder that holds the checkpoint")
    return read_json(file)


# key: (the value the native network means, why another is not expressible, what to do)
EXPRESSIBLE: dict[str, tuple[Any, str, str]] = {
    "rmsnorm": (True, "LayerNorm instead of RMSNorm", "no native network exists for it"),
    "add_bias_linear": (False, "biases on every linear layer", "no native network exists for it"),
    "apply_residual_connection_post_layernorm": (
        False, "residuals taken after the norm", "no native network exists for it"),
    "post_layer_norm": (True, "no norm after the last layer", "no native network exists for it"),
    "fp32_residual_connection": (False, "residuals in float32", "set it to false in config.json if that is meant"),
    "original_rope": (True, "another rotary embedding", "no native network exists for it"),
    "hidden_dropout": (0.0, "dropout on the residuals", "set it to 0 in config.json; LoRA has lora_dropout"),
    "pre_seq_len": (None, "a P-Tuning v2 prefix lies in the weights",
                    "load the base checkpoint and train adapter.method: prefix_tuning"),
    "quantization_bit": (0, "weights packed by the vendor's own INT4/INT8",
                         "load the float16 checkpoint (THUDM/chatglm3-6b) with model.quantization: int4"),
    "quantization_config": (None, "quantized weights in the original layout",
                            "load the float16 checkpoint with model.quantization: int4"),
    "tie_word_embeddings": (False, "input and output embeddings tied", "no published checkpoint is; check config.json"),
    "vision_config": (None, "a vision tower (GLM-4V, CogVLM)", "use the text model: THUDM/glm-4-9b-chat"),
}  # fmt: skip
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "padded_vocab_size",
         "seq_length")  # fmt: skip


def glm_network(model: ModelConfig, config: dict[str, Any]) -> GlmConfig:
    """GlmConfig for an original config.json, with `model.rope_scaling`, which may only say what `rope_ratio` means."""
    reading = glm_reading(model.rope_scaling, config)
    found = glm_config(config, model.name, reading)
    if reading is None:
        rope.apply(found, model.rope_scaling, model.name)
    return found


def glm_reading(scaling: RopeScaling | None, config: Mapping[str, Any]) -> str | None:
    """default or linear, when the key says which of its two meanings an original `rope_ratio` has; else None."""
    ratio = float(config.get("rope_ratio") or 1)
    if scaling is None or scaling.rope_type not in ("default", "linear") or scaling.factor not in (None, ratio):
        return None
    return scaling.rope_type if ratio != 1 or scaling.factor is None else None


def glm_config(
    config: Mapping[str, Any], name_or_path: str | Path, rope: str | Mapping[str, Any] | None = None
) -> GlmConfig:
    """GlmConfig for an original config.json.

    `rope` settles what a `rope_ratio` means where the names do not: "default" (a larger base: ChatGLM3, GLM-4) or
    "linear" (interpolated positions: chatglm2-6b-32k), also as `{"rope_type": …}`.

    Raises UserError, all reasons at once, for what GlmForCausalLM cannot express.
    """
    problems = [
        Problem(f"not in config.json, which says model_type {config.get('model_type')!r}", name_or_path, key=key,
                fix="take config.json from the published checkpoint")
        for key in SIZES if config.get(key) is None
    ]  # fmt: skip
    for key, (native, why, fix) in EXPRESSIBLE.items():
        if config.get(key) is not None and bool(config[key]) != bool(native):
            message = f"{config[key]!r} ({why}) cannot be expressed by GlmForCausalLM"
            problems.append(Problem(message, name_or_path, key=key, fix=fix))
    if config.get("multi_query_attention") and not config.get("multi_query_group_num"):
        problems.append(Problem("needed with multi_query_attention: true", name_or_path, key="multi_query_group_num"))
    if problems:
        raise UserError(problems)
    heads = config["num_attention_heads"]
    return GlmConfig(
        vocab_size=config["padded_vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["ffn_hidden_size"],
        num_hidden_layers=config["num_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config["multi_query_group_num"] if config.get("multi_query_attention") else heads,
        head_dim=config["kv_channels"],
        hidden_act="silu",
        attention_dropout=config.get("attention_dropout", 0.0),
        max_position_embeddings=config["seq_length"],
        # GlmConfig's own defaults are GLM-4's: its epsilon alone costs 5e-4 in ChatGLM3's logits.
        rms_norm_eps=config.get("layernorm_epsilon", 1e-5),
        attention_bias=bool(config.get("add_qkv_bias")),
        tie_word_embeddings=False,
        rope_parameters=rope_parameters(config, name_or_path, rope),
        pad_token_id=0 if config.get("pad_token_id") is None else config["pad_token_id"],
        eos_token_id=2 if config.get("eos_token_id") is None else config["eos_token_id"],
        bos_token_id=None,
    )


def rope_parameters(
    config: Mapping[str, Any], name_or_path: str | Path, rope: str | Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `rope_ratio` means: ChatGLM3 and GLM-4 multiply the base, chatglm2-6b-32k divides positions."""
    ratio = float(config.get("rope_ratio") or 1)
    kind = rope.get("rope_type") if isinstance(rope, Mapping) else rope
    if kind is None and ratio != 1:
        kind = _rope_kind(config, name_or_path)
    if kind not in (None, "default", "linear"):
        raise UserError(f"{kind!r} is neither default nor linear", path=name_or_path, key="model.rope_scaling")
    if kind == "linear":
        return {"rope_type": "linear", "factor": ratio, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return {"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5}


def _rope_kind(config: Mapping[str, Any], name_or_path: str | Path) -> str:
    """The two readings of rope_ratio look the same in config.json; only the names tell them apart."""
    version = version_in(config.get("_name_or_path"), Path(name_or_path).name, name_or_path)
    if version is not None:
        return "linear" if version == 2 else "default"
    raise UserError(
        f"{config['rope_ratio']} is a larger RoPE base in ChatGLM3 and GLM-4 but interpolates positions in ChatGLM2, "
        "and neither `_name_or_path` nor the folder's name says which one this is",
        path=name_or_path, key="rope_ratio",
        fix="set model.rope_scaling to {rope_type: default} (ChatGLM3, GLM-4) or {rope_type: linear} (ChatGLM2)",
    )  # fmt: skip


WORDS = {2: ("chatglm2", "codegeex2"), 3: ("chatglm3",), 4: ("glm4", "codegeex4")}


def version_in(*names: object) -> int | None:
    """2, 3 or 4: what the first telling name says; one that names several says nothing."""
    for name in names:
        plain = str(name or "").lower().replace("-", "").replace("_", "")
        found = [version for version, words in WORDS.items() if any(word in plain for word in words)]
        if len(found) == 1:
            return found[0]
    return None
