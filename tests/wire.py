"""Own HTTP/1.1 on sockets for the test servers: heads, bodies, and the log of what was carried.

Never decides what to answer.
"""

from __future__ import annotations

import dataclasses
import fcntl
import re
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from typing import Literal, NamedTuple

PIECE_BYTES = 256 * 1024
MAX_HEAD_BYTES = 64 * 1024
LAST_CHUNK = b"0\r\n\r\n"

Framing = int | Literal["chunked", "until-close"]
"""How a body's end is known: its length, its chunks, or the end of the connection."""


class Request(NamedTuple):
    """One request as a server or proxy saw it. Status 0: nothing was answered."""

    method: str
    path: str
    range: str | None
    status: int
    body_bytes: int


@dataclasses.dataclass(slots=True)
class Exchange:
    """A request under way; written by the one thread that serves it, read by any."""

    method: str
    path: str
    range: str | None
    status: int = 0
    body_bytes: int = 0
    uploaded_bytes: int = 0

    def send(self, sock: socket.socket, piece: bytes | memoryview) -> None:
        """Send body bytes and count them; who has received a byte finds it counted already."""
        rest = memoryview(piece)
        self.body_bytes += len(rest)
        try:
            while rest:
                rest = rest[sock.send(rest) :]
        except OSError:
            self.body_bytes -= len(rest)
            raise


class TrafficLog:
    """Counts requests in order of arrival. Thread-safe; exact once a request's client has its answer."""

    def __init__(self) -> None:
        self._log_lock = threading.Lock()
        self._exchanges: list[Exchange] = []

    @property
    def requests(self) -> list[Request]:
        """All requests since the last reset, those under way included."""
        with self._log_lock:
            return [Request(e.method, e.path, e.range, e.status, e.body_bytes) for e in self._exchanges]

    def body_bytes(self, pattern: str | None = None) -> int:
        """Sum the response-body bytes of GETs whose path, query included, matches the regex."""
        return sum(
            request.body_bytes
            for request in self.requests
            if request.method == "GET" and (pattern is None or re.search(pattern, request.path))
        )

    def uploaded_bytes(self) -> int:
        """Sum the bytes of all bodies that clients sent; only the proxy counts them."""
        with self._log_lock:
            return sum(exchange.uploaded_bytes for exchange in self._exchanges)

    def reset(self) -> None:
        """Forget all requests."""
        with self._log_lock:
            self._exchanges.clear()

    def record(self, method: str, path: str, range_: str | None) -> Exchange:
        """Enter a request that just arrived."""
        exchange = Exchange(method, path, range_)
        with self._log_lock:
            self._exchanges.append(exchange)
        return exchange


class Head:
    """The start line and headers of a message; names compare without case, their spelling stays."""

    def __init__(self, start: str, headers: list[tuple[str, str]]) -> None:
        self.start = start
        self.headers = headers

    @classmethod
    def parse(cls, text: bytes) -> Head:
        """Read a head without its final empty line."""
        start, *lines = text.decode("latin-1").split("\r\n")
        headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        return cls(start, headers)

    @property
    def status(self) -> int:
        """The status in a response's head."""
        return int(self.start.split(" ", 2)[1])

    @property
    def wants_close(self) -> bool:
        """Whether the connection ends with this message; with HTTP/1.0 it always does."""
        if "HTTP/1.0" in (self.start[:8], self.start[-8:]):
            return True
        return "close" in (self.get("Connection") or "").lower()

    def get(self, name: str) -> str | None:
        """Return a header's first value."""
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def remove(self, name: str) -> None:
        """Remove a header, if it is there."""
        self.headers = [(key, value) for key, value in self.headers if key.lower() != name.lower()]

    def set(self, name: str, value: str) -> None:
        """Replace or add a header."""
        self.remove(name)
        self.headers.append((name, value))

    def request_framing(self) -> Framing:
        """Say where this request's body ends."""
        if "chunked" in (self.get("Transfer-Encoding") or "").lower():
            return "chunked"
        return int(self.get("Content-Length") or 0)

    def response_framing(self, method: str) -> Framing:
        """Say where the body of this response to a request of that method ends."""
        if method == "HEAD" or self.status in (204, 304):
            return 0
        if "chunked" in (self.get("Transfer-Encoding") or "").lower():
            return "chunked"
        length = self.get("Content-Length")
        return "until-close" if length is None else int(length)

    def encode(self) -> bytes:
        """Return the head as it is sent, with the empty line."""
        lines = [self.start, *(f"{name}: {value}" for name, value in self.headers), "", ""]
        return "\r\n".join(lines).encode("latin-1")


