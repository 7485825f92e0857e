"""`ft recipes import`: configs and command lines of other tools become recipes that pass our checks; what has no
equivalent is listed. Keys are theirs, values and texts are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ft

from finetune.errors import UserError
from finetune.recipe.file import load
from finetune.recipe.importing.source import read
from finetune.recipe.importing.translate import Imported, translate

LLAMA_FACTORY = {
    "stage": "sft", "do_train": True, "model_name_or_path": "org/base", "finetuning_type": "lora", "lora_rank": 4,
    "lora_target": "all", "dataset": "mine,theirs", "dataset_dir": "data", "template": "qwen", "cutoff_len": 512,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 1e-4, "warmup_ratio": 0.1,
    "bf16": True, "val_size": 0.1, "output_dir": "saves/a", "plot_loss": True, "use_galore": True, "report_to": "none",
    "quantization_bit": 4, "resume_from_checkpoint": None,
}  # fmt: skip
AXOLOTL = {
    "base_model": "org/base", "load_in_8bit": True, "datasets": [{"path": "org/rows", "type": "alpaca"}],
    "val_set_size": 0.05, "output_dir": "./out", "adapter": "lora", "lora_r": 32, "lora_alpha": 16,
    "sequence_len": 4096,
    "lora_target_linear": True, "sample_packing": True, "micro_batch_size": 2, "gradient_accumulation_steps": 4,
    "num_epochs": 2, "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine", "learning_rate": 2e-4, "bf16": "auto",
    "attn_implementation": "flash_attention_2", "wandb_project": "mine", "wandb_entity": None, "saves_per_epoch": 1,
    "special_tokens": {"pad_token": "x"}, "unfrozen_parameters": ["a.*"], "warmup_ratio": 0.1,
}  # fmt: skip


def imported(path: Path, content: Any) -> Imported:
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8")
    return translate(read(path))


def left(found: Imported) -> set[str]:
    return {key for key, _, _ in found.left_out}


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    info = {
        "mine": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}},
        "theirs": {"hf_hub_url": "org/rows", "subset": "zh"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    found = imported(tmp_path / "a.yaml", LLAMA_FACTORY)
    values = found.values
    assert values["model"] == {"name": "org/base", "dtype": "bfloat16", "quantization": "int4"}
    assert values["adapter"] == {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    assert values["data"]["train"] == [
        {"path": str(tmp_path / "data" / "mine.json"), "columns": {"instruction": "q", "output": "a"}},
        {"path": "org/rows", "source": "hub", "name": "zh"},
    ]
    train = values["train"]
    assert (train["effective_batch_size"], train["per_device_train_batch_size"]) == (8, 2)
    assert (train["warmup_steps"], train["lr_scheduler_type"]) == (0.1, "linear"), "their default is not ours"
    assert {"use_galore", "template", "plot_loss", "do_train"} <= left(found)
    assert "resume_from_checkpoint" not in left(found), "null asks for nothing"


def test_every_key_is_used_or_listed(tmp_path: Path) -> None:
    """Taken out one by one: the recipe changes, or the key was listed, or it says what is so anyway."""
    for name, config in (("a", LLAMA_FACTORY), ("b", AXOLOTL)):
        whole = imported(tmp_path / f"{name}.yaml", config)
        for key, value in config.items():
            if value in (None, "none", False):
                continue
            try:
                without = imported(tmp_path / f"{name}.yaml", {k: v for k, v in config.items() if k != key})
            except UserError:
                continue  # it cannot be done without
            changed = without.values != whole.values or without.notes != whole.notes
            listed = any(one == key or one.startswith(f"{key}.") for one in left(whole))
            assert changed or listed or key in SAID_ANYWAY[name], key


SAID_ANYWAY: dict[str, set[str]] = {
    "a": {"stage", "finetuning_type", "dataset_dir", "report_to"},
    "b": {"lr_scheduler", "bf16"},
}
"""Keys with the value that they have when they are not there."""


def test_axolotl(tmp_path: Path) -> None:
    found = imported(tmp_path / "x.yml", AXOLOTL)
    values = found.values
    assert values["data"]["train"] == "org/rows"
    assert values["data"]["packing"] is True
    assert values["model"]["quantization"] == "int8"
    assert values["train"]["optim"] == "adamw_8bit"
    assert values["train"]["report_to"] == ["wandb"]
    assert found.notes[0] == "set WANDB_PROJECT=mine in the environment"
    assert {"unfrozen_parameters", "special_tokens", "saves_per_epoch", "datasets.type"} <= left(found)
    assert imported(tmp_path / "x.yml", {**AXOLOTL, "adapter": None}).values["adapter"]["method"] == "full"


SWIFT = """
export CUDA_VISIBLE_DEVICES=0
MODEL=org/base
NPROC_PER_NODE=2 swift sft \\
    --model ${MODEL} \\
    --tuner_type lora \\
    --dataset 'org/zh#500' HF::org/en:sub local.jsonl \\
    --torch_dtype bfloat16 \\
    --lora_rank 8 --target_modules all-linear \\
    --per_device_train_batch_size=1 --gradient_accumulation_steps 16 \\
    --deepspeed zero2 --freeze_vit true \\
    --output_dir out  # where it goes
