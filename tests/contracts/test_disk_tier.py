"""The disk tier keeps the tier contract, and what only a tier of files can promise."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_folder import chunk_files, flip_byte, occupied_bytes, open_below, staged_files
from children import Child
from tier_contract import TierContract, content_of, put, read, run_at_once

from weightcache.digest import Digest, checksum
from weightcache.layout import pages
from weightcache.locks import Lease, exclusive
from weightcache.manifest import Chunk, Role, Shard
from weightcache.measurements import Measurements
from weightcache.tiers.catalogue import CatalogueDamagedError
from weightcache.tiers.disk import N_QUARANTINED, DiskTier
from weightcache.tiers.records import ModelRecord

ROOM_NBYTES = 64 << 20
DAY_S = 86400.0
WRITERS = Path(__file__).with_name("writers.py")


class TestDiskTier(TierContract):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[DiskTier]:
        disk = DiskTier(tmp_path / "cache", ROOM_NBYTES)
        yield disk
        assert disk.used_bytes() == occupied_bytes(disk.root)
        assert staged_files(disk.root) == []
        disk.close()


@pytest.fixture
def open_tier(tmp_path: Path) -> Iterator[Callable[..., DiskTier]]:
    """Open the cache folder as another process would; closed at the end: `open_tier(budget_bytes)`."""
    opened: list[DiskTier] = []

    def open_one(budget_bytes: int = ROOM_NBYTES) -> DiskTier:
        opened.append(DiskTier(tmp_path / "cache", budget_bytes))
        return opened[-1]

    yield open_one
    for disk in opened:
        disk.close()


@pytest.fixture
def tier(open_tier: Callable[..., DiskTier]) -> DiskTier:
    return open_tier()


def remember(tier: DiskTier, key: str, contents: list[bytes]) -> str:
    """Record a model of one shard whose chunks have these contents; return its key."""
    chunks, at = [], 0
    for content in contents:
        chunks.append(Chunk(at, len(content), Digest.of(content)))
        at += len(content)
    shard_key = Digest.of(key.encode()).hex[:32]
    tier.records.remember_shard(shard_key, Shard("model.safetensors", at, key, Role.WEIGHTS, tuple(chunks)))
    tier.records.remember_model(ModelRecord(key, f"s3://bucket/{key}", "", ((shard_key, "model.safetensors", ""),)))
    return key


# -- files


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097])
def test_chunk_files_are_padded_to_4_kib_with_zeros(tier: DiskTier, nbytes: int) -> None:
    content = content_of(nbytes)
    digest = put(tier, content)
    assert chunk_files(tier.root)[digest.hex].read_bytes() == content + bytes(pages(nbytes) - nbytes)
    assert tier.used_bytes() == pages(nbytes)


def test_padding_holds_nothing_of_the_chunk_before(tier: DiskTier) -> None:
    put(tier, b"\xff" * 8192)
    digest = put(tier, b"short")
    assert chunk_files(tier.root)[digest.hex].read_bytes() == b"short" + bytes(4091)


def test_g24_files_are_0600_and_folders_0700(open_tier: Callable[..., DiskTier]) -> None:
    before = os.umask(0)
    try:
        tier = open_tier()
        put(tier, b"chunk")
        lease = tier.lease(remember(tier, "model", [b"chunk"]))
        tier.records.pin("model", pinned=True)
        tier.flight().close()
        tier.make_room()
        found = [tier.root, *tier.root.rglob("*")]
        modes = {str(path.relative_to(tier.root)): path.lstat().st_mode & 0o777 for path in found}
        wrong = {name: oct(mode) for name, mode in modes.items() if mode not in (0o600, 0o700)}
        lease.release()
    finally:
        os.umask(before)
    assert wrong == {}


def test_close_leaves_nothing_open_in_any_thread(open_tier: Callable[..., DiskTier]) -> None:
    gc.disable()
    try:
        tier = open_tier()
        gate = threading.Barrier(4)

        def work(number: int) -> None:
            put(tier, content_of(1000, number))
            gate.wait()

        run_at_once(threading.Thread(target=work, args=(number,)) for number in range(4))
        assert open_below(tier.root)
        tier.close()
        assert open_below(tier.root) == []
    finally:
        gc.enable()


def test_a_tier_that_is_dropped_leaves_nothing_open(tmp_path: Path) -> None:
    gc.disable()
    try:
        tier = DiskTier(tmp_path / "cache", ROOM_NBYTES)
        put(tier, b"chunk")
        del tier
        assert open_below(tmp_path) == []
    finally:
        gc.enable()


def test_chunks_survive_reopening(open_tier: Callable[..., DiskTier]) -> None:
    digest = put(open_tier(), content_of(5000))
    again = open_tier()
    assert again.look([digest]) == {digest}
    assert read(again, digest, 5000) == content_of(5000)


def test_g03_a_chunk_is_synced_before_the_catalogue_shows_it(
    tier: DiskTier, open_tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = content_of(5000)
    digest = Digest.of(content)
    target = tier.root / "chunks" / digest.hex[:2] / digest.hex
    other = open_tier()
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watch(step: str) -> None:
        assert other.look([digest]) == set()
        steps.append(step)

    def watched_fsync(fd: int) -> None:
        fsync(fd)
        path = Path(f"/proc/self/fd/{fd}").readlink()
        watch("file synced" if path.parent.name == "staging" else f"{path.name} synced")

    def watched_rename(source: Path, destination: Path) -> None:
        rename(source, destination)
        steps.append(f"renamed to {Path(destination).name}")  # in a transaction: nobody can look

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched_fsync)
        patch.setattr(os, "rename", watched_rename)
        assert tier.write(digest, checksum(content), memoryview(content))
    assert steps == ["file synced", f"renamed to {digest.hex}", f"{target.parent.name} synced"]
    assert other.look([digest]) == {digest}


# -- rot and loss


def test_g04_a_rotten_chunk_is_set_aside_and_missed(tier: DiskTier) -> None:
    content = content_of(10_000)
    digest, other = put(tier, content), put(tier, content_of(9999))
    flip_byte(chunk_files(tier.root)[digest.hex])
    assert read(tier, digest, 10_000) is None
    assert tier.look([digest, other]) == {other}
    assert sorted(chunk_files(tier.root)) == [other.hex]
    assert [path.name for path in (tier.root / "quarantine").iterdir()] == [digest.hex]
    assert tier.used_bytes() == occupied_bytes(tier.root)
    assert read(tier, put(tier, content), 10_000) == content


def test_g04_rot_is_found_where_only_the_digest_is_known(tier: DiskTier, open_tier: Callable[..., DiskTier]) -> None:
    sound, rotten = content_of(10_000, 1), content_of(10_000, 2)
    remember(tier, "model", [sound, rotten])
    put(tier, sound)
    put(tier, rotten)
    flip_byte(chunk_files(tier.root)[Digest.of(rotten).hex])
    tier.close()
    shutil.rmtree(tier.root / "catalogue")
    again = open_tier()
    assert again.look([Digest.of(sound), Digest.of(rotten)]) == {Digest.of(sound), Digest.of(rotten)}
    assert read(again, Digest.of(rotten), 10_000) is None
    assert read(again, Digest.of(sound), 10_000) == sound
    assert again.look([Digest.of(sound), Digest.of(rotten)]) == {Digest.of(sound)}


def test_rot_in_the_padding_harms_nobody(tier: DiskTier) -> None:
    content = content_of(5000)
    digest = put(tier, content)
    flip_byte(chunk_files(tier.root)[digest.hex], 8191)
    assert read(tier, digest, 5000) == content


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 9999])
def test_g04_a_truncated_chunk_is_set_aside_and_missed(tier: DiskTier, nbytes: int) -> None:
    digest = put(tier, content_of(10_000))
    os.truncate(chunk_files(tier.root)[digest.hex], nbytes)
    assert read(tier, digest, 10_000) is None
    assert tier.look([digest]) == set()
    assert tier.used_bytes() == occupied_bytes(tier.root) == 0


def test_g04_a_lost_file_is_a_miss_and_can_be_written_again(tier: DiskTier) -> None:
    content = content_of(10_000)
    digest = put(tier, content)
    chunk_files(tier.root)[digest.hex].unlink()
    assert read(tier, digest, 10_000) is None
    assert tier.look([digest]) == set()
    assert tier.used_bytes() == 0
    assert read(tier, put(tier, content), 10_000) == content
    assert tier.used_bytes() == occupied_bytes(tier.root)


def test_a_lost_file_is_written_again_before_anybody_missed_it(tier: DiskTier) -> None:
    content = content_of(10_000)
    digest = put(tier, content)
    chunk_files(tier.root)[digest.hex].unlink()
    assert read(tier, put(tier, content), 10_000) == content
    assert tier.used_bytes() == occupied_bytes(tier.root)


def test_quarantine_keeps_the_newest_few(tier: DiskTier) -> None:
    digests = []
    for seed in range(N_QUARANTINED + 3):
        digests.append(put(tier, content_of(100, seed)))
        flip_byte(chunk_files(tier.root)[digests[-1].hex], 50)
        assert read(tier, digests[-1], 100) is None
    kept = {path.name for path in (tier.root / "quarantine").iterdir()}
    assert len(kept) == N_QUARANTINED
    assert digests[-1].hex in kept


def test_g12_who_opened_a_chunk_reads_on_while_it_is_dropped(tier: DiskTier) -> None:
    content = content_of(10_000)
    digest = put(tier, content)
    with chunk_files(tier.root)[digest.hex].open("rb") as reader:
        assert reader.read(5000) == content[:5000]
        tier.drop(digest)
        assert reader.read(5000) == content[5000:]


# -- many writers


def test_processes_that_write_the_same_chunks_leave_each_once(tier: DiskTier) -> None:
    with Child(WRITERS, tier.root, ROOM_NBYTES) as writers:
        assert writers.hear() == [True] * 4
        assert writers.wait() == 0
    contents = [content_of(100_000 + seed, seed) for seed in range(6)]
    assert set(chunk_files(tier.root)) == {Digest.of(content).hex for content in contents}
    for content in contents:
        assert read(tier, Digest.of(content), len(content)) == content
    # Who opens the tier while others write may count a file twice, staged and published; never less than there is.
    assert tier.used_bytes() >= occupied_bytes(tier.root)
    assert tier.make_room()
    assert tier.used_bytes() == occupied_bytes(tier.root)
    assert staged_files(tier.root) == []


def test_g13_the_budget_holds_while_processes_write(tier: DiskTier) -> None:
    budget_bytes = 3 * pages(100_005)
    most_bytes = 0
    with Child(WRITERS, tier.root, budget_bytes) as writers:
        while not writers.has_ended():
            with exclusive(tier.root / "evict.lock"):  # nothing leaves while it is counted
                most_bytes = max(most_bytes, occupied_bytes(tier.root))
        assert len(writers.hear()) == 4
    assert 0 < most_bytes <= budget_bytes
    assert occupied_bytes(tier.root) <= tier.used_bytes() <= budget_bytes
    for digest in map(Digest, chunk_files(tier.root)):
        [seed] = [seed for seed in range(6) if Digest.of(content_of(100_000 + seed, seed)) == digest]
        assert read(tier, digest, 100_000 + seed) in (None, content_of(100_000 + seed, seed))


def test_g13_litter_of_dead_writers_is_swept_and_work_is_not(
    tier: DiskTier, open_tier: Callable[..., DiskTier]
) -> None:
    (tier.root / "staging" / "dead.staged").write_bytes(b"half a chunk")
    with (tier.root / "staging" / "live.staged").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        open_tier()
        assert [path.name for path in staged_files(tier.root)] == ["live.staged"]
    open_tier()
    assert staged_files(tier.root) == []


@pytest.mark.parametrize("hold", ["a staged file", "a lease"])
def test_opening_a_tier_spares_what_another_is_about_to_lock(
    tier: DiskTier, open_tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch, hold: str
) -> None:
    """Between a file's creation and its lock, whoever sweeps takes it for litter."""
    flock, others = fcntl.flock, [open_tier]

    def late_flock(fd: int, operation: int) -> None:
        if others:
            others.pop()().leased()
        flock(fd, operation)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late_flock)
        if hold == "a staged file":
            digest = put(tier, content_of(1000))
        else:
            lease = tier.lease("model")
    if hold == "a staged file":
        assert read(tier, digest, 1000) == content_of(1000)
    else:
        assert tier.leased() == {"model"}
        lease.release()


