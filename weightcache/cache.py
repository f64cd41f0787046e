"""Own the way from a URI to tensors: the conductor of open, describe, look, decide, move and bind.

Never moves a byte itself, and makes nothing of a model visible before all of it is verified (`stream` yields tensors
one by one, each verified).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightcache.arrival import Arrival, Counter, OnChunk, Passing
from weightcache.checkpoint import select
from weightcache.delivery import (
    Where,
    account,
    counter_of,
    find_held,
    home_for,
    is_attached,
    lay_out_for,
    move,
    open_for,
    transfer_of,
    using,
)
from weightcache.errors import CapacityError, ConfigError, OriginChangedError, nearest
from weightcache.layout import lay_out
from weightcache.manifest import Role
from weightcache.modelfiles import PulledFiles, missing_file_keys, place_files
from weightcache.planning import Plan
from weightcache.report import Report
from weightcache.session import (
    Request,
    Session,
    chunks_of,
    decide,
    describe_model,
    fall_back,
    find_wanted,
    open_session,
    sizes_of,
    wanted_names,
)
from weightcache.tiers.host import HeldImage, Image, allocate_shared, host_budget_bytes, host_tier, image_bytes
from weightcache.windows import Windows

if TYPE_CHECKING:
    import torch

    from weightcache.tensors import LoadedModel

log = logging.getLogger(__name__)

PREFETCH_TIERS = ("disk", "host")


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
    host_bytes: int
    disk_bytes: int
    origin_bytes: int
    n_reads: int
    n_fetches: int

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def load(request: Request, device: str | torch.device, dtype: str | torch.dtype | None = None) -> LoadedModel:
    """Bring a model's tensors to a device and bind them."""
    report = Report(uri=request.uri)
    try:
        return _load(request, device, dtype, report)
    except OriginChangedError as exc:
        fall_back(report, f"the model changed while it was loaded, starting again once: {exc}")
        again = Report(uri=request.uri, warnings=report.warnings)
        return _load(request, device, dtype, again)


def _load(request: Request, device: str | torch.device, dtype: str | torch.dtype | None, report: Report) -> LoadedModel:
    with report.stage("import"):
        from weightcache.tensors import LoadedModel, resolve_dtype
    with report.stage("open"):
        wanted_dtype = resolve_dtype(dtype)
        session, where = open_for(request, device, report)
    try:
        if wanted_dtype is None:
            tensors, files = _bring_whole(session, where)
        else:
            tensors, files = _bring_converted(session, where, wanted_dtype)
    except BaseException:
        session.release()
        raise
    finally:
        wait_stored = session.settle()
    report.device = str(where.chosen)
    report.n_tensors = len(tensors)
    report.tensor_bytes = sum(tensor.nbytes for tensor in tensors.values())
    log.info(
        "loaded %s: %d tensors, %d bytes in %.3f s (%.2f GB/s; origin %d, disk %d, host %d)",
        report.uri,
        report.n_tensors,
        report.tensor_bytes,
        report.total_s,
        report.gb_per_s,
        report.bytes["origin"],
        report.bytes["disk"],
        report.bytes["host"],
    )
    return LoadedModel(tensors, files, report, session.release, wait_stored)


def _bring_whole(session: Session, where: Where) -> tuple[dict[str, torch.Tensor], dict[str, Path]]:
    """Bring all tensors into one image, or one slab, and bind them."""
    from weightcache.tensors import Binder
    from weightcache.tiers.device import Slab

    report = session.report
    arrival = session.threads.run(_bring(session, where))
    with report.stage("bind"):
        home = arrival.home
        if not isinstance(home, Slab):
            report.choices["memory"] = home.pages()
        binder = Binder(home.base) if isinstance(home, Slab) else Binder.over(home.memory, where.chosen)
        tensors = {placed.name: binder.bind(placed.entry, placed.offset) for placed in home.tensors}
    with report.stage("files"):
        files = place_files(session, arrival.files)
    return tensors, files


async def _bring(session: Session, where: Where) -> Arrival:
    """Describe, look, decide and move, within the deadline."""
    report = session.report
    try:
        with report.stage("describe"):
            await describe_model(session)
        with report.stage("look"):
            wanted = find_wanted(session)
            held = find_held(session, wanted)
            keys = [*([] if is_attached(held, where) else chunks_of(wanted)), *missing_file_keys(session)]
            plan = decide(session, keys, held.layout.chunks if held else ())
        with report.stage("move"):
            arrival = Arrival(session, home_for(session, wanted, where, held), keys, counter_of(session, keys))
            with using(session, held, where):
                await move(session, transfer_of(session, arrival, where.landing, held), plan)
        return arrival
    finally:
        account(session)
        await session.close_origin()


