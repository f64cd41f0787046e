"""Own the delivery of one request: the device it is for, the memory its tensors go to, what fills that, what is said.

Never describes a model and never binds a tensor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from weightcache import meters
from weightcache.arrival import Counter
from weightcache.config import read_settings
from weightcache.errors import DeadlineError, DeviceError
from weightcache.layout import ChunkKey, Layout, Wanted, lay_out, lay_out_in_place, pack
from weightcache.locks import exclusive
from weightcache.machine import memory_available_bytes
from weightcache.operations import Crew
from weightcache.origins.base import Stat
from weightcache.origins.pace import throttle
from weightcache.planning import Plan
from weightcache.report import Report
from weightcache.session import Request, Session, chunks_of, fall_back, open_session, sizes_of
from weightcache.tiers.host import AttachedImage, Image, Scratch, SharedImage, host_tier
from weightcache.transfer import Destination, Keeping, Transfer

if TYPE_CHECKING:
    import torch

    from weightcache.arrival import Home
    from weightcache.tiers.device import Landing

N_PASSING = 16  # ranges under way in memory that nothing else keeps, at most
LEAST_WAITING_NBYTES = 256 << 20  # of bytes that may wait for the disk in memory that nothing else keeps


@dataclass(frozen=True, slots=True)
class Where:
    """The device a load is for, and how its memory is reached: None for host memory, or for torch's own copies."""

    chosen: torch.device
    landing: Landing | None


def open_for(request: Request, device: str | torch.device, report: Report) -> tuple[Session, Where]:
    """Open what a request needs, or attach to the node daemon's image.

    On the caller's thread: its current stream is what the device's memory is used on.

    Raises:
        DeviceError: A device that is not there, was opened before a fork, or whose stream is being captured.
    """
    from weightcache.tiers.device import check_capture, check_fork, land, resolve_device

    settings = read_settings()
    chosen, why = resolve_device(device, settings.libcuda)
    if why:
        report.choices["device"] = why
    if chosen.type == "cuda":
        check_fork(settings.libcuda)
        check_capture(chosen)
    session = open_session(request, report, may_attach=True)
    landing = None
    if chosen.type == "cuda":
        try:
            landing = land(settings.libcuda, chosen, session.threads.n_workers)
            report.choices["ring"] = landing.device.describe_ring()
        except DeviceError as exc:
            # torch has the device, so it can be filled, if not by our engine.
            fall_back(report, f"tensors go to {chosen} by torch's own copies, which is slower: {exc}")
        except BaseException:
            session.settle()
            session.release()
            raise
    return session, Where(chosen, landing)


async def hold_image(session: Session, wanted: Iterable[Wanted], landing: Landing | None = None) -> SharedImage | None:
    """Take the image of this state of the model in host memory, the daemon's or this process's, if it has all that is wanted.

    It is held until the session is released, and registered for the device where that pays. Once a load.
    """
    if session.attached is not None:
        if landing is not None:
            session.report.choices["registration"] = "not registered: the image is the daemon's, and mapped to be read"
        return session.attached
    if not session.request.takes_images or not all(shard.etag for shard in session.manifest.weights):
        return None  # its states cannot be told apart
    held = host_tier.hold(session.key, str(session.manifest.revision), chunks_of(wanted), time.time())
    if held is None:
        return None
    session.held.callback(host_tier.let_go, held)
    if landing is not None:
        device, lock_for = landing.device, held.lock_for
        folder = session.settings.dir
        why_not = await session.threads.on_worker(lock_for, device, device.register, lambda: _alone(folder))
        if why_not:
            session.report.choices["registration"] = why_not
    return held


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes of this node from page-locking meanwhile: together they fail where one by one they do not."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # no folder to lock in: it saves trouble, and is needed for nothing
            stack.enter_context(exclusive(folder / "register.lock"))
        yield


def home_for(session: Session, wanted: Sequence[Wanted], where: Where, held: SharedImage | None) -> Home:
    """Make the memory that tensors go to, or take that in which they are."""
    manifest, sizes = session.manifest, sizes_of(session.manifest, chunks_of(wanted))
    if where.landing is not None:
        from weightcache.tiers.device import Slab

        return Slab(pack(manifest, wanted), where.landing, Scratch(sizes))
    if held is not None:
        attached = AttachedImage(held, {tensor.name for tensor in wanted})
        if attached.memory.is_private:
            return attached
        session.report.choices["attach"] = "copied: no reserved huge page is left for those that are written"
    return Image(lay_out_for(session, wanted), sizes)


