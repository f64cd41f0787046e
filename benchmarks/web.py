"""Own the plain byte sources: nginx over a folder, by HTTP or TLS 1.3, on loopback or behind a link.

Never signs, lists buckets or fails on purpose: it is the server that costs a client the least.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import links
import measuring
from links import Link, LinkShape

LOOPBACK = "127.0.0.1"
READY_TIMEOUT_S = 10.0
END_TIMEOUT_S = 10.0
CERTIFICATE = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
CERTIFICATE_DAYS = "2"
LINKED_PORT = 8000  # in a namespace of its own every port is free

CONFIGURATION = """
daemon off;
worker_processes auto;
pid {folder}/pid;
error_log {folder}/error.log;
{user}
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    tcp_nodelay on;
    etag on;
    keepalive_timeout 1h;
    keepalive_requests 1000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen {address}:{port}{tls};
        root {root};
        autoindex on;
    }}
}}
"""
TLS_LINES = """ ssl;
        ssl_protocols TLSv1.3;
        ssl_certificate {folder}/certificate.pem;
        ssl_certificate_key {folder}/key.pem"""


@dataclass(frozen=True, slots=True)
class WebShape:
    """How a folder is served: by TLS or not, behind a link or, without one, on loopback."""

    is_tls: bool = False
    link: LinkShape | None = None


SOURCES: Mapping[str, WebShape] = {
    "nginx": WebShape(),
    "nginx-tls": WebShape(is_tls=True),
    "nginx-20ms-1000mbit": WebShape(link=LinkShape(20, 1000)),
    "nginx-80ms-200mbit": WebShape(link=LinkShape(80, 200)),
}
"""By the name a case's source has."""


def obstacle() -> str:
    """Say why nginx cannot be had on this machine; empty where it can."""
    return "" if _nginx() else "no nginx here (apt-get install nginx-light)"


def tls_obstacle() -> str:
    """Say why nginx cannot serve TLS on this machine; empty where it can."""
    return obstacle() or ("" if shutil.which("openssl") else "no openssl here (apt-get install openssl)")


def link_obstacle() -> str:
    """Say why nginx cannot be put behind a link on this machine; empty where it can."""
    return obstacle() or links.obstacle()


class Web:
    """An nginx of its own, while the `with` block runs.

    Args:
        root: The folder it serves, with pages of links.
        folder: For its configuration, certificate, logs and the wire's program.

    Attributes:
        address, port, endpoint: Where it listens; set once it runs.
        link: What it lies behind, or None.
        authority: The certificate that its clients must trust; empty without TLS.
    """

    def __init__(self, shape: WebShape, root: Path, folder: Path) -> None:
        self._shape = shape
        self._root = root
        self._folder = folder
        self._held = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self.link: Link | None = None
        self.authority = str(folder / "authority.pem") if shape.is_tls else ""

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True)
        try:
            if self._shape.link is not None:
                self.link = self._held.enter_context(Link(self._shape.link, self._folder))
            self.address = self.link.address if self.link else LOOPBACK
            self.port = LINKED_PORT if self.link else _free_port()
            self.endpoint = f"{'https' if self._shape.is_tls else 'http'}://{self.address}:{self.port}"
            if self._shape.is_tls:
                self._make_certificates()
            self._held.callback(self._stop)
            self.start()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def cpu_s(self) -> float:
        """Return the CPU seconds that its processes have used."""
        assert self._process is not None
        pid = self._process.pid
        workers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return sum(measuring.cpu_s(int(each)) for each in (pid, *workers))

    def describe(self) -> dict[str, Any]:
        """Say which nginx it is, and how long dialling it takes: a round trip of the link."""
        told = subprocess.run([str(_nginx()), "-v"], capture_output=True, text=True, check=True)
        began = time.perf_counter()
        _dial(self.address, self.port)
        return {
            "server": told.stderr.strip().rpartition(" ")[2],
            "dial_ms": round(1e3 * (time.perf_counter() - began), 2),
        }

    def kill(self) -> None:
        """End it at once, until `start`."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def start(self) -> None:
        """Start it, and wait until it answers; does nothing where it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        text = CONFIGURATION.format(
            folder=self._folder,
            root=self._root,
            address=self.address,
            port=self.port,
            tls=TLS_LINES.format(folder=self._folder) if self._shape.is_tls else "",
            user="user root;" if os.geteuid() == 0 else "",  # its workers read what only we may
        )
        path = self._folder / "nginx.conf"
        path.write_text(text)
        command = [str(_nginx()), "-p", str(self._folder), "-c", str(path), "-e", str(self._folder / "error.log")]
        self._process = subprocess.Popen(
            self.link.inside(command) if self.link else command, stdin=subprocess.DEVNULL, start_new_session=True
        )
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while not _accepts(self.address, self.port):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                said = measuring.read(self._folder / "error.log")[-2000:]
                raise RuntimeError(f"nginx does not answer at {self.endpoint}; its log:\n{said}")
            time.sleep(0.02)

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)  # the master ends its workers
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _make_certificates(self) -> None:
        """Make an authority, which clients trust, and the server's certificate, which that has signed."""
        key, authority_key = self._folder / "key.pem", self._folder / "authority-key.pem"
        _openssl("-subj", "/CN=benchmark authority", "-keyout", authority_key, "-out", self.authority)
        leaf = ("-subj", "/CN=benchmark", "-addext", f"subjectAltName=IP:{self.address}")
        leaf += ("-addext", "basicConstraints=critical,CA:FALSE", "-CA", self.authority, "-CAkey", authority_key)
        _openssl(*leaf, "-keyout", key, "-out", self._folder / "certificate.pem")


def _openssl(*arguments: str | Path) -> None:
    command = [*CERTIFICATE, "-days", CERTIFICATE_DAYS, *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"openssl made no certificate:\n{answer.stderr}")


def _nginx() -> str | None:
    """Return nginx's path; Debian puts it where only root's PATH leads."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


def _free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _dial(address: str, port: int) -> None:
    socket.create_connection((address, port), timeout=1).close()


def _accepts(address: str, port: int) -> bool:
    try:
        _dial(address, port)
    except OSError:
        return False
    return True
