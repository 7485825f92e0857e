"""Every key of every stage's recipe, flipped: what is built changes, or what comes out, or the key is refused by name.

`Plan` runs the stage itself up to the first step of training and takes down what it was about to do: what the weights
are loaded with, the trainer's arguments, rows, order, adapter and optimizer, and the loss of the first batch. A key
whose effect lies elsewhere has a probe of its own below. A new key without a second value, or without an effect, fails.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args, get_origin

import datasets
import pytest
import torch
import yaml
from conftest import write_rows
from pydantic import BaseModel, TypeAdapter, ValidationError

from finetune import hub
from finetune.adapters import methods
from finetune.base import Base
from finetune.commands import dpo, evaluate, kto, ppo, sft
from finetune.data import conversations, pairs, prompts, text
from finetune.errors import RunError, UserError
from finetune.evaluation import measuring, targets
from finetune.models import loading, quantization, sanity, tokenizers
from finetune.models.config import read_config
from finetune.recipe import effects, file
from finetune.recipe.adapters import ADAPTERS, OtherAdapter
from finetune.recipe.resolve import Hardware, a_step, batch_layout, resolve
from finetune.recipe.sections import DRAWING, DataConfig, EvalSet, GenerationConfig, ModelConfig, SourceConfig
from finetune.recipe.stages import RECIPES
from finetune.rl.ppo import Ppo
from finetune.run.directory import Run
from finetune.training import new_base, plan, session
from finetune.training.callbacks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PREFERENCES = ("reward", "dpo", "kto")


class Stop(BaseException):
    """Everything has been taken down."""


# --- the keys ---


def classes(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in classes(part)]


def keys(stage: str) -> Iterator[tuple[str, Any]]:
    """(name, field) of every key: adapter.METHOD.KEY for those of a method, source.KEY for the mappings of data.train.
    (Those of reward.train are the same class, read as the data.train of `ft reward`.)"""

    def walk(kind: type[BaseModel], at: str) -> Iterator[tuple[str, Any]]:
        for name, field in kind.model_fields.items():
            below = classes(field.annotation)
            if f"{at}{name}" == "adapter":
                for one in below:  # `other` is what foreign adapters are called; a recipe that sets it is refused
                    if one is OtherAdapter:
                        continue
                    yield from walk(one, f"adapter.{one.model_fields['method'].default}.")
            elif below == [SourceConfig] * len(below) and below:
                yield f"{at}{name}", field
                if f"{at}{name}" == "data.train":
                    yield from walk(SourceConfig, "source.")
            elif below and set(below) == {EvalSet}:
                yield f"{at}{name}", field
                yield from walk(EvalSet, f"{at}{name}.")
            elif below:
                if not field.is_required() and field.default is None:
                    yield f"{at}{name}", field
                yield from walk(below[0], f"{at}{name}.")
            else:
                yield f"{at}{name}", field

    yield from walk(RECIPES[stage], "")


ALL = [(stage, key) for stage in RECIPES for key, _ in keys(stage)]
FIELDS = {stage: dict(keys(stage)) for stage in RECIPES}


def second_value(field: Any) -> Any:
    """Another valid value than the default, by the field's own type."""
    kind = TypeAdapter(tuple[field.rebuild_annotation()] if hasattr(field, "rebuild_annotation") else field.annotation)
    literals = [v for part in (field.annotation, *get_args(field.annotation)) if get_origin(part) is Literal
                for v in get_args(part)]  # fmt: skip
    numbers = [field.default * 2, field.default / 2] if type(field.default) in (int, float) else []
    for value in (*literals, not field.default, *map(type(field.default), numbers), 2, 0.25, 1.5):
        if value == field.default or (isinstance(value, bool) != isinstance(field.default, bool) and not literals):
            continue
        try:
            kind.validate_python((value,), strict=True)
        except ValidationError:
            continue
        return value
    raise AssertionError(f"no second value: add one to VALUES ({field.annotation})")


