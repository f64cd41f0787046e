"""Own one request being served: the origin and tiers it needs opened, the model described, the moves decided.

Never moves a weight byte.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import logging
import math
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec

from weightcache import spending
from weightcache.access import Access
from weightcache.behind import Behind
from weightcache.checkpoint import describe
from weightcache.config import Settings, read_settings
from weightcache.digest import Digest
from weightcache.errors import (
    CapacityError,
    ConfigError,
    DaemonError,
    ModelNotFoundError,
    OfflineError,
    OriginUnreachableError,
    UnsafePathError,
    UriError,
    WeightcacheError,
    nearest,
)
from weightcache.files import file_system_of, is_network
from weightcache.layout import ChunkKey, Order, Wanted, want
from weightcache.ledger import Ledger, place_of
from weightcache.locks import Flight
from weightcache.manifest import Manifest, Shard
from weightcache.measurements import Measurements
from weightcache.opening import WEB, make_origin, make_replicas
from weightcache.origins.base import Origin, Stat
from weightcache.origins.chunked import ChunkedOrigin
from weightcache.origins.local import LocalOrigin
from weightcache.origins.replicas import Replicas
from weightcache.origins.resilient import Resilient
from weightcache.planning import Plan, make_plan
from weightcache.policy import Verb
from weightcache.published import Bundle, Published, read_form
from weightcache.registry import Registry
from weightcache.report import Report
from weightcache.residency import Policy
from weightcache.runtime import Runtime, runtime
from weightcache.tiers.disk import DiskTier
from weightcache.tiers.host import keep_freed
from weightcache.tiers.node import NodeImage, attach
from weightcache.tiers.records import ModelRecord, model_key, shard_key
from weightcache.transfer import Tally
from weightcache.uri import Name, latest_of, parse_uri

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
Patterns = str | Sequence[str] | None
N_SPANS_TOLD = 300  # to the daemon, of a load
CACHE_MODES = ("auto", "disk", "none")
MEASURED_FROM_NBYTES = 64 << 20  # what comes in less than a second says little of a rate


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks for; see `weightcache.load_model` for each field. Not public are the last four.

    Attributes:
        names: Exact names of tensors, in place of patterns.
        verb: What it is for, to residency policies.
        takes_images: Whether images in host memory may be used that others fill: the node daemon's, or another thread's.
        needs_weights: Whether a model without safetensors is refused; its files can be carried as data.
    """

    uri: str
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    cache: str = "auto"
    offline: bool | None = None
    include: Patterns = None
    exclude: Patterns = None
    order: Order = ()
    ahead_share: float = 0.0
    timeout_s: float | None = None
    progress: Progress | None = None
    names: frozenset[str] | None = None
    verb: Verb = Verb.READ
    takes_images: bool = True
    needs_weights: bool = True


class _Memory:
    """Remembers shards in the disk tier; new descriptions are collected, to be written behind."""

    def __init__(self, disk: DiskTier | None, url: str, endpoint: str) -> None:
        self._disk = disk
        self._base = f"{endpoint} {url}" if endpoint else url
        self.fresh: list[tuple[str, Shard]] = []

    def key(self, path: str, nbytes: int, etag: str) -> str:
        return shard_key(f"{self._base}/{path}", nbytes, etag)

    def recall(self, stat: Stat, prefix: str) -> Shard | None:
        if self._disk is None or not stat.etag:
            return None  # a file whose states cannot be told apart is described anew each time
        return self._disk.recall_shard(self.key(stat.path, stat.nbytes, stat.etag), path=stat.path, prefix=prefix)

    def remember(self, stat: Stat, shard: Shard) -> None:
        self.fresh.append((self.key(stat.path, stat.nbytes, stat.etag), shard))


