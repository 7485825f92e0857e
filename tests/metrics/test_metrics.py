"""Metrics against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from finetune import metrics
from finetune.metrics.statistics import mean_interval


def test_exact_match_ignores_outer_white_space_only() -> None:
    assert metrics.exact_match(" a b\n", "a b")
    assert not metrics.exact_match("a  b", "a b")


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ('{"a": "1", "b": "2"}', {"a": True, "b": True}),
        ('{"a": "1", "b": "3"}', {"a": True, "b": False}),
        ('{"b": "2"}', {"a": False, "b": True}),
        ("nonsense", {"a": False, "b": False}),
        ("[1]", {"a": False, "b": False}),
    ],
)
def test_json_fields(prediction: str, expected: dict[str, bool]) -> None:
    assert metrics.json_fields(prediction, '{"a": "1", "b": "2"}') == expected


def test_json_fields_needs_an_object() -> None:
    assert metrics.json_fields("{}", "plain text") is None
    assert metrics.json_fields('{"a": 1}', '{"a": null}') == {"a": False}


def test_json_fields_tells_true_from_one() -> None:
    assert metrics.json_fields('{"a": true, "b": [0], "c": 1.0}', '{"a": 1, "b": [false], "c": 1}') == {
        "a": False, "b": False, "c": True,
    }  # fmt: skip


@pytest.mark.parametrize("value", ["[" * 500 + "]" * 500, "[" * 100_000, "1" * 5000, '{"a":' * 200 + "1" + "}" * 200])
def test_json_fields_of_what_a_model_may_write(value: str) -> None:
    text = f'{{"a": {value}}}'
    assert metrics.json_fields(text, '{"a": 1}') == {"a": False}
    assert metrics.json_fields('{"a": 1}', text) is None


def test_by_group() -> None:
    groups = ["b", None, "a", "b"]
    assert metrics.by_group([1.0, 0.0, 0.0, 0.0], groups) == {"a": [0.0], "b": [1.0, 0.0]}
    assert list(metrics.by_group([1.0, 0.0, 0.0, 0.0], groups)) == ["a", "b"]
    assert metrics.by_group([1.0], [None]) == {}
    with pytest.raises(ValueError, match="zip"):
        metrics.by_group([1.0], [])


def test_wilson() -> None:
    # Newcombe 1998, table I, case r=81, n=263: 0.2553 to 0.3662
    low, high = metrics.wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert metrics.wilson(0, 0) == (0.0, 1.0)
    assert metrics.wilson(10, 10)[1] == pytest.approx(1.0)
    assert metrics.wilson(10, 10)[0] == pytest.approx(0.7225, abs=1e-4)


def test_paired() -> None:
    a, b = [0.0] * 40 + [1.0] * 10, [1.0] * 30 + [0.0] * 10 + [1.0] * 10
    result = metrics.paired(a, b)
    assert result["difference"] == pytest.approx(0.6)
    assert (result["wins"], result["losses"], result["ties"]) == (30, 0, 20)
    # standard error sqrt(0.6 * 0.4 / 50) = 0.069
    assert result["ci"][0] == pytest.approx(0.6 - 1.96 * 0.0693, abs=0.03)
    assert result["ci"][1] == pytest.approx(0.6 + 1.96 * 0.0693, abs=0.03)
    low = metrics.paired(a, b, lower_is_better=True)
    assert (low["wins"], low["losses"], low["ties"]) == (0, 30, 20)
    assert (low["difference"], low["ci"]) == (result["difference"], result["ci"]), "of which the sign is not turned"
    with pytest.raises(ValueError, match="cannot be paired"):
        metrics.paired([1.0], [1.0, 0.0])


def test_a_paired_difference_is_that_of_the_means_that_are_reported() -> None:
    a, b, weights = [1.0, 2.0, 4.0], [1.5, 1.0, 3.0], [1.0, 5.0, 2.0]
    found = metrics.paired(a, b, weights=(weights, weights))
    assert found["difference"] == pytest.approx((0.5 - 5 - 2) / 8)
    assert (found["n"], found["wins"], found["losses"]) == (3, 1, 2)
    same, plain = metrics.paired(a, b, weights=([1.0] * 3, [1.0] * 3)), metrics.paired(a, b)
    assert same.pop("ci") == pytest.approx(plain.pop("ci"))
    assert same == pytest.approx(plain)


def test_rows_that_are_all_the_same_do_not_prove_that_models_are() -> None:
    low, high = metrics.paired([1.0] * 20, [1.0] * 20)["ci"]
    assert -0.25 < low < -0.05
    assert 0.05 < high < 0.25
    assert metrics.paired([0.5] * 20, [0.5] * 20)["ci"] == [0, 0], "of what is not right or wrong nothing is known"
    assert metrics.drawn_rows([0.0] * 5, [1.0] * 5) == (0, 0)


def coverage(draw: Any, truth: float, runs: int = 300) -> float:
    """In how many of such experiments the interval of the difference holds what it is drawn with."""
    held = 0
    for seed in range(runs):
        a, b, weights = draw(np.random.default_rng(seed))
        low, high = metrics.paired(a, b, resamples=250, seed=seed, weights=weights)["ci"]
        held += low <= truth <= high
    return held / runs


def test_paired_intervals_hold_the_truth_in_95_of_100_experiments() -> None:
    """300 simulated evaluations of 25 and 60 rows: 95% is 285 of them, give or take 4 (one standard deviation), and a
    bootstrap of few rows may miss somewhat more."""

    def losses(generator: np.random.Generator) -> Any:
        easy = generator.gamma(2, 1, 25)  # what makes a row hard is the same for both
        return easy + generator.normal(0, 0.3, 25), easy + generator.normal(0.2, 0.3, 25), None

    def answers(generator: np.random.Generator) -> Any:
        both, change = generator.random(60) < 0.5, generator.random(60)
        after = both | (change < 0.06)  # three rows of a hundred change, and only to the better
        return both.astype(float), after.astype(float), None

    def tokens(generator: np.random.Generator) -> Any:
        counts, a, b, _ = generator.integers(1, 40, 40), *losses(generator)
        return a, b, (counts[: len(a)], counts[: len(b)])

    found = {draw.__name__: coverage(draw, truth) for draw, truth in ((losses, 0.2), (answers, 0.03), (tokens, 0.2))}
    assert min(found.values()) >= 0.91, found
    assert max(found["losses"], found["tokens"]) <= 0.99, found


def test_perplexity() -> None:
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert metrics.perplexity(1e6) == math.inf


def test_power_law_is_recovered() -> None:
    sizes = [250.0, 500.0, 1000.0, 2000.0]
    e, b, beta = metrics.fit_power_law(sizes, [0.3 + 5 / size**0.5 for size in sizes])
    assert (e, b, beta) == pytest.approx((0.3, 5.0, 0.5), rel=1e-3)
    with pytest.raises(ValueError, match="three sizes"):
        metrics.fit_power_law([1.0, 2.0, 2.0], [1.0, 0.9, 0.8])


def test_doubling_has_an_interval_around_the_truth() -> None:
    import random

    sizes, noise = [250.0, 500.0, 1000.0, 2000.0], random.Random(0)
    rows = [[0.3 + 5 / size**0.5 + noise.gauss(0, 0.05) for _ in range(300)] for size in sizes]
    result = metrics.doubling(sizes, rows)
    truth = 5 / 2000**0.5 - 5 / 4000**0.5
    assert result["ci"][0] < truth < result["ci"][1]
    assert result["ci"][0] < result["gain"] < result["ci"][1]


def test_true_is_not_one_in_json() -> None:
    reference = '{"paid": true, "count": 1, "deep": [{"ok": false}], "share": 1.0}'
    right = '{"paid": true, "count": 1.0, "deep": [{"ok": false}], "share": 1}'
    wrong = '{"paid": 1, "count": true, "deep": [{"ok": 0}], "share": true}'
    assert metrics.json_fields(right, reference) == dict.fromkeys(("paid", "count", "deep", "share"), True)
    assert metrics.json_fields(wrong, reference) == dict.fromkeys(("paid", "count", "deep", "share"), False)


def test_a_metric_is_the_weighted_mean_of_the_rows_that_have_it() -> None:
    rows: list[dict[str, Any]] = [
        {"x": 1.0, "w": 3, "group": "a"},
        {"x": None, "w": 9, "group": "b"},
        {"x": 5.0, "w": 1, "group": None},
    ]
    toy = metrics.Metric("toy", ("answers",), lambda row: row["x"], metrics.weighted, weight=lambda row: row["w"])
    assert toy.mean(rows) == (3 + 5) / 4
    assert toy.figures(rows) == {"toy": 2.0, "toy_ci": list(metrics.ratio_interval([3, 5], [3, 1])), "toy_n": 2}
    assert toy.figures(rows[:1], "a") == {"toy/a": 1.0, "toy/a_ci": [1.0, 1.0]}
    assert toy.groups(rows) == {}
    assert replace(toy, by_group=True).groups(rows) == {"a": rows[:1]}
    assert toy.figures(rows[1:2]) == {}
    assert toy.mean([]) is None


def test_each_figure_of_a_group_has_its_own_number_of_rows() -> None:
    """Of two rows one has a number."""
    rows = [{"prediction": text, "reference": text, "group": "g"} for text in ("7", "seven")]
    chosen = [metric for metric in metrics.METRICS if metric.name in ("number_match", "exact_match")]
    found = metrics.measure("answers", rows, chosen)
    assert (found["number_match/g_n"], found["exact_match/g_n"], found["groups"]) == (1, 2, {"g": 1})


def test_intervals_of_few_rows_are_widened_alike() -> None:
    """Of a loss per token as of any mean: with rows of one length they are the same."""
    values = [0.4, 1.3, 0.2, 2.5, 0.9]
    assert metrics.ratio_interval([3 * v for v in values], [3] * 5) == pytest.approx(mean_interval(values, 1000))


def test_what_is_measured_and_compared() -> None:
    """Of labelled answers the loss is of those to learn; what a model has no figure for is not compared."""
    rows = [
        {"label": True, "loss": 1.0, "loss_tokens": 2, "correct": 1.0, "answer_reward": 0.5},
        {"label": True, "loss": 2.0, "loss_tokens": 2, "correct": 0.0, "answer_reward": -0.1},
        {"label": False, "loss": 4.0, "loss_tokens": 1, "correct": 1.0, "answer_reward": -0.6},
    ]
    found = metrics.measure("unpaired", rows)
    assert (found["loss"], found["bad_loss"], found["margin"]) == (1.5, 4.0, 2.5)
    assert found["perplexity"] == pytest.approx(math.exp(1.5))
    assert found["reward_accuracy"] == pytest.approx(2 / 3)
    assert found["reward_margin"] == pytest.approx(0.2 - -0.6)
    without = metrics.measure("unpaired", [{**row, "correct": None, "answer_reward": None} for row in rows])
    gone = {"reward_accuracy", "reward_accuracy_ci", "reward_margin", "reward_margin_ci"}
    assert without.keys() == found.keys() - gone
    for name in ("margin", "reward_margin", "perplexity"):
        assert found[f"{name}_ci"][0] <= found[name] <= found[f"{name}_ci"][1]
    names = [metric.named(group) for metric, group in metrics.compared("unpaired", [found, without])]
    assert names == ["loss"]
    both = {**found, "groups": {"g": 3}, "reward_accuracy/g": 1.0}
    names = [metric.named(group) for metric, group in metrics.compared("unpaired", [both, both])]
    assert names == ["reward_accuracy", "reward_accuracy/g", "loss"]
    assert [m.name for m in metrics.METRICS if m.lower_is_better] == ["loss"]
