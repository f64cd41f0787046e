"""Own the removal of what a registry no longer needs: chunks of no revision, revisions of no tag, the signs of the dead.

Never removes what a revision or a living publisher needs, whoever works there at the same time; see presence.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightcache.digest import Digest
from weightcache.errors import FormatError, IntegrityError, InUseError
from weightcache.manifest import Manifest
from weightcache.origins.chunked import chunk_name
from weightcache.presence import CLOCK, Sweep, now_s_at, sweeping
from weightcache.registry import (
    WritableRegistry,
    revision_name,
    tag_name,
)
from weightcache.runtime import all_of

log = logging.getLogger(__name__)

DAY_S = 86400.0
N_AT_ONCE = 64  # removals under way
CLOCK_AGE_S = 3600.0


@dataclass(slots=True)
class Garbage:
    """What a sweep removed, or would: `is_dry` says which.

    Attributes:
        chunks: Digests, with the bytes they take.
        revisions: `model@blake3:…` of no tag.
        kept_young: Chunks that nothing needs, but that were written too lately to be removed.
        kept_chunks: Chunks that revisions or publishers need.
        dead_publishers: Signs of publishers that ended without removing them.
    """

    is_dry: bool
    chunks: dict[str, int] = field(default_factory=dict)
    revisions: list[str] = field(default_factory=list)
    kept_young: int = 0
    kept_chunks: int = 0
    dead_publishers: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.chunks.values())

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "bytes": self.bytes}


def digests_of(manifest: Manifest) -> set[Digest]:
    """Return the chunks that a revision needs."""
    return {chunk.digest for shard in manifest.shards for chunk in shard.chunks if chunk.digest is not None}


async def collect(registry: WritableRegistry, *, dry: bool, grace_s: float, untagged_s: float | None) -> Garbage:
    """Remove what nothing needs, or say what would be.

    Args:
        dry: Look only.
        grace_s: Chunks written later than so long ago stay, by the store's clock.
        untagged_s: Revisions that no tag names go, too, if they were written longer ago than this; None: they stay.

    Raises:
        InUseError: Another sweep runs.
    """
    await registry.about()
    garbage = Garbage(is_dry=dry)
    while True:
        async with sweeping(registry.origin) as sweep:
            doomed, revisions, litter = await _look(registry, sweep, garbage, grace_s, untagged_s)
            if dry:
                return garbage
            done = await _remove(registry, sweep, doomed, revisions, litter)
        if done:
            return garbage


async def _look(
    registry: WritableRegistry, sweep: Sweep, garbage: Garbage, grace_s: float, untagged_s: float | None
) -> tuple[list[Digest], list[tuple[str, Digest]], list[str]]:
    now_s = await now_s_at(registry.origin)
    chunks = await registry.chunks()
    # Publishers first: one that ends between the two has written its manifest before it took its sign away.
    needed, held, litter = await sweep.needed()
    dead = len(litter)
    old_revisions: list[tuple[str, Digest]] = []
    for model in await registry.models():
        named = {tag.revision for tag in await registry.tags(model)}
        revisions = await registry.revisions(model)
        is_old = {
            digest
            for digest, written_s in revisions
            if untagged_s is not None
            and digest not in named
            and (model, digest) not in held
            and now_s - written_s >= untagged_s
        }
        old_revisions += [(model, digest) for digest in is_old]
        kept = [digest for digest, _ in revisions if digest not in is_old]
        for published in await all_of(registry.revision(model, digest) for digest in kept):
            needed |= digests_of(published.manifest)
    useless = {digest: entry for digest, entry in chunks.items() if digest not in needed}
    doomed = [digest for digest, entry in useless.items() if now_s - entry.modified_s >= grace_s]
    litter += [entry.name for entry in await registry.origin.entries(CLOCK) if now_s - entry.modified_s > CLOCK_AGE_S]
    garbage.chunks |= {str(digest): useless[digest].nbytes for digest in doomed}
    garbage.revisions = sorted({*garbage.revisions, *(f"{model}@{digest}" for model, digest in old_revisions)})
    garbage.kept_young = len(useless) - len(doomed)
    garbage.kept_chunks = len(chunks) - len(useless)
    garbage.dead_publishers = max(garbage.dead_publishers, dead)
    return doomed, old_revisions, litter


async def _remove(
    registry: WritableRegistry,
    sweep: Sweep,
    doomed: Sequence[Digest],
    revisions: Iterable[tuple[str, Digest]],
    litter: Iterable[str],
) -> bool:
    """Remove while publishers still wait; tell whether all is gone. A revision goes before the chunks it needs."""
    names = [
        *(revision_name(model, digest) for model, digest in revisions),
        *litter,
        *(chunk_name(digest.hex) for digest in doomed),
    ]
    for start in range(0, len(names), N_AT_ONCE):
        if not sweep.may_remove:
            return False
        await all_of(registry.origin.delete(name) for name in names[start : start + N_AT_ONCE])
    return True


async def remove_tag(registry: WritableRegistry, model: str, tag: str) -> None:
    """Remove a tag; what it named stays. Raises ModelNotFoundError."""
    with contextlib.suppress(FormatError):  # one that is damaged goes, too
        await registry.tag(model, tag)
    await registry.origin.delete(tag_name(model, tag))


async def remove_revision(registry: WritableRegistry, model: str, revision: Digest) -> None:
    """Remove a revision that no tag names and nobody publishes; its chunks stay until they are collected.

    Raises:
        ModelNotFoundError: It is not there.
        InUseError: A tag names it, or it is being published.
    """
    async with sweeping(registry.origin) as sweep:
        with contextlib.suppress(FormatError, IntegrityError):  # one that is damaged goes, too
            await registry.revision(model, revision)
        _, held, _ = await sweep.needed()
        names = [tag.name for tag in await registry.tags(model) if tag.revision == revision]
        if names or (model, revision) in held:
            why = f"tag {', '.join(names)} names it" if names else "it is being published"
            raise InUseError(
                f"revision {revision} of {model} in {registry.uri} stays: {why}; remove or move the tag first",
                uri=registry.uri,
                revision=str(revision),
            )
        await _remove_files(registry, model, revision)


async def remove_model(registry: WritableRegistry, model: str) -> int:
    """Remove all tags and revisions of a model; its chunks stay until they are collected. Returns how many revisions.

    Raises:
        ModelNotFoundError: It is not there.
        InUseError: Somebody publishes a revision of it.
    """
    async with sweeping(registry.origin) as sweep:
        _, held, _ = await sweep.needed()
        tags, revisions = await registry.tags(model), await registry.revisions(model)
        if not tags and not revisions:
            raise await registry.no_model(model)
        if any(name == model for name, _ in held):
            raise InUseError(f"{model} in {registry.uri} stays: a revision of it is being published", uri=registry.uri)
        await all_of(registry.origin.delete(tag_name(model, tag.name)) for tag in tags)
        await all_of(_remove_files(registry, model, digest) for digest, _ in revisions)
        return len(revisions)


async def _remove_files(registry: WritableRegistry, model: str, revision: Digest) -> None:
    await registry.origin.delete(revision_name(model, revision))
    for entry in await registry.origin.entries(f"models/{model}/signatures/{revision.hex}."):
        await registry.origin.delete(entry.name)