@dataclass
class Session:
    """One request being served: everything that was opened for it."""

    request: Request
    settings: Settings
    report: Report
    threads: Runtime
    name: Name
    endpoint: str
    origin: Resilient | None
    local: Path | None
    disk: DiskTier | None
    deadline: float | None = None  # loop time
    manifest: Manifest = field(default_factory=lambda: Manifest.plain(()))
    shard_keys: list[str] = field(default_factory=list)
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    behind: Behind | None = None
    flight: Flight | None = None
    tally: Tally = field(default_factory=Tally)
    policy: Policy = field(default_factory=Policy)  # the model's own, where it is published
    bundles: tuple[Bundle, ...] = ()
    base: str = ""  # what the model was made from, as it was published
    attached: NodeImage | None = None  # the node daemon's, which has it all
    access: Access = field(init=False)

    def __post_init__(self) -> None:
        self.access = Access(self.settings, self.name, self.request.verb)
        self.tally.spans = self.report.spans

    @property
    def in_place(self) -> LocalOrigin | None:
        """The folder of this machine whose files are read in place, if they are."""
        inner = self.origin.inner if self.origin is not None and self.disk is None else None
        return inner if isinstance(inner, LocalOrigin) else None

    @property
    def key(self) -> str:
        return model_key(str(self.name), self.endpoint)

    def open_origin(self) -> None:
        """Open the origin that the name names, and begin its ledger."""
        name, options = self.name, self.request.storage_options
        root: Origin
        if name.store:
            root = make_replicas(name, self.settings, options, self.threads, self.access)
        else:
            self._check_access()
            root = make_origin(name, self.settings, options, self.threads, self.access)
            if name.scheme != "file":
                root.ledger.replica = place_of(name.root, self.endpoint)
        self.origin = Resilient(
            ChunkedOrigin(root) if name.model else root,
            attempts=self.settings.attempts,
            deadline=self.deadline,
            most=self.settings.connections,
            hedges=name.scheme in (*WEB, "s3", "wc"),
        )

    def _check_access(self) -> None:
        """Raise ResidencyError unless bytes may come from the one place that the name names."""
        site = self.access.site_of(self.name, self.endpoint)
        self.access.check_read(Verb.READ, site, place_of(self.name.root, self.endpoint))

    def check_access_again(self) -> None:
        """Raise ResidencyError unless they still may, now that more policies are known; and be kept here."""
        if (replicas := self.replicas) is not None:
            replicas.restrict()
        elif self.origin is not None:
            self._check_access()
        if self.disk is not None:
            self.access.check_keep()

    @property
    def replicas(self) -> Replicas | None:
        """The replicas of a store, where one is asked."""
        inner = self.origin.inner if self.origin is not None else None
        return inner.root if isinstance(inner, ChunkedOrigin) and isinstance(inner.root, Replicas) else None

    async def close_origin(self) -> None:
        """Close the origin, and write down what was asked of it and what was ruled. May be called twice."""
        replicas = self.replicas
        if replicas is not None:
            self._report(replicas)
        origin, self.origin = self.origin, None
        try:
            if origin is not None:
                await origin.close()
        finally:
            if origin is not None:
                self._enter([ledger for ledger in origin.ledgers if ledger.n_requests or len(origin.ledgers) == 1])
            self.access.close()

    def _report(self, replicas: Replicas) -> None:
        if replicas.reason:
            refused = [f"{ruling.edge.source_name} is forbidden: {ruling.rule}" for ruling in self.access.refusals]
            self.report.choices["replica"] = "; ".join([replicas.reason, *refused])
        for name, paths in replicas.damage.items():
            fall_back(
                self.report,
                f"replica {name} of {replicas.uri} lacks {len(paths)} files or holds them damaged, first {paths[0]}: they were "
                "read elsewhere; run weightcache check --repair",
            )

    def _enter(self, ledgers: Sequence[Ledger]) -> None:
        """Enter what the origin was asked for into the report, the metrics and, behind, the cache folder's ledger."""
        self.report.n_requests += sum(ledger.n_requests for ledger in ledgers)
        self.report.n_retries += sum(ledger.n_retries for ledger in ledgers)
        if self.name.scheme == "file":
            return  # nothing was dialled
        saved_bytes = self.tally.disk_bytes + self.tally.host_bytes
        entries = spending.bill(str(self.name), ledgers, saved_bytes, self.access.price_of, time.time())
        spending.enter(entries, self.report)
        if entries and self.disk is not None and self.behind is not None:
            self.behind.submit(spending.append, self.disk.root, entries)
            self._measure(self.disk.root, self.behind)

    def _measure(self, root: Path, behind: Behind) -> None:
        """Remember, behind, how fast the model came from its place: that is what losing it costs."""
        nbytes, move_s = self.tally.origin_bytes, self.report.seconds.get("move", 0.0)
        if nbytes >= MEASURED_FROM_NBYTES and move_s and self.request.verb is not Verb.PREFETCH:  # they wait for others
            behind.submit(_remember_rate, root, place_of(str(self.name), self.endpoint), nbytes / move_s)

    def leave_disk(self, why: str) -> None:
        """Go on without the disk tier."""
        fall_back(self.report, why)
        self.settle()
        self.disk = None

    def settle(self) -> Callable[[float | None], bool]:
        """Ask nothing more of the disk tier: when all is written behind, what was learned is entered and it is closed.

        Returns what waits for that and then knows the last of the report. May be called twice.
        """
        behind, self.behind = self.behind, None
        if behind is None or self.disk is None:
            return lambda timeout_s: True
        shards = tuple(zip(self.shard_keys, self.manifest.shards, strict=True))
        behind.seal(functools.partial(_finish, self.disk, self.flight, self.tally, shards))
        report, tally, settled = self.report, self.tally, behind.settled

        def wait(timeout_s: float | None) -> bool:
            done = settled.wait(timeout_s)
            report.stored_bytes = tally.stored_bytes
            failure = f"the disk tier failed: {tally.disk_failure}"
            if tally.disk_failure and failure not in report.warnings:
                report.warnings.append(failure)
            return done

        return wait

    def tell(self) -> None:
        """Tell the node daemon whose image was used how that went."""
        if self.attached is not None:
            self.attached.tell(self.report.as_dict(n_spans=N_SPANS_TOLD))

    def release(self) -> None:
        """Let go of what is held for this model: its lease, and files outside the cache. May be called twice."""
        self.held.close()


