"""The plan against real tensors: the same pass with numbers, and a run of ft; what fits, and what is said."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ft, train
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer

from finetune.adapters.methods import METHODS
from finetune.commands import plan
from finetune.errors import UserError
from finetune.models import sources
from finetune.planning import cards, fits, network, sizing, source
from finetune.planning.memory import estimate, timeline
from finetune.planning.passes import traced
from finetune.planning.tracker import Tracker
from finetune.recipe.file import check, load
from finetune.recipe.resolve import Hardware, resolve
from finetune.recipe.sections import PretrainModelConfig
from finetune.recipe.stages import SftRecipe

pytestmark = pytest.mark.whole
SHAPE: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 96, "vocab_size": 300, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "sft", {}),
    "full, recomputed, bfloat16": ("qwen2", "sft", {
        "adapter": {"method": "full"}, "train": {"gradient_checkpointing": True},
        "model": {"name": "tiny-llama", "dtype": "bfloat16"}}),
    "eager attention": ("qwen2", "sft", {
        "model": {"name": "tiny-llama", "dtype": "bfloat16", "attn_implementation": "eager"}}),
    "dpo": ("llama", "dpo", {}),
    "smoothed": ("llama", "sft", {"train": {"label_smoothing_factor": 0.1}}),
    "bitfit": ("qwen2", "sft", {"adapter": {"method": "bitfit"}}),
    "loha": ("llama", "sft", {"adapter": {"method": "loha", "r": 4}}),
    "lokr": ("llama", "sft", {"adapter": {"method": "lokr", "r": 4}}),
    "ppo": ("llama", "ppo", {"reward": {"functions": ["x.py:f"]}, "ppo": {"max_new_tokens": 8}}),
}  # fmt: skip


def recipe(stage: str = "sft", machine: Hardware = Hardware(), **sections: Any) -> Any:
    values = {
        "version": 1, "stage": stage, "model": {"name": "tiny-llama", "dtype": "float32"}, "output": {"dir": "r"},
        "data": {"train": "d", "max_length": 64}, **sections,
    }  # fmt: skip
    return resolve(check(values, stage), machine)


def skeleton(kind: str, **more: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **more}))


@pytest.mark.parametrize("name", CASES)
def test_a_pass_without_numbers_is_one_with_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, stage, sections = CASES[name]
    made = recipe(stage, **sections)
    planned = traced(network.build(made, skeleton(kind)), made, 2, 32)
    monkeypatch.setattr(network, "FakeTensorMode", contextlib.nullcontext)
    real = network.build(made, skeleton(kind))
    with torch.no_grad():
        for tensor in [*real.model.parameters(), *real.model.buffers()]:
            tensor.fill_(0.01)
    assert planned == traced(real, made, 2, 32)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "other"])
def test_every_method_is_planned(method: str) -> None:
    more = {"oft_block_size": 16} if method == "oft" else {}
    made = recipe(adapter={"method": method, **more}, train={"max_steps": 100})
    assert traced(network.build(made, skeleton("llama")), made, 2, 32)


def test_ids_of_a_new_network_are_its_tokenizer_s() -> None:
    """GLM's own lie beyond a small vocabulary."""
    config = {"model_type": "glm", **SHAPE, "head_dim": 12}
    del config["pad_token_id"]
    model = PretrainModelConfig(name="mine", tokenizer="t", config=config)
    assert source.skeleton(model).config.pad_token_id is None


def test_the_vocabulary_of_a_new_network_is_its_tokenizer_s(base: Path) -> None:
    """Not that of its config class, LLaMA's 32,000; builtin:world makes the one of tiny-llama."""
    config = {"model_type": "llama", **{key: value for key, value in SHAPE.items() if key != "vocab_size"}}
    for tokenizer, made in ((str(base), base), ("builtin:world", sources.BUILTIN_MODELS / "tiny-llama")):
        model = PretrainModelConfig(name="mine", tokenizer=tokenizer, config=config)
        rows = source.skeleton(model).get_input_embeddings().weight.shape[0]
        assert rows == len(AutoTokenizer.from_pretrained(made))


