"""What is learned from a rollout: num_ppo_epochs passes of clipped policy and value losses over its replies."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from finetune import ranks
from finetune.errors import RunError
from finetune.metrics import mean
from finetune.recipe.stages import PpoRecipe
from finetune.rl import arithmetic
from finetune.rl.models import PpoModels
from finetune.rl.replies import Sampling, log_probs, response_logits, token_values
from finetune.rl.rollout import Rollout
from finetune.rl.shares import add_gradients, figures, own
from finetune.training.callbacks import check_scale
from finetune.training.optim import faster_b, is_matrix, scheduler_kwargs, warmup_steps
from finetune.training.weight_check import Proof


class Learner:
    """Policy and value model with their optimizer, its schedule and, in float16, the scale of the loss."""

    def __init__(
        self, recipe: PpoRecipe, models: PpoModels, sampling: Sampling, rows: int, total: int, arguments: dict[str, Any]
    ) -> None:
        """rows: of a forward pass; total: rollouts of the run; arguments: transformers' TrainingArguments."""
        self.recipe, self.models, self.sampling, self.rows = recipe, models, sampling, rows
        self.steps = self.left_out = 0  # steps of the optimizer, and those that loss scaling has left out
        self.still = False  # whether the last update found nothing but zeros for the policy, beside advantages
        self.module = nn.ModuleList([*models.trained(), models.value_head])
        self.optimizer = self._optimizer(TrainingArguments(**arguments))
        train = recipe.train
        self.scheduler = get_scheduler(
            train.lr_scheduler_type, self.optimizer, warmup_steps(train, total), total,
            scheduler_specific_kwargs=scheduler_kwargs(train, total),
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(models.device.type, enabled=models.dtype == torch.float16)

    def _optimizer(self, arguments: TrainingArguments) -> torch.optim.Optimizer:
        policy, train = self.models.policy.model, self.recipe.train
        values = [*self._value_adapter(), *self.models.value_head.parameters()]
        theirs = {id(p) for p in values}
        own = [p for p in policy.parameters() if p.requires_grad and id(p) not in theirs]
        self.own = own
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, policy)
        rate = self.recipe.ppo.value_learning_rate or train.learning_rate
        groups, decays = [], {id(p) for n, p in self.module.named_parameters() if is_matrix(n, p)}
        for parameters, lr in ((own, train.learning_rate), (values, rate)):
            for matrices, decay in ((True, train.weight_decay), (False, 0.0)):
                if part := [p for p in parameters if (id(p) in decays) is matrices]:
                    groups.append({"params": part, "lr": lr, "weight_decay": decay})
        optimizer: torch.optim.Optimizer = kind(groups, **options)
        if (ratio := getattr(self.recipe.adapter, "loraplus_lr_ratio", None)) is not None:
            faster_b(optimizer, self.module, ratio)
        return optimizer

    def _value_adapter(self) -> Iterator[nn.Parameter]:
        model, adapter = self.models.value.model, self.models.value.adapter
        shared = model is self.models.policy.model
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (not shared or adapter in name.split(".")):
                yield parameter

    @functools.cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """What is trained, by name; the same from the first step to the last."""
        return {n: p for n, p in self.module.named_parameters() if p.requires_grad}

    def stateful(self) -> dict[str, Any]:
        """What else a checkpoint keeps, by name."""
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def update(self, rollout: Rollout, step: int, proof: Proof | None = None) -> dict[str, float]:
        """All passes over one rollout, that of `step`; means of what was seen."""
        before, seen = self.steps, dict[str, list[float]]()
        # Without advantages, as of replies that are all paid the same, there is nothing to learn yet.
        self.still = ranks.any_of(bool((rollout.advantages * rollout.replies.mask).any()))  # all stop, or none
        for index in self.minibatches(len(rollout.replies)):
            found = self.minibatch(rollout, index)
            self.scaler.unscale_(self.optimizer)
            if proof is not None:
                proof.look()
            self.still = self.still and self._largest() == 0.0
            norm = self._step(step)
            if math.isfinite(norm):  # or loss scaling has left the step out
                found["grad_norm"] = norm
            if proof is not None:
                proof.count(max(g["lr"] for g in self.optimizer.param_groups))
            for key, value in found.items():
                seen.setdefault(key, []).append(value)
            if found["approx_kl"] > self.recipe.ppo.max_update_kl:
                seen["backed_off"] = [1.0]
                break
        if self.steps > before:  # or loss scaling has left all of them out
            self.scheduler.step()
        # The largest |log ratio| of the first minibatch, before any update: 0 but for rounding.
        first = seen.pop("log_ratio_max")[0]
        return {**{key: mean(values) for key, values in seen.items()}, "first_log_ratio": first}

    def minibatches(self, rows: int) -> Iterator[torch.Tensor]:
        """Row numbers of each optimizer step.

        The first pass takes the rows in the order in which their old log-probabilities were computed: the same
        products in the same shapes, so that its ratios are exactly those of the policy to itself.
        """
        for epoch in range(self.recipe.ppo.num_ppo_epochs):
            order = ranks.from_first(lambda: torch.randperm(rows)) if epoch else torch.arange(rows)
            yield from order.to(self.models.device).split(rows // self.recipe.ppo.num_mini_batches)

    def minibatch(self, rollout: Rollout, index: torch.Tensor, shared: bool = True) -> dict[str, float]:
        """Gradients of one optimizer step; every token of the minibatch weighs the same.

        shared: whether each process takes its part of the rows, or all take all.
        """
        c, models = self.recipe.ppo, self.models
        tokens = rollout.replies.mask[index].sum()
        seen: dict[str, float] = {}
        for rows in (own(index) if shared else index).split(self.rows):
            part = rollout.replies.rows(rows)
            share = part.mask.sum() / tokens
            allowed = None if rollout.allowed is None else rollout.allowed.rows(rows)
            with models.active(models.policy) as model:
                logits = response_logits(model, part)
                new = log_probs(logits, part.tokens, self.sampling, allowed)
                policy = arithmetic.policy_loss(
                    new, rollout.logp[rows], rollout.advantages[rows], part.mask, c.cliprange
                )
                with torch.set_grad_enabled(c.entropy_coef > 0):  # its graph over the vocabulary is a tenth of the peak
                    entropy = arithmetic.masked_mean(arithmetic.entropy(logits / c.temperature), part.mask)
                # Inside: gradient checkpointing computes the forward pass again, with the adapter that is active.
                self.scaler.scale((policy.loss - c.entropy_coef * entropy) * share).backward()
            with models.active(models.value) as model:
                values = token_values(model, models.value_head, part)
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
        if not shared:
            return seen
        add_gradients(self.weights.values())
        return figures(seen)

    def _largest(self) -> float:
        """Of the policy's gradient, whose squares may be too small for a norm; no number in a step that is left out."""
        return float(nn.utils.get_total_norm([p.grad for p in self.own if p.grad is not None], math.inf))

    def _step(self, step: int) -> float:
        """The norm of the gradient, not finite where loss scaling leaves the step out."""
        limit = self.recipe.train.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(list(self.weights.values()), limit))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise RunError(f"the gradient became {norm} at step {step}: lower train.learning_rate")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if math.isfinite(norm):
            self.steps += 1
        else:
            self.left_out += 1
            check_scale(self.scaler, step)
        self.optimizer.zero_grad()
        return norm
