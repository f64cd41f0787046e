"""Own the published form of a revision: a manifest in which every chunk has its digest, and what is said beside it.

Never reads a file or a network. The revision's name is the digest of these bytes, so they are written in one way only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightcache.digest import Digest
from weightcache.errors import FormatError, IntegrityError, RegistryFormatError, WeightcacheError
from weightcache.manifest import (
    Chunk,
    Manifest,
    Role,
    Shard,
    check_path,
    check_paths,
    check_shard,
    read_count,
    read_text,
    tensor_from_json,
    tensor_to_json,
)
from weightcache.residency import Policy

FORMAT_VERSION = 1
# Kimi K2 (1 TB, 211,000 tensors) takes some 28 MB.
MAX_MANIFEST_NBYTES = 64 << 20
CODECS = ("raw",)
ARTEFACT_PREFIX = "artefact:"  # before the paths of a bundle's files, which are no files of the model
MAX_FACTS = 64


@dataclass(frozen=True, slots=True)
class Bundle:
    """What a compiler made of a model, for hardware and versions that `facts` name exactly."""

    name: str
    facts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Published:
    """A revision as it was published.

    Attributes:
        manifest: With the digest of every chunk; its `revision` is the digest of `raw`.
        raw: The bytes it was read from.
        base: The revision it was made from, `name@blake3:…` in the same registry or a whole URI; or empty.
        policy: Where its bytes may be.
        bundles: Artefacts; the files of each are the shards whose paths `path_in` spells.
    """

    manifest: Manifest
    raw: bytes
    base: str = ""
    policy: Policy = field(default_factory=Policy)
    bundles: tuple[Bundle, ...] = ()


def path_in(bundle: str, path: str) -> str:
    """Return what a bundle's file is called among the shards."""
    return f"{ARTEFACT_PREFIX}{bundle}/{path}"


def publish_form(
    shards: Iterable[Shard], base: str = "", policy: Policy | None = None, bundles: Sequence[Bundle] = ()
) -> Published:
    """Make a revision of described shards, whose chunks all have digests. Raises FormatError, UnsafePathError."""
    form = {
        "version": FORMAT_VERSION,
        "base": base,
        "policy": (policy or Policy()).to_form(),
        "bundles": [{"name": each.name, "facts": dict(each.facts)} for each in bundles],
        "shards": [_shard_to_json(shard) for shard in sorted(shards, key=lambda shard: shard.path)],
    }
    raw = json.dumps(form, separators=(",", ":"), sort_keys=True).encode()
    return read_form(raw, Digest.of(raw))


def read_form(raw: bytes, revision: Digest) -> Published:
    """Read a revision back.

    Raises:
        IntegrityError: These are not the bytes that have this digest.
        RegistryFormatError: A version or codec that this code does not know.
        FormatError, UnsafePathError: Anything else that is no valid revision.
    """
    if len(raw) > MAX_MANIFEST_NBYTES:
        raise FormatError(f"manifest {revision} has more than {MAX_MANIFEST_NBYTES} bytes")
    if Digest.of(raw) != revision:
        raise IntegrityError(
            f"manifest {revision} has digest {Digest.of(raw)}: it was damaged; run weightcache check on the registry",
            digest=str(revision),
        )
    try:
        form = json.loads(raw)
        if form["version"] != FORMAT_VERSION:
            raise RegistryFormatError(
                f"manifest {revision} has format version {form['version']!r:.40}, expected {FORMAT_VERSION}: update weightcache"
            )
        shards = tuple(_shard_from_json(each) for each in form["shards"])
        bundles = tuple(_bundle_from_json(each) for each in form["bundles"])
        base, policy = read_text(form["base"]), Policy.from_form(form["policy"], f"manifest {revision}")
    except WeightcacheError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as exc:
        raise FormatError(f"manifest {revision} is not valid: {exc!r:.300}") from exc
    check_paths(shard.path for shard in shards)
    if [shard.path for shard in shards] != sorted(shard.path for shard in shards):
        raise FormatError(f"manifest {revision} does not name its files in order")
    return Published(Manifest(shards, revision), raw, base, policy, bundles)


def _shard_to_json(shard: Shard) -> dict[str, Any]:
    if any(chunk.digest is None for chunk in shard.chunks):
        raise FormatError(f"{shard.path} cannot be published: some of its chunks have no digest", path=shard.path)
    return {
        "path": shard.path,
        "prefix": shard.prefix,
        "role": str(shard.role),
        "metadata": dict(shard.metadata or {}),
        "chunks": [
            [
                str(chunk.digest),
                chunk.nbytes,
                chunk.codec,
                chunk.nbytes if chunk.codec == "raw" else chunk.stored_bytes,
                str(chunk.base) if chunk.base else None,
            ]
            for chunk in shard.chunks
        ],
        "tensors": [tensor_to_json(entry) for entry in shard.tensors],
    }


def _shard_from_json(form: Any) -> Shard:
    chunks: list[Chunk] = []
    position = 0
    for digest, nbytes, codec, stored_bytes, base in form["chunks"]:
        if codec not in CODECS:
            raise RegistryFormatError(
                f"a chunk of {read_text(form['path'])[:200]!r} is stored as {codec!r:.40}, expected {', '.join(CODECS)}: "
                "update weightcache"
            )
        if base is not None or stored_bytes != nbytes:
            raise ValueError(f"a chunk stored as it is has {stored_bytes!r:.40} of {nbytes!r:.40} bytes, or a base")
        chunks.append(Chunk(position, read_count(nbytes), Digest.parse(read_text(digest)), codec, stored_bytes))
        position += nbytes
    role = Role(form["role"])
    path = check_path(read_text(form["path"]))
    if path.startswith(ARTEFACT_PREFIX) != (role is Role.ARTEFACT):
        raise ValueError(f"file {path[:200]!r} has role {role}")
    shard = Shard(
        path=path,
        nbytes=position,
        etag=Digest.of("\n".join(str(chunk.digest) for chunk in chunks).encode()).hex[:32],
        role=role,
        chunks=tuple(chunks),
        tensors=tuple(tensor_from_json(*tensor) for tensor in form["tensors"]),
        prefix=read_text(form["prefix"]),
        metadata={read_text(key): read_text(value) for key, value in form["metadata"].items()},
    )
    check_shard(shard)
    return shard


def _bundle_from_json(form: Any) -> Bundle:
    facts = {read_text(key): read_text(value) for key, value in form["facts"].items()}
    if len(facts) > MAX_FACTS:
        raise ValueError(f"{len(facts)} facts of one bundle, at most {MAX_FACTS}")
    return Bundle(check_path(read_text(form["name"])), facts)
