"""Fast tokenizers for ChatGLM2, ChatGLM3 and GLM-4-9B from their `tokenizer.model`, without the checkpoint's code.

ChatGLM2/3: a sentencepiece BPE model with byte fallback. GLM-4: a tiktoken file (base64 token, rank per line).
Text never becomes a control token (`split_special_tokens`): "philosophy" contains ChatGLM3's `sop`. Chat ids are built
per segment in finetune/data/chat_glm.py; there is no Jinja template, which could not be exact.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from finetune.errors import UserError
from finetune.models import sources
from finetune.models.chatglm.config import version_in
from finetune.models.chatglm.weights import fetch
from finetune.models.weight_files import read_json
from finetune.recipe.sections import ModelConfig

MASKS = ["[MASK]", "[gMASK]", "[sMASK]"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
MEDIA = ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
CONTROL = {
    2: [*MASKS, "sop", "eop"],
    3: [*MASKS, "sop", "eop", *ROLES],
    4: ["<|endoftext|>", *MASKS, "<sop>", "<eop>", *ROLES, *MEDIA],
}
"""Control tokens per version; their ids follow the last piece of the vocabulary in this order."""

GLM4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Every kind of text on which a sentencepiece normalizer, another model type or user-defined pieces would show.
PROBES = [
    "", " ", "  a  b ", "\n\n x\t", "你好，世界！ＡＢＣ　１２３", "ﬁ ① ㍿ é é", "sop <|user|> [gMASK] </s> <unk>",
    "def f(x):\n    return x ** 2  # 平方", "🙂👩‍👩‍👧 ก็ \u00a0\u200b", "aaaa        ---- 1234567890", "▁ ▁▁ <0x41>",
]  # fmt: skip


def load_original_tokenizer(model: ModelConfig) -> PreTrainedTokenizerFast:
    """Built here: the tokenizer's own code cannot run with current transformers, and is never run."""
    refuse_template(model)
    return build_tokenizer(fetch(sources.weights(model), sources.hub_revision(model)))


def refuse_template(model: ModelConfig) -> None:
    if model.chat_template is not None:
        raise UserError(
            "ChatGLM's turns are made of tokens that no text becomes, so no template can replace them",
            path=model.name, key="model.chat_template", fix="leave it out",
        )  # fmt: skip


def glm_version(folder: str | Path) -> int:
    """2, 3 or 4, from what stands beside tokenizer.model: the names in the configs, else the published code's text.

    Raises UserError when nothing tells ChatGLM2 and ChatGLM3 apart: their prompts differ, their files do not.
    """
    folder = Path(folder)
    names = []
    for file, key in (("tokenizer_config.json", "name_or_path"), ("config.json", "_name_or_path")):
        if (folder / file).is_file():
            names.append(read_json(folder / file).get(key))
    version = version_in(*names, folder.name, folder)
    if version is not None:
        return version
    code = folder / "tokenization_chatglm.py"  # read as text, never run
    if code.is_file():
        return 3 if "<|user|>" in code.read_text(encoding="utf-8") else 2
    raise UserError(
        "nothing says whether this is ChatGLM2 or ChatGLM3, whose prompts differ", path=folder, key="_name_or_path",
        fix='write "_name_or_path": "THUDM/chatglm3-6b" (or chatglm2-6b) into its config.json',
    )  # fmt: skip


