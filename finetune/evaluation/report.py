"""What `ft eval` says: the table, the comparisons, some wrong answers, and the files for scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.table import Table

from finetune.errors import visible
from finetune.evaluation.comparisons import show_changes
from finetune.evaluation.generation import Evaluation
from finetune.language import translated
from finetune.metrics import Metric
from finetune.recipe.sections import GenerationConfig
from finetune.run.writing import write_json, write_lines
from finetune.terminal.progress import note, output, row, say, say_json, shown_name, tell, warn
from finetune.terminal.progress import show as show_table
from finetune.terminal.values import padded


@dataclass
class Found:
    """What there is to say of one held-out set."""

    name: str
    data: str
    results: Sequence[Evaluation]
    comparisons: Sequence[dict[str, Any]]
    chosen: Sequence[Metric]
    shown: Sequence[Evaluation]
    """Those whose wrong answers are shown."""
    asked_with: dict[str, Any] = field(default_factory=dict)
    changes: Sequence[dict[str, Any]] = ()
    general: bool = False
    forgotten: Sequence[dict[str, Any]] = ()
    """The comparisons with a base in which something is lost."""

    @property
    def about(self) -> dict[str, str]:
        """By name of a metric what does not count in it."""
        texts = {metric.name: metric.normalises for metric in self.chosen if metric.normalises}
        return {name: text for name, text in texts.items() if any(name in result.metrics for result in self.results)}

    def as_json(self) -> dict[str, Any]:
        runs = [
            {"name": r.name, "n": r.n, "kind": r.kind, "metrics": r.metrics, "generation": r.generation}
            for r in self.results
        ]
        first = self.results[0].generation
        drawn = {key: first[key] for key in ("temperature", "seed")} if first.get("temperature") else {}
        found = {"data": self.data, **drawn, **self.asked_with, "runs": runs, "comparisons": list(self.comparisons)}
        found["normalises"] = self.about
        if self.changes:
            found["changes"] = list(self.changes)
        if self.general:
            found |= {"general": True, "forgotten": list(self.forgotten)}
        return found


def report(sets: Sequence[Found], json_file: str | None, most: int) -> None:
    """Each set as tables on stdout with `most` wrong answers of those that are shown, as JSON there, or both."""
    single = len(sets) == 1
    found = sets[0].as_json() if single else {"sets": [{"name": one.name, **one.as_json()} for one in sets]}
    if json_file == "-":
        say_json(found)
    else:
        for number, one in enumerate(sets):
            if not single:
                say(("\n" if number else "") + f"{one.name}:")
            show_set(one, most)
    for one in sets:
        tell_forgotten(one, "" if single else f"{one.name}: ")
    if json_file and json_file != "-":
        write_json(Path(json_file), found)
        note(f"written to {json_file}")


def show_set(one: Found, most: int) -> None:
    results = one.results
    ways = list(dict.fromkeys(how_written(result) for result in results))
    parts = [*([ways[0]] if len(ways) == 1 and ways[0] else []), *(f"{k} {v}" for k, v in one.asked_with.items())]
    show(results, one.comparisons, one.data == "data.eval_split", "".join(f", {part}" for part in parts))
    for result in results if len(ways) > 1 else ():
        tell(f"{result.name} answered {how_written(result)}")
    show_about(results, one.about)
    for change in one.changes:
        metric = next(m for m in one.chosen if m.name == change["metric"])
        values = [value for result in results for value in metric.values(result.rows)[0]]
        show_changes(change, label(metric.name), set(values) <= {0.0, 1.0})
    for result in one.shown if most else ():
        show_rows(result, most)


def tell_forgotten(one: Found, start: str) -> None:
    """What a general set says of forgetting."""
    for item in one.forgotten:
        low, high = item["ci"]
        what = f"{label(item['metric'])} {item['difference']:+.3f} [{low:+.3f}, {high:+.3f}] against {item['a']}"
        warn(f"{start}{item['b']} has lost something it is not trained for: {what} (n={item['n']})")


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
    number = result.metrics.get(f"{name}_n")
    text += f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return text + (f" n={number}" if number is not None else "")


def field_cell(result: Evaluation, name: str) -> str:
    if name not in result.metrics.get("fields", {}):
        return "–"
    value, (low, high), n = (result.metrics[key][name] for key in ("fields", "fields_ci", "fields_n"))
    return f"{value:.3f} [{low:.3f}, {high:.3f}] n={n}"


def label(name: str) -> str:
    """A metric's name as words; patterns and functions stay as they were written."""
    return (
        name if ":" in name else translated(name.removesuffix("_gb").replace("_", " ")) + ", GB" * name.endswith("_gb")
    )


