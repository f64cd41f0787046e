"""The care of a node's cache, end to end: what it says it holds, how it heals, and what leaves it when."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_folder import chunk_files, flip_byte, occupied_bytes
from models import Shapes, write_safetensors
from reference import assert_same, tensors_of
from servers import Bucket, Proxy, S3Server

import weightcache
from weightcache import errors
from weightcache.measurements import Measurements
from weightcache.tiers.disk import DiskTier

MIB = 1 << 20
WEIGHTS = r"\.safetensors(\?|$)"
TIMEOUT_S = 60.0

# Each tensor is a chunk of its own.
LAYERS: Shapes = {f"layers.{number}.weight": ("BF16", (512, 1024)) for number in range(4)}
LAYER_BYTES = MIB
MODEL_BYTES = len(LAYERS) * LAYER_BYTES

Options = dict[str, Any]


@pytest.fixture
def collected() -> Iterator[None]:
    """An error that crossed threads is a cycle, and holds the files of its frames open."""
    yield
    gc.collect()


@pytest.fixture
def options(s3: S3Server, proxy: Proxy) -> Options:
    """The storage options that lead through the proxy."""
    return s3.storage_options(proxy.endpoint)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The cache folder."""
    return tmp_path / "cache"


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three models without a byte in common."""
    folders = [tmp_path / name for name in "abc"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        write_safetensors(folder / "model.safetensors", LAYERS, seed)
        (folder / "config.json").write_text(f'{{"model_type": "{folder.name}"}}')
    return folders


@pytest.fixture
def folder(folders: list[Path]) -> Path:
    """The first model."""
    return folders[0]


@pytest.fixture
def url(folder: Path, bucket: Bucket) -> str:
    """The first model in the bucket."""
    return bucket.upload(folder, folder.name)


@pytest.fixture
def urls(folders: list[Path], bucket: Bucket) -> list[str]:
    """The three models in the bucket."""
    return [bucket.upload(folder, folder.name) for folder in folders]


def fill(uri: str | Path, **arguments: Any) -> None:
    """Load a model, and wait until it is on disk."""
    with weightcache.load_model(uri, "cpu", cache="disk", **arguments) as model:
        assert model.wait_stored(TIMEOUT_S)


def spoil(cache: Path) -> str:
    """Flip a byte of one layer on disk; return its digest."""
    digest, path = next((name, path) for name, path in chunk_files(cache).items() if path.stat().st_size == LAYER_BYTES)
    flip_byte(path)
    return digest


def names(models: list[Any]) -> list[str]:
    return [model.uri.rpartition("/")[2] for model in models]


# -- models


def test_a_node_that_loaded_nothing_holds_no_model(cache: Path) -> None:
    assert weightcache.models() == []
    assert not cache.exists()


def test_models_says_how_much_of_a_model_is_here(folder: Path) -> None:
    fill(folder, include="layers.[01].*")
    [model] = weightcache.models()
    assert model.bytes == 2 * LAYER_BYTES
    assert model.total_bytes == sum(path.stat().st_size for path in folder.iterdir())


def test_a_prefetched_model_is_here_whole(folder: Path) -> None:
    weightcache.prefetch(folder)
    [model] = weightcache.models()
    assert model.bytes == model.total_bytes


def test_models_names_a_model_by_its_uri_and_endpoint(url: str, proxy: Proxy, options: Options) -> None:
    weightcache.prefetch(url, storage_options=options)
    [model] = weightcache.models()
    assert (model.uri, model.endpoint, model.tier) == (url, proxy.endpoint, "disk")


def test_models_come_most_recently_used_first(folders: list[Path]) -> None:
    for folder in (*folders, folders[1]):
        weightcache.prefetch(folder)
    assert names(weightcache.models()) == ["b", "c", "a"]


def test_a_model_is_in_use_until_it_is_closed(folder: Path) -> None:
    model = weightcache.load_model(folder, "cpu", cache="disk")
    assert model.wait_stored(TIMEOUT_S)
    assert [each.in_use for each in weightcache.models()] == [True]
    model.close()
    assert [each.in_use for each in weightcache.models()] == [False]


def test_a_pin_shows_until_it_is_ended(folder: Path) -> None:
    weightcache.prefetch(folder)
    weightcache.pin(folder)
    assert [each.pinned for each in weightcache.models()] == [True]
    weightcache.unpin(folder)
    assert [each.pinned for each in weightcache.models()] == [False]


# -- verify


def test_a_sound_cache_is_sound(folder: Path, cache: Path) -> None:
    weightcache.prefetch(folder)
    found = weightcache.verify(deep=True)
    assert (found.sound, found.rotten, found.lost) == (True, [], [])
    assert found.n_chunks == len(chunk_files(cache))


def test_a_shallow_look_does_not_see_a_flipped_byte(folder: Path, cache: Path) -> None:
    weightcache.prefetch(folder)
    spoil(cache)
    assert weightcache.verify().sound


def test_a_deep_look_finds_the_one_flipped_byte(folder: Path, cache: Path) -> None:
    weightcache.prefetch(folder)
    digest = spoil(cache)
    found = weightcache.verify(deep=True)
    assert [text.rpartition(":")[2] for text in found.rotten] == [digest]
    assert not found.sound


def test_a_shallow_look_finds_a_lost_chunk(folder: Path, cache: Path) -> None:
    weightcache.prefetch(folder)
    digest, path = next(iter(chunk_files(cache).items()))
    path.unlink()
    assert [text.rpartition(":")[2] for text in weightcache.verify().lost] == [digest]


def test_repair_fetches_only_the_rotten_chunk(urls: list[str], cache: Path, proxy: Proxy, options: Options) -> None:
    for url in urls:
        weightcache.prefetch(url, storage_options=options)
    digest = spoil(cache)
    proxy.reset()
    found = weightcache.verify(deep=True, repair=True, storage_options=options)
    assert [text.rpartition(":")[2] for text in found.repaired] == [digest]
    assert proxy.body_bytes(WEIGHTS) == LAYER_BYTES


def test_after_a_repair_all_is_sound(url: str, cache: Path, options: Options) -> None:
    weightcache.prefetch(url, storage_options=options)
    spoil(cache)
    assert weightcache.verify(deep=True, repair=True, storage_options=options).sound
    assert weightcache.verify(deep=True).sound


@pytest.mark.usefixtures("collected")
def test_a_repair_without_credentials_says_what_is_left(url: str, cache: Path, options: Options) -> None:
    weightcache.prefetch(url, storage_options=options)
    digest = spoil(cache)
    found = weightcache.verify(deep=True, repair=True)
    assert [text.rpartition(":")[2] for text in found.unrepaired] == [digest]
    assert [url in problem for problem in found.problems] == [True]


def test_a_load_heals_a_rotten_chunk_and_says_so_once(
    url: str, folder: Path, cache: Path, proxy: Proxy, options: Options
) -> None:
    fill(url, storage_options=options)
    spoil(cache)
    proxy.reset()
    with weightcache.load_model(url, "cpu", storage_options=options) as model:
        assert_same(model, tensors_of(folder))
        assert len(model.report.warnings) == 1
        assert model.wait_stored(TIMEOUT_S)
    assert proxy.body_bytes(WEIGHTS) == LAYER_BYTES
    assert weightcache.verify(deep=True).sound


@pytest.mark.usefixtures("collected")
def test_offline_a_rotten_chunk_is_an_offline_error(url: str, cache: Path, options: Options) -> None:
    fill(url, storage_options=options)
    spoil(cache)
    with pytest.raises(errors.OfflineError, match="rotten"):
        weightcache.load_model(url, "cpu", offline=True, storage_options=options)


# -- evict


def test_evict_frees_what_the_model_occupied(folders: list[Path], cache: Path) -> None:
    weightcache.prefetch(folders[0])
    fill(folders[1])
    before = occupied_bytes(cache)
    freed = weightcache.evict(folders[1])
    assert freed == before - occupied_bytes(cache)
    assert MODEL_BYTES <= freed <= MODEL_BYTES + 16 * 1024
    assert names(weightcache.models()) == ["a"]


@pytest.mark.usefixtures("collected")
def test_a_pinned_model_is_not_evicted(folder: Path, cache: Path) -> None:
    weightcache.prefetch(folder)
    weightcache.pin(folder)
    before = occupied_bytes(cache)
    with pytest.raises(errors.InUseError, match="pinned"):
        weightcache.evict(folder)
    assert occupied_bytes(cache) == before


@pytest.mark.usefixtures("collected")
def test_a_model_in_use_is_not_evicted(folder: Path, cache: Path) -> None:
    with weightcache.load_model(folder, "cpu", cache="disk") as model:
        assert model.wait_stored(TIMEOUT_S)
        before = occupied_bytes(cache)
        with pytest.raises(errors.InUseError, match="held by a running process"):
            weightcache.evict(folder)
        assert occupied_bytes(cache) == before


@pytest.mark.parametrize("work", [weightcache.evict, weightcache.pin, weightcache.unpin])
@pytest.mark.usefixtures("collected")
def test_an_unknown_model_is_not_found_and_the_nearest_is_named(work: Any, folder: Path) -> None:
    weightcache.prefetch(folder)
    with pytest.raises(errors.ModelNotFoundError, match=f"did you mean .*{folder}'"):
        work(f"{folder}x")


def test_an_evicted_model_is_fetched_again(folder: Path) -> None:
    fill(folder)
    weightcache.evict(folder)
    with weightcache.load_model(folder, "cpu", cache="disk") as model:
        assert_same(model, tensors_of(folder))
        assert model.report.bytes["disk"] == 0


# -- the budget


def test_the_least_recently_used_model_leaves_first(
    folders: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = int(2.5 * MODEL_BYTES)
    monkeypatch.setenv("WEIGHTCACHE_DISK_BUDGET_BYTES", str(budget))
    for folder in (folders[0], folders[1], folders[0], folders[2]):
        fill(folder)
    assert names(weightcache.models()) == ["c", "a"]
    assert occupied_bytes(cache) <= budget


def test_a_pinned_model_survives_what_does_not_fit_beside_it(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_DISK_BUDGET_BYTES", str(int(1.5 * MODEL_BYTES)))
    fill(folders[0])
    weightcache.pin(folders[0])
    fill(folders[1])
    with weightcache.load_model(folders[0], "cpu", cache="disk") as model:
        assert model.report.bytes["origin"] == 0


def test_a_load_that_does_not_fit_the_budget_is_whole(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = MODEL_BYTES // 2
    monkeypatch.setenv("WEIGHTCACHE_DISK_BUDGET_BYTES", str(budget))
    with weightcache.load_model(folder, "cpu", cache="disk") as model:
        assert_same(model, tensors_of(folder))
        assert model.wait_stored(TIMEOUT_S)
    assert occupied_bytes(cache) <= budget


@pytest.fixture
def related(folders: list[Path]) -> list[Path]:
    """Two models of two shards each, the first of which is the same."""
    base, tuned, _ = folders
    for folder in (base, tuned):
        shutil.move(folder / "model.safetensors", folder / "model-00002.safetensors")
    shared: Shapes = {f"shared.{number}.weight": ("BF16", (512, 1024)) for number in range(2)}
    write_safetensors(base / "model-00001.safetensors", shared)
    shutil.copy(base / "model-00001.safetensors", tuned)
    return [base, tuned]


def test_how_fast_a_cold_load_came_is_remembered_of_its_place(
    url: str, cache: Path, options: Options, proxy: Proxy, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightcache.session.MEASURED_FROM_NBYTES", 1)
    fill(url, storage_options=options)
    known = Measurements(cache).of(f"{proxy.endpoint}/{bucket.name}").bytes_per_s
    assert known is not None
    assert known > 0
    fill(url, storage_options=options)
    assert Measurements(cache).of(f"{proxy.endpoint}/{bucket.name}").bytes_per_s == known  # nothing came from there


def test_a_load_is_a_use(folder: Path, cache: Path) -> None:
    before = time.time()
    fill(folder)
    disk = DiskTier(cache)
    try:
        [record] = disk.records.models()
        [used_s] = disk._uses(record.key)
    finally:
        disk.close()
    assert before - 1 <= used_s <= time.time()


def test_equal_chunks_of_two_models_are_kept_once(related: list[Path], cache: Path) -> None:
    for folder in related:
        fill(folder)
    n_layers = sum(path.stat().st_size == LAYER_BYTES for path in chunk_files(cache).values())
    assert n_layers == 2 + 2 * len(LAYERS)


def test_shared_chunks_survive_the_eviction_of_one_model(
    related: list[Path], bucket: Bucket, proxy: Proxy, options: Options
) -> None:
    base, tuned = [bucket.upload(folder, folder.name) for folder in related]
    fill(base, storage_options=options)
    fill(tuned, storage_options=options)
    weightcache.evict(base)
    proxy.reset()
    with weightcache.load_model(tuned, "cpu", offline=True, storage_options=options) as model:
        assert_same(model, tensors_of(related[1]))
    assert proxy.requests == []


def test_evicting_frees_only_what_is_not_shared(related: list[Path], cache: Path) -> None:
    for folder in related:
        fill(folder)
    weightcache.evict(related[0])
    n_layers = sum(path.stat().st_size == LAYER_BYTES for path in chunk_files(cache).values())
    assert n_layers == 2 + len(LAYERS)
