"""Own the way from a URI to tensors: the conductor of open, describe, look, decide, move and bind.

Never moves a byte itself, and makes nothing of a model visible before all of it is verified (`stream` yields tensors
one by one, each verified).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightcache.checkpoint import select
from weightcache.errors import CapacityError, ConfigError, OriginChangedError
from weightcache.layout import ChunkKey, Layout
from weightcache.manifest import Role
from weightcache.modelfiles import PulledFiles, missing_file_keys, place_files
from weightcache.origins.base import Stat
from weightcache.planning import Plan
from weightcache.report import Report
from weightcache.session import (
    Progress,
    Request,
    Session,
    decide,
    describe_model,
    fall_back,
    lay_out_wanted,
    open_session,
    sizes_of,
    wanted_names,
)
from weightcache.tiers.host import Image, Scratch
from weightcache.transfer import Destination, Keeping, Transfer

if TYPE_CHECKING:
    import torch

    from weightcache.tensors import LoadedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """What a load would do, decided without moving a weight byte."""

    uri: str
    revision: str
    n_tensors: int
    tensor_bytes: int
    image_bytes: int
    n_shards: int
    n_files: int
    disk_bytes: int
    origin_bytes: int
    n_reads: int
    n_fetches: int

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


class _Arrival:
    """Where chunks go: tensors' into the image, files' into scratch memory; and who hears of it.

    `on_tensor` is called with a tensor's index in the layout when it lies whole in its place; from worker threads.
    """

    def __init__(
        self,
        session: Session,
        layout: Layout,
        keys: Sequence[ChunkKey],
        on_tensor: Callable[[int], None] = lambda index: None,
    ) -> None:
        sizes = sizes_of(session.manifest, keys)
        self.image = Image(layout, sizes)
        self.files: dict[ChunkKey, memoryview] = {}
        self._scratch = Scratch(sizes)
        self._counter = _Counter(session.request.progress, sum(sizes.values()))
        image = self.image

        def complete(index: int) -> None:  # no method: it would hold this object, and the image, in a cycle
            image.settle(layout.tensors[index])
            on_tensor(index)

        self._completion = _Completion(layout, complete)

    def claim(self, keys: Sequence[ChunkKey]) -> list[memoryview]:
        return (self.image if keys[0] in self.image.layout.chunks else self._scratch).claim(keys)

    def arrived(self, key: ChunkKey, view: memoryview) -> None:
        if key in self.image.layout.chunks:
            self._completion(key)
        else:
            self.files[key] = view
        self._counter.add(len(view))


class _Counter:
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


def _transfer(
    session: Session,
    destination: Destination,
    on_chunk: Callable[[ChunkKey, memoryview], None],
    *,
    wait_for_disk: bool = False,
) -> Transfer:
    keeping = None
    if session.disk is not None and session.behind is not None:
        session.flight = session.disk.flight()
        keeping = Keeping(session.disk, session.shard_keys, session.flight, session.behind)
    return Transfer(
        manifest=session.manifest,
        origin=session.origin,
        keeping=keeping,
        destination=destination,
        on_chunk=on_chunk,
        threads=session.threads,
        connections=session.settings.connections,
        wait_for_disk=wait_for_disk,
        tally=session.tally,
    )


async def _move(session: Session, transfer: Transfer, plan: Plan) -> None:
    try:
        await transfer.run(plan)
        if session.origin is not None and plan.fetches:
            shards = [session.manifest.shards[index] for index in sorted({fetch.shard for fetch in plan.fetches})]
            await session.origin.check_unchanged([Stat(shard.path, shard.nbytes, shard.etag) for shard in shards])
    finally:
        tally, report = transfer.tally, session.report
        report.bytes["origin"] += tally.origin_bytes
        report.bytes["disk"] += tally.disk_bytes
        if tally.followed_bytes:
            report.choices["fetch"] = (
                f"{tally.followed_bytes} of the bytes from disk were fetched by other processes meanwhile"
            )
        if tally.n_rotten:
            report.warnings.append(f"{tally.n_rotten} chunks on disk were lost or rotten and fetched again")


def load(request: Request, device: str | torch.device) -> LoadedModel:
    """Bring a model's tensors to a device and bind them."""
    report = Report(uri=request.uri)
    try:
        return _load(request, device, report)
    except OriginChangedError as exc:
        fall_back(report, f"the model changed while it was loaded, starting again once: {exc}")
        again = Report(uri=request.uri, warnings=report.warnings)
        return _load(request, device, again)


