"""trl's trainers with what they lack: rows that are token ids already, an order that can be resumed, muon, LoRA+, …

`Extras` is mixed into each trainer: the order of samples depends on (seed, epoch) alone, so that a resumed run sees
exactly the batches of an uninterrupted one; the optimizers of `optim`; loss scaling on CPUs; checkpoints that are
complete or not there and hold all that a resumed run needs; held-out figures that no batch size changes. `RowMeans`
gives every row of a step the same weight, however the step is cut into passes.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune.adapters import adalora
from finetune.adapters.multiple import copy_adapter, named
from finetune.adapters.resume import load_state, save_state
from finetune.errors import RunError, UserError
from finetune.metrics import ratio_interval
from finetune.models.quantization import is_quantized
from finetune.recipe.sections import TrainConfig
from finetune.recipe.stages import DpoConfig
from finetune.run.checkpoints import complete, damage, known_of, rotate
from finetune.run.writing import write_json
from finetune.terminal.progress import task
from finetune.training.optim import MuonWithAdamW, decayed, faster_b, muon_split
from finetune.training.preference import mismatched, orpo_loss, simpo_loss
from finetune.training.sampler import OrderedSampler
from finetune.training.weight_check import check_finite, trained

REFERENCE_FREE = ("simpo", "orpo")
RESAMPLED = 10  # batches of held-out rows from which on they are resampled for an interval
SORTED = ("aot", "aot_unpaired")
"""Losses between the sorted margins of all pairs that are in a pass."""


class Extras:
    """Mixed in before a transformers Trainer."""

    recipe_train: TrainConfig
    loraplus_lr_ratio: float | None = None
    length_columns: tuple[str, ...] = ("input_ids",)
    optimizer: Any
    model: Any
    args: Any
    accelerator: Any
    control: Any
    batches: list[Any]
    """What was seen of each batch of held-out rows."""
    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches = []
        with unrounded(kwargs["model"]):
            super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset = self.train_dataset if train_dataset is None else train_dataset  # type: ignore[attr-defined]
        columns = zip(*(dataset[name] for name in self.length_columns), strict=True)
        lengths = [max(len(ids) for ids in row) for row in columns]
        grouped = self.recipe_train.group_by_length and "seq_lengths" not in dataset.column_names
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps if grouped else 1
        return OrderedSampler(lengths, self.args.seed, group)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self._metrics = {"train": {}, "eval": {}}  # of trl, whose trainers replace it
        if self.args.fp16 and self.args.device.type == "cpu":
            # accelerate drops autocast and loss scaling for fp16 on CPUs without a word; with them the path that
            # T4 and V100 take runs here, too.
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return decayed(model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.recipe_train.optim == "muon" and self.optimizer is None:
            self.optimizer = MuonWithAdamW(*muon_split(self.model if model is None else model), self.recipe_train)
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if fresh and self.loraplus_lr_ratio is not None:
            faster_b(optimizer, self.model, self.loraplus_lr_ratio)
        return optimizer

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's loss, with AdaLoRA's penalty once per step."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not self.model.training or isinstance(loss, tuple):
            return loss
        return loss + adalora.penalty(self.model) / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]

    # --- checkpoints ---

    inputs: dict[str, str] = {}  # noqa: RUF012 (replaced, never changed)
    """{key: digest of its content} of what the run reads."""
    begun = 0.0
    """When training began, less what it had taken before it was stopped."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Complete or not there; older ones go when it is there. RunError when there is nothing good to keep."""
        folder = self._checkpoint(self.state.global_step)  # type: ignore[attr-defined]
        check_finite(trained(self.model), f"at step {self.state.global_step}")  # type: ignore[attr-defined]
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # what a kill or a damaged checkpoint has left
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        if self.args.should_save:
            save_state(self.model, folder)
            best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
            complete(folder, inputs=self.inputs, counters=self._counters())
            rotate(folder.parent, self.recipe_train.save_total_limit, best and Path(best).name)

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _counters(self) -> dict[str, Any]:
        """What transformers and trl count in memory only."""
        best = self.state.best_model_checkpoint  # type: ignore[attr-defined]
        return {
            "loss": self._total_loss_scalar, "loss_since": float(self._tr_loss),
            "logged_at": self._globalstep_last_logged, "tokens": self._total_train_tokens,
            "metrics": dict(self._metrics["train"]),
            "patience": [stopper.early_stopping_patience_counter for stopper in self._stoppers()],
            "best": best and Path(best).name, "seconds": time.perf_counter() - self.begun,
        }  # fmt: skip

    def count_on(self, checkpoint: Path) -> None:
        """From where the run stood at a checkpoint; called when transformers has set everything to zero."""
        known = known_of(checkpoint).get("counters")
        if known is None:
            return
        self._total_loss_scalar, self._initial_global_step = known["loss"], 0
        self._tr_loss = torch.tensor(known["loss_since"], device=self.args.device)
        self._globalstep_last_logged, self._total_train_tokens = known["logged_at"], known["tokens"]
        self._metrics["train"].update({key: list(values) for key, values in known["metrics"].items()})
        self.begun -= known["seconds"]
        for stopper, counter in zip(self._stoppers(), known["patience"], strict=False):
            stopper.early_stopping_patience_counter = counter
        best = known["best"] and Path(self.args.output_dir) / known["best"]  # the run may lie elsewhere now
        self.state.best_model_checkpoint = str(best) if best and best.is_dir() else None  # type: ignore[attr-defined]

    def _stoppers(self) -> list[Any]:
        callbacks = self.callback_handler.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing when all steps are taken: transformers looks only after one more."""
        patient = all(c.early_stopping_patience_counter < c.early_stopping_patience for c in self._stoppers())
        if self.state.global_step < self.state.max_steps and patient:  # type: ignore[attr-defined]
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]
        else:
            self.control.should_training_stop = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not load_state(self.model, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)  # type: ignore[attr-defined]
        if (reason := damage(best)) is not None:
            raise RunError(f"the best checkpoint {best} is damaged: {reason}")
        if not load_state(self.model, best):
            super()._load_best_model()  # type: ignore[misc]

    # --- every step ---

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """A step with a loss or gradient that is no number is logged, at which `Recorder` stops the run."""
        norm = 0.0 if grad_norm is None or self.accelerator.optimizer_step_was_skipped else float(grad_norm)
        if not math.isfinite(float(tr_loss) + norm):
            self.control.should_log = True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)  # type: ignore[misc]

    # --- held-out rows ---

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = super().prediction_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        logged = self._metrics["eval"]
        values = {"loss": float(found[0]), **{key: float(values[-1]) for key, values in logged.items()}}
        logged.clear()
        self.batches.append({key: (value, self.weight(key, inputs)) for key, value in values.items()})
        return found

    def weight(self, key: str, inputs: dict[str, Any]) -> float:
        """What a batch's figure is a mean over: its trained tokens."""
        labels = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][..., 1:]
        return float((labels != -100).sum())

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Every figure over all held-out rows at once, not the mean of what the batches have."""
        self.batches = []
        output = super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        figures = self.figures()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = figures.pop("loss")
        parts = [batch["loss"] for batch in self.batches if "loss" in batch and batch["loss"][1]]
        if len(parts) >= RESAMPLED:
            totals, weights = [value * weight for value, weight in parts], [weight for _, weight in parts]
            output.metrics[f"{prefix}_loss_ci"] = list(ratio_interval(totals, weights))
        self._metrics["eval"].update({key: [value] for key, value in figures.items()})
        return output

    def figures(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for key in dict.fromkeys(key for batch in self.batches for key in batch):
            values = [batch[key] for batch in self.batches if key in batch and batch[key][1]]
            if key == "num_tokens":
                found[key] = self._total_train_tokens
            elif key in ("min_reward", "max_reward"):
                found[key] = (min if key == "min_reward" else max)(value for value, _ in values)
            else:
                total = sum(weight for _, weight in values)
                found[key] = sum(value * weight for value, weight in values) / total if total else math.nan
        return found


class CountOn(TrainerCallback):
    """Begins the count of a run, or takes it up where its checkpoint stood."""

    def __init__(self, trainer: Any, checkpoint: Path | None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.begun = time.perf_counter()
        if self.checkpoint is not None:
            self.trainer.count_on(self.checkpoint)


@contextmanager
def unrounded(model: Any) -> Iterator[None]:
    """While a trainer of trl is made: what is trained on a quantized base keeps its float32.

    trl casts it to bfloat16, which cannot be undone: a policy that goes on from an adapter would begin elsewhere than
    that adapter, and DPO's reference pass would see the rounded one. It passes over what does not require a gradient.
    """
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    trained = [p for p in model.parameters() if p.requires_grad] if quantized else []
    for parameter in trained:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


def as_measured(model: Any, training: bool) -> None:
    """For a pass of the reference: nothing is dropped at random, and quantized layers compute as they do for the policy
    it is compared with. Those of int8 compute otherwise in training."""
    model.eval()
    for module in model.modules():
        if is_quantized(module):
            module.train(training)


class RowMeans:
    """Mixed in before a trainer whose loss of a pass is a mean over its rows.

    transformers averages over the passes of a step, so that a row of a short last pass would weigh more than others.
    """

    loss_is_scaled_for_ga = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], int]:
        batches, _ = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        return batches, sum(len(batch["input_ids"]) for batch in batches)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the pass's rows, as its share of the mean over the step's."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if num_items_in_batch is None:
            return loss
        share = len(inputs["input_ids"]) / num_items_in_batch
        return (loss[0] * share, loss[1]) if return_outputs else loss * share


class Collator(DataCollatorForLanguageModeling):
    """trl's, with the loss weights of turns where the data has them."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        if "weights" in examples[0]:
            rows = [example["weights"] for example in examples]
            rows = [[w for row in rows for w in row]] if self.padding_free else rows
            longest = batch["labels"].shape[1]
            batch["weights"] = torch.tensor([row + [0.0] * (longest - len(row)) for row in rows])
        return batch


