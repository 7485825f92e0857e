"""`ft sft`: every training key by its effect, exact resume, and a run directory anyone can load."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ft, tensors, train, write_rows
from torch.nn.functional import cross_entropy
from transformers import Trainer

from finetune.errors import UserError

Recipe = Callable[..., Path]


def logged(run: Any, key: str) -> list[float]:
    return [row[key] for row in run.read_metrics() if key in row]


@pytest.mark.whole
def test_run_directory(recipe: Recipe) -> None:
    run = train(recipe())
    assert {p.name for p in run.path.iterdir()} == {
        "recipe.yaml", "adapter", "metrics.jsonl", "result.json", "report.html", "loss.png", "checkpoints",
        "data_audit.json",
    }  # fmt: skip
    result = json.loads(run.result.read_text())
    assert result["status"] == "done"
    assert result["steps"] == 4
    assert 0 < result["trainable_parameters"] < result["total_parameters"]
    told = [line for line in result["decisions"] if not line.startswith("threads:")]
    assert told == ["only 4 updates; 50 or more want more data or epochs, or a smaller batch"]
    row = run.read_metrics()[0]
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb"} <= row.keys()
    plan, report = result["plan"], (run.path / "report.html").read_text()
    assert plan["peak_memory_gb"] == pytest.approx(sum(plan["memory"].values()), abs=0.001)
    assert (plan["rows"], plan["memory"]["weights"] > 0) == (8, True)
    assert "planned: weights" in report
    assert "data:image/png;base64," in report
    assert (run.path / "loss.png").stat().st_size > 5000


def test_adapter_loads_with_plain_peft(recipe: Recipe, base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(recipe())
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    adapted = PeftModel.from_pretrained(model, run.adapter)
    assert (adapted(ids).logits - before).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(run.adapter).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert all(t.dtype == torch.float32 for t in tensors(run.adapter).values())


def test_same_seed_same_run(recipe: Recipe, tmp_path: Path) -> None:
    first = train(recipe())
    second = train(recipe(output={"dir": str(tmp_path / "again")}))
    other = train(recipe(output={"dir": str(tmp_path / "other")}), "train.seed=1")
    assert logged(first, "loss") == logged(second, "loss")
    a, b, c = (tensors(r.adapter) for r in (first, second, other))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)


def test_running_the_resolved_recipe_reproduces_the_run(recipe: Recipe, tmp_path: Path) -> None:
    first = train(recipe())
    again = train(first.path / "recipe.yaml", f"output.dir={tmp_path / 'again'}")
    assert logged(first, "loss") == logged(again, "loss")


def test_learning_rate_schedule(recipe: Recipe) -> None:
    path = recipe(train={"max_steps": 10, "warmup_steps": 2, "learning_rate": 1e-3, "logging_steps": 1})
    rates = logged(train(path), "learning_rate")
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])
    # cosine down to a floor of 10%: rate(t) = floor + (1 - floor) * (1 + cos(pi t)) / 2, logged before the step
    expected = [1e-3 * (0.1 + 0.9 * (1 + torch.cos(torch.tensor(torch.pi * k / 8)).item()) / 2) for k in range(8)]
    assert rates[2:] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [0, 1, 0.75, 0.5, 0.25]),
        ("constant", [1, 1, 1, 1, 1]),
        ("constant_with_warmup", [0, 1, 1, 1, 1]),
        ("cosine", [0, 1, 0.853553, 0.5, 0.146447]),
        ("warmup_stable_decay", [0.1, 1, 1, 1, 0.55]),
    ],
)
def test_scheduler_kinds(recipe: Recipe, kind: str, expected: list[float]) -> None:
    warmup = 0 if kind == "constant" else 1
    settings = {"max_steps": 5, "warmup_steps": warmup, "learning_rate": 1e-3, "lr_scheduler_type": kind}
    rates = logged(train(recipe(train=settings)), "learning_rate")
    assert rates == pytest.approx([1e-3 * e for e in expected], rel=1e-4)


def test_warmup_as_a_fraction(recipe: Recipe) -> None:
    settings = {"max_steps": 4, "warmup_steps": 0.5, "lr_scheduler_type": "linear", "learning_rate": 1e-3}
    assert logged(train(recipe(train=settings)), "learning_rate") == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def step_of(recipe: Recipe, base: Path, **settings: Any) -> float:
    """Norm of the weights' change in one plain gradient step on all weights."""
    settings = {"max_steps": 1, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 1.0, **settings}
    run = train(recipe(train=settings, adapter={"method": "full", "r": None, "lora_alpha": None}))
    before, after = tensors(base), tensors(run.model)
    return sum(((after[k] - before[k]) ** 2).sum().item() for k in before) ** 0.5


