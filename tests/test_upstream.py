"""What finetune/ uses of trl, transformers, peft and datasets without their promise: an upgrade fails here first.

Each row says why we need the name. A private name that stands in finetune/ and not here fails, too.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import trl
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import other as peft_names
from peft.utils.peft_types import PeftType
from sacrebleu.metrics.base import Metric as SACREBLEU
from transformers import core_model_loading
from transformers import modeling_gguf_pytorch_utils as gguf_loader
from transformers.integrations import ggml, integration_utils, moe
from transformers.integrations.gguf import gguf_config_mapping, gguf_tokenizer_mapping
from transformers.integrations.gguf import reader as gguf_reader
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

PACKAGE = Path(__file__).parents[1] / "finetune"
PARAMETERS = lora.layer.ParamWrapper
TRAINER, DPO, KTO = transformers.Trainer, trl.DPOTrainer, trl.KTOTrainer
OF_TRL = (trl.SFTTrainer, DPO, KTO, trl.RewardTrainer)

# (where it is defined, name, its parameters, why we need it)
METHODS: list[tuple[Any, str, tuple[Any, ...], str]] = [
    (TRAINER, "_get_train_sampler", ("self", "train_dataset"), "an order of samples that can be resumed"),
    (TRAINER, "_save_checkpoint", ("self", "model", "trial"), "a checkpoint is complete or not there"),
    (TRAINER, "_load_from_checkpoint", ("self", "resume_from_checkpoint", "model"), "states that peft does not save"),
    (TRAINER, "_load_best_model", ("self",), "the same, and a damaged best checkpoint is an error"),
    (TRAINER, "_run_epoch", ("self", ...), "a run whose steps are all taken takes no more"),
    (TRAINER, "_maybe_log_save_evaluate", ("self", "tr_loss", "grad_norm", ...), "a step that is no number is logged"),
    (TRAINER, "_determine_best_metric", ("self", "metrics", "trial"), "the metric may not be due, or missing"),
    (TRAINER, "get_batch_samples", ("self", "epoch_iterator", "num_batches", "device"), "all rows of a step"),
    (TRAINER, "prediction_step", ("self", "model", "inputs", ...), "figures of each held-out batch"),
    (TRAINER, "evaluation_loop", ("self", "dataloader", ...), "figures over all held-out rows"),
    (TRAINER, "create_accelerator_and_postprocess", ("self",), "loss scaling on CPUs"),
    (TRAINER, "get_train_dataloader", ("self",), "rows shared out to several processes"),
    (TRAINER, "get_eval_dataloader", ("self", "eval_dataset"), "the same of held-out rows"),
    (TRAINER, "_get_num_items_in_batch", ("self", "batch_samples", "device"), "spare rows do not count"),
    (TRAINER, "save_model", ("self", "output_dir", "_internal_call"), "weights in parts are saved whole"),
    (TRAINER, "_save", ("self", "output_dir", "state_dict"), "the same"),
    (TRAINER, "_save_optimizer_and_scheduler", ("self", "output_dir"), "the same of the optimizer's state"),
    (TRAINER, "_load_optimizer_and_scheduler", ("self", "checkpoint"), "the same, back into parts"),
    (TRAINER, "_save_rng_state", ("self", "output_dir"), "the first process writes those of all"),
    (TRAINER, "_load_rng_state", ("self", "checkpoint"), "who computes a pass together draws the same"),
    (SACREBLEU, "_extract_corpus_statistics", ("self", "hypotheses", "references"), "rows are drawn for an interval"),
    (SACREBLEU, "_compute_score_from_stats", ("self", "stats"), "the same: the figure of drawn rows is of their sum"),
    (DPO, "_prepare_dataset", ("self", "dataset", ...), "rows are token ids already"),
    (KTO, "_prepare_dataset", ("self", "dataset", ...), "rows are token ids already"),
    (KTO, "_compute_kl_logps", ("self", "model", "batch"), "the KL term is that of the step, not of the pass"),
    (KTO, "_compute_loss", ("self", "model", "inputs", "return_outputs"), "its rows stand side by side on CPUs"),
    (DPO, "compute_ref_log_probs", ("self", "model", "inputs"), "the reference is scored by the policy's own pass"),
    (KTO, "compute_ref_log_probs", ("self", "model", "inputs"), "the same"),
    (BaseTuner, "_pre_injection_hook", ("self", "model", "config", "adapter_name"), "targets of our own tuners"),
    (BaseTuner, "_prepare_adapter_config", ("self", "peft_config", "model_config"), "our tuners know their targets"),
    (BaseTuner, "_create_and_replace", ("self", ...), "how our tuners wrap a layer"),
    (BaseTuner, "_replace_module", ("self", "parent", "child_name", "new_module", "child"), "the same"),
    (BaseTunerLayer, "_move_adapter_to_device_of_base_layer", ("self", "adapter_name", ...), "where a layer is"),
    (PARAMETERS, "_get_in_out_features", ("self", "module"), "LoRA on experts in 4 bits: their real shape"),
    (PARAMETERS, "_activate_lora", ("self", "active_adapters"), "the same: the update beside the weight"),
    (LoraConfig, "_register_custom_module", ("self", "mapping"), "the same: peft's documented way to bring a layer"),
    (Bnb4BitHfQuantizer, "_process_model_before_weight_loading", ("self", "model", "device_map", ...), "4-bit experts"),
    (Bnb4BitHfQuantizer, "_dequantize", ("self", "model", "dtype"), "4-bit experts, unpacked for merging"),
    (BaseTunerLayer, "_cast_input_dtype", ("self", "x", "dtype"), "our layers compute in their own precision"),
    (peft_names, "get_pattern_key", ("pattern_keys", "key_to_match"), "the rank and scale of a single layer, exported"),
    (gguf_loader, "get_gguf_hf_weights_map", ("hf_model", "processor", ...), "weights of a GGUF file without a place"),
    (gguf_reader, "read_gguf_metadata", ("gguf_path", "string_arrays"), "the vocabulary of a GGUF file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "name", "parameters", "why"), METHODS, ids=[f"{owner.__name__}.{name}" for owner, name, *_ in METHODS]
)
def test_methods(owner: Any, name: str, parameters: tuple[Any, ...], why: str) -> None:
    found = tuple(inspect.signature(getattr(owner, name)).parameters)
    wanted = parameters[:-1] if parameters[-1] is ... else parameters
    assert found[: len(wanted)] == wanted, why
    assert parameters[-1] is ... or len(found) == len(wanted), why


# name -> (pattern in the source of the class or module, why we need it)
IN_THE_SOURCE: dict[str, tuple[Any, str, str]] = {
    "_tr_loss": (TRAINER, r"self\._tr_loss = torch\.tensor\(0\.0", "the loss since the last log, for checkpoints"),
    "_total_loss_scalar": (TRAINER, r"self\._total_loss_scalar = 0\.0", "the mean loss of a run that goes on"),
    "_globalstep_last_logged": (TRAINER, r"self\._globalstep_last_logged = self\.state\.global_step", "the same"),
    "_initial_global_step": (
        TRAINER, r"num_steps_trained = self\.state\.global_step - self\._initial_global_step", "the same",
    ),
    "_n_gpu": (transformers.TrainingArguments, r"return self\._n_gpu", "one device, whatever else is there"),
    "_weight_conversions": (
        core_model_loading, r'getattr\(model, "_weight_conversions", None\)', "what is converted is saved as stock",
    ),
    "_can_checkpoint_with_cache": (
        GradientCheckpointingLayer, r"if not self\._can_checkpoint_with_cache", "prefixes live in the cache",
    ),
    "_experts_implementation": (
        moe, r"get_interface\(self\.config\._experts_implementation, original_forward\)",
        "experts are summed in float64, which grouped products lack",
    ),
    "_attn_implementation": (
        transformers.PreTrainedConfig, r"self\._attn_implementation = ", "whether documents may have any length",
    ),
    "_wandb": (integration_utils, r"self\._wandb = wandb", "recipe and result go to the run that transformers began"),
    "_log_model": (integration_utils, r"self\._log_model = WandbLogModel", "whether the weights go there, too"),
    "_swanlab": (integration_utils, r"self\._swanlab = swanlab", "as wandb"),
    "_trackio": (integration_utils, r"self\._trackio = trackio", "as wandb"),
    "_ml_flow": (integration_utils, r"self\._ml_flow = mlflow", "as wandb"),
    "_apply_gate": (
        moe, r"experts_class\._apply_gate = _default_apply_gate", "what experts compute between their two products",
    ),
    "_disable_adapters": (BaseTunerLayer, r"self\._disable_adapters", "peft's state of a layer"),
    "_active_adapter": (BaseTunerLayer, r"self\._active_adapter", "peft's state of a layer"),
    "_use_triton": (
        trl.trainer.utils, r"compact = _use_triton\(hidden_states\.device\)", "only trained positions are scored",
    ),
    "_tp_size": (
        trl.SFTTrainer, r"num_tokens_in_batch // self\._tp_size", "each process counts its own, of the same rows",
    ),
    "_device_mesh": (
        lora.model, r'device_mesh = getattr\(model, "_device_mesh", None\)', "LoRA on layers that lie in parts",
    ),
    "_fingerprint": (datasets.Dataset, r"self\._fingerprint", "packed rows are kept under the name of their content"),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_THE_SOURCE)
def test_attributes(name: str) -> None:
    owner, pattern, why = IN_THE_SOURCE[name]
    assert re.search(pattern, inspect.getsource(inspect.getmodule(owner) or owner)), why


def test_trl_asks_for_triton_only_to_leave_positions_out() -> None:
    """`loss_parts.score_trained_positions` answers yes. Kernels that need Triton ask elsewhere."""
    assert inspect.getsource(trl.trainer.utils).count("_use_triton(") == 1


# What the model of `ft eval --tasks` does itself: name -> its arguments in lm-evaluation-harness.
HARNESS: dict[str, tuple[str, ...]] = {
    "_model_call": ("self", "inps", "attn_mask", "labels"), "_encode_pair": ("self", "context", "continuation"),
    "apply_chat_template": ("self", "chat_history", "add_generation_prompt"),
    "tok_batch_encode": ("self", "strings", "padding_side", "left_truncate_len", "truncation"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARNESS)
def test_the_harness_asks_through_these(name: str) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    assert tuple(inspect.signature(getattr(huggingface.HFLM, name)).parameters) == HARNESS[name]


@pytest.mark.parametrize("trainer", OF_TRL)
def test_trl_counts_in_these(trainer: type) -> None:
    """`_metrics` and `_total_train_tokens` are read for the run's figures and kept in checkpoints."""
    source = inspect.getsource(trainer)
    assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source
    assert "self._total_train_tokens = 0" in source


