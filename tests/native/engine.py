"""Own single operations of `_engine.run` for tests: made field by field, carried out, and looked at.

Never checks anything, and never goes through weightcache.operations, which is tested elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from weightcache import _engine

# struct wc_op and struct wc_span of ext/run.h.
OPERATION = np.dtype(
    [
        ("fd", "i4"), ("flags", "u4"), ("name", "u8"), ("offset", "u8"), ("nbytes", "u8"), ("target", "u8"),
        ("first_span", "u4"), ("n_spans", "u4"), ("checksum", "u8"), ("status", "i4"), ("reread", "u4"), ("moved", "u8"),
    ]
)  # fmt: skip
SPAN = np.dtype([("from", "u8"), ("to", "u8"), ("nbytes", "u8")])
COUNTERS = ("direct", "cached", "checked", "copied", "by_device", "done", "reread", "refused")
DRIVER_ERROR = -1_000_000  # less the driver's code it is an operation's status


def op(fd: int = -1, **fields: int) -> tuple[int, ...]:
    """Return one operation, its fields as named in ext/run.h, 0 unless given."""
    row = dict.fromkeys(OPERATION.names or (), 0) | {"fd": fd} | fields
    return tuple(row.values())


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file or a folder for a while."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def address(buffer: Any) -> int:
    """Return the address of a buffer's first byte, which must not move while it is used."""
    return int(np.frombuffer(buffer, "u1").ctypes.data)


@dataclass(frozen=True)
class Ended:
    """What came of a run: the index that it returned, its operations, and its counters by name."""

    failed: int | None
    ops: Any
    counters: dict[str, int]

    @property
    def statuses(self) -> list[int]:
        return [int(status) for status in self.ops["status"]]


def run(ops: Sequence[tuple[int, ...]], spans: Sequence[tuple[int, int, int]] = (), **others: Any) -> Ended:
    """Carry operations out by `_engine.run`."""
    rows, counters = np.array(list(ops), OPERATION), np.zeros(_engine.N_COUNTERS, "u8")
    failed = _engine.run(rows, np.array(list(spans), SPAN), counters=counters, **others)
    return Ended(failed, rows, dict(zip(COUNTERS, map(int, counters), strict=True)))


def read(fd: int, offset: int, target: Any, flags: int = 0, **fields: int) -> Ended:
    """Fill a writable buffer from an open file."""
    return run([op(fd, flags=flags, offset=offset, nbytes=len(target), target=address(target), **fields)], threads=1)