@pytest.fixture
def full(recipe: Recipe) -> Recipe:
    def write(**sections: Any) -> Path:
        path = recipe(**{k: v for k, v in sections.items() if k != "adapter"})
        text = path.read_text().splitlines()
        at = text.index("adapter:")
        rest = [i for i, line in enumerate(text) if i > at and not line.startswith(" ")]
        path.write_text("\n".join([*text[:at], "adapter: {method: full}", *text[rest[0] :]]))
        return path

    return write


def test_gradient_clipping_bounds_the_step(full: Recipe, base: Path) -> None:
    assert step_of(full, base, max_grad_norm=0.01) == pytest.approx(0.01, rel=1e-3)


def test_without_clipping_the_step_is_the_gradient(full: Recipe, base: Path) -> None:
    size = step_of(full, base, max_grad_norm=0.0)
    assert size > 0.1


def test_weight_decay_shrinks_weights(recipe: Recipe, tmp_path: Path) -> None:
    norms = []
    for decay in (0.0, 10.0):
        path = recipe(output={"dir": str(tmp_path / str(decay))}, train={"weight_decay": decay})
        adapter = tensors(train(path).adapter)
        norms.append(sum(t.norm().item() for k, t in adapter.items() if "lora_A" in k))
    assert norms[1] < 0.9 * norms[0]


def test_effective_batch_size_counts_samples(recipe: Recipe, tmp_path: Path) -> None:
    curves = {}
    for micro in (8, 4, 1):
        path = recipe(output={"dir": str(tmp_path / str(micro))}, train={"per_device_train_batch_size": micro})
        run = train(path)
        curves[micro] = logged(run, "loss")
        assert logged(run, "epoch") == pytest.approx([0.125, 0.25, 0.375, 0.5])  # 8 of 64 samples a step
    assert curves[4] == pytest.approx(curves[8], abs=2e-5)
    assert curves[1] == pytest.approx(curves[8], abs=2e-5)


OPTIMIZERS = ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion_8bit", "muon"]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizers_learn(recipe: Recipe, optim: str) -> None:
    rate = 1e-3 if optim == "lion_8bit" else 1e-2
    settings = {"max_steps": 30, "optim": optim, "learning_rate": rate, "lr_scheduler_type": "constant"}
    losses = logged(train(recipe(train=settings)), "loss")
    assert sum(losses[-5:]) / 5 < losses[0] - 0.3


def test_optimizers_differ(recipe: Recipe, tmp_path: Path) -> None:
    curves = set()
    for optim in ("adamw", "adafactor", "sgd", "muon"):
        path = recipe(output={"dir": str(tmp_path / optim)}, train={"optim": optim})
        curves.add(tuple(logged(train(path), "loss")))
    assert len(curves) == 4


def test_neftune_adds_noise_while_training_only(recipe: Recipe, tmp_path: Path) -> None:
    """Of weights that stay where they are."""
    train_loss, held_out = [], []
    for noise in (None, 50.0):
        settings = {"max_steps": 1, "learning_rate": 1e-12, "neftune_noise_alpha": noise}
        run = train(recipe(output={"dir": str(tmp_path / str(noise))}, data={"eval_split": 8}, train=settings))
        train_loss += logged(run, "loss")
        held_out += logged(run, "eval_loss")
    assert abs(train_loss[0] - train_loss[1]) > 1e-3
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-6)


