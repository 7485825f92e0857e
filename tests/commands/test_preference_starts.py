"""Where a policy, its reference and a reward model begin, and in which precision; what weight decay reaches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tensors, train, write_rows
from rl_kit import reward_recipe, run_reward
from test_accumulation import made, recipe_of, step
from test_reward import plain_peft, text

from finetune.adapters.load import apply
from finetune.adapters.methods import METHODS
from finetune.base import Base
from finetune.data.chat import make_encoder
from finetune.data.pairs import load_pairs, load_unpaired
from finetune.data.prompts import load_prompts
from finetune.errors import UserError
from finetune.evaluation.rewards import score_rows
from finetune.models import hardware, loading, tokenizers
from finetune.recipe.adapters import ADAPTERS
from finetune.recipe.file import check
from finetune.recipe.resolve import resolve
from finetune.recipe.sections import DataConfig, ModelConfig, SourceConfig
from finetune.training import reference
from finetune.training.optim import decayed


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.training.reference.cache_folder", lambda: tmp_path / "cache")


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    named = trainer.model.named_parameters()
    return {n.replace(".default.", "."): p.detach() for n, p in named if p.requires_grad}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_policy_on_a_quantized_base_begins_as_its_adapter(
    base: Path, tmp_path: Path, recipe: Callable[..., Path], kind: str
) -> None:
    """Bit for bit, with DPO's first loss at ln 2 and KTO's KL at 0: nothing is rounded on the way."""
    sft = train(recipe(train={"max_steps": 6}, model={"quantization": kind}))
    stored = tensors(sft.adapter)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in stored.values()), "or rounding would not show"
    for stage in ("dpo", "kto", "reward"):
        sections: dict[str, Any] = {"model": {"adapter": str(sft.path), "quantization": kind}}
        if stage == "kto":
            sections["data"] = {"max_samples": 4}
        values = recipe_of(base, stage, **sections).model_dump(exclude={"adapter"}, exclude_unset=True)
        trainer = made(check(yaml.safe_load(json.dumps(values)), stage), tmp_path, 8)
        found = weights_of(trainer)
        for name, tensor in stored.items():
            assert torch.equal(found[name], tensor), (stage, name)
        if stage == "reward":
            continue
        loss, _ = step(trainer, 1)
        margins = trainer._metrics["train"]["rewards/margins"]
        assert margins == pytest.approx([0.0], abs=1e-6)
        assert loss == pytest.approx(math.log(2) if stage == "dpo" else 0.5, abs=1e-6)
        if stage == "kto":
            assert trainer.kl.item() == pytest.approx(0.0, abs=1e-5)


def test_loftq_begins_as_its_own_reference(base: Path, tmp_path: Path) -> None:
    sections = {"model": {"quantization": "int4"}, "adapter": {"init_lora_weights": "loftq"}}
    trainer = made(recipe_of(base, "dpo", **sections), tmp_path, 8)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in weights_of(trainer).values())
    assert step(trainer, 1)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_reference_has_the_name_of_its_precision(base: Path) -> None:
    """Also of `full`, whose weights are float32 whatever computes."""
    keys = set()
    for dtype in ("float32", "bfloat16", "float16"):
        for adapter in ("full", "lora"):
            recipe = recipe_of(base, "dpo", model={"dtype": dtype}, adapter={"method": adapter})
            keys.add(reference.key_of(recipe, Base.open(recipe.model)))
    assert len(keys) == 5, "in float32 both hold the base alike"


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_reference_of_full_fine_tuning_is_the_policy(base: Path, tmp_path: Path, stage: str) -> None:
    """Not the base loaded once more without the recipe's rope_scaling, revision or layout."""
    sections = {"adapter": {"method": "full"}, "model": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}}
    trainer = made(recipe_of(base, stage, **sections), tmp_path)
    assert step(trainer, 1)[0] == pytest.approx({"dpo": math.log(2), "kto": 0.5}[stage], abs=1e-6)
    assert not list(trainer.ref_model.parameters()), "no second model"


