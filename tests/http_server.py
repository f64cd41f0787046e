"""Own the plain HTTP server of the tests: a folder with ranges, entity tags and listings, counted.

Never breaks an answer; put a Proxy before it for that.
"""

from __future__ import annotations

import html
import os
import re
import socket
import sys
import threading
from email.utils import formatdate
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote, urlsplit

from wire import PIECE_BYTES, Exchange, TrafficLog


class HttpServer(TrafficLog):
    """Serve a folder over HTTP/1.1 on a free port of 127.0.0.1, one thread a connection.

    Files have an ETag, answer Range, If-Match, If-None-Match and If-Range; folders answer with a page of
    links, which is what fsspec's `find()` follows. Every request is counted, as by Proxy.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder.resolve()
        self._server = _FolderServer(self)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self.endpoint = f"http://{self.address}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), name="http-accept", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Break all connections and join all threads; a second call does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.interrupt()
            self._server.server_close()


class _FolderServer(ThreadingHTTPServer):
    """Knows its open connections, so that closing it does not wait for idle clients."""

    daemon_threads = False  # server_close() joins them

    def __init__(self, owner: HttpServer) -> None:
        self.owner = owner
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _FolderConnection)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def close_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Pass over clients that left; raise the rest out of the connection's thread."""
        if not isinstance(sys.exception(), OSError):
            raise

    def interrupt(self) -> None:
        """Make the blocking calls of all connections' threads fail."""
        with self._lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # gone already
                    pass


class _FolderConnection(BaseHTTPRequestHandler):
    """Answers GET and HEAD from the folder."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _FolderServer

    def do_GET(self) -> None:
        exchange = self.server.owner.record(self.command, self.path, self.headers.get("Range"))
        path = self._locate()
        if path is None:
            self._answer(exchange, HTTPStatus.NOT_FOUND, b"no such file\n")
        elif path.is_dir():
            self._answer(exchange, HTTPStatus.OK, self._list(path), content_type="text/html; charset=utf-8")
        else:
            self._answer_file(exchange, path)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def _locate(self) -> Path | None:
        """Return the file or folder asked for, if it is there and inside the served folder."""
        folder = self.server.owner.folder
        path = (folder / unquote(urlsplit(self.path).path).lstrip("/")).resolve()
        return path if path.is_relative_to(folder) and path.exists() else None

    def _list(self, folder: Path) -> bytes:
        """Return a page with one link per entry, absolute, those of folders with a slash at their end."""
        links = []
        for path in sorted(folder.iterdir()):
            name = path.relative_to(self.server.owner.folder).as_posix() + ("/" if path.is_dir() else "")
            links.append(f'<li><a href="/{quote(name)}">{html.escape(path.name)}</a></li>')
        return "<!DOCTYPE html><ul>{}</ul>".format("\n".join(links)).encode()

    def _answer_file(self, exchange: Exchange, path: Path) -> None:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            size = stat.st_size
            etag = f'"{stat.st_mtime_ns:x}-{size:x}"'
            headers = {
                "ETag": etag,
                "Last-Modified": formatdate(stat.st_mtime, usegmt=True),
                "Accept-Ranges": "bytes",
            }
            if self.headers.get("If-Match", etag) not in (etag, "*"):
                self._answer(exchange, HTTPStatus.PRECONDITION_FAILED, b"", headers)
                return
            if self.headers.get("If-None-Match") in (etag, "*"):
                self._answer(exchange, HTTPStatus.NOT_MODIFIED, b"", headers)
                return
            is_same = self.headers.get("If-Range", etag) == etag
            asked = _parse_range(self.headers.get("Range", ""), size) if is_same else None
            start, end = asked or (0, size)
            if asked is None:
                status = HTTPStatus.OK
            elif start >= end:
                headers["Content-Range"] = f"bytes */{size}"
                self._answer(exchange, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", headers)
                return
            else:
                status = HTTPStatus.PARTIAL_CONTENT
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            self._send_head(exchange, status, end - start, headers)
            if self.command == "HEAD":
                return
            file.seek(start)
            while start < end:
                piece = file.read(min(PIECE_BYTES, end - start))
                if not piece:
                    raise ConnectionError(f"{path.name} shrank under way")
                exchange.send(self.connection, piece)
                start += len(piece)

    def _answer(
        self,
        exchange: Exchange,
        status: HTTPStatus,
        body: bytes,
        headers: dict[str, str] | None = None,
        content_type: str = "text/plain",
    ) -> None:
        self._send_head(exchange, status, len(body), headers or {}, content_type)
        if self.command != "HEAD":
            exchange.send(self.connection, body)

    def _send_head(
        self,
        exchange: Exchange,
        status: HTTPStatus,
        n_bytes: int,
        headers: dict[str, str],
        content_type: str = "application/octet-stream",
    ) -> None:
        exchange.status = status.value
        self.send_response(status)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(n_bytes))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Return what a Range header asks for as [start, end); None for what is answered whole, empty for 416."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match is None or match[0] == "bytes=-":
        return None
    if not match[1]:
        return max(0, size - int(match[2])), size
    start = int(match[1])
    if match[2] and int(match[2]) < start:
        return None
    return start, min(size, int(match[2]) + 1) if match[2] else size
