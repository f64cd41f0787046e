"""Spans: what is noted, that their number is bounded, and that joining them loses no byte and no busy time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from weightcache.report import Report
from weightcache.spans import SLICE_S, Slices, Span, Spans, busy_s, join

LANES = st.sampled_from(("stage", "origin", "verify"))


@st.composite
def spans(draw: st.DrawFn) -> list[Span]:
    start_s = draw(st.integers(0, 100))
    times = st.tuples(LANES, st.sampled_from("ab"), st.integers(0, 100), st.integers(1, 20), st.integers(0, 9))
    return [
        Span(lane, name, start_s + at, start_s + at + long, size)
        for lane, name, at, long, size in draw(st.lists(times))
    ]


def test_span_is_told_from_the_start_of_its_load() -> None:
    noted = Spans()
    began = time.perf_counter()
    noted.note("origin", "a", began, 5)
    [span] = noted.noted()
    assert span[:2] == ("origin", "a")
    assert 0 <= span.start_s <= span.stop_s < 60
    assert span.nbytes == 5


def test_number_of_spans_is_bounded() -> None:
    noted = Spans(most=100)
    for number in range(1000):
        noted.note("origin", f"file {number}", time.perf_counter(), 1)
    assert len(noted.noted()) <= 100
    assert sum(span.nbytes for span in noted.noted()) == 1000


def test_threads_lose_no_span() -> None:
    noted = Spans()
    with ThreadPoolExecutor(4) as threads:
        for _ in range(4):
            threads.submit(lambda: [noted.note("store", "a", time.perf_counter(), 1) for _ in range(500)])
    assert len(noted.noted()) == 2000


@given(spans(), st.integers(3, 40))
def test_joined_spans_tell_the_same_coarser(given_spans: list[Span], most: int) -> None:
    joined = join(given_spans, most)
    assert len(joined) <= most
    assert joined == sorted(joined, key=lambda span: span.start_s)
    for lane in ("stage", "origin", "verify"):
        before = [span for span in given_spans if span.lane == lane]
        after = [span for span in joined if span.lane == lane]
        assert sum(span.nbytes for span in after) == sum(span.nbytes for span in before)
        assert {span.start_s for span in after} <= {span.start_s for span in before}
        assert max((span.stop_s for span in after), default=0) <= max((span.stop_s for span in before), default=0)


def test_joined_lane_is_as_busy_as_it_was() -> None:
    chunks = [Span("verify", "a", at, at + 0.25, 1) for at in range(100)]
    assert busy_s(chunks) == busy_s(join(chunks, 10)) == 25
    assert [span.name for span in join(chunks, 10)] == ["a"] * 10


def test_lane_with_few_spans_keeps_them() -> None:
    stages = [Span("stage", name, at, at + 1, 0) for at, name in enumerate(("open", "move", "bind"))]
    fetches = [Span("origin", f"file {at}", at / 100, at / 100 + 1, 7) for at in range(1000)]
    joined = join([*stages, *fetches], 50)
    assert [span for span in joined if span.lane == "stage"] == stages
    assert {span.name for span in joined if span.lane == "origin"} == {""}


def test_slices_are_noted_as_time_passes() -> None:
    noted = Spans()
    slices = Slices(noted, "disk", "read")
    slices.add(1)
    assert noted.noted() == []
    deadline = time.perf_counter() + SLICE_S
    while time.perf_counter() < deadline:
        pass
    slices.add(2)
    slices.add(4)
    slices.end()
    first, second = noted.noted()
    assert (first.nbytes, second.nbytes) == (3, 4)
    assert first.stop_s <= second.start_s


# -- in a report


def test_stage_is_a_span() -> None:
    report = Report(uri="x")
    with report.stage("open"):
        pass
    [[lane, name, start_s, stop_s, nbytes]] = report.as_dict(n_spans=10)["spans"]
    assert (lane, name, nbytes) == ("stage", "open", 0)
    assert 0 <= start_s <= stop_s <= 60


def test_stage_within_a_stage_counts_once() -> None:
    report = Report(uri="x")
    began = time.perf_counter()
    with report.stage("open"):
        with report.stage("import"):
            while time.perf_counter() < began + 0.02:
                pass
        with report.stage("import"):
            pass
    with report.stage("move"):
        pass
    assert report.seconds["import"] >= 0.02
    assert report.seconds["open"] < 0.02
    assert report.total_s <= time.perf_counter() - began


def test_spans_are_told_only_where_asked() -> None:
    report = Report(uri="x")
    with report.stage("open"):
        pass
    assert "spans" not in report.as_dict()
