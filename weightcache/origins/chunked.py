"""Own the files of a published revision as an origin: each range is read from the registry's chunks.

Never reads a chunk's bytes for data before whoever asked has verified them: that is the transfer's, as everywhere.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from weightcache.errors import ModelNotFoundError, OriginChangedError, OriginError
from weightcache.ledger import Ledger
from weightcache.manifest import Chunk, Manifest
from weightcache.origins.base import Origin, Small, Stat
from weightcache.origins.replicas import CHUNKS, Replicas


class ChunkedOrigin:
    """A revision's files, as they lie in chunks below a registry's root.

    Args:
        root: The registry's root, closed with this.
    """

    def __init__(self, root: Origin) -> None:
        self.root = root
        self._chunks: dict[str, tuple[Chunk, ...]] = {}
        self._stats: list[Stat] = []

    def serve(self, manifest: Manifest) -> None:
        """Serve the files of this revision from now on."""
        self._chunks = {shard.path: shard.chunks for shard in manifest.shards}
        self._stats = [Stat(shard.path, shard.nbytes, shard.etag) for shard in manifest.shards]
        if isinstance(self.root, Replicas):
            self.root.nbytes = sum(shard.nbytes for shard in manifest.shards)

    @property
    def ledger(self) -> Ledger:
        return self.root.ledger

    @property
    def ledgers(self) -> Sequence[Ledger]:
        return self.root.ledgers

    @property
    def uri(self) -> str:
        return self.root.uri

    async def list(self) -> Sequence[Stat]:
        return self._stats

    async def get(self, name: str, limit_nbytes: int) -> Small:
        return await self.root.get(name, limit_nbytes)

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        """Fill the views; they lie within one chunk, as ranges of published models are planned."""
        chunk, place = self._chunk_at(stat, start)
        assert start + sum(map(len, views)) <= chunk.stop
        try:
            await self.root.read_into(place, start - chunk.start, views)
        except (ModelNotFoundError, OriginChangedError) as exc:
            raise OriginError(
                f"chunk {chunk.digest} of {stat.path} is missing or cut short in {self.uri}: run weightcache check on it",
                digest=str(chunk.digest),
                uri=self.uri,
            ) from exc

    def reject(self, stat: Stat, start: int) -> bool:
        """Hear that what was read of a file from `start` on is not what was published; see Replicas.reject."""
        chunk, place = self._chunk_at(stat, start)
        return self.reject_file(place.path, chunk.nbytes)

    def reject_file(self, name: str, nbytes: int) -> bool:
        """Hear that a file of the registry is not what its name says; see Replicas.reject."""
        return isinstance(self.root, Replicas) and self.root.reject(name, nbytes)

    def _chunk_at(self, stat: Stat, start: int) -> tuple[Chunk, Stat]:
        chunks = self._chunks[stat.path]
        chunk = chunks[bisect.bisect_right(chunks, start, key=lambda each: each.start) - 1]
        assert chunk.digest is not None
        return chunk, Stat(chunk_name(chunk.digest.hex), chunk.nbytes, "")

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        pass  # a chunk's name says what its bytes are

    def drop(self) -> None:
        self.root.drop()

    async def close(self) -> None:
        await self.root.close()


def chunk_name(hex_digits: str) -> str:
    """Return where a chunk lies below a registry's root."""
    return f"{CHUNKS}{hex_digits[:2]}/{hex_digits}"
