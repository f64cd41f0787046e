"""What is remembered of replicas between processes, and what a file that is not ours may do to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weightcache.measurements import FILE, MOST, NEWS_SHARE, VERSION, Measured, Measurements

PLACE = "https://t3.storage.dev/models"


def write(root: Path, form: object) -> bytes:
    content = form if isinstance(form, bytes) else json.dumps(form).encode()
    (root / FILE).write_bytes(content)
    return content


def test_a_new_measurement_is_mixed_with_what_was_known() -> None:
    measured = Measured()
    measured.add_latency(0.1)
    measured.add_rate(100.0)
    assert measured == Measured(0.1, 100.0)
    measured.add_latency(0.2)
    measured.add_rate(200.0)
    assert measured == Measured(pytest.approx(0.1 + NEWS_SHARE * 0.1), pytest.approx(100 + NEWS_SHARE * 100))


def test_what_is_saved_is_known_to_the_next(tmp_path: Path) -> None:
    one = Measurements(tmp_path)
    one.of(PLACE).add_latency(0.02)
    one.of(PLACE).add_rate(5e6)
    one.of("elsewhere").add_latency(0.0)
    one.save()
    other = Measurements(tmp_path)
    assert (other.of(PLACE), other.of("elsewhere")) == (Measured(0.02, 5e6), Measured(0.0, None))
    assert other.of("nowhere") == Measured()


def test_two_writers_keep_what_each_measured_elsewhere(tmp_path: Path) -> None:
    one, other = Measurements(tmp_path), Measurements(tmp_path)
    one.of("a").add_latency(1.0)
    one.of("both").add_latency(1.0)
    other.of("b").add_latency(2.0)
    other.of("both").add_latency(2.0)
    one.save()
    other.save()
    known = Measurements(tmp_path)
    assert [known.of(place).latency_s for place in ("a", "b", "both")] == [1.0, 2.0, 2.0]


def test_what_was_measured_last_is_kept_where_there_is_too_much(tmp_path: Path) -> None:
    write(tmp_path, {"version": VERSION, "replicas": {PLACE: [1.0, None]} | {str(n): [1.0, 1.0] for n in range(MOST)}})
    one = Measurements(tmp_path)
    one.of(PLACE).add_rate(7.0)
    one.save()
    kept = json.loads((tmp_path / FILE).read_bytes())["replicas"]
    assert len(kept) == MOST
    assert kept[PLACE] == [1.0, 7.0]


@pytest.mark.parametrize(
    "form",
    [
        b"",
        b"{",
        b"\xff",
        b"[" * 100_000,
        [],
        {},
        {"version": VERSION},
        {"version": VERSION, "replicas": []},
        {"version": VERSION, "replicas": {PLACE: None}},
        {"version": VERSION, "replicas": {PLACE: [1.0, 2.0, 3.0]}},
        {"version": VERSION, "replicas": {PLACE: ["1", "2"]}},
        {"version": VERSION, "replicas": {PLACE: [True, None]}},
        {"version": VERSION, "replicas": {PLACE: [-1.0, None]}},
        {"version": VERSION, "replicas": {PLACE: [float("nan"), None]}},
        {"version": VERSION, "replicas": {PLACE: [float("inf"), None]}},
        {"version": VERSION, "replicas": {PLACE: [10**400, None]}},
    ],
    ids=lambda form: repr(form)[:40],
)
def test_a_damaged_file_is_as_if_there_were_none_and_is_written_anew(tmp_path: Path, form: object) -> None:
    write(tmp_path, form)
    one = Measurements(tmp_path)
    assert one.of(PLACE) == Measured()
    one.of(PLACE).add_latency(0.5)
    one.save()
    assert Measurements(tmp_path).of(PLACE) == Measured(0.5, None)


def test_g18_a_file_of_another_version_is_not_read_and_stays_as_it_is(tmp_path: Path) -> None:
    content = write(tmp_path, {"version": VERSION + 1, "replicas": {PLACE: [1.0, 1.0]}})
    one = Measurements(tmp_path)
    assert one.of(PLACE) == Measured()
    one.of(PLACE).add_latency(0.5)
    one.save()
    assert (tmp_path / FILE).read_bytes() == content


def test_without_a_cache_folder_nothing_is_kept(tmp_path: Path) -> None:
    one = Measurements(tmp_path / "none")
    one.of(PLACE).add_latency(0.5)
    one.save()
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_fails_nothing(tmp_path: Path) -> None:
    one = Measurements(tmp_path)
    one.of(PLACE).add_latency(0.5)
    (tmp_path / FILE).mkdir()
    one.save()
    assert list((tmp_path / FILE).iterdir()) == []
