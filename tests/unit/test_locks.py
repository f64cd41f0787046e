"""Locks between processes: single flight with its stamps, and who comes first."""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from children import wait_until

from weightcache.locks import Flight, Precedence


@pytest.fixture
def flights(tmp_path: Path) -> Iterator[tuple[Flight, Flight]]:
    with closing(Flight(tmp_path / "flight")) as one, closing(Flight(tmp_path / "flight")) as other:
        yield one, other


def test_one_leads_until_it_lands(flights: tuple[Flight, Flight]) -> None:
    one, other = flights
    assert one.lead("chunk")
    assert not other.lead("chunk")
    assert other.lead("other chunk")
    one.land("chunk")
    assert other.lead("chunk")


def test_a_stamp_changes_while_its_leader_runs_and_no_longer(flights: tuple[Flight, Flight]) -> None:
    one, other = flights
    one.lead("chunk")
    seen = {other.stamp("chunk")}

    def has_changed() -> bool:
        seen.add(other.stamp("chunk"))
        return len(seen) >= 3

    wait_until(has_changed)
    one.close()
    last = other.stamp("chunk")
    other.lead("other chunk")
    wait_until(lambda: bool(other.stamp("other chunk")))
    assert other.stamp("chunk") == last


def test_g13_a_closed_flight_leaves_no_thread(tmp_path: Path) -> None:
    flight = Flight(tmp_path / "flight")
    flight.lead("chunk")
    assert "weightcache-flight" in [thread.name for thread in threading.enumerate()]
    flight.close()
    flight.close()
    assert "weightcache-flight" not in [thread.name for thread in threading.enumerate()]


def test_several_may_come_first_and_others_wait_for_all_of_them(tmp_path: Path) -> None:
    first, second, waiting = (Precedence(tmp_path / "lock") for _ in range(3))
    with closing(waiting):
        assert waiting.is_given()
        assert first.take()
        assert second.take()
        assert not waiting.is_given()
        first.close()
        assert not waiting.is_given()
        second.close()
        second.close()
        assert waiting.is_given()


def test_g09_who_wants_to_come_first_never_waits_for_the_lock(tmp_path: Path) -> None:
    with closing(Precedence(tmp_path / "lock")) as first, (tmp_path / "lock").open("rb") as frozen:
        fcntl.flock(frozen, fcntl.LOCK_EX)  # a process stopped while it looked
        assert not first.take()
        fcntl.flock(frozen, fcntl.LOCK_UN)
        assert first.take()
