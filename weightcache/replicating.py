"""Own replication: what one registry has and another has not is copied, verified on the way, tags last.

Never moves a tag back, and never copies what a revision does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightcache.digest import Digest
from weightcache.errors import ConflictError, ModelNotFoundError
from weightcache.origins.chunked import ChunkedOrigin
from weightcache.origins.resilient import Resilient
from weightcache.presence import Presence
from weightcache.published import Published
from weightcache.publishing import Publication, Publisher, Source
from weightcache.registry import Tag, WritableRegistry
from weightcache.residency import Policy
from weightcache.runtime import Runtime
from weightcache.sweeping import digests_of

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Replication:
    """What a replication copied, or would: `is_dry` says which.

    Attributes:
        source, target: The registries.
        revisions: `model@blake3:…` that the target had not.
        tags: `model@tag` that it had not, or as they had been.
        n_chunks, bytes: Of the chunks that it had not.
        lag_s: How long ago the oldest tag that it had not was moved; 0 where it had all.
        usd: What it costs that so many bytes leave the source, by its price.
        conflicts: Tags that both sides moved: each stays as it is.
    """

    source: str
    target: str
    is_dry: bool
    revisions: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    n_chunks: int = 0
    bytes: int = 0
    lag_s: float = 0.0
    usd: float = 0.0
    conflicts: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class _Lacking:
    """What the target lacks of one model: revisions, and tags with what they are there."""

    model: str
    revisions: list[Published] = field(default_factory=list)
    tags: list[tuple[Tag, Tag | None]] = field(default_factory=list)


async def replicate(
    source: WritableRegistry,
    target: WritableRegistry,
    threads: Runtime,
    *,
    models: Sequence[str],
    dry: bool,
    usd_per_gb: float,
    now_s: float,
    progress: Progress | None = None,
    rule: Callable[[str, Policy], object] = lambda owner, policy: None,
) -> Replication:
    """Copy what the target lacks.

    Args:
        source, target: Registries. The target is made if there is none.
        models: Whose tags and revisions; all there are where it is empty.
        dry: Only say what would be copied.
        usd_per_gb: What a GB costs that leaves the source.
        now_s: Seconds since 1970.
        progress: Told (bytes done, bytes in all).
        rule: Told each revision's own policy, with its owner, before a byte of it moves; raises what forbids that.
    """
    done = Replication(source.uri, target.uri, dry)
    about = await source.about()
    lacking = [await _compare(source, target, model, done) for model in models or await source.models()]
    try:
        there = set(await target.chunks())
    except ModelNotFoundError:
        there = set()
    sizes: dict[Digest, int] = {}
    for each in lacking:
        for published in each.revisions:
            rule(f"model {each.model}", published.policy)
            wanted = digests_of(published.manifest) - there
            for shard in published.manifest.shards:
                sizes.update((chunk.digest, chunk.nbytes) for chunk in shard.chunks if chunk.digest in wanted)
    done.n_chunks, done.bytes = len(sizes), sum(sizes.values())
    done.usd = done.bytes / 1e9 * usd_per_gb
    moved = [tag.moved_s for each in lacking for tag, _ in each.tags]
    done.lag_s = max(0.0, now_s - min(moved)) if moved else 0.0
    if dry or not any(each.revisions or each.tags for each in lacking):
        return done
    await target.make(about.policy)
    presence = Presence(target.origin)
    try:
        await presence.begin()
        publisher = Publisher(target, presence, threads, Publication(target.uri), progress)
        for each in lacking:
            await _copy(source, target, publisher, each, done)
    finally:
        await presence.end()
    return done


async def _compare(source: WritableRegistry, target: WritableRegistry, model: str, done: Replication) -> _Lacking:
    """Find what the target lacks of a model. Newer is who was moved more often; equally often and apart is a conflict."""
    lacking = _Lacking(model)
    try:
        theirs = {tag.name: tag for tag in await target.tags(model)}
        there = {digest for digest, _ in await target.revisions(model)}
    except ModelNotFoundError:
        theirs, there = {}, set()
    revisions = await source.revisions(model)
    tags = await source.tags(model)
    if not revisions and not tags:
        raise await source.no_model(model)
    for digest, _ in revisions:
        if digest not in there:
            lacking.revisions.append(await source.revision(model, digest))
            done.revisions.append(f"{model}@{digest}")
    for tag in tags:
        seen = theirs.get(tag.name)
        if seen is not None and seen.revision == tag.revision and seen.moves >= tag.moves:
            continue
        if seen is not None and seen.moves >= tag.moves:
            if seen.moves == tag.moves:
                done.conflicts.append(
                    f"{model}@{tag.name} is {tag.revision} at {source.uri} and {seen.revision} at {target.uri}"
                )
            continue
        lacking.tags.append((tag, seen))
        done.tags.append(f"{model}@{tag.name}")
    return lacking


async def _copy(
    source: WritableRegistry, target: WritableRegistry, publisher: Publisher, lacking: _Lacking, done: Replication
) -> None:
    model = lacking.model
    for published in lacking.revisions:
        files = ChunkedOrigin(source.origin.inner)
        files.serve(published.manifest)
        reader = Resilient(files)
        await publisher.bring([Source(published.manifest.shards, reader)])
        await publisher.put(model, published)
        for name, content in await source.all_signatures(model, published.manifest.revision):
            await target.origin.put(name, content)
    for tag, seen in lacking.tags:
        await publisher.hold(model, tag.revision)
        try:
            await target.put_tag(model, tag, seen)
        except ConflictError as exc:
            done.conflicts.append(str(exc))
            done.tags.remove(f"{model}@{tag.name}")
