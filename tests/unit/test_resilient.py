"""Retries: how often, after which pause, until when, and of what; on a clock that tests turn themselves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import pytest
from turned_clock import run

from weightcache import errors
from weightcache.ledger import Ledger
from weightcache.origins.base import Stat
from weightcache.origins.connection import ClosedIdleError
from weightcache.origins.resilient import (
    FIRST_PAUSE_S,
    HEDGE_AFTER,
    LEAST_JUDGED,
    LONGEST_PAUSE_S,
    LOOK_S,
    PIECE_NBYTES,
    RETRY_BUDGET,
    RETRY_FLOOR_NBYTES,
    THROTTLED_PAUSE_S,
    Resilient,
)

CONTENT = random.Random(7).randbytes(64 << 20)
FILE = Stat("a/file", len(CONTENT), "1")
STALL = "stall"


class MemoryOrigin:
    """An origin in memory that does as its script says: an error to raise, STALL, or None to answer."""

    uri = "memory://models"

    def __init__(self, *script: Exception | str | None) -> None:
        self.script = list(script)
        self.n_asked = 0
        self.closed = False
        self.ledger = Ledger()
        self.ledgers = [self.ledger]
        self.asked: list[tuple[int, int]] = []
        self.takes_s: list[float] = []

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
        self.asked.append((start, sum(len(view) for view in views)))
        await asyncio.sleep(self.takes_s.pop(0) if self.takes_s else 0.0)
        await self._act()
        for view in views:
            view[:] = CONTENT[start : start + len(view)]
            start += len(view)
            self.ledger.received_bytes += len(view)

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        pass

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
    assert (origin.n_asked, resilient.ledger.n_retries) == (3, 2)


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
    assert (resilient.used_bytes, resilient.ledger.n_retries) == (8, 1)


def test_failed_read_counts_no_bytes() -> None:
    resilient = make(MemoryOrigin(*[transient()] * 3))
    run(resilient.read_into(FILE, 0, [memoryview(bytearray(3))]))
    assert resilient.used_bytes == 0


def broken_off(received_bytes: int) -> Exception:
    return errors.TransientOriginError("the body ended", received_bytes=received_bytes)


class HalfOrigin(MemoryOrigin):
    """Fills the views as far as it says before it raises."""

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        step = self.script[0] if self.script else None
        if isinstance(step, errors.TransientOriginError):
            left = int(step.facts.get("received_bytes", 0))  # type: ignore[call-overload]
            self.ledger.received_bytes += left
            at = start
            for view in views:
                n_filled = min(left, len(view))
                view[:n_filled] = CONTENT[at : at + n_filled]
                at, left = at + n_filled, left - n_filled
        await super().read_into(stat, start, views)


def test_g11_a_broken_body_goes_on_from_its_last_whole_piece() -> None:
    first, second = bytearray(3 * PIECE_NBYTES), bytearray(2 * PIECE_NBYTES)
    origin = HalfOrigin(broken_off(PIECE_NBYTES * 3 // 2), broken_off(3 * PIECE_NBYTES), broken_off(7))
    resilient = make(origin)
    assert run(resilient.read_into(FILE, 10, [memoryview(first), memoryview(second)]))[0] is None
    assert bytes(first + second) == CONTENT[10 : 10 + 5 * PIECE_NBYTES]
    assert [start for start, _ in origin.asked] == [10 + PIECE_NBYTES * whole for whole in (0, 1, 4, 4)]
    assert {start + nbytes for start, nbytes in origin.asked} == {10 + 5 * PIECE_NBYTES}
    run(resilient.close())
    assert resilient.ledger.wasted_bytes == PIECE_NBYTES // 2 + 7


def test_g14_a_body_that_breaks_off_before_a_piece_is_whole_has_three_attempts() -> None:
    origin = HalfOrigin(*[broken_off(PIECE_NBYTES - 1)] * 3)
    got, _ = run(make(origin).read_into(FILE, 0, [memoryview(bytearray(2 * PIECE_NBYTES))]))
    assert isinstance(got, errors.OriginUnreachableError)
    assert len(origin.asked) == 3


def test_g14_a_load_wastes_no_more_than_its_budget() -> None:
    origin = HalfOrigin()
    resilient = make(origin)
    for number in range(1000):  # noqa: B007
        origin.script = [broken_off(2 * PIECE_NBYTES - 1), None]
        got, _ = run(resilient.read_into(FILE, 0, [memoryview(bytearray(3 * PIECE_NBYTES))]))
        if got is not None:
            break
    assert "more than a load may waste" in str(got)
    spent = (number + 1) * (PIECE_NBYTES - 1)
    assert RETRY_BUDGET * resilient.used_bytes + RETRY_FLOOR_NBYTES < spent
    assert spent < RETRY_BUDGET * resilient.used_bytes + RETRY_FLOOR_NBYTES + PIECE_NBYTES


@pytest.mark.parametrize("attempts", [1, 3])
def test_one_kept_connection_that_was_closed_costs_no_attempt(attempts: int) -> None:
    origin = MemoryOrigin(ClosedIdleError("closed"))
    resilient = make(origin, attempts)
    assert run(resilient.list()) == ([FILE], 0.0)
    assert resilient.ledger.n_retries == 0
    origin = MemoryOrigin(*[ClosedIdleError("closed")] * 9)
    got, _ = run(make(origin, attempts).list())
    assert isinstance(got, errors.OriginUnreachableError)
    assert origin.n_asked == max(2, attempts)


def test_a_throttled_request_waits_longer_and_as_long_as_it_is_told() -> None:
    origin = MemoryOrigin(
        errors.TransientOriginError("503", is_throttled=True),
        errors.TransientOriginError("429", is_throttled=True, retry_after_s=3.0),
    )
    _, took_s = run(make(origin).list())
    assert took_s == pytest.approx(THROTTLED_PAUSE_S * 2 + THROTTLED_PAUSE_S * 4 + 3.0)


# -- beside


def read_in_turn(resilient: Resilient, n: int, nbytes: int = PIECE_NBYTES) -> tuple[object, float]:
    async def read() -> bytes:
        memory = bytearray()
        for number in range(n):
            piece = bytearray(nbytes)
            await resilient.read_into(FILE, number * nbytes, [memoryview(piece)])
            memory += piece
        return bytes(memory)

    return run(read())


def hedging(origin: MemoryOrigin, deadline: float | None = None) -> Resilient:
    return Resilient(origin, hedges=True, deadline=deadline, jitter=lambda: 1.0)


def test_a_range_that_takes_far_longer_than_others_is_asked_for_once_more() -> None:
    origin = MemoryOrigin()
    origin.takes_s = [1.0] * LEAST_JUDGED + [1e6, 1.0]
    resilient = hedging(origin)
    got, took_s = read_in_turn(resilient, LEAST_JUDGED + 1)
    assert got == CONTENT[: (LEAST_JUDGED + 1) * PIECE_NBYTES]
    assert took_s == pytest.approx(LEAST_JUDGED + HEDGE_AFTER + 1.0, abs=2 * LOOK_S)
    assert origin.asked[-1] == origin.asked[-2]
    assert (resilient.ledger.n_hedges, resilient.ledger.n_retries) == (1, 0)


def test_the_first_of_two_that_is_whole_is_taken() -> None:
    origin = MemoryOrigin()
    origin.takes_s = [1.0] * LEAST_JUDGED + [5.0, 100.0]
    got, took_s = read_in_turn(hedging(origin), LEAST_JUDGED + 1)
    assert got == CONTENT[: (LEAST_JUDGED + 1) * PIECE_NBYTES]
    assert took_s == pytest.approx(LEAST_JUDGED + 5.0)


def test_a_failure_of_one_of_two_waits_for_the_other() -> None:
    origin = MemoryOrigin(*[None] * LEAST_JUDGED, transient())
    origin.takes_s = [1.0] * LEAST_JUDGED + [1e6, 1.0, 1.0]
    resilient = hedging(origin, deadline=50.0)
    got, _ = read_in_turn(resilient, LEAST_JUDGED + 1)
    assert isinstance(got, errors.DeadlineError)
    origin = MemoryOrigin(*[None] * LEAST_JUDGED, transient())
    origin.takes_s = [1.0] * LEAST_JUDGED + [10.0, 1.0]
    resilient = hedging(origin)
    got, took_s = read_in_turn(resilient, LEAST_JUDGED + 1)
    assert got == CONTENT[: (LEAST_JUDGED + 1) * PIECE_NBYTES]
    assert (took_s, resilient.ledger.n_retries) == (pytest.approx(LEAST_JUDGED + 10.0), 0)


def test_g14_hedges_have_a_budget() -> None:
    origin = MemoryOrigin()
    nbytes = 1 << 20
    origin.takes_s = [1.0] * LEAST_JUDGED + [30.0, 30.0] * 9
    resilient = hedging(origin)
    assert read_in_turn(resilient, 7, nbytes)[0] == CONTENT[: 7 * nbytes]
    assert resilient.ledger.n_hedges == 1


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
