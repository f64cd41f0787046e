"""Own the disk tier's catalogue: a diskcache (SQLite, WAL) of small JSON rows.

Never the truth: chunks are. Lost or damaged, it is set aside and filled again from the files. Never pickles, and
refuses rows that claim to be pickled.

Rows:
    chunk:<digest>             [nbytes, checksum]; checksum is null when not known yet
    learned:<shard>:<index>    digest of a chunk of a shard that came without one
    uses:<model>               moments of a model's last uses, newest first; kept when the model has left
    used_bytes                 what chunks, models' files and chunks being written occupy; never less
    reserved_bytes             what was ever reserved for chunks to be written; only grows
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sqlite3
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diskcache

log = logging.getLogger(__name__)

NEVER_BYTES = 1 << 62
WAIT_S = 30.0
DAMAGED = "damaged"  # a file beside the database, put there by whoever found it so


class PlainDisk(diskcache.Disk):  # type: ignore[misc]
    """Stores text keys and JSON values, inline."""

    def put(self, key: str) -> tuple[str, bool]:
        return key, True

    def get(self, key: str, raw: bool) -> str:
        if not raw:
            raise sqlite3.DatabaseError("a key that is not text")
        return key

    def store(self, value: Any, read: bool, key: Any = None) -> tuple[int, int, str | None, Any]:
        return 0, diskcache.core.MODE_RAW, None, json.dumps(value)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        if mode != diskcache.core.MODE_RAW:
            raise sqlite3.DatabaseError("a value that is not inline text")
        # Counters that SQLite adds up itself come back as numbers.
        return json.loads(value) if isinstance(value, str) else value


class Rows(diskcache.Cache):  # type: ignore[misc]
    """A diskcache that enters the connections of all threads into `opened`, so that their owner can close them.

    Python closes a connection that nobody holds only when it collects garbage: it is part of a cycle.
    """

    def __init__(self, folder: Path, opened: list[sqlite3.Connection], **settings: Any) -> None:
        self._opened = opened
        super().__init__(str(folder), **settings)

    @property
    def _con(self) -> sqlite3.Connection:
        if getattr(self._local, "con", None) is None or self._local.pid != os.getpid():
            path = Path(self.directory) / diskcache.core.DBNAME
            self._local.pid = os.getpid()
            self._local.con = sqlite3.connect(path, timeout=self.timeout, isolation_level=None, check_same_thread=False)
            self._opened.append(self._local.con)
            with contextlib.suppress(sqlite3.OperationalError):  # no settings yet
                for key, value in self._local.con.execute("SELECT key, value FROM Settings").fetchall():
                    if key.startswith("sqlite_"):
                        self.reset(key, value, update=False)
        connection: sqlite3.Connection = self._local.con
        return connection


class CatalogueUnavailableError(OSError):
    """The catalogue cannot be reached now: locked for long, read-only, or its disk is full."""


class CatalogueDamagedError(CatalogueUnavailableError):
    """The catalogue is not a database any more; whoever opens it next rebuilds it."""


class Catalogue:
    """Rows by name. Safe to use from threads and processes.

    Every call may raise CatalogueDamagedError or CatalogueUnavailableError.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)
        (folder / diskcache.core.DBNAME).touch(mode=0o600)  # SQLite's other files take its mode over
        opened: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._n_calls = 0  # under way; a connection closed under its user takes the process with it
        self._closed = False
        self._finalizer = weakref.finalize(self, _close_all, opened)
        self._finalizer.atexit = False  # writers may still be at work then
        if (folder / DAMAGED).exists():
            raise CatalogueDamagedError(f"{folder}: it was found damaged before")
        with self._watching():
            self._rows = Rows(
                folder,
                opened,
                timeout=WAIT_S,
                disk=PlainDisk,
                eviction_policy="none",
                size_limit=NEVER_BYTES,
                cull_limit=0,
                disk_min_file_size=NEVER_BYTES,
                sqlite_mmap_size=0,  # a truncated file under a map would raise SIGBUS
                sqlite_synchronous=1,
            )

    def get(self, key: str) -> Any:
        """Return the row or None: a row is never null."""
        with self._watching():
            return self._rows.get(key)

    def set(self, key: str, value: Any) -> None:
        with self._watching():
            self._rows.set(key, value)

    def delete(self, key: str) -> bool:
        """Remove the row and tell whether it was there."""
        with self._watching():
            return bool(self._rows.delete(key))

    def count(self, key: str) -> int:
        """Return a counter, 0 where there is none."""
        value = self.get(key)
        if value is not None and type(value) is not int:
            raise self.damage(f"{key} is no number")
        return value or 0

    def add(self, key: str, amount: int) -> int:
        """Add to a counter atomically and return its new value."""
        with self.transaction():
            total = self.count(key) + amount
            self.set(key, total)
            return total

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make the calls in the block one atomic change (and many times faster than single ones)."""
        with self._watching(), self._rows.transact():
            yield

    def keys(self, prefix: str) -> list[str]:
        with self._watching():
            return [key for key in self._rows.iterkeys() if key.startswith(prefix)]

    def close(self) -> None:
        """Refuse further calls, and close the connections of all threads when the last call under way has ended."""
        with self._lock:
            self._closed = True
            idle = self._n_calls == 0
        if idle:
            self._finalizer()

    def damage(self, what: str) -> CatalogueDamagedError:
        """Close the catalogue for good, so that whoever opens it next rebuilds it. Returns the error to raise."""
        self.close()
        with contextlib.suppress(OSError):
            (self._folder / DAMAGED).touch(mode=0o600)
        return CatalogueDamagedError(f"{self._folder}: {what}")

    @contextlib.contextmanager
    def _watching(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise CatalogueUnavailableError(f"{self._folder}: it was closed")
            self._n_calls += 1
        try:
            yield
        except (sqlite3.OperationalError, sqlite3.ProgrammingError, diskcache.Timeout) as exc:
            raise CatalogueUnavailableError(f"{self._folder}: {exc or 'locked'}") from exc
        except (sqlite3.DatabaseError, json.JSONDecodeError) as exc:
            raise self.damage(str(exc)) from exc
        finally:
            with self._lock:
                self._n_calls -= 1
                last = self._closed and self._n_calls == 0
            if last:
                self._finalizer()


def _close_all(opened: list[sqlite3.Connection]) -> None:
    for connection in opened:
        with contextlib.suppress(sqlite3.Error):
            connection.close()


def discard(folder: Path) -> None:
    """Remove a catalogue's folder."""
    shutil.rmtree(folder, ignore_errors=True)
