"""Own the comparison of two revisions: which tensors, files and bytes differ. Pure.

Never reads a chunk: where manifests alone cannot tell, because a small tensor is packed with others into a chunk that
changed, it says what must be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightcache.digest import Digest
from weightcache.header import TensorEntry
from weightcache.layout import want
from weightcache.manifest import Chunk, Manifest, Role


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `[start, stop)` of a chunk."""

    digest: Digest
    start: int
    stop: int


@dataclass(slots=True)
class Difference:
    """What another revision has that one has not.

    Attributes:
        added, removed, changed: Names of tensors, with the bytes of each in the revision that has it (the other, if both).
        n_same: Tensors that are equal, dtype and shape included.
        files_added, files_removed, files_changed: Paths of other files.
        shared_bytes: Of the other's chunks, those that one has too.
        new_bytes: Of the other's chunks, those that it has not: what must be fetched.
        unsure: Tensors whose pieces must be read to tell; see `settle`.
    """

    added: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    n_same: int = 0
    files_added: list[str] = field(default_factory=list)
    files_removed: list[str] = field(default_factory=list)
    files_changed: list[str] = field(default_factory=list)
    shared_bytes: int = 0
    new_bytes: int = 0
    unsure: dict[str, tuple[tuple[Piece, ...], tuple[Piece, ...]]] = field(default_factory=dict)

    def settle(self, name: str, *, is_same: bool) -> None:
        """Hear whether the pieces of a tensor that was unsure have the same bytes."""
        pieces = self.unsure.pop(name)[1]
        if is_same:
            self.n_same += 1
        else:
            self.changed[name] = sum(piece.stop - piece.start for piece in pieces)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "unsure"}


def compare(one: Manifest, other: Manifest) -> Difference:
    """Compare two revisions whose chunks have digests."""
    found = Difference()
    mine, theirs = _tensors(one), _tensors(other)
    sizes = [_sizes(each) for each in (one, other)]
    found.removed = {name: entry.nbytes for name, (entry, _) in mine.items() if name not in theirs}
    for name, (entry, pieces) in theirs.items():
        if name not in mine:
            found.added[name] = entry.nbytes
            continue
        before, pieces_before = mine[name]
        if (before.dtype, before.shape) != (entry.dtype, entry.shape):
            found.changed[name] = entry.nbytes
        elif pieces_before == pieces:
            found.n_same += 1
        elif all(_is_whole(each, sizes[0]) for each in pieces_before) and all(
            _is_whole(each, sizes[1]) for each in pieces
        ):
            found.changed[name] = entry.nbytes
        else:
            found.unsure[name] = (pieces_before, pieces)
    files = [
        {shard.path: shard.etag for shard in each.shards if shard.role is not Role.WEIGHTS} for each in (one, other)
    ]
    found.files_added = sorted(files[1].keys() - files[0].keys())
    found.files_removed = sorted(files[0].keys() - files[1].keys())
    found.files_changed = sorted(path for path in files[0].keys() & files[1].keys() if files[0][path] != files[1][path])
    found.shared_bytes = sum(nbytes for digest, nbytes in sizes[1].items() if digest in sizes[0])
    found.new_bytes = sum(sizes[1].values()) - found.shared_bytes
    return found


def _tensors(manifest: Manifest) -> dict[str, tuple[TensorEntry, tuple[Piece, ...]]]:
    """Return each tensor, and where its bytes lie in chunks, in order."""
    return {
        tensor.name: (
            tensor.entry,
            tuple(_piece(manifest.shards[shard].chunks[index], tensor.entry) for shard, index in tensor.chunks),
        )
        for tensor in want(manifest)
    }


def _piece(chunk: Chunk, entry: TensorEntry) -> Piece:
    assert chunk.digest is not None
    return Piece(chunk.digest, max(entry.start, chunk.start) - chunk.start, min(entry.stop, chunk.stop) - chunk.start)


def _is_whole(piece: Piece, sizes: Mapping[Digest, int]) -> bool:
    return piece.start == 0 and sizes[piece.digest] == piece.stop


def _sizes(manifest: Manifest) -> Mapping[Digest, int]:
    return {
        chunk.digest: chunk.nbytes for shard in manifest.shards for chunk in shard.chunks if chunk.digest is not None
    }
