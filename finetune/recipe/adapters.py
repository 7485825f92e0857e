"""The `adapter` section: one strict class per PEFT method, a union on `method`. No torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field

from finetune.recipe.sections import Count, Names, OptionalNames, Section


class AdapterSection(Section):
    trains: ClassVar[Literal["matrices", "vectors", "both"]] = "both"
    """What the method makes: muon is for matrices, and only they decay."""


class FullAdapter(AdapterSection):
    method: Literal["full"] = "full"
    """Train every weight; the run writes model/ instead of adapter/."""


class TargetedAdapter(AdapterSection):
    target_modules: Annotated[str | list[str], Names] = "all-linear"
    """Module names (one, or a list), a regular expression for full names, or all-linear (every linear layer but the
    output head, and those that would pass an adapter over: docs/models.md)."""
    modules_to_save: Annotated[list[str] | None, OptionalNames] = None
    """Further modules that are trained and saved whole."""


class LoraAdapter(TargetedAdapter):
    trains = "matrices"
    method: Literal["lora"] = "lora"
    """Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685)."""
    r: Count = 16
    """Rank of the update."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the update is multiplied by lora_alpha / r (by lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    use_rslora: bool = False
    """Rank-stabilised scale (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353)."""
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"] = "default"
    """Start of A and B. pissa (arXiv:2404.02948) and olora (arXiv:2406.01775) take A and B out of the base's weights;
    the saved adapter is plain LoRA for the base as it was. loftq (arXiv:2310.08659) makes up for the rounding of int4.
    default, gaussian and orthogonal start as the base."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns this many times faster than A; 16 is usual."""


class AdaLoraAdapter(TargetedAdapter):
    trains = "matrices"
    method: Literal["adalora"] = "adalora"
    """Ranks shared out by importance while training (Zhang et al. 2023, arXiv:2303.10512)."""
    init_r: Count = 12
    """Rank of every layer at first."""
    target_r: Count = 8
    """Mean rank in the end."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    """Scale of the update."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    tinit: Annotated[float, Field(ge=0)] = 0.1
    """Steps before the first cut: a number, or below 1 a fraction of all steps."""
    tfinal: Annotated[float, Field(ge=0)] = 0.3
    """Steps at the end with the final ranks: a number, or below 1 a fraction of all steps."""
    deltaT: Count = 10
    """Steps between cuts."""
    orth_reg_weight: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the penalty that keeps the singular vectors orthogonal."""


class VeraAdapter(TargetedAdapter):
    trains = "vectors"
    method: Literal["vera"] = "vera"
    """Two vectors per layer around random matrices that all layers share (Kopiczko et al. 2023, arXiv:2310.11454)."""
    r: Count = 256
    """Rank of the shared matrices."""
    vera_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    d_initial: Annotated[float, Field(gt=0)] = 0.1
    """First value of the vector between the matrices."""
    projection_prng_key: Annotated[int, Field(ge=0)] = 0
    """Seed of the shared matrices."""


class OftAdapter(TargetedAdapter):
    trains = "matrices"
    method: Literal["oft"] = "oft"
    """Weights rotated in blocks (Qiu et al. 2023, arXiv:2306.07280)."""
    oft_block_size: Count = 32
    """Size of a block; must divide the layers' input sizes."""
    module_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of blocks left as they are in a training step."""


class LohaAdapter(TargetedAdapter):
    trains = "matrices"
    method: Literal["loha"] = "loha"
    """Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2022, arXiv:2108.06098)."""
    r: Count = 8
    """Rank of each factor."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale: the update is multiplied by alpha / r."""
    module_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of layers left out in a training step."""


class LokrAdapter(TargetedAdapter):
    trains = "matrices"
    method: Literal["lokr"] = "lokr"
    """Kronecker product (Edalati et al. 2022, arXiv:2212.10650; as in LyCORIS, arXiv:2309.14859)."""
    r: Count = 8
    """Rank of the larger factor."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale: the update is multiplied by alpha / r."""
    decompose_factor: Annotated[int, Field(ge=-1)] = -1
    """Size of the smaller factor; -1: as near to the square root as divides."""
    module_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of layers left out in a training step."""


class BottleneckAdapter(AdapterSection):
    method: Literal["bottleneck"] = "bottleneck"
    """Small networks between the base's layers."""
    variant: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """houlsby: after attention and after the MLP (arXiv:1902.00751); pfeiffer: after the MLP (arXiv:2005.00247);
    parallel: beside the MLP (He et al. 2022, arXiv:2110.04366)."""
    bottleneck_size: Count = 64
    """Width of the middle."""
    non_linearity: Literal[
        "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "relu6", "leaky_relu", "silu", "swish",
        "mish", "hardswish", "sigmoid", "tanh", "linear",
    ] = "gelu"  # fmt: skip
    """Activation in the middle, by transformers' name."""
    scaling: Annotated[float, Field(gt=0)] = 1.0
    """The adapter's output is multiplied by it; He et al. use 4 for parallel."""
    bottleneck_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""