def test_what_is_wrong_with_layers_in_parts() -> None:
    """`models.tensor_parallel` makes up for it; where it is mended, that can go."""
    from peft.tuners import tuners_utils
    from transformers.distributed import tensor_parallel

    narrow = inspect.getsource(tuners_utils._get_in_out_features)
    assert "out_features, in_features = module.weight.to_local().shape" in narrow, "LoRA is as wide as a part"
    wide = inspect.getsource(tensor_parallel.RowwiseParallel.transform_inputs_pre_forward)
    assert "self._from_local_last_dim_shard(x, mesh, module.in_features)" in wide, "and read as if it were the whole"
    summed = inspect.getsource(tensor_parallel.ReplicatedWithGradAllReduce)
    assert "dist.all_reduce(param.grad" in summed, "norms' gradients, with those of the passes before"
    assert "and not args.save_only_model" in inspect.getsource(TRAINER.__init__), "no optimizer is saved"


@pytest.mark.parametrize("trainer", OF_TRL)
def test_trl_rounds_what_requires_a_gradient(trainer: type) -> None:
    """On quantized bases, to bfloat16; `trainers.unrounded` hides it from this loop. Without the loop it can go."""
    rounds = (
        "        if _is_quantized_model:\n            for name, param in model.named_parameters():\n"
        '                if param.requires_grad and "lora_magnitude_vector" not in name:\n'
        "                    param.data = param.data.to(torch.bfloat16)\n"
    )
    assert rounds in inspect.getsource(trainer.__init__)


