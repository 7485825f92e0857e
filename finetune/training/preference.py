"""Learning from preferences: what DPO, KTO and reward models share, and the two losses without a reference.

Everything else is trl's: DPOTrainer, KTOTrainer and RewardTrainer underneath.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F


def simpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, chosen_length: torch.Tensor, rejected_length: torch.Tensor,
    beta: float, gamma: float,
) -> torch.Tensor:  # fmt: skip
    """-log sigmoid(beta (chosen / |chosen| - rejected / |rejected| - gamma)), per pair.

    Meng et al. 2024 (arXiv:2405.14734), eq. 6, with their margin written as a share of beta.

    Args:
        chosen, rejected: [pairs] summed log-probabilities of the answers; lengths: [pairs] their tokens.
    """
    return -F.logsigmoid(beta * (chosen / chosen_length - rejected / rejected_length - gamma))


def orpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, chosen_length: torch.Tensor, rejected_length: torch.Tensor,
    beta: float,
) -> torch.Tensor:  # fmt: skip
    """Mean negative log-likelihood of the chosen answer, minus beta log sigmoid(log odds ratio), per pair.

    Hong et al. 2024 (arXiv:2403.07691), eq. 6 and 7: odds(y) = p / (1 - p) of the length-normalised likelihood p.

    Args: as simpo_loss.
    """
    a, b = chosen / chosen_length, rejected / rejected_length
    log_odds = _log_odds(a) - _log_odds(b)
    return -a - beta * F.logsigmoid(log_odds)


def _log_odds(mean_logp: torch.Tensor) -> torch.Tensor:
    """log p - log(1 - p). A certain answer (log p = 0 in float32) counts as one in a million short of it, whose odds
    are finite."""
    logp = mean_logp.clamp(max=-1e-6)
    return logp - torch.log(-torch.expm1(logp))


@dataclass
class PairCollator:
    """Rows of `data.pairs.load_pairs` -> input_ids, attention_mask, completion_mask of [2 x pairs, longest]."""

    pad_token_id: int
    pad_to_multiple_of: int = 1
    """Few different shapes: on CPUs oneDNN compiles a kernel per shape, on GPUs 8 fits the tensor cores."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row[f"{name}_ids"] for name in ("chosen", "rejected") for row in rows]
        masks = [row[f"{name}_mask"] for name in ("chosen", "rejected") for row in rows]
        longest = -(-max(map(len, ids)) // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def padded(lists: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in lists])

        batch = {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "completion_mask": padded(masks, 0),
        }
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            if key in rows[0]:
                batch[key] = torch.tensor([row[key] for row in rows])
        return batch


@dataclass
class ScoreCollator(PairCollator):
    """Rows of `data.pairs.load_pairs` -> input_ids, attention_mask of [2 x pairs, longest] and the margin wanted."""

    margin: float = 0.0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(rows)
        del batch["completion_mask"]
        return {**batch, "margin": torch.full((len(rows),), self.margin)}


def with_other_answers(rows: Any, train: Any, seed: int) -> Any:
    """The rows with KL_completion_ids: for each the answer of another one to another prompt, drawn once.

    Held-out rows that all have one prompt get those of the training rows `train`.
    """
    prompts, answers, draw = list(rows["prompt_ids"]), list(rows["completion_ids"]), Random(seed)
    order = draw.sample(range(len(prompts)), len(prompts))  # rows that stand together are often alike
    found = mismatched([prompts[i] for i in order])
    if found is not None:
        others = {i: answers[order[other]] for i, other in zip(order, found, strict=True)}
    else:
        pool = [row["completion_ids"] for row in train if row["prompt_ids"] != prompts[0]]
        others = {i: draw.choice(pool) for i in order}
    return rows.add_column("KL_completion_ids", [others[i] for i in range(len(prompts))])


def mismatched(prompts: Sequence[Any]) -> list[int] | None:
    """For each row the number of another one whose prompt is another; None where all prompts are one.

    Every row is taken once, as KTO's estimate wants (Ethayarajh et al. 2024: answers to other prompts), unless
    more than half of the rows share one prompt.
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(repr(prompt), []).append(i)
    if len(groups) < 2:
        return None
    order = [i for group in sorted(groups.values(), key=len, reverse=True) for i in group]
    most = max(map(len, groups.values()))
    found = [0] * len(order)
    for place, i in enumerate(order):
        found[i] = order[place - most]
    for place, i in enumerate(order[:most]):  # of a group of more than half, some would meet their own prompt
        if prompts[found[i]] == prompts[i]:
            found[i] = order[most + place % (len(order) - most)]
    return found


def stuck(rows: list[dict[str, Any]]) -> str | None:
    """A warning when the margin of the rewards has stood at 0, where it begins, while the learning rate was not zero.

    The sigmoid loss then stands at ln 2; that of other objectives, or with an SFT term, elsewhere.
    """
    margins = [row["rewards/margins"] for row in rows if "rewards/margins" in row and row.get("learning_rate", 0) > 0]
    if len(margins) < 5 or any(abs(margin) > 2e-3 for margin in margins[1:]):
        return None
    return (
        "the margin stands at 0 (a sigmoid loss at 0.693): policy and reference stay equal; raise train.learning_rate "
        "or beta, and look whether chosen and rejected answers differ (ft data check)"
    )
