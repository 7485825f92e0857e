"""Metrics of texts against the libraries whose figures people report, and against values worked out by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_score import rouge_scorer

from finetune import metrics
from finetune.errors import RunError, UserError
from finetune.metrics import asked, corpus, numbers, text
from finetune.metrics.json_answers import json_valid
from finetune.recipe.sections import metric_names

ENGLISH = [
    ("The cat sat on the mat.", "A cat was sitting on the mat"), ("the the the", "the cat"), ("hello", "goodbye"),
    ("It's 3.5 km, isn't it?", "It is 3.5 km"), ("a b c d e", "e d c b a"), ("", "nothing was said"),
    ("One two. Three four! one", "one two three FOUR"),
]  # fmt: skip
CHINESE = [
    ("今天天气很好，我们去公园玩。", "今天的天气非常好，我们一起去公园吧！"), ("你好", "再见"), ("", "什么都没说"),
    ("北京是中国的首都。北京很大", "中国的首都是北京，它很大。"), ("我喜欢用Python写代码", "我喜欢Python编程"),
]  # fmt: skip
ROUGE = {"rouge1": 1, "rouge2": 2, "rougeL": 0}


def rows(pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    return [{"prediction": prediction, "reference": reference} for prediction, reference in pairs]


@pytest.mark.parametrize(("pairs", "tokenizer"), [(ENGLISH, "13a"), (CHINESE, "zh")])
def test_bleu_and_chrf_are_sacrebleus(pairs: list[tuple[str, str]], tokenizer: str) -> None:
    predictions, references = [p for p, _ in pairs], [[r for _, r in pairs]]
    bleu, chrf = corpus.bleu.whole(rows(pairs)), corpus.chrf.whole(rows(pairs))
    assert bleu is not None
    assert chrf is not None
    assert bleu.value == pytest.approx(sacrebleu.corpus_bleu(predictions, references, tokenize=tokenizer).score)
    assert chrf.value == pytest.approx(sacrebleu.corpus_chrf(predictions, references).score)
    assert f"tok:{tokenizer}" in str(bleu.how)
    for whole in (bleu, chrf):
        assert whole.interval is not None
        assert whole.interval[0] < whole.value < whole.interval[1]


def test_corpus_figures_are_of_rows_with_a_reference() -> None:
    both = rows([("a b c d", "a b c d")])
    assert corpus.bleu.whole([*both, {"prediction": "x", "reference": None}]).value == pytest.approx(100)  # type: ignore[union-attr]
    assert corpus.bleu.whole([{"prediction": "x", "reference": None}]) is None


def test_the_interval_of_a_corpus_figure_is_that_of_drawn_rows() -> None:
    """As sacrebleu's own bootstrap has it, up to the draw."""
    words = [*"abcdefghijklmnopqr"]
    many = [(" ".join(words[: 5 + i % 11]), " ".join(words[i % 3 : 6 + i % 7])) for i in range(200)]
    whole = corpus.bleu.whole(rows(many))
    assert whole is not None
    assert whole.interval is not None
    theirs = sacrebleu.BLEU().corpus_score([p for p, _ in many], [[r for _, r in many]], n_bootstrap=1000)
    assert (whole.interval[1] - whole.interval[0]) / 2 == pytest.approx(theirs._ci, rel=0.15)


class Characters:
    def tokenize(self, words: str) -> list[str]:
        return text.TOKEN.findall(words.lower())


@pytest.mark.parametrize("name", ROUGE)
def test_rouge_is_rouge_scores(name: str) -> None:
    for pairs, tokenizer in ((ENGLISH, None), (CHINESE, Characters())):
        scorer = rouge_scorer.RougeScorer([name], tokenizer=tokenizer)
        for prediction, reference in pairs:
            expected = scorer.score(reference, prediction)[name].fmeasure
            assert text.rouge(ROUGE[name])(prediction, reference) == pytest.approx(expected), (prediction, reference)


def test_rouge_of_chinese_words_is_that_of_rouge_chinese() -> None:
    """Computed once with rouge-chinese 1.0.3 and jieba 0.42.1, as LLaMA-Factory calls them."""
    expected = [(0.476190, 0.315789, 0.476190), (0, 0, 0), (0, 0, 0), (0.875, 0.266667, 0.588235)]
    for (prediction, reference), figures in zip(CHINESE, expected, strict=False):
        found = [text.rouge_jieba(n)(prediction, reference) for n in ROUGE.values()]
        assert found == pytest.approx(figures, abs=1e-6)
    assert [text.rouge_jieba(n)("the the the", "the cat") for n in ROUGE.values()] == pytest.approx((2 / 3, 0, 0.4))