@pytest.mark.parametrize("when", ["before it is entered", "once it is entered"])
@pytest.mark.parametrize("how", ["dropped", "set aside"])
def test_g13_a_chunk_that_is_taken_from_under_its_writer_is_counted_right(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, when: str, how: str
) -> None:
    content = content_of(50_000)
    take = tier.drop if how == "dropped" else tier.quarantine
    enter = tier._enter

    def entered(digest: Digest, *rest: Any) -> bool:
        if when == "before it is entered":
            take(digest)
        new = enter(digest, *rest)
        if when == "once it is entered":
            take(digest)
        return new

    with monkeypatch.context() as patch:
        patch.setattr(tier, "_enter", entered)
        digest = put(tier, content)
    assert tier.look([digest]) == ({digest} if when == "before it is entered" else set())
    assert tier.used_bytes() == occupied_bytes(tier.root)
    assert read(tier, put(tier, content), 50_000) == content
    assert tier.used_bytes() == occupied_bytes(tier.root)


@pytest.mark.parametrize("step", ["the folder's sync", "its entry"])
def test_g13_a_chunk_whose_writer_failed_once_it_had_its_name_stays_counted(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_: object) -> bool:
        raise OSError(errno.EIO, "injected")

    content = content_of(50_000)
    put(tier, content_of(40_000))
    with monkeypatch.context() as patch:
        if step == "its entry":
            patch.setattr(tier, "_enter", fail)
        else:
            patch.setattr("weightcache.files.sync_folder", fail)
        with pytest.raises(OSError, match="injected"):
            put(tier, content)
    assert tier.used_bytes() == occupied_bytes(tier.root)
    assert tier.look([Digest.of(content)]) == set()
    assert read(tier, put(tier, content), 50_000) == content
    assert tier.used_bytes() == occupied_bytes(tier.root)


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "folder"])
def test_g04_what_is_no_file_is_set_aside_and_missed(tier: DiskTier, tmp_path: Path, kind: str) -> None:
    content = content_of(5000)
    digest = put(tier, content)
    path = chunk_files(tier.root)[digest.hex]
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "elsewhere").write_bytes(content if kind == "link" else b"")
        path.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    assert read(tier, digest, 5000) is None
    assert tier.look([digest]) == set()
    assert read(tier, put(tier, content), 5000) == content
    assert tier.used_bytes() == occupied_bytes(tier.root)


