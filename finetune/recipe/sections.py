"""The sections of a recipe that several stages have: strict, frozen pydantic classes.

Field names are those of transformers, peft and trl. The docstring under a field is its only description: the JSON
schema (`ft recipes schema`) is generated from it. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# peft's names, in lower case, for values of keys that are spelled as peft's.
SPELLINGS = {
    "init_lora_weights": {"true": "default"}, "prompt_tuning_init": {"sample_vocab": "vocabulary"},
    "thinking": {"true": "on", "false": "off"},  # what YAML makes of on and off
}  # fmt: skip


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


def as_list(value: Any) -> list[Any]:
    """A list as it is, [] for None, anything else in a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


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
MOST = (1 << 31) - 1  # what counts of torch and of tokenizers hold; larger ones end in an overflow somewhere
Count = Annotated[int, Field(gt=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]  # what numpy takes
Named = Annotated[str, Field(min_length=1)]


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
    """Built-in base (tiny-llama), packaged base (smollm2-135m), local folder, GGUF file, or hub id."""
    gguf_file: str | None = None
    """The GGUF file to use of a hub repository or a local folder that holds several kinds."""
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
    float16 with loss scaling on older GPUs; on CPUs training times a block of the model in bfloat16 and in float32."""
    quantization: Literal["int8", "int4"] | None = None
    """Hold the base in 8 or 4 bits (bitsandbytes); embeddings, norms and the output head keep their precision."""
    quantization_type: Literal["nf4", "fp4"] = "nf4"
    """Data type of int4."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel; transformers chooses when unset."""
    chat_template: str | None = None
    """File of a Jinja chat template that replaces the tokenizer's own."""

    @property
    def is_new(self) -> bool:
        """A network that pre-training makes, without a base's weights."""
        return False

    def at(self, place: str, **changes: Any) -> ModelConfig:
        """The same settings, with `changes`, for a model that lies elsewhere."""
        return self.model_copy(update={"name": place, "source": None, "revision": None, "gguf_file": None, **changes})


class PretrainModelConfig(ModelConfig):
    config: dict[str, Any] | None = None
    """Start from random weights with this transformers config (`model_type`, `hidden_size`, …) instead of loading
    `name`, which then only names the result."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id; with `config` only. `builtin:tickets` trains the tiny bases' own on the corpus."""

    @property
    def is_new(self) -> bool:
        return self.config is not None


class SourceConfig(Section):
    path: Named
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
    train: Named | SourceConfig | Annotated[list[Named | SourceConfig], Field(min_length=1)]
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
    thinking: Literal["keep", "drop", "empty"] = "keep"
    """Thinking of the assistant's trained turns (`reasoning_content`, `thinking`, `<think>…</think>`). keep: trained
    where a row has some; of the others all that the template writes is trained, an empty block included. empty: as
    keep, but rows without any are written with thinking off, and the empty block is context, so that the model neither
    forgets to think nor begins to. drop: taken out of the rows, which are then written with thinking off."""
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


Scheduler = Literal[
    "linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt",
    "warmup_stable_decay",
]  # fmt: skip
Optimizer = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd", "lion_8bit", "muon",
]  # fmt: skip


Tracker = Literal["tensorboard", "wandb", "swanlab", "trackio", "mlflow"]


def _trackers(value: Any) -> Any:
    """none, null -> []; "wandb, tensorboard" -> both; each once."""
    if value is None or value == "none":
        return []
    texts = value.split(",") if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    return list(dict.fromkeys(text.strip().lower() for text in texts if text.strip()))


