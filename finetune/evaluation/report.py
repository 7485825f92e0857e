"""What `ft eval` says: the table, the comparisons, some wrong answers, and the files for scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.table import Table

from finetune.errors import visible
from finetune.evaluation.generation import Evaluation
from finetune.metrics import Metric, paired
from finetune.recipe.sections import GenerationConfig
from finetune.run.writing import write_json, write_lines
from finetune.terminal.progress import note, output, row, say, say_json
from finetune.terminal.progress import show as show_table


def compare(a: Evaluation, b: Evaluation, metric: Metric, group: str | None = None) -> dict[str, Any]:
    """b against a on the rows, or those of a group, that both have."""
    before, after = (column(result, metric, group) for result in (a, b))
    places = [place for place in before if place in after]
    found = paired([before[place] for place in places], [after[place] for place in places], metric.lower_is_better)
    return {"a": a.name, "b": b.name, "metric": metric.named(group), **found}


def column(result: Evaluation, metric: Metric, group: str | None) -> dict[Any, float]:
    """Place -> value of the rows that have one."""
    rows = enumerate(result.rows)
    found = {row.get("place", i): metric.function(row) for i, row in rows if group is None or row.get("group") == group}
    return {place: float(value) for place, value in found.items() if value is not None}


def report(
    name: str, results: Sequence[Evaluation], comparisons: Sequence[dict[str, Any]], json_file: str | None,
    asked_with: dict[str, Any], shown: Sequence[Evaluation], most: int, about: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """As a table on stdout with `most` wrong answers of each of `shown`, as JSON there, or both.

    about: by name of a metric what does not count in it.
    """
    about = {name: text for name, text in (about or {}).items() if any(name in result.metrics for result in results)}
    runs = [
        {"name": r.name, "n": r.n, "kind": r.kind, "metrics": r.metrics, "generation": r.generation} for r in results
    ]
    first = results[0].generation
    drawn = {key: first[key] for key in ("temperature", "seed")} if first.get("temperature") else {}
    same = {**drawn, **asked_with}
    found = {"data": name, **same, "runs": runs, "comparisons": list(comparisons), "normalises": about}
    if json_file == "-":
        say_json(found)
    else:
        by_split = " by data.eval_split" if name == "data.eval_split" else ""
        ways = list(dict.fromkeys(how_written(result) for result in results))
        parts = [*([ways[0]] if len(ways) == 1 and ways[0] else []), *(f"{k} {v}" for k, v in asked_with.items())]
        show(results, comparisons, by_split, "".join(f", {part}" for part in parts))
        for result in results if len(ways) > 1 else ():
            say(f"{result.name} answered {how_written(result)}")
        show_about(results, about)
        for result in shown if most else ():
            show_rows(result, most)
    if json_file and json_file != "-":
        write_json(Path(json_file), found)
        note(f"written to {json_file}")


def how_written(result: Evaluation) -> str:
    """`greedy`, or `temperature 0.7, seed 3`; "" where nothing is answered."""
    settings = {key: value for key, value in result.generation.items() if key in GenerationConfig.model_fields}
    return str(GenerationConfig(**settings)) if settings else ""


UNITS = {"answers": "", "pairs": " pairs", "unpaired": " answers", "text": " blocks of text", "choices": " questions"}


def cell(result: Evaluation, name: str) -> str:
    value, interval = result.metrics.get(name), result.metrics.get(f"{name}_ci")
    if value is None:
        return "–"
    text = f"{value:.4g}" if name in ("weights_gb", "tokens_per_second") else f"{value:.3f}"
    return text + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def label(name: str) -> str:
    """A metric's name as words; patterns and functions stay as they were written."""
    return name if ":" in name else name.replace("_", " ")


def show_about(results: Sequence[Evaluation], about: Mapping[str, str]) -> None:
    """What of the texts does not count in each figure, and with what it was computed."""
    lines: dict[str, list[str]] = {}
    for name, text in about.items():
        how = next((r.metrics[f"{name}_how"] for r in results if f"{name}_how" in r.metrics), None)
        lines.setdefault(text if how is None else f"{text} ({how})", []).append(label(name))
    for text, names in lines.items():
        say(f"{', '.join(names)}: {text}")


WIDE = 3  # more models than this stand below each other, without the single fields