# Second values that the type does not give; {name} is a file of the fixture `files`.
VALUES: dict[str, Any] = {
    "version": 2, "stage": "other", "output.dir": "{tmp}/elsewhere", "train.save_steps": 3, "train.eval_steps": 2,
    "model.name": "{other}", "model.adapter": "{adapter}", "model.source": "hub", "model.revision": "v2",
    "model.gguf_file": "x.gguf",
    "model.rope_scaling": {"rope_type": "linear", "factor": 2.0}, "model.rope_scaling.rope_type": "dynamic",
    "model.sanity_check": False, "model.device_map": "auto", "model.max_memory": {"cpu": "8GB"},
    "model.offload_folder": "{tmp}/offload", "model.dtype": "bfloat16", "model.attn_implementation": "eager",
    "model.quantization": "int4", "model.chat_template": "{markers}", "model.config": "{config}",
    "model.tokenizer": "{other}", "data.train": "{fewer}", "data.eval_split": 2, "data.format": "nonsense",
    "data.columns": "{columns}", "data.max_length": 36, "data.on_overlong": "error", "data.train_on": "all",
    "data.thinking": "empty",
    "data.on_error": "drop", "data.max_dropped": 0.9, "data.max_samples": 9, "source.path": "{fewer}",
    "source.source": "hub", "source.name": "x", "source.split": "test", "source.revision": "v2",
    "source.format": "nonsense", "source.columns": "{columns}", "source.filter": {"even": True}, "source.weight": 2.0,
    "source.max_samples": 9, "train.gradient_checkpointing": True, "train.label_smoothing_factor": 0.1,
    "train.lr_scheduler_type": "cosine", "train.optim": "sgd", "train.per_device_train_batch_size": 1,
    "train.save_total_limit": 1,
    "train.logging_steps": 4, "train.metric_for_best_model": "mean_token_accuracy", "eval.during": {"steps": 2},
    "eval.during.steps": 2, "eval.during.metrics": ["token_f1"], "eval.during.limit": 1,
    "train.gradient_accumulation_steps": 4, "train.warmup_steps": 2.0, "eval.data": "{fewer}", "eval.limit": 1,
    "eval.shots_from": "{fewer}",
    "reward.train": "{pairs}", "reward.model": "{tmp}/nothing", "reward.functions": ["{rule}:other"],
    "reward.weights": [2.0], "ppo.models": "separate", "dpo.loss_type": "ipo", "dpo.start": "merge",
    "kto.start": "merge", "ppo.max_kl": 1e-9, "ppo.max_update_kl": 1e-9, "ppo.log_samples_steps": 2,
}  # fmt: skip
ADAPTER_VALUES: dict[str, Any] = {
    "method": "nonsense", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "targets": ["q_proj"],
    "init_lora_weights": "gaussian", "feedforward_modules": ["up_proj"], "oft_block_size": 16, "num_layers": 1,
    "prompt_tuning_init": "random", "prefix_init": "random", "bias": "existing", "variant": "pfeiffer",
    "prompt_tuning_init_text": "say", "prefix_init_text": "say", "target_r": 4, "decompose_factor": 4, "r": 5,
    "loraplus_lr_ratio": 4.0,
}  # fmt: skip
YARN = {"model.rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
MUON = {"train.optim": "muon", "adapter.method": "bottleneck"}
NEW = {"model.config": "{larger}", "model.tokenizer": "{base}"}
# What must stand beside a key for it to mean anything.
BESIDE: dict[str, dict[str, Any]] = {
    "model.quantization_type": {"model.quantization": "int4"}, "model.max_memory": {"model.device_map": "auto"},
    "model.offload_folder": {"model.device_map": "auto"}, "model.tokenizer": NEW, "model.config": NEW,
    **{f"model.rope_scaling.{key}": YARN for key in (
        "rope_type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")},
    "data.max_dropped": {"data.on_error": "drop", "data.train": "{broken}"},
    "data.text_unit": {"data.train": "{plain}", "data.max_length": 16},
    "data.on_error": {"data.train": "{broken}"}, "data.on_overlong": {"data.max_length": 36},
    "data.shuffle": {"data.max_samples": 9}, "data.on_forged_marker": {
        "data.train": "{forged}", "model.chat_template": "{markers}"},
    "train.lr_decay_ratio": {"train.lr_scheduler_type": "warmup_stable_decay", "train.num_train_epochs": 9.0},
    "train.muon_momentum": MUON, "train.muon_adamw_learning_rate": MUON,
    **{f"eval.generation.{key}": {"eval.generation.temperature": 0.7} for key in DRAWING},
    "train.metric_for_best_model": {"train.load_best_model_at_end": True},
    **{f"eval.during.{key}": {"eval.during": {"steps": 1}} for key in ("steps", "metrics", "limit")},
    "eval.shots_from": {"eval.shots": 2},
    "dpo.simpo_gamma": {"dpo.loss_type": "simpo"}, "ppo.kl_horizon": {"ppo.kl_target": 0.001},
    "ppo.clip_rewards": {"ppo.clip_rewards": 0.01},
    **{f"reward.{key}": {"reward.train": "{pairs}"} for key in (
        "learning_rate", "num_train_epochs", "center_rewards_coefficient")},
    "adapter.p_tuning.encoder_dropout": {"adapter.encoder_reparameterization_type": "LSTM"},
    "adapter.prefix_tuning.encoder_hidden_size": {"adapter.prefix_projection": True},
    "adapter.ia3.feedforward_modules": {"adapter.target_modules": ["down_proj", "up_proj"]},
    "adapter.prompt_tuning.prompt_tuning_init_text": {
        "adapter.prompt_tuning_init": "text", "adapter.prompt_tuning_init_text": "go"},
    "adapter.prefix_tuning.prefix_init_text": {"adapter.prefix_init": "text", "adapter.prefix_init_text": "go"},
    "adapter.lokr.decompose_factor": {"adapter.r": 2},
}  # fmt: skip


# --- a small recipe of every stage ---


@pytest.fixture(scope="module")
def files(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What recipes may name, by the placeholder that stands for it; data by stage."""
    import shutil

    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("files")
    shutil.copytree(base, folder / "other")
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(base)
    section = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    get_peft_model(copy.deepcopy(network), section).save_pretrained(folder / "adapter")
    (folder / "markers.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endif %}{% endfor %}"
    )
    (folder / "rule.py").write_text(
        "def score(prompts, completions, **_):\n    return [float(len(c)) for c in completions]\n"
        "def other(prompts, completions, **_):\n    return [float(c.count('a')) for c in completions]\n"
    )
    found: dict[str, Any] = {
        "base": str(base), "other": str(folder / "other"), "adapter": str(folder / "adapter"), "network": network,
        "markers": str(folder / "markers.jinja"), "rule": str(folder / "rule.py"),
        "config": {**network.config.to_diff_dict(), "num_hidden_layers": 1}, "larger": network.config.to_diff_dict(),
    }  # fmt: skip

    def answers(i: int) -> dict[str, dict[str, Any]]:
        long = f"{i} " + "yes please " * (1 + i % 3)
        pair = {"chosen": long, "rejected": f"no {i}"}
        return {"sft": {"completion": long}, "pairs": pair, "text": {"text": f"say {i}: {long}" * 3}}

    for kind in ("sft", "pairs", "text"):
        column = "text" if kind == "text" else "prompt"
        more = [{"ask": f"what is {i}" * 9, "even": i % 2 == 0, **answers(i)[kind]} for i in range(18)]
        rows = more if kind == "text" else [{"prompt": f"say {i}", **row} for i, row in enumerate(more)]
        forged = [{**row, "prompt": f"[INST] say {i}"} for i, row in enumerate(rows)]
        for name, some in {
            "rows": rows,
            "fewer": rows[:12],
            "broken": [*rows, *[{"nothing": 1}] * 3],
            "forged": forged,
        }.items():
            found[f"{kind} {name}"] = str(write_rows(folder / f"{kind}_{name}.jsonl", some))
        found[f"{kind} columns"] = {column: "ask"}
    found["pairs"] = found["pairs rows"]
    (folder / "plain.txt").write_text("".join(f"say {i}\n" + "\n" * (i % 3 == 0) for i in range(40)))
    found["plain"] = str(folder / "plain.txt")
    return found


def filled(value: Any, stage: str, files: dict[str, Any], tmp: Path) -> Any:
    """`value` with the files that it names."""
    kind = {"pretrain": "text", "sft": "sft", "ppo": "sft"}.get(stage, "pairs")
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        done = {key: filled(item, stage, files, tmp) for key, item in items}
        return done if isinstance(value, dict) else list(done.values())
    if not isinstance(value, str) or "{" not in value:
        return value
    name, _, rest = value[1:].partition("}")
    found = str(tmp) if name == "tmp" else files.get(f"{kind} {name}", files.get(name))
    return found + rest if rest else found


def recipe(stage: str, settings: dict[str, Any], files: dict[str, Any], tmp: Path) -> dict[str, Any]:
    """The smallest recipe of a stage with dotted settings in it."""
    values: dict[str, Any] = {
        "version": 1, "stage": stage, "model": {"name": "{base}", "dtype": "float32"},
        "data": {"train": "{rows}", "max_length": 128},
        "train": {"effective_batch_size": 4, "per_device_eval_batch_size": 3}, "output": {"dir": "{tmp}/run"},
    }  # fmt: skip
    if stage == "ppo":
        del values["train"]["per_device_eval_batch_size"]
        values["train"] |= {"learning_rate": 0.01, "logging_steps": 1}
        values["reward"] = {"functions": ["{rule}:score"]}
        values["ppo"] = {"num_mini_batches": 2, "max_new_tokens": 6}
    else:
        values["data"]["eval_split"] = 5
    if stage == "pretrain":
        values["data"]["max_length"] = 64
    for key, value in settings.items():
        *parts, last = key.removeprefix("source.").split(".") if key.startswith("source.") else key.split(".")
        node = values
        if key.startswith("source."):
            if isinstance(values["data"]["train"], str):
                values["data"]["train"] = {"path": values["data"]["train"]}
            node = values["data"]["train"]
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = copy.deepcopy(value)
    if stage == "ppo" and "train" in values["reward"]:
        del values["reward"]["functions"]
    return dict(filled(values, stage, files, tmp))


def settings_of(key: str, stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what stands beside a key, the same with the key flipped)."""
    beside, field = dict(BESIDE.get(key, {})), FIELDS[stage][key]
    if (stage == "reward" and key.startswith("reward.")) or (stage == "ppo" and "muon" in key):
        beside = {}  # ft ppo's section of that name is another one; ft ppo has no muon
    name = key
    if key.startswith("adapter."):
        _, method, last = key.split(".")
        beside, name = {"adapter.method": method, **beside}, f"adapter.{last}"
        value = ADAPTER_VALUES[last] if last in ADAPTER_VALUES else second_value(field)
    else:
        value = VALUES[key] if key in VALUES else second_value(field)
    if key == "ppo.clip_rewards":
        value = 5.0
    if stage == "ppo" and "data.max_length" in (key, *beside):  # of prompts, which are shorter than samples
        beside, value = {**beside, "data.max_length": 24}, 24 if key == "data.max_length" else value
    if stage == "ppo" and key == "data.max_length":
        beside = {}
    if stage == "ppo" and key.startswith("eval.during"):
        beside = {**beside, "eval.data": "{rows}"}
    return beside, {**beside, name: value}


# --- what is built ---


class Watch:
    """Takes down what a stage builds, and stops it before the first step."""

    def __init__(self, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, Any] = {}
        self.files = files
        self.until = "training"  # or "loading"
        for module, name in ((conversations, "load_sft"), (pairs, "load_pairs"), (pairs, "load_unpaired"),
                             (prompts, "load_prompts"), (text, "load_blocks")):  # fmt: skip
            monkeypatch.setattr(module, name, self.reading(getattr(module, name)))
        monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", self.load)
        monkeypatch.setattr(quantization, "after_loading", lambda *_: None)
        monkeypatch.setattr(sanity, "check", lambda _, __, model: self.seen.update(sanity=model.sanity_check))
        for module in (tokenizers, new_base):
            monkeypatch.setattr(module, "load_tokenizer", self.tokenizer)
        monkeypatch.setattr(session, "fit_trainer", self.fit)
        for command in (dpo, kto):
            monkeypatch.setattr(command, "merged_start", self.merged)
        monkeypatch.setattr(ppo, "train_reward", self.reward)
        monkeypatch.setattr(Ppo, "fit", lambda trainer, run, *_: self.ppo(trainer, run))

    def load(self, source: str, config: Any = None, **options: Any) -> Any:
        quantized = options.pop("quantization_config", None)
        self.seen |= {"source": source, "rope": str(getattr(config, "rope_parameters", None)), "options": str(options)}
        self.seen |= {"quantized": quantized and quantized.to_dict(), "length": config.max_position_embeddings}
        if self.until == "loading":
            raise Stop
        network = copy.deepcopy(self.files["network"])
        network.config._attn_implementation = options.get("attn_implementation", "sdpa")
        return network, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    def tokenizer(self, *arguments: Any) -> Any:
        found = TOKENIZER(*arguments)
        self.seen |= {"tokenizer": arguments[0].name, "template": found.chat_template}  # both are saved with the run
        return found

    def reading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*arguments: Any, **more: Any) -> Any:
            found = load(*arguments, **more)
            self.seen["rows"], self.seen["held out"] = table(found.train), table(found.eval)
            return found

        return loaded

    def reward(self, recipe: Any, run: Run, go_on: str) -> None:
        self.seen["reward model"] = file.to_yaml(recipe)
        raise Stop

    def merged(self, recipe: Any, run: Run) -> Base:
        self.seen["merged"] = recipe.model.adapter
        return Base.open(recipe.model.model_copy(update={"adapter": None}))

    def fit(self, trainer: Any, run: Run, checkpoint: Path | None, inputs: dict[str, str]) -> None:
        model = trainer.model
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Ranks):
                callback.on_train_begin(trainer.args, SimpleNamespace(max_steps=100), None, model=model)
        self.seen |= {"run": str(run.path), "arguments": trainer.args.to_dict(), **adapters(model)}
        self.seen["kept"] = trainer.recipe_train.save_total_limit  # what `run.rotate` is given: see stages/test_life.py
        self.seen["order"] = list(trainer._get_train_sampler())
        self.seen["callbacks"] = [(type(c).__name__, getattr(c, "early_stopping_patience", None))
                                  for c in trainer.callback_handler.callbacks]  # fmt: skip
        asked = trainer.during
        self.seen["answered"] = asked and (asked.steps, len(asked.rows), [metric.name for metric in asked.metrics])
        self.seen["optimizer"] = groups(trainer.create_optimizer())
        trainer.create_scheduler(trainer.args.max_steps if trainer.args.max_steps > 0 else 40)
        self.seen["rates"] = [f(step) for f in trainer.lr_scheduler.lr_lambdas[:1] for step in range(40)]
        if "float32" in self.seen.get("options", ""):  # the first batch, as it is trained
            torch.manual_seed(0)
            trainer.current_gradient_accumulation_steps = 1
            model.train()
            batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
            batch = trainer._prepare_inputs(batches[0])
            self.seen["loss"] = trainer.compute_loss(model, batch).item()
        raise Stop

    def ppo(self, trainer: Ppo, run: Run) -> None:
        """Three rollouts, but for what is not PPO's own."""
        self.seen |= {
            "run": str(run.path),
            "total": trainer.total,
            "batch": trainer.batch,
            "rows": trainer.rows,
        }
        self.seen |= {"optimizer": groups(trainer.learner.optimizer), **adapters(trainer.model)}
        self.seen["rates"] = [f(step) for f in trainer.learner.scheduler.lr_lambdas[:1] for step in range(40)]
        self.seen["held out"] = [prompt.ids for prompt in trainer.held_out]
        self.seen["models"] = len(trainer.models.networks())
        self.seen["checkpointing"] = trainer.model.is_gradient_checkpointing
        if self.until == "building":
            raise Stop
        trainer.total = 3
        REAL_PPO(trainer, run, None, {})
        dropped = ("tokens_per_second", "peak_memory_gb")
        self.seen["metrics"] = [{k: v for k, v in row.items() if k not in dropped} for row in run.read_metrics()]
        self.seen["samples"] = run.samples.read_text() if run.samples.exists() else ""
        self.seen["checkpoints"] = sorted(p.name for p in run.checkpoints.iterdir())
        raise Stop


