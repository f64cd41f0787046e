"""Own host memory that chunks arrive in: images of models, those that this process keeps, and scratch memory.

Never frees memory that a tensor still lies in: the memory lives as long as anything made from it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from weightcache import _engine, machine
from weightcache.errors import CapacityError
from weightcache.layout import PAGE_NBYTES, ChunkKey, Layout, Placement, pages
from weightcache.operations import Crew, HostPlace, address_of

CHECKED_FROM_NBYTES = 64 << 20  # asking costs 0.2 ms; memory of a few chunks is there, or the next image is refused
HUGE_PAGE_NBYTES = 2 << 20
REGISTERED_NBYTES = 1 << 30  # at once: a longer registration holds up other users of the device
LEAST_REGISTERED_NBYTES = 256 << 20
NO_ROOM = (errno.ENOMEM, errno.ENOSPC)

ImageMemory = _engine.Memory | _engine.SharedMemory


class Image:
    """A model's tensor bytes in one contiguous memory: private in huge pages, or shared with other processes.

    Writable by whoever holds it; chunks are written by distinct threads to distinct places.
    """

    def __init__(self, layout: Layout, sizes: Mapping[ChunkKey, int], memory: ImageMemory | None = None) -> None:
        self.layout = layout
        self._sizes = sizes
        self.memory = memory or allocate(image_bytes(layout))
        self._address = self.memory.address
        self._view = memoryview(self.memory)

    @property
    def tensors(self) -> tuple[Placement, ...]:
        return self.layout.tensors

    def holds(self, key: ChunkKey) -> bool:
        return key in self.layout.chunks

    def place(self, key: ChunkKey) -> HostPlace:
        """Return where a chunk goes at once."""
        return HostPlace(self._address + self.layout.chunks[key], is_padded=self.layout.padded, is_fresh=True)

    def claim(self, keys: Sequence[ChunkKey]) -> list[memoryview]:
        """Return the populated memory of these chunks, each exactly as long as the chunk."""
        views: list[memoryview] = []
        for key in keys:
            start = self.layout.chunks[key]
            stop = start + self._sizes[key]
            self.memory.populate(start, stop)
            views.append(self._view[start:stop])
        return views

    def accept(self, key: ChunkKey, view: memoryview, crew: Crew) -> None:
        """Do nothing: what was fetched and verified lies in its place."""

    def settle(self, placement: Placement) -> None:
        """Copy a tensor that arrived badly placed for its dtype to the place of its own; others lie where they are."""
        if placement.copied_from is not None:
            nbytes = placement.entry.nbytes
            self.memory.populate(placement.offset, placement.offset + nbytes)
            arrived = self._view[placement.copied_from : placement.copied_from + nbytes]
            self._view[placement.offset : placement.offset + nbytes] = arrived

    def pages(self) -> str:
        """Say in which pages the image lies, and why."""
        if isinstance(self.memory, _engine.SharedMemory):
            return f"shared, in pages of {shared_pages(self.memory)}"
        if self.memory.huge_refused_errno:
            return f"private, in pages of {_small_pages()}: {os.strerror(self.memory.huge_refused_errno)}"
        huge = self.memory.huge_nbytes()
        return f"private, {huge} bytes in huge pages (transparent_hugepage/enabled is {machine.huge_pages()})"


def image_bytes(layout: Layout) -> int:
    """Return the memory that a layout takes."""
    return pages(layout.nbytes) or PAGE_NBYTES


class HeldImage:
    """An image that this process keeps: frozen, so that nobody writes into it, and mapped anew for each who wants it."""

    def __init__(self, uri: str, revision: str, layout: Layout, memory: _engine.SharedMemory) -> None:
        memory.freeze()
        self.uri = uri
        self.revision = revision
        self.layout = layout
        self.nbytes = memory.nbytes
        self.last_use_s = 0.0
        self.n_users = 0  # loads that copy from it, and models attached to it; changed under the tier's lock
        self._memory = memory
        self.lock = threading.Lock()  # of what follows
        self._n_loads = 0
        self._is_closed = False
        self._registered_for: Hashable = None
        self._why_not = ""
        self._undo: list[Callable[[], None]] = []

    @property
    def address(self) -> int:
        return self._memory.address

    def pages(self) -> str:
        return f"shared, in pages of {shared_pages(self._memory)}"

    def attach(self) -> _engine.SealedMemory:
        """Map it for somebody who may write into it: each page that is written becomes their own."""
        return _engine.SealedMemory(self._memory.fd, self.nbytes, own=True)

    def lock_for(
        self,
        device: Hashable,
        register: Callable[[int, int], Callable[[], None]],
        alone: Callable[[], AbstractContextManager[None]],
    ) -> str:
        """Have the image registered for a device on its second load there, or at once where that costs nothing.

        Registering costs 0.1 s/GB in 4 KiB pages and nearly nothing in huge ones; passing through the ring costs
        0.05 to 0.08 s of processor time per GB each time (docs/decisions/011). Call it once a load, not on the loop.

        Args:
            device: Names the device. The driver takes memory once, so it is registered for the first that loads twice.
            register: Registers (address, nbytes) and returns what undoes it. Raises OSError or DriverError.
            alone: Keeps other processes from registering meanwhile.

        Returns:
            Why it is not registered; empty where it is.
        """
        with self.lock:
            if self._is_closed:
                return "it is no longer kept"
            if self._registered_for is not None:
                return self._why_not if self._registered_for == device else "registered for another device"
            self._n_loads += 1
            if self._n_loads < 2 and self._memory.pages == _engine.PAGES_SMALL:
                return "not registered yet: that pays from the second load on"
            self._registered_for = device
            # Reserved huge pages are registered whole; the mapping goes on to the end of the last.
            end = (
                -(-self.nbytes // HUGE_PAGE_NBYTES) * HUGE_PAGE_NBYTES
                if self.nbytes >= HUGE_PAGE_NBYTES
                else self.nbytes
            )
            piece, at = REGISTERED_NBYTES, 0
            while at < end:
                nbytes = min(piece, end - at)
                try:
                    with alone():
                        self._undo.append(register(self.address + at, nbytes))
                    at += nbytes
                except (OSError, _engine.DriverError) as exc:
                    piece = min(piece, nbytes) // 2
                    if piece < LEAST_REGISTERED_NBYTES:
                        self._why_not = f"{at} of {self.nbytes} bytes could be registered: {exc}"
                        break
            return self._why_not

    def close(self) -> None:
        """Undo registrations, for good; what was attached stays valid."""
        with self.lock:
            self._is_closed = True
            for undo in self._undo:
                undo()
            self._undo.clear()


class AttachedImage:
    """A held image as one load sees it: all tensors lie in their places already, and may be written."""

    def __init__(self, held: HeldImage, wanted: Container[str]) -> None:
        self.tensors = tuple(placed for placed in held.layout.tensors if placed.name in wanted)
        self.memory: _engine.SealedMemory | _engine.Memory = held.attach()
        self._pages = held.pages()
        if not self.memory.is_private:  # no reserved page is left for one that is written
            copied = allocate(held.nbytes)
            memoryview(copied)[: held.nbytes] = memoryview(self.memory)
            self.memory = copied
            self._pages = "private, copied from a shared image: no reserved page is left for those that are written"

    def pages(self) -> str:
        return self._pages


class HostTier:
    """The images this process keeps, by model, within a budget; least recently used leave. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images: dict[str, HeldImage] = {}
        self._promised_bytes = 0  # to images that are being filled

    def hold(self, model: str, revision: str, keys: Iterable[ChunkKey], now_s: float) -> HeldImage | None:
        """Return the image of a model in this state if it holds all these chunks; `let_go` of it afterwards."""
        with self._lock:
            held = self._images.get(model)
            if held is None or held.revision != revision or not all(key in held.layout.chunks for key in keys):
                return None
            held.last_use_s = now_s
            held.n_users += 1
            return held

    def let_go(self, held: HeldImage) -> None:
        with self._lock:
            held.n_users -= 1

    @contextlib.contextmanager
    def room(self, nbytes: int, budget_bytes: int) -> Iterator[None]:
        """Have room for an image for the length of the block, dropping idle ones. Raises CapacityError.

        An image in use never leaves, and none leaves where that would not suffice.
        """
        with self._lock:
            idle = sorted(
                (held for held in self._images.values() if not held.n_users), key=lambda each: each.last_use_s
            )
            over = sum(held.nbytes for held in self._images.values()) + self._promised_bytes + nbytes - budget_bytes
            if over > sum(held.nbytes for held in idle):
                raise CapacityError(
                    f"no room for an image of {nbytes} bytes within the host budget of {budget_bytes}, of which "
                    f"{budget_bytes + over - nbytes} are in use or kept: evict models, or raise host_budget_bytes",
                    wanted_bytes=nbytes,
                    budget_bytes=budget_bytes,
                )
            gone: list[HeldImage] = []
            while over > sum(held.nbytes for held in gone):
                gone.append(idle.pop(0))
            self._images = {key: held for key, held in self._images.items() if held not in gone}
            self._promised_bytes += nbytes
        try:
            for held in gone:
                held.close()
            yield
        finally:
            with self._lock:
                self._promised_bytes -= nbytes

    def keep(self, model: str, held: HeldImage) -> None:
        """Keep an image, in place of the one of another state of its model."""
        with self._lock:
            before = self._images.get(model)
            self._images[model] = held
        if before is not None:
            before.close()

    def drop(self, uri: str) -> int:
        """Drop the images of a model. Returns the bytes they had; tensors taken from them stay valid."""
        with self._lock:
            gone = [self._images.pop(key) for key, held in list(self._images.items()) if held.uri == uri]
        for held in gone:
            held.close()
        return sum(held.nbytes for held in gone)

    def images(self) -> list[HeldImage]:
        """Return what is kept now."""
        with self._lock:
            return list(self._images.values())

    def after_fork_in_child(self) -> None:
        """Renew the locks: who held them stayed in the parent."""
        self._lock = threading.Lock()
        for held in self._images.values():
            held.lock = threading.Lock()


