"""Load tokenizers and models: built-in bases, local folders, hub and ModelScope ids through one door.

    read_config(model)              config.json as a dict; what cannot be loaded is refused here, with the reason
    load_tokenizer(model)           with pad and end tokens that differ
    load_model(model, dtype)        strict: missing or unexpected weights are an error, and so is a loss like guessing
    refuse_training(model)          for weights that lie on disk or beside the GPU
    check_adapter(folder, model)    does an adapter fit the base? Before that is loaded
    attach_adapter(base, folder)    base identity checked, embeddings as many as it was trained on

Remote code is never run, pickles are read with weights_only. Where files lie: sources.py.
"""

from __future__ import annotations

import pickle
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
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

from finetune import hub, register
from finetune.errors import FinetuneError, Problem, UserError
from finetune.models import baichuan, quantization, rope, sanity, sentencepiece_tokenizer, sources
from finetune.models.adapter_files import check_fit, described, own_embeddings, resize
from finetune.models.adapter_files import weights as weights_of
from finetune.models.chatglm import weights as chatglm
from finetune.models.chatglm.adapter import convert_adapter_from_original, is_original_adapter, save_adapter
from finetune.models.chatglm.tokenizer import build_tokenizer
from finetune.models.chatglm.weights import fetch, glm_config, is_chatglm_layout
from finetune.models.identity import check_identity, locked_template, read_identity
from finetune.models.sources import HUB_HELP, base_of, builtin_names, folder, locate
from finetune.models.weight_files import DERIVED, check_file, read_json, tensors, weight_files
from finetune.recipe.resolve import Hardware
from finetune.recipe.sections import ModelConfig
from finetune.resources import resource_path
from finetune.terminal.progress import shown_name, task

__all__ = [
    "adapter_folder", "attach_adapter", "base_of", "builtin_names", "check_adapter", "check_loading", "configs_of",
    "described", "find_adapter", "folder", "load_model", "load_tokenizer", "locate", "new_model", "read_config",
    "refuse_training", "resize_for", "skeleton",
]  # fmt: skip

CPU = Hardware()
SPLIT_PROBE = 'Tara Nkem paid 1,024.50 yuan;\n  it\'s order-ID: ZX90817 (杭州,2024年3月5日) <b>  {"k": "v"}\n\n退款!'
BAICHUAN2_TURN = "<reserved_106>"


def read_config(model: ModelConfig) -> dict[str, Any]:
    """config.json. UserError, before anything else is fetched, when the model cannot be loaded."""
    path = sources.file(model, "config.json")
    if path is None:
        raise UserError("has no config.json", path=model.name, key="model.name", fix=HUB_HELP)
    config = read_json(Path(path))
    check_config(config, model)
    return config


