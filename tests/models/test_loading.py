"""Where models come from, what is never run, how large ones are spread, and which adapter belongs to which base."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families_tiny as tiny
import pytest
import torch
from conftest import train
from safetensors.torch import load_file, save_file

from finetune.adapters.load import apply
from finetune.adapters.merge import logits_of
from finetune.commands import chat, evaluate, merge
from finetune.data.chat import make_encoder
from finetune.errors import UserError
from finetune.evaluation.generation import generate
from finetune.models import loading, modelscope, sources, tokenizers
from finetune.models.config import read_config
from finetune.models.identity import configs_of, fingerprint, read_identity
from finetune.recipe.adapters import LoraAdapter
from finetune.recipe.sections import ModelConfig

Recipe = Callable[..., Path]
IDS = [[5, 9, 17, 30, 44]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("loading") / "qwen2", "qwen2")


def config_of(name: str | Path, **keys: Any) -> ModelConfig:
    return ModelConfig(name=str(name), **{"sanity_check": False, **keys})


def load(name: str | Path, **keys: Any) -> Any:
    return loading.load_model(config_of(name, **keys), torch.float32)


def test_the_head_gets_its_input_in_one_piece(checkpoint: Path) -> None:
    """Of a slice torch would copy the head's weight once per row, in bfloat16 on CPUs."""
    model, seen = load(checkpoint), list[bool]()
    model.get_output_embeddings().register_forward_hook(
        lambda module, given, out: seen.append(given[0].is_contiguous())
    )
    model(torch.tensor([*IDS, *IDS]), logits_to_keep=2)
    assert seen == [True]


# --- sources ---


def hub_cache(root: Path, checkpoint: Path, commit: str = "0123abcd" * 5) -> Path:
    """The hub client's cache as a download leaves it: the only kind of hub there is without a network."""
    repository = root / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    for ref in ("main", "v1"):
        (repository / "refs" / ref).write_text(commit)
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    return repository


@pytest.fixture
def cached(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.constants
    import transformers.utils.hub

    for module in (huggingface_hub.constants, transformers.utils.hub):
        for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(tmp_path / "cache"))
    return hub_cache(tmp_path / "cache", checkpoint)


def test_a_hub_id_from_the_cache_by_revision(cached: Path, checkpoint: Path) -> None:
    for revision in (None, "v1", "0123abcd" * 5):
        model = load("owner/model", revision=revision)
        assert torch.equal(logits_of(model, IDS)[0], logits_of(load(checkpoint), IDS)[0])
    assert sources.commit(config_of("owner/model", revision="v1")) == "0123abcd" * 5
    assert fingerprint(sources.folder(config_of("owner/model"))) == fingerprint(checkpoint)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        load("owner/model", revision="v2")


def test_offline_says_so(cached: Path) -> None:
    with pytest.raises(UserError, match="HF_HUB_OFFLINE") as caught:
        load("owner/other")
    assert len(caught.value.lines()) == 1


def test_source_decides_where_a_name_is_ambiguous(
    cached: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = tiny.write(tmp_path / "owner" / "model", "qwen2", seed=1)
    assert sources.locate(config_of("owner/model")) == str(other)
    assert sources.locate(config_of("owner/model", source="hub")) == "owner/model"
    with pytest.raises(UserError, match="no such model"):
        sources.locate(config_of("owner/nothing", source="local"))


def test_modelscope(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for its client, with the client's signature; nothing is downloaded here."""
    calls: list[Any] = []

    def snapshot_download(model_id: str, revision: str | None = None, ignore_patterns: Any = None) -> str:
        calls.append((model_id, revision, "*.safetensors" in ignore_patterns))
        return str(checkpoint)

    modelscope.folder.cache_clear()
    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=snapshot_download))
    keys = {"source": "modelscope", "revision": "v2"}
    read_config(config_of("Owner/Model", **keys))
    tokenizers.load_tokenizer(config_of("Owner/Model", **keys))
    assert calls == [("Owner/Model", "v2", True)]  # weights are fetched last, when all else is checked
    model = load("Owner/Model", **keys)
    assert calls[1:] == [("Owner/Model", "v2", False)]
    assert torch.equal(logits_of(model, IDS)[0], logits_of(load(checkpoint), IDS)[0])
    modelscope.folder.cache_clear()


def test_modelscope_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    modelscope.folder.cache_clear()
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError, match="pip install modelscope"):
        read_config(config_of("Owner/Model", source="modelscope"))


# --- nothing from a checkpoint is run ---


