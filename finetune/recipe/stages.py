"""One recipe class per stage, from the shared sections and the stage's own. No torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeVar

from pydantic import Field, model_validator

from finetune.python_files import is_function
from finetune.recipe.adapters import Adapter, FullAdapter, LoraAdapter
from finetune.recipe.sections import (
    Count,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OutputConfig,
    PretrainModelConfig,
    Section,
    SourceConfig,
    TrainConfig,
)


def metric_name(name: str) -> str:
    """What a metric is called in figures: of a function file.py:function without its folder."""
    return name.replace("\\", "/").rpartition("/")[2] if is_function(name) else name


class PpoTrainConfig(TrainConfig):
    warmup_steps: Annotated[float, Field(ge=0)] = 0.0
    """Linear warm-up: a number of rollouts, or below 1 a fraction of all. The first of them learns nothing."""


PREFERENCE_FIGURES = {"loss": False, "rewards/margins": True, "rewards/chosen": True, "rewards/rejected": False}
HELD_OUT_FIGURES: dict[str, dict[str, bool]] = {
    "pretrain": {"loss": False}, "sft": {"loss": False, "mean_token_accuracy": True},
    "reward": {"loss": False, "accuracy": True, "margin": True},
    "dpo": {**PREFERENCE_FIGURES, "rewards/accuracies": True}, "kto": PREFERENCE_FIGURES, "ppo": {},
}  # fmt: skip
"""stage -> what its trainer measures on the rows of data.eval_split, and whether higher is better."""


class BaseRecipe(Section):
    version: Literal[1]
    """Version of the recipe format."""
    train: TrainConfig = TrainConfig()
    """Optimisation."""
    output: OutputConfig
    """Where results go."""
    eval: EvalConfig = EvalConfig()
    """Held-out evaluation."""
    stage: str
    model: ModelConfig
    """The base model."""
    data: DataConfig
    adapter: Adapter = LoraAdapter()
    """What is trained."""

    @model_validator(mode="after")
    def _consistent(self) -> BaseRecipe:
        train = self.train
        sizes = {key: getattr(train, key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps")}
        given = {key: value for key, value in sizes.items() if value is not None}
        first, product = next(iter(given), None), math.prod(given.values())
        if self.data.packing:
            if len(given) == 2:
                what = "with data.packing a row holds several samples, and gradient_accumulation_steps with this size"
                raise ValueError(f"train.{first}: {what} says nothing of effective_batch_size; give one of the three")
            return self
        rows, of = self.step_rows()
        if first is not None and (rows % product or (len(given) == 2 and rows != product)):
            if self._passes_may_differ and given.keys() == {"per_device_train_batch_size"} and product <= rows:
                return self
            if len(given) == 1:
                raise ValueError(f"train.{first}: {product} does not divide {of} of {rows}")
            micro, accumulation = given.values()
            what = f"{micro} x gradient_accumulation_steps {accumulation} is {product}, and no {of} of {rows}"
            raise ValueError(f"train.{first}: {what}; set effective_batch_size: {product}, or leave one of them out")
        return self

    @model_validator(mode="after")
    def _best_on_disk(self) -> BaseRecipe:
        train, during = self.train, self.eval.during
        if during is not None and during.steps and train.eval_steps and during.steps % train.eval_steps:
            what = f"{during.steps} is no multiple of train.eval_steps {train.eval_steps}"
            raise ValueError(f"eval.during.steps: {what}; leave one of them out")
        every = self.best_every
        if self.keeps_best and train.save_steps and every and train.save_steps % every:
            key = "eval_steps" if every == train.eval_steps else "eval.during.steps"
            what = f"{train.save_steps} is no multiple of {key} {every}"
            raise ValueError(f"train.save_steps: {what}: the best model would not be on disk; leave one of them out")
        return self

    @model_validator(mode="after")
    def _best_known(self) -> BaseRecipe:
        figures, during = HELD_OUT_FIGURES[self.stage], self.eval.during
        if self.train.metric_for_best_model is None or not self.keeps_best or not figures:
            return self
        if self.best_in in figures:
            if self.data.eval_split is None and during is not None:
                what = f"{self.best_in} is measured on the rows of data.eval_split, and none are held out"
                raise ValueError(f"train.metric_for_best_model: {what}; set it, or name a metric of eval.during")
        elif during is None:
            what = f"{self.best_in} is no held-out figure of ft {self.stage}"
            answers = "" if self.stage in ("pretrain", "reward") else ", or set eval.during"
            raise ValueError(f"train.metric_for_best_model: {what}; one of {', '.join(figures)}{answers}")
        elif during.metrics is not None and self.best_in not in [*map(metric_name, during.metrics)]:
            what = f"{self.best_in} is not in eval.during.metrics ({', '.join(during.metrics)})"
            raise ValueError(f"train.metric_for_best_model: {what}; add it there, or name one of them")
        return self

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint is kept rather than the last."""
        return self.train.load_best_model_at_end or self.train.early_stopping_patience is not None

    @property
    def best_in(self) -> str | None:
        """train.metric_for_best_model without transformers' `eval_`; None for the first metric of eval.during."""
        named = self.train.metric_for_best_model
        if named is None:
            return None if self.data.eval_split is None and self.eval.during is not None else "loss"
        return metric_name(named.removeprefix("eval_"))

    @property
    def best_in_answers(self) -> bool:
        """Whether that is a metric of eval.during."""
        return self.eval.during is not None and self.best_in not in HELD_OUT_FIGURES[self.stage]

    @property
    def eval_every(self) -> int | None:
        """Steps between evaluations of any kind; None at the end of every epoch."""
        during = self.eval.during
        loss = self.train.eval_steps if self.data.eval_split is not None else None
        return loss or (None if during is None else during.steps)

    @property
    def best_every(self) -> int | None:
        """Steps between evaluations of metric_for_best_model."""
        during = self.eval.during
        return (during.steps if self.best_in_answers and during is not None else None) or self.eval_every

    @property
    def _passes_may_differ(self) -> bool:
        """Whether the last pass of a step may have fewer rows than the others."""
        return False

    def step_rows(self) -> tuple[int, str]:
        """(rows of an optimizer step, what makes them so many)."""
        return self.train.effective_batch_size, "effective_batch_size"


