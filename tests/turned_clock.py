"""Own a clock that tests turn: a loop that never waits, but adds the time that would pass to its own clock.

Never for sockets: nothing from outside the loop arrives on it.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from weightcache import errors

T = TypeVar("T")


class TurnedSelector(selectors.DefaultSelector):
    """Never waits: the time that would pass is added to a clock."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing would ever happen")
        self.now_s += max(timeout, 0.0)
        return super().select(0)


def make_loop() -> asyncio.AbstractEventLoop:
    """Return a loop that tells the time by its own clock, which begins at 0."""
    selector = TurnedSelector()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now_s  # type: ignore[method-assign]
    return loop


def run(coroutine: Coroutine[Any, Any, T]) -> tuple[T | BaseException, float]:
    """Run a coroutine; return what it gave or raised, and how many seconds it took by its own clock."""

    async def caught() -> T | BaseException:
        try:
            return await coroutine
        except errors.WeightcacheError as exc:
            return exc

    with asyncio.Runner(loop_factory=make_loop) as runner:
        return runner.run(caught()), runner.get_loop().time()
