"""Own the two hashes: Digest (BLAKE3, identity of bytes from anywhere) and checksum (XXH3, rot on this node).

Never lets a checksum stand for identity: XXH3 preimages are cheap to make.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import blake3
import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer

ALGORITHM = "blake3"
_TEXT = re.compile(r"blake3:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """Algorithm and hash of some bytes, written `blake3:<64 hex digits>`."""

    hex: str

    @classmethod
    def of(cls, content: Buffer) -> Digest:
        """Compute the digest of `content`; the GIL is released while hashing."""
        return cls(blake3.blake3(content).hexdigest())

    @classmethod
    def parse(cls, text: str) -> Digest:
        """Read the written form. Raises ValueError if it is not one."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"not a digest: {text[:80]!r}, expected blake3: and 64 hex digits")
        return cls(match[1])

    def __str__(self) -> str:
        return f"{ALGORITHM}:{self.hex}"


def checksum(content: Buffer) -> int:
    """Compute XXH3-64 of bytes this node stored itself; the GIL is released while hashing."""
    return xxhash.xxh3_64_intdigest(content)