def _remember_rate(root: Path, place: str, bytes_per_s: float) -> None:
    measurements = Measurements(root)
    measurements.of(place).add_rate(bytes_per_s)
    measurements.save()


def _finish(disk: DiskTier, flight: Flight | None, tally: Tally, shards: Sequence[tuple[str, Shard]]) -> None:
    """Put what was learned into the records, and let go of the disk tier."""
    try:
        if tally.stored_bytes and not tally.disk_failure:
            for key, shard in shards:
                disk.consolidate(key, shard)
    except OSError as exc:
        log.warning("what was learned is not remembered in %s: %s", disk.root, exc)
    finally:
        if flight is not None:
            flight.close()
        disk.close()


def open_session(request: Request, report: Report, *, may_attach: bool = False) -> Session:
    """Open what a request needs: origin and disk tier, or, where it may attach and a node daemon serves it, nothing."""
    settings = read_settings()
    if request.timeout_s is not None:
        if not 0 < request.timeout_s < math.inf:
            raise ConfigError(f"timeout_s={request.timeout_s!r}: expected a positive number of seconds")
        settings = replace(settings, timeout_s=request.timeout_s)
    if request.cache not in CACHE_MODES:
        raise ConfigError(
            f"cache={request.cache!r}: expected one of {', '.join(CACHE_MODES)}{nearest(request.cache, CACHE_MODES)}"
        )
    name = parse_uri(request.uri, fsspec.available_protocols(), str(Path.cwd()), settings.stores)
    if name.scheme == "wc" and not name.model:
        raise UriError(f"{name} names a store: expected one of its models, as in {name}/llama-3-8b@v1", uri=str(name))
    offline = settings.offline if request.offline is None else request.offline
    threads = runtime(settings.threads)
    until_s = time.monotonic() + (settings.timeout_s or math.inf)
    attached = (
        _attach(request, settings, name, offline, until_s, report) if may_attach and request.takes_images else None
    )
    disk = _open_disk(request, settings, name, report) if attached is None else None
    keep_freed(settings.host_budget_bytes)
    session = Session(
        request=request,
        settings=settings,
        report=report,
        threads=threads,
        name=name,
        endpoint="",
        origin=None,
        local=Path(name.root) if name.scheme == "file" and not name.model else None,
        disk=disk,
        deadline=threads.loop.time() + until_s - time.monotonic() if settings.timeout_s else None,
        behind=Behind(threads.writers) if disk is not None else None,
        attached=attached,
    )
    if attached is not None:
        session.held.callback(attached.close)
        return session
    try:
        if name.scheme == "s3":
            with report.stage("import"):
                from weightcache.origins.s3 import endpoint_of
            session.endpoint = endpoint_of(request.storage_options)
        elif name.scheme == "hf":
            session.endpoint = str(request.storage_options.get("endpoint") or "")
        if disk is not None:
            session.access.check_keep()
        if not offline or name.scheme == "file":
            session.open_origin()
        elif disk is None:
            raise OfflineError(
                f"{name} cannot be loaded offline without the disk tier: pass cache='auto'", uri=str(name)
            )
        else:
            report.choices["origin"] = "none: offline was asked for"
    except BaseException:
        session.settle()
        session.access.close()
        raise
    return session


