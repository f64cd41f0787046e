"""Own the process's meters: what is counted and measured, under which name, and the text that Prometheus reads.

Never holds a secret, never forgets a series, and never serves them: that is who asks for the text. A name, a label or a
value that is not in METERS is a KeyError: what nobody has documented is not measured (docs/metrics.md is METERS in words).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Labels = tuple[tuple[str, str], ...]
Key = tuple[str, Labels]

ANY: Sequence[str] = ()  # the values of a label that the configuration or the build names, and so bounds
TIERS = ("disk", "host")
STATES = ("resident", "filling")
OPERATIONS = ("attach", "warm", "evict", "status", "report")
REQUEST_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0)
LOAD_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True, slots=True)
class Meter:
    """What a name stands for.

    Attributes:
        kind: `counter` for what only grows, `gauge` for what is, `histogram` for how long things took.
        help: One line, without backslashes.
        labels: By name the values that each may have; ANY where they are not known here, but few.
        bounds: Of a histogram: the upper ends of its buckets, in seconds, ascending; one without an end is added.
    """

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Mapping[str, Sequence[str]] = field(default_factory=lambda: MappingProxyType({}))
    bounds: Sequence[float] = ()


METERS: Mapping[str, Meter] = {
    "weightcache_build_info": Meter("gauge", "1; the label says which version runs.", {"version": ANY}),
    "weightcache_clients": Meter("gauge", "Connections to the daemon's socket."),
    "weightcache_evicted_bytes_total": Meter(
        "counter", "Dropped to stay within a tier's budget, or left unused too long.", {"tier": TIERS}
    ),
    "weightcache_leases": Meter("gauge", "Holds of clients on images; each ends with its client's connection."),
    "weightcache_load_bytes_total": Meter(
        "counter", "Brought by loads, by the tier they came from.", {"tier": ("origin", *TIERS)}
    ),
    "weightcache_load_seconds": Meter(
        "histogram",
        "How long the daemon took to bring models, by the tier most of their bytes came from.",
        {"tier": ("origin", *TIERS)},
        LOAD_BOUNDS_S,
    ),
    "weightcache_models": Meter(
        "gauge", "Models in a tier, whole or on their way in.", {"tier": TIERS, "state": STATES}
    ),
    "weightcache_origin_bytes_total": Meter("counter", "Received from a replica, wasted or not.", {"replica": ANY}),
    "weightcache_origin_hedges_total": Meter(
        "counter", "Requests sent because an earlier one was slow.", {"replica": ANY}
    ),
    "weightcache_origin_requests_total": Meter(
        "counter",
        "GET and HEAD requests, and listings, sent to a replica; failed ones count.",
        {"replica": ANY, "kind": ("get", "list")},
    ),
    "weightcache_origin_retries_total": Meter(
        "counter", "Requests sent because an earlier one failed.", {"replica": ANY}
    ),
    "weightcache_origin_usd_total": Meter("counter", "What a replica was asked for, at list prices.", {"replica": ANY}),
    "weightcache_origin_wasted_bytes_total": Meter(
        "counter", "Received from a replica and not used: broken answers, lost races.", {"replica": ANY}
    ),
    "weightcache_prefetch_bytes_total": Meter(
        "counter",
        "Fetched ahead of demand, by what asked for it.",
        {"why": ("request", "list", "tag", "forecast")},
    ),
    "weightcache_prefetch_wasted_bytes_total": Meter(
        "counter", "Fetched ahead of demand and dropped before anyone used it."
    ),
    "weightcache_request_seconds": Meter(
        "histogram",
        "How long requests on the socket took, those that wait for a load too.",
        {"op": OPERATIONS},
        REQUEST_BOUNDS_S,
    ),
    "weightcache_requests_total": Meter(
        "counter",
        "Requests on the socket: done; refused or failed, which the answer says why; wrong, which ended the connection.",
        {"op": OPERATIONS, "outcome": ("ok", "refused", "wrong")},
    ),
    "weightcache_tier_budget_bytes": Meter("gauge", "The most that a tier may hold.", {"tier": TIERS}),
    "weightcache_tier_used_bytes": Meter("gauge", "What a tier holds.", {"tier": TIERS}),
}

_lock = threading.Lock()  # of what follows
_numbers: dict[Key, float] = {}  # of counters and gauges
_spreads: dict[Key, list[float]] = {}  # of histograms: how many fell into each bucket, then the sum of their seconds


def add(name: str, amount: float, **labels: str) -> None:
    """Add to a counter, `weightcache_…_total`; labels tell its series apart. Thread-safe."""
    key = _key("counter", name, labels)
    with _lock:
        _numbers[key] = _numbers.get(key, 0) + amount


def set(name: str, value: float, **labels: str) -> None:
    """Say what a gauge is now. Thread-safe."""
    key = _key("gauge", name, labels)
    with _lock:
        _numbers[key] = value


def observe(name: str, seconds: float, **labels: str) -> None:
    """Enter how long something took into a histogram, `weightcache_…_seconds`. Thread-safe."""
    key = _key("histogram", name, labels)
    bounds = METERS[name].bounds
    bucket = next((index for index, bound in enumerate(bounds) if seconds <= bound), len(bounds))
    with _lock:
        spread = _spreads.setdefault(key, [0] * (len(bounds) + 2))
        spread[bucket] += 1
        spread[-1] += seconds


def snapshot() -> Mapping[Key, float]:
    """Return every series by name and sorted labels, as it stands, in that order; buckets count up. Thread-safe."""
    with _lock:
        seen: dict[Key, float | tuple[float, ...]] = dict(_numbers)
        seen |= {key: tuple(spread) for key, spread in _spreads.items()}
    series: dict[Key, float] = {}
    for (name, labels), value in sorted(seen.items(), key=lambda each: each[0]):
        if not isinstance(value, tuple):
            series[name, labels] = value
            continue
        *counts, total_s = value
        n_below: float = 0
        for bound, count in zip((*map(repr, METERS[name].bounds), "+Inf"), counts, strict=True):
            n_below += count
            series[f"{name}_bucket", (*labels, ("le", bound))] = n_below
        series[f"{name}_sum", labels] = total_s
        series[f"{name}_count", labels] = n_below
    return series


def text() -> str:
    """Return every series in Prometheus's text format, a line each, after what its name means and is."""
    lines: list[str] = []
    described = ""
    for (name, labels), value in snapshot().items():
        meter = name if name in METERS else name.rpartition("_")[0]
        if meter != described:
            described = meter
            lines.append(f"# HELP {meter} {METERS[meter].help}\n# TYPE {meter} {METERS[meter].kind}\n")
        told = ",".join(f'{label}="{_escape(text)}"' for label, text in labels)
        lines.append(f"{name}{{{told}}} {value!r}\n" if told else f"{name} {value!r}\n")
    return "".join(lines)


def _key(kind: str, name: str, labels: Mapping[str, str]) -> Key:
    meter = METERS.get(name)
    if meter is None or meter.kind != kind or labels.keys() != meter.labels.keys():
        raise KeyError(f"{name} with {sorted(labels)} is no {kind} of METERS")
    for label, value in labels.items():
        if meter.labels[label] and value not in meter.labels[label]:
            raise KeyError(f"{label} of {name} is {value!r}: expected one of {', '.join(meter.labels[label])}")
    return name, tuple(sorted(labels.items()))


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _after_fork_in_child() -> None:
    # What its parent did is not the child's, and the lock may be held by a thread that stayed there.
    global _lock
    _lock = threading.Lock()
    _numbers.clear()
    _spreads.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
