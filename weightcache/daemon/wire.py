"""Own the form of what the node daemon and its clients tell each other: JSON objects, each behind its length.

Never trusts a peer: sizes, kinds and versions are checked, and nothing but JSON is ever read.

    4 bytes, big-endian: how many follow      {"v": 1, "op": "attach", …}

A client asks, the daemon answers `{"v": 1, "ok": true, …}`, or `{"v": 1, "ok": false, "code": …, "error": …}`. The answer to
`attach` brings the descriptor of an image with its first byte, and the model's shards in a second message; while the image
is being filled more messages tell which chunks have arrived. A connection is a lease: what it attached is held until it
is closed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from weightcache.errors import DaemonError

VERSION = 1
HEAD = struct.Struct("!I")
MOST_REQUEST_NBYTES = 256 << 10
MOST_ANSWER_NBYTES = 256 << 20  # 200,000 tensors and their chunks
BEAT_S = 0.5  # how often the daemon says that it is alive while a client waits
STALL_S = 2.0  # a daemon that is silent for so long while a client waits is stopped


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message as it is sent."""
    return frame(json.dumps({"v": VERSION, **message}, separators=(",", ":")).encode())


def frame(body: bytes) -> bytes:
    """Return an encoded message behind its length."""
    return HEAD.pack(len(body)) + body


def body_nbytes(head: bytes, most: int) -> int:
    """Return how many bytes follow a message's head. Raises DaemonError for more than `most`."""
    (nbytes,) = HEAD.unpack(head)
    if nbytes > most:
        raise DaemonError(f"a message of {nbytes} bytes on the daemon's socket: expected at most {most}")
    return int(nbytes)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def decode(body: bytes) -> dict[str, Any]:
    """Read a message. Raises DaemonError for what is none, or of another version."""
    try:
        message = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise DaemonError("a message on the daemon's socket is not JSON") from None
    if not isinstance(message, dict):
        raise DaemonError("a message on the daemon's socket is no JSON object")
    if message.get("v") != VERSION:
        raise DaemonError(
            f"a message of version {message.get('v')!r:.20} on the daemon's socket, expected {VERSION}: restart the daemon "
            "and its clients with the same weightcache"
        )
    return message
