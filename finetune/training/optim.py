"""The optimizers and the learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch

from finetune.errors import UserError
from finetune.recipe.sections import TrainConfig

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor",
    "sgd": "sgd",
    "lion_8bit": "lion_8bit",
    "muon": "adamw_torch",  # replaced by MuonWithAdamW
}


# peft's vectors and scales, whatever their shape: IA3's, DoRA's magnitudes, AdaLoRA's singular values, VeRA's.
SCALES = ("ia3_l", "lora_magnitude_vector", "lora_E", "vera_lambda_b", "vera_lambda_d")


def is_matrix(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is a matrix (or a stack of them), and no bias, norm, vector or scale."""
    return parameter.ndim > 1 and not name.endswith("bias") and not set(SCALES) & set(name.split("."))


def decayed(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that weight decay reaches: matrices."""
    return [name for name, parameter in model.named_parameters() if is_matrix(name, parameter)]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) on the matrices of the blocks, AdamW on embeddings, norms, biases and heads.

    torch's Muon takes matrices only. The parameter groups are shared with the two parts, so schedulers and loss
    scaling see one optimizer.
    """

    def __init__(
        self, matrices: list[torch.nn.Parameter], others: list[torch.nn.Parameter], train: TrainConfig
    ) -> None:
        adamw_lr = train.muon_adamw_learning_rate or train.learning_rate
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            rate, momentum, decay = train.learning_rate, train.muon_momentum, train.weight_decay
            self.parts.append(torch.optim.Muon(matrices, lr=rate, momentum=momentum, weight_decay=decay))
        if others:
            betas = (train.adam_beta1, train.adam_beta2)
            self.parts.append(torch.optim.AdamW(others, lr=adamw_lr, betas=betas, weight_decay=0.0))
        super().__init__(matrices + others, defaults={"lr": train.learning_rate})  # polynomial reads it
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def faster_b(optimizer: torch.optim.Optimizer, model: torch.nn.Module, ratio: float) -> None:
    """LoRA+ (Hayou et al. 2024, arXiv:2402.12354): LoRA's B learns `ratio` times faster than everything else.

    Splits the groups of an optimizer that has not stepped yet; schedules scale every group from its own start.
    """
    fast = {id(p) for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_B." in name}
    groups = list(optimizer.param_groups)
    optimizer.param_groups.clear()
    for group in groups:
        for is_fast, rate in ((False, group["lr"]), (True, group["lr"] * ratio)):
            members = [p for p in group["params"] if (id(p) in fast) == is_fast]
            if members:
                optimizer.param_groups.append({**group, "params": members, "lr": rate})


def muon_split(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """(matrices for muon, everything else) among the trainable parameters."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            inner = parameter.ndim == 2 and id(parameter) not in embeddings and "lm_head" not in name
            (matrices if inner and is_matrix(name, parameter) else others).append(parameter)
    return matrices, others


def warmup_steps(train: TrainConfig, total_steps: int) -> int:
    """Steps of the linear warm-up. transformers rounds a fraction up and begins at a rate of 0: a run of one update
    would then be all warm-up, and train nothing."""
    if train.warmup_steps >= 1:
        return int(train.warmup_steps)
    return math.floor(train.warmup_steps * total_steps + 1e-9)


def check_schedule(train: TrainConfig, total_steps: int) -> None:
    """UserError for a schedule that does not fit into a run of so many updates."""
    warmup = warmup_steps(train, total_steps)
    decay = scheduler_kwargs(train, total_steps).get("num_decay_steps", 0)
    if train.lr_scheduler_type != "constant" and warmup and warmup >= total_steps:
        raise UserError(
            f"{warmup} steps of warm-up, and the run has {total_steps}: the learning rate would never be reached",
            key="train.warmup_steps", fix="lower it (below 1 it is a share of the run), or train longer",
        )  # fmt: skip
    if decay and warmup + decay > total_steps:
        raise UserError(
            f"{decay} steps of decay and {warmup} of warm-up are more than the {total_steps} of the run",
            key="train.lr_decay_ratio", fix="lower one of them",
        )  # fmt: skip
    if train.lr_scheduler_type == "polynomial" and train.learning_rate <= 1e-7:
        raise UserError("polynomial ends at 1e-7", key="train.learning_rate", fix="raise it, or use linear")


def scheduler_kwargs(train: TrainConfig, total_steps: int) -> dict[str, Any]:
    if train.lr_scheduler_type == "cosine_with_min_lr":
        return {"min_lr_rate": train.lr_min_ratio}
    if train.lr_scheduler_type == "warmup_stable_decay":
        decay = max(1, round(total_steps * train.lr_decay_ratio))
        return {"num_decay_steps": decay, "min_lr_ratio": train.lr_min_ratio, "decay_type": "linear"}
    return {}