def _attach(
    request: Request, settings: Settings, name: Name, offline: bool, until_s: float, report: Report
) -> NodeImage | None:
    """Attach to the image that the node daemon has of a model, or begins to fill; None where it does not."""
    path = settings.socket_path
    if path is None or request.cache != "auto":
        return None
    with contextlib.suppress(PermissionError):  # it lies in another user's folder: who tries to connect hears so
        if not path.exists():
            return None
    # A part of a model, and what is read where it lies, are brought here faster than the whole is to the daemon.
    is_part = bool(request.include or request.exclude or request.names is not None)
    try:
        image = attach(
            path,
            settings,
            str(name),
            request.storage_options,
            offline=offline,
            local=Path(name.root) if name.scheme == "file" else None,
            resident_only=is_part or name.scheme == "file",
            until_s=until_s,
        )
    except DaemonError as exc:
        report.choices["daemon"] = f"not used: {exc}"
        return None
    filling = "" if image.is_full else ", while it was being filled"
    report.choices["daemon"] = f"attached to an image of the daemon {image.pid}{filling}"
    return image


def _open_disk(request: Request, settings: Settings, name: Name, report: Report) -> DiskTier | None:
    mode, reason = request.cache, "asked for"
    if mode == "auto":
        mode, reason = "disk", "the origin is not this machine"
        if name.scheme == "file":
            file_system = file_system_of(Path(name.root))
            mode = "disk" if is_network(file_system) else "none"
            reason = f"a folder on {file_system} is " + ("on a network" if mode == "disk" else "read in place")
    report.choices["cache"] = f"{mode}: {reason}"
    if mode == "none":
        return None
    try:
        return DiskTier(settings.dir, settings.disk_budget_bytes)
    except CapacityError as exc:
        if request.cache == "disk":
            raise
        fall_back(report, f"no disk tier: {exc}")
        report.choices["cache"] = "none: the cache folder cannot be used"
        return None


async def describe_model(session: Session) -> None:
    """Learn what the model is: from the node daemon, from the origin, or offline from what is remembered."""
    if session.attached is not None:
        session.manifest = session.attached.manifest
        session.report.revision = session.attached.revision
        return
    memory = _Memory(session.disk, session.name.root, session.endpoint)
    if session.origin is not None:
        try:
            if not session.name.model:
                session.manifest = await _describe_plain(session, memory)
            if session.name.model:  # it may have turned out to be one
                memory = _Memory(session.disk, "", "")
                session.manifest = await _describe_published(session, memory)
        except OriginUnreachableError as exc:
            # The origin is down, not against us: what this node knows of the model serves until it is back.
            try:
                session.manifest = _remembered(session)
            except OfflineError:
                raise exc from None
            fall_back(session.report, f"the origin cannot be reached, loading from this node: {exc}")
        session.report.metadata_bytes += session.origin.used_bytes
    else:
        session.manifest = _remembered(session)
    if session.name.model:
        memory = memory if memory.fresh else _Memory(session.disk, "", "")  # a chunk's digest says it all
    shards = session.manifest.shards
    session.shard_keys = [memory.key(shard.path, shard.nbytes, shard.etag) for shard in shards]
    session.report.revision = str(session.manifest.revision)
    if session.disk is None:
        return
    try:
        session.held.callback(session.disk.lease(session.key).release)
    except OSError as exc:
        session.leave_disk(f"no disk tier: {session.disk.root} cannot be written ({exc.strerror or exc})")
        return
    record = ModelRecord(
        session.key,
        str(session.name),
        session.endpoint,
        tuple((key, shard.path, shard.prefix) for key, shard in zip(session.shard_keys, shards, strict=True)),
    )
    assert session.behind is not None
    session.behind.submit(_remember, session.disk, memory.fresh, record)


