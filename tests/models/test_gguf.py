"""A GGUF file is a base: converted once, found again, and refused by name where it cannot be one."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ft, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.early import inputs
from finetune.errors import UserError
from finetune.evaluation import targets
from finetune.models import sources
from finetune.models.gguf import cache, packaged
from finetune.planning.network import build
from finetune.planning.source import skeleton
from finetune.recipe.file import check, load
from finetune.recipe.resolve import Hardware, resolve
from finetune.recipe.sections import ModelConfig
from finetune.run.directory import Run
from finetune.training.start import merged_start

gguf = pytest.importorskip("gguf")
from gguf_tiny import TINY, random_llama, write  # noqa: E402


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and the folder from which names are looked up."""
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folder(name: str | Path, **more: Any) -> Path:
    return sources.folder(ModelConfig(name=str(name), **more))


def logits(where: Path, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)(torch.tensor([ids])).logits


def said(name: Any, **more: Any) -> str:
    """What is refused, before torch has a part in it."""
    config = ModelConfig(name=str(name), **more)
    with pytest.raises(UserError) as error:
        inputs.base(config)
    return str(error.value)


IDS = list(range(4, 60))


def test_floats_come_back_as_they_were(here: Path) -> None:
    made = folder(write(here / "tiny one.gguf"))
    assert torch.equal(logits(made, IDS), logits(TINY, IDS))
    before, after = (AutoTokenizer.from_pretrained(where) for where in (TINY, made))
    chat = [{"role": "user", "content": "hi"}]
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)
    assert (after.bos_token_id, after.eos_token_id, after.pad_token_id) == (0, 2, 3)
    assert after.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    config = json.loads((made / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-05
    assert (config["tie_word_embeddings"], config["dtype"]) == (True, "float32")
    assert sources.stored_dtype(ModelConfig(name=str(here / "tiny one.gguf"))) == "float32"


@pytest.mark.parametrize(("kind", "dtype"), [("F16", "float16"), ("BF16", "bfloat16"), ("Q8_0", "bfloat16")])
def test_precision(kind: str, dtype: str, here: Path) -> None:
    """A file of floats keeps its own; of a quantized one every weight is that of the package, rounded once."""
    model = random_llama()
    path = write(here / "x.gguf", model, kind)
    made = AutoModelForCausalLM.from_pretrained(folder(path), dtype="auto")
    assert str(made.dtype) == f"torch.{dtype}"
    stored = gguf.GGMLQuantizationType[kind]
    for name in ("model.layers.1.mlp.down_proj.weight", "lm_head.weight"):
        weight = model.state_dict()[name].numpy()
        back = gguf.quants.dequantize(gguf.quants.quantize(weight, stored), stored)
        assert torch.equal(made.state_dict()[name], torch.tensor(np.array(back)).to(made.dtype)), name


def test_grouped_heads_an_own_output_and_more_rows_than_tokens(here: Path) -> None:
    model = random_llama(vocab_size=1040)
    path = write(here / "x.gguf", model, meta={"llama.vocab_size": None})
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits
    torch.testing.assert_close(logits(folder(path), IDS), expected, atol=1e-5, rtol=1e-5)


def test_found_again_by_content(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(here / "x.gguf", random_llama())
    first = folder(path)
    assert "converting x.gguf" in capfd.readouterr().err
    blob = here / "sha256-1234"  # Ollama's name
    path.rename(blob)
    assert folder(blob) == first
    assert "converting" not in capfd.readouterr().err
    other = write(here / "y.gguf", random_llama(), meta={"general.name": "y"})
    assert folder(other) != first


@pytest.mark.parametrize("harm", ["model.safetensors", "config.json", cache.NOTES, "cut"])
def test_a_broken_folder_in_the_cache_is_made_again(harm: str, here: Path) -> None:
    path = write(here / "x.gguf", random_llama())
    made = folder(path)
    whole = (made / "model.safetensors").read_bytes()
    if harm == "cut":
        (made / "model.safetensors").write_bytes(whole[:500])
    else:
        (made / harm).unlink()
    assert folder(path) == made
    assert (made / "model.safetensors").read_bytes() == whole


def test_nothing_is_left_of_a_conversion_that_failed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(here / "x.gguf", random_llama())

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("finetune.models.gguf.tokenizer.check_ids", interrupted)
        with pytest.raises(KeyboardInterrupt):
            folder(path)
    assert [p.suffix for p in (here / "cache" / "gguf").iterdir()] == [".lock"]
    assert (folder(path) / "config.json").is_file()


def test_two_at_once(here: Path) -> None:
    """The second waits and finds what the first has made."""
    path = write(here / "x.gguf", random_llama())
    code = (
        "import sys; from finetune.models import sources; from finetune.recipe.sections import ModelConfig\n"
        "print(sources.folder(ModelConfig(name=sys.argv[1])))"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(here / "datasets"))
        both = [Popen([sys.executable, "-c", code, str(path)], stdout=PIPE, stderr=PIPE, text=True) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert ends[0][0] == ends[1][0]
    assert sum("converting" in err for _, err in ends) == 1
    assert {p.suffix for p in (here / "datasets" / "finetune" / "gguf").iterdir()} == {"", ".lock"}


META: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"arch": "granite"}, "architecture granite, which transformers does not read"),
    "no native network": ({"arch": "deci"}, "no native network"),
    "encoder-decoder": ({"arch": "t5"}, "encoder-decoder"),
    "encoder": ({"arch": "nomic-bert"}, "is an encoder (nomic-bert)"),
    "embeddings": ({"meta": {"llama.pooling_type": 3}}, "is an encoder"),
    "experts": ({"meta": {"llama.expert_count": 8}}, "Mixtral"),
    "lora": ({"meta": {"general.type": "adapter"}}, "is a LoRA adapter"),
    "projector": ({"arch": "clip"}, "image encoder"),
    "tokenizer": ({"meta": {"tokenizer.ggml.model": "rwkv"}}, "tokenizer of the kind rwkv"),
    "no tokenizer": ({"meta": {"tokenizer.ggml.model": None}}, "holds no tokenizer"),
    "split": ({"pre": "viking"}, "splits text into words as viking does"),
    "no split": ({"pre": None}, "does not say how its tokenizer splits text"),
    "part": ({"meta": {"split.count": 3}}, "one part of a model"),
}


@pytest.mark.parametrize("case", META)
def test_refused_by_its_header(case: str, here: Path) -> None:
    options, words = META[case]
    assert words in said(write(here / "x.gguf", random_llama(num_hidden_layers=1), **options))


LONG = struct.pack("<IIQQ", 9, 8, 5000, 1 << 62)  # an array of texts, the first of which is longer than any file
LIST = struct.pack("<IIQI", 9, 4, 1, 32)


@pytest.mark.parametrize(("name", "value"), [("a", LONG), ("general.alignment", LIST), ("a", LONG[:12])])
def test_a_damaged_header_is_no_traceback(name: str, value: bytes, here: Path) -> None:
    start = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(name)) + name.encode()
    (here / "x.gguf").write_bytes(start + value)
    assert "is cut off or damaged in its header" in said("x.gguf")


