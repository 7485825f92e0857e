"""How each contestant is asked for the same work: command, environment and settings files, written into a folder.

Equal settings: LoRA r 8, alpha 16, no dropout, on all linear layers of the blocks; float32; AdamW without weight decay
at a constant 1e-3; seed 42; whole rows; loss of assistant tokens; no gradient checkpointing or packing.
`defaults` leaves to each tool its own precision, packing, checkpointing and attention.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH, RATE, EPOCHS = 576, 1e-3, 2  # no row is longer: LLaMA-Factory cuts elsewhere than the others
PROMPTS, REPLY, ROLLOUTS = 16, 48, 3
Command = tuple[list[str], dict[str, str]]


@dataclass(frozen=True)
class Places:
    load: Path
    """Of the workload."""
    venvs: Path
    work: Path
    """Of this run: settings, output."""
    batch: int
    packed: bool = False
    defaults: bool = False
    cuda: bool = False
    base: str | None = None
    """Another base than the workload's."""

    @property
    def model(self) -> str:
        return self.base or str(self.load / "base")

    def python(self, venv: str) -> str:
        return str(self.venvs / venv / "bin" / "python")

    def program(self, venv: str, name: str) -> str:
        return str(self.venvs / venv / "bin" / name)

    def settings(self, name: str, values: dict[str, Any]) -> str:
        """A settings file; JSON is YAML."""
        path = self.work / name
        path.write_text(json.dumps(values, indent=1), encoding="utf-8")
        return str(path)


def trl_arguments(p: Places, stage: str) -> dict[str, Any]:
    equal = {"bf16": False, "gradient_checkpointing": False}
    own = {"beta": 0.1} if stage == "dpo" else {"assistant_only_loss": True}
    if stage == "sft":
        equal["packing"] = p.packed
    return {
        "output_dir": str(p.work / "out"), "max_length": LENGTH, "per_device_train_batch_size": p.batch,
        "gradient_accumulation_steps": 1, "learning_rate": RATE, "lr_scheduler_type": "constant",
        "num_train_epochs": EPOCHS, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 42,
        "use_cpu": not p.cuda, **own, **({} if p.defaults else equal),
    }  # fmt: skip


def trl_script(stage: str) -> Callable[[Places], Command]:
    def command(p: Places) -> Command:
        values = {"base": p.model, "data": str(p.load / f"{stage}.jsonl"), "targets": TARGETS, "dtype": "float32"}
        given = p.settings("trl_script.json", {**values, "arguments": trl_arguments(p, stage)})
        return [p.python("trl"), str(HERE / f"trl_{stage}.py"), given], {}

    return command