def test_label_smoothing_changes_the_loss_by_its_formula(
    recipe: Recipe, base: Path, rows: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = {"max_steps": 1, "effective_batch_size": 64, "label_smoothing_factor": 0.3}
    loss = logged(train(recipe(train=settings)), "loss")[0]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    total, count = 0.0, 0
    for line in rows.read_text().splitlines():
        encoded = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        log_p = torch.log_softmax(model(encoded["input_ids"]).logits[0, :-1].float(), -1)
        keep = encoded["assistant_masks"][0, 1:].bool()
        nll = -log_p.gather(1, encoded["input_ids"][0, 1:, None])[:, 0][keep]
        total += (0.7 * nll - 0.3 * log_p[keep].mean(-1)).sum().item()
        count += int(keep.sum())
    assert loss == pytest.approx(total / count, abs=1e-4)


def test_gradient_checkpointing_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    plain = train(recipe(output={"dir": str(tmp_path / "plain")}))
    saved = train(recipe(output={"dir": str(tmp_path / "saved")}, train={"gradient_checkpointing": True}))
    assert logged(plain, "loss") == pytest.approx(logged(saved, "loss"), abs=1e-5)
    assert logged(plain, "grad_norm") == pytest.approx(logged(saved, "grad_norm"), rel=1e-3)


def test_logging_eval_and_save_steps(recipe: Recipe) -> None:
    settings = {"max_steps": 6, "logging_steps": 2, "eval_steps": 3, "save_steps": 2, "save_total_limit": 2}
    run = train(recipe(train=settings, data={"eval_split": 8}))
    rows = run.read_metrics()
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6]
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]
    assert {p.name for p in run.checkpoints.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}, "the newest two"
    assert json.loads(run.result.read_text())["eval"]["loss"] == rows[-1]["eval_loss"]


def test_early_stopping_keeps_the_best(recipe: Recipe) -> None:
    settings = {
        "max_steps": 40, "learning_rate": 1.0, "lr_scheduler_type": "constant", "warmup_steps": 0, "eval_steps": 1,
        "save_steps": 1, "early_stopping_patience": 2,
    }  # fmt: skip
    run = train(recipe(train=settings, data={"eval_split": 8}))
    losses = logged(run, "eval_loss")
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 40
    result = json.loads(run.result.read_text())
    assert result["best_checkpoint"].endswith(f"checkpoint-{best}")
    kept = tensors(run.checkpoints / f"checkpoint-{best}")
    assert all(torch.equal(t, kept[k]) for k, t in tensors(run.adapter).items())


def test_the_accuracy_is_measured_however_the_loss_is(recipe: Recipe, tmp_path: Path) -> None:
    """train.metric_for_best_model may name it; the loss with smoothing or weights is not trl's."""
    turns = [
        [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} again"}] for i in range(24)
    ]

    def measured(name: str, weight: float, **settings: Any) -> Any:
        said = [{"conversations": [asked, {**answer, "loss": weight}]} for asked, answer in turns]
        return train(
            recipe(
                output={"dir": str(tmp_path / name)}, model={"adapter": start and str(start.path)},
                data={"train": str(write_rows(tmp_path / f"{name}.jsonl", said)), "eval_split": 8},
                train={"effective_batch_size": 64, "load_best_model_at_end": True,
                       "metric_for_best_model": "mean_token_accuracy", **settings},
            )
        )  # fmt: skip

    start = None
    start = measured("start", 1, max_steps=8, logging_steps=8)
    plain = logged(measured("plain", 1, max_steps=1), "mean_token_accuracy")
    assert plain[0] > 0.1
    for run in (measured("smoothed", 1, max_steps=1, label_smoothing_factor=0.1), measured("half", 0.5, max_steps=1)):
        assert logged(run, "mean_token_accuracy") == pytest.approx(plain, abs=1e-6)  # before the only step
        assert len(logged(run, "eval_mean_token_accuracy")) == 1


