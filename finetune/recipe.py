"""The recipe: one strict, frozen pydantic class per stage, and `resolve`, which fills in what depends on the machine.

    PretrainRecipe | SftRecipe | RewardRecipe | …           model, data, adapter, train, eval, output, the stage's own
    RECIPES                     stage name -> class; `recipe_file.load` reads YAML into one of these

Field names are those of transformers, peft and trl. The docstring under a field is its only description: the JSON
schema (`ft recipes schema`) is generated from it. Nothing here imports torch.
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

PACKAGE = Path(__file__).parent
BUILTIN_MODELS = PACKAGE / "models" / "bases"


def resource_path(*parts: str) -> Path:
    """Path of shipped data (`recipes/…`, `data_templates/…`): in the package of a wheel, beside it in a checkout."""
    inside = PACKAGE.joinpath(*parts)
    return inside if inside.exists() else PACKAGE.parent.joinpath(*parts)


# peft's names, in lower case, for values of keys that are spelled as peft's.
SPELLINGS = {"init_lora_weights": {"true": "default"}, "prompt_tuning_init": {"sample_vocab": "vocabulary"}}


def _choices(annotation: Any) -> Iterator[Any]:
    """The members of every Literal in it."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from _choices(part)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=(),
        allow_inf_nan=False,
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _spelling(cls, values: Any) -> Any:
        """Words of a fixed list in any case, and by peft's names."""
        if not isinstance(values, dict):
            return values
        read = dict(values)
        for key, field in cls.model_fields.items():
            if isinstance(word := values.get(key), str | bool):
                word = SPELLINGS.get(key, {}).get(str(word).lower(), word)
                same = [c for c in _choices(field.annotation) if isinstance(c, str) and c.lower() == str(word).lower()]
                if isinstance(word, str) and same and word not in same:
                    word = same[0]
                read[key] = word
        return read


def _percent(value: Any) -> Any:
    """5% -> 0.05; anything else as it is."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


Percent = BeforeValidator(_percent, json_schema_input_type=float | int | str | None)


def _listed(value: Any) -> Any:
    """q_proj -> [q_proj]; "q_proj, v_proj" -> [q_proj, v_proj]. As a regular expression, which peft makes of a text, a
    name means no module at all: full names begin with the model's."""
    if isinstance(value, str) and value not in WORDS and re.fullmatch(r"\s*[\w.]+(\s*,\s*[\w.]+)*\s*", value):
        return [name.strip() for name in value.split(",")]
    return value


WORDS = ("all-linear", "all", "storable")
Names = BeforeValidator(_listed, json_schema_input_type=str | list[str])
OptionalNames = BeforeValidator(_listed, json_schema_input_type=str | list[str] | None)
Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]