Trackers = BeforeValidator(_trackers, json_schema_input_type=Tracker | list[Tracker] | None)


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
    auto_find_batch_size: bool = False
    """When memory runs out while training, go on from the last checkpoint with half the rows per forward pass, and with
    half of those again; effective_batch_size stays as it is, and so do the rows of every step."""
    gradient_accumulation_steps: Count | None = None
    """Forward passes per optimizer step, of all processes together; a divisor of effective_batch_size; derived when
    unset."""
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
    seed: Seed = 42
    """Seed of weights, order and dropout, set before anything is initialised."""
    logging_steps: Count = 10
    """Steps between rows of metrics.jsonl."""
    report_to: Annotated[list[Tracker], Trackers] = []
    """Trackers that get every row of metrics.jsonl, too, the resolved recipe as config and the result as summary; none
    unless named. Their own environment variables say where it goes (docs/trackers.md)."""
    eval_steps: Count | None = None
    """Steps between evaluations of the held-out loss (data.eval_split); unset: as eval.during.steps, or at the end of
    every epoch."""
    save_steps: Count | None = None
    """Steps between checkpoints; unset: at the end of every epoch. With load_best_model_at_end a multiple of the steps
    between evaluations, and equal to them when unset."""
    save_total_limit: Count = 2
    """Checkpoints kept (the best one beside them)."""
    load_best_model_at_end: bool = False
    """Keep the checkpoint that is best in metric_for_best_model instead of the last."""
    metric_for_best_model: str | None = None
    """What the best checkpoint is best in: a held-out figure of the stage (loss, of pairs rewards/accuracies, …) or a
    metric of eval.during; lower or higher is better as that metric has it. Unset: the held-out loss, or without
    data.eval_split the first metric of eval.during."""
    early_stopping_patience: Count | None = None
    """Stop after this many evaluations without a better metric_for_best_model; implies load_best_model_at_end."""


class GenerationConfig(Section):
    """How answers are written; keys as in transformers' GenerationConfig. Unset, greedily: nothing of what the base's
    own generation_config.json asks for holds, but for the tokens that end an answer."""

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the likeliest token each time; above it answers are drawn, each row with its own random numbers."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that hold this much probability."""
    num_beams: Count = 1
    """Beam search over so many beginnings; 1: none. Beams are not drawn."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Scores of tokens that stand in the prompt or the answer already are divided by it (times it, below 0); 1: off."""
    seed: Seed = 0
    """Of the drawn answers (the same row and seed give the same answer, whatever the batch size), and of eval.shots."""

    @property
    def drawn(self) -> bool:
        return self.temperature > 0

    @property
    def chosen(self) -> dict[str, float | int]:
        """What holds of these settings: those of drawing only where it is drawn."""
        idle = () if self.drawn else DRAWING
        return {key: value for key, value in self.model_dump().items() if key not in idle}

    def __str__(self) -> str:
        """`greedy`, or `temperature 0.7, top_p 0.9, seed 0`."""
        usual = GenerationConfig().model_dump()
        given = {k: v for k, v in self.chosen.items() if v != usual[k] or (k == "seed" and self.drawn)}
        parts = [f"{k} {v}" if isinstance(v, int) else f"{k} {v:g}" for k, v in given.items()]
        return ", ".join([*([] if self.drawn or self.num_beams > 1 else ["greedy"]), *parts])


DRAWING = ("top_k", "top_p", "seed")
"""The keys of `GenerationConfig` that do something only above temperature 0."""


