"""Own the contract of a tier: a place on this node that holds chunks by digest.

Never holds an implementation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from weightcache.digest import Digest


class Tier(Protocol):
    """Chunks by digest. All methods may be called from any thread and process at the same time."""

    def look(self, digests: Iterable[Digest]) -> set[Digest]:
        """Return those of the chunks that the tier holds now. A chunk may be gone when it is read: that is a miss."""

    def read_into(self, digest: Digest, target: memoryview) -> bool:
        """Fill `target`, exactly as long as the chunk, and check it.

        Returns False when the chunk is not there, or was rotten and has been set aside: a miss, fetch it again.
        `target` is then undefined.
        """

    def write(self, digest: Digest, checksum: int, content: memoryview) -> bool:
        """Store a chunk durably, or tell with False that there is no room for it.

        `checksum` is that of the bytes that were verified. Content that no longer has it (its owner wrote into it) is
        not stored: False. Writing what is there is no error.
        """

    def drop(self, digest: Digest) -> None:
        """Forget a chunk; readers that opened it finish undisturbed. A chunk that is not there is no error."""
