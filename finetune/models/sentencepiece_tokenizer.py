"""Fast tokenizers for LLaMA-layout checkpoints that bring only a sentencepiece `tokenizer.model`.

transformers converts these with protobuf (and without it fails with a message about tiktoken), or with the checkpoint's
own code (Baichuan). Here they are rebuilt as ChatGLM's is, and refused unless sentencepiece gives the same ids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from finetune.errors import UserError
from finetune.families import family
from finetune.models.chatglm.tokenizer import sentencepiece_bpe
from finetune.models.weight_files import read_json
from finetune.resources import resource_path

BAICHUAN2_TURN = "<reserved_106>"
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def wanted(folder: Path, model_type: str) -> bool:
    """True for LLaMA layouts with tokenizer.model and no tokenizer.json."""
    alone = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    return alone and family(model_type).tokenizer == "sentencepiece"


def build(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of `folder`, with its bos and eos as tokenizer_config.json says (LLaMA's own: bos, no eos)."""
    core = sentencepiece_bpe(folder / "tokenizer.model")
    config = _json(folder / "tokenizer_config.json")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    for source in (_json(folder / "special_tokens_map.json"), config):
        for name in NAMED:
            if source.get(name):
                special[name] = source[name]["content"] if isinstance(source[name], dict) else source[name]
    added = {token: int(number) for token, number in _json(folder / "added_tokens.json").items()}
    added |= {entry["content"]: int(number) for number, entry in (config.get("added_tokens_decoder") or {}).items()}
    for token, number in sorted(added.items(), key=lambda pair: pair[1]):
        core.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if core.token_to_id(token) != number:
            raise UserError(
                f"{token!r} gets the id {core.token_to_id(token)}, the checkpoint means {number}", path=folder,
                fix="save its tokenizer as tokenizer.json where it comes from",
            )  # fmt: skip
    ends = {name: str(special[f"{name}_token"]) for name in ("bos", "eos")}
    ends = {name: token for name, token in ends.items() if config.get(f"add_{name}_token", name == "bos")}
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in set(special.values())])
    if ends:
        text = [ends.get("bos"), "$A", ends.get("eos")]
        pair = [ends.get("bos"), "$A", "$B:1", ends.get("eos")]
        core.post_processor = processors.TemplateProcessing(
            single=" ".join(part for part in text if part),
            pair=" ".join(part for part in pair if part),
            special_tokens=[(token, core.token_to_id(token)) for token in ends.values()],
        )
    template = config.get("chat_template")
    if template is None and core.token_to_id(BAICHUAN2_TURN) is not None:
        file = resource_path("data_templates", "chat_templates", "baichuan2.jinja")
        template = file.read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=template,
        **special,
    )


def _json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