def metric_names(value: Any) -> Any:
    """ "a, b" -> [a, b]; a regular expression goes up to the end of its text."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return value
    found: list[str] = []
    for text in texts:
        start = re.search(r"(?:^|,)\s*regex:", text)
        names, pattern = (text, "") if start is None else (text[: start.start()], text[start.start() :].lstrip(", "))
        found += [name.strip() for name in names.split(",") if name.strip()] + ([pattern] if pattern else [])
    return list(dict.fromkeys(found))


MetricNames = BeforeValidator(metric_names, json_schema_input_type=str | list[str] | None)


class DuringConfig(Section):
    """Held-out rows that are answered while the run trains, as `ft eval` would answer them."""

    steps: Count | None = None
    """Steps between the evaluations (of `ft ppo`: rollouts); unset: as train.eval_steps, or at the end of every
    epoch. Beside train.eval_steps a multiple of it."""
    metrics: Annotated[list[str] | None, MetricNames] = None
    """What is measured of the answers, as in eval.metrics; unset: what suits the rows."""
    limit: Count = 100
    """Only the first n held-out rows."""

    @model_validator(mode="after")
    def _named(self) -> DuringConfig:
        if self.metrics == []:
            raise ValueError("eval.during.metrics: names no metric; leave it out, or name one")
        return self


class EvalSet(Section):
    path: str
    """File, folder, glob, or `builtin:` name."""
    general: bool = False
    """Not what is trained for: what is lost on it against the base, beyond the interval, is warned of."""


class HeldSet(NamedTuple):
    """One of the held-out sets, as `held_sets` finds them."""

    name: str
    path: str
    general: bool = False


def held_sets(data: Any) -> list[HeldSet]:
    """The sets of an eval.data, checked or as it stands in a file, in their order."""

    def one(value: Any, name: str | None = None) -> HeldSet:
        values = value.model_dump() if isinstance(value, EvalSet) else value
        if isinstance(values, dict):
            return HeldSet(name or str(values.get("path")), str(values.get("path")), bool(values.get("general")))
        return HeldSet(name or str(values), str(values))

    if isinstance(data, dict) and not _is_set(data):
        return [one(value, str(name)) for name, value in data.items()]
    return [one(value) for value in as_list(data)]


def _sets(data: Any) -> Any:
    """ValueError with one plain line for what no set can be; the union's own would be a line for each of its kinds."""
    if data is None:
        return None
    named = isinstance(data, dict) and not _is_set(data)
    for name, one in data.items() if named else enumerate(data) if isinstance(data, list) else [("", data)]:
        key = f"eval.data.{name}" if name != "" else "eval.data"
        if isinstance(one, dict):
            if unknown := next((part for part in one if part not in EvalSet.model_fields), None):
                raise ValueError(f"{key}.{unknown}: unknown key, there are {', '.join(EvalSet.model_fields)}")
            if not isinstance(one.get("path") or None, str) or not isinstance(one.get("general", False), bool):
                raise ValueError(f"{key}: a path and, where it applies, general: true are wanted, not {one!r}")
        elif not one or not isinstance(one, str | EvalSet):
            raise ValueError(f"{key}: {one!r} is no path")
    names = [one.name for one in held_sets(data)]
    if not names:
        raise ValueError("eval.data: names no set")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"eval.data: two sets are called {twice}")
    return data


def _is_set(values: dict[Any, Any]) -> bool:
    """Whether a mapping is one set, and not several by name."""
    return isinstance(values.get("path"), str) and values.keys() <= EvalSet.model_fields.keys()


HeldOutData = Annotated[
    str | EvalSet | list[str | EvalSet] | dict[str, str | EvalSet] | None,
    Field(union_mode="left_to_right"), BeforeValidator(_sets),
]  # fmt: skip


class EvalConfig(Section):
    data: HeldOutData = None
    """Held-out data with reference answers; several sets as a list, or as a mapping NAME: PATH (or NAME: {path: PATH,
    general: true}, which is watched for forgetting). Where one set is wanted it is the first that is not general."""
    max_new_tokens: Count = 256
    """Longest generated answer."""
    batch_size: Count = 32
    """Prompts per generation batch."""
    thinking: Literal["on", "off"] | None = None
    """Ask for thinking or for none (the template's enable_thinking, or whatever it calls it); unset: as the run was
    trained, otherwise as the template does by itself."""
    limit: Count | None = None
    """Only the first n rows; of multiple choice the first n of each subject."""
    generation: GenerationConfig = GenerationConfig()
    """How answers are written, in `ft eval`, `ft generate` and `ft chat`; greedily when unset."""
    metrics: Annotated[list[str] | None, MetricNames] = None
    """What `ft eval` measures: names, regex:PATTERN, file.py:function; unset: what suits the rows."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Examples with their answers before each row, as earlier turns of the conversation: drawn for each row by
    generation.seed, never the row itself; unset: none. Of multiple choice the first of the subject's dev file; unset:
    5, or as many as there are."""
    shots_from: str | None = None
    """File that shots are drawn from; unset: data.train, or for a model without a run the other held-out rows."""
    during: DuringConfig | None = None
    """Answer held-out rows (of eval.data, otherwise of data.eval_split) while the run trains; {} with the defaults."""

    @model_validator(mode="after")
    def _named(self) -> EvalConfig:
        if self.metrics == []:
            raise ValueError("eval.metrics: names no metric; leave it out, or name one")
        return self

    @property
    def sets(self) -> list[HeldSet]:
        return held_sets(self.data)

    @property
    def paths(self) -> list[str] | None:
        return [one.path for one in self.sets] or None

    @property
    def first(self) -> HeldSet | None:
        """Where one set is wanted."""
        return next((one for one in self.sets if not one.general), next(iter(self.sets), None))


class OutputConfig(Section):
    dir: Named
    """Run directory; never overwritten without --overwrite."""
