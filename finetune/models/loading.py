"""Load tokenizers and models: built-in bases, local folders, hub and ModelScope ids through one door.

    read_config(model)              config.json as a dict; what cannot be loaded is refused here, with the reason
    load_tokenizer(model)           with pad and end tokens that differ
    load_model(model, dtype)        strict: missing or unexpected weights are an error, and so is a loss like guessing
    refuse_training(model)          for weights that lie on disk or beside the GPU
    attach_adapter(base, folder)    base identity checked

Remote code is never run, pickles are read with weights_only. Where files lie: sources.py.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune import families
from finetune.errors import Problem, UserError
from finetune.models import chatglm, fused, quantization, rope, sanity, sentencepiece_tokenizer, sources
from finetune.models.chatglm import fetch, glm_config, is_chatglm_layout
from finetune.models.chatglm_adapter import convert_adapter_from_original, is_original_adapter, save_adapter
from finetune.models.chatglm_tokenizer import build_tokenizer
from finetune.models.identity import check_identity, fingerprint, locked_template, read_identity
from finetune.models.sources import HUB_HELP, builtin_names, folder, locate
from finetune.recipe import Hardware, ModelConfig, resource_path

__all__ = [
    "adapter_folder", "attach_adapter", "base_of", "builtin_names", "check_loading", "configs_of", "find_adapter",
    "folder",
    "load_model", "load_tokenizer", "locate", "new_model", "read_config", "refuse_training", "skeleton",
]  # fmt: skip

CPU = Hardware()
SPLIT_PROBE = 'Tara Nkem paid 1,024.50 yuan;\n  it\'s order-ID: ZX90817 (杭州,2024年3月5日) <b>  {"k": "v"}\n\n退款!'
BAICHUAN2_TURN = "<reserved_106>"


def read_config(model: ModelConfig) -> dict[str, Any]:
    """config.json. UserError, before anything else is fetched, when the model cannot be loaded."""
    path = sources.file(model, "config.json")
    if path is None:
        raise UserError("has no config.json", path=model.name, key="model.name", fix=HUB_HELP)
    try:
        config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"is not JSON: {error}", path=path, fix="download the model again") from None
    check_config(config, model)
    return config


def check_config(config: dict[str, Any], model: ModelConfig) -> None:
    """UserError unless a native network exists for this config.json."""
    row = families.refused(config)
    if row is not None:
        raise UserError(f"{row.name} {row.why}", path=model.name, key="model.name", fix=row.instead)
    if is_chatglm_layout(config):
        glm_config(config, model.name, rope.glm_reading(model.rope_scaling, config))
        return
    kind = config.get("model_type")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or fused.is_fused_layout(config):
        return
    if kind is None:
        raise UserError(
            "config.json names no model_type", path=model.name, key="model.name",
            fix="give the folder of a complete transformers checkpoint",
        )  # fmt: skip
    if kind in CONFIG_MAPPING:
        raise UserError(
            f"{kind} is no language model that continues text", path=model.name, key="model.name",
            fix="use a causal model; `ft models list` shows what is tested",
        )  # fmt: skip
    raise UserError(
        f"model_type {kind!r} needs code that comes with the checkpoint, which is never run here", path=model.name,
        key="model.name", fix="use a checkpoint with a native network; `ft models list` shows what is tested",
    )  # fmt: skip


def load_tokenizer(model: ModelConfig, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, padded left, with a pad token that is not the end token.

    With an adapter its locked chat template is used; UserError if the file was changed since training.
    """
    config = read_config(model)
    if is_chatglm_layout(config):  # its own code cannot run here, and is never run
        _refuse_template(model)
        return build_tokenizer(fetch(sources.weights(model), sources.hub_revision(model)))
    tokenizer = _tokenizer(model, config)
    if model.chat_template is not None:
        path = Path(model.chat_template)
        if not path.is_file():
            raise UserError("no such file", path=path, key="model.chat_template", fix="give a Jinja file")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    elif adapter is not None:
        tokenizer.chat_template = locked_template(adapter) or tokenizer.chat_template
    tokenizer.padding_side = "left"
    if "glm_version" in tokenizer.init_kwargs:  # GLM-4 pads with its end token, and ends turns with <|user|>
        _refuse_template(model)
        return tokenizer
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # pad == eos hides the end of turn from the loss in many trainers: generation then never stops.
        tokenizer.pad_token = _unused_token(tokenizer)
    return tokenizer


