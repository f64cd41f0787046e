"""The process's counters: what adds up, how it is told, and that threads and forks do not disturb it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from weightcache import meters


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "_counters", {})


def test_series_add_up_by_name_and_labels() -> None:
    meters.add("weightcache_a_total", 1, replica="x", kind="get")
    meters.add("weightcache_a_total", 2, kind="get", replica="x")
    meters.add("weightcache_a_total", 4, replica="y", kind="get")
    assert meters.snapshot() == {
        ("weightcache_a_total", (("kind", "get"), ("replica", "x"))): 3,
        ("weightcache_a_total", (("kind", "get"), ("replica", "y"))): 4,
    }


def test_snapshot_does_not_move() -> None:
    meters.add("weightcache_a_total", 1)
    before = meters.snapshot()
    meters.add("weightcache_a_total", 1)
    assert list(before.values()) == [1]


def test_text_is_prometheus() -> None:
    assert meters.text() == ""
    meters.add("weightcache_b_total", 0.5)
    meters.add("weightcache_a_total", 2**53, replica='a "quoted"\\\nplace')
    meters.add("weightcache_a_total", 1, replica="a")
    assert meters.text().splitlines() == [
        "# TYPE weightcache_a_total counter",
        'weightcache_a_total{replica="a"} 1',
        r'weightcache_a_total{replica="a \"quoted\"\\\nplace"} 9007199254740992',
        "# TYPE weightcache_b_total counter",
        "weightcache_b_total 0.5",
    ]


def test_threads_lose_nothing() -> None:
    def count(_: int) -> None:
        for _ in range(1000):
            meters.add("weightcache_a_total", 1)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(count, range(8)))
    assert list(meters.snapshot().values()) == [8000]


def test_child_begins_anew() -> None:
    meters.add("weightcache_a_total", 1)
    with meters._lock:
        child = os.fork()
        if child == 0:
            meters.add("weightcache_a_total", 5)
            os._exit(0 if list(meters.snapshot().values()) == [5] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert list(meters.snapshot().values()) == [1]
