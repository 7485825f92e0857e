"""What other tools (LLaMA-Factory, ms-swift, axolotl, trl, unsloth) call a recipe's keys, and what to write instead."""

from __future__ import annotations

from collections.abc import Container

FOREIGN_KEYS = {
    "model_name_or_path": "model.name", "base_model": "model.name", "model_id": "model.name",
    "model_path": "model.name", "adapter_name_or_path": "model.adapter",
    "torch_dtype": "model.dtype", "bf16": "model.dtype", "fp16": "model.dtype",
    "flash_attn": "model.attn_implementation", "attn_impl": "model.attn_implementation",
    "finetuning_type": "adapter.method", "train_type": "adapter.method", "tuner_type": "adapter.method",
    "peft_type": "adapter.method", "lora_rank": "adapter.r", "lora_r": "adapter.r", "rank": "adapter.r",
    "alpha": "adapter.lora_alpha", "dropout": "adapter.lora_dropout", "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules", "lora_modules_to_save": "adapter.modules_to_save",
    "additional_target": "adapter.modules_to_save", "rslora": "adapter.use_rslora", "peft_use_dora": "adapter.use_dora",
    "dataset": "data.train", "datasets": "data.train", "train_file": "data.train", "data_path": "data.train",
    "train_dataset": "data.train", "val_size": "data.eval_split", "val_set_size": "data.eval_split",
    "split_dataset_ratio": "data.eval_split", "test_size": "data.eval_split", "eval_dataset": "eval.data",
    "val_dataset": "eval.data", "cutoff_len": "data.max_length", "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length", "max_seq_len": "data.max_length", "model_max_length": "data.max_length",
    "sample_packing": "data.packing", "pack": "data.packing", "train_on_inputs": "data.train_on",
    "assistant_only_loss": "data.train_on", "truncation_strategy": "data.on_overlong",
    "lr": "train.learning_rate", "epochs": "train.num_train_epochs", "num_epochs": "train.num_train_epochs",
    "n_epochs": "train.num_train_epochs", "batch_size": "train.effective_batch_size",
    "global_batch_size": "train.effective_batch_size", "train_batch_size": "train.effective_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size", "accumulation_steps": "train.gradient_accumulation_steps",
    "warmup_ratio": "train.warmup_steps", "lr_scheduler": "train.lr_scheduler_type", "optimizer": "train.optim",
    "gradient_clipping": "train.max_grad_norm", "max_norm": "train.max_grad_norm",
    "neftune_alpha": "train.neftune_noise_alpha", "noisy_embedding_alpha": "train.neftune_noise_alpha",
    "label_smoothing": "train.label_smoothing_factor",
    "activation_checkpointing": "train.gradient_checkpointing", "group_by_len": "train.group_by_length",
    "random_seed": "train.seed", "early_stopping_steps": "train.early_stopping_patience",
    "output_dir": "output.dir", "save_dir": "output.dir", "out_dir": "output.dir", "max_tokens": "eval.max_new_tokens",
    "enable_thinking": "eval.thinking",
}  # fmt: skip
"""Their key -> ours with the same meaning."""

ADVICE = {
    "load_in_4bit": "write model: {quantization: int4}",
    "load_in_8bit": "write model: {quantization: int8}",
    **dict.fromkeys(("quantization_bit", "quant_bits"), "write model: {quantization: int4} or int8"),
    **dict.fromkeys(
        ("quant_method", "quantization_method"), "bitsandbytes is used; write model: {quantization: int4} or int8"
    ),
    "bnb_4bit_quant_type": "write model: {quantization: int4, quantization_type: nf4}",
    "bnb_4bit_compute_dtype": "write model: {dtype: bfloat16}",
    "extends": "write it at the top of a recipe's file",
    "template": "leave it out: the tokenizer's own chat template is used; model.chat_template names another",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "ddp_timeout"), "leave it out: a run uses one device so far"),
    "wandb_project": "write train: {report_to: [wandb]}, and set WANDB_PROJECT in the environment",
    "swanlab_project": "write train: {report_to: [swanlab]}, and set SWANLAB_PROJECT in the environment",
    **dict.fromkeys(("use_wandb", "use_swanlab"), "write train: {report_to: [wandb]} or [swanlab]"),
    "run_name": "leave it out: a tracker's run is called as the run directory",
    "do_sample": "write eval: {generation: {temperature: …}}: above 0 answers are drawn, 0 is greedy",
    "logging_dir": "leave it out: metrics.jsonl lies in the run directory",
    "plot_loss": "leave it out: loss.png is always written",
    "overwrite_output_dir": "leave it out and give --overwrite on the command line",
    "resume_from_checkpoint": "leave it out and give --resume on the command line",
    "do_train": "leave it out: the command says what is done (ft sft, ft eval, …)",
    "do_eval": "leave it out: with eval.data or data.eval_split the held-out loss is computed",
    "do_predict": "leave it out: `ft eval` answers held-out rows",
    "eval_strategy": "leave it out: set train.eval_steps, or nothing for the end of every epoch",
    "evaluation_strategy": "leave it out: set train.eval_steps, or nothing for the end of every epoch",
    "evals_per_epoch": "set train.eval_steps, or nothing for the end of every epoch",
    "save_strategy": "leave it out: set train.save_steps, or nothing for the end of every epoch",
    "saves_per_epoch": "set train.save_steps, or nothing for the end of every epoch",
    "metric_for_best_model": "leave it out: train.load_best_model_at_end looks at the held-out loss",
    "overwrite_cache": "leave it out: cached data is keyed by content; data.cache: false does without",
    "dataset_dir": "write the path into data.train",
    "preprocessing_num_workers": "leave it out: rows are tokenised in batches",
    "dataloader_num_workers": "leave it out: rows are tokenised before training",
    "trust_remote_code": "leave it out: code from a checkpoint is never run; ChatGLM2/3 and GLM-4 load natively",
    **dict.fromkeys(("mask_history", "last_turn_loss"), "write data: {train_on: last}"),
    "neat_packing": "write data: {packing: true}; a probe makes sure that packed samples do not see each other",
    "packing_strategy": "leave it out: write data: {packing: true}",
    "pref_loss": "write dpo: {loss_type: …}",
    **dict.fromkeys(("pref_beta", "rl_beta"), "write dpo: {beta: …}"),
    **dict.fromkeys(("pref_ftx", "rpo_alpha"), "write dpo: {sft_weight: …}"),
    "rl": "write stage: dpo (or kto) at the top of the recipe",
    "rlhf_type": "write stage: dpo (or kto, reward, ppo) at the top of the recipe",
    "reward_model": "write reward: {model: …}",
    "task_type": "leave it out: the stage says it",
    "inference_mode": "leave it out: an adapter in a recipe is trained",
    "fan_in_fan_out": "leave it out: it is found in the network",
    **dict.fromkeys(("use_unsloth", "enable_liger_kernel", "use_liger_kernel"), "leave it out"),
    **dict.fromkeys(("hub_model_id", "push_to_hub"), "leave it out: a run stays on this machine"),
}
"""Their key -> what to do where ours works otherwise."""


def foreign_name(key: str, known: Container[str]) -> str | None:
    """What to write instead of another tool's key, or None when it is nobody's.

    Args:
        known: our keys in this stage, dotted.
    """
    ours = FOREIGN_KEYS.get(key)
    if ours in known:
        note = " (a number below 1 is a fraction)" if key == "warmup_ratio" else ""
        return f"here it is called {ours}{note}"
    return ADVICE.get(key)
