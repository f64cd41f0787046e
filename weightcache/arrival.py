"""Own where the chunks of one load arrive, and who hears of it: tensors complete, files' bytes, progress.

Never moves a byte: it hands out places, and is told when they are filled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from weightcache.layout import ChunkKey, Placement
from weightcache.operations import Crew, Place
from weightcache.session import Progress, Session, sizes_of
from weightcache.tiers.host import AttachedImage, Image, Scratch

if TYPE_CHECKING:
    from weightcache.tiers.device import Slab

    Home = Image | AttachedImage | Slab

OnChunk = Callable[[ChunkKey, memoryview], None]

PASSING_NBYTES = 256 << 20  # of chunks read together that only pass through


class Arrival:
    """Where chunks go: tensors' into an image or a slab, files' into scratch memory; and who hears of it.

    `on_tensor` is called with a tensor's index in `home.tensors` when it lies whole in its place, `on_chunk` when a chunk
    and every tensor that is complete with it do; from worker threads.
    """

    batch_bytes = 0

    def __init__(
        self,
        session: Session,
        home: Home,
        keys: Sequence[ChunkKey],
        counter: Counter,
        on_tensor: Callable[[int], None] = lambda index: None,
        on_chunk: Callable[[ChunkKey], None] = lambda key: None,
    ) -> None:
        self.home = home
        self.files: dict[ChunkKey, memoryview] = {}
        self._filling = None if isinstance(home, AttachedImage) else home
        self._sizes = sizes_of(session.manifest, keys)
        self._scratch = Scratch(self._sizes)
        self._counter = counter
        self._on_chunk = on_chunk
        filling = self._filling

        def complete(index: int) -> None:  # no method: it would hold this object, and the image, in a cycle
            if filling is not None:
                filling.settle(filling.tensors[index])
            on_tensor(index)

        self._completion = _Completion(home.tensors, complete)

    def begin(self) -> None:
        """Tell of the tensors that are in their places already."""
        self._completion.begin()

    def _home_of(self, key: ChunkKey) -> Image | Slab | None:
        """Return the memory that a chunk of tensors goes to, None for one of files."""
        return self._filling if self._filling is not None and self._filling.holds(key) else None

    def place(self, key: ChunkKey) -> Place | None:
        if (home := self._home_of(key)) is not None:
            return home.place(key)
        if self._completion.knows(key):
            return None  # of an attached image
        [self.files[key]] = self._scratch.claim([key])
        return self._scratch.place(self.files[key])

    def claim(self, keys: Sequence[ChunkKey]) -> list[memoryview]:
        if (home := self._home_of(keys[0])) is not None:
            return home.claim(keys)
        views = self._scratch.claim(keys)
        self.files.update(zip(keys, views, strict=True))
        return views

    def accept(self, key: ChunkKey, view: memoryview, crew: Crew) -> None:
        if (home := self._home_of(key)) is not None:
            home.accept(key, view, crew)

    def arrived(self, key: ChunkKey) -> None:
        self._completion(key)
        self._counter.add(self._sizes[key])
        self._on_chunk(key)


class Passing:
    """Chunks that only pass through scratch memory, each handed on once it is verified."""

    batch_bytes = PASSING_NBYTES

    def __init__(self, session: Session, keys: Sequence[ChunkKey], on_chunk: OnChunk, counter: Counter) -> None:
        self._scratch = Scratch(sizes_of(session.manifest, keys))
        self._on_chunk = on_chunk
        self._counter = counter
        self._views: dict[ChunkKey, memoryview] = {}

    def place(self, key: ChunkKey) -> Place:
        [view] = self.claim([key])
        return self._scratch.place(view)

    def claim(self, keys: Sequence[ChunkKey]) -> list[memoryview]:
        views = self._scratch.claim(keys)
        self._views.update(zip(keys, views, strict=True))
        return views

    def accept(self, key: ChunkKey, view: memoryview, crew: Crew) -> None:
        pass

    def arrived(self, key: ChunkKey) -> None:
        view = self._views.pop(key)
        self._on_chunk(key, view)
        self._counter.add(len(view))


class Counter:
    """Tells a progress callback how far a load is. Called from worker threads."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._done += nbytes
                self._progress(self._done, self._total)


class _Completion:
    """Tells when a tensor's last chunk has arrived. Called from worker threads."""

    def __init__(self, tensors: Sequence[Placement], complete: Callable[[int], None]) -> None:
        self._lock = threading.Lock()
        self._complete = complete
        self._left = [len(placed.chunks) for placed in tensors]
        self._tensors: dict[ChunkKey, list[int]] = {}
        for index, placed in enumerate(tensors):
            for key in placed.chunks:
                self._tensors.setdefault(key, []).append(index)

    def begin(self) -> None:
        """Tell of the tensors that have no bytes."""
        for index, left in enumerate(self._left):
            if left == 0:
                self._complete(index)

    def knows(self, key: ChunkKey) -> bool:
        return key in self._tensors

    def __call__(self, key: ChunkKey) -> None:
        for index in self._tensors.get(key, ()):
            with self._lock:
                self._left[index] -= 1
                done = self._left[index] == 0
            if done:
                self._complete(index)
