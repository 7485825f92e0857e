"""How answers are written: as the recipe says, whatever the base's generation_config.json asks for, and whatever else
is in the batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ft, train, write_rows

from finetune.commands import chat, evaluate
from finetune.data.chat import make_encoder
from finetune.errors import UserError
from finetune.evaluation import generation
from finetune.evaluation.generation import GREEDY, Settings, answer, generate, left_pad, stop_ids
from finetune.evaluation.options import overridden
from finetune.models import loading, tokenizers
from finetune.recipe.sections import ModelConfig
from finetune.rl import replies

ASKS = {
    "repetition_penalty": 1.3, "do_sample": True, "top_k": 5, "forced_bos_token_id": 9, "forced_eos_token_id": 9,
    "suppress_tokens": list(range(40, 90)), "begin_suppress_tokens": list(range(90, 140)), "min_new_tokens": 7,
    "eos_token_id": [2, 1],
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same base, with only its stop tokens and with all that a generation_config.json can ask for."""
    folders = []
    for name, asks in (("quiet", {"eos_token_id": ASKS["eos_token_id"]}), ("asking", ASKS)):
        folder = Path(shutil.copytree(base, tmp_path_factory.mktemp("pair") / name))
        (folder / "generation_config.json").write_text(json.dumps(asks))
        folders.append(folder)
    return folders


def opened(folder: Path) -> tuple[Any, Any]:
    config = ModelConfig(name=str(folder))
    return loading.load_model(config, torch.float32), make_encoder(tokenizers.load_tokenizer(config))


@pytest.fixture(scope="module")
def asked(pair: list[Path]) -> tuple[Any, Any, list[list[int]]]:
    model, encoder = opened(pair[1])
    return model, encoder, [encoder.prompt_ids([{"role": "user", "content": "ab" * n}]) for n in (1, 9, 4, 30, 2)]


def test_what_a_base_asks_for_changes_no_answer(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In eval, chat and PPO's rollouts; its stop tokens count, and what is not followed is said."""
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ab" * n, "answer": "x"} for n in range(1, 6)])
    found: list[list[Any]] = []
    for folder in pair:
        file = tmp_path / f"{folder.name}.jsonl"
        evaluate.run([], model=str(folder), data=str(data), limit=3, predictions=str(file), show=0)
        evaluated = [json.loads(line)["prediction"] for line in file.read_text().splitlines()]
        capsys.readouterr()
        lines = iter(["abab", "/exit"])
        monkeypatch.setattr("builtins.input", lambda prompt: next(lines))  # noqa: B023
        monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
        chat.run([str(folder)], max_new_tokens=12)
        said = capsys.readouterr()
        model, encoder = opened(folder)
        assert set(stop_ids(model, encoder)) == {1, 2}
        prompts = [encoder.prompt_ids([{"role": "user", "content": "ab" * n}]) for n in (1, 2, 7)]
        torch.manual_seed(0)
        drawn = replies.sample(model, prompts, replies.Sampling(max_new_tokens=8), [2], 0, 3)
        found.append([evaluated, said.out, drawn.ids.tolist()])
    assert found[0] == found[1]
    assert "repetition_penalty 1.3" in said.err
    assert "do_sample" in said.err


@pytest.mark.parametrize("how", [Settings(temperature=1.0, seed=3), Settings(temperature=0.8, top_k=9, top_p=0.7)])
def test_a_drawn_answer_does_not_depend_on_its_batch(asked: tuple[Any, Any, list[list[int]]], how: Settings) -> None:
    model, encoder, prompts = asked
    found = [generate(model, encoder, prompts, 10, size, how=how) for size in (1, 2, 5)]
    assert found[0] == found[1] == found[2]
    assert found[0] != generate(model, encoder, prompts, 10, 5, how=how.model_copy(update={"seed": 8}))


def test_top_k_and_top_p_are_those_of_transformers(asked: tuple[Any, Any, list[list[int]]]) -> None:
    """Of 400 first tokens each one lies in what top-k and top-p leave, and all of that is drawn."""
    model, _, prompts = asked
    ids, mask = left_pad([prompts[0]] * 400, 0, torch.device("cpu"))
    with torch.inference_mode():
        p, order = (model(ids[:1]).logits[0, -1] / 0.2).softmax(-1).sort(descending=True)
    for how, kept in (
        (Settings(temperature=0.2, top_k=4), 4),
        (Settings(temperature=0.2, top_p=0.3), int((p.cumsum(0) - p < 0.3).sum())),
    ):
        draws = generation.uniforms(1, range(400), 1)
        found = answer(model, ids, mask, 1, [], 0, how, draws)[:, -1]
        assert set(found.tolist()) == set(order[:kept].tolist())


def test_the_penalty_sees_no_padding(asked: tuple[Any, Any, list[list[int]]]) -> None:
    """A row alone is as transformers has it; among longer ones it is the same, though padding is the end token."""
    model, _, prompts = asked
    how, stop = Settings(repetition_penalty=1.7), 2
    alone = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        written = answer(model, ids, torch.ones_like(ids), 12, [stop], stop, how)
        with generation.only_as_told(model):
            stock = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, repetition_penalty=1.7,
                do_sample=False, eos_token_id=stop, pad_token_id=stop,
            )  # fmt: skip
        assert written.tolist() == stock.tolist()
        alone.append(generation.up_to_stop(written[0, len(prompt) :].tolist(), [stop]))
    (batch,) = generation.written(model, prompts, 12, 5, [stop], stop, how)
    assert [ids for _, ids in sorted(batch)] == alone
    (plain,) = generation.written(model, prompts, 12, 5, [stop], stop)
    assert sorted(plain) != sorted(batch)


