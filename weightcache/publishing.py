"""Own publishing: a described model's chunks go to a registry, those that are missing there, then manifest, then tag.

Never shows a part: until the tag moves nobody is led to the new revision, and what a killed publisher uploaded is found
again by the next.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightcache.digest import Digest
from weightcache.errors import IntegrityError, ModelNotFoundError
from weightcache.manifest import CHUNK_LIMIT_NBYTES, Shard
from weightcache.origins.base import Stat
from weightcache.origins.resilient import Resilient
from weightcache.presence import Presence
from weightcache.published import Bundle, Published, publish_form
from weightcache.registry import WritableRegistry
from weightcache.residency import Policy
from weightcache.runtime import Runtime, all_of
from weightcache.tiers.host import allocate

N_UNDER_WAY = 16  # chunks read, hashed and written at the same time: 256 MiB of memory at most

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Publication:
    """What publishing did.

    Attributes:
        uri: The revision's tag, as it can be loaded.
        revision: Its digest.
        n_chunks, bytes: Of all chunks, each counted as often as files have it.
        uploaded_bytes: Of the chunks that were missing.
        saved_bytes: The rest: in the registry before, or twice in the model.
        copied_bytes: To other replicas.
        seconds: It took.
        warnings: What an operator should know.
    """

    uri: str
    revision: str = ""
    n_chunks: int = 0
    bytes: int = 0
    uploaded_bytes: int = 0
    copied_bytes: int = 0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    @property
    def saved_bytes(self) -> int:
        return self.bytes - self.uploaded_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "saved_bytes": self.saved_bytes}


@dataclass(frozen=True, slots=True)
class Source:
    """Files to publish: described shards, and the origin that reads them by the names in `names`, else by their own."""

    shards: Sequence[Shard]
    origin: Resilient
    names: Mapping[str, str] = field(default_factory=dict)


class Publisher:
    """Chunks and revisions on their way to a registry, on the loop thread: `run` once, or `bring` and `put` each revision.

    Args:
        registry: Where to.
        presence: This publisher's sign there, begun.
        threads: This process's.
        progress: Told (bytes done, bytes in all) on the loop thread.
    """

    def __init__(
        self,
        registry: WritableRegistry,
        presence: Presence,
        threads: Runtime,
        publication: Publication,
        progress: Progress | None,
    ) -> None:
        self._registry = registry
        self._presence = presence
        self._threads = threads
        self._publication = publication
        self._progress = progress
        self._known: set[Digest] = set()
        self._n_sweeps = -1
        self._listing = asyncio.Lock()
        self._uploading: dict[Digest, asyncio.Future[None]] = {}
        self._free: list[memoryview] = []
        self._turns = asyncio.Semaphore(N_UNDER_WAY)
        self._n_done = 0

    async def run(
        self,
        model: str,
        tag: str,
        sources: Sequence[Source],
        base: str = "",
        policy: Policy | None = None,
        bundles: Sequence[Bundle] = (),
    ) -> None:
        """Publish, and let the tag name it.

        Raises:
            ConflictError: Another moved the tag meanwhile; the revision is there, by its digest.
        """
        try:
            seen = await self._registry.tag(model, tag)
        except ModelNotFoundError:
            seen = None
        published = publish_form(await self.bring(sources), base, policy, bundles)
        await self.put(model, published)
        revision = published.manifest.revision
        if seen is None or seen.revision != revision:
            await self._registry.move_tag(model, tag, revision, seen)

    async def bring(self, sources: Sequence[Source]) -> list[Shard]:
        """See to it that all chunks are in the registry; return the shards with all digests."""
        self._publication.bytes += sum(shard.nbytes for source in sources for shard in source.shards)
        self._publication.n_chunks += sum(len(shard.chunks) for source in sources for shard in source.shards)
        return [shard for each in await all_of(map(self._bring, sources)) for shard in each]

    async def put(self, model: str, published: Published) -> None:
        """Write the manifest of a revision whose chunks were brought."""
        await self._presence.rely_on_revision(model, published.manifest.revision)
        self._presence.check_alive()
        await self._registry.put_revision(model, published)
        self._publication.revision = str(published.manifest.revision)

    async def hold(self, model: str, revision: Digest) -> None:
        """See to it that a revision that is there stays. Raises ModelNotFoundError."""
        await self._presence.rely_on_revision(model, revision)
        await self._registry.revision(model, revision)
        self._presence.check_alive()

    async def _bring(self, source: Source) -> list[Shard]:
        return await all_of(self._bring_shard(source, shard) for shard in source.shards)

    async def _bring_shard(self, source: Source, shard: Shard) -> Shard:
        digests = await all_of(self._bring_chunk(source, shard, index) for index in range(len(shard.chunks)))
        return shard.with_digests(dict(enumerate(digests)))

    async def _bring_chunk(self, source: Source, shard: Shard, index: int) -> Digest:
        """See to it that a chunk is in the registry; return its digest."""
        chunk = shard.chunks[index]
        async with self._turns:
            digest = chunk.digest
            if digest is None or not await self._has(digest):
                with self._memory() as memory:
                    view = memory[: chunk.nbytes]
                    stat = Stat(source.names.get(shard.path, shard.path), shard.nbytes, shard.etag)
                    while True:
                        await source.origin.read_into(stat, chunk.start, [view])
                        found = await self._threads.on_worker(Digest.of, view)
                        if digest in (None, found):
                            break
                        if not source.origin.discard(stat, chunk.start, chunk.nbytes):
                            raise IntegrityError(
                                f"bytes [{chunk.start}, {chunk.stop}) of {shard.path} have digest {found}, expected {digest}: "
                                "they were damaged where they come from",
                                path=shard.path,
                            )
                    digest = found
                    if not await self._has(digest):
                        await self._upload(digest, view)
            self._n_done += chunk.nbytes
            if self._progress is not None:
                self._progress(self._n_done, self._publication.bytes)
        return digest

    @contextlib.contextmanager
    def _memory(self) -> Iterator[memoryview]:
        """Lend memory for a chunk; what was used before is there already."""
        memory = self._free.pop() if self._free else memoryview(allocate(CHUNK_LIMIT_NBYTES))
        try:
            yield memory
        finally:
            self._free.append(memory)

    async def _has(self, digest: Digest) -> bool:
        """Tell whether a chunk is there, to stay."""
        await self._presence.rely_on(digest)
        async with self._listing:
            if self._n_sweeps != self._presence.n_sweeps:
                self._n_sweeps = self._presence.n_sweeps
                self._known = set(await self._registry.chunks())
        return digest in self._known

    async def _upload(self, digest: Digest, view: memoryview) -> None:
        """Write a chunk, unless the same one is being written."""
        if digest in self._uploading:
            await asyncio.shield(self._uploading[digest])
            return
        done = self._uploading[digest] = asyncio.get_running_loop().create_future()
        try:
            await self._registry.put_chunk(digest, view)
            self._known.add(digest)
            self._publication.uploaded_bytes += len(view)
        finally:
            done.set_result(None)
            del self._uploading[digest]
