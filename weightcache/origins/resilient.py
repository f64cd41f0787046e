"""Own the retries: the one place where a failed request is asked again.

Never retries what is final; never waits past the deadline.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from weightcache.errors import DeadlineError, OriginUnreachableError, TransientOriginError
from weightcache.origins.base import Origin, Stat

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0


@dataclass(slots=True)
class Ledger:
    """What one load asked of its origin."""

    n_requests: int = 0
    n_retries: int = 0
    bytes_received: int = 0


class Resilient:
    """An origin whose transient failures are asked again: bounded attempts, full jitter, one deadline.

    Args:
        inner: The origin that is asked.
        attempts: Most tries of one request.
        deadline: Loop time after which nothing is asked any more, or None.
        jitter: Draws from [0, 1); an argument so that tests are exact.
    """

    def __init__(
        self,
        inner: Origin,
        *,
        attempts: int = 3,
        deadline: float | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.inner = inner
        self._attempts = attempts
        self._deadline = deadline
        self._jitter = jitter
        self.ledger = Ledger()

    @property
    def uri(self) -> str:
        return self.inner.uri

    async def list(self) -> Sequence[Stat]:
        return await self._insist(f"listing {self.uri}", self.inner.list)

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        nbytes = sum(len(view) for view in views)
        what = f"bytes [{start}, {start + nbytes}) of {self.uri}/{stat.path}"
        await self._insist(what, lambda: self.inner.read_into(stat, start, views))
        self.ledger.bytes_received += nbytes

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        # Not counted as a request: for most origins it is none.
        await self._insist(f"looking again at {self.uri}", lambda: self.inner.check_unchanged(stats), n_requests=0)

    async def close(self) -> None:
        await self.inner.close()

    async def _insist(self, what: str, ask: Callable[[], Awaitable[T]], *, n_requests: int = 1) -> T:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._ask(what, ask, n_requests)
        except TimeoutError as exc:
            raise DeadlineError(
                f"{what}: the time allowed for the load ran out; raise timeout_s or look at the network",
                what=what,
            ) from exc

    async def _ask(self, what: str, ask: Callable[[], Awaitable[T]], n_requests: int) -> T:
        for attempt in range(1, self._attempts + 1):
            if self._deadline is not None and asyncio.get_running_loop().time() >= self._deadline:
                raise TimeoutError
            self.ledger.n_requests += n_requests
            try:
                return await ask()
            except TransientOriginError as exc:
                if attempt == self._attempts:
                    raise OriginUnreachableError(
                        f"{what} failed {attempt} times, last: {exc}; try again when the origin is healthy",
                        what=what,
                        attempts=attempt,
                    ) from exc
                # Full jitter (Brooker, AWS Architecture Blog, 2015): clients that failed together do not return together.
                pause = self._jitter() * min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
                log.debug("%s failed (%s); attempt %d follows in %.2f s", what, exc, attempt + 1, pause)
                self.ledger.n_retries += 1
                await asyncio.sleep(pause)
        raise AssertionError("unreachable: attempts is at least 1")
