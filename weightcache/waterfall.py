"""Own the picture of a load over time: as a trace, as a page of its own, and in one sentence, the bottleneck. Pure.

Never draws what was not told: a lane without spans has no bar, and a limit that nobody measured is none.

A load comes in its plain form (`Report.as_dict(n_spans=…)`), so that one of another process is drawn like one's own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from weightcache.spans import STAGE, Span, busy_s, join

LANES = ("origin", "wait", "disk", "host", "verify", "device", "store")
MOVE = "move"
MEANS = {
    "open": "the origin and the tiers",
    "describe": "requests for headers, indexes and listings",
    "look": "what is where",
    "bind": "tensors over the bytes",
    "files": "files beside the weights",
    "settle": "until everything is on disk",
    "origin": "reading from where the model was born",
    "wait": "for another process that fetches the same",
    "disk": "reading the disk tier",
    "host": "copying from host memory",
    "verify": "computing digests",
    "device": "copying to the device",
    "store": "writing to the disk tier, behind",
}
# Of the stages, by the lane that has the same.
COLOURS = {
    "import": "stage",
    "open": "wait",
    "describe": "verify",
    "look": "store",
    "move": "origin",
    "bind": "disk",
    "files": "device",
    "settle": "host",
}
# A lane whose share of the time is this close to the largest may as well be what the others wait for.
NEARLY = 0.9
AT_LIMIT = 0.8  # of the rate that a lane can do: nothing else is worth looking at before
N_PARTS = 20  # the best twentieth of a lane's time is what it can do, as far as one load can tell
MOST_BARS = 3000


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What a load spent most of its time on.

    Attributes:
        what: A stage, or while bytes moved, a lane.
        share: Of the load's time, for a stage; of the move's, for a lane.
        bytes_per_s: What the lane did while it was busy; None for a stage.
        limit_bytes_per_s: What it can do; None where nobody knows.
        says: All this in a sentence.
    """

    what: str
    share: float
    bytes_per_s: float | None
    limit_bytes_per_s: float | None
    says: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


def spans_of(report: Mapping[str, Any]) -> list[Span]:
    """Return the spans of a load by their start; where it tells none, its stages one after the other."""
    if "spans" in report:
        return sorted((Span(*each) for each in report["spans"]), key=lambda span: span.start_s)
    spans, at_s = [], 0.0
    for name, spent_s in report["seconds"].items():
        if name != "total":
            spans.append(Span(STAGE, name, at_s, at_s + spent_s, 0))
            at_s += spent_s
    return spans


def pack(spans: Sequence[Span]) -> list[list[Span]]:
    """Divide spans, which come by their start, among as few rows as hold them without overlap."""
    rows: list[list[Span]] = []
    ends: list[tuple[float, int]] = []
    for span in spans:
        if ends and ends[0][0] <= span.start_s:
            row = heapq.heapreplace(ends, (span.stop_s, ends[0][1]))[1]
            rows[row].append(span)
        else:
            heapq.heappush(ends, (span.stop_s, len(rows)))
            rows.append([span])
    return rows


def best_bytes_per_s(spans: Sequence[Span]) -> float:
    """Return the rate while busy in the best twentieth of the time of these spans, which come by their start.

    Each one's bytes are spread evenly over it.
    """
    start_s, stop_s = spans[0].start_s, max(span.stop_s for span in spans)
    part_s = (stop_s - start_s) / N_PARTS
    if part_s <= 0:
        return 0.0
    parts: list[list[Span]] = [[] for _ in range(N_PARTS)]
    for span in spans:
        first, last = (min(int((at_s - start_s) / part_s), N_PARTS - 1) for at_s in (span.start_s, span.stop_s))
        for number in range(first, last + 1):
            if cut := _cut(span, start_s + number * part_s, start_s + (number + 1) * part_s):
                parts[number].append(cut)
    return max(sum(span.nbytes for span in part) / busy_s(part) for part in parts if part)