REAL_PPO, TOKENIZER = Ppo.fit, tokenizers.load_tokenizer


def table(rows: Any) -> Any:
    if isinstance(rows, list):
        return [(row.ids, row.columns) for row in rows]
    if rows is None or isinstance(rows, text.Blocks):
        return None if rows is None else rows.ids.tolist()
    return {name: list(rows[name]) for name in rows.column_names}


def groups(optimizer: Any) -> list[Any]:
    return [type(optimizer).__name__] + [
        {k: len(v) if k == "params" else v for k, v in group.items()} for group in optimizer.param_groups
    ]


def adapters(model: Any) -> dict[str, Any]:
    """The adapter as it is, not as its config names it: peft's config without dropouts, which trainers switch off, the
    weights, and every dropout that is on."""
    trained = {n: (tuple(p.shape), float(p.detach().double().sum())) for n, p in model.named_parameters()
               if p.requires_grad}  # fmt: skip
    configs = {name: {k: v for k, v in vars(config).items() if "dropout" not in k}
               for name, config in getattr(model, "peft_config", {}).items()}  # fmt: skip
    on = [(name, key, str(value)) for name, module in model.named_modules() for key, value in vars(module).items()
          if key == "p" or ("dropout" in key and isinstance(value, float | dict))]  # fmt: skip
    settings = [(name, str(vars(module).get("bottleneck_settings"))) for name, module in model.named_modules()]
    scales = [(name, str(module.scaling)) for name, module in model.named_modules() if hasattr(module, "scaling")]
    return {"trained": trained, "peft": str(configs), "dropouts": on, "scales": scales, "settings": settings}


