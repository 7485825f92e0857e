"""`ft merge`: the written model computes what base and adapter compute together, or it is not written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tensors, train, write_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from finetune.adapters.merge import in_float32, logits_of
from finetune.commands import merge
from finetune.early import merging
from finetune.errors import RunError, UserError
from finetune.models import attach
from finetune.models.export import FORMATS

Recipe = Callable[..., Path]


def merged(run: Path, output: Path, dtype: str | None = None, **more: object) -> dict[str, object]:
    merge.run(str(run), str(output), dtype=dtype, overwrite=bool(more.get("overwrite")))
    report: dict[str, object] = json.loads((output / "merge.json").read_text())
    return report


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a LoRA on every linear layer."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i} {i * 7}"}]}
            for i in range(64)]  # fmt: skip
    values = {
        "version": 1, "stage": "sft", "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(write_rows(folder / "rows.jsonl", rows)), "max_length": 64},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8},
        "train": {"max_steps": 3, "effective_batch_size": 8, "learning_rate": 1e-2},
        "output": {"dir": str(folder / "run")},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(values))
    path: Path = train(folder / "recipe.yaml").path
    return path


def small_llama(folder: Path, dtype: torch.dtype, tied: bool, scale: float = 1.0) -> Path:
    tokenizer = make_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            parameter.data *= scale
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def peft_adapter(base: Path, folder: Path, targets: Any, std: float = 0.05) -> Path:
    """A LoRA of scale 2, as plain peft writes it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's on tied embeddings
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=std)
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merged_equals_unmerged(
    recipe: Recipe, base: Path, tmp_path: Path, adapter: dict[str, object], dtype: str
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = train(recipe(adapter=adapter, train={"max_steps": 12}))
    report = merged(run.path, tmp_path / "merged", dtype)
    kind = getattr(torch, dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.dtype == kind
    pair = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=kind), run.adapter)
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("another text", return_tensors="pt")["input_ids"]
    difference = (plain(ids).logits - pair(ids).logits).abs().max().item()
    assert difference < {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}[dtype]
    assert report["max_logit_diff"] <= report["adapter_effect"] / 10
    assert report["dtype"] == dtype


