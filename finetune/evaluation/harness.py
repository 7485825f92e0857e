"""`ft eval --tasks`: tasks of lm-evaluation-harness (0.4), on a model that we have loaded and with its adapter on.

A task is a name that the harness knows, a YAML file, or a folder of them; data files that such a task names are looked
for beside it, so that a folder works from everywhere and offline. The harness makes the prompts, compares and counts.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from finetune.adapters.methods import is_before_text
from finetune.base import Base
from finetune.data.encoder import Encoder
from finetune.errors import UserError
from finetune.evaluation.choices import through
from finetune.evaluation.generation import only_as_told, stop_ids
from finetune.evaluation.options import HARNESS
from finetune.metrics import paired
from finetune.models.rope import context
from finetune.run.writing import write_json
from finetune.terminal.progress import note, row, say, say_json, show


@dataclass
class Measured:
    """What the harness found of one model."""

    name: str
    figures: dict[str, dict[str, Any]]
    """{task or group: {metric: value, metric_stderr: its standard error, n, shots}}"""
    rows: dict[str, dict[Any, float]]
    """{task/metric: {document: value}}"""
    templated: bool


@contextlib.contextmanager
def problems_of(what: str) -> Iterator[None]:
    """What the harness and datasets raise while tasks are read, as a line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        unknown = isinstance(error, KeyError)
        fix = "`lm_eval ls tasks` lists all" if unknown else "mend the task, or see that its data can be had"
        raise UserError(f"{what} cannot be read: {type(error).__name__}: {text}", key="--tasks", fix=fix) from error


def load(names: Sequence[str]) -> list[Any]:
    """Tasks and groups, with their data. UserError for what is not there, before a model is loaded."""
    logging.getLogger(HARNESS).setLevel(logging.ERROR)
    from lm_eval.tasks import TaskManager

    found: list[Any] = []
    known: Any = None
    for name in names:
        place = Path(name).expanduser()
        if place.is_dir() or place.suffix in (".yaml", ".yml"):
            found += of_place(place)
            continue
        if known is None:
            known = TaskManager()
        with problems_of(f"task {name}"):
            found += whole(known.load([name]))
    return found


def of_place(place: Path) -> list[Any]:
    """The groups that a folder defines, or else its tasks; or what a file does."""
    from lm_eval.tasks import TaskManager

    folder = (place if place.is_dir() else place.parent).resolve()
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    names = manager.all_groups or manager.all_subtasks if place.is_dir() else [str(place.resolve())]
    if not names:
        fix = "lay a YAML file with `task: NAME` into it"
        raise UserError("defines no task", path=place, key="--tasks", fix=fix)
    with problems_of(str(place)), beside(folder):
        return whole(manager.load(names))


@contextlib.contextmanager
def beside(folder: Path) -> Iterator[None]:
    """Relative paths of data files are meant from the task's folder."""
    before = Path.cwd()
    with contextlib.chdir(folder):
        try:
            yield
        except FileNotFoundError:
            raise UserError(
                f"names data that is neither in it nor elsewhere (looked for from {folder}, not from {before})",
                path=folder, key="--tasks", fix="give data_files beside the YAML file, or by their whole path",
            ) from None  # fmt: skip


def whole(loaded: Mapping[str, Any]) -> list[Any]:
    """The groups, and the tasks that are in none of them."""
    groups = list(loaded["groups"].values())
    inside = {id(task) for group in groups for task in group.get_all_tasks()}
    below = {id(group) for one in groups for group in one.get_all_groups()}
    tasks = [task for task in loaded["tasks"].values() if id(task) not in inside]
    return [*(group for group in groups if id(group) not in below), *tasks]


def measure(
    name: str, model: Any, base: Base, encoder: Encoder | None, tasks: Sequence[Any], shots: int | None,
    limit: int | None, batch_size: int,
) -> Measured:  # fmt: skip
    """One model on tasks of `load`, which are used once.

    Args:
        encoder: asks as a conversation; None: as the tasks are published.
    """
    from lm_eval import simple_evaluate

    asks = {}
    if encoder is not None and encoder.thinking.switch is not None and encoder.asks is not None:
        asks = {encoder.thinking.switch: encoder.asks}
    wrapped = adapter_of(encoder)(
        pretrained=model, backend="causal", tokenizer=base.tokenizer,
        max_length=context(base.config, base.model),
        batch_size=1 if is_before_text(model) else batch_size,  # padding would come between them and the text
        chat_template_args=asks,
    )  # fmt: skip
    with only_as_told(model, stop_ids(model, encoder or base.encoder)):
        found: Any = simple_evaluate(
            wrapped, tasks=list(tasks), num_fewshot=shots, limit=limit, apply_chat_template=encoder is not None,
            batch_size=batch_size, bootstrap_iters=1000, log_samples=True,
        )  # fmt: skip
    return Measured(name, figures_of(found), rows_of(found), encoder is not None)


