"""PPO (Schulman et al. 2017, arXiv:1707.06347) on language models (Ziegler et al. 2019, arXiv:1909.08593).

A step is one rollout and its updates:

    rollout     the policy answers a batch of prompts; scores, log-probabilities, KL to the reference, values
    update      num_ppo_epochs passes of clipped policy and value losses over these replies
    monitor     stop when KL explodes or replies degenerate

The arithmetic is in `arithmetic`, sampling and forward passes are in `replies`, policy, reference, reward and value in
`models`, what is kept between rollouts in `checkpoint`. Here: the steps, what they log, held-out prompts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune import ranks
from finetune.data.encoder import Encoder
from finetune.data.prompts import Prompt
from finetune.data.rows import Places
from finetune.errors import Interrupted, RunError
from finetune.evaluation.during import figures_of
from finetune.evaluation.generation import behind_thinking, not_followed, notice, seeded
from finetune.evaluation.rewards import Scorer
from finetune.metrics import Metric, mean, paired
from finetune.models.hardware import peak_memory_gb
from finetune.recipe.stages import PpoRecipe
from finetune.rl import arithmetic
from finetune.rl.checkpoint import State, load_checkpoint, save_checkpoint
from finetune.rl.models import PpoModels
from finetune.rl.monitor import Degenerate, check_gradient, check_numbers, watch
from finetune.rl.replies import together
from finetune.rl.rollout import Collector, Rollout
from finetune.rl.update import Learner
from finetune.run.directory import Run
from finetune.run.resuming import to_go_on
from finetune.run.writing import append_lines
from finetune.terminal.progress import Progress, note, samples, task
from finetune.training.callbacks import Guard
from finetune.training.health import kept_batch, with_batch
from finetune.training.held_out_figures import undisturbed
from finetune.training.longest import forgotten, tell
from finetune.training.plan import rollouts
from finetune.training.sampler import OrderedSampler
from finetune.training.tracking import Trackers
from finetune.training.weight_check import Proof

EVALUATION_SEED = 20_000
PATIENCE = 50  # updates within which every gradient must have been non-zero: rewards may be equal at first


@dataclass(kw_only=True)
class Ppo:
    recipe: PpoRecipe
    models: PpoModels
    encoder: Encoder
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt] = ()
    metrics: Sequence[Metric] = ()
    """Of replies to held-out prompts, measured as eval.during says."""
    rules: Mapping[str, Scorer]
    """By name, beside the reward model of `models`."""
    arguments: dict[str, Any]
    """transformers' TrainingArguments, for the optimizer."""
    rows: int
    """Of a forward pass."""
    places: Places = field(default_factory=Places)
    """Of the prompts."""
    trackers: Trackers | None = None
    run: Run = field(init=False)
    inputs: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        recipe, models = self.recipe, self.models
        self.batch, per_epoch, self.total = rollouts(recipe, len(self.prompts))
        during = recipe.eval.during
        self.every = None if during is None else during.steps or per_epoch
        minibatch = self.batch // recipe.ppo.num_mini_batches
        self.collector = Collector(recipe, models, self.encoder, self.rules, minibatch, self.rows)
        self.learner = Learner(recipe, models, self.collector.sampling, self.rows, self.total, self.arguments)
        self.state = State(kl_coef=recipe.ppo.kl_coef)
        self.progress = Progress("ppo")

    @property
    def model(self) -> Any:
        """What is trained and saved."""
        return self.models.policy.model

    def fit(self, run: Run, checkpoint: Path | None, inputs: Mapping[str, str]) -> dict[str, Any]:
        """All steps; returns what result.json says.

        RunError when the policy runs away, Interrupted after a signal, with a checkpoint on disk.

        Args:
            checkpoint: where to go on from; inputs: what the run reads, by content, kept in the checkpoints.
        """
        self.run, self.inputs = run, inputs
        if checkpoint is not None:
            self.state = load_checkpoint(checkpoint, self.learner.weights, self.learner.stateful())
        run.forget_after(self.state.step)
        self.longest_first()
        if checkpoint is None and self.held_out:
            self.state.before = ranks.from_first(self.held_out_scores)
        if (ignored := notice(not_followed(self.model))) is not None:
            note(ignored)
        state, proof, guard = self.state, Proof(self.learner.module, PATIENCE), Guard()
        guard.on_train_begin(None, None, None)
        self.progress.start(self.total, state.step)
        begun = time.perf_counter() - state.seconds
        every = self.recipe.train.save_steps or max(1, self.total // 4)
        try:
            while state.step < self.total and not guard.stopped:
                row = self.looked_at(proof)
                if self.every is not None and state.step % self.every == 0:
                    row |= ranks.from_first(self.held_out_row)
                state.losses.append(row["loss"])
                state.seconds = time.perf_counter() - begun
                self.log(row)
                guard.stopped = ranks.any_of(guard.stopped)  # all stop at the same step
                if state.step % every == 0 or guard.stopped or state.step == self.total:
                    self.save()
        finally:
            self.progress.stop()
            guard.on_train_end(None, None, None)
        if state.step < self.total:
            where = f"checkpoint saved in {run.checkpoints}"
            raise Interrupted(f"stopped at step {state.step}; {where}; go on with {to_go_on(self.recipe)}")
        if self.learner.left_out and not self.learner.steps:
            what = f"loss scaling has left out all {self.learner.left_out} steps: nothing was trained"
            raise RunError(f"{what}; set model.dtype: bfloat16 or float32")
        result: dict[str, Any] = {}
        try:
            result["trained"] = proof.finish() if proof.seen else None
        except RunError as error:
            result |= {"trained": None, "status": "failed", "failed": str(error)}
        result |= {
            "train_loss": mean(state.losses), "steps": state.step,
            "seconds": round(time.perf_counter() - begun, 2), "epochs": self.epochs(),
        }  # fmt: skip
        result["generation"] = {**vars(self.collector.sampling), "not_followed": not_followed(self.model)}
        return {**result, "eval": self.compared()} if self.held_out and "failed" not in result else result

    def looked_at(self, proof: Proof) -> dict[str, Any]:
        """A step, and RunError with its prompts when it is one to stop at."""
        step, row = self.state.step, None
        try:
            row = self.step(proof)
            check_numbers(row)
            check_gradient(self.state.step, self.learner.still, self.state)
        except RunError as error:
            if row is not None:
                self.run.append_metrics(row)  # the reason must be on record
            if not ranks.first():
                raise
            numbers = self.numbers_of(step)
            texts = [{"prompt": self.prompts[i].text} for i in numbers]
            told = kept_batch(self.run, texts, [self.places[i] for i in numbers] if len(self.places) else [])
            said = str(error)
            message = with_batch(said, told, self.run)
            raise type(error)(message) from None
        return row

    def epochs(self) -> float:
        return round(self.state.step * self.batch / len(self.prompts), 4)

    def save(self) -> None:
        """A checkpoint between rollouts, complete or not there."""
        weights, keep = self.learner.weights, self.recipe.train.save_total_limit
        if ranks.first():
            save_checkpoint(self.run, self.state, weights, self.learner.stateful(), keep, self.inputs)

    def longest_first(self) -> None:
        """The longest prompts with the longest replies go forward and backward once, and leave nothing behind."""
        prompts = sorted((p.ids for p in self.prompts), key=len, reverse=True)[: self.rows]
        written = [[self.collector.pad] * self.recipe.ppo.max_new_tokens] * len(prompts)
        replies = together(prompts, written, (), self.collector.pad, self.models.device)
        none, module = torch.zeros_like(replies.mask), self.learner.module
        with undisturbed(module), forgotten(module):
            rollout = Rollout(replies, [], [], {}, none, none, none, None, none, none, 0.0)
            index = torch.arange(len(prompts), device=self.models.device)
            self.learner.minibatch(rollout, index, shared=False)
        tell(len(prompts), replies.ids.shape[1], module, self.recipe.train.optim)

    # --- a step ---

    def prompts_of(self, step: int) -> list[Prompt]:
        return [self.prompts[i] for i in self.numbers_of(step)]

    def numbers_of(self, step: int) -> list[int]:
        """Of the prompts of a step: none twice in an epoch, in an order that depends on (seed, epoch) only."""
        epoch, place = divmod(step, len(self.prompts) // self.batch)
        order = OrderedSampler([1] * len(self.prompts), self.recipe.train.seed)
        order.set_epoch(epoch)
        return list(order)[place * self.batch : (place + 1) * self.batch]

    def step(self, proof: Proof | None = None) -> dict[str, Any]:
        """One rollout and its updates; the row for metrics.jsonl."""
        state, c = self.state, self.recipe.ppo
        drawn = self.recipe.train.seed * 1_000_003 + state.step  # rules may draw: a resumed run draws the same
        random.seed(drawn)
        np.random.seed(drawn % 2**32)
        if ranks.count() > 1:  # each draws replies of its own, and the same again when it goes on
            torch.manual_seed(drawn * ranks.count() + ranks.rank())
        prompts, rate = self.prompts_of(state.step), self.learner.learning_rate
        rollout = self.collector.collect(prompts, state, self.progress.doing)
        self.progress.doing("learning from the replies")
        found = self.learner.update(rollout, state.step + 1, proof)
        state.step += 1
        replies = rollout.replies
        told = [ids[kept.bool()].tolist() for ids, kept in zip(replies.tokens, replies.mask, strict=True)]
        row = {
            "step": state.step, "epoch": self.epochs(), "reward_mean": mean(rollout.scores), "kl": rollout.kl,
            "kl_coef": state.kl_coef, **found,
            "explained_variance": float(arithmetic.explained_variance(rollout.values, rollout.returns, replies.mask)),
            "response_length": float(replies.mask.sum(1).mean()), "eos_rate": float(replies.ended.float().mean()),
            "repetition": mean([repetition(ids) for ids in told]), "learning_rate": rate,
            "peak_memory_gb": round(peak_memory_gb(), 3), "tokens": float(replies.attention.sum()),
        }  # fmt: skip
        if len(rollout.parts) > 1:
            row |= {f"rewards/{name}": mean(values) for name, values in rollout.parts.items()}
        if c.kl_target is not None:
            state.kl_coef = arithmetic.adapted_beta(state.kl_coef, rollout.kl, c.kl_target, len(prompts), c.kl_horizon)
        if state.step % c.log_samples_steps == 0 or state.step in (1, self.total):
            self.show(prompts, rollout)
        return row

    def log(self, row: dict[str, Any]) -> None:
        """The row of a step, on the terminal and in metrics.jsonl. RunError when it is one to stop at."""
        step = self.state.step
        row["tokens_per_second"] = self.progress.rate(row.pop("tokens"))
        self.progress.step(step)
        logged = step % self.recipe.train.logging_steps == 0 or step in (1, self.total) or "eval_reward_mean" in row
        if logged:
            self.run.append_metrics(row)
            self.progress.log(row)
            if self.trackers is not None:
                self.trackers.log(row, step)
        try:
            watch(row, self.state, self.recipe.ppo)
        except RunError as error:
            if not logged:
                self.run.append_metrics(row)  # the reason must be on record
            if isinstance(error, Degenerate):
                self.save()
            raise

    def show(self, prompts: Sequence[Prompt], rollout: Rollout) -> None:
        """A few replies, on the terminal and in samples.jsonl."""
        rows = list(zip((p.text for p in prompts), rollout.texts, rollout.scores, strict=True))[:4]
        samples(f"step {self.state.step}", rows)
        if not ranks.first():
            return
        append_lines(
            self.run.samples,
            [{"step": self.state.step, "prompt": p, "reply": reply, "score": score} for p, reply, score in rows],
        )

    # --- held-out prompts ---

    def held_out_scores(self) -> list[float]:
        """Scores of replies to the held-out prompts."""
        with task("answering held-out prompts", len(self.held_out), "replies") as advance:
            return self.held_out_replies(self.held_out, advance)[1]

    def held_out_replies(
        self, prompts: Sequence[Prompt], on_batch: Callable[[int], None] = lambda n: None
    ) -> tuple[list[str], list[float]]:
        """(replies, their scores), sampled with a seed of their own."""
        with seeded(self.recipe.train.seed + EVALUATION_SEED, self.models.device):
            _, texts = self.collector.answer(prompts, on_batch)
            return texts, self.collector.score(prompts, texts)[0]

    def held_out_row(self) -> dict[str, Any]:
        """What metrics.jsonl says of replies to the first held-out prompts: their scores and eval.during.metrics."""
        assert self.recipe.eval.during is not None
        prompts = self.held_out[: self.recipe.eval.during.limit]
        self.progress.doing(f"answering {len(prompts):,} held-out prompts", self.state.step)
        texts, scores = self.held_out_replies(prompts)
        low, high = paired([0.0] * len(scores), scores)["ci"]
        rows = [
            {**row, **behind_thinking(self.encoder, prompt.ids, text)}
            for row, prompt, text in zip(answered_rows(prompts), prompts, texts, strict=True)
        ]
        found = {"reward_mean": mean(scores), "reward_mean_ci": [low, high], **figures_of(self.metrics, rows)}
        return {f"eval_{name}": value for name, value in found.items()}

    def compared(self) -> dict[str, Any]:
        before, after = self.state.before, ranks.from_first(self.held_out_scores)
        difference = paired(before, after)
        return {
            "reward_before": mean(before), "reward_mean": mean(after), "reward_difference": difference["difference"],
            "reward_difference_ci": difference["ci"], "n": len(after),
        }  # fmt: skip


def answered_rows(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Rows for metrics, with the reference as the answer."""
    found = []
    for i, prompt in enumerate(prompts, 1):
        text = prompt.columns["reference"]
        place = {"file": "eval.data", "row": i, "columns": prompt.columns}
        found.append({**place, "reference": text, "prediction": text or ""})
    return found


def repetition(ids: Sequence[int]) -> float:
    """Share of the trigrams that repeat an earlier one of the same reply; 0 for replies under 6 tokens."""
    grams = [tuple(ids[i : i + 3]) for i in range(len(ids) - 2)]
    return 1 - len(set(grams)) / len(grams) if len(ids) >= 6 else 0.0
