"""Who else loads adapters, and which of them: the limits of each, known before anything is written. No torch.

vLLM's are those of 0.33.0, read in its sources: keys of adapter_config.json in vllm/lora/peft_helper.py
(`_validate_features`, `validate_legal`), sizes of --max-lora-rank in vllm/config/lora.py (`MaxLoRARanks`), names of
weights in vllm/lora/utils.py (`parse_fine_tuned_lora_name`) and vllm/lora/lora_model.py (`check_unexpected_modules`),
architectures in vllm/model_executor/models (`SupportsLoRA`, `embedding_modules`; tools/vllm_models.py lists them).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.methods import of
from finetune.errors import Problem, UserError
from finetune.families import family

Config = Mapping[str, Any]
MERGE = "merge it (ft merge) and give the consumer the whole model"


@dataclass(frozen=True)
class Key:
    """A key of adapter_config.json, what is taken there, and why nothing else."""

    name: str
    why: str
    fits: Callable[[Any], bool] = lambda value: not value


@dataclass(frozen=True)
class Consumer:
    what: str
    """For people."""
    types: tuple[str, ...] | None = None
    """Of peft that it reads; None for all of peft's own."""
    keys: tuple[Key, ...] = ()
    names: re.Pattern[str] | None = None
    """Of the weights that it reads; None for all."""
    ranks: tuple[int, ...] = ()
    """Sizes to which it can be set; the largest is the limit."""
    model_types: frozenset[str] | None = None
    """Bases on which it takes adapters; None for all."""
    embedding_types: frozenset[str] | None = None
    """Bases on whose embeddings and heads it takes them; None for all."""
    gguf: bool = False
    """Whether it is given a GGUF file."""


# Model types of transformers for which vLLM 0.33.0 has a class of its own that takes adapters, …
MODELS = """
afmoe apertus arcee axk1 cohere cohere2 cwm deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon_h1
flex_olmo gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text gemma4_unified glm glm4 glm4_moe glm4_moe_lite
gpt_bigcode gpt_neox gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared
hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jamba kolibri1 laguna lfm2 lfm2_moe
llama llama4 llama4_text longcat_flash mellum minicpm3 minimax_m2 ministral3 mistral mixtral nemotron nemotron_h olmo
olmo2 olmo3 olmo_hybrid olmoe opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text
qwen3_moe qwen3_next seed_oss smollm3 starcoder2 vaultgemma
"""
# … and of these, those where embeddings and head take them, too.
EMBEDDINGS = """
apertus arcee cohere cohere2 cwm ernie4_5 exaone4 exaone_moe falcon_h1 flex_olmo glm gpt_bigcode gpt_neox granite
granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_dense hunyuan_v1_moe hyperclovax
internlm3 iquestcoder jais2 jamba kolibri1 lfm2 lfm2_moe llama llama4 llama4_text mellum minicpm3 mixtral nemotron
nemotron_h olmo olmo2 olmo3 phi phi3 qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe seed_oss
smollm3 starcoder2 vaultgemma
"""
VLLM_MODELS, VLLM_EMBEDDINGS = frozenset(MODELS.split()), frozenset(EMBEDDINGS.split())
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