def lay_out_for(session: Session, wanted: Sequence[Wanted]) -> Layout:
    return (lay_out if session.in_place is None else lay_out_in_place)(session.manifest, wanted)


def transfer_of(
    session: Session,
    destination: Destination,
    landing: Landing | None = None,
    held: SharedImage | None = None,
    *,
    wait_for_disk: bool = False,
    is_kept: bool = False,
    is_awaited: Callable[[], bool] = lambda: True,
) -> Transfer:
    """Make the transfer to a destination; `is_kept` says that it keeps what it gets for as long as the load lasts."""
    keeping = None
    if session.disk is not None and session.behind is not None:
        session.flight = session.flight or session.disk.flight()
        keeping = Keeping(session.disk, session.shard_keys, session.flight, session.behind)
        if not is_kept and not wait_for_disk:
            keeping.waiting_bytes = max(LEAST_WAITING_NBYTES, memory_available_bytes() // 2)
    return Transfer(
        manifest=session.manifest,
        origin=session.origin,
        local=session.in_place,
        keeping=keeping,
        held=held,
        destination=destination,
        threads=session.threads,
        crew=Crew(
            session.threads.n_workers,
            landing.target if landing else None,
            landing.device.cpus if landing else b"",
            session.tally.counters,
        ),
        connections=session.settings.connections if is_kept else min(session.settings.connections, N_PASSING),
        wait_for_disk=wait_for_disk,
        is_awaited=is_awaited,
        background=throttle(session.settings.daemon.prefetch_bytes_per_s, "prefetch"),
        tally=session.tally,
    )


async def move(session: Session, transfer: Transfer, plan: Plan) -> None:
    """Carry a plan out within the deadline. Raises DeadlineError."""
    try:
        async with asyncio.timeout_at(session.deadline):
            await transfer.run(plan)
    except TimeoutError as exc:
        raise DeadlineError(
            f"loading {session.name}: the time allowed ran out; raise timeout_s, or look at the disk and the network",
            uri=str(session.name),
        ) from exc
    if session.origin is not None and plan.fetches:
        shards = [session.manifest.shards[index] for index in sorted({fetch.shard for fetch in plan.fetches})]
        await session.origin.check_unchanged([Stat(shard.path, shard.nbytes, shard.etag) for shard in shards])


def account(session: Session) -> None:
    """Enter into the report what the transfers did."""
    tally, report = session.tally, session.report
    for tier, nbytes in (("origin", tally.origin_bytes), ("disk", tally.disk_bytes), ("host", tally.host_bytes)):
        report.bytes[tier] += nbytes
        meters.add("weightcache_load_bytes_total", nbytes, tier=tier)
    if tally.followed_bytes:
        report.choices["fetch"] = (
            f"{tally.followed_bytes} of the bytes from disk were fetched by other processes meanwhile"
        )
    if tally.n_rotten:
        report.warnings.append(f"{tally.n_rotten} chunks on disk were lost or rotten and fetched again")
    if tally.unstored_bytes:
        fall_back(
            report,
            f"{tally.unstored_bytes} bytes are not kept on disk, which was slower than the origin: the next load fetches "
            "them again, or weightcache prefetch does now",
        )
    counters = tally.counters
    if counters.direct or counters.cached:
        ways = {"past the page cache (O_DIRECT)": counters.direct, "through the page cache": counters.cached}
        said = " and ".join(f"{nbytes} bytes {way}" for way, nbytes in ways.items() if nbytes)
        refused = f"; O_DIRECT was refused: {os.strerror(counters.refused)}" if counters.refused else ""
        report.choices["read"] = said + refused
    if counters.copied or counters.by_device:
        ways = {"through the ring": counters.copied, "from registered memory": counters.by_device}
        report.choices["to the device"] = " and ".join(
            f"{nbytes} bytes {way}" for way, nbytes in ways.items() if nbytes
        )


def counter_of(session: Session, keys: Iterable[ChunkKey]) -> Counter:
    return Counter(session.request.progress, sum(sizes_of(session.manifest, list(keys)).values()))
