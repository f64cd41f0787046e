"""Own the work behind a load: what writer threads do while nobody waits for it.

Never keeps what its work used: memory is let go of as each piece is done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future

log = logging.getLogger(__name__)


class Behind:
    """Work submitted to writer threads, and one last thing to do when all of it is done.

    `settled` is set after that last thing. Thread-safe.
    """

    def __init__(self, writers: Executor) -> None:
        self.settled = threading.Event()
        self._writers = writers
        self._lock = threading.Lock()
        self._pending = 1  # the seal
        self._last: Callable[[], None] = _nothing

    def submit(self, work: Callable[..., None], *arguments: object) -> Future[None]:
        """Have work done behind. Its errors are its own; what escapes is logged. Not after `seal`."""
        with self._lock:
            self._pending += 1
        held = [(work, arguments)]

        def step() -> None:
            # Popped, so that the memory they lead to is let go of before the work counts as done, not a moment later.
            work, arguments = held.pop()
            work(*arguments)

        del work, arguments
        future = self._writers.submit(step)
        future.add_done_callback(self._done)
        return future

    def seal(self, last: Callable[[], None]) -> None:
        """Nothing more is submitted: do `last` when all is done, at once if it is."""
        self._last = last
        self._step()

    def _done(self, future: Future[None]) -> None:
        if not future.cancelled() and (exc := future.exception()) is not None:
            log.error("work behind a load failed: %r", exc)
        self._step()

    def _step(self) -> None:
        with self._lock:
            self._pending -= 1
            if self._pending:
                return
        last, self._last = self._last, _nothing
        try:
            last()
        finally:
            self.settled.set()


def _nothing() -> None:
    pass
