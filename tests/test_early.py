"""What is not there is told before torch is imported, with what was probably meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bad_inputs_kit import Told, typed

from finetune import early, hub
from finetune.early import answering, evaluating, inputs, training
from finetune.errors import UserError
from finetune.models import modelscope, sources
from finetune.recipe.file import load, to_yaml
from finetune.recipe.resolve import Hardware, resolve
from finetune.recipe.sections import ModelConfig
from finetune.recipe.stages import ROWS, SftRecipe
from finetune.run.checkpoints import complete

RECIPE = """\
# ft sft --recipe mine.yaml            one 24 GB GPU (bfloat16)
version: 1
stage: {stage}
model: {{name: {model}}}
data: {{train: {data}}}
output: {{dir: runs/new}}
"""
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
# (name, what is typed, what is said). `near` is an adapter in runs/, `full` a full fine-tuning, `own` a model.
CASES: list[tuple[str, str]] = [
    ("chat runs/naer", "runs/naer: no such run, adapter or model → did you mean runs/near?"),
    ("chat naer", "naer: no such run, adapter or model → did you mean runs/near?"),
    ("chat tiny-lama", "tiny-lama: no such run, adapter or model → did you mean tiny-llama?"),
    ("chat --model owm", "owm: model.name: no such model → did you mean own?"),
    ("chat --model runs/near", "is an adapter, not a model → give its base; use --adapter"),
    ("chat --adapter own", "own: adapter: is a model, not an adapter → give it as --model"),
    ("chat --adapter tiny-llama", "tiny-llama: adapter: is a model, not an adapter → give it as --model"),
    ("chat --adapter runs/full", "is a full fine-tuning: it has no adapter → give it as --model"),
    ("chat runs/begun", "is a run that is not finished: it has no adapter yet"),
    ("chat runs/lost", "was trained on /nowhere/base, which is no longer there"),
    ("chat runs/score", "is a reward model: it scores answers and gives none"),
    ("chat rows.jsonl", "rows.jsonl: is neither a run nor an adapter nor a model"),
    ("chat tiny-llama --model own", "given twice: tiny-llama and --model own"),
    ("chat", "no model to talk to → write ft chat RUN, or give --model or --adapter"),
    ("serve runs/naer", "runs/naer: no such run, adapter or model → did you mean runs/near?"),
    ("serve tiny-lama", "tiny-lama: no such run, adapter or model → did you mean tiny-llama?"),
    ("serve --model tiny-llama --adapter a=runs/naer", "runs/naer: adapter: no such run or adapter → did you mean"),
    ("serve --adapter runs/near --adapter near=runs/near", "two adapters have one name → name them"),
    ("serve runs/score", "is a reward model: it scores answers and gives none"),
    ("serve", "no model to talk to → write ft serve RUN, or give --model or --adapter"),
    ("serve tiny-llama --host nowhere.invalid", "--host: no such host: 'nowhere.invalid'"),
    ("serve tiny-llama --port 0 --api-key=", "--api-key: is empty → give another one"),
    ("serve tiny-llama --port 0 --timeout inf", "--timeout: must be seconds, at most a million"),
    ("serve tiny-llama --port 0 --thinking maybe", "--thinking: unknown word 'maybe' → one of on, off"),
    ("merge runs/naer -o out", "runs/naer: adapter: no such run or adapter → did you mean runs/near?"),
    ("merge own -o out", "own: adapter: is a model, not an adapter"),
    ("merge runs/near -o out --model tiny-lama", "tiny-lama: model.name: no such model → did you mean tiny-llama?"),
    ("merge runs/near -o rows.jsonl", "rows.jsonl: --output: is a file"),
    ("merge runs/near -o own", "own: --output: already holds files"),
    ("merge runs/near -o out --dtype float8", "--dtype: unknown dtype 'float8'"),
    ("eval runs/naer", "runs/naer: no such run, adapter or model → did you mean runs/near?"),
    ("eval --adapter runs/naer", "runs/naer: adapter: no such run or adapter → did you mean runs/near?"),
    ("eval --model tiny-lama --data rows.jsonl", "tiny-lama: model.name: no such model → did you mean tiny-llama?"),
    ("eval --model own --data rowz.jsonl", "rowz.jsonl: --data: no such file → did you mean rows.jsonl?"),
    ("eval --recipe nome.yaml", "nome.yaml: no such recipe"),
    ("eval runs/near --reward runs/naer", "runs/naer: no such run, adapter or model → did you mean runs/near?"),
    ("eval own --data rows.jsonl --reward runs/near", "runs/near: --reward: has no score head → give a run of"),
    ("compare mine.yaml --set model.name=tiny-lama", "tiny-lama: model.name: no such model → did you mean tiny-llama?"),
    ("compare mine.yaml --set eval.data=rowz.jsonl", "rowz.jsonl: eval.data: no such file → did you mean rows.jsonl?"),
    ("compare mine.yaml", "eval.data: a comparison needs held-out data"),
    ("compare mine.yaml --methods lor", "--methods: unknown method 'lor'"),
    ("data check rowz.jsonl", "rowz.jsonl: data.train: no such file → did you mean rows.jsonl?"),
    ("data check rows.jsonl --eval rowz.jsonl", "rowz.jsonl: eval.data: no such file → did you mean rows.jsonl?"),
    ("data check rows.jsonl --model tiny-lama", "tiny-lama: model.name: no such model → did you mean tiny-llama?"),
    ("data preview rowz.jsonl --model own", "rowz.jsonl: data.train: no such file → did you mean rows.jsonl?"),
    ("data preview mine.yam", "mine.yam: data.train: no such file → did you mean mine.yaml?"),
    ("data preview rows.jsonl --model tiny-lama", "did you mean tiny-llama?"),
    ("data check rows.jsonl --recipe mine.yaml --data rows.jsonl", "given twice: rows.jsonl and --data rows.jsonl"),
    ("sft mine.yaml --resume", "runs/new: output.dir: no such run to resume → leave --resume out to start it"),
    ("sft mine.yaml --resume --output runs/naer", "did you mean runs/near?"),
    ("sft mine.yaml --resume --output runs/begun", "holds no complete checkpoint"),
    ("sft mine.yaml --resume --output runs/half --set train.seed=7", "train.seed: differs from the run to resume"),
    ("sft mine.yaml --set model.adapter=runs/naer", "runs/naer: model.adapter: no such run or adapter"),
    ("sft mine.yaml --set model.chat_template=no.jinja", "no.jinja: model.chat_template: no such file"),
    ("ppo ppo.yaml --set reward.functions=[rulez.py:f]", "rulez.py: reward.functions: no such file"),
    ("ppo ppo.yaml --set reward.model=runs/naer", "runs/naer: no such run, adapter or model → did you mean runs/near?"),
    ("ppo ppo.yaml --set reward.model=owner/judge", "owner/judge: model.name: is neither here nor in the cache"),
    ("ppo ppo.yaml --set reward.train=rowz.jsonl", "rowz.jsonl: reward.train: no such file"),
    *((f"{stage} {stage}.yaml --set model.name=tiny-lama", "did you mean tiny-llama?") for stage in ROWS),
    *((f"{stage} {stage}.yaml --set data.train=rowz.jsonl", "did you mean rows.jsonl?") for stage in ROWS),
    *((f"{stage} {stage}.yaml --set data.train=broken.jsonl", "broken.jsonl, row 1") for stage in ROWS),
    ("sft mine.yaml --set model.name=bert --set data.train=rowz.jsonl", "BERT"),
]


def folder_of_runs(tmp: Path) -> None:
    def write(name: str, text: Any) -> None:
        path = tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")

    lora = {"peft_type": "LORA", "base_model_name_or_path": "tiny-llama"}
    write("own/config.json", {"model_type": "llama"})
    write("bert/config.json", {"model_type": "bert"})
    write("runs/near/adapter/adapter_config.json", lora)
    write("runs/score/adapter/adapter_config.json", {**lora, "task_type": "SEQ_CLS"})
    write("runs/lost/adapter/adapter_config.json", {**lora, "base_model_name_or_path": "/nowhere/base"})
    write("runs/full/model/config.json", {"model_type": "llama"})
    write("runs/begun/recipe.yaml", "stage: sft\n")
    half = RECIPE.format(stage="sft", model="tiny-llama", data="rows.jsonl")
    (tmp / "runs/half/checkpoints/checkpoint-2").mkdir(parents=True)
    complete(tmp / "runs/half/checkpoints/checkpoint-2", inputs={"data.train": "digest"})
    write("rows.jsonl", {"instruction": "q", "output": "a"})
    write("broken.jsonl", "{")
    write("mine.yaml", half)
    begun: Any = load(str(tmp / "mine.yaml"), SftRecipe, output=str(tmp / "runs/half"))
    write("runs/half/recipe.yaml", to_yaml(resolve(begun, Hardware("cuda", True, 80.0))))  # on another machine
    for stage in ROWS:
        more = "reward: {functions: [rule.py:f]}\n" if stage == "ppo" else ""
        write(f"{stage}.yaml", RECIPE.format(stage=stage, model="tiny-llama", data="rows.jsonl") + more)
    write("rule.py", "def f(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    where = tmp_path_factory.mktemp("first hour")
    folder_of_runs(where)
    return typed(where, [line for line, _ in CASES])


@pytest.mark.parametrize(("line", "expected"), CASES, ids=[line for line, _ in CASES])
def test_what_is_not_there_is_told_without_torch(said: dict[str, Told], line: str, expected: str) -> None:
    code, heavy, text = said[line]
    assert expected in text
    assert code == 2
    assert heavy == []
    assert "bug" not in text


def test_all_that_is_missing_at_once(said: dict[str, Told]) -> None:
    text = said["sft mine.yaml --set model.name=bert --set data.train=rowz.jsonl"][2]
    assert "rowz.jsonl" in text


def test_what_the_machine_decides_is_no_difference(said: dict[str, Told]) -> None:
    text = said["sft mine.yaml --resume --output runs/half --set train.seed=7"][2]
    assert "dtype" not in text
    assert len(text.splitlines()) == 1


def test_plain_arguments_are_known_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert answering.chat(["runs/near"], None, []) == (["runs/near"], None, {})
    assert answering.chat(["runs/near/adapter"], None, []) == (["runs/near/adapter"], None, {})
    assert answering.chat(["runs/near"], "own", []) == (["runs/near"], "own", {})
    assert answering.chat(["runs/full"], None, []) == (["runs/full"], None, {})
    assert answering.chat(["own"], None, []) == (["own"], None, {})
    assert answering.chat(["own"], None, ["runs/near"]) == ([], "own", {"near": "runs/near"})
    assert answering.chat([], "own", ["a=runs/near"]) == ([], "own", {"a": "runs/near"})
    assert answering.chat(["tiny-qwen"], None, []) == (["tiny-qwen"], None, {})


def test_recipe_or_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.cli.groups import recipe_or_data

    monkeypatch.chdir(tmp_path)
    assert recipe_or_data("mine.yaml", None, None) == ("mine.yaml", None)
    assert recipe_or_data("quickstart", None, None) == ("quickstart", None)
    assert recipe_or_data("mine.yaml", None, "rows.jsonl") == ("mine.yaml", "rows.jsonl")
    assert recipe_or_data("rows.jsonl", "mine.yaml", None) == ("mine.yaml", "rows.jsonl")
    assert recipe_or_data("builtin:tickets/train", None, None) == (None, "builtin:tickets/train")
    (tmp_path / "quickstart").mkdir()  # a folder of data
    assert recipe_or_data("quickstart", None, None) == (None, "quickstart")


# --- a recipe that wants more than there is ---


def test_a_recipe_for_a_gpu_is_told_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.models import hardware

    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.format(stage="sft", model="tiny-llama", data="rows.jsonl"))
    monkeypatch.setattr(hardware, "detect", lambda: Hardware())
    warned = training.gpu_missing(str(path), load(str(path), SftRecipe))
    assert warned is not None
    assert "this recipe asks for one 24 GB GPU (bfloat16), and no GPU was found here" in warned
    assert training.gpu_missing(str(path), load(str(path), SftRecipe, ["model.name=tiny-qwen"])) is None
    assert training.gpu_missing("quickstart", load("quickstart", SftRecipe)) is None
    monkeypatch.setattr(hardware, "detect", lambda: Hardware("cuda"))
    assert training.gpu_missing(str(path), load(str(path), SftRecipe)) is None


def test_downloads_are_announced(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(hub, "cached", lambda name, revision=None: None)
    monkeypatch.setattr(hub, "endpoint", lambda: "https://mirror.example")
    sources.announce(ModelConfig(name="THUDM/chatglm3-6b"))
    assert "downloads THUDM/chatglm3-6b from https://mirror.example (once)" in capsys.readouterr().err
    sources.announce(ModelConfig(name="tiny-llama"))
    assert capsys.readouterr().err == ""


def test_a_model_of_modelscope_is_announced_and_not_yet_fetched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **how: Any) -> str:
        asked.append(how)
        raise ValueError("not in the cache")

    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=snapshot_download))
    inputs.there(ModelConfig(name="Owner/Model", source="modelscope"))
    assert "downloads Owner/Model from ModelScope (once)" in capsys.readouterr().err
    assert [how.get("local_files_only") for how in asked] == [True]


def test_what_is_in_the_cache_is_not_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setattr(hub, "cached", lambda name, revision=None: tmp_path)
    assert hub.fetches("owner/x")  # the config alone
    (tmp_path / "model.safetensors").touch()
    sources.announce(ModelConfig(name="owner/x"))
    assert capsys.readouterr().err == ""


# --- hubs ---

HUB_PROGRAM = """
import sys, time
from finetune.errors import UserError
from finetune.models import modelscope, sources
from finetune.recipe.sections import ModelConfig

