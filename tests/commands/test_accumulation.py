"""One optimizer step has one gradient, however it is cut into forward passes; and what each objective's keys do."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from conftest import write_rows

from finetune.commands import dpo, kto, reward
from finetune.commands.dpo import check_sorted
from finetune.errors import UserError
from finetune.recipe.file import check
from finetune.recipe.stages import DpoLoss
from finetune.run.directory import Run
from finetune.training import session
from finetune.training.plan import Layout
from finetune.training.preference import mismatched

FIXTURES = Path(__file__).parents[1] / "fixtures" / "preferences"
STAGES: dict[str, Any] = {"dpo": dpo, "kto": kto, "reward": reward}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.training.reference.cache_folder", lambda: tmp_path / "cache")


def recipe_of(base: Path, stage: str, file: str = "uneven", **sections: Any) -> Any:
    values: dict[str, Any] = {
        "version": 1, "stage": stage, "model": {"name": str(base), "dtype": "float32", "sanity_check": False},
        "data": {"train": str(FIXTURES / f"{file}.jsonl"), "max_length": 128},
        "adapter": {"method": "lora", "r": 4}, "train": {"max_steps": 1}, "output": {"dir": "unused"},
    }  # fmt: skip
    for name, section in sections.items():
        fresh = name == "adapter" and "method" in section
        values[name] = section if fresh else {**values.get(name, {}), **section}
    return check(yaml.safe_load(yaml.safe_dump(values)), stage)


def made(recipe: Any, folder: Path, rows: int = 4, passes: int = 1) -> Any:
    """The stage's trainer, as it stands before its first step."""
    found: list[Any] = []

    def stop(_: Any, trainer: Any, *args: Any, **more: Any) -> None:
        found.append(trainer)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "layout", lambda *_: Layout(rows, passes, 1, 1))
        patch.setattr(session.Session, "train", stop)
        output = recipe.output.model_copy(update={"dir": str(folder / "made")})
        with pytest.raises(KeyboardInterrupt):
            STAGES[recipe.stage].run(recipe.model_copy(update={"output": output}), overwrite=True)
    return found[0]


def step(trainer: Any, passes: int) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of the next step, by the trainer's own code."""
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), passes, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.zero_grad()
    loss = sum(float(trainer.training_step(trainer.model, batch, count)) for batch in batches)
    named = trainer.model.named_parameters()
    return loss, {n: p.grad.clone() for n, p in named if p.requires_grad and p.grad is not None}


OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {"dpo": {"sft_weight": 1.0}}),
    "ipo": ("dpo", {"dpo": {"loss_type": "ipo"}}),
    "simpo": ("dpo", {"dpo": {"loss_type": "simpo", "sft_weight": 0.5}}),
    "orpo": ("dpo", {"dpo": {"loss_type": "orpo", "sft_weight": 0.5}}),
    "adalora": ("dpo", {"adapter": {"method": "adalora", "init_r": 4, "target_r": 2}}),
    "kto": ("kto", {}),
    "reward": ("reward", {"reward": {"margin": 0.3}}),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_has_one_gradient(base: Path, tmp_path: Path, objective: str) -> None:
    """16 rows in 1, 4 and 16 passes; 5 rows in one pass, and in a full and a short one."""
    stage, sections = OBJECTIVES[objective]

    def found(rows: int, passes: int, samples: int) -> tuple[float, dict[str, torch.Tensor]]:
        recipe = recipe_of(base, stage, data={"max_samples": samples}, **sections)
        trainer = made(recipe, tmp_path, rows, passes)
        if stage == "kto":
            moved(trainer)  # or the KL term is 0 everywhere
        result = step(trainer, passes)
        assert stage != "kto" or trainer.kl.item() > 0.1, "below 0 it would be clamped, and not be tried"
        return result

    half = 2 if stage == "kto" else 1  # a pair is two answers there
    for samples, layouts in ((16, [(16, 1), (4, 4), (1, 16)]), (5, [(5 * half, 1), (4 * half, 2)])):
        (loss, gradients), *others = [found(rows, passes, samples // half) for rows, passes in layouts]
        assert any(g.abs().max() > 1e-4 for g in gradients.values())
        for other, theirs in others:
            assert other == pytest.approx(loss, abs=1e-5)
            for key, gradient in gradients.items():
                torch.testing.assert_close(theirs[key], gradient, atol=2e-6, rtol=1e-4)


def test_sft_weight_is_per_answer(base: Path, tmp_path: Path) -> None:
    """RPO: the mean over a pair's chosen tokens, averaged over the pairs. A mean over all tokens is another number."""
    plain, _ = step(made(recipe_of(base, "dpo"), tmp_path, 16), 1)
    trainer = made(recipe_of(base, "dpo", dpo={"sft_weight": 1.0}), tmp_path, 16)
    weighted, _ = step(trainer, 1)
    per_answer, tokens = [], []
    for row in trainer.train_dataset:
        ids, mask = torch.tensor([row["chosen_ids"]]), torch.tensor(row["chosen_mask"])[1:].bool()
        with torch.no_grad():
            logps = trainer.model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        losses = -logps.gather(-1, ids[0, 1:, None])[:, 0][mask]
        per_answer.append(losses.mean().item())
        tokens += losses.tolist()
    assert weighted - plain == pytest.approx(sum(per_answer) / 16, abs=1e-5)
    assert weighted - plain != pytest.approx(sum(tokens) / len(tokens), abs=1e-3)


def test_sorted_pairs_stand_in_one_pass(base: Path) -> None:
    for loss in ("aot", "aot_unpaired"):
        recipe = recipe_of(base, "dpo", dpo={"loss_type": loss})
        check_sorted(recipe, Layout(16, 1, 1, 1))
        with pytest.raises(UserError, match=r"per_device_train_batch_size.*set it to 16"):
            check_sorted(recipe, Layout(4, 4, 1, 1))


@pytest.mark.parametrize("loss", get_args(DpoLoss))
def test_a_key_of_dpo_does_something_or_is_refused(base: Path, tmp_path: Path, loss: str) -> None:
    """By trying: the loss or the gradient of a step moves, or the recipe names the key."""

    def tried(**keys: Any) -> tuple[float, list[float]] | str:
        smoothing = {"label_smoothing": 0.1} if loss == "exo_pair" else {}
        try:
            recipe = recipe_of(base, "dpo", data={"max_samples": 4}, dpo={"loss_type": loss, **smoothing, **keys})
        except UserError as error:
            return str(error)
        trainer = made(recipe, tmp_path)
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data += torch.randn_like(parameter) / 30
        value, gradients = step(trainer, 1)
        return value, [g.abs().sum().item() for g in gradients.values()]

    plain = tried()
    assert not isinstance(plain, str)
    refused = []
    for key, value in {"label_smoothing": 0.2, "simpo_gamma": 1.5, "sft_weight": 1.0, "beta": 0.7}.items():
        found = tried(**{key: value})
        if isinstance(found, str):
            assert f"dpo.{key}" in found
            refused.append(key)
        else:
            assert found != plain, key
    assert "beta" not in refused
    assert "sft_weight" not in refused
    assert ("simpo_gamma" in refused) is (loss != "simpo")


@pytest.mark.parametrize(
    ("prompts", "whole"),
    [("abcd", True), ("aabb", True), ("aaabbb", True), ("aabbcd", True), ("aaab", False), ("abababac", True)],
)
def test_answers_to_other_prompts(prompts: str, whole: bool) -> None:
    found = mismatched(list(prompts))
    assert found is not None
    assert all(prompts[i] != prompts[j] for i, j in enumerate(found))
    assert (sorted(found) == list(range(len(prompts)))) is whole, "every answer is taken once where that can be"


def test_one_prompt_has_no_other() -> None:
    assert mismatched(["a", "a"]) is None
    assert mismatched(list("abcd")) == [3, 0, 1, 2], "as trl's"


def moved(trainer: Any) -> Any:
    """The trainer with a policy that has left its reference."""
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn_like(parameter) / 60
    return trainer


def rows_of(batch: dict[str, torch.Tensor], prefix: str = "") -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of each row."""
    found = []
    for ids, real, mask in zip(
        *(batch[f"{prefix}{key}"].tolist() for key in ("input_ids", "attention_mask", "completion_mask")), strict=True
    ):
        found.append((ids[: mask.index(1)], ids[mask.index(1) : sum(real)]))
    return found


def logp(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum())


def test_kl_answers_are_to_other_prompts(base: Path, tmp_path: Path) -> None:
    """Of training and held-out rows, each answer once, by seed."""
    made_with = {
        seed: made(recipe_of(base, "kto", "grouped", data={"eval_split": 12}, train={"seed": seed}), tmp_path)
        for seed in (1, 2)
    }
    answers = {}
    for seed, trainer in made_with.items():
        for rows in (trainer.train_dataset, trainer.eval_dataset):
            prompts = {tuple(row["completion_ids"]): row["prompt_ids"] for row in rows}
            assert len({*map(tuple, prompts.values())}) < len(prompts), "several answers to a prompt"
            assert sorted(rows["KL_completion_ids"]) == sorted(rows["completion_ids"])
            assert all(prompts[tuple(row["KL_completion_ids"])] != row["prompt_ids"] for row in rows)
        answers[seed] = list(trainer.train_dataset["KL_completion_ids"])
    assert answers[1] != answers[2]


@pytest.mark.parametrize(("rows", "passes"), [(8, 1), (2, 4), (1, 2), (3, 1)])
def test_kto_is_the_formula(base: Path, tmp_path: Path, rows: int, passes: int) -> None:
    """Ethayarajh et al. 2024, eq. 7 and 8, in float64: z0 over all rows of the step, each with another's answer."""
    keys = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    recipe = recipe_of(base, "kto", "grouped", kto=keys, train={"group_by_length": False})
    start = made(recipe, tmp_path, rows, passes).model.eval()
    trainer = moved(made(recipe, tmp_path, rows, passes))
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), passes, trainer.args.device)
    loss = sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=count).item() for batch in batches)

    def ratio(row: tuple[list[int], list[int]]) -> float:
        return logp(trainer.model.eval(), *row) - logp(start, *row)

    mixed = [row for batch in batches for row in rows_of(batch, "KL_")]
    own = [row for batch in batches for row in rows_of(batch)]
    assert [prompt for prompt, _ in mixed] == [prompt for prompt, _ in own]
    kl = sum(map(ratio, mixed)) / len(mixed)
    assert trainer.kl.item() == pytest.approx(kl, abs=1e-3)
    assert kl > 0.1, "below 0 it would be clamped, and not be tried"
    expected = []
    for row, label in zip(own, [label for batch in batches for label in batch["label"].tolist()], strict=True):
        signed = (ratio(row) - kl) if label else (kl - ratio(row))
        expected.append((1.5 if label else 0.5) * (1 - 1 / (1 + math.exp(-0.3 * signed))))
    assert loss == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_held_out_kl_is_the_same_in_every_batch_size(base: Path, tmp_path: Path) -> None:
    """Measured on all held-out rows."""
    found = {}
    for size in (1, 3, 12):
        sections = {"data": {"eval_split": 12}, "train": {"per_device_eval_batch_size": size}}
        trainer = moved(made(recipe_of(base, "kto", "grouped", **sections), tmp_path))
        trainer.evaluate()
        found[size] = trainer.state.log_history[-1]
    assert found[1]["eval_kl"] > 0.1
    for size in (1, 3):
        for key in ("eval_kl", "eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
            assert found[size][key] == pytest.approx(found[12][key], abs=1e-3), key


def test_kto_wants_another_prompt(base: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": f"answer {i}", "label": bool(i % 2)} for i in range(4)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"data\.train_on.*part of the answer"):
        made(recipe_of(base, "kto", data={"train_on": "all"}), tmp_path)
    with pytest.raises(UserError, match="same prompt"):
        kto.run(recipe_of(base, "kto", data={"train": str(file)}, output={"dir": str(tmp_path / "run")}))


def smoothed(trainer: Any, weights: bool, smoothing: float) -> float:
    """Of all training rows in float64: (1 - s) nll + s mean over the vocabulary, by weight, per trained token."""
    total, count = 0.0, 0
    for row in trainer.train_dataset:
        with torch.no_grad():
            logits = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0, -len(row["input_ids"]) : -1]
        logps = logits.double().log_softmax(-1)
        for place, label in enumerate(row["labels"][1:]):
            if label != -100:
                weight = row["weights"][place + 1] if weights else 1.0
                total -= weight * ((1 - smoothing) * logps[place, label] + smoothing * logps[place].mean()).item()
                count += 1
    return total / count


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
@pytest.mark.parametrize("weights", [False, True])
def test_label_smoothing_holds_with_weights(base: Path, tmp_path: Path, weights: bool, method: str) -> None:
    """In training, in any layout, and in evaluation; with virtual tokens before the text, too."""
    from finetune.commands import sft
    from finetune.data import conversations
    from finetune.training import start

    turns = (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "first", "weight": 0.5}] if weights else []
    )
    rows = [
        {"messages": [*turns, {"role": "user", "content": f"b{i}"}, {"role": "assistant", "content": "x" * (i + 1)}]}
        for i in range(6)
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    sections = {"data": {"train": str(file)}, "adapter": {"method": method}}
    recipe = recipe_of(base, "sft", train={"max_steps": 1, "label_smoothing_factor": 0.2}, **sections)
    prepared = session.prepare(recipe, resume=False)
    data = conversations.load_sft(prepared.recipe.data, prepared.base.encoder)
    assert ("weights" in data.train.column_names) is weights
    data.eval = data.train
    prepared.plan(data, 40)
    prepared.folder = Run(tmp_path)
    for per_pass, passes in ((6, 1), (4, 2)):
        start.seed_everything(prepared.recipe)
        model = start.policy(prepared.recipe, prepared.base, prepared.machine)
        prepared.layout = Layout(per_pass, passes, 1, 1)
        trainer = sft.make_trainer(prepared, model, data.train)
        assert step(trainer, passes)[0] == pytest.approx(smoothed(trainer, weights, 0.2), abs=1e-4)
    batch = next(iter(trainer.get_eval_dataloader(data.train.select(range(4)))))
    trainer.model.eval()
    whole, _, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    trainer.train_dataset = data.train.select(range(4))
    assert whole.item() == pytest.approx(smoothed(trainer, weights, 0.2), abs=1e-4)
