"""Several processes and one cache folder: one download, dead leaders, kill -9, fork, Ctrl-C."""

from __future__ import annotations

import json
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from children import Child, wait_until
from models import write_safetensors
from reference import fingerprint, tensors_of
from servers import Bucket, Proxy, S3Server

import weightcache

LOADER = Path(__file__).parent / "loader.py"
N_PROCESSES = 8
CHUNK_NBYTES = 8 << 20
N_CHUNKS = 8
HEADER_READ = 128 << 10  # what is read of a shard to describe it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MiB in tensors that are each a chunk and, by two, a range."""
    folder = tmp_path_factory.mktemp("model")
    shapes = {f"layers.{i}.weight": ("BF16", (CHUNK_NBYTES // 2 // 1024, 1024)) for i in range(N_CHUNKS)}
    write_safetensors(folder / "model.safetensors", shapes)
    (folder / "config.json").write_text('{"model_type": "test"}')
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    return fingerprint(tensors_of(folder))


@pytest.fixture
def uri(bucket: Bucket, folder: Path) -> str:
    return bucket.upload(folder, "model")


def start(uri: str, s3: S3Server, proxy: Proxy) -> Child:
    return Child(LOADER, uri, json.dumps(s3.storage_options(proxy.endpoint)))


def weight_bytes(proxy: Proxy) -> int:
    return proxy.body_bytes("safetensors")


def file_bytes(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


def stored_chunks(cache: Path) -> int:
    return sum(path.stat().st_size for path in (cache / "chunks").glob("??/*"))


def load(uri: str, s3: S3Server, proxy: Proxy) -> Any:
    with weightcache.load_model(uri, device="cpu", storage_options=s3.storage_options(proxy.endpoint)) as model:
        model.wait_stored()
        return fingerprint(model), model.report


def test_g10_eight_processes_at_once_fetch_every_byte_once(
    uri: str, s3: S3Server, proxy: Proxy, folder: Path, expected: str
) -> None:
    with ExitStack() as stack:
        children = [stack.enter_context(start(uri, s3, proxy)) for _ in range(N_PROCESSES)]
        for child in children:
            assert child.hear() == "ready"
        for child in children:
            child.tell("load")
        heard = [child.hear() for child in children]
    assert [one["fingerprint"] for one in heard] == [expected] * N_PROCESSES
    assert sum(one["bytes"]["origin"] for one in heard) <= 1.05 * file_bytes(folder)
    # Each process may read the header before it is remembered.
    assert weight_bytes(proxy) <= 1.05 * file_bytes(folder) + N_PROCESSES * (128 << 10)


def test_g10_a_killed_leader_is_succeeded(
    uri: str, s3: S3Server, proxy: Proxy, folder: Path, expected: str, tmp_path: Path
) -> None:
    with start(uri, s3, proxy) as leader, start(uri, s3, proxy) as follower:
        assert leader.hear() == follower.hear() == "ready"
        proxy.script("GET .*safetensors", "ok hold hold hold hold")
        leader.tell("load")
        proxy.wait_stopped(4)  # every range is the leader's, and under way
        follower.tell("load")
        wait_until(lambda: len(list((tmp_path / "cache" / "leases").iterdir())) == 2)
        leader.kill()
        proxy.release()
        assert follower.hear()["fingerprint"] == expected


def test_g10_a_stopped_leader_is_succeeded_by_one(
    uri: str, s3: S3Server, proxy: Proxy, folder: Path, expected: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        leader, *followers = [stack.enter_context(start(uri, s3, proxy)) for _ in range(4)]
        for child in (leader, *followers):
            assert child.hear() == "ready"
        proxy.script("GET .*safetensors", "ok hold hold hold hold")
        leader.tell("load")
        proxy.wait_stopped(4)
        leader.signal(signal.SIGSTOP)
        proxy.reset()
        for child in followers:
            child.tell("load")
        try:
            heard = [child.hear() for child in followers]
            assert [one["fingerprint"] for one in heard] == [expected] * len(followers)
            assert sum(one["bytes"]["origin"] for one in heard) <= 1.05 * file_bytes(folder)
        finally:
            leader.signal(signal.SIGCONT)
        proxy.release()
        assert leader.hear()["fingerprint"] == expected
    assert weightcache.verify(deep=True).sound


def test_a_prefetch_waits_while_somebody_waits_for_a_load(
    uri: str, bucket: Bucket, s3: S3Server, proxy: Proxy, folder: Path, expected: str, tmp_path: Path
) -> None:
    other = bucket.upload(folder, "other")
    with start(uri, s3, proxy) as child, ThreadPoolExecutor(1) as threads:
        assert child.hear() == "ready"
        proxy.script("GET .*model/model.safetensors", "ok hold hold hold hold")
        child.tell("load")
        proxy.wait_stopped(4)
        prefetching = threads.submit(weightcache.prefetch, other, storage_options=s3.storage_options(proxy.endpoint))
        # Its header is read to describe it.
        wait_until(lambda: proxy.body_bytes("other/model.safetensors") >= HEADER_READ)
        before = proxy.body_bytes("other/model.safetensors")
        with pytest.raises(TimeoutError):
            prefetching.result(1.0)
        assert proxy.body_bytes("other/model.safetensors") == before
        proxy.release()
        assert child.hear()["fingerprint"] == expected
        prefetching.result(30.0)
        assert proxy.body_bytes("other/model.safetensors") >= file_bytes(folder)


def test_g11_after_kill_9_whole_chunks_are_not_fetched_again(
    uri: str, s3: S3Server, proxy: Proxy, folder: Path, expected: str, tmp_path: Path
) -> None:
    with start(uri, s3, proxy) as child:
        assert child.hear() == "ready"
        proxy.script("GET .*safetensors", "ok ok ok hold hold")  # the header, two ranges, then no more
        child.tell("load")
        proxy.wait_stopped(2)
        wait_until(lambda: stored_chunks(tmp_path / "cache") >= file_bytes(folder) // 2)
        wait_until(lambda: learned(uri, s3, proxy) >= N_CHUNKS // 2)
        child.kill()
    proxy.reset()
    got, report = load(uri, s3, proxy)
    assert got == expected
    assert report.bytes["origin"] <= file_bytes(folder) // 2 + (64 << 10)
    assert weight_bytes(proxy) <= file_bytes(folder) // 2 + (64 << 10)


def learned(uri: str, s3: S3Server, proxy: Proxy) -> int:
    """Count the chunks that a load would read from disk."""
    return weightcache.plan(uri, storage_options=s3.storage_options(proxy.endpoint)).n_reads


def test_g12_a_lease_ends_with_its_process(uri: str, s3: S3Server, proxy: Proxy) -> None:
    with start(uri, s3, proxy) as child:
        assert child.hear() == "ready"
        proxy.script("GET .*safetensors", "ok hold hold hold hold")
        child.tell("load")
        proxy.wait_stopped(4)
        with pytest.raises(weightcache.errors.InUseError):
            weightcache.evict(uri)
        child.kill()
    weightcache.evict(uri)
    assert weightcache.models() == []


def test_g16_a_forked_child_loads_and_ends(uri: str, s3: S3Server, proxy: Proxy, expected: str) -> None:
    with start(uri, s3, proxy) as child:
        assert child.hear() == "ready"
        child.tell("load")
        assert child.hear()["fingerprint"] == expected
        child.tell("fork")
        assert child.hear()["fingerprint"] == expected  # the grandchild's
        assert child.hear() == 0


def test_ctrl_c_ends_a_load_and_the_next_one_goes_on(
    uri: str, s3: S3Server, proxy: Proxy, expected: str, tmp_path: Path
) -> None:
    with start(uri, s3, proxy) as child:
        assert child.hear() == "ready"
        proxy.script("GET .*safetensors", "ok ok hold hold hold")
        child.tell("load")
        proxy.wait_stopped(3)
        child.signal(signal.SIGINT)
        assert child.hear() == "interrupted"
        proxy.reset()
        child.tell("load")
        assert child.hear()["fingerprint"] == expected
    assert weightcache.verify(deep=True).sound
