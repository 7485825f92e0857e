"""Generation and scoring, shared by `ft eval`, `ft merge`, `ft chat` and mid-training evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from finetune import metrics
from finetune.adapters.methods import sees_padding
from finetune.data.encoder import Encoder
from finetune.data.types import Conversation
from finetune.models.hardware import input_device


@dataclass
class Evaluation:
    name: str
    n: int
    metrics: dict[str, Any]
    rows: list[dict[str, Any]] = field(repr=False)
    """What `--predictions` writes of each row that was measured, and what `metrics.METRICS` are taken from: correct (0
    or 1, where there is a right and a wrong), loss (nats per token), loss_tokens, margin, reward, group, …"""
    kind: str = "answers"
    """answers, pairs, unpaired or text"""
    generation: dict[str, Any] = field(default_factory=dict)
    """How the answers were written, and what of the base's generation_config.json was not followed."""
    notes: list[str] = field(default_factory=list)
    """What was left out or cut."""

    @property
    def predictions(self) -> list[str]:
        return [row["prediction"] for row in self.rows]

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


def right_pad(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both [rows, longest], real tokens at the left end."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
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


@torch.inference_mode()
def generate(
    model: PreTrainedModel, encoder: Encoder, prompts: Sequence[list[int]], max_new_tokens: int, batch_size: int,
    on_batch: Callable[[int], None] = lambda n: None, temperature: float = 0.0, seed: int = 0,
) -> list[str]:  # fmt: skip
    """Answers in the order of `prompts` (token ids that end where the answer begins).

    temperature: 0 is greedy; above it answers are drawn from the whole distribution, without top-k or top-p. The same
    seed and batch size give the same answers on the same machine; the caller's random numbers stay as they are.
    """
    model.eval()
    tokenizer, stops = encoder.tokenizer, stop_ids(model, encoder)
    answers = [""] * len(prompts)
    device = input_device(model)
    with seeded(seed, device) if temperature else nullcontext():
        for rows in batches(prompts, batch_size, equal_length=sees_padding(model)):
            ids, mask = left_pad([prompts[i] for i in rows], tokenizer.pad_token_id, device)
            sampled = Sampled(temperature) if temperature else None
            output = answer(model, ids, mask, max_new_tokens, stops, tokenizer.pad_token_id, sampled)
            for row, sequence in zip(rows, output[:, ids.shape[1] :].tolist(), strict=True):
                answers[row] = decode(encoder, sequence, stops)
            on_batch(len(rows))
    return answers


@dataclass(frozen=True)
class Sampled:
    """How answers are drawn; by default from the whole distribution."""

    temperature: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0


def answer(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, max_new_tokens: int, stops: Sequence[int], pad: int,
    sampled: Sampled | None = None, **more: Any,
) -> torch.Tensor:  # fmt: skip
    """Prompts and answers, [rows, …]; without `sampled` greedy. Whoever lets a model write comes through here: eval,
    chat, PPO's rollouts, comparisons.

    Nothing of the base's generation_config.json holds: it may ask for penalties, forbidden tokens or beams, under
    which greedy is not greedy and sampled text has other probabilities than the model gives it.
    """
    wishes: dict[str, Any] = {"do_sample": False}
    if sampled is not None:
        wishes = {"do_sample": True, "temperature": sampled.temperature, "top_k": sampled.top_k, "top_p": sampled.top_p}
    ends = {"eos_token_id": list(stops) or None, "pad_token_id": pad, "max_new_tokens": max_new_tokens}
    config = GenerationConfig(**ends, **wishes)
    with only_as_told(model):
        output: torch.Tensor = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **more)
    return output


@contextmanager
def only_as_told(model: Any) -> Iterator[None]:
    """Without the base's generation_config.json, from which transformers fills in what it is not told."""
    owners = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    before = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
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


