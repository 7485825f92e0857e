"""One training pass of each stage, as its trainer computes it, on tensors without numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lycoris_utils import LycorisLayer
from trl.trainer import utils as trl

from finetune.adapters.methods import active
from finetune.planning.network import Network, tracker_of
from finetune.planning.tracker import Segment
from finetune.recipe.stages import PpoRecipe, Recipe

PAIRS = ("dpo", "reward")
"""Stages whose rows are two sequences."""


def traced(network: Network, recipe: Recipe, rows: int, length: int) -> list[Segment]:
    """What a pass of so many rows allocates, in the order of time: before, forward 0, …, head, loss backward,
    backward …, first backward."""
    key = rows, length
    if key not in network.seen:
        try:
            network.seen[key] = _traced(network, recipe, rows, length)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            if not network.masked or network.seen:
                raise
            network.masked = False  # some networks make masks of their own and take no finished one
            network.seen[key] = _traced(network, recipe, rows, length)
    return network.seen[key]


def _traced(network: Network, recipe: Recipe, rows: int, length: int) -> list[Segment]:
    model, scored_everywhere = network.model, trl._use_triton
    tracker, phase = tracker_of(network), {"backward": False}
    handles: list[Any] = []

    def mark(name: str) -> None:
        tracker.mark(name)

    def before(i: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            if phase["backward"]:
                return  # recomputed by gradient checkpointing
            mark(f"forward {i}")
            states = args[0] if args else kwargs["hidden_states"]
            if i == 0 and states.requires_grad:
                states.register_hook(lambda grad: mark("first backward"))

        return hook

    def behind(i: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if phase["backward"]:
                return
            if i == len(network.blocks) - 1:
                tracker.count_apart(states, "last states")  # they go with the head; those of the other blocks stay
                tracker.mark_next("head")
            if states.requires_grad:
                states.register_hook(lambda grad: mark(f"backward {i}"))

        return hook

    for i, block in enumerate(network.blocks):
        handles.append(block.register_forward_pre_hook(before(i), with_kwargs=True))
        handles.append(block.register_forward_hook(behind(i)))
    for module in model.modules():
        if isinstance(
            module, LycorisLayer
        ):  # LoHa, LoKr: in training they draw a number, also where nothing is left out
            module.training = False
    dtype = getattr(torch, recipe.model.dtype)
    trl._use_triton = lambda device: False  # all positions are scored: which, without numbers, is not known
    try:
        with network.mode, tracker:
            mark("before")
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = loss_of(network, recipe, rows, length)
            phase["backward"] = True
            mark("loss backward")
            loss.backward()
            mark("end")
    finally:
        trl._use_triton = scored_everywhere
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.grad = None
    return tracker.segments


def loss_of(network: Network, recipe: Recipe, rows: int, length: int) -> torch.Tensor:
    model = network.model
    if recipe.stage in PAIRS:
        rows *= 2
    ids = torch.zeros(rows, length, dtype=torch.long)
    if recipe.stage == "reward":
        return model(input_ids=ids).logits.float().sum()
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if rows > 1 and network.masked and active(model).virtual_tokens is None:  # several rows are padded
        inputs["attention_mask"] = mask_of(model, rows, length)
    if isinstance(recipe, PpoRecipe):
        return policy_loss(model, recipe, inputs)
    if recipe.train.label_smoothing_factor:
        logits = model(**inputs).logits[:, -length:-1].float()
        every = logits.log_softmax(-1)
        return (every.gather(-1, ids[:, 1:, None])[..., 0] + every.mean(-1)).sum()
    return -model(**inputs, labels=ids, fused_lm_head=True).log_probs.sum()


def mask_of(model: Any, rows: int, length: int) -> torch.Tensor:
    """As transformers makes it: eager attention adds it to the scores, sdpa takes what is to be seen."""
    added = model.config.get_text_config()._attn_implementation == "eager"
    return torch.ones(rows, 1, length, length, dtype=model.dtype if added else torch.bool)


def policy_loss(model: Any, recipe: PpoRecipe, inputs: dict[str, Any]) -> torch.Tensor:
    """The clipped loss of a minibatch of replies, each as long as it may become."""
    ids, replied = inputs["input_ids"], recipe.ppo.max_new_tokens
    logits = model(**inputs, logits_to_keep=replied + 1).logits
    index = torch.zeros(len(ids), replied, 1, dtype=torch.long).expand(-1, -1, logits.shape[-1])
    logits = logits.gather(1, index).float() / recipe.ppo.temperature
    new = logits.gather(-1, ids[:, -replied:, None])[..., 0] - logits.logsumexp(-1)
    with torch.set_grad_enabled(recipe.ppo.entropy_coef > 0):
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
    return (new + recipe.ppo.entropy_coef * entropy).sum()