class PretrainRecipe(BaseRecipe):
    stage: Literal["pretrain"]
    """The command that runs this recipe."""
    model: PretrainModelConfig
    """The model, or the config to start one from."""
    data: DataConfig
    """Raw text."""
    adapter: Adapter = FullAdapter()
    """What is trained; all weights by default."""


class SftRecipe(BaseRecipe):
    stage: Literal["sft"]
    """The command that runs this recipe."""
    data: DataConfig
    """Conversations."""


DpoLoss = Literal[
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "discopop", "apo_zero", "apo_down", "sigmoid_norm", "simpo", "orpo",
]  # fmt: skip
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
"""The losses that dpo.label_smoothing changes."""
REFERENCE_FREE = ("simpo", "orpo")
"""The losses without a reference model."""


class DpoConfig(Section):
    loss_type: DpoLoss = "sigmoid"
    """The objective; simpo (arXiv:2405.14734) and orpo (arXiv:2403.07691) need no reference model."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to the reference (sigmoid and kin); the scale of the log-odds (orpo) or of the
    mean log-probabilities (simpo, usually 2 to 2.5)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of wrongly labelled pairs, of robust, exo_pair, aot and aot_unpaired; refused with the others."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen answers' negative log-likelihood added to the loss (RPO, arXiv:2404.19733): the mean over an
    answer's tokens, averaged over the pairs."""
    simpo_gamma: Annotated[float, Field(ge=0)] = 0.5
    """Target margin of simpo, as a share of beta."""
    start: Literal["continue", "merge"] = "continue"
    """With model.adapter: train that adapter on and keep a frozen copy as the reference; or merge it into the base
    first, which is then base and reference of a fresh adapter."""

    @model_validator(mode="after")
    def _smoothed(self) -> DpoConfig:
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            fix = f"leave it out, or set dpo.loss_type: robust (with effect in {', '.join(SMOOTHED)})"
            raise ValueError(f"dpo.label_smoothing: has no effect on {self.loss_type}; {fix}")
        if self.simpo_gamma != DpoConfig.model_fields["simpo_gamma"].default and self.loss_type != "simpo":
            raise ValueError(f"dpo.simpo_gamma: has no effect on {self.loss_type}; leave it out")
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("dpo.label_smoothing: exo_pair takes its logarithm; set it above 0, for example 0.001")
        return self