"""


def test_ms_swift(tmp_path: Path) -> None:
    found = imported(tmp_path / "train.sh", SWIFT)
    values = found.values
    assert values["model"] == {"name": "org/base", "dtype": "bfloat16", "source": "modelscope"}
    assert values["data"]["train"] == [
        {"path": "org/zh", "source": "modelscope", "max_samples": 500},
        {"path": "org/en", "source": "hub", "name": "sub"},
        "local.jsonl",
    ]
    assert values["output"]["dir"] == "out"
    assert (values["train"]["learning_rate"], values["train"]["weight_decay"]) == (1e-4, 0.1)
    assert values["adapter"]["lora_dropout"] == 0.05
    assert {"deepspeed", "freeze_vit"} <= left(found)
    assert found.notes[0] == "train.effective_batch_size is that of one GPU: multiply it by how many you had"


def test_trl_by_command_and_by_config(tmp_path: Path) -> None:
    line = "trl dpo --model_name_or_path org/base --dataset_name org/pairs --use_peft --lora_r 4 --beta 0.2"
    found = imported(tmp_path / "run.sh", f"{line} --loss_type ipo --output_dir out 2>&1 | tee log\n")
    assert found.stage == "dpo"
    assert found.values["dpo"] == {"beta": 0.2, "loss_type": "ipo"}
    assert found.values["adapter"]["r"] == 4
    assert found.values["train"]["learning_rate"] == 1e-6
    (tmp_path / "c.yaml").write_text("model_name_or_path: org/base\ndataset_name: org/rows\nlearning_rate: 1.0e-4\n")
    other = imported(tmp_path / "sft.sh", "trl sft --config c.yaml --max_length 256\n")
    assert other.values["adapter"]["method"] == "full"
    assert other.values["data"] == {"max_length": 256, "train": "org/rows"}


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({**LLAMA_FACTORY, "do_train": False}, "does not train"),
        ({**AXOLOTL, "rl": "grpo"}, "grpo has no equivalent here"),
        ({**AXOLOTL, "adapter": "boft"}, "boft has no equivalent here"),
        ("swift rlhf --rlhf_type gkd --model a --dataset b\n", "gkd has no equivalent here"),
        ("swift sft --model a --task_type embedding --dataset b\n", "task_type embedding"),
        ({"compute_environment": "LOCAL_MACHINE"}, "is accelerate's"),
        ({"version": 1, "stage": "sft", "model": {"name": "a"}}, "is a recipe already"),
        ({"a": 1}, "no key of LLaMA-Factory"),
        ("just text\n", "neither a config nor a command line"),
        ("trl sft --config nowhere.yaml\n", "names nowhere.yaml"),
        ({k: v for k, v in AXOLOTL.items() if k != "datasets"}, "missing"),
        ("swift sft --model 'a\n", "cannot be read"),
    ],
)
def test_what_cannot_become_a_recipe_is_said(config: Any, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=what):
        imported(tmp_path / "x.yaml", config)


def test_what_our_checks_refuse_is_taken_out_with_what_they_say(tmp_path: Path) -> None:
    found = imported(tmp_path / "x.yml", {**AXOLOTL, "lr_scheduler": "rex", "eval_steps": 10, "val_set_size": 0})
    reasons = {key: why for key, _, why in found.left_out}
    assert "not possible here" in reasons["lr_scheduler"]
    assert "no rows are held out" in reasons["eval_steps"]


def test_command(tmp_path: Path) -> None:
    (tmp_path / "x.yml").write_text(yaml.safe_dump(AXOLOTL), encoding="utf-8")
    printed = ft("recipes", "import", "x.yml", cwd=tmp_path)
    assert printed.returncode == 0
    assert '# unfrozen_parameters: ["a.*"] (no equivalent' in printed.stdout
    written = ft("recipes", "import", "x.yml", "--output", "mine.yaml", cwd=tmp_path)
    assert written.returncode == 0
    assert "left out: unfrozen_parameters" in written.stderr
    assert "ft sft --recipe mine.yaml --dry-run" in written.stderr
    assert load(str(tmp_path / "mine.yaml"), None).data.max_length == 4096
    again = ft("recipes", "import", "x.yml", "--output", "mine.yaml", cwd=tmp_path)
    assert again.returncode == 2
    assert ft("recipes", "import", "nowhere.yml", cwd=tmp_path).returncode == 2


def reasons(found: Imported) -> dict[str, str]:
    return {key: why for key, _, why in found.left_out}


SFT = "swift sft --model org/base --dataset a.jsonl"


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ({**LLAMA_FACTORY, "warmup_steps": 0}, "train.warmup_steps", 0.1),
        ({**LLAMA_FACTORY, "warmup_steps": 20}, "train.warmup_steps", 20),
        ({**LLAMA_FACTORY, "additional_target": "embed_tokens, lm_head"}, "adapter.modules_to_save",
         ["embed_tokens", "lm_head"]),
        ({**LLAMA_FACTORY, "adapter_name_or_path": "a,b"}, "model.adapter", "b"),
        ({**LLAMA_FACTORY, "stage": "dpo", "pref_loss": "simpo", "pref_beta": 2.0}, "dpo.simpo_gamma", 0.25),
        ({**LLAMA_FACTORY, "stage": "rm"}, "reward.center_rewards_coefficient", 0.0),
        ({**AXOLOTL, "warmup_ratio": None}, "train.warmup_steps", 0.03),
        (AXOLOTL, "data.on_overlong", "drop"),
        ({**AXOLOTL, "lora_target_modules": ["embed_tokens"]}, "adapter.target_modules", "all-linear"),
        ({**AXOLOTL, "use_tensorboard": True}, "train.report_to", ["tensorboard", "wandb"]),
        ({**AXOLOTL, "rl": "orpo"}, "dpo.loss_type", "orpo"),
        (f"{SFT} --per_device_train_batch_size 3\n", "train.effective_batch_size", 18),
        (f"{SFT} --max_length 99\n", "train.adam_beta2", 0.95),
        (f"{SFT} --truncation_strategy right\n", "data.on_overlong", "truncate"),
        ("swift rlhf --rlhf_type simpo --model org/base --dataset a.jsonl\n", "dpo.simpo_gamma", 0.5),
        ("swift rlhf --rlhf_type orpo --model org/base --dataset a.jsonl\n", "dpo.loss_type", "orpo"),
        (f"""{SFT} --columns '{{"q": "query", "a": "response"}}'\n""", "data.columns",
         {"instruction": "q", "output": "a"}),
        ("trl sft --model_name_or_path b --dataset_name d --assistant_only_loss true\n", "data.train_on", "assistant"),
        ("trl dpo --model_name_or_path b --dataset_name d --loss_type robust --label_smoothing 0.1\n",
         "dpo.label_smoothing", 0.1),
    ],
)  # fmt: skip
def test_what_means_something_else_there(tmp_path: Path, config: Any, key: str, value: Any) -> None:
    """Of two keys the one that counts, defaults that are not ours, names that are called the same and are not."""
    found = imported(tmp_path / "x.sh", config)
    section, _, name = key.partition(".")
    assert found.values[section][name] == value


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({**LLAMA_FACTORY, "warmup_steps": 20}, "warmup_ratio"),
        ({**LLAMA_FACTORY, "adapter_name_or_path": "a,b"}, "adapter_name_or_path"),
        ({**LLAMA_FACTORY, "finetuning_type": "freeze", "freeze_trainable_layers": -2}, "freeze_trainable_layers"),
        ({**LLAMA_FACTORY, "eval_steps": 0.1}, "eval_steps"),
        ({**LLAMA_FACTORY, "gradient_accumulation_steps": "auto"}, "gradient_accumulation_steps"),
        ({**LLAMA_FACTORY, "reward_model": "org/r"}, "reward_model"),
        ({**LLAMA_FACTORY, "test_datasets": "b.json"}, "test_datasets"),
        ({**AXOLOTL, "lora_target_modules": ["embed_tokens"]}, "lora_target_modules"),
        ({**AXOLOTL, "datasets": [{"path": "a", "roles_to_train": ["user"]}]}, "datasets.roles_to_train"),
        ({**AXOLOTL, "use_comet": True}, "use_comet"),
        (f"{SFT}:a/b\n", "dataset"),
        (f"{SFT} --val_dataset 'b.jsonl#9'\n", "b.jsonl: max_samples"),
    ],
)
def test_nothing_is_read_and_ignored(tmp_path: Path, config: Any, key: str) -> None:
    assert key in reasons(imported(tmp_path / "x.sh", config))


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({**LLAMA_FACTORY, "packing": True}, "keeps samples apart"),
        (AXOLOTL, "counts samples here, and packed rows there"),
        (f"{SFT}\n", "is the model's own there"),
        ({**LLAMA_FACTORY, "template": "qwen3_nothink"}, "thinking is off there"),
        (f"{SFT} --enable_thinking false\n", "thinking is off there"),
        ("trl sft --model_name_or_path b --dataset_name d\n", "trains all text of messages"),
        ("trl sft --model_name_or_path b --dataset_name d --use_peft\n", "are peft's for the model there"),
    ],
)
def test_differences_are_told(tmp_path: Path, config: Any, note: str) -> None:
    assert any(note in one for one in imported(tmp_path / "x.sh", config).notes)


def test_what_dataset_info_says_is_used_or_listed(tmp_path: Path) -> None:
    info = {"mine": {
        "file_name": "mine.json", "ranking": True, "formatting": "sharegpt", "script_url": "x.py",
        "columns": {"messages": "turns", "chosen": "good", "rejected": "bad", "images": "pictures"},
        "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "customer", "assistant_tag": "gpt"},
    }}  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    found = imported(tmp_path / "a.yaml", {**LLAMA_FACTORY, "stage": "dpo", "dataset": "mine"})
    assert found.values["data"]["train"]["columns"] == {"conversations": "turns", "chosen": "good", "rejected": "bad"}
    assert {"mine: columns.images", "mine: tags.user_tag", "mine: script_url"} <= left(found)
    assert not {"mine: tags.role_tag", "mine: ranking", "mine: formatting"} & left(found)
