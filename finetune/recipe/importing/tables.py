"""Keys of other tools: what they are here, and why some are nothing here.

Names that mean the same stand in `foreign_keys` already; keys that are called as ours are not listed at all.
"""

from __future__ import annotations

from typing import Any

from finetune.recipe.importing.source import AXOLOTL, LLAMA_FACTORY, SWIFT, TRL

NAMES = {
    "model": "model.name", "model_revision": "model.revision", "revision_of_model": "model.revision",
    "model_name_or_path": "model.name", "use_rslora": "adapter.use_rslora", "use_dora": "adapter.use_dora",
    "lora_use_dora": "adapter.use_dora", "lora_use_rslora": "adapter.use_rslora",
    "peft_use_rslora": "adapter.use_rslora",
    "lorap_lr_ratio": "adapter.loraplus_lr_ratio", "init_weights": "adapter.init_lora_weights",
    "eval_batch_size": "train.per_device_eval_batch_size",
    "bnb_4bit_quant_type": "model.quantization_type",
    "kto_chosen_weight": "kto.desirable_weight", "kto_rejected_weight": "kto.undesirable_weight",
    "desirable_weight": "kto.desirable_weight", "undesirable_weight": "kto.undesirable_weight",
    "cosine_min_lr_ratio": "train.lr_min_ratio",
    "early_stop_interval": "train.early_stopping_patience", "rope_scaling": "model.rope_scaling",
}  # fmt: skip
"""Beside those of `foreign_keys`."""

OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw", "adamw_apex_fused"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), "adamw_8bit"),
    **dict.fromkeys(("paged_adamw_32bit", "paged_adamw"), "paged_adamw"), "paged_adamw_8bit": "paged_adamw_8bit",
    "adafactor": "adafactor", "sgd": "sgd", "lion_8bit": "lion_8bit", "muon": "muon",
}  # fmt: skip
ATTENTION = {
    "fa2": "flash_attention_2", "flash_attn": "flash_attention_2", "flash_attention_2": "flash_attention_2",
    "sdpa": "sdpa", "eager": "eager", "disabled": "eager",
}  # fmt: skip
METHODS = {
    "lora": "lora", "qlora": "lora", "full": "full", "none": "full", "oft": "oft", "adalora": "adalora", "ia3": "ia3",
    "vera": "vera", "freeze": "last_layers", "": "full",
}  # fmt: skip

USUAL: dict[str, dict[str, Any]] = {
    LLAMA_FACTORY: {
        "train.learning_rate": 5e-5, "train.lr_scheduler_type": "linear", "train.warmup_steps": 0.0, "adapter.r": 8,
        "adapter.num_layers": 2, "reward.center_rewards_coefficient": 0.0, "micro": 8, "accumulation": 1,
    },
    AXOLOTL: {
        "train.warmup_steps": 0.03, "train.lr_scheduler_type": "cosine", "train.num_train_epochs": 1,
        "data.max_length": 512, "data.on_overlong": "drop", "reward.center_rewards_coefficient": 0.0, "accumulation": 1,
    },
    SWIFT: {
        "train.learning_rate": 1e-4, "train.lr_scheduler_type": "cosine", "train.warmup_steps": 0.0,
        "train.weight_decay": 0.1, "train.adam_beta2": 0.95, "data.on_overlong": "drop", "adapter.r": 8,
        "adapter.lora_dropout": 0.05, "reward.center_rewards_coefficient": 0.0, "micro": 1,
    },
    TRL: {
        "train.learning_rate": 2e-5, "train.lr_scheduler_type": "linear", "train.warmup_steps": 0.0,
        "data.max_length": 1024, "adapter.lora_dropout": 0.05, "reward.center_rewards_coefficient": 0.0, "micro": 8,
        "accumulation": 1,
    },
}  # fmt: skip
"""What a tool takes where its config is silent, and we would take something else; `micro` and `accumulation` make
effective_batch_size; ms-swift makes as many passes as 16 rows take.
(Defaults of LLaMA-Factory 0.9, axolotl 0.21, ms-swift 4, trl 1.16.)"""

SPEED = "changes speed or memory, not what is learned; a run does without"
DEVICES = "a run uses one device so far"
EYES = "only text is read here: no images, sound or video"
OWN = "the tokenizer's own chat template and tokens are used (model.chat_template names another)"
HERE = "is decided here, and is none of a recipe's keys"
WHERE = "results go to output.dir, figures to metrics.jsonl there"

