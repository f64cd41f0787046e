"""Equal registries asked as one: who rests, who is tried again, who is left, whose bytes were wrong; on a turned clock."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from turned_clock import run

from weightcache import errors
from weightcache.digest import Digest
from weightcache.ledger import Ledger
from weightcache.manifest import Chunk, Manifest, Role, Shard
from weightcache.measurements import Measured
from weightcache.origins.base import PIECE_NBYTES, Small, Stat
from weightcache.origins.chunked import ChunkedOrigin
from weightcache.origins.connection import ClosedIdleError
from weightcache.origins.replicas import (
    FIRST_REST_S,
    LEAST_UNDER_WAY,
    LONGEST_REST_S,
    N_FAILURES,
    PROBE_S,
    SLOW_FOR_S,
    Member,
    Replicas,
)
from weightcache.origins.resilient import LEAST_JUDGED, Resilient
from weightcache.policy import Verb
from weightcache.published import publish_form
from weightcache.registry import Registry

CONTENT = random.Random(7).randbytes(4 * PIECE_NBYTES)
CHUNK = Stat("chunks/aa/1", len(CONTENT), "")
TAG = "models/llama/tags/v1.json"
HANGS = "hangs"


class Shelf:
    """A registry in memory that does as its script says: an error to raise, HANGS, a function of the views, or None.

    It gives `bytes_per_s` to each read, a tenth of a second's worth at a time, and its first byte after `latency_s`.
    """

    def __init__(self, name: str, *script: Any, latency_s: float = 0.01, bytes_per_s: float = 1e12) -> None:
        self.name = self.uri = name
        self.script = list(script)
        self.latency_s = latency_s
        self.bytes_per_s = bytes_per_s
        self.content = CONTENT
        self.asked: list[str] = []
        self.is_closed = False
        self.ledger = Ledger(name)
        self.ledgers = [self.ledger]
        self._left = asyncio.Event()

    async def list(self) -> Sequence[Stat]:
        await self._act("")
        return [CHUNK]

    async def get(self, name: str, limit_nbytes: int) -> Small:
        await self._act(name)
        self.ledger.received_bytes += 2
        return Small(b"{}", "1")

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        step = await self._act(stat.path)
        at = start
        n_received = 0
        for view in views:
            for piece_start in range(0, len(view), piece := max(1, min(len(view), int(self.bytes_per_s / 10)))):
                part = view[piece_start : piece_start + piece]
                await self._wait(len(part) / self.bytes_per_s, n_received)
                part[:] = self.content[at : at + len(part)]
                at += len(part)
                n_received += len(part)
                self.ledger.received_bytes += len(part)
                if isinstance(step, int) and n_received >= step:
                    raise errors.TransientOriginError("it broke off", received_bytes=n_received)

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        pass

    def drop(self) -> None:
        self._left.set()
        self._left = asyncio.Event()

    async def close(self) -> None:
        self.is_closed = True

    async def _act(self, name: str) -> Any:
        self.asked.append(name)
        step = self.script.pop(0) if self.script else None
        await self._wait(1e9 if step == HANGS else self.latency_s, 0)
        if isinstance(step, Exception):
            raise step
        return step

    async def _wait(self, seconds: float, n_received: int) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._left.wait()
        except TimeoutError:
            return
        raise errors.TransientOriginError("left", is_left=True, received_bytes=n_received)


def failure(**facts: object) -> Exception:
    return errors.TransientOriginError("500", **facts)


def allow(verb: Verb, member: Member) -> None:
    pass


def replicas_of(*shelves: Shelf, authorize: Callable[[Verb, Member], object] = allow, **more: Any) -> Replicas:
    return Replicas("wc://prod", [Member(shelf.name, shelf) for shelf in shelves], authorize, **more)


async def read(origin: Any, stat: Stat = CHUNK) -> bytes:
    memory = bytearray(stat.nbytes)
    await origin.read_into(stat, 0, [memoryview(memory)])
    return bytes(memory)


def resilient_of(replicas: Replicas, **more: Any) -> tuple[Resilient, Stat]:
    """Return the replicas as a load reads them: one file, of one chunk."""
    chunk = Chunk(0, len(CONTENT), Digest.of(CONTENT), "raw", len(CONTENT))
    files = ChunkedOrigin(replicas)
    files.serve(Manifest.plain([Shard("file", len(CONTENT), "1", Role.FILE, (chunk,))]))
    return Resilient(files, jitter=lambda: 1.0, **more), Stat("file", len(CONTENT), "1")


# -- who rests


def test_a_member_rests_after_two_failures_in_a_row() -> None:
    member = Member("a", Shelf("a"))
    member.failed(100.0)
    member.succeeded()
    member.failed(101.0)
    assert member.is_healthy(101.0)
    member.failed(102.0)
    assert not member.is_healthy(102.0 + FIRST_REST_S - 0.01)
    assert member.is_healthy(102.0 + FIRST_REST_S)


def test_a_rest_doubles_with_each_trial_that_fails_up_to_the_longest_and_a_success_ends_that() -> None:
    member, now, rests = Member("a", Shelf("a")), 0.0, []
    member.failed(now, N_FAILURES - 1)
    for _ in range(8):
        member.failed(now)
        began = now
        while not member.is_healthy(now):
            now += 0.5
        rests.append(now - began)
    assert rests == [min(LONGEST_REST_S, FIRST_REST_S * 2**number) for number in range(8)]
    member.succeeded()
    member.failed(now, N_FAILURES)
    assert member.is_healthy(now + FIRST_REST_S)


def test_failures_of_requests_that_were_under_way_make_no_rest_longer() -> None:
    member = Member("a", Shelf("a"))
    for _ in range(16):
        member.failed(10.0)
    assert member.is_healthy(10.0 + FIRST_REST_S)


def test_after_a_rest_one_request_at_a_time_is_tried_until_one_succeeds() -> None:
    a, b = Shelf("a", failure(), failure()), Shelf("b")
    a.latency_s = 0.5

    async def work() -> list[int]:
        replicas = replicas_of(a, b)
        replicas.members[1].usd_per_gb = 1.0
        for _ in range(N_FAILURES):
            with pytest.raises(errors.TransientOriginError):
                await read(replicas)
        await asyncio.sleep(FIRST_REST_S)
        counts = []
        for _ in range(2):
            a.asked.clear()
            await asyncio.gather(*(read(replicas, Stat(f"chunks/{number}", 9, "")) for number in range(5)))
            counts.append(len(a.asked))
        await replicas.close()
        return counts

    assert run(work())[0] == [1, 5]


@pytest.mark.parametrize(
    "error",
    [
        errors.AccessDeniedError("403"),
        errors.OriginError("odd"),
        errors.FormatError("odd"),
        errors.ResidencyError("no"),
    ],
)
def test_a_member_that_refuses_is_out_for_the_load(error: errors.WeightcacheError) -> None:
    a, b = Shelf("a", error), Shelf("b")

    async def work() -> bytes:
        replicas = replicas_of(a, b)
        with pytest.raises(errors.TransientOriginError, match=f"a: {error}"):
            await read(replicas)
        await asyncio.sleep(2 * LONGEST_REST_S)
        return b"".join([await read(replicas) for _ in range(3)])

    assert run(work())[0] == 3 * CONTENT
    assert (len(a.asked), len(b.asked)) == (1, 3)


@pytest.mark.parametrize(
    "error",
    [errors.AccessDeniedError("403"), errors.OriginError("odd"), errors.ResidencyError("no"), errors.ConfigError("no")],
)
def test_where_nobody_else_is_left_a_refusal_is_told_as_it_is(error: errors.WeightcacheError) -> None:
    assert run(read(replicas_of(Shelf("a", error))))[0] is error


def test_a_closed_connection_and_a_member_that_was_left_are_no_failures() -> None:
    a = Shelf("a", *[ClosedIdleError("closed"), failure(is_left=True)] * N_FAILURES)

    async def work() -> bytes:
        replicas = replicas_of(a, Shelf("b"))
        for _ in range(2 * N_FAILURES):
            with pytest.raises(errors.TransientOriginError):
                await read(replicas)
        return await read(replicas)

    assert run(work())[0] == CONTENT
    assert len(a.asked) == 2 * N_FAILURES + 1


def test_one_that_rests_is_waited_for_where_the_others_refuse() -> None:
    a, b = Shelf("a", errors.AccessDeniedError("403")), Shelf("b", *[failure()] * 2)

    async def work() -> bytes:
        replicas = replicas_of(b, a)
        origin, stat = resilient_of(replicas, attempts=4)
        return await read(origin, stat)

    assert run(work())[0] == CONTENT


def test_a_signature_that_one_lacks_may_be_lacking_though_another_does_not_answer() -> None:
    gone = errors.ModelNotFoundError("404")
    a, b = Shelf("a", None, gone), Shelf("b", failure())

    async def work() -> object:
        replicas = replicas_of(a, b)
        await replicas.get("weightcache.json", 9)
        return await replicas.get("models/llama/signatures/1.json", 9)

    assert run(work())[0] is gone


def test_when_nobody_is_well_all_are_tried_in_turn() -> None:
    shelves = [Shelf(name, *[failure()] * 9) for name in "abc"]

    async def work() -> None:
        origin, stat = resilient_of(replicas_of(*shelves), attempts=9)
        await read(origin, stat)

    run(work())
    assert min(len(shelf.asked) for shelf in shelves) >= 5


# -- how it is tried again


def test_failures_at_others_use_up_no_attempt() -> None:
    a, b = Shelf("a", failure(), failure()), Shelf("b", failure(), failure())

    async def work() -> bytes:
        origin, stat = resilient_of(replicas_of(a, b), attempts=3)
        return await read(origin, stat)

    got, took_s = run(work())
    assert got == CONTENT
    assert 0.1 < took_s < 1.0  # one pause, when both rest


def test_one_that_asks_for_less_slows_nobody_down_where_another_answers() -> None:
    a, b = Shelf("a", *[failure(is_throttled=True, retry_after_s=3600.0)] * 2), Shelf("b")

    async def work() -> bytes:
        origin, stat = resilient_of(replicas_of(a, b))
        async with origin.slot():
            await read(origin, stat)
        async with origin.slot():
            return await read(origin, stat)

    got, took_s = run(work())
    assert got == CONTENT
    assert took_s < 1.0


# -- the probe


def test_a_member_that_hangs_is_waited_for_no_longer_than_it_takes_to_know() -> None:
    a, b = Shelf("a", HANGS), Shelf("b")

    async def work() -> str:
        replicas = replicas_of(a, b)
        await asyncio.gather(*(replicas.get(TAG, 9) for _ in range(3)))
        return replicas.reason

    reason, took_s = run(work())
    assert took_s == pytest.approx(PROBE_S / 2, abs=0.1)
    assert (a.asked, b.asked) == ([PROBED], [PROBED, TAG, TAG, TAG])
    assert str(reason).startswith("b of 2 allowed (b: 10 ms, ? MB/s")
    assert "a: 1000 ms, ? MB/s" in str(reason)
    assert "slow just now" in str(reason)


def test_a_late_answer_is_waited_for_where_the_others_fail() -> None:
    a, b = Shelf("a", failure()), Shelf("b", latency_s=0.8 * PROBE_S)

    async def work() -> str:
        replicas = replicas_of(a, b)
        await replicas.get(TAG, 9)
        return replicas.reason

    assert str(run(work())[0]).startswith("b of 2 allowed (b: 1600 ms, ? MB/s, ")
    assert (a.asked, b.asked) == ([PROBED], [PROBED, TAG])


def test_one_that_was_late_is_asked_where_no_other_answers() -> None:
    a, b = Shelf("a", *[failure()] * 99), Shelf("b", latency_s=2 * PROBE_S)

    async def work() -> Small:
        return await replicas_of(a, b).get(TAG, 9)

    assert run(work())[0] == Small(b"{}", "1")
    assert b.asked == [PROBED, TAG]


def test_a_probe_that_is_cancelled_measures_nothing() -> None:
    a, b = Shelf("a", HANGS), Shelf("b", HANGS)

    async def work() -> list[Measured]:
        replicas = replicas_of(a, b)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await replicas.get(TAG, 9)
        return [member.measured for member in replicas.members]

    assert run(work())[0] == [Measured(), Measured()]


def test_a_single_member_is_not_probed() -> None:
    a = Shelf("a")

    async def work() -> str:
        replicas = replicas_of(a)
        await replicas.get(TAG, 9)
        return replicas.reason

    assert str(run(work())[0]).startswith("a of 1 allowed")
    assert a.asked == [TAG]


def test_what_was_probed_is_not_asked_for_again() -> None:
    a, b = Shelf("a"), Shelf("b")

    async def work() -> list[Small]:
        replicas = replicas_of(a, b)
        return [await replicas.get(PROBED, 9) for _ in range(2)]

    assert run(work())[0] == [Small(b"{}", "1")] * 2
    assert (a.asked, b.asked) == ([PROBED] * 2, [PROBED])


def test_latency_is_that_of_a_small_file() -> None:
    a = Shelf("a", latency_s=0.05)

    async def work() -> list[float | None]:
        replicas = replicas_of(a)
        await replicas.get(PROBED, 9)
        a.latency_s = 3.0  # for its manifest is large
        await replicas.get("models/llama/revisions/1.json", 9)
        return [member.measured.latency_s for member in replicas.members]

    assert run(work())[0] == [pytest.approx(0.05)]


def test_a_setting_that_cannot_be_honoured_is_not_taken_for_a_replica_that_is_down() -> None:
    error = errors.ConfigError("no such profile")
    assert run(replicas_of(Shelf("a", error), Shelf("b")).get(TAG, 9))[0] is error


PROBED = "weightcache.json"

# -- who has become slow

MB = 1_000_000


async def load(replicas: Replicas, n_chunks: int, n_at_once: int, change: Callable[[], object] | None = None) -> float:
    """Read chunks as a load does; `change` something when a third is read. Returns how long the rest took."""
    origin, _ = resilient_of(replicas)
    turns = asyncio.Semaphore(n_at_once)
    loop = asyncio.get_running_loop()
    changed_at = loop.time()

    async def one(number: int) -> None:
        nonlocal changed_at
        async with turns:
            if change is not None and number == n_chunks // 3:
                change()
                changed_at = loop.time()
            chunk = Stat("file", len(CONTENT), "1")
            assert await read(origin, chunk) == CONTENT

    await asyncio.gather(*(one(number) for number in range(n_chunks)))
    return loop.time() - changed_at


def known(name: str, bytes_per_s: float | None, **more: Any) -> Member:
    """Return a member that is remembered to give so much, and gives it to LEAST_UNDER_WAY reads together."""
    shelf = Shelf(name, bytes_per_s=(bytes_per_s or MB) / LEAST_UNDER_WAY)
    return Member(name, shelf, measured=Measured(0.01, bytes_per_s), **more)


def test_a_member_that_has_become_slow_is_left_within_three_seconds() -> None:
    a, b = known("a", 4 * MB), known("b", 2 * MB)

    def change() -> None:
        a.origin.bytes_per_s /= 10  # type: ignore[attr-defined]

    async def work() -> tuple[int, float]:
        replicas = Replicas("wc://prod", [a, b], allow)
        spent_s = await load(replicas, 24, LEAST_UNDER_WAY, change)
        await replicas.close()
        return replicas.n_left, spent_s

    n_left, spent_s = run(work())[0]  # type: ignore[misc]
    assert n_left == 1
    alone_s = 16 * len(CONTENT) / (2 * MB)
    assert spent_s < alone_s + 3.0


def test_a_member_that_stalls_is_left_even_at_the_end_of_a_load() -> None:
    a, b = known("a", 4 * MB), known("b", 4 * MB)
    a.origin.script = [HANGS]  # type: ignore[attr-defined]

    async def work() -> bytes:
        replicas = Replicas("wc://prod", [a, b], allow)
        origin, stat = resilient_of(replicas)
        got = await read(origin, stat)
        await replicas.close()
        return got

    got, took_s = run(work())
    assert got == CONTENT
    assert took_s < 3.0


def test_nobody_is_left_at_the_end_of_a_load_when_few_reads_are_under_way() -> None:
    a, b = known("a", 100 * MB), known("b", 100 * MB)
    a.origin.bytes_per_s = MB / 10  # type: ignore[attr-defined]

    async def work() -> tuple[int, Any]:
        replicas = Replicas("wc://prod", [a, b], allow)
        await load(replicas, LEAST_UNDER_WAY - 1, LEAST_UNDER_WAY)
        await replicas.close()
        return replicas.n_left, b.origin

    n_left, other = run(work())[0]  # type: ignore[misc]
    assert (n_left, other.asked) == (0, [])


@pytest.mark.parametrize("most_bytes_per_s", [MB // 2, 0])
def test_nobody_is_left_because_of_this_process_own_limit(most_bytes_per_s: int) -> None:
    a, b = known("a", 4 * MB), known("b", 4 * MB)
    a.origin.bytes_per_s = b.origin.bytes_per_s = MB / 2 / LEAST_UNDER_WAY  # type: ignore[attr-defined]

    async def work() -> int:
        replicas = Replicas("wc://prod", [a, b], allow, most_bytes_per_s=most_bytes_per_s)
        await load(replicas, 8, LEAST_UNDER_WAY)
        await replicas.close()
        return replicas.n_left

    assert (run(work())[0] == 0) == bool(most_bytes_per_s)


def test_who_shows_no_bytes_on_their_way_is_not_thought_slow() -> None:
    a, b = known("a", 4 * MB, is_watched=False), known("b", 4 * MB)
    a.origin.bytes_per_s = MB / 100  # type: ignore[attr-defined]

    async def work() -> int:
        replicas = Replicas("wc://prod", [a, b], allow)
        await load(replicas, 2 * LEAST_UNDER_WAY, LEAST_UNDER_WAY)
        await replicas.close()
        return replicas.n_left

    assert run(work())[0] == 0
    assert b.origin.asked == []  # type: ignore[attr-defined]


def test_one_that_was_left_is_asked_again_when_the_other_fails_and_first_after_a_while() -> None:
    a, b = known("a", 4 * MB), known("b", 2 * MB)

    async def work() -> list[str]:
        replicas = Replicas("wc://prod", [a, b], allow)
        a.left(asyncio.get_running_loop().time(), SLOW_FOR_S)
        firsts = [replicas._order()[0].name]
        b.failed(0.0, N_FAILURES)
        firsts.append(replicas._order()[0].name)
        await asyncio.sleep(SLOW_FOR_S)
        return [*firsts, replicas._order()[0].name]

    assert run(work())[0] == ["b", "a", "a"]


def test_one_that_was_never_measured_is_tried_where_much_is_left_to_read() -> None:
    a, b = known("a", MB), known("b", None)
    a.usd_per_gb, b.usd_per_gb = 0.0, 1.0
    a.measured = Measured(0.01, 125 * MB)
    b.origin.bytes_per_s = 10 * MB  # type: ignore[attr-defined]

    async def work() -> tuple[int, int]:
        replicas = Replicas("wc://prod", [a, b], allow)
        origin, stat = resilient_of(replicas)
        replicas.nbytes = 1000 * MB
        turns = asyncio.Semaphore(LEAST_UNDER_WAY)

        async def one() -> None:
            async with turns:
                await read(origin, stat)

        await asyncio.gather(*(one() for _ in range(60)))
        await replicas.close()
        return len(a.origin.asked), len(b.origin.asked)  # type: ignore[attr-defined]

    from_a, from_b = run(work())[0]  # type: ignore[misc]
    assert from_b > 2 * from_a


# -- what was measured


def test_what_a_load_gave_is_remembered_and_a_stall_is_no_rate() -> None:
    a, b = known("a", None), known("b", None)
    b.origin.script = [HANGS]  # type: ignore[attr-defined]

    async def work() -> None:
        for member in (a, b):
            replicas = Replicas("wc://prod", [member], allow)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5.0):
                    await read(replicas)
            await replicas.close()

    run(work())
    assert a.measured.bytes_per_s == pytest.approx(MB / LEAST_UNDER_WAY, rel=0.1)
    assert b.measured.bytes_per_s is None


# -- whose bytes were wrong


@pytest.mark.parametrize("error", [errors.ModelNotFoundError("404"), errors.OriginChangedError("416")])
def test_a_chunk_that_one_lacks_is_read_from_another_and_told_for_repair(error: errors.WeightcacheError) -> None:
    a, b = Shelf("a", error), Shelf("b")

    async def work() -> Replicas:
        replicas = replicas_of(a, b)
        origin, stat = resilient_of(replicas)
        assert await read(origin, stat) == CONTENT
        assert await read(origin, stat) == CONTENT
        return replicas

    replicas: Any = run(work())[0]
    place = a.asked[0]
    assert replicas.damage == {"a": [place]}
    assert (len(a.asked), len(b.asked)) == (1, 2)
    assert replicas.members[0].may_have("chunks/another")


def test_a_tag_that_one_lacks_is_read_from_another_and_no_damage() -> None:
    a, b = Shelf("a", None, errors.ModelNotFoundError("404")), Shelf("b")

    async def work() -> Replicas:
        replicas = replicas_of(a, b)
        await Resilient(replicas).get(TAG, 9)
        return replicas

    replicas: Any = run(work())[0]
    assert (replicas.damage, b.asked[-1]) == ({}, TAG)


@pytest.mark.parametrize("error", [errors.ModelNotFoundError("404"), errors.OriginChangedError("416")])
def test_a_chunk_that_all_lack_is_an_error_at_once(error: errors.WeightcacheError) -> None:
    shelves = [Shelf(name, error) for name in "abc"]

    async def work() -> None:
        origin, stat = resilient_of(replicas_of(*shelves))
        await read(origin, stat)

    got, took_s = run(work())
    assert isinstance(got, errors.OriginError)
    assert "is missing or cut short in wc://prod" in str(got)
    assert took_s < 0.1


def test_a_manifest_that_is_damaged_at_one_is_read_from_another() -> None:
    raw = publish_form([]).raw
    revision = Digest.of(raw)

    class Manifests(Shelf):
        async def get(self, name: str, limit_nbytes: int) -> Small:
            await super().get(name, limit_nbytes)
            return Small(raw if self.name == "b" else raw[:-1], "1")

    async def work() -> object:
        a, b, c = Manifests("a"), Manifests("b"), Manifests("c")
        assert (await Registry(resilient_of(replicas_of(a, b))[0]).revision("llama", revision)).raw == raw
        assert [len(shelf.asked) for shelf in (a, b)] == [2, 2]
        return await Registry(resilient_of(replicas_of(a, c))[0]).revision("llama", revision)

    assert isinstance(run(work())[0], errors.IntegrityError)


def rotten(name: str, *script: Any) -> Shelf:
    shelf = Shelf(name, *script)
    shelf.content = bytes(255 - byte for byte in CONTENT)
    return shelf


async def read_verified(replicas: Replicas) -> list[bool]:
    """Read a chunk as a transfer does, until it is right or reading it once more does not help. Returns what came."""
    origin, stat = resilient_of(replicas)
    came = []
    while True:
        came.append(await read(origin, stat) == CONTENT)
        if came[-1] or not origin.discard(stat, 0, stat.nbytes):
            await origin.close()
            return came


def test_rotten_chunks_are_read_from_one_after_another_and_told_for_repair() -> None:
    replicas = replicas_of(rotten("a"), rotten("b"), Shelf("c"))
    assert run(read_verified(replicas))[0] == [False, False, True]
    assert {name: len(paths) for name, paths in replicas.damage.items()} == {"a": 1, "b": 1}


def test_a_chunk_that_is_rotten_everywhere_is_read_once_from_each() -> None:
    shelves = [rotten("a"), rotten("b")]
    replicas = replicas_of(*shelves)
    assert run(read_verified(replicas))[0] == [False, False]
    assert [len(shelf.asked) for shelf in shelves] == [1, 1]


def test_a_single_member_is_asked_once_more_for_what_came_wrong() -> None:
    assert run(read_verified(replicas_of(rotten("a"))))[0] == [False, False]


@pytest.mark.parametrize("healthy_first", [False, True])
def test_who_gave_the_end_of_a_chunk_is_not_blamed_for_its_beginning(healthy_first: bool) -> None:
    breaks = PIECE_NBYTES + 1
    a = (Shelf if healthy_first else rotten)("a", breaks, failure())  # and rests
    b = rotten("b") if healthy_first else Shelf("b")
    a.bytes_per_s = 10 * breaks
    replicas = replicas_of(a, b)
    assert run(read_verified(replicas))[0] == ([False, False, True] if healthy_first else [False, True])
    assert set(replicas.damage) == ({"b"} if healthy_first else set())


def test_bytes_of_a_rotten_member_never_come_after_the_others_were_accepted() -> None:
    a, b = Shelf("a"), Shelf("b", bytes_per_s=4e6)

    async def work() -> tuple[bytes, bytes, int]:
        replicas = replicas_of(a, b)
        replicas.members[1].usd_per_gb = 1.0
        origin, stat = resilient_of(replicas, hedges=True)
        origin.used_bytes = 1 << 40  # enough to pay for what is asked beside
        for _ in range(LEAST_JUDGED):
            await read(origin, stat)
        a.content, a.bytes_per_s = bytes(len(CONTENT)), 1e6
        memory = bytearray(len(CONTENT))
        await origin.read_into(stat, 0, [memoryview(memory)])
        at_once = bytes(memory)
        await asyncio.sleep(60.0)
        return at_once, bytes(memory), origin.ledger.n_hedges + sum(each.n_hedges for each in origin.ledgers)

    at_once, later, n_hedges = run(work())[0]  # type: ignore[misc]
    assert n_hedges
    assert at_once == later


# -- whom policy lets ask


def test_every_request_is_allowed_before_it_is_made_and_its_reason_told() -> None:
    told: list[tuple[str, str]] = []
    a, b = Shelf("a"), Shelf("b")

    def authorize(verb: Verb, member: Member) -> None:
        assert len(member.origin.asked) == sum(name == member.name for _, name in told)  # type: ignore[attr-defined]
        told.append((str(verb), member.name))

    async def work() -> None:
        replicas = replicas_of(a, b, authorize=authorize)
        await replicas.get(TAG, 9)
        await read(replicas)
        replicas.members[0].refused()
        await read(replicas)
        await replicas.list()
        views = [memoryview(bytearray(9))]
        await asyncio.gather(*(replicas.read_into(CHUNK, 0, views) for _ in range(2)))
        await replicas.close()

    run(work())
    beside = [("fail-over", "b"), ("hedge", "b")]
    assert told == [
        ("probe", "a"),
        ("probe", "b"),
        ("read", "a"),
        ("read", "a"),
        ("fail-over", "b"),
        ("fail-over", "b"),
        *beside,
    ]


@pytest.mark.parametrize("verb", [Verb.PROBE, Verb.READ, Verb.FAIL_OVER])
def test_who_must_not_be_asked_is_not(verb: Verb) -> None:
    a, b = Shelf("a", *[failure()] * 9), Shelf("b")

    def authorize(asked: Verb, member: Member) -> None:
        if asked is verb and (member.name == "b" or verb is Verb.READ):
            raise errors.ResidencyError("no")

    async def work() -> None:
        replicas = replicas_of(a, b, authorize=authorize)
        if verb is Verb.FAIL_OVER:
            replicas._first = replicas.members[0]
            replicas.members[0].refused()
        origin, stat = resilient_of(replicas)
        if verb is Verb.PROBE:
            await origin.get(TAG, 9)
        await read(origin, stat)

    got, _ = run(work())
    assert isinstance(got, (errors.ResidencyError, errors.OriginUnreachableError))
    assert verb is Verb.PROBE or isinstance(got, errors.ResidencyError)
    assert PROBED not in b.asked
    if verb is not Verb.PROBE:
        assert b.asked == []


def test_a_hedge_that_is_forbidden_leaves_the_read_alone() -> None:
    a, b = Shelf("a"), Shelf("b")

    def authorize(verb: Verb, member: Member) -> None:
        if verb is Verb.HEDGE:
            raise errors.ResidencyError("no")

    async def work() -> bytes:
        replicas = replicas_of(a, b, authorize=authorize)
        replicas.members[1].usd_per_gb = 1.0
        origin, stat = resilient_of(replicas, hedges=True)
        origin.used_bytes = 1 << 40
        for _ in range(LEAST_JUDGED):
            await read(origin, stat)
        a.latency_s = 0.9  # long enough for a hedge, too short to be left
        return await read(origin, stat)

    assert run(work())[0] == CONTENT
    assert b.asked == []


def test_members_that_a_new_policy_forbids_are_asked_no_more_but_counted_and_closed() -> None:
    shelves = [Shelf(name) for name in "abc"]
    forbidden: set[str] = set()

    def authorize(verb: Verb, member: Member) -> None:
        if member.name in forbidden:
            raise errors.ResidencyError(f"{member.name} is forbidden")

    async def work() -> list[str]:
        replicas = replicas_of(*shelves, authorize=authorize)
        await replicas.get(TAG, 9)
        reasons = [replicas.reason]
        forbidden.update("ab")
        replicas.restrict()
        assert await read(replicas) == CONTENT
        reasons.append(replicas.reason)
        forbidden.add("c")
        with pytest.raises(errors.ResidencyError, match="c is forbidden"):
            replicas.restrict()
        with pytest.raises(errors.ResidencyError, match="c is forbidden"):
            replicas.restrict()
        with pytest.raises(errors.ResidencyError, match="c is forbidden"):
            await read(replicas)
        assert [ledger.replica for ledger in replicas.ledgers] == ["c", "a", "b"]
        await replicas.close()
        return reasons

    first, then = run(work())[0]  # type: ignore[misc]
    assert first.startswith("a of 3 allowed")
    assert then.startswith("c of 1 allowed")
    assert all(shelf.is_closed for shelf in shelves)
    assert [shelf.asked for shelf in shelves[:2]] == [[PROBED, TAG], [PROBED]]


# -- what was received for nothing


def test_bytes_that_were_thrown_away_are_counted_as_wasted_where_they_came_from() -> None:
    replicas = replicas_of(rotten("a"), Shelf("b"))
    run(read_verified(replicas))
    assert {each.replica: each.wasted_bytes for each in replicas.ledgers} == {"a": len(CONTENT), "b": 0}


def test_a_break_wastes_what_came_after_the_last_whole_piece() -> None:
    a, b = Shelf("a", PIECE_NBYTES + 7, bytes_per_s=10 * (PIECE_NBYTES + 7)), Shelf("b")

    async def work() -> list[Ledger]:
        replicas = replicas_of(a, b)
        await replicas.get(TAG, 9)
        a.script = [PIECE_NBYTES + 7]
        origin, stat = resilient_of(replicas)
        assert await read(origin, stat) == CONTENT
        await origin.close()
        return list(replicas.ledgers)

    ledgers: Any = run(work())[0]
    assert {ledger.replica: ledger.wasted_bytes for ledger in ledgers} == {"a": 7, "b": 0}
    assert sum(ledger.received_bytes for ledger in ledgers) == len(CONTENT) + 7 + 3 * 2


def test_bytes_read_at_the_same_time_are_counted_once() -> None:
    a = Shelf("a")

    async def work() -> Ledger:
        replicas = replicas_of(a)
        await asyncio.gather(*(replicas.get(f"models/{number}", 9) for number in range(8)))
        member = replicas.members[0]
        assert member.used_bytes == a.ledger.received_bytes
        a.ledger.received_bytes += 100  # of answers that broke
        await replicas.close()
        return a.ledger

    assert run(work())[0].wasted_bytes == 100  # type: ignore[union-attr]