def test_bleu4_of_characters_is_nltks() -> None:
    for prediction, reference in ENGLISH + CHINESE + [("abcdef", "abcdef"), ("ab", "abc")]:
        smooth = SmoothingFunction().method3
        expected = sentence_bleu([list(reference)], list(prediction), smoothing_function=smooth) if prediction else 0
        assert text.character_bleu4(prediction, reference) == pytest.approx(expected), (prediction, reference)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Ｈello， World！", "hello world", True), ("你好，世界。", "你好 世界", True), ("中 文 abc", "中文abc", True),
        ("don't", "dont", True), ("well-known", "well known", True), ("3.5", "35", False), ("-5", "5", False),
        ("?!", "!?", False), ("?!", "？！", True), ("a  b", "a b", True), ("ab", "a b", False), ("1:30", "130", False),
        ("Straße", "STRASSE", True),
    ],
)  # fmt: skip
def test_normalised_match(a: str, b: str, same: bool) -> None:
    assert text.normalised_match(a, b) is same


def test_token_f1() -> None:
    assert text.token_f1("The cat sat", "a cat sat down") == pytest.approx(2 * 2 / (3 + 4))
    assert text.token_f1("北京很大", "北京大。") == pytest.approx(2 * 3 / (4 + 3))
    assert text.token_f1("b a", "A, B!") == 1
    assert (text.token_f1("-5", "5"), text.token_f1("", "5"), text.token_f1("", "")) == (0, 0, 1)


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("#### 1,234", "1234.0"), ("so 16-3=13", "13"), ("x = -5.", "-5"), ("$1,234.50.", "1234.5"), ("１８ 个", "18"),
        ("18 eggs\n#### 20 dollars\nQuestion 7", "20"), ("#### none\n7", "7"), ("1,2", "2"), ("25 m²", "25"),
        (".5", "0.5"), ("10 - 5 = −5", "-5"), ("2e3", "2000"), ("2e9999999", "9999999"), ("none", None), ("", None),
    ],
)  # fmt: skip
def test_the_number_of_an_answer(written: str, number: str | None) -> None:
    assert numbers.final_number(written) == (None if number is None else Decimal(number))


def test_number_match_needs_a_number_in_the_reference() -> None:
    assert numbers.number_match("it is 1,234", "9 * 2\n#### 1234.0") is True
    assert numbers.number_match("no idea", "#### 3") is False
    assert numbers.number_match("3", "three") is None


def test_json_valid_is_strict() -> None:
    def valid(prediction: str, reference: str | None = None) -> float | None:
        return json_valid({"prediction": prediction, "reference": reference})

    texts = ('{"a": 1}', " [1] ", '{"a": NaN}', '{"a": 1, "a": 2}', "```json\n{}\n```")
    assert [valid(t) for t in texts] == [1, 1, 0, 0, 0]
    assert (valid("{}", "{}"), valid("{}", "text")) == (1, None)


# --- names ---


def test_a_list_of_names() -> None:
    assert metric_names("loss, rouge1,") == ["loss", "rouge1"]
    assert metric_names([r"loss,regex:a{1,3},b", "bleu", "loss"]) == ["loss", "regex:a{1,3},b", "bleu"]


def test_a_pattern_compares_what_both_sides_have_last() -> None:
    (metric,) = asked.find([r"regex:answer is (\w)"], "answers", "--metrics")

    def value(prediction: str, reference: str | None) -> float | None:
        return metric.function({"prediction": prediction, "reference": reference})

    assert value("the answer is A, no: the answer is B", "answer is B") == 1
    assert value("the answer is A", "answer is B") == 0
    assert value("no idea", "answer is B") == 0
    assert value("the answer is B", " B\n") == 1, "a reference without a match is compared as it is"
    assert value("B", None) is None
    (whole,) = asked.find([r"regex:[A-D]\b"], "answers", "--metrics")
    assert whole.function({"prediction": "A B", "reference": "B"}) == 1


def script(folder: Path, body: str) -> str:
    (folder / "own.py").write_text(body, encoding="utf-8")
    return f"{folder / 'own.py'}:f"


ROW = {"prediction": "a", "reference": "b", "columns": {"n": 2, "bad name": 1, "prediction": 3}, "file": "x", "row": 7}


