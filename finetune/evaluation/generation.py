"""How answers are written, for every command that lets a model write, and what is measured of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from finetune import metrics
from finetune.adapters.methods import sees_padding
from finetune.data import thinking
from finetune.data.encoder import Encoder
from finetune.data.types import Conversation
from finetune.evaluation import continuous
from finetune.evaluation.kept import Answers
from finetune.evaluation.likelihood import negative_log_likelihoods, per_token
from finetune.evaluation.sampling import Drawn, Repeated, uniforms
from finetune.metrics import Metric
from finetune.models.hardware import input_device
from finetune.recipe.sections import GenerationConfig as Settings

GREEDY = Settings()
Draws = Callable[[Sequence[int], Sequence[int], int], torch.Tensor | None]
"""Of rows (numbers of their prompts) that have so many tokens each: [rows, count] numbers in [0, 1) for the next."""


@dataclass
class Evaluation:
    name: str
    n: int
    metrics: dict[str, Any]
    rows: list[dict[str, Any]] = field(repr=False)
    """What `--predictions` writes of each row that was measured, and what `metrics.METRICS` are taken from: correct (0
    or 1, where there is a right and a wrong), loss (nats per token), loss_tokens, margin, reward, group, …"""
    kind: str = "answers"
    """answers, pairs, unpaired, text or choices"""
    generation: dict[str, Any] = field(default_factory=dict)
    """How the answers were written, and what of the base's generation_config.json was not followed."""
    notes: list[str] = field(default_factory=list)
    """What was left out or cut."""

    @property
    def losses(self) -> list[float]:
        """Mean negative log-likelihood per token of each row's reference, where it is trained."""
        return [row["loss"] for row in self.rows if row["loss"] is not None]


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [rows, longest], real tokens at the right end."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def batches(prompts: Sequence[Sequence[int]], batch_size: int, equal_length: bool) -> Iterator[list[int]]:
    """Numbers of the prompts that are answered together, short ones first.

    With `equal_length` nothing is padded (`sees_padding`).
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, alike in groupby(order, key=lambda i: len(prompts[i]) if equal_length else 0):
        rows = list(alike)
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def generate(
    model: PreTrainedModel, encoder: Encoder, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int,
    on_batch: Callable[[int], None] = lambda n: None, how: Settings = GREEDY, first: int = 0,
    kept: Answers | None = None,
) -> list[str]:  # fmt: skip
    """Answers as they were written, in the order of `prompts` (token ids that end where the answer begins).

    Args:
        first: number of the first prompt; drawn answers depend on theirs. kept: those of before, which are not written
            again.
    """
    stops, pad = stop_ids(model, encoder), encoder.tokenizer.pad_token_id
    answers = [None if kept is None else kept.get(prompt, first + i) for i, prompt in enumerate(prompts)]
    left = [i for i, text in enumerate(answers) if text is None]
    on_batch(len(prompts) - len(left))
    asked, names = [prompts[i] for i in left], [first + i for i in left]
    for batch in written(model, asked, max_new_tokens, batch_size, stops, pad, how, names):
        for at, ids in batch:
            i = left[at]
            answers[i] = text = as_written(encoder, ids, stops)
            if kept is not None:
                kept.add(prompts[i], first + i, text)
        on_batch(len(batch))
    return [text or "" for text in answers]


def written(
    model: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, stops: Sequence[int], pad: int,
    how: Settings = GREEDY, names: Sequence[object] | None = None, apart: bool = True,
) -> Iterator[list[tuple[int, list[int]]]]:  # fmt: skip
    """(number of the prompt, ids of its answer with the stop token that ends it), a list of them whenever some have
    ended; short prompts first, in continuous batches where the network's cache allows it.

    Args:
        names: of the prompts, one each; their numbers when None.
        apart: a drawn answer depends on how.seed and on the prompt's name alone, not on the batch it is in, and the
            caller's random numbers stay as they are. Otherwise answers are drawn from torch's global generator.
    """

    def draws(numbers: Sequence[int], begun: Sequence[int], count: int) -> torch.Tensor | None:
        """[rows, count], from the token after those that were told."""
        if not (apart and how.drawn):
            return None
        found = uniforms(how.seed, [i if names is None else names[i] for i in numbers], max(begun) + count)
        return torch.stack([row[n : n + count] for row, n in zip(found, begun, strict=True)])

    model.eval()
    left = list(range(len(prompts)))
    if how.num_beams == 1 and stops and continuous.can(model) and not sees_padding(model):
        for done in continuously(model, prompts, max_new_tokens, batch_size, stops, pad, how, draws):
            left = [i for i in left if i not in {number for number, _ in done}]
            yield done
    for rows in batches([prompts[i] for i in left], batch_size, equal_length=sees_padding(model)):
        numbers = [left[i] for i in rows]
        ids, mask = left_pad([prompts[i] for i in numbers], pad, input_device(model))
        with torch.inference_mode():
            output = answer(
                model, ids, mask, max_new_tokens, stops, pad, how, draws(numbers, [0] * len(numbers), max_new_tokens)
            )
        yield [
            (i, up_to_stop(sequence, stops))
            for i, sequence in zip(numbers, output[:, ids.shape[1] :].tolist(), strict=True)
        ]


def continuously(
    model: Any, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int, stops: Sequence[int], pad: int,
    how: Settings, draws: Draws,
) -> Iterator[list[tuple[int, list[int]]]]:  # fmt: skip
    """`written` in continuous batches; nothing where the network's cache is none whose rows can come and go."""
    waiting = [i for rows in batches(prompts, batch_size, equal_length=False) for i in rows]
    rows: continuous.Rows | None = None
    while waiting or rows is not None:
        free = batch_size - (0 if rows is None else len(rows.numbers))
        if waiting and free * continuous.SHARE >= batch_size:
            numbers, waiting = waiting[:free], waiting[free:]
            ids, mask = left_pad([prompts[i] for i in numbers], pad, input_device(model))
            new = continuous.Rows(numbers, [0] * len(numbers), ids, mask, None)
            new = further(model, new, 1, stops, pad, how, draws)
            if not continuous.whole(new.cache):
                return
            rows = new if rows is None else continuous.joined(rows, new, pad)
        else:
            assert rows is not None
            count = max_new_tokens - max(rows.told)
            rows = further(model, rows, count, stops, pad, how, draws)
        answers = [up_to_stop(ids[-n:], stops) for ids, n in zip(rows.ids.tolist(), rows.told, strict=True)]
        ended = [i for i, ids in enumerate(answers) if len(ids) == max_new_tokens or ids[-1] in stops]
        if ended:
            yield [(rows.numbers[i], answers[i]) for i in ended]
            kept = [i for i in range(len(answers)) if i not in ended]
            rows = continuous.of(rows, kept) if kept else None