def _refuse_template(model: ModelConfig) -> None:
    if model.chat_template is not None:
        raise UserError(
            "ChatGLM's turns are made of tokens that no text becomes, so no template can replace them",
            path=model.name, key="model.chat_template", fix="leave it out",
        )  # fmt: skip


def _tokenizer(model: ModelConfig, config: dict[str, Any]) -> PreTrainedTokenizerBase:
    if sources.file(model, "tokenizer.json") is None:
        file = sources.file(model, "tokenizer.model")
        for companion in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            sources.file(model, companion)  # into the same snapshot
        if file is not None and sentencepiece_tokenizer.wanted(Path(file).parent, str(config["model_type"])):
            built = sentencepiece_tokenizer.build(Path(file).parent)
            if built.chat_template is None and BAICHUAN2_TURN in built.get_vocab():
                template = resource_path("data_templates", "chat_templates", "baichuan2.jinja")
                built.chat_template = template.read_text(encoding="utf-8")
            return built
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": locate(model), "revision": sources.hub_revision(model),
        "trust_remote_code": False,
    }  # fmt: skip
    try:
        found = AutoTokenizer.from_pretrained(**where)
        return found if _as_stored(found, model) else PreTrainedTokenizerFast.from_pretrained(**where)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"no usable tokenizer ({reason})", path=model.name, key="model.name", fix=HUB_HELP) from None