class _WeightedSft(SFTTrainer):
    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """trl's loss; with weights the sum of weight x negative log-likelihood over the number of trained tokens.

        Label smoothing is done here with and without weights: trl's own takes no weights, and no virtual tokens.
        """
        weights, smoothing = inputs.pop("weights", None), self.args.label_smoothing_factor
        if weights is None and not smoothing:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        trained = labels != -100
        if smoothing:
            given = {key: value for key, value in inputs.items() if key != "labels"}
            outputs = model(**given, use_cache=False)
            logits = outputs.logits[:, -labels.shape[1] - 1 : -1].float()
            every = logits.log_softmax(-1)
            right = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            logps = ((1 - smoothing) * right + smoothing * every.mean(-1)) * trained
        else:
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            logps = outputs.log_probs[:, -labels.shape[1] :]
        losses = -logps if weights is None else -logps * weights[:, 1:].to(logps)
        if self.model.training:
            self._total_train_tokens += int(inputs["labels"].numel())
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        loss = losses.sum() / (trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class Sft(Extras, _WeightedSft):
    """Rows of input_ids, labels and, where there are any, weights and seq_lengths."""


@contextmanager
def own_reference(model: Any, copy: bool) -> Iterator[None]:
    """While trl's DPOTrainer and KTOTrainer are made: the reference is ours, not the second adapter that trl adds.

    trl adds "ref" to every PeftModel and copies what has `.default.` inside its name, which leaves BitFit, IA3, VeRA,
    LoHa, LoKr and soft prompts with a reference that was never trained. Here `copy` makes a whole copy; otherwise
    there is none, and the base with the adapter off is the reference, without the memory.
    """
    if copy and isinstance(model, PeftModel):
        try:
            copy_adapter(model, "default", "ref")
        except UserError as error:  # what copy_adapter advises is for PPO
            problems = [replace(problem, fix="set dpo.start or kto.start: merge") for problem in error.problems]
            raise UserError(problems) from None
        for parameter in named(model, "ref").values():
            parameter.requires_grad_(False)
    find = getattr(model, "get_parameter", None)
    if not isinstance(model, PeftModel) or find is None:
        yield
        return
    model.add_adapter = lambda *args, **kwargs: None
    model.get_parameter = lambda name: find(name.replace(".ref.", ".default."))  # copied onto itself
    try:
        yield
    finally:
        del model.add_adapter, model.get_parameter


class _PairDpo(DPOTrainer):
    """trl's DPO on pairs of token ids, and the two losses without a reference."""

    data_collator: Any

    def __init__(self, *, dpo: DpoConfig, copy: bool, reference: str, cache: Path, **kwargs: Any) -> None:
        """
        Args:
            copy: the reference is a frozen copy of the adapter as it is now, not the base with the adapter off.
            reference: what identifies the reference, for the cache of its log-probabilities in the folder `cache`.
        """
        self.recipe_dpo, self.copy, self.reference, self.cache = dpo, copy, reference, cache
        with own_reference(kwargs["model"], copy):
            super().__init__(**kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Once per content: pairs, reference and precision make the name of the file they are kept in."""
        if self.recipe_dpo.loss_type in REFERENCE_FREE:
            return dataset
        digest = hashlib.sha256(f"{self.reference} {name}".encode())
        for row in dataset:
            digest.update(repr(sorted(row.items())).encode())
        file = self.cache / f"{digest.hexdigest()}.json"
        if file.is_file():
            columns = json.loads(file.read_text(encoding="utf-8"))
        else:
            as_measured(self.model, training=name == "train")
            collate: Any = self.data_collator
            what = "scoring with the reference" if name == "train" else "scoring held-out pairs with the reference"
            with task(what, len(dataset), "pairs") as advance:
                self.data_collator = lambda rows: (advance(len(rows)), collate(rows))[1]
                try:
                    done = super()._precompute_ref_logps(dataset, name, batch_size)
                finally:
                    self.data_collator = collate
            columns = {key: list(done[key]) for key in ("ref_chosen_logps", "ref_rejected_logps")}
            self.cache.mkdir(parents=True, exist_ok=True)
            write_json(file, columns)
        for key, values in columns.items():
            dataset = dataset.add_column(key, values)
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.recipe_dpo.loss_type not in REFERENCE_FREE:
            return self._with_sft(model, inputs, return_outputs)
        completion = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(completion == 0, -100)
        kept = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        outputs = model(**kept, labels=labels, use_cache=False, fused_lm_head=True)
        shifted = completion[:, 1:]
        logps = outputs.log_probs[:, -shifted.shape[1] :].sum(1)
        (chosen, rejected), (long, short) = logps.chunk(2), shifted.sum(1).chunk(2)
        beta = self.recipe_dpo.beta
        if self.recipe_dpo.loss_type == "simpo":
            losses = simpo_loss(chosen, rejected, long, short, beta, self.recipe_dpo.simpo_gamma)
        else:
            losses = orpo_loss(chosen, rejected, long, short, beta)
        if self.recipe_dpo.sft_weight:
            losses = losses - self.recipe_dpo.sft_weight * chosen / long
        rewards = (beta * (chosen / long).detach(), beta * (rejected / short).detach())
        self._record(rewards, chosen, rejected, inputs["attention_mask"])
        return losses.mean()

    def _with_sft(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """trl's objective and, weighted, each chosen answer's mean negative log-likelihood, averaged over the pairs.

        trl's own `sft` is a mean over the tokens of a pass: pairs with long answers would weigh more, and every way to
        cut a step into passes would have another loss.
        """
        if not self.recipe_dpo.sft_weight:
            return super()._compute_loss(model, inputs, return_outputs)
        seen = []

        def looked_at(**kwargs: Any) -> Any:
            seen.append(model(**kwargs))
            return seen[-1]

        loss = super()._compute_loss(looked_at, inputs, return_outputs)
        chosen = inputs["completion_mask"][:, 1:].chunk(2)[0]
        logps = seen[0].log_probs[:, -chosen.shape[1] :].chunk(2)[0].sum(1)
        sft = -(logps / chosen.sum(1)).mean() * self.recipe_dpo.sft_weight
        return (loss[0] + sft, loss[1]) if return_outputs else loss + sft

    def _record(self, rewards: tuple[Any, Any], chosen: Any, rejected: Any, attention: Any) -> None:
        """The same names that trl logs."""
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += int(attention.sum())
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        good, bad = rewards
        for name, value in {
            "rewards/chosen": good, "rewards/rejected": bad, "rewards/margins": good - bad,
            "rewards/accuracies": (good > bad).float(), "logps/chosen": chosen.detach(),
            "logps/rejected": rejected.detach(),
        }.items():  # fmt: skip
            self._metrics[mode][name].append(value.mean().item())


class Dpo(Extras, RowMeans, _PairDpo):
    """Rows of chosen_ids, chosen_mask, rejected_ids, rejected_mask."""

    length_columns = ("chosen_ids", "rejected_ids")

    def weight(self, key: str, inputs: dict[str, Any]) -> float:
        """Pairs, or the tokens that a figure is a mean over."""
        chosen, rejected = inputs["completion_mask"][:, 1:].chunk(2)
        tokens = {
            "mean_token_accuracy": chosen.sum(), "logits/chosen": chosen.sum(), "logits/rejected": rejected.sum(),
            "entropy": chosen.sum() + rejected.sum(),
        }  # fmt: skip
        return float(tokens.get(key, len(chosen)))


class _TokenKto(KTOTrainer):
    """trl's KTO, with a KL term that is the same however a step is cut into passes: measured on all its rows, before
    the first pass, on answers to other prompts of the same step."""

    def __init__(self, *, copy: bool, **kwargs: Any) -> None:
        """
        Args:
            copy: as for DPO.
        """
        args = kwargs["args"]
        rows = args.per_device_train_batch_size
        args.per_device_train_batch_size = max(2, rows)  # trl wants two rows in a pass, as it measures KL there
        model = kwargs["model"]
        if not isinstance(model, PeftModel):  # trl would load the base anew, without what the recipe says of it
            kwargs["ref_model"] = deepcopy(model).requires_grad_(False)
        with own_reference(model, copy):
            super().__init__(**kwargs)
        self.args.per_device_train_batch_size = self._train_batch_size = rows
        self.precompute_ref_logps = True  # `measure_kl` puts the reference's log-probabilities into every batch
        self.kl = torch.zeros(1)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        batches, count = super().get_batch_samples(*args, **kwargs)
        as_measured(self.model, training=True)
        self.measure_kl(batches)
        return batches, count

    def measure_kl(self, batches: list[dict[str, Any]]) -> None:
        """The KL estimate of the rows of these batches, and the reference's log-probabilities in each of them."""
        prompts, answers = [], []
        for batch in batches:
            for ids, real, completion in zip(
                *(batch[key].tolist() for key in ("input_ids", "attention_mask", "completion_mask")), strict=True
            ):
                start = completion.index(1)
                prompts.append(ids[:start])
                answers.append(ids[start : sum(real)])
        others = self._answers_to_others(prompts, answers)
        ratios, at = [], 0
        for batch in batches:
            count = len(batch["label"])
            rows = [
                {"prompt_ids": prompt, "KL_completion_ids": other, "label": True}
                for prompt, other in zip(prompts[at : at + count], others[at : at + count], strict=True)
            ]
            at += count
            mixed = {k: v.to(batch["label"].device) for k, v in self.data_collator(rows).items() if k != "label"}
            both = {**batch, **mixed}
            batch["ref_logps"], reference = self.compute_ref_log_probs(self.ref_model or self.model, both)
            batch["ref_KL_logps"] = torch.zeros_like(self.kl)
            with torch.no_grad(), self.accelerator.autocast():
                ratios.append(super()._compute_kl_logps(self.model, both) - reference)
        self.kl = torch.cat(ratios).mean()[None]

    def _answers_to_others(self, prompts: list[list[int]], answers: list[list[int]]) -> list[list[int]]:
        """For each prompt the answer to another one: of the same rows or, where they all have one prompt, of others."""
        order = mismatched(prompts)
        if order is not None:
            return [answers[i] for i in order]
        draw, rows = Random(self.args.seed * 1_000_003 + self.state.global_step), self.train_dataset
        found: list[list[int]] = []
        while len(found) < len(prompts):
            row = rows[draw.randrange(len(rows))]
            if row["prompt_ids"] != prompts[0]:  # there are some: `alignment.check_step` asks for two prompts
                found.append(row["completion_ids"])
        return found

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        return self.kl  # trl takes `ref_KL_logps` off, which are 0, and then the mean


class Kto(Extras, RowMeans, _TokenKto):
    """Rows of prompt_ids, completion_ids, label."""

    length_columns = ("prompt_ids", "completion_ids")

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """The KL term of held-out rows is measured on all of them, not on those of a batch."""
        self.measured = [self._prepare_inputs(batch) for batch in dataloader]
        as_measured(self.model, training=False)
        self.measure_kl(self.measured)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().prediction_step(model, self.measured.pop(0), *args, **kwargs)  # the same batch, measured

    def weight(self, key: str, inputs: dict[str, Any]) -> float:
        """Answers of the kind that a figure is a mean over, or their tokens."""
        good, tokens = torch.as_tensor(inputs["label"]).bool(), inputs["completion_mask"][:, 1:].sum(1)
        good = good.to(tokens.device)
        if key.startswith("logits/"):
            return float(tokens[good if key == "logits/chosen" else ~good].sum())
        if key == "entropy":
            return float(tokens.sum())
        side = good if key.endswith("/chosen") else ~good if key.endswith("/rejected") else torch.ones_like(good)
        return float(side.sum())

    def figures(self) -> dict[str, float]:
        found = super().figures()
        if "rewards/margins" in found:
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


class Reward(Extras, RowMeans, RewardTrainer):
    """Rows of chosen_ids and rejected_ids; the model has one output."""

    length_columns = ("chosen_ids", "rejected_ids")

    def weight(self, key: str, inputs: dict[str, Any]) -> float:
        """Pairs."""
        return len(inputs["input_ids"]) / 2