@pytest.mark.parametrize("trainer", [DPO, KTO])
def test_trl_makes_no_reference_where_one_is_given(trainer: type) -> None:
    """`reference.NoReference` stands there: no adapter "ref" is added, and with columns it is never asked."""
    init = inspect.getsource(trainer.__init__)
    assert "elif is_peft_model(model) and ref_model is None:" in init
    assert init.count('model.add_adapter("ref"') == 1
    assert "        else:\n            self.ref_model = ref_model\n" in init
    assert "self.precompute_ref_logps = args.precompute_ref_log_probs" in init
    loss = inspect.getsource(trainer._compute_loss)
    assert loss.index("if self.precompute_ref_logps:") < loss.index("self.ref_model")
    scoring = inspect.getsource(trainer.compute_ref_log_probs)
    assert "if self.ref_model is None and is_peft_model(self.model):" in scoring, "else the model is scored as it is"


def test_trl_takes_the_mean_of_the_kl_term() -> None:
    """`Kto` gives it that of the step; two rows in a pass are asked for only with the KL term."""
    assert "kl = (KL_logps - ref_KL_logps).mean().detach()" in inspect.getsource(KTO._compute_loss)
    init = inspect.getsource(KTO.__init__)
    assert 'calculate_kl = args.loss_type not in ["apo_zero_unpaired"]' in init
    assert "if self.calculate_KL and args.per_device_train_batch_size <= 1:" in init