def test_a_function_gets_the_columns_that_it_names(tmp_path: Path) -> None:
    def value(body: str) -> float | None:
        (metric,) = asked.find([script(tmp_path, body)], "answers", "--metrics")
        assert metric.name == "own.py:f"
        return metric.function(ROW)

    assert value("def f(prediction, reference):\n    return prediction < reference\n") == 1
    assert value("def f(a, b, *, n):\n    return n / 4\n") == 0.5
    assert value("def f(prediction, reference, **columns):\n    return len(columns)\n") == 1
    assert value("def f(prediction, reference):\n    return None\n") is None
    for body in ("return 'yes'", "return float('nan')", "return 1 / 0", "raise SystemExit(3)"):
        with pytest.raises(RunError, match=r"^x, row 7: own\.py:f "):
            value(f"def f(prediction, reference):\n    {body}\n")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rougel", "did you mean rougeL?"), ("exact-match", "did you mean exact_match?"),
        ("zzz", "one of number_match"),
        ("regex:(", "no regular expression"), ("regex:", "the pattern is empty"), ("regex:a,loss", "name it last"),
        ("nowhere.py:f", "no such file"), ("margin", "is measured on pairs and unpaired, and these rows are answers"),
    ],
)  # fmt: skip
def test_names_that_cannot_be(name: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        asked.find([name], "answers", "--metrics")
    assert str(caught.value).count("\n") == 0
    assert "--metrics" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def f(prediction): pass", "does not take an answer and a reference"), ("g = 1", "has no function f"),
        ("async def f(a, b): pass", "coroutine"), ("import nothing_here\ndef f(a, b): pass", "cannot be imported"),
    ],
)  # fmt: skip
def test_functions_that_cannot_be(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        asked.find([script(tmp_path, body + "\n")], "answers", "--metrics")


def test_metrics_that_no_row_has_are_refused(tmp_path: Path) -> None:
    def check(*names: str, reference: str | None = "b") -> None:
        row = {**ROW, "reference": reference, "prediction": reference or "", "loss": None, "loss_tokens": 1}
        asked.check_rows(asked.find(names, "answers", "--metrics"), [row], "--metrics")

    check("exact_match", "bleu", "json_valid", reference="{}")
    for name in ("field_accuracy", "json_valid", "number_match"):
        with pytest.raises(UserError, match=f"{name} is of none of these rows"):
            check(name)
    with pytest.raises(UserError, match="bleu is of none of these rows"):
        check("bleu", reference=None)
    with pytest.raises(UserError, match=r"x, row 7: --metrics: has no column 'm'"):
        check(script(tmp_path, "def f(a, b, m): return 1\n"))
    with pytest.raises(UserError, match=r"failed: ZeroDivisionError.*tried with the reference"):
        check(script(tmp_path, "def f(a, b): return 1 / 0\n"))


def test_a_missing_package_is_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Callable[..., Any] = importlib.util.find_spec
    absent = ("sacrebleu", "jieba")
    monkeypatch.setattr(asked.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    for name, package in (("bleu", "sacrebleu"), ("chrf", "sacrebleu"), ("rouge2_jieba", "jieba")):
        with pytest.raises(UserError, match=rf"{name} needs {package}.*pip install 'ft-recipes\[eval\]'"):
            asked.check([name], "--metrics")
    asked.check(["rouge1"], "--metrics")


def test_what_is_measured_when_nothing_is_named() -> None:
    def names(*references: str | None) -> list[str]:
        return [
            m.name for m in metrics.by_itself("answers", [{"reference": r, "prediction": None} for r in references])
        ]

    plain = ["exact_match", "loss", "perplexity", "reward", "win_rate"]
    assert names("a", None) == plain
    assert names("9\n#### 9", "#### 1,000", "none") == ["number_match", *plain]
    assert set(names('{"a": 1}')) - set(plain) == {"json_valid", "field_accuracy"}


def test_a_win_is_a_higher_reward_than_the_references() -> None:
    found = [{"reward": 1.0, "reference_reward": r} for r in (0.0, 1.0, 2.0, 0.5, None)]
    (metric,) = asked.find(["win_rate"], "answers", "--metrics")
    figures = metric.figures(found)
    assert figures["win_rate"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert figures["win_rate_ci"][0] < 0.625 < figures["win_rate_ci"][1]


def test_the_mean_of_subjects() -> None:
    subjects = [("a", [1, 1, 1, 1]), ("b", [0, 1])]
    found = [{"letter_right": float(v), "group": s} for s, values in subjects for v in values]
    values = metrics.measure("choices", found)
    assert values["choice_accuracy"] == pytest.approx(5 / 6)
    assert values["choice_accuracy/b_ci"] == pytest.approx(list(metrics.wilson(1, 2)))
    assert values["choice_accuracy_macro"] == pytest.approx((1 + 0.5) / 2)
    half = 1.959964 * (6 / 8 * 2 / 8 / 4 + 1 / 2 * 1 / 2 / 2) ** 0.5 / 2
    assert values["choice_accuracy_macro_ci"] == pytest.approx([0.75 - half, 1.0])
    none = metrics.measure("choices", [{**row, "letter_right": 0.0} for row in found])
    assert none["choice_accuracy_macro_ci"][1] > 0.1, "none of six right is not surely none"
    assert "choice_accuracy_macro" not in metrics.measure("choices", found[:4])


def test_corpora_are_compared_on_the_same_drawn_rows() -> None:
    """The interval of a difference is narrower than those of two figures apart, and its middle is the difference."""
    words = "the boat was late again and nobody at the pier knew when one would leave for the far islands".split()  # noqa: SIM905
    references = [" ".join(words[i : i + 9]) for i in range(12)]
    a = rows([(" ".join(r.split()[:6]), r) for r in references])
    b = rows([(r if i % 2 else " ".join(r.split()[:6]), r) for i, r in enumerate(references)])
    found = corpus.bleu.against(a, b)
    before, after = (corpus.bleu.whole(x) for x in (a, b))
    assert before is not None
    assert after is not None
    assert found["difference"] == pytest.approx(after.value - before.value)
    assert found["ci"][0] < found["difference"] < found["ci"][1]
    assert (found["n"], found["wins"], found["losses"], found["ties"]) == (12, 6, 0, 6)
    same = corpus.chrf.against(a, a)
    assert (same["difference"], same["ci"]) == (0, [0, 0])
