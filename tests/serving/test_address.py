"""Where the server listens."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from finetune.errors import UserError
from finetune.serving import address


def test_a_port_in_use_is_told_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port: port {port} of 127.0.0.1 is in use"):
            address.check("127.0.0.1", port)
        done = subprocess.run(
            [sys.executable, "-m", "finetune", "serve", "tiny-llama", "--port", str(port)],
            capture_output=True, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n"), "is in use" in done.stderr) == (2, 1, True)
    address.check("127.0.0.1", port)


def test_who_can_reach_it() -> None:
    for host, alone in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        with address.bound(host, 0) as listener:
            assert address.is_loopback(listener) == alone
            assert address.url(listener).startswith("http://")


def test_an_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.early import answering

    real = answering.importlib.util.find_spec
    monkeypatch.setattr(answering.importlib.util, "find_spec", lambda name: None if name == "fastapi" else real(name))
    with pytest.raises(UserError, match=r"fastapi is not installed → pip install 'ft-recipes\[serve\]'"):
        answering.served([], "tiny-llama", [], "127.0.0.1", 0, None)
