"""trl's trainers for preferences, on rows of token ids; a step has one gradient however it is cut into passes.

The reference's log-probabilities are columns of the rows (`reference.add`); no model stands for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from trl import DPOTrainer, KTOTrainer, RewardTrainer

from finetune import ranks
from finetune.errors import UserError
from finetune.models import documents
from finetune.recipe.stages import REFERENCE_FREE, DpoConfig
from finetune.training.loss_parts import scores_are_its_own
from finetune.training.preference import orpo_loss, simpo_loss
from finetune.training.reference import NoReference, as_measured
from finetune.training.side_by_side import draws, scored, unpadded
from finetune.training.trainers import Extras, RowMeans

SORTED = ("aot", "aot_unpaired")
"""Losses between the sorted margins of all pairs that are in a pass."""


def check_scores(model: Any) -> None:
    """UserError for a model whose log-probabilities trl gets wrong."""
    if not ranks.of_all(lambda: scores_are_its_own(model)):
        kind = model.config.model_type
        what = f"trl computes other log-probabilities for {kind} than the model does itself"
        raise UserError(what, key="stage", fix="use ft sft, which takes them from the logits, or another base")


class _PairLoss(DPOTrainer):
    """The loss of a pass, below `RowMeans`."""

    recipe_dpo: DpoConfig
    draws: bool

    def shares(self) -> bool:
        """Whether both answers may have one prompt: counted twice where experts are balanced, and where activations are
        dropped, other ones."""
        return not self.aux_loss_enabled and not (self.draws and self.model.training)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The objective and, weighted, each chosen answer's mean negative log-likelihood, averaged over the pairs.

        trl's own `sft` is a mean over the tokens of a pass: pairs with long answers would weigh more, and every way to
        cut a step into passes would have another loss.
        """
        dpo, mask, seen = self.recipe_dpo, inputs["completion_mask"][:, 1:], []

        passed = unpadded(model, self.model, self.shares())

        def forward(**kwargs: Any) -> Any:
            seen.append(passed(**kwargs))
            return seen[-1]

        if free := dpo.loss_type in REFERENCE_FREE:
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
            given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            forward(**given, labels=labels, use_cache=False, fused_lm_head=True)
        else:
            loss = super().compute_loss(forward, inputs)
        chosen, rejected = seen[0].log_probs[:, -mask.shape[1] :].sum(1).chunk(2)
        long, short = mask.sum(1).chunk(2)
        if dpo.loss_type == "simpo":
            loss = simpo_loss(chosen, rejected, long, short, dpo.beta, dpo.simpo_gamma).mean()
        elif dpo.loss_type == "orpo":
            loss = orpo_loss(chosen, rejected, long, short, dpo.beta).mean()
        if free:
            self._record(chosen.detach(), rejected.detach(), long, short, inputs["attention_mask"])
        return loss - dpo.sft_weight * (chosen / long).mean() if dpo.sft_weight else loss

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        return super().compute_ref_log_probs(unpadded(model, self.model, self.shares()), inputs)

    def _record(self, chosen: Any, rejected: Any, long: Any, short: Any, attention: Any) -> None:
        """The same names that trl logs; a reward is beta times the mean log-probability."""
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            self._total_train_tokens += int(attention.sum())
            self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        better, worse = self.recipe_dpo.beta * chosen / long, self.recipe_dpo.beta * rejected / short
        for name, value in {
            "rewards/chosen": better, "rewards/rejected": worse, "rewards/margins": better - worse,
            "rewards/accuracies": (better > worse).float(), "logps/chosen": chosen, "logps/rejected": rejected,
        }.items():  # fmt: skip
            self._metrics[mode][name].append(value.mean().item())


