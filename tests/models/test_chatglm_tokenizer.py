"""Tokenizers rebuilt from tokenizer.model: recorded goldens, sentencepiece itself, a plain tiktoken BPE."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
import regex
import sentencepiece
from chatglm_reference import CASES, FIXTURES
from transformers import AutoTokenizer

from finetune.errors import UserError
from finetune.models.chatglm.tokenizer import GLM4_PATTERN, build_tokenizer, glm_version

CHECKPOINT = FIXTURES / "chatglm3" / "checkpoint"
ALPHABET = [*"aab  \n\t你好世界ethsop.,-0019▁🙂é", "<|user|>", "[gMASK]", "sop", "</s>", "    "]


@pytest.fixture(scope="module", params=["built", "saved and loaded again"])
def both(request, tmp_path_factory):
    """folder -> tokenizer, built here or loaded by plain AutoTokenizer."""

    def get(folder):
        tokenizer = build_tokenizer(folder)
        if request.param == "built":
            return tokenizer
        saved = tmp_path_factory.mktemp("saved")
        tokenizer.save_pretrained(saved)
        return AutoTokenizer.from_pretrained(saved)

    return get


@pytest.mark.parametrize("case", CASES)
def test_ids_and_texts_are_those_of_the_original_tokenizer(both, case):
    tokenizer = both(FIXTURES / case / "checkpoint")
    golden = json.loads((FIXTURES / case / "tokenizer_golden.json").read_text(encoding="utf-8"))
    for row in golden["rows"]:
        assert tokenizer(row["text"], add_special_tokens=False)["input_ids"] == row["sp_ids"]
        assert tokenizer(row["text"])["input_ids"] == row["call_ids"]
        assert tokenizer.decode(row["sp_ids"]) == row["decode"]
    for row in json.loads((FIXTURES / case / "chat_golden.json").read_text(encoding="utf-8")):
        assert tokenizer.decode(row["input_ids"]) == row["decoded"]
    meta = golden["meta"]
    assert tokenizer.convert_tokens_to_ids(list(meta["special_tokens"])) == list(meta["special_tokens"].values())
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (meta["pad"], meta["eos"]) == (0, 2)
    assert tokenizer.padding_side == meta["padding_side"] == "left"
    assert len(tokenizer) == meta["vocab_size"]  # the original's own len() is wrong by two


def test_batches_are_padded_left_with_unk(both):
    tokenizer = both(CHECKPOINT)
    batch = tokenizer(["a", "hello world"], padding=True)
    short, long = batch["input_ids"]
    assert len(short) == len(long)
    assert short == [0] * (len(long) - 3) + tokenizer("a")["input_ids"]
    assert batch["attention_mask"][0] == [0] * (len(long) - 3) + [1] * 3


def test_text_never_becomes_a_control_token(both):
    tokenizer = both(CHECKPOINT)
    control = set(range(950, 959)) | {0, 1, 2}
    for text in ("philosophy", "[gMASK]sop<|user|>", "</s><unk><s>", "[MASK][sMASK]eop<|observation|>"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert not control & set(ids)
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([951, 953, 957, 683, 13, 683, 498, 2], skip_special_tokens=True).strip() == "你好"


def test_random_text_equals_sentencepiece(both):
    tokenizer, draw = both(CHECKPOINT), random.Random(0)
    model = sentencepiece.SentencePieceProcessor(model_file=str(CHECKPOINT / "tokenizer.model"))
    texts = ["".join(draw.choices(ALPHABET, k=draw.randint(1, 40))) for _ in range(2000)]
    texts += [draw.choice(ALPHABET) * draw.randint(1, 40) for _ in range(300)]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == model.encode(texts)


def train(file: Path, **options) -> None:
    """A small sentencepiece model; runs of one character and of spaces make merges that overlap."""
    draw, buffer = random.Random(1), io.BytesIO()
    corpus = ["".join(draw.choices(["a", "aa", "b", " ", "  ", "你", "好好", "---", "0"], k=20)) for _ in range(800)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=buffer, minloglevel=2, hard_vocab_limit=False,
        **{"model_type": "bpe", "byte_fallback": True, "vocab_size": 420, "normalization_rule_name": "identity",
           "remove_extra_whitespaces": False, **options},
    )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(buffer.getvalue())


@pytest.mark.parametrize("options", [{}, {"split_digits": True, "split_by_whitespace": False, "vocab_size": 380}])
def test_other_sentencepiece_models_are_rebuilt(tmp_path, options):
    folder = tmp_path / "chatglm3"
    train(folder / "tokenizer.model", **options)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer, draw = build_tokenizer(folder), random.Random(2)
    texts = [
        "".join(draw.choices(["a", "aa", "b", " ", "你", "好", "好好", "-", "é", "🙂"], k=30)) for _ in range(1500)
    ]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == model.encode(texts)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": ["ab", "好a"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_models_that_would_differ_are_refused(tmp_path, options):
    folder = tmp_path / "chatglm3"
    train(folder / "tokenizer.model", **options)
    with pytest.raises(UserError, match="cannot be rebuilt exactly"):
        build_tokenizer(folder)


def test_version_is_told_by_names_then_by_the_published_code(tmp_path):
    assert glm_version(CHECKPOINT) == 3
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(CHECKPOINT / "tokenizer.model", folder)
    with pytest.raises(UserError, match="nothing says whether this is ChatGLM2 or ChatGLM3"):
        build_tokenizer(folder)
    assert build_tokenizer(folder, version=2).init_kwargs["glm_version"] == 2
    (folder / "tokenization_chatglm.py").write_text("raise SystemExit  # knows <|user|>", encoding="utf-8")
    assert glm_version(folder) == 3
    (folder / "tokenization_chatglm.py").write_text("raise SystemExit", encoding="utf-8")
    assert glm_version(folder) == 2
    for name, version in (("THUDM/chatglm3-6b", 3), ("THUDM/chatglm2-6b-32k", 2), ("THUDM/glm4-9b-chat", 4)):
        (folder / "config.json").write_text(json.dumps({"_name_or_path": name}), encoding="utf-8")
        assert glm_version(folder) == version
    with pytest.raises(UserError, match="is not GLM-4's tiktoken file"):
        build_tokenizer(folder)


def test_chatglm2_has_five_control_tokens(tmp_path):
    folder = tmp_path / "chatglm2-6b"
    folder.mkdir()
    shutil.copy(CHECKPOINT / "tokenizer.model", folder)
    tokenizer = build_tokenizer(folder)
    assert len(tokenizer) == 955
    assert tokenizer("a")["input_ids"] == [951, 953, 260]
    assert "<|user|>" not in tokenizer.get_vocab()


def test_a_folder_without_tokenizer_model_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.model"):
        build_tokenizer(tmp_path)


def test_the_marker_survives_saving(both):
    assert both(CHECKPOINT).init_kwargs["glm_version"] == 3


# --- GLM-4: a tiktoken file ---


def tiktoken_ranks(corpus: str, size: int) -> dict[bytes, int]:
    """Train a small byte-level BPE the plain way."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(GLM4_PATTERN, corpus)]
    while len(ranks) < size:
        counts: dict[bytes, int] = {}
        for word in words:
            for left, right in pairwise(word):
                counts[left + right] = counts.get(left + right, 0) + 1
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        ranks[best] = len(ranks)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if word[at] + word[at + 1] == best:
                    word[at : at + 2] = [best]
                at += 1
    return ranks


