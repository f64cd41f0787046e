"""Own what every tier must do; a tier's tests inherit it.

Never knows where a tier keeps its chunks.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable

import pytest

from weightcache.digest import Digest, checksum
from weightcache.tiers.base import Tier

SIZES = (1, 4095, 4096, 4097, (1 << 20) + 3, 16 << 20)
N_THREADS = 8


def content_of(nbytes: int, seed: int = 0) -> bytes:
    """Return random bytes, the same for the same arguments."""
    return random.Random(nbytes * 1000 + seed).randbytes(nbytes)


def put(tier: Tier, content: bytes) -> Digest:
    """Write a chunk, which must succeed."""
    digest = Digest.of(content)
    assert tier.write(digest, checksum(content), memoryview(content)) is True
    return digest


def read(tier: Tier, digest: Digest, nbytes: int) -> bytes | None:
    """Return a chunk's bytes, or None for a miss."""
    target = bytearray(nbytes)
    return bytes(target) if tier.read_into(digest, memoryview(target)) else None


def run_at_once(work: Iterable[threading.Thread]) -> None:
    """Start threads and wait for all of them."""
    threads = list(work)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class TierContract:
    """A subclass gives the fixture `tier`: an empty one, with room for 64 MiB."""

    @pytest.mark.parametrize("nbytes", SIZES)
    def test_a_chunk_reads_back_as_it_was_written(self, tier: Tier, nbytes: int) -> None:
        content = content_of(nbytes)
        digest = put(tier, content)
        assert tier.look([digest]) == {digest}
        assert read(tier, digest, nbytes) == content

    def test_an_unknown_chunk_is_a_miss(self, tier: Tier) -> None:
        put(tier, b"there")
        digest = Digest.of(b"elsewhere")
        assert tier.look([digest]) == set()
        assert read(tier, digest, 9) is None

    def test_look_shows_what_is_there_and_nothing_else(self, tier: Tier) -> None:
        there = {put(tier, content_of(100, seed)) for seed in range(5)}
        absent = {Digest.of(content_of(101, seed)) for seed in range(5)}
        assert tier.look([]) == set()
        assert tier.look([*there, *absent, *there]) == there

    def test_g01_content_that_was_written_into_is_refused(self, tier: Tier) -> None:
        content = bytearray(content_of(5000))
        digest, expected = Digest.of(content), checksum(content)
        content[17] ^= 1
        assert tier.write(digest, expected, memoryview(content)) is False
        assert tier.look([digest]) == set()
        assert read(tier, digest, 5000) is None
        content[17] ^= 1
        assert tier.write(digest, expected, memoryview(content)) is True
        assert read(tier, digest, 5000) == bytes(content)

    def test_content_changed_after_it_was_written_does_not_change_the_chunk(self, tier: Tier) -> None:
        content = bytearray(content_of(5000))
        expected = bytes(content)
        digest = Digest.of(content)
        assert tier.write(digest, checksum(content), memoryview(content))
        content[:] = bytes(5000)
        assert read(tier, digest, 5000) == expected

    def test_rewriting_is_no_error(self, tier: Tier) -> None:
        content = content_of(10_000)
        digest = put(tier, content)
        assert put(tier, content) == digest
        assert read(tier, digest, 10_000) == content

    def test_drop_forgets_a_chunk(self, tier: Tier) -> None:
        content = content_of(3000)
        digest, other = put(tier, content), put(tier, content_of(3001))
        tier.drop(digest)
        assert tier.look([digest, other]) == {other}
        assert read(tier, digest, 3000) is None
        tier.drop(digest)
        put(tier, content)
        assert read(tier, digest, 3000) == content

    def test_dropping_what_is_not_there_is_no_error(self, tier: Tier) -> None:
        tier.drop(Digest.of(b"nowhere"))

    def test_threads_that_write_one_chunk_leave_one_sound_chunk(self, tier: Tier) -> None:
        content = content_of(200_000)
        digest = Digest.of(content)
        gate = threading.Barrier(N_THREADS)
        stored: list[bool] = []

        def write() -> None:
            gate.wait()
            stored.append(tier.write(digest, checksum(content), memoryview(content)))

        run_at_once(threading.Thread(target=write) for _ in range(N_THREADS))
        assert stored == [True] * N_THREADS
        assert read(tier, digest, len(content)) == content

    def test_threads_that_write_read_and_drop_see_whole_chunks_or_none(self, tier: Tier) -> None:
        contents = [content_of(50_000, seed) for seed in range(4)]
        gate = threading.Barrier(N_THREADS)
        wrong: list[object] = []

        def work(number: int) -> None:
            choose = random.Random(number)
            gate.wait()
            for _ in range(30):
                content = choose.choice(contents)
                digest = Digest.of(content)
                if choose.random() < 0.3:
                    tier.drop(digest)
                elif choose.random() < 0.5:
                    tier.write(digest, checksum(content), memoryview(content))
                elif read(tier, digest, len(content)) not in (None, content):
                    wrong.append(digest)

        run_at_once(threading.Thread(target=work, args=(number,)) for number in range(N_THREADS))
        assert wrong == []
        for content in contents:
            assert read(tier, put(tier, content), len(content)) == content
