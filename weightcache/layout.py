"""Own the image's layout: where each chunk and each tensor of a model lies in one contiguous memory. Pure.

Never allocates; offsets are bytes from the image's start, which is at least 4 KiB-aligned.

Each chunk starts at a 4 KiB boundary, so that direct reads land in place. The pieces of a large tensor are whole
multiples of 4 KiB but for the last, so the tensor is contiguous. A small tensor packed at an offset that its dtype
does not like gets a place of its own at the end, filled by a copy once its chunk is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weightcache.dtypes import alignment_bytes
from weightcache.errors import FormatError
from weightcache.header import TensorEntry
from weightcache.manifest import Manifest, Shard

PAGE_NBYTES = 4096
COPY_ALIGNMENT_NBYTES = 64

ChunkKey = tuple[int, int]  # index of the shard in the manifest, index of the chunk in the shard


def pages(nbytes: int) -> int:
    """Round up to whole pages of 4 KiB."""
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor lies: `offset` bytes into the image; `copied_from` is where its bytes arrive, if elsewhere."""

    name: str
    entry: TensorEntry
    offset: int
    chunks: tuple[ChunkKey, ...]
    copied_from: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of all wanted chunks and tensors."""

    nbytes: int
    chunks: Mapping[ChunkKey, int]
    tensors: tuple[Placement, ...]


def lay_out(manifest: Manifest, wanted: Callable[[str], bool] = lambda name: True) -> Layout:
    """Lay out the tensors whose model-wide names are wanted, in file order.

    Raises:
        FormatError: Two tensors with one name, or a tensor over chunks that would not lie one after the other.
    """
    offsets: dict[ChunkKey, int] = {}
    placements: list[Placement] = []
    misplaced: list[int] = []  # indexes in placements
    owners: dict[str, str] = {}
    end = 0
    for shard_index, shard in enumerate(manifest.shards):
        chunk_of = _Cursor(shard)
        for entry in shard.tensors:
            name = shard.prefix + entry.name
            if name in owners:
                raise FormatError(
                    f"tensor {name!r} is in both {owners[name]} and {shard.path}: expected one place; remove one file "
                    "or name the folder of the wanted one",
                    tensor=name,
                )
            owners[name] = shard.path
            if not wanted(name):
                continue
            keys = tuple((shard_index, index) for index in chunk_of.covering(entry))
            for key in keys:
                if key not in offsets:
                    offsets[key] = end
                    end += pages(shard.chunks[key[1]].nbytes)
            if keys:
                offset = offsets[keys[0]] + entry.start - shard.chunks[keys[0][1]].start
            else:
                offset = 0  # no elements, no bytes
            if offset % alignment_bytes(entry.dtype):
                misplaced.append(len(placements))
            placements.append(Placement(name, entry, offset, keys))
    for index in misplaced:
        placed = placements[index]
        end = -(-end // COPY_ALIGNMENT_NBYTES) * COPY_ALIGNMENT_NBYTES
        placements[index] = Placement(placed.name, placed.entry, end, placed.chunks, copied_from=placed.offset)
        end += placed.entry.nbytes
    return Layout(end, offsets, tuple(placements))


class _Cursor:
    """Finds the chunks of tensors asked for in file order, in one pass over the shard."""

    def __init__(self, shard: Shard) -> None:
        self._path = shard.path
        self._chunks = shard.chunks
        self._at = 0

    def covering(self, entry: TensorEntry) -> range:
        if entry.nbytes == 0:
            return range(0)
        while self._chunks[self._at].stop <= entry.start:
            self._at += 1
        first = last = self._at
        while self._chunks[last].stop < entry.stop:
            if self._chunks[last].nbytes % PAGE_NBYTES:
                raise FormatError(
                    f"tensor {entry.name!r} of {self._path} goes on after a chunk of {self._chunks[last].nbytes} bytes, "
                    f"expected whole pages of {PAGE_NBYTES}: describe the model again",
                    tensor=entry.name,
                )
            last += 1
        return range(first, last + 1)