def show(
    results: Sequence[Evaluation], comparisons: Sequence[dict[str, Any]], by_split: str = "", title: str = ""
) -> None:
    """The table and the comparisons, to stdout.

    Args:
        by_split: how the rows were held out; title: what goes on after their number.
    """
    names = list(dict.fromkeys(k for r in results for k, v in r.metrics.items() if isinstance(v, float)))
    fields = list(dict.fromkeys(f for r in results for f in r.metrics.get("fields", {})))
    seen = {r.name: r.metrics["trained_on"] for r in results if r.metrics.get("trained_on")}
    number = f"n={results[0].n}{UNITS[results[0].kind]}{title}"
    table = Table(title=visible(number if seen else f"held-out{by_split}, {number}"), title_justify="left")
    wide = len(results) > WIDE
    for heading in ("", *([label(n) for n in names] if wide else [r.name for r in results])):
        table.add_column(visible(heading), justify="right" if heading else "left")
    if wide:
        for result in results:
            row(table, result.name, *(cell(result, name) for name in names))
    else:
        for name in names:
            row(table, label(name), *(cell(r, name) for r in results))
        for field in fields:
            row(table, f"  {field}", *(f"{r.metrics.get('fields', {}).get(field, 0.0):.3f}" for r in results))
    show_table(table)
    for name, count in seen.items():
        what = "the texts" if results[0].kind == "text" else f"these {results[0].n} rows"
        say(f"{name} was trained on {count} of {what}: its figures are not held-out")
    for item in comparisons:
        low, high = item["ci"]
        counts = f"{item['wins']} better, {item['losses']} worse, {item['ties']} same"
        name = label(item["metric"])
        say(f"{item['b']} - {item['a']}, {name}: {item['difference']:+.3f} [{low:+.3f}, {high:+.3f}], {counts}")


def show_rows(result: Evaluation, most: int) -> None:
    """Some rows that the model has wrong, or where nothing is right or wrong those that it finds least probable."""
    judged = [r for r in result.rows if r["correct"] is not None]
    if judged:
        found = [r for r in judged if not r["correct"]]
        what = {
            "answers": "wrong answers",
            "pairs": "pairs the wrong way round",
            "unpaired": "on the wrong side",
            "choices": "wrong answers",
        }
        title = f"{result.name}: {min(most, len(found))} of {len(found)} {what[result.kind]}"
    elif result.kind == "answers" and any(r["prediction"] is not None for r in result.rows):
        found = result.rows
        title = f"{result.name}: {min(most, len(found))} of {len(found)} answers"
    else:
        known = [r for r in result.rows if r["loss"] is not None and r.get("label") is not False]
        found = sorted(known, key=lambda r: -r["loss"])
        title = f"{result.name}: what it finds least probable"
    if not found:
        return
    say(title)
    for values in found[:most]:
        say(f"  row {values['row']}")
        for name, text in parts_of(values, result.kind).items():
            say(line(f"    {name:<10} ", text))


def parts_of(values: dict[str, Any], kind: str) -> dict[str, str]:
    """What is shown of a row, by name."""
    asked = {} if kind == "text" else {"asked": str(values["messages"][-1]["content"]) if values["messages"] else ""}
    loss = "" if values["loss"] is None else f" (loss {values['loss']:.3f})"
    if kind == "answers":
        reference = values["reference"]
        answer = {} if values["prediction"] is None else {"answer": values["prediction"]}
        return {**asked, **({} if reference is None else {"reference": reference + loss * (not answer)}), **answer}
    if kind == "choices":
        options = values["options"]
        return {**asked, "right": option(options, values["reference"]), "answer": option(options, values["prediction"])}
    if kind == "text":
        return {f"loss {values['loss']:.3f}": values["text"]}
    if kind == "unpaired":
        return {**asked, "good" if values["label"] else "bad": content(values["completion"]) + loss}
    unit = "" if "chosen_score" in values else " nats"
    margin = f" (by {-values['margin']:.3f}{unit})"
    return {**asked, "chosen": content(values["chosen"]), "preferred": content(values["rejected"]) + margin}


def option(options: Mapping[str, str], letter: str) -> str:
    """B (its text)"""
    return f"{letter} ({options[letter]})"


def content(messages: Sequence[dict[str, Any]]) -> str:
    return " ".join(str(message["content"]) for message in messages)


def line(start: str, text: str) -> str:
    """One line of the terminal's width, without what a terminal would obey. Both ends of a long text are kept: a
    question stands at the end of its prompt, and an answer's first words at its beginning."""
    room = max(20, output.width - cell_len(start))
    shown = visible(text.replace("\n", "⏎").replace("\t", " "))
    if cell_len(shown) <= room:
        return start + shown
    tail = shown[-(room // 3) :]
    while cell_len(tail) > room // 3:
        tail = tail[1:]
    return start + set_cell_size(shown, room - cell_len(tail) - 1).rstrip() + "…" + tail


HIDDEN = ("place", "loss_tokens", "columns", "letter_right", "full_right")


def write_predictions(path: str, results: Sequence[Evaluation]) -> None:
    """A line for each row and model: run, row, what was asked, reference, prediction, correct, loss, …"""
    rows = [
        {"run": result.name, **{k: v for k, v in values.items() if k not in HIDDEN and (k != "group" or v is not None)}}
        for result in results
        for values in result.rows
    ]
    write_lines(Path(path), rows)
    note(f"{len(rows)} rows written to {path}")