def test_template_and_stop_tokens_come_along(recipe: Recipe, base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    run = train(recipe())
    merged(run.path, tmp_path / "merged")
    template = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert template == AutoTokenizer.from_pretrained(base).chat_template
    assert 2 in GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id


def test_a_wrong_merge_is_not_written(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(recipe())

    def forget_the_adapter(model: torch.nn.Module) -> torch.nn.Module:
        return model.unload()  # type: ignore[operator, no-any-return]

    monkeypatch.setattr(merge.merge, "merge_in_float32", forget_the_adapter)
    with pytest.raises(RunError, match="differs from base"):
        merged(run.path, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir() if "merged" in p.name] == []


def lose_all(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()


def lose_one(model: Any) -> None:
    next(p for name, p in model.named_parameters() if "layers.1.mlp.up_proj.lora_B" in name).data.zero_()


def scale_wrongly(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1.01)


def round_twice(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16().float()


@pytest.mark.parametrize("mutation", [lose_all, lose_one, scale_wrongly, round_twice])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_merged_is_what_was_proven(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: Callable[[Any], None], dtype: str
) -> None:
    real = merge.merge.merge_in_float32

    def wrong(model: Any) -> Any:
        mutation(model)
        return real(model)

    monkeypatch.setattr(merge.merge, "merge_in_float32", wrong)
    with pytest.raises(RunError, match="differs from base"):
        merged(trained, tmp_path / "merged", dtype)
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.01])
@pytest.mark.parametrize("only", ["", "layers.0.self_attn.v_proj"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sum_itself_is_proven(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, only: str, dtype: str
) -> None:
    """A library that adds the wrong update would do so twice alike."""
    from peft.tuners.lora.layer import Linear

    real, wrapped = Linear.get_delta_weight, attach.attach_adapter

    def marked(*arguments: Any, **options: Any) -> Any:
        model = wrapped(*arguments, **options)
        for name, module in model.named_modules():
            module.marked = only in name
        return model

    def wrong(self: Any, adapter: str) -> torch.Tensor:
        return real(self, adapter) * (factor if self.marked else 1.0)

    monkeypatch.setattr(attach, "attach_adapter", marked)
    monkeypatch.setattr(Linear, "get_delta_weight", wrong)
    with pytest.raises(RunError, match=rf"differs from base \+ adapter: in .*{only}"):
        merged(trained, tmp_path / "merged", dtype)


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_wrong_tensor_on_disk_is_found(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str
) -> None:
    real = FORMATS["hf"].load_for_proof

    def damaged(folder: Path, *arguments: Any) -> Any:
        weights = load_file(folder / "model.safetensors")
        own = load_file(base / "model.safetensors")[tensor]
        weights[tensor] = own + 2**-8 if tensor == "model.norm.weight" else own
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return real(folder, *arguments)

    monkeypatch.setitem(FORMATS, "hf", replace(FORMATS["hf"], load_for_proof=damaged))
    with pytest.raises(RunError, match=rf"1 of \d+ tensors are not.*{tensor}"):
        merged(trained, tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_the_sum_rounded_once(tmp_path: Path, stored: torch.dtype, tied: bool) -> None:
    """Over shards, with and without tied embeddings, from a base in the same and in a wider precision."""
    folder = small_llama(tmp_path / "base", stored, tied)
    adapter = peft_adapter(folder, tmp_path / "adapter", ["q_proj", "down_proj", "embed_tokens"])
    merge.run(str(adapter), str(tmp_path / "merged"), dtype="bfloat16", max_shard_size="30KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    own, found, weights = tensors(folder), tensors(tmp_path / "merged"), tensors(adapter)
    expected = {name: tensor.float() for name, tensor in own.items()}
    if tied:  # the adapter sits on the embedding, and the head has none: they are two matrices from now on
        expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    for name in list(expected):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in weights:
            a, b = weights[f"{key}.lora_A.weight"], weights[f"{key}.lora_B.weight"]
            expected[name] = expected[name] + 2.0 * (b @ a)
        elif f"{key}.lora_embedding_A" in weights:
            a, b = weights[f"{key}.lora_embedding_A"], weights[f"{key}.lora_embedding_B"]
            expected[name] = expected[name] + 2.0 * (b @ a).T
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_rounding_is_no_reason_to_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where bfloat16 moves logits by more than the adapter does, as it may on published models."""
    folder = small_llama(tmp_path / "base", torch.bfloat16, False, scale=30.0)
    adapter = peft_adapter(folder, tmp_path / "adapter", "all-linear", std=2e-3)
    report = merged(adapter, tmp_path / "merged")
    assert report["base_logit_diff"] > report["max_logit_diff"] / 10 > 0  # type: ignore[operator]
    assert report["max_logit_diff"] > report["adapter_effect"] / 2  # type: ignore[operator]
    assert "--dtype float32 keeps all of it" in " ".join(capsys.readouterr().err.split())
    assert report["sum"]["largest_miss"] < 1e-2  # type: ignore[index]
    assert merged(adapter, tmp_path / "wide", "float32")["base_logit_diff"] == 0


def test_an_adapter_of_no_numbers_is_refused(trained: Path, tmp_path: Path) -> None:
    import shutil

    adapter = Path(shutil.copytree(trained / "adapter", tmp_path / "adapter"))
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="no numbers"):
        merged(adapter, tmp_path / "merged")


def test_the_base_s_generation_config_is_kept(trained: Path, base: Path, tmp_path: Path) -> None:
    import shutil

    said = {"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.3, "suppress_tokens": [7], "of_ours": "x"}
    other = Path(shutil.copytree(base, tmp_path / "other"))
    (other / "generation_config.json").write_text(json.dumps({**said, "eos_token_id": [2, 9]}))
    merge.run(str(trained), str(tmp_path / "merged"), model=str(other))
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert written == {**said, "eos_token_id": [2, 9], "pad_token_id": 0}


def test_float32_in_passing(tmp_path: Path) -> None:
    """Weights are widened one module at a time, and afterwards they are what they were."""
    model = AutoModelForCausalLM.from_pretrained(small_llama(tmp_path / "base", torch.bfloat16, True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with in_float32(model):
        passing = logits_of(model, [[5, 6, 7, 8]])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(passing, logits_of(model.float(), [[5, 6, 7, 8]]), atol=1e-6, rtol=0)


def test_results_are_not_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe())
    merged(run.path, tmp_path / "merged")
    with pytest.raises(UserError, match="already holds files"):
        merged(run.path, tmp_path / "merged")
    (tmp_path / "merged" / "model.gguf").write_text("mine")
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    report = merged(run.path, tmp_path / "merged", overwrite=True)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == files == {*report["files"], "model.gguf"}  # type: ignore[misc]
    assert (tmp_path / "merged" / "model.gguf").read_text() == "mine"


def snapshot(folder: Path) -> dict[str, object]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else p.is_symlink() for p in folder.rglob("*")}


def test_overwrite_takes_nothing_that_no_merge_wrote(
    recipe: Recipe, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Foreign folders, the run itself, what holds it, the base, links; and a foreign folder where it would be built."""
    run = train(recipe())
    project, place = tmp_path / "project", tmp_path / "place"
    for folder in (project, place, tmp_path / "new.part"):
        folder.mkdir()
        (folder / "mine").write_text("mine")
    (place / "merge.json").write_text('{"models": [], "merge_method": "slerp"}')  # another tool's
    (tmp_path / "link").symlink_to(project)
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(project)
    before, of_base = snapshot(tmp_path), snapshot(base)
    targets = [project, place, run.path, run.adapter, run.checkpoints, tmp_path, base, base.parent, "/", ".", "..", "~"]
    for target in (*targets, tmp_path / "link", tmp_path / "lost", tmp_path / "new", place / "mine"):
        for overwrite in (True, False):
            with pytest.raises(UserError) as caught:
                merged(run.path, Path(target), overwrite=overwrite)
            assert caught.value.problems[0].key == "--output", target
    assert snapshot(tmp_path) == before
    assert snapshot(base) == of_base


def test_a_merge_is_no_place_for_what_is_merged(recipe: Recipe, tmp_path: Path) -> None:
    """The base is an earlier merge, and would be replaced by its own child."""
    first = train(recipe())
    merged(first.path, tmp_path / "merged")
    second = train(recipe(model={"name": str(tmp_path / "merged")}, output={"dir": str(tmp_path / "second")}))
    before = snapshot(tmp_path / "merged")
    with pytest.raises(UserError, match="is what is merged"):
        merged(second.path, tmp_path / "merged", overwrite=True)
    assert snapshot(tmp_path / "merged") == before


def test_a_failed_merge_leaves_the_one_before(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(recipe())
    merged(run.path, tmp_path / "merged")
    before = snapshot(tmp_path / "merged")

    def unproven(*_: object) -> None:
        assert snapshot(tmp_path / "merged") == before
        raise RunError("differs")

    monkeypatch.setattr(merge.merge, "check_written", unproven)
    with pytest.raises(RunError, match="differs"):
        merged(run.path, tmp_path / "merged", overwrite=True)
    assert snapshot(tmp_path / "merged") == before
    assert [path.name for path in tmp_path.iterdir() if "merged." in path.name] == []


def test_other_base_is_refused(recipe: Recipe, base: Path, tmp_path: Path) -> None:
    run = train(recipe())
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="was trained on another base"):
        merge.run(str(run.path), str(tmp_path / "merged"), model=str(other))


def test_changed_template_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    run = train(recipe())
    template = run.adapter / "chat_template.jinja"
    template.write_text(template.read_text().replace("im_start", "im_begin"))
    with pytest.raises(UserError, match="not the chat template"):
        merged(run.path, tmp_path / "merged")


def test_adapter_folder_of_plain_peft(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert merged(tmp_path / "adapter", tmp_path / "merged")["adapter_effect"] > 0.01  # type: ignore[operator]


def test_what_is_in_the_way_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "new.part").mkdir()
    (tmp_path / "new.part" / "mine").write_text("mine")
    with pytest.raises(UserError, match="is in the way"):
        merging.check_target(tmp_path / "new", False)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")  # since the check at the beginning
    with pytest.raises(UserError, match="already holds files"):
        merging.written_names(tmp_path / "there", True)
    for report in ({"adapter": "x", "versions": {}}, {"versions": {"ft": "0"}}):
        (tmp_path / "there" / "merge.json").write_text(json.dumps(report))
        with pytest.raises(UserError, match="already holds files"):
            merging.check_target(tmp_path / "there", True)
