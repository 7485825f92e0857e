"""`ft data check` and `ft data preview`: look at data before any model is loaded.

Without a model only the structure is checked; with one (from the recipe or --model) also what the model would see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from finetune.early import training
from finetune.errors import UserError, visible
from finetune.language import translated
from finetune.places import check_file, json_with
from finetune.recipe.file import load, with_settings
from finetune.recipe.resolve import absolute_source
from finetune.recipe.sections import DataConfig, ModelConfig
from finetune.recipe.stages import ROWS
from finetune.run.writing import write_atomically, write_json
from finetune.terminal.progress import note, output, say, say_json

WORST = 20  # problems of each level shown in the terminal; --json has them all


def check(
    *, recipe: str | None = None, overrides: Sequence[str] = (), data: str | None = None, model: str | None = None,
    stage: str | None = None, eval_data: str | None = None, fix: str | None = None, json_file: str | None = None,
) -> int:  # fmt: skip
    """Exit code: 2 when a row cannot be used, else 0."""
    from finetune.data import audit, samples, sources
    from finetune.data import fix as mend

    check_outputs(("--json", json_file, json_with("problems", "kinds")))
    if fix is not None:
        mend.check_free(Path(fix))
        if json_file is not None and Path(json_file).resolve() in {p.resolve() for p in mend.files(Path(fix))}:
            raise UserError("is the file of --fix", path=json_file, key="--json", fix="name another file")
    config, base, kind, held_out = looked_at(recipe, overrides, data, model, stage, eval_data)
    base = None if kind == "text" else base
    training.data_of(config, base, held_out)
    encoder = None if base is None else encoder_of(base, config.thinking)
    if fix is not None:
        kept, taken, rejects = mend.mend(config, Path(fix), encoder, kind, held_out)
        note(f"{kept:,} rows written to {fix}, {taken:,} rejects with their reasons to {rejects}")
    report = audit.check(config, encoder, kind=kind, eval_data=held_out)
    notice = [] if encoder is None or encoder.notice is None else [encoder.notice]
    for line in (*notice, *sources.left_out(samples.specs(config), offer=held_out is None)):
        (note if json_file == "-" else found)(line)
    if json_file != "-":
        show(report)
    write(json_file, report.as_json())
    return 2 if report.errors and fix is None else 0


def preview(
    *, recipe: str | None = None, overrides: Sequence[str] = (), data: str | None = None, model: str | None = None,
    stage: str | None = None, limit: int = 5, json_file: str | None = None, html_file: str | None = None,
) -> None:  # fmt: skip
    from finetune.data import preview as views

    check_outputs(("--json", json_file, json_with("samples", "template")), ("--html", html_file, is_page))
    if json_file is not None and html_file is not None and Path(json_file).resolve() == Path(html_file).resolve():
        raise UserError("is the file of --json", path=html_file, key="--html", fix="name another file")
    config, base, kind, _ = looked_at(recipe, overrides, data, model, stage)
    training.data_of(config, base, None)
    if base is None:
        raise UserError("a preview needs a tokenizer", key="--model", fix="give --model or --recipe")
    encoder = encoder_of(base, config.thinking)
    shown = views.samples(config, encoder, limit, kind)
    rows = views.packs(shown, config.max_length) if config.packing else None
    kept = [{key: value for key, value in sample.items() if key != "roles"} for sample in shown]
    packs = {} if rows is None else {"packs": rows}
    write(json_file, {"template": encoder.origin, "samples": kept, **packs}, indent=None)
    if html_file is not None:
        write_atomically(Path(html_file), views.as_html(shown, rows))
        note(f"written to {html_file}")
    if json_file is None and html_file is None:
        coloured = output.is_terminal and not output.no_color and output.color_system is not None
        if not coloured:
            say(translated(f"{'…'.join(views.MARKS)} is trained, the rest is only read · {encoder.origin}"))
        output.print(views.as_text(shown, rows, coloured), soft_wrap=True)
        if coloured:
            note(f"green is trained · {encoder.origin}")


def write(json_file: str | None, value: dict[str, Any], indent: int | None = 2) -> None:
    """To the file of --json, or to stdout."""
    if json_file == "-":
        say_json(value, indent)
    elif json_file is not None:
        write_json(Path(json_file), value)


def check_outputs(*files: tuple[str, str | None, Callable[[Path], bool]]) -> None:
    """UserError for what cannot be written; before anything is read."""
    for key, file, ours in files:
        if file is not None and file != "-":
            check_file(Path(file), key, ours)


def is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return b"<title>ft data preview</title>" in file.read(200)


class LookedAt(NamedTuple):
    config: DataConfig
    base: ModelConfig | None
    kind: str | None
    """Of rows; None where nothing says it."""
    held_out: list[str] | None


def looked_at(
    recipe: str | None, overrides: Sequence[str], data: str | None, model: str | None = None, stage: str | None = None,
    eval_data: str | None = None,
) -> LookedAt:  # fmt: skip
    """What the arguments and the recipe name; arguments win."""
    if stage is not None and stage not in ROWS:
        raise UserError(f"unknown stage {stage!r}", key="--stage", fix=f"one of {', '.join(ROWS)}")
    base = None if model is None else ModelConfig(name=model)
    if recipe is None:
        if data is None:
            raise UserError("nothing to look at", fix="give --recipe R, or --data D")
        return LookedAt(
            data_settings(stage, data, overrides),
            base,
            ROWS[stage] if stage else None,
            [eval_data] if eval_data else None,
        )
    loaded = load(recipe, None, overrides)
    config = loaded.data if data is None else loaded.data.model_copy(update={"train": absolute_source(data)})
    return LookedAt(
        config, base or loaded.model, ROWS[stage or loaded.stage], [eval_data] if eval_data else loaded.eval.paths
    )


def data_settings(stage: str | None, data: str, overrides: Sequence[str]) -> DataConfig:
    """A data section without a recipe; `data.` may be left out of the keys. UserError as for a recipe."""
    items = [item if item.startswith("data.") else f"data.{item}" for item in overrides]
    named = stage or "sft"
    values: dict[str, Any] = {
        "version": 1, "stage": named, "model": {"name": "-"}, "output": {"dir": "-"},
        "data": {"train": str(absolute_source(data))}, **({"reward": {"model": "-"}} if named == "ppo" else {}),
    }  # fmt: skip
    return with_settings(values, named, items).data


def encoder_of(model: ModelConfig, thinking: str) -> Any:
    from finetune.base import Base

    return Base.open(model, treatment=thinking).encoder


def show(report: Any) -> None:
    """The report for people, on stdout: problems first, then what the data is like."""
    for level, style in (("error", "red"), ("warning", "yellow")):
        listed = [p for p in report.problems if p["level"] == level]
        for problem in listed[:WORST]:
            what, arrow, fix = problem["message"].partition(" → ")
            row = translated(f"row {problem['row']}")
            found(f"{translated(level)}: {problem['file']}, {row}: {translated(what)}{arrow}{translated(fix)}", style)
        if len(listed) > WORST:
            found(f"… and {len(listed) - WORST:,} more ({level}s; --json lists them)")
    trained = f", {report.trained_tokens:,} trained tokens" if report.trained_tokens is not None else ""
    found(f"{report.rows:,} rows, {report.counts['used']:,} usable{trained}")
    kinds = sorted((count, kind) for kind, count in report.kinds.items() if count)
    if kinds:
        found(" · ".join(f"{kind} {count:,}" for count, kind in reversed(kinds)))
    found("languages: " + ", ".join(f"{name} {count:,}" for name, count in report.languages.items()))
    lengths = report.tokens or report.characters
    most = max(lengths.values(), default=1)
    for name, count in lengths.items():
        unit = "tokens" if report.tokens else "characters"
        found(f"{name:>13} {unit} {'█' * max(1, round(30 * count / most))} {count:,}")


def found(line: str, style: str | None = None) -> None:
    """One line of a report: a result, so it goes to stdout."""
    output.print(visible(translated(line)), style=style, soft_wrap=True)
