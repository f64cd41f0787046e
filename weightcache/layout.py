"""Own the layout: where each chunk and each tensor of a model lies in host memory, or in a device's. Pure.

Never allocates; offsets are bytes from the memory's start, which is at least 4 KiB-aligned in host memory and
256-byte-aligned on a device.

In host memory (`lay_out`) each chunk starts at a 4 KiB boundary, so that direct reads land in place. The pieces of a
large tensor are whole multiples of 4 KiB but for the last, so the tensor is contiguous. A small tensor packed at an
offset that its dtype does not like gets a place of its own at the end, filled by a copy once its chunk is there.

A folder that is read in place is laid out as its files are (`lay_out_in_place`): each chunk at its file's offset modulo
4 KiB, neighbours touching, so that direct reads of a file whose tensors start anywhere land in place too.

On a device (`pack`) only tensors lie, each at a 256-byte boundary, and neighbours whose sizes allow it touch, so that
they are copied together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from weightcache.dtypes import alignment_bytes
from weightcache.errors import FormatError
from weightcache.header import TensorEntry
from weightcache.manifest import Manifest, Shard

PAGE_NBYTES = 4096
COPY_ALIGNMENT_NBYTES = 64
DEVICE_ALIGNMENT_NBYTES = 256  # what CUDA's own allocator promises, and every kernel may rely on

ChunkKey = tuple[int, int]  # index of the shard in the manifest, index of the chunk in the shard


def pages(nbytes: int) -> int:
    """Round up to whole pages of 4 KiB."""
    return _round_up(nbytes, PAGE_NBYTES)


def _round_up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor that is wanted: its model-wide name, and the chunks that hold it."""

    name: str
    entry: TensorEntry
    chunks: tuple[ChunkKey, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor lies: `offset` bytes into the memory; `copied_from` is where its bytes arrive, if elsewhere."""

    name: str
    entry: TensorEntry
    offset: int
    chunks: tuple[ChunkKey, ...]
    copied_from: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of all wanted chunks and tensors. `padded`: up to its next 4 KiB boundary a chunk's place is its own."""

    nbytes: int
    chunks: Mapping[ChunkKey, int]
    tensors: tuple[Placement, ...]
    padded: bool = True


@dataclass(frozen=True, slots=True)
class Packing:
    """The places of all wanted tensors on a device; `spans` are each chunk's (from, to, nbytes), ascending."""

    nbytes: int
    spans: Mapping[ChunkKey, tuple[tuple[int, int, int], ...]]
    tensors: tuple[Placement, ...]


def want(manifest: Manifest, wanted: Callable[[str], bool] = lambda name: True) -> list[Wanted]:
    """Find the tensors whose model-wide names are wanted, in file order.

    Raises:
        FormatError: Two tensors with one name.
    """
    found: list[Wanted] = []
    owners: dict[str, str] = {}
    for shard_index, shard in enumerate(manifest.shards):
        cursor = _Cursor(shard_index, shard)
        for entry in shard.tensors:
            name = shard.prefix + entry.name
            if name in owners:
                raise FormatError(
                    f"tensor {name!r} is in both {owners[name]} and {shard.path}: expected one place; remove one file "
                    "or name the folder of the wanted one",
                    tensor=name,
                )
            owners[name] = shard.path
            if wanted(name):
                found.append(Wanted(name, entry, cursor.covering(entry)))
    return found


Order = Sequence[str] | Callable[[str], Any]
"""Names that come first, in this order; or a key, as `sorted` takes it, to sort all names by."""


def windows(tensors: Iterable[Wanted], limit: int, order: Order = ()) -> Iterator[list[Wanted]]:
    """Divide tensors into groups of about `limit` bytes, cut only where no chunk is in two of them.

    Args:
        tensors: In file order.
        limit: Bytes after which a group ends.
        order: Of the groups. Within a group tensors are in file order.
    """
    rank = order if callable(order) else _rank_in(order)
    in_file_order = list(enumerate(_together(tensors)))
    some_first = sorted(in_file_order, key=lambda some: min(rank(each.name) for each in some[1]))
    group: list[tuple[int, list[Wanted]]] = []
    nbytes = 0
    for some in some_first:
        if group and nbytes >= limit:
            yield [tensor for _, each in sorted(group, key=itemgetter(0)) for tensor in each]
            group, nbytes = [], 0
        group.append(some)
        nbytes += sum(tensor.entry.nbytes for tensor in some[1])
    if group:
        yield [tensor for _, each in sorted(group, key=itemgetter(0)) for tensor in each]


def _rank_in(names: Sequence[str]) -> Callable[[str], int]:
    ranks = {name: number for number, name in enumerate(names)}
    return lambda name: ranks.get(name, len(ranks))


def _together(tensors: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """Divide tensors in file order into the smallest groups that share no chunk."""
    group: list[Wanted] = []
    last = (-1, -1)
    for tensor in tensors:
        if group and tensor.chunks and tensor.chunks[0] > last:
            yield group
            group = []
        group.append(tensor)
        last = max((last, *tensor.chunks))
    if group:
        yield group


def lay_out(manifest: Manifest, tensors: Iterable[Wanted]) -> Layout:
    """Lay out tensors in host memory, in the order given.

    Raises:
        FormatError: A tensor over chunks that would not lie one after the other.
    """
    offsets: dict[ChunkKey, int] = {}
    end = 0
    tensors = list(tensors)
    for tensor in tensors:
        for key in tensor.chunks[:-1]:
            nbytes = manifest.shards[key[0]].chunks[key[1]].nbytes
            if nbytes % PAGE_NBYTES:
                raise FormatError(
                    f"tensor {tensor.name!r} of {manifest.shards[key[0]].path} goes on after a chunk of {nbytes} bytes, "
                    f"expected whole pages of {PAGE_NBYTES}: describe the model again",
                    tensor=tensor.name,
                )
        for key in tensor.chunks:
            if key not in offsets:
                offsets[key] = end
                end += pages(manifest.shards[key[0]].chunks[key[1]].nbytes)
    return _place(manifest, tensors, offsets, end, padded=True)


def lay_out_in_place(manifest: Manifest, tensors: Iterable[Wanted]) -> Layout:
    """Lay out tensors in host memory as their files lie, for reading them in place."""
    offsets: dict[ChunkKey, int] = {}
    end = 0
    tensors = list(tensors)
    for shard_index, index in sorted({key for tensor in tensors for key in tensor.chunks}):
        chunk = manifest.shards[shard_index].chunks[index]
        if (shard_index, index - 1) not in offsets:
            end = pages(end) + chunk.start % PAGE_NBYTES
        offsets[(shard_index, index)] = end
        end += chunk.nbytes
    return _place(manifest, tensors, offsets, end, padded=False)


def _place(
    manifest: Manifest, tensors: Sequence[Wanted], offsets: Mapping[ChunkKey, int], end: int, *, padded: bool
) -> Layout:
    """Place tensors where their chunks lie, or, where their dtype does not like that, at the end."""
    placements: list[Placement] = []
    moved = {(shard, index): at - manifest.shards[shard].chunks[index].start for (shard, index), at in offsets.items()}
    for tensor in tensors:
        entry, copied_from = tensor.entry, None
        offset = moved[tensor.chunks[0]] + entry.start if tensor.chunks else 0  # no elements, no bytes
        if offset % alignment_bytes(entry.dtype):
            copied_from, offset = offset, _round_up(end, COPY_ALIGNMENT_NBYTES)
            end = offset + entry.nbytes
        placements.append(Placement(tensor.name, entry, offset, tensor.chunks, copied_from))
    return Layout(end, offsets, tuple(placements), padded)


def carry(layout: Layout, sizes: Mapping[ChunkKey, int]) -> Layout:
    """Return a layout with chunks behind it that hold no tensor that is laid out."""
    offsets, end = dict(layout.chunks), layout.nbytes
    for key, nbytes in sizes.items():
        offsets[key] = end = pages(end)
        end += nbytes
    return Layout(end, offsets, layout.tensors, layout.padded)


def pack(manifest: Manifest, tensors: Iterable[Wanted]) -> Packing:
    """Lay out tensors on a device, in the order given."""
    spans: dict[ChunkKey, list[tuple[int, int, int]]] = {}
    placements: list[Placement] = []
    end = 0
    for tensor in tensors:
        offset = _round_up(end, DEVICE_ALIGNMENT_NBYTES)
        placements.append(Placement(tensor.name, tensor.entry, offset, tensor.chunks))
        end = offset + tensor.entry.nbytes
        for key in tensor.chunks:
            chunk = manifest.shards[key[0]].chunks[key[1]]
            start, stop = max(tensor.entry.start, chunk.start), min(tensor.entry.stop, chunk.stop)
            _append(spans.setdefault(key, []), start - chunk.start, offset + start - tensor.entry.start, stop - start)
    return Packing(end, {key: tuple(each) for key, each in spans.items()}, tuple(placements))


def _append(spans: list[tuple[int, int, int]], start: int, to: int, nbytes: int) -> None:
    """Add a span, joined to the last where it goes on from there on both sides."""
    if spans:
        last_start, last_to, last_nbytes = spans[-1]
        if (last_start + last_nbytes, last_to + last_nbytes) == (start, to):
            spans[-1] = (last_start, last_to, last_nbytes + nbytes)
            return
    spans.append((start, to, nbytes))


class _Cursor:
    """Finds the chunks of tensors asked for in file order, in one pass over the shard."""

    def __init__(self, shard_index: int, shard: Shard) -> None:
        self._shard_index = shard_index
        self._stops = [chunk.stop for chunk in shard.chunks]
        self._at = 0
        self._alone: tuple[ChunkKey, ...] = ((shard_index, 0),)  # the chunk that it is at, which most tensors share

    def covering(self, entry: TensorEntry) -> tuple[ChunkKey, ...]:
        if entry.start == entry.stop:
            return ()
        if self._stops[self._at] <= entry.start:
            while self._stops[self._at] <= entry.start:
                self._at += 1
            self._alone = ((self._shard_index, self._at),)
        if entry.stop <= self._stops[self._at]:
            return self._alone
        last = self._at
        while self._stops[last] < entry.stop:
            last += 1
        return tuple((self._shard_index, index) for index in range(self._at, last + 1))
