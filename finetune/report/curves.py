"""What is drawn of a run: panels of lines over steps, out of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune.metrics import METRICS
from finetune.run.records import is_number

# What is drawn when a run logged it: (axis, [(key of metrics.jsonl, label, line style)]).
PANELS: tuple[tuple[str, list[tuple[str, str, str]]], ...] = (
    ("loss", [("loss", "training loss", "-"), ("eval_loss", "held-out loss", "o-")]),
    (
        "reward",
        [("reward_mean", "score of the replies", "-"), ("rewards/chosen", "chosen", "-"),
         ("rewards/rejected", "rejected", "-"), ("mean_reward", "mean score", "-"),
         ("eval_reward_mean", "score of held-out replies", "o-")],
    ),
    (
        "margin",
        [("rewards/margins", "training margin", "-"), ("eval_rewards/margins", "held-out margin", "o-"),
         ("margin", "training margin", "-"), ("eval_margin", "held-out margin", "o-")],
    ),
    (
        "accuracy",
        [("rewards/accuracies", "training pairs", "-"), ("eval_rewards/accuracies", "held-out pairs", "o-"),
         ("accuracy", "training pairs", "-"), ("eval_accuracy", "held-out pairs", "o-")],
    ),
    ("KL, nats per reply", [("kl", "KL to the reference", "-")]),
    ("share", [("eos_rate", "replies that end", "-"), ("clip_fraction", "clipped tokens", "-")]),
    ("learning rate", [("learning_rate", "learning rate", "-")]),
    ("gradient norm", [("grad_norm", "gradient norm", "-")]),
)  # fmt: skip


def answered(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Panels of the metrics of held-out answers: shares in one, anything else in one of its own."""
    others = {key for _, lines in PANELS for key, _, _ in lines}
    names = {metric.name for metric in METRICS if metric.needs == "prediction"}
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key.startswith("eval_")]
    found: dict[str, list[tuple[str, str, str]]] = {}
    for key in keys:
        name = key.removeprefix("eval_")
        if key in others or key.endswith("_ci") or not (name in names or ":" in name):
            continue
        values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
        share = all(0 <= value <= 1 for value in values)
        label = name if ":" in name else name.replace("_", " ")
        found.setdefault("held-out answers" if share else label, []).append((key, label, "o-"))
    return [*found.items()]


LOG_FROM = 20.0  # a loss that falls by more than this shows nothing of its end on a linear axis
# On the page only.
MORE: tuple[tuple[str, list[tuple[str, str, str]]], ...] = (
    ("entropy, nats per token", [("entropy", "training", "-"), ("eval_entropy", "held out", "o-")]),
    ("tokens per second", [("tokens_per_second", "tokens per second", "-")]),
    ("peak memory, GB", [("peak_memory_gb", "peak memory", "-")]),
    (
        "token accuracy",
        [("mean_token_accuracy", "training", "-"), ("eval_mean_token_accuracy", "held out", "o-")],
    ),
    ("reply length, tokens", [("response_length", "replies", "-")]),
    ("value loss", [("value_loss", "value loss", "-")]),
)
LEFT_OUT = {"step", "epoch", "num_tokens", "eval_num_tokens", "eval_n"}
Panel = dict[str, Any]


def panels(rows: Sequence[dict[str, Any]], most: int) -> list[Panel]:
    """[{title, more, lines: [{key, label, held, x, y, ci}]}] of everything that was logged; `more` panels are of what
    no panel names. A line has at most `most` points.
    """
    named = [*PANELS[:1], *answered(rows), *PANELS[1:], *MORE]
    known = LEFT_OUT | {key for _, lines in named for key, _, _ in lines}
    others = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in known]
    rest = [
        (key.replace("_", " "), [(key, "training", "-"), (f"eval_{key}", "held out", "o-")])
        for key in others
        if not key.endswith("_ci") and not (key.startswith("eval_") and key.removeprefix("eval_") in others)
    ]
    found = []
    for number, (title, lines) in enumerate([*named, *rest]):
        drawn = [line(rows, key, label, style == "o-", most) for key, label, style in lines]
        drawn = [one for one in drawn if one["x"]]
        if drawn:
            found.append({"title": title, "more": number >= len(named), "lines": drawn})
    return found


def line(rows: Sequence[dict[str, Any]], key: str, label: str, held: bool, most: int) -> dict[str, Any]:
    """held: figures of held-out rows, of which there are few: they have a dot each."""
    known = thinned([row for row in rows if is_number(row.get(key))], key, most)
    ci = [[rounded(end) for end in row[f"{key}_ci"]] if row.get(f"{key}_ci") else None for row in known]
    return {
        "key": key, "label": label, "held": held, "x": [row["step"] for row in known],
        "y": [rounded(row[key]) for row in known], "ci": ci if any(ci) else None,
    }  # fmt: skip


def thinned(rows: Sequence[dict[str, Any]], key: str, most: int) -> list[dict[str, Any]]:
    """Of every few rows in a row those with the smallest and the largest value; what jumps out stays in."""
    if len(rows) <= most:
        return list(rows)
    buckets, found = max(1, most // 2), []
    for number in range(buckets):
        part = range(number * len(rows) // buckets, (number + 1) * len(rows) // buckets)
        ends = {min(part, key=lambda i: rows[i][key]), max(part, key=lambda i: rows[i][key])}
        found += [rows[i] for i in sorted(ends)]
    return found


def rounded(value: float) -> float:
    """Five digits: more cannot be seen."""
    return float(f"{value:.5g}")