def _load(request: Request, device: str | torch.device, report: Report) -> LoadedModel:
    with report.stage("import"):
        from weightcache.tensors import Binder, LoadedModel, resolve_device
    with report.stage("open"):
        chosen, why = resolve_device(device)
        if why:
            report.choices["device"] = why
        session = open_session(request, report)
    try:
        arrival, layout = session.threads.run(_bring(session))
        with report.stage("bind"):
            memory = arrival.image.memory
            report.choices["memory"] = arrival.image.pages()
            binder = Binder.over(memory, chosen)
            tensors = {placed.name: binder.bind(placed.entry, placed.offset) for placed in layout.tensors}
        with report.stage("files"):
            files = place_files(session, arrival.files)
    except BaseException:
        session.release()
        raise
    finally:
        wait_stored = session.settle()
    report.device = str(chosen)
    report.n_tensors = len(tensors)
    report.tensor_bytes = sum(placed.entry.nbytes for placed in layout.tensors)
    log.info(
        "loaded %s: %d tensors, %d bytes in %.3f s (%.2f GB/s; origin %d, disk %d)",
        report.uri,
        report.n_tensors,
        report.tensor_bytes,
        report.total_s,
        report.gb_per_s,
        report.bytes["origin"],
        report.bytes["disk"],
    )

    return LoadedModel(tensors, files, report, session.release, wait_stored)


async def _bring(session: Session) -> tuple[_Arrival, Layout]:
    """Describe, look, decide and move, within the deadline."""
    report = session.report
    try:
        with report.stage("describe"):
            await describe_model(session)
        with report.stage("look"):
            layout = lay_out_wanted(session)
            keys = [*layout.chunks, *missing_file_keys(session)]
            plan = decide(session, keys)
        with report.stage("move"):
            arrival = _Arrival(session, layout, keys)
            transfer = _transfer(session, arrival, arrival.arrived)
            await _move(session, transfer, plan)
        return arrival, layout
    finally:
        await session.close_origin()