def outcome(stage: str, settings: dict[str, Any], files: dict[str, Any], watch: Watch, tmp: Path) -> Any:
    """What the stage would do, or what it says against it."""
    watch.seen = {}
    path = tmp / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(stage, settings, files, tmp)), encoding="utf-8")
    try:
        loaded = file.load(str(path), RECIPES[stage])
        importlib.import_module(f"finetune.commands.{stage}").run(loaded, overwrite=True)
    except UserError as error:
        return "; ".join(error.lines())
    except RunError as error:
        watch.seen["ended"] = str(error)
    except Stop:
        pass
    return watch.seen


def arguments(stage: str, settings: dict[str, Any], files: dict[str, Any], tmp: Path) -> Any:
    """What the trainer of a stage is given (see `test_the_trainer_gets_these_arguments`), or why there is none."""
    machine = Hardware()
    try:
        checked: Any = file.with_settings(recipe(stage, settings, files, tmp), stage, ())
    except UserError as error:
        return "; ".join(error.lines())
    made = resolve(checked, machine)
    layout = plan.Layout(*batch_layout(*a_step(made), machine), 4, 40)
    return plan.arguments(made, Run(tmp), layout, machine, made.data.eval_split is not None)


PLANS: dict[str, Any] = {}
ROLLED = ("ppo.", "reward.", "train.logging_steps", "train.save", "train.max_steps", "train.max_grad_norm", "eval.")


