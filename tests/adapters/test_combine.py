"""Several adapters as one: what each combination is, against matrices computed here in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import adapter, ft, tensors
from safetensors.torch import save_file
from transformers import AutoTokenizer

from finetune.adapters import combine as module
from finetune.adapters import weighted
from finetune.adapters.weighted import Combination, Part
from finetune.commands import merge
from finetune.errors import RunError, UserError
from finetune.models import loading
from finetune.recipe.sections import ModelConfig

Matrices = dict[str, torch.Tensor]
Q, V, DOWN = "q_proj", "v_proj", "down_proj"


def factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Layer -> (A, B, scale), read from the files."""
    config, state = json.loads((folder / "adapter_config.json").read_text()), tensors(folder)
    found = {}
    for key in state:
        if ".lora_A." in key:
            layer = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
            a, b = state[key].double(), state[key.replace("lora_A", "lora_B")].double()
            alpha = next((v for k, v in config["alpha_pattern"].items() if layer.endswith(k)), config["lora_alpha"])
            found[layer] = (a, b, alpha / (len(a) ** 0.5 if config["use_rslora"] else len(a)))
    return found


def deltas(folder: Path) -> Matrices:
    return {layer: scale * b @ a for layer, (a, b, scale) in factors(folder).items()}


def weighted_sum(parts: list[Part]) -> Matrices:
    total: Matrices = {}
    for part in parts:
        for layer, delta in deltas(part.folder).items():
            total[layer] = total.get(layer, torch.zeros_like(delta)) + part.weight * delta
    return total


def combined(base: Path, parts: list[Part], out: Path, kind: str, **more: Any) -> tuple[Matrices, Any]:
    how = weighted.combination(parts, kind, more.get("density"), more.get("seed"), more.get("svd_rank"))
    assert how is not None
    weighted.check(parts, how)
    outcome = module.combine(parts, how, ModelConfig(name=str(base), sanity_check=False), out)
    return deltas(out), outcome


def close(found: Matrices, expected: Matrices) -> None:
    assert found.keys() == expected.keys()
    for layer, delta in expected.items():
        torch.testing.assert_close(
            found[layer], delta, atol=2e-6, rtol=1e-5, msg=lambda text, at=layer: f"{at}: {text}"
        )


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Part]:
    """Two of one rank on the same layers."""
    folder = tmp_path_factory.mktemp("pair")
    return [Part(adapter(base, folder / "a", 1), 0.7), Part(adapter(base, folder / "b", 2), 0.3)]