def test_a_file_that_may_not_be_read(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    (here / "x.gguf").touch()
    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read: Permission denied" in said("x.gguf")


def test_refused_by_what_it_is(here: Path) -> None:
    path = write(here / "x.gguf", random_llama())
    content = path.read_bytes()
    cut, header, old, swapped, other, pointer = (here / f"{n}.gguf" for n in ("cut", "head", "v1", "be", "bin", "lfs"))
    cut.write_bytes(content[:-100])
    assert "is cut off:" in said(cut)
    header.write_bytes(content[:3000])
    assert "is cut off or damaged in its header" in said(header)
    old.write_bytes(b"GGUF" + struct.pack("<I", 1) + content[8:])
    assert "version 1 of the format" in said(old)
    swapped.write_bytes(b"GGUF" + struct.pack(">I", 3) + content[8:])
    assert "big-endian" in said(swapped)
    other.write_bytes(b"GGML" + content)
    assert "is a file, and no GGUF file" in said(other)
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in said(pointer)
    part = here / "big-00001-of-00003.gguf"
    shutil.copy(path, part)
    assert "llama-gguf-split --merge" in said(part)
    assert "no such model" in said(here / "gone.gguf")
    assert "no such model" in said("models/gone.gguf")
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 16
    assert struct.unpack_from("<I", content, at) == (0,)  # F32
    for number, words in ((15, "cannot be read (Q8_K)"), (999, "of an unknown kind (999)")):
        odd = here / f"kind-{number}.gguf"
        odd.write_bytes(content[:at] + struct.pack("<I", number) + content[at + 4 :])
        assert words in said(odd)


def test_folders_of_files(here: Path) -> None:
    models = here / "my models"
    models.mkdir()
    write(models / "a Q8.gguf", random_llama())
    write(models / "b.gguf", random_llama(), meta={"general.name": "b"})
    assert "GGUF files: a Q8.gguf, b.gguf → name one of them: " in said("my models")
    assert "GGUF files there: a Q8.gguf, b.gguf" in said("my models", gguf_file="c.gguf")
    assert folder("my models", gguf_file="b.gguf") == folder(models / "b.gguf")
    assert "is a file already" in said(models / "b.gguf", gguf_file="b.gguf")
    assert "comes with ft or a package" in said("tiny-llama", gguf_file="b.gguf")
    assert "is no path in" in said("my models", gguf_file="../b.gguf")
    assert "has no revisions" in said(models / "b.gguf", revision="main")


def test_a_hub_repository(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = write(here / "x.gguf", random_llama()), []

    def of_hub(source: str, name: str, revision: str | None = None) -> str | None:
        asked.append((source, name, revision))
        return str(path) if name == "q/x.gguf" else None

    monkeypatch.setattr("finetune.hub.file", of_hub)
    monkeypatch.setattr("finetune.hub.files", lambda *_: ["q/x.gguf", "y.gguf"])
    made = folder("owner/repo", gguf_file="q/x.gguf", revision="v2")
    assert asked[0] == ("owner/repo", "q/x.gguf", "v2")
    assert made == folder(path)
    with pytest.raises(UserError, match=r"has no file z.gguf → GGUF files there: q/x.gguf, y.gguf"):
        folder("owner/repo", gguf_file="z.gguf")
    with pytest.raises(UserError, match=r"no config.json, but GGUF files: q/x.gguf, y.gguf → .*model.gguf_file"):
        folder("owner/repo")


def test_packages_that_are_missing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packaged.PACKAGED, "tiny-one", ("no_such_package", "x.gguf"))
    assert "comes with the package no-such-package, which is not installed → pip install" in said("tiny-one")
    path = write(here / "x.gguf", random_llama())
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "the package gguf is not installed → pip install 'ft-recipes[real]'" in said(path)


def test_no_room(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(here / "x.gguf", random_llama())
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))  # type: ignore[attr-defined]
    assert "set HF_DATASETS_CACHE to a folder that has it" in said(path)


