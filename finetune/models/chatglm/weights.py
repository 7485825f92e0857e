"""ChatGLM2, ChatGLM3 and GLM-4-9B checkpoints in their original layout, loaded into transformers' own GlmForCausalLM.

Weights are renamed and split while they are read; nothing is converted on disk. The published checkpoints bring Python
code that current transformers cannot run; it is never run here. The network is the one transformers ships for GLM-4:
same blocks, same interleaved RoPE over half of each head, other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import GlmConfig, GlmForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.utils import cached_file

from finetune import hub
from finetune.errors import Problem, UserError
from finetune.models import sources
from finetune.models.chatglm.config import EXPRESSIBLE, glm_config, read_config
from finetune.models.weight_files import check_file, shapes, weight_files
from finetune.recipe.sections import ModelConfig

# Original name -> native name. The first four are beginnings of a weight's name, the others lie inside a layer.
PREFIXES = {
    "transformer.embedding.word_embeddings.": "model.embed_tokens.",
    "transformer.encoder.final_layernorm.": "model.norm.",
    "transformer.output_layer.": "lm_head.",
    "transformer.encoder.layers.": "model.layers.",
}
INNER = {
    ".self_attention.dense.": ".self_attn.o_proj.",
    ".mlp.dense_h_to_4h.": ".mlp.gate_up_proj.",
    ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
}
FUSED = ".self_attention.query_key_value."
SPLIT = (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")
INV_FREQ = "transformer.rotary_pos_emb.inv_freq"


@dataclass(frozen=True)
class Fused:
    """Rows of a fused query_key_value tensor: all of q, then k, then v, or per head [q, k, v] (`interleaved`).

    Works on anything whose first dimension is the fused rows: weight, bias, LoRA's B, DoRA's magnitudes.
    """

    heads: int
    groups: int
    head_dim: int
    interleaved: bool = False
    """`multi_query_attention: false`; a plain split would be silently wrong."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Fused:
        """From an original config.json."""
        heads, shared = config["num_attention_heads"], bool(config.get("multi_query_attention"))
        groups = config["multi_query_group_num"] if shared else heads
        return cls(heads, groups, config["kv_channels"], interleaved=not shared)

    @property
    def rows(self) -> tuple[int, int, int]:
        return self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim

    def split(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[q+k+v rows, …] -> q, k, v."""
        if fused.shape[0] != sum(self.rows):
            raise UserError(f"query_key_value has {fused.shape[0]} rows, config.json means {sum(self.rows)}")
        if self.interleaved:
            per_head = fused.reshape(self.heads, 3, self.head_dim, *fused.shape[1:])
            q, k, v = (part.reshape(self.rows[0], *fused.shape[1:]) for part in per_head.unbind(1))
        else:
            q, k, v = fused.split(self.rows)
        return q.contiguous(), k.contiguous(), v.contiguous()

    def join(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v -> [q+k+v rows, …], the inverse of `split`."""
        if not self.interleaved:
            return torch.cat([q, k, v])
        parts = [x.reshape(self.heads, self.head_dim, *x.shape[1:]) for x in (q, k, v)]
        return torch.stack(parts, 1).reshape(sum(self.rows), *q.shape[1:])


def fetch(name: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: a folder as it is, a hub id downloaded (or found in the cache when offline).

    Of the two kinds of weights that the published repositories hold only safetensors are fetched where there are any.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        index = [
            cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
            for file in ("model.safetensors.index.json", "model.safetensors")
        ]
        weights = "*.safetensors" if any(index) else "*.bin"
        files = ["*.json", "*.py", "tokenizer.model", weights]  # the Python is for exports, it is never run
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files))
    except OSError as error:
        what, fix = hub.why(error)
        raise UserError(what, path=name, key="model.name", fix=fix) from None


def load_original_weights(model: ModelConfig, network: GlmConfig, **options: Any) -> Any:
    """As `load`, from wherever the base lies."""
    return load(fetch(sources.weights(model), sources.hub_revision(model)), network, **options)


