"""--push-to-hub against stand-ins for the clients: private unless told otherwise, and no token is ever printed."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from conftest import adapter, ft
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from finetune import hub
from finetune.errors import UserError
from finetune.models import pushing
from finetune.models.pushing import Push

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"


def response(code: int) -> Any:
    import httpx

    return httpx.Response(code, request=httpx.Request("GET", "https://huggingface.co"))


class Hub:
    """What `huggingface_hub.HfApi` does, remembered. With the client's own parameters: see the last test."""

    calls: list[tuple[str, dict[str, Any]]]
    role, there, private = "write", False, True
    broken: Exception | None = None
    sent: dict[str, int]

    def __init__(self) -> None:
        self.calls, self.sent = [], {}

    def whoami(self) -> dict[str, Any]:
        return {"name": "me", "orgs": [{"name": "us"}], "auth": {"accessToken": {"role": self.role}}}

    def repo_info(self, repo_id: str, *, repo_type: str | None = None) -> Any:
        if not self.there:
            raise RepositoryNotFoundError("404", response=response(404))
        return SimpleNamespace(private=self.private)

    def create_repo(self, repo_id: str, *, private: bool | None = None, exist_ok: bool = False) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, "private": private, "exist_ok": exist_ok}))
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, commit_message: str | None = None, allow_patterns: Any = None
    ) -> None:
        if self.broken is not None:
            raise self.broken
        files = huggingface_hub.utils.filter_repo_objects(
            [path.name for path in Path(folder_path).iterdir()], allow_patterns=allow_patterns
        )
        self.sent = {name: (Path(folder_path) / name).stat().st_size for name in files}
        self.calls.append(("upload_folder", {"repo_id": repo_id}))


class ModelScope(Hub):
    """What `modelscope.hub.api.HubApi` does."""

    logged_in = True

    def get_cookies(self, access_token: str | None = None, cookies_required: bool = False) -> Any:
        if cookies_required and not self.logged_in:
            raise ValueError("Token does not exist, please login first.")
        return {}

    def repo_exists(self, repo_id: str, *, repo_type: str | None = None, re_raise: bool = False) -> bool:
        return self.there

    def create_repo(self, repo_id: str, *, visibility: Any = None, repo_type: str = "model") -> None:  # type: ignore[override]
        self.calls.append(("create_repo", {"repo_id": repo_id, "visibility": visibility}))


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    monkeypatch.setattr(hub, "unreachable", lambda: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return found


@pytest.fixture
def modelscope(monkeypatch: pytest.MonkeyPatch) -> ModelScope:
    found = ModelScope()
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    api = ModuleType("modelscope.hub.api")
    api.HubApi = lambda: found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", api)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "merged"
    made.mkdir()
    for name in ("config.json", "model[1].safetensors", "notes of mine", "merge.json"):
        (made / name).write_text(name)
    return made


FILES = ["config.json", "model[1].safetensors"]


def test_private_unless_told_otherwise(client: Hub, folder: Path) -> None:
    """Only what the merge wrote: neither the user's files nor merge.json, which has paths of this machine."""
    pushing.check(Push("us/mine"))
    assert pushing.push(folder, FILES, Push("us/mine")) == "https://huggingface.co/us/mine (private)"
    assert client.calls[0] == ("create_repo", {"repo_id": "us/mine", "private": True, "exist_ok": False})
    assert sorted(client.sent) == FILES
    pushing.push(folder, FILES, Push("me/mine", public=True))
    assert client.calls[2][1]["private"] is False


def test_modelscope(modelscope: ModelScope, folder: Path) -> None:
    """Its client makes repositories public when it is not told."""
    to = Push("me/mine", "modelscope")
    pushing.check(to)
    assert pushing.push(folder, FILES, to) == "https://www.modelscope.cn/models/me/mine (private)"
    assert modelscope.calls[0] == ("create_repo", {"repo_id": "me/mine", "visibility": "private"})
    assert sorted(modelscope.sent) == FILES
    pushing.push(folder, FILES, Push("me/mine", "modelscope", public=True))
    assert modelscope.calls[2][1]["visibility"] == "public"
    modelscope.there = True
    with pytest.raises(UserError, match="is on ModelScope already"):
        pushing.check(to)
    modelscope.logged_in = False
    with pytest.raises(UserError, match="nobody is logged in to ModelScope"):
        pushing.check(to)


def test_modelscope_without_its_client(monkeypatch: pytest.MonkeyPatch, modelscope: ModelScope) -> None:
    sys.modules["modelscope.hub.api"].HubApi = SimpleNamespace  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"has no get_cookies, .* → pip install -U modelscope"):
        pushing.check(Push("me/mine", "modelscope"))
    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(UserError, match="ModelScope's client is not installed → pip install modelscope"):
        pushing.check(Push("me/mine", "modelscope"))


@pytest.mark.parametrize("name", ["mine", "a/b/c", "/mine", "me/", "me/../x", "me/a b", "me/-x", "", "me/a--b"])
def test_no_repository(name: str, client: Hub) -> None:
    with pytest.raises(UserError, match="is no repository → write OWNER/NAME"):
        pushing.check(Push(name))
    assert client.calls == []


def test_what_cannot_be_pushed_is_known_before_the_merge(client: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(said: str, **more: Any) -> None:
        with pytest.raises(UserError, match=said) as caught:
            pushing.check(Push(**{"name": "me/mine", **more}))
        assert TOKEN not in str(caught.value)
        assert client.calls == []

    refused("me may not write for them → push to me/mine, or log in as them", name="them/mine")
    refused("no hub 'gitlab' → one of hub, modelscope", where="gitlab")
    client.there = True
    refused("is on the hub already → choose a new name, or --overwrite")
    client.private = False
    refused("is public there → say so with --public", again=True)
    pushing.check(Push("me/mine", again=True, public=True))
    client.role = "read"
    refused("the token of this machine may only read → log in with a token that may write")

    def nobody() -> Any:
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(client, "whoami", nobody)
    refused("nobody is logged in to the hub, or the token is not valid")

    def unknown() -> Any:
        raise HfHubHTTPError(f"401 Bearer {TOKEN}", response=response(401))

    monkeypatch.setattr(client, "whoami", unknown)
    refused("nobody is logged in to the hub")
    monkeypatch.setattr(hub, "unreachable", lambda: "HF_HUB_OFFLINE is set")
    refused("the hub cannot be asked: HF_HUB_OFFLINE is set → unset HF_HUB_OFFLINE, or merge without it")


@pytest.mark.parametrize("token", [TOKEN, "an-old-kind-of-token"])
def test_a_push_that_fails_leaves_the_folder_and_the_command(
    token: str, client: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """httpx writes a header that it does not like into its error, token and all."""
    monkeypatch.setenv("HF_TOKEN", token)
    client.broken = ValueError(f"Illegal header value b'Bearer {token}'")
    with pytest.raises(UserError) as caught:
        pushing.push(folder, FILES, Push("me/mine"))
    said = str(caught.value)
    assert "was not pushed: the hub did not take it (Illegal header value b'Bearer ***')" in said
    assert token not in said
    assert f"the merged model is whole: push it with hf upload me/mine {folder}" in said
    assert caught.value.__cause__ is None
    assert folder.is_dir()


def test_a_merge_is_pushed_only_when_that_is_asked(client: Hub, tmp_path: Path, base: Path) -> None:
    """From the command line: what is pushed is what lies there, but for merge.json."""
    one = adapter(base, tmp_path / "a", 1)
    words = ["merge", one, "--model", base, "--output", tmp_path / "out"]
    assert ft(*words).returncode == 0
    assert client.calls == []
    done = ft(*words, "--overwrite", "--push-to-hub", "them/mine")
    assert done.returncode == 2
    done = ft(*words, "--overwrite", "--push-to-hub", "me/mine")
    assert done.returncode == 0, done.stderr
    assert "pushed: https://huggingface.co/me/mine (private)" in done.stderr
    assert TOKEN not in done.stderr + done.stdout
    files = set(json.loads((tmp_path / "out" / "merge.json").read_text())["files"])
    assert set(client.sent) == files - {"merge.json"}
    assert {"config.json", "generation_config.json", "chat_template.jinja", "README.md", "model.safetensors"} <= files


def test_the_stand_ins_take_what_the_clients_take() -> None:
    """An upgrade of a client fails here first; ModelScope's where it is installed."""
    pairs: list[tuple[type, Any]] = [(Hub, huggingface_hub.HfApi)]
    if importlib.util.find_spec("modelscope") is not None:
        pairs.append((ModelScope, importlib.import_module("modelscope.hub.api").HubApi))
    for stand_in, real in pairs:
        for name, method in vars(stand_in).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                given = {key: None for key in inspect.signature(method).parameters if key != "self"}
                inspect.signature(getattr(real, name)).bind(None, **given)