host_tier = HostTier()
os.register_at_fork(after_in_child=host_tier.after_fork_in_child)


def host_budget_bytes(setting: int) -> int:
    """Return the budget of the host tier: as set, else half of what this process could have beside what is kept."""
    kept = sum(held.nbytes for held in host_tier.images())
    return setting or (machine.memory_available_bytes() + kept) // 2


def keep_freed(setting: int) -> None:
    """Have freed memory kept for the next load, once a process: the kernel may take it back when it needs it.

    At most an eighth of what this process could have, and no more than the host budget, if one is set.
    """
    global _keeps_freed
    if not _keeps_freed:
        _keeps_freed = True
        available = machine.memory_available_bytes() // 8
        _engine.pool_limit(min(setting, available) if setting else available)


_keeps_freed = False


class Scratch:
    """Memory for chunks that only pass through: each claim is freed for the next when its views are dropped."""

    def __init__(self, sizes: Mapping[ChunkKey, int]) -> None:
        self._sizes = sizes

    @staticmethod
    def place(view: memoryview) -> HostPlace:
        """Return claimed memory as a place to read a chunk to."""
        return HostPlace(address_of(view), is_padded=True, is_fresh=True)

    def claim(self, keys: Sequence[ChunkKey]) -> list[memoryview]:
        starts: list[int] = []
        end = 0
        for key in keys:
            starts.append(end)
            end += pages(self._sizes[key])
        whole = memoryview(allocate(end))
        return [whole[start : start + self._sizes[key]] for start, key in zip(starts, keys, strict=True)]