def load(
    folder: str | Path, config: GlmConfig | None = None, *, dtype: torch.dtype | str = "auto", **from_pretrained: Any
) -> Any:
    """The checkpoint in `folder` (safetensors, or sharded .bin read with weights_only) as a stock GlmForCausalLM.

    quantization_config, device_map, attn_implementation … go to `from_pretrained`.

    Raises UserError when weights are missing, left over or of another shape, before the network is built.
    """
    source = read_config(folder)
    config = config or glm_config(source, folder)
    fused = Fused.of(source)
    check_weights(folder, config, fused)
    loading: Any = type("OriginalGlmForCausalLM", (GlmForCausalLM,), {
        "__module__": __name__, "_keys_to_ignore_on_load_unexpected": [r"rotary_pos_emb\.inv_freq$"],
    })  # fmt: skip
    register_checkpoint_conversion_mapping(loading.__name__, conversion(fused), overwrite=True)
    model, info = loading.from_pretrained(
        str(folder), config=config, dtype=dtype, weights_only=True, output_loading_info=True, **from_pretrained
    )
    if wrong := {*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]}:
        raise UserError(f"weights that did not arrive: {', '.join(map(str, sorted(wrong, key=str)))}", path=folder)
    # Stock from here on. Otherwise save_pretrained would write the original names under `model_type: glm`, which stock
    # transformers loads as random weights (save_original_format is on by default and replays `_weight_conversions`).
    model.__class__ = GlmForCausalLM
    del model._weight_conversions
    return model


class _SplitFused(ConversionOps):
    """Fused rows -> q, k, v, for transformers' loader."""

    def __init__(self, fused: Fused):
        self.fused = fused

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        [tensor] = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        return dict(zip(target_patterns, self.fused.split(tensor), strict=True))


def conversion(fused: Fused) -> list[WeightRenaming | WeightConverter]:
    """The layout as rules for transformers' loader."""
    rules = [WeightRenaming("^" + old.replace(".", r"\."), new) for old, new in PREFIXES.items()]
    rules += [WeightRenaming(old.replace(".", r"\."), new) for old, new in INNER.items()]
    return [*rules, WeightConverter(FUSED.strip("."), [name.strip(".") for name in SPLIT], [_SplitFused(fused)])]


def original_shapes(config: GlmConfig, fused: Fused) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight in the original layout (without inv_freq, which is derived)."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attention.query_key_value.weight": (sum(fused.rows), hidden),
        "self_attention.dense.weight": (hidden, fused.rows[0]),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.dense_h_to_4h.weight": (2 * inner, hidden),
        "mlp.dense_4h_to_h.weight": (hidden, inner),
    }
    if config.attention_bias:
        layer["self_attention.query_key_value.bias"] = (sum(fused.rows),)
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"transformer.encoder.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["transformer.encoder.final_layernorm.weight"] = (hidden,)
    shapes["transformer.output_layer.weight"] = (vocab, hidden)
    return shapes


def check_weights(folder: str | Path, config: GlmConfig, fused: Fused) -> None:
    """UserError unless the files hold exactly the weights that config.json means.

    Only names and shapes are read. Needed beside transformers' own report: that one does not compare the shapes of
    weights that are quantized while loading.
    """
    wanted, found = original_shapes(config, fused), stored_shapes(folder)
    problems = [Problem("missing weight", folder, key=name) for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted and not name.endswith("rotary_pos_emb.inv_freq")]
    fix = None
    if any(name.endswith("weight_scale") for name in extra):
        fix = EXPRESSIBLE["quantization_bit"][2]
    elif any("prefix_encoder" in name for name in extra):
        fix = EXPRESSIBLE["pre_seq_len"][2]
    problems += [Problem("unexpected weight", folder, key=name, fix=fix) for name in extra]
    problems += [
        Problem(f"shape {found[name]}, config.json means {shape}", folder, key=name)
        for name, shape in wanted.items() if name in found and found[name] != shape
    ]  # fmt: skip
    if problems:
        raise UserError(problems)


def stored_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored weight, from headers only; pickles are read with weights_only."""
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        check_file(file)
        found |= shapes(file)
    return found