def stream(request: Request, device: str | torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors as they arrive; see `weightcache.stream`."""
    from weightcache.tensors import CPU, Binder, resolve_device

    report = Report(uri=request.uri)
    chosen, _ = resolve_device(device)
    session = open_session(request, report)
    arrived: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # indexes of placements; None ends it
    begun: queue.SimpleQueue[tuple[_Arrival, Layout] | None] = queue.SimpleQueue()

    async def bring() -> None:
        try:
            await describe_model(session)
            layout = lay_out_wanted(session)
            plan = decide(session, list(layout.chunks))
            arrival = _Arrival(session, layout, list(layout.chunks), arrived.put)
            begun.put((arrival, layout))
            await _move(session, _transfer(session, arrival, arrival.arrived), plan)
        finally:
            begun.put(None)
            arrived.put(None)
            await session.close_origin()

    job = session.threads.start(bring())
    try:
        ready = begun.get()
        if ready is not None:
            arrival, layout = ready
            base = Binder.over(arrival.image.memory, CPU)
            while (index := arrived.get()) is not None:
                placed = layout.tensors[index]
                tensor = base.bind(placed.entry, placed.offset)
                yield placed.name, tensor if chosen.type == "cpu" else tensor.to(chosen)
        job.outcome.result()
    finally:
        job.cancel()
        session.settle()
        session.release()


class _Completion:
    """Tells when a tensor's last chunk has arrived. Called from worker threads."""

    def __init__(self, layout: Layout, complete: Callable[[int], None]) -> None:
        self._lock = threading.Lock()
        self._complete = complete
        self._left = [len(placed.chunks) for placed in layout.tensors]
        self._tensors: dict[ChunkKey, list[int]] = {}
        for index, placed in enumerate(layout.tensors):
            for key in placed.chunks:
                self._tensors.setdefault(key, []).append(index)
            if not placed.chunks:
                complete(index)

    def __call__(self, key: ChunkKey) -> None:
        for index in self._tensors[key]:
            with self._lock:
                self._left[index] -= 1
                done = self._left[index] == 0
            if done:
                self._complete(index)


def load_into(request: Request, module: torch.nn.Module, *, strict: bool) -> Report:
    """Fill a module in place; see `weightcache.load_into`."""
    from weightcache.tensors import check_fit, fill_module, torch_form

    with _described(request) as session:
        wanted = wanted_names(request)
        shapes = {name: torch_form(entry)[1] for name, _, entry in session.manifest.tensors() if wanted(name)}
    names = check_fit(module, shapes, strict=strict)
    report = Report(uri=request.uri)
    with load(replace(request, names=frozenset(names)), "cpu") as model:
        with report.stage("fill"):
            fill_module(module, model.items())
        model.report.seconds.update(report.seconds)
        return model.report


@contextlib.contextmanager
def _described(request: Request) -> Iterator[Session]:
    """Describe a model for the length of the block; its origin is closed."""
    session = open_session(request, Report(uri=request.uri))

    async def bring() -> None:
        try:
            await describe_model(session)
        finally:
            await session.close_origin()

    try:
        session.threads.run(bring())
        yield session
    finally:
        session.settle()
        session.release()


def plan(request: Request) -> PlannedLoad:
    """Decide what a load would do; see `weightcache.plan`."""
    with _described(request) as session:
        layout = lay_out_wanted(session)
        decided = decide(session, [*layout.chunks, *missing_file_keys(session)])
        manifest = session.manifest
    return PlannedLoad(
        uri=request.uri,
        revision=str(manifest.revision),
        n_tensors=len(layout.tensors),
        tensor_bytes=sum(placed.entry.nbytes for placed in layout.tensors),
        image_bytes=layout.nbytes,
        n_shards=len(manifest.weights),
        n_files=sum(shard.role is Role.FILE for shard in manifest.shards),
        disk_bytes=decided.disk_nbytes,
        origin_bytes=decided.origin_nbytes,
        n_reads=len(decided.reads),
        n_fetches=len(decided.fetches),
    )


def prefetch(request: Request, tier: str) -> Report:
    """Bring a model to a tier of this node; see `weightcache.prefetch`."""
    if tier != "disk":
        raise ConfigError(
            f"tier={tier!r}: a process by itself can prefetch to 'disk'; host memory needs a daemon to own it"
        )
    if request.cache == "none":
        raise ConfigError("prefetch with cache='none' would keep nothing: leave cache out")
    report = Report(uri=request.uri)
    with report.stage("open"):
        session = open_session(replace(request, cache="disk"), report)

    def check_kept(*_: object) -> None:
        if session.tally.disk_failure:
            raise CapacityError(
                f"{session.name} cannot be kept on disk: {session.tally.disk_failure}; free some space, evict models or "
                "raise the budget",
                uri=str(session.name),
            )

    _through(session, [Role.WEIGHTS, Role.FILE], check_kept, report, keep_only=True)
    check_kept()
    return report


def pull(request: Request, folder: Path) -> Report:
    """Write a model's files, bit for bit; see `weightcache.pull`."""
    report = Report(uri=request.uri)
    with report.stage("open"):
        session = open_session(request, report)
    pulled = PulledFiles(folder)
    try:
        _through(session, list(Role), pulled.write, report, before=lambda: pulled.begin(session.manifest))
        with report.stage("files"):
            pulled.publish()
    finally:
        pulled.close()
    return report


def _through(
    session: Session,
    roles: Sequence[Role],
    on_chunk: Callable[[ChunkKey, memoryview], None],
    report: Report,
    *,
    before: Callable[[], None] = lambda: None,
    keep_only: bool = False,
) -> None:
    """Move the chunks of whole files through scratch memory, past `on_chunk`, to disk."""

    async def bring() -> None:
        try:
            with report.stage("describe"):
                await describe_model(session)
            with report.stage("look"):
                before()
                keys = select(session.manifest, roles)
                decided = decide(session, keys)
                if keep_only:
                    decided = Plan((), decided.fetches)
                counter = _Counter(session.request.progress, decided.disk_nbytes + decided.origin_nbytes)

                def arrived(key: ChunkKey, view: memoryview) -> None:
                    on_chunk(key, view)
                    counter.add(len(view))

            with report.stage("move"):
                scratch = Scratch(sizes_of(session.manifest, keys))
                transfer = _transfer(session, scratch, arrived, wait_for_disk=True)
                await _move(session, transfer, decided)
        finally:
            await session.close_origin()

    try:
        session.threads.run(bring())
    finally:
        wait_stored = session.settle()
        session.release()
    with report.stage("settle"):
        wait_stored(None)