@pytest.mark.parametrize("flat", [False, True])
def test_packing_leaves_the_loss_as_it_is(
    recipe: Recipe, tmp_path: Path, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rows, and in one row as for kernels that take documents of any length."""
    from finetune.commands import sft
    from finetune.training import packing

    for module in (sft, packing):
        monkeypatch.setattr(module, "one_row", lambda model, packed=True: flat)
    settings = {"max_steps": 1, "effective_batch_size": 64}
    plain = train(recipe(output={"dir": str(tmp_path / "plain")}, train=settings))
    packed = train(
        recipe(output={"dir": str(tmp_path / "packed")}, train=settings, data={"packing": True, "max_length": 128})
    )
    assert logged(packed, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-5)
    assert logged(packed, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-3)
    one, other = (json.loads(run.result.read_text()) for run in (plain, packed))
    assert other["seen_tokens"] == one["seen_tokens"]
    assert not any("packing" in line for line in other["decisions"]), "it was packed"


@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "smoothed"])
def test_a_pass_without_padding_has_the_same_loss(
    recipe: Recipe, tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.models import documents
    from finetune.training import sft_trainer

    shapes, plain = [], sft_trainer.Collator.torch_call
    monkeypatch.setattr(
        sft_trainer.Collator, "torch_call",
        lambda self, rows: shapes.append(batch := plain(self, rows)) or batch,
    )  # fmt: skip
    settings = {"max_steps": 2, "effective_batch_size": 8, "per_device_train_batch_size": 4, **more}
    one_row = train(recipe(output={"dir": str(tmp_path / "one")}, train=settings, data={"eval_split": 8}))
    assert {batch["input_ids"].shape[0] for batch in shapes} == {1}
    assert all("attention_mask" not in batch for batch in shapes)
    monkeypatch.setattr(documents, "use", lambda model: False)
    rows = train(recipe(output={"dir": str(tmp_path / "rows")}, train=settings, data={"eval_split": 8}))
    assert "attention_mask" in shapes[-1]
    for key in ("loss", "eval_loss", "mean_token_accuracy", "num_tokens"):
        assert logged(one_row, key) == pytest.approx(logged(rows, key), abs=1e-5), key
    assert logged(one_row, "grad_norm") == pytest.approx(logged(rows, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("flat", [False, True])
def test_documents_in_rows_are_apart(flat: bool) -> None:
    """Each document's logits and gradients are those that it has alone, behind padding and between others; a mask for
    all would show them to each other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune.training.sft_trainer import Collator

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    rows = [[range(3, 10), range(20, 25)], [range(40, 42)], [range(50, 60), range(60, 61), range(70, 72)]]
    examples = [
        {"input_ids": ids, "labels": ids, "seq_lengths": [len(document) for document in row]}
        for row in rows
        for ids in [[token for document in row for token in document]]
    ]
    collator = Collator(0, padding_free=flat, return_position_ids=not flat, pad_to_multiple_of=None if flat else 32)
    batch = collator(examples)
    assert batch["input_ids"].shape == ((1, 27) if flat else (3, 32))
    names = ("input_ids", "position_ids")
    with torch.no_grad():
        together = model(**{name: batch[name] for name in names}, use_cache=False).logits
        for place, row in enumerate(rows):
            at = sum(len(document) for other in rows[:place] for document in other) if flat else 0
            for document in row:
                alone = model(input_ids=torch.tensor([list(document)])).logits[0]
                found = together[0 if flat else place, at : at + len(document)]
                torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
                trained = batch["labels"][0 if flat else place, at : at + len(document)]
                assert trained.tolist() == [-100, *document[1:]]
                at += len(document)
    assert flat or batch["tokens"] == 27

    def gradients(*passes: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of the summed loss of (logits, labels); both (rows, tokens, …)."""
        model.zero_grad()
        for logits, labels in passes:
            cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    packed = gradients((model(**{name: batch[name] for name in names}, use_cache=False).logits, batch["labels"]))
    documents = [torch.tensor([list(document)]) for row in rows for document in row]
    plain = gradients(*((model(input_ids=ids).logits, ids) for ids in documents if ids.shape[1] > 1))
    for name, wanted in plain.items():
        torch.testing.assert_close(packed[name], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def of_threes(folder: Path) -> dict[str, Any]:
    """60 samples of 29 tokens, which fill 20 packed rows of three."""
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(10, 70)
    ]
    return {"train": str(write_rows(folder / "even.jsonl", rows)), "packing": True, "max_length": 90}


def test_packed_steps_hold_effective_batch_size_samples(recipe: Recipe, tmp_path: Path) -> None:
    """8 samples are nearest to 3 rows, so 7 steps are an epoch."""
    run = train(recipe(train={"max_steps": None, "num_train_epochs": 1.0}, data=of_threes(tmp_path)))
    assert json.loads(run.result.read_text())["steps"] == 7


def test_packed_rows_are_counted_before_a_model_loads(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes cannot share the 3 rows of a step."""
    from finetune.recipe.resolve import Hardware

    monkeypatch.setattr("finetune.training.session.hardware.detect", lambda: Hardware(processes=2))
    monkeypatch.setattr("finetune.commands.sft.policy", lambda *_: pytest.fail("it was loaded"))
    path = recipe(data=of_threes(tmp_path))
    for more in ([], ["--dry-run"]):
        done = ft("sft", path, *more)
        assert (done.returncode, "a step of 3 packed rows cannot be shared out" in done.stderr) == (2, True)
        assert "train.effective_batch_size" in done.stderr
        assert not (tmp_path / "run").exists()


def test_probe_switches_packing_off_where_documents_leak(recipe: Recipe, tmp_path: Path) -> None:
    from conftest import make_tokenizer
    from transformers import BloomConfig, BloomForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=2, eos_token_id=2, pad_token_id=0)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    run = train(recipe(model={"name": str(tmp_path / "bloom")}, data={"packing": True}))
    assert any(d.startswith("packing is off") for d in json.loads(run.result.read_text())["decisions"])


def weighted_rows(path: Path, weights: tuple[float, float]) -> Path:
    """Conversations of two answers each, in the form of the ChatGLM3 demo: per-turn `loss`."""
    answers = [{"role": "assistant", "content": f"{n} again", "loss": w} for n, w in zip("ab", weights, strict=True)]
    turns = [[{"role": "user", "content": "x"}, answer] for answer in answers]
    return write_rows(path, [{"conversations": turns[0] + turns[1]}] * 16)


@pytest.mark.parametrize("packing", [False, True])
def test_weighted_turns(recipe: Recipe, tmp_path: Path, packing: bool) -> None:
    """loss(w1, w2) = (w1 nll1 + w2 nll2) / trained tokens; turns of weight 0 are not trained at all."""
    settings = {"max_steps": 1, "effective_batch_size": 16}
    first = []
    for weights in ((1.0, 1.0), (0.5, 0.25), (1.0, 0.0)):
        name = "-".join(map(str, weights))
        data = {"train": str(weighted_rows(tmp_path / f"{name}.jsonl", weights)), "packing": packing, "max_length": 128}
        first.append(logged(train(recipe(data=data, train=settings, output={"dir": str(tmp_path / name)})), "loss")[0])
    both, weighted, one = first  # both: mean of the two turns' losses, which have the same number of tokens
    other = 2 * both - one
    assert weighted == pytest.approx((0.5 * one + 0.25 * other) / 2, abs=1e-5)


def test_full_fine_tuning_writes_a_model(full: Recipe) -> None:
    from transformers import AutoModelForCausalLM

    run = train(full())
    assert not run.adapter.exists()
    AutoModelForCausalLM.from_pretrained(run.model)
    result = json.loads(run.result.read_text())
    assert result["trainable_parameters"] == result["total_parameters"]


def test_continue_from_an_adapter(recipe: Recipe, tmp_path: Path) -> None:
    first = train(recipe())
    second = train(recipe(model={"adapter": str(first.path)}, output={"dir": str(tmp_path / "second")}))
    assert logged(second, "loss")[0] < logged(first, "loss")[0] - 0.1


def test_resume_is_exact(recipe: Recipe, tmp_path: Path) -> None:
    settings = {"max_steps": None, "num_train_epochs": 2.0, "save_steps": 3, "save_total_limit": 10}
    whole = train(recipe(train=settings, adapter={"lora_dropout": 0.1}))
    broken_dir = tmp_path / "broken"
    path = recipe(train=settings, adapter={"lora_dropout": 0.1}, output={"dir": str(broken_dir)})
    broken = train(path)
    # As after a crash at step 14: no result, and a checkpoint that was being written.
    broken.result.unlink()
    for step in (12, 15, 16):
        (broken.checkpoints / f"checkpoint-{step}" / "complete").unlink()
    resumed = train(path, resume=True)
    assert logged(resumed, "loss") == logged(whole, "loss")
    a, b = tensors(whole.adapter), tensors(resumed.adapter)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_with_a_changed_recipe(recipe: Recipe) -> None:
    run = train(recipe())
    run.result.unlink()
    with pytest.raises(UserError, match=r"train\.learning_rate: differs from the run to resume"):
        train(recipe(), "train.learning_rate=0.5", resume=True)


def test_float16_trains_with_loss_scaling(recipe: Recipe) -> None:
    run = train(recipe(model={"dtype": "float16"}, train={"max_steps": 8}))
    losses = logged(run, "loss")
    assert losses[-1] < losses[0]
    assert all(t.dtype == torch.float32 for t in tensors(run.adapter).values())
    assert (run.checkpoints / "checkpoint-8" / "scaler.pt").exists(), "a GradScaler was at work"


def test_nan_stops_the_run(full: Recipe) -> None:
    settings = {"max_steps": 20, "optim": "sgd", "learning_rate": 1e9, "max_grad_norm": 0.0, "warmup_steps": 0}
    from finetune.errors import RunError

    with pytest.raises(RunError, match=r"became (nan|inf) at step"):
        train(full(train=settings))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_interrupt_saves_a_checkpoint_and_resumes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(train={"max_steps": 12, "save_steps": 1000, "logging_steps": 1})
    step = Trainer.training_step

    def interrupted(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupted)
        done = ft("sft", "--recipe", path)
    assert done.returncode == 130, done.stderr
    written = tmp_path / "run" / "recipe.yaml"
    assert done.stderr.rstrip().endswith(f"go on with ft sft --recipe {written} --resume")
    assert not (tmp_path / "run" / "result.json").exists()
    resumed = train(written, resume=True)
    assert [row["step"] for row in resumed.read_metrics()] == list(range(1, 13))
    whole = train(path, f"output.dir={tmp_path / 'whole'}")
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_a_second_interrupt_does_not_wait_for_the_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.training_step

    def interrupted(self: Any, *arguments: Any, **more: Any) -> Any:
        for _ in range(2 * (self.state.global_step == 1)):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments, **more)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    done = ft("sft", "--recipe", recipe())
    assert done.returncode == 130, done.stderr
    assert "interrupted before there was a checkpoint; start again with ft sft" in done.stderr
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "as it was"