def allocate(nbytes: int, numa_node: int = machine.UNKNOWN_NODE) -> _engine.Memory:
    """Reserve private memory, zero-filled unless reused. Raises CapacityError."""
    _expect_room(nbytes)
    try:
        return _engine.Memory(nbytes, numa_node)
    except OSError as exc:
        if exc.errno not in NO_ROOM:
            raise
        raise _no_room(nbytes) from exc


def allocate_shared(nbytes: int, name: str, numa_node: int = machine.UNKNOWN_NODE) -> _engine.SharedMemory:
    """Reserve memory that other processes can map once it is sealed. Raises CapacityError."""
    try:
        memory = _engine.SharedMemory(nbytes, name, numa_node)
    except OSError as exc:
        if exc.errno not in NO_ROOM:
            raise
        raise _no_room(nbytes) from exc
    if memory.pages != _engine.PAGES_HUGETLB:  # those are set aside, and are no part of what is available
        _expect_room(nbytes)
    return memory


def shared_pages(memory: _engine.SharedMemory) -> str:
    """Say in which pages shared memory lies, and why in no better ones."""
    if memory.pages == _engine.PAGES_HUGETLB:
        return "hugetlb 2 MiB"
    if memory.hugetlb_refused_errno == errno.EFBIG:
        return f"{_small_pages()}: smaller than a huge page"
    refused = memory.hugetlb_refused_errno
    why = "too few reserved ones are free" if refused == errno.ENOMEM else f"reserved ones: {os.strerror(refused)}"
    if memory.pages == _engine.PAGES_HUGE:
        return f"shmem huge pages: {why}"
    setting = machine.shared_huge_pages()
    if memory.huge_refused_errno:
        why_small = os.strerror(memory.huge_refused_errno)
    elif setting in ("never", "deny", "none"):
        why_small = f"shmem_enabled is {setting}"
    else:
        why_small = "none is free"
    return f"{_small_pages()}: {why}; of shmem {why_small}"


def _small_pages() -> str:
    return f"{os.sysconf('SC_PAGESIZE') >> 10} KiB"


def _expect_room(nbytes: int) -> None:
    """Raise CapacityError where so much cannot be filled now."""
    if nbytes < CHECKED_FROM_NBYTES:
        return
    available = machine.memory_available_bytes()
    if nbytes > available:
        raise _no_room(nbytes, available_bytes=available)


def _no_room(nbytes: int, **facts: int) -> CapacityError:
    there = "".join(f", {available} are available" for available in facts.values())
    return CapacityError(
        f"no room for {nbytes} bytes of host memory{there}: free some, raise the limit, or load fewer tensors with include=",
        wanted_bytes=nbytes,
        **facts,
    )