def decode(encoder: Encoder, ids: list[int], stops: list[int]) -> str:
    """Text of an answer: up to the first stop token, special tokens left out."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text: str = encoder.tokenizer.decode(ids[:end], skip_special_tokens=True)
    return text.strip()


ROOM = 8192  # tokens in a batch, padding included: what is computed of each is as wide as the vocabulary


def by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of the rows that are computed together, short ones first; fewer at once where they are long."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[i] > ROOM):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def negative_log_likelihoods(
    model: PreTrainedModel, rows: Sequence[tuple[list[int], list[int]]], pad: int, batch_size: int,
    on_batch: Callable[[int], None] = lambda n: None,
) -> list[tuple[float, int]]:  # fmt: skip
    """(summed negative log-likelihood in nats, number of tokens) over the labels of each row (ids, labels)."""
    model.eval()
    device = input_device(model)
    result: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for batch in by_length([len(ids) for ids, _ in rows], batch_size):
        # Padded right: causal attention never looks there, and positions start at 0 as in training.
        ids, mask = right_pad([rows[i][0] for i in batch], pad, device)
        labels, _ = right_pad([rows[i][1] for i in batch], -100, device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -ids.shape[1] :]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
        )
        counts = (labels[:, 1:] != -100).sum(1).tolist()
        for row, total, count in zip(batch, losses.double().sum(1).tolist(), counts, strict=True):
            result[row] = (total, count)
        on_batch(len(batch))
    return result


def evaluate(
    name: str, model: PreTrainedModel, encoder: Encoder, conversations: Sequence[Conversation], max_new_tokens: int,
    batch_size: int, on_batch: Callable[[int], None] = lambda n: None, temperature: float = 0.0, seed: int = 0,
) -> Evaluation:  # fmt: skip
    """Exact match with a 95% interval, per-field accuracy of JSON answers, loss and perplexity of the references.

    Where rows have groups, exact match also of each: `exact_match/GROUP`, `exact_match/GROUP_ci`, and `groups`, the
    number of rows. Rows whose last turn is not trained have no loss: `rows_without_loss` counts them.
    """
    prompts = [encoder.prompt_ids(c.asked, c.tools) for c in conversations]
    begun = time.perf_counter()
    predictions = generate(model, encoder, prompts, max_new_tokens, batch_size, on_batch, temperature, seed)
    seconds = time.perf_counter() - begun
    rows: list[dict[str, Any]] = [
        {
            "messages": c.asked, "reference": c.reference, "prediction": prediction, "correct": None, "loss": None,
            "group": c.group,
        }
        for c, prediction in zip(conversations, predictions, strict=True)
    ]  # fmt: skip
    known = [i for i, row in enumerate(rows) if row["reference"] is not None]
    encoded = [encoder.encode(conversations[i], "last") for i in known]
    labelled = [(row.input_ids, row.labels) for row in encoded]
    scored = negative_log_likelihoods(model, labelled, encoder.tokenizer.pad_token_id, batch_size)
    for i, loss in zip(known, scored, strict=True):
        rows[i] |= {"correct": metrics.right(rows[i]), **per_token(loss)}
    values = metrics.measure("answers", rows)
    columns: dict[str, list[float]] = {}
    for row in rows:
        for key, right in metrics.fields(row).items():
            columns.setdefault(key, []).append(float(right))
    if columns:
        values["fields"] = {key: metrics.mean(column) for key, column in columns.items()}
    if missing := sum(not count for _, count in scored):  # the last turn is not trained
        values["rows_without_loss"] = missing
    written = sum(len(encoder.tokenizer.encode(p, add_special_tokens=False)) + 1 for p in predictions)
    values["tokens_per_second"] = written / max(seconds, 1e-9)
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "not_followed": not_followed(model)}
    return Evaluation(name, len(conversations), values, rows, generation=how)


def per_token(scored: tuple[float, int]) -> dict[str, float | None]:
    """Nats per token of a row (sum, tokens), and how many these are; None where no token is trained."""
    total, count = scored
    return {"loss": total / count if count else None, "loss_tokens": count}
