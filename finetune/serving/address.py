"""Where the server listens, found out before anything is loaded."""

from __future__ import annotations

import errno
import ipaddress
import socket

from finetune.errors import UserError

LOOPBACK = "127.0.0.1"


def bound(host: str, port: int) -> socket.socket:
    """A socket at that address, not yet listening. UserError where there can be none."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        fix = f"{LOOPBACK} is for this machine alone, 0.0.0.0 for all that can reach it"
        raise UserError(f"no such host: {host!r}", key="--host", fix=fix) from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left a moment ago
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _refused(error, host, port) from None
    return listener


def listen(listener: socket.socket, host: str, port: int) -> None:
    """UserError where somebody else began to while the model was loaded."""
    try:
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise _refused(error, host, port) from None


def check(host: str, port: int) -> None:
    """UserError where nobody can listen."""
    listener = bound(host, port)
    listen(listener, host, port)
    listener.close()


def _refused(error: OSError, host: str, port: int) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port {port} of {host} is in use", key="--port", fix="give another one, or 0 for any")
    if error.errno == errno.EACCES:
        return UserError(f"port {port} may not be used here", key="--port", fix="give one above 1023")
    return UserError(f"cannot listen at {host}: {error.strerror}", key="--host", fix=f"{LOOPBACK} is this machine")


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