class Wire:
    """One TCP connection and the bytes that were read from it too early.

    Read by one thread; `shutdown()` may be called by any.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._early = b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read_head(self) -> Head | None:
        """Read the next message's head; None when the peer closed between two messages."""
        text = bytearray(self._early)
        while (end := text.find(b"\r\n\r\n")) < 0:
            if len(text) > MAX_HEAD_BYTES:
                raise ConnectionError(f"a head of more than {MAX_HEAD_BYTES} bytes")
            piece = self.sock.recv(PIECE_BYTES)
            if not piece and text:
                raise ConnectionError("closed inside a head")
            if not piece:
                return None
            text += piece
        self._early = bytes(text[end + 4 :])
        return Head.parse(bytes(text[:end]))

    def read_answer(self) -> Head:
        """Read a response's head."""
        answer = self.read_head()
        if answer is None:
            raise ConnectionError("the server closed instead of answering")
        return answer

    def read_body(self, framing: Framing) -> Iterator[bytes]:
        """Yield a body's pieces, without chunk framing; trailers are dropped."""
        if framing == "until-close":
            while piece := self._read_some(PIECE_BYTES):
                yield piece
        elif framing == "chunked":
            while n_bytes := int(self._read_line().partition(b";")[0], 16):
                yield from self._read_exactly(n_bytes)
                self._read_line()
            while self._read_line():
                pass
        else:
            yield from self._read_exactly(framing)

    def is_readable(self) -> bool:
        """Whether bytes, or the peer's end, wait to be read."""
        return bool(self._early) or bool(_poll_readable(0, self.sock))

    def speaks_before(self, other: Wire) -> bool:
        """Block until this or the other wire is readable; whether it is this one."""
        if self._early or other._early:
            return bool(self._early)
        return self.sock.fileno() in _poll_readable(None, self.sock, other.sock)

    def wait_delivered(self, timeout_s: float = 1.0) -> None:
        """Wait until the peer's kernel has all that was sent, which a reset would otherwise discard."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            (n_unsent,) = struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))
            if not n_unsent:
                return
            time.sleep(0.001)

    def reset_on_close(self) -> None:
        """Make close() send RST, not FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def shutdown(self) -> None:
        """End both directions; blocked calls of other threads return."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:  # gone already
            pass

    def _read_some(self, limit: int) -> bytes:
        """Read 1 to limit bytes; b"" at the end of the connection."""
        if self._early:
            piece, self._early = self._early[:limit], self._early[limit:]
            return piece
        return self.sock.recv(limit)

    def _read_exactly(self, n_bytes: int) -> Iterator[bytes]:
        while n_bytes:
            piece = self._read_some(min(n_bytes, PIECE_BYTES))
            if not piece:
                raise ConnectionError(f"closed with {n_bytes} bytes to come")
            n_bytes -= len(piece)
            yield piece

    def _read_line(self) -> bytes:
        while (end := self._early.find(b"\r\n")) < 0:
            piece = self.sock.recv(PIECE_BYTES)
            if not piece:
                raise ConnectionError("closed inside a chunked body")
            self._early += piece
        line, self._early = self._early[:end], self._early[end + 2 :]
        return line


def chunk(piece: bytes) -> tuple[bytes, bytes, bytes]:
    """Return what a piece of a body is in chunked framing: size line, payload, line end."""
    return b"%x\r\n" % len(piece), piece, b"\r\n"


def _poll_readable(timeout_ms: int | None, *socks: socket.socket) -> set[int]:
    """Return the descriptors that are readable, or at their end, within the time."""
    poller = select.poll()
    for sock in socks:
        poller.register(sock, select.POLLIN)
    return {fd for fd, _ in poller.poll(timeout_ms)}
