"""Own the commands on registries: each opens what it needs, runs, and closes it.

Never knows how a registry is laid out, nor how anything is moved.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from weightcache.access import Access
from weightcache.artefacts import describe_bundle, facts_of_machine
from weightcache.checking import Checker, RegistryCheck
from weightcache.comparing import Difference, Piece, compare
from weightcache.config import read_settings
from weightcache.digest import ALGORITHM, Digest
from weightcache.errors import (
    ConfigError,
    ModelNotFoundError,
    OriginError,
    OriginUnreachableError,
    UriError,
    nearest,
)
from weightcache.ledger import place_of
from weightcache.opening import name_of, open_writable
from weightcache.origins.base import Stat
from weightcache.origins.chunked import chunk_name
from weightcache.origins.resilient import Resilient
from weightcache.policy import Verb
from weightcache.presence import Presence
from weightcache.prices import price_of
from weightcache.published import Bundle, Published
from weightcache.publishing import Publication, Publisher, Source
from weightcache.registry import Tag, WritableRegistry
from weightcache.replicating import Replication
from weightcache.replicating import replicate as copy_registry
from weightcache.report import Report
from weightcache.residency import Policy, Site
from weightcache.runtime import all_of, runtime
from weightcache.session import Request, describe_model, open_session
from weightcache.signatures import Signature, load_private, public_key
from weightcache.signatures import sign as sign_revision
from weightcache.sweeping import Garbage, collect, remove_model, remove_revision, remove_tag
from weightcache.uri import LATEST, Name, latest_of, parse_uri

Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TagRow:
    """A tag as it is shown: the revision it names, what it named before, and when it was moved (seconds since 1970)."""

    model: str
    tag: str
    revision: str
    previous: str | None
    moves: int
    moved_s: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class RevisionRow:
    """A revision as it is shown: `bytes` of its files, `tags` that name it now, and when it was written."""

    model: str
    revision: str
    tags: tuple[str, ...]
    written_s: float
    bytes: int
    n_tensors: int
    base: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def publish(
    request: Request,
    destination: str,
    options: Mapping[str, Any],
    base: str,
    rules: Mapping[str, Any] | None,
    bundles: Sequence[tuple[Bundle, Path]] = (),
    replicas: int = 1,
) -> Publication:
    """Publish a model; see `weightcache.publish`."""
    name = _model_name(destination)
    if name.revision.startswith(f"{ALGORITHM}:"):
        raise UriError(f"{destination!r} names a revision: publish to a tag, as in {name.root}/{name.model}@latest")
    began = time.perf_counter()
    own = Policy.from_form(rules, "what is published") if rules is not None else None
    others = _other_replicas(name, replicas)
    publication = Publication(str(name))
    session = open_session(replace(request, cache="none"), Report(uri=request.uri))

    async def work(registry: WritableRegistry, access: Access) -> None:
        if not _parse(destination).model:
            await _check_is_free(registry, name)
        await describe_model(session)
        assert session.origin is not None
        policy = own if own is not None else session.policy
        at = _at(name, options, access)
        access.join(session.access)  # whatever its own policy says: what may not go there does not
        access.add(f"model {name.model}", policy)
        access.check_write(Verb.PUBLISH, at.site, at.label)
        access.add(f"registry {registry.uri}", (await registry.make(Policy())).policy)
        access.check_write(Verb.PUBLISH, at.site, at.label)
        ancestor = await _find_base(registry, name, base) if base else ""
        if not await registry.origin.has_conditions():
            publication.warnings.append(
                f"{registry.uri} keeps no conditions on writes: of two who move one tag at the same moment one may be lost"
            )
        presence = Presence(registry.origin)
        try:
            await presence.begin()
            publisher = Publisher(registry, presence, session.threads, publication, request.progress)
            sources = [Source(session.manifest.shards, session.origin)]
            found = [await describe_bundle(bundle, folder, session.threads) for bundle, folder in bundles]
            await publisher.run(
                name.model, name.revision, [*sources, *found], ancestor, policy, [bundle for bundle, _ in bundles]
            )
        finally:
            await presence.end()

    try:
        _run(name, options, Verb.PUBLISH, work)
    finally:
        session.threads.run(session.close_origin())
        session.settle()
        session.release()
    _wait_for(name, options, others, replicas, publication)
    publication.seconds = time.perf_counter() - began
    return publication


def bundles_of(
    folders: Mapping[str, str | os.PathLike[str]], facts: Mapping[str, str] | None
) -> list[tuple[Bundle, Path]]:
    """Return folders of artefacts as bundles for a machine, this one unless facts are given. Raises ConfigError."""
    if not folders:
        if facts:
            raise ConfigError(f"facts are given ({', '.join(facts)}), but no artefacts that they are of: name a folder")
        return []
    for name, folder in folders.items():
        if not Path(folder).is_dir():
            raise ConfigError(f"no folder {folder}: expected that of the artefacts {name!r}")
    known = dict(facts) if facts is not None else facts_of_machine()
    return [(Bundle(name, known), Path(folder)) for name, folder in folders.items()]


async def _check_is_free(registry: WritableRegistry, name: Name) -> None:
    """Raise UriError where a name without a tag is a folder of its own: a registry, or a source in the wrong place."""
    here = f"{name.root}/{name.model}"
    if await registry.is_there(f"{name.model}/"):
        raise UriError(f"{here} is a registry: expected a model in it, as in {here}/llama-3-8b@v1", uri=here)
    if await registry.origin.entries(f"{name.model}/"):
        raise UriError(
            f"{here} is a folder with files, and no place for a model: expected first what to publish, then where to, as "
            f"registry/model@tag",
            uri=here,
        )


async def _find_base(registry: WritableRegistry, name: Name, base: str) -> str:
    """Return the revision that a base names: `model@blake3:…` in the same registry, else its whole URI."""
    found = _model_name(base if "/" in base else f"{name.root}/{base}")
    if found.root != name.root:
        return str(found)
    revision, _ = await registry.find(found.model, found.revision)
    return f"{found.model}@{revision}"


def _other_replicas(name: Name, replicas: int) -> list[str]:
    """Return whom to copy to for so many replicas to have it, beside the one published to. Raises ConfigError."""
    store = read_settings().stores.get(name.store)
    if replicas > 1 and store is None:
        raise ConfigError(
            f"{replicas} replicas were asked for: only stores of the configuration have them, as wc://store"
        )
    others = (
        [each.name for each in store.replicas if each.is_writable and each.name != store.publish_to] if store else []
    )
    if len(others) + 1 < replicas:
        raise ConfigError(
            f"{replicas} replicas were asked for, but only {len(others) + 1} of {name.root} can be written to: set "
            'access = "write" for more'
        )
    return others


def _wait_for(
    name: Name, options: Mapping[str, Any], others: Sequence[str], replicas: int, publication: Publication
) -> None:
    """Copy what was published until so many replicas have it."""
    n_there = 1
    for other in others:
        if n_there == replicas:
            return
        try:
            [done] = replicate(f"{name.root}/{name.model}", options, source="", to=other, dry=False, progress=None)
        except OriginError as exc:
            publication.warnings.append(f"replica {other} does not have it: {exc}")
            continue
        publication.copied_bytes += done.bytes
        n_there += 1
    if n_there < replicas:
        raise OriginUnreachableError(
            f"{name} is published, and {n_there} of {replicas} replicas have it: {'; '.join(publication.warnings)}; run "
            f"weightcache replicate {name.root}",
            uri=str(name),
        )


def tags(uri: str, options: Mapping[str, Any]) -> list[TagRow]:
    """Return the tags of a model, or of all models of a registry; see `weightcache.tags`."""

    async def work(registry: WritableRegistry, access: Access, model: str) -> list[TagRow]:
        models = [model] if model else await registry.models()
        found = [_tag_row(each, tag) for each in models for tag in await registry.tags(each)]
        if model and not found and not await registry.revisions(model):
            raise await registry.no_model(model)
        return found

    return _run_found(uri, options, Verb.READ, work)


def revisions(uri: str, options: Mapping[str, Any]) -> list[RevisionRow]:
    """Return the revisions of a model, or of all models of a registry; see `weightcache.revisions`."""

    async def work(registry: WritableRegistry, access: Access, model: str) -> list[RevisionRow]:
        found: list[RevisionRow] = []
        for each in [model] if model else await registry.models():
            tags = await registry.tags(each)
            for revision, written_s in await registry.revisions(each):
                names = tuple(sorted(tag.name for tag in tags if tag.revision == revision))
                found.append(_revision_row(each, await registry.revision(each, revision), names, written_s))
            if model and not found and not tags:
                raise await registry.no_model(model)
        return found

    return _run_found(uri, options, Verb.READ, work)


def move_tag(uri: str, revision: str, options: Mapping[str, Any]) -> TagRow:
    """Let a tag name another revision; see `weightcache.tag`."""
    name = _model_name(uri)
    if name.revision.startswith(f"{ALGORITHM}:"):
        raise UriError(f"{uri!r} names a revision: name the tag to move, as in {name.root}/{name.model}@stable")
    try:
        pointer = _parse(f"{name.root}/{name.model}@{revision}")
        is_one = (pointer.root, pointer.model) == (name.root, name.model)
    except UriError:
        is_one = False
    if not is_one:
        raise UriError(
            f"{revision!r} is no revision of {name.model}: expected another of its tags, or blake3: and 64 hex digits"
        )

    async def work(registry: WritableRegistry, access: Access) -> TagRow:
        await registry.about()
        presence = Presence(registry.origin)
        try:
            await presence.begin()
            wanted, _ = await registry.find(name.model, revision)
            await presence.rely_on_revision(name.model, wanted)
            await registry.revision(name.model, wanted)
            try:
                seen = await registry.tag(name.model, name.revision)
            except ModelNotFoundError:
                seen = None
            presence.check_alive()
            if seen is not None and seen.revision == wanted:
                return _tag_row(name.model, seen)
            return _tag_row(name.model, await registry.move_tag(name.model, name.revision, wanted, seen))
        finally:
            await presence.end()

    return _run(name, options, Verb.PUBLISH, work)


def remove(uri: str, options: Mapping[str, Any], replica: str = "") -> str:
    """Remove a tag, a revision or a whole model; see `weightcache.remove`. Returns what was removed, in words."""
    pointer = _parse(uri).revision if "@" in uri.rpartition("/")[2] else ""

    async def work(registry: WritableRegistry, access: Access, model: str) -> str:
        if not model:
            raise UriError(
                f"{uri!r} names no model: expected registry/model, registry/model@tag or registry/model@blake3:…"
            )
        if not pointer:
            return f"model {model}: {await remove_model(registry, model)} revisions"
        if pointer.startswith(f"{ALGORITHM}:"):
            await remove_revision(registry, model, Digest.parse(pointer))
            return f"revision {pointer} of {model}"
        await remove_tag(registry, model, pointer)
        return f"tag {pointer} of {model}"

    return _run_found(uri, options, Verb.PUBLISH, work, replica)


def gc(
    uri: str, options: Mapping[str, Any], *, dry: bool, grace_s: float, untagged_s: float | None, replica: str = ""
) -> Garbage:
    """Remove what no revision needs; see `weightcache.gc`."""

    async def work(registry: WritableRegistry, access: Access, model: str) -> Garbage:
        _check_is_whole(uri, model)
        return await collect(registry, dry=dry, grace_s=grace_s, untagged_s=untagged_s)

    return _run_found(uri, options, Verb.READ if dry else Verb.PUBLISH, work, replica)


def check(
    uri: str,
    options: Mapping[str, Any],
    *,
    deep: bool,
    repair_from: Sequence[str],
    progress: Progress | None,
    replica: str = "",
) -> RegistryCheck:
    """Check a registry; see `weightcache.check`."""
    name = _parse(uri)
    threads = runtime(read_settings().threads)
    verb = Verb.REPLICATE if repair_from else Verb.READ

    async def work(registry: WritableRegistry, access: Access, model: str) -> RegistryCheck:
        _check_is_whole(uri, model)
        here = _at(name, options, access, replica)
        sources: list[_At] = []
        for each in repair_from:
            # Of a store, another of its replicas; else another registry.
            is_replica = bool(name.store) and "/" not in each
            at = _at(name if is_replica else _root_name(each), options, access, each if is_replica else "")
            access.check_read(Verb.REPLICATE, at.site, at.label)
            sources.append(at)

        def rule(owner: str, policy: Policy) -> None:
            access.add(owner, policy)
            if deep:
                access.check_read(Verb.READ, here.site, here.label)
            for at in sources:
                access.check_read(Verb.REPLICATE, at.site, at.label)
            if sources:
                access.check_write(Verb.REPLICATE, here.site, here.label)

        rule(f"registry {registry.uri}", (await registry.about()).policy)
        async with AsyncExitStack() as opened:
            others: list[Resilient] = []
            for at in sources:
                other = await opened.enter_async_context(_opened(at, access, Verb.READ))
                await other.about()
                others.append(other.origin)
            return await Checker(registry, threads, others, progress, rule).run(deep=deep)

    return _run_found(uri, options, verb, work, replica)


def diff(uri: str, other: str, options: Mapping[str, Any]) -> Difference:
    """Compare two revisions; see `weightcache.diff`."""
    names = [_model_name(uri), _model_name(other)]

    async def find(registry: WritableRegistry, access: Access, name: Name) -> Published:
        """Return a revision whose bytes may come here."""
        at = _at(name, options, access)
        access.add(f"registry {registry.uri}", (await registry.about()).policy)
        access.check_read(Verb.READ, at.site, at.label)
        published = await registry.revision(name.model, (await registry.find(name.model, name.revision))[0])
        access.add(f"model {name.model}", published.policy)
        access.check_read(Verb.READ, at.site, at.label)
        return published

    async def compare_with(second: WritableRegistry, beside: Access) -> Difference:
        async def work(first: WritableRegistry, access: Access) -> Difference:
            found = [await find(first, access, names[0]), await find(second, beside, names[1])]
            difference = compare(found[0].manifest, found[1].manifest)
            for tensor, sides in sorted(difference.unsure.items()):
                contents = [
                    b"".join(await all_of(_read_piece(each, published, piece) for piece in pieces))
                    for each, published, pieces in zip((first, second), found, sides, strict=True)
                ]
                difference.settle(tensor, is_same=contents[0] == contents[1])
            return difference

        return await _in(names[0], options, Verb.READ, work)

    return _run(names[1], options, Verb.READ, compare_with)


def replicate(
    uri: str, options: Mapping[str, Any], *, source: str, to: str, dry: bool, progress: Progress | None
) -> list[Replication]:
    """Copy what other replicas of a store lack; see `weightcache.replicate`."""
    name = _parse(uri)
    if not name.store:
        raise UriError(f"{uri!r} is no store of the configuration: expected wc://store or wc://store/model")
    name = replace(name, revision="*") if name.model else name  # all that the model has
    settings = read_settings()
    store, threads = settings.stores[name.store], runtime(settings.threads)
    first = source or store.publish_to
    names = [each.name for each in store.replicas]
    if to and to not in names:
        raise ConfigError(f"store {store.name} has no replica {to!r}{nearest(to, names)}: expected {', '.join(names)}")
    targets = [
        each.name
        for each in store.replicas
        if (each.name == to if to else each.is_writable and not each.replicates_itself) and each.name != first
    ]
    if not targets:
        raise ConfigError(
            f'store {store.name} has no replica to copy to beside {first or "none"}: name one, or set access = "write" '
            "for another"
        )

    async def copy_to(target: str, registry: WritableRegistry, access: Access) -> Replication:
        here, there = _at(name, options, access, first), _at(name, options, access, target)

        def rule(owner: str, policy: Policy) -> None:
            access.add(owner, policy)
            access.check_read(Verb.REPLICATE, here.site, here.label)
            access.check_write(Verb.REPLICATE, there.site, there.label)

        rule(f"registry {registry.uri}", (await registry.about()).policy)
        async with _opened(there, access, Verb.REPLICATE) as other:
            return await copy_registry(
                registry,
                other,
                threads,
                models=[name.model] if name.model else [],
                dry=dry,
                usd_per_gb=here.usd_per_gb,
                now_s=time.time(),
                progress=progress,
                rule=rule,
            )

    # Each by itself: what may not go to one may go to another.
    return [_run(name, options, Verb.READ, partial(copy_to, target), first) for target in targets]


def sign(uri: str, key: Path, options: Mapping[str, Any]) -> tuple[str, int]:
    """Sign a revision; see `weightcache.sign`. Returns the revision and the serial."""
    name = _model_name(uri)
    private = load_private(key)
    key_id = public_key(private).key_id

    async def work(registry: WritableRegistry, access: Access) -> tuple[str, int]:
        await registry.about()
        revision, _ = await registry.find(name.model, name.revision)
        await registry.revision(name.model, revision)
        serials = [0]
        for other, _ in await registry.revisions(name.model):
            for file, content in await registry.all_signatures(name.model, other):
                serials.append(Signature.from_form(json.loads(content), file).serial)
        signature = sign_revision(private, name.model, revision, max(serials) + 1)
        await registry.put_signature(name.model, revision, key_id, json.dumps(signature.to_form()).encode())
        return str(revision), signature.serial

    return _run(name, options, Verb.PUBLISH, work)


async def _read_piece(registry: WritableRegistry, published: Published, piece: Piece) -> bytes:
    sizes = {chunk.digest: chunk.nbytes for shard in published.manifest.shards for chunk in shard.chunks}
    content = bytearray(piece.stop - piece.start)
    stat = Stat(chunk_name(piece.digest.hex), sizes[piece.digest], "")
    await registry.origin.read_into(stat, piece.start, [memoryview(content)])
    return bytes(content)


# -- names and their opening


@dataclass(frozen=True, slots=True)
class _At:
    """A registry that is opened: its root, how it is reached, where it lies, and what it is called in messages."""

    root: Name
    options: Mapping[str, Any]
    site: Site
    label: str
    usd_per_gb: float = 0.0
    is_writable: bool = True


def _parse(uri: str) -> Name:
    return parse_uri(uri, fsspec.available_protocols(), str(Path.cwd()), read_settings().stores)


def _model_name(uri: str) -> Name:
    """Understand the name of a model in a registry; without a tag it is the latest. Raises UriError."""
    name = _parse(uri)
    found = name if name.model else latest_of(name)
    if found is None:
        example = f"{name.root if name.store else 's3://bucket/registry'}/llama-3-8b@v1"
        raise UriError(f"{uri!r} names no model of a registry: expected registry/model@tag, as in {example}")
    return found


def _root_name(uri: str) -> Name:
    """Understand the name of a registry. Raises UriError."""
    name = _parse(uri)
    if name.model or name.file:
        raise UriError(f"{uri!r} names a model: expected the registry, {name.root}")
    return name


def _at(name: Name, options: Mapping[str, Any], access: Access, replica: str = "") -> _At:
    """Return where a registry is: of a store the replica that is named, or the one that publishers write to."""
    settings = read_settings()
    if not name.store:
        if replica:
            raise ConfigError(
                f"replica {replica!r} of {name}: only stores of the configuration have replicas, as wc://store"
            )
        endpoint = ""
        if name.scheme == "s3":
            from weightcache.origins.s3 import endpoint_of

            endpoint = endpoint_of(options)
        place = place_of(name.root, endpoint)
        price = price_of(place, settings.prices).egress_usd_per_gb
        return _At(replace(name, model="", revision=""), options, access.site_of(name, endpoint), place, price)
    store = settings.stores[name.store]
    access.add(f"store {store.name}", store.policy)
    wanted = replica or store.publish_to
    names = [each.name for each in store.replicas]
    if not wanted:
        raise ConfigError(
            f'no replica of store {store.name} is written to: set access = "write" for one of {", ".join(names)}, or name one'
        )
    found = next((each for each in store.replicas if each.name == wanted), None)
    if found is None:
        raise ConfigError(
            f"store {store.name} has no replica {wanted!r}{nearest(wanted, names)}: expected {', '.join(names)}"
        )
    price = found.price(settings.prices).egress_usd_per_gb
    return _At(name_of(found), found.opened_with(options), found.site, found.name, price, found.is_writable)


@asynccontextmanager
async def _opened(at: _At, access: Access, verb: Verb) -> AsyncIterator[WritableRegistry]:
    """Open a registry for the length of the block, if policy allows what it is for."""
    is_write = verb in (Verb.PUBLISH, Verb.REPLICATE)
    if is_write and not at.is_writable:
        raise ConfigError(f'replica {at.label} may only be read: set access = "write" for it in weightcache.toml')
    (access.check_write if is_write else access.check_read)(verb, at.site, at.label)
    settings = read_settings()
    origin = open_writable(at.root, settings, at.options, runtime(settings.threads), access)
    try:
        yield WritableRegistry(origin)
    finally:
        await origin.close()


def _run(
    name: Name,
    options: Mapping[str, Any],
    verb: Verb,
    work: Callable[[WritableRegistry, Access], Awaitable[T]],
    replica: str = "",
) -> T:
    """Open the registry a name lies in, do some work, and close it."""
    return runtime(read_settings().threads).run(_in(name, options, verb, work, replica))


async def _in(
    name: Name,
    options: Mapping[str, Any],
    verb: Verb,
    work: Callable[[WritableRegistry, Access], Awaitable[T]],
    replica: str = "",
) -> T:
    """Do what `_run` does, on the loop thread."""
    access = Access(read_settings(), name)
    try:
        async with _opened(_at(name, options, access, replica), access, verb) as registry:
            try:
                return await work(registry, access)
            except ModelNotFoundError as exc:
                here = f"{name.root}/{name.model}"
                if name.revision == LATEST and await registry.is_there(f"{name.model}/"):
                    raise UriError(f"{here} is a registry: expected a model in it, as in {here}/llama-3-8b@v1") from exc
                raise
    finally:
        access.close()


def _check_is_whole(uri: str, model: str) -> None:
    """Raise UriError where a model was named in place of its registry."""
    if model:
        raise UriError(f"{uri!r} names a model: expected its registry, {uri.rpartition('/')[0] or '.'!r}")


def _run_found(
    uri: str,
    options: Mapping[str, Any],
    verb: Verb,
    work: Callable[[WritableRegistry, Access, str], Awaitable[T]],
    replica: str = "",
) -> T:
    """Open the registry that a name is, or that the model it names lies in, and do some work there.

    The work is told the model's name, empty where the registry was named.
    """
    name = _parse(uri)
    if name.model or name.store:

        async def named(registry: WritableRegistry, access: Access) -> T:
            await registry.about()
            return await work(registry, access, name.model)

        return _run(name, options, verb, named, replica)
    inside = latest_of(name)

    async def root(registry: WritableRegistry, access: Access) -> list[T]:
        try:
            await registry.about()
        except ModelNotFoundError:
            if inside is None:
                raise
            return []
        return [await work(registry, access, "")]

    async def parent(registry: WritableRegistry, access: Access) -> T:
        assert inside is not None
        try:
            await registry.about()
        except ModelNotFoundError as exc:
            raise ModelNotFoundError(
                f"no registry at {name.root}, nor one at {inside.root} that could have a model {inside.model!r}: check the "
                "name; weightcache publish makes one",
                uri=name.root,
            ) from exc
        return await work(registry, access, inside.model)

    done = _run(name, options, verb, root, replica)
    return done[0] if done else _run(inside or name, options, verb, parent, replica)


def _tag_row(model: str, tag: Tag) -> TagRow:
    previous = str(tag.previous) if tag.previous else None
    return TagRow(model, tag.name, str(tag.revision), previous, tag.moves, tag.moved_s)


def _revision_row(model: str, published: Published, tags: tuple[str, ...], written_s: float) -> RevisionRow:
    manifest = published.manifest
    return RevisionRow(
        model,
        str(manifest.revision),
        tags,
        written_s,
        sum(shard.nbytes for shard in manifest.shards),
        sum(len(shard.tensors) for shard in manifest.weights),
        published.base,
    )
