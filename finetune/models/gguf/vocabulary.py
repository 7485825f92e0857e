"""The tokenizer of a model folder as a GGUF file holds it: what llama.cpp will do with it is tried out, not guessed.

A byte-level vocabulary names one of llama.cpp's rules for cutting text into words. Which one is found by behaviour: the
rule is put in the place of the tokenizer's own, and must give the same ids on every probe. A sentencepiece vocabulary
has scores instead of merges; llama.cpp's way of joining by scores is written out here and held against the ids, also
behind the vocabulary's own tokens: llama.cpp puts a space before every text that follows one, or before none.
"""

from __future__ import annotations

import heapq
import json
import random
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from finetune.errors import UserError
from finetune.models.gguf.checks import DIGIT_SPLITS, GPT2_SPLITS, NUMBER_SPLITS
from finetune.models.gguf.tokenizer import WHOLE_WORDS, splitter

Render = Callable[[list[dict[str, str]], bool], str | None]
"""(a conversation, whether an answer is asked for) -> its text by the chat template; None where that refuses it."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
USUAL = ("llama-bpe", "qwen2", "smollm", "gpt-2", "qwen35", "tekken", "gpt-4o")
"""Tried first: of rules that do the same, the best known name."""
KNOWN = [*USUAL, *sorted((GPT2_SPLITS | DIGIT_SPLITS | set(GGUF_PRE_TOKENIZER_SPLITS)) - {*USUAL}), *NUMBER_SPLITS]
INSTEAD = "merge with --format hf, and ask the model's authors for a GGUF file of the base"
TEXTS = (
    "Hello world", "The year 1024,  costs 12345.67 (see 3.14)!", "  leading\n\n\ttab and\r\n newline   ", " x", "\n",
    "北京的水壶,王小明 250元。", "订单B9876的电热水壶迟迟没有送到，客户要求退款128元。", "it's we'll I'VE don't DON'T",
    "naïve café — “quotes” 🙂👩‍👩‍👧", "def f(x):\n    return x**2\n\n\n", "a" * 9 + " " * 7 + "b", "１２３ ½ ²",
    "Привет, мир! Ещё 42.", "日本語のテキスト、カタカナ。", "한국어 문장입니다", "word 1 22 333 4444 1234567",
    "camelCaseWord HTTPServer", '{"k": ["v", 1.5e-3]}', "http://a.b/c?d=e&f=g#h", "tab\tseparated\tvalues\n\n\n\nend",
)  # fmt: skip


CHATS = ("Hello, 1, 2 world\n\n 北京", " x", "\n  y 🙂 ", "订单B98，退款128元。")


@dataclass(frozen=True)
class Vocabulary:
    values: dict[str, Any]
    """Metadata of the file, under llama.cpp's keys."""
    rule: str
    """How it cuts text into words, in words."""
    texts: list[str]
    """Such as have the same ids; the chats are always among them."""