def test_weights_without_a_place(here: Path) -> None:
    path = write(here / "x.gguf", random_llama(), tensors={"blk.0.attn_q.bias": np.zeros(128, np.float32)})
    with pytest.raises(UserError, match=r"1 weight has no place in transformers' llama \(blk.0.attn_q.bias\)"):
        folder(path)


def test_a_run_finds_its_base_again(here: Path, recipe: Any) -> None:
    """By the name that was given: after the cache was emptied, but not with other weights in that place."""
    data = write_rows(here / "r.jsonl", [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(8)])
    models = here / "my models"
    models.mkdir()
    write(models / "tiny one.gguf")
    made = recipe(
        model={"name": "my models", "gguf_file": "tiny one.gguf", "sanity_check": False}, data={"train": str(data)},
        train={"max_steps": 2},
    )  # fmt: skip
    trained = ft("sft", "--recipe", made)
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.count("converting tiny one.gguf") == 1
    run = here / "run"
    identity = json.loads((run / "adapter" / "base_identity.json").read_text())
    assert (identity["base"], identity["gguf_file"]) == (str(models), "tiny one.gguf")
    assert "ft chat --adapter ." in (run / "adapter" / "README.md").read_text()
    shutil.rmtree(here / "cache")
    merged = ft("merge", run, "--output", here / "merged")
    assert merged.returncode == 0, merged.stderr
    assert "license: apache-2.0" in (here / "merged" / "README.md").read_text()
    assert logits(here / "merged", IDS).shape[-1] == 1024
    assert ft("eval", run, "--data", data).returncode == 0
    (models / "tiny one.gguf").rename(here / "moved.gguf")
    assert "tiny one.gguf" in ft("chat", run).stderr
    assert ft("chat", run, "--model", here / "moved.gguf", stdin="hi\n").returncode == 0
    write(models / "tiny one.gguf", kind="Q8_0")
    assert "was trained on another base" in ft("chat", run, stdin="hi\n").stderr