def _as_stored(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> bool:
    """Whether the tokenizer splits text as its tokenizer.json says.

    For some model types (qwen2 among them) AutoTokenizer of transformers 5 takes the class of the type whatever
    tokenizer_config.json names, and that class brings its own pre-tokenizer (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    in transformers/models/auto/tokenization_auto.py). A base with another tokenizer would read other tokens than it
    was trained on, without a word.
    """
    if type(tokenizer) is PreTrainedTokenizerFast or (file := sources.file(model, "tokenizer.json")) is None:
        return True
    stored = Tokenizer.from_file(str(file)).encode(SPLIT_PROBE, add_special_tokens=False).ids
    return bool(tokenizer.encode(SPLIT_PROBE, add_special_tokens=False) == stored)


def _unused_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A token of the vocabulary that can stand for padding; the embedding is never resized."""
    vocabulary = tokenizer.get_vocab()
    named = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>", "<|vision_pad|>")
    reserved = sorted(t for t in vocabulary if "reserved" in t or "extra_" in t)
    for token in (*named, *reserved):
        if token in vocabulary and vocabulary[token] != tokenizer.eos_token_id:
            return token
    if tokenizer.bos_token is not None and tokenizer.bos_token_id != tokenizer.eos_token_id:
        return str(tokenizer.bos_token)
    raise UserError("the tokenizer has no token to pad with", fix="set pad_token in tokenizer_config.json")


def load_model(model: ModelConfig, dtype: torch.dtype, machine: Hardware = CPU, **options: Any) -> PreTrainedModel:
    """The base model in `dtype` on this machine's device (or as `model.device_map` spreads it), in eval mode.

    UserError on missing, unexpected or misshapen weights, and when the result does not know a word (`sanity_check`).
    """
    config = read_config(model)
    quantization.check_config(model, config)
    scratch = None
    if model.device_map is not None:
        scratch = tempfile.mkdtemp(prefix="ft-offload-")
        options |= _spread(model, scratch)
    elif machine.device != "cpu":
        options.setdefault("device_map", {"": torch.accelerator.current_device_index()})
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    if (quantized := quantization.config_for(model, dtype)) is not None:
        options["quantization_config"] = quantized
    loaded = _from_pretrained(model, config, dtype, options)
    if scratch is not None:
        weakref.finalize(loaded, shutil.rmtree, scratch, ignore_errors=True)
    if quantized is not None or quantization.is_bitsandbytes(config):
        _check_quantized_shapes(loaded, model.name)
        quantization.after_loading(loaded, model.name)
    if model.sanity_check is not False:
        sanity.check(loaded, load_tokenizer(model), model)
    return loaded


def _network(model: ModelConfig, config: dict[str, Any]) -> Any:
    """The native network of a config.json, as transformers' config, with `model.rope_scaling` in it."""
    if is_chatglm_layout(config):
        reading = rope.glm_reading(model.rope_scaling, config)
        network: Any = glm_config(config, model.name, reading)
        if reading is not None:
            return network
    elif fused.is_fused_layout(config):
        network = fused.llama_config(config, model.name)
    else:
        revision = sources.hub_revision(model)
        with _as_user_error(model):
            network = AutoConfig.from_pretrained(locate(model), revision=revision, trust_remote_code=False)
    rope.apply(network, model.rope_scaling, model.name)
    return network


def _from_pretrained(
    model: ModelConfig, config: dict[str, Any], dtype: torch.dtype, options: dict[str, Any]
) -> PreTrainedModel:
    network = _network(model, config)
    source, options = sources.weights(model), {"dtype": dtype, **options}
    revision = sources.hub_revision(model)
    if is_chatglm_layout(config):
        return chatglm.load(fetch(source, revision), network, **options)
    with _as_user_error(model):
        if fused.is_fused_layout(config):
            loaded, info = fused.load(source, network, revision=revision, **options)
        else:
            loaded, info = AutoModelForCausalLM.from_pretrained(
                source, config=network, revision=revision, trust_remote_code=False,
                output_loading_info=True, ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    check_loading(info, model.name)
    return loaded


@contextmanager
def _as_user_error(model: ModelConfig) -> Iterator[None]:
    """What transformers says about a checkpoint it cannot load, in one line."""
    try:
        yield
    except pickle.UnpicklingError:
        raise UserError(
            "a .bin file holds more than weights: pickled code is never run", path=model.name, key="model.name",
            fix="save it again as safetensors where it comes from",
        ) from None  # fmt: skip
    except torch.OutOfMemoryError:
        raise UserError(
            "does not fit into the device's memory", path=model.name, key="model.name",
            fix="set model.quantization: int4, or model.device_map: auto (which can generate, not train)",
        ) from None  # fmt: skip
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot be loaded ({reason})", path=model.name, key="model.name", fix=HUB_HELP) from None


def skeleton(model: ModelConfig) -> PreTrainedModel:
    """The network without weights (on torch's meta device): names and shapes, before anything large is read."""
    network = _network(model, read_config(model))
    with _as_user_error(model), torch.device("meta"):
        return AutoModelForCausalLM.from_config(network)


def _spread(model: ModelConfig, scratch: str) -> dict[str, Any]:
    """What accelerate needs to spread a model over devices, main memory and disk."""
    options: dict[str, Any] = {"device_map": model.device_map}
    if model.max_memory:
        options["max_memory"] = {int(k) if str(k).isdigit() else k: v for k, v in model.max_memory.items()}
    options["offload_folder"] = model.offload_folder or scratch
    return options


def refuse_training(model: PreTrainedModel, name: str) -> None:
    """UserError when weights lie where no gradient reaches: on disk, or in main memory beside a GPU."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    away = places & ({"disk"} if places <= {"cpu", "disk"} else {"cpu", "disk"})
    if away:
        raise UserError(
            f"weights are on {' and '.join(sorted(away))}, where they can generate but not be trained", path=name,
            key="model.device_map", fix="use model.quantization: int4, a smaller base, or more memory",
        )  # fmt: skip


# Derived while building the network; old checkpoints stored them as well.
DERIVED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$")


def check_loading(info: dict[str, Any], name: str) -> None:
    """transformers only warns about these, and the weights concerned stay random."""
    problems = []
    unexpected = [key for key in info["unexpected_keys"] if not DERIVED.search(key)]
    for kind, keys in (("missing", info["missing_keys"]), ("unexpected", unexpected)):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (" …" if len(keys) > 3 else "")
            problems.append(
                Problem(f"{len(keys)} {kind} weights ({shown})", name, fix="the checkpoint is not of this kind")
            )
    if info["mismatched_keys"]:
        first = sorted(info["mismatched_keys"])[0]
        problems.append(Problem(f"misshapen weights ({first})", name, fix="config.json belongs to another checkpoint"))
    if problems:
        raise UserError(problems)


def _check_quantized_shapes(model: PreTrainedModel, name: str) -> None:
    """transformers does not compare the shapes of weights that it quantizes while loading."""
    for path, module in model.named_modules():
        if quantization.is_quantized(module):
            layer: Any = module
            state = getattr(layer.weight, "quant_state", None)
            stored = list(layer.weight.shape if state is None else state.shape)
            meant = [layer.out_features, layer.in_features]
            if stored != meant:
                raise UserError(
                    f"misshapen weights ({path}: {stored}, config.json means {meant})", path=name,
                    fix="config.json belongs to another checkpoint",
                )  # fmt: skip


def new_model(config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A model with random weights from a transformers config; the caller has set the seed."""
    values = dict(config)
    model_type = values.pop("model_type", None)
    try:
        built = AutoConfig.for_model(model_type, **values)
        return AutoModelForCausalLM.from_config(built, dtype=dtype)
    except (ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"no model can be built from it ({reason})", key="model.config", fix="see the config class"
        ) from None


def find_adapter(reference: str) -> Path | None:
    """As `adapter_folder`; None where there is none."""
    path = Path(reference).expanduser()
    candidates = (path / "adapter", path)
    return next((folder.resolve() for folder in candidates if (folder / "adapter_config.json").is_file()), None)


def adapter_folder(reference: str) -> Path:
    """The adapter folder of a run directory, or the folder itself."""
    if (found := find_adapter(reference)) is not None:
        return found
    path = Path(reference).expanduser()
    if (path / "model").is_dir():
        raise UserError("is a full fine-tuning: it has no adapter", path=path, fix="give it as --model")
    what = "holds no adapter" if path.exists() else "no such run or adapter"
    raise UserError(what, path=path, key="adapter", fix="give a run directory or a folder with adapter_config.json")


def base_of(adapter: Path | None) -> str:
    """The base that an adapter names."""
    assert adapter is not None
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    identity = read_identity(adapter) or {}
    name = identity.get("base") or config.get("base_model_name_or_path")
    if not name:
        raise UserError("does not name its base", path=adapter, fix="give it with --model")
    return str(name)


def configs_of(adapter: Path, model: str | None = None) -> tuple[ModelConfig, ModelConfig]:
    """(the base of an adapter in its original precision, the same quantized as it was while training)."""
    identity = read_identity(adapter) or {}
    kept = ("revision", "source") if model is None else ()  # those of the name that the adapter gives
    loaded_as = {key: identity[key] for key in (*kept, "rope_scaling", "sanity_check") if key in identity}
    original = ModelConfig.model_validate({"name": model or base_of(adapter), **loaded_as})
    kind = identity.get("quantization_type") or "nf4"
    quantized = {"quantization": identity.get("quantization"), "quantization_type": kind}
    return original, original.model_copy(update=quantized)


def attach_adapter(
    base: PreTrainedModel, adapter: Path, model: ModelConfig, trainable: bool = False,
    adjust: Callable[[Any], Any] | None = None, more: dict[str, torch.Tensor] | None = None,
) -> PreTrainedModel:  # fmt: skip
    """`base` with the adapter of a folder on it, after checking that it was trained on this base.

    Args:
        adjust: last word on peft's config, e.g. for an adapter that goes on under a score head.
        more: weights that the adjusted adapter has and the folder lacks.
    """
    from peft import PeftConfig, PeftModel

    check_identity(adapter, fingerprint(folder(model)), model.name)
    config = read_config(model)
    with tempfile.TemporaryDirectory() as scratch:
        if is_chatglm_layout(config) and is_original_adapter(adapter):  # LoRA on the fused query_key_value
            save_adapter(*convert_adapter_from_original(adapter, config), scratch)
            adapter = Path(scratch)
        if more:
            weights = load_file(adapter / "adapter_model.safetensors")
            if adapter != Path(scratch):
                shutil.copy(adapter / "adapter_config.json", scratch)
            adapter = Path(scratch)
            save_file({**weights, **more}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        options = {} if adjust is None else {"config": adjust(PeftConfig.from_pretrained(str(adapter)))}
        return PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable, **options)
