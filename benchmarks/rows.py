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
        )

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / GB / self.seconds.median

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"gb_per_s": self.gb_per_s}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A number held against its target."""

    what: str
    value: float
    limit: float
    unit: str = ""

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    def __str__(self) -> str:
        word = "pass" if self.passed else "MISS"
        return f"  {word}  {self.what}: {self.value:.3f}{self.unit}, target at most {self.limit:g}{self.unit}"


Rows = Mapping[str, Row]
Judge = Callable[[Rows], list[Verdict]]


def no_slower(ours: str, peer: str) -> Judge:
    """Hold the ratio of two medians against 1; without verdict where a case was skipped."""

    def judge(rows: Rows) -> list[Verdict]:
        if ours not in rows or peer not in rows:
            return []
        ratio = rows[ours].seconds.median / rows[peer].seconds.median
        return [Verdict(f"time of {ours} / {peer}", ratio, 1.0, "x")]

    return judge


def at_most(case: str, limit_s: float) -> Judge:
    """Hold a median against a time."""
    return lambda rows: [Verdict(case, rows[case].seconds.median, limit_s, " s")]


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