async def _describe_plain(session: Session, memory: _Memory) -> Manifest:
    """Describe a folder; if there is none, it may be the latest of a model of a registry."""
    assert session.origin is not None
    try:
        return await describe(session.origin, memory, needs_weights=session.request.needs_weights)
    except (ModelNotFoundError, UnsafePathError) as exc:
        if await Registry(session.origin).is_there():
            raise UriError(
                f"{session.name} is a registry: expected one of its models, as in {session.name}/llama-3-8b@v1; "
                "weightcache tags shows them",
                uri=str(session.name),
            ) from exc
        published = latest_of(session.name)
        if published is None or isinstance(exc, UnsafePathError):
            raise
        plain = session.name
        await session.close_origin()
        session.name, session.local = published, None
        session.open_origin()
        try:
            await Registry(session.origin).about()
        except WeightcacheError:
            session.name = plain
            raise exc from None
        return Manifest.plain(())


async def _describe_published(session: Session, memory: _Memory) -> Manifest:
    """Learn what a revision is, from the registry or, where it is remembered, by its digest alone."""
    assert session.origin is not None
    registry, access, model = Registry(session.origin), session.access, session.name.model
    try:
        about = await registry.about()
    except ModelNotFoundError as exc:
        if "@" not in session.request.uri or session.name.store:
            raise
        hint = "a plain folder whose name has an @ is written with a slash behind it"
        raise ModelNotFoundError(f"{exc}; {hint}", **exc.facts) from exc
    access.add(f"registry {registry.uri}", about.policy)
    session.check_access_again()
    revision, tag = await registry.find(model, session.name.revision)
    remembered = session.disk.records.recall_published(session.key) if session.disk is not None else None
    raw, signatures = remembered or (b"", [])
    if access.key_ids:
        signatures = await registry.signatures(model, revision, access.key_ids)
        access.check_signed(model, tag.name if tag else None, revision, signatures)
    if raw and Digest.of(raw) == revision:
        published = read_form(raw, revision)
    else:
        published = await registry.revision(model, revision)
        for shard in published.manifest.shards:
            memory.remember(Stat(shard.path, shard.nbytes, shard.etag), shard)
    _accept(session, published)
    if session.disk is not None and session.behind is not None and remembered != (published.raw, signatures):
        session.behind.submit(_remember_published, session.disk, session.key, published.raw, signatures)
    return published.manifest


def _accept(session: Session, published: Published) -> None:
    """Go on with a revision, if its own policy lets it come here from where it is read."""
    session.access.add(f"model {session.name.model}", published.policy)
    session.policy, session.bundles, session.base = published.policy, published.bundles, published.base
    if session.origin is not None and isinstance(session.origin.inner, ChunkedOrigin):
        session.origin.inner.serve(published.manifest)
    session.check_access_again()


def _remember_published(disk: DiskTier, key: str, raw: bytes, signatures: Sequence[bytes]) -> None:
    try:
        disk.records.remember_published(key, raw, signatures)
    except OSError as exc:
        log.warning("a manifest is not remembered: %s", exc)