def check_config(config: dict[str, Any], model: ModelConfig) -> None:
    """UserError unless a native network exists for this config.json."""
    sources.check_family(config, model.name)
    if is_chatglm_layout(config):
        glm_config(config, model.name, rope.glm_reading(model.rope_scaling, config))
        return
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"model_type {kind!r} is no name", path=model.name, key="model.name", fix=HUB_HELP)
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or baichuan.is_fused_layout(config):
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

    With an adapter its locked chat template is used, whatever model.chat_template has become (UserError if the locked
    file was changed since training), and the tokens that its own tokenizer adds.
    """
    config = read_config(model)
    if is_chatglm_layout(config):  # its own code cannot run here, and is never run
        _refuse_template(model)
        glm = build_tokenizer(fetch(sources.weights(model), sources.hub_revision(model)))
        glm.embedding_rows = embedding_rows(config)
        return glm
    tokenizer = _tokenizer(model, config)
    grown = adapter or (find_adapter(model.adapter) if model.adapter is not None else None)
    rows = embedding_rows(config)
    if grown is not None and (extended := extended_tokenizer(tokenizer, grown)) is not None:
        tokenizer, rows = extended, max(rows or 0, max(extended.get_vocab().values()) + 1)
    tokenizer.embedding_rows = rows
    locked = locked_template(adapter) if adapter is not None else None
    if locked is not None:
        tokenizer.chat_template = locked
    elif model.chat_template is not None:
        path = Path(model.chat_template)
        if not path.is_file():
            raise UserError("no such file", path=path, key="model.chat_template", fix="give a Jinja file")
        try:
            tokenizer.chat_template = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot be read: {error}", path=path, key="model.chat_template") from None
        tokenizer.template_file = str(path)  # so that what is wrong with it can be told with its place
    tokenizer.padding_side = "left"
    if "glm_version" in tokenizer.init_kwargs:  # GLM-4 pads with its end token, and ends turns with <|user|>
        _refuse_template(model)
        return tokenizer
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # pad == eos hides the end of turn from the loss in many trainers: generation then never stops.
        tokenizer.pad_token = _unused_token(tokenizer)
    return tokenizer


def embedding_rows(config: dict[str, Any]) -> int | None:
    """How many ids the model knows, by its config.json."""
    parts = [config, config.get("text_config") or {}]
    return next((part[key] for part in parts for key in ("padded_vocab_size", "vocab_size") if part.get(key)), None)


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
    except Exception as error:  # tokenizers and transformers raise many kinds, bare Exception among them
        what, fix = _unloadable(error, model, f"no usable tokenizer ({_reason(error)})")
        raise UserError(what, path=model.name, key="model.name", fix=fix) from error


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
    check_weights(model)
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
    precision = [str(dtype).removeprefix("torch."), *([model.quantization] if model.quantization else [])]
    with task(f"loading {shown_name(model.name)} ({', '.join(precision)})"):
        loaded = _from_pretrained(model, config, dtype, options)
        if scratch is not None:
            weakref.finalize(loaded, shutil.rmtree, scratch, ignore_errors=True)
        if quantized is not None or quantization.is_bitsandbytes(config):
            _check_quantized_shapes(loaded, model.name)
            quantization.after_loading(loaded, model.name)
    if model.sanity_check is not False:
        plain = model.model_copy(update={"chat_template": None})  # its text is no conversation
        with task("looking whether it is a language model", after=1.0):
            sanity.check(loaded, load_tokenizer(plain), model)
    return loaded


def _network(model: ModelConfig, config: dict[str, Any]) -> Any:
    """The native network of a config.json, as transformers' config, with `model.rope_scaling` in it."""
    if is_chatglm_layout(config):
        reading = rope.glm_reading(model.rope_scaling, config)
        network: Any = glm_config(config, model.name, reading)
        if reading is not None:
            return network
    elif baichuan.is_fused_layout(config):
        network = baichuan.llama_config(config, model.name)
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
        if baichuan.is_fused_layout(config):
            loaded, info = baichuan.load(source, network, revision=revision, **options)
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
    except FinetuneError:
        raise
    except Exception as error:  # a config.json with odd values ends in any kind of error
        what, fix = _unloadable(error, model, f"cannot be loaded ({_reason(error)})")
        raise UserError(what, path=model.name, key="model.name", fix=fix) from error


def _unloadable(error: Exception, model: ModelConfig, otherwise: str) -> tuple[str, str]:
    """(message, fix): of the hub, where files could not be had from there, else `otherwise`."""
    if hub.failed(error) and not Path(sources.weights(model)).is_dir():
        return hub.why(error)
    return otherwise, HUB_HELP


