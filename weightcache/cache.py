"""Own the way from a URI to tensors: the conductor of open, describe, look, decide, move and bind.

Never moves a byte itself, and makes nothing of a model visible before all of it is verified (`stream` yields tensors
one by one, each verified).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from weightcache.arrival import Arrival, Counter, OnChunk, Passing
from weightcache.artefacts import facts_of_machine, files_of, mismatch
from weightcache.checkpoint import select
from weightcache.delivery import (
    Where,
    account,
    counter_of,
    hold_image,
    home_for,
    lay_out_for,
    move,
    open_for,
    transfer_of,
)
from weightcache.errors import (
    CapacityError,
    ConfigError,
    DaemonError,
    ImageLostError,
    OriginChangedError,
    WeightcacheError,
    nearest,
)
from weightcache.layout import ChunkKey, carry
from weightcache.manifest import Manifest, Role
from weightcache.modelfiles import PulledFiles, file_keys, files_folder, missing_file_keys, place_files
from weightcache.planning import Plan
from weightcache.policy import Verb
from weightcache.report import Report
from weightcache.runtime import collection_paused
from weightcache.session import (
    Request,
    Session,
    chunks_of,
    decide,
    describe_model,
    fall_back,
    find_wanted,
    look,
    open_session,
    sizes_of,
    wanted_names,
)
from weightcache.tiers.host import (
    HeldImage,
    Image,
    allocate,
    allocate_shared,
    host_budget_bytes,
    host_tier,
    image_bytes,
    limit_freed,
)
from weightcache.windows import WINDOW_NBYTES, Windows

if TYPE_CHECKING:
    import torch

    from weightcache.tensors import LoadedModel

log = logging.getLogger(__name__)

T = TypeVar("T")

PREFETCH_TIERS = ("disk", "host")
FREED_NBYTES = WINDOW_NBYTES * 5 // 4  # one window, which is used again if it is at most a quarter too large


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """What a load would do, decided without moving a weight byte; `choices` are those of its report so far.

    Attributes:
        names: Of the tensors wanted, in file order; not in `as_dict`.
    """

    uri: str
    revision: str
    names: tuple[str, ...]
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
    choices: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "names"}


def load(request: Request, device: str | torch.device, dtype: str | torch.dtype | None = None) -> LoadedModel:
    """Bring a model's tensors to a device and bind them."""
    return _again(request, lambda request, report: _load(request, report, device, dtype))


def _again(request: Request, attempt: Callable[[Request, Report], T]) -> T:
    """Try once more from the start when the model changed meanwhile, or an image was lost that somebody else filled."""
    report = Report(uri=request.uri)
    n_changed = 0
    while True:
        try:
            return attempt(request, report)
        except OriginChangedError as exc:
            n_changed += 1
            if n_changed > 1:
                raise
            fall_back(report, f"the model changed while it was loaded, starting again once: {exc}")
        except ImageLostError as exc:
            request = replace(request, takes_images=False)
            fall_back(report, f"starting again without it: {exc}")
        # Not within the except block, whose traceback holds what the first attempt had loaded.
        report = Report(
            uri=request.uri,
            warnings=report.warnings,
            n_requests=report.n_requests,
            n_retries=report.n_retries,
            replicas=report.replicas,
        )


def _load(request: Request, report: Report, device: str | torch.device, dtype: str | torch.dtype | None) -> LoadedModel:
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
    _log_load("loaded", report)
    session.tell()
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
        with collection_paused():
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
            held = await hold_image(session, wanted, where.landing)
            keys = [*chunks_of(wanted), *missing_file_keys(session)]
            plan = decide(session, keys, look(session, keys), held.layout.chunks if held else ())
        with report.stage("move"):
            home = await session.threads.on_worker(home_for, session, wanted, where, held)
            arrival = Arrival(session, home, keys, counter_of(session, keys))
            del home
            transfer = transfer_of(session, arrival, where.landing, held, is_kept=where.landing is None)
            await move(session, transfer, plan)
        return arrival
    finally:
        account(session)
        await session.close_origin()