class Ia3Adapter(AdapterSection):
    trains = "vectors"
    method: Literal["ia3"] = "ia3"
    """Learned rescaling of keys, values and the MLP's inner activations (Liu et al. 2022, arXiv:2205.05638)."""
    target_modules: Annotated[list[str] | None, OptionalNames] = None
    """Rescaled layers; unset: keys, values and the MLP's last layer."""
    feedforward_modules: Annotated[list[str] | None, OptionalNames] = None
    """Those of target_modules whose input is rescaled instead of their output; unset: the MLP's last layer."""


class PromptTuningAdapter(AdapterSection):
    method: Literal["prompt_tuning"] = "prompt_tuning"
    """Learned embeddings before the text (Lester et al. 2021, arXiv:2104.08691)."""
    num_virtual_tokens: Count = 20
    """Number of learned embeddings."""
    prompt_tuning_init: Literal["random", "text", "vocabulary"] = "vocabulary"
    """Start from noise as wide as the base's embeddings, from prompt_tuning_init_text, or from random tokens."""
    prompt_tuning_init_text: str | None = None
    """Text to start from, repeated or cut to num_virtual_tokens."""


class PTuningAdapter(AdapterSection):
    method: Literal["p_tuning"] = "p_tuning"
    """Learned embeddings that come out of a small network (Liu et al. 2021, arXiv:2103.10385)."""
    num_virtual_tokens: Count = 20
    """Number of learned embeddings."""
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """The network; it is not needed after training."""
    encoder_hidden_size: Count = 128
    """Its width."""
    encoder_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside the LSTM."""


class PrefixTuningAdapter(AdapterSection):
    method: Literal["prefix_tuning"] = "prefix_tuning"
    """Learned keys and values before the text in every layer (Li and Liang 2021, arXiv:2101.00190)."""
    num_virtual_tokens: Count = 20
    """Length of the prefix."""
    prefix_projection: bool = False
    """Let a small network make the prefix while training, as in P-Tuning v2 (Liu et al. 2021, arXiv:2110.07602)."""
    encoder_hidden_size: Count = 128
    """Width of that network."""
    prefix_init: Literal["random", "text", "vocabulary"] = "vocabulary"
    """Start from noise, or from the base's keys and values for prefix_init_text or for random tokens. With
    prefix_projection the network starts at random."""
    prefix_init_text: str | None = None
    """Text to start from, repeated or cut to num_virtual_tokens."""


class BitFitAdapter(AdapterSection):
    trains = "vectors"
    method: Literal["bitfit"] = "bitfit"
    """Train biases only (Ben Zaken et al. 2022, arXiv:2106.10199)."""
    bias: Literal["existing", "add"] = "add"
    """existing: the biases that the base has; add: zero biases on linear layers without, too."""
    targets: Annotated[Literal["storable", "all"] | list[str], Names] = "storable"
    """With bias: add, the layers that get one: those whose bias the architecture can store, all linear layers (cannot
    be merged then), or names. With bias: existing, names of layers that have one; otherwise all of them are trained."""


class LastLayersAdapter(AdapterSection):
    method: Literal["last_layers"] = "last_layers"
    """Train the last blocks whole; the rest is frozen."""
    num_layers: Count = 2
    """Number of blocks."""
    norm: bool = True
    """The final norm, too."""
    head: bool = False
    """The output head, too; where it is tied to the embeddings it becomes a matrix of its own."""


class LnTuningAdapter(AdapterSection):
    trains = "vectors"
    method: Literal["ln_tuning"] = "ln_tuning"
    """Train norms only (Zhao et al. 2023, arXiv:2312.11420)."""
    target_modules: Annotated[str | list[str] | None, OptionalNames] = None
    """Names, or a regular expression for full names; unset: every norm."""


class OtherAdapter(AdapterSection):
    method: Literal["other"] = "other"
    """What model.adapter is called when another tool made it with a PEFT method that has no section here. Trained on as
    it is; not for new adapters."""
    kind: str | None = None
    """peft's name of it; filled in."""


def _method(values: Any) -> Any:
    """`method` in any case: peft_type is upper case."""
    if isinstance(values, dict) and isinstance(values.get("method"), str):
        return {**values, "method": values["method"].lower()}
    return values


Adapter = Annotated[
    LoraAdapter | AdaLoraAdapter | VeraAdapter | OftAdapter | LohaAdapter | LokrAdapter | BottleneckAdapter
    | Ia3Adapter | PromptTuningAdapter | PTuningAdapter | PrefixTuningAdapter | BitFitAdapter | LastLayersAdapter
    | LnTuningAdapter | FullAdapter | OtherAdapter,
    Field(discriminator="method"), BeforeValidator(_method),
]  # fmt: skip

ADAPTERS: dict[str, type[AdapterSection]] = {
    section.model_fields["method"].default: section for section in get_args(get_args(Adapter)[0])
}
"""method -> its section."""
