"""Own how fast an origin is asked: how many ranges are under way, and how many bytes a second may come.

Never dials. One pace serves one origin, on the loop thread; clocks are arguments.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache

log = logging.getLogger(__name__)

START = 16  # of one host on loopback, all there is; of a store far away, 1.4 GB/s at its 90 MB/s a connection
LEAST_PIECE_NBYTES = 16 << 10
MOST_PIECE_NBYTES = 64 << 20
GROWTH = 1.5
GAIN = 1.05  # what more connections must bring to be kept
LOSS = 0.6  # less of its best than this, and a level is too high
LEAST = 4  # that a loss alone leads to
EPOCH_S = 0.25  # shortest; an epoch is also at least one range a slot
N_HELD = 8  # epochs at a level before more is tried again
REST_S = 1.0  # between two times that the level is halved


class Throttle:
    """The bytes a second that all connections of a process may take together; 0 is no limit."""

    def __init__(self, bytes_per_s: int, clock: Callable[[], float]) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._free_at = 0.0

    @property
    def piece_nbytes(self) -> int:
        """Most bytes to take at once, so that connections share the rate evenly."""
        return max(LEAST_PIECE_NBYTES, self._bytes_per_s // 50) if self._bytes_per_s else MOST_PIECE_NBYTES

    def pause_s(self, nbytes: int) -> float:
        """Count bytes that came; returns how long their connection should rest."""
        if not self._bytes_per_s:
            return 0.0
        now = self._clock()
        self._free_at = max(self._free_at, now) + nbytes / self._bytes_per_s
        return self._free_at - now


def loop_time() -> float:
    return asyncio.get_running_loop().time()


@cache
def throttle(bytes_per_s: int, purpose: str = "") -> Throttle:
    """Return the one throttle of this process for a rate and a purpose."""
    return Throttle(bytes_per_s, time.monotonic)


class Pace:
    """How many ranges are asked of an origin at the same time: found while they come.

    It starts at 16, grows by half while that brings more bytes a second, goes back when it does not, shrinks when the
    same number takes longer, and is halved when the origin asks for less. After N_HELD epochs it tries again: the link
    may have become free.

    Args:
        most: The bound.
        received_bytes: How many bytes of bodies have come so far.
        clock: Seconds; called on the loop thread alone.
    """

    def __init__(self, most: int, received_bytes: Callable[[], int], clock: Callable[[], float] = loop_time) -> None:
        self.most = most
        self.level = min(START, most)
        self._received_bytes = received_bytes
        self._clock = clock
        self._n_taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._quiet_until = 0.0
        self._halved_at = -REST_S
        self._began, self._began_bytes, self._n_done = 0.0, 0, 0
        self._was_full = False
        self._best = 0.0  # bytes a second
        self._settled = self.level  # the level that gave it
        self._n_held = 0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Wait for one's turn, first come first served, and hold a slot for the length of the block."""
        await self._take_turn()
        try:
            while (rest_s := self._quiet_until - self._clock()) > 0:
                await asyncio.sleep(rest_s)
            yield
            self._count()
        finally:
            self._n_taken -= 1
            self._let_in()

    def throttled(self, retry_after_s: float | None) -> None:
        """Hear that the origin asked for less."""
        now = self._clock()
        if retry_after_s:
            self._quiet_until = max(self._quiet_until, now + retry_after_s)
        if now - self._halved_at >= REST_S:
            self._halved_at = now
            self.level = max(1, self.level // 2)
            self._best, self._settled, self._n_held = 0.0, self.level, 0
            log.debug("the origin asks for less: %d ranges at a time", self.level)
            self._begin_epoch()

    async def _take_turn(self) -> None:
        if self._n_taken >= self.level or self._waiting:
            self._was_full = True
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._n_taken -= 1
                    self._let_in()
                elif turn in self._waiting:
                    self._waiting.remove(turn)
                raise
        else:
            self._n_taken += 1
            if self._n_taken == 1:
                self._begin_epoch()

    def _let_in(self) -> None:
        while self._waiting and self._n_taken < self.level:
            turn = self._waiting.popleft()
            if not turn.done():
                self._n_taken += 1
                turn.set_result(None)

    def _begin_epoch(self) -> None:
        self._began = max(self._clock(), self._quiet_until)
        self._began_bytes, self._n_done = self._received_bytes(), 0
        self._was_full = bool(self._waiting)

    def _count(self) -> None:
        """Count a range that is done, and judge the epoch when it is long enough."""
        self._n_done += 1
        spent = self._clock() - self._began
        if spent < EPOCH_S or self._n_done < self.level:
            return
        if self._was_full and self._waiting:  # else the level was not what held it back
            self._judge((self._received_bytes() - self._began_bytes) / spent)
        self._begin_epoch()

    def _judge(self, rate: float) -> None:
        if rate > self._best * GAIN:
            self._best, self._settled, self._n_held = rate, self.level, 0
            self._set(min(self.most, int(self.level * GROWTH) + 1))
        elif self.level != self._settled:
            self._set(self._settled)  # more brought nothing
            self._n_held = 1
        elif rate < self._best * LOSS:  # each takes longer than it did: others are here, too
            self._best, self._n_held = rate, 0
            self._set(min(self.level, max(LEAST, self.level * 2 // 3)))
            self._settled = self.level
        else:
            self._n_held += 1
            if self._n_held >= N_HELD:
                self._best, self._n_held = rate, 0
                self._set(min(self.most, int(self.level * GROWTH) + 1))

    def _set(self, level: int) -> None:
        if level != self.level:
            log.debug("%d ranges at a time, was %d", level, self.level)
            self.level = level