def _reason(error: Exception) -> str:
    """What an error of a library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines and not isinstance(error, KeyError) else f"{type(error).__name__} {error}"


def check_weights(model: ModelConfig) -> None:
    """UserError for weight files of a local folder that are missing or cut off; only headers are read."""
    where = Path(locate(model))
    if model.source != "modelscope" and where.is_dir():
        for file in weight_files(where):
            check_file(file)


def skeleton(model: ModelConfig) -> PreTrainedModel:
    """The network without weights (on torch's meta device): names and shapes, before anything large is read."""
    network = _network(model, read_config(model))
    check_weights(model)
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
    """As `adapter_folder`; None where there is none. UserError for one that peft could not read."""
    found = sources.find_adapter(reference)
    if found is not None:
        described(found)
    return found


def adapter_folder(reference: str) -> Path:
    """The adapter folder of a run directory, or the folder itself, readable by peft."""
    found = sources.adapter_folder(reference)
    described(found)
    return found


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
        more: weights for what the adjusted adapter has and the folder lacks; its own stay.
    """
    from peft import PeftConfig, PeftModel

    register()
    check_identity(adapter, folder(model), model.name)
    config = read_config(model)
    with tempfile.TemporaryDirectory() as scratch, _as_adapter_error(adapter, model.name):
        if is_chatglm_layout(config) and is_original_adapter(adapter):  # LoRA on the fused query_key_value
            save_adapter(*convert_adapter_from_original(adapter, config), scratch)
            adapter = Path(scratch)
        if more:
            weights = dict(tensors(weights_of(adapter)))
            if adapter != Path(scratch):
                shutil.copy(adapter / "adapter_config.json", scratch)
            adapter = Path(scratch)
            save_file({**more, **weights}, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        options = {} if adjust is None else {"config": adjust(PeftConfig.from_pretrained(str(adapter)))}
        resize_for(base, adapter, model)
        adapted = PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable, **options)
        adapted.holds_embeddings = bool(own_embeddings(adapter))  # they go on being saved with it
        return adapted


@contextmanager
def _as_adapter_error(adapter: Path, name: str) -> Iterator[None]:
    """What peft says about an adapter that it cannot put on this base, in one line."""
    try:
        with warnings.catch_warnings():
            # Weights that the file lacks would stay what they were drawn as.
            warnings.filterwarnings("error", "Found missing adapter keys")
            # What is said of merging is done in adapters/merge.py.
            warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", "`lora_bias=True` was passed")
            yield
    except FinetuneError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot be put on {name} ({_reason(error)})", path=adapter, key="model.adapter",
            fix="give the base it was trained on, or another adapter",
        ) from error  # fmt: skip


def check_adapter(adapter: Path, model: ModelConfig, trainable: bool = False) -> Any:
    """UserError, before the base is loaded, where the adapter's config and weights have no place on it; otherwise the
    two without weights, or None where that cannot be made.

    Args:
        trainable: refuse what can be used but not trained on.
    """
    config = read_config(model)
    if is_chatglm_layout(config) and is_original_adapter(adapter):
        return None
    if described(adapter).get("task_type") == "SEQ_CLS":  # its score head is no part of this network
        return None
    network = skeleton(model)
    with _as_user_error(model):
        resize_for(network, adapter, model)
    adapted = check_fit(network, adapter, model.name)
    if trainable and adapted is not None:
        head = adapted.get_output_embeddings()
        if hasattr(head, "base_layer") or hasattr(head, "token_adapter"):
            raise UserError(
                "works on the output head (or on embeddings tied to it), and log-probabilities are computed in "
                "training from the head's own weight: it would not be trained", path=adapter, key="model.adapter",
                fix="merge it first (ft merge) and train a new adapter on the result",
            )  # fmt: skip
    return adapted


def resize_for(network: Any, adapter: Path, model: ModelConfig) -> None:
    """Give the base `model` as many embeddings as the adapter was trained on."""
    if not is_chatglm_layout(read_config(model)):
        resize(network, adapter, added_tokens(model, adapter))


def added_tokens(model: ModelConfig, adapter: Path) -> int:
    """Ids of the tokenizer beside the adapter where it goes on from the base's, else 0."""
    plain = model.model_copy(update={"adapter": None, "chat_template": None})
    found = extended_tokenizer(load_tokenizer(plain), adapter)
    return 0 if found is None else max(found.get_vocab().values()) + 1


def extended_tokenizer(base: PreTrainedTokenizerBase, adapter: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in an adapter's folder if it has all tokens of the base's and more."""
    if not (adapter / "tokenizer.json").is_file():
        return None
    try:
        found = AutoTokenizer.from_pretrained(str(adapter), trust_remote_code=False)
    except Exception as error:
        raise UserError(f"no usable tokenizer ({_reason(error)})", path=adapter, fix="copy its files again") from error
    ours, theirs = base.get_vocab(), found.get_vocab()
    return found if ours.items() < theirs.items() else None
