"""Own the care of a node's cache: what is in it, whether it is sound, what an operator keeps or drops.

Never loads a model; repairs go through the conductor's prefetch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec

from weightcache import cache
from weightcache.config import Settings, read_settings
from weightcache.digest import Digest
from weightcache.errors import DaemonError, InUseError, ModelNotFoundError, WeightcacheError, nearest, of_code
from weightcache.report import Report
from weightcache.session import Request
from weightcache.tiers.disk import DiskTier
from weightcache.tiers.host import host_tier
from weightcache.tiers.node import Line, introduction
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
    """List the models of the disk tier, of this process's host tier and of the daemon's, most recently used first."""
    found = _models_of_daemon() + [
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
    if read_settings().dir.exists():
        found += disk_models()
    return sorted(found, key=lambda model: -model.last_use_s)


def disk_models() -> list[CachedModel]:
    """List the models of the disk tier. Raises ModelNotFoundError where there is none."""
    found: list[CachedModel] = []
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
    return found


def _models_of_daemon() -> list[CachedModel]:
    try:
        state = status()
    except DaemonError:
        return []
    names = ("uri", "tier", "bytes", "total_bytes", "last_use_s", "pinned")
    return [
        CachedModel(endpoint="", in_use=each["n_leases"] > 0, **{name: each[name] for name in names})
        for each in state["models"]
        if each["tier"] == "host"
    ]


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


def disk_use() -> tuple[int, int]:
    """Return the bytes used of the disk tier, and its budget. Raises ModelNotFoundError where there is none."""
    with _disk() as disk:
        return disk.used_bytes(), disk.budget_bytes


def status() -> dict[str, Any]:
    """Ask the node daemon for its state; see `weightcache.status`."""
    settings = read_settings()
    with _line(settings) as line:
        state = line.ask("status", **introduction(settings))["state"]
    assert isinstance(state, dict)
    return state


def warm(request: Request, tier: str, until_s: float | None) -> Report:
    """Have the node daemon bring a model to a tier; see `weightcache.warm`."""
    settings = read_settings()
    progress = request.progress

    def on_wait(beat: Mapping[str, Any]) -> None:
        if progress is not None and (told := beat.get("progress")):
            progress(told[0], told[1])

    with _line(settings) as line:
        asked: dict[str, Any] = {"uri": _name(request.uri), "options": dict(request.storage_options), "tier": tier}
        until = {} if until_s is None else {"until_s": until_s}
        return Report.from_dict(line.ask("warm", on_wait, **asked, **until, **introduction(settings))["report"])


def has_daemon() -> bool:
    """Tell whether a node daemon answers."""
    try:
        with _line(read_settings()):
            return True
    except DaemonError:
        return False


@contextmanager
def _line(settings: Settings) -> Iterator[Line]:
    """Connect to the node daemon for the length of the block. Raises DaemonError."""
    if settings.socket_path is None:
        raise DaemonError('there is no daemon to ask: socket is "none"')
    line = Line(settings.socket_path)
    try:
        yield line
    except DaemonError as exc:
        raise of_code(str(exc.facts.get("code", "")), str(exc)) from exc
    finally:
        line.close()


def evict(uri: str) -> int:
    """Remove a model from host memory, the daemon's and this process's, and from disk; see `weightcache.evict`."""
    settings, freed = read_settings(), 0
    if has_daemon():
        with contextlib.suppress(ModelNotFoundError), _line(settings) as line:
            freed = int(line.ask("evict", uri=_name(uri), **introduction(settings))["freed_bytes"])
    return freed + evict_here(uri, or_none=freed > 0)


def evict_here(uri: str, *, or_none: bool = False) -> int:
    """Remove a model from this process's host tier and from the disk tier."""
    name = _name(uri)
    is_held = any(held.uri == name for held in host_tier.images())
    if (is_held or or_none) and not read_settings().dir.exists():
        return host_tier.drop(name)
    freed = 0
    with _disk() as disk:
        for record in _find(disk, uri, or_none=is_held or or_none):
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