def check_flip(stage: str, key: str, files: dict[str, Any], watch: Watch, tmp: Path) -> None:
    """The cheapest look first: the arguments, then everything up to loading, then up to training."""
    beside, flipped = settings_of(key, stage)
    after = arguments(stage, flipped, files, tmp)
    if isinstance(after, str):
        assert key.rpartition(".")[2] in after, after
        return
    if stage != "ppo" and str(after) != str(arguments(stage, beside, files, tmp)):
        return
    looks = ("loading", "training") if stage != "ppo" or key.startswith(ROLLED) else ("loading", "building")
    for watch.until in looks:
        after = outcome(stage, flipped, files, watch, tmp)
        if isinstance(after, str):
            assert key.rpartition(".")[2] in after or "model." in key or "broken" in after, after
            return
        name = f"{stage} {watch.until} {beside}"
        if name not in PLANS:
            PLANS[name] = outcome(stage, beside, files, watch, tmp)
        before = PLANS[name]
        if isinstance(before, str) or any(str(after.get(part)) != str(before.get(part)) for part in after | before):
            return
    raise AssertionError(f"{key} does nothing in ft {stage}")


# --- keys whose effect lies elsewhere ---


def evaluated(stage: str, settings: dict[str, Any], files: dict[str, Any], monkeypatch: Any, tmp: Path) -> Any:
    """What `ft eval RUN` does with the recipe that a run left behind."""
    seen: dict[str, Any] = {}

    def stop(target: Any, held: Any, _: Any, chosen: Any, shots: int, *__: Any) -> None:
        seen.update(
            first=target.name,
            metrics=[metric.name for metric in chosen],
            shots=shots,
            before=[row.shots for row in held.rows],
            limits=(target.eval.max_new_tokens, target.eval.batch_size, str(target.eval.generation)),
            rows=len(held.rows),
            thinking=target.eval.thinking,
        )
        raise Stop

    monkeypatch.setattr(measuring, "evaluate_target", stop)
    run = Run(tmp / "evaluated")
    run.path.mkdir(exist_ok=True)
    monkeypatch.setattr(targets.sources, "adapter_folder", lambda _: run.path / "adapter")
    monkeypatch.setattr(targets.attach, "check_adapter", lambda *_: None)
    (tmp / "recipe.yaml").write_text(yaml.safe_dump(recipe(stage, settings, files, tmp)), encoding="utf-8")
    try:
        loaded: Any = file.load(str(tmp / "recipe.yaml"), RECIPES[stage])
    except UserError as error:
        return str(error)
    (run.path / "recipe.yaml").write_text(file.to_yaml(resolve(loaded, Hardware())), encoding="utf-8")
    with pytest.raises((Stop, UserError)) as caught:
        evaluate.run([str(run.path)])
    return seen or str(caught.value)