def show_about(results: Sequence[Evaluation], about: Mapping[str, str]) -> None:
    """What of the texts does not count in each figure, and with what it was computed."""
    lines: dict[str, list[str]] = {}
    for name, text in about.items():
        how = next((r.metrics[f"{name}_how"] for r in results if f"{name}_how" in r.metrics), None)
        said = translated(text)
        lines.setdefault(said if how is None else f"{said} ({how})", []).append(label(name))
    for text, names in lines.items():
        say(f"{', '.join(names)}: {text}")


WIDE = 3  # more models than this stand below each other, without the single fields


def show(
    results: Sequence[Evaluation], comparisons: Sequence[dict[str, Any]], by_split: bool = False, title: str = ""
) -> None:
    """The table and the comparisons, to stdout.

    Args:
        by_split: held out by data.eval_split; title: what goes on after their number.
    """
    names = list(dict.fromkeys(k for r in results for k, v in r.metrics.items() if isinstance(v, float)))
    fields = list(dict.fromkeys(f for r in results for f in r.metrics.get("fields", {})))
    seen = {r.name: r.metrics["trained_on"] for r in results if r.metrics.get("trained_on")}
    title = translated(f"n={results[0].n}{UNITS[results[0].kind]}") + title
    held_out = "held-out by data.eval_split" if by_split else "held-out"
    title = title if seen else f"{translated(held_out)}, {title}"
    table = Table(title=visible(title), title_justify="left")
    wide = len(results) > WIDE
    for heading in ("", *([label(n) for n in names] if wide else [r.name for r in results])):
        table.add_column(visible(heading), justify="right" if heading else "left")
    if wide:
        for result in results:
            row(table, result.name, *(cell(result, name) for name in names))
    else:
        for name in names:
            row(table, label(name), *(cell(r, name) for r in results))
        for name in fields:
            row(table, f"  {name}", *(field_cell(r, name) for r in results))
    show_table(table)
    for result in results:
        for text in leakage_of(result):
            say(text)
    for item in comparisons:
        low, high = item["ci"]
        counts = translated(f"{item['wins']} better, {item['losses']} worse, {item['ties']} same")
        name = label(item["metric"])
        number = f"{counts} (n={item['n']})"
        say(f"{item['b']} - {item['a']}, {name}: {item['difference']:+.3f} [{low:+.3f}, {high:+.3f}], {number}")


def leakage_of(result: Evaluation) -> list[str]:
    """What is said of the rows that the run was trained on; nothing where it is no run, or its data cannot be read."""
    found = result.metrics.get("leakage")
    if found is None:
        return []
    what = "the texts" if result.kind == "text" else f"these {found['n']} rows"
    if not result.metrics["trained_on"]:
        return [translated(f"{result.name}: none of {what} stands in its training data, exactly or nearly")]
    kinds = {"exact": "exactly", "near": f"nearly ({found['near_from']:.0%} of the prompt's passages or more)",
             "question": "as the same question under another system turn"}  # fmt: skip
    how = ", ".join(f"{found[kind]} {translated(words)}" for kind, words in kinds.items() if found[kind])
    trained = result.metrics["trained_on"]
    lines = [translated(f"{result.name} was trained on {trained} of {what}: its figures are not held-out")]
    lines.append(f"  {how}: {'; '.join(example(one) for one in found['examples'])}")
    return lines


def example(one: dict[str, Any]) -> str:
    return translated(f"row {one['row']} is row {one['train_row']} of {shown_name(one['train_file'])}")


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
        title = f"{result.name}: {min(most, len(found))} of {len(found)} {translated(what[result.kind])}"
    elif result.kind == "answers" and any(r["prediction"] is not None for r in result.rows):
        found = result.rows
        title = f"{result.name}: {min(most, len(found))} of {len(found)} answers"
    else:
        known = [r for r in result.rows if r["loss"] is not None and r.get("label") is not False]
        found = sorted(known, key=lambda r: -r["loss"])
        title = f"{result.name}: what it finds least probable"
    if not found:
        return
    tell(title)
    for values in found[:most]:
        say("  " + translated(f"row {values['row']}"))
        for name, text in parts_of(values, result.kind).items():
            say(line(f"    {padded(translated(name), 10)} ", text))


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


def write_predictions(path: str, sets: Sequence[Found]) -> None:
    """A line for each row and model: (set,) run, row, what was asked, reference, prediction, correct, loss, …"""
    rows = [
        {
            **({"set": one.name} if len(sets) > 1 else {}), "run": result.name,
            **{k: v for k, v in values.items() if k not in HIDDEN and (k != "group" or v is not None)},
        }
        for one in sets
        for result in one.results
        for values in result.rows
    ]  # fmt: skip
    write_lines(Path(path), rows)
    note(f"{len(rows)} rows written to {path}")
