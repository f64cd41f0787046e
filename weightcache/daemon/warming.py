"""Own what the daemon does by itself: models of a list, tags that move, what is likely to be asked for, what is idle.

Never comes before a load: what it brings waits while others of this node ask an origin.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

from weightcache import meters, upkeep
from weightcache.config import Settings
from weightcache.daemon.residents import Residents
from weightcache.daemon.settings import START, Warm
from weightcache.errors import CapacityError, FormatError, ModelNotFoundError, WeightcacheError
from weightcache.files import publish_bytes
from weightcache.forecast import Forecast
from weightcache.session import Request
from weightcache.tiers.host import host_tier

log = logging.getLogger(__name__)

TICK_S = 1.0
DISK_S = 60.0  # how often what is idle on disk is looked for
FORESEE_S = 20.0
LEAD_S = 120.0  # a model is fetched so long before it is due
PAUSE_S = 300.0  # before what was foreseen and did not come is tried again


class Warming:
    """Brings and lets go, once a second. On the server's loop.

    Args:
        settings: Of the daemon; `reread` replaces them.
        residents: The models.
    """

    def __init__(self, settings: Settings, residents: Residents) -> None:
        self._residents = residents
        self._settings = settings
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self.is_draining = False
        self._listed: set[tuple[Warm, str]] = set()  # and when, that were begun
        self._watched_s = time.monotonic()
        self._foreseen_s = self._disk_s = -math.inf
        self._not_before_s: dict[str, float] = {}  # by model that was foreseen, and did not come
        self._recall()

    def reread(self, settings: Settings) -> None:
        """Take other settings from now on: new models of the list are brought at once."""
        self._settings = settings
        if settings.daemon.forecast is (self._residents.forecast is None):
            self._recall()

    def expected(self, now_s: float) -> list[dict[str, Any]]:
        """Return what is likely to be asked for, for JSON."""
        forecast = self._residents.forecast
        return [
            {
                "uri": due.model,
                "n_uses": due.n_uses,
                "expected_from_s": due.expected_from_s,
                "expected_until_s": due.expected_until_s,
                "why": due.why,
            }
            for due in (forecast.due(now_s) if forecast is not None else ())
        ]

    async def run(self) -> None:
        """Work until cancelled."""
        try:
            while True:
                now = time.localtime()
                self._bring_listed(now)
                self._watch()
                self._foresee()
                self._residents.demote_idle(self._settings.daemon.idle_host_s)
                await self._evict_idle()
                await asyncio.sleep(TICK_S)
        finally:
            self._remember()
            for task in self._under_way.values():
                task.cancel()

    def _bring_listed(self, now: time.struct_time) -> None:
        minute = time.strftime("%H:%M", now)
        today = time.strftime("%Y-%m-%d ", now)
        for warm in self._settings.warm:
            for at in warm.at:
                due = (warm, START) if at == START else (warm, today + at)
                if at in (START, minute) and due not in self._listed:
                    self._listed.add(due)
                    self._begin(warm, "list")
        self._listed = {due for due in self._listed if due[1] == START or due[1].startswith(today)}

    def _watch(self) -> None:
        """Look whether tags have moved: what is here already costs a request, what has moved is brought."""
        watch_s = self._settings.daemon.watch_s
        if not watch_s or time.monotonic() - self._watched_s < watch_s:
            return
        self._watched_s = time.monotonic()
        for warm in self._settings.warm:
            if any(due[0] == warm for due in self._listed):
                self._begin(warm, "tag")

    def _foresee(self) -> None:
        """Bring what is likely to be asked for soon, as it was asked for last."""
        forecast = self._residents.forecast
        if forecast is None or time.monotonic() - self._foreseen_s < FORESEE_S:
            return
        self._foreseen_s, soon_s = time.monotonic(), time.time() + LEAD_S
        self._remember()
        here = {held.uri for held in host_tier.images()}
        coming = [due.model for due in forecast.due(soon_s) if due.model not in here]
        expected = {model: forecast.expected_per_s(model, soon_s) for model in (*here, *coming)}
        host_tier.expected_per_s = {model: each for model, each in expected.items() if each is not None}
        for model in coming:
            if self._foreseen_s >= self._not_before_s.get(model, -math.inf):
                self._begin(Warm(model, "host"), "forecast")

    def _recall(self) -> None:
        """Take up what the daemon before knew of uses; without a forecast, nothing."""
        if not self._settings.daemon.forecast:
            self._residents.forecast = None
            host_tier.expected_per_s = {}
            return
        waste = self._settings.daemon.waste
        forecast = Forecast(waste=waste)
        try:
            forecast = Forecast.from_form(json.loads(self._file.read_bytes()), waste=waste)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, FormatError) as exc:
            log.warning("the forecast begins anew: %s: %s", self._file, exc)
        self._residents.forecast = forecast

    def _remember(self) -> None:
        if self._residents.forecast is None:
            return
        try:
            publish_bytes(json.dumps(self._residents.forecast.to_form()).encode(), self._file, self._file.parent)
        except OSError as exc:
            log.warning("what is known of uses is not kept in %s: %s", self._file, exc)

    @property
    def _file(self) -> Path:
        return self._settings.dir / "daemon" / "forecast.json"

    def _begin(self, warm: Warm, why: str) -> None:
        if self.is_draining or warm.model in self._under_way:
            return
        task = asyncio.create_task(self._bring(warm, why))
        self._under_way[warm.model] = task
        task.add_done_callback(lambda _: self._under_way.pop(warm.model, None))

    async def _bring(self, warm: Warm, why: str) -> None:
        try:
            request = self._residents.requests.get(warm.model) or Request(warm.model)
            report = await self._residents.bring(request, why, warm.tier)
        except WeightcacheError as exc:
            self._not_before_s[warm.model] = time.monotonic() + PAUSE_S
            if not isinstance(exc, CapacityError):  # which is told already
                self._residents.decide("leave", warm.model, warm.tier, str(exc), logging.WARNING)
            return
        self._not_before_s.pop(warm.model, None)
        if report.bytes["origin"] or report.bytes["disk"]:
            self._residents.decide("fetch", warm.model, warm.tier, f"by {why}: revision {report.revision[:23]}…")
        if why == "list" and warm.tier == "host":
            host_tier.until_s[warm.model] = time.time() + warm.until_s if warm.until_s else 0.0

    async def _evict_idle(self) -> None:
        """Let models leave the disk that nobody has used for so long."""
        idle_s = self._settings.daemon.idle_disk_s
        if not idle_s or time.monotonic() - self._disk_s < DISK_S:
            return
        self._disk_s = time.monotonic()
        with contextlib.suppress(ModelNotFoundError):
            for uri, unused_s, freed in await asyncio.get_running_loop().run_in_executor(None, _evict_unused, idle_s):
                self._residents.decide("evict", uri, "disk", f"nobody used it for {unused_s:.0f} s")
                meters.add("weightcache_evicted_bytes_total", freed, tier="disk")


def _evict_unused(idle_s: float) -> list[tuple[str, float, int]]:
    """Evict models; returns each with how long it was not used, and the bytes that it had."""
    gone: list[tuple[str, float, int]] = []
    for model in upkeep.disk_models():
        unused_s = time.time() - model.last_use_s
        if unused_s > idle_s and not (model.pinned or model.in_use):
            with contextlib.suppress(WeightcacheError):
                gone.append((model.uri, unused_s, upkeep.evict_here(model.uri)))
    return gone