@pytest.fixture(scope="module")
def uneven(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Part]:
    """Of other ranks and scales, on other layers, one with a rank of its own on one of them."""
    folder = tmp_path_factory.mktemp("uneven")
    pattern = {"rank_pattern": {"layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}
    return [
        Part(adapter(base, folder / "a", 1, r=2, use_rslora=True), 0.5),
        Part(adapter(base, folder / "b", 2, r=4, targets=[Q, DOWN], **pattern), -1.5),
        Part(adapter(base, folder / "c", 3, r=4, targets=["k_proj", "v_proj"], layers_to_transform=[1]), 2.0),
    ]


@pytest.mark.parametrize("which", ["pair", "uneven"])
def test_cat_is_the_weighted_sum(which: str, base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    parts = request.getfixturevalue(which)
    found, outcome = combined(base, parts, tmp_path / "out", "cat")
    close(found, weighted_sum(parts))
    assert outcome.difference < 1e-6
    assert outcome.worst < 1e-6


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("which", ["pair", "uneven"])
def test_svd_is_the_best_sum_of_that_rank(
    which: str, rank: int | None, base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Eckart-Young: nothing of that rank is nearer, and what is missed is what the terminal says."""
    parts = request.getfixturevalue(which)
    found, outcome = combined(base, parts, tmp_path / "out", "svd", svd_rank=rank)
    missed = whole = 0.0
    for layer, total in weighted_sum(parts).items():
        singular = torch.linalg.svdvals(total)
        kept = rank or (4 if which == "pair" else 6)
        best = singular[kept:].norm().item()
        assert (found[layer] - total).norm().item() == pytest.approx(best, abs=1e-5)
        missed, whole = missed + best**2, whole + total.norm().item() ** 2
    assert outcome.cut == pytest.approx((missed / whole) ** 0.5, rel=1e-4, abs=1e-7)
    assert outcome.difference == pytest.approx(outcome.cut, abs=1e-6)
    assert f"{outcome.cut:.2g} is what rank {outcome.rank} cuts off" in outcome.said()


def test_linear_is_no_weighted_sum_and_says_how_far_it_is(base: Path, pair: list[Part], tmp_path: Path) -> None:
    """(Σ √(w s) B)(Σ √(w s) A): the weighted sum and two cross terms."""
    found, outcome = combined(base, pair, tmp_path / "out", "linear")
    one, two = (factors(part.folder) for part in pair)
    total, missed, whole = weighted_sum(pair), 0.0, 0.0
    for layer, (a, b, scale) in one.items():
        other_a, other_b, other = two[layer]
        cross = (0.7 * scale * 0.3 * other) ** 0.5
        difference = cross * (b @ other_a + other_b @ a)
        torch.testing.assert_close(found[layer], total[layer] + difference, atol=2e-6, rtol=1e-5)
        missed, whole = missed + difference.norm().item() ** 2, whole + total[layer].norm().item() ** 2
    assert outcome.difference == pytest.approx((missed / whole) ** 0.5, rel=1e-4)
    assert outcome.difference > 0.1
    assert f"differs from the weighted sum by {outcome.difference:.2g}" in outcome.said()


def trimmed(matrix: torch.Tensor, density: float) -> torch.Tensor:
    """The largest entries, by size."""
    kept = int(density * matrix.numel())
    threshold = matrix.abs().flatten().sort(descending=True).values[kept - 1]
    return torch.where(matrix.abs() >= threshold, matrix, 0.0)


def elected(matrices: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Entry by entry: the sign with more weight behind it before weighing, and the mean of those that have it."""
    total = sum(matrices)
    assert torch.is_tensor(total)
    sign = torch.where(total >= 0, 1.0, -1.0).double()
    agree = [(m.sign() == sign).double() for m in matrices]
    votes: Any = sum(agree)
    sums: Any = sum(w * m * yes for w, m, yes in zip(weights, matrices, agree, strict=True))
    return torch.as_tensor(sums / votes.clamp(min=1.0))


def reference(parts: list[Part], thinned: Callable[[torch.Tensor], torch.Tensor]) -> Matrices:
    """On A and on B, each with the root of weight × scale, as peft's documentation has it."""
    all_of = [factors(part.folder) for part in parts]
    out = {}
    for layer in all_of[0]:
        roots = [(part.weight * one[layer][2]) ** 0.5 for part, one in zip(parts, all_of, strict=True)]
        a, b = (elected([thinned(one[layer][at]) for one in all_of], roots) for at in (0, 1))
        out[layer] = b @ a
    return out


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties(base: Path, pair: list[Part], tmp_path: Path, density: float) -> None:
    found, outcome = combined(base, pair, tmp_path / "out", "ties", density=density)
    expected = reference(pair, lambda matrix: trimmed(matrix, density))
    close(found, expected)
    total = weighted_sum(pair)
    missed = sum((expected[layer] - total[layer]).norm().item() ** 2 for layer in total)
    whole = sum(total[layer].norm().item() ** 2 for layer in total)
    assert outcome.difference == pytest.approx((missed / whole) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("seed", [0, 7])
def test_dare_ties(base: Path, pair: list[Part], tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was drawn kept: for each layer A of both, then B of both."""
    draws: list[torch.Tensor] = []
    real = torch.bernoulli
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", lambda chances: draws.append(real(chances)) or draws[-1])
        found, _ = combined(base, pair, tmp_path / "out", "dare_ties", density=0.6, seed=seed)
    assert torch.cat([mask.flatten() for mask in draws]).mean().item() == pytest.approx(0.6, abs=0.03)
    masks = iter(draws)
    close(found, reference(pair, lambda matrix: matrix * next(masks) / 0.6))
    assert next(masks, None) is None
    again, _ = combined(base, pair, tmp_path / "again", "dare_ties", density=0.6, seed=seed)
    other, _ = combined(base, pair, tmp_path / "other", "dare_ties", density=0.6, seed=seed + 1)
    assert all(torch.equal(again[layer], delta) for layer, delta in found.items())
    assert not all(torch.equal(other[layer], delta) for layer, delta in found.items())


def test_a_sum_that_is_none_is_not_written(
    base: Path, pair: list[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import LoraModel

    real = LoraModel.add_weighted_adapter

    def wrong(self: Any, adapters: Any, weights: list[float], *names: Any, **more: Any) -> None:
        real(self, adapters, [1.01 * weight for weight in weights], *names, **more)

    monkeypatch.setattr(LoraModel, "add_weighted_adapter", wrong)
    for kind in ("cat", "svd"):
        with pytest.raises(RunError, match=f"{kind} does not give the weighted sum"):
            combined(base, pair, tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


def test_merged_is_the_base_and_the_weighted_sum(
    base: Path, uneven: list[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command, from another folder; the base is loaded once it is known that all fits."""
    words = [word for part in uneven for word in ("--adapter", f"{part.folder}:{part.weight}")]
    done = ft("merge", *words, "--output", "merged", "--model", base, "--dtype", "float32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert "combined by cat: the weighted sum itself" in said
    assert "merged 3 adapters of type LORA" in said
    own, written, total = tensors(base), tensors(tmp_path / "merged"), weighted_sum(uneven)
    for name, tensor in own.items():
        delta = total.get(name.removesuffix(".weight"), torch.zeros(()))
        torch.testing.assert_close(written[name].double(), tensor.double() + delta, atol=2e-6, rtol=1e-5)
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert [part["weight"] for part in report["adapters"]] == [0.5, -1.5, 2.0]
    assert report["combine"] == "cat"
    assert report["difference_to_weighted_sum"] < 1e-6
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| adapters | a × 0.5, b × -1.5, c × 2 |" in card
    assert "| combined by | cat |" in card
    assert str(tmp_path) not in card


def test_one_adapter_with_a_weight(base: Path, pair: list[Part], tmp_path: Path) -> None:
    merge.run(f"{pair[0].folder}:0.25", str(tmp_path / "merged"), model=str(base), dtype="float32")
    own, written, delta = tensors(base), tensors(tmp_path / "merged"), deltas(pair[0].folder)
    name = "model.layers.1.self_attn.q_proj"
    expected = own[f"{name}.weight"].double() + 0.25 * delta[name]
    torch.testing.assert_close(written[f"{name}.weight"].double(), expected, atol=2e-6, rtol=1e-5)


# --- what is given ---


def test_a_path_with_a_colon_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:0.5", "b", "c:d"):
        (tmp_path / name).mkdir()
    split = weighted.split
    assert split("a:0.5") == ("a:0.5", 1.0)
    assert split("a:0.5:0.25") == ("a:0.5", 0.25)
    assert split("b:0.5") == ("b", 0.5)
    assert split("c:d") == ("c:d", 1.0)
    assert split("c:d:-1e-1") == ("c:d", -0.1)
    assert split(r"C:\runs\x:0.7") == (r"C:\runs\x", 0.7)
    assert split(r"C:\runs\x") == (r"C:\runs\x", 1.0)
    assert split("b:") == ("b:", 1.0)
    assert split(":0.5") == (":0.5", 1.0)
    for wrong in ("b:0", "b:nan", "b:inf", "b:-0.0"):
        with pytest.raises(UserError, match="cannot be weighed with"):
            split(wrong)


def edited(folder: Path, file: str, **keys: Any) -> None:
    path = folder / file
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **keys}))


def other_base(folder: Path) -> None:
    edited(folder, "adapter_config.json", base_model_name_or_path="owner/other")


def other_weights(folder: Path) -> None:
    edited(folder, "base_identity.json", base="there", fingerprint="xxh3:1")


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def other_thinking(folder: Path) -> None:
    record = {"data.thinking": "drop", "rows_with": 0, "rows_without": 4, "shown": ["off"]}
    (folder / "thinking.json").write_text(json.dumps(record))


def other_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)


def embeddings(folder: Path) -> None:
    table = {"base_model.model.model.embed_tokens.weight": torch.zeros(259, 64)}
    save_file({**tensors(folder), **table}, folder / "adapter_model.safetensors", {"format": "pt"})


def keys(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edited(folder, "adapter_config.json", **values)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "base": (other_base, "b: --adapter: its base is owner/other, that of .*a "),
    "weights": (other_weights, "b: --adapter: its base is there, other weights"),
    "template": (other_template, "b: --adapter: has another chat template than .*a"),
    "tokens": (other_tokens, "b: --adapter: has other tokens than .*a"),
    "thinking": (other_thinking, r"b: --adapter: its record of thinking \(thinking.json\) is drop \(shown off\)"),
    "type": (keys(peft_type="LOHA"), "b: --adapter: is loha, and only adapters of type lora"),
    "DoRA": (keys(use_dora=True), "b: --adapter: has use_dora"),
    "bias": (keys(bias="all"), "b: --adapter: has bias"),
    "whole modules": (keys(modules_to_save=["lm_head"]), "b: --adapter: has modules_to_save"),
    "start": (keys(init_lora_weights="pissa_niter_4"), "b: --adapter: has init_lora_weights"),
    "embeddings": (embeddings, "b: --adapter: holds embeddings whole"),
}


@pytest.mark.parametrize(("change", "expected"), REFUSED.values(), ids=REFUSED)
def test_adapters_of_two_kinds(
    change: Callable[[Path], None], expected: str, base: Path, pair: list[Part], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By name, in one line, before the base is loaded."""
    for part, name in zip(pair, "ab", strict=True):
        shutil.copytree(part.folder, tmp_path / name)
    edited(tmp_path / "a", "base_identity.json", base=str(base), fingerprint="xxh3:0")
    if change is not other_weights:
        (tmp_path / "a" / "base_identity.json").unlink()
    thinking = {"data.thinking": "keep", "rows_with": 4, "rows_without": 0, "shown": ["on"]}
    (tmp_path / "a" / "thinking.json").write_text(json.dumps(thinking))
    change(tmp_path / "b")
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match=expected) as caught:
        merge.run([f"{tmp_path / 'a'}:0.5", f"{tmp_path / 'b'}:0.5"], str(tmp_path / "merged"), model=str(base))
    assert len(caught.value.lines()) == 1
    assert not list(tmp_path.glob("merged*"))


WORDS: dict[str, tuple[list[str], str]] = {
    "unknown": (["--combine", "slerp"], "--combine: unknown combination 'slerp' → one of cat, svd, linear, ties, dare"),
    "density": (["--combine", "cat", "--density", "0.5"], "--density: has no effect on cat"),
    "no share": (["--combine", "ties", "--density", "1.5"], "--density: is 1.5"),
    "seed": (["--combine", "ties", "--seed", "1"], "--seed: has no effect on ties"),
    "rank": (["--svd-rank", "2"], "--svd-rank: has no effect on cat"),
    "size": (["--max-shard-size", "five"], "--max-shard-size: 'five' is no size"),
    "hub": (["--hub", "modelscope"], "--hub: has no effect without --push-to-hub"),
    "public": (["--public"], "--public: has no effect without --push-to-hub"),
}


@pytest.mark.parametrize(("words", "expected"), WORDS.values(), ids=WORDS)
def test_options_without_an_effect(words: list[str], expected: str, base: Path, pair: list[Part]) -> None:
    given = [f"{pair[0].folder}", f"{pair[1].folder}:0.5"]
    done = ft("merge", *given, "--output", "x", "--model", base, *words)
    assert done.returncode == 2
    assert expected in " ".join(done.stderr.split())


def test_factors_of_one_shape_only(base: Path, pair: list[Part], uneven: list[Part], tmp_path: Path) -> None:
    for kind in ("linear", "ties", "dare_ties"):
        with pytest.raises(UserError, match=rf"its rank is 6, that of .* 4, and {kind} adds matrices of one shape"):
            weighted.check([pair[0], uneven[1]], Combination(kind, 0.5))
    same_largest = adapter(base, tmp_path / "s", 3, r=6)
    parts = [uneven[1], Part(same_largest)]
    with pytest.raises(UserError, match=r"linear adds matrices of one shape, and the ranks on .*q_proj differ"):
        combined(base, parts, tmp_path / "out", "linear")


def test_signs_are_not_voted_on_below_zero(pair: list[Part]) -> None:
    parts = [pair[0], Part(pair[1].folder, -0.5)]
    with pytest.raises(UserError, match="a weight below zero"):
        weighted.combination(parts, "ties", None, None, None)
    assert weighted.combination(parts, "linear", None, None, None) == Combination("linear")


def test_one_is_no_combination(pair: list[Part]) -> None:
    with pytest.raises(UserError, match="--combine: has no effect on one adapter"):
        weighted.combination(pair[:1], "svd", None, None, None)
    with pytest.raises(UserError, match="is given twice"):
        weighted.parts_of([f"{pair[0].folder}:0.5", str(pair[0].folder)])
