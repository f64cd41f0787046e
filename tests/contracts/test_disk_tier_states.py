"""The disk tier beside a dict: whatever is done in whatever order, no wrong byte, and the budget holds."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from cache_folder import chunk_files, flip_byte, occupied_bytes, staged_files
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tier_contract import content_of, read

from weightcache.digest import Digest, checksum
from weightcache.layout import pages
from weightcache.locks import Lease
from weightcache.manifest import Chunk, Role, Shard
from weightcache.tiers.disk import DiskTier
from weightcache.tiers.records import ModelRecord

CONTENTS = {Digest.of(content): content for content in (content_of(1 + 3000 * number) for number in range(8))}
DIGESTS = sorted(CONTENTS)
# Neighbours share chunks, as a fine-tune does with its base; the last chunk is of no model.
MODELS = {f"m{number}": tuple(DIGESTS[number * 2 : number * 2 + 3]) for number in range(3)}
ALL_NBYTES = sum(pages(len(content)) for content in CONTENTS.values())

MEMORY = Path("/dev/shm")  # thousands of syncs, of which none matters here

digests = st.sampled_from(DIGESTS)
models = st.sampled_from(sorted(MODELS))


class DiskTierBesideADict(RuleBasedStateMachine):
    """`there` holds what must be in the tier unless an eviction was allowed to take it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="tier-", dir=MEMORY if MEMORY.is_dir() else None))
        self.there: set[Digest] = set()
        self.remembered: set[str] = set()
        self.pinned: set[str] = set()
        self.leases: dict[str, list[Lease]] = {}
        self.clock_s = 1000.0

    @initialize(share=st.sampled_from([0.2, 0.4, 0.7, 1.0]))
    def open(self, share: float) -> None:
        self.budget_bytes = int(share * ALL_NBYTES)
        self.tier = DiskTier(self.folder / "cache", self.budget_bytes)

    def held(self) -> set[Digest]:
        """Return the chunks of models that are leased or pinned."""
        keys = (self.pinned | {key for key, leases in self.leases.items() if leases}) & self.remembered
        return {digest for key in keys for digest in MODELS[key]}

    def forget_what_was_evicted(self) -> None:
        """Eviction may take models that nobody holds, whole, and chunks of no model; nothing else."""
        left = {record.key for record in self.tier.records.models()}
        evicted = self.remembered - left
        assert not evicted & {key for key in evicted if self.leases.get(key) or key in self.pinned}
        self.remembered = left
        self.pinned &= left
        owned = {digest for key in left for digest in MODELS[key]}
        found = self.tier.look(self.there)
        assert self.there & owned <= found
        self.there = found

    @rule(digest=digests)
    def write(self, digest: Digest) -> None:
        content = CONTENTS[digest]
        stored = self.tier.write(digest, checksum(content), memoryview(content))
        self.forget_what_was_evicted()
        needed = sum(pages(len(CONTENTS[each])) for each in (self.held() & self.there) | {digest})
        assert stored or needed > self.budget_bytes
        if stored:
            self.there.add(digest)

    @rule(digest=digests)
    def write_what_changed_meanwhile(self, digest: Digest) -> None:
        there = digest in self.there
        stored = self.tier.write(digest, checksum(CONTENTS[digest]) ^ 1, memoryview(CONTENTS[digest]))
        self.forget_what_was_evicted()
        assert stored == there

    @rule(digest=digests)
    def read(self, digest: Digest) -> None:
        expected = CONTENTS[digest] if digest in self.there else None
        assert read(self.tier, digest, len(CONTENTS[digest])) == expected

    @rule(digest=digests)
    def drop(self, digest: Digest) -> None:
        self.tier.drop(digest)
        self.there.discard(digest)

    @precondition(lambda self: self.there)
    @rule(data=st.data(), nbytes=st.none() | st.integers(0, 5000))
    def rot(self, data: st.DataObject, nbytes: int | None) -> None:
        digest = data.draw(st.sampled_from(sorted(self.there)))
        path = chunk_files(self.tier.root)[digest.hex]
        if nbytes is None:
            flip_byte(path, 0)
        elif nbytes < len(CONTENTS[digest]):
            path.write_bytes(CONTENTS[digest][:nbytes])
        else:
            path.unlink()
        assert read(self.tier, digest, len(CONTENTS[digest])) is None
        self.there.discard(digest)

    @rule(key=models)
    def remember(self, key: str) -> None:
        chunks, at = [], 0
        for digest in MODELS[key]:
            chunks.append(Chunk(at, len(CONTENTS[digest]), digest))
            at = chunks[-1].stop
        shard_key = Digest.of(key.encode()).hex[:32]
        self.tier.records.remember_shard(shard_key, Shard("model", at, key, Role.WEIGHTS, tuple(chunks)))
        self.tier.records.remember_model(ModelRecord(key, f"s3://bucket/{key}", "", ((shard_key, "model", ""),)))
        self.remembered.add(key)

    @rule(key=models)
    def use(self, key: str) -> None:
        self.clock_s += 1
        self.tier.note_use(key, self.clock_s)

    @precondition(lambda self: self.remembered)
    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.remembered)))
        self.tier.records.pin(key, pinned=pinned)
        (self.pinned.add if pinned else self.pinned.discard)(key)

    @rule(key=models)
    def lease(self, key: str) -> None:
        self.leases.setdefault(key, []).append(self.tier.lease(key))

    @rule(key=models)
    def release(self, key: str) -> None:
        if self.leases.get(key):
            self.leases[key].pop().release()

    @rule(key=models)
    def evict(self, key: str) -> None:
        before = occupied_bytes(self.tier.root)
        freed = self.tier.evict([key])
        assert freed == before - occupied_bytes(self.tier.root)
        if key in self.remembered:
            kept = {digest for other in self.remembered - {key} for digest in MODELS[other]}
            self.there -= set(MODELS[key]) - kept
        self.remembered.discard(key)
        self.pinned.discard(key)

    @rule(rebuilt=st.booleans())
    def reopen(self, rebuilt: bool) -> None:
        self.tier.close()
        if rebuilt:
            shutil.rmtree(self.folder / "cache" / "catalogue")
            # The size of a chunk that no model names is not known: it is fetched again.
            self.there &= {digest for key in self.remembered for digest in MODELS[key]}
        self.tier = DiskTier(self.folder / "cache", self.budget_bytes)

    @invariant()
    def only_what_is_there_is_shown(self) -> None:
        if hasattr(self, "tier"):
            assert self.tier.look(DIGESTS) == self.there

    @invariant()
    def the_budget_holds_and_is_counted_right(self) -> None:
        if hasattr(self, "tier"):
            assert occupied_bytes(self.tier.root) == self.tier.used_bytes() <= self.budget_bytes
            assert staged_files(self.tier.root) == []

    @invariant()
    def leases_are_seen(self) -> None:
        if hasattr(self, "tier"):
            assert self.tier.leased() == {key for key, leases in self.leases.items() if leases}

    def teardown(self) -> None:
        for leases in self.leases.values():
            for lease in leases:
                lease.release()
        if hasattr(self, "tier"):
            self.tier.close()
        shutil.rmtree(self.folder)


TestDiskTierBesideADict = DiskTierBesideADict.TestCase
TestDiskTierBesideADict.settings = settings(
    max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