class RopeScaling(Section):
    rope_type: Literal["default", "linear", "dynamic", "yarn"]
    """linear: positions are divided by factor (wants fine-tuning at the new length); dynamic: the base grows with the
    text, short texts are computed as before; yarn: only slow frequencies are divided; default: no scaling."""
    factor: Annotated[float, Field(ge=1)] | None = None
    """New length / original length."""
    original_max_position_embeddings: Count | None = None
    """The length the base was trained on; config.json's max_position_embeddings when unset."""
    attention_factor: Annotated[float, Field(gt=0)] | None = None
    """yarn: scale of the attention logits."""
    beta_fast: Annotated[float, Field(gt=0)] | None = None
    """yarn: frequencies with more turns than this over the original length stay as they are."""
    beta_slow: Annotated[float, Field(gt=0)] | None = None
    """yarn: frequencies with fewer turns than this are divided by factor."""

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, values: Any) -> Any:
        """`type` is what config.json files called it until 2024."""
        if isinstance(values, dict) and "type" in values and "rope_type" not in values:
            return {"rope_type": values["type"], **{k: v for k, v in values.items() if k != "type"}}
        return {"rope_type": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _complete(self) -> RopeScaling:
        if self.factor is None and self.rope_type in ("dynamic", "yarn"):
            raise ValueError("model.rope_scaling.factor: missing, new length / original length")
        return self


class ModelConfig(Section):
    name: str
    """Built-in base (tiny-llama), local folder, or hub id."""
    adapter: str | None = None
    """Run directory or adapter folder to continue from; its base must be `name`."""
    source: Literal["local", "hub", "modelscope"] | None = None
    """Where `name` lies; unset: a built-in base or a local folder when there is one, otherwise a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    rope_scaling: RopeScaling | None = None
    """Longer contexts than the base was trained on, e.g. {rope_type: yarn, factor: 4}. For ChatGLM checkpoints whose
    `rope_ratio` could mean two things, {rope_type: default} (ChatGLM3, GLM-4) or {rope_type: linear} (ChatGLM2)."""
    sanity_check: Literal["auto"] | bool = "auto"
    """Loss on a fixed text right after loading must be far below that of guessing: true an error, false not looked at,
    auto an error from 20 million parameters on and a warning below (small models are often random ones for tests)."""
    device_map: Literal["auto", "balanced", "sequential"] | dict[str, int | str] | None = None
    """Spread the model over several devices, main memory and disk; unset: one device. What lies in main memory (beside
    a GPU) or on disk can generate but not train."""
    max_memory: dict[int | str, int | str] | None = None
    """With device_map, the most to use: {0: 20GB, cpu: 60GB}."""
    offload_folder: str | None = None
    """With device_map, where weights on disk go; a temporary folder when unset."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the computation; trainable weights are always float32. auto: bfloat16 where the hardware has it,
    float16 with loss scaling on older GPUs, float32 on other CPUs."""
    quantization: Literal["int8", "int4"] | None = None
    """Hold the base in 8 or 4 bits (bitsandbytes); embeddings, norms and the output head keep their precision."""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """Data type of int4."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel; transformers chooses when unset."""
    chat_template: str | None = None
    """File of a Jinja chat template that replaces the tokenizer's own."""


class PretrainModelConfig(ModelConfig):
    config: dict[str, Any] | None = None
    """Start from random weights with this transformers config (`model_type`, `hidden_size`, …) instead of loading
    `name`, which then only names the result."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id; with `config` only. `builtin:tickets` trains the tiny bases' own on the corpus."""


class SourceConfig(Section):
    path: str
    """File, folder, glob, `builtin:` name, or dataset id."""
    source: Literal["local", "hub", "modelscope"] | None = None
    """Where `path` lies; unset: a local path when it exists, otherwise a hub id."""
    name: str | None = None
    """Configuration of a hub dataset."""
    split: str | None = None
    """Split of a hub dataset (train when unset)."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    format: str | None = None
    """Row format of this source; recognised when unset."""
    columns: dict[str, str] | None = None
    """Rename columns: {the format's name: the file's name}."""
    filter: dict[str, str | int | float | bool | list[str | int | float | bool]] | None = None
    """Use only rows whose columns have these values: {column: value or list of values}."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is used: 2 twice, 0.5 half of the rows (chosen by content hash)."""
    max_samples: Count | None = None
    """Use only this many rows of this source."""


class DataConfig(Section):
    train: str | SourceConfig | list[str | SourceConfig]
    """Training data: file, folder, glob, `builtin:tickets/train`, hub dataset id, or a mapping with more (path, split,
    weight, filter, …); several as a list."""
    eval_split: Annotated[Fraction | Count | None, Percent] = None
    """Hold this share (0.05 or 5%, at least one row) or number of rows of `train` out for the loss during training, by
    content hash."""
    format: str | None = None
    """Row format; recognised from the rows when unset."""
    columns: dict[str, str] | None = None
    """Rename columns: {the format's name: your name}."""
    text_unit: Literal["line", "paragraph", "file"] = "line"
    """What one document of plain text (.txt) is in `ft pretrain`: a line, what stands between blank lines, or the whole
    file."""
    max_length: Count = 2048
    """Longest sample in tokens."""
    packing: bool = False
    """Put several samples of `ft sft` into one row of max_length tokens; off when a probe finds that they see each
    other."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which turns carry loss: every assistant turn, only the last one, or all text but tool output."""
    on_overlong: Literal["truncate", "drop", "error"] = "truncate"
    """A sample longer than max_length: cut its end, leave it out, or stop. Counted in result.json."""
    on_error: Literal["stop", "drop"] = "stop"
    """A row that cannot be used: stop with all of them listed, or leave them out (at most max_dropped)."""
    max_dropped: Annotated[float, Field(ge=0, le=1), Percent] = 0.05
    """The largest share of rows (0.05 or 5%) that may be left out: with on_error: drop those that cannot be used, and
    those whose first max_length tokens hold nothing that is trained."""
    max_samples: Count | None = None
    """Use only this many rows of each source: the first ones, or with shuffle a random choice."""
    shuffle: bool = False
    """Draw max_samples at random by seed instead of taking the first rows. (Training order is always shuffled.)"""
    streaming: bool = False
    """Read hub datasets as a stream instead of downloading them first."""
    on_forged_marker: Literal["error", "allow"] = "error"
    """Turn markers that are plain text to the tokenizer ([INST] of Llama-2, [|Human|]: of BlueLM) inside content: an
    error, or allowed and counted. Control tokens inside content always become text."""
    cache: bool = True
    """Keep tokenised large data of `ft sft` on disk, keyed by content, template, tokenizer and settings."""


class FullAdapter(Section):
    method: Literal["full"] = "full"
    """Train every weight; the run writes model/ instead of adapter/."""


class TargetedAdapter(Section):
    target_modules: Annotated[str | list[str], Names] = "all-linear"
    """Module names (one, or a list), a regular expression for full names, or all-linear (every linear layer but the
    output head)."""
    modules_to_save: Annotated[list[str] | None, OptionalNames] = None
    """Further modules that are trained and saved whole."""


class LoraAdapter(TargetedAdapter):
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
    method: Literal["oft"] = "oft"
    """Weights rotated in blocks (Qiu et al. 2023, arXiv:2306.07280)."""
    oft_block_size: Count = 32
    """Size of a block; must divide the layers' input sizes."""
    module_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of blocks left as they are in a training step."""


class LohaAdapter(TargetedAdapter):
    method: Literal["loha"] = "loha"
    """Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2022, arXiv:2108.06098)."""
    r: Count = 8
    """Rank of each factor."""
    alpha: Annotated[float, Field(gt=0)] = 16
    """Scale: the update is multiplied by alpha / r."""
    module_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of layers left out in a training step."""


