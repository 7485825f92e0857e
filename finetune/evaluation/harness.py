"""`ft eval --tasks`: tasks of lm-evaluation-harness (0.4), on a model that we have loaded and with its adapter on.

The harness makes the prompts, compares and counts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from finetune.adapters.methods import is_before_text
from finetune.base import Base
from finetune.data.encoder import Encoder
from finetune.data.templates import STOPPED, asked
from finetune.data.text import separator
from finetune.data.thinking import answer
from finetune.data.types import RowProblem
from finetune.errors import FinetuneError, RunError
from finetune.evaluation.choices import through
from finetune.evaluation.generation import only_as_told, stop_ids
from finetune.evaluation.harness_tasks import apart, why
from finetune.evaluation.options import HARNESS
from finetune.language import translated
from finetune.metrics import paired
from finetune.models.rope import context
from finetune.run.writing import write_json
from finetune.terminal.progress import note, row, say, say_json, show, warn


@dataclass
class Measured:
    """What the harness found of one model."""

    name: str
    figures: dict[str, dict[str, Any]]
    """{task or group: {metric: value, metric_stderr: its standard error, n, shots}}"""
    rows: dict[str, dict[Any, float]]
    """{task/metric: {document: value}}"""
    templated: bool
    notes: list[str] = field(default_factory=list)
    """What the harness warned of."""


def measure(
    name: str, model: Any, base: Base, encoder: Encoder | None, tasks: Sequence[Any], shots: int | None,
    limit: int | None, batch_size: int,
) -> Measured:  # fmt: skip
    """One model on tasks of `load`, which are used once.

    Args:
        encoder: asks as a conversation; None: as the tasks are published.
    """
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager

    asks = {}
    if encoder is not None and encoder.thinking.switch is not None and encoder.asks is not None:
        asks = {encoder.thinking.switch: encoder.asks}
    own = {} if templates(encoder) else {"add_bos_token": False, "prefix_token_id": separator(base.tokenizer)[-1]}
    wrapped = adapter_of(encoder)(
        pretrained=model, backend="causal", tokenizer=base.tokenizer,
        max_length=context(base.config, base.model),
        batch_size=1 if is_before_text(model) else batch_size,  # padding would come between them and the text
        chat_template_args=asks, think_end_token=thinking_ends(encoder), **own,
    )  # fmt: skip
    loaded = TaskManager(include_defaults=False).load(list(tasks))
    for task in loaded["tasks"].values():
        if shots is not None or task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        apart(task)
        task.set_fewshot_seed(seed=SEED)
    with only_as_told(model, stop_ids(model, encoder or base.encoder)), told() as warnings, failures(name):
        torch.manual_seed(SEED)
        found: Any = evaluate(
            wrapped, loaded, limit=limit, apply_chat_template=encoder is not None, fewshot_as_multiturn=True,
            bootstrap_iters=1000, log_samples=True,
        )  # fmt: skip
    return Measured(name, figures_of(found), rows_of(found), encoder is not None, warnings)


SEED = 1234  # the harness's own


@contextlib.contextmanager
def failures(name: str) -> Iterator[None]:
    """What a task's own functions raise while it is measured, as a line."""
    try:
        yield
    except (FinetuneError, torch.OutOfMemoryError, MemoryError, OSError):
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{last.filename}, line {last.lineno}, in {last.name}"
        raise RunError(f"{name}: the harness stopped at {where}: {why(error)}; --debug shows the traceback") from error


class Warnings(logging.Handler):
    """Counts what the harness warns of; numbers and rows that differ are one warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: dict[str, list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().partition("\n")[0].strip()
        self.seen.setdefault(re.sub(r"\d+", "0", text), []).append(text)

    def lines(self) -> list[str]:
        return [f"{found[0]} ({len(found)} times)" if len(found) > 1 else found[0] for found in self.seen.values()]


@contextlib.contextmanager
def told() -> Iterator[list[str]]:
    """What the harness warns of meanwhile: prompts that are cut, answers that are no option, …"""
    logger, handler, found = logging.getLogger(HARNESS), Warnings(), list[str]()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
        found += handler.lines()


def thinking_ends(encoder: Encoder | None) -> str | int | None:
    """What ends the thinking that the harness leaves out: an id where the tokenizer leaves the mark out of texts."""
    if encoder is None or not encoder.thinking.known:
        return None
    tokenizer, end = encoder.tokenizer, encoder.thinking.end
    return int(tokenizer.convert_tokens_to_ids(end)) if end in tokenizer.all_special_tokens else end


def templates(encoder: Encoder | None) -> bool:
    """Whether the harness can ask by itself: plainly, or with the tokenizer's chat template."""
    return encoder is None or encoder.template is not None