@pytest.mark.parametrize(("method", "kind"), [("full", "int4"), ("loha", "int4"), ("lokr", "int8")])
def test_what_training_refuses_has_no_plan(tmp_path: Path, method: str, kind: str) -> None:
    words = ["--set", f"adapter.method={method}", "--set", f"model.quantization={kind}"]
    done = ft("plan", "quickstart", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert "model.quantization: " in done.stderr


def test_blocks_stand_for_their_kind() -> None:
    """Three kinds of blocks, and the whole is what it is when each block is gone through."""
    made = recipe()
    found = network.build(made, skeleton("gemma3_text", num_hidden_layers=9, head_dim=12, sliding_window=16))
    assert len(found.kinds) == 9
    assert len(found.blocks) < 9
    every = network.build(made, skeleton("llama", num_hidden_layers=2))
    assert every.kinds == [0, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_few_blocks_give_what_all_of_them_give(
    dtype: str, again: bool, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Level and peak at every block, of a pass through all: of the states only the last go with the head."""
    made = recipe(model={"name": "tiny-llama", "dtype": dtype}, adapter={"method": method},
                  train={"gradient_checkpointing": again})  # fmt: skip
    few = network.build(made, skeleton("llama", num_hidden_layers=6))
    found = timeline(few, made, 2, 32)
    every = (str(n) for n in itertools.count())
    monkeypatch.setattr(network, "kind_of", lambda block: next(every))
    whole = network.build(made, skeleton("llama", num_hidden_layers=6))
    assert (len(few.blocks), len(whole.blocks)) == (2, 6)
    expected = timeline(whole, made, 2, 32)
    assert [moment[1:] for moment in found] == [moment[1:] for moment in expected]
    assert all(moment.level >= moment.gradients for moment in found)


def test_the_peak_of_a_run(recipe_of_smol: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Real training through ft, seen op by op: within 15%."""
    path = recipe_of_smol()
    made = resolve(load(str(path), SftRecipe), Hardware())
    from finetune.planning.source import skeleton as of

    plan = estimate(network.build(made, of(made.model)), made, 8, 64, "cpu", fits.accumulation(made))
    peaks, step = [], Trainer.training_step

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracker = Tracker([*self.model.parameters(), *self.model.buffers()])
        with tracker:
            tracker.mark("step")
            found = step(self, *args, **kwargs)
        peaks.append(tracker.high)
        return found

    monkeypatch.setattr(Trainer, "training_step", watched)
    train(path)
    going = sum(plan.parts[part] for part in ("gradients", "activations", "logits"))
    assert max(peaks) == pytest.approx(going, rel=0.15)


@pytest.fixture
def recipe_of_smol(recipe: Callable[..., Path]) -> Callable[..., Path]:
    def write() -> Path:
        rows = Path(recipe().parent / "long.jsonl")
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 90}]
        rows.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(16)), encoding="utf-8")
        return recipe(data={"train": str(rows), "max_length": 64, "train_on": "all"})

    return write


@pytest.mark.parametrize("limit", [0, 5, 30, 171, 400, 10_000])
def test_the_most_that_fits(limit: int) -> None:
    def peak(n: int) -> int:
        return 5 + n * n // 3 + 2 * n

    assert fits.most(peak, limit, 40) == max((n for n in range(1, 41) if peak(n) <= limit), default=0)


def test_rows_follow_the_memory() -> None:
    base = skeleton("llama", hidden_size=256, num_hidden_layers=8, intermediate_size=1024, vocab_size=32_000)
    raw = recipe(train={"effective_batch_size": 64}, data={"train": "d", "max_length": 512})
    rows = {}
    for gb in (2.0, 3.0, 24.0):
        machine = Hardware("cuda", True, gb)
        rows[gb] = sizing.rows_of(network.build(raw, base), raw, machine)
    assert 1 <= rows[2.0] < rows[3.0] < rows[24.0] == 64
    found = network.build(raw, base)
    limit = fits.budget(Hardware("cuda", True, 3.0))
    assert estimate(found, raw, rows[3.0], 512, "cuda", 2).peak <= limit
    assert estimate(found, raw, rows[3.0] + 4, 512, "cuda", 2).peak > limit


def test_what_is_unset_is_planned_and_what_is_set_stays() -> None:
    values: dict[str, Any] = {
        "version": 1, "stage": "sft", "model": {"name": "tiny-llama"}, "output": {"dir": "r"},
        "data": {"train": "d", "max_length": 256}, "train": {"effective_batch_size": 64},
    }  # fmt: skip
    machine = Hardware("cpu", False, 2.2)
    few, found = sizing.sized(check(values, "sft"), machine)
    assert few.rows is not None
    assert found is not None
    assert 0 < few.rows < 64
    made = resolve(check(values, "sft"), few)
    micro, passes = made.train.per_device_train_batch_size, made.train.gradient_accumulation_steps
    assert micro is not None
    assert micro <= few.rows
    assert micro * (passes or 0) == 64, "the effective batch is kept"
    values["train"] |= {"per_device_train_batch_size": 64}
    assert sizing.sized(check(values, "sft"), machine) == (machine, None)