def stream(request: Request, device: str | torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors as they arrive; see `weightcache.stream`."""
    session, where = open_for(request, device, Report(uri=request.uri))
    windows_ahead = Windows(session, where)
    try:
        for wanted, tensor in windows_ahead:
            yield wanted.name, tensor
    finally:
        windows_ahead.close()
        session.settle()
        session.release()


def _bring_converted(
    session: Session, where: Where, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, Path]]:
    """Bring all tensors in windows, and convert each on its device into its place."""
    from weightcache.tensors import allocate_converted

    report = session.report
    ahead = Windows(session, where, with_files=True)
    try:
        entries = {tensor.name: tensor.entry for tensor in ahead.begin()}
        allocate = where.landing.allocate if where.landing else None
        tensors = allocate_converted(entries, dtype, where.chosen, allocate)
        for wanted, tensor in ahead:
            tensors[wanted.name].copy_(tensor)
        report.choices["dtype"] = f"floating-point tensors were converted to {dtype} on {where.chosen}"
    finally:
        ahead.close()
    with report.stage("files"):
        return tensors, place_files(session, ahead.files)


def load_into(request: Request, module: torch.nn.Module, *, strict: bool) -> Report:
    """Fill a module in place; see `weightcache.load_into`."""
    from weightcache.tensors import check_fit, devices_of, fill_module, torch_form

    with _described(request) as session:
        wanted = wanted_names(request)
        shapes = {name: torch_form(entry)[1] for name, _, entry in session.manifest.tensors() if wanted(name)}
    names = check_fit(module, shapes, strict=strict)
    report = Report(uri=request.uri)
    for device, names_there in devices_of(module, names).items():
        session, where = open_for(replace(request, names=frozenset(names_there)), device, report)
        ahead = Windows(session, where)
        try:
            fill_module(module, ((wanted.name, tensor) for wanted, tensor in ahead))
            report.revision = str(session.manifest.revision)
        finally:
            ahead.close()
            session.settle()
            session.release()
        report.device = str(where.chosen)
    report.n_tensors = len(names)
    return report


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
        wanted = find_wanted(session)
        manifest = session.manifest
        held = find_held(session, wanted)
        keys = [*chunks_of(wanted), *missing_file_keys(session)]
        decided = decide(session, keys, held.layout.chunks if held else ())
        image_nbytes = lay_out(manifest, wanted).nbytes
    return PlannedLoad(
        uri=request.uri,
        revision=str(manifest.revision),
        n_tensors=len(wanted),
        tensor_bytes=sum(tensor.entry.nbytes for tensor in wanted),
        image_bytes=image_nbytes,
        n_shards=len(manifest.weights),
        n_files=sum(shard.role is Role.FILE for shard in manifest.shards),
        host_bytes=decided.host_nbytes,
        disk_bytes=decided.disk_nbytes,
        origin_bytes=decided.origin_nbytes,
        n_reads=len(decided.reads),
        n_fetches=len(decided.fetches),
    )


def prefetch(request: Request, tier: str) -> Report:
    """Bring a model to a tier of this node; see `weightcache.prefetch`."""
    if tier not in PREFETCH_TIERS:
        raise ConfigError(f"tier={tier!r}: expected one of {', '.join(PREFETCH_TIERS)}{nearest(tier, PREFETCH_TIERS)}")
    if request.cache == "none":
        raise ConfigError("prefetch with cache='none' would keep nothing: leave cache out")
    report = Report(uri=request.uri)
    if tier == "host":
        return _prefetch_to_host(replace(request, cache="auto"), report)
    with report.stage("open"):
        session = open_session(replace(request, cache="disk"), report)

    def check_kept() -> None:
        if session.tally.disk_failure:
            raise CapacityError(
                f"{session.name} cannot be kept on disk: {session.tally.disk_failure}; free some space, evict models or "
                "raise the budget",
                uri=str(session.name),
            )

    _through(session, [Role.WEIGHTS, Role.FILE], lambda key, view: check_kept(), report, keep_only=True)
    check_kept()
    return report


def _prefetch_to_host(request: Request, report: Report) -> Report:
    """Bring a model's tensors into an image that this process keeps."""
    with report.stage("open"):
        session = open_session(request, report)

    async def bring() -> None:
        try:
            with report.stage("describe"):
                await describe_model(session)
            with report.stage("look"):
                wanted = find_wanted(session)
                if find_held(session, wanted) is not None:
                    return
                keys = chunks_of(wanted)
                sizes, layout = sizes_of(session.manifest, keys), lay_out_for(session, wanted)
                host_tier.make_room(image_bytes(layout), host_budget_bytes(session.settings.host_budget_bytes))
                memory = allocate_shared(image_bytes(layout), "weightcache")
                image = Image(layout, sizes, memory)
                plan = decide(session, keys)
            with report.stage("move"):
                arrival = Arrival(session, image, keys, counter_of(session, keys))
                await move(session, transfer_of(session, arrival), plan)
                held = HeldImage(str(session.name), str(session.manifest.revision), layout, memory)
            report.choices["memory"] = held.pages()
            host_tier.keep(session.key, held)
        finally:
            account(session)
            await session.close_origin()

    try:
        session.threads.run(bring())
    finally:
        wait_stored = session.settle()
        session.release()
    with report.stage("settle"):
        wait_stored(None)
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
    on_chunk: OnChunk,
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
                    decided = Plan((), (), decided.fetches)
                counter = Counter(session.request.progress, decided.disk_nbytes + decided.origin_nbytes)
            with report.stage("move"):
                passing = Passing(session, keys, on_chunk, counter)
                await move(session, transfer_of(session, passing, wait_for_disk=True), decided)
        finally:
            account(session)
            await session.close_origin()

    try:
        session.threads.run(bring())
    finally:
        wait_stored = session.settle()
        session.release()
    with report.stage("settle"):
        wait_stored(None)
