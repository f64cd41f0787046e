"""Own the decision: from a manifest and what is where, the ordered moves that satisfy a load. Pure.

Never moves a byte and never asks anyone: everything it needs to know is handed in.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from weightcache.digest import Digest
from weightcache.layout import ChunkKey
from weightcache.manifest import Manifest, Role


@dataclass(frozen=True, slots=True)
class Copy:
    """One chunk from an image in host memory."""

    key: ChunkKey
    nbytes: int


@dataclass(frozen=True, slots=True)
class Read:
    """One chunk from the disk tier."""

    key: ChunkKey
    digest: Digest
    nbytes: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Adjacent chunks of one shard, asked of the origin as the range `[start, stop)` of its file."""

    shard: int
    start: int
    stop: int
    keys: tuple[ChunkKey, ...]

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """The ordered moves that satisfy a load: all copies, reads and fetches, each in file order, small files first."""

    copies: tuple[Copy, ...]
    reads: tuple[Read, ...]
    fetches: tuple[Fetch, ...]

    @property
    def host_nbytes(self) -> int:
        return sum(step.nbytes for step in self.copies)

    @property
    def disk_nbytes(self) -> int:
        return sum(step.nbytes for step in self.reads)

    @property
    def origin_nbytes(self) -> int:
        return sum(step.nbytes for step in self.fetches)


def make_plan(
    manifest: Manifest,
    keys: Iterable[ChunkKey],
    stored: Container[Digest],
    range_bytes: int,
    held: Container[ChunkKey] = (),
) -> Plan:
    """Decide where each chunk comes from.

    Args:
        manifest: The revision.
        keys: The chunks wanted, in any order.
        stored: Digests of the chunks the disk tier holds.
        range_bytes: Largest range of one fetch, unless a single chunk is larger.
        held: The chunks that an image in host memory holds.
    """
    copies: list[Copy] = []
    reads: list[Read] = []
    missing: list[ChunkKey] = []
    is_large = [shard.role is not Role.FILE for shard in manifest.shards]
    for key in sorted(keys, key=lambda key: (is_large[key[0]], key)):
        chunk = manifest.shards[key[0]].chunks[key[1]]
        if key in held:
            copies.append(Copy(key, chunk.nbytes))
        elif chunk.digest is not None and chunk.digest in stored:
            reads.append(Read(key, chunk.digest, chunk.nbytes))
        else:
            missing.append(key)
    return Plan(tuple(copies), tuple(reads), tuple(coalesce(manifest, missing, range_bytes)))


def coalesce(manifest: Manifest, keys: Iterable[ChunkKey], range_bytes: int) -> list[Fetch]:
    """Join adjacent chunks into ranges of at most `range_bytes`; `keys` are sorted."""
    fetches: list[Fetch] = []
    for key in keys:
        chunk = manifest.shards[key[0]].chunks[key[1]]
        last = fetches[-1] if fetches else None
        if last and last.shard == key[0] and last.stop == chunk.start and chunk.stop - last.start <= range_bytes:
            fetches[-1] = Fetch(last.shard, last.start, chunk.stop, (*last.keys, key))
        else:
            fetches.append(Fetch(key[0], chunk.start, chunk.stop, (key,)))
    return fetches