def trl_cli(stage: str) -> Callable[[Places], Command]:
    def command(p: Places) -> Command:
        values = trl_arguments(p, stage)
        lora = {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": TARGETS}
        data = {"datasets": [{"path": "json", "data_files": str(p.load / f"{stage}.jsonl"), "split": "train"}]}
        model = {"model_name_or_path": p.model, **({} if p.defaults else {"dtype": "float32"})}
        given = p.settings("trl.yaml", {**model, **data, "dataset_test_split": None, **lora, **values})
        return [p.program("trl", "trl"), stage, "--config", given], {}

    return command


def llamafactory(stage: str) -> Callable[[Places], Command]:
    def command(p: Places) -> Command:
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                "system_tag": "system"}  # fmt: skip
        listed = {
            "sft": {"file_name": str(p.load / "sft.jsonl"), "formatting": "sharegpt",
                    "columns": {"messages": "messages"}, "tags": tags},
            "dpo": {"file_name": str(p.load / "dpo_lf.jsonl"), "ranking": True,
                    "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}},
        }  # fmt: skip
        p.settings("dataset_info.json", listed)
        equal = {"disable_gradient_checkpointing": True, "flash_attn": "sdpa", "packing": p.packed}
        more = {"pref_beta": 0.1, "pref_loss": "sigmoid"} if stage == "dpo" else {}
        given = p.settings("lf.yaml", {
            "model_name_or_path": p.model, "stage": stage, "do_train": True, "finetuning_type": "lora", "lora_rank": 8,
            "lora_alpha": 16, "lora_dropout": 0.0, "lora_target": ",".join(TARGETS), "dataset_dir": str(p.work),
            "dataset": stage, "cutoff_len": LENGTH, "preprocessing_num_workers": 1,
            "output_dir": str(p.work / "out"), "per_device_train_batch_size": p.batch, "gradient_accumulation_steps": 1,
            "learning_rate": RATE, "lr_scheduler_type": "constant", "num_train_epochs": EPOCHS, "optim": "adamw_torch",
            "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 42, "use_cpu": not p.cuda,
            **more, **({} if p.defaults else equal),
        })  # fmt: skip
        return [p.program("llamafactory", "llamafactory-cli"), "train", given], {}

    return command


def swift(stage: str) -> Callable[[Places], Command]:
    def command(p: Places) -> Command:
        equal = {"torch_dtype": "float32", "bf16": False, "fp16": False, "gradient_checkpointing": False,
                 "attn_impl": "sdpa"}  # fmt: skip
        values = {
            "model": p.model, "model_type": "llama", "template": "bench", "split_dataset_ratio": 0,
            "tuner_type": "lora", "external_plugins": str(HERE / "swift_template.py"),
            "dataset": str(p.load / ("sft.jsonl" if stage == "sft" else "dpo_swift.jsonl")), "lora_rank": 8,
            "lora_alpha": 16, "lora_dropout": 0, "max_length": LENGTH, "truncation_strategy": "right",
            "per_device_train_batch_size": p.batch, "gradient_accumulation_steps": 1, "learning_rate": RATE,
            "lr_scheduler_type": "constant", "warmup_ratio": 0, "num_train_epochs": EPOCHS, "optim": "adamw_torch",
            "weight_decay": 0, "adam_beta2": 0.999, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no",
            "report_to": "none", "seed": 42, "use_cpu": not p.cuda, "dataloader_num_workers": 0, "dataset_num_proc": 1,
            "add_version": False, "check_model": False, "output_dir": str(p.work / "out"),
            **({"beta": 0.1} if stage == "dpo" else {}), **({} if p.defaults else equal),
        }  # fmt: skip
        words = [
            word
            for key, value in values.items()
            for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))
        ]
        start = ["sft"] if stage == "sft" else ["rlhf", "--rlhf_type", stage]
        return [p.program("ms-swift", "swift"), *start, *words, "--target_modules", *TARGETS], {"USE_HF": "1"}

    return command


def axolotl(stage: str) -> Callable[[Places], Command]:
    data = {
        "sft": {"type": "chat_template", "field_messages": "messages", "roles_to_train": ["assistant"],
                "train_on_eos": "turn"},
        "dpo": {"type": "chat_template.default", "field_messages": "prompt", "split": "train"},
    }[stage]  # fmt: skip
    more = {"rl": "dpo", "rl_beta": 0.1} if stage == "dpo" else {"excess_length_strategy": "truncate"}

    def command(p: Places) -> Command:
        equal = {"bf16": False, "fp16": False, "tf32": False, "gradient_checkpointing": False,
                 "attn_implementation": "sdpa"}  # fmt: skip
        if stage == "sft":
            equal |= {"sample_packing": p.packed, "pad_to_sequence_len": False}
        given = p.settings("axolotl.yaml", {
            "base_model": p.model, "model_type": "LlamaForCausalLM", "tokenizer_type": "AutoTokenizer",
            "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": TARGETS,
            "datasets": [{"path": str(p.load / f"{stage}.jsonl"), "ds_type": "json",
                          "message_property_mappings": {"role": "role", "content": "content"}, **data}],
            "chat_template": "tokenizer_default", "dataset_prepared_path": str(p.work / "prepared"), "val_set_size": 0,
            "output_dir": str(p.work / "out"), "sequence_len": LENGTH,
            "micro_batch_size": p.batch, "gradient_accumulation_steps": 1, "num_epochs": EPOCHS,
            "optimizer": "adamw_torch", "lr_scheduler": "constant", "learning_rate": RATE, "weight_decay": 0.0,
            "logging_steps": 1, "save_strategy": "no", "seed": 42, "use_tensorboard": False, "lora_mlp_kernel": False,
            "lora_qkv_kernel": False, "lora_o_kernel": False, **more, **({} if p.defaults else equal),
        })  # fmt: skip
        return [p.program("axolotl", "axolotl"), "train", given, "--launcher", "python"], {"AXOLOTL_DO_NOT_TRACK": "1"}

    return command


