"""Replicas that slow down, fall silent or were slow from the first: how soon they are left, on a clock that tests turn."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from turned_clock import run

from weightcache import errors
from weightcache.ledger import Ledger
from weightcache.measurements import Measured
from weightcache.origins.base import Small, Stat
from weightcache.origins.pace import loop_time
from weightcache.origins.replicas import Member, Replicas
from weightcache.origins.resilient import Resilient

TICK_S = 0.02
RANGE = bytearray(16 << 20)
N_RANGES = 60  # 1 GB: 8 s from the nearest
SECOND_ALONE_S = 16.5
DEADLINE_S = 60.0
NEAR_BYTES_PER_S, MIDDLE_BYTES_PER_S, FAR_BYTES_PER_S = 125e6, 62.5e6, 25e6
LEFT_WITHIN_S = 3.0


@dataclass
class Region:
    """An origin in memory whose reads share a rate, which is reached bit by bit; `gave` says what it gave when.

    It has another rate from `changes_at` on.
    """

    latency_s: float
    bytes_per_s: float
    changes_at: float = 1e9
    then_bytes_per_s: float = 0.0
    reached_in_s: float = 0.1
    uri: str = "memory://registry"
    ledger: Ledger = field(default_factory=Ledger)
    gave: list[tuple[float, int]] = field(default_factory=list)
    _reads: set[object] = field(default_factory=set)

    @property
    def ledgers(self) -> Sequence[Ledger]:
        return [self.ledger]

    async def list(self) -> Sequence[Stat]:
        raise NotImplementedError

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        raise NotImplementedError

    async def get(self, name: str, limit_nbytes: int) -> Small:
        await asyncio.sleep(self.latency_s)
        return Small(b"{}", "")

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        await asyncio.sleep(2 * self.latency_s)
        nbytes, done, read = sum(map(len, views)), 0, object()
        self._reads.add(read)
        try:
            while done < nbytes:
                await asyncio.sleep(TICK_S)
                if read not in self._reads:
                    raise errors.TransientOriginError("left", is_left=True, received_bytes=done)
                rate = self.then_bytes_per_s if loop_time() >= self.changes_at else self.bytes_per_s
                rate *= min(1.0, loop_time() / self.reached_in_s)
                came = min(nbytes - done, int(rate * TICK_S / len(self._reads)))
                done += came
                self.ledger.received_bytes += came
                self.gave.append((loop_time(), came))
        finally:
            self._reads.discard(read)

    def drop(self) -> None:
        self._reads.clear()

    async def close(self) -> None:
        pass

    def bytes_after(self, since: float) -> int:
        return sum(nbytes for when, nbytes in self.gave if when > since)


def load(*regions: Region, known: Sequence[float] = ()) -> float:
    """Read all ranges from regions, of which rates may be known; return how long that took."""
    rates = list(known) or [None] * len(regions)
    members = [
        Member(f"region {number}", region, measured=Measured(None, rate))
        for number, (region, rate) in enumerate(zip(regions, rates, strict=True))
    ]

    async def read_all() -> None:
        replicas = Replicas("wc://regions", members, lambda verb, member: None)
        origin = Resilient(replicas, hedges=True, jitter=lambda: 1.0)

        async def read(number: int) -> None:
            async with origin.slot():
                await origin.read_into(Stat(f"chunks/{number}", len(RANGE), ""), 0, [memoryview(RANGE)])

        await origin.get("weightcache.json", 100)
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
            for number in range(N_RANGES):
                group.create_task(read(number))
        await origin.close()

    failure, took_s = run(read_all())
    assert failure is None
    return took_s


def others() -> tuple[Region, Region]:
    return Region(0.04, MIDDLE_BYTES_PER_S), Region(0.08, FAR_BYTES_PER_S)


def test_the_nearest_alone_is_read_while_it_is_as_fast_as_any() -> None:
    second, third = others()
    load(Region(0.02, NEAR_BYTES_PER_S), second, third)
    assert (second.gave, third.gave) == ([], [])


@pytest.mark.parametrize("changes_at", [0.0, 0.6, 4.0])
@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("known", [(), (NEAR_BYTES_PER_S, MIDDLE_BYTES_PER_S, FAR_BYTES_PER_S)])
def test_a_replica_that_gives_a_tenth_or_nothing_is_left_within_3_s(
    changes_at: float, share: float, known: Sequence[float]
) -> None:
    near = Region(0.02, NEAR_BYTES_PER_S, changes_at, share * NEAR_BYTES_PER_S)
    took_s = load(near, *others(), known=known)
    assert near.bytes_after(max(changes_at, 0.2) + LEFT_WITHIN_S) == 0  # before 0.2 s nothing comes
    assert took_s <= 1.5 * SECOND_ALONE_S


def test_a_replica_that_becomes_faster_is_not_left_for_one_that_nothing_is_known_of() -> None:
    third = Region(0.08, FAR_BYTES_PER_S)
    assert load(Region(0.02, MIDDLE_BYTES_PER_S, reached_in_s=2.0), third) <= SECOND_ALONE_S
    assert third.bytes_after(0.0) < N_RANGES / 4 * len(RANGE)
