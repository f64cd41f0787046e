"""Own the results: rows from runs, verdicts on rows, and the table.

Never runs anything, and never hides a miss.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MIB = 1 << 20
GB = 10**9
MEMORY_LIMIT_NBYTES = 256 * MIB
NO_COPY_NBYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and what it lies between."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Row:
    """One case's runs of one question.

    Attributes:
        nbytes: Of the model's weight files.
        seconds: To the last tensor, every page of it touched.
        stored_s: To the same and all fetched bytes synced to disk, counted from the same start; None where the case
            stores nothing.
        cpu_s: Of the process, median, until the last of the two.
        peak_nbytes: Highest resident memory above that after the imports, mapped files included; the worst run.
        image_nbytes: Of it, the memory the tensors lie in; 0 where not known.
        page_cache: The state found at the start of the last run.
        facts: What the loader said of itself in the last run.
        spreads: The numbers among the facts, over all runs.
    """

    case: str
    nbytes: int
    seconds: Spread
    stored_s: Spread | None
    cpu_s: float
    peak_nbytes: int
    image_nbytes: int
    page_cache: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    spreads: Mapping[str, Spread] = field(default_factory=dict)

    @classmethod
    def of(cls, case: str, nbytes: int, results: Sequence[Mapping[str, Any]]) -> Row:
        last = results[-1]
        stored = [result["stored_s"] for result in results if "stored_s" in result]
        return cls(
            case=case,
            nbytes=nbytes,
            seconds=Spread.of([result["seconds"] for result in results]),
            stored_s=Spread.of(stored) if stored else None,
            cpu_s=statistics.median(result.get("stored_cpu_s", result["cpu_s"]) for result in results),
            peak_nbytes=max(result["peak_bytes"] for result in results),
            image_nbytes=last["facts"].get("image_bytes", 0),
            page_cache=last["page_cache"],
            facts=last["facts"],
            spreads={
                name: Spread.of([result["facts"][name] for result in results])
                for name, value in last["facts"].items()
                if isinstance(value, (int, float))
            },
        )

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / GB / self.seconds.median

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gb_per_s": self.gb_per_s}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A number held against its target: the most it may be, or the least where `is_least`; or told without one."""

    what: str
    value: float
    limit: float | None = None
    unit: str = ""
    is_least: bool = False

    @property
    def passed(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.is_least else self.value <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"unit": self.unit.strip(), "passed": self.passed}

    def __str__(self) -> str:
        if self.limit is None:
            return f"  told  {self.what}: {self.value:.10g}{self.unit}"
        word, bound = "pass" if self.passed else "MISS", "at least" if self.is_least else "at most"
        return f"  {word}  {self.what}: {self.value:.3f}{self.unit}, target {bound} {self.limit:g}{self.unit}"


Rows = Mapping[str, Row]
Judge = Callable[[Rows], list[Verdict]]


def no_slower(ours: str, peer: str, most: float = 1.0) -> Judge:
    """Hold the ratio of two medians against `most`; without verdict where a case was skipped."""

    def judge(rows: Rows) -> list[Verdict]:
        if ours not in rows or peer not in rows:
            return []
        ratio = rows[ours].seconds.median / rows[peer].seconds.median
        return [Verdict(f"time of {ours} / {peer}", ratio, most, "x")]

    return judge


def later_by_at_most(ours: str, peer: str, most_s: float) -> Judge:
    """Hold the difference of two medians against `most_s`; without verdict where a case was skipped."""

    def judge(rows: Rows) -> list[Verdict]:
        if ours not in rows or peer not in rows:
            return []
        seconds = rows[ours].seconds.median - rows[peer].seconds.median
        return [Verdict(f"time of {ours} - {peer}", seconds, most_s, " s")]

    return judge


def at_most(case: str, limit_s: float) -> Judge:
    """Hold a median against a time; without verdict where the case was skipped."""
    return lambda rows: [Verdict(case, rows[case].seconds.median, limit_s, " s")] if case in rows else []


