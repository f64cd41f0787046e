"""Own the printed table of what a load makes of each fault: `python tests/faults/hostile_table.py [pytest's arguments]`.

Never judges: it runs test_hostile.py and prints as Markdown what each row recorded.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).with_name("test_hostile.py")


class Recorder:
    """A pytest plugin that keeps what the rows recorded, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        recorded = dict(report.user_properties)
        if report.when == "call" and "row" in recorded:
            self.lines.append(to_line(recorded, is_right=report.passed))


def to_line(recorded: Mapping[str, Any], *, is_right: bool) -> str:
    """Return one row of the table; an outcome that the test does not accept says so."""
    row = recorded["row"]
    outcome = recorded["outcome"]
    verdict = outcome if is_right else f"**{outcome}** (expected: {' or '.join(row.expected)})"
    fault = f"{row.fault}, {row.times}"
    return f"| {fault} | {row.place} | {row.wire} | {verdict} | {recorded['seconds']:.2f} | {recorded['requests']} |"


def main(arguments: list[str]) -> int:
    recorder = Recorder()
    with contextlib.redirect_stdout(sys.stderr):
        status = pytest.main([str(TABLE), "-q", "--tb=no", *arguments], plugins=[recorder])
    print("| fault | place | wire | outcome | seconds | requests |", "|---|---|---|---|--:|--:|", sep="\n")
    print("\n".join(recorder.lines))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