def vocabulary(tokenizer: Any, rows: int, path: Path, render: Render) -> Vocabulary:
    """UserError, for `path`, for a tokenizer that llama.cpp cannot follow.

    Args:
        tokenizer: transformers', with the library tokenizers behind it.
        rows: of the embedding; ids without a token get a name that no text holds. render: writes conversations.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        refuse(path, f"its tokenizer ({type(tokenizer).__name__}) is no tokenizer.json")
    made = json.loads(backend.to_str())
    model = made["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        refuse(path, f"its tokenizer is of the kind {model['type']}, with other marks than llama.cpp's BPE")
    check_added(made["added_tokens"], path)
    tokens, types = listed(made, max(rows, 1 + max(tokenizer.get_vocab().values())))
    if len(tokens) > rows:
        refuse(path, f"its tokenizer has {len(tokens):,} tokens and its embedding {rows:,} rows")
    values: dict[str, Any] = {}
    chats, texts = chats_of(tokenizer, render), list(TEXTS)
    if model.get("byte_fallback"):
        scores = scores_of(model["merges"], tokens)
        for number, token in enumerate(tokens):
            if types[number] == USER_DEFINED:
                tokens[number] = token.replace("▁", " ")
        prefix, rule, texts = spaced(backend, Scores(tokens, types, scores), chats, path)
        values |= {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": prefix}
    else:
        pre = rule_of(made, path)
        values |= {"model": "gpt2", "pre": pre, "merges": [pair(merge) for merge in model["merges"]]}
        rule = f"text is cut into words as {pre} does"
    values |= {"tokens": tokens, "token_type": types}
    return Vocabulary({f"tokenizer.ggml.{key}": value for key, value in values.items()}, rule, [*texts, *chats])


def refuse(path: Path, what: str) -> Any:
    raise UserError(what, path=path, key="--format", fix=INSTEAD)


def pair(merge: Any) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def check_added(added: list[dict[str, Any]], path: Path) -> None:
    for token in added:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            how = "is only found as a whole word" if token["single_word"] else "takes the white space beside it"
            refuse(path, f"its token {token['content']!r} {how}, and llama.cpp has no such tokens")


def listed(made: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """(token of every id, its type)"""
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for token, number in made["model"]["vocab"].items():
        is_byte = made["model"].get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        tokens[number], types[number] = token, BYTE if is_byte else NORMAL
    for token in made["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    unknown = made["model"]["vocab"].get(made["model"].get("unk_token"))
    if unknown is not None and made["model"].get("byte_fallback"):
        types[unknown] = UNKNOWN
    return tokens, types


def probes(made: dict[str, Any]) -> list[str]:
    """Texts, and texts put together from pieces of the vocabulary, so that what may join does meet."""
    vocab, added = made["model"]["vocab"], {token["content"] for token in made["added_tokens"]}
    plain = Tokenizer.from_str(json.dumps({**made, "post_processor": None}))
    pieces = [plain.decode([number]) for token, number in sorted(vocab.items()) if token not in added]
    pieces = [piece for piece in pieces if "\ufffd" not in piece and piece]
    draw = random.Random(0)
    mixed = ["".join(draw.choices(pieces, k=8)) for _ in range(1500)] if pieces else []
    return [unicodedata.normalize("NFC", text) for text in (*TEXTS, *mixed)]


def rule_of(made: dict[str, Any], path: Path) -> str:
    """Name of llama.cpp's rule that gives the ids of this tokenizer. UserError when none does."""
    normalizer = (made.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        refuse(path, f"its tokenizer changes text before it reads it ({normalizer}), and llama.cpp does not")
    texts = probes(made)
    plain = {**made, "normalizer": None, "post_processor": None, "truncation": None, "padding": None}
    ours = ids(Tokenizer.from_str(json.dumps(plain)), texts)
    others = {}  # two, because words that were seen are kept
    for whole in (False, True):
        model = {**made["model"], "ignore_merges": whole}
        others[whole] = Tokenizer.from_str(json.dumps({**plain, "model": model, "pre_tokenizer": None}))
    best = (len(texts) + 1, "", "")
    for pre in KNOWN:
        other = others[pre in WHOLE_WORDS]
        other.pre_tokenizer = splitter(pre)
        wrong = [text for text, a, b in zip(texts, ours, ids(other, texts), strict=True) if a != b]
        if not wrong:
            return pre
        best = min(best, (len(wrong), pre, wrong[0]))
    what = f"its tokenizer cuts text into words as no rule of llama.cpp does (nearest: {best[1]}, not for {best[2]!r})"
    return str(refuse(path, what))


def ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=False)]


def by_transformers(tokenizer: Any) -> Render:
    def render(chat: list[dict[str, str]], prompt: bool) -> str | None:
        try:
            return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))
        except TemplateError:
            return None

    return render


def chats_of(tokenizer: Any, render: Render) -> list[str]:
    """Conversations as the chat template writes them: control tokens between words. Some templates know no answers."""
    found = []
    for text in CHATS if tokenizer.chat_template else ():
        turns = [{"role": role, "content": text} for role in ("user", "assistant", "user")]
        found += [render(chat, True) for chat in (turns[:1], turns)]
    return [chat for chat in found if chat]


