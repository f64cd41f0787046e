"""The plan: every chunk moves once, from where it is, in ranges that are contiguous and bounded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, manifests

from weightcache.digest import Digest
from weightcache.layout import ChunkKey
from weightcache.manifest import Chunk, Manifest, Role, Shard
from weightcache.planning import Fetch, Plan, make_plan

LIMIT = 64
RANGES = st.one_of(st.integers(1, 5 * LIMIT), st.sampled_from([LIMIT, 2 * LIMIT, 3 * LIMIT]))


@dataclass(frozen=True)
class Wish:
    """What a plan is made of."""

    manifest: Manifest
    keys: tuple[ChunkKey, ...]
    stored: frozenset[Digest]
    range_bytes: int

    def plan(self) -> Plan:
        return make_plan(self.manifest, self.keys, self.stored, self.range_bytes)


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    """Draw a model some of whose digests are known and stored, and a shuffled choice of its chunks."""
    plain = draw(manifests(LIMIT))
    digest = st.integers(0, 9).map(lambda number: Digest(f"{number:064x}"))
    shards = [
        shard.with_digests(draw(st.dictionaries(st.integers(0, len(shard.chunks)), digest))) for shard in plain.shards
    ]
    manifest = Manifest.plain(shards)
    keys = [(i, j) for i, shard in enumerate(manifest.shards) for j in range(len(shard.chunks))]
    chosen = draw(st.lists(st.sampled_from(keys), unique=True)) if keys else []
    return Wish(manifest, tuple(chosen), draw(st.frozensets(digest)), draw(RANGES))


def fits(wish: Wish, fetch: Fetch, following: Fetch) -> bool:
    """Tell whether two fetches could have been one."""
    adjacent = fetch.shard == following.shard and fetch.stop == following.start
    first = following.keys[0]
    joined = wish.manifest.shards[first[0]].chunks[first[1]].stop - fetch.start
    return adjacent and joined <= wish.range_bytes


@examples
@given(wishes())
def test_every_wanted_chunk_is_in_exactly_one_step(wish: Wish) -> None:
    plan = wish.plan()
    planned = [step.key for step in plan.reads] + [key for step in plan.fetches for key in step.keys]
    assert sorted(planned) == sorted(wish.keys)


@examples
@given(wishes())
def test_chunk_is_read_exactly_when_it_is_stored(wish: Wish) -> None:
    for step in wish.plan().reads:
        chunk = wish.manifest.shards[step.key[0]].chunks[step.key[1]]
        assert (step.digest, step.nbytes) == (chunk.digest, chunk.nbytes)
        assert step.digest in wish.stored
    for step in wish.plan().fetches:
        digests = {wish.manifest.shards[shard].chunks[chunk].digest for shard, chunk in step.keys}
        assert digests & wish.stored == set()


@examples
@given(wishes())
def test_fetch_is_one_range_of_one_file(wish: Wish) -> None:
    for step in wish.plan().fetches:
        pieces = [wish.manifest.shards[step.shard].chunks[chunk] for _, chunk in step.keys]
        assert {shard for shard, _ in step.keys} == {step.shard}
        assert (step.start, step.stop) == (pieces[0].start, pieces[-1].stop)
        assert all(a.stop == b.start for a, b in pairwise(pieces))


@examples
@given(wishes())
def test_fetch_passes_the_largest_range_only_for_a_single_chunk(wish: Wish) -> None:
    assert all(step.nbytes <= wish.range_bytes or len(step.keys) == 1 for step in wish.plan().fetches)


@examples
@given(wishes())
def test_neighbours_that_fit_one_range_are_one_fetch(wish: Wish) -> None:
    fetches = wish.plan().fetches
    assert not any(fits(wish, *pair) for pair in pairwise(fetches))


@examples
@given(wishes())
def test_steps_are_in_file_order_small_files_first_and_add_up(wish: Wish) -> None:
    plan = wish.plan()
    reads = [step.key for step in plan.reads]
    fetches = [step.keys[0] for step in plan.fetches]
    is_large = [shard.role is not Role.FILE for shard in wish.manifest.shards]  # small files come first
    assert reads == sorted(reads, key=lambda key: (is_large[key[0]], key))
    assert fetches == sorted(fetches, key=lambda key: (is_large[key[0]], key))
    wanted = sum(wish.manifest.shards[shard].chunks[chunk].nbytes for shard, chunk in wish.keys)
    assert plan.disk_nbytes + plan.origin_nbytes == wanted


@examples
@given(wishes(), st.randoms())
def test_plan_does_not_depend_on_the_order_of_the_wish(wish: Wish, random: st.randoms) -> None:
    shuffled = random.sample(wish.keys, len(wish.keys))
    assert make_plan(wish.manifest, shuffled, wish.stored, wish.range_bytes) == wish.plan()


def test_neighbours_of_two_files_are_two_fetches() -> None:
    chunks = (Chunk(0, 5), Chunk(5, 5))
    manifest = Manifest.plain([Shard(path, 10, "1", Role.FILE, chunks) for path in ("a", "b")])
    assert make_plan(manifest, [(0, 0), (1, 1)], set(), 100).fetches == (
        Fetch(0, 0, 5, ((0, 0),)),
        Fetch(1, 5, 10, ((1, 1),)),
    )


def test_range_may_be_exactly_the_largest() -> None:
    manifest = Manifest.plain([Shard("a", 10, "1", Role.FILE, (Chunk(0, 5), Chunk(5, 5)))])
    keys = [(0, 0), (0, 1)]
    assert [len(make_plan(manifest, keys, set(), nbytes).fetches) for nbytes in (9, 10)] == [2, 1]
