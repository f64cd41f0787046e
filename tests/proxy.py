"""Own the fault proxy: HTTP/1.1 between a client and a real server, counted, and broken by script.

Never answers in the server's place but for the status words, and never touches the Host header, so a SigV4
signature made for the proxy's address stays valid at a server that checks the Host it receives.

Words of a script, one a request ("half way" is the middle of the body; where there is no body, before the
head, for clients take half a head for a whole one):

    ok        pass on unchanged
    503 …     answer with this status and an S3 error (see STATUS_WORDS); 503:7 adds "Retry-After: 7"
    flip      invert one bit in the middle of the body
    short     promise the whole Content-Length, close half way
    long      promise and send EXTRA_BYTES more than the server did
    reset     TCP reset half way
    drop      TCP reset before any byte; the server never sees the request
    stall     stop half way, until the client leaves or the proxy closes
    hold      stop half way, until `release()`; then send the rest
    whole     ask the server without the Range: 200 and the whole object
    shift     ask the server for the range one byte later; the Content-Range says so
    blind     pass on without If-Match and If-None-Match, as a store that knows no conditions
    picky     501 to a request that has one of them, as another such store; else ok
    slow:64   at most 64 KiB/s of body
"""

from __future__ import annotations

import os
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Self

from wire import LAST_CHUNK, Exchange, Framing, Head, TrafficLog, Wire, chunk

STATUS_WORDS = {
    "403": ("Forbidden", "AccessDenied"),
    "404": ("Not Found", "NoSuchKey"),
    "409": ("Conflict", "ConditionalRequestConflict"),
    "412": ("Precondition Failed", "PreconditionFailed"),
    "429": ("Too Many Requests", "TooManyRequests"),
    "500": ("Internal Server Error", "InternalError"),
    "501": ("Not Implemented", "NotImplemented"),
    "503": ("Service Unavailable", "SlowDown"),
}
BODY_WORDS = frozenset({"flip", "short", "long", "reset", "stall", "hold"})
PLAIN_WORDS = BODY_WORDS | {"ok", "drop", "whole", "shift", "blind", "picky"}
CONDITIONS = ("If-Match", "If-None-Match")
EXTRA_BYTES = 1024
JOIN_S = 10.0