def adapter_of(encoder: Encoder | None) -> Any:
    """The harness's class for a model of transformers."""
    from lm_eval.models.huggingface import HFLM

    class Loaded(HFLM):
        def _model_call(self, *arguments: Any, **more: Any) -> Any:
            """Without the logits of virtual tokens before the text."""
            ids = arguments[0] if arguments else more["inps"]
            return super()._model_call(*arguments, **more)[:, -ids.shape[1] :]

    return Loaded if encoder is None or encoder.template is not None else in_our_format(Loaded, encoder)


def in_our_format(parent: Any, encoder: Encoder) -> Any:
    """Where a chat format is no template of the tokenizer (ChatGLM's): prompts are our ids, found again by the text
    that the harness was given for them."""
    asked: dict[str, list[dict[str, Any]]] = {}

    class Asked(parent):
        def apply_chat_template(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if not add_generation_prompt:
                what = "a task begins the assistant's answer, which this chat format has no room for"
                raise UserError(what, key="--tasks", fix="take gen_prefix out of it")
            text = json.dumps(history, ensure_ascii=False)
            asked[text] = history
            return text

        def tok_encode(self, string: str, *arguments: Any, **more: Any) -> list[int]:
            known = asked.get(string)
            return super().tok_encode(string, *arguments, **more) if known is None else encoder.prompt_ids(known)

        def tok_batch_encode(
            self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **more: Any
        ) -> Any:
            rows = [self.tok_encode(text)[-(left_truncate_len or 0) :] for text in strings]
            found = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
            return found["input_ids"], found["attention_mask"]

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            if context not in asked:
                return super()._encode_pair(context, continuation)
            before = encoder.prompt_ids(asked[context])
            return before, through(encoder, asked[context], continuation)[len(before) :]

    return Asked


def named(metric: str, way: str) -> str:
    """(acc, none) -> acc; (exact_match, strict-match) -> exact_match (strict-match)"""
    return metric if way in ("", "none") else f"{metric} ({way})"


def figures_of(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    for task, values in {**found["results"], **found.get("groups", {})}.items():
        counts = found.get("n-samples", {}).get(task, {})
        known: dict[str, Any] = {"n": counts.get("effective"), "shots": found.get("n-shot", {}).get(task)}
        for key, value in values.items():
            if "," in key and isinstance(value, int | float):
                metric, _, way = key.partition(",")
                plain = metric.removesuffix("_stderr")
                known[named(plain, way) + metric.removeprefix(plain)] = float(value)
        figures[task] = {key: value for key, value in known.items() if value is not None}
    return figures


def rows_of(found: Mapping[str, Any]) -> dict[str, dict[Any, float]]:
    """Of each task and metric the values of its documents, where it has any."""
    rows: dict[str, dict[Any, float]] = {}
    for task, samples in (found.get("samples") or {}).items():
        for sample in samples:
            for metric in sample.get("metrics", ()):
                value = sample.get(metric)
                if isinstance(value, int | float):
                    name = named(metric, sample.get("filter", "none"))
                    rows.setdefault(f"{task}/{name}", {})[sample["doc_id"]] = float(value)
    return rows


# --- what is said ---

ABOUT = ("n", "shots")


def compared(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The others against the first, document by document, in what each task calls its metrics."""
    first = measured[0]
    found = []
    for other in measured[1:]:
        for name, before in first.rows.items():
            after = other.rows.get(name, {})
            places = [place for place in before if place in after]
            if places:
                values = paired([before[place] for place in places], [after[place] for place in places])
                found.append({"a": first.name, "b": other.name, "metric": name, **values})
    return found


def report(measured: Sequence[Measured], json_file: str | None, limit: int | None) -> None:
    """As a table on stdout, as JSON there, or both."""
    comparisons = compared(measured)
    runs = [
        {"name": one.name, "tasks": one.figures, "generation": {"chat_template": one.templated}} for one in measured
    ]
    found = {"harness": HARNESS, "limit": limit, "runs": runs, "comparisons": comparisons}
    if json_file == "-":
        say_json(found)
        return
    table = Table(title="lm-evaluation-harness, ± standard errors", title_justify="left")
    for heading in ("task", "metric", "n", "shots", *(one.name for one in measured)):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task, values in measured[0].figures.items():
        for metric in values:
            if metric in ABOUT or metric.endswith("_stderr"):
                continue
            about = [str(values.get(key, "")) for key in ABOUT]
            row(table, task, metric, *about, *(cell(one.figures.get(task, {}), metric) for one in measured))
    show(table)
    for templated in (True, False):
        models = [one.name for one in measured if one.templated is templated]
        if models:
            how = "asked with the chat template" if templated else "asked without a chat template"
            say(f"{', '.join(models)}: {how}")
    for item in comparisons:
        low, high = item["ci"]
        counts = f"{item['wins']} higher, {item['losses']} lower, {item['ties']} same"
        change = f"{item['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        say(f"{item['b']} - {item['a']}, {item['metric']}: {change}, {counts}")
    if json_file is not None:
        write_json(Path(json_file), found)
        note(f"written to {json_file}")


def cell(values: Mapping[str, Any], metric: str) -> str:
    if metric not in values:
        return "–"
    error = values.get(f"{metric}_stderr")
    return f"{values[metric]:.3f}" + ("" if error is None else f" ± {error:.3f}")