@pytest.mark.parametrize("trainer", [DPO, KTO])
def test_trl_reads_the_columns(trainer: type) -> None:
    """ref_… and KL_… are no arguments of the model, and the loss of the fused head has these names."""
    source = inspect.getsource(trainer)
    names = ("ref_chosen_logps", "ref_rejected_logps") if trainer is DPO else ("ref_logps", "ref_KL_logps")
    assert all(f'"{name}"' in source for name in names)
    assert "fused_lm_head=True" in source
    assert ".log_probs" in source


def test_swanlab_has_no_run_to_ask_for() -> None:
    """`tracking.begin_swanlab` starts one first: transformers asks for it, and swanlab raises where there is none."""
    begins = inspect.getsource(integration_utils.SwanLabCallback.setup)
    assert begins.index("if self._swanlab.get_run() is None:") < begins.index("self._swanlab.init(")
    swanlab = pytest.importorskip("swanlab", reason="pip install '.[trackers]'")
    assert not swanlab.has_run()
    with pytest.raises(RuntimeError, match=r"(?i)no active run"):
        swanlab.get_run()


def test_llama4_names_a_backbone_that_is_not_there() -> None:
    """`native.load_weights` gives it the right name, under which trl's fused head finds it."""
    assert transformers.Llama4ForCausalLM.base_model_prefix == "language_model"
    assert "self.model = Llama4TextModel(config)" in inspect.getsource(transformers.Llama4ForCausalLM.__init__)


def test_trl_reads_the_number_of_experts_under_one_name() -> None:
    """`loss_parts.balances` leaves the loss out where it has another."""
    source = inspect.getsource(trl.trainer.utils.add_fused_lm_head)
    assert "num_experts = text_config.num_experts\n" in source
    assert "num_experts_per_tok = text_config.num_experts_per_tok\n" in source


def test_peft_takes_new_methods() -> None:
    """`tuners.base.add_type` adds a member to this enum, as peft's own `register_peft_method` accepts no other name."""
    assert PeftType._member_map_["LORA"] is PeftType._value2member_map_["LORA"] is PeftType.LORA
    assert "LORA" in PeftType._member_names_
    assert isinstance(PeftType.LORA, str)


