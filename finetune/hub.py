"""The Hugging Face hub, asked once: whether it can be reached, and why it did not give what was asked for.

Settings are the hub client's own: HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 reads the cache and asks nobody.
"""

from __future__ import annotations

import functools
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import UserError, without_secrets

OFFLINE = "HF_HUB_OFFLINE"
SWITCHES = (OFFLINE, "TRANSFORMERS_OFFLINE")
GET_IT = "or download it elsewhere and give the folder"
REACH = f"check the network, name a mirror with HF_ENDPOINT, {GET_IT}; {OFFLINE}=1 reads the cache without asking"
LOG_IN = "accept its terms on its page and log in (`hf auth login`, or HF_TOKEN)"
# What clients, and the libraries under them, call a connection that was not made or broke off.
BROKEN = {
    "ConnectError", "ConnectTimeout", "ReadTimeout", "ReadError", "PoolTimeout", "NetworkError", "TimeoutException",
    "ProxyError", "RemoteProtocolError", "ConnectionError", "NewConnectionError", "MaxRetryError", "Timeout",
    "NameResolutionError", "OfflineModeIsEnabled",
}  # fmt: skip


def endpoint() -> str:
    from huggingface_hub import constants

    return without_secrets(str(constants.ENDPOINT))


@functools.cache
def unreachable() -> str | None:
    """Why the hub cannot be reached, after one try (its client takes six, half a minute); None when it answers.

    If it does not, everything in this process and its children is looked for in the cache only.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.is_offline_mode():
        return f"{switch()} is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of httpx, of proxies, of certificates
        read_the_cache_only()
        return next(iter(str(error).splitlines()), "") or type(error).__name__
    return None


def switch() -> str:
    """The variable that keeps this process offline."""
    return next((name for name in SWITCHES if os.environ.get(name)), OFFLINE)


def read_the_cache_only() -> None:
    """As if HF_HUB_OFFLINE had been set from the start: some libraries have read it when they were imported."""
    os.environ[OFFLINE] = "1"
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            setattr(sys.modules[name], OFFLINE, True)


def file(name: str, filename: str, revision: str | None = None) -> str | None:
    """None where the model has no such file. UserError with the reason when it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    away = unreachable()
    try:
        return str(hf_hub_download(name, filename, revision=revision, local_files_only=away is not None))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError) or (away and cached(name, revision)):
            return None  # it has no such file, or nobody needed it when it was online
        what, fix = not_there() if away else why(error)
    except Exception as error:  # the client and the network each raise their own
        what, fix = why(error)
    raise UserError(what, path=name, key="model.name", fix=fix)


def files(name: str, revision: str | None, ending: str) -> list[str]:
    """Names in a repository; [] when it cannot be asked."""
    from huggingface_hub import HfApi

    if unreachable() is not None:
        return []
    try:
        return sorted(f for f in HfApi().list_repo_files(name, revision=revision) if f.endswith(ending))
    except Exception:  # whoever asks has a reason to refuse already
        return []


def has(name: str, filename: str, revision: str | None = None) -> bool:
    """Whether a file is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, filename, revision=revision), str)


def cached(name: str, revision: str | None = None) -> Path | None:
    """The snapshot in the cache."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def fetches(name: str, revision: str | None = None) -> bool:
    """Whether the weights of a model are not in the cache, and can be fetched."""
    snapshot = cached(name, revision)
    there = snapshot is not None and any(p.suffix in (".safetensors", ".bin") for p in snapshot.iterdir())
    return not there and unreachable() is None


def not_there() -> tuple[str, str]:
    """(message, fix) for what is not in the cache while the hub cannot be asked."""
    reason = unreachable()
    if reason == f"{switch()} is set":
        what = f"is neither here nor in the cache, and the hub is not asked: {reason}"
        return what, f"unset {switch()} to download it, {GET_IT}"
    return f"is neither here nor in the cache, and the hub cannot be reached ({endpoint()}: {reason})", REACH


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        yield here
        here = here.__cause__ or here.__context__


CLIENTS = ("huggingface_hub.", "httpx", "httpcore", "requests.", "urllib3.")


def failed(error: BaseException) -> bool:
    """Whether an error comes from a hub's client or the network, not from what was read."""
    return any(kind.__module__.startswith(CLIENTS) for e in chain(error) for kind in type(e).__mro__)


def why(error: BaseException, hub: str = "the hub") -> tuple[str, str]:
    """(message, fix) for what a client of `hub` raised: not reached, no access, not there, else its own words."""
    found = list(chain(error))
    names = {kind.__name__ for e in found for kind in type(e).__mro__}
    codes = {getattr(getattr(e, "response", None), "status_code", None) for e in found}
    words = words_of(error)
    ours = hub == "the hub"
    if "GatedRepoError" in names or 403 in codes or "gated dataset" in words:
        return f"is gated on {hub}: it is given to those who are logged in and were granted access", LOG_IN
    if "RevisionNotFoundError" in names:
        return f"has no such revision on {hub}", "check the revision (a branch, tag or commit), or leave it out"
    missing = {"RepositoryNotFoundError", "DatasetNotFoundError", "NotExistError"} & names
    if missing or codes & {401, 404}:
        return f"is not on {hub}, or is private", f"check the name; if it is private or gated, {LOG_IN}"
    if names & BROKEN or any(isinstance(e, ConnectionError | TimeoutError | socket.gaierror) for e in found):
        if ours and unreachable() is not None:
            return not_there()
        return f"{hub} cannot be reached ({words})", REACH if ours else f"check the network, {GET_IT}"
    return f"cannot be had from {hub} ({words})", f"check the name and the network, {GET_IT}"


TOKENS = re.compile(r"\b(hf_|ms-)[A-Za-z0-9-]{6,}")  # in the words of a client, also half ones


def words_of(error: BaseException) -> str:
    """Its first line, without a token."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return TOKENS.sub("***", without_secrets(line)) or type(error).__name__
