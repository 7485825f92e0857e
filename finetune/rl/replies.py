"""Replies sampled from a policy, and what is read off them: log-probabilities, values and scores per token.

Everything that enters a ratio comes from the same kind of pass: prompt and reply side by side, padded right, positions
from 0. That holds for soft prompts, too, whose virtual tokens come first; the reply's positions are gathered by index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from finetune.adapters.methods import active
from finetune.evaluation.generation import Settings, written
from finetune.evaluation.likelihood import takes
from finetune.models import documents
from finetune.models.hardware import input_device


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; by default from the whole distribution."""

    temperature: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    top_p: float = 1.0
    max_new_tokens: int = field(kw_only=True)

    @property
    def settings(self) -> Settings:
        return Settings(temperature=float(self.temperature), top_k=self.top_k, top_p=float(self.top_p))


@dataclass
class Replies:
    """B replies. T is the longest reply, L the longest prompt and reply together."""

    ids: torch.Tensor
    """[B, L] prompt and reply, padded right."""
    attention: torch.Tensor
    """[B, L] 1 on real tokens."""
    prompt_lengths: torch.Tensor
    """[B]"""
    tokens: torch.Tensor
    """[B, T] the reply's tokens, padded with 0."""
    mask: torch.Tensor
    """[B, T] 1 on the reply's tokens, its end token included."""
    ended: torch.Tensor
    """[B] whether the reply ends with an end token."""

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, index: torch.Tensor) -> Replies:
        """Some of them, with no more padding than they need. The reply's columns stay: [b, T]."""
        longest = rounded(int(self.attention[index].sum(1).max()), self.ids.shape[1])
        return Replies(
            self.ids[index, :longest], self.attention[index, :longest], self.prompt_lengths[index], self.tokens[index],
            self.mask[index], self.ended[index],
        )  # fmt: skip

    def positions(self) -> torch.Tensor:
        """[B, T] where the logits of each reply token stand in `ids`: one before the token itself."""
        t = torch.arange(self.tokens.shape[1], device=self.ids.device)
        return (self.prompt_lengths[:, None] - 1 + t).clamp(max=self.ids.shape[1] - 1)

    def side_by_side(self, last: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """(ids and positions [1, N] of all rows as one without padding, where in it the logits of each reply token
        stand [B, T]).

        last: whether the last token of each row is there, which no token of the reply is read from.
        """
        lengths, device = self.attention.sum(1) - int(not last), self.ids.device
        place = torch.arange(self.ids.shape[1], device=device).expand_as(self.ids)
        kept = place < lengths[:, None]
        more = -int(lengths.sum()) % 8  # few shapes, as in `rounded`; documents of one token
        ids, positions = (F.pad(x[kept], (0, more))[None] for x in (self.ids, place))
        t = torch.arange(self.tokens.shape[1], device=device)
        inside = torch.minimum(self.prompt_lengths[:, None] - 1 + t, lengths[:, None] - 1)
        return {"input_ids": ids, "position_ids": positions}, (lengths.cumsum(0) - lengths)[:, None] + inside

    def text_ids(self, row: int, stops: Sequence[int]) -> list[int]:
        """The reply's tokens without the end token."""
        ids: list[int] = self.tokens[row][self.mask[row].bool()].tolist()
        return ids[:-1] if ids and ids[-1] in stops else ids


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[list[int]], sampling: Sampling, stops: Sequence[int], pad: int, batch_size: int,
    on_batch: Callable[[int], None] = lambda n: None,
) -> Replies:  # fmt: skip
    """One reply per prompt, in order, drawn from torch's global generator. The model is left in eval mode."""
    replies: list[list[int]] = [[] for _ in prompts]
    how, most = sampling.settings, sampling.max_new_tokens
    for ended in written(model, prompts, most, batch_size, stops, pad, how, apart=False):
        for row, ids in ended:
            replies[row] = ids
        on_batch(len(ended))
    return together(prompts, replies, stops, pad, input_device(model))


def together(
    prompts: Sequence[list[int]], replies: Sequence[list[int]], stops: Sequence[int], pad: int, device: Any
) -> Replies:
    """Prompts and their replies as tensors."""
    whole = [[*p, *r] for p, r in zip(prompts, replies, strict=True)]
    longest, longest_reply = rounded(max(map(len, whole))), max(map(len, replies))

    def padded(rows: Sequence[Sequence[int]], width: int, value: int) -> torch.Tensor:
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)

    return Replies(
        ids=padded(whole, longest, pad),
        attention=padded([[1] * len(row) for row in whole], longest, 0),
        prompt_lengths=torch.tensor([len(p) for p in prompts], device=device),
        tokens=padded(replies, longest_reply, 0),
        mask=padded([[1] * len(r) for r in replies], longest_reply, 0).float(),
        ended=torch.tensor([bool(r) and r[-1] in stops for r in replies], device=device),
    )