def test_transformers_lists_what_it_reads_of_gguf() -> None:
    """Other architectures, tokenizers and splits of GGUF files are refused by name."""
    assert {"llama", "qwen2", "gemma3"} <= set(ggml.GGUF_CONFIG_MAPPING)
    assert {"qwen35", "lfm2"} <= set(gguf_config_mapping.GGUF_CONFIG_ARCHS)
    assert {"gpt2", "llama"} <= set(gguf_tokenizer_mapping.GGUF_TOKENIZER_TYPES)
    splits = set(gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS)
    assert "qwen2" in splits
    assert "smollm" not in splits, "checks.DIGIT_SPLITS can go"
    assert {"llama", "gemma3"} <= set(gguf_loader.TENSOR_PROCESSORS)


def test_peft_asks_for_the_layer_of_a_parameter() -> None:
    """`experts_lora.on_experts` is asked before peft's own layers, and known by the name of its class."""
    make = inspect.getsource(lora.LoraModel._create_new_module)
    assert make.index("config._custom_modules.items()") < make.index("dispatch_bnb_4bit")
    assert '__class__.__name__ == "ParamWrapper"' in inspect.getsource(BaseTuner._inject_parameters)
    assert "_param_ndim" in inspect.getsource(PARAMETERS.update_layer)


def test_transformers_multiplies_by_groups() -> None:
    assert [*inspect.signature(moe._grouped_linear).parameters] == ["input", "weight", "offs", "bias", "is_transposed"]
    flags = inspect.getsource(moe.use_experts_implementation)
    assert all(f"self.{name} = {name}" in flags for name in ("has_gate", "has_bias", "is_transposed"))


def test_torch_maps_over_trees() -> None:
    """Arguments of a layer to another device, in merging."""
    from torch.utils._pytree import tree_map

    assert tree_map(lambda x: x + 1, {"a": (1, 2)}) == {"a": (2, 3)}


OF_TORCH = {
    "_buffers", "_parameters", "_cdata", "_overloadpacket", "_grouped_mm",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
}  # fmt: skip
"""What planning reads, which goes through a pass op by op."""


def test_torch_names_its_ops_and_storages() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import flop_registry

    layer, aten = torch.nn.Linear(2, 3), torch.ops.aten
    assert {*layer._parameters} == {"weight", "bias"}
    assert layer._buffers == {}
    assert layer.weight.untyped_storage()._cdata == layer.weight.detach().untyped_storage()._cdata
    assert aten.mm.default._overloadpacket is aten.mm
    assert aten.addmm in flop_registry
    attends = [aten._scaled_dot_product_flash_attention_for_cpu, aten._grouped_mm]
    assert all("default" in packet.overloads() for packet in attends)
    back = str(aten._scaled_dot_product_flash_attention_for_cpu_backward.default._schema)
    assert "grad_out, Tensor query, Tensor key" in back, "queries and keys are the second and third argument"
    with FakeTensorMode():
        assert torch.empty(2, 3).untyped_storage().nbytes() == 24


def private_names() -> dict[str, list[str]]:
    """Names with one underscore that finetune/ reads of others: {name: files}."""
    own: set[str] = set()
    of_self, of_others = [], []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                mine = isinstance(node.value, ast.Name) and node.value.id == "self"
                (of_self if mine else of_others).append((node.attr, file.name))
                if mine and isinstance(node.ctx, ast.Store):
                    own.add(node.attr)
    found: dict[str, list[str]] = {}
    for name, file in of_others + [entry for entry in of_self if entry[0] not in own]:
        found.setdefault(name, []).append(file)
    return found


def test_every_private_name_is_here() -> None:
    of_python = {"_exit", "_replace", "_name_", "_value_"}  # os, namedtuple, enum
    known = of_python | {name for _, name, _, _ in METHODS} | set(IN_THE_SOURCE) | set(HARNESS)
    known |= OF_TORCH
    known |= {"_metrics", "_total_train_tokens", "_member_map_", "_value2member_map_", "_member_names_"}
    assert {name: files for name, files in private_names().items() if name not in known} == {}


def test_what_is_private_is_seen() -> None:
    assert {"_replace_module", "_weight_conversions", "_fingerprint", "_member_map_"} <= set(private_names())