# -- holds and budget


def test_g12_a_lease_is_seen_by_other_tiers_until_it_is_released(
    tier: DiskTier, open_tier: Callable[..., DiskTier]
) -> None:
    lease = tier.lease("model")
    assert open_tier().leased() == {"model"}
    lease.release()
    lease.release()
    assert tier.leased() == set()
    assert list((tier.root / "leases").iterdir()) == []


def test_two_leases_of_one_model_end_one_by_one(tier: DiskTier) -> None:
    first, second = tier.lease("model"), Lease(tier.root / "leases", "model")
    first.release()
    assert tier.leased() == {"model"}
    second.release()
    assert tier.leased() == set()


def test_g16_a_forked_child_that_lets_go_leaves_its_parents_lease(tier: DiskTier) -> None:
    lease = tier.lease("model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of forking beside threads
        pid = os.fork()
    if pid == 0:
        try:
            lease.release()
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert tier.leased() == {"model"}
    lease.release()
    assert tier.leased() == set()


def test_g13_chunks_of_no_model_are_the_first_to_go(open_tier: Callable[..., DiskTier]) -> None:
    tier = open_tier(5 * 40960)
    kept, new = [content_of(40960, seed) for seed in range(2)], content_of(40960, 2)
    remember(tier, "kept", kept)
    remember(tier, "new", [new])
    for content in (*kept, *(content_of(40960, 10 + seed) for seed in range(3)), new):
        put(tier, content)
    assert set(chunk_files(tier.root)) == {Digest.of(content).hex for content in (*kept, new)}
    assert tier.used_bytes() == occupied_bytes(tier.root)


def test_g13_a_write_past_the_budget_evicts_the_least_recently_used(open_tier: Callable[..., DiskTier]) -> None:
    tier = open_tier(4 * 40960)
    contents = {key: content_of(40960, seed) for seed, key in enumerate(("old", "older", "newer"))}
    for key, used_s in (("old", 2000.0), ("older", 1000.0), ("newer", 3000.0)):
        put(tier, contents[key])
        tier.records.touch(remember(tier, key, [contents[key]]), used_s)
    new = [content_of(40960, 10 + seed) for seed in range(2)]
    remember(tier, "new", new)
    put(tier, new[0])
    assert len(list(tier.records.models())) == 4
    put(tier, new[1])  # down to the low watermark
    assert [record.key for record in tier.records.models()] == ["new", "newer"]
    assert set(chunk_files(tier.root)) == {Digest.of(content).hex for content in (contents["newer"], *new)}
    assert tier.used_bytes() == occupied_bytes(tier.root)


def fill(tier: DiskTier, key: str, seed: int, *used_s: float) -> None:
    """Bring a model of one chunk of its own, and note uses of it."""
    content = content_of(40960, seed)
    put(tier, content)
    remember(tier, key, [content])
    tier.records.touch(key, used_s[0] if used_s else time.time())
    for at_s in used_s:
        tier.note_use(key, at_s)


def keys(tier: DiskTier) -> set[str]:
    return {record.key for record in tier.records.models()}


def test_models_used_once_do_not_displace_one_that_is_used_again(open_tier: Callable[..., DiskTier]) -> None:
    tier = open_tier(4 * 40960)
    now_s = time.time()
    fill(tier, "daily", 0, now_s - 2 * DAY_S, now_s - DAY_S)
    for number in range(1, 8):
        fill(tier, f"scan{number}", number, now_s - 600 + number)
    assert "daily" in keys(tier)
    assert "scan1" not in keys(tier)


def test_uses_are_remembered_of_a_model_that_was_evicted(open_tier: Callable[..., DiskTier]) -> None:
    tier, other = open_tier(4 * 40960), open_tier(4 * 40960)
    now_s = time.time()
    fill(tier, "again", 0, now_s - 2 * DAY_S)
    for number in range(1, 5):
        fill(tier, f"scan{number}", number, now_s - DAY_S + number)
    assert "again" not in keys(tier)
    fill(other, "again", 0, now_s - 3600)
    for number in range(5, 12):
        fill(tier, f"scan{number}", number, now_s - 600 + number)
    assert "again" in keys(tier)


def test_the_last_use_counts_in_a_cache_that_knows_no_others(open_tier: Callable[..., DiskTier]) -> None:
    tier = open_tier(4 * 40960)
    now_s = time.time()
    for number, key in enumerate(("old", "oldest", "daily")):
        fill(tier, key, number)
    for key, age_s in (("old", 2 * DAY_S), ("oldest", 3 * DAY_S), ("daily", DAY_S)):
        tier.records.touch(key, now_s - age_s)
    tier.note_use("old", now_s)  # twice used from now on
    fill(tier, "new", 3, now_s)
    fill(tier, "newer", 4, now_s)
    assert {"oldest", "daily"}.isdisjoint(keys(tier))
    assert "old" in keys(tier)


def test_the_model_from_the_slower_place_stays(open_tier: Callable[..., DiskTier]) -> None:
    tier = open_tier(4 * 40960)
    measurements = Measurements(tier.root)
    measurements.of("s3://slow").add_rate(1e6)
    measurements.of("s3://fast").add_rate(1e9)
    measurements.save()
    now_s = time.time()
    for number, bucket in enumerate(("slow", "fast", "middle")):
        fill(tier, bucket, number)
        shards = tier.records.recall_model(bucket).shards
        tier.records.forget_model(bucket)
        tier.records.remember_model(ModelRecord(bucket, f"s3://{bucket}/model", "", shards))
        tier.note_use(bucket, now_s - 3600 + number)
    fill(tier, "new", 3, now_s)
    fill(tier, "newer", 4, now_s)
    assert keys(tier) & {"slow", "fast"} == {"slow"}


def test_a_base_inherits_the_uses_of_an_evicted_fine_tune(
    open_tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Models are so small here that the latency would count for more than their bytes.
    monkeypatch.setattr("weightcache.tiers.eviction.ASSUMED_LATENCY_S", 0.0)
    tier = open_tier(7 * 40960)
    now_s = time.time()
    shared = [content_of(40960, 100 + number) for number in range(4)]
    for key, age_s in (("tune", 2 * DAY_S), ("other tune", DAY_S)):
        own = content_of(40960, len(key))
        for content in (*shared, own):
            put(tier, content)
        tier.records.touch(remember(tier, key, [*shared, own]), now_s - age_s)
        tier.note_use(key, now_s - age_s)
    fill(tier, "new", 1, now_s - 600)
    fill(tier, "newer", 2, now_s - 300)
    assert keys(tier) == {"other tune", "newer"}  # not "new", which was used later than each of the two
    assert tier._uses("other tune") == (now_s - DAY_S, now_s - 2 * DAY_S)


def test_a_use_is_its_models_last(tier: DiskTier) -> None:
    tier.note_use(remember(tier, "model", []), 2000.0)
    [record] = tier.records.models()
    assert record.last_use_s == 2000.0


def test_uses_noted_at_once_are_all_kept(tier: DiskTier) -> None:
    remember(tier, "model", [])
    now_s = time.time()
    uses = [now_s + 1000 * number for number in range(8)]
    run_at_once(threading.Thread(target=tier.note_use, args=("model", at_s)) for at_s in uses)
    assert set(tier._uses("model")) >= set(uses[1:])


def test_of_models_that_left_few_are_remembered(
    open_tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightcache.tiers.disk.N_GONE", 2)
    tier = open_tier(2 * 40960)
    for number in range(6):
        fill(tier, f"m{number}", number, 1000.0 * (number + 1))
    known = {f"m{number}" for number in range(6) if tier._uses(f"m{number}")}
    assert known == {"m2", "m3", "m4", "m5"}


@pytest.mark.parametrize("row", [7, ["text"], [None], [float("nan")], {"a": 1.0}], ids=str)
def test_g07_uses_that_are_none_have_the_catalogue_rebuilt(open_tier: Callable[..., DiskTier], row: object) -> None:
    tier = open_tier()
    fill(tier, "model", 0, 1000.0)
    tier._catalogue.set("uses:model", row)
    with pytest.raises(CatalogueDamagedError):
        tier.note_use("model", 2000.0)
    again = open_tier()
    again.note_use("model", 2000.0)
    assert again._uses("model") == (2000.0, 1000.0)


def test_g12_a_write_that_held_models_leave_no_room_for_is_refused(open_tier: Callable[..., DiskTier]) -> None:
    tier = open_tier(2 * 40960)
    leased, pinned, more = (content_of(40960, seed) for seed in range(3))
    put(tier, leased)
    put(tier, pinned)
    lease = tier.lease(remember(tier, "leased", [leased]))
    tier.records.pin(remember(tier, "pinned", [pinned]), pinned=True)
    assert tier.write(Digest.of(more), checksum(more), memoryview(more)) is False
    assert len(chunk_files(tier.root)) == 2
    assert tier.used_bytes() == occupied_bytes(tier.root)
    lease.release()
    assert tier.write(Digest.of(more), checksum(more), memoryview(more)) is True
    assert tier.look(map(Digest.of, (leased, pinned, more))) == {Digest.of(pinned), Digest.of(more)}


def test_g13_room_made_while_another_writes_counts_what_it_writes(
    tier: DiskTier, open_tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, writing, go_on = os.fsync, threading.Event(), threading.Event()

    def held_fsync(fd: int) -> None:
        writing.set()
        assert go_on.wait(20)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", held_fsync)
    writer = threading.Thread(target=put, args=(tier, content_of(40960)))
    writer.start()
    assert writing.wait(20)
    assert open_tier().make_room()
    go_on.set()
    writer.join()
    assert tier.used_bytes() == occupied_bytes(tier.root) == 40960


# -- the catalogue is a cache


def test_g07_a_lost_catalogue_is_rebuilt_from_the_chunks(tier: DiskTier, open_tier: Callable[..., DiskTier]) -> None:
    contents = [content_of(1000 + seed, seed) for seed in range(5)]
    remember(tier, "model", contents)
    digests = {put(tier, content) for content in contents}
    used = tier.used_bytes()
    tier.close()
    shutil.rmtree(tier.root / "catalogue")
    again = open_tier()
    assert again.look(digests) == digests
    assert again.used_bytes() == used == occupied_bytes(tier.root)
    for content in contents:
        assert read(again, Digest.of(content), len(content)) == content
