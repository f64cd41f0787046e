"""Own the fixtures of all tests: servers, a clean environment, and the check that nothing leaks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from nodes import Node
from servers import Bucket, HttpServer, Proxy, S3Server

# Each run draws the same cases; `pytest --hypothesis-profile=default` draws new ones.
settings.register_profile("same cases", derandomize=True)
settings.load_profile("same cases")

LEAK_TIMEOUT_S = 5.0
PROCESS_WIDE_THREADS = ("weightcache-loop", "weightcache-worker", "weightcache-writer")


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One real S3 server for the whole session."""
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[Bucket]:
    """A new, empty bucket; `bucket.upload(folder, prefix)` fills it and returns its URL."""
    bucket = s3.create_bucket()
    yield bucket
    bucket.remove()


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[Proxy]:
    """A counting, faulty proxy before the S3 server; reach it by `s3.storage_options(proxy.endpoint)`."""
    with Proxy(s3.address, (s3.key, s3.secret)) as proxy:
        yield proxy


@pytest.fixture
def http_folder() -> Iterator[Callable[[Path], HttpServer]]:
    """Serve a folder over HTTP until the test ends: `http_folder(path)`."""
    with ExitStack() as servers:
        yield lambda folder: servers.enter_context(HttpServer(folder))


@pytest.fixture
def start() -> Iterator[Callable[..., Node]]:
    """Start the daemon of this test's cache folder: `start(configuration, arguments)`."""
    with ExitStack() as nodes:
        yield lambda configuration="", arguments=(): nodes.enter_context(Node(configuration, arguments))


@pytest.fixture
def node(start: Callable[..., Node]) -> Node:
    """The daemon of this test's cache folder."""
    return start()


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the cache at tmp_path and hide the developer's settings and credentials."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "WEIGHTCACHE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WEIGHTCACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", "")  # which a node sets
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture(autouse=True)
def nothing_leaks(tmp_path: Path) -> Iterator[None]:
    """Fail a test that leaves files under tmp_path open or threads of its own running."""
    yield
    deadline_s = time.monotonic() + LEAK_TIMEOUT_S
    while (leaks := _open_files(tmp_path) + _own_threads()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not leaks, f"still there {LEAK_TIMEOUT_S} s after the test: {leaks}"


def _open_files(folder: Path) -> list[str]:
    """Return the paths under a folder that this process holds open."""
    paths = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            path = link.readlink()
        except FileNotFoundError:  # closed since
            continue
        if path.is_relative_to(folder):
            paths.append(str(path))
    return paths


def _own_threads() -> list[str]:
    """Return the names of weightcache's threads that are not the process's but a test's."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("weightcache-") and not name.startswith(PROCESS_WIDE_THREADS)]
