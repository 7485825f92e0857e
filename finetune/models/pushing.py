"""A folder goes to a repository of the Hugging Face hub or ModelScope: private unless told otherwise. No torch."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import hub
from finetune.errors import UserError
from finetune.models import modelscope

HUBS = {"hub": "the hub", "modelscope": "ModelScope"}
TO_WRITE = {
    "hub": "log in with a token that may write (`hf auth login`, or HF_TOKEN)",
    "modelscope": "log in (`modelscope login --token …`, or MODELSCOPE_API_TOKEN)",
}
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Push:
    """Where a folder is to go."""

    name: str
    """OWNER/NAME"""
    where: str = "hub"
    """One of HUBS."""
    public: bool = False
    again: bool = False
    """Whether a repository that is there gets a new commit."""


def check(push: Push) -> None:
    """UserError, before there is anything to push, where it could not be: the name, the client, the account, and a
    repository that is there already."""
    key = "--push-to-hub"
    if push.where not in HUBS:
        raise UserError(f"no hub {push.where!r}", key="--hub", fix=f"one of {', '.join(HUBS)}")
    if not REPOSITORY.fullmatch(push.name) or ".." in push.name or "--" in push.name:
        raise UserError(f"{push.name!r} is no repository", key=key, fix="write OWNER/NAME")
    if push.where == "modelscope":
        client = modelscope_client(push.name, "get_cookies", "repo_exists", "create_repo", "upload_folder")
        asked(push, lambda: client.get_cookies(cookies_required=True))
        if asked(push, lambda: client.repo_exists(push.name, repo_type="model", re_raise=True)):
            fix = "choose a new name, or upload the merged folder with ModelScope's own client"
            raise UserError("is on ModelScope already", path=push.name, key=key, fix=fix)
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if (reason := hub.unreachable()) is not None:
        fix = f"unset {hub.switch()}" if reason == f"{hub.switch()} is set" else "check the network"
        raise UserError(f"the hub cannot be asked: {reason}", key=key, fix=f"{fix}, or merge without it")
    api = HfApi()
    account = asked(push, api.whoami)
    if (account.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise UserError("the token of this machine may only read", path=push.name, key=key, fix=TO_WRITE["hub"])
    owners = [account.get("name"), *(org.get("name") for org in account.get("orgs") or ())]
    owner = push.name.partition("/")[0]
    if owner not in owners:
        fix = f"push to {owners[0]}/{push.name.partition('/')[2]}, or log in as {owner}"
        raise UserError(f"{owners[0]} may not write for {owner}", path=push.name, key=key, fix=fix)
    try:
        private = api.repo_info(push.name, repo_type="model").private
    except RepositoryNotFoundError:
        return
    except Exception as error:
        what, fix = hub.why(error)
        raise UserError(what, path=push.name, key=key, fix=fix) from None
    if not push.again:
        fix = "choose a new name, or --overwrite for a new commit there (what is there stays in its history)"
        raise UserError("is on the hub already", path=push.name, key=key, fix=fix)
    if not private and not push.public:
        raise UserError("is public there", path=push.name, key=key, fix="say so with --public, or choose a new name")


def asked(push: Push, question: Any) -> Any:
    """Its answer. UserError with the reason where the hub gives none."""
    try:
        return question()
    except Exception as error:  # the client and the network each raise their own
        names = {kind.__name__ for e in hub.chain(error) for kind in type(e).__mro__}
        codes = {getattr(getattr(e, "response", None), "status_code", None) for e in hub.chain(error)}
        if {"LocalTokenNotFoundError", "AuthenticationError"} & names or 401 in codes or "login first" in str(error):
            what, fix = f"nobody is logged in to {HUBS[push.where]}, or the token is not valid", TO_WRITE[push.where]
        else:
            what, fix = hub.why(error, HUBS[push.where])
    raise UserError(what, path=push.name, key="--push-to-hub", fix=fix)


def push(folder: Path, files: Sequence[str], to: Push) -> str:
    """The page of the repository to which these files of a folder were pushed; it is made private unless `to.public`.

    UserError with the command that goes on where the hub did not take them: the folder is complete.
    """
    patterns = [glob.escape(name) for name in files]
    seen = "public" if to.public else "private"
    try:
        if to.where == "modelscope":
            client = modelscope_client(to.name, "upload_folder", "create_repo")
            client.create_repo(to.name, visibility=seen, repo_type="model")
            client.upload_folder(
                repo_id=to.name, folder_path=str(folder), commit_message="Merged by ft", allow_patterns=patterns
            )
            return f"https://www.modelscope.cn/models/{to.name} ({seen})"
        from huggingface_hub import HfApi

        api = HfApi()
        page = api.create_repo(to.name, private=not to.public, exist_ok=to.again)
        api.upload_folder(repo_id=to.name, folder_path=folder, commit_message="Merged by ft", allow_patterns=patterns)
        return f"{page} ({seen})"
    except UserError:
        raise
    except Exception as error:
        what = f"{HUBS[to.where]} did not take it ({hub.words_of(error)})"
    tool = f"modelscope upload {to.name}" if to.where == "modelscope" else f"hf upload {to.name}"
    fix = f"the merged model is whole: push it with {tool} {folder}"
    raise UserError(f"was not pushed: {what}", path=to.name, key="--push-to-hub", fix=fix)


def modelscope_client(name: str, *needed: str) -> Any:
    """ModelScope's own. UserError when it is not installed, or lacks what is needed of it."""
    client = modelscope.client(name, "--hub", "modelscope.hub.api").HubApi()
    if lacking := [method for method in needed if not hasattr(client, method)]:
        what = f"the installed modelscope has no {', '.join(lacking)}"
        raise UserError(what, path=name, key="--hub", fix="pip install -U modelscope")
    return client