def scored(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Log-probability of an answer, by transformers alone."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    logps = logits[-len(answer) - 1 : -1].log_softmax(-1)
    return float(logps.gather(-1, torch.tensor(answer)[:, None]).sum())


STARTS: dict[str, dict[str, Any]] = {
    "lora": {}, "pissa": {"init_lora_weights": "pissa"}, "full": {"method": "full"}, "adapter": {},
    "prompt_tuning": {"method": "prompt_tuning"}, "prefix_tuning": {"method": "prefix_tuning"},
}  # fmt: skip


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_reference_is_where_the_policy_starts(
    base: Path, tmp_path: Path, recipe: Callable[..., Path], stage: str, start: str
) -> None:
    """Every row has the log-probabilities of the model it starts from: the adapter's, else the base's. A fresh soft
    prompt is no reference, as it changes every answer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    expected = AutoModelForCausalLM.from_pretrained(base)
    values = recipe_of(base, stage, adapter=STARTS[start] or {}, data={"max_samples": 8, "eval_split": 2}).model_dump(
        exclude={"adapter"} if start == "adapter" else None, exclude_unset=True
    )
    if start == "adapter":
        sft = train(recipe(train={"max_steps": 6}))
        values["model"]["adapter"] = str(sft.path)
        expected = PeftModel.from_pretrained(expected, sft.adapter)
    trainer = made(check(yaml.safe_load(json.dumps(values, default=str)), stage), tmp_path, 16)  # all in one step
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        for row in rows:
            if stage == "dpo":
                found = [row["ref_chosen_logps"], row["ref_rejected_logps"]]
                pairs = []
                for name in ("chosen", "rejected"):
                    ids, at = row[f"{name}_ids"], row[f"{name}_mask"].index(1)
                    pairs.append((ids[:at], ids[at : at + sum(row[f"{name}_mask"])]))
            else:
                found = [row["ref_logps"], row["ref_KL_logps"]]
                pairs = [(row["prompt_ids"], row[f"{name}completion_ids"]) for name in ("", "KL_")]
            assert found == pytest.approx([scored(expected.eval(), *pair) for pair in pairs], abs=2e-3)


@pytest.mark.parametrize(
    "adapter",
    [{"method": "lora", "r": 4}, {"method": "prompt_tuning"}, {"method": "last_layers", "num_layers": 1}],
    ids=lambda adapter: adapter["method"],
)
def test_reward_goes_on_with_the_head_of_its_start(base: Path, tmp_path: Path, adapter: dict[str, Any]) -> None:
    """With another seed: the same would draw the same head. It gives the scores that plain peft gives for the start."""
    first = run_reward(reward_recipe(tmp_path, base, adapter=adapter, train={"max_steps": 4}))
    again = recipe_of(base, "reward", model={"adapter": str(first.path)}, train={"seed": 7})
    values = again.model_dump(exclude={"adapter"}, exclude_unset=True)
    trainer = made(check(yaml.safe_load(json.dumps(values)), "reward"), tmp_path)
    stored = tensors(first.adapter)
    (head,) = (tensor for name, tensor in stored.items() if name.endswith("score.weight"))
    (ours,) = (tensor for name, tensor in weights_of(trainer).items() if "score" in name)
    assert torch.equal(ours, head)
    rows = [trainer.processing_class(text(i, "yes"))["input_ids"] for i in range(4)]
    with torch.no_grad():
        theirs = [plain_peft(base, first.adapter)(input_ids=torch.tensor([row])).logits.item() for row in rows]
    assert score_rows(trainer.model.eval(), rows, 0) == pytest.approx(theirs, abs=1e-5)


def test_an_answer_is_scored_at_its_end_whatever_is_trained(base: Path, tmp_path: Path) -> None:
    """Also where the template writes on behind it; and the recipe's key, without effect, is named."""
    encoder = make_encoder(tokenizers.load_tokenizer(ModelConfig(name=str(base))))
    file = write_rows(
        tmp_path / "pairs.jsonl", [{"prompt": f"say {i}", "chosen": "yes", "rejected": "no"} for i in "ab"]
    )
    ids = [
        load_pairs(DataConfig(train=str(file), train_on=what), encoder, to_score=True).train["chosen_ids"]
        for what in ("assistant", "last", "all")
    ]
    assert ids[0] == ids[1] == ids[2]
    assert all(row[-1] == encoder.end_id for row in ids[0])
    with pytest.raises(UserError, match=r"data\.train_on.*no effect"):
        made(recipe_of(base, "reward", data={"train_on": "all"}), tmp_path)


@pytest.mark.parametrize("stage", ["dpo", "kto", "ppo", "pretrain"])
def test_the_weight_of_a_source_counts_in_every_stage(base: Path, tmp_path: Path, stage: str) -> None:
    from finetune.data import text as raw

    encoder = make_encoder(tokenizers.load_tokenizer(ModelConfig(name=str(base))))
    once, often = (
        write_rows(
            tmp_path / f"{name}.jsonl",
            [{"text": f"{name} {i}"} if stage == "pretrain" else
             {"prompt": f"{name} {i}", "chosen": "yes", "rejected": "no"} for i in range(40)],
        )
        for name in ("once", "often")
    )  # fmt: skip
    data = DataConfig(train=[SourceConfig(path=str(once)), SourceConfig(path=str(often), weight=2.5)])
    if stage == "pretrain":
        found = list(raw.documents(data, 0, 1))
        assert found[:80] == [*(f"once {i}" for i in range(40)), *(f"often {i}" for i in range(40))]
    elif stage == "ppo":
        found = [prompt.text for prompt in load_prompts(data, encoder).train]
    else:
        rows = (load_pairs if stage == "dpo" else load_unpaired)(data, encoder).train
        column, answers = ("chosen_ids", 1) if stage == "dpo" else ("prompt_ids", 2)
        texts = [encoder.tokenizer.decode(ids).split("user\n")[1].split("<")[0] for ids in rows[column]]
        assert len(texts) % answers == 0
        found = texts[::answers] if stage == "dpo" else sorted(texts)[::2]
    counts = [sum(text.startswith(name) for text in found) for name in ("once ", "often ")]
    assert counts[0] == 40
    assert 88 <= counts[1] <= 112, "twice, and for about half of the rows once more"


@pytest.mark.parametrize("method", [*(name for name, row in METHODS.items() if row.make_config), "dora"])
def test_weight_decay_reaches_matrices_only(base: Path, method: str) -> None:
    """By what a parameter is: no vector, scale, bias or norm; LoRA's of rank 1 are matrices."""
    network = loading.load_model(ModelConfig(name=str(base), sanity_check=False), torch.float32, hardware.detect())
    options: dict[str, Any] = {"lora": {"r": 1}, "dora": {"use_dora": True}, "vera": {"r": 8}}.get(method, {})
    section = ADAPTERS["lora" if method == "dora" else method].model_validate(options)
    model = apply(network, section, tokenizers.load_tokenizer(ModelConfig(name=str(base))))  # type: ignore[arg-type]
    names = set(decayed(model))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kept = {n for n in trained if n not in names}
    vectors = {"ia3", "vera", "bitfit", "ln_tuning"}
    assert (kept == set(trained)) is (method in vectors)
    assert all(p.ndim > 1 for n, p in trained.items() if n in names)
    for part in ("bias", "magnitude", "ia3_l", "lora_E", "vera_lambda", "norm"):
        assert not [n for n in trained if n in names and part in n], part
    if method in ("dora", "adalora"):
        assert kept
    if method == "lora":
        assert not kept


def test_resolved_recipes_stay_valid(base: Path) -> None:
    """What a run writes down, every default in it, can be run again."""
    for loss in ("sigmoid", "simpo", "robust"):
        recipe = resolve(recipe_of(base, "dpo", dpo={"loss_type": loss}), hardware.detect())
        assert check(yaml.safe_load(recipe.model_dump_json()), "dpo") == recipe
