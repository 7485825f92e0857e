"""What is measured of one model on held-out sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import xxhash

from finetune import metrics
from finetune.adapters.multiple import ActiveAdapter, activated
from finetune.base import Base
from finetune.data.chat_glm import glm_version
from finetune.data.held_out import SPLIT, HeldOut, HeldRow
from finetune.data.thinking import switched
from finetune.data.types import Conversation
from finetune.evaluation import choices, evaluators
from finetune.evaluation import shots as few_shot
from finetune.evaluation.generation import Evaluation
from finetune.evaluation.kept import Kept
from finetune.evaluation.rewards import RewardModel
from finetune.evaluation.sets import Once, Part
from finetune.evaluation.targets import Target, reference_of
from finetune.metrics import Metric
from finetune.models import adapter_files, hardware
from finetune.models.quantization import weight_bytes
from finetune.models.rope import context
from finetune.recipe.resolve import compute_dtype


def evaluate_sets(target: Target, parts: Sequence[Part], thinking: str | None, kept: Kept) -> dict[str, Evaluation]:
    """Of one model the figures of each set, by its name; it is loaded once."""
    once = Once()
    return {
        part.name: evaluate_target(target, part.held, thinking, part.chosen, part.shots, once, kept) for part in parts
    }


def evaluate_target(
    target: Target, held: HeldOut, thinking: str | None = None, chosen: Sequence[Metric] | None = None, shots: int = 0,
    once: Callable[[Callable[[], Any]], Any] = lambda make: make(), kept: Kept | None = None,
) -> Evaluation:  # fmt: skip
    """The metrics of one model on these rows.

    Args:
        once: what the model is loaded through. kept: the answers of before.
    """
    size, longest = target.eval.batch_size, target.data.max_length
    if target.scores is not None:
        place, dtype = target.scores, target.model.dtype
        scorer = once(lambda: reward_model(place, dtype))
        return evaluators.scores(target.name, scorer, held.rows, longest, chosen)
    # In the chat format that was trained.
    base = Base.open(target.model, target.adapter or target.template, target.treatment)
    encoder: Any = base.encoder if held.kind not in ("text", "choices") or chats(base) else None
    if held.kind == "answers":
        key = "eval.thinking" if thinking is None else "--thinking"
        encoder = base.asking(switched(thinking or target.eval.thinking), key)
    model = once(lambda: load_model(target, base))
    if held.kind == "choices":
        limit, which = (
            context(base.config, target.model),
            metrics.by_itself("choices", []) if chosen is None else chosen,
        )
        result = choices.evaluate(target.name, model, base.tokenizer, encoder, held, shots, size, limit, which)
    elif held.kind == "text":
        length = min(longest, context(base.config, target.model) or longest)
        texts = [sample.text for sample in held.samples]
        whole = held.name == SPLIT
        result = evaluators.text(target.name, model, base.tokenizer, texts, size, length, held.blocks, whole, chosen)
        if target.recipe is not None:  # of a model by itself nobody has said a length
            result.notes += [f"{target.name}: {line}" for line in shorter(length, longest)]
    elif held.kind == "answers":
        limits = (target.eval.max_new_tokens, size)
        before = None if kept is None else kept.of({"data": held.name, **way_of_asking(target, base, encoder)})
        how = target.eval.generation
        room = context(base.config, target.model)
        rows, said = few_shot.asked(held.rows, encoder, limits[0], room)
        said += beyond(rows, encoder, room)
        result = evaluators.answers(target.name, model, encoder, rows, *limits, how, chosen, before)
        result.notes += [f"{target.name}: {line}" for line in said]
    elif held.kind == "pairs":
        train_on = "last" if target.data.train_on == "last" else "assistant"
        ref = reference(target, model)
        result = evaluators.pairs(target.name, model, encoder, held.rows, size, longest, train_on, ref, chosen)
    else:
        ref = reference(target, model)
        result = evaluators.unpaired(target.name, model, encoder, held.rows, size, longest, ref, chosen)
    result.metrics["weights_gb"] = weight_bytes(model) / 1e9
    return result


def shorter(length: int, wanted: int) -> list[str]:
    """What is to be said of blocks that are shorter than those of the run: the model has no room for them."""
    what = f"the text is read in blocks of {length} tokens, for which the model was made"
    return [f"{what}, and not of data.max_length {wanted}; model.rope_scaling gives more room"] * (length < wanted)


def beyond(rows: Sequence[HeldRow], encoder: Any, room: int | None) -> list[str]:
    """What is to be said of prompts that are as long as what the model was made for: its figures there mean little."""
    asked = [row.sample for row in rows] if room is not None else []
    longer = sum(len(encoder.prompt_ids(one.asked, one.tools)) >= (room or 0) for one in asked)
    what = f"{longer} of {len(rows)} prompts have {room} tokens or more, for which the model was not made"
    return [f"{what}: shorten them, or set model.rope_scaling"] * bool(longer)


def way_of_asking(target: Target, base: Base, encoder: Any) -> dict[str, Any]:
    """All that an answer depends on but the prompt; batches are none of it."""
    adapter = None if target.adapter is None else target.adapter.resolve()
    weights = None if adapter is None else xxhash.xxh3_128_hexdigest(adapter_files.weights(adapter).read_bytes())
    of_model = target.model.model_dump(exclude={"name", "adapter", "revision", "source"})
    how = {"max_new_tokens": target.eval.max_new_tokens, **target.eval.generation.chosen}
    return {"base": base.fingerprint, "adapter": weights, "model": of_model, "stops": encoder.stop_ids, **how}


def chats(base: Base) -> bool:
    """Whether the base, or the adapter on it, brings a chat format: others are asked as a benchmark is published."""
    return bool(base.tokenizer.chat_template) or glm_version(base.tokenizer) is not None


def load_model(target: Target, base: Base | None = None) -> Any:
    """base: what is open of it already."""
    machine = hardware.detect()
    dtype = getattr(torch, compute_dtype(target.model.dtype, machine))
    return replace(base or Base.open(target.model), adapter=target.adapter).load(dtype, machine)


def reward_model(path: str, dtype: str = "auto") -> RewardModel:
    machine = hardware.detect()
    return RewardModel.load(path, getattr(torch, compute_dtype(dtype, machine)), machine)


def reference(target: Target, model: Any) -> evaluators.Reference | None:
    """The reference of a run that has one: the same model with its adapter off where that is it, else another."""
    other = reference_of(target)
    if other is None:
        return None
    beta = getattr(target.recipe, target.recipe.stage).beta
    if target.adapter is not None and other.adapter is None:
        return (lambda: activated(ActiveAdapter(model))), beta
    return (lambda: nullcontext(load_model(replace(other, name=f"{target.name}: its reference")))), beta


def add_rewards(
    path: str, results: Sequence[Evaluation], rows: Sequence[Any], chosen: Sequence[Metric] | None = None
) -> None:
    """Add the mean reward of each model's answers, with a 95% interval, and how often it is above the reference's. Both
    are read whole, with what was thought before them, as in `ft ppo`."""
    model = reward_model(path)

    def scores(replies: Sequence[dict[str, Any]], of: Sequence[Any]) -> list[float]:
        return model.scores([Conversation([*c.asked, r], c.tools) for c, r in zip(of, replies, strict=True)])

    known = [i for i, row in enumerate(rows) if row.reference is not None]
    references = scores([reply(rows[i].reference) for i in known], [rows[i] for i in known]) if known else []
    for result in results:
        said = [reply(row["prediction"], row.get("thinking")) for row in result.rows]
        for row, value in zip(result.rows, scores(said, rows), strict=True):
            row["reward"] = value
        for i, value in zip(known, references, strict=True):
            result.rows[i]["reference_reward"] = value
        result.metrics |= metrics.measure(result.kind, result.rows, chosen)


def reply(text: str | None, thought: str | None = None) -> dict[str, Any]:
    """An answer as a turn, without white space at both ends, and what was thought before it."""
    more = {"reasoning_content": thought} if thought else {}
    return {"role": "assistant", "content": (text or "").strip() or " ", **more}
