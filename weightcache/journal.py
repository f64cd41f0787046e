"""Own journals: lines of JSON in a folder of the cache folder, a file a month (UTC).

Never fails whoever appends, and never changes a line: what cannot be written is logged once a process, and is not there.

    <folder>/YYYY-MM.jsonl      at most 64 MiB

Lines are appended by single writes, so processes need no lock. Nothing is synced: a power cut may cost the last of them.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from weightcache.errors import CapacityError

log = logging.getLogger(__name__)

MONTH_LIMIT_NBYTES = 64 << 20  # some 150,000 lines
LINE_LIMIT_NBYTES = 1 << 16

_told: set[Path] = set()  # files that could not be written; a path is added under the GIL


class Entry(Protocol):
    """What a line holds."""

    @property
    def time_s(self) -> float:
        """When it was, since the epoch."""

    def to_line(self) -> bytes:
        """Return the line, with its end."""


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True, slots=True)
class Journal(Generic[E]):
    """The lines of one kind, in any cache folder.

    Attributes:
        folder: Its name below the cache folder.
        subject: What the lines say, for messages.
        parse: Reads a line back; ValueError, TypeError, KeyError, RecursionError and OverflowError say that it is foreign.
    """

    folder: str
    subject: str
    parse: Callable[[bytes], E]

    def append(self, root: Path, entries: Sequence[E]) -> None:
        """Write entries of one time; what goes wrong is logged, once a process."""
        if not entries:
            return
        month = datetime.fromtimestamp(entries[0].time_s, UTC).strftime("%Y-%m")
        path = root / self.folder / f"{month}.jsonl"
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _append(path, b"".join(entry.to_line() for entry in entries))
        except OSError as exc:
            if path not in _told:
                _told.add(path)
                log.warning("%s is not kept in %s: %s", self.subject, path, exc.strerror or exc)

    def read(self, root: Path, since_s: float) -> Iterator[E]:
        """Yield the entries from a moment on; lines that are torn or foreign are left out, with a warning.

        Raises:
            CapacityError: A file cannot be read.
        """
        first = datetime.fromtimestamp(since_s, UTC).strftime("%Y-%m")
        for path in sorted((root / self.folder).glob("????-??.jsonl")):
            if path.stem < first:
                continue
            n_foreign = 0
            for line in _lines(path):
                try:
                    entry = self.parse(line)
                except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
                    n_foreign += bool(line.strip())
                    continue
                if entry.time_s >= since_s:
                    yield entry
            if n_foreign:
                log.warning("%d lines of %s cannot be read and are left out", n_foreign, path)


def as_text(value: object) -> str:
    """Return a value of a line that must be text. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def as_count(value: object) -> int:
    """Return a value of a line that must be a count. Raises ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("not a count")
    return value


def _append(path: Path, lines: bytes) -> None:
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        nbytes = os.fstat(fd).st_size
        if nbytes + len(lines) > MONTH_LIMIT_NBYTES:
            raise OSError(f"it has {nbytes} bytes, the most it may have is {MONTH_LIMIT_NBYTES}; move it away")
        if nbytes and os.pread(fd, 1, nbytes - 1) != b"\n":
            lines = b"\n" + lines  # so that a line that was torn spoils no other
        n_written = os.write(fd, lines)
        if n_written != len(lines):
            raise OSError(f"{n_written} bytes of {len(lines)} were written")
    finally:
        os.close(fd)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from iter(functools.partial(file.readline, LINE_LIMIT_NBYTES), b"")
    except OSError as exc:
        raise CapacityError(f"the journal {path} cannot be read: {exc.strerror}", path=str(path)) from exc