class KtoConfig(Section):
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to the reference."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the good answers' loss."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the bad answers' loss."""
    start: Literal["continue", "merge"] = "continue"
    """As dpo.start."""


class DpoRecipe(BaseRecipe):
    stage: Literal["dpo"]
    """The command that runs this recipe."""
    data: DataConfig
    """Preference pairs."""
    dpo: DpoConfig = DpoConfig()
    """The objective."""


class KtoRecipe(BaseRecipe):
    stage: Literal["kto"]
    """The command that runs this recipe."""
    data: DataConfig
    """Answers with a label, good or bad."""
    kto: KtoConfig = KtoConfig()
    """The objective."""


class RewardModelConfig(Section):
    margin: float = 0.0
    """The chosen answer's score should be higher by at least this much."""
    center_rewards_coefficient: Annotated[float, Field(ge=0)] | None = 0.01
    """Weight of the mean squared sum of a pair's scores, which keeps them around zero (Eisenstein et al. 2023,
    arXiv:2312.09244, eq. 2)."""


class RewardRecipe(BaseRecipe):
    stage: Literal["reward"]
    """The command that runs this recipe."""
    model: ModelConfig
    """The base model; with model.adapter that adapter is where the reward model starts."""
    data: DataConfig
    """Preference pairs."""
    adapter: Adapter = LoraAdapter()
    """What is trained, besides the score head."""
    reward: RewardModelConfig = RewardModelConfig()
    """The objective."""


class RewardSources(Section):
    """What scores the replies; several are added up."""

    train: str | SourceConfig | list[str | SourceConfig] | None = None
    """Preference pairs to train a reward model on first, on the same base, into output.dir/reward, as `ft reward` does
    by default (16 pairs a step) and otherwise as `train` says. 5% are held out to say how accurate it is."""
    model: str | None = None
    """Run of `ft reward`, or a folder or hub id of a sequence-classification model with one output."""
    functions: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Python rules, file.py:function(prompts, completions, **columns) -> list of numbers."""
    weights: list[float] | None = None
    """One weight per source, the model first; all 1 when unset."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """With train: peak learning rate of the reward model; train.learning_rate when unset."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 2.0
    """With train: passes over the pairs."""
    center_rewards_coefficient: Annotated[float, Field(ge=0)] | None = 0.01
    """With train: as in `ft reward`."""

    @model_validator(mode="after")
    def _complete(self) -> RewardSources:
        if self.train is not None and self.model is not None:
            raise ValueError("reward.train: excludes reward.model; give one of them")
        count = len(self.functions) + (self.train is not None or self.model is not None)
        if not count:
            raise ValueError("reward: nothing scores the replies; give train, model or functions")
        if self.weights is not None and len(self.weights) != count:
            raise ValueError(f"reward.weights: {len(self.weights)} for {count} sources")
        return self