def tiktoken_encode(ranks: dict[bytes, int], text: str) -> list[int]:
    """tiktoken's own algorithm: whole words first, then always the leftmost pair of lowest rank."""
    ids = []
    for word in regex.findall(GLM4_PATTERN, text):
        parts = [word.encode()] if word.encode() in ranks else [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            found = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not found:
                break
            at = min(found)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def glm4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glm-4-9b-chat")
    corpus = (
        "the cat's hat, 你好世界 你好 hello world 12345 there aaaa   bbbb\n\n def f(x):\n    return x, where foxes jump"
    )
    ranks = tiktoken_ranks(corpus, 320)
    assert len(ranks) == 320
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n", encoding="ascii")
    return folder, ranks


def test_glm4_ids_equal_tiktokens_algorithm(both, glm4):
    folder, ranks = glm4
    tokenizer, draw = both(folder), random.Random(3)
    alphabet = [*"abehtw '\n\r\t0123你好世界,.é🙂", "the", "'s", "'S", "hello", "  ", "<|user|>", "<sop>"]
    for _ in range(1500):
        text = "".join(draw.choices(alphabet, k=draw.randint(0, 30)))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == tiktoken_encode(ranks, text)
        assert tokenizer.decode(ids) == text


def test_glm4_control_tokens_follow_the_vocabulary(both, glm4):
    tokenizer = both(glm4[0])
    names = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
             "<|assistant|>", "<|observation|>"]  # fmt: skip
    assert tokenizer.convert_tokens_to_ids(names) == list(range(320, 330))
    assert len(tokenizer) == 320 + 14
    assert tokenizer("")["input_ids"] == [322, 324]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (320, 320, "left")
    assert tokenizer.init_kwargs["glm_version"] == 4


def test_gaps_in_a_tiktoken_file_are_an_error(tmp_path):
    (tmp_path / "tokenizer.model").write_text("YQ== 0\nYg== 2\n", encoding="ascii")
    with pytest.raises(UserError, match="the ranks have gaps"):
        build_tokenizer(tmp_path)


# --- the published tokenizer.model, where it is at hand ---

PUBLISHED = os.environ.get("CHATGLM_TOKENIZER_MODEL", "")


@pytest.mark.skipif(not PUBLISHED, reason="CHATGLM_TOKENIZER_MODEL does not name the published tokenizer.model")
def test_the_published_tokenizer(tmp_path):
    golden = json.loads((FIXTURES / "real_tokenizer_golden.json").read_text(encoding="utf-8"))
    assert sha256(Path(PUBLISHED).read_bytes()).hexdigest() == golden["tokenizer_model_sha256"]
    shutil.copy(PUBLISHED, tmp_path / "tokenizer.model")
    tokenizer = build_tokenizer(tmp_path, version=3)
    for row in golden["rows"]:
        assert tokenizer(row["text"], add_special_tokens=False)["input_ids"] == row["sp_ids"]
        assert tokenizer.decode(row["sp_ids"]) == row["decode"]
