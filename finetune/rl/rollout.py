"""A rollout: what a batch of prompts gives to learn from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from finetune import ranks
from finetune.data.encoder import Encoder
from finetune.data.prompts import Prompt
from finetune.errors import RunError
from finetune.evaluation.generation import decode, stop_ids
from finetune.evaluation.rewards import Scorer, answered, checked, scored_reply
from finetune.recipe.stages import PpoRecipe
from finetune.rl import arithmetic
from finetune.rl.checkpoint import State
from finetune.rl.models import PpoModels
from finetune.rl.replies import (
    Replies,
    Sampling,
    Support,
    end_scores,
    joined,
    log_probs,
    response_logits,
    sample,
    support,
    together,
    token_values,
)
from finetune.rl.shares import listed, numbers, own, stacked, supported


@dataclass
class Rollout:
    """Tensors as in `replies.Replies`."""

    replies: Replies
    texts: list[str]
    scores: list[float]
    """As the reward sources gave them."""
    parts: dict[str, list[float]]
    """The same by source."""
    logp: torch.Tensor
    ref_logp: torch.Tensor
    values: torch.Tensor
    allowed: Support | None
    advantages: torch.Tensor
    returns: torch.Tensor
    kl: float
    """Per reply, in nats: the sum over its tokens of the non-negative estimator."""


class Collector:
    def __init__(
        self,
        recipe: PpoRecipe,
        models: PpoModels,
        encoder: Encoder,
        rules: Mapping[str, Scorer],
        minibatch: int,
        rows: int,
    ) -> None:
        """rules: by name, beside the reward model of `models`. minibatch: replies of an optimizer step; rows: of a
        forward pass."""
        self.recipe, self.models, self.encoder = recipe, models, encoder
        self.minibatch, self.rows = minibatch, rows
        self.pad, self.stops = encoder.tokenizer.pad_token_id, stop_ids(models.policy.model, encoder)
        c = recipe.ppo
        self.sampling = Sampling(c.temperature, c.top_k, c.top_p, max_new_tokens=c.max_new_tokens)
        self.scorers = dict(rules)
        if models.reward_model is not None:
            self.scorers = {"model": models.reward_model.score, **rules}
        elif models.reward is not None:
            self.scorers = {"model": self.shared_scores, **rules}

    def passes(self, replies: Replies, all_rows: bool = False) -> Iterator[Replies]:
        """Rows of one forward pass: this process's of the minibatches, split where they are too large for one."""
        for minibatch in torch.arange(len(replies), device=self.models.device).split(self.minibatch):
            yield from map(replies.rows, (minibatch if all_rows else own(minibatch)).split(self.rows))

    def answer(
        self, prompts: Sequence[Prompt], on_batch: Callable[[int], None] = lambda n: None
    ) -> tuple[Replies, list[str]]:
        size = max(self.rows, self.recipe.eval.batch_size)
        with self.models.active(self.models.policy) as model:
            ids = [p.ids for p in prompts]
            replies = sample(model, ids, self.sampling, self.stops, self.pad, size, on_batch)
        listed = [replies.text_ids(i, self.stops) for i in range(len(replies))]
        return replies, [decode(self.encoder, ids, self.stops) for ids in listed]

    def score(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> tuple[list[float], dict[str, list[float]]]:
        """(weighted sums, the same by source). RunError for scores that are no finite numbers."""
        parts = {name: scorer(prompts, texts) for name, scorer in self.scorers.items()}
        weights = self.recipe.reward.weights or [1.0] * len(parts)
        sums = [sum(w * s for w, s in zip(weights, row, strict=True)) for row in zip(*parts.values(), strict=True)]
        bad = next((i for i, v in enumerate(sums) if not math.isfinite(v)), None)
        if bad is not None:
            raise RunError(f"the reward of reply {texts[bad][:60]!r} is {sums[bad]}: lower reward.weights")
        return sums, parts

    @torch.no_grad()
    def shared_scores(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Of the reward model on the policy's base."""
        assert self.models.reward is not None
        adapter, head = self.models.reward
        rows = [scored_reply(self.encoder, c) for c in answered(prompts, texts)]
        ends = [[row[-1]] for row in rows]  # the last token is where the score stands
        read = together([row[:-1] for row in rows], ends, self.stops, self.pad, self.models.device)
        with self.models.active(adapter) as model:
            found = [
                score for part in self.passes(read, all_rows=True) for score in end_scores(model, head, part).tolist()
            ]
        return checked(found, len(texts), "the reward model")

    @torch.no_grad()
    def log_probs(self, replies: Replies) -> tuple[torch.Tensor, torch.Tensor, Support | None]:
        """(log pi, log ref, what top-k and top-p left at each position); [B, T] each, 0 on padding."""
        logp, ref, allowed = [], [], []
        for part in self.passes(replies):
            with self.models.active(self.models.policy) as model:
                logits = response_logits(model, part)
                allowed.append(support(logits, part.tokens, self.sampling))
                logp.append(log_probs(logits, part.tokens, self.sampling, allowed[-1]))
            with self.models.active(self.models.ref) as model:
                ref.append(log_probs(response_logits(model, part), part.tokens, self.sampling))
        rows, size = len(replies), self.minibatch
        policy, reference = (stacked(torch.cat(found), rows, size) * replies.mask for found in (logp, ref))
        return policy, reference, supported(joined(allowed), rows, size)

    @torch.no_grad()
    def values(self, replies: Replies) -> torch.Tensor:
        """[B, T], 0 on padding."""
        with self.models.active(self.models.value) as model:
            found = [token_values(model, self.models.value_head, part) for part in self.passes(replies)]
        return stacked(torch.cat(found), len(replies), self.minibatch) * replies.mask

    def collect(self, prompts: Sequence[Prompt], state: State, doing: Callable[[str], None]) -> Rollout:
        """Replies to these prompts and everything the updates need.

        Args:
            state: its kl_coef is paid for, its moments take the scores in.
            doing: is told what is being done.
        """
        written = 0

        def told(rows: int) -> None:
            nonlocal written
            written += rows * ranks.count()
            doing(f"{written:,}/{len(prompts):,} replies")

        doing(f"generating {len(prompts):,} replies")
        mine = [prompts[i] for i in numbers(ranks.rank(), len(prompts), self.minibatch)]
        replies, texts = self.answer(mine, told)
        doing("scoring the replies")
        scores, parts = self.score(mine, texts)
        if ranks.count() > 1:
            replies, texts, scores, parts = self.of_all(prompts, replies, texts, scores, parts)
        c, mask = self.recipe.ppo, replies.mask
        logp, ref, allowed = self.log_probs(replies)
        values = self.values(replies)
        paid, apart = self.paid(scores, replies.ended, state), arithmetic.per_token_kl(logp, ref, mask)
        rewards = arithmetic.token_rewards(paid, apart, mask, state.kl_coef)
        advantages, returns = arithmetic.advantages(rewards, values, mask, c.gamma, c.lam)
        if c.whiten_advantages:
            advantages = arithmetic.whiten(advantages, mask)
        kl = float(arithmetic.kl_estimate(logp, ref, mask).sum(1).mean())
        return Rollout(replies, texts, scores, parts, logp, ref, values, allowed, advantages, returns, kl)

    def of_all(
        self, prompts: Sequence[Prompt], replies: Replies, texts: list[str], scores: list[float],
        parts: dict[str, list[float]],
    ) -> tuple[Replies, list[str], list[float], dict[str, list[float]]]:  # fmt: skip
        """The replies of all processes, in the order of the prompts."""
        ids = [tokens[kept.bool()].tolist() for tokens, kept in zip(replies.tokens, replies.mask, strict=True)]
        by_source = [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
        found = listed([*zip(ids, texts, scores, by_source, strict=True)], len(prompts), self.minibatch)
        asked, device = [p.ids for p in prompts], self.models.device
        whole = together(asked, [row[0] for row in found], self.stops, self.pad, device)
        sources = {name: [row[3][name] for row in found] for name in parts}
        return whole, [row[1] for row in found], [row[2] for row in found], sources

    def paid(self, scores: Sequence[float], ended: torch.Tensor, state: State) -> torch.Tensor:
        """[B] what the last token is paid: normalised and clipped scores, less the penalty for no end."""
        c, result = self.recipe.ppo, torch.tensor(scores, dtype=torch.float32, device=ended.device)
        if c.normalize_rewards:
            state.moments.add(scores)
            result = (result - state.moments.mean) / (state.moments.deviation + 1e-8)
        if c.clip_rewards is not None:
            result = result.clamp(-c.clip_rewards, c.clip_rewards)
        return result - c.missing_eos_penalty * (~ended).float()