class TensorStream:
    """A model's tensors on their way; see `weightcache.stream`. Not thread-safe.

    Attributes:
        report: What is known of the load so far; whole when the last tensor was yielded.
    """

    def __init__(self, request: Request, device: str | torch.device) -> None:
        self.report = Report(uri=request.uri)
        self._names: tuple[str, ...] | None = None
        self._given = _stream(request, device, self.report)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, in file order. The first look begins the transfer, and raises what describing raises."""
        if self._names is None:
            try:
                self._names = next(self._given)
            except StopIteration:
                raise WeightcacheError(f"the stream of {self.report.uri} has ended; begin another") from None
        return self._names

    def __iter__(self) -> TensorStream:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        if self._names is None:
            self._names = next(self._given)
        given: tuple[str, torch.Tensor] = next(self._given)
        return given

    def close(self) -> None:
        """Stop the transfer. May be called twice."""
        self._given.close()


def _stream(request: Request, device: str | torch.device, report: Report) -> Generator[Any, None, None]:
    """Yield the names of all tensors, and then each with its name."""
    revision, left = None, set[str]()
    while True:
        session, where = open_for(request, device, report)
        limit_freed(min(session.settings.host_budget_bytes or FREED_NBYTES, FREED_NBYTES))
        windows_ahead = Windows(session, where)
        try:
            names = tuple(tensor.name for tensor in windows_ahead.begin())
            report.device = str(where.chosen)
            if revision is None:
                revision, left = session.manifest.revision, set(names)
                yield names
            elif revision != session.manifest.revision:
                raise OriginChangedError(f"{session.name} changed while it was streamed; stream again")
            for wanted, tensor in windows_ahead:
                given = [(wanted.name, tensor)]  # popped: nothing here holds on to what the user lets go
                left.discard(wanted.name)
                report.n_tensors += 1
                report.tensor_bytes += tensor.nbytes
                del tensor
                yield given.pop()
            _log_load("streamed", report)
            return
        except ImageLostError as exc:
            fall_back(report, f"going on without it: {exc}")
        finally:
            windows_ahead.close()
            session.settle()
            session.release()
            limit_freed(0)  # who streams has the tensors elsewhere now, and another use for the memory
        order = request.order if callable(request.order) else [name for name in request.order if name in left]
        request = replace(request, takes_images=False, names=frozenset(left), include=None, exclude=None, order=order)


def _log_load(did: str, report: Report) -> None:
    log.info(
        "%s %s: %d tensors, %d bytes in %.3f s (%.2f GB/s; origin %d, disk %d, host %d)",
        did,
        report.uri,
        report.n_tensors,
        report.tensor_bytes,
        report.total_s,
        report.gb_per_s,
        report.bytes["origin"],
        report.bytes["disk"],
        report.bytes["host"],
    )


def _bring_converted(
    session: Session, where: Where, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, Path]]:
    """Bring all tensors in windows, and convert each on its device into its place."""
    from weightcache.tensors import allocate_converted

    report = session.report
    ahead = Windows(session, where, with_files=True)
    try:
        entries = {tensor.name: tensor.entry for tensor in ahead.begin()}
        tensors = allocate_converted(entries, dtype, lambda nbytes: _allocate(where, nbytes))
        for wanted, tensor in ahead:
            tensors[wanted.name].copy_(tensor)
        if where.landing is not None:
            where.landing.finish()
        report.choices["dtype"] = f"floating-point tensors were converted to {dtype} on {where.chosen}"
    finally:
        ahead.close()
    with report.stage("files"):
        return tensors, place_files(session, ahead.files)


def _allocate(where: Where, nbytes: int) -> torch.Tensor:
    """Return memory of the device of a load, as bytes."""
    import torch

    if where.landing is not None:
        return where.landing.allocate(nbytes)
    if where.chosen.type == "cpu":
        return torch.frombuffer(allocate(nbytes), dtype=torch.uint8)
    return torch.empty(nbytes, dtype=torch.uint8, device=where.chosen)


def load_into(request: Request, module: torch.nn.Module, *, strict: bool) -> Report:
    """Fill a module in place; see `weightcache.load_into`."""
    return _again(request, lambda request, report: _load_into(request, module, report, strict=strict))


def _load_into(request: Request, module: torch.nn.Module, report: Report, *, strict: bool) -> Report:
    from weightcache.tensors import check_fit, devices_of, fill_module, torch_form

    with _described(request, report, may_attach=True) as session:
        wanted, revision = wanted_names(request), session.manifest.revision
        shapes = {name: torch_form(entry)[1] for name, _, entry in session.manifest.tensors() if wanted(name)}
    names = check_fit(module, shapes, strict=strict)
    for device, names_there in devices_of(module, names).items():
        session, where = open_for(replace(request, names=frozenset(names_there)), device, report)
        ahead = Windows(session, where)
        try:
            ahead.begin()
            if session.manifest.revision != revision:
                raise OriginChangedError(f"{session.name} changed between two parts of a load; load again")
            fill_module(module, ((wanted.name, tensor) for wanted, tensor in ahead))
        finally:
            ahead.close()
            session.settle()
            session.release()
        report.device = str(where.chosen)
    report.n_tensors = len(names)
    return report


@contextlib.contextmanager
def _described(request: Request, report: Report, *, may_attach: bool = False) -> Iterator[Session]:
    """Describe a model for the length of the block; its origin is closed."""
    session = open_session(request, report, may_attach=may_attach)

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
    report = Report(uri=request.uri)
    with _described(request, report) as session:
        wanted = find_wanted(session)
        manifest = session.manifest
        held = session.threads.run(hold_image(session, wanted))
        keys = [*chunks_of(wanted), *missing_file_keys(session)]
        decided = decide(session, keys, look(session, keys), held.layout.chunks if held else ())
        image_nbytes = lay_out_for(session, wanted).nbytes
    return PlannedLoad(
        uri=request.uri,
        revision=str(manifest.revision),
        names=tuple(tensor.name for tensor in wanted),
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
        choices=report.choices,
    )


def prefetch(request: Request, tier: str) -> Report:
    """Bring a model to a tier of this node; see `weightcache.prefetch`."""
    if tier not in PREFETCH_TIERS:
        raise ConfigError(f"tier={tier!r}: expected one of {', '.join(PREFETCH_TIERS)}{nearest(tier, PREFETCH_TIERS)}")
    report = Report(uri=request.uri)
    request = replace(request, verb=Verb.PREFETCH, takes_images=tier == "host")
    if tier == "host":
        return keep_in_host(replace(request, cache="auto"), report)
    with report.stage("open"):
        session = open_session(replace(request, cache="disk"), report)

    def check_kept() -> None:
        if session.tally.disk_failure:
            raise CapacityError(
                f"{session.name} cannot be kept on disk: {session.tally.disk_failure}; free some space, evict models or "
                "raise the budget",
                uri=str(session.name),
            )

    wanted = [Role.WEIGHTS, Role.FILE]
    _through(session, lambda: select(session.manifest, wanted), lambda key, view: check_kept(), report, keep_only=True)
    check_kept()
    return report


@dataclass(frozen=True, slots=True)
class Kept:
    """A model in host memory.

    Attributes:
        held: Its image.
        manifest: What that is of.
        files: Where its configuration and tokenizer lie, if they lie on this node.
        base: The URI of the model that it was made from, as it was published; or empty.
    """

    held: HeldImage
    manifest: Manifest
    files: Path | None
    base: str = ""


def keep_in_host(
    request: Request,
    report: Report,
    on_kept: Callable[[Kept], None] | None = None,
    *,
    here_only: bool = False,
    is_ahead: bool = False,
) -> Report:
    """Bring a model's tensors into an image that this process keeps.

    Args:
        request: Of a model.
        report: Of this.
        on_kept: Called on the loop thread as soon as there is an image to attach to, which may still be being filled.
            It is held for whoever is told: `host_tier.let_go` of it.
        here_only: Fill none.
        is_ahead: Nobody asked for it: fill none for which models of more value would leave.
    """
    with report.stage("open"):
        session = open_session(request, report)

    def tell(held: HeldImage) -> None:
        if on_kept is not None and host_tier.hold_again(held, time.time()):
            on_kept(Kept(held, session.manifest, files_folder(session), base_of(session)))

    async def take(held: HeldImage) -> dict[ChunkKey, memoryview]:
        """Take an image that somebody else fills, or has filled."""
        session.held.callback(host_tier.let_go, held)
        tell(held)
        if on_kept is None:
            with report.stage("move"):
                await held.wait(held.layout.chunks)
        return {}

    async def bring() -> dict[ChunkKey, memoryview]:
        try:
            with report.stage("describe"):
                await describe_model(session)
            with report.stage("look"):
                if not all(shard.etag for shard in session.manifest.weights):
                    raise ConfigError(
                        f"{session.name} cannot be kept in host memory: its origin gives no ETag or date by which its states "
                        "could be told apart; prefetch it to 'disk'"
                    )
                here = host_tier.hold(session.key, str(session.manifest.revision), (), time.time())
            if here is not None:
                return await take(here)
            if here_only:
                raise DaemonError(f"{session.name} is not in host memory", uri=str(session.name))
            return await fill()
        finally:
            account(session)
            await session.close_origin()

    async def fill() -> dict[ChunkKey, memoryview]:
        with report.stage("look"):
            wanted = find_wanted(session)
            carried = file_keys(session.manifest)
            keys = [*chunks_of(wanted), *carried, *([] if carried else missing_file_keys(session))]
            sizes = sizes_of(session.manifest, keys)
            layout = carry(lay_out_for(session, wanted), {key: sizes[key] for key in carried})
            plan = decide(session, keys, look(session, keys))
            budget_bytes = host_budget_bytes(session.settings.host_budget_bytes)
        nbytes, now_s = image_bytes(layout), time.time()
        if is_ahead:
            host_tier.admit(session.key, str(session.name), nbytes, budget_bytes, now_s)
        with host_tier.room(nbytes, budget_bytes, now_s):
            memory = allocate_shared(nbytes, "weightcache")
            mine = HeldImage(str(session.name), str(session.manifest.revision), layout, memory)
            held = host_tier.keep(session.key, mine, time.time())
        if held is not mine:
            return await take(held)
        try:
            tell(held)
            image = Image(layout, sizes, memory)
            arrival = Arrival(session, image, keys, counter_of(session, keys), on_chunk=held.arrived)
            arrival.begin()
            # Whoever fills it is one of its users.
            transfer = transfer_of(session, arrival, is_kept=True, is_awaited=lambda: held.n_users > 1)
            with report.stage("move"):
                await move(session, transfer, plan)
                await session.threads.on_worker(held.freeze)
        except BaseException as exc:
            is_broken_off = isinstance(exc, asyncio.CancelledError)
            host_tier.give_up(held, "it was broken off" if is_broken_off else str(exc) or type(exc).__name__)
            raise
        finally:
            host_tier.let_go(held)
        report.choices["memory"] = held.pages()
        return arrival.files | dict(zip(carried, image.claim(carried), strict=True))

    try:
        files = session.threads.run(bring())
        if files:
            place_files(session, files)
    finally:
        wait_stored = session.settle()
        session.release()
    with report.stage("settle"):
        wait_stored(None)
    return report


def base_of(session: Session) -> str:
    """Return the URI of the model that a published one was made from; empty where that is not known."""
    root = str(session.name).rpartition(f"/{session.name.model}@")[0]
    return session.base if "://" in session.base or not (session.base and root) else f"{root}/{session.base}"


def pull(request: Request, folder: Path, *, weights: bool, headers: bool) -> Report:
    """Write a model's files, bit for bit; see `weightcache.pull`."""
    report = Report(uri=request.uri)
    with report.stage("open"):
        session = open_session(replace(request, needs_weights=False), report)

    roles = {Role.FILE: True, Role.WEIGHTS: weights or headers, Role.FOREIGN: weights}

    def names() -> dict[int, str]:
        return {index: shard.path for index, shard in enumerate(session.manifest.shards) if roles.get(shard.role)}

    _pull(session, folder, names, headers_only=not weights)
    return report


