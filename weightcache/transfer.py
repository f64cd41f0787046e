"""Own the motion: carries a plan out, from the disk tier or the origin into host memory, and disk written behind.

Never shows a chunk before it is verified, and never waits for the disk unless another process already writes there.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from weightcache.behind import Behind
from weightcache.digest import Digest, checksum
from weightcache.errors import IntegrityError, OfflineError
from weightcache.layout import ChunkKey
from weightcache.locks import Flight
from weightcache.manifest import Manifest
from weightcache.origins.base import Origin, Stat
from weightcache.planning import Fetch, Plan, Read, coalesce
from weightcache.runtime import Runtime
from weightcache.tiers.disk import DiskTier

log = logging.getLogger(__name__)
T = TypeVar("T")

READS_IN_FLIGHT = 8  # more than the workers, so that none waits for the loop; few, so that verifying is not queued
POLL_S = 0.02  # how soon a follower sees that its leader is done or dead; a lock attempt costs microseconds
PATIENCE_S = 30.0  # how long a follower waits for one chunk before it fetches it itself


class Destination(Protocol):
    """Memory that chunks arrive in."""

    def claim(self, keys: Sequence[ChunkKey]) -> list[memoryview]:
        """Return writable memory for these chunks, each view exactly as long as its chunk. Called on worker threads."""


@dataclass(slots=True)
class Tally:
    """What a transfer did. The last two are written by writers, the rest on the loop thread."""

    origin_bytes: int = 0
    disk_bytes: int = 0
    followed_bytes: int = 0  # of the disk bytes: fetched by another process meanwhile
    n_rotten: int = 0
    stored_bytes: int = 0
    disk_failure: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add_stored(self, nbytes: int) -> None:
        """Count bytes that a writer stored."""
        with self._lock:
            self.stored_bytes += nbytes


@dataclass(slots=True)
class Keeping:
    """Where fetched chunks are kept: the disk tier, the record key of each shard, this load's flight and its writes."""

    disk: DiskTier
    shard_keys: Sequence[str]
    flight: Flight
    behind: Behind