def test_what_is_made_of_a_file_in_a_folder_is_no_gguf_file(here: Path, recipe: Any) -> None:
    """What full fine-tuning and dpo.start: merge write lies elsewhere: model.gguf_file says nothing of it."""
    data = write_rows(here / "r.jsonl", [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(8)])
    models = here / "models"
    models.mkdir()
    write(models / "tiny.gguf")
    model = {"name": "models", "gguf_file": "tiny.gguf", "sanity_check": False}
    made = recipe(model=model, data={"train": str(data)}, train={"max_steps": 1})
    values = yaml.safe_load(made.read_text()) | {"adapter": {"method": "full"}}
    made.write_text(yaml.safe_dump(values))
    trained = ft("sft", "--recipe", made)
    assert trained.returncode == 0, trained.stderr
    assert (target := targets.run_target(str(here / "run"))).model.gguf_file is None
    assert Path(sources.locate(target.model)) == here / "run" / "model"
    assert targets.run_target(str(here / "run"), str(models / "tiny.gguf"), compare_base=True).base is not None
    run = Run(here / "aligned")
    (run.path / "start").mkdir(parents=True)
    shutil.copytree(folder(models / "tiny.gguf"), run.path / "start", dirs_exist_ok=True)
    (run.path / "start" / "merge.json").write_text("{}")
    dpo = check({"version": 1, "stage": "dpo", "model": {**model, "adapter": "a"}, "data": {"train": "d"},
                 "dpo": {"start": "merge"}, "output": {"dir": str(run.path)}}, "dpo")  # fmt: skip
    assert merged_start(dpo, run).folder == run.path / "start"  # type: ignore[arg-type]


def test_a_gguf_base_is_planned_from_its_header(recipe: Any, tmp_path: Path) -> None:
    """Nothing is converted, and the plan is that of the same model in its folder."""
    file = write(tmp_path / "my base.gguf")
    done = ft("plan", recipe(model={"name": str(file), "dtype": "float32"}), "--json", "-", "--gpu", "8GB")
    assert done.returncode == 0, done.stderr
    assert "converting" not in done.stderr
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    said = json.loads(done.stdout)
    assert said["tokens_per_row"] is None, "its tokenizer would have to be made first"
    made: Any = resolve(load(str(recipe(model={"name": "tiny-llama", "dtype": "float32"})), None), Hardware())
    same = build(made, skeleton(made.model))
    assert (said["total_parameters"], said["trainable_parameters"]) == (same.total, same.trainable)
    assert said["memory"]["weights"] == pytest.approx(same.weights / 1e9, rel=0.01)