def _remembered(session: Session) -> Manifest:
    known = (
        session.disk.records.recall_published(session.key) if session.disk is not None and session.name.model else None
    )
    if known is not None:
        published = read_form(known[0], Digest.of(known[0]))
        session.access.check_signed(session.name.model, None, published.manifest.revision, known[1])
        _accept(session, published)
        return published.manifest
    # Of a published model nothing else will do: what is signed, and where it may be, is known of nothing else.
    manifest = (
        session.disk.recall_manifest(session.key) if session.disk is not None and not session.name.model else None
    )
    if manifest is None or (session.request.needs_weights and not manifest.weights):
        raise OfflineError(
            f"{session.name} is not on this node: load or prefetch it once without offline (weightcache ls shows what is "
            "here)",
            uri=str(session.name),
        )
    return manifest


def _remember(disk: DiskTier, fresh: Sequence[tuple[str, Shard]], record: ModelRecord) -> None:
    try:
        for key, shard in fresh:
            disk.records.remember_shard(key, shard)
        disk.records.remember_model(record)
        disk.note_use(record.key, time.time())
    except OSError as exc:
        log.warning("what was learned of %s is not remembered: %s", record.uri, exc)


def fall_back(report: Report, what: str) -> None:
    """Note a fallback: logged, and counted in the report."""
    log.warning("%s", what)
    report.warnings.append(what)


def wanted_names(request: Request) -> Callable[[str], bool]:
    if request.names is not None:
        return request.names.__contains__
    include = _patterns(request.include)
    exclude = _patterns(request.exclude) or []
    # A loader may name thousands of tensors one by one.
    named = frozenset(include or ())
    patterns = [each for each in include or () if set(each) & set("*?[")]

    def wanted(name: str) -> bool:
        return (
            include is None or name in named or any(fnmatch.fnmatchcase(name, each) for each in patterns)
        ) and not any(fnmatch.fnmatchcase(name, each) for each in exclude)

    return wanted


def _patterns(given: Patterns) -> list[str] | None:
    return None if given is None else [given] if isinstance(given, str) else list(given)


def find_wanted(session: Session) -> list[Wanted]:
    """Return the tensors that the request asks for. Raises ConfigError when its patterns leave none."""
    request, attached = session.request, session.attached
    if attached is not None and not (request.include or request.exclude or request.names is not None):
        wanted = attached.wanted
    else:
        wanted = want(session.manifest, wanted_names(request))
    if not wanted and (request.include or request.exclude):
        names = [name for name, _, _ in session.manifest.tensors()]
        hint = nearest((_patterns(request.include) or [""])[0], names)
        raise ConfigError(
            f"include={request.include!r}, exclude={request.exclude!r} leave none of the {len(names)} tensors of "
            f"{session.name}{hint}"
        )
    if callable(request.order):
        return wanted
    known = {tensor.name for tensor in wanted} if request.order else set()
    for name in request.order:
        if name not in known:
            raise ConfigError(
                f"order names {name!r}, which is no tensor wanted of {session.name}{nearest(name, known)}"
            )
    return wanted


def chunks_of(wanted: Iterable[Wanted]) -> list[ChunkKey]:
    """Return the chunks that hold tensors, each once, in file order."""
    return sorted({key for tensor in wanted for key in tensor.chunks})


def look(session: Session, keys: Iterable[ChunkKey]) -> set[Digest]:
    """Return the digests of those chunks that the disk tier holds; without one, or when it fails, none."""
    if session.disk is None:
        return set()
    known = (session.manifest.shards[shard].chunks[chunk].digest for shard, chunk in keys)
    try:
        return session.disk.look({digest for digest in known if digest is not None})
    except OSError as exc:
        session.leave_disk(f"the disk tier cannot be read: {exc}")
        return set()


def decide(
    session: Session, keys: Sequence[ChunkKey], stored: Container[Digest], held: Container[ChunkKey] = ()
) -> Plan:
    # A published chunk is an object of its own.
    range_bytes = 0 if session.name.model else session.settings.range_bytes
    return make_plan(session.manifest, keys, stored, range_bytes, held)


def sizes_of(manifest: Manifest, keys: Sequence[ChunkKey]) -> dict[ChunkKey, int]:
    return {key: manifest.shards[key[0]].chunks[key[1]].nbytes for key in keys}
