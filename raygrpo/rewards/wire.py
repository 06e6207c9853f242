"""Messages between a scorer and its child process: JSON with a length before it, over a socket.

JSON because the child runs anybody's code: reading it runs none. The receiver's deadline covers the whole message, so
that a child killed or stopped in the middle of one cannot hold its parent.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

_LENGTH = struct.Struct("<Q")


def send(connection: socket.socket, message: Any, *, timeout_s: float | None = None) -> None:
    """Raises TimeoutError when the other side does not read, OSError when it is gone."""
    body = json.dumps(message).encode()
    connection.settimeout(timeout_s)
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive(connection: socket.socket, *, timeout_s: float | None = None) -> Any:
    """Raises TimeoutError when there is no whole message in time, EOFError when the other side is gone."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size, deadline))
    return json.loads(_read(connection, length, deadline))


def _read(connection: socket.socket, num_bytes: int, deadline: float | None) -> bytes:
    parts = []
    while num_bytes:
        if deadline is not None:
            connection.settimeout(max(deadline - time.monotonic(), 1e-4))
        else:
            connection.settimeout(None)
        try:
            part = connection.recv(min(num_bytes, 1 << 20))
        except ConnectionError:
            part = b""
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)
