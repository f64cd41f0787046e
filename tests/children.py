"""Own the processes that tests start: Python scripts beside the tests, spoken to in lines of JSON.

Never leaves one running: a child is killed when its block ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

DEADLINE_S = 60.0
TESTS = Path(__file__).parent


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Poll a condition until it holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s"
        time.sleep(0.005)


class Child:
    """A Python process that runs a script, in a process group of its own, so that what it forks ends with it.

    Args:
        script: A file of the tests; it may import what lies in `tests/`.
        arguments: Its command line.
        python: The interpreter.
    """

    def __init__(self, script: Path, *arguments: object, python: str = sys.executable) -> None:
        environment = os.environ | {"PYTHONPATH": str(TESTS), "PYTHONWARNINGS": "error"}
        self._process = subprocess.Popen(
            [python, str(script), *map(str, arguments)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self._heard = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, value: Any = None) -> None:
        """Send a line of JSON to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value).encode() + b"\n")

    def hear(self, timeout_s: float = DEADLINE_S) -> Any:
        """Return the next line of JSON that it prints."""
        assert self._process.stdout is not None
        while b"\n" not in self._heard:
            ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
            assert ready, f"the child said nothing for {timeout_s} s"
            piece = os.read(self._process.stdout.fileno(), 65536)
            assert piece, f"the child ended with {self._process.wait(timeout_s)}; see its standard error"
            self._heard += piece
        line, _, self._heard = self._heard.partition(b"\n")
        return json.loads(line)

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait until it has ended; return its exit status, negative for a signal."""
        return self._process.wait(timeout_s)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """End it and all that it started, at once."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()