def _cut(span: Span, start_s: float, stop_s: float) -> Span | None:
    """Return what of a span lies between two moments, with its share of the bytes."""
    begin_s, end_s = max(span.start_s, start_s), min(span.stop_s, stop_s)
    if begin_s >= end_s:
        return None
    inside = (end_s - begin_s) / (span.stop_s - span.start_s)
    return Span(span.lane, span.name, begin_s, end_s, round(span.nbytes * inside))


def bottleneck(report: Mapping[str, Any], limits: Mapping[str, float | None] | None = None) -> Bottleneck | None:
    """Name what a load spent most of its time on, imports left out; None for one that took none.

    Args:
        limits: The best that this machine has shown, `<lane>_bytes_per_s`. Without them a lane's limit is the best
            twentieth of its own time in this load: how steady it was is all that one load can tell.
    """
    seconds = {name: spent_s for name, spent_s in report["seconds"].items() if name not in ("total", "import")}
    total_s = sum(seconds.values())
    if not total_s:
        return None
    stage = max(seconds, key=lambda name: seconds[name])
    lanes = _lanes_of_the_move(report, waits_for_disk="settle" in seconds) if stage == MOVE else {}
    if not lanes:
        share = seconds[stage] / total_s
        means = f" ({MEANS[stage]})" if stage in MEANS else ""
        says = f"{stage}: {duration(seconds[stage])} of {duration(total_s)}{means}"
        return Bottleneck(stage, share, None, None, says)
    move_s = seconds[MOVE]
    judged = [_judge(lane, spans, move_s, limits) for lane, spans in lanes.items()]
    largest = max(each.share for each in judged)
    return max((each for each in judged if each.share >= NEARLY * largest), key=_used)


def _lanes_of_the_move(report: Mapping[str, Any], *, waits_for_disk: bool) -> dict[str, list[Span]]:
    """Return the spans that the move may have waited for, by lane, cut to its time."""
    spans = spans_of(report)
    moves = [span for span in spans if span.lane == STAGE and span.name == MOVE]
    lanes: dict[str, list[Span]] = {}
    for span in spans if moves else ():
        is_waited_for = span.lane in LANES and (span.lane != "store" or waits_for_disk)
        if is_waited_for and (cut := _cut(span, moves[0].start_s, moves[-1].stop_s)):
            lanes.setdefault(span.lane, []).append(cut)
    return lanes


def _judge(lane: str, spans: Sequence[Span], move_s: float, limits: Mapping[str, float | None] | None) -> Bottleneck:
    spent_s, nbytes = busy_s(spans), sum(span.nbytes for span in spans)
    share = min(1.0, spent_s / move_s)
    says = f"{lane} ({MEANS[lane]}): busy for {_percent(share)} of the move"
    if not nbytes:
        return Bottleneck(lane, share, None, None, says)
    rate = nbytes / spent_s
    if limits is None:
        limit: float | None = best_bytes_per_s(spans)
        source = "in the best twentieth of its time"
    else:
        limit = limits.get(f"{lane}_bytes_per_s")
        source = "at best on this machine"
    says += f", at {size(rate)}/s"
    if limit:
        verdict = "at its limit" if rate >= AT_LIMIT * limit else "below what it can do"
        says += f"; {size(limit)}/s {source}: {verdict} ({_percent(rate / limit)})"
    return Bottleneck(lane, share, rate, limit or None, says)


def _used(each: Bottleneck) -> float:
    """Return how much of what it can do a lane did; of one whose limit is not known, a middling guess."""
    if each.bytes_per_s is None or each.limit_bytes_per_s is None:
        return AT_LIMIT / 2
    return each.bytes_per_s / each.limit_bytes_per_s


# -- as a trace


