"""PPO with trl 1.12, the last release with it: python trl_ppo.py SETTINGS.json.

Policy, reward and value model each have a network of their own there; policy and value learn with LoRA, the reference
is the policy without its adapter.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
tokenizer = AutoTokenizer.from_pretrained(given["base"], padding_side="left")
rows = [json.loads(line) for line in Path(given["data"]).read_text(encoding="utf-8").splitlines()]
ids = [tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)["input_ids"] for row in rows]
lora = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": given["targets"]}


def classifier() -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(given["base"], num_labels=1, dtype=torch.float32)


reward = PeftModel.from_pretrained(classifier(), given["reward"]).merge_and_unload()
value = get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS", **lora)).base_model.model
trainer = PPOTrainer(
    args=PPOConfig(**given["arguments"]),
    processing_class=tokenizer,
    model=AutoModelForCausalLM.from_pretrained(given["base"], dtype=torch.float32),
    ref_model=None,
    reward_model=reward,
    value_model=value,
    train_dataset=Dataset.from_dict({"input_ids": ids}),
    peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
)
trainer.train()
