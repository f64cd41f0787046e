"""Own the manifest: the frozen list of a revision's files, tensors and chunks, its JSON form and its validation.

Never reads a file or a network; a value that exists is a valid one.

A *plain* manifest is built from a folder of safetensors: its chunks carry no digest until their bytes have arrived
once. A *published* one carries every digest from the start.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any

from weightcache.digest import Digest
from weightcache.dtypes import tensor_nbytes
from weightcache.errors import CacheFormatError, FormatError, UnsafePathError
from weightcache.header import MAX_RANK, MAX_TENSORS, TensorEntry

CHUNK_LIMIT_NBYTES = 16 << 20
FORMAT_VERSION = 1
MAX_PATH_NBYTES = 1024
MAX_ELEMENTS = 1 << 57  # torch keeps sizes and strides in int64, safetensors counts a tensor's bits in uint64
RESERVED_PREFIX = ".weightcache-"


class Role(StrEnum):
    """What a shard is to a load."""

    WEIGHTS = "weights"  # its tensors are part of the model
    FILE = "file"  # carried along: configuration, tokenizer, code as data
    FOREIGN = "foreign"  # weights in another format or a duplicate; carried by pull alone
    ARTEFACT = "artefact"  # published beside the model, and no file of it: what a compiler made, for some hardware


@dataclass(frozen=True, slots=True)
class Chunk:
    """Content-addressed unit of storage and transfer: bytes `[start, start + nbytes)` of its shard's file.

    `stored_bytes`, `codec` and `base` say how the chunk lies in a registry; `raw` is the bytes themselves.
    """

    start: int
    nbytes: int
    digest: Digest | None = None
    codec: str = "raw"
    stored_bytes: int = -1
    base: Digest | None = None

    @property
    def stop(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a checkpoint.

    Attributes:
        path: Name relative to the model's root, with `/`.
        nbytes: Size of the file.
        etag: What the origin calls this state of the file; any change of the bytes changes it.
        role: What it is to a load.
        chunks: Ordered, adjacent, covering `[0, nbytes)`.
        tensors: Ordered by start; names as in the file.
        prefix: Put before each tensor's name: the component's folder and `/` in a diffusers layout, else empty.
        metadata: The file's own string map.
    """

    path: str
    nbytes: int
    etag: str
    role: Role
    chunks: tuple[Chunk, ...]
    tensors: tuple[TensorEntry, ...] = ()
    prefix: str = ""
    metadata: Mapping[str, str] | None = None

    def with_digests(self, digests: Mapping[int, Digest]) -> Shard:
        """Return this shard with the digests of the chunks at these indexes filled in."""
        chunks = tuple(
            replace(chunk, digest=digests[index]) if index in digests else chunk
            for index, chunk in enumerate(self.chunks)
        )
        return replace(self, chunks=chunks)


@dataclass(frozen=True, slots=True)
class Manifest:
    """The frozen list of a revision's shards.

    `revision` names the state: for a published manifest the digest of its JSON, for a plain one the digest of every
    file's name, size and ETag, so that it does not move when chunk digests are learned.
    """

    shards: tuple[Shard, ...]
    revision: Digest

    @classmethod
    def plain(cls, shards: Iterable[Shard]) -> Manifest:
        """Build the manifest of a folder as it lies. Raises UnsafePathError for names that cannot lie in one folder."""
        ordered = tuple(sorted(shards, key=lambda shard: shard.path))
        check_paths(shard.path for shard in ordered)
        identity = json.dumps([[shard.path, shard.nbytes, shard.etag] for shard in ordered], separators=(",", ":"))
        return cls(ordered, Digest.of(identity.encode()))

    @property
    def weights(self) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.shards if shard.role is Role.WEIGHTS)

    @property
    def tensor_nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for shard in self.weights for entry in shard.tensors)

    def tensors(self) -> Iterator[tuple[str, Shard, TensorEntry]]:
        """Yield (model-wide name, shard, entry) in file order."""
        for shard in self.weights:
            for entry in shard.tensors:
                yield shard.prefix + entry.name, shard, entry


def check_path(path: str) -> str:
    """Return `path` if it is a relative name that stays in its folder, else raise UnsafePathError."""
    parts = path.split("/")
    if (
        not path
        or len(path.encode(errors="surrogatepass")) > MAX_PATH_NBYTES
        or any(part in ("", ".", "..") or len(part.encode(errors="surrogatepass")) > 255 for part in parts)
        or any(ord(char) < 32 or char == "\x7f" or "\ud800" <= char <= "\udfff" for char in path)
        or "\\" in path
        or any(part.startswith(RESERVED_PREFIX) for part in parts)
    ):
        raise UnsafePathError(
            f"unsafe file name {path[:200]!r}: expected a relative name without empty, '.' or '..' parts, backslashes, "
            f"control characters or the prefix {RESERVED_PREFIX!r}; rename the file at the origin",
            path=path,
        )
    return path


