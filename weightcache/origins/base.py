"""Own the contract of an origin: a folder of immutable-while-read files behind a URI.

Never holds an implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from weightcache.ledger import Ledger

PIECE_NBYTES = 256 << 10  # a broken body is resumed from its last whole piece


@dataclass(frozen=True, slots=True)
class Stat:
    """One file at an origin: name relative to the folder, size in bytes, and the name of this state of it.

    An empty `etag` demands no state: the file's name says what its bytes are.
    """

    path: str
    nbytes: int
    etag: str


@dataclass(frozen=True, slots=True)
class Small:
    """A small file: its bytes, and the name of this state of it."""

    content: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One file as a listing says it; `modified_s` is when it was written, in seconds since 1970 by the store's clock."""

    name: str
    nbytes: int
    modified_s: float


class Origin(Protocol):
    """A folder at an origin. All methods run on the loop thread and may run concurrently.

    Errors are translated at the edge: ModelNotFoundError, AccessDeniedError, OriginChangedError and OriginError are
    final; TransientOriginError is worth another attempt. A cancelled call leaves nothing behind.
    """

    @property
    def ledger(self) -> Ledger:
        """What was asked so far, of the replica that is asked next; counted beside by what wraps it."""

    @property
    def ledgers(self) -> Sequence[Ledger]:
        """What was asked of each replica; where there is one, `ledger` alone."""

    @property
    def uri(self) -> str:
        """The folder's name, free of secrets; equal folders have equal names."""

    async def list(self) -> Sequence[Stat]:
        """Return every file below the folder, in any order; may be called again to see changes.

        Raises ModelNotFoundError when the folder does not exist or is empty.
        """

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        """Fill `views`, one after the other, with the bytes of the file from `start` on.

        Either all views are filled with bytes of the state that `stat.etag` names, or an error is raised and their
        content is undefined, but for the first `received_bytes` of a TransientOriginError that has that fact. The views
        are not kept afterwards. The same range may be read into the same views twice at once.
        """

    async def get(self, name: str, limit_nbytes: int) -> Small:
        """Return a small file whole, in whatever state it is.

        Raises ModelNotFoundError when it is not there, FormatError when it has more than `limit_nbytes` bytes.
        """

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        """Raise OriginChangedError unless the files are still in these states.

        For origins whose `read_into` cannot ask for one state; the others have nothing to do.
        """

    def drop(self) -> None:
        """Break off the reads under way, as if their connections broke, where this can be done; others go on."""

    async def close(self) -> None:
        """Release connections. May be called twice; no other call may follow."""


class WritableOrigin(Origin, Protocol):
    """An origin that can be written to, which registries need. Every method may be called again after a failure."""

    async def entries(self, prefix: str) -> Sequence[Entry]:
        """Return every file whose name begins with `prefix`, in any order; none is no error."""

    async def put(self, name: str, content: bytes | memoryview, only_if: str | None = None) -> None:
        """Write a file, which appears whole or not at all.

        Args:
            content: Its bytes; must not change before this returns.
            only_if: The state that the file must be in, as `get` names it; empty: it must not be there. None: whatever.

        Raises ConflictError when the file is in another state, on stores that can tell.
        """

    async def delete(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""

    async def has_conditions(self) -> bool:
        """Tell whether `put` keeps to `only_if` whoever else writes at the same moment; may ask by writing a file."""
