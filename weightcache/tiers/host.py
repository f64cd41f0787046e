"""Own host memory that chunks arrive in: the image of a model, and scratch memory for bytes that only pass through.

Never frees memory that a tensor still lies in: the memory lives as long as anything made from it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence

from weightcache import _engine
from weightcache.errors import CapacityError
from weightcache.layout import PAGE_NBYTES, ChunkKey, Layout, Placement, pages


class Image:
    """A model's tensor bytes in one contiguous private memory, in huge pages where the system grants them.

    Writable by whoever holds it; chunks are written by distinct threads to distinct places.
    """

    def __init__(self, layout: Layout, sizes: Mapping[ChunkKey, int]) -> None:
        self.layout = layout
        self._sizes = sizes
        self.memory = allocate(pages(layout.nbytes) or PAGE_NBYTES)
        self._view = memoryview(self.memory)

    def claim(self, keys: Sequence[ChunkKey]) -> list[memoryview]:
        """Return the populated memory of these chunks, each exactly as long as the chunk."""
        views: list[memoryview] = []
        for key in keys:
            start = self.layout.chunks[key]
            stop = start + self._sizes[key]
            self.memory.populate(start, stop)
            views.append(self._view[start:stop])
        return views

    def settle(self, placement: Placement) -> None:
        """Copy a tensor that arrived badly placed for its dtype to the place of its own; others lie where they are."""
        if placement.copied_from is not None:
            nbytes = placement.entry.nbytes
            arrived = self._view[placement.copied_from : placement.copied_from + nbytes]
            self._view[placement.offset : placement.offset + nbytes] = arrived

    def pages(self) -> str:
        """Say in which pages the image lies, and why."""
        refused = self.memory.huge_refused_errno
        if refused:
            return f"4 KiB pages: the system refused huge ones ({os.strerror(refused)})"
        return "2 MiB pages where the system has them (madvise)"


class Scratch:
    """Memory for chunks that only pass through: each claim is new and freed when its views are dropped."""

    def __init__(self, sizes: Mapping[ChunkKey, int]) -> None:
        self._sizes = sizes

    def claim(self, keys: Sequence[ChunkKey]) -> list[memoryview]:
        starts: list[int] = []
        end = 0
        for key in keys:
            starts.append(end)
            end += pages(self._sizes[key])
        whole = memoryview(allocate(end))
        return [whole[start : start + self._sizes[key]] for start, key in zip(starts, keys, strict=True)]


def allocate(nbytes: int) -> _engine.Memory:
    """Reserve private memory. Raises CapacityError."""
    try:
        return _engine.Memory(nbytes)
    except OSError as exc:
        if exc.errno != errno.ENOMEM:
            raise
        raise CapacityError(
            f"no room for {nbytes} bytes of host memory: free some, raise the limit, or load fewer tensors with include="
        ) from exc