def check_paths(paths: Iterable[str]) -> None:
    """Raise UnsafePathError unless all names are safe and can lie in one folder side by side."""
    seen: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path in paths:
        normal = unicodedata.normalize("NFC", check_path(path))
        parents = normal.split("/")[:-1]
        ancestors = ["/".join(parents[: depth + 1]) for depth in range(len(parents))]
        clash = (
            seen.get(normal) or folders.get(normal) or next((seen[each] for each in ancestors if each in seen), None)
        )
        if clash is not None:
            raise UnsafePathError(f"file names collide: {clash!r} and {path!r}; rename one at the origin", path=path)
        seen[normal] = path
        folders.update((each, path) for each in ancestors)


def shard_to_json(shard: Shard) -> dict[str, Any]:
    """Return the JSON form of a shard, without its path and prefix, which belong to the model it is part of."""
    return {
        "version": FORMAT_VERSION,
        "nbytes": shard.nbytes,
        "etag": shard.etag,
        "role": str(shard.role),
        "metadata": dict(shard.metadata or {}),
        "chunks": [[chunk.start, chunk.nbytes, str(chunk.digest) if chunk.digest else None] for chunk in shard.chunks],
        "tensors": [tensor_to_json(entry) for entry in shard.tensors],
    }


def shard_from_json(form: Any, *, path: str, prefix: str = "") -> Shard:
    """Read a shard's JSON form back.

    Raises:
        CacheFormatError: A version this code does not know.
        FormatError: Anything else that is not a valid shard.
    """
    try:
        if form["version"] != FORMAT_VERSION:
            raise CacheFormatError(
                f"the record of {path} has format version {form['version']!r}, expected {FORMAT_VERSION}: it was "
                "written by another version of weightcache; update, or use another cache folder",
                path=path,
            )
        shard = Shard(
            path=path,
            nbytes=read_count(form["nbytes"]),
            etag=read_text(form["etag"]),
            role=Role(form["role"]),
            chunks=tuple(_chunk_from_json(*chunk) for chunk in form["chunks"]),
            tensors=tuple(tensor_from_json(*tensor) for tensor in form["tensors"]),
            prefix=prefix,
            metadata={read_text(key): read_text(value) for key, value in form["metadata"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise FormatError(f"the record of {path} is not valid: {exc!r:.300}", path=path) from exc
    check_shard(shard)
    return shard


def _chunk_from_json(start: Any, nbytes: Any, digest: Any) -> Chunk:
    return Chunk(read_count(start), read_count(nbytes), None if digest is None else Digest.parse(digest))


def tensor_to_json(entry: TensorEntry) -> list[Any]:
    return [entry.name, entry.dtype, list(entry.shape), entry.start, entry.stop]


def tensor_from_json(name: Any, dtype: Any, shape: Any, start: Any, stop: Any) -> TensorEntry:
    if {type(start), type(stop), *map(type, shape)} != {int} or type(dtype) is not str:
        raise ValueError(f"tensor {read_text(name)[:80]!r}: {[dtype, shape, start, stop]!r:.160} of wrong types")
    entry = TensorEntry(read_text(name), dtype, tuple(shape), start, stop)
    if entry.nbytes != _nbytes_of(dtype, entry.shape):
        raise ValueError(f"tensor {name[:80]!r} at [{start}, {stop}) has not the bytes of {dtype} of shape {shape}")
    return entry


@lru_cache(maxsize=1024)  # a model repeats a few dozen
def _nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    # An empty tensor has strides too: its other dimensions must multiply to something that can be counted.
    if len(shape) > MAX_RANK or min(shape, default=0) < 0 or math.prod(size or 1 for size in shape) >= MAX_ELEMENTS:
        raise ValueError(f"a shape of rank {len(shape)} that cannot be counted")
    return tensor_nbytes(dtype, shape)


def read_count(value: Any) -> int:
    """Return a size or offset. Raises ValueError for what is none."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r:.40} where a size or offset is expected")
    return value


def read_text(value: Any) -> str:
    """Return a text. Raises ValueError for what is none."""
    if type(value) is not str:
        raise ValueError(f"{value!r:.40} where text is expected")
    return value


def check_shard(shard: Shard) -> None:
    """Raise FormatError unless the chunks cover the file and the tensors lie in it."""
    position = 0
    for chunk in shard.chunks:
        if chunk.start != position or not 0 < chunk.nbytes <= CHUNK_LIMIT_NBYTES:
            raise FormatError(
                f"chunk [{chunk.start}, {chunk.stop}) of {shard.path} is misplaced: expected to start at {position} "
                f"and hold at most {CHUNK_LIMIT_NBYTES} bytes",
                path=shard.path,
            )
        position = chunk.stop
    if position != shard.nbytes:
        raise FormatError(f"the chunks of {shard.path} end at {position}, expected {shard.nbytes}", path=shard.path)
    if len(shard.tensors) > MAX_TENSORS:
        raise FormatError(f"{shard.path} has {len(shard.tensors)} tensors, at most {MAX_TENSORS}", path=shard.path)
    position = 0
    for entry in shard.tensors:
        if not position <= entry.start <= entry.stop <= shard.nbytes:
            raise FormatError(
                f"tensor {entry.name[:80]!r} of {shard.path} lies at [{entry.start}, {entry.stop}), expected between "
                f"{position}, where the one before it ends, and the file's {shard.nbytes} bytes",
                path=shard.path,
            )
        position = entry.stop
