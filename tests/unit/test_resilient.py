"""Retries: how often, after which pause, until when, and of what; on a clock that tests turn themselves."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import pytest

from weightcache import errors
from weightcache.origins.base import Stat
from weightcache.origins.resilient import FIRST_PAUSE_S, LONGEST_PAUSE_S, Resilient

T = TypeVar("T")
CONTENT = bytes(range(256))
FILE = Stat("a/file", len(CONTENT), "1")
STALL = "stall"


class TurnedSelector(selectors.DefaultSelector):
    """Never waits: the time that would pass is added to a clock."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("nothing would ever happen")
        self.now_s += max(timeout, 0.0)
        return super().select(0)


def run(coroutine: Coroutine[Any, Any, T]) -> tuple[T | BaseException, float]:
    """Run a coroutine; return what it gave or raised, and how many seconds it took by its own clock."""
    selector = TurnedSelector()

    def make_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.SelectorEventLoop(selector)
        loop.time = lambda: selector.now_s  # type: ignore[method-assign]
        return loop

    async def caught() -> T | BaseException:
        try:
            return await coroutine
        except errors.WeightcacheError as exc:
            return exc

    with asyncio.Runner(loop_factory=make_loop) as runner:
        return runner.run(caught()), selector.now_s


class MemoryOrigin:
    """An origin in memory that does as its script says: an error to raise, STALL, or None to answer."""

    uri = "memory://models"

    def __init__(self, *script: Exception | str | None) -> None:
        self.script = list(script)
        self.n_asked = 0
        self.closed = False

    async def _act(self) -> None:
        self.n_asked += 1
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        if step == STALL:
            await asyncio.Event().wait()

    async def list(self) -> Sequence[Stat]:
        await self._act()
        return [FILE]

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        await self._act()
        for view in views:
            view[:] = CONTENT[start : start + len(view)]
            start += len(view)

    async def close(self) -> None:
        self.closed = True


def transient(message: str = "503") -> Exception:
    return errors.TransientOriginError(message)


def make(
    origin: MemoryOrigin, attempts: int = 3, deadline: float | None = None, jitter: Callable[[], float] = lambda: 1.0
) -> Resilient:
    return Resilient(origin, attempts=attempts, deadline=deadline, jitter=jitter)


def test_failure_is_asked_again_until_it_is_answered() -> None:
    origin = MemoryOrigin(transient(), transient())
    resilient = make(origin)
    assert run(resilient.list())[0] == [FILE]
    assert (origin.n_asked, resilient.ledger.n_requests, resilient.ledger.n_retries) == (3, 3, 2)


@pytest.mark.parametrize("attempts", [1, 2, 3, 10])
def test_attempts_are_bounded(attempts: int) -> None:
    origin = MemoryOrigin(*[transient(f"answer {number}") for number in range(1, 20)])
    got, _ = run(make(origin, attempts).list())
    assert isinstance(got, errors.OriginUnreachableError)
    assert f"listing memory://models failed {attempts} times, last: answer {attempts};" in str(got)
    assert origin.n_asked == attempts


def test_pauses_double_by_the_jitter_drawn() -> None:
    draws = iter([0.0, 0.5, 1.0])
    origin = MemoryOrigin(*[transient()] * 3)
    got, took_s = run(make(origin, 4, jitter=lambda: next(draws)).list())
    assert got == [FILE]
    assert took_s == pytest.approx(FIRST_PAUSE_S * (0.0 * 2 + 0.5 * 4 + 1.0 * 8))


def test_pause_has_a_longest() -> None:
    origin = MemoryOrigin(*[transient()] * 9)
    _, took_s = run(make(origin, 10).list())
    doubled = [FIRST_PAUSE_S * 2**attempt for attempt in range(1, 10)]
    assert took_s == pytest.approx(sum(min(pause, LONGEST_PAUSE_S) for pause in doubled))


def test_nothing_is_waited_after_the_last_attempt() -> None:
    assert run(make(MemoryOrigin(transient()), 1).list())[1] == 0.0


@pytest.mark.parametrize(
    "error",
    [
        errors.ModelNotFoundError("gone"),
        errors.AccessDeniedError("no"),
        errors.OriginChangedError("changed"),
        errors.OriginError("odd"),
        errors.ConfigError("wrong"),
    ],
)
def test_final_error_is_not_asked_again(error: errors.WeightcacheError) -> None:
    origin = MemoryOrigin(error)
    assert run(make(origin).list()) == (error, 0.0)
    assert origin.n_asked == 1


def test_g09_stalled_request_ends_at_the_deadline() -> None:
    origin = MemoryOrigin(STALL)
    got, took_s = run(make(origin, deadline=7.0).read_into(FILE, 0, [memoryview(bytearray(4))]))
    assert isinstance(got, errors.DeadlineError)
    assert "bytes [0, 4) of memory://models/a/file: the time allowed for the load ran out" in str(got)
    assert (origin.n_asked, took_s) == (1, pytest.approx(7.0))


def test_g09_pause_is_not_waited_past_the_deadline() -> None:
    origin = MemoryOrigin(*[transient()] * 9)
    got, took_s = run(make(origin, 10, deadline=0.5).list())
    assert isinstance(got, errors.DeadlineError)
    assert (origin.n_asked, took_s) == (2, pytest.approx(0.5))


def test_g09_nothing_is_asked_after_the_deadline() -> None:
    origin = MemoryOrigin()
    got, took_s = run(make(origin, deadline=0.0).list())
    assert isinstance(got, errors.DeadlineError)
    assert (origin.n_asked, took_s) == (0, 0.0)


def test_no_deadline_lets_a_request_take_its_time() -> None:
    async def ask() -> Sequence[Stat]:
        asyncio.get_running_loop().call_later(1e6, release.set)
        return await Resilient(slow).list()

    release = asyncio.Event()

    class Slow(MemoryOrigin):
        async def _act(self) -> None:
            await release.wait()

    slow = Slow()
    assert run(ask()) == ([FILE], 1e6)


def test_views_are_filled_and_counted_once() -> None:
    first, second = bytearray(3), bytearray(5)
    resilient = make(MemoryOrigin(transient()))
    run(resilient.read_into(FILE, 10, [memoryview(first), memoryview(second)]))
    assert bytes(first + second) == CONTENT[10:18]
    assert (resilient.ledger.bytes_received, resilient.ledger.n_retries) == (8, 1)


def test_failed_read_counts_no_bytes() -> None:
    resilient = make(MemoryOrigin(*[transient()] * 3))
    run(resilient.read_into(FILE, 0, [memoryview(bytearray(3))]))
    assert resilient.ledger.bytes_received == 0


def test_requests_at_the_same_time_have_attempts_of_their_own() -> None:
    origin = MemoryOrigin(*[transient()] * 4)

    async def ask() -> list[Sequence[Stat]]:
        resilient = make(origin)
        return await asyncio.gather(*(resilient.list() for _ in range(2)))

    assert run(ask())[0] == [[FILE], [FILE]]


def test_close_and_uri_are_the_inner_ones() -> None:
    origin = MemoryOrigin()
    resilient = make(origin)
    run(resilient.close())
    assert (origin.closed, resilient.uri) == (True, "memory://models")


def test_jitter_is_random_by_default() -> None:
    async def ask() -> Sequence[Stat]:
        return await Resilient(MemoryOrigin(transient())).list()

    assert len({run(ask())[1] for _ in range(5)}) == 5
