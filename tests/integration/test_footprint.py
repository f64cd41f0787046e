"""What a load leaves behind: memory, descriptors and files, no more and no longer than promised."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import models
import pytest
from cache_folder import occupied_bytes, open_below
from children import wait_until
from hosted import Hosted, host
from reference import assert_same
from servers import Bucket, Proxy

import weightcache
from weightcache import _engine
from weightcache.errors import ModelNotFoundError
from weightcache.tiers.disk import DiskTier
from weightcache.tiers.host import keep_freed


@pytest.fixture
def hosted(tmp_path: Path, bucket: Bucket, proxy: Proxy) -> Hosted:
    """Nine tensors of 4 MiB, and a configuration."""
    (tmp_path / "model").mkdir()
    tensors = {f"layer.{number}.weight": ("F32", (1024, 1024)) for number in range(9)}
    models.write_safetensors(tmp_path / "model" / "model.safetensors", tensors)
    (tmp_path / "model" / "config.json").write_text("{}")
    return host(tmp_path / "model", bucket, proxy)


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    """Let nothing go that is not let go of."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True)
def no_pool() -> None:
    """Keep no freed memory, which the kernel could have back and which still counts as this process's."""
    keep_freed(0)
    _engine.pool_limit(0)


def resident_bytes() -> int:
    """Return the memory of this process that is not backed by files."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_g13_a_model_that_is_closed_gives_its_memory_back_at_once(
    hosted: Hosted, no_garbage_collection: None, cache: str
) -> None:
    for _ in ("cold", "warm"):
        model = weightcache.load_model(hosted.url, "cpu", cache=cache, storage_options=hosted.options)
        assert model.wait_stored(60)
        before = resident_bytes()
        model.close()
        assert resident_bytes() < before - 0.9 * hosted.nbytes


def test_g13_a_stream_gives_its_memory_back_at_once(hosted: Hosted, no_garbage_collection: None) -> None:
    for _ in ("cold", "warm"):
        stream = weightcache.stream(hosted.url, "cpu", storage_options=hosted.options)
        tensors = [next(stream) for _ in hosted.tensors]
        before = resident_bytes()
        assert list(stream) == []
        tensors.clear()
        wait_until(lambda: resident_bytes() < before - 0.9 * hosted.nbytes)  # noqa: B023 - waited for here


def test_g13_a_load_that_fails_gives_its_memory_back_at_once(
    hosted: Hosted, no_garbage_collection: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the model is there when the rest is refused."""
    monkeypatch.setenv("WEIGHTCACHE_CONNECTIONS", "1")
    before = 0
    for _ in range(3):
        hosted.proxy.script(r"GET .*safetensors", "ok ok 404")
        with pytest.raises(ModelNotFoundError):
            weightcache.load_model(hosted.url, "cpu", cache="none", storage_options=hosted.options)
        assert hosted.served_bytes() > hosted.nbytes / 3
        hosted.proxy.reset()
        before = before or resident_bytes()
    wait_until(lambda: resident_bytes() < before + hosted.nbytes / 3)  # a thread may still be putting it down


def test_g13_a_closed_model_leaves_no_file_open(hosted: Hosted, tmp_path: Path, no_garbage_collection: None) -> None:
    for _ in ("cold", "warm"):
        model = weightcache.load_model(hosted.url, "cpu", storage_options=hosted.options)
        assert model.wait_stored(60)
        model.close()
        assert open_below(tmp_path) == []


def test_g13_what_is_counted_is_what_lies_there(hosted: Hosted, tmp_path: Path) -> None:
    with weightcache.load_model(hosted.url, "cpu", storage_options=hosted.options) as model:
        assert model.wait_stored(60)
    with closing(DiskTier(tmp_path / "cache")) as disk:
        assert disk.used_bytes() == occupied_bytes(tmp_path / "cache") > hosted.nbytes
        used = disk.used_bytes()
        assert disk.make_room()
        assert disk.used_bytes() == used
    weightcache.evict(hosted.url)
    with closing(DiskTier(tmp_path / "cache")) as disk:
        assert disk.used_bytes() == occupied_bytes(tmp_path / "cache") == 0


def test_g24_all_that_a_load_leaves_is_private(tmp_path: Path, bucket: Bucket, proxy: Proxy) -> None:
    models.write_diffusers(tmp_path / "model")
    hosted = host(tmp_path / "model", bucket, proxy)
    with weightcache.load_model(hosted.url, "cpu", storage_options=hosted.options) as model:
        assert model.wait_stored(60)
        weightcache.pin(hosted.url)
        modes = {path: path.lstat().st_mode & 0o777 for path in (tmp_path / "cache").rglob("*")}
    assert {str(path): oct(mode) for path, mode in modes.items() if mode not in (0o600, 0o700)} == {}


def test_tensors_share_no_memory_with_the_cache(hosted: Hosted) -> None:
    for _ in range(3):
        with weightcache.load_model(hosted.url, "cpu", storage_options=hosted.options) as model:
            assert_same(model, hosted.tensors)
            assert model.wait_stored(60)
            for tensor in model.values():
                tensor.zero_()