REASONS = {
    **dict.fromkeys((
        "tf32", "use_liger_kernel", "enable_liger_kernel", "liger_rope", "liger_rms_norm", "liger_glu_activation",
        "liger_layer_norm", "liger_fused_linear_cross_entropy", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel",
        "use_unsloth", "use_unsloth_gc", "padding_free", "pad_to_sequence_len", "use_kernels", "low_cpu_mem_usage",
        "gradient_checkpointing_kwargs", "use_reentrant_gc", "activation_offloading", "flash_optimum",
        "use_logits_to_keep",
        "cut_cross_entropy", "eval_sample_packing", "lazy_tokenize", "use_cce", "torch_compile_backend", "plugins",
        "double_quantization", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "quantize_moe_experts",
        "bnb_config_kwargs", "upcast_layernorm", "xformers_attention", "torchdistx_path", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "skip_memory_metrics",     ), SPEED),
    **dict.fromkeys((
        "deepspeed", "fsdp", "fsdp_config", "fsdp_version", "ddp_timeout", "ddp_find_unused_parameters", "ddp_backend",
        "context_parallel_size", "sequence_parallel_size", "tensor_parallel_size", "dp_shard_size", "nproc_per_node",
        "nnodes", "node_rank", "master_addr", "master_port", "use_ray", "ray_num_workers", "ray_run_name",
        "resources_per_worker", "placement_strategy", "ray_storage_path", "ray_storage_filesystem",
    ), DEVICES),
    **dict.fromkeys((
        "image_max_pixels", "image_min_pixels", "video_max_pixels", "video_fps", "video_maxlen", "freeze_vit",
        "freeze_aligner", "freeze_vision_tower", "freeze_multi_modal_projector", "processor_type", "vit_lr",
        "aligner_lr",
        "media_dir", "max_pixels", "freeze_mm_modules", "freeze_language_model",
    ), EYES),
    **dict.fromkeys((
        "template", "chat_template", "chat_template_jinja", "special_tokens", "eot_tokens", "tokens", "tokenizer_type",
        "tokenizer_use_fast", "tokenizer_legacy", "model_type", "use_chat_template", "use_fast_tokenizer",
        "tokenizer_use_mistral_common", "agent_template", "is_llama_derived_model",
    ), OWN),
    **dict.fromkeys(("system", "default_system"), "rows bring their own system turns; write it into them"),
    **dict.fromkeys((
        "save_strategy", "eval_strategy", "evaluation_strategy", "logging_strategy", "saves_per_epoch",
        "evals_per_epoch",
    ), "set train.save_steps or train.eval_steps, or nothing for the end of every epoch"),
    **dict.fromkeys((
        "wandb_name", "wandb_entity", "wandb_watch", "wandb_log_model", "wandb_run_id", "run_name", "wandb_mode",
        "swanlab_experiment_name", "swanlab_description", "swanlab_mode", "swanlab_run_name", "trackio_project_name",
        "trackio_run_name", "trackio_space_id", "swanlab_log_completions",
    ), "a tracker's own environment variables say it; its run is called as the run directory"),
    **dict.fromkeys((
        "preprocessing_num_workers", "dataset_num_proc", "dataloader_num_workers", "overwrite_cache",
        "load_from_cache_file",
        "dataset_prepared_path", "tokenized_path", "dataset_processes", "data_seed", "dataloader_drop_last",
        "skip_prepare_dataset", "remove_unused_columns", "shuffle_merged_datasets", "dataset_shuffle",
    ), "rows are tokenised at the start, in batches, and kept by content"),
    **dict.fromkeys((
        "overwrite_output_dir", "resume_from_checkpoint", "auto_resume_from_checkpoints",
    ), "is said on the command line: --overwrite, --resume"),
    **dict.fromkeys((
        "do_train", "do_eval", "do_predict", "predict_with_generate", "task_type", "inference_mode", "use_peft",
        "merge_lora", "peft_type", "label_names", "finetune", "strict",
    ), "the command says what is done"),
    **dict.fromkeys(("plot_loss", "logging_dir", "add_version", "save_only_model", "save_safetensors",
    "logging_first_step",
                     "include_num_input_tokens_seen", "log_level", "disable_tqdm", "create_new_adapter",
                     "report_dir", "gc_steps", "debug"), WHERE),
    **dict.fromkeys(("model_author", "model_name"), "is for a model's self-introduction rows of ms-swift"),
    **dict.fromkeys(("adam_epsilon", "adam_eps"), "is 1e-8 here"),
    **dict.fromkeys(("trust_remote_code",), "code from a checkpoint is never run"),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "push_dataset_to_hub", "hub_strategy", "hf_use_auth_token",
                     "hub_private_repo"), "a run stays on this machine; `ft merge --push-to-hub` publishes"),
    **dict.fromkeys(("loss_watchdog_threshold", "loss_watchdog_patience"),
    "a loss that is no number stops a run by itself"),
    **dict.fromkeys(("lora_fan_in_fan_out", "fan_in_fan_out"), "is found in the network"),
    "resize_token_embeddings_to_32x": "embeddings keep the size that the base gives them",
    "use_hf": HERE, "lora_bias": HERE,
}  # fmt: skip
"""Their key -> why it is nothing here."""
