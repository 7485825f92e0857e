# ruff: noqa: E501  (a row or a recipe a line reads best)
"""What SECURITY.md promises. Templates: data/test_template_limits.py; links and --overwrite: run/test_guards.py,
test_places.py; a malicious adapter and YAML: test_bad_inputs.py."""

from __future__ import annotations

import ast
import base64
import gzip
import json
import os
import shutil
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ft, train

import finetune
from finetune import cli, errors, given_files, places
from finetune.data import sources
from finetune.data.readers import read_file
from finetune.errors import UserError
from finetune.models import sources as model_sources
from finetune.models import weight_files
from finetune.report import page
from finetune.run import appending, checkpoints, records, writing
from finetune.terminal import progress
from finetune.training import model_card

PACKAGE = Path(finetune.__file__).parent
SECRETS = {
    "HF_TOKEN": "hf_verysecretverysecretverysecret", "WANDB_API_KEY": "0123456789abcdef0123456789", "MY_PASSWORD": "hunter2222",
}  # fmt: skip
DEEP = '{"a": ' * 50_000


class Evil:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


# --- no code of others is run ---

FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "marshal.loads", "joblib.load",
    "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "shelve.open",
}  # fmt: skip
NEVER = ("trust_remote_code", "shell", "allow_pickle")
SAFE_LOADERS = ("Loader=_Loader", "SafeLoader")


def unsafe(call: ast.Call | ast.Dict) -> str | None:
    if isinstance(call, ast.Dict):  # options that are handed on
        values = {ast.unparse(k).strip("'"): ast.unparse(v) for k, v in zip(call.keys, call.values, strict=True) if k}
        return next((f"{{{key}: True}}" for key in NEVER if values.get(key) == "True"), None)
    name, given = ast.unparse(call.func), {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in FORBIDDEN:
        return name
    if name == "torch.load" and given.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if (
        name == "yaml.load"
        and not ast.unparse(call).rstrip(")").endswith(SAFE_LOADERS)
        and "SafeLoader" not in ast.unparse(call)
    ):
        return "yaml.load without a safe loader"
    return next((f"{name}({key}=True)" for key in NEVER if given.get(key) == "True"), None)


def test_nothing_in_the_package_runs_what_it_reads() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call | ast.Dict) and (what := unsafe(node)) is not None:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {what}")
    assert found == []


