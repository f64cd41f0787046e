"""The process's meters: what adds up, what is told, that a parser reads it, and that threads and forks do not disturb it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from weightcache import meters
from weightcache.meters import METERS, Meter

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
UNITS = {"bytes": "bytes", "seconds": "seconds", "usd": "USD"}
MOST_SERIES = 120  # of one name, where the values of its labels are known
BYTES, ASKED, MODELS, CLIENTS, LOADS = (
    "weightcache_origin_bytes_total",
    "weightcache_origin_requests_total",
    "weightcache_models",
    "weightcache_clients",
    "weightcache_load_seconds",
)


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_numbers", {})
    monkeypatch.setattr(meters, "_spreads", {})


def told(name: str, value: float, **labels: str) -> None:
    """Enter a value into a meter of any kind."""
    {"counter": meters.add, "gauge": meters.set, "histogram": meters.observe}[METERS[name].kind](name, value, **labels)


def series_of(meter: Meter) -> Iterator[dict[str, str]]:
    """Yield the labels of every series that a meter may have; `some` stands for what is not known here."""
    for values in product(*(known or ("some",) for known in meter.labels.values())):
        yield dict(zip(meter.labels, values, strict=True))


def test_series_add_up_by_name_and_labels() -> None:
    meters.add(ASKED, 1, replica="x", kind="get")
    meters.add(ASKED, 2, kind="get", replica="x")
    meters.add(ASKED, 4, replica="y", kind="get")
    assert meters.snapshot() == {
        (ASKED, (("kind", "get"), ("replica", "x"))): 3,
        (ASKED, (("kind", "get"), ("replica", "y"))): 4,
    }


def test_gauge_is_what_was_said_last() -> None:
    meters.set(CLIENTS, 3)
    meters.set(CLIENTS, 1)
    assert meters.snapshot() == {(CLIENTS, ()): 1}


def test_histogram_counts_up_to_each_bound() -> None:
    for seconds in (0.05, 0.06, 700.0):
        meters.observe(LOADS, seconds, tier="disk")
    counts = {dict(labels).get("le", name): value for (name, labels), value in meters.snapshot().items()}
    assert (counts["0.05"], counts["0.1"], counts["600.0"], counts["+Inf"]) == (1, 2, 2, 3)
    assert (counts[f"{LOADS}_count"], counts[f"{LOADS}_sum"]) == (3, pytest.approx(700.11))


def test_snapshot_does_not_move() -> None:
    meters.add(BYTES, 1, replica="x")
    meters.observe(LOADS, 1, tier="host")
    before = meters.snapshot()
    kept = dict(before)
    meters.add(BYTES, 1, replica="x")
    meters.observe(LOADS, 1, tier="host")
    assert before == kept


def test_text_is_prometheus() -> None:
    assert meters.text() == ""
    meters.set(CLIENTS, 0.5)
    meters.add(BYTES, 2**53, replica='a "quoted"\\\nplace')
    meters.add(BYTES, 1, replica="a")
    assert meters.text().splitlines() == [
        "# HELP weightcache_clients Connections to the daemon's socket.",
        "# TYPE weightcache_clients gauge",
        "weightcache_clients 0.5",
        "# HELP weightcache_origin_bytes_total Received from a replica, wasted or not.",
        "# TYPE weightcache_origin_bytes_total counter",
        'weightcache_origin_bytes_total{replica="a"} 1',
        r'weightcache_origin_bytes_total{replica="a \"quoted\"\\\nplace"} 9007199254740992',
    ]


def test_parser_of_prometheus_reads_every_series() -> None:
    for name, meter in METERS.items():
        for labels in series_of(meter):
            told(name, 2.0, **labels)
    families = {family.name: family for family in text_string_to_metric_families(meters.text())}
    assert families.keys() == {name.removesuffix("_total") for name in METERS}
    for name, meter in METERS.items():
        family = families[name.removesuffix("_total")]
        assert (family.type, family.documentation) == (meter.kind, meter.help)
        assert {(each.name, *sorted(each.labels.items())): each.value for each in family.samples} == {
            (found, *sorted(labels)): value
            for (found, labels), value in meters.snapshot().items()
            if _is_of(found, name)
        }


def _is_of(found: str, name: str) -> bool:
    return found in (name, f"{name}_bucket", f"{name}_sum", f"{name}_count")


def test_parser_of_prometheus_reads_odd_values_of_labels() -> None:
    place = 'a "quoted"\\n\\\nplace, {of}=ours#'
    meters.add(BYTES, 1, replica=place)
    (family,) = text_string_to_metric_families(meters.text())
    assert [each.labels for each in family.samples] == [{"replica": place}]


@pytest.mark.parametrize(
    "enter",
    [
        lambda: meters.add("weightcache_unheard_of_total", 1),
        lambda: meters.add(CLIENTS, 1),
        lambda: meters.set(BYTES, 1, replica="x"),
        lambda: meters.observe(CLIENTS, 1),
        lambda: meters.add(BYTES, 1),
        lambda: meters.add(BYTES, 1, replica="x", kind="get"),
        lambda: meters.set(MODELS, 1, tier="disk", state="s3://bucket/model"),
    ],
)
def test_what_is_not_documented_is_not_measured(enter: Callable[[], None]) -> None:
    with pytest.raises(KeyError):
        enter()
    assert meters.snapshot() == {}


# -- the names


@pytest.mark.parametrize(("name", "meter"), METERS.items())
def test_name_follows_prometheus(name: str, meter: Meter) -> None:
    assert re.fullmatch(r"weightcache(_[a-z]+)+", name)
    assert name.endswith("_total") == (meter.kind == "counter")
    assert name.endswith("_seconds") == (meter.kind == "histogram")
    assert not name.endswith(("_bucket", "_sum", "_count"))
    assert meter.help.endswith(".") and meter.help.isprintable() and "\\" not in meter.help
    assert list(meter.bounds) == sorted(meter.bounds) and bool(meter.bounds) == (meter.kind == "histogram")


@pytest.mark.parametrize(("name", "meter"), METERS.items())
def test_series_of_a_name_are_few(name: str, meter: Meter) -> None:
    n_each = len(meter.bounds) + 3 if meter.bounds else 1
    assert n_each * len(list(series_of(meter))) <= MOST_SERIES
    assert {label for label, values in meter.labels.items() if values is meters.ANY} <= {"replica", "version"}


def test_docs_say_what_is_measured() -> None:
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert rows == [row(name, meter) for name, meter in sorted(METERS.items())]


def row(name: str, meter: Meter) -> str:
    """Spell a meter as docs/metrics.md does."""
    unit = UNITS.get(name.removesuffix("_total").rpartition("_")[2], "")
    labels = "; ".join(f"`{label}`: {', '.join(values)}".removesuffix(": ") for label, values in meter.labels.items())
    return f"| `{name}` | {meter.kind} | {unit or '–'} | {labels or '–'} | {meter.help} |"


# -- threads and forks


def test_threads_lose_nothing() -> None:
    def count(_: int) -> None:
        for _ in range(1000):
            meters.add(BYTES, 1, replica="x")
            meters.observe(LOADS, 1, tier="disk")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(count, range(8)))
    counted = {name: value for (name, _), value in meters.snapshot().items()}
    assert (counted[BYTES], counted[f"{LOADS}_count"], counted[f"{LOADS}_sum"]) == (8000, 8000, 8000)


def test_child_begins_anew() -> None:
    meters.add(BYTES, 1, replica="x")
    meters.observe(LOADS, 1, tier="disk")
    with meters._lock:
        child = os.fork()
        if child == 0:
            meters.add(BYTES, 5, replica="x")
            os._exit(0 if list(meters.snapshot().values()) == [5] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert meters.snapshot()[BYTES, (("replica", "x"),)] == 1
