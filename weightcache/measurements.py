"""Own what this node has measured of replicas: latency and rate, kept between processes.

Never fails a load: what cannot be read or written is as if it had never been measured.

    replicas.json       in the cache folder, by place; the last who writes wins, for all measure the same
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from weightcache.files import publish_bytes

log = logging.getLogger(__name__)

FILE = "replicas.json"
VERSION = 1
NEWS_SHARE = 0.3  # of a new measurement in what is remembered: an exponentially weighted mean
MOST = 1000  # places
MOST_NBYTES = 1 << 20


@dataclass(slots=True)
class Measured:
    """What is remembered of a replica; None where it was never measured."""

    latency_s: float | None = None
    bytes_per_s: float | None = None

    def add_latency(self, seconds: float) -> None:
        self.latency_s = seconds if self.latency_s is None else _mix(self.latency_s, seconds)

    def add_rate(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s if self.bytes_per_s is None else _mix(self.bytes_per_s, bytes_per_s)


def _mix(old: float, new: float) -> float:
    return old + NEWS_SHARE * (new - old)


class Measurements:
    """The file of one cache folder, as it was when it was opened, and what is added to it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known, _ = self._read()
        self._used: dict[str, Measured] = {}

    def of(self, place: str) -> Measured:
        """Return what is known of a place, to be added to until `save`."""
        return self._used.setdefault(place, self._known.get(place, Measured()))

    def save(self) -> None:
        """Write what was measured, beside what others have written meanwhile."""
        known, is_ours = self._read()
        if not self._root.is_dir() or not is_ours:
            return  # nothing is kept on this node, or another version of this code keeps it
        kept = [*((place, each) for place, each in known.items() if place not in self._used), *self._used.items()]
        form = {
            "version": VERSION,
            "replicas": {place: [each.latency_s, each.bytes_per_s] for place, each in kept[-MOST:]},
        }
        try:
            publish_bytes(json.dumps(form).encode(), self._root / FILE, self._root)
        except OSError as exc:
            log.debug("what was measured of replicas is not remembered: %s", exc)

    def _read(self) -> tuple[dict[str, Measured], bool]:
        """Return what the file says, and whether it may be written: it is of this version, or of none."""
        try:
            with (self._root / FILE).open("rb") as file:
                form = json.loads(file.read(MOST_NBYTES))
            if form["version"] != VERSION:
                return {}, False
            measured = {place: Measured(*map(_number, pair)) for place, pair in form["replicas"].items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {}, True
        return measured, True


def _number(value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r:.40} where a measurement is expected")
    return value
