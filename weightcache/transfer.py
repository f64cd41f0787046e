"""Own the motion: carries a plan out, from the disk tier or the origin into host memory, and disk written behind.

Never shows a chunk before it is verified, and never waits for the disk unless another process already writes there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import errno
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from weightcache.behind import Behind
from weightcache.digest import Digest, checksum
from weightcache.errors import IntegrityError, OfflineError
from weightcache.layout import ChunkKey
from weightcache.locks import STALE_S, Flight
from weightcache.manifest import Manifest
from weightcache.operations import Counters, Crew, HostPlace, Operations, Place
from weightcache.origins.base import Stat
from weightcache.origins.local import FileRange, LocalOrigin
from weightcache.origins.pace import Throttle, throttle
from weightcache.origins.resilient import Resilient
from weightcache.planning import Copy, Fetch, Plan, Read, coalesce
from weightcache.runtime import Runtime, ended
from weightcache.spans import Slices, Spans
from weightcache.tiers.disk import DiskTier, WantedChunk
from weightcache.tiers.host import SharedImage

log = logging.getLogger(__name__)
T = TypeVar("T")

IN_PLACE_NBYTES = 64 << 20  # of a file read in place, at most one operation
POLL_S = 0.02  # how soon a follower sees that its leader is done or dead; a lock attempt costs microseconds
PATIENCE_S = 30.0  # how long a follower waits for one chunk before it fetches it itself, and a prefetch to go on


class Destination(Protocol):
    """Where chunks go. All methods are called on worker threads, concurrently, for different chunks."""

    @property
    def batch_bytes(self) -> int:
        """Most bytes of chunks to read together: `place` takes memory for all of them first. 0 is no limit."""

    def place(self, key: ChunkKey) -> Place | None:
        """Return where the chunk goes at once when it is read on this node; `arrived` follows, or nothing does.

        None: it comes there by itself, with the image that it is taken from.
        """

    def claim(self, keys: Sequence[ChunkKey]) -> list[memoryview]:
        """Return host memory to fetch these chunks into and verify them, each view exactly as long as its chunk."""

    def accept(self, key: ChunkKey, view: memoryview, crew: Crew) -> None:
        """Bring a verified chunk from claimed memory to its place; `arrived` follows."""

    def arrived(self, key: ChunkKey) -> None:
        """Hear that the chunk lies in its place, verified."""


@dataclass(slots=True)
class Tally:
    """What a load's transfers did. What follows `counters` is written by writers, the rest on the loop thread."""

    origin_bytes: int = 0
    disk_bytes: int = 0
    host_bytes: int = 0
    followed_bytes: int = 0  # of the disk bytes: fetched by another process meanwhile
    n_rotten: int = 0
    counters: Counters = field(default_factory=Counters)
    spans: Spans = field(default_factory=Spans)
    stored_bytes: int = 0
    unstored_bytes: int = 0  # not kept on disk, which was slower than the origin
    disk_failure: str = ""
    _waiting_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_stored(self, nbytes: int) -> None:
        """Count bytes that a writer stored."""
        with self._lock:
            self.stored_bytes += nbytes

    def begin_write(self, nbytes: int, limit: int) -> bool:
        """Count bytes that wait to be written, unless they are more than `limit` together."""
        with self._lock:
            if self._waiting_bytes + nbytes > limit:
                self.unstored_bytes += nbytes
                return False
            self._waiting_bytes += nbytes
            return True

    def end_write(self, nbytes: int) -> None:
        with self._lock:
            self._waiting_bytes -= nbytes


@dataclass(slots=True)
class Keeping:
    """Where fetched chunks are kept: the disk tier, the record key of each shard, this load's flight and its writes.

    `waiting_bytes` bounds what may wait to be written, where the destination does not keep it anyway.
    """

    disk: DiskTier
    shard_keys: Sequence[str]
    flight: Flight
    behind: Behind
    waiting_bytes: int = 1 << 62