def probe_eval(stage: str, key: str, files: dict[str, Any], monkeypatch: Any, tmp: Path) -> None:
    data = {} if key == "eval.data" else {"eval.data": files["pairs rows" if stage == "reward" else "sft rows"]}
    fewer = files["pairs fewer" if stage == "reward" else "sft fewer"]
    values: dict[str, Any] = {
        "eval.data": fewer, "eval.limit": 1, "eval.thinking": "on",
        "eval.metrics": ["margin" if stage == "reward" else "loss"], "eval.shots": 2,
        "eval.shots_from": fewer,
    }  # fmt: skip
    value = values.get(key, 7)
    if key in ("eval.generation.temperature", "eval.generation.top_p", "eval.generation.repetition_penalty"):
        value = 0.5
    if key == "eval.shots_from":
        assert key in evaluated(stage, {**data, key: value}, files, monkeypatch, tmp), "there are no shots"
        data |= {"eval.shots": 2}
    if key.rpartition(".")[2] in DRAWING:
        assert key in evaluated(stage, {**data, key: value}, files, monkeypatch, tmp), "greedy answers need none"
        data |= BESIDE[key]
    after = evaluated(stage, {**data, key: value}, files, monkeypatch, tmp)
    assert (isinstance(after, str) and key in after) or after != evaluated(stage, data, files, monkeypatch, tmp)


def probe_set(stage: str, key: str, files: dict[str, Any], monkeypatch: Any, tmp: Path) -> None:
    """Of a set that is watched the base is measured, too; a reward model has none, which is said."""
    kind = "pairs" if stage == "reward" else "sft"
    plain = {"path": files[f"{kind} rows"]}
    flipped = {"path": files[f"{kind} fewer"]} if key == "eval.data.path" else {**plain, "general": True}
    before, after = (evaluated(stage, {"eval.data": one}, files, monkeypatch, tmp) for one in (plain, flipped))
    assert after != before or (stage, key) == ("reward", "eval.data.general")