def scores_of(merges: list[Any], tokens: list[str]) -> list[float]:
    """The earlier a token can be made, the higher; all merges into one token stand together."""
    made: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made.setdefault(left + right, rank)
    return [-float(made.get(token, len(merges))) for token in tokens]


def joined(text: str, ranks: dict[str, int], scores: list[float], prefix: bool) -> list[int]:
    """Ids of a text without added tokens, as llama.cpp's sentencepiece joins characters: the best score first, of
    equal ones the leftmost; what is no token becomes bytes."""
    symbols = [*f"{' ' if prefix else ''}{text}".replace(" ", "▁")]
    after, before = [*range(1, len(symbols)), -1], [*range(-1, len(symbols) - 1)]
    queue: list[tuple[float, int, int, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0 and (number := ranks.get(symbols[left] + symbols[right])) is not None:
            heapq.heappush(queue, (-scores[number], left, right, symbols[left] + symbols[right]))

    for left in range(len(symbols) - 1):
        offer(left, left + 1)
    while queue:
        _, left, right, both = heapq.heappop(queue)
        if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != both:
            continue
        symbols[left], symbols[right] = both, ""
        after[left] = after[right]
        if after[right] >= 0:
            before[after[right]] = left
        offer(before[left], left)
        offer(left, after[left])
    out: list[int] = []
    for symbol in filter(None, symbols):
        found = ranks.get(symbol)
        out += [found] if found is not None else [ranks[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out


PREFIXED = (
    "with a space before each text and behind each special token, which a bare gguf_file= of transformers leaves out"
)


class Scores:
    """A sentencepiece vocabulary in llama.cpp."""

    def __init__(self, tokens: list[str], types: list[int], scores: list[float]) -> None:
        self.scores = scores
        self.ranks = {t: n for n, t in enumerate(tokens) if types[n] in (NORMAL, BYTE, USER_DEFINED)}
        self.own = {t: n for n, t in enumerate(tokens) if types[n] in (CONTROL, USER_DEFINED) and t}
        longest = sorted(self.own, key=len, reverse=True)
        self.cut = re.compile("(" + "|".join(map(re.escape, longest)) + ")") if longest else re.compile("(?!)()")

    def ids(self, text: str, prefix: bool) -> list[int]:
        """prefix: add_space_prefix of the file."""
        out: list[int] = []
        begins = True  # the text, or behind a token of the vocabulary's own
        for number, part in enumerate(self.cut.split(text)):
            if not part:
                continue
            own = number % 2 == 1
            out += [self.own[part]] if own else joined(part, self.ranks, self.scores, prefix and begins)
            begins = own
        return out


def spaced(backend: Tokenizer, scores: Scores, chats: list[str], path: Path) -> tuple[bool, str, list[str]]:
    """(add_space_prefix, the rule in words, the texts of TEXTS that have the same ids). UserError when joining by
    scores gives a chat, or a text without one, other ids than the tokenizer either way."""
    texts = [*probes(json.loads(backend.to_str())), *chats]
    ours = ids(backend, texts)
    wrong = {
        prefix: [text for text, own in zip(texts, ours, strict=True) if scores.ids(text, prefix) != own]
        for prefix in (True, False)
    }
    rule, fewer = "text is joined by scores, as sentencepiece does", min(wrong, key=lambda prefix: len(wrong[prefix]))
    if not wrong[fewer]:
        return fewer, f"{rule}; {PREFIXED}" if fewer else rule, list(TEXTS)
    # transformers' LlamaTokenizer puts a space before a text, unless one is there, and none behind its own tokens.
    same = all(text.startswith(" ") or text in chats for text in wrong[True])
    if same and chats and not set(chats) & set(wrong[False]):
        kept = [text for text in TEXTS if text not in wrong[False]]
        return False, f"{rule}; what is no chat begins without its first space in llama.cpp", kept
    if same and not chats:
        kept = [text for text in TEXTS if text not in wrong[True]]
        return True, f"{rule}; what begins with a space gets one more in llama.cpp", kept
    text = (wrong[fewer] if not same else [text for text in wrong[False] if text in chats])[0]
    return refuse(path, f"its tokenizer gives other ids than llama.cpp's sentencepiece would for {text!r}")