def test_the_look_at_the_package_finds_something() -> None:
    lines = ("torch.load(f)", "eval(x)", "yaml.load(t, yaml.Loader)", "f(trust_remote_code=True)", "run(x, shell=True)",
             "{'trust_remote_code': True}")  # fmt: skip
    for line in lines:
        assert unsafe(ast.parse(line).body[0].value) is not None  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def half_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints that can be gone on with, made with secrets in the environment."""
    where = tmp_path_factory.mktemp("half")
    (where / "rows.jsonl").write_text('{"instruction": "q", "output": "a"}\n{"instruction": "p", "output": "b"}\n')
    (where / "recipe.yaml").write_text(
        f"version: 1\nstage: sft\nmodel: {{name: tiny-llama, dtype: float32}}\ndata: {{train: {where}/rows.jsonl, max_length: 64}}\n"
        "adapter: {method: lora, r: 2}\ntrain: {max_steps: 2, effective_batch_size: 2, save_steps: 1, warmup_steps: 0}\n"
        f"output: {{dir: '{where}/run <img src=x onerror=alert(1)>'}}\n"
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        train(where / "recipe.yaml")
    return next(path for path in where.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_pickled_code_is_not_gone_on_with(half_a_run: Path, tmp_path: Path, name: str) -> None:
    where = tmp_path / "run"
    shutil.copytree(half_a_run, where)
    (where / "result.json").unlink()
    shutil.rmtree(where / "checkpoints" / "checkpoint-2")
    folder = where / "checkpoints" / "checkpoint-1"
    assert (folder / name).is_file()
    torch.save({"state": Evil(tmp_path / "pwned")}, folder / name)
    known = {key: value for key, value in checkpoints.known_of(folder).items() if key != "files"}
    checkpoints.complete(folder, **known)  # whoever writes such a file writes its checksum, too
    text = (where / "recipe.yaml").read_text().replace(str(half_a_run), str(where))
    (where / "recipe.yaml").write_text(text)
    done = ft("sft", where / "recipe.yaml", "--resume", "--output", where)
    assert not (tmp_path / "pwned").exists()
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert not (where / "result.json").exists()


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors"])
def test_an_index_names_files_of_its_folder_only(tmp_path: Path, shard: str) -> None:
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(UserError, match="names a file outside of its folder"):
        weight_files.weight_files(folder)


# --- bombs ---

OWN_FILES: dict[str, Callable[[Path], Any]] = {
    "result.json": places.read_json,
    "complete": lambda path: checkpoints.known_of(path.parent),
    "metrics.jsonl": writing.read_lines,
    "x.safetensors": checkpoints._readable,
    "state.json": sources.listed_files,
}


@pytest.mark.parametrize("name", OWN_FILES)
def test_deep_json_in_our_own_files_is_no_json(tmp_path: Path, name: str) -> None:
    text = DEEP.encode()
    (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text if name.endswith("s") else text)
    assert not OWN_FILES[name](tmp_path / name)


def test_deep_json_in_a_file_of_answers(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text(DEEP + "\n")
    with pytest.raises(UserError, match="is no row that ft wrote"):
        list(appending.done_in(tmp_path / "answers.jsonl"))


def test_a_packed_file_of_white_space_takes_no_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "rows.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(b" " * (1 << 20))
    tracemalloc.start()
    with pytest.raises(UserError, match="the file is empty"):
        list(read_file(tmp_path / "rows.jsonl.gz"))
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < 20 << 20


# --- secrets ---


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return list(SECRETS.values())


def test_no_secret_is_in_what_a_run_leaves(half_a_run: Path) -> None:
    for path in half_a_run.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [name for name, value in SECRETS.items() if value.encode() in content], path


def test_no_secret_is_in_an_error(secrets: list[str]) -> None:
    for secret in secrets:
        (line,) = errors.render(UserError(f"refused {secret}!", path=f"https://me:{secret}@host/x"))
        assert secret not in line
        assert "***" in line
    (line,) = errors.render(UserError("https://me:pass@host, hf_ABCDEFGHIJKLMNOPQRSTUVWX, hf_transfer"))
    assert line == "https://***@host, ***, hf_transfer"


@pytest.mark.parametrize("debug", [False, True])
def test_no_secret_is_in_a_traceback(
    secrets: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], debug: bool
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError(f"401 for {secrets[0]} and {secrets[1]}")

    monkeypatch.setattr(cli, "app", fails)
    monkeypatch.setattr("sys.argv", ["ft", "doctor", *(["--debug"] if debug else [])])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "ValueError: 401 for *** and ***" in said
    assert ("Traceback" in said) == debug
    assert not [secret for secret in secrets if secret in said]


@pytest.mark.parametrize("given", [["--api-key", "keykeykey"], ["--api-key=keykeykey"]])
def test_a_key_is_not_said_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str]
) -> None:
    monkeypatch.setattr(cli, "app", lambda **_: 130)
    monkeypatch.setattr("sys.argv", ["ft", "serve", "tiny-llama", *given])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().err
    assert "start again with ft serve tiny-llama --api-key" in said
    assert "keykeykey" not in said


def test_a_token_in_a_recipe_is_refused_and_not_said(tmp_path: Path) -> None:
    done = ft("sft", "quickstart", "--set", f"train.hub_token={SECRETS['HF_TOKEN']}", cwd=tmp_path)
    assert done.returncode == 2
    assert "train.hub_token: unknown key" in done.stderr
    assert SECRETS["HF_TOKEN"] not in done.stdout + done.stderr


# --- HTML and Markdown ---


def test_what_a_user_writes_is_no_markup(half_a_run: Path) -> None:
    text = (half_a_run / "report.html").read_text(encoding="utf-8")
    assert "&lt;img src=x" in text
    assert "<img src=x" not in text
    card = (half_a_run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "&lt;img src=x" in card
    assert "\n# run <img" not in card


def test_a_cell_is_a_cell() -> None:
    (*_, line) = model_card.table([("base", "a | b\n# c <img src=x onerror=alert(1)>")])
    assert line == "| base | a \\| b # c &lt;img src=x onerror=alert(1)&gt; |"


# --- code that a checkpoint names ---


@pytest.mark.parametrize(
    "more",
    [
        {"attn_implementation": "kernels-community/flash-attn3"},
        {"_attn_implementation": {"": "owner/kernel"}},
        {"text_config": {"_attn_implementation_internal": "owner/kernel:function"}},
        {"experts_implementation": "sonicmoe"},
    ],
)
def test_a_kernel_that_a_config_names_is_not_fetched(tmp_path: Path, more: dict[str, Any]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **more}))
    done = ft("chat", "model", cwd=tmp_path)
    assert done.returncode == 2
    assert "which may be code of a hub, and that is never run" in done.stderr
    for usual in ("sdpa", "eager", "flash_attention_2"):
        assert model_sources.fetched_code({"attn_implementation": usual, "text_config": None}) is None


def test_no_secret_is_in_an_address_or_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    said = "https://tok123@host/x?a=1&X-Amz-Signature=abcd&sig=ef wJalrXUtnFEMI ghp_ABCDEFGHIJKLMNOPQRSTUVWX"
    (line,) = errors.render(UserError(said))
    assert line == "https://***@host/x?a=1&X-Amz-Signature=***&sig=*** *** ***"
    progress.warn("refused hf_ABCDEFGHIJKLMNOPQRSTUVWX")
    assert "hf_" not in capsys.readouterr().err


def test_a_line_has_an_end() -> None:
    (line,) = errors.render(UserError("no " + "x" * 100_000, path="rows.jsonl", fix="mend it"))
    assert len(line) < 2100
    assert line.startswith("rows.jsonl: no xxx")
    assert line.endswith("xxx → mend it")


def test_a_value_too_short_for_a_secret_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "model")
    monkeypatch.setenv("MY_SECRET", "with a newline\n")
    assert errors.without_secrets("a model with a newline") == "a model ***"


def test_no_secret_is_in_what_is_said_of_arguments(tmp_path: Path, secrets: list[str]) -> None:
    done = ft("recipes", f"--{secrets[1]}", cwd=tmp_path)
    assert done.returncode == 2
    assert secrets[1] not in done.stderr


def test_a_line_of_a_card_is_a_line() -> None:
    assert model_card.plain("a\r# b\n# c") == "a # b # c"


def test_a_picture_behind_a_link_is_not_shown(half_a_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(half_a_run, run)
    (tmp_path / "private").write_bytes(b"a private file")
    (run / "loss.png").unlink(missing_ok=True)
    (run / "loss.png").symlink_to(tmp_path / "private")
    shown = page.of_one(records.read(run))
    assert base64.b64encode(b"a private file").decode() not in shown


def test_a_socket_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("rows.jsonl")
        assert given_files.odd(Path("rows.jsonl")) == ("is a socket", "give a file")
