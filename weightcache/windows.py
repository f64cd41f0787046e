"""Own a model on its way in groups of tensors, a few at a time, so that no more of it is held than is used.

Never keeps a group that its tensors' users have let go of.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from weightcache.arrival import Arrival, Counter
from weightcache.delivery import Where, account, counter_of, hold_image, home_for, move, transfer_of
from weightcache.digest import Digest
from weightcache.layout import ChunkKey, Wanted, windows
from weightcache.machine import memory_available_bytes
from weightcache.modelfiles import missing_file_keys
from weightcache.session import Session, chunks_of, decide, describe_model, find_wanted, look
from weightcache.tiers.host import SharedImage
from weightcache.transfer import first_of

if TYPE_CHECKING:
    import torch

WINDOW_NBYTES = 256 << 20  # sixteen ranges: what the connections keep under way together
WINDOWS_AHEAD = 2  # one being used, one on its way; where more may wait, no more are on their way


class Windows:
    """A model on its way in groups of tensors, a few at a time, so that no more of it is held than is used.

    Iterating yields (tensor wanted, tensor) in the order they arrive, each verified. `begin` before, `close` after.
    """

    def __init__(self, session: Session, where: Where, *, with_files: bool = False) -> None:
        self.wanted: list[Wanted] = []
        self.files: dict[ChunkKey, memoryview] = {}
        self._session = session
        self._where = where
        self._with_files = with_files
        self._held: SharedImage | None = None
        self._stored: set[Digest] = set()
        self._described = threading.Event()
        self._is_described = False
        self._arrived: queue.SimpleQueue[tuple[Arrival, int] | None] = queue.SimpleQueue()
        self._on_their_way = asyncio.Semaphore(WINDOWS_AHEAD)
        self._gate = asyncio.Semaphore(WINDOWS_AHEAD)
        self._job = session.threads.start(self._bring())

    def begin(self) -> list[Wanted]:
        """Wait until the model is described, and return its tensors."""
        self._described.wait()
        if not self._is_described:
            self._job.result()  # raises
        return self.wanted

    def __iter__(self) -> Iterator[tuple[Wanted, torch.Tensor]]:
        from weightcache.tensors import CPU, Binder
        from weightcache.tiers.device import Slab

        by_name = {tensor.name: tensor for tensor in self.begin()}
        binders: dict[Arrival, tuple[Binder, list[int]]] = {}  # and how many of its tensors are still to come
        while (each := self._arrived.get()) is not None:
            arrival, index = each
            home = arrival.home
            if arrival not in binders:
                binder = Binder(home.base) if isinstance(home, Slab) else Binder.over(home.memory, CPU)
                binders[arrival] = binder, [len(home.tensors)]
            binder, left = binders[arrival]
            left[0] -= 1
            is_last = left[0] == 0
            if is_last:
                del binders[arrival]
            placed = home.tensors[index]
            given = [binder.bind(placed.entry, placed.offset)]  # popped: nothing here holds on to what the user lets go
            if not self._where.landing:
                given[0] = given[0].to(self._where.chosen)
            del each, arrival, home, binder
            yield by_name[placed.name], given.pop()
            if is_last:
                self._session.threads.loop.call_soon_threadsafe(self._gate.release)
        self._job.result()

    def close(self) -> None:
        """Stop what is under way."""
        self._job.cancel()

    async def _bring(self) -> None:
        session, report = self._session, self._session.report
        try:
            with report.stage("describe"):
                await describe_model(session)
            with report.stage("look"):
                self.wanted = find_wanted(session)
                self._held = await hold_image(session, self.wanted, self._where.landing)
                file_keys = missing_file_keys(session) if self._with_files else []
                keys = [*chunks_of(self.wanted), *file_keys]
                self._stored = look(session, keys)
                counter = counter_of(session, keys)
                self._is_described = True
                self._described.set()
            planned = list(windows(self.wanted, WINDOW_NBYTES, session.request.order))
            for _ in range(self._n_more(planned)):
                self._gate.release()
            with report.stage("move"):
                async with asyncio.TaskGroup() as group:
                    for number, window in enumerate(planned):
                        await self._gate.acquire()
                        group.create_task(self._bring_window(window, [] if number else file_keys, counter))
                    if not self.wanted:
                        group.create_task(self._bring_window([], file_keys, counter))
        except BaseExceptionGroup as failures:
            raise first_of(failures) from None
        finally:
            account(session)
            self._described.set()
            self._arrived.put(None)
            await session.close_origin()

    def _n_more(self, planned: Sequence[Sequence[Wanted]]) -> int:
        """Return how many windows may wait beyond the two, each as large as the largest."""
        share = self._session.request.ahead_share
        largest_nbytes = max((sum(tensor.entry.nbytes for tensor in window) for window in planned), default=0)
        if not share or not largest_nbytes:
            return 0
        landing = self._where.landing
        free_nbytes = memory_available_bytes() if landing is None else landing.free_nbytes()
        return max(0, int(share * free_nbytes) // largest_nbytes - WINDOWS_AHEAD)

    async def _bring_window(self, window: Sequence[Wanted], file_keys: Sequence[ChunkKey], counter: Counter) -> None:
        session, where, held = self._session, self._where, self._held
        owner: list[Arrival] = []
        keys = [*chunks_of(window), *file_keys]
        arrived = self._arrived
        async with self._on_their_way:
            home = await session.threads.on_worker(home_for, session, window, where, held)
            arrival = Arrival(session, home, keys, counter, lambda index: arrived.put((owner[0], index)))
            owner.append(arrival)
            try:
                arrival.begin()
                plan = decide(session, keys, self._stored, held.layout.chunks if held else ())
                await move(session, transfer_of(session, arrival, where.landing, held), plan)
                self.files.update(arrival.files)
            finally:
                owner.clear()