class LokrAdapter(TargetedAdapter):
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


class BottleneckAdapter(Section):
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


class Ia3Adapter(Section):
    method: Literal["ia3"] = "ia3"
    """Learned rescaling of keys, values and the MLP's inner activations (Liu et al. 2022, arXiv:2205.05638)."""
    target_modules: Annotated[list[str] | None, OptionalNames] = None
    """Rescaled layers; unset: keys, values and the MLP's last layer."""
    feedforward_modules: Annotated[list[str] | None, OptionalNames] = None
    """Those of target_modules whose input is rescaled instead of their output; unset: the MLP's last layer."""


class PromptTuningAdapter(Section):
    method: Literal["prompt_tuning"] = "prompt_tuning"
    """Learned embeddings before the text (Lester et al. 2021, arXiv:2104.08691)."""
    num_virtual_tokens: Count = 20
    """Number of learned embeddings."""
    prompt_tuning_init: Literal["random", "text", "vocabulary"] = "vocabulary"
    """Start from noise as wide as the base's embeddings, from prompt_tuning_init_text, or from random tokens."""
    prompt_tuning_init_text: str | None = None
    """Text to start from, repeated or cut to num_virtual_tokens."""


class PTuningAdapter(Section):
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


class PrefixTuningAdapter(Section):
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


class BitFitAdapter(Section):
    method: Literal["bitfit"] = "bitfit"
    """Train biases only (Ben Zaken et al. 2022, arXiv:2106.10199)."""
    bias: Literal["existing", "add"] = "add"
    """existing: the biases that the base has; add: zero biases on linear layers without, too."""
    targets: Annotated[Literal["storable", "all"] | list[str], Names] = "storable"
    """With bias: add, the layers that get one: those whose bias the architecture can store, all linear layers (cannot
    be merged then), or names. With bias: existing, names of layers that have one; otherwise all of them are trained."""


class LastLayersAdapter(Section):
    method: Literal["last_layers"] = "last_layers"
    """Train the last blocks whole; the rest is frozen."""
    num_layers: Count = 2
    """Number of blocks."""
    norm: bool = True
    """The final norm, too."""
    head: bool = False
    """The output head, too; where it is tied to the embeddings it becomes a matrix of its own."""


class LnTuningAdapter(Section):
    method: Literal["ln_tuning"] = "ln_tuning"
    """Train norms only (Zhao et al. 2023, arXiv:2312.11420)."""
    target_modules: Annotated[str | list[str] | None, OptionalNames] = None
    """Names, or a regular expression for full names; unset: every norm."""


