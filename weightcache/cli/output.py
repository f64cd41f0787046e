"""Own what the command line prints: results on stdout, everything else on stderr.

Never lets a name in a model speak to the terminal: what is not printable is shown escaped.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import click

LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)
GONE_EXIT_CODE = 1
PIPE_WIDTH = 10_000  # columns: in a pipe a row is one line


class Output:
    """How one run of the command line prints: tables, or one JSON object."""

    def __init__(self) -> None:
        self.as_json = False
        self._verbosity = 0
        self._logs_json = False

    def log(self, verbosity: int, *, as_json: bool = False) -> None:
        """Log weightcache's records to stderr: 0 warnings, 1 what is done, 2 all. The highest call counts.

        `as_json` says that each is a JSON object, this run's error too.
        """
        self._verbosity = max(verbosity, self._verbosity)
        self._logs_json = as_json
        shape = "%(asctime)s %(levelname)s %(name)s: %(message)s" if self._verbosity else "weightcache: %(message)s"
        stderr = logging.StreamHandler()
        stderr.setFormatter(_JsonLines() if as_json else logging.Formatter(shape))
        logging.basicConfig(handlers=[stderr], level=logging.WARNING, force=True)
        # Weightcache's alone: botocore's DEBUG shows signatures.
        logging.getLogger("weightcache").setLevel(LEVELS[min(self._verbosity, 2)])

    def result(self, facts: Mapping[str, Any], show: Callable[[], None]) -> None:
        """Print a result: its facts as JSON, or what `show` prints."""
        try:
            if self.as_json:
                print(json.dumps(facts, indent=2, default=str))
            else:
                show()
            print(end="", flush=True)
        except BrokenPipeError:  # the reader has seen enough; what is left must not be tried again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(GONE_EXIT_CODE) from None

    def error(self, line: str, **facts: Any) -> None:
        """Print one line on stderr, and in JSON mode the facts on stdout."""
        if self._logs_json:
            logging.getLogger("weightcache").error("%s", line)
        else:
            click.echo(f"weightcache: {printable(line)}", err=True)
        if self.as_json:
            self.result({"error": facts}, lambda: None)

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None] | None]:
        """Show a bar on stderr during the block, if a person looks on; yields what to call with (done, total)."""
        if self.as_json or self._verbosity or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def show_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows below titles; without titles the first column names the second."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    table = Table(box=None, show_header=any(titles), padding=(0, 2, 0, 0), pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    with console.capture() as drawn:
        console.print(table)
    for line in drawn.get().splitlines():
        print(line.rstrip())


class _JsonLines(logging.Formatter):
    """An object a record: when in UTC, how grave, whose, what; and of a load that ended, its report."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if load := getattr(record, "load", None):
            facts["load"] = load
        if record.exc_info:
            facts["error"] = self.formatException(record.exc_info)
        return json.dumps(facts, default=str)


def printable(text: str) -> str:
    """Escape what would move the cursor, break the line or cannot be encoded."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def size(nbytes: int) -> str:
    """Spell a number of bytes: `2.47 GB`."""
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if nbytes >= 10**power:
            return f"{nbytes / 10**power:.2f} {unit}"
    return f"{nbytes} B"


def count(number: int, what: str) -> str:
    """Spell a number of things: `1 tag`, `2 tags`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def usd(amount: float) -> str:
    """Spell an amount of money: `12.34 USD`, and small ones to a hundredth of a cent."""
    if 0 < amount < 0.0001:
        return "< 0.0001 USD"
    return f"{amount:.4f} USD" if 0 < amount < 1 else f"{amount:.2f} USD"


def ago(then_s: float) -> str:
    """Spell how long ago a moment (seconds since the epoch) was: `3 min ago`."""
    passed_s = time.time() - then_s
    for length_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if passed_s >= length_s:
            return f"{int(passed_s / length_s)} {unit} ago"
    return "just now"