def build_tokenizer(folder: str | Path, version: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of the checkpoint in `folder`, which holds tokenizer.model.

    Raises UserError when the file is missing or when the fast tokenizer would not give sentencepiece's ids.
    """
    folder = Path(folder)
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise UserError("no tokenizer.model", path=folder, fix="copy it from the published checkpoint")
    ranks = read_tiktoken(file)
    if ranks is not None:
        return _wrap(_byte_level(ranks), 4, pad="<|endoftext|>", eos="<|endoftext|>", sop="<sop>")
    version = version or glm_version(folder)
    if version == 4:
        raise UserError("is not GLM-4's tiktoken file", path=file, fix="copy it from the published checkpoint")
    return _wrap(sentencepiece_bpe(file), version, pad="<unk>", eos="</s>", sop="sop", unk_token="<unk>")


def _wrap(core: Tokenizer, version: int, *, pad: str, eos: str, sop: str, **special: Any) -> PreTrainedTokenizerFast:
    """Add control tokens, prefix and settings, the same way for all versions."""
    first = core.get_vocab_size()
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL[version]])
    ids = [core.token_to_id(token) for token in CONTROL[version]]
    if ids != list(range(first, first + len(ids))):
        raise UserError(f"control tokens have the ids {ids}: the vocabulary already holds pieces of these names")
    core.post_processor = processors.TemplateProcessing(
        single=f"[gMASK] {sop} $A",
        pair=f"[gMASK] {sop} $A $B {eos}",
        special_tokens=[(token, core.token_to_id(token)) for token in ("[gMASK]", sop, eos)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=eos,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
        glm_version=version,
        **special,
    )


def sentencepiece_bpe(file: Path) -> Tokenizer:
    """sentencepiece BPE as `tokenizers` BPE; UserError unless it gives the same ids.

    sentencepiece merges the pair whose whole has the best score, so the merges are, for each piece in score order,
    every split of it into two pieces. Control, unknown and byte pieces never come out of merging.
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    size = model.vocab_size()
    vocab = {model.id_to_piece(i): i for i in range(size)}
    normal = {
        piece: i for piece, i in vocab.items()
        if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i) or model.is_unused(i))
    }  # fmt: skip
    merges: list[tuple[str, str]] = []
    for piece in sorted(normal, key=lambda p: (-model.get_score(normal[p]), normal[p])):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted(
            ((left, right) for left, right in halves if left in normal and right in normal),
            key=lambda pair: (vocab[pair[0]], vocab[pair[1]]),
        )
    core = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    begins = model.encode("a", out_type=str)[0].startswith("▁")  # the model puts a space before every text
    core.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if begins else []), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         *([decoders.Strip(" ", 1, 0)] if begins else [])]
    )  # fmt: skip
    probes = [*PROBES, *(f"x{piece} {piece}{piece}" for piece in sorted(normal)[:: max(1, len(normal) // 500)])]
    # User-defined pieces have score 0 and are taken before any merging, which shows where two overlap.
    first = [piece for piece, i in normal.items() if model.get_score(i) == 0][:50]
    probes += [left + right[1:] for left in first for right in first if left[-1] == right[0]]
    for probe in probes:
        if core.encode(probe, add_special_tokens=False).ids != model.encode(probe):
            raise UserError(
                f"cannot be rebuilt exactly: {probe!r} gives other ids than sentencepiece",
                path=file,
                fix="only BPE models without text normalisation and user-defined pieces are supported",
            )
    return core


def read_tiktoken(file: Path) -> dict[bytes, int] | None:
    """Token -> rank of a tiktoken file, or None if it is not one."""
    ranks = {}
    try:
        for line in file.read_text(encoding="ascii").splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (UnicodeDecodeError, ValueError, binascii.Error):
        return None
    return ranks or None


def _byte_level(ranks: dict[bytes, int]) -> Tokenizer:
    """tiktoken BPE: a word in the vocabulary is taken as it is, else the pair with the lowest rank merges first."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError("tokenizer.model: the ranks have gaps", fix="copy it from the published checkpoint")
    names = bytes_to_unicode()
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += sorted(
            ((left, right) for left, right in halves if left in ranks and right in ranks),
            key=lambda pair: (ranks[pair[0]], ranks[pair[1]]),
        )

    def text(token: bytes) -> str:
        return "".join(names[byte] for byte in token)

    core = Tokenizer(
        BPE(vocab={text(token): rank for token, rank in ranks.items()},
            merges=[(text(left), text(right)) for left, right in merges], ignore_merges=True)
    )  # fmt: skip
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(GLM4_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    return core
