"""Own a stand-in for the Hugging Face Hub: it knows where a file lies, and sends its reader to the S3 server.

Never carries a weight byte: like the Hub, it answers `resolve` with a redirect to a signed URL of the store.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubFile(NamedTuple):
    """One file of a repository: its size, its entity tag, and where its bytes are."""

    nbytes: int
    etag: str
    url: str


class Hub:
    """Serve `/{repository}/resolve/{revision}/{file}` on a free port of 127.0.0.1.

    Args:
        files: By "{repository}/{file}".
    """

    def __init__(self, files: Mapping[str, HubFile]) -> None:
        self.files = dict(files)
        self._server = _Server(self.files)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="hub", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # idle keep-alive connections must not delay the end

    def __init__(self, files: Mapping[str, HubFile]) -> None:
        self.files = files
        super().__init__(("127.0.0.1", 0), _Connection)


class _Connection(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        repository, _, rest = self.path.lstrip("/").partition("/resolve/")
        file = self.server.files.get(f"{repository}/{rest.partition('/')[2]}")
        if file is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_response(302)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Size", str(file.nbytes))
            self.send_header("X-Linked-Etag", f'"{file.etag}"')
            self.send_header("Location", file.url)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass
