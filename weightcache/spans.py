"""Own the spans of one load: which lane was busy from when to when, and with how many bytes.

Never more than a bounded number of them: beyond it neighbours are joined, so that what is told stays whole and coarser.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

STAGE = "stage"
MOST = 20_000
SLICE_S = 0.02  # a load of a minute has 3,000 slices in a lane: finer than a screen, far from MOST


class Span(NamedTuple):
    """One piece of work, `[start_s, stop_s)` in seconds since its load began; or neighbours, joined.

    Those begin with the first of them and are as long as any of them was under way, so that a lane is as busy as it was.

    Attributes:
        lane: `stage`, for what came one after the other; else what was busy: `origin`, `wait` (for another process that
            fetches), `disk`, `host`, `verify`, `device`, `store` (writes to the disk tier, behind).
        name: The stage, the file, or what was done; empty where pieces of different names were joined.
        nbytes: Its bytes; 0 for a stage.
    """

    lane: str
    name: str
    start_s: float
    stop_s: float
    nbytes: int


class Spans:
    """The spans of a load, which begins when this is made. Thread-safe."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._began = time.perf_counter()
        self._lock = threading.Lock()
        self._spans: list[Span] = []

    def note(self, lane: str, name: str, began: float, nbytes: int = 0) -> None:
        """Note what began at a moment of `time.perf_counter()` and is done now."""
        span = Span(lane, name, began - self._began, time.perf_counter() - self._began, nbytes)
        with self._lock:
            self._spans.append(span)
            if len(self._spans) > self._most:
                self._spans = join(self._spans, self._most // 2)

    def noted(self, most: int = MOST) -> list[Span]:
        """Return the spans so far by their start, joined to at most so many."""
        with self._lock:
            spans = self._spans[:]
        return join(spans, most)


class Slices:
    """Pieces of work of which only the ends are told, noted as slices of time. For one thread at a time."""

    def __init__(self, spans: Spans, lane: str, name: str) -> None:
        self._spans, self._lane, self._name = spans, lane, name
        self._began = time.perf_counter()
        self._nbytes = 0

    def add(self, nbytes: int) -> None:
        """Hear that so many bytes more are done."""
        self._nbytes += nbytes
        if time.perf_counter() - self._began >= SLICE_S:
            self.end()

    def end(self) -> None:
        """Note what is left."""
        if self._nbytes:
            self._spans.note(self._lane, self._name, self._began, self._nbytes)
        self._began, self._nbytes = time.perf_counter(), 0


def busy_s(spans: Iterable[Span]) -> float:
    """Return for how long any of these spans, which come by their start, was under way."""
    total_s, until_s = 0.0, 0.0
    for span in spans:
        total_s += max(0.0, span.stop_s - max(span.start_s, until_s))
        until_s = max(until_s, span.stop_s)
    return total_s


def join(spans: Sequence[Span], most: int) -> list[Span]:
    """Return at most so many spans (and at least one a lane) by their start, neighbours of a lane joined where needed.

    Lanes with few keep all of theirs: every lane gets an equal share, and what one leaves goes to the larger ones.
    """
    ordered = sorted(spans, key=lambda span: span.start_s)
    if len(ordered) <= most:
        return ordered
    lanes: dict[str, list[Span]] = {}
    for span in ordered:
        lanes.setdefault(span.lane, []).append(span)
    joined: list[Span] = []
    by_size = sorted(lanes.values(), key=len)
    for n_done, of_lane in enumerate(by_size):
        share = max(1, (most - len(joined)) // (len(by_size) - n_done))
        step = -(-len(of_lane) // share)
        joined += [_as_one(of_lane[first : first + step]) for first in range(0, len(of_lane), step)]
    return sorted(joined, key=lambda span: span.start_s)


def _as_one(spans: Sequence[Span]) -> Span:
    first = spans[0]
    name = first.name if all(span.name == first.name for span in spans) else ""
    return Span(first.lane, name, first.start_s, first.start_s + busy_s(spans), sum(span.nbytes for span in spans))