class OtherAdapter(Section):
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

ADAPTERS: dict[str, type[Section]] = {cls.model_fields["method"].default: cls for cls in get_args(get_args(Adapter)[0])}
"""method -> its section."""

Scheduler = Literal[
    "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt",
    "warmup_stable_decay",
]  # fmt: skip
Optimizer = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd", "lion_8bit", "muon",
]  # fmt: skip


class TrainConfig(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 3.0
    """Passes over the data; max_steps overrides it."""
    max_steps: Count | None = None
    """Optimizer steps; overrides num_train_epochs."""
    effective_batch_size: Count = 16
    """Original samples per optimizer step over all devices, packed or not; micro-batch and accumulation follow."""
    per_device_train_batch_size: Count | None = None
    """Rows per forward pass and device, a divisor of effective_batch_size; derived when unset."""
    gradient_accumulation_steps: Count | None = None
    """Forward passes per optimizer step, a divisor of effective_batch_size; derived when unset."""
    per_device_eval_batch_size: Count | None = None
    """Rows per forward pass in evaluation; derived when unset."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.03
    """Linear warm-up from 0: a number of steps, or below 1 a fraction of all steps, rounded down."""
    lr_scheduler_type: Scheduler = "cosine_with_min_lr"
    """Shape of the learning rate; cosine_with_min_lr ends at lr_min_ratio of the peak."""
    lr_min_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Floor of cosine_with_min_lr and warmup_stable_decay, as a share of the peak."""
    lr_decay_ratio: Fraction = 0.35
    """warmup_stable_decay: share of the steps spent in the final decay."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients are scaled down to this norm; 0 switches it off."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay on matrices (not on biases, norms, and the vectors and scales of adapters)."""
    optim: Optimizer = "adamw"
    """Optimizer. muon: orthogonalised momentum on matrices, AdamW on the rest."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Momentum of muon on matrices."""
    muon_adamw_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the AdamW part of muon (embeddings, norms, biases); learning_rate when unset."""
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = None
    """Noise on the embeddings while training (arXiv:2310.05914)."""
    label_smoothing_factor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target probability spread over the vocabulary."""
    gradient_checkpointing: bool | None = None
    """Recompute activations instead of keeping them; unset: on GPUs yes, on CPUs no."""
    torch_compile: bool = False
    """Compile the model with torch.compile; pays in long runs."""
    group_by_length: bool = True
    """Batch samples of similar length (less padding); without effect when packed."""
    seed: int = 42
    """Seed of weights, order and dropout, set before anything is initialised."""
    logging_steps: Count = 10
    """Steps between rows of metrics.jsonl."""
    eval_steps: Count | None = None
    """Steps between evaluations of the held-out loss (data.eval_split); unset: at the end of every epoch."""
    save_steps: Count | None = None
    """Steps between checkpoints; unset: at the end of every epoch. With load_best_model_at_end a multiple of
    eval_steps, and equal to it when unset."""
    save_total_limit: Count = 2
    """Checkpoints kept (the best one beside them)."""
    load_best_model_at_end: bool = False
    """Keep the checkpoint with the lowest held-out loss instead of the last."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations without a lower held-out loss; implies load_best_model_at_end."""


class PpoTrainConfig(TrainConfig):
    warmup_steps: Annotated[float, Field(ge=0)] = 0.0
    """Linear warm-up: a number of rollouts, or below 1 a fraction of all. The first of them learns nothing."""


class EvalConfig(Section):
    data: str | None = None
    """Held-out data with reference answers."""
    max_new_tokens: Count = 256
    """Longest generated answer."""
    batch_size: Count = 32
    """Prompts per generation batch."""
    limit: Count | None = None
    """Only the first n rows."""


class OutputConfig(Section):
    dir: str
    """Run directory; never overwritten without --overwrite."""


class BaseRecipe(Section):
    version: Literal[1]
    """Version of the recipe format."""
    train: TrainConfig = TrainConfig()
    """Optimisation."""
    output: OutputConfig
    """Where results go."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""

    @model_validator(mode="after")
    def _consistent(self) -> BaseRecipe:
        train = self.train
        if train.max_steps is None and train.num_train_epochs <= 0:
            raise ValueError("train.num_train_epochs: must be positive")
        given = {
            key: value
            for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
            if (value := getattr(train, key)) is not None
        }
        first, product = next(iter(given), None), math.prod(given.values())
        data: DataConfig = getattr(self, "data")  # noqa: B009 (every stage has its own)
        if data.packing:
            if len(given) == 2:
                what = "with data.packing a row holds several samples, and gradient_accumulation_steps with this size"
                raise ValueError(f"train.{first}: {what} says nothing of effective_batch_size; give one of the three")
            return self
        rows, of = self._step_rows()
        if first is not None and (rows % product or (len(given) == 2 and rows != product)):
            if self._passes_may_differ and given.keys() == {"per_device_train_batch_size"} and product <= rows:
                return self
            if len(given) == 1:
                raise ValueError(f"train.{first}: {product} does not divide {of} of {rows}")
            micro, accumulation = given.values()
            what = f"{micro} x gradient_accumulation_steps {accumulation} is {product}, and no {of} of {rows}"
            raise ValueError(f"train.{first}: {what}; set effective_batch_size: {product}, or leave one of them out")
        return self

    @model_validator(mode="after")
    def _best_on_disk(self) -> BaseRecipe:
        train = self.train
        best = train.load_best_model_at_end or train.early_stopping_patience is not None
        if best and train.save_steps and train.eval_steps and train.save_steps % train.eval_steps:
            what = f"{train.save_steps} is no multiple of eval_steps {train.eval_steps}"
            raise ValueError(f"train.save_steps: {what}: the best model would not be on disk; leave one of them out")
        return self

    @property
    def _passes_may_differ(self) -> bool:
        """Whether the last pass of a step may have fewer rows than the others."""
        return False

    def _step_rows(self) -> tuple[int, str]:
        """(rows of an optimizer step, what makes them so many)."""
        return self.train.effective_batch_size, "effective_batch_size"


class PretrainRecipe(BaseRecipe):
    stage: Literal["pretrain"]
    """The command that runs this recipe."""
    model: PretrainModelConfig
    """The model, or the config to start one from."""
    data: DataConfig
    """Raw text."""
    adapter: Adapter = FullAdapter()
    """What is trained; all weights by default."""


class SftRecipe(BaseRecipe):
    stage: Literal["sft"]
    """The command that runs this recipe."""
    model: ModelConfig
    """The base model."""
    data: DataConfig
    """Conversations."""
    adapter: Adapter = LoraAdapter()
    """What is trained."""


DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "discopop", "apo_zero", "apo_down", "sigmoid_norm", "simpo", "orpo",
]  # fmt: skip


SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
"""The losses that dpo.label_smoothing changes."""


class DpoConfig(Section):
    loss_type: DpoLoss = "sigmoid"
    """The objective; simpo (arXiv:2405.14734) and orpo (arXiv:2403.07691) need no reference model."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to the reference (sigmoid and kin); the scale of the log-odds (orpo) or of the
    mean log-probabilities (simpo, usually 2 to 2.5)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of wrongly labelled pairs, of robust, exo_pair, aot and aot_unpaired; refused with the others."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answers' negative log-likelihood added to the loss (RPO, arXiv:2404.19733): the mean over an
    answer's tokens, averaged over the pairs."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 0.5
    """Target margin of simpo, as a share of beta."""
    start: Literal["continue", "merge"] = "continue"
    """With model.adapter: train that adapter on and keep a frozen copy as the reference; or merge it into the base
    first, which is then base and reference of a fresh adapter."""

    @model_validator(mode="after")
    def _smoothed(self) -> DpoConfig:
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            fix = f"leave it out, or set dpo.loss_type: robust (with effect in {', '.join(SMOOTHED)})"
            raise ValueError(f"dpo.label_smoothing: has no effect on {self.loss_type}; {fix}")
        if self.simpo_gamma != DpoConfig.model_fields["simpo_gamma"].default and self.loss_type != "simpo":
            raise ValueError(f"dpo.simpo_gamma: has no effect on {self.loss_type}; leave it out")
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("dpo.label_smoothing: exo_pair takes its logarithm; set it above 0, for example 0.001")
        return self


class KtoConfig(Section):
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the good answers' loss."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the bad answers' loss."""
    start: Literal["continue", "merge"] = "continue"
    """As dpo.start."""


class DpoRecipe(BaseRecipe):
    stage: Literal["dpo"]
    """The command that runs this recipe."""
    model: ModelConfig
    """The base model."""
    data: DataConfig
    """Preference pairs."""
    adapter: Adapter = LoraAdapter()
    """What is trained."""
    dpo: DpoConfig = DpoConfig()
    """The objective."""


class KtoRecipe(BaseRecipe):
    stage: Literal["kto"]
    """The command that runs this recipe."""
    model: ModelConfig
    """The base model."""
    data: DataConfig
    """Answers with a label, good or bad."""
    adapter: Adapter = LoraAdapter()
    """What is trained."""
    kto: KtoConfig = KtoConfig()
    """The objective."""


class RewardModelConfig(Section):
    margin: float = 0.0
    """The chosen answer's score should be higher by at least this much."""
    center_rewards_coefficient: Annotated[float, Field(ge=0)] | None = 0.01
    """Weight of the mean squared sum of a pair's scores, which keeps them around zero (Eisenstein et al. 2023,
    arXiv:2312.09244, eq. 2)."""


class RewardRecipe(BaseRecipe):
    stage: Literal["reward"]
    """The command that runs this recipe."""
    model: ModelConfig
    """The base model; with model.adapter that adapter is where the reward model starts."""
    data: DataConfig
    """Preference pairs."""
    adapter: Adapter = LoraAdapter()
    """What is trained, besides the score head."""
    reward: RewardModelConfig = RewardModelConfig()
    """The objective."""


class RewardSources(Section):
    """What scores the replies; several are added up."""

    train: str | SourceConfig | list[str | SourceConfig] | None = None
    """Preference pairs to train a reward model on first, on the same base, into output.dir/reward, as `ft reward` does
    by default (16 pairs a step) and otherwise as `train` says. 5% are held out to say how accurate it is."""
    model: str | None = None
    """Run of `ft reward`, or a folder or hub id of a sequence-classification model with one output."""
    functions: list[str] = []
    """Python rules, file.py:function(prompts, completions, **columns) -> list of numbers."""
    weights: list[float] | None = None
    """One weight per source, the model first; all 1 when unset."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """With train: peak learning rate of the reward model; train.learning_rate when unset."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 2.0
    """With train: passes over the pairs."""
    center_rewards_coefficient: Annotated[float, Field(ge=0)] | None = 0.01
    """With train: as in `ft reward`."""

    @model_validator(mode="after")
    def _complete(self) -> RewardSources:
        if self.train is not None and self.model is not None:
            raise ValueError("reward.train: excludes reward.model; give one of them")
        count = len(self.functions) + (self.train is not None or self.model is not None)
        if not count:
            raise ValueError("reward: nothing scores the replies; give train, model or functions")
        if self.weights is not None and len(self.weights) != count:
            raise ValueError(f"reward.weights: {len(self.weights)} for {count} sources")
        return self


class PpoConfig(Section):
    num_ppo_epochs: Count = 2
    """Passes over the replies of one rollout."""
    num_mini_batches: Count = 4
    """Optimizer steps per pass."""
    cliprange: Annotated[float, Field(gt=0)] = 0.2
    """The importance ratio's gain ends at 1 ± this."""
    cliprange_value: Annotated[float, Field(gt=0)] = 0.2
    """Values move at most this far per rollout."""
    vf_coef: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the value loss."""
    value_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the value model; train.learning_rate when unset."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of generalised advantage estimation."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the KL divergence from the reference, per token, in the reward."""
    kl_target: Annotated[float, Field(gt=0)] | None = None
    """Adapt kl_coef so that the KL per reply stays near this; unset: kl_coef is fixed."""
    kl_horizon: Count = 1000
    """Replies over which kl_coef adapts."""
    max_kl: Annotated[float, Field(gt=0)] = 20.0
    """Two rollouts in a row whose KL per reply is larger stop the run: the policy has left the reference for good."""
    max_update_kl: Annotated[float, Field(gt=0)] = 0.1
    """When the updates of one rollout have moved the policy this far (mean squared log ratio / 2), the rest of them is
    left out."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Advantages of a rollout have mean 0 and variance 1."""
    normalize_rewards: bool = True
    """Divide scores by their running standard deviation, after taking off their running mean."""
    clip_rewards: Annotated[float, Field(gt=0)] | None = 5.0
    """Normalised scores are cut at ± this."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Taken off the score of a reply that does not end by itself."""
    max_new_tokens: Count = 64
    """Longest reply."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampling, and of every log-probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens only; 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that hold this much probability."""
    models: Literal["shared", "separate"] = "shared"
    """shared: policy, reference, reward and value are adapters on one base in memory. separate: a model of its own for
    each, for full fine-tuning or a reward model on another base."""
    log_samples_steps: Count = 10
    """Rollouts between tables of sample replies."""


class PpoRecipe(BaseRecipe):
    stage: Literal["ppo"]
    """The command that runs this recipe."""
    model: ModelConfig
    """The base model; model.adapter is where the policy starts, and its reference."""
    data: DataConfig
    """Prompts: rows of any format, whose answers are not used. In `train`, effective_batch_size is the number of
    prompts per rollout and max_steps the number of rollouts."""
    adapter: Adapter = LoraAdapter()
    """What is trained."""
    train: PpoTrainConfig = PpoTrainConfig()
    """Optimisation."""
    reward: RewardSources
    """What scores the replies."""
    ppo: PpoConfig = PpoConfig()
    """The algorithm (Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593)."""

    @property
    def _passes_may_differ(self) -> bool:
        return True  # a minibatch is cut into passes by PPO's own loop

    def _step_rows(self) -> tuple[int, str]:
        if self.train.effective_batch_size % self.ppo.num_mini_batches:
            raise ValueError("ppo.num_mini_batches: does not divide train.effective_batch_size")
        rows = self.train.effective_batch_size // self.ppo.num_mini_batches
        return rows, "effective_batch_size / ppo.num_mini_batches"

    @model_validator(mode="after")
    def _batches(self) -> PpoRecipe:
        if self.ppo.kl_target is not None and self.ppo.kl_coef == 0:
            raise ValueError("ppo.kl_coef: nothing to adapt to kl_target; give it a value above 0")
        if self.ppo.kl_target is not None and self.train.effective_batch_size >= 5 * self.ppo.kl_horizon:
            raise ValueError("ppo.kl_horizon: a fifth of train.effective_batch_size or less makes kl_coef negative")
        return self


Recipe = PretrainRecipe | SftRecipe | RewardRecipe | DpoRecipe | KtoRecipe | PpoRecipe
R = TypeVar("R", bound=Recipe)
RECIPES: dict[str, type[Recipe]] = {
    "pretrain": PretrainRecipe,
    "sft": SftRecipe,
    "reward": RewardRecipe,
    "dpo": DpoRecipe,
    "kto": KtoRecipe,
    "ppo": PpoRecipe,
}


@dataclass(frozen=True)
class Hardware:
    """What `resolve` needs to know of the machine."""

    device: Literal["cpu", "cuda", "mps", "xpu"] = "cpu"
    bf16: bool = False
    """Fast bfloat16 matrix products."""
    memory_gb: float = 0.0
    """Memory of one device."""
    processes: int = 1
    """Data-parallel processes."""


def absolute(path: str, exists_only: bool = True) -> str:
    """Absolute path of a local file or folder; anything else (builtin:…, hub ids) unchanged."""
    if path.startswith("builtin:") or (exists_only and not Path(path).expanduser().exists()):
        return path
    return str(Path(path).expanduser().resolve())


def absolute_data(path: str) -> str:
    """The same data, found from any folder; globs, too. What names a file or folder as it stands is no pattern."""
    place = Path(path).expanduser()
    if path.startswith("builtin:") or place.exists() or not glob.has_magic(path):
        return absolute(path)
    return str(Path(glob.escape(str(Path.cwd()))) / place)


REMOTE = ("hub", "modelscope")


def absolute_source(source: str | SourceConfig) -> str | SourceConfig:
    if isinstance(source, SourceConfig):
        if source.source in REMOTE:
            return source
        return source.model_copy(update={"path": absolute_data(source.path)})
    return absolute_data(source)


def absolute_rewards(reward: RewardSources) -> RewardSources:
    """The same, found from any folder."""
    sources = reward.train if isinstance(reward.train, list) else [] if reward.train is None else [reward.train]
    rules = [
        f"{absolute(file)}:{name}" if file else name  # without a function the rule is refused when it is loaded
        for file, _, name in (rule.rpartition(":") for rule in reward.functions)
    ]
    return reward.model_copy(
        update={
            "train": [absolute_source(s) for s in sources] or None,
            "model": reward.model and absolute(reward.model),
            "functions": rules,
        }
    )


def compute_dtype(wanted: str, hardware: Hardware) -> str:
    if wanted != "auto":
        return wanted
    if hardware.bf16:
        return "bfloat16"
    return "float16" if hardware.device == "cuda" else "float32"


def a_step(recipe: Recipe) -> tuple[TrainConfig, int]:
    """(train with the rows of an optimizer step, their length). PPO's are a minibatch of prompts and replies."""
    if not isinstance(recipe, PpoRecipe):
        return recipe.train, recipe.data.max_length
    rows = recipe.train.effective_batch_size // recipe.ppo.num_mini_batches
    train = recipe.train.model_copy(update={"effective_batch_size": rows})
    return train, recipe.data.max_length + recipe.ppo.max_new_tokens


def batch_layout(train: TrainConfig, max_length: int, hardware: Hardware) -> tuple[int, int]:
    """(rows per forward pass, forward passes per optimizer step); × processes = effective_batch_size."""
    per_process = max(1, train.effective_batch_size // hardware.processes)
    if train.per_device_train_batch_size and train.gradient_accumulation_steps:
        return train.per_device_train_batch_size, train.gradient_accumulation_steps
    if train.per_device_train_batch_size:
        return train.per_device_train_batch_size, max(1, round(per_process / train.per_device_train_batch_size))
    if train.gradient_accumulation_steps:
        return max(1, round(per_process / train.gradient_accumulation_steps)), train.gradient_accumulation_steps
    # Activations grow with tokens per pass; 512 tokens per GB is a cautious start that `ft plan` refines.
    budget = max(4096, int(hardware.memory_gb * 512))
    limit = max(1, budget // max_length)
    micro = max(n for n in range(1, per_process + 1) if per_process % n == 0 and n <= limit)
    return micro, per_process // micro


def resolve(recipe: R, hardware: Hardware) -> R:
    """Fill in everything that depends on the machine. Pure; nothing changes a recipe afterwards.

    The result is complete: written to recipe.yaml and run again, it gives the same run from any folder.
    """
    train, data = recipe.train, recipe.data
    is_ppo = isinstance(recipe, PpoRecipe)
    micro, accumulation = batch_layout(*a_step(recipe), hardware)
    best = train.load_best_model_at_end or train.early_stopping_patience is not None
    sources = data.train if isinstance(data.train, list) else [data.train]
    sections: dict[str, Any] = {
        "model": recipe.model.model_copy(
            update={
                "name": recipe.model.name if recipe.model.source in REMOTE else absolute(recipe.model.name),
                "adapter": recipe.model.adapter and absolute(recipe.model.adapter),
                "chat_template": recipe.model.chat_template and absolute(recipe.model.chat_template),
                "offload_folder": recipe.model.offload_folder
                and absolute(recipe.model.offload_folder, exists_only=False),
                "dtype": compute_dtype(recipe.model.dtype, hardware),
            }
        ),
        "data": data.model_copy(update={"train": [absolute_source(s) for s in sources]}),
        "train": train.model_copy(
            update={
                # How many samples a packed row holds is known only once they are packed.
                "per_device_train_batch_size": train.per_device_train_batch_size if data.packing else micro,
                "gradient_accumulation_steps": train.gradient_accumulation_steps if data.packing else accumulation,
                "per_device_eval_batch_size": (
                    None if is_ppo or data.eval_split is None else train.per_device_eval_batch_size or micro
                ),
                "gradient_checkpointing": (
                    hardware.device != "cpu" if train.gradient_checkpointing is None else train.gradient_checkpointing
                ),
                "load_best_model_at_end": best,
                # The best model can only be kept where it was evaluated.
                "save_steps": train.save_steps or (train.eval_steps if best else None),
                "eval_steps": train.eval_steps or (train.save_steps if best else None),
            }
        ),
        "eval": recipe.eval.model_copy(update={"data": recipe.eval.data and absolute_data(recipe.eval.data)}),
        "output": OutputConfig(dir=absolute(recipe.output.dir, exists_only=False)),
    }
    if isinstance(recipe, PpoRecipe):
        sections["reward"] = absolute_rewards(recipe.reward)
    return cast("R", recipe.model_copy(update=sections))
