"""Own the endurance: the one place where a failed request is asked again, or a slow one asked beside.

Never retries what is final; never waits past the deadline; never asks for more extra bytes than its budgets allow.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from statistics import median
from typing import TypeVar

from weightcache.errors import DeadlineError, OriginUnreachableError, TransientOriginError
from weightcache.ledger import Ledger
from weightcache.origins.base import PIECE_NBYTES, Entry, Origin, Small, Stat, WritableOrigin
from weightcache.origins.chunked import ChunkedOrigin
from weightcache.origins.connection import ClosedIdleError
from weightcache.origins.pace import Pace, loop_time

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_PAUSE_S = 0.1
THROTTLED_PAUSE_S = 0.4
LONGEST_PAUSE_S = 5.0
RETRY_BUDGET = 0.10  # of the bytes used, most that broken answers may have cost
RETRY_FLOOR_NBYTES = 64 << 20
HEDGE_BUDGET = 0.05  # of the bytes used, most that are asked for beside
HEDGE_FLOOR_NBYTES = 1 << 20
HEDGE_AFTER = 3.0  # times the median of what ranges take
LEAST_HEDGE_S = 0.3
N_JUDGED = 64  # ranges whose times are remembered
LEAST_JUDGED = 4
LOOK_S = 0.1
MOST_ELSEWHERE = 8  # times that one request goes on at another replica without counting as tried again


class Resilient:
    """An origin whose transient failures are asked again: bounded attempts, full jitter, budgets, one deadline.

    Args:
        inner: The origin that is asked.
        attempts: Most tries of one request; a body that broke off after a whole piece goes on as another request.
        deadline: Loop time after which nothing is asked any more, or None.
        most: Ranges asked at the same time, at most.
        hedges: Whether a range that takes far longer than others is asked for once more, beside.
        jitter: Draws from [0, 1); an argument so that tests are exact.
    """

    def __init__(
        self,
        inner: Origin,
        *,
        attempts: int = 3,
        deadline: float | None = None,
        most: int = 16,
        hedges: bool = False,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.inner = inner
        self.used_bytes = 0
        self._attempts = attempts
        self._deadline = deadline
        self._hedges = hedges
        self._jitter = jitter
        self._pace = Pace(most, self._received_bytes)
        self._extra_bytes = 0
        self._hedged_bytes = 0
        self._took_s: deque[tuple[int, float]] = deque(maxlen=N_JUDGED)
        self._suspect: set[tuple[str, int]] = (
            set()
        )  # ranges that came wrong: each is read in one go then, from one place

    @property
    def ledger(self) -> Ledger:
        return self.inner.ledger

    @property
    def ledgers(self) -> Sequence[Ledger]:
        return self.inner.ledgers

    def _received_bytes(self) -> int:
        return sum(ledger.received_bytes for ledger in self.inner.ledgers)

    @property
    def uri(self) -> str:
        return self.inner.uri

    def slot(self) -> AbstractAsyncContextManager[None]:
        """Wait for one's turn to read a range, and hold it for the length of the block."""
        return self._pace.slot()

    def discard(self, stat: Stat, start: int, nbytes: int) -> bool:
        """Hear that bytes which were read turned out wrong. Returns whether reading them once more may help."""
        self.used_bytes -= nbytes
        self._extra_bytes += nbytes
        is_first = (stat.path, start) not in self._suspect
        self._suspect.add((stat.path, start))
        is_found_out = isinstance(self.inner, ChunkedOrigin) and self.inner.reject(stat, start)
        return is_first or is_found_out

    def discard_small(self, name: str, nbytes: int) -> bool:
        """Hear that a small file turned out wrong. Returns whether another may have it right."""
        self.used_bytes -= nbytes
        self._extra_bytes += nbytes
        return isinstance(self.inner, ChunkedOrigin) and self.inner.reject_file(name, nbytes)

    async def list(self) -> Sequence[Stat]:
        before = self._received_bytes()
        listed = await self._insist(f"listing {self.uri}", self.inner.list)
        self.used_bytes += self._received_bytes() - before  # pages
        return listed

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        nbytes = sum(len(view) for view in views)
        left = list(views)
        n_whole = 0  # bytes that lie in the views for good
        is_suspect = (stat.path, start) in self._suspect

        async def ask() -> None:
            nonlocal n_whole
            try:
                await self._read(stat, start + n_whole, left, hedges=self._hedges and not is_suspect)
            except TransientOriginError as exc:
                n_received = int(exc.facts.get("received_bytes", 0))  # type: ignore[call-overload]
                resumed_at = 0 if is_suspect else (n_whole + n_received) // PIECE_NBYTES * PIECE_NBYTES
                self._extra_bytes += n_whole + n_received - max(n_whole, resumed_at)
                exc.facts["is_resumed"] = resumed_at > n_whole
                _skip(left, max(0, resumed_at - n_whole))
                n_whole = max(n_whole, resumed_at)
                raise

        try:
            await self._insist(f"bytes [{start}, {start + nbytes}) of {self.uri}/{stat.path}", ask)
        finally:
            left.clear()  # an error holds the frames it went through, and they what they enclose
        self.used_bytes += nbytes

    async def get(self, name: str, limit_nbytes: int) -> Small:
        small = await self._insist(f"reading {self.uri}/{name}", lambda: self.inner.get(name, limit_nbytes))
        self.used_bytes += len(small.content)
        return small

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        await self._insist(f"looking again at {self.uri}", lambda: self.inner.check_unchanged(stats))

    def drop(self) -> None:
        self.inner.drop()

    async def close(self) -> None:
        """Close the origin; the ledger is complete then."""
        await self.inner.close()
        if len(self.ledgers) == 1:
            self.ledgers[0].wasted_bytes = max(0, self._received_bytes() - self.used_bytes)

    # -- again

    async def _insist(self, what: str, ask: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._ask(what, ask)
        except TimeoutError as exc:
            raise DeadlineError(
                f"{what}: the time allowed for the load ran out; raise timeout_s or look at the network",
                what=what,
            ) from exc

    async def _ask(self, what: str, ask: Callable[[], Awaitable[T]]) -> T:
        attempt = 1
        n_elsewhere = 0  # failures of replicas while another could be asked
        n_idle_closed = 0  # kept connections that the server closed, which is nobody's failure: one is free
        while True:
            if self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline:
                raise TimeoutError
            try:
                return await ask()
            except TransientOriginError as exc:
                is_throttled = bool(exc.facts.get("is_throttled"))
                retry_after_s = exc.facts.get("retry_after_s")
                is_elsewhere = bool(exc.facts.pop("goes_elsewhere", False)) and n_elsewhere < MOST_ELSEWHERE
                n_elsewhere += is_elsewhere
                if is_throttled and not is_elsewhere:
                    self._pace.throttled(float(retry_after_s) if retry_after_s else None)  # type: ignore[arg-type]
                if exc.facts.get("is_resumed"):
                    attempt = 0
                is_nobodys = is_elsewhere or (isinstance(exc, ClosedIdleError) and n_idle_closed == 0)
                n_idle_closed += is_nobodys and not is_elsewhere
                if attempt >= self._attempts and not is_nobodys:
                    raise OriginUnreachableError(
                        f"{what} failed {attempt} times, last: {exc}; try again when the origin is healthy",
                        what=what,
                        attempts=attempt,
                    ) from exc
                if self._extra_bytes > RETRY_BUDGET * self.used_bytes + RETRY_FLOOR_NBYTES:
                    raise OriginUnreachableError(
                        f"{what}: broken answers have cost {self._extra_bytes} bytes beside the {self.used_bytes} used, "
                        f"more than a load may waste, last: {exc}; try again when the origin is healthy",
                        what=what,
                        extra_bytes=self._extra_bytes,
                    ) from exc
                pause_s = self._pause_s(attempt, is_throttled, float(retry_after_s or 0))  # type: ignore[arg-type]
                attempt += not is_elsewhere
                self.ledger.n_retries += is_elsewhere or not is_nobodys
                if not is_nobodys:
                    log.debug("%s failed (%s); attempt %d follows in %.2f s", what, exc, attempt, pause_s)
                    await asyncio.sleep(pause_s)

    def _pause_s(self, attempt: int, is_throttled: bool, retry_after_s: float) -> float:
        # Full jitter (Brooker, AWS Architecture Blog, 2015): clients that failed together do not return together.
        if is_throttled:
            longest = min(LONGEST_PAUSE_S, THROTTLED_PAUSE_S * 2.0**attempt)
            return retry_after_s + longest * (1 + self._jitter()) / 2
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**attempt) if attempt else 0.0
        return self._jitter() * longest

    # -- beside

    async def _read(self, stat: Stat, start: int, views: Sequence[memoryview], *, hedges: bool) -> None:
        """Read once, and once more beside when that takes far longer than others took."""
        if not hedges:
            await self.inner.read_into(stat, start, views)
            return
        nbytes = sum(len(view) for view in views)
        began = loop_time()
        tasks = [asyncio.create_task(self.inner.read_into(stat, start, views))]
        failures: list[BaseException | None] = []
        try:
            while True:
                timeout_s = LOOK_S if len(tasks) == 1 else None
                pending = [task for task in tasks if not task.done()]
                await asyncio.wait(pending, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
                failures = [task.exception() for task in tasks if task.done()]
                if None in failures:
                    self._took_s.append((nbytes, loop_time() - began))
                    return
                if len(failures) == len(tasks):
                    raise max((each for each in failures if each is not None), key=_received_bytes)
                if len(tasks) == 1 and self._is_slow(nbytes, loop_time() - began):
                    self._hedged_bytes += nbytes
                    self.ledger.n_hedges += 1
                    log.debug(
                        "bytes [%d, %d) of %s are slow: asked for once more, beside", start, start + nbytes, stat.path
                    )
                    tasks.append(asyncio.create_task(self.inner.read_into(stat, start, views)))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # nobody writes into the views afterwards
            tasks.clear()  # and nothing here holds an error that holds this
            failures.clear()

    def _is_slow(self, nbytes: int, spent_s: float) -> bool:
        if self._hedged_bytes + nbytes > HEDGE_BUDGET * self.used_bytes + HEDGE_FLOOR_NBYTES:
            return False
        like = [took_s for size, took_s in self._took_s if 2 * size >= nbytes]
        return len(like) >= LEAST_JUDGED and spent_s > max(LEAST_HEDGE_S, HEDGE_AFTER * median(like))


class ResilientWriter(Resilient):
    """An origin that can be written to, as Resilient as one that is read."""

    inner: WritableOrigin

    async def entries(self, prefix: str) -> Sequence[Entry]:
        return await self._insist(f"listing {self.uri}/{prefix}", lambda: self.inner.entries(prefix))

    async def put(self, name: str, content: bytes | memoryview, only_if: str | None = None) -> None:
        """Write a file. A ConflictError may come of an earlier attempt whose answer was lost."""
        await self._insist(f"writing {self.uri}/{name}", lambda: self.inner.put(name, content, only_if))

    async def delete(self, name: str) -> None:
        await self._insist(f"removing {self.uri}/{name}", lambda: self.inner.delete(name))

    async def has_conditions(self) -> bool:
        return await self._insist(f"trying {self.uri}", self.inner.has_conditions)


def _skip(left: list[memoryview], nbytes: int) -> None:
    """Take the first bytes off views."""
    while nbytes and left:
        n_taken = min(nbytes, len(left[0]))
        left[0] = left[0][n_taken:]
        nbytes -= n_taken
        if not left[0]:
            left.pop(0)


def _received_bytes(failure: BaseException) -> int:
    return int(getattr(failure, "facts", {}).get("received_bytes", 0))