def times_as_fast(ours: str, peers: Sequence[str], least: float) -> Judge:
    """Hold how many times as fast ours is, by medians, as the fastest of those peers that ran."""

    def judge(rows: Rows) -> list[Verdict]:
        present = [rows[peer] for peer in peers if peer in rows]
        if ours not in rows or not present:
            return []
        fastest = min(present, key=lambda row: row.seconds.median)
        ratio = fastest.seconds.median / rows[ours].seconds.median
        return [Verdict(f"speed of {ours} / {fastest.case}", ratio, least, "x", is_least=True)]

    return judge


def cpu_at_most(case: str, limit_s_per_gb: float) -> Judge:
    """Hold a case's CPU seconds per GB against a limit."""

    def judge(rows: Rows) -> list[Verdict]:
        if case not in rows:
            return []
        return [Verdict(f"CPU of {case}", rows[case].cpu_s / rows[case].nbytes * GB, limit_s_per_gb, " s/GB")]

    return judge


def cpu_share(ours: str, peer: str, most: float) -> Judge:
    """Hold ours' CPU seconds against a share of a peer's."""

    def judge(rows: Rows) -> list[Verdict]:
        if ours not in rows or peer not in rows:
            return []
        return [Verdict(f"CPU of {ours} / {peer}", rows[ours].cpu_s / rows[peer].cpu_s, most, "x")]

    return judge


def extra_bytes_at_most(ours: str, base: str, most: float) -> Judge:
    """Hold the bytes that a proxy carried for ours beside those for another case, as a share of those."""

    def judge(rows: Rows) -> list[Verdict]:
        if ours not in rows or base not in rows:
            return []
        carried, due = (rows[case].facts["proxy_bytes"] for case in (ours, base))
        return [Verdict(f"bytes of {ours} / {base}, last round", carried / due, 1 + most, "x")]

    return judge


def told(case: str, fact: str, what: str, unit: str = "") -> Judge:
    """Tell the median of a number among a case's facts."""
    return lambda rows: (
        [Verdict(f"{what} of {case}", rows[case].spreads[fact].median, unit=unit)] if case in rows else []
    )


def fact_at_most(case: str, fact: str, what: str, most: float, unit: str = "") -> Judge:
    """Hold the highest of a number among a case's facts against a limit."""
    return lambda rows: (
        [Verdict(f"{what} of {case}, worst round", rows[case].spreads[fact].high, most, unit)] if case in rows else []
    )


def fact_at_least(case: str, fact: str, what: str, least: float, unit: str = "") -> Judge:
    """Hold the lowest of a number among a case's facts against a limit."""
    return lambda rows: (
        [Verdict(f"{what} of {case}, worst round", rows[case].spreads[fact].low, least, unit, is_least=True)]
        if case in rows
        else []
    )


def no_copy(case: str) -> Judge:
    """Hold the memory that a case took beside what was there before its clock against NO_COPY_NBYTES."""
    return lambda rows: (
        [Verdict(f"new memory of {case}", rows[case].peak_nbytes / MIB, NO_COPY_NBYTES / MIB, " MiB")]
        if case in rows
        else []
    )


def little_memory(rows: Rows) -> list[Verdict]:
    """Hold what weightcache needs beside its image against MEMORY_LIMIT_NBYTES."""
    return [
        Verdict(
            f"memory of {row.case} beside its tensors",
            (row.peak_nbytes - row.image_nbytes) / MIB,
            MEMORY_LIMIT_NBYTES / MIB,
            " MiB",
        )
        for row in rows.values()
        if row.image_nbytes
    ]


def format_table(rows: Sequence[Row]) -> str:
    """Return rows as text with aligned columns."""
    head = ("case", "s to the last tensor", "s until stored", "GB/s", "CPU s", "peak MiB", "state")
    lines = [head] + [
        (
            row.case,
            str(row.seconds),
            str(row.stored_s or "–"),
            f"{row.gb_per_s:.2f}",
            f"{row.cpu_s:.2f}",
            f"{row.peak_nbytes / MIB:.0f}",
            row.page_cache,
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
