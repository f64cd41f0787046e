"""The service manager: what it is told, through a socket it really listens on, and what of its sockets is taken over."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from weightcache.config import take_service_environment
from weightcache.daemon import service
from weightcache.daemon.service import ServiceManager, inherited_socket


@pytest.fixture(params=["path", "abstract"])
def notified(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """What NOTIFY_SOCKET says, and the socket that a manager would read."""
    name = f"@weightcache-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1))
        manager.settimeout(10)
        yield name, manager


def heard(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(65536).decode().splitlines())


def test_manager_is_told_of_every_turn(notified: tuple[str, socket.socket]) -> None:
    name, manager = notified
    told = ServiceManager({"NOTIFY_SOCKET": name})
    told.ready()
    assert heard(manager) == {"READY": "1"}
    told.status("2 models, 5.1 GB")
    assert heard(manager) == {"STATUS": "2 models, 5.1 GB"}
    told.alive()
    assert heard(manager) == {"WATCHDOG": "1"}
    told.stopping()
    assert heard(manager) == {"STOPPING": "1"}


def test_reload_carries_the_moment_it_began(notified: tuple[str, socket.socket]) -> None:
    name, manager = notified
    before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    ServiceManager({"NOTIFY_SOCKET": name}).reloading()
    message = heard(manager)
    assert message.keys() == {"RELOADING", "MONOTONIC_USEC"}
    assert before_us <= int(message["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_status_is_one_line_that_systemd_takes(notified: tuple[str, socket.socket]) -> None:
    name, manager = notified
    ServiceManager({"NOTIFY_SOCKET": name}).status("s3://bucket/\nREADY=1\udcff " + "ü" * 5000)
    message = manager.recv(65536)
    assert message.startswith("STATUS=s3://bucket/ READY=1? ü".encode())
    assert message.count(b"\n") == 0 and len(message) <= 4096


def test_process_without_a_manager_tells_nobody(caplog: pytest.LogCaptureFixture) -> None:
    manager = ServiceManager({"WATCHDOG_USEC": "30000000"})
    manager.ready()
    manager.stopping()
    assert (manager.watchdog_s, caplog.records) == (None, [])


@pytest.mark.parametrize("name", ["/not/there", "@weightcache-nobody", "/" + "x" * 200])
def test_manager_that_does_not_listen_costs_one_warning(name: str, caplog: pytest.LogCaptureFixture) -> None:
    manager = ServiceManager({"NOTIFY_SOCKET": name})
    manager.ready()
    manager.stopping()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "was not told READY=1" in record.message


def test_address_of_another_kind_is_a_warning_and_no_manager(caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager({"NOTIFY_SOCKET": "vsock:2:1234"}).ready()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["NOTIFY_SOCKET is 'vsock"]


def test_manager_that_reads_nothing_does_not_hold_up_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "PATIENCE_S", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "notify"))
        manager = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        for _ in range(10_000):  # more than any queue holds
            manager.alive()
            if caplog.records:
                break
    (record,) = caplog.records
    assert "timed out" in record.message


@pytest.mark.parametrize(
    ("passed", "every_s"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "9" * 5000}, None),
        ({}, None),
    ],
)
def test_watchdog_is_put_off_twice_a_period(passed: dict[str, str], every_s: float | None) -> None:
    assert ServiceManager({"NOTIFY_SOCKET": "/run/notify", **passed}).watchdog_s == every_s


def test_what_the_manager_passed_is_not_for_children(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "1", "LISTEN_FDS": "1", "LISTEN_PID": "7"}
    for name, value in passed.items():
        monkeypatch.setenv(name, value)
    assert take_service_environment() == passed
    assert take_service_environment() == {}
    assert not passed.keys() & os.environ.keys()


# -- sockets

TAKES_OVER = """
import logging, os, sys
from weightcache.config import take_service_environment
from weightcache.daemon.service import inherited_socket
logging.basicConfig(format="%(message)s", stream=sys.stdout)
found = inherited_socket(take_service_environment())
if found is not None:
    print(found.getsockname(), os.get_inheritable(found.fileno()), found.getblocking())
"""


def take_over(*passed: socket.socket | int, names: str = "", count: int = -1, pid: str = "$$") -> list[str]:
    """Start a process with sockets from descriptor 3 on, as systemd does. Returns what it says of them."""
    fds = [fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in passed]  # none is overwritten by another on its way
    moves = " ".join(f"{service.FIRST_FD + index}<&{fd} {fd}<&-" for index, fd in enumerate(fds))
    told = f"LISTEN_PID={pid} LISTEN_FDS={count if count >= 0 else len(fds)} LISTEN_FDNAMES={names}"
    command = ["bash", "-c", f'exec {moves}; {told} exec "$@"', "bash", sys.executable, "-c", TAKES_OVER]
    try:
        done = subprocess.run(command, pass_fds=fds, capture_output=True, text=True, timeout=60)
    finally:
        for fd in fds:
            os.close(fd)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.fixture
def unix(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "daemon.sock"))
        listening.listen()
        yield listening


def test_socket_of_the_manager_is_taken_over(unix: socket.socket) -> None:
    assert take_over(unix, names="weightcache.socket") == [f"{unix.getsockname()} False False"]


def test_sockets_for_another_process_are_left_alone(unix: socket.socket) -> None:
    assert take_over(unix, pid="1") == []


def test_process_that_was_passed_nothing_takes_nothing() -> None:
    assert inherited_socket({}) is None
    assert inherited_socket({"LISTEN_PID": str(os.getpid())}) is None


def test_second_socket_is_named_and_closed(unix: socket.socket) -> None:
    said, kept = take_over(unix, unix, names="one:other")
    assert kept == f"{unix.getsockname()} False False"
    assert said.startswith("the service manager passed descriptor 4 (other), which is not used")


def test_socket_that_is_of_no_use_is_named_and_closed(tmp_path: Path) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as silent,
        socket.create_server(("127.0.0.1", 0)) as tcp,
    ):
        datagrams.bind(str(tmp_path / "datagrams"))
        said = take_over(datagrams, silent, tcp, names="datagrams:silent")
    assert [line.partition(", ")[0] for line in said] == [
        "the service manager passed descriptor 3 (datagrams)",
        "the service manager passed descriptor 4 (silent)",
        "the service manager passed descriptor 5 (unknown)",
    ]


def test_descriptor_that_is_no_socket_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (tmp_path / "file").open() as file:
        (said,) = take_over(file.fileno(), count=10**17)
    assert said.startswith("the service manager passed descriptor 3 (), which is no socket: ")