LORA_KEYS = (
    Key("use_dora", "DoRA is not read"),
    Key("lora_bias", "biases of B are not read"),
    Key("bias", "trained biases of the base are not read", lambda value: value == "none"),
    Key("modules_to_save", "modules that were trained whole are not read"),
    Key("trainable_token_indices", "single trained tokens are not read"),
    Key("target_parameters", "adapters on bare parameters (experts) are not read in peft's form"),
    Key("layer_replication", "layers that stand twice are not read"),
    Key(
        "init_lora_weights", "this start changes the base's weights",
        lambda value: not isinstance(value, str) or value.lower() in PLAIN_STARTS,
    ),
    Key("alora_invocation_tokens", "aLoRA is not read"),
    Key("use_bdlora", "block-diagonal LoRA is not read"),
    Key("use_qalora", "QALoRA is not read"),
)  # fmt: skip
A_AND_B = re.compile(r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$")

CONSUMERS = {
    "peft": Consumer("plain peft"),
    "vllm": Consumer(
        "vLLM 0.33.0", ("LORA",), LORA_KEYS, A_AND_B, VLLM_RANKS, VLLM_MODELS, VLLM_EMBEDDINGS,
    ),
    "llama.cpp": Consumer("llama.cpp", ("LORA",), LORA_KEYS, A_AND_B, gguf=True),
    "ollama": Consumer("Ollama", ("LORA",), LORA_KEYS, A_AND_B, gguf=True),
}  # fmt: skip


def unfit(keys: Sequence[Key], stored: Config) -> list[Key]:
    """Those of the keys that an adapter_config.json sets, and not as they must be."""
    return [key for key in keys if (value := stored.get(key.name)) is not None and not key.fits(value)]


def largest_rank(stored: Config) -> int:
    """Of all layers, of adapter_config.json; 0 for an adapter without ranks."""
    pattern = stored.get("rank_pattern")
    ranks = [stored.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)


def consumer(name: str) -> Consumer:
    if name not in CONSUMERS:
        raise UserError(f"unknown consumer {name!r}", key="--for", fix=f"one of {', '.join(CONSUMERS)}")
    return CONSUMERS[name]


def check(name: str, stored: Config, folder: Path, started: str | None = None) -> None:
    """UserError with every limit that an adapter meets, from its config alone.

    Args:
        stored: its adapter_config.json; started: init_lora_weights of the recipe that it was trained by.
    """
    row, kind, problems = consumer(name), str(stored.get("peft_type")), []
    if of(kind).own:
        raise UserError(
            f"{kind.lower()} is no type of peft's, and {row.what} does not know it", path=folder, key="--for",
            fix=in_python(stored, folder) if name == "peft" or of(kind).not_mergeable else MERGE,
        )  # fmt: skip
    if row.types is not None and kind not in row.types:
        fix = MERGE if of(kind).not_mergeable is None else in_python(stored, folder)
        what = f"is {kind.lower()}, and {row.what} reads {' and '.join(row.types).lower()} only"
        raise UserError(what, path=folder, key="--for", fix=fix)
    for key in unfit(row.keys, stored):
        problems.append(Problem(f"has {key.name}: {key.why} by {row.what}", folder, key="--for", fix=MERGE))
    largest = largest_rank(stored)
    if row.ranks and largest > row.ranks[-1]:
        what = f"its rank is {largest}, and {row.what} reads {row.ranks[-1]} at most (--max-lora-rank)"
        problems.append(Problem(what, folder, key="--for", fix=MERGE))
    if started == "loftq" and name != "peft":
        what = "started by making up for what int4 rounds away (loftq): it fits the int4 base alone"
        fix = "merge it (ft merge --base dequantized) and give the consumer the whole model"
        problems.append(Problem(what, folder, key="--for", fix=fix))
    if problems:
        raise UserError(problems)


def check_base(name: str, model_type: str, folder: Path) -> None:
    """UserError for an adapter on a base that the consumer cannot have it on."""
    row, layout = consumer(name), family(model_type)
    if layout.layout:
        what = f"its base is in {layout.name}'s original layout, and the adapter is for transformers' own network"
        raise UserError(f"{what}: {row.what} does not bring the two together", path=folder, key="--for", fix=MERGE)
    if row.model_types is not None and model_type not in row.model_types:
        raise UserError(
            f"{row.what} has no class for {model_type} that takes adapters", path=folder, key="--for", fix=MERGE
        )


def check_names(name: str, names: list[str], model_type: str, folder: Path) -> None:
    """UserError for weights in the file that the consumer cannot place."""
    row = consumer(name)
    if row.names is None:
        return
    problems = []
    if unread := [key for key in names if not row.names.search(key)]:
        shown = f"{unread[0]}{f' and {len(unread) - 1} more' if len(unread) > 1 else ''}"
        problems.append(Problem(f"holds {shown}, which {row.what} does not read", folder, key="--for", fix=MERGE))
    if experts := [key for key in names if ".experts" in key]:
        what = f"reaches experts ({experts[0]}), whose adapters {row.what} wants in a form of its own"
        problems.append(Problem(what, folder, key="--for", fix=MERGE))
    ends = [key for key in names if "lora_embedding_" in key or ".lm_head.lora_" in key]
    if ends and row.embedding_types is not None and model_type not in row.embedding_types:
        what = f"reaches embeddings or the head ({ends[0]}), where {row.what} takes none on {model_type}"
        problems.append(Problem(what, folder, key="--for", fix=MERGE))
    if problems:
        raise UserError(problems)


def size_of(row: Consumer, rank: int) -> int:
    """The smallest setting that takes this rank."""
    return next(size for size in row.ranks if size >= rank)


def in_python(stored: Config, folder: Path) -> str:
    """How Python loads it, in one line; the card beside it has the lines one by one."""
    own = of(stored.get("peft_type")).own
    loaded = f"PeftModel.from_pretrained(base, {str(folder)!r})"
    before = "import finetune; finetune.register(); " if own else ""
    return f"in Python: {before}from peft import PeftModel; model = {loaded}"