def adapter_of(encoder: Encoder | None) -> Any:
    """The harness's class for a model of transformers."""
    from lm_eval.models.huggingface import HFLM

    class Loaded(HFLM):
        def _model_call(self, *arguments: Any, **more: Any) -> Any:
            """Without the logits of virtual tokens before the text."""
            ids = arguments[0] if arguments else more["inps"]
            return super()._model_call(*arguments, **more)[:, -ids.shape[1] :]

        def apply_chat_template(self, chat_history: list[Any], add_generation_prompt: bool = True) -> str:
            """As transformers renders it, within the limits of time and size that hold for templates here."""
            assert encoder is not None
            assert encoder.template is not None
            variables = {**encoder.tokenizer.special_tokens_map, **self.chat_template_args}
            try:
                return asked(encoder.template, chat_history, variables, not add_generation_prompt)
            except RowProblem as problem:
                plain = [turn for turn in chat_history if turn["role"] != "system"]
                if problem.kind == STOPPED or plain == chat_history:
                    raise RunError(problem.message) from None
                logging.getLogger(HARNESS).warning("the chat template takes no system turn: it is left out")
                try:
                    return asked(encoder.template, plain, variables, not add_generation_prompt)
                except RowProblem as again:
                    raise RunError(again.message) from None

        def generate_until(self, *arguments: Any, **more: Any) -> list[str]:
            """Thinking that does not end is no answer."""
            texts: list[str] = super().generate_until(*arguments, **more)
            marks = encoder.thinking if encoder is not None and encoder.thinking.known else None
            return texts if marks is None else ["" if answer(text, marks).unfinished else text for text in texts]

    return Loaded if encoder is None or templates(encoder) else in_our_format(Loaded, encoder)


def in_our_format(parent: Any, encoder: Encoder) -> Any:
    """Where a chat format is no template of the tokenizer (ChatGLM's): prompts are our ids, found again by the text
    that the harness was given for them."""
    given: dict[str, list[dict[str, Any]]] = {}

    class Asked(parent):
        def apply_chat_template(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            text = json.dumps(history, ensure_ascii=False)
            given[text] = history
            return text

        def tok_encode(self, string: str, *arguments: Any, **more: Any) -> list[int]:
            known = given.get(string)
            return super().tok_encode(string, *arguments, **more) if known is None else encoder.prompt_ids(known)

        def tok_batch_encode(
            self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **more: Any
        ) -> Any:
            rows = [self.tok_encode(text) for text in strings]
            if left_truncate_len and any(len(ids) > left_truncate_len for ids in rows):
                logging.getLogger(HARNESS).warning("a prompt is cut to its last %s tokens", left_truncate_len)
                rows = [ids[-left_truncate_len:] for ids in rows]
            found = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
            return found["input_ids"], found["attention_mask"]

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            if context not in given:
                return super()._encode_pair(context, continuation)
            before = encoder.prompt_ids(given[context])
            return before, through(encoder, given[context], continuation)[len(before) :]

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


def compared(measured: Sequence[Measured], kinds: int = 0) -> list[dict[str, Any]]:
    """The others against the first, document by document, in what each task calls its metrics; of several `kinds` each
    model in the others against itself in the first."""
    found = []
    size = kinds if kinds > 1 else len(measured)
    for start in range(0, len(measured), size):
        first, *others = measured[start : start + size]
        for other, (name, before) in product(others, first.rows.items()):
            after = other.rows.get(name, {})
            places = [place for place in before if place in after]
            if places:
                values = paired([before[place] for place in places], [after[place] for place in places])
                found.append({"a": first.name, "b": other.name, "metric": name, **values})
    return found


def report(measured: Sequence[Measured], json_file: str | None, limit: int | None, kinds: int = 0) -> None:
    """As a table on stdout, as JSON there, or both."""
    for one in measured:
        for line in one.notes:
            warn(f"{one.name}: {line}")
    comparisons = compared(measured, kinds)
    runs = [
        {"name": one.name, "tasks": one.figures, "generation": {"chat_template": one.templated}} for one in measured
    ]
    found = {"harness": HARNESS, "limit": limit, "runs": runs, "comparisons": comparisons}
    if json_file == "-":
        say_json(found)
        return
    table = Table(title=translated("lm-evaluation-harness, ± standard errors"), title_justify="left")
    for heading in ("task", "metric"):
        table.add_column(translated(heading))
    for heading in ("n", translated("shots"), *(one.name for one in measured)):
        table.add_column(heading, justify="right")
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
            say(f"{', '.join(models)}: {translated(how)}")
    for item in comparisons:
        low, high = item["ci"]
        counts = translated(f"{item['wins']} higher, {item['losses']} lower, {item['ties']} same")
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