def trace(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a load in the Trace Event Format (JSON object form), which ui.perfetto.dev and chrome://tracing show.

    Events of one track must nest, so that a lane has as many tracks as it did things at once.
    """
    events = [_said("process_name", 0, name=f"weightcache load {report['uri']}")]
    for track, (lane, number, row) in enumerate(_tracks(spans_of(report)), 1):
        events.append(_said("thread_name", track, name=f"{lane} {number}" if number > 1 else lane))
        events.append(_said("thread_sort_index", track, sort_index=track))
        for span in row:
            event = {
                "name": span.name or span.lane,
                "cat": span.lane,
                "ph": "X",
                "ts": round(span.start_s * 1e6, 3),
                "dur": round((span.stop_s - span.start_s) * 1e6, 3),
                "pid": 1,
                "tid": track,
            }
            events.append({**event, "args": {"bytes": span.nbytes}} if span.nbytes else event)
    found = bottleneck(report)
    told = {name: str(report.get(name, "")) for name in ("uri", "revision", "device")}
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {**told, "bottleneck": found.says if found else ""},
    }


def _said(what: str, track: int, **args: object) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 1, "tid": track, "args": args}


def _tracks(spans: Sequence[Span]) -> Iterator[tuple[str, int, list[Span]]]:
    """Yield (lane, number of the row in it, row)."""
    for lane in (STAGE, *LANES):
        for number, row in enumerate(pack([span for span in spans if span.lane == lane]), 1):
            yield lane, number, row


# -- as a page

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #16202b; --muted: #55626e; --line: #d9e0e6;
  --stage: #64748b; --origin: #2f74d0; --wait: #8a6d3b; --disk: #0c7a6d; --host: #33762f; --verify: #97590a;
  --device: #c03d77; --store: #7657cf; }
@media (prefers-color-scheme: dark) { :root { --page: #0f151b; --card: #171f27; --ink: #e4eaf0; --muted: #9aa8b5;
  --line: #2b3743; --stage: #8494a6; --origin: #5b9cf0; --wait: #c7a367; --disk: #35b5a4; --host: #66b86a;
  --verify: #e0a03f; --device: #ea7bab; --store: #a58bf2; } }
body { margin: 0; padding: 1.5rem clamp(1rem, 4vw, 3rem); background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 1.25rem; margin: 0; }
h2 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .25rem 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin-top: 1rem; }
.muted, th { color: var(--muted); }
.lane { display: grid; grid-template-columns: 4rem minmax(0, 1fr); gap: .5rem; align-items: start; margin: .3rem 0; }
svg, .axis { display: block; width: 100%; background: color-mix(in srgb, var(--line) 40%, transparent); }
.axis { position: relative; height: 1.5em; background: none; color: var(--muted); font-size: 12px; }
.axis span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.axis span:first-child { transform: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .2rem .75rem .2rem 0; border-bottom: 1px solid var(--line); font-weight: normal; }
.numbers td + td, .numbers th + th { text-align: right; white-space: nowrap; }
"""


def page(report: Mapping[str, Any]) -> str:
    """Return a load as an HTML page that needs nothing but itself, no script either."""
    spans = spans_of(report)
    drawn = join(spans, MOST_BARS)
    end_s = max((span.stop_s for span in spans), default=0.0)
    found = bottleneck(report)
    moved = ", ".join(f"{size(nbytes)} from {tier}" for tier, nbytes in report["bytes"].items() if nbytes)
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>weightcache: {_text(report['uri'])}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>",
        f"<h1>{_text(report['uri'])}</h1>",
        f'<p class="muted">{_text(report["revision"])}</p>',
        f"<p>{duration(report['seconds']['total'])}: {moved or 'nothing moved'}; {report['gb_per_s']:.2f} GB/s</p>",
        f"<section><h2>Bottleneck</h2><p>{_text(found.says) if found else 'none: it took no time'}</p>",
        '<p class="muted">Measured in this load alone.</p></section>',
        "<section><h2>Waterfall</h2>",
        *(_bars(lane, [span for span in drawn if span.lane == lane], end_s) for lane in (STAGE, *LANES)),
        _axis(end_s),
        _key(report["seconds"]),
        "</section>",
        _table("Stages", ("stage", "time", "share"), _stage_rows(report), numbers=True),
        _table("Lanes", ("lane", "busy", "bytes", "while busy", "at best", "pieces"), _lane_rows(spans), numbers=True),
        _table("Choices", ("of", "chosen"), report["choices"].items()),
        _table("Warnings", ("warning",), ([text] for text in report["warnings"])),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _bars(lane: str, spans: Sequence[Span], end_s: float) -> str:
    """Return a lane's bars, a row for each thing it did at once; as wide as the load is long."""
    rows = pack(spans)
    if not rows or end_s <= 0:
        return ""
    height = max(5, 14 // len(rows))
    bars = []
    for number, row in enumerate(rows):
        for span in row:
            x, width = span.start_s / end_s * 1000, max(1.0, (span.stop_s - span.start_s) / end_s * 1000)
            told = f"{span.name or lane}: {duration(span.stop_s - span.start_s)} from {duration(span.start_s)}"
            told += f", {size(span.nbytes)}" if span.nbytes else ""
            place = f'x="{x:.2f}" y="{number * height}" width="{width:.2f}" height="{height - 1}"'
            fill = f' fill="var(--{COLOURS[span.name]})"' if lane == STAGE and span.name in COLOURS else ""
            bars.append(f"<rect {place}{fill}><title>{_text(told)}</title></rect>")
    label = f"{lane}: {MEANS.get(lane, 'one after the other')}, busy for {duration(busy_s(spans))}"
    return (
        f'<div class="lane"><span>{lane}</span><svg role="img" aria-label="{label}" '
        f'viewBox="0 0 1000 {len(rows) * height}" height="{len(rows) * height}" preserveAspectRatio="none" '
        f'fill="var(--{lane})">{"".join(bars)}</svg></div>'
    )


def _axis(end_s: float) -> str:
    ticks = "".join(f'<span style="left:{at_s / end_s:.2%}">{duration(at_s)}</span>' for at_s in _ticks(end_s))
    return f'<div class="lane" aria-hidden="true"><span></span><div class="axis">{ticks}</div></div>'


def _key(stages: Iterable[str]) -> str:
    """Return what the colours of the stages mean."""
    known = (f'<span style="color:var(--{COLOURS[name]})">■</span> {name}' for name in stages if name in COLOURS)
    return f'<p class="muted">{" &nbsp; ".join(known)}</p>'


def _ticks(end_s: float) -> list[float]:
    """Return up to nine round moments from the start to the end of a load."""
    if end_s <= 0:
        return []
    steps = (step * 10.0**power for power in range(-6, 12) for step in (1, 2, 5))
    step_s = next((step_s for step_s in steps if end_s / step_s < 8), end_s)
    return [step_s * number for number in range(int(end_s / step_s) + 1)]


def _table(title: str, titles: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    if not lines:
        return ""
    head = "".join(f'<th scope="col">{each}</th>' for each in titles)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<section><h2>{title}</h2><div class="scroll"><table{" class=numbers" if numbers else ""}>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _stage_rows(report: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    total_s = report["seconds"]["total"]
    for name, spent_s in report["seconds"].items():
        yield name, duration(spent_s), _percent(spent_s / total_s) if total_s else ""


def _lane_rows(spans: Sequence[Span]) -> Iterator[tuple[str, ...]]:
    for lane in LANES:
        of_lane = [span for span in spans if span.lane == lane]
        if of_lane:
            spent_s, nbytes = busy_s(of_lane), sum(span.nbytes for span in of_lane)
            rate = f"{size(nbytes / spent_s)}/s" if spent_s else ""
            yield lane, duration(spent_s), size(nbytes), rate, f"{size(best_bytes_per_s(of_lane))}/s", str(len(of_lane))


def size(nbytes: float) -> str:
    """Spell a number of bytes: `2.47 GB`."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if nbytes >= 10**power:
            return f"{nbytes / 10**power:.2f} {unit}"
    return f"{nbytes:.0f} B"


def _percent(part: float) -> str:
    return f"{part * 100:.0f} %"


def duration(spent_s: float) -> str:
    """Spell a length of time: `850 ms`, `12.30 s`, `4 min 12 s`."""
    if spent_s >= 60:
        return f"{int(spent_s // 60)} min {int(spent_s % 60)} s"
    return f"{spent_s:.2f} s" if spent_s >= 1 else f"{spent_s * 1000:.4g} ms"


def _text(text: str) -> str:
    """Return a text as HTML; what has no shape of its own, or would turn the text around it, is spelled out."""
    return escape("".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text))