def test_training_takes_the_rows_that_fit(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.models import hardware
    from finetune.planning.source import skeleton as of
    from finetune.training.session import prepare

    loaded = load(str(recipe(data={"max_length": 128}, train={"effective_batch_size": 64})), SftRecipe)
    made = resolve(loaded, Hardware())
    eight = estimate(network.build(made, of(made.model)), made, 8, 128, "cpu", 2).peak
    for rows, limit in ((8, 1.01 * eight), (64, 16e9)):
        machine = Hardware("cpu", False, limit / fits.USABLE["cpu"] / 1e9)
        monkeypatch.setattr(hardware, "detect", lambda machine=machine: machine)
        assert prepare(loaded, False).recipe.train.per_device_train_batch_size == rows


def test_changes_that_make_it_fit() -> None:
    machine, base = (
        Hardware("cuda", True, 2.5),
        skeleton("llama", hidden_size=256, vocab_size=32_000, num_hidden_layers=8),
    )
    made = recipe(machine=machine, data={"train": "d", "max_length": 1024},
                  train={"effective_batch_size": 8, "per_device_train_batch_size": 8,
                         "gradient_checkpointing": False})  # fmt: skip
    now = estimate(network.build(made, base), made, 8, 1024, "cuda")
    assert now.peak > fits.budget(machine)
    found = fits.changes(made, base, now, machine)
    assert found
    assert all(change.peak <= fits.budget(machine) for change in found)
    assert [change.slowdown for change in found] == sorted(change.slowdown for change in found)
    rows = {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 8}
    assert rows in [change.settings for change in found], "4 and 2 do not fit"


def test_changes_that_make_it_fit_together() -> None:
    """int4 in int8's place, at its own price; and nothing that it would fit without."""
    base = skeleton("llama", hidden_size=512, intermediate_size=2048, vocab_size=2000, num_hidden_layers=24)
    made = recipe(
        data={"train": "d", "max_length": 1024}, model={"name": "m", "dtype": "float32"},
        train={"effective_batch_size": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": True},
    )  # fmt: skip
    now = estimate(network.build(made, base), made, 2, 1024, "cuda")
    machine = Hardware("cuda", True, 0.92)
    (change,) = fits.changes(made, base, now, machine)
    assert change.peak <= fits.budget(machine) < now.peak
    assert change.settings["model.quantization"] == "int4"
    assert change.slowdown == fits.UNPACKED["int4"]
    assert "8 bits" not in change.why.replace("its moments in 8 bits", "")
    options = [
        o for o in fits.candidates(made, now.length) if all(change.settings.get(k) == v for k, v in o[0].items())
    ]
    assert len(options) > 1
    networks: fits.Networks = {}
    for i in range(len(options)):
        fewer = fits.tried(made, base, [*options[:i], *options[i + 1 :]], now, machine, networks)
        assert fewer is None or fewer.peak > fits.budget(machine)


@pytest.mark.parametrize(
    ("text", "memory"), [("24GB", 24.0), ("RTX 4090", 25.3), ("rtx4090", 25.3), ("a100-80gb", 85.1)]
)
def test_cards(text: str, memory: float) -> None:
    assert cards.card(text).memory == memory


@pytest.mark.parametrize("text", ["", "big", "0GB", "-1GB", "24 kg", "nan"])
def test_no_cards(text: str) -> None:
    with pytest.raises(UserError):
        cards.card(text)


def test_the_command(tmp_path: Path) -> None:
    done = ft("plan", "--recipe", "lora_chatglm3.yaml", "--gpu", "RTX 3060", "--json", "-", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["peak_memory_gb"] == pytest.approx(sum(said["memory"].values()), abs=0.01)
    assert said["fits"] is (said["peak_memory_gb"] <= 0.95 * 12.6)
    assert said["total_parameters"] - said["trainable_parameters"] == 6_243_584_000
    assert said["memory"]["weights"] == pytest.approx(4.01, abs=0.02)
    assert said["seconds"] == pytest.approx(said["flops"] / 51e12 / 0.5, rel=0.01)
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_the_command_on_a_run_here(recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = recipe(train={"effective_batch_size": 8, "num_train_epochs": 2, "max_steps": None})
    done = ft("plan", path, "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    for word in ("are trained", "peak", "fits this machine", "most that fits", "TFLOP a step"):
        assert word in done.stdout
    said = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert (said["steps"], said["device"]) == (16, "cpu")
    assert 10 < said["tokens_per_row"] < 64, "counted by the tokenizer that is here"
    assert ft("plan", path, "--json", tmp_path / "plan.json").returncode == 0, "its own file may be replaced"
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    assert ft("plan", path, "--json", tmp_path / "other.json").returncode == 2


def test_what_cannot_be_planned_is_named(recipe: Callable[..., Path], tmp_path: Path) -> None:
    wrong = ft("plan", recipe(), "--gpu", "RTX 4900")
    assert wrong.returncode == 2
    assert "did you mean RTX 4090?" in wrong.stderr
    with pytest.raises(UserError, match=r"did you mean RTX 4090\? Or give its memory, as in 48GB"):
        cards.card("4090")  # no 4,090 GB
    odd = recipe(model={"name": "owner/nothing-like-that"})
    assert ft("plan", odd).returncode == 2


def test_a_network_that_looks_at_its_numbers_is_refused_by_name() -> None:
    made, base = recipe(model={"name": "owner/curious", "dtype": "float32"}), skeleton("llama")
    found = network.build(made, base)

    def look(module: Any, given: Any) -> None:
        assert given[0].sum() < torch.inf

    found.blocks[0].register_forward_pre_hook(look)
    with pytest.raises(UserError) as refused:
        plan.attempt(made, lambda: estimate(found, made, 1, 16, "cpu"))
    (line,) = refused.value.lines()
    assert line.startswith("owner/curious: model.name: its network computes in a way that cannot be planned")
    assert line.endswith("try a few rows of it: train.max_steps 1")
