"""Own a forward proxy: what HTTP_PROXY names, for plain requests and for tunnels, with and without a password.

Never breaks an answer, but for refusing all: put a Proxy or a hostile server behind it for that.
"""

from __future__ import annotations

import base64
import socket
import threading
from contextlib import suppress
from typing import Self
from urllib.parse import quote, urlsplit

from wire import PIECE_BYTES, Head, Wire

REASONS = {407: "Proxy Authentication Required", 502: "Bad Gateway"}


class ForwardProxy:
    """A proxy on a free port of 127.0.0.1, one thread a connection and one more for each tunnel.

    Args:
        user, password: What it wants to hear; nothing unless a user is given.
        refuses: The status that it gives to all, once they said who they are.

    `close()` ends all threads; a context manager does it, too.
    """

    def __init__(self, user: str = "", password: str = "", refuses: int = 0) -> None:
        self.user = user
        self.password = password
        self.refuses = refuses
        self.asked: list[str] = []  # method and target of each request; a list's append needs no lock
        self.logins: list[str] = []  # what each said of itself
        self._lock = threading.Lock()  # guards the two below
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """What a setting names it by, password included."""
        login = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@" if self.user else ""
        return f"http://{login}{self.address}"

    def close(self) -> None:
        """Break all connections and join all threads; a second call does nothing."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        while self._threads:
            self._threads.pop().join()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="forward-proxy", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, sock)

    def _serve(self, sock: socket.socket) -> None:
        """Serve one connection until either side leaves."""
        upstream: dict[str, Wire] = {}
        with self._lock:
            self._open.add(sock)
        try:
            client = Wire(sock)
            while (head := client.read_head()) is not None and self._serve_one(client, head, upstream):
                pass
        except OSError:  # somebody left
            pass
        finally:
            with self._lock:
                self._open -= {sock, *(wire.sock for wire in upstream.values())}
            for each in (sock, *(wire.sock for wire in upstream.values())):
                each.close()

    def _serve_one(self, client: Wire, head: Head, upstream: dict[str, Wire]) -> bool:
        """Answer one request; whether another may follow."""
        method, target, _ = head.start.split(" ", 2)
        self.asked.append(f"{method} {target}")
        said = head.get("Proxy-Authorization") or ""
        self.logins.append(said)
        login = "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        if self.user and said != login:
            return _refuse(client, 407)
        if self.refuses:
            return _refuse(client, self.refuses)
        url = urlsplit(f"//{target}" if method == "CONNECT" else target)
        assert url.hostname, f"no absolute form: {target}"
        host = url.netloc
        if host not in upstream:
            sock = socket.create_connection((url.hostname, url.port or 80), timeout=10)
            sock.settimeout(None)
            upstream[host] = Wire(sock)
            with self._lock:
                self._open.add(sock)
        server = upstream[host]
        if method == "CONNECT":
            client.sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            self._start(_pump, server.sock, client.sock)
            _pump(client.sock, server.sock)
            return False
        head.remove("Proxy-Authorization")
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        head.start = f"{method} {path} HTTP/1.1"
        server.sock.sendall(head.encode())
        answer = server.read_answer()
        client.sock.sendall(answer.encode())
        framing = answer.response_framing(method)
        assert isinstance(framing, int), "only bodies with a length are passed on"
        for piece in server.read_body(framing):
            client.sock.sendall(piece)
        return not answer.wants_close


def _refuse(client: Wire, status: int) -> bool:
    head = Head(f"HTTP/1.1 {status} {REASONS[status]}", [("Content-Length", "0")])
    if status == 407:
        head.set("Proxy-Authenticate", 'Basic realm="tests"')
    client.sock.sendall(head.encode())
    return True


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass bytes on until one side ends; then end both."""
    with suppress(OSError):
        while piece := source.recv(PIECE_BYTES):
            sink.sendall(piece)
    for sock in (source, sink):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
