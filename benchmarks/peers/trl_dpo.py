"""A bare trl script, as its documentation writes them: python trl_dpo.py SETTINGS.json."""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=given["targets"], task_type="CAUSAL_LM")
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(given["base"], dtype=getattr(torch, given["dtype"])),
    args=DPOConfig(**given["arguments"]),
    train_dataset=load_dataset("json", data_files=given["data"], split="train"),
    processing_class=AutoTokenizer.from_pretrained(given["base"]),
    peft_config=lora,
)
trainer.train()
