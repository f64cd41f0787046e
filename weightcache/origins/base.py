"""Own the contract of an origin: a folder of immutable-while-read files behind a URI.

Never holds an implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from weightcache.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Stat:
    """One file at an origin: name relative to the folder, size in bytes, and the name of this state of it."""

    path: str
    nbytes: int
    etag: str


class Origin(Protocol):
    """A folder at an origin. All methods run on the loop thread and may run concurrently.

    Errors are translated at the edge: ModelNotFoundError, AccessDeniedError, OriginChangedError and OriginError are
    final; TransientOriginError is worth another attempt. A cancelled call leaves nothing behind.
    """

    @property
    def ledger(self) -> Ledger:
        """What was asked so far; counted by the origin itself, beside what its wrappers count."""

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

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        """Raise OriginChangedError unless the files are still in these states.

        For origins whose `read_into` cannot ask for one state; the others have nothing to do.
        """

    async def close(self) -> None:
        """Release connections. May be called twice; no other call may follow."""