@dataclass
class Transfer:
    """One plan being carried out. Made for one use; `run` on the loop thread.

    Args:
        manifest: The revision.
        origin: Where missing chunks are fetched; None forbids fetching.
        keeping: The disk tier and how it knows this model, or None to neither read nor write it.
        destination: The memory.
        on_chunk: Called on a worker thread with each chunk once it is verified and in place.
        connections: Fetches in flight.
        wait_for_disk: Let go of a fetched chunk's memory only when it is on disk, for destinations that are not kept.
    """

    manifest: Manifest
    origin: Origin | None
    keeping: Keeping | None
    destination: Destination
    on_chunk: Callable[[ChunkKey, memoryview], None]
    threads: Runtime
    connections: int
    wait_for_disk: bool = False
    tally: Tally = field(default_factory=Tally)

    async def run(self, plan: Plan) -> None:
        """Bring every chunk of the plan to the destination. Raises the first error, when all motion has stopped."""
        if plan.fetches and self.origin is None:
            raise OfflineError(
                f"{plan.origin_nbytes} bytes in {sum(len(step.keys) for step in plan.fetches)} chunks are not on this node, "
                "first of " + self.manifest.shards[plan.fetches[0].shard].path + ": load once without offline",
                missing_bytes=plan.origin_nbytes,
            )
        self._dialling = asyncio.Semaphore(self.connections)
        self._reading = asyncio.Semaphore(READS_IN_FLIGHT)
        self._following = asyncio.Semaphore(self.connections)
        try:
            async with asyncio.TaskGroup() as group:
                for read in plan.reads:
                    group.create_task(self._read(read))
                for fetch in plan.fetches:
                    group.create_task(self._fetch(fetch))
        except BaseExceptionGroup as failures:
            raise _first(failures) from None

    # -- from disk

    async def _read(self, step: Read) -> None:
        async with self._reading:
            found = await self._on_worker(self._read_chunk, step.key, step.digest)
        if found:
            self.tally.disk_bytes += step.nbytes
            return
        self.tally.n_rotten += 1
        if self.origin is None:
            raise OfflineError(
                f"chunk {step.digest} of {self.manifest.shards[step.key[0]].path} was lost or rotten on disk and cannot "
                "be fetched again offline: load once without offline",
                digest=str(step.digest),
            )
        await self._fetch_led(coalesce(self.manifest, [step.key], 0)[0])

    def _read_chunk(self, key: ChunkKey, digest: Digest) -> bool:
        assert self.keeping is not None
        [view] = self.destination.claim([key])
        if not self.keeping.disk.read_into(digest, view):
            return False
        log.debug("read chunk %s: %d bytes", digest, len(view))
        self.on_chunk(key, view)
        return True

    # -- from the origin

    async def _fetch(self, step: Fetch) -> None:
        """Fetch what no other process is fetching; wait for the rest to appear on disk."""
        async with self._dialling:
            led = await self._on_worker(self._lead, step.keys)
            for part in coalesce(self.manifest, led, step.nbytes):
                await self._fetch_led(part)
        for key in step.keys:
            if key not in led:
                async with self._following:
                    await self._follow(key)

    async def _follow(self, key: ChunkKey) -> None:
        assert self.keeping is not None
        for _ in range(int(PATIENCE_S / POLL_S)):
            if self.keeping.flight.lead(self._flight_name(key)):
                break
            await asyncio.sleep(POLL_S)
        digest = await self._on_worker(self._digest_on_disk, key)
        chunk = self.manifest.shards[key[0]].chunks[key[1]]
        if digest is not None and await self._on_worker(self._read_chunk, key, digest):
            self.keeping.flight.land(self._flight_name(key))
            self.tally.disk_bytes += chunk.nbytes
            self.tally.followed_bytes += chunk.nbytes
        else:
            async with self._dialling:
                await self._fetch_led(coalesce(self.manifest, [key], 0)[0])

    async def _fetch_led(self, step: Fetch) -> None:
        assert self.origin is not None
        shard = self.manifest.shards[step.shard]
        stat = Stat(shard.path, shard.nbytes, shard.etag)
        views = await self._on_worker(self.destination.claim, step.keys)
        await self.origin.read_into(stat, step.start, views)
        self.tally.origin_bytes += step.nbytes
        log.debug("fetched [%d, %d) of %s", step.start, step.stop, shard.path)
        for key, view in zip(step.keys, views, strict=True):
            chunk = shard.chunks[key[1]]
            try:
                write = await self._on_worker(self._accept, key, view)
            except IntegrityError:
                log.warning(
                    "bytes [%d, %d) of %s came wrong and are fetched once more", chunk.start, chunk.stop, shard.path
                )
                await self.origin.read_into(stat, chunk.start, [view])
                self.tally.origin_bytes += chunk.nbytes
                write = await self._on_worker(self._accept, key, view)
            if write is not None and self.wait_for_disk:
                await asyncio.wrap_future(write)

    def _accept(self, key: ChunkKey, view: memoryview) -> concurrent.futures.Future[None] | None:
        """Verify a chunk that arrived and hand it on. Returns the write behind, if there is one."""
        shard = self.manifest.shards[key[0]]
        expected = shard.chunks[key[1]].digest
        if self.keeping is None and expected is None:
            self.on_chunk(key, view)  # a folder read in place: nothing is known of it and nothing is kept
            return None
        digest = Digest.of(view)
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
            write = self.keeping.behind.submit(self._store, key, digest, checksum(view), view)
        self.on_chunk(key, view)
        return write

    # -- to disk, behind

    def _store(self, key: ChunkKey, digest: Digest, expected: int, view: memoryview) -> None:
        assert self.keeping is not None
        disk, shard_key = self.keeping.disk, self.keeping.shard_keys[key[0]]
        try:
            if self.tally.disk_failure:
                return
            if disk.write(digest, expected, view):
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

    def _flight_name(self, key: ChunkKey) -> str:
        assert self.keeping is not None
        digest = self.manifest.shards[key[0]].chunks[key[1]].digest
        return digest.hex if digest else f"{self.keeping.shard_keys[key[0]]}:{key[1]}"

    async def _on_worker(self, work: Callable[..., T], *arguments: object) -> T:
        """Run a step on a worker thread."""
        outcome: list[T] = []
        # Not as the future's result: a future that a loop waited for is part of a cycle, and the views of memory it
        # held would keep a whole image until garbage is collected.
        await asyncio.get_running_loop().run_in_executor(self.threads.workers, lambda: outcome.append(work(*arguments)))
        return outcome.pop()


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    while isinstance(failures, BaseExceptionGroup):
        failures = failures.exceptions[0]  # type: ignore[assignment]
    return failures