class PpoConfig(Section):
    num_ppo_epochs: Count = 2
    """Passes over the replies of one rollout."""
    num_mini_batches: Count = 4
    """Optimizer steps per pass."""
    cliprange: Annotated[float, Field(gt=0)] = 0.2
    """The importance ratio's gain ends at 1 ± this."""
    cliprange_value: Annotated[float, Field(gt=0)] = 0.2
    """Values move at most this far per rollout."""
    vf_coef: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the value loss."""
    value_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the value model; train.learning_rate when unset."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount per token."""
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Lambda of generalised advantage estimation."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the KL divergence from the reference, per token, in the reward."""
    kl_target: Annotated[float, Field(gt=0)] | None = None
    """Adapt kl_coef so that the KL per reply stays near this; unset: kl_coef is fixed."""
    kl_horizon: Count = 1000
    """Replies over which kl_coef adapts."""
    max_kl: Annotated[float, Field(gt=0)] = 20.0
    """Two rollouts in a row whose KL per reply is larger stop the run: the policy has left the reference for good."""
    max_update_kl: Annotated[float, Field(gt=0)] = 0.1
    """When the updates of one rollout have moved the policy this far (mean squared log ratio / 2), the rest of them is
    left out."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Advantages of a rollout have mean 0 and variance 1."""
    normalize_rewards: bool = True
    """Divide scores by their running standard deviation, after taking off their running mean."""
    clip_rewards: Annotated[float, Field(gt=0)] | None = 5.0
    """Normalised scores are cut at ± this."""
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0
    """Taken off the score of a reply that does not end by itself."""
    max_new_tokens: Count = 64
    """Longest reply."""
    thinking: Literal["on", "off"] | None = None
    """Ask for thinking or for none; unset: off where data.thinking is empty or drop, otherwise as model.adapter was
    trained, or as the template does by itself."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of sampling, and of every log-probability."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from the k likeliest tokens only; 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that hold this much probability."""
    models: Literal["shared", "separate"] = "shared"
    """shared: policy, reference, reward and value are adapters on one base in memory. separate: a model of its own for
    each, for full fine-tuning or a reward model on another base."""
    log_samples_steps: Count = 10
    """Rollouts between tables of sample replies."""


class PpoRecipe(BaseRecipe):
    stage: Literal["ppo"]
    """The command that runs this recipe."""
    model: ModelConfig
    """The base model; model.adapter is where the policy starts, and its reference."""
    data: DataConfig
    """Prompts: rows of any format, whose answers are not used. In `train`, effective_batch_size is the number of
    prompts per rollout and max_steps the number of rollouts."""
    train: PpoTrainConfig = PpoTrainConfig()
    """Optimisation."""
    reward: RewardSources
    """What scores the replies."""
    ppo: PpoConfig = PpoConfig()
    """The algorithm (Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019, arXiv:1909.08593)."""

    @property
    def _passes_may_differ(self) -> bool:
        return True  # a minibatch is cut into passes by PPO's own loop

    def step_rows(self) -> tuple[int, str]:
        if self.train.effective_batch_size % self.ppo.num_mini_batches:
            raise ValueError("ppo.num_mini_batches: does not divide train.effective_batch_size")
        rows = self.train.effective_batch_size // self.ppo.num_mini_batches
        return rows, "effective_batch_size / ppo.num_mini_batches"

    @model_validator(mode="after")
    def _batches(self) -> PpoRecipe:
        if self.ppo.kl_target is not None and self.ppo.kl_coef == 0:
            raise ValueError("ppo.kl_coef: nothing to adapt to kl_target; give it a value above 0")
        if self.ppo.kl_target is not None and self.train.effective_batch_size >= 5 * self.ppo.kl_horizon:
            raise ValueError("ppo.kl_horizon: a fifth of train.effective_batch_size or less makes kl_coef negative")
        return self


Recipe = PretrainRecipe | SftRecipe | RewardRecipe | DpoRecipe | KtoRecipe | PpoRecipe
R = TypeVar("R", bound=Recipe)
RECIPES: dict[str, type[Recipe]] = {
    "pretrain": PretrainRecipe, "sft": SftRecipe, "reward": RewardRecipe, "dpo": DpoRecipe,
    "kto": KtoRecipe, "ppo": PpoRecipe,
}  # fmt: skip
ROWS = {
    "pretrain": "text", "sft": "sft", "reward": "preference", "dpo": "preference", "kto": "unpaired", "ppo": "prompts",
}  # fmt: skip
"""stage -> the kind of rows it reads."""