class Bomb:
    """What a pickle can do when it is not read with weights_only."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import pathlib; pathlib.Path('exploded').write_text('')",)


def as_bin(checkpoint: Path, folder: Path, extra: Any = None) -> Path:
    shutil.copytree(checkpoint, folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**state, **({"extra": extra} if extra else {})}, folder / "pytorch_model.bin")
    return folder


def test_bin_files_load(checkpoint: Path, tmp_path: Path) -> None:
    model = load(as_bin(checkpoint, tmp_path / "bin"))
    assert torch.equal(logits_of(model, IDS)[0], logits_of(load(checkpoint), IDS)[0])


def test_a_malicious_pickle_is_not_run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = as_bin(checkpoint, tmp_path / "bin", Bomb())
    with pytest.raises(UserError, match="pickled code is never run"):
        load(folder)
    assert not Path("exploded").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # what would have happened
    assert Path("exploded").exists()


def test_code_beside_a_known_model_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "coded"
    shutil.copytree(checkpoint, folder)
    (folder / "code.py").write_text("raise SystemExit('remote code ran')")
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        values = json.loads((folder / name).read_text())
        values["auto_map"] = {key: ["code.X", None] if key == "AutoTokenizer" else "code.X"}
        (folder / name).write_text(json.dumps(values))
    tokenizers.load_tokenizer(config_of(folder))
    load(folder)


# --- models larger than one device ---


def test_offloaded_to_disk_it_generates_the_same(checkpoint: Path, tmp_path: Path) -> None:
    keys = {"device_map": "auto", "max_memory": {"cpu": "40KB"}, "offload_folder": str(tmp_path / "offload")}
    model, whole = load(checkpoint, **keys), load(checkpoint)
    assert "disk" in model.hf_device_map.values()
    encoder = make_encoder(tokenizers.load_tokenizer(config_of(checkpoint)))
    prompts = [encoder.prompt_ids([{"role": "user", "content": text}]) for text in ("one", "another 一")]
    assert generate(model, encoder, prompts, 8, 2) == generate(whole, encoder, prompts, 8, 2)
    with pytest.raises(UserError, match="not be trained"):
        loading.refuse_training(model, "it")
    loading.refuse_training(whole, "it")


def test_a_temporary_offload_folder_goes_with_the_model(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = load(as_bin(checkpoint, tmp_path / "bin"), device_map="auto", max_memory={"cpu": "40KB"})
    assert any(tmp_path.glob("ft-offload-*"))
    with torch.inference_mode():
        assert torch.equal(model(torch.tensor(IDS)).logits[0], logits_of(load(checkpoint), IDS)[0])
    del model
    gc.collect()
    assert not any(tmp_path.glob("ft-offload-*"))


def test_a_temporary_offload_folder_goes_when_loading_fails(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = []

    def fails(*_: Any, **options: Any) -> Any:
        made.append(Path(options["offload_folder"]).is_dir())
        raise UserError("no")

    layout = loading.layout_of(loading.read_config(config_of(checkpoint)))
    monkeypatch.setattr(loading, "layout_of", lambda config: replace(layout, weights=fails))
    with pytest.raises(UserError, match="no"):
        load(checkpoint, device_map="auto")
    assert made == [True]
    assert not any(tmp_path.glob("ft-offload-*"))


def test_training_an_offloaded_model_is_refused(recipe: Recipe, base: Path) -> None:
    path = recipe(model={"device_map": "auto", "max_memory": {"cpu": "100KB"}})
    with pytest.raises(UserError, match=r"model\.device_map: weights are on disk"):
        train(path)


def test_everything_in_main_memory_trains(recipe: Recipe) -> None:
    train(recipe(model={"device_map": "auto", "max_memory": {"cpu": "4GB"}}, train={"max_steps": 1}))


# --- an adapter and its base ---


@pytest.fixture
def stranger(base: Path, tmp_path: Path) -> Path:
    """The same architecture with one other matrix."""
    folder = tmp_path / "stranger"
    shutil.copytree(base, folder)
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] += 0.01
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_every_meeting_of_adapter_and_base_is_checked(
    recipe: Recipe, base: Path, stranger: Path, tmp_path: Path
) -> None:
    run = train(recipe(train={"max_steps": 1}))
    identity = read_identity(run.adapter)
    assert identity["base"] == str(base)
    assert identity["fingerprint"] == fingerprint(base)
    held_out = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    (tmp_path / "held.jsonl").write_text(json.dumps(held_out) + "\n")

    def go_on(model: str) -> Any:
        return train(recipe(model={"name": model, "adapter": str(run.path)}, output={"dir": str(tmp_path / "more")}))

    meetings: dict[str, Callable[[str], Any]] = {
        "sft": go_on,
        "eval": lambda m: evaluate.run([], model=m, adapter=str(run.path), data=str(tmp_path / "held.jsonl"), limit=1),
        "merge": lambda m: merge.run(str(run.path), str(tmp_path / "merged"), model=m),
        "chat": lambda m: chat.run([str(run.path)], model=m, max_new_tokens=1),
    }  # fmt: skip
    for name, meet in meetings.items():
        with pytest.raises(UserError, match="was trained on another base"):
            meet(str(stranger))
        if name in ("eval", "merge"):
            meet(str(base))


def test_a_resharded_copy_is_the_same_base(base: Path, tmp_path: Path) -> None:
    load(base).save_pretrained(tmp_path / "copy", max_shard_size="50KB")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "copy") == fingerprint(base)


def test_how_the_base_was_loaded_comes_back_with_the_adapter(recipe: Recipe) -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0}
    run = train(recipe(model={"rope_scaling": scaling, "sanity_check": False}, train={"max_steps": 1}))
    config, _ = configs_of(run.adapter)
    assert config.rope_scaling is not None
    assert config.rope_scaling.model_dump(exclude_none=True) == scaling
    assert config.sanity_check is False


def test_merging_after_full_fine_tuning_and_other_folders(recipe: Recipe, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model"):
        read_config(ModelConfig(name=str(tmp_path / "nothing")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(ModelConfig(name=str(tmp_path / "empty")))
    apply(load(base), LoraAdapter(r=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter"):
        read_config(ModelConfig(name=str(tmp_path / "adapter")))


def test_a_broken_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(UserError, match="is not JSON"):
        read_config(ModelConfig(name=str(tmp_path)))


def test_chatglm_takes_no_other_template(tmp_path: Path) -> None:
    """Its turns are tokens that no text becomes; a template would be without effect."""
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(UserError, match="no template can replace them") as caught:
        tokenizers.load_tokenizer(ModelConfig(name="tiny-chatglm3", chat_template=str(template)))
    assert caught.value.problems[0].key == "model.chat_template"
