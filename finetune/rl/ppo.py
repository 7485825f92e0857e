"""PPO (Schulman et al. 2017, arXiv:1707.06347) on language models (Ziegler et al. 2019, arXiv:1909.08593).

A step is one rollout and its updates:

    collect     the policy answers a batch of prompts; scores, log-probabilities, KL to the reference, values
    update      num_ppo_epochs passes of clipped policy and value losses over these replies
    watch       stop when KL explodes or replies degenerate; log, sample table, checkpoint

The arithmetic is in `rl`, sampling and forward passes are in `rollout`, who computes is in `actors`, what is kept
between rollouts and when to stop in `ppo_state`.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from finetune.adapters.multiple import activated
from finetune.data.prompts import Prompt
from finetune.errors import RunError
from finetune.evaluation.generation import decode, seeded, stop_ids
from finetune.evaluation.rewards import Scorer, answered, checked, scored_reply
from finetune.metrics import mean, paired
from finetune.models.hardware import peak_memory_gb
from finetune.recipe.stages import PpoRecipe
from finetune.rl import arithmetic
from finetune.rl.checkpoint import State, load_checkpoint, save_checkpoint
from finetune.rl.models import Actors
from finetune.rl.monitor import Degenerate, watch
from finetune.rl.rollout import (
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
from finetune.run.directory import Run
from finetune.run.writing import append_lines
from finetune.terminal.progress import Progress, samples, task
from finetune.training.callbacks import Guard, check_scale
from finetune.training.optim import faster_b, is_matrix, scheduler_kwargs, warmup_steps
from finetune.training.sampler import OrderedSampler
from finetune.training.weight_check import Proof, check_finite

EVALUATION_SEED = 20_000
PATIENCE = 50  # updates within which every gradient must have been non-zero: rewards may be equal at first


@dataclass
class Rollout:
    """What one batch of replies gives to learn from; tensors as in `rollout.Replies`."""

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


def rollouts(recipe: PpoRecipe, prompts: int) -> tuple[int, int, int]:
    """(prompts per rollout, rollouts per epoch, rollouts of the run). An epoch's last prompts, too few for a rollout,
    are left out of it; every epoch leaves out others."""
    parts = recipe.ppo.num_mini_batches
    batch = min(recipe.train.effective_batch_size, prompts // parts * parts)
    per_epoch = prompts // batch
    return batch, per_epoch, recipe.train.max_steps or max(1, round(per_epoch * recipe.train.num_train_epochs))


class Ppo:
    def __init__(
        self, recipe: PpoRecipe, run: Run, actors: Actors, encoder: Any, prompts: Sequence[Prompt],
        held_out: Sequence[Prompt], scorers: dict[str, Scorer], arguments: dict[str, Any], rows: int,
        inputs: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            scorers: rules by name, beside the reward model of `actors`.
            arguments: transformers' TrainingArguments; rows: per forward pass.
            inputs: what the run reads, by content, for its checkpoints.
        """
        self.recipe, self.config, self.run, self.actors, self.encoder = recipe, recipe.ppo, run, actors, encoder
        self.prompts, self.held_out, self.scorers = prompts, held_out, scorers
        self.rows, self.inputs = rows, inputs or {}
        self.progress = Progress("ppo")
        self.steps = self.left_out = 0  # steps of the optimizer, and those that loss scaling has left out
        self.pad = encoder.tokenizer.pad_token_id
        self.stops = stop_ids(actors.policy.model, encoder)
        c = recipe.ppo
        self.sampling = Sampling(c.max_new_tokens, c.temperature, c.top_k, c.top_p)
        self.state = State(kl_coef=c.kl_coef)
        self.device = actors.value_head.weight.device
        self.dtype = getattr(torch, recipe.model.dtype)
        self.batch, _, self.total = rollouts(recipe, len(prompts))
        self.module = nn.ModuleList([*actors.trained_models(), actors.value_head])
        self._optimizer(TrainingArguments(**arguments))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    # --- set-up ---

    def _optimizer(self, arguments: TrainingArguments) -> None:
        policy, train = self.actors.policy, self.recipe.train
        values = [*self._value_adapter(), *self.actors.value_head.parameters()]
        theirs = {id(p) for p in values}
        own = [p for p in policy.model.parameters() if p.requires_grad and id(p) not in theirs]
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, policy.model)
        rate = self.config.value_learning_rate or train.learning_rate
        groups, decays = [], {id(p) for n, p in self.module.named_parameters() if is_matrix(n, p)}
        for parameters, lr in ((own, train.learning_rate), (values, rate)):
            for matrices, decay in ((True, train.weight_decay), (False, 0.0)):
                if part := [p for p in parameters if (id(p) in decays) is matrices]:
                    groups.append({"params": part, "lr": lr, "weight_decay": decay})
        self.optimizer = kind(groups, **options)
        if (ratio := getattr(self.recipe.adapter, "loraplus_lr_ratio", None)) is not None:
            faster_b(self.optimizer, self.module, ratio)
        self.scheduler = get_scheduler(
            train.lr_scheduler_type, self.optimizer, warmup_steps(train, self.total), self.total,
            scheduler_specific_kwargs=scheduler_kwargs(train, self.total),
        )  # fmt: skip

    def _value_adapter(self) -> Iterator[nn.Parameter]:
        model, adapter = self.actors.value.model, self.actors.value.adapter
        shared = model is self.actors.policy.model
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (not shared or adapter in name.split(".")):
                yield parameter

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def chunks(self, index: torch.Tensor) -> Iterator[torch.Tensor]:
        """Rows of one forward pass: minibatches, split where they are too large for one."""
        for minibatch in index.split(self.batch // self.config.num_mini_batches):
            yield from minibatch.split(self.rows)

    # --- collecting ---

    def prompts_of(self, step: int) -> list[Prompt]:
        """The prompts of a step: none twice in an epoch, in an order that depends on (seed, epoch) only."""
        per_epoch = len(self.prompts) // self.batch
        epoch, place = divmod(step, per_epoch)
        order = OrderedSampler([1] * len(self.prompts), self.recipe.train.seed)
        order.set_epoch(epoch)
        return [self.prompts[i] for i in list(order)[place * self.batch : (place + 1) * self.batch]]

    def answer(
        self, prompts: Sequence[Prompt], on_batch: Callable[[int], None] = lambda n: None
    ) -> tuple[Replies, list[str]]:
        with activated(self.actors.policy) as model, self.autocast():
            size = max(self.rows, self.recipe.eval.batch_size)
            ids = [p.ids for p in prompts]
            replies = sample(model, ids, self.sampling, self.stops, self.pad, size, on_batch)
        listed = [replies.text_ids(i, self.stops) for i in range(len(replies))]
        return replies, [decode(self.encoder, ids, self.stops) for ids in listed]

    def score(
        self, prompts: Sequence[Prompt], replies: Replies, texts: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """(weighted sums, the same by source). RunError for scores that are no finite numbers."""
        source = iter(self.recipe.reward.weights or repeat(1.0))
        actors, parts = self.actors, {}
        if actors.reward is not None:
            assert actors.reward_head is not None
            rows = [scored_reply(self.encoder, c) for c in answered(prompts, texts)]
            ends = [[row[-1]] for row in rows]  # the last token is where the score stands
            read = together([row[:-1] for row in rows], ends, self.stops, self.pad, self.device)
            found = list[float]()
            with torch.no_grad(), self.autocast(), activated(actors.reward) as model:
                model.train()
                for index in self.chunks(torch.arange(len(replies), device=self.device)):
                    found += end_scores(model, actors.reward_head, read.rows(index)).tolist()
            parts["model"] = (next(source), checked(found, len(replies), "the reward model"))
        elif actors.judge is not None:
            parts["model"] = (next(source), actors.judge.score(prompts, texts))
        for name, scorer in self.scorers.items():
            parts[name] = (next(source), scorer(prompts, texts))
        sums = [sum(w * values[i] for w, values in parts.values()) for i in range(len(texts))]
        bad = next((i for i, v in enumerate(sums) if not math.isfinite(v)), None)
        if bad is not None:
            raise RunError(f"the reward of reply {texts[bad][:60]!r} is {sums[bad]}: lower reward.weights")
        return sums, {name: values for name, (_, values) in parts.items()}

    @torch.no_grad()
    def collect(self, prompts: Sequence[Prompt]) -> Rollout:
        """Replies to these prompts and everything the updates need."""
        written = 0

        def told(rows: int) -> None:
            nonlocal written
            written += rows
            self.progress.doing(f"{written:,}/{len(prompts):,} replies")

        self.progress.doing(f"generating {len(prompts):,} replies")
        replies, texts = self.answer(prompts, told)
        self.progress.doing("scoring the replies")
        scores, parts = self.score(prompts, replies, texts)
        c, actors = self.config, self.actors
        logp, ref, values, allowed = [], [], [], []
        for index in self.chunks(torch.arange(len(replies), device=self.device)):
            part = replies.rows(index)
            with self.autocast():
                with activated(actors.policy) as model:
                    model.train()
                    logits = response_logits(model, part)
                    allowed.append(support(logits, part.tokens, self.sampling))
                    logp.append(log_probs(logits, part.tokens, self.sampling, allowed[-1]))
                with activated(actors.reference) as model:
                    model.train()
                    ref.append(log_probs(response_logits(model, part), part.tokens, self.sampling))
                with activated(actors.value) as model:
                    model.train()
                    values.append(token_values(model, actors.value_head, part))
        mask = replies.mask
        old, reference = torch.cat(logp) * mask, torch.cat(ref) * mask
        value = torch.cat(values) * mask
        rewards = arithmetic.token_rewards(
            self.shaped(scores, replies), arithmetic.per_token_kl(old, reference, mask), mask, self.state.kl_coef
        )
        advantages, returns = arithmetic.advantages(rewards, value, mask, c.gamma, c.lam)
        if c.whiten_advantages:
            advantages = arithmetic.whiten(advantages, mask)
        kl = float(arithmetic.kl_estimate(old, reference, mask).sum(1).mean())
        kept = joined(allowed)
        return Rollout(replies, texts, scores, parts, old, reference, value, kept, advantages, returns, kl)

    def shaped(self, scores: Sequence[float], replies: Replies) -> torch.Tensor:
        """[B] what the last token is paid: normalised and clipped scores, less the penalty for no end."""
        c, result = self.config, torch.tensor(scores, dtype=torch.float32, device=self.device)
        if c.normalize_rewards:
            self.state.moments.add(scores)
            result = (result - self.state.moments.mean) / (self.state.moments.deviation + 1e-8)
        if c.clip_rewards is not None:
            result = result.clamp(-c.clip_rewards, c.clip_rewards)
        return result - c.missing_eos_penalty * (~replies.ended).float()

    # --- updating ---

    def update(self, rollout: Rollout, proof: Proof | None) -> dict[str, float]:
        """All passes over one rollout; means of what was seen."""
        c, size = self.config, self.batch // self.config.num_mini_batches
        seen: dict[str, list[float]] = {}
        for epoch in range(c.num_ppo_epochs):
            # The first pass takes the rows in the order in which their old log-probabilities were computed: the same
            # products in the same shapes, so that its ratios are exactly those of the policy to itself.
            order = torch.randperm(self.batch) if epoch else torch.arange(self.batch)
            for index in order.to(self.device).split(size):
                found = self.minibatch(rollout, index)
                self.scaler.unscale_(self.optimizer)
                if proof is not None:
                    proof.look()
                norm = self._step()
                if math.isfinite(norm):  # or loss scaling has left the step out
                    found["grad_norm"] = norm
                if proof is not None:
                    proof.count(max(g["lr"] for g in self.optimizer.param_groups))
                for key, value in found.items():
                    seen.setdefault(key, []).append(value)
                if found["approx_kl"] > c.max_update_kl:
                    return {**_means(seen), "backed_off": 1.0}
        return _means(seen)

    def _step(self) -> float:
        limit = self.recipe.train.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.requires_grad], limit))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise RunError(f"the gradient became {norm} at step {self.state.step + 1}: lower train.learning_rate")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if math.isfinite(norm):
            self.steps += 1
        else:
            self.left_out += 1
            check_scale(self.scaler, self.state.step + 1)
        self.optimizer.zero_grad()
        return norm

    def minibatch(self, rollout: Rollout, index: torch.Tensor) -> dict[str, float]:
        """Gradients of one optimizer step; every token of the minibatch weighs the same."""
        c, actors = self.config, self.actors
        tokens = rollout.replies.mask[index].sum()
        seen: dict[str, float] = {}
        for rows in self.chunks(index):
            part = rollout.replies.rows(rows)
            share = part.mask.sum() / tokens
            allowed = None if rollout.allowed is None else rollout.allowed.rows(rows)
            with self.autocast(), activated(actors.policy) as model:
                model.train()
                logits = response_logits(model, part)
                new = log_probs(logits, part.tokens, self.sampling, allowed)
                policy = arithmetic.policy_loss(
                    new, rollout.logp[rows], rollout.advantages[rows], part.mask, c.cliprange
                )
                with torch.set_grad_enabled(c.entropy_coef > 0):  # its graph over the vocabulary is a tenth of the peak
                    entropy = arithmetic.masked_mean(arithmetic.entropy(logits / c.temperature), part.mask)
                # Inside: gradient checkpointing computes the forward pass again, with the adapter that is active.
                self.scaler.scale((policy.loss - c.entropy_coef * entropy) * share).backward()
            with self.autocast(), activated(actors.value) as model:
                model.train()
                values = token_values(model, actors.value_head, part)
                loss = arithmetic.value_loss(
                    values, rollout.values[rows], rollout.returns[rows], part.mask, c.cliprange_value
                )  # fmt: skip
                self.scaler.scale(c.vf_coef * loss * share).backward()
            ratio = ((new.detach() - rollout.logp[rows]) * part.mask).abs().max()
            for key, value in {
                "loss": policy.loss, "value_loss": loss, "entropy": entropy, "clip_fraction": policy.clip_fraction,
                "approx_kl": policy.approx_kl,
            }.items():  # fmt: skip
                seen[key] = seen.get(key, 0.0) + float(value.detach() * share)
            seen["log_ratio_max"] = max(seen.get("log_ratio_max", 0.0), float(ratio))
        return seen

    # --- the run ---

    def train(self, resume: Path | None) -> dict[str, Any]:
        """All steps; returns what result.json says. RunError when the policy runs away, Guard's flag when stopped."""
        run, every = self.run, self.recipe.train.save_steps or max(1, self.total // 4)
        if resume is not None:
            self.load(resume)
        run.forget_after(self.state.step)
        if resume is None and self.held_out:
            self.state.before = self.held_out_scores()
        self.guard, progress, proof = Guard(), self.progress, Proof(self.module, PATIENCE)
        self.guard.on_train_begin(None, None, None)
        progress.start(self.total, self.state.step)
        begun = time.perf_counter() - self.state.seconds
        try:
            while self.state.step < self.total and not self.guard.stopped:
                row = self.step(proof)
                self.state.losses.append(row["loss"])
                self.state.seconds = time.perf_counter() - begun
                row["tokens_per_second"] = progress.rate(row.pop("tokens"))
                progress.step(self.state.step)
                logged = self.state.step % self.recipe.train.logging_steps == 0 or self.state.step in (1, self.total)
                if logged:
                    run.append_metrics(row)
                    progress.log(row)
                try:
                    watch(row, self.state, self.config)
                except RunError as error:
                    if not logged:
                        run.append_metrics(row)  # the reason must be on record
                    if isinstance(error, Degenerate):
                        self.save()
                    raise
                if self.state.step % every == 0 or self.guard.stopped or self.state.step == self.total:
                    self.save()
        finally:
            progress.stop()
            self.guard.on_train_end(None, None, None)
        if self.finished:
            if self.left_out and not self.steps:
                what = f"loss scaling has left out all {self.left_out} steps: nothing was trained"
                raise RunError(f"{what}; set model.dtype: bfloat16 or float32")
            check_finite(self.weights().items(), "at the end")
        result = {
            "trained": proof.finish() if self.finished and proof.seen else None, "train_loss": mean(self.state.losses),
            "steps": self.state.step, "seconds": round(time.perf_counter() - begun, 2),
            "epochs": round(self.state.step * self.batch / len(self.prompts), 4),
        }  # fmt: skip
        if self.held_out and self.finished:
            result["eval"] = self.compared()
        return result

    @property
    def model(self) -> Any:
        """The policy."""
        return self.actors.policy.model

    @property
    def finished(self) -> bool:
        return self.state.step >= self.total

    def step(self, proof: Proof | None = None) -> dict[str, Any]:
        """One rollout and its updates; the row for metrics.jsonl."""
        drawn = self.recipe.train.seed * 1_000_003 + self.state.step  # rules may draw: a resumed run draws the same
        random.seed(drawn)
        np.random.seed(drawn % 2**32)
        prompts = self.prompts_of(self.state.step)
        rollout = self.collect(prompts)
        steps = self.steps
        self.progress.doing("learning from the replies")
        found = self.update(rollout, proof)
        rate = self.scheduler.get_last_lr()[0]
        if self.steps > steps:  # or loss scaling has left all of them out
            self.scheduler.step()
        self.state.step += 1
        lengths = rollout.replies.mask.sum(1)
        row = {
            "step": self.state.step, "epoch": round(self.state.step * self.batch / len(self.prompts), 4),
            "reward_mean": mean(rollout.scores), "kl": rollout.kl, "kl_coef": self.state.kl_coef, **found,
            "explained_variance": float(
                arithmetic.explained_variance(rollout.values, rollout.returns, rollout.replies.mask)
            ),
            "response_length": float(lengths.mean()), "eos_rate": float(rollout.replies.ended.float().mean()),
            "repetition": mean([repetition(ids[m.bool()].tolist()) for ids, m in
                                zip(rollout.replies.tokens, rollout.replies.mask, strict=True)]),
            "learning_rate": rate, "peak_memory_gb": round(peak_memory_gb(), 3),
            "tokens": float(rollout.replies.attention.sum()),
        }  # fmt: skip
        if len(rollout.parts) > 1:
            row |= {f"rewards/{name}": mean(values) for name, values in rollout.parts.items()}
        if self.config.kl_target is not None:
            self.state.kl_coef = arithmetic.adapted_beta(
                self.state.kl_coef, rollout.kl, self.config.kl_target, len(prompts), self.config.kl_horizon
            )
        if self.state.step % self.config.log_samples_steps == 0 or self.state.step in (1, self.total):
            self.show(prompts, rollout)
        return row

    def show(self, prompts: Sequence[Prompt], rollout: Rollout) -> None:
        """A few replies, on the terminal and in samples.jsonl."""
        chosen = list(range(min(4, len(prompts))))
        rows = [(prompts[i].text, rollout.texts[i], rollout.scores[i]) for i in chosen]
        samples(f"step {self.state.step}", rows)
        append_lines(
            self.run.samples,
            [{"step": self.state.step, "prompt": p, "reply": reply, "score": score} for p, reply, score in rows],
        )

    # --- held-out prompts ---

    def held_out_scores(self) -> list[float]:
        """Scores of replies to the held-out prompts, sampled with a seed of their own."""
        what = task("answering held-out prompts", len(self.held_out), "replies")
        with what as advance, seeded(self.recipe.train.seed + EVALUATION_SEED, self.device):
            replies, texts = self.answer(self.held_out, advance)
            return self.score(self.held_out, replies, texts)[0]

    def compared(self) -> dict[str, Any]:
        after = self.held_out_scores()
        difference = paired(self.state.before, after)
        return {
            "reward_before": mean(self.state.before), "reward_mean": mean(after),
            "reward_difference": difference["difference"], "reward_difference_ci": difference["ci"],
            "n": len(after),
        }  # fmt: skip

    # --- checkpoints ---

    def save(self) -> None:
        """A checkpoint between rollouts, complete or not there."""
        keep = self.recipe.train.save_total_limit
        save_checkpoint(self.run, self.state, self.weights(), self._stateful(), keep, self.inputs)

    def load(self, folder: Path) -> None:
        self.state = load_checkpoint(folder, self.weights(), self._stateful())

    def weights(self) -> dict[str, torch.Tensor]:
        """What is trained, by name."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def _stateful(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}


def _means(seen: dict[str, list[float]]) -> dict[str, float]:
    found = {key: mean(values) for key, values in seen.items() if key != "log_ratio_max"}
    # The largest |log ratio| of the first minibatch, before any update: 0 but for rounding.
    return {**found, "first_log_ratio": seen["log_ratio_max"][0]}


def repetition(ids: Sequence[int]) -> float:
    """Share of the trigrams that repeat an earlier one of the same reply; 0 for replies under 6 tokens."""
    grams = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
    return 1 - len(set(grams)) / len(grams) if len(ids) >= 6 else 0.0
