"""Own the models in the daemon's host memory: brought there once for all who ask, attached to, let go of again.

Never talks to a client. Its methods are called on the server's loop; what they start runs on threads of its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weightcache import cache, meters
from weightcache.cache import Kept
from weightcache.digest import Digest
from weightcache.errors import CapacityError, DaemonError, WeightcacheError
from weightcache.forecast import Forecast
from weightcache.report import Report
from weightcache.runtime import runtime
from weightcache.session import N_SPANS_TOLD, Request
from weightcache.tiers.host import HeldImage, host_tier

log = logging.getLogger(__name__)

N_THREADS = 16  # requests that describe or fill at the same time
N_LOADS = 50  # that are remembered
N_DECISIONS = 100
TIERS = ("origin", "disk", "host")
COSTS = ("usd", "received_bytes", "n_gets", "saved_bytes", "wasted_prefetch_bytes")
LEAST_TELLING_NBYTES = 64 << 20  # a load of less says nothing of a rate
LOOK_S = 0.05
HOLD_S = 600.0  # an image stays for so long whatever the forecast says
FRESH_S = 1.0  # so long after it was looked at, a model is not looked at again


@dataclass(slots=True)
class Moving:
    """A model on its way."""

    number: int
    uri: str
    why: str
    tier: str
    began_s: float
    done_bytes: int = 0
    total_bytes: int = 0

    def as_dict(self, now_s: float) -> dict[str, Any]:
        """Return plain values, for JSON."""
        rate = self.done_bytes / max(now_s - self.began_s, 1e-3)
        names = ("uri", "why", "tier", "began_s", "done_bytes", "total_bytes")
        return {"id": self.number, **{name: getattr(self, name) for name in names}, "bytes_per_s": int(rate)}


@dataclass(slots=True)
class Decision:
    """What the daemon decided by itself, and why."""

    at_s: float
    what: str
    uri: str
    tier: str
    why: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass
class Residents:
    """The models in host memory, those on their way, and what became of those before.

    Attributes:
        moving: On their way to host memory or disk.
        loads: The newest first: when it ended, which process's it was, its report.
        decisions: The newest first.
        requests: How each model was asked for last, so that it can be asked for again.
        forecast: When models are used next, where that is wanted.
        limits: The best rates that loads have shown, bytes a second.
        ledger: What loads have cost since the daemon began.
    """

    moving: dict[int, Moving] = field(default_factory=dict)
    loads: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=N_LOADS))
    decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=N_DECISIONS))
    requests: dict[str, Request] = field(default_factory=dict)
    forecast: Forecast | None = None
    limits: dict[str, float | None] = field(default_factory=lambda: {f"{tier}_bytes_per_s": None for tier in TIERS})
    ledger: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COSTS, 0))
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self._threads = concurrent.futures.ThreadPoolExecutor(N_THREADS, "weightcache-request")
        self._numbers = itertools.count(1)
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()  # by URI
        self._fresh: dict[str, Kept] = {}  # by what was asked and as whom, for FRESH_S

    async def attach(self, request: Request, *, resident_only: bool) -> Kept:
        """Return a model's image, held for the caller, when there is one to attach to. It may still be being filled.

        Raises:
            WeightcacheError: It cannot be described, does not fit, or is not there and is not to be brought.
        """
        if resident_only and not any(held.uri == request.uri for held in host_tier.images()):
            raise DaemonError(
                f"{request.uri} is not in host memory, and is not brought there for a part or a folder of it"
            )
        asked = repr((request.uri, sorted(request.storage_options.items()), request.offline))
        identity = str(Digest.of(asked.encode()))  # it may hold a secret
        async with self._turns.setdefault(identity, asyncio.Lock()):  # who comes second finds it looked at
            kept = await self._attach(request, identity, resident_only=resident_only)
        self.requests[request.uri] = request
        if self.forecast is not None:
            self.forecast.used(request.uri, self.clock(), kept.base)
        return kept

    async def _attach(self, request: Request, identity: str, *, resident_only: bool) -> Kept:
        known = self._fresh.get(identity)
        if known is not None and host_tier.hold_again(known.held, self.clock()):
            return known
        loop = asyncio.get_running_loop()
        first: asyncio.Future[Kept] = loop.create_future()

        def tell(kept: Kept) -> None:
            loop.call_soon_threadsafe(offer, kept)

        def offer(kept: Kept) -> None:
            if first.done():
                host_tier.let_go(kept.held)
            else:
                first.set_result(kept)

        bringing = asyncio.create_task(self._bring(request, "load", "host", tell, here_only=resident_only))
        bringing.add_done_callback(_seen)
        waited: list[asyncio.Future[Any]] = [first, bringing]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0)  # what was told before it ended comes first
        if not first.done():
            first.cancel()
            raise bringing.exception() or DaemonError(f"{request.uri} was not brought to host memory")
        kept = first.result()
        self._fresh[identity] = kept
        loop.call_later(FRESH_S, self._fresh.pop, identity, None)  # or it would keep the image's memory
        return kept

    async def bring(
        self, request: Request, why: str, tier: str, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Report:
        """Bring a model to a tier. Raises WeightcacheError."""
        return await self._bring(replace(request, progress=progress), why, tier)

    async def _bring(
        self,
        request: Request,
        why: str,
        tier: str,
        on_kept: Callable[[Kept], None] | None = None,
        *,
        here_only: bool = False,
    ) -> Report:
        moving = Moving(next(self._numbers), request.uri, why, tier, self.clock())
        also = request.progress

        def progress(done: int, total: int) -> None:
            moving.done_bytes, moving.total_bytes = done, total
            if also is not None:
                also(done, total)

        def work() -> Report:
            asked = replace(request, progress=progress)
            report = Report(uri=request.uri)
            try:
                if tier == "disk":
                    return cache.prefetch(asked, "disk")
                return cache.keep_in_host(asked, report, on_kept, here_only=here_only, is_ahead=why == "forecast")
            except concurrent.futures.CancelledError as exc:
                raise DaemonError(f"the daemon ended before it had brought {request.uri}") from exc

        self.moving[moving.number] = moving
        try:
            report = await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except CapacityError as exc:
            self.decide("leave", request.uri, tier, str(exc))
            raise
        finally:
            self.moving.pop(moving.number, None)
        if moving.total_bytes:  # what was there already is no load
            self._log_load(moving, report)
            self.enter(report.as_dict(n_spans=N_SPANS_TOLD), "daemon", os.getpid())
            if why != "load":
                meters.add("weightcache_prefetch_bytes_total", sum(report.bytes.values()), why=why)
            if self.forecast is not None:
                fetched_bytes = report.bytes["origin"]
                self.forecast.fetched(request.uri, fetched_bytes, self.clock(), is_ahead=why == "forecast")
        return report

    @staticmethod
    def _log_load(moving: Moving, report: Report) -> None:
        log.info(
            "brought %s to %s by %s: %d bytes in %.3f s (origin %d, disk %d)",
            moving.uri,
            moving.tier,
            moving.why,
            moving.total_bytes,
            report.total_s,
            report.bytes["origin"],
            report.bytes["disk"],
            extra={"load": {"why": moving.why, "tier": moving.tier, **report.as_dict()}},
        )

    async def settled(self, uri: str) -> None:
        """Wait until nothing of a model is under way, its way to disk included."""
        while any(moving.uri == uri for moving in self.moving.values()):
            await asyncio.sleep(LOOK_S)

    def enter(self, report: Mapping[str, Any], by: str, pid: int) -> None:
        """Remember a load."""
        self.loads.appendleft({"ended_s": self.clock(), "pid": pid, "by": by, "report": report})
        if by != "daemon":
            return  # what a client says of itself is shown, and no more
        for counts in report["replicas"].values():
            for name in ("usd", "received_bytes", "n_gets"):
                self.ledger[name] += counts[name]
        self.ledger["saved_bytes"] += report["bytes"]["disk"]
        moved, move_s = report["bytes"], report["seconds"].get("move", 0.0)
        meters.observe("weightcache_load_seconds", report["seconds"]["total"], tier=max(moved, key=moved.__getitem__))
        for tier, nbytes in moved.items():
            if move_s and nbytes >= LEAST_TELLING_NBYTES and nbytes >= 0.9 * sum(moved.values()):
                self.limits[f"{tier}_bytes_per_s"] = max(self.limits[f"{tier}_bytes_per_s"] or 0.0, nbytes / move_s)

    def decide(self, what: str, uri: str, tier: str, why: str, level: int = logging.INFO) -> None:
        """Remember a decision; one to leave a model out of a tier takes the place of the last such."""
        about = next((each for each in self.decisions if (each.uri, each.tier) == (uri, tier)), None)
        if about is not None and about.what == what == "leave":
            self.decisions.remove(about)
            level = logging.DEBUG if about.why == why else level  # it is tried again and again
        log.log(level, "%s %s, tier %s: %s", what, uri, tier, why)
        self.decisions.appendleft(Decision(self.clock(), what, uri, tier, why))

    def demote_idle(self, idle_s: float) -> None:
        """Let images leave host memory that nobody has used for so long, or is expected to use soon."""
        now_s = self.clock()
        for held in host_tier.images():
            why = self._why_demote(held, idle_s, now_s)
            if why and (freed := host_tier.drop(held.uri, idle_only=True)):
                host_tier.until_s.pop(held.uri, None)
                self.decide("demote", held.uri, "host", why)
                meters.add("weightcache_evicted_bytes_total", freed, tier="host")
                if self.forecast is not None:
                    wasted = self.forecast.wasted(held.uri, now_s)
                    self.ledger["wasted_prefetch_bytes"] += wasted
                    meters.add("weightcache_prefetch_wasted_bytes_total", wasted)

    def _why_demote(self, held: HeldImage, idle_s: float, now_s: float) -> str:
        if held.n_users or host_tier.stays(held.uri, now_s):
            return ""
        if held.last_use_s < host_tier.until_s.get(held.uri, 0.0):
            return "its time is over"
        if idle_s and now_s - held.last_use_s > idle_s:
            return f"nobody used it for {now_s - held.last_use_s:.0f} s"
        if self.forecast is not None and now_s > max(
            self.forecast.keep_until(held.uri, now_s), held.last_use_s + HOLD_S
        ):
            return "it is not expected to be used soon"
        return ""

    def close(self) -> None:
        """Break off what is under way, and wait until it has cleaned up."""
        runtime().stop()
        self._threads.shutdown(wait=True, cancel_futures=True)


def _seen(task: asyncio.Task[Report]) -> None:
    """Take note of how a task ended that nobody waits for any more."""
    if not task.cancelled() and (exc := task.exception()) is not None:
        is_known = isinstance(exc, WeightcacheError)
        log.log(logging.INFO if is_known else logging.ERROR, "a model is not brought to host memory: %s", exc)


def describe_image(held: HeldImage, until_s: float | None) -> dict[str, Any]:
    """Return what is said of an image, for JSON."""
    there = sum(held.there)
    return {
        "uri": held.uri,
        "revision": held.revision,
        "tier": "host",
        "state": "resident" if held.is_full else "filling",
        "bytes": held.nbytes * there // max(len(held.there), 1),
        "total_bytes": held.nbytes,
        "n_hits": held.n_uses,
        "n_leases": held.n_users - (not held.is_full),  # who fills it is no client
        "last_use_s": held.last_use_s,
        "pinned": until_s == 0,
        "until_s": until_s or None,
        "pages": held.pages(),
    }