def further(
    model: Any, rows: continuous.Rows, count: int, stops: Sequence[int], pad: int, how: Settings, draws: Draws,
) -> continuous.Rows:  # fmt: skip
    """At most `count` tokens more for each row; fewer when a part of them has ended."""
    width = rows.ids.shape[1]
    more = {} if rows.cache is None else {"past_key_values": rows.cache}
    enough = continuous.Enough(width, list(stops), len(rows.numbers), rows.ids.device)
    with torch.inference_mode():
        output: Any = answer(
            model, rows.ids, rows.mask, count, stops, pad, how, draws(rows.numbers, rows.told, count),
            stopping_criteria=[enough], as_dict=True, **more,
        )  # fmt: skip
    ids = output.sequences
    told = ids.shape[1] - width
    mask = torch.cat([rows.mask, rows.mask.new_ones(len(ids), told)], 1)
    return continuous.Rows(rows.numbers, [n + told for n in rows.told], ids, mask, output.past_key_values)


def up_to_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """An answer's ids with the first stop token, and without what stands behind it."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def generation_config(how: Settings, max_new_tokens: int, stops: Sequence[int], pad: int) -> GenerationConfig:
    """All that transformers is told about writing, by any command: what is not here has no say."""
    wishes: dict[str, Any] = {"do_sample": how.drawn, "num_beams": how.num_beams}
    if how.drawn:
        wishes |= {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p}
    ends = {"eos_token_id": list(stops) or None, "pad_token_id": pad, "max_new_tokens": max_new_tokens}
    return GenerationConfig(**ends, **wishes)


def answer(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, stops: Sequence[int], pad: int,
    how: Settings = GREEDY, draws: torch.Tensor | None = None, processors: Sequence[Any] = (), as_dict: bool = False,
    **more: Any,
) -> Any:  # fmt: skip
    """Prompts and answers, [rows, …]. Whoever lets a model write comes through here: eval, generate, chat, PPO's
    rollouts, comparisons.

    Nothing of the base's generation_config.json holds: it may ask for penalties, forbidden tokens or beams, under
    which greedy is not greedy and sampled text has other probabilities than the model gives it.

    Args:
        draws: [rows, max_new_tokens] numbers in [0, 1) that tokens are drawn with; torch's global generator when None.
        processors: of the caller's, before those of `how`. as_dict: all that transformers gives back, with the cache.
    """
    config = generation_config(how, max_new_tokens, stops, pad)
    processors = [*processors, *([] if how.repetition_penalty == 1 else [Repeated(how.repetition_penalty, mask)])]
    if how.drawn and draws is not None:
        config = generation_config(GREEDY, max_new_tokens, stops, pad)  # greedy among the one token that is drawn
        exact = torch.float32 if ids.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        processors.append(Drawn(how, draws.to(ids.device, exact)))
    config.return_dict_in_generate = as_dict
    with only_as_told(model):
        return model.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors, **more
        )


@contextmanager
def only_as_told(model: Any, ends: Sequence[int] | None = None) -> Iterator[None]:
    """Without the base's generation_config.json, from which transformers fills in what it is not told; but for what
    ends an answer, where nobody else says it."""
    owners = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    before = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig(eos_token_id=list(ends) if ends else None)
        yield
    finally:
        for owner, config in zip(owners, before, strict=True):
            owner.generation_config = config


# What of a generation_config.json has no say in which tokens are written, or is followed (what ends an answer).
HARMLESS = (
    "eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "use_cache", "max_length", "max_new_tokens",
    "cache_implementation", "output_attentions", "output_hidden_states",
)  # fmt: skip


def not_followed(model: Any) -> dict[str, Any]:
    """What the base's generation_config.json asks for and `answer` does not do."""
    asked = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    return {k: v for k, v in asked.items() if k not in HARMLESS and not k.startswith("_") and v not in (None, False)}