class Proxy(TrafficLog):
    """A counting, faulty HTTP/1.1 proxy on a free port of 127.0.0.1, one thread a connection.

    Args:
        upstream: "host:port" of the real server.
        credentials: (key, secret) at the server. Needed by `whole` and `shift` alone, and only for clients
            that sign the Range header (botocore does; presigned URLs do not): such requests are signed anew.

    `close()` ends all threads; a context manager does it, too.
    """

    def __init__(self, upstream: str, credentials: tuple[str, str] | None = None) -> None:
        super().__init__()
        host, _, port = upstream.rpartition(":")
        self.upstream = (host, int(port))
        self.credentials = credentials
        self.closing = threading.Event()
        # _changed guards the four names below it; it is notified when an exchange stops half way.
        self._changed = threading.Condition()
        self._scripts: list[tuple[re.Pattern[str], list[str]]] = []
        self._stopped: dict[int, str] = {}  # eventfd that wakes the exchange -> its word
        self._connections: dict[_Connection, threading.Thread] = {}
        self._n_accepted = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.endpoint = f"http://{self.address}"
        self._acceptor = threading.Thread(target=self._accept, name="proxy-accept", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def script(self, pattern: str, words: str) -> None:
        """Apply words, in order, to the next requests whose "METHOD path" matches the regex; then ok.

        A request takes its word from the oldest matching script that has words left.

        Raises:
            ValueError: there is no such word.
        """
        for word in words.split():
            _check_word(word)
        with self._changed:
            self._scripts.append((re.compile(pattern), words.split()))

    def reset(self) -> None:
        """Forget all requests and scripts; what is stopped stays stopped."""
        super().reset()
        with self._changed:
            self._scripts.clear()

    def release(self) -> None:
        """Let every exchange that `hold` has stopped go on."""
        with self._changed:
            for wake_fd, word in self._stopped.items():
                if word == "hold":
                    os.eventfd_write(wake_fd, 1)

    def wait_stopped(self, n: int = 1, timeout_s: float = 10.0) -> None:
        """Wait until at least n exchanges are stopped half way by `hold` or `stall`.

        Raises:
            TimeoutError: fewer were stopped when the time was over.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._stopped) >= n, timeout_s):
                raise TimeoutError(f"{len(self._stopped)} exchanges stopped after {timeout_s} s, wanted {n}")

    def close(self) -> None:
        """Break all connections and join all threads; a second call does nothing.

        Raises:
            RuntimeError: a thread did not end in JOIN_S seconds.
        """
        if self.closing.is_set():
            return
        self.closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(JOIN_S)
        self._listener.close()
        with self._changed:
            for wake_fd in self._stopped:
                os.eventfd_write(wake_fd, 1)
            connections = dict(self._connections)
        for connection in connections:
            connection.interrupt()
        for thread in connections.values():
            thread.join(JOIN_S)
        alive = [thread.name for thread in (self._acceptor, *connections.values()) if thread.is_alive()]
        if alive:
            raise RuntimeError(f"proxy {self.address}: threads still run after {JOIN_S} s: {alive}")

    def next_word(self, line: str) -> str:
        """Take the word for a request, by its "METHOD path"."""
        with self._changed:
            for pattern, words in self._scripts:
                if words and pattern.search(line):
                    return words.pop(0)
        return "ok"

    def stop_half_way(self, client: socket.socket, word: str) -> bool:
        """Block the serving thread; True when released, False when the client left or the proxy closes."""
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC)
        poller = select.poll()
        poller.register(wake_fd, select.POLLIN)
        poller.register(client, select.POLLRDHUP)
        try:
            with self._changed:
                self._stopped[wake_fd] = word
                self._changed.notify_all()
                if self.closing.is_set():  # close() has woken the others already
                    return False
            woken = {fd for fd, _ in poller.poll()}
            return wake_fd in woken and not self.closing.is_set()
        finally:
            with self._changed:
                del self._stopped[wake_fd]
            os.close(wake_fd)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # the listener was shut down
                return
            connection = _Connection(self, Wire(client))
            with self._changed:
                self._n_accepted += 1
                name = f"proxy-connection-{self._n_accepted}"
                thread = threading.Thread(target=self._serve, args=(connection,), name=name, daemon=True)
                self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: _Connection) -> None:
        try:
            connection.serve()
        finally:
            with self._changed:
                del self._connections[connection]


class _Broken(Exception):
    """A fault ends this connection, by RST or by FIN."""

    def __init__(self, *, by_reset: bool) -> None:
        super().__init__()
        self.by_reset = by_reset


class _Connection:
    """One client's connection and the upstream connection that serves it."""

    def __init__(self, proxy: Proxy, client: Wire) -> None:
        self._proxy = proxy
        self._client = client
        self._upstream: Wire | None = None

    def interrupt(self) -> None:
        """Make the serving thread's blocking calls fail; callable from any thread."""
        for wire in (self._client, self._upstream):
            if wire is not None:
                wire.shutdown()

    def serve(self) -> None:
        """Serve requests until either side leaves or a fault ends it."""
        try:
            while not self._proxy.closing.is_set() and self._serve_one():
                pass
        except _Broken as fault:
            if fault.by_reset:
                self._client.reset_on_close()
        except OSError:  # one side left
            pass
        finally:
            self._client.sock.close()
            self._close_upstream()

    def _serve_one(self) -> bool:
        """Serve one request; False when the connection ends with it."""
        request = self._client.read_head()
        if request is None:
            return False
        method, path, _ = request.start.split(" ", 2)
        exchange = self._proxy.record(method, path, request.get("Range"))
        word = self._proxy.next_word(f"{method} {path}")
        if word == "drop":
            raise _Broken(by_reset=True)
        if word == "picky" and any(map(request.get, CONDITIONS)):
            word = "501"
        if word.partition(":")[0] in STATUS_WORDS:
            return self._answer_status(request, exchange, word)
        if word in ("whole", "shift"):
            self._change_range(request, word)
        if word == "blind":
            for name in CONDITIONS:
                request.remove(name)
        upstream = self._connect_upstream()
        answer = self._forward(request, upstream, exchange)
        framing = answer.response_framing(method)
        if framing == "until-close":
            answer.set("Connection", "close")
        self._send_answer(answer, framing, upstream.read_body(framing), exchange, word)
        if answer.wants_close:
            self._close_upstream()
        return not (request.wants_close or answer.wants_close)

    def _answer_status(self, request: Head, exchange: Exchange, word: str) -> bool:
        """Answer with an S3 error in the server's place; False when the connection ends with it."""
        status, _, retry_after = word.partition(":")
        reason, code = STATUS_WORDS[status]
        message = f"injected by the test proxy for {exchange.path.partition('?')[0]}"
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()
        answer = Head(f"HTTP/1.1 {status} {reason}", [("Content-Type", "application/xml")])
        answer.set("Content-Length", str(len(body)))
        if retry_after:
            answer.set("Retry-After", retry_after)
        if request.get("Expect"):  # whether the client sends its body now is unknown
            answer.set("Connection", "close")
        else:
            for _ in self._client.read_body(request.request_framing()):
                pass
        exchange.status = int(status)
        self._client.sock.sendall(answer.encode())
        if exchange.method != "HEAD":
            exchange.send(self._client.sock, body)
        return not (request.wants_close or answer.wants_close)

    def _change_range(self, request: Head, word: str) -> None:
        """Drop or move a request's Range, and sign the request anew where its Range was signed."""
        asked = request.get("Range")
        if asked is None:
            return
        request.remove("Range")
        if word == "shift":
            request.set("Range", re.sub(r"\d+", lambda number: str(int(number[0]) + 1), asked))
        if re.search(r"SignedHeaders=[^,]*\brange\b", request.get("Authorization") or ""):
            if self._proxy.credentials is None:
                raise RuntimeError(f"{word}: the client signs its Range; give Proxy the credentials")
            _sign_anew(request, *self._proxy.credentials)

    def _forward(self, request: Head, upstream: Wire, exchange: Exchange) -> Head:
        """Send a request upstream, body included, and read the head of its final answer."""
        upstream.sock.sendall(request.encode())
        if request.get("Expect") and not self._client.speaks_before(upstream):
            interim = upstream.read_answer()
            if interim.status != 100:  # refused: whether the client sends its body now is unknown
                interim.set("Connection", "close")
                return interim
            self._client.sock.sendall(interim.encode())
        framing = request.request_framing()
        try:
            for piece in self._client.read_body(framing):
                exchange.uploaded_bytes += len(piece)
                for part in chunk(piece) if framing == "chunked" else (piece,):
                    upstream.sock.sendall(part)
            if framing == "chunked":
                upstream.sock.sendall(LAST_CHUNK)
        except BrokenPipeError:  # the server refused early: its answer waits
            pass
        answer = upstream.read_answer()
        while answer.status == 100:
            answer = upstream.read_answer()
        return answer

    def _send_answer(
        self, answer: Head, framing: Framing, pieces: Iterator[bytes], exchange: Exchange, word: str
    ) -> None:
        """Send the server's answer to the client, changed as the word says."""
        client = self._client.sock
        exchange.status = answer.status
        if word in BODY_WORDS:
            body = pieces
            if not isinstance(framing, int):  # its middle must be known
                whole = b"".join(pieces)
                body, framing = iter([whole]), len(whole)
                answer.remove("Transfer-Encoding")
                answer.set("Content-Length", str(framing))
            self._send_broken(answer, framing, body, exchange, word)
            return
        client.sendall(answer.encode())
        if word.startswith("slow:"):
            pieces = self._paced(pieces, int(word.partition(":")[2]) * 1024)
        for piece in pieces:
            if framing == "chunked":
                size_line, _, line_end = chunk(piece)
                client.sendall(size_line)
                exchange.send(client, piece)
                client.sendall(line_end)
            else:
                exchange.send(client, piece)
        if framing == "chunked":
            client.sendall(LAST_CHUNK)

    def _send_broken(self, answer: Head, n_bytes: int, pieces: Iterator[bytes], exchange: Exchange, word: str) -> None:
        """Send an answer whose body has n_bytes with a fault in its middle, or behind its end for `long`."""
        client = self._client.sock
        if not n_bytes:
            self._break(word)
            client.sendall(answer.encode())
            return
        if word == "long":
            answer.set("Content-Length", str(n_bytes + EXTRA_BYTES))
        client.sendall(answer.encode())
        n_sent = 0
        for piece in pieces:
            middle = n_bytes // 2 - n_sent
            n_sent += len(piece)
            if not 0 <= middle < len(piece):
                exchange.send(client, piece)
            elif word == "flip":
                flipped = bytearray(piece)
                flipped[middle] ^= 1
                exchange.send(client, bytes(flipped))
            else:
                exchange.send(client, piece[:middle])
                self._break(word)
                exchange.send(client, piece[middle:])
        if word == "long":
            exchange.send(client, bytes(EXTRA_BYTES))

    def _break(self, word: str) -> None:
        """Do what a word does half way; return only where the answer goes on."""
        if word == "reset":
            self._client.wait_delivered()
            raise _Broken(by_reset=True)
        if word == "short":
            raise _Broken(by_reset=False)
        if word in ("stall", "hold") and not self._proxy.stop_half_way(self._client.sock, word):
            raise _Broken(by_reset=False)

    def _paced(self, pieces: Iterator[bytes], bytes_per_s: int) -> Iterator[bytes]:
        """Cut pieces to a twentieth of a second and hand them out at the rate."""
        step = max(1, bytes_per_s // 20)
        n_sent, start_s = 0, time.monotonic()
        for piece in pieces:
            for offset in range(0, len(piece), step):
                part = piece[offset : offset + step]
                n_sent += len(part)
                wait_s = start_s + n_sent / bytes_per_s - time.monotonic()
                if wait_s > 0 and self._proxy.closing.wait(wait_s):
                    raise _Broken(by_reset=False)
                yield part

    def _connect_upstream(self) -> Wire:
        """Return the upstream connection, a new one where the server has closed the old."""
        if self._upstream is not None and self._upstream.is_readable():
            self._close_upstream()
        if self._upstream is None:
            self._upstream = Wire(socket.create_connection(self._proxy.upstream))
            if self._proxy.closing.is_set():  # interrupt() may have come before it could see this socket
                raise ConnectionError("the proxy is closing")
        return self._upstream

    def _close_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.sock.close()
            self._upstream = None


def _check_word(word: str) -> None:
    """Raise ValueError for a word that no script may hold."""
    name, colon, number = word.partition(":")
    if colon:
        is_known = (name == "slow" or name in STATUS_WORDS) and number.isdecimal() and int(number) > 0
    else:
        is_known = name in PLAIN_WORDS or name in STATUS_WORDS
    if not is_known:
        known = ", ".join(sorted({*PLAIN_WORDS, *STATUS_WORDS, "slow:KIB_PER_S", "503:RETRY_AFTER_S"}))
        raise ValueError(f"unknown fault word {word!r}; known: {known}")


def _sign_anew(request: Head, key: str, secret: str) -> None:
    """Replace the SigV4 signature of a request without a body, after its headers were changed."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    method, path, _ = request.start.split(" ", 2)
    region = re.search(r"Credential=[^/]+/\d+/([^/]+)/", request.get("Authorization") or "")
    if region is None:
        raise RuntimeError("a signature without a credential scope")
    for name in ("Authorization", "X-Amz-Date", "X-Amz-Content-SHA256"):
        request.remove(name)
    signed = AWSRequest(method, f"http://{request.get('Host')}{path}", headers=dict(request.headers))
    S3SigV4Auth(Credentials(key, secret), "s3", region[1]).add_auth(signed)
    request.headers = list(signed.headers.items())
