"""The daemon below a service manager: what systemd hears of it, that systemd's socket is its own, what Prometheus sees."""

from __future__ import annotations

import math
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from children import wait_until
from nodes import Node
from prometheus_client.parser import text_string_to_metric_families

import weightcache
from weightcache import errors, session
from weightcache.config import Settings
from weightcache.report import Report
from weightcache.uri import parse_uri

ACTIVATE = "systemd-socket-activate"
WATCHDOG_S = 0.2


class Manager:
    """What a service manager hears, which reads at once: the daemon never waits for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._reader = threading.Thread(target=self._read, name="manager")
        self._reader.start()

    def _read(self) -> None:
        while message := self._socket.recv(65536):
            self._heard.put(message.decode())

    def hears(self, name: str, within_s: float = 60.0) -> dict[str, str]:
        """Wait for a message that begins with a name; what comes before is passed over. Raises queue.Empty."""
        deadline_s = time.monotonic() + within_s
        while True:
            lines = self._heard.get(timeout=max(0.0, deadline_s - time.monotonic())).splitlines()
            if lines[0].partition("=")[0] == name:
                return dict(line.split("=", 1) for line in lines)

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", str(self.path))
        self._reader.join()
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    manager = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(manager.path))
    monkeypatch.setenv("WATCHDOG_USEC", str(int(WATCHDOG_S * 1e6)))
    yield manager
    manager.close()


def test_manager_hears_of_every_turn(manager: Manager) -> None:
    with Node() as node:
        assert manager.hears("READY") == {"READY": "1"}
        node.signal(signal.SIGHUP)
        assert int(manager.hears("RELOADING")["MONOTONIC_USEC"]) > 0
        manager.hears("READY")
        for _ in range(3):
            manager.hears("WATCHDOG")
        assert manager.hears("STATUS")["STATUS"] == "0 models, 0 bytes in memory; 0 clients"
        assert node.stop() == 0
        manager.hears("STOPPING")


def test_configuration_that_is_wrong_ends_the_reload_and_not_the_daemon(manager: Manager) -> None:
    with Node() as node:
        manager.hears("READY")
        node.write("no = such setting\n")
        node.signal(signal.SIGHUP)
        manager.hears("RELOADING")
        manager.hears("READY")
        assert node.state()["is_ready"]


def test_daemon_that_stands_still_is_not_alive(manager: Manager) -> None:
    with Node() as node:
        manager.hears("WATCHDOG")
        node.signal(signal.SIGSTOP)
        with pytest.raises(queue.Empty):
            for _ in range(100):  # what was said before it stopped
                manager.hears("WATCHDOG", within_s=5 * WATCHDOG_S)


@contextmanager
def activated(path: Path, log: Path, *passed: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have systemd listen on a path, and start the daemon when somebody connects."""
    environment = [f"--setenv={name}={value}" for name, value in os.environ.items() if name in passed]
    command = [ACTIVATE, f"--listen={path}", *environment, sys.executable, "-m", "weightcache", "daemon"]
    with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
        try:
            wait_until(path.is_socket)
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


@pytest.mark.skipif(shutil.which(ACTIVATE) is None, reason=f"there is no {ACTIVATE} here: apt-get install systemd")
def test_socket_of_systemd_is_served_and_left_where_it_is(
    tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / "daemon.sock"
    path.parent.mkdir(0o700)
    (tmp_path / "weightcache.toml").write_text(f'socket = "{path}"\n[daemon]\nhttp = ""\n')
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", str(tmp_path / "weightcache.toml"))
    passed = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WEIGHTCACHE_CONFIG", "WEIGHTCACHE_DIR")
    with activated(path, tmp_path / "log", *passed) as process:
        state = None
        while state is None:  # a client waits no longer than it would without a daemon
            try:
                state = weightcache.status()
            except errors.DaemonError:
                assert process.poll() is None, (tmp_path / "log").read_text()
        assert (state["socket"], state["pid"]) == (str(path), process.pid)
        manager.hears("READY")
        process.terminate()
        assert process.wait(60) == 0
    assert path.is_socket()


def test_prometheus_sees_the_daemon_as_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Node(f'[daemon]\nhttp = "127.0.0.1:{port}"\n') as node:
        node.state()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
    seen = {family.name: family for family in text_string_to_metric_families(text)}
    assert seen["weightcache_build_info"].samples[0].labels.keys() == {"version"}
    assert {each.labels["tier"] for each in seen["weightcache_tier_budget_bytes"].samples} >= {"host"}
    assert [each.value for each in seen["weightcache_leases"].samples] == [0]
    asked = [each for each in seen["weightcache_requests"].samples if each.labels["op"] == "status"]
    assert [(each.labels["outcome"], each.value > 0) for each in asked] == [("ok", True)]
    assert seen["weightcache_request_seconds"].type == "histogram"


@pytest.fixture
def nobody() -> Iterator[None]:
    """Be a user who may enter no folder of the tests, for the kernel's checks of files."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_load_goes_on_by_itself_where_the_socket_is_another_user_s(tmp_path: Path, nobody: None) -> None:
    report, name = Report("s3://bucket/model"), parse_uri("s3://bucket/model", ["s3"], "/")
    settings = Settings(dir=tmp_path, socket=str(tmp_path / "daemon.sock"))
    assert session._attach(session.Request(str(name)), settings, name, False, math.inf, report) is None
    assert report.choices["daemon"].endswith("(Permission denied): run as its user, or name this one in its uids")