def place_artefacts(request: Request, folder: Path) -> dict[str, str]:
    """Write the bundles that fit this machine below a folder, each in one of its own; say of each what became of it."""
    here = facts_of_machine()
    session = open_session(request, Report(uri=request.uri))
    told: dict[str, str] = {}

    def names() -> dict[int, str]:
        found: dict[int, str] = {}
        for bundle in session.bundles:
            why_not = mismatch(bundle, here)
            told[bundle.name] = f"left out: {why_not}" if why_not else f"placed in {folder / bundle.name}"
            if not why_not:
                files = files_of(bundle.name, session.manifest.shards)
                found |= {index: f"{bundle.name}/{name}" for index, name in files.items()}
        return found

    _pull(session, folder, names)
    return told


def _pull(
    session: Session, folder: Path, choose: Callable[[], Mapping[int, str]], *, headers_only: bool = False
) -> None:
    """Write files: those whose indexes are chosen when the model is described, by the names chosen for them."""
    pulled = PulledFiles(folder)

    def keys() -> list[ChunkKey]:
        names = choose()
        pulled.begin(session.manifest, names)
        shards = {index: session.manifest.shards[index] for index in names}
        stops = {index: shard.tensors[0].start for index, shard in shards.items() if headers_only and shard.tensors}
        return [
            (index, number)
            for index, shard in shards.items()
            for number, chunk in enumerate(shard.chunks)
            if chunk.start < stops.get(index, shard.nbytes)
        ]

    try:
        _through(session, keys, pulled.write, session.report)
        with session.report.stage("files"):
            pulled.publish()
    finally:
        pulled.close()


def _through(
    session: Session,
    choose: Callable[[], list[ChunkKey]],
    on_chunk: OnChunk,
    report: Report,
    *,
    keep_only: bool = False,
) -> None:
    """Move chunks, chosen once the model is described, through scratch memory, past `on_chunk`, to disk."""

    async def bring() -> None:
        try:
            with report.stage("describe"):
                await describe_model(session)
            with report.stage("look"):
                keys = choose()
                decided = decide(session, keys, look(session, keys))
                if keep_only:
                    decided = Plan((), (), decided.fetches)
                counter = Counter(session.request.progress, decided.disk_nbytes + decided.origin_nbytes)
            with report.stage("move"):
                passing = Passing(session, keys, on_chunk, counter)
                transfer = transfer_of(session, passing, wait_for_disk=True, is_awaited=lambda: not keep_only)
                await move(session, transfer, decided)
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