def notice(asked: dict[str, Any]) -> str | None:
    """The line about what `not_followed` found."""
    listed = ", ".join(f"{key} {value}" for key, value in asked.items())
    return f"not followed, of the base's generation_config.json: {listed}" if asked else None


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed`, and afterwards those that would have come without."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


def stop_ids(model: PreTrainedModel, encoder: Encoder) -> list[int]:
    """What ends an answer: the chat template's end of turn, and the base's own (generation_config.json: Llama 3 has
    three, GLM-4-0414 the next turn's role)."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([*encoder.stop_ids, *listed]))


def as_written(encoder: Encoder, ids: list[int], stops: list[int]) -> str:
    """Text of an answer as it was written: up to the first stop token, special tokens left out."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text = thinking.decoded(encoder.tokenizer, ids[:end], encoder.thinking)
    return text.removeprefix("\n") if encoder.template is None else text  # ChatGLM's header ends within the answer


def decode(encoder: Encoder, ids: list[int], stops: list[int]) -> str:
    """The same without white space at both ends, as it is scored and shown in a conversation."""
    return as_written(encoder, ids, stops).strip()


def evaluate(
    name: str, model: PreTrainedModel, encoder: Encoder, conversations: Sequence[Conversation], max_new_tokens: int,
    batch_size: int, on_batch: Callable[[int], None] = lambda n: None, how: Settings = GREEDY,
    chosen: Sequence[Metric] | None = None, known: Sequence[dict[str, Any]] | None = None, kept: Answers | None = None,
) -> Evaluation:  # fmt: skip
    """The metrics of answers and of the references' losses, with their 95% intervals.

    Where rows have groups, some also of each: `exact_match/GROUP`, `exact_match/GROUP_ci`, and `groups`, the number of
    rows. Rows whose last turn is not trained have no loss: `rows_without_loss` counts them.

    Args:
        chosen: only these metrics; what none of them needs is neither written nor computed. Unset: what suits the rows.
        known: what else is known of each row (its place, its columns). kept: see `generate`.
    """
    rows: list[dict[str, Any]] = [
        {
            **more, "messages": c.asked, "prediction": None, "correct": None, "loss": None, "group": c.group,
            "reference": c.reference and thinking.answer(c.reference, encoder.thinking).text,
        }
        for c, more in zip(conversations, known or [{}] * len(conversations), strict=True)
    ]  # fmt: skip
    chosen = metrics.by_itself("answers", rows) if chosen is None else chosen
    needs = {metric.needs for metric in chosen}
    seconds, tokens, predictions = 0.0, 0, 0
    from_before = 0 if kept is None else len(kept.known)
    for start in windows(rows) if needs & {"prediction", "reward"} else ():
        prompts = [encoder.prompt_ids(c.asked, c.tools) for c in conversations[start : start + WINDOW]]
        begun = time.perf_counter()
        texts = generate(model, encoder, prompts, max_new_tokens, batch_size, on_batch, how, start, kept)
        seconds += time.perf_counter() - begun
        predictions += len(texts)
        tokens += sum(len(encoder.tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts)
        for row, prompt, text in zip(rows[start : start + WINDOW], prompts, texts, strict=True):
            row.update(behind_thinking(encoder, prompt, text))
    if predictions:
        judge(rows, chosen)
    referred = [i for i, row in enumerate(rows) if row["reference"] is not None] if "loss" in needs else []
    missing = 0
    for start in windows(referred):
        part = referred[start : start + WINDOW]
        encoded = [encoder.encode(conversations[i], "last") for i in part]
        labelled = [(row.input_ids, row.labels) for row in encoded]
        scored = negative_log_likelihoods(model, labelled, encoder.tokenizer.pad_token_id, batch_size)
        missing += sum(not loss.tokens for loss in scored)
        for i, loss in zip(part, scored, strict=True):
            rows[i] |= per_token(loss)
    values = metrics.measure("answers", rows, chosen)
    columns: dict[str, list[float]] = {}
    for row in rows:
        for key, right in (metrics.fields(row) if any(m.name == "field_accuracy" for m in chosen) else {}).items():
            columns.setdefault(key, []).append(float(right))
    if columns:
        values["fields"] = {key: metrics.mean(column) for key, column in columns.items()}
        values["fields_ci"] = {key: [*metrics.wilson(int(sum(c)), len(c))] for key, c in columns.items()}
        values["fields_n"] = {key: len(column) for key, column in columns.items()}
    if missing:  # the last turn is not trained
        values["rows_without_loss"] = missing
    said: dict[str, Any] = {}
    if predictions:
        if not from_before:
            values["tokens_per_second"] = tokens / max(seconds, 1e-9)
        said = {"max_new_tokens": max_new_tokens, **how.chosen, "not_followed": not_followed(model)}
        if encoder.thinking.switch is not None:
            said["thinking"] = thinking.named(encoder.asks)
    return Evaluation(
        name, len(conversations), values, rows, generation=said, notes=said_of_thinking(name, rows, values)
    )


def behind_thinking(encoder: Encoder, prompt: list[int], text: str) -> dict[str, Any]:
    """An answer as a row has it: `prediction`, which is scored, and where there was some `thinking`."""
    found = thinking.answer(text, encoder.thinking, thinking.begun(encoder.tokenizer, prompt, encoder.thinking))
    if not found.thought and not found.unfinished:
        return {"prediction": found.text}
    return {"prediction": found.text, "thinking": found.thought, "unfinished_thinking": found.unfinished}


def said_of_thinking(name: str, rows: Sequence[dict[str, Any]], values: dict[str, Any]) -> list[str]:
    """What is to be said of answers with thinking; they and those that never ended it are counted in `values`."""
    thought = [row for row in rows if "thinking" in row]
    if not thought:
        return []
    unfinished = sum(row["unfinished_thinking"] for row in thought)
    values |= {"with_thinking": len(thought), "unfinished_thinking": unfinished}
    lines = [f"{name}: {len(thought)} of {len(rows)} answers think first; only what stands behind that is scored"]
    if unfinished:
        lines.append(
            f"{name}: {unfinished} of {len(rows)} answers end inside their thinking and count as no answer: raise "
            "eval.max_new_tokens, or ask with --thinking off"
        )
    return lines


WINDOW = 2048  # rows that are encoded and sorted by length together: what is held beside the rows does not grow


def windows(rows: Sequence[Any]) -> range:
    """Where each begins."""
    return range(0, len(rows), WINDOW)


def judge(rows: Sequence[dict[str, Any]], chosen: Sequence[Metric]) -> None:
    """Where answers meet metrics, and nowhere else: each row gets what the metrics say of it, and `correct`, the
    verdict of the first of them that has only right and wrong."""
    metrics.score(rows, chosen)
    for verdict in [m for m in chosen if m.needs == "prediction" and m.interval is metrics.share][:1]:
        for row in rows:
            row["correct"] = verdict.of(row) if row["reference"] is not None else None