def trl_ppo(p: Places) -> Command:
    arguments = {
        "output_dir": str(p.work / "out"), "per_device_train_batch_size": PROMPTS, "gradient_accumulation_steps": 1,
        "num_mini_batches": 4, "num_ppo_epochs": 2, "total_episodes": PROMPTS * ROLLOUTS, "response_length": REPLY,
        "local_rollout_forward_batch_size": PROMPTS, "learning_rate": 1e-4, "lr_scheduler_type": "constant",
        "temperature": 1.0, "kl_coef": 0.05, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 42,
        "use_cpu": not p.cuda, "num_sample_generations": 0, "missing_eos_penalty": 1.0, "stop_token": "eos",
        **({} if p.defaults else {"bf16": False, "gradient_checkpointing": False}),
    }  # fmt: skip
    values = {"base": p.model, "data": str(p.load / "ppo.jsonl"), "reward": str(p.load / "reward" / "adapter")}
    given = p.settings("trl_ppo.json", {**values, "targets": TARGETS, "arguments": arguments})
    return [p.python("trl112"), str(HERE / "trl_ppo.py"), given], {}


def ft(stage: str) -> Callable[[Places], Command]:
    def command(p: Places) -> Command:
        lora = {"method": "lora", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": TARGETS}
        train = {"num_train_epochs": EPOCHS, "learning_rate": RATE, "lr_scheduler_type": "constant",
                 "weight_decay": 0.0,
                 "warmup_steps": 0, "effective_batch_size": p.batch, "per_device_train_batch_size": p.batch,
                 "logging_steps": 1, "seed": 42}  # fmt: skip
        model = {"name": p.model, "sanity_check": False, **({} if p.defaults else {"dtype": "float32"})}
        data: dict[str, Any] = {"train": str(p.load / f"{stage}.jsonl"), "max_length": LENGTH}
        more: dict[str, Any] = {}
        if stage == "sft":
            data |= {} if p.defaults else {"packing": p.packed}
        if stage == "reward":
            data["train"] = str(p.load / "dpo.jsonl")
            train["num_train_epochs"] = 1
        if stage == "ppo":
            train = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
                     "logging_steps": 1,
                     "effective_batch_size": PROMPTS, "per_device_train_batch_size": PROMPTS // 4,
                     "max_steps": ROLLOUTS, "seed": 42}  # fmt: skip
            more = {"reward": {"model": str(p.load / "reward")},
                    "ppo": {"max_new_tokens": REPLY, "num_ppo_epochs": 2, "num_mini_batches": 4}}  # fmt: skip
        out = str(p.load / "reward") if stage == "reward" else str(p.work / "out")
        given = p.settings(f"ft_{stage}.yaml", {
            "version": 1, "stage": stage, "model": model, "data": data, "adapter": lora, "train": train, **more,
            "output": {"dir": out},
        })  # fmt: skip
        return [sys.executable, "-m", "finetune", stage, "--recipe", given, "--overwrite"], {}

    return command


SFT = {"ft": ft("sft"), "bare trl script": trl_script("sft"), "trl CLI": trl_cli("sft"),
       "LLaMA-Factory": llamafactory("sft"), "ms-swift": swift("sft"), "axolotl": axolotl("sft")}  # fmt: skip
DPO = {"ft": ft("dpo"), "bare trl script": trl_script("dpo"), "trl CLI": trl_cli("dpo"),
       "LLaMA-Factory": llamafactory("dpo"), "ms-swift": swift("dpo"), "axolotl": axolotl("dpo")}  # fmt: skip
PPO = {"ft": ft("ppo"), "trl 1.12": trl_ppo}
