"""Own the command of a suite of questions: its options, the run through the questions, what is printed and written.

Never measures, and knows no question.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measuring
from questions import Answer, Comparison, Question
from rows import GB, format_table
from workshop import Workshop


def main(
    description: str | None,
    questions: Sequence[Question],
    disk_needed: Mapping[bool, int],
    *,
    out: Path | None = None,
    quick_throws_away: int = 1,
    slow: Sequence[str] = (),
) -> None:
    """Answer the questions that the command line chooses.

    Args:
        description: The benchmark's docstring.
        disk_needed: Bytes, by --quick.
        out: Where the rows go without --out; not with --quick.
        quick_throws_away: Rounds before those that count, with --quick.
        slow: Questions left out with --quick, unless --only names them.
    """
    arguments = parse_arguments(description or "", questions, out)
    chosen = [question for question in questions if question.name.startswith(arguments.only)]
    if not chosen:
        sys.exit(f"no question begins with {arguments.only!r}: {', '.join(each.name for each in questions)}")
    if arguments.quick:
        chosen = [
            replace(each, n_thrown_away=quick_throws_away) if isinstance(each, Comparison) else each
            for each in chosen
            if each.name not in slow or arguments.only
        ]
    free, needed = shutil.disk_usage(arguments.work).free, disk_needed[arguments.quick]
    say(f"disk: {free / GB:.0f} GB free, up to {needed / GB:.0f} GB needed for the time of the run")
    if free < needed:
        sys.exit("not enough: pass --work FOLDER on a larger disk, or --quick")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    commit = measuring.describe_commit(measuring.REPOSITORY)
    machine = measuring.describe_machine(arguments.work)
    print(f"commit {commit}\nmachine {machine}\nload average {os.getloadavg()[0]:.1f} at the start\n")
    rows: list[dict[str, Any]] = []
    n_misses = n_skipped = 0
    began = time.monotonic()
    with Workshop(arguments.work, quick=arguments.quick) as workshop:
        for question in chosen:
            answer = question.answer(workshop, arguments.repeats, say)
            show(question, answer, 0 if answer.obstacle else workshop.nbytes(question.model))
            n_skipped += bool(answer.obstacle)
            n_misses += sum(not verdict.passed for verdict in answer.verdicts) + len(answer.failures)
            rows += as_json(question, answer, {"commit": commit, "machine": machine, "quick": arguments.quick})
            if arguments.out is not None:  # after each question: a long run that breaks has not been for nothing
                text = json.dumps(rows, indent=1).replace(str(workshop.folder), "<work>")
                arguments.out.write_text(text + "\n")
    skipped = f", {n_skipped} questions skipped" if n_skipped else ""
    print(f"{n_misses} targets missed{skipped}; {time.monotonic() - began:.0f} s in all")


def parse_arguments(description: str, questions: Sequence[Question], out: Path | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0], epilog=f"questions: {', '.join(each.name for each in questions)}"
    )
    parser.add_argument("--quick", action="store_true", help="models of a tenth of the size, and 1 repeat")
    parser.add_argument("--repeats", type=int, help="runs of each case, beside one thrown away (5; 1 with --quick)")
    parser.add_argument("--only", default="", metavar="NAME", help="only the questions whose names begin so")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all rows there, too")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where to work: on a real disk")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 5)
    if not arguments.quick and not arguments.only:
        arguments.out = arguments.out or out
    return arguments


def show(question: Question, answer: Answer, nbytes: int) -> None:
    """Print a question's table and verdicts."""
    if answer.obstacle:
        print(f"{question.name}: SKIPPED, {answer.obstacle}\n", flush=True)
        return
    print(f"{question.name} ({nbytes / GB:.3f} GB): {question.asks}")
    print(format_table(list(answer.rows.values())))
    for verdict in answer.verdicts:
        print(verdict)
    for case, reason in answer.failures.items():
        print(f"  MISS  {case} failed: {reason}")
    print(flush=True)


def as_json(question: Question, answer: Answer, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a question's rows, each complete by itself, and its verdicts as a last row."""
    rows = [
        {**common, "question": question.name, "model": question.model, **row.as_dict()} for row in answer.rows.values()
    ]
    last = {**common, "question": question.name, "verdicts": [verdict.as_dict() for verdict in answer.verdicts]}
    if answer.failures:
        last["failures"] = dict(answer.failures)
    if answer.obstacle:
        last["obstacle"] = answer.obstacle
    return [*rows, last]


def say(line: str) -> None:
    """Report progress, beside the results."""
    print(line, file=sys.stderr, flush=True)