for name, call in {
    "model": lambda: sources.check_there(ModelConfig(name="owner/nothing")),
    "data": lambda: next(__import__("finetune.data.sources", fromlist=["x"]).read_rows("owner/nothing")),
}.items():
    begun = time.perf_counter()
    try:
        call()
    except UserError as error:
        print(f"{name} {time.perf_counter() - begun:.1f} {error}")
"""


def of_hub(tmp_path: Path, **environment: str) -> list[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    env |= {"PYTHONPATH": str(Path(early.__file__).parents[2]), "HF_HOME": str(tmp_path / "hf"), **environment}
    done = subprocess.run(
        [sys.executable, "-c", HUB_PROGRAM], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=200
    )
    assert "Retrying" not in done.stderr
    return done.stdout.splitlines()


def test_a_hub_that_refuses_is_asked_once(tmp_path: Path) -> None:
    lines = of_hub(tmp_path, HF_ENDPOINT="http://127.0.0.1:9", NO_PROXY="127.0.0.1")
    assert [line.split()[0] for line in lines] == ["model", "data"]
    for line in lines:
        assert "the hub cannot be reached (http://127.0.0.1:9: " in line
        assert "HF_ENDPOINT" in line
        assert "HF_HUB_OFFLINE=1" in line
        assert float(line.split()[1]) < 15  # its client tries for 24 seconds of waiting alone


@pytest.mark.parametrize("switch", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_is_named(tmp_path: Path, switch: str) -> None:
    lines = of_hub(tmp_path, **{switch: "1"})
    assert [line.split()[0] for line in lines] == ["model", "data"]
    for line in lines:
        assert f"neither here nor in the cache, and the hub is not asked: {switch} is set → unset {switch}" in line


class Answer:
    def __init__(self, code: int) -> None:
        self.status_code = code


def error_of(name: str, code: int | None = None, text: str = "words") -> Exception:
    made: Exception = type(name, (Exception,), {"__module__": "huggingface_hub.errors"})(text)
    if code is not None:
        made.response = Answer(code)  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (error_of("GatedRepoError", 403), "is gated on the hub"),
        (error_of("HfHubHTTPError", 403), "is gated on the hub"),
        (error_of("RepositoryNotFoundError", 401), "is not on the hub, or is private"),
        (error_of("RepositoryNotFoundError", 404), "is not on the hub, or is private"),
        (error_of("RevisionNotFoundError", 404), "has no such revision on the hub"),
        (error_of("DatasetNotFoundError"), "is not on the hub, or is private"),
        (error_of("ConnectTimeout", text="timed out"), "the hub cannot be reached (timed out)"),
        (ConnectionResetError("reset"), "the hub cannot be reached (reset)"),
        (error_of("HfHubHTTPError", 500, "Server Error"), "cannot be had from the hub (Server Error)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_why(monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str) -> None:
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    outer = OSError("We couldn't connect")
    outer.__cause__ = error  # as transformers and datasets wrap it
    for raised in (error, outer) if "reset" not in expected and "words" in str(error) else (error,):
        assert hub.why(raised)[0] == expected or hub.why(raised)[0].startswith(expected)


def test_modelscope_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    modelscope.folder.cache_clear()
    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(snapshot_download=fails))
    with pytest.raises(UserError, match=r"owner/x: model.name: ModelScope cannot be reached \(no route\)"):
        modelscope.folder("owner/x", None)


def test_an_error_of_the_checkpoint_is_none_of_the_hub() -> None:
    assert not hub.failed(ValueError("odd value"))
    assert hub.failed(error_of("GatedRepoError", 403))


def test_tasks_need_none_of_a_runs_own_rows(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "model" / "config.json").write_text("{}")
    text = RECIPE.format(stage="sft", model="tiny-llama", data=tmp_path / "rows.jsonl")
    (run / "recipe.yaml").write_text(text + f"eval: {{data: {tmp_path / 'gone.jsonl'}}}\n")
    evaluating.evaluated_one(str(run), None, is_adapter=False, own=False)
    with pytest.raises(UserError, match=r"gone\.jsonl: eval\.data: no such file"):
        evaluating.evaluated_one(str(run), None, is_adapter=False, own=True)
