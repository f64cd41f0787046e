"""Own the check of a registry: whether every tag, revision and chunk is there and is what its name says, and the repair.

Never removes anything; what is rotten is written anew from a replica, where one has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from weightcache.digest import Digest
from weightcache.errors import FormatError, IntegrityError, ModelNotFoundError, OriginError
from weightcache.manifest import CHUNK_LIMIT_NBYTES
from weightcache.origins.base import Stat
from weightcache.origins.chunked import chunk_name
from weightcache.origins.resilient import Resilient
from weightcache.published import Published
from weightcache.registry import Registry, WritableRegistry, revision_name
from weightcache.residency import Policy
from weightcache.runtime import Runtime, all_of
from weightcache.tiers.host import allocate

N_AT_ONCE = 16  # chunks read together: 256 MiB of memory at most


@dataclass(slots=True)
class RegistryCheck:
    """What a check of a registry found.

    Attributes:
        n_models, n_tags, n_revisions, n_chunks, n_bytes: What was looked at; chunks that revisions need, each once.
        deep: Whether every chunk's digest was computed anew.
        lost: Digests of chunks that are not there.
        rotten: Digests of chunks, and `model@digest` of revisions, that are not what their names say.
        problems: What is wrong with tags and revisions, and not repaired.
        repaired: Those of lost and rotten that are sound again.
        n_unneeded, unneeded_bytes: Chunks that no revision needs; `gc` removes them.
    """

    deep: bool
    n_models: int = 0
    n_tags: int = 0
    n_revisions: int = 0
    n_chunks: int = 0
    n_bytes: int = 0
    lost: list[str] = field(default_factory=list)
    rotten: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    n_unneeded: int = 0
    unneeded_bytes: int = 0

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong, or everything that was wrong is repaired."""
        return not self.problems and set(self.lost) | set(self.rotten) == set(self.repaired)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {**{name: getattr(self, name) for name in self.__slots__}, "sound": self.sound}


class Checker:
    """One check under way, on the loop thread.

    Args:
        registry: What is checked.
        threads: This process's.
        others: Registries that chunks are repaired from, in this order.
        progress: Told (bytes done, bytes in all).
        rule: Told each revision's own policy, with its owner, before a chunk is read; raises what forbids that.
    """

    def __init__(
        self,
        registry: WritableRegistry,
        threads: Runtime,
        others: list[Resilient],
        progress: Callable[[int, int], None] | None = None,
        rule: Callable[[str, Policy], object] = lambda owner, policy: None,
    ) -> None:
        self._registry = registry
        self._threads = threads
        self._others = others
        self._progress = progress
        self._rule = rule
        self._n_done = 0
        self._free: list[memoryview] = []

    async def run(self, *, deep: bool) -> RegistryCheck:
        check = RegistryCheck(deep)
        registry = self._registry
        await registry.about()
        needed: dict[Digest, int] = {}
        for model in await registry.models():
            check.n_models += 1
            await self._check_model(model, check, needed)
        there = await registry.chunks()
        check.n_chunks, check.n_bytes = len(needed), sum(needed.values())
        unneeded = [entry.nbytes for digest, entry in there.items() if digest not in needed]
        check.n_unneeded, check.unneeded_bytes = len(unneeded), sum(unneeded)
        for digest, nbytes in needed.items():
            if digest not in there:
                check.lost.append(str(digest))
            elif there[digest].nbytes != nbytes:
                check.rotten.append(str(digest))
        if deep:
            bad = {*check.lost, *check.rotten}
            todo = [(digest, nbytes) for digest, nbytes in needed.items() if str(digest) not in bad]
            for start in range(0, len(todo), N_AT_ONCE):
                batch = todo[start : start + N_AT_ONCE]
                sound = await all_of(self._is_sound(registry.origin, digest, nbytes) for digest, nbytes in batch)
                check.rotten += [
                    str(digest) for (digest, _), is_sound in zip(batch, sound, strict=True) if not is_sound
                ]
                self._n_done += sum(nbytes for _, nbytes in batch)
                if self._progress is not None:
                    self._progress(self._n_done, check.n_bytes)
        chunks = [text for text in (*check.lost, *check.rotten) if "@" not in text]
        for text in chunks if self._others else ():
            if await self._repair(Digest.parse(text), needed[Digest.parse(text)]):
                check.repaired.append(text)
        return check

    async def _check_model(self, model: str, check: RegistryCheck, needed: dict[Digest, int]) -> None:
        registry = self._registry
        revisions = {digest for digest, _ in await registry.revisions(model)}
        for digest in revisions:
            check.n_revisions += 1
            try:
                published = await registry.revision(model, digest)
            except (FormatError, IntegrityError, ModelNotFoundError) as exc:
                check.rotten.append(f"{model}@{digest}")
                repaired = await self._repair_revision(model, digest)
                if repaired is None:
                    check.problems.append(f"{model}@{digest}: {exc}")
                    continue
                check.repaired.append(f"{model}@{digest}")
                published = repaired
            self._rule(f"model {model}", published.policy)
            _need(published, needed)
        try:
            tags = await registry.tags(model)
        except FormatError as exc:
            check.problems.append(str(exc))
            return
        for tag in tags:
            check.n_tags += 1
            if tag.revision not in revisions:
                check.problems.append(f"tag {tag.name} of {model} names {tag.revision}, which is not there")

    async def _is_sound(self, origin: Resilient, digest: Digest, nbytes: int) -> bool:
        memory = self._free.pop() if self._free else memoryview(allocate(CHUNK_LIMIT_NBYTES))
        try:
            view = memory[:nbytes]
            await origin.read_into(Stat(chunk_name(digest.hex), nbytes, ""), 0, [view])
            return await self._threads.on_worker(Digest.of, view) == digest
        except ModelNotFoundError:
            return False
        finally:
            self._free.append(memory)

    async def _repair_revision(self, model: str, revision: Digest) -> Published | None:
        """Write a revision anew from the first registry that has it; return it, if one did."""
        for other in self._others:
            try:
                published = await Registry(other).revision(model, revision)
            except (OriginError, ModelNotFoundError, FormatError, IntegrityError):
                continue
            await self._registry.origin.put(revision_name(model, revision), published.raw)
            return published
        return None

    async def _repair(self, digest: Digest, nbytes: int) -> bool:
        """Write a chunk anew from the first registry that has it; tell whether one did."""
        memory = memoryview(allocate(nbytes))
        for other in self._others:
            try:
                await other.read_into(Stat(chunk_name(digest.hex), nbytes, ""), 0, [memory])
            except OriginError:
                continue
            except ModelNotFoundError:
                continue
            if await self._threads.on_worker(Digest.of, memory) == digest:
                await self._registry.origin.put(chunk_name(digest.hex), memory)
                return True
        return False


def _need(published: Published, needed: dict[Digest, int]) -> None:
    for shard in published.manifest.shards:
        needed.update((chunk.digest, chunk.nbytes) for chunk in shard.chunks if chunk.digest is not None)