def test_beams(asked: tuple[Any, Any, list[list[int]]]) -> None:
    model, _, prompts = asked
    (batch,) = generation.written(model, prompts, 6, 5, [2], 2, Settings(num_beams=3, repetition_penalty=1.2))
    for i, found in batch:
        ids = torch.tensor([prompts[i]])
        with generation.only_as_told(model):
            stock = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, num_beams=3, do_sample=False,
                repetition_penalty=1.2, eos_token_id=2, pad_token_id=2,
            )  # fmt: skip
        assert found == generation.up_to_stop(stock[0, len(prompts[i]) :].tolist(), [2])


def test_options_stand_above_the_recipe() -> None:
    recipe = Settings(temperature=0.7, top_p=0.9, seed=4)
    assert overridden(recipe, {"temperature": None, "top_p": 0.5}) == Settings(temperature=0.7, top_p=0.5, seed=4)
    assert str(overridden(recipe, {"temperature": 0.0})) == "greedy"
    assert str(recipe) == "temperature 0.7, top_p 0.9, seed 4"
    assert overridden(Settings(num_beams=4), {"temperature": 1.0}) == Settings(temperature=1.0)
    for settings, given, expected in (
        (GREEDY, {"seed": 3}, "--seed: has no effect: answers are greedy"),
        (GREEDY, {"top_k": 3}, "--top-k: has no effect"),
        (recipe, {"num_beams": 3}, "--num-beams: beams are not drawn"),
    ):
        with pytest.raises(UserError, match=expected):
            overridden(settings, given)


def test_a_run_is_asked_as_its_recipe_says(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """eval.generation of the run; options win; the JSON and the table say what was used."""
    data = write_rows(tmp_path / "held.jsonl", [{"prompt": "ab" * n, "answer": "x"} for n in (1, 2, 3)])
    section = {"data": str(data), "max_new_tokens": 8, "generation": {"temperature": 0.9, "top_k": 40, "seed": 5}}
    path = recipe(eval=section)
    train(path, "train.max_steps=1")
    file = tmp_path / "eval.json"
    done = ft("eval", "run", "--json", file, cwd=tmp_path)
    assert "n=3, temperature 0.9, top_k 40, seed 5" in " ".join(done.stdout.split())
    said = json.loads(file.read_text())["runs"][0]["generation"]
    assert {**said, "not_followed": 0} == {
        "max_new_tokens": 8, "temperature": 0.9, "top_k": 40, "top_p": 1.0, "num_beams": 1, "repetition_penalty": 1.0,
        "seed": 5, "not_followed": 0,
    }  # fmt: skip
    assert "n=3, greedy" in ft("eval", "run", "--temperature", "0", cwd=tmp_path).stdout
    assert "answers: temperature 0.9, top_k 40, seed 5" in ft("chat", "run", cwd=tmp_path, stdin="").stderr
    values = yaml.safe_load(path.read_text())
    values["eval"]["generation"] = {"temperature": 0.0, "repetition_penalty": 1.2}
    path.write_text(yaml.safe_dump(values))
    edited = ft("eval", "--recipe", path, cwd=tmp_path)
    assert "n=3, greedy, repetition_penalty 1.2" in " ".join(edited.stdout.split())
    assert "eval.generation" in edited.stderr
