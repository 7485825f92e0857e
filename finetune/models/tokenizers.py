"""A base's tokenizer: with its control tokens, a pad token of its own, and what an adapter adds to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetune.errors import UserError
from finetune.models import sentencepiece_tokenizer, sources
from finetune.models.chatglm.tokenizer import refuse_template
from finetune.models.config import embedding_rows, read_config
from finetune.models.failures import reason, unloadable
from finetune.models.identity import locked_template
from finetune.models.layouts import layout_of
from finetune.recipe.sections import ModelConfig

SPLIT_PROBE = 'Tara Nkem paid 1,024.50 yuan;\n  it\'s order-ID: ZX90817 (杭州,2024年3月5日) <b>  {"k": "v"}\n\n退款!'


def load_tokenizer(model: ModelConfig, adapter: Path | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer, padded left, with a pad token that is not the end token.

    With an adapter its locked chat template is used, whatever model.chat_template has become (UserError if the locked
    file was changed since training), and the tokens that its own tokenizer adds.
    """
    config = read_config(model)
    if (own := layout_of(config).tokenizer) is not None:
        tokenizer = own(model)
        tokenizer.embedding_rows = embedding_rows(config)
        return tokenizer
    tokenizer = _tokenizer(model, config)
    grown = adapter or (sources.find_adapter(model.adapter) if model.adapter is not None else None)
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
        refuse_template(model)
        return tokenizer
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        # pad == eos hides the end of turn from the loss in many trainers: generation then never stops.
        tokenizer.pad_token = _unused_token(tokenizer)
    return tokenizer


def _tokenizer(model: ModelConfig, config: dict[str, Any]) -> PreTrainedTokenizerBase:
    if sources.file(model, "tokenizer.json") is None:
        file = sources.file(model, "tokenizer.model")
        for companion in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            sources.file(model, companion)  # into the same snapshot
        if file is not None and sentencepiece_tokenizer.wanted(Path(file).parent, str(config["model_type"])):
            return sentencepiece_tokenizer.build(Path(file).parent)
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": sources.locate(model), "revision": sources.hub_revision(model),
        "trust_remote_code": False,
    }  # fmt: skip
    try:
        found = AutoTokenizer.from_pretrained(**where)
        return found if _as_stored(found, model) else PreTrainedTokenizerFast.from_pretrained(**where)
    except Exception as error:  # tokenizers and transformers raise many kinds, bare Exception among them
        what, fix = unloadable(error, model, f"no usable tokenizer ({reason(error)})")
        raise UserError(what, path=model.name, key="model.name", fix=fix) from error


def _as_stored(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> bool:
    """Whether the tokenizer splits text as its tokenizer.json says.

    For some model types (qwen2 among them) AutoTokenizer of transformers 5 takes the class of the type whatever
    tokenizer_config.json names, and that class brings its own pre-tokenizer (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    in transformers/models/auto/tokenization_auto.py); that of Llama puts no space before what follows a token like <s>,
    as the files of Llama 2 and its kin do. A base with another tokenizer would read other tokens than it was trained
    on, without a word.
    """
    if type(tokenizer) is PreTrainedTokenizerFast or (file := sources.file(model, "tokenizer.json")) is None:
        return True
    stored = Tokenizer.from_file(str(file))
    known = {token.content for token in stored.get_added_tokens_decoder().values()}
    own = [token for token in (tokenizer.bos_token, tokenizer.eos_token) if token in known]
    texts = [SPLIT_PROBE, f"  {SPLIT_PROBE}", *(f"{token}{space}{SPLIT_PROBE}" for token in own for space in ("", " "))]
    return all(
        tokenizer.encode(text, add_special_tokens=False) == stored.encode(text, add_special_tokens=False).ids
        for text in texts
    )


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
        raise UserError(f"no usable tokenizer ({reason(error)})", path=adapter, fix="copy its files again") from error
    ours, theirs = base.get_vocab(), found.get_vocab()
    return found if ours.items() < theirs.items() else None
