"""Own host memory that chunks arrive in: images of models, those that this process keeps, and scratch memory.

Never frees memory that a tensor still lies in: the memory lives as long as anything made from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

from weightcache import _engine, machine
from weightcache.errors import CapacityError, ImageLostError
from weightcache.layout import PAGE_NBYTES, ChunkKey, Layout, Placement, pages
from weightcache.operations import Crew, HostPlace, address_of
from weightcache.tiers.eviction import Resident, Uses, choose_victims, used_again

CHECKED_FROM_NBYTES = 64 << 20  # asking costs 0.2 ms; memory of a few chunks is there, or the next image is refused
HUGE_PAGE_NBYTES = 2 << 20
REGISTERED_NBYTES = 1 << 30  # at once: a longer registration holds up other users of the device
LEAST_REGISTERED_NBYTES = 256 << 20
ASSUMED_DISK_BYTES_PER_S = 2e9  # from which an image that left comes back
N_PAST = 1000
LOOK_S = 0.002  # how soon a chunk that arrived is seen by those who wait for it
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


class SharedImage:
    """An image that loads take tensors from, also while it is being filled.

    Attributes:
        uri: The model.
        revision: Its state.
        layout: What lies where.
        nbytes: Its size.
        there: 1 for each chunk, in the layout's order, that lies in its place.
        failure: Why it will never be full; empty while it may.
    """

    def __init__(self, uri: str, revision: str, layout: Layout, nbytes: int) -> None:
        self.uri = uri
        self.revision = revision
        self.layout = layout
        self.nbytes = nbytes
        self.there = bytearray(len(layout.chunks))
        self.failure = ""
        self.numbers = {key: number for number, key in enumerate(layout.chunks)}

    @property
    def is_full(self) -> bool:
        return all(self.there)

    @property
    def address(self) -> int:
        raise NotImplementedError

    def attach(self) -> _engine.SealedMemory:
        """Map it for somebody who may write into it: each page that is written becomes their own."""
        raise NotImplementedError

    def pages(self) -> str:
        """Say in which pages it lies, and why."""
        raise NotImplementedError

    async def arriving(self, keys: Iterable[ChunkKey]) -> AsyncIterator[list[ChunkKey]]:
        """Yield chunks when they lie in their places, those that do already at once. Raises ImageLostError."""
        left = {key: self.numbers[key] for key in keys}
        while left:
            failure = self.failure  # read first: what arrived before it counts
            here = [key for key, number in left.items() if self.there[number]]
            for key in here:
                del left[key]
            if here:
                yield here
            elif failure:
                raise ImageLostError(f"the image of {self.uri} is not being filled any more: {failure}", uri=self.uri)
            else:
                await asyncio.sleep(LOOK_S)

    async def wait(self, keys: Iterable[ChunkKey]) -> None:
        """Wait until chunks lie in their places. Raises ImageLostError."""
        async for _ in self.arriving(keys):
            pass


class HeldImage(SharedImage):
    """An image that this process fills and keeps; each who wants it maps it anew. Nobody else can ever write into it."""

    def __init__(self, uri: str, revision: str, layout: Layout, memory: _engine.SharedMemory) -> None:
        super().__init__(uri, revision, layout, memory.nbytes)
        self.last_use_s = 0.0
        self.uses: Uses = ()
        self.n_users = 0  # who fills it, loads that copy from it, and models attached; changed under the tier's lock
        self.n_uses = 0
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

    @property
    def fd(self) -> int:
        return self._memory.fd

    def arrived(self, key: ChunkKey) -> None:
        """Hear that a chunk, and every tensor that is complete with it, lies in its place. From any thread."""
        self.there[self.numbers[key]] = 1

    def freeze(self) -> None:
        """Let nobody write into it any more, now that it is full."""
        self._memory.freeze()

    def pages(self) -> str:
        return f"shared, in pages of {shared_pages(self._memory)}"

    def attach(self) -> _engine.SealedMemory:
        return _engine.SealedMemory(self._memory.fd, self.nbytes, partial=not self.is_full)

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
    """A shared image as one load sees it: all tensors come to lie in their places by themselves, and may be written."""

    def __init__(self, shared: SharedImage, wanted: Container[str]) -> None:
        self.tensors = tuple(placed for placed in shared.layout.tensors if placed.name in wanted)
        self.memory = shared.attach()
        self.pages = shared.pages


class HostTier:
    """The images this process keeps, by model, within a budget; the least valuable leave. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images: dict[str, HeldImage] = {}
        self._former: list[HeldImage] = []  # of states that are no longer kept, but in use
        self._past: dict[str, Uses] = {}  # of models that are no longer kept
        self._promised_bytes = 0  # to images that are being made
        self.until_s: dict[str, float] = {}  # by URI: until when it stays, used or not; 0 is for ever
        self.expected_per_s: Mapping[str, float] = {}  # by URI: uses that a forecast expects, of those that it knows

    def hold(self, model: str, revision: str, keys: Iterable[ChunkKey], now_s: float) -> HeldImage | None:
        """Return the image of a model in this state if it holds all these chunks; `let_go` of it afterwards."""
        with self._lock:
            held = self._images.get(model)
            if (
                held is None
                or held.failure
                or held.revision != revision
                or not all(key in held.layout.chunks for key in keys)
            ):
                return None
            self._use(held, now_s)
            return held

    def hold_again(self, held: HeldImage, now_s: float) -> bool:
        """Hold an image once more; False where it is no longer kept."""
        with self._lock:
            is_kept = not held.failure and any(each is held for each in self._images.values())
            if is_kept:
                self._use(held, now_s)
            return is_kept

    @staticmethod
    def _use(held: HeldImage, now_s: float) -> None:
        held.last_use_s = now_s
        held.uses = used_again(held.uses, now_s)
        held.n_users += 1
        held.n_uses += 1

    def let_go(self, held: HeldImage) -> None:
        with self._lock:
            held.n_users -= 1
            if not held.n_users and held in self._former:
                self._former.remove(held)

    @contextlib.contextmanager
    def room(self, nbytes: int, budget_bytes: int, now_s: float) -> Iterator[None]:
        """Have room to make and keep an image, dropping idle ones. Raises CapacityError.

        An image in use, or that is to stay, never leaves, and none leaves where that would not suffice.
        """
        with self._lock:
            residents = self._residents(now_s)
            over = self._over_bytes(nbytes, budget_bytes)
            if over > _evictable_bytes(residents):
                raise CapacityError(
                    f"no room for an image of {nbytes} bytes within the host budget of {budget_bytes}, of which "
                    f"{budget_bytes + over - nbytes} are in use or kept: evict models, or raise host_budget_bytes",
                    wanted_bytes=nbytes,
                    budget_bytes=budget_bytes,
                )
            victims = choose_victims(residents, {}, over, now_s).victims
            gone = [self._forget(victim.key) for victim in victims]
            self._promised_bytes += nbytes
        try:
            for held in gone:
                held.close()
            yield
        finally:
            with self._lock:
                self._promised_bytes -= nbytes

    def admit(self, model: str, uri: str, nbytes: int, budget_bytes: int, now_s: float) -> None:
        """Raise CapacityError where a model that nobody waits for would be among the first to leave again."""
        with self._lock:
            before = self._images.get(model)
            newcomer = Resident(
                "",
                frozenset(),
                now_s,
                uses=before.uses if before is not None else self._past.get(model, ()),
                held=self.stays(uri, now_s),
                own_bytes=nbytes,
                bytes_per_s=ASSUMED_DISK_BYTES_PER_S,
                expected_per_s=self.expected_per_s.get(uri),
            )
            residents, over = self._residents(now_s), self._over_bytes(nbytes, budget_bytes)
        if over > _evictable_bytes(residents):
            return  # which `room` says
        if newcomer in choose_victims([*residents, newcomer], {}, over, now_s).victims:
            known = f"{len(newcomer.uses)} uses of it are known" if newcomer.uses else "no use of it is known"
            raise CapacityError(
                f"{uri} is not brought ahead, for models of more value would leave host memory for it: {known}; load it, evict "
                "others, or raise host_budget_bytes",
                uri=uri,
                wanted_bytes=nbytes,
                budget_bytes=budget_bytes,
            )

    def _residents(self, now_s: float) -> list[Resident]:
        return [
            Resident(
                model,
                frozenset(),
                held.last_use_s,
                uses=held.uses,
                held=held.n_users > 0 or self.stays(held.uri, now_s),
                own_bytes=held.nbytes,
                bytes_per_s=ASSUMED_DISK_BYTES_PER_S,
                expected_per_s=self.expected_per_s.get(held.uri),
            )
            for model, held in self._images.items()
        ]

    def _over_bytes(self, nbytes: int, budget_bytes: int) -> int:
        return self._used_bytes() + self._promised_bytes + nbytes - budget_bytes

    def stays(self, uri: str, now_s: float) -> bool:
        """Tell whether a model is to stay, used or not."""
        until_s = self.until_s.get(uri)
        return until_s is not None and (not until_s or now_s < until_s)

    def keep(self, model: str, held: HeldImage, now_s: float) -> HeldImage:
        """Keep an image that its caller is going to fill, in place of the one of another state of its model.

        Returns the image that is kept: another's, if that is of the same state. The caller uses it: `let_go` of it
        when it is full, or `give_up`.
        """
        with self._lock:
            before = self._images.get(model)
            if before is not None and not before.failure and before.revision == held.revision:
                self._use(before, now_s)
                return before
            self._images[model] = held
            held.last_use_s = now_s
            held.uses = used_again(before.uses if before is not None else self._past.pop(model, ()), now_s)
            held.n_users += 1
            if before is not None and before.n_users:
                self._former.append(before)
        if before is not None:
            before.close()
        return held

    def give_up(self, held: HeldImage, why: str) -> None:
        """Keep an image no longer that will never be full; who waits for it is told."""
        held.failure = why
        with self._lock:
            for model in [model for model, each in self._images.items() if each is held]:
                self._forget(model)
        held.close()

    def drop(self, uri: str, *, idle_only: bool = False) -> int:
        """Drop the images of a model. Returns the bytes they had; tensors taken from them stay valid."""
        with self._lock:
            gone = [
                self._forget(model)
                for model, held in list(self._images.items())
                if held.uri == uri and not (idle_only and held.n_users)
            ]
            self._former += [held for held in gone if held.n_users]
        for held in gone:
            held.close()
        return sum(held.nbytes for held in gone)

    def _forget(self, model: str) -> HeldImage:
        """Keep an image no longer, but remember for a while how it was used."""
        held = self._images.pop(model)
        self._past[model] = held.uses
        while len(self._past) > N_PAST:
            del self._past[next(iter(self._past))]
        return held

    def images(self) -> list[HeldImage]:
        """Return what is kept now."""
        with self._lock:
            return list(self._images.values())

    def used_bytes(self) -> int:
        """Return the size of all images, those of former states that are in use included."""
        with self._lock:
            return self._used_bytes()

    def _used_bytes(self) -> int:
        return sum(held.nbytes for held in (*self._images.values(), *self._former))

    def after_fork_in_child(self) -> None:
        """Renew the locks: who held them stayed in the parent."""
        self._lock = threading.Lock()
        for held in self._images.values():
            held.lock = threading.Lock()


def _evictable_bytes(residents: Iterable[Resident]) -> int:
    return sum(resident.own_bytes for resident in residents if not resident.held)


host_tier = HostTier()
os.register_at_fork(after_in_child=host_tier.after_fork_in_child)


def host_budget_bytes(setting: int) -> int:
    """Return the budget of the host tier: as set, else half of what this process could have beside what is kept."""
    return setting or (machine.memory_available_bytes() + host_tier.used_bytes()) // 2


def keep_freed(setting: int) -> None:
    """Have freed memory kept for the next load, once a process: the kernel may take it back when it needs it.

    At most an eighth of what this process could have, and no more than the host budget, if one is set.
    """
    global _keeps_freed
    if not _keeps_freed:
        _keeps_freed = True
        available = machine.memory_available_bytes() // 8
        _engine.pool_limit(min(setting, available) if setting else available)


def limit_freed(nbytes: int) -> None:
    """Keep no more freed memory than this, until `keep_freed` is called again."""
    global _keeps_freed
    _keeps_freed = False
    _engine.pool_limit(nbytes)


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
    """Reserve memory that other processes can map to be read. Raises CapacityError."""
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
