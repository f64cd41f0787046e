"""Own the care of a node's cache: what is in it, whether it is sound, what an operator keeps or drops.

Never loads a model; repairs go through the conductor's prefetch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from weightcache import cache
from weightcache.config import read_settings
from weightcache.digest import Digest
from weightcache.errors import InUseError, ModelNotFoundError, WeightcacheError, nearest
from weightcache.session import Request
from weightcache.tiers.disk import DiskTier
from weightcache.tiers.host import host_tier
from weightcache.tiers.records import ModelRecord
from weightcache.uri import parse_uri


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the cache: `bytes` of its `total_bytes` are here; `last_use_s` counts from the epoch."""

    uri: str
    endpoint: str
    tier: str
    bytes: int
    total_bytes: int
    last_use_s: float
    pinned: bool
    in_use: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Verification:
    """What a check of the cache found. `rotten` and `lost` are digests; `unrepaired` are those still missing."""

    n_chunks: int = 0
    n_bytes: int = 0
    deep: bool = False
    rotten: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    unrepaired: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong, or everything that was wrong is repaired."""
        return not self.unrepaired

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "sound": self.sound}


def models() -> list[CachedModel]:
    """List the models of the disk tier and of this process's host tier, most recently used first."""
    found = [
        CachedModel(
            uri=held.uri,
            endpoint="",
            tier="host",
            bytes=held.nbytes,
            total_bytes=held.nbytes,
            last_use_s=held.last_use_s,
            pinned=False,
            in_use=held.n_users > 0,
        )
        for held in host_tier.images()
    ]
    if not read_settings().dir.exists():
        return sorted(found, key=lambda model: -model.last_use_s)
    with _disk() as disk:
        leased = disk.leased()
        for record in disk.records.models():
            chunks = disk.chunks_of(record)
            here = disk.look(chunks)
            found.append(
                CachedModel(
                    uri=record.uri,
                    endpoint=record.endpoint,
                    tier="disk",
                    bytes=sum(chunks[digest] for digest in here),
                    total_bytes=disk.total_bytes(record),
                    last_use_s=record.last_use_s,
                    pinned=record.pinned,
                    in_use=record.key in leased,
                )
            )
    return sorted(found, key=lambda model: -model.last_use_s)


def verify(*, deep: bool, repair: bool, storage_options: Mapping[str, Any]) -> Verification:
    """Check every chunk that a model of the cache is said to have here; see `weightcache.verify`."""
    result = Verification(deep=deep)
    with _disk() as disk:
        owners = _find_bad(disk, result)
        if repair:
            _repair(disk, owners, result, storage_options)
        else:
            result.unrepaired = [str(digest) for digest in owners]
    return result


def _find_bad(disk: DiskTier, result: Verification) -> dict[Digest, ModelRecord]:
    """Enter into the result what is rotten or lost; return each such chunk with a model that has it."""
    seen: set[Digest] = set()
    bad: dict[Digest, ModelRecord] = {}
    for record in disk.records.models():
        for digest, nbytes in disk.chunks_of(record).items():
            if digest in seen:
                continue
            seen.add(digest)
            result.n_chunks += 1
            result.n_bytes += nbytes
            state = disk.inspect(digest, nbytes, deep=result.deep)
            if state != "sound":
                (result.rotten if state == "rotten" else result.lost).append(str(digest))
                bad[digest] = record
    return bad


def _repair(
    disk: DiskTier, bad: Mapping[Digest, ModelRecord], result: Verification, storage_options: Mapping[str, Any]
) -> None:
    for text in result.rotten:
        disk.quarantine(Digest.parse(text))
    for text in result.lost:
        disk.drop(Digest.parse(text))
    for record in {record.key: record for record in bad.values()}.values():
        try:
            cache.prefetch(_request_for(record, storage_options), "disk")
        except WeightcacheError as exc:
            result.problems.append(f"{record.uri}: {exc}")
    here = disk.look(bad)
    result.repaired = [str(digest) for digest in bad if digest in here]
    result.unrepaired = [str(digest) for digest in bad if digest not in here]


def evict(uri: str) -> int:
    """Remove a model from this process's host tier and from the disk tier; see `weightcache.evict`."""
    name = _name(uri)
    is_held = any(held.uri == name for held in host_tier.images())
    if is_held and not read_settings().dir.exists():
        return host_tier.drop(name)
    freed = 0
    with _disk() as disk:
        for record in _find(disk, uri, or_none=is_held):
            if record.pinned:
                raise InUseError(f"{record.uri} is pinned: unpin it first", uri=record.uri)
            if record.key in disk.leased():
                raise InUseError(
                    f"{record.uri} is held by a running process: end it, or close its model, first", uri=record.uri
                )
            freed += disk.evict([record.key])
    return freed + host_tier.drop(name)


def pin(uri: str, *, pinned: bool) -> None:
    """Set or end an operator's hold on a model."""
    with _disk() as disk:
        for record in _find(disk, uri):
            disk.records.pin(record.key, pinned=pinned)


@contextmanager
def _disk() -> Iterator[DiskTier]:
    """Open the disk tier for the length of the block. Asking makes no folder: ModelNotFoundError if there is none."""
    settings = read_settings()
    if not settings.dir.exists():
        raise ModelNotFoundError(f"no cache at {settings.dir}: nothing was loaded yet, or WEIGHTCACHE_DIR differs")
    disk = DiskTier(settings.dir, settings.disk_budget_bytes)
    try:
        yield disk
    finally:
        disk.close()


def _name(uri: str) -> str:
    return str(parse_uri(uri, fsspec.available_protocols(), str(Path.cwd()), read_settings().stores))


def _find(disk: DiskTier, uri: str, *, or_none: bool = False) -> list[ModelRecord]:
    name = _name(uri)
    records = list(disk.records.models())
    found = [record for record in records if record.uri == name]
    if not found and not or_none:
        raise ModelNotFoundError(
            f"{name} is not in the cache {disk.root}{nearest(name, [record.uri for record in records])}; weightcache ls "
            "shows what is",
            uri=name,
        )
    return found


def _request_for(record: ModelRecord, storage_options: Mapping[str, Any]) -> Request:
    options = dict(storage_options)
    if record.endpoint and "endpoint_url" not in options:
        options["endpoint_url"] = record.endpoint
    return Request(record.uri, options, "disk")
