"""Own long links on one machine: a network namespace behind a wire with a delay and a rate, see wire.c.

Never starts a server behind one; needs root, network namespaces and TUN devices.
"""

from __future__ import annotations

import itertools
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from compiling import compile_program

MTU = 9000  # large packets: the wire's CPU time is the machine's, and is spent by the packet
READY_TIMEOUT_S = 5.0
END_TIMEOUT_S = 5.0

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class LinkShape:
    """What a link is like: its round trip and the rate of each direction."""

    rtt_ms: float
    mbit: float


def obstacle() -> str:
    """Say why there can be no links on this machine; empty where there can."""
    if os.geteuid() != 0:
        return "links need root"
    for program in ("ip", "gcc"):
        if shutil.which(program) is None:
            return f"links need {program} (apt-get install {'iproute2' if program == 'ip' else program})"
    if not Path("/dev/net/tun").exists():
        return "links need /dev/net/tun"
    probe = f"wcprobe{os.getpid()}"
    answer = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if answer.returncode:
        return f"links need network namespaces: {answer.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


class Link:
    """A namespace behind a wire, while the `with` block runs.

    Args:
        folder: Where the wire's program is compiled.

    Attributes:
        address: The IPv4 address of the far end, reachable from here.
    """

    def __init__(self, shape: LinkShape, folder: Path) -> None:
        number = next(_numbers)
        name = f"{os.getpid()}x{number}"
        self._shape = shape
        self._program = compile_program("wire", folder)
        self._namespace = f"wcbench{name}"
        self._near, self._far = f"wcn{name}", f"wcf{name}"  # at most 15 letters
        # 198.18.0.0/15 is set aside for benchmarks (RFC 2544): no machine that can be reached has such an address.
        base = f"198.18.{os.getpid() % 256}"
        self._near_address, self.address = f"{base}.{4 * number + 1}", f"{base}.{4 * number + 2}"
        self._held = ExitStack()
        self._wire: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            _ip("netns", "add", self._namespace)
            self._held.callback(_ip, "netns", "del", self._namespace)
            self._start_wire()
            self._configure(self._near, self._near_address, self.address)
            self._configure(self._far, self.address, self._near_address, "-n", self._namespace)
            _ip("-n", self._namespace, "link", "set", "lo", "up")
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def inside(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs a command behind the link, as the same process."""
        return ["ip", "netns", "exec", self._namespace, *command]

    @property
    def received_bytes(self) -> int:
        """What has come over it to this end since it is there, headers of packets included."""
        return int(Path(f"/sys/class/net/{self._near}/statistics/rx_bytes").read_text())

    def cut(self) -> None:
        """Let nothing through, in silence, until `mend`."""
        assert self._wire is not None
        self._wire.send_signal(signal.SIGSTOP)

    def slow(self, share: float) -> None:
        """Have a share of its rate, until `mend`."""
        assert self._wire is not None and self._wire.stdin is not None
        self._wire.stdin.write(f"{self._shape.mbit * share}\n".encode())
        self._wire.stdin.flush()

    def mend(self) -> None:
        """Be as it was."""
        assert self._wire is not None
        self._wire.send_signal(signal.SIGCONT)
        self.slow(1.0)

    def _start_wire(self) -> None:
        shape = self._shape
        command = [self._program, self._near, self._namespace, self._far, shape.rtt_ms / 2, shape.mbit, MTU]
        wire = self._wire = subprocess.Popen(
            [str(each) for each in command],
            stdin=subprocess.PIPE,  # it ends with us
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._held.callback(_end, wire)
        assert wire.stdout is not None
        ready, _, _ = select.select([wire.stdout], [], [], READY_TIMEOUT_S)
        if not ready or not wire.stdout.readline():
            raise RuntimeError("the wire did not get ready; what it said stands above")

    def _configure(self, device: str, own: str, peer: str, *where: str) -> None:
        _ip(*where, "addr", "add", own, "peer", peer, "dev", device)
        _ip(*where, "link", "set", device, "mtu", str(MTU), "txqueuelen", "20000", "up")


def _ip(*arguments: str) -> None:
    answer = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)} failed: {answer.stderr.strip()}")


def _end(wire: subprocess.Popen[bytes]) -> None:
    assert wire.stdin is not None and wire.stdout is not None
    wire.stdin.close()
    try:
        wire.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        wire.kill()
        wire.wait()
    wire.stdout.close()