def rounded(length: int, most: int | None = None) -> int:
    """A multiple of 8, at most `most`: few shapes, for which CPUs compile kernels; 16 made a tenth of padding."""
    up = -(-length // 8) * 8
    return up if most is None else min(up, most)


def response_logits(model: Any, replies: Replies) -> torch.Tensor:
    """[B, T, vocabulary] float32 logits that predict the reply's tokens."""
    if documents.used(model):
        return logits_side_by_side(model, replies).float()
    positions, length = replies.positions(), replies.ids.shape[1]
    options: dict[str, Any] = {}
    first = 0
    if takes(model, "logits_to_keep"):  # logits of the prompt are most of the memory, and nobody reads them
        first = int(positions.min())
        options["logits_to_keep"] = length - first
    logits = model(input_ids=replies.ids, attention_mask=replies.attention, use_cache=False, **options).logits
    return at(logits[:, -(length - first) :], positions - first).float()  # virtual tokens stand before


def logits_side_by_side(model: Any, replies: Replies) -> torch.Tensor:
    """The same from one row without padding; the head takes the reply's positions and no others."""
    inputs, positions = replies.side_by_side(last=False)
    real = replies.mask.bool()
    wanted, place = positions[real], real.flatten().cumsum(0).clamp(min=1) - 1
    if takes(model, "logits_to_keep"):
        logits = model(**inputs, use_cache=False, logits_to_keep=wanted).logits[0]
    else:
        logits = model(**inputs, use_cache=False).logits[0].index_select(0, wanted)
    return logits.index_select(0, place).view(*real.shape, -1)


def at(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[B, L, N] and [B, T] -> [B, T, N]; whole rows, which takes a quarter of `gather`'s time forward and backward."""
    rows = torch.arange(len(states), device=states.device)[:, None] * states.shape[1]
    chosen = states.flatten(0, 1).index_select(0, (rows + positions).flatten())
    return chosen.view(*positions.shape, -1)


@dataclass
class Support:
    """The tokens that top-k and top-p leave at each position of B replies: many at some, one at most of them, and so
    kept one after the other."""

    ids: list[torch.Tensor]
    """B times [N] int32 ids, those of the first position first."""
    counts: torch.Tensor
    """[B, T] how many belong to each position; never 0."""

    def rows(self, index: torch.Tensor) -> Support:
        return Support([self.ids[i] for i in index.tolist()], self.counts[index])


def support(logits: torch.Tensor, tokens: torch.Tensor, sampling: Sampling) -> Support | None:
    """What top-k and top-p leave; None when they leave all.

    Kept from the time of sampling: the policy that learns is renormalised over the same tokens, or its ratio would
    jump whenever a token enters or leaves. The sampled token is always among them.

    Args:
        logits: [B, T, V]; tokens: [B, T].
    """
    if not sampling.top_k and sampling.top_p >= 1:
        return None
    found, counts = [], []
    for row, taken in zip(logits / sampling.temperature, tokens, strict=True):  # one by one: sorting takes memory
        ordered, ids = row.sort(dim=-1, descending=True)
        kept = torch.ones_like(ids, dtype=torch.bool)
        if sampling.top_k:
            kept[:, sampling.top_k :] = False
        if sampling.top_p < 1:
            p = ordered.masked_fill(~kept, -torch.inf).softmax(-1)
            kept &= p.cumsum(-1) - p < sampling.top_p
        kept |= ids == taken[:, None]
        found.append(ids[kept].int())
        counts.append(kept.sum(-1))
    return Support(found, torch.stack(counts))


def joined(parts: Sequence[Support | None]) -> Support | None:
    """Those of several passes as one."""
    found = [part for part in parts if part is not None]
    if not found:
        return None
    return Support([ids for part in found for ids in part.ids], torch.cat([part.counts for part in found]))


def log_probs(
    logits: torch.Tensor, tokens: torch.Tensor, sampling: Sampling, allowed: Support | None = None
) -> torch.Tensor:
    """[B, T] log-probabilities of `tokens` under the distribution they are sampled from.

    Args:
        logits: [B, T, V]; tokens: [B, T]; allowed: of `support`.
    """
    logits = logits / sampling.temperature
    chosen = logits.gather(-1, tokens[..., None]).squeeze(-1)
    if allowed is None:
        return chosen - logits.logsumexp(-1)
    counts = allowed.counts.flatten()
    position = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    among = logits.flatten(0, 1)[position, torch.cat(allowed.ids)]
    peak = torch.full_like(chosen.flatten(), -torch.inf).scatter_reduce(0, position, among.detach(), "amax")
    total = torch.zeros_like(peak).index_add(0, position, (among - peak[position]).exp())
    return chosen - (peak + total.log()).view_as(chosen)


def hidden_states(model: Any, replies: Replies) -> torch.Tensor:
    """[B, L, hidden] of the last layer, behind the final norm."""
    inputs = {"input_ids": replies.ids, "attention_mask": replies.attention}
    return states_of(model, inputs)


def states_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same of any rows."""
    if active(model).virtual_tokens is not None:
        options = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        states = model(**inputs, use_cache=False, output_hidden_states=True, **options).hidden_states[-1]
        return states[:, -inputs["input_ids"].shape[1] :]  # virtual tokens stand before
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    network = getattr(whole, whole.base_model_prefix)
    return network(**inputs, use_cache=False).last_hidden_state


def apply_head(head: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    """[..., hidden] -> [...] in the head's own precision."""
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(next(head.parameters()).dtype)).squeeze(-1)


def token_values(model: Any, head: torch.nn.Module, replies: Replies) -> torch.Tensor:
    """[B, T] value of the text before each token of the reply."""
    if documents.used(model):
        inputs, positions = replies.side_by_side(last=False)
        return apply_head(
            head, states_of(model, inputs)[0].index_select(0, positions.flatten()).view(*positions.shape, -1)
        )
    states = hidden_states(model, replies)
    return apply_head(head, at(states, replies.positions()))


def end_scores(model: Any, head: torch.nn.Module, replies: Replies) -> torch.Tensor:
    """[B] score of prompt and reply, read at the last token."""
    if documents.used(model):
        inputs, _ = replies.side_by_side(last=True)
        return apply_head(head, states_of(model, inputs)[0].index_select(0, replies.attention.sum(1).cumsum(0) - 1))
    states, rows = hidden_states(model, replies), torch.arange(len(replies), device=replies.ids.device)
    return apply_head(head, states[rows, replies.attention.sum(1) - 1])
