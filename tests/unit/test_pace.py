"""How fast an origin is asked: a rate that is kept, and a number of ranges that is found, on a clock that tests turn."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import TypeVar

import pytest
from turned_clock import run

from weightcache.origins.pace import EPOCH_S, GROWTH, LEAST, N_HELD, REST_S, START, Pace, Throttle, loop_time, throttle

T = TypeVar("T")
MIB = 1 << 20
TICK_S = 0.01


def given(work: Callable[[], Awaitable[T]]) -> T:
    """Return what a coroutine gives on a clock of its own."""

    async def worked() -> T:
        return await work()

    got, _ = run(worked())
    assert not isinstance(got, BaseException), got
    return got


# -- bytes a second


def test_no_limit_never_rests() -> None:
    limit = Throttle(0, lambda: 0.0)
    assert [limit.pause_s(1 << 40) for _ in range(3)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("piece_nbytes", [1, 1460, 1 << 20])
def test_a_rate_is_kept_over_many_pieces(piece_nbytes: int) -> None:
    now_s, n_pieces, rate = 0.0, 1000, 10_000
    limit = Throttle(rate, lambda: now_s)
    for _ in range(n_pieces):
        now_s += limit.pause_s(piece_nbytes)
    assert now_s == pytest.approx(n_pieces * piece_nbytes / rate)


def test_connections_share_a_rate() -> None:
    limit = Throttle(1000, loop_time)

    async def take() -> None:
        for _ in range(10):
            await asyncio.sleep(limit.pause_s(50))

    async def take_together() -> None:
        await asyncio.gather(*(take() for _ in range(8)))

    assert run(take_together())[1] == pytest.approx(8 * 10 * 50 / 1000)


def test_time_without_bytes_is_not_saved_up() -> None:
    now_s = 0.0
    limit = Throttle(1000, lambda: now_s)
    assert limit.pause_s(500) == pytest.approx(0.5)
    now_s = 3600.0
    assert limit.pause_s(500) == pytest.approx(0.5)
    assert limit.pause_s(0) == pytest.approx(0.5)  # of another connection


def test_a_process_has_one_throttle_for_a_rate() -> None:
    assert throttle(12_345) is throttle(12_345)
    assert throttle(12_345) is not throttle(12_346)


# -- ranges at the same time


class Link:
    """A link that carries `capacity` bytes a second, and each range `per_range` of them at most, shared evenly."""

    def __init__(self, per_range: float, capacity: float) -> None:
        self.per_range = per_range
        self.capacity = capacity
        self.received_bytes = 0
        self.n_most = 0
        self._under_way: dict[asyncio.Future[None], float] = {}

    async def carry(self, nbytes: int) -> None:
        """Bring a range."""
        done = asyncio.get_running_loop().create_future()
        self._under_way[done] = nbytes
        self.n_most = max(self.n_most, len(self._under_way))
        try:
            await done
        finally:
            self._under_way.pop(done, None)

    async def serve(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self._under_way:
                share = TICK_S * min(self.per_range, self.capacity / len(self._under_way))
                for done, left in list(self._under_way.items()):
                    self.received_bytes += int(min(left, share))
                    self._under_way[done] = left - share
                    if left <= share and not done.done():
                        done.set_result(None)


async def load_for(seconds: float, link: Link, pace: Pace, n_ranges: int = 128) -> list[int]:
    """Ask a link for ranges for a while, as many at a time as the pace lets; return the level at each tick."""
    draw = random.Random(11)

    async def ask() -> None:
        while True:
            async with pace.slot():
                await link.carry(draw.randrange(MIB, 3 * MIB))

    tasks: list[asyncio.Task[None]] = [
        asyncio.create_task(each) for each in (link.serve(), *(ask() for _ in range(n_ranges)))
    ]
    levels = []
    for _ in range(int(seconds / TICK_S)):
        await asyncio.sleep(TICK_S)
        levels.append(pace.level)
    await end(tasks)
    return levels


def typical(levels: list[int]) -> int:
    return sorted(levels)[len(levels) // 2]


@pytest.mark.parametrize("n_best", [4, 16, 24, 40, 100, 300])
def test_the_level_ends_near_what_fills_the_link(n_best: int) -> None:
    per_range, most = 10.0 * MIB, 128
    link = Link(per_range, per_range * n_best)

    async def measure() -> tuple[int, float]:
        pace = Pace(most, lambda: link.received_bytes)
        await load_for(30.0, link, pace)
        before = link.received_bytes
        levels = await load_for(20.0, link, pace)
        return typical(levels), (link.received_bytes - before) / 20.0

    level, rate = given(measure)
    wanted = min(most, max(START, n_best))
    assert wanted / 1.1 <= level <= min(most, wanted * GROWTH * 1.1)
    assert rate >= 0.9 * per_range * min(n_best, most)
    assert link.n_most <= most


def test_it_grows_by_half_while_that_brings_more_and_goes_back_when_it_does_not() -> None:
    link = Link(10.0 * MIB, 10.0 * MIB * 30)
    levels = given(lambda: load_for(5.0, link, Pace(512, lambda: link.received_bytes)))
    steps = [now for before, now in pairwise(levels) if now != before]
    assert (levels[0], steps[:4]) == (START, [25, 38, 58, 38])


def test_a_level_is_held_for_some_epochs_and_more_is_tried_again() -> None:
    link = Link(10.0 * MIB, 10.0 * MIB * START)
    levels = given(lambda: load_for(20.0, link, Pace(512, lambda: link.received_bytes)))
    tried = [at for at, (before, now) in enumerate(pairwise(levels)) if now > before]
    assert set(levels) == {START, int(START * GROWTH) + 1}
    assert len(tried) >= 3
    assert all(later - earlier >= N_HELD * EPOCH_S / TICK_S for earlier, later in pairwise(tried))


def test_a_link_that_becomes_free_is_used() -> None:
    link = Link(10.0 * MIB, 10.0 * MIB * START)

    async def measure() -> tuple[int, int]:
        pace = Pace(512, lambda: link.received_bytes)
        before = typical(await load_for(10.0, link, pace))
        link.capacity *= 4
        await load_for(30.0, link, pace)
        return before, typical(await load_for(10.0, link, pace))

    before, after = given(measure)
    assert before == START
    assert after >= 4 * START / 1.1


def test_a_link_that_others_take_is_asked_for_less() -> None:
    link = Link(10.0 * MIB, 10.0 * MIB * 40)

    async def measure() -> tuple[int, list[int]]:
        pace = Pace(512, lambda: link.received_bytes)
        await load_for(10.0, link, pace)
        before = pace.level
        link.capacity /= 10
        return before, (await load_for(30.0, link, pace))[int(15.0 / TICK_S) :]

    before, after = given(measure)
    assert before >= 40 / 1.1
    assert min(after) >= LEAST
    assert typical(after) < before


def test_a_loss_never_raises_the_level() -> None:
    link = Link(10.0 * MIB, 10.0 * MIB)

    async def measure() -> list[int]:
        pace = Pace(512, lambda: link.received_bytes)
        for _ in range(10):
            pace.throttled(None)
            await asyncio.sleep(REST_S)
        levels = await load_for(10.0, link, pace)
        link.capacity /= 3
        return levels + await load_for(10.0, link, pace)

    assert set(given(measure)) == {1, 2}


@pytest.mark.parametrize("most", [1, 3, START, 20])
def test_there_are_never_more_than_allowed(most: int) -> None:
    link = Link(10.0 * MIB, 1e15)
    levels = given(lambda: load_for(10.0, link, Pace(most, lambda: link.received_bytes)))
    assert (max(levels), link.n_most) == (most, most)


def test_the_lowest_level_is_left_again_by_short_ranges() -> None:
    link = Link(100.0 * MIB, 1e15)

    async def measure() -> int:
        pace = Pace(512, lambda: link.received_bytes)
        for _ in range(10):
            pace.throttled(None)
            await asyncio.sleep(REST_S)
        assert pace.level == 1
        await load_for(10.0, link, pace)
        return pace.level

    assert given(measure) > START


def test_an_origin_that_counts_no_bytes_is_asked_on() -> None:
    async def work() -> list[None]:
        pace = quiet_pace(3)
        return await asyncio.gather(*(hold(pace, EPOCH_S) for _ in range(50)))

    assert len(given(work)) == 50


def test_few_ranges_say_nothing_about_the_link() -> None:
    link = Link(10.0 * MIB, 1e15)
    levels = given(lambda: load_for(10.0, link, Pace(512, lambda: link.received_bytes), n_ranges=START))
    assert set(levels) == {START}


# -- an origin that asks for less


async def hold(pace: Pace, seconds: float, began: list[float] | None = None) -> None:
    async with pace.slot():
        if began is not None:
            began.append(loop_time())
        await asyncio.sleep(seconds)


def quiet_pace(most: int = 512) -> Pace:
    return Pace(most, lambda: 0)


def test_g14_the_level_is_halved_at_most_once_a_second() -> None:
    async def hear() -> list[int]:
        pace, levels = quiet_pace(), []
        for _ in range(20):
            pace.throttled(None)
            levels.append(pace.level)
            await asyncio.sleep(REST_S / 4)
        return levels

    assert given(hear) == [8] * 4 + [4] * 4 + [2] * 4 + [1] * 8


def test_g14_no_more_than_the_halved_level_are_let_in() -> None:
    async def work() -> list[float]:
        pace, began = quiet_pace(), []
        held = [asyncio.create_task(hold(pace, 1.0)) for _ in range(START)]
        await asyncio.sleep(0.5)
        pace.throttled(None)
        waiting = [asyncio.create_task(hold(pace, 1.0, began)) for _ in range(START)]
        await asyncio.gather(*held, *waiting)
        return began

    assert given(work) == pytest.approx([1.0] * 8 + [2.0] * 8)


def test_g14_retry_after_is_waited_out_by_those_in_line_and_those_who_come() -> None:
    async def work() -> list[float]:
        pace, began = quiet_pace(2), []
        held = [asyncio.create_task(hold(pace, 1.0)) for _ in range(2)]
        in_line = [asyncio.create_task(hold(pace, 0.5, began)) for _ in range(2)]
        await asyncio.sleep(0.5)
        pace.throttled(10.0)
        pace.throttled(3.0)  # does not shorten it
        late = [asyncio.create_task(hold(pace, 0.5, began)) for _ in range(2)]
        await asyncio.gather(*held, *in_line, *late)
        return began

    assert given(work) == pytest.approx([10.5, 11.0, 11.5, 12.0])


@pytest.mark.parametrize("retry_after_s", [None, 0.0])
def test_without_retry_after_nothing_is_waited_out(retry_after_s: float | None) -> None:
    async def work() -> list[float]:
        pace, began = quiet_pace(), []
        pace.throttled(retry_after_s)
        await hold(pace, 1.0, began)
        return began

    assert given(work) == [0.0]


def test_after_a_throttling_the_link_is_filled_again() -> None:
    link = Link(10.0 * MIB, 10.0 * MIB * 20)

    async def measure() -> tuple[int, list[int]]:
        pace = Pace(512, lambda: link.received_bytes)
        await load_for(5.0, link, pace)
        for _ in range(10):
            pace.throttled(None)
            await load_for(REST_S, link, pace, n_ranges=1)
        lowest = pace.level
        await load_for(30.0, link, pace)
        return lowest, await load_for(10.0, link, pace)

    lowest, levels = given(measure)
    assert lowest == 1
    assert 20 / 1.1 <= typical(levels) <= 20 * GROWTH * 1.1


# -- turns


def test_turns_come_in_order() -> None:
    async def work() -> list[int]:
        pace, order = quiet_pace(3), []

        async def take(number: int) -> None:
            async with pace.slot():
                order.append(number)
                await asyncio.sleep(draw.random())

        draw = random.Random(3)
        await asyncio.gather(*(take(number) for number in range(50)))
        return order

    assert given(work) == list(range(50))


async def count_slots(pace: Pace) -> int:
    """Return how many slots can be held at the same time."""
    began: list[float] = []
    tasks = [asyncio.create_task(hold(pace, 1.0, began)) for _ in range(2 * pace.most)]
    await asyncio.sleep(0.5)
    n_held = len(began)
    await end(tasks)
    return n_held


async def end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [each for each in ended if each and not isinstance(each, asyncio.CancelledError)] == []


def test_who_leaves_while_holding_leaves_the_slot() -> None:
    async def work() -> int:
        pace = quiet_pace(4)
        tasks = [asyncio.create_task(hold(pace, 10.0)) for _ in range(4)]
        await asyncio.sleep(1.0)
        await end(tasks)
        return await count_slots(pace)

    assert given(work) == 4


def test_who_leaves_the_line_takes_no_slot_along() -> None:
    async def work() -> int:
        pace = quiet_pace(4)
        tasks = [asyncio.create_task(hold(pace, 10.0)) for _ in range(12)]
        await asyncio.sleep(1.0)
        await end(tasks[4:10])
        await end([*tasks[:4], *tasks[10:]])
        return await count_slots(pace)

    assert given(work) == 4


def test_who_leaves_at_the_moment_of_being_let_in_gives_the_slot_to_the_next() -> None:
    async def work() -> tuple[list[float], int]:
        pace, began = quiet_pace(1), []
        async with pace.slot():
            second, third = (asyncio.create_task(hold(pace, 1.0, began)) for _ in range(2))
            await asyncio.sleep(1.0)
        second.cancel()  # let in, and not awake yet
        await third
        assert second.cancelled()
        return began, await count_slots(pace)

    assert given(work) == ([1.0], 1)


def test_who_leaves_while_waiting_out_retry_after_takes_no_slot_along() -> None:
    async def work() -> int:
        pace = quiet_pace(4)
        pace.throttled(5.0)
        tasks = [asyncio.create_task(hold(pace, 10.0)) for _ in range(8)]
        await asyncio.sleep(1.0)
        await end(tasks)
        await asyncio.sleep(5.0)
        return await count_slots(pace)

    assert given(work) == 2  # halved


def test_a_failure_leaves_the_slot() -> None:
    async def work() -> int:
        pace = quiet_pace(2)
        for _ in range(5):
            with suppress(ZeroDivisionError):
                async with pace.slot():
                    raise ZeroDivisionError
        return await count_slots(pace)

    assert given(work) == 2
