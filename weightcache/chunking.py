"""Own the cut: where a file is divided into chunks. Pure.

Never looks at content: the same names, dtypes, shapes and sizes give the same cut on every node.

A fine-tune should share every tensor it did not touch with its base, so chunks begin and end at tensor boundaries:

- the header of a safetensors file, and every other file, is cut by itself, in pieces of at most the limit;
- a tensor of 1 MiB or more is cut by itself, into limit-sized pieces from its own start;
- smaller neighbours are packed together, up to the limit, so that 6,000 norms and biases are not 6,000 objects.

1 MiB: below it a request's latency costs more than its bytes on any object store (ORIGIN measurements: 85–90 MB/s a
connection, 100–200 ms to the first byte), above it a tensor is worth sharing by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weightcache.header import TensorEntry
from weightcache.manifest import CHUNK_LIMIT_NBYTES, Chunk

PACKED_BELOW_NBYTES = 1 << 20


def cut_file(nbytes: int, limit: int = CHUNK_LIMIT_NBYTES) -> tuple[Chunk, ...]:
    """Cut a file without tensors."""
    return tuple(_pieces(0, nbytes, limit))


def cut_safetensors(
    data_start: int, tensors: Sequence[TensorEntry], limit: int = CHUNK_LIMIT_NBYTES
) -> tuple[Chunk, ...]:
    """Cut a safetensors file.

    Args:
        data_start: Bytes before the first tensor: length field and header.
        tensors: Ordered by start, adjacent, the first at `data_start`.
        limit: Most bytes of a chunk.

    Returns:
        Adjacent chunks that cover the file.
    """
    chunks = list(_pieces(0, data_start, limit))
    start = stop = data_start  # the pack under way
    for entry in tensors:
        alone = entry.nbytes >= min(PACKED_BELOW_NBYTES, limit)
        if alone or entry.stop - start > limit:
            chunks += _pieces(start, stop, limit)
            start = entry.start
        stop = entry.stop
        if alone:
            chunks += _pieces(start, stop, limit)
            start = stop
    chunks += _pieces(start, stop, limit)
    return tuple(chunks)


def _pieces(start: int, stop: int, limit: int) -> Iterator[Chunk]:
    for at in range(start, stop, limit):
        yield Chunk(at, min(limit, stop - at))