def probe_hub_model(stage: str, key: str, files: dict[str, Any], monkeypatch: Any, tmp: Path) -> None:
    """`source` says where a name is looked up, `revision` goes along to the hub."""
    asked: list[Any] = []

    def of_hub(source: str, name: str, revision: str | None = None) -> str:
        asked.append((source, revision))
        return str(Path(files["base"]) / name)

    monkeypatch.setattr(hub, "file", of_hub)
    read_config(ModelConfig(name="owner/base", source="hub", revision="v2"))
    assert asked == [("owner/base", "v2")]
    with pytest.raises(UserError, match="no such model"):
        read_config(ModelConfig(name="owner/base", source="local"))
    for settings in ({"model.source": "hub"}, {"model.revision": "v2"}, {"model.gguf_file": "x.gguf"}):
        (said,) = settings
        assert said in outcome(stage, settings, files, SimpleNamespace(seen={}), tmp)  # type: ignore[arg-type]


def probe_hub_data(stage: str, key: str, files: dict[str, Any], monkeypatch: Any, tmp: Path) -> None:
    """A hub dataset gets all of them; a local file refuses what it has no use for."""
    from finetune.data.samples import read_samples

    asked: list[Any] = []

    def load_dataset(path: str, name: str | None = None, **more: Any) -> list[dict[str, Any]]:
        asked.append((path, name, more))
        return [{"prompt": "a", "completion": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = SourceConfig(path="owner/data", source="hub", name="x", split="test", revision="v2")
    for streaming in (False, True):
        assert len(list(read_samples(source, DataConfig(train="-", streaming=streaming)))) == 1
        more = {"split": "test", "revision": "v2", "streaming": streaming}
        assert asked.pop() == ("owner/data", "x", more)
    settings = {key: VALUES.get(key, True)}
    said = outcome(stage, settings, files, SimpleNamespace(seen={}), tmp)  # type: ignore[arg-type]
    assert key.rpartition(".")[2] in said, said


def probe_cache(stage: str, key: str, files: dict[str, Any], monkeypatch: Any, tmp: Path) -> None:
    """Large data lies in the cache after it was read."""
    if stage != "sft":
        assert key in arguments(stage, {key: False}, files, tmp)
        return
    monkeypatch.setattr(conversations.token_cache, "LARGE", 0)
    monkeypatch.setattr(conversations, "cache_folder", lambda: tmp / "tokenised")
    monkeypatch.setattr(session.Session, "show", lambda *_: None)
    for cache in (False, True):
        loaded = file.with_settings(recipe(stage, {key: cache}, files, tmp), stage, ())
        sft.run(loaded, dry_run=True, overwrite=True)
        assert (tmp / "tokenised").exists() is cache


def probe_smaller(stage: str, key: str, files: dict[str, Any], monkeypatch: Any, tmp: Path) -> None:
    """With it there is something to go on with after memory has run out: see training/test_out_of_memory.py."""
    found = []
    for wanted in (False, True):
        (tmp / "recipe.yaml").write_text(yaml.safe_dump(recipe(stage, {key: wanted}, files, tmp)), encoding="utf-8")
        made: Any = file.load(str(tmp / "recipe.yaml"), RECIPES[stage])
        found.append(session.fewer_rows(made, plan.Layout(4, 1, 1, 1)))
    assert found == [None, {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 2}]


def probe_trackers(stage: str, key: str, files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """The named trackers, and no others, are started before the base is loaded."""
    from finetune.training import tracking

    started: list[str] = []

    def start(names: list[str]) -> Any:
        started.extend(names)
        raise RuntimeError("started")

    monkeypatch.setattr(tracking, "get_reporting_integration_callbacks", start)
    failed = lambda *a, **k: pytest.fail("the base was loaded first")  # noqa: E731
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", failed)
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe(stage, {key: ["wandb"]}, files, here)), encoding="utf-8")
    loaded: Any = file.load(str(here / "recipe.yaml"), RECIPES[stage])
    with pytest.raises(UserError, match="wandb: started"):
        importlib.import_module(f"finetune.commands.{stage}").run(loaded, overwrite=True)
    assert started == ["wandb"]


PROBES: dict[str, Callable[..., None]] = {
    "train.auto_find_batch_size": probe_smaller,
    "train.report_to": probe_trackers,
    "data.cache": probe_cache,
    **dict.fromkeys(("eval.data", "eval.max_new_tokens", "eval.batch_size", "eval.limit", "eval.thinking",
                     "eval.metrics", "eval.shots", "eval.shots_from", "eval.shots_from"), probe_eval),
    **{f"eval.generation.{key}": probe_eval for key in GenerationConfig.model_fields},
    **{f"eval.data.{key}": probe_set for key in EvalSet.model_fields},
    **dict.fromkeys(("model.source", "model.revision", "model.gguf_file"), probe_hub_model),
    **dict.fromkeys(("data.streaming", "source.source", "source.name", "source.split", "source.revision"),
                    probe_hub_data),
}  # fmt: skip


# --- the tests ---


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all runs: plans hold paths."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def watch(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch, here: Path) -> Watch:
    monkeypatch.setattr("finetune.training.reference.cache_folder", lambda: here / "cache")
    return Watch(files, monkeypatch)


@pytest.mark.parametrize("stage", RECIPES)
def test_the_same_recipe_gives_the_same_plan(stage: str, files: dict[str, Any], watch: Watch, here: Path) -> None:
    """Or every comparison below would find a change."""
    first = outcome(stage, {}, files, watch, here)
    again = outcome(stage, {}, files, watch, here)
    assert {"trained", "optimizer", "run"} <= set(first), first
    assert [name for name in first if str(first[name]) != str(again[name])] == []


@pytest.mark.parametrize("stage", [stage for stage in RECIPES if stage != "ppo"])
def test_the_trainer_gets_these_arguments(stage: str, files: dict[str, Any], watch: Watch, here: Path) -> None:
    settings = {"train.num_train_epochs": 2.0, "train.weight_decay": 0.1, "train.seed": 7, "train.save_steps": 3}
    made, given = outcome(stage, settings, files, watch, here), arguments(stage, settings, files, here)
    derived = (
        "output_dir",
        "use_cpu",
        "optim",
        "lr_scheduler_type",
        "warmup_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "per_device_eval_batch_size",
        "save_strategy",
        "eval_strategy",
        "report_to",
    )
    assert {k: v for k, v in given.items() if k not in derived and made["arguments"].get(k, v) != v} == {}


RUNNING = [(s, k) for s, k in ALL if k not in PROBES and (s == "sft" or not k.startswith("adapter."))]


@pytest.mark.parametrize(("stage", "key"), RUNNING, ids=lambda v: v)
def test_a_flipped_key_changes_something(
    stage: str, key: str, files: dict[str, Any], watch: Watch, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_flip(stage, key, files, watch, here)


@pytest.mark.parametrize(("stage", "key"), [(s, k) for s, k in ALL if k in PROBES], ids=lambda v: v)
def test_a_key_with_its_effect_elsewhere(
    stage: str, key: str, files: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PROBES[key](stage, key, files, monkeypatch, here)


@pytest.mark.parametrize("stage", [stage for stage in RECIPES if stage != "sft"])
def test_every_adapter_is_the_same_in_every_stage(stage: str, files: dict[str, Any], watch: Watch, here: Path) -> None:
    """The keys of each method reach peft's config, or are refused; that the stage trains it, one of them shows."""
    network = loading.skeleton(ModelConfig(name=files["base"]))
    for key in (key for key in FIELDS[stage] if key.startswith("adapter.") and not key.endswith(".method")):
        made = []
        for settings in settings_of(key, stage):
            (here / "recipe.yaml").write_text(yaml.safe_dump(recipe(stage, settings, files, here)), encoding="utf-8")
            try:
                section = file.load(str(here / "recipe.yaml"), RECIPES[stage]).adapter
                made.append(str(vars(methods.METHODS[section.method].make_config(network, section))))
            except UserError as error:
                made.append(str(error))
        last = key.rpartition(".")[2]
        known = (
            "tinit",
            "tfinal",
            "loraplus_lr_ratio",
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "prefix_init",
            "prefix_init_text",
        )  # of the trainer or of the first weights, which are looked at in ft sft
        assert made[0] != made[1] or last in known, f"{key} does nothing in ft {stage}"
    if stage != "pretrain":
        check_flip(stage, "adapter.lora.r", files, watch, here)


@pytest.mark.parametrize("key", sorted({key for row in effects.IDLE for key in row.keys}))
def test_a_key_that_can_be_refused_does_something_somewhere(key: str, files: dict[str, Any], here: Path) -> None:
    """With what stands beside it, in one stage at least."""
    last = key.removeprefix("adapter.")
    names = [f"adapter.{m}.{last}" for m in ADAPTERS] if key.startswith("adapter.") else [key]
    said = []
    for stage, name in ALL:
        if name in names:
            values = recipe(stage, settings_of(name, stage)[1], files, here)
            try:
                found: Any = file.check(values, stage)
            except UserError as error:
                said.append(str(error))
                continue
            if key not in {effects_key for effects_key, *_ in effects.refused(found)}:
                return
    raise AssertionError(said or f"{key}: refused everywhere, or no key")
