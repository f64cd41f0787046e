"""Own the hostile server: S3 and a plain web folder from one set of objects, over TCP or TLS, broken by named faults.

Never decides what a fault is: those are in hostile_faults.py. Nothing here depends on a real S3; signatures are ignored.

One server speaks both: a query with `list-type=2` is a ListObjectsV2, a path that ends with a slash is a page of links,
any other path is an object with HEAD, GET, Range, If-Match, ETag, Last-Modified and Accept-Ranges.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import html
import re
import socket
import ssl
import struct
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

import trustme
from wire import Exchange, Head, TrafficLog

ALWAYS = 1 << 30
CONNECT = "CONNECT"  # stands for a request where a rule is about a connection, before its first byte
JOIN_S = 10.0
MAX_REQUEST_BYTES = 64 << 10
PAGE_KEYS = 1000
REASONS = {
    200: "OK",
    206: "Partial Content",
    404: "Not Found",
    412: "Precondition Failed",
    416: "Range Not Satisfiable",
}


@dataclass(slots=True)
class Answer:
    """What an honest server says; a fault changes it, or says something else.

    Attributes:
        head: Status line and headers.
        body: What follows; for HEAD, what would follow a GET.
        whole: The object that `body` is `[start, start + len(body))` of.
        n_before: Requests that got this fault before.
    """

    method: str
    head: Head
    body: bytes = b""
    whole: bytes = b""
    start: int = 0
    n_before: int = 0

    @property
    def stop(self) -> int:
        return self.start + len(self.body)

    def give(self, start: int, stop: int) -> None:
        """Become the honest 206 for `[start, stop)`."""
        self.start, self.body = start, self.whole[start:stop]
        self.head.start = "HTTP/1.1 206 Partial Content"
        self.head.set("Content-Range", f"bytes {start}-{stop - 1}/{len(self.whole)}")
        self.head.set("Content-Length", str(len(self.body)))

    def replace_body(self, body: bytes) -> None:
        """Say something else, of the right length."""
        self.body = body
        self.head.set("Content-Length", str(len(body)))


class Peer:
    """The client's end of one connection, as a fault sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, trap: str) -> None:
        self.reader = reader
        self.writer = writer
        self.trap = trap  # another server's endpoint, to be redirected to
        self.exchange: Exchange | None = None
        writer.transport.set_write_buffer_limits(
            high=1, low=0
        )  # drained is sent; asyncio's TLS never resumes from high=0

    async def send(self, raw: bytes) -> None:
        """Send bytes that belong to no body."""
        self.writer.write(raw)
        await self.writer.drain()

    async def send_body(self, piece: bytes) -> None:
        """Send body bytes and count them."""
        assert self.exchange is not None
        if self.exchange.method != "HEAD":
            self.exchange.body_bytes += len(piece)
            await self.send(piece)

    async def answer(self, answer: Answer) -> None:
        """Send an answer as it is."""
        await self.send_head(answer)
        await self.send_body(answer.body)

    async def send_head(self, answer: Answer) -> None:
        """Send a head and enter its status in the log."""
        if self.exchange is not None:
            self.exchange.status = answer.head.status
        await self.send(answer.head.encode())

    async def wait_gone(self) -> None:
        """Send nothing until the client leaves or the server closes."""
        while await self.reader.read(1 << 16):
            pass

    async def close(self) -> None:
        """End the connection in order: FIN, and close_notify under TLS."""
        self.writer.close()
        with suppress(OSError, TimeoutError):
            await asyncio.wait_for(self.writer.wait_closed(), 1)

    def cut(self, *, by_reset: bool = False) -> None:
        """End the connection without close_notify, by FIN or by RST."""
        if by_reset:
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Fault = Callable[[Answer, Peer], Awaitable[None]]
"""Answers one request in the honest server's place; the connection goes on after it unless it was closed."""


@dataclass(slots=True)
class Rule:
    """Which requests get a fault: the next `times` whose line matches, and whose range holds byte `covers`."""

    pattern: re.Pattern[str]
    fault: Fault
    times: int
    covers: int | None
    taken: list[str] = field(default_factory=list)

    def take(self, line: str, asked: str | None) -> bool:
        """Whether this request gets the fault; counts it then."""
        if len(self.taken) >= self.times or not self.pattern.search(line):
            return False
        if self.covers is not None:
            start, stop = parse_range(asked, 1 << 62) or (0, 1 << 62)
            if not start <= self.covers < stop:
                return False
        self.taken.append(line)
        return True