@dataclass
class Transfer:
    """One plan being carried out. Made for one use; `run` on the loop thread.

    Args:
        manifest: The revision.
        origin: Where missing chunks are fetched; None forbids fetching.
        local: The origin as a folder of this machine, when its files are read in place; no chunk is kept then.
        keeping: The disk tier and how it knows this model, or None to neither read nor write it.
        held: The image in host memory that the plan's copies come from, when they have arrived there.
        destination: Where chunks go.
        threads: This process's.
        crew: Who reads on this node, and the device.
        connections: Most fetches in flight; the origin's own pace decides how many of them.
        wait_for_disk: Let go of a fetched chunk's memory only when it is on disk, for destinations that are not kept.
        is_awaited: Whether somebody waits for it just now; else it asks the origin for nothing while others of this node do,
            and for no more than `background` allows.
    """

    manifest: Manifest
    origin: Resilient | None
    local: LocalOrigin | None
    keeping: Keeping | None
    held: SharedImage | None
    destination: Destination
    threads: Runtime
    crew: Crew
    connections: int
    wait_for_disk: bool = False
    tally: Tally = field(default_factory=Tally)
    is_awaited: Callable[[], bool] = lambda: True
    background: Throttle = field(default_factory=lambda: throttle(0))
    _names: dict[ChunkKey, str] = field(default_factory=dict)  # in flight, of chunks whose first leader was stopped

    async def run(self, plan: Plan) -> None:
        """Bring every chunk of the plan to the destination. Raises the first error, when all motion has stopped."""
        if plan.fetches and self.origin is None:
            raise OfflineError(
                f"{plan.origin_nbytes} bytes in {sum(len(step.keys) for step in plan.fetches)} chunks are not on this node, "
                "first of " + self.manifest.shards[plan.fetches[0].shard].path + ": load once without offline",
                missing_bytes=plan.origin_nbytes,
            )
        self._dialling = asyncio.Semaphore(self.connections)
        self._following = asyncio.Semaphore(self.connections)
        self._allowed = asyncio.Event()
        order = asyncio.create_task(self._keep_order(bool(plan.fetches)))
        try:
            async with asyncio.TaskGroup() as group:
                if plan.copies:
                    group.create_task(self._copy(plan.copies))
                if plan.reads:
                    group.create_task(self._read(plan.reads, group))
                if self.local is not None and plan.fetches:
                    group.create_task(self._read_in_place(plan.fetches))
                else:
                    for fetch in plan.fetches:
                        group.create_task(self._fetch(fetch))
        except BaseExceptionGroup as failures:
            raise first_of(failures) from None
        finally:
            order.cancel()
            await asyncio.wait([order])

    # -- from this node

    async def _copy(self, steps: Sequence[Copy]) -> None:
        """Copy chunks of an image in host memory, or let them count that lie in their places with it."""
        assert self.held is not None
        by_key = {step.key: step for step in steps}
        async for keys in self.held.arriving(by_key):
            here = [by_key[key] for key in keys]
            await self._on_worker(self._copy_together, here)
            self.tally.host_bytes += sum(step.nbytes for step in here)

    def _copy_together(self, steps: Sequence[Copy]) -> None:
        assert self.held is not None
        operations, slices, copied = Operations(), Slices(self.tally.spans, "host", "copy"), list[Copy]()
        for step in steps:
            place = self.destination.place(step.key)
            if place is None:
                self.destination.arrived(step.key)
            else:
                operations.copy(self.held.address + self.held.layout.chunks[step.key], step.nbytes, place)
                copied.append(step)
        if not copied:
            return

        def arrived(done: Sequence[int]) -> None:
            for index in done:
                self.destination.arrived(copied[index].key)
                slices.add(copied[index].nbytes)

        failure = operations.run(self.crew, arrived)
        if failure is not None:
            raise failure.as_error(f"chunk {copied[failure.index].key[1]} of an image in host memory")
        slices.end()

    async def _read(self, steps: Sequence[Read], group: asyncio.TaskGroup) -> None:
        """Read chunks of the disk tier, and fetch those that turn out lost or rotten."""
        for batch in _batches(steps, self.destination.batch_bytes):
            missed = await self._on_worker(self._read_batch, batch)
            self.tally.disk_bytes += sum(step.nbytes for step in batch) - sum(step.nbytes for step in missed)
            self.tally.n_rotten += len(missed)
            if missed and self.origin is None:
                raise OfflineError(
                    f"chunk {missed[0].digest} of {self.manifest.shards[missed[0].key[0]].path} was lost or rotten on disk "
                    "and cannot be fetched again offline: load once without offline",
                    digest=str(missed[0].digest),
                )
            for step in missed:
                group.create_task(self._heal(step))

    def _read_batch(self, steps: Sequence[Read]) -> list[Read]:
        """Read chunks together; returns those that were lost or rotten."""
        assert self.keeping is not None
        wanted = [WantedChunk(step.digest, step.nbytes, self._place(step.key)) for step in steps]
        slices = Slices(self.tally.spans, "disk", "read")

        def arrived(index: int) -> None:
            self.destination.arrived(steps[index].key)
            slices.add(steps[index].nbytes)

        missed = self.keeping.disk.read(wanted, self.crew, arrived)
        slices.end()
        return [steps[index] for index in missed]

    def _place(self, key: ChunkKey) -> Place:
        place = self.destination.place(key)
        assert place is not None, "what comes with an image is only ever copied"
        return place

    async def _heal(self, step: Read) -> None:
        async with self._turn():
            await self._fetch_led(coalesce(self.manifest, [step.key], 0)[0])

    async def _read_in_place(self, steps: Sequence[Fetch]) -> None:
        """Read files of this machine, which no digest is known of and which are not kept."""
        for batch in _batches(steps, self.destination.batch_bytes):
            await self._on_worker(self._read_files, batch)
            self.tally.origin_bytes += sum(step.nbytes for step in batch)

    def _read_files(self, steps: Sequence[Fetch]) -> None:
        assert self.local is not None
        ranges: list[FileRange] = []
        members: list[list[ChunkKey]] = []
        for key in (key for step in steps for key in step.keys):
            shard = self.manifest.shards[key[0]]
            chunk = shard.chunks[key[1]]
            each = FileRange(Stat(shard.path, shard.nbytes, shard.etag), chunk.start, chunk.nbytes, self._place(key))
            joined = _join(ranges[-1], each) if ranges else None
            if joined:
                ranges[-1] = joined
                members[-1].append(key)
            else:
                ranges.append(each)
                members.append([key])

        slices = Slices(self.tally.spans, "origin", "read in place")

        def arrived(done: Sequence[int]) -> None:
            for index in done:
                for key in members[index]:
                    self.destination.arrived(key)
                slices.add(ranges[index].nbytes)

        self.local.read(ranges, self.crew, arrived)
        slices.end()

    # -- from the origin

    async def _fetch(self, step: Fetch) -> None:
        """Fetch what no other process is fetching; wait for the rest to appear on disk."""
        if not self.is_awaited():
            await asyncio.sleep(self.background.pause_s(step.nbytes))
        async with self._turn():
            led = await self._on_worker(self._lead, step.keys)
            for part in coalesce(self.manifest, led, step.nbytes):
                await self._fetch_led(part)
        for key in step.keys:
            if key not in led:
                async with self._following:
                    await self._follow(key)

    async def _follow(self, key: ChunkKey) -> None:
        assert self.keeping is not None
        flight, name = self.keeping.flight, self._flight_name(key)
        stamp, n_same, began = b"", 0, time.perf_counter()
        for _ in range(int(PATIENCE_S / POLL_S)):
            if self._allowed.is_set() and flight.lead(name):
                self._names[key] = name
                break
            # Polls are counted, not seconds: when this process was stopped, too, its leader may be as alive as it is.
            last, stamp = stamp, flight.stamp(name)
            n_same = n_same + 1 if stamp == last else 0
            if n_same * POLL_S >= STALE_S:
                log.info("chunk %d of %s: the process that fetches it is stopped", key[1], self._path(key))
                name, n_same = f"{name}+", 0  # the first to take this name succeeds it, the others follow
            await asyncio.sleep(POLL_S)
        self.tally.spans.note("wait", self._path(key), began)
        digest = await self._on_worker(self._digest_on_disk, key)
        chunk = self.manifest.shards[key[0]].chunks[key[1]]
        if digest is not None and not await self._on_worker(self._read_batch, [Read(key, digest, chunk.nbytes)]):
            self.keeping.flight.land(self._flight_name(key))
            self.tally.disk_bytes += chunk.nbytes
            self.tally.followed_bytes += chunk.nbytes
        else:
            async with self._turn(is_led=True):
                await self._fetch_led(coalesce(self.manifest, [key], 0)[0])

    @asynccontextmanager
    async def _turn(self, *, is_led: bool = False) -> AsyncIterator[None]:
        """Hold one's turn at the origin for the length of the block.

        `is_led` says that others may follow already: who waits then, waits for those who wait for him.
        """
        assert self.origin is not None
        async with self._dialling:
            if not is_led and not self._allowed.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE_S):  # no wait_for: Python 3.11's may lose a cancellation
                        await self._allowed.wait()
            async with self.origin.slot():
                yield

    async def _keep_order(self, fetches: bool) -> None:
        """Come first as long as this runs, or if nobody waits for this transfer, watch whether others do."""
        if self.keeping is None or not fetches:
            self._allowed.set()
            return
        try:
            with contextlib.closing(self.keeping.disk.precedence()) as precedence:
                while not self.is_awaited():
                    if precedence.is_given():
                        self._allowed.set()
                    else:
                        self._allowed.clear()
                    await asyncio.sleep(POLL_S)
                self._allowed.set()
                while not precedence.take():
                    await asyncio.sleep(POLL_S)
                await asyncio.Event().wait()  # until cancelled
        except OSError as exc:
            log.warning("prefetches do not wait for loads: %s", exc)
            self._allowed.set()

    async def _fetch_led(self, step: Fetch) -> None:
        assert self.origin is not None
        shard = self.manifest.shards[step.shard]
        stat = Stat(shard.path, shard.nbytes, shard.etag)
        views = await self._on_worker(self.destination.claim, step.keys)
        began = time.perf_counter()
        await self.origin.read_into(stat, step.start, views)
        self.tally.spans.note("origin", shard.path, began, step.nbytes)
        self.tally.origin_bytes += step.nbytes
        log.debug("fetched [%d, %d) of %s", step.start, step.stop, shard.path)
        for key, view in zip(step.keys, views, strict=True):
            write = await self._accept_or_again(key, view, stat)
            if write is not None and self.wait_for_disk:
                await asyncio.wrap_future(write)

    async def _accept_or_again(
        self, key: ChunkKey, view: memoryview, stat: Stat
    ) -> concurrent.futures.Future[None] | None:
        """Accept a chunk that arrived, or one that is fetched once more where that may help."""
        assert self.origin is not None
        chunk = self.manifest.shards[key[0]].chunks[key[1]]
        while True:
            try:
                return await self._on_worker(self._accept, key, view)
            except IntegrityError:
                if not self.origin.discard(stat, chunk.start, chunk.nbytes):
                    raise
            log.warning("bytes [%d, %d) of %s came wrong and are fetched once more", chunk.start, chunk.stop, stat.path)
            began = time.perf_counter()
            await self.origin.read_into(stat, chunk.start, [view])
            self.tally.spans.note("origin", stat.path, began, chunk.nbytes)
            self.tally.origin_bytes += chunk.nbytes

    def _accept(self, key: ChunkKey, view: memoryview) -> concurrent.futures.Future[None] | None:
        """Verify a chunk that arrived and hand it on. Returns the write behind, if there is one."""
        shard = self.manifest.shards[key[0]]
        expected = shard.chunks[key[1]].digest
        if self.keeping is None and expected is None:
            self._hand_on(key, view)  # nothing is known of it and nothing is kept
            return None
        began = time.perf_counter()
        digest = Digest.of(view)
        self.tally.spans.note("verify", shard.path, began, len(view))
        if expected not in (None, digest):
            chunk = shard.chunks[key[1]]
            raise IntegrityError(
                f"bytes [{chunk.start}, {chunk.stop}) of {shard.path} have digest {digest}, expected {expected}: the "
                "origin's bytes changed without a new ETag, or were damaged on the way; if the origin is right, run "
                "weightcache evict for this model and load again",
                path=shard.path,
                start=chunk.start,
                stop=chunk.stop,
            )
        write = None
        if self.keeping is not None:
            if self.wait_for_disk or self.tally.begin_write(len(view), self.keeping.waiting_bytes):
                write = self.keeping.behind.submit(self._store, key, digest, checksum(view), view)
            else:
                self.keeping.flight.land(self._flight_name(key))
        self._hand_on(key, view)
        return write

    def _hand_on(self, key: ChunkKey, view: memoryview) -> None:
        began = time.perf_counter()
        self.destination.accept(key, view, self.crew)
        if self.crew.target is not None:
            self.tally.spans.note("device", self._path(key), began, len(view))
        self.destination.arrived(key)

    # -- to disk, behind

    def _store(self, key: ChunkKey, digest: Digest, expected: int, view: memoryview) -> None:
        assert self.keeping is not None
        disk, shard_key = self.keeping.disk, self.keeping.shard_keys[key[0]]
        try:
            if self.tally.disk_failure:
                return
            began = time.perf_counter()
            if disk.write(digest, expected, view):
                self.tally.spans.note("store", self._path(key), began, len(view))
                disk.learn(shard_key, key[1], digest)
                self.tally.add_stored(len(view))
                log.debug("stored chunk %s: %d bytes", digest, len(view))
            elif checksum(view) == expected:
                what = (
                    f"its budget of {disk.budget_bytes} bytes does not hold this model beside what is in use or pinned"
                )
                self._disk_failed(OSError(errno.ENOSPC, what))
        except OSError as exc:
            self._disk_failed(exc)
        finally:
            self.keeping.flight.land(self._flight_name(key))
            if not self.wait_for_disk:
                self.tally.end_write(len(view))

    # -- small steps

    def _lead(self, keys: Sequence[ChunkKey]) -> list[ChunkKey]:
        """Return the chunks that this transfer is to fetch: all without a disk tier, else those nobody else fetches."""
        if self.keeping is None:
            return list(keys)
        # A lock that is ours although the chunk is on disk stays ours until it is read: _follow takes it again.
        return [
            key
            for key in keys
            if self.keeping.flight.lead(self._flight_name(key)) and self._digest_on_disk(key) is None
        ]

    def _digest_on_disk(self, key: ChunkKey) -> Digest | None:
        assert self.keeping is not None
        disk = self.keeping.disk
        try:
            digest = self.manifest.shards[key[0]].chunks[key[1]].digest
            digest = digest or disk.learned(self.keeping.shard_keys[key[0]], [key[1]]).get(key[1])
            return digest if digest is not None and disk.look([digest]) else None
        except OSError as exc:
            self._disk_failed(exc)
            return None

    def _disk_failed(self, exc: OSError) -> None:
        """Warn once; the load goes on, slower."""
        assert self.keeping is not None
        if not self.tally.disk_failure:
            self.tally.disk_failure = f"{exc.strerror or exc}"
            log.warning(
                "the disk tier %s fails (%s): this load goes on without it",
                self.keeping.disk.root,
                self.tally.disk_failure,
            )

    def _path(self, key: ChunkKey) -> str:
        return self.manifest.shards[key[0]].path

    def _flight_name(self, key: ChunkKey) -> str:
        assert self.keeping is not None
        if key in self._names:
            return self._names[key]
        digest = self.manifest.shards[key[0]].chunks[key[1]].digest
        return digest.hex if digest else f"{self.keeping.shard_keys[key[0]]}:{key[1]}"

    async def _on_worker(self, work: Callable[..., T], *arguments: object) -> T:
        """Run a step on a worker thread. Cancelled, it is told to stop, and waited for: nothing moves afterwards."""
        future, outcome = self.threads.submit(work, *arguments)
        await ended(future, self.crew.stop.set)
        return outcome.pop()


Step = TypeVar("Step", Read, Fetch)


def _batches(steps: Sequence[Step], limit: int) -> Iterator[Sequence[Step]]:
    """Divide steps into groups of at most `limit` bytes, or of one; no limit is one group."""
    begin, nbytes = 0, 0
    for index, step in enumerate(steps):
        if limit and index > begin and nbytes + step.nbytes > limit:
            yield steps[begin:index]
            begin, nbytes = index, 0
        nbytes += step.nbytes
    if steps:
        yield steps[begin:]


def _join(one: FileRange, other: FileRange) -> FileRange | None:
    """Return two ranges as one where they touch in the file and in host memory, and are not too many bytes."""
    a, b = one.place, other.place
    if (
        isinstance(a, HostPlace)
        and isinstance(b, HostPlace)
        and (one.stat, one.start + one.nbytes, a.address + one.nbytes) == (other.stat, other.start, b.address)
        and one.nbytes + other.nbytes <= IN_PLACE_NBYTES
    ):
        return replace(one, nbytes=one.nbytes + other.nbytes)
    return None


def first_of(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that came first."""
    while isinstance(failures, BaseExceptionGroup):
        failures = failures.exceptions[0]  # type: ignore[assignment]
    return failures
