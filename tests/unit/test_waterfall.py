"""The picture of a load: its bottleneck in a sentence, its trace for Perfetto, its page, and what they may not do."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import daemon_states
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightcache.cli.output import printable
from weightcache.report import Report
from weightcache.spans import Span, busy_s
from weightcache.waterfall import best_bytes_per_s, bottleneck, duration, pack, page, size, spans_of, trace

COLD, WARM, HOT, _ = (load["report"] for load in daemon_states.at_rest()["loads"])
LIMITS = daemon_states.at_rest()["limits"]
NOTHING: dict[str, Any] = Report(uri="x").as_dict(n_spans=10)

moments = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 10))).map(
    lambda each: sorted((Span("origin", "", at, at + long, 1) for at, long in each), key=lambda span: span.start_s)
)


def load_of(seconds: dict[str, float], *spans: Span) -> dict[str, Any]:
    """Return a report of these stages, one after the other, and what moved."""
    plain = {**NOTHING, "seconds": {**seconds, "total": sum(seconds.values())}}
    stages = spans_of({name: value for name, value in plain.items() if name != "spans"})
    return {**plain, "spans": [list(span) for span in (*stages, *spans)]}


# -- the bottleneck


def test_stage_that_took_longest_is_the_bottleneck() -> None:
    found = bottleneck(load_of({"describe": 3.0, "move": 1.0}))
    assert found is not None
    assert (found.what, found.share, found.bytes_per_s) == ("describe", 0.75, None)
    assert found.says == "describe: 3.00 s of 4.00 s (requests for headers, indexes and listings)"


def test_imports_are_left_out() -> None:
    found = bottleneck(load_of({"import": 30.0, "open": 1.0, "move": 0.5}))
    assert found is not None
    assert found.says == "open: 1.00 s of 1.50 s (the origin and the tiers)"
    assert bottleneck(load_of({"import": 30.0})) is None


def test_lane_that_was_busiest_is_the_bottleneck() -> None:
    found = bottleneck(load_of({"move": 10.0}, Span("origin", "", 0, 4, 4000), Span("verify", "", 1, 9, 4000)), {})
    assert found is not None
    assert (found.what, found.share, found.bytes_per_s, found.limit_bytes_per_s) == ("verify", 0.8, 500, None)


def test_lane_at_its_limit_is_the_bottleneck_among_equally_busy_ones() -> None:
    lanes = Span("origin", "", 0, 10, 10_000), Span("disk", "", 0, 9.9, 9_900)
    slow_disk = bottleneck(load_of({"move": 10.0}, *lanes), {"origin_bytes_per_s": 9000, "disk_bytes_per_s": 1100})
    slow_origin = bottleneck(load_of({"move": 10.0}, *lanes), {"origin_bytes_per_s": 1100, "disk_bytes_per_s": 9000})
    assert slow_disk is not None
    assert slow_origin is not None
    assert (slow_disk.what, slow_origin.what) == ("disk", "origin")
    assert slow_origin.says.endswith("at 1.00 kB/s; 1.10 kB/s at best on this machine: at its limit (91 %)")


def test_lane_far_from_its_limit_is_said_to_be() -> None:
    found = bottleneck(load_of({"move": 10.0}, Span("origin", "", 0, 10, 10_000)), {"origin_bytes_per_s": 4000})
    assert found is not None
    assert found.says.endswith("below what it can do (25 %)")


def test_load_alone_measures_itself() -> None:
    spans = [Span("origin", "", at, at + 1, 100 if at else 500) for at in range(20)]
    found = bottleneck(load_of({"move": 20.0}, *spans))
    assert found is not None
    assert found.limit_bytes_per_s == pytest.approx(500)
    assert "500 B/s in the best twentieth of its time" in found.says


def test_writes_behind_hold_up_only_who_waits_for_them() -> None:
    lanes = Span("origin", "", 0, 5, 10), Span("store", "", 0, 10, 10)
    loaded, prefetched = (
        bottleneck(load_of({"move": 10.0}, *lanes)),
        bottleneck(load_of({"move": 10.0, "settle": 0.1}, *lanes)),
    )
    assert loaded is not None
    assert prefetched is not None
    assert (loaded.what, prefetched.what) == ("origin", "store")


def test_only_what_lies_in_the_move_counts() -> None:
    found = bottleneck(load_of({"open": 4.0, "move": 6.0}, Span("origin", "", 2, 12, 1000)))
    assert found is not None
    assert (found.share, found.bytes_per_s) == (1.0, 100)


def test_nothing_has_no_bottleneck() -> None:
    assert bottleneck(NOTHING) is None


def test_load_without_spans_is_judged_by_its_stages() -> None:
    found = bottleneck({"seconds": {"open": 1.0, "move": 3.0, "total": 4.0}})
    assert found is not None
    assert found.says == "move: 3.00 s of 4.00 s"


# -- its parts


@given(moments)
def test_rows_hold_every_span_without_overlap_and_are_few(spans: list[Span]) -> None:
    rows = pack(spans)
    assert sorted(span for row in rows for span in row) == sorted(spans)
    assert all(a.stop_s <= b.start_s for row in rows for a, b in pairwise(row))
    most = max((sum(a.start_s <= b.start_s < a.stop_s for a in spans) for b in spans), default=0)
    assert len(rows) == most


@given(moments)
def test_busy_time_counts_each_moment_once(spans: list[Span]) -> None:
    assert busy_s(spans) == len({at for span in spans for at in range(int(span.start_s), int(span.stop_s))})


@given(moments.filter(bool))
def test_best_rate_is_at_least_the_mean_while_busy(spans: list[Span]) -> None:
    sized = [span._replace(nbytes=10**9) for span in spans]
    assert best_bytes_per_s(sized) >= len(spans) * 1e9 / busy_s(spans) * (1 - 1e-6)


def test_idle_time_does_not_make_a_lane_slower() -> None:
    assert best_bytes_per_s([Span("origin", "", at, at + 0.1, 100) for at in range(40)]) == pytest.approx(1000)


def test_best_rate_of_an_instant_is_none() -> None:
    assert best_bytes_per_s([Span("origin", "", 1, 1, 5)]) == 0.0


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        (size(0), "0 B"),
        (size(999), "999 B"),
        (size(2_470_000_000), "2.47 GB"),
        (duration(0), "0 ms"),
        (duration(0.00125), "1.25 ms"),
        (duration(12.3), "12.30 s"),
        (duration(252.9), "4 min 12 s"),
    ],
)
def test_numbers_have_units(spelled: str, expected: str) -> None:
    assert spelled == expected


# -- as a trace


@pytest.mark.parametrize("report", [HOT, WARM, COLD, NOTHING, load_of({"move": 1.0})])
def test_trace_has_the_form_that_perfetto_reads(report: dict[str, Any]) -> None:
    form = json.loads(json.dumps(trace(report), allow_nan=False))
    assert form.keys() == {"traceEvents", "displayTimeUnit", "otherData"}
    tracks: dict[int, list[tuple[float, float]]] = {}
    named = set()
    for event in form["traceEvents"]:
        assert {"name", "ph", "pid", "tid"} <= event.keys()
        if event["ph"] == "M":
            named.add(event["tid"])
            assert event["name"] in ("process_name", "thread_name", "thread_sort_index")
            continue
        assert (event["ph"], event["pid"]) == ("X", 1)
        assert event["name"]
        assert event["dur"] >= 0
        tracks.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert tracks.keys() <= named
    # What overlaps on a track without nesting is drawn wrongly; a microsecond's rounding is not seen.
    for spans in tracks.values():
        assert all(a[1] <= b[0] + 0.01 for a, b in pairwise(sorted(spans)))


def test_trace_tells_every_byte_and_the_bottleneck() -> None:
    form = trace(COLD)
    told = sum(event["args"]["bytes"] for event in form["traceEvents"] if event.get("cat") == "origin")
    assert told == sum(span.nbytes for span in spans_of(COLD) if span.lane == "origin")
    assert form["otherData"]["bottleneck"].startswith("origin")


# -- as a page


class Parsed(HTMLParser):
    """What a page holds: its tags, where they lead, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_shows_the_load_and_needs_nothing() -> None:
    parsed = Parsed(page(COLD))
    assert parsed.links == []
    assert not {"script", "link", "iframe", "img"} & set(parsed.tags)
    assert "url(" not in page(COLD)
    for said in (COLD["uri"], "16.06 GB from origin", "in the best twentieth of its time", "describe", "verify"):
        assert said in parsed.text


def test_page_of_nothing_is_a_page() -> None:
    assert "it took no time" in Parsed(page(NOTHING)).text


def test_hostile_names_stay_text_on_the_page() -> None:
    plain = Parsed(page(COLD))
    for evil in daemon_states.EVIL:
        spans = [[lane, evil, *rest] for lane, _, *rest in COLD["spans"]] + [[evil, evil, 0, 1, 1]]
        named = COLD | {"uri": evil, "revision": evil, "device": evil, "spans": spans, "warnings": [evil]}
        parsed = Parsed(page(named | {"choices": {evil: evil}}))
        assert set(parsed.tags) == set(plain.tags)
        assert parsed.links == []
        assert parsed.text.count(printable(evil)) > 4
        assert "\u202e" not in parsed.text
