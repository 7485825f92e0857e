"""trl's trainer for supervised rows of token ids, with weights of turns and packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from finetune import ranks
from finetune.training.loss_parts import scores_are_its_own
from finetune.training.trainers import Extras


@dataclass
class Collator(DataCollatorForLanguageModeling):
    """trl's, with the loss weights of turns where the data has them.

    Packed rows: with `padding_free` all of a pass are one row, for kernels that take documents of any length. Without,
    each stays a row (`return_position_ids`): attention that masks documents apart costs the square of a row's length.
    """

    boundaries: bool = True
    """Whether one row says where its documents begin, as kernels are told, and not by its positions alone."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        if "weights" in examples[0]:
            rows = [example["weights"] for example in examples]
            rows = [[w for row in rows for w in row]] if self.padding_free else rows
            longest = batch["labels"].shape[1]
            batch["weights"] = torch.tensor([row + [0.0] * (longest - len(row)) for row in rows])
        if self.return_position_ids:
            # Documents begin at position 0, and padding is documents of one token: transformers tells them apart by
            # that alone, and only where there is no other mask.
            batch["tokens"] = int(batch.pop("attention_mask").sum())
            batch["labels"][batch["position_ids"] == 0] = -100
        elif self.padding_free:
            batch["tokens"] = sum(len(example["input_ids"]) for example in examples)
            told = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
            for key in () if self.boundaries else told:
                del batch[key]
        return batch


class _WeightedSft(SFTTrainer):
    _total_train_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own_scores = ranks.of_all(lambda: scores_are_its_own(self.model))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """trl's loss; with weights the sum of weight x negative log-likelihood over the number of trained tokens.

        Label smoothing is done here with and without weights: trl's own takes no weights, and no virtual tokens. So is
        all loss of a model whose log-probabilities trl gets wrong, from its logits.
        """
        weights, smoothing = inputs.pop("weights", None), self.args.label_smoothing_factor
        tokens, seen = inputs.pop("tokens", None), self._total_train_tokens
        if tokens is None and "attention_mask" in inputs:
            tokens = int(inputs["attention_mask"].sum())
        if weights is None and not smoothing and self.own_scores:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            if tokens is not None and self.model.training:  # trl counts the positions of the first row
                self._total_train_tokens = seen + tokens
                self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            return found
        labels = inputs["labels"][:, 1:]
        trained = labels != -100
        if smoothing or not self.own_scores:
            given = {key: value for key, value in inputs.items() if key != "labels"}
            outputs = model(**given, use_cache=False)
            logits = outputs.logits[:, -labels.shape[1] - 1 : -1].float()
            every = logits.log_softmax(-1)
            right = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            logps = ((1 - smoothing) * right + smoothing * every.mean(-1)) * trained
            likeliest = (logits.argmax(-1) == labels) & trained
        else:
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            logps, likeliest = outputs.log_probs[:, -labels.shape[1] :], outputs.is_top1[:, -labels.shape[1] :]
        accuracy = likeliest.sum() / trained.sum().clamp(min=1)
        self._metrics["train" if self.model.training else "eval"]["mean_token_accuracy"].append(accuracy.item())
        losses = -logps if weights is None else -logps * weights[:, 1:].to(logps)
        if self.model.training:
            self._total_train_tokens += inputs["labels"].numel() if tokens is None else tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        loss = losses.sum() / (trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * ranks.shares()  # DDP averages over the processes
        return (loss, outputs) if return_outputs else loss


class Sft(Extras, _WeightedSft):
    """Rows of input_ids, labels and, where there are any, weights and seq_lengths."""