def test_summary_names_the_next_command(recipe: Recipe, tmp_path: Path) -> None:
    done = ft("sft", "--recipe", recipe(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "next    ft chat --adapter run" in done.stderr
    assert "no rows were held out" in done.stderr
    assert "warning: only 4 updates" in done.stderr
    assert "step 4/4  loss" in done.stderr
    assert "{'loss'" not in done.stdout + done.stderr, "the libraries' own output stays out of sight"


@pytest.mark.parametrize(("steps", "few"), [(49, True), (50, False)])
def test_a_run_of_few_updates_is_told(recipe: Recipe, steps: int, few: bool) -> None:
    said = ft("sft", "--recipe", recipe(train={"max_steps": steps}), "--dry-run").stderr
    assert (f"only {steps} updates" in said) is few, said


def test_dry_run_writes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    done = ft("sft", "--recipe", recipe(), "--dry-run")
    assert done.returncode == 0
    assert "learning_rate: 0.01" in done.stdout
    assert "per_device_train_batch_size: 8" in done.stdout
    assert not (tmp_path / "run").exists()


def message_row(answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("missing file", "nowhere.jsonl"),
        ("malformed line", "row 3"),
        ("missing columns", "row 2"),
        ("empty answer", "row 2"),
        ("overlong", "row 2"),
        ("model path", "no such model"),
        ("adapter target", "matches no module: q_projj"),
        ("adapter of another base", "was trained on another base"),
    ],
)
def test_bad_input(recipe: Recipe, tmp_path: Path, base: Path, what: str, expected: str) -> None:
    """Exit 2, one line with place and fix, no run directory."""
    data = tmp_path / "bad.jsonl"
    good = message_row("fine")
    sections: dict[str, Any] = {"data": {"train": str(data), "on_overlong": "error"}}
    write_rows(data, [good] * 3)
    if what == "missing file":
        sections["data"]["train"] = str(tmp_path / "nowhere.jsonl")
    elif what == "malformed line":
        data.write_text(data.read_text().replace("}\n", "}\n", 1).rsplit("{", 1)[0] + '{"role": \n')
    elif what == "missing columns":
        write_rows(data, [good, {"question": "q"}, good])
    elif what == "empty answer":
        write_rows(data, [good, message_row(""), good])
    elif what == "overlong":
        write_rows(data, [good, message_row("x" * 100), good])
    elif what == "model path":
        sections["model"] = {"name": str(tmp_path / "nope")}
    elif what == "adapter target":
        sections["adapter"] = {"target_modules": ["q_projj"]}
    elif what == "adapter of another base":
        from transformers import AutoModelForCausalLM

        run = train(recipe(output={"dir": str(tmp_path / "first")}))
        other = AutoModelForCausalLM.from_pretrained(base)
        with torch.no_grad():
            other.model.layers[0].mlp.up_proj.weight.add_(0.01)
        other.save_pretrained(tmp_path / "other")
        for file in base.glob("*token*"):
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "other" / "chat_template.jinja").write_bytes((base / "chat_template.jinja").read_bytes())
        sections["model"] = {"name": str(tmp_path / "other"), "adapter": str(run.path)}
    with pytest.raises(UserError) as caught:
        train(recipe(**sections))
    lines = caught.value.lines()
    assert any(expected in line for line in lines), lines
    assert all("→" in line for line in lines), "every line says how to mend it"
    assert not (tmp_path / "run").exists()