class Dpo(Extras, RowMeans, _PairLoss):
    """Rows of chosen_ids, chosen_mask, rejected_ids, rejected_mask."""

    length_columns = ("chosen_ids", "rejected_ids")
    reference_columns = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(self, *, dpo: DpoConfig, **kwargs: Any) -> None:
        super().__init__(ref_model=NoReference(kwargs["model"].config), **kwargs)
        check_scores(self.model)
        self.recipe_dpo, self.precompute_ref_logps = dpo, True
        self.draws = documents.used(self.model) and ranks.of_all(lambda: draws(self.model))

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def weight(self, key: str, inputs: dict[str, Any]) -> float:
        """Pairs, or the tokens that a figure is a mean over."""
        chosen, rejected = inputs["completion_mask"][:, 1:].chunk(2)
        tokens = {
            "mean_token_accuracy": chosen.sum(), "logits/chosen": chosen.sum(), "logits/rejected": rejected.sum(),
            "entropy": chosen.sum() + rejected.sum(),
        }  # fmt: skip
        return float(tokens.get(key, len(chosen)))


class Kto(Extras, RowMeans, KTOTrainer):
    """Rows of prompt_ids, completion_ids, label and KL_completion_ids, the answer to another prompt.

    trl measures the KL term on the rows of a pass. Here it is the mean over the rows of a step, before its first pass,
    and over all held-out rows in an evaluation.
    """

    length_columns = ("prompt_ids", "completion_ids")
    reference_columns = ("ref_logps", "ref_KL_logps")
    kl: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        args = kwargs["args"]
        args.loss_type = "apo_zero_unpaired"  # with the loss that has a KL term trl asks for two rows in a pass
        super().__init__(ref_model=NoReference(kwargs["model"].config), **kwargs)
        check_scores(self.model)
        args.loss_type = self.loss_type = "kto"
        self.calculate_KL = self.precompute_ref_logps = True

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], int]:
        batches, count = super().get_batch_samples(*args, **kwargs)
        self.measure_kl(batches, training=True)
        return batches, count

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        self.measure_kl(dataloader, training=False)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        return super().compute_ref_log_probs(unpadded(model, self.model), inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        return super()._compute_loss(unpadded(model, self.model), inputs, return_outputs)

    def measure_kl(self, batches: Iterable[dict[str, Any]], training: bool) -> None:
        """The mean over all rows of these batches of log (policy / reference) of the answers to other prompts."""
        as_measured(self.model, training)
        found, rows = torch.zeros((), device=self.args.device), 0
        with torch.no_grad(), self.accelerator.autocast():
            for batch in batches:
                ratios = super()._compute_kl_logps(unpadded(self.model, self.model), batch) - batch["ref_KL_logps"]
                if "spare" not in batch:
                    found, rows = found + ratios.sum(), rows + len(ratios)
        total, count = ranks.totals([float(found), rows])
        self.kl = found / rows if ranks.shares() == 1 else torch.tensor(total / count, device=self.args.device)

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        return batch["ref_KL_logps"] + self.kl  # trl takes the former off, and then the mean

    def weight(self, key: str, inputs: dict[str, Any]) -> float:
        """Answers of the kind that a figure is a mean over, or their tokens."""
        tokens = inputs["completion_mask"][:, 1:].sum(1)
        chosen = torch.as_tensor(inputs["label"], device=tokens.device).bool()
        if key.startswith("logits/"):
            return float(tokens[chosen if key == "logits/chosen" else ~chosen].sum())
        if key == "entropy":
            return float(tokens.sum())
        side = chosen if key.endswith("/chosen") else ~chosen if key.endswith("/rejected") else torch.ones_like(chosen)
        return float(side.sum())

    def figures(self) -> dict[str, float]:
        found = super().figures()
        if {"rewards/chosen", "rewards/rejected"} <= found.keys():  # in whichever batches they were
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found


class _ScoreLoss(RewardTrainer):
    """The loss of a pass, below `RowMeans`."""

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(scored(model, self.model), *args, **kwargs)


class Reward(Extras, RowMeans, _ScoreLoss):
    """Rows of chosen_ids and rejected_ids; the model has one output."""

    length_columns = ("chosen_ids", "rejected_ids")

    def weight(self, key: str, inputs: dict[str, Any]) -> float:
        """Pairs."""
        return len(inputs["input_ids"]) / 2