class HostileServer(TrafficLog):
    """A counting server on a free port of this machine, one loop on one thread.

    Args:
        objects: Paths without a leading slash ("bucket/model/config.json") and their bytes.
        certificates: Contexts by name; "good" makes it speak TLS, a rule for CONNECT may name another.
        trap: The endpoint that faults redirect to.
        host: The loopback address it listens at.

    `close()` ends the thread, and raises what went wrong in a fault; a context manager does it, too.
    """

    def __init__(
        self,
        objects: Mapping[str, bytes],
        certificates: Mapping[str, ssl.SSLContext] | None = None,
        trap: str = "",
        host: str = "127.0.0.1",
    ) -> None:
        super().__init__()
        self.objects = dict(objects)
        self.heads: list[Head] = []  # of all requests, as they came
        self._certificates = certificates or {}
        self._trap = trap
        self._rules: list[Rule] = []
        self._certificate = "good"
        self._rules_lock = threading.Lock()
        self._crashes: list[Exception] = []
        self._connections: set[asyncio.Task[None]] = set()
        self.n_accepted = 0
        self._host = host
        self._listener = _listen(host, 0)
        self.port = int(self._listener.getsockname()[1])
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self.endpoint = f"{'https' if self._certificates else 'http'}://{self.address}"
        self._loop = asyncio.new_event_loop()
        self._accepting: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="hostile-server", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_open(self) -> int:
        """Connections that neither side has left."""
        return len(self._connections)

    def script(self, pattern: str, fault: Fault, times: int = 1, covers: int | None = None) -> Rule:
        """Give a fault to the next `times` requests whose "METHOD target range" matches; the oldest rule wins."""
        rule = Rule(re.compile(pattern), fault, times, covers)
        with self._rules_lock:
            self._rules.append(rule)
        return rule

    def show(self, certificate: str) -> None:
        """Show another certificate from now on."""
        self._certificate = certificate

    def reset(self) -> None:
        """Forget all requests and rules, and be honest."""
        super().reset()
        with self._rules_lock:
            self._rules.clear()
            self.heads.clear()
        self._certificate = "good"

    def refuse(self) -> None:
        """Stop listening: connections are refused until `accept()`."""
        self._call(self._stop_accepting())

    def accept(self) -> None:
        """Listen again, on the same port."""
        self._listener = _listen(self._host, self.port)
        self._call(self._start_accepting())

    def close(self) -> None:
        """Break all connections and join the thread; a second call does nothing.

        Raises:
            ExceptionGroup: faults or the server itself failed.
        """
        if self._thread.is_alive():
            self._call(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(JOIN_S)
            self._loop.close()
        if self._crashes:
            crashes, self._crashes = self._crashes, []
            raise ExceptionGroup("the hostile server failed", crashes)

    # -- on the loop

    def _run(self) -> None:
        self._loop.create_task(self._start_accepting())
        self._loop.run_forever()

    def _call(self, work: Awaitable[None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(JOIN_S)  # type: ignore[arg-type]

    async def _start_accepting(self) -> None:
        self._accepting = asyncio.create_task(self._accept(self._listener))

    async def _stop_accepting(self) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        self._listener.close()

    async def _end(self) -> None:
        await self._stop_accepting()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.sleep(0.01)  # aborted transports close in the next turns of the loop

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            sock, _ = await self._loop.sock_accept(listener)
            self.n_accepted += 1
            task = asyncio.create_task(self._serve(sock))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _serve(self, sock: socket.socket) -> None:
        """Serve one connection until either side leaves or a fault ends it."""
        fault = self._take(CONNECT, None)
        tls = None if fault else self._certificates.get(self._certificate)
        reader = asyncio.StreamReader(MAX_REQUEST_BYTES, self._loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=self._loop)
        try:
            transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, sock, ssl=tls)
        except (OSError, asyncio.IncompleteReadError):  # no TLS came of it
            sock.close()
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
        peer = Peer(reader, writer, self._trap)
        try:
            if fault:
                await fault(Answer("GET", Head("HTTP/1.1 200 OK", [])), peer)
            while not writer.is_closing() and not fault:
                await self._serve_one(peer)
            await peer.close()
        except (OSError, EOFError):  # the client left; an IncompleteReadError is an EOFError
            pass
        except Exception as exc:  # shown by close()
            self._crashes.append(exc)
        finally:
            transport.abort()

    async def _serve_one(self, peer: Peer) -> None:
        text = await peer.reader.readuntil(b"\r\n\r\n")
        request = Head.parse(text[:-4])
        method, target, _ = request.start.split(" ", 2)
        asked = request.get("Range")
        with self._rules_lock:
            self.heads.append(request)
        peer.exchange = self.record(method, target, asked)
        answer = self._answer(method, target, request)
        fault = self._take(f"{method} {target} {asked or ''}", answer)
        await (fault(answer, peer) if fault else peer.answer(answer))
        if request.wants_close:
            await peer.close()

    def _take(self, line: str, answer: Answer | None) -> Fault | None:
        """Return the fault for a request, if a rule has one."""
        asked = line.rpartition(" ")[2]
        with self._rules_lock:
            for rule in self._rules:
                if rule.take(line, asked):
                    if answer is not None:
                        answer.n_before = len(rule.taken) - 1
                    return rule.fault
        return None

    # -- honest answers

    def _answer(self, method: str, target: str, request: Head) -> Answer:
        url = urlsplit(target)
        path, query = unquote(url.path).lstrip("/"), parse_qs(url.query)
        if "list-type" in query:
            return self._list(method, path.rstrip("/"), {name: values[0] for name, values in query.items()})
        if path.endswith("/"):
            return self._page(method, path)
        if path not in self.objects:
            return _plain(method, 404, _error("NoSuchKey", path), "application/xml")
        return _object(method, self.objects[path], request)

    def _list(self, method: str, bucket: str, query: Mapping[str, str]) -> Answer:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        keys = sorted(path.removeprefix(f"{bucket}/") for path in self.objects if path.startswith(f"{bucket}/"))
        keys = [key for key in keys if key.startswith(prefix) and key > after]
        page, rest = keys[:PAGE_KEYS], keys[PAGE_KEYS:]
        spell = quote if query.get("encoding-type") == "url" else escape
        entries = "".join(
            f"<Contents><Key>{spell(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{etag_of(self.objects[f'{bucket}/{key}'])[1:-1]}&quot;</ETag>"
            f"<Size>{len(self.objects[f'{bucket}/{key}'])}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key in page
        )
        encoding = "<EncodingType>url</EncodingType>" if query.get("encoding-type") == "url" else ""
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if rest else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{spell(prefix)}</Prefix><KeyCount>{len(page)}</KeyCount>"
            f"<MaxKeys>{PAGE_KEYS}</MaxKeys>{encoding}<IsTruncated>{str(bool(rest)).lower()}</IsTruncated>{token}{entries}"
            "</ListBucketResult>"
        )
        return _plain(method, 200, body.encode(), "application/xml")

    def _page(self, method: str, folder: str) -> Answer:
        """Return a page with one link per entry, absolute, those of folders with a slash at their end."""
        below = {path.removeprefix(folder) for path in self.objects if path.startswith(folder)}
        names = sorted({name.partition("/")[0] + ("/" if "/" in name else "") for name in below})
        if not names:
            return _plain(method, 404, b"no such folder\n", "text/plain")
        links = (f'<li><a href="/{quote(folder + name)}">{html.escape(name)}</a></li>' for name in names)
        return _plain(method, 200, f"<!DOCTYPE html><ul>{''.join(links)}</ul>".encode(), "text/html; charset=utf-8")


def objects_of(folder: Path, below: str) -> dict[str, bytes]:
    """Read a folder's files as objects below "bucket/prefix"."""
    return {
        f"{below}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def etag_of(content: bytes) -> str:
    """Return an object's ETag, quotes included."""
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return what a Range header asks for as [start, stop); None where it is none."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header or "")
    return (int(match[1]), min(size, int(match[2]) + 1) if match[2] else size) if match else None


def make_certificates(folder: Path) -> tuple[str, dict[str, ssl.SSLContext]]:
    """Make a throw-away CA; return the path of its certificate and servers' contexts by what is wrong with them."""
    authority, stranger = trustme.CA(), trustme.CA()
    path = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    names = ("127.0.0.1", "localhost")
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    leaves = {
        "good": authority.issue_cert(*names),
        "unknown-ca": stranger.issue_cert(*names),
        "wrong-name": authority.issue_cert("weights.example"),
        "expired": authority.issue_cert(*names, not_before=past, not_after=past + datetime.timedelta(days=1)),
    }
    contexts = {}
    for name, leaf in leaves.items():
        contexts[name] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        leaf.configure_cert(contexts[name])
    return str(path), contexts


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=256)
    listener.setblocking(False)
    return listener


def _plain(method: str, status: int, body: bytes, content_type: str) -> Answer:
    head = Head(f"HTTP/1.1 {status} {REASONS[status]}", [("Content-Type", content_type)])
    head.set("Content-Length", str(len(body)))
    return Answer(method, head, body, body)


def _error(code: str, path: str) -> bytes:
    message = f"<Code>{code}</Code><Message>hostile server: {escape(path)}</Message>"
    return f'<?xml version="1.0" encoding="UTF-8"?><Error>{message}</Error>'.encode()


def _object(method: str, content: bytes, request: Head) -> Answer:
    """Answer a GET or HEAD of an object as S3 and web servers do."""
    answer = _plain(method, 200, content, "application/octet-stream")
    answer.head.set("ETag", etag_of(content))
    answer.head.set("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
    answer.head.set("Accept-Ranges", "bytes")
    if (request.get("If-Match") or "*") not in ("*", etag_of(content)):
        return _plain(method, 412, _error("PreconditionFailed", ""), "application/xml")
    asked = parse_range(request.get("Range"), len(content))
    if asked is None:
        return answer
    if asked[0] >= asked[1]:
        refusal = _plain(method, 416, _error("InvalidRange", ""), "application/xml")
        refusal.head.set("Content-Range", f"bytes */{len(content)}")
        return refusal
    answer.give(*asked)
    return answer
