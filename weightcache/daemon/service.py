"""Own the talk with the service manager: the socket it opened for us, and what it is told of how we are.

Never fails the daemon: a manager that is not there or does not listen costs a warning. Never reads the environment: what
the manager passed is an argument (`config.take_service_environment`).

    NOTIFY_SOCKET                             where the manager listens: a path, or @name of the abstract namespace
    WATCHDOG_USEC, WATCHDOG_PID               how long a silence counts as a hang, and of which process
    LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES    for whom, and how many, sockets begin at descriptor 3; their names

The protocols are sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3).
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Mapping

log = logging.getLogger(__name__)

FIRST_FD = 3
PATIENCE_S = 1.0  # with a manager whose queue is full; the loop stands still meanwhile
MOST_STATUS_CHARS = 1000  # systemd drops a message of more than 4096 bytes, whole


class ServiceManager:
    """Who started this process, and is told how it is. Where nobody waits to be told, nothing is done.

    Attributes:
        watchdog_s: How often to call `alive`: half of the silence that counts as a hang. None where none does.
    """

    def __init__(self, passed: Mapping[str, str]) -> None:
        self._address = _address(passed.get("NOTIFY_SOCKET", ""))
        self._is_deaf = False
        self.watchdog_s = _watchdog_s(passed) if self._address else None

    def ready(self) -> None:
        """Requests are served: from now on, or again after `reloading`."""
        self._tell("READY=1")

    def reloading(self) -> None:
        """The configuration is being read again; `ready` ends it, whatever came of it."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """No new request is taken; those under way are ended."""
        self._tell("STOPPING=1")

    def status(self, words: str) -> None:
        """Show a line to whoever asks the manager; no secret, it is open to every user."""
        self._tell(f"STATUS={' '.join(words.split())[:MOST_STATUS_CHARS]}")

    def alive(self) -> None:
        """Put off the watchdog."""
        self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(PATIENCE_S)
                sender.sendto("\n".join(lines).encode(errors="replace"), self._address)
        except OSError as exc:
            log.log(
                logging.DEBUG if self._is_deaf else logging.WARNING,
                "the service manager at %r was not told %s: %s",
                self._address,
                lines[0],
                exc,
            )
            self._is_deaf = True


def inherited_socket(passed: Mapping[str, str]) -> socket.socket | None:
    """Take over the Unix socket that the manager opened; None where it opened none. Once a process.

    What else was passed is closed with a warning: nobody would answer there.

    Returns:
        It listens, does not block, and is closed on exec. It is the caller's; its path stays where it is when it is
        closed, for the manager goes on listening there.
    """
    found: socket.socket | None = None
    if _number(passed.get("LISTEN_PID", "")) != os.getpid():
        return None
    names = passed.get("LISTEN_FDNAMES", "").split(":")
    for index in range(_number(passed.get("LISTEN_FDS", ""))):
        name = f"descriptor {FIRST_FD + index} ({names[index] if index < len(names) else 'unknown'})"
        try:
            each = socket.socket(fileno=FIRST_FD + index)
        except OSError as exc:
            log.warning("the service manager passed %s, which is no socket: %s; what follows is not used", name, exc)
            break
        is_stream = (each.family, each.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
        if found is None and is_stream and each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            each.set_inheritable(False)
            each.setblocking(False)
            found = each
        else:
            each.close()
            log.warning(
                "the service manager passed %s, which is not used: expected one listening Unix stream socket; look at "
                "ListenStream= and Accept=no of its socket unit",
                name,
            )
    return found


def _address(spelled: str) -> str:
    if spelled.startswith("@"):
        return "\0" + spelled[1:]
    if spelled and not spelled.startswith("/"):
        log.warning("NOTIFY_SOCKET is %r: expected a path or @name; the service manager is told nothing", spelled)
        return ""
    return spelled


def _watchdog_s(passed: Mapping[str, str]) -> float | None:
    period_us = _number(passed.get("WATCHDOG_USEC", ""))
    is_ours = passed.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return period_us / 2e6 if period_us and is_ours else None


def _number(spelled: str) -> int:
    """Read a number; 0 for what is none."""
    return int(spelled) if re.fullmatch("[0-9]{1,18}", spelled) else 0
