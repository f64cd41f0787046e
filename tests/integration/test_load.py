"""Loading end to end, from a real S3 server: the right bytes in the tensors, and no byte read twice or in vain."""

from __future__ import annotations

import gc
import glob
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from cache_folder import chunk_files, open_below, staged_files
from children import wait_until
from models import (
    INDEX_NAME,
    Shapes,
    minilm_folder,
    tensor_bytes,
    write_diffusers,
    write_many_small,
    write_safetensors,
    write_tiny_sharded,
)
from reference import assert_same, raw, tensors_of
from servers import Bucket, HttpServer, Proxy, S3Server

import weightcache
from weightcache import errors
from weightcache.windows import WINDOWS_AHEAD

KIB, MIB = 1 << 10, 1 << 20
HEADER_READ = 128 * KIB  # what is read of a shard to describe it, at most, while its header is small
WEIGHTS = r"\.safetensors(\?|$)"
TIMEOUT_S = 60.0
STAGES = {"import", "open", "describe", "look", "move", "bind", "files", "total"}

# Each tensor is a chunk of its own.
LAYERS: Shapes = {f"layers.{number}.weight": ("BF16", (512, 1024)) for number in range(6)}
LAYER_BYTES = MIB

Options = dict[str, Any]


def write_layers(folder: Path, seed: int = 0) -> None:
    """Write one shard of LAYERS, and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", LAYERS, seed)
    (folder / "config.json").write_text('{"model_type": "layers"}')


def write_two_linear(folder: Path, shape: tuple[int, int] = (512, 1024)) -> None:
    """Write what `two_linear()` holds; the first weight is larger than what is read of a header."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes: Shapes = {"0.weight": ("F32", shape), "0.bias": ("F32", (512,)), "1.weight": ("F32", (8, 512))}
    write_safetensors(folder / "model.safetensors", shapes)


def two_linear() -> torch.nn.Module:
    """Return a module that fits `write_two_linear`."""
    return torch.nn.Sequential(torch.nn.Linear(1024, 512), torch.nn.Linear(512, 8, bias=False))


def copy_minilm(folder: Path) -> None:
    shutil.copytree(minilm_folder(), folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def state(module: torch.nn.Module) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in module.state_dict().items()}


def object_bytes(proxy: Proxy, bucket: Bucket) -> int:
    """Return the bytes of objects that came through the proxy: everything but listings."""
    return proxy.body_bytes(rf"^/{bucket.name}/[^?]")


def paths(proxy: Proxy, pattern: str = WEIGHTS) -> list[str]:
    """Return the path of each request that matches."""
    return [request.path for request in proxy.requests if re.search(pattern, request.path)]


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
def folder(tmp_path: Path) -> Path:
    """The folder of the tiny sharded model."""
    write_tiny_sharded(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def url(folder: Path, bucket: Bucket) -> str:
    """The tiny sharded model in the bucket."""
    return bucket.upload(folder, "model")


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """The folder of a model whose every tensor is a chunk."""
    write_layers(tmp_path / "layers")
    return tmp_path / "layers"


@pytest.fixture
def layers_url(layers: Path, bucket: Bucket) -> str:
    return bucket.upload(layers, "layers")


def fill(url: str, options: Options) -> None:
    """Load a model, and wait until it is on disk."""
    with weightcache.load_model(url, "cpu", storage_options=options) as model:
        assert model.wait_stored(TIMEOUT_S)


# -- bytes


KINDS: dict[str, Callable[[Path], None]] = {
    "minilm": copy_minilm,
    "tiny-sharded": write_tiny_sharded,
    "300-small": lambda folder: write_many_small(folder, 300),
    "diffusers": write_diffusers,
}


@pytest.mark.parametrize("kind", KINDS)
def test_cold_and_warm_load_equal_safetensors_bit_for_bit(
    kind: str, tmp_path: Path, bucket: Bucket, proxy: Proxy, options: Options
) -> None:
    folder = tmp_path / "model"
    KINDS[kind](folder)
    url = bucket.upload(folder, "model")
    expected = tensors_of(folder)

    with weightcache.load_model(url, "cpu", storage_options=options) as cold:
        assert_same(cold, expected)
        assert cold.wait_stored(TIMEOUT_S)
    n_cold = object_bytes(proxy, bucket)
    n_shards = len(list(folder.rglob("*.safetensors")))
    assert n_cold >= sum(tensor.nbytes for tensor in expected.values())
    assert n_cold <= sum(map(len, contents(folder).values())) + n_shards * 256 * KIB

    proxy.reset()
    with weightcache.load_model(url, "cpu", storage_options=options) as warm:
        assert_same(warm, expected)
        assert warm.report.bytes["origin"] == 0
    assert [path for path in paths(proxy, rf"^/{bucket.name}/[^?]") if INDEX_NAME not in path] == []


def test_a_diffusers_tensor_is_named_by_its_component(tmp_path: Path, bucket: Bucket, options: Options) -> None:
    write_diffusers(tmp_path / "model")
    url = bucket.upload(tmp_path / "model", "model")
    with weightcache.load_model(url, "cpu", storage_options=options) as model:
        assert {name.partition("/")[0] for name in model} == {"unet", "vae", "text_encoder"}


def test_one_file_can_be_named(folder: Path, url: str, options: Options) -> None:
    name = "model-00002-of-00003.safetensors"
    alone = folder.with_name("alone")
    alone.mkdir()
    shutil.copy(folder / name, alone)
    with weightcache.load_model(f"{url}/{name}", "cpu", storage_options=options) as model:
        assert_same(model, tensors_of(alone))


def test_include_reads_only_the_chunks_needed(layers: Path, layers_url: str, proxy: Proxy, options: Options) -> None:
    wanted = ["layers.1.*", "layers.4.weight"]
    with weightcache.load_model(layers_url, "cpu", include=wanted, storage_options=options) as model:
        expected = tensors_of(layers)
        assert_same(model, {name: expected[name] for name in ("layers.1.weight", "layers.4.weight")})
    assert proxy.body_bytes(WEIGHTS) == HEADER_READ + 2 * LAYER_BYTES


def test_exclude_reads_only_the_chunks_needed(layers: Path, layers_url: str, proxy: Proxy, options: Options) -> None:
    with weightcache.load_model(layers_url, "cpu", exclude="layers.[1-5].*", storage_options=options) as model:
        assert_same(model, {"layers.0.weight": tensors_of(layers)["layers.0.weight"]})
    assert proxy.body_bytes(WEIGHTS) == HEADER_READ + LAYER_BYTES


def test_an_unneeded_shard_is_not_read_beyond_its_header(url: str, proxy: Proxy, options: Options) -> None:
    with weightcache.load_model(url, "cpu", include="model.norm.weight", storage_options=options):
        pass
    assert len(paths(proxy, "00001-of-00003" + WEIGHTS)) == 1


@pytest.mark.usefixtures("collected")
def test_a_pattern_that_fits_no_tensor_is_a_config_error(url: str, options: Options) -> None:
    with pytest.raises(errors.ConfigError, match=r"model\.norm\.weight"):
        weightcache.load_model(url, "cpu", include="model.norm.wieght", storage_options=options)


def test_two_loads_at_once_fetch_once(
    layers: Path, layers_url: str, bucket: Bucket, cache: Path, proxy: Proxy, options: Options
) -> None:
    proxy.script("GET .*" + WEIGHTS, "ok hold")  # a header, then a range of weights
    with ThreadPoolExecutor(2) as threads:
        loads = [threads.submit(weightcache.load_model, layers_url, "cpu", storage_options=options)]
        proxy.wait_stopped()
        loads.append(threads.submit(weightcache.load_model, layers_url, "cpu", storage_options=options))
        wait_until(lambda: open_below(cache).count(str(cache / "flight")) == 2)
        proxy.release()
        models = [load.result(TIMEOUT_S) for load in loads]
    for model in models:
        assert_same(model, tensors_of(layers))
        model.close()
    n_headers = 2 * HEADER_READ
    assert object_bytes(proxy, bucket) <= 1.05 * sum(map(len, contents(layers).values())) + n_headers


def test_only_the_shard_that_changed_is_fetched_again(
    folder: Path, url: str, bucket: Bucket, proxy: Proxy, options: Options
) -> None:
    fill(url, options)
    write_tiny_sharded(folder.with_name("other"), seed=1)
    name = "model-00002-of-00003.safetensors"
    shutil.copy(folder.with_name("other") / name, folder / name)
    bucket.put(f"model/{name}", (folder / name).read_bytes())
    proxy.reset()
    with weightcache.load_model(url, "cpu", storage_options=options) as model:
        assert_same(model, tensors_of(folder))
        assert model.report.bytes["origin"] <= (folder / name).stat().st_size
    assert {path.partition("?")[0] for path in paths(proxy)} == {f"/{bucket.name}/model/{name}"}


def test_a_shard_that_the_index_newly_names_is_picked_up(
    folder: Path, url: str, bucket: Bucket, proxy: Proxy, options: Options
) -> None:
    fill(url, options)
    write_safetensors(folder / "model-extra.safetensors", {"extra": ("BF16", (512, 1024))})
    index = json.loads((folder / INDEX_NAME).read_bytes())
    index["weight_map"]["extra"] = "model-extra.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    for name in ("model-extra.safetensors", INDEX_NAME):
        bucket.put(f"model/{name}", (folder / name).read_bytes())
    proxy.reset()
    with weightcache.load_model(url, "cpu", storage_options=options) as model:
        assert_same(model, tensors_of(folder))
    assert {path.partition("?")[0] for path in paths(proxy)} == {f"/{bucket.name}/model/model-extra.safetensors"}


# -- stream


def test_stream_equals_load(folder: Path, url: str, options: Options) -> None:
    assert_same(dict(weightcache.stream(url, "cpu", storage_options=options)), tensors_of(folder))


def test_a_stream_reports_as_a_load_does(folder: Path, url: str, options: Options) -> None:
    stream = weightcache.stream(url, "cpu", storage_options=options)
    came, report = dict(stream), stream.report
    assert (report.n_tensors, report.device) == (len(came), "cpu")
    assert report.tensor_bytes == sum(tensor.nbytes for tensor in came.values())
    assert report.bytes["origin"] >= report.tensor_bytes
    assert {"describe", "move"} <= report.seconds.keys()


@pytest.mark.parametrize("by_key", [False, True])
def test_a_stream_comes_in_the_order_that_is_wanted(
    layers: Path, layers_url: str, options: Options, monkeypatch: pytest.MonkeyPatch, by_key: bool
) -> None:
    monkeypatch.setattr("weightcache.windows.WINDOW_NBYTES", 1)
    names = sorted(tensors_of(layers), reverse=True)
    order = names.index if by_key else names
    stream = weightcache.stream(layers_url, "cpu", order=order, storage_options=options)
    assert sorted(stream.names, reverse=True) == names
    came = [name for name, _ in stream]
    assert sorted(came, reverse=True) == names
    late = [came.index(name) - number for number, name in enumerate(names)]
    assert max(late) < WINDOWS_AHEAD  # those under way together overtake each other
    with pytest.raises(errors.ConfigError, match="nowhere"):
        next(weightcache.stream(layers_url, "cpu", order=["nowhere"], storage_options=options))
    with pytest.raises(errors.ConfigError, match="between 0 and 1"):
        weightcache.stream(layers_url, "cpu", ahead_share=2)


def test_a_stream_tells_names_until_it_has_ended(layers: Path, layers_url: str, options: Options) -> None:
    stream = weightcache.stream(layers_url, "cpu", storage_options=options)
    assert set(stream.names) == tensors_of(layers).keys()
    stream.close()
    assert set(stream.names) == tensors_of(layers).keys()
    missing = weightcache.stream(f"{layers_url}/nothing", "cpu", storage_options=options)
    with pytest.raises(errors.ModelNotFoundError):
        missing.names  # noqa: B018
    with pytest.raises(errors.WeightcacheError, match="has ended"):
        missing.names  # noqa: B018


def test_a_stream_left_early_stops_the_transfer(
    layers_url: str, proxy: Proxy, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_RANGE_BYTES", str(LAYER_BYTES))
    # A header and one layer pass; all others stop half way, until the stream is left.
    proxy.script("GET .*" + WEIGHTS, "ok ok " + "hold " * len(LAYERS))
    stream = weightcache.stream(layers_url, "cpu", storage_options=options)
    next(stream)
    stream.close()
    proxy.release()
    assert proxy.body_bytes(WEIGHTS) < len(LAYERS) * LAYER_BYTES


def test_a_load_after_a_stream_left_early_is_whole(layers: Path, layers_url: str, options: Options) -> None:
    stream = weightcache.stream(layers_url, "cpu", storage_options=options)
    next(stream)
    stream.close()
    with weightcache.load_model(layers_url, "cpu", storage_options=options) as model:
        assert_same(model, tensors_of(layers))


def test_a_streamed_tensor_outlives_the_stream(layers: Path, layers_url: str, options: Options) -> None:
    stream = weightcache.stream(layers_url, "cpu", storage_options=options)
    name, tensor = next(stream)
    stream.close()
    del stream
    gc.collect()
    assert raw(tensor) == raw(tensors_of(layers)[name])


# -- into a module


def test_load_into_fills_a_module_in_place(tmp_path: Path, bucket: Bucket, options: Options) -> None:
    write_two_linear(tmp_path / "model")
    module = two_linear()
    before = dict(module.named_parameters())
    weightcache.load_into(module, bucket.upload(tmp_path / "model", "model"), storage_options=options)
    assert_same(module.state_dict(), tensors_of(tmp_path / "model"))
    assert all(parameter is before[name] for name, parameter in module.named_parameters())


def test_load_into_fills_what_is_tied(tmp_path: Path, bucket: Bucket, options: Options) -> None:
    (tmp_path / "model").mkdir()
    write_safetensors(tmp_path / "model" / "model.safetensors", {"0.weight": ("F32", (64, 16))})
    embedding, head = torch.nn.Embedding(64, 16), torch.nn.Linear(16, 64, bias=False)
    head.weight = embedding.weight
    module = torch.nn.Sequential(embedding, head)
    weightcache.load_into(module, bucket.upload(tmp_path / "model", "model"), storage_options=options)
    assert raw(head.weight) == raw(tensors_of(tmp_path / "model")["0.weight"])


@pytest.mark.usefixtures("collected")
def test_load_into_refuses_names_that_do_not_match(tmp_path: Path, bucket: Bucket, options: Options) -> None:
    write_two_linear(tmp_path / "model")
    module = torch.nn.Sequential(torch.nn.Linear(1024, 512), torch.nn.Linear(512, 8))  # with a second bias
    before = state(module)
    with pytest.raises(errors.MismatchError, match=r"1\.bias"):
        weightcache.load_into(module, bucket.upload(tmp_path / "model", "model"), storage_options=options)
    assert state(module) == before


def test_load_into_not_strict_reads_only_what_matches(
    tmp_path: Path, bucket: Bucket, proxy: Proxy, options: Options
) -> None:
    write_layers(tmp_path / "model")
    module = torch.nn.Module()
    module.register_module("layers", torch.nn.ModuleList([torch.nn.Linear(1024, 512) for _ in range(2)]))
    module.to(torch.bfloat16)
    bias = raw(module.state_dict()["layers.0.bias"])
    url = bucket.upload(tmp_path / "model", "model")
    weightcache.load_into(module, url, strict=False, storage_options=options)
    expected = tensors_of(tmp_path / "model")
    filled = module.state_dict()
    assert raw(filled["layers.0.bias"]) == bias
    for name in ("layers.0.weight", "layers.1.weight"):
        assert raw(filled[name]) == raw(expected[name])
    assert proxy.body_bytes(WEIGHTS) <= 2 * HEADER_READ + 2 * LAYER_BYTES


@pytest.mark.usefixtures("collected")
def test_load_into_leaves_a_module_of_another_shape_untouched(tmp_path: Path, bucket: Bucket, options: Options) -> None:
    write_two_linear(tmp_path / "model", shape=(512, 1025))
    module = two_linear()
    before = state(module)
    with pytest.raises(errors.MismatchError, match="shape"):
        weightcache.load_into(module, bucket.upload(tmp_path / "model", "model"), storage_options=options)
    assert state(module) == before


@pytest.mark.usefixtures("collected")
def test_load_into_reads_no_weights_for_a_module_of_another_shape(
    tmp_path: Path, bucket: Bucket, proxy: Proxy, options: Options
) -> None:
    write_two_linear(tmp_path / "model", shape=(512, 1025))
    url = bucket.upload(tmp_path / "model", "model")
    with pytest.raises(errors.MismatchError):
        weightcache.load_into(two_linear(), url, storage_options=options)
    assert proxy.body_bytes(WEIGHTS) == HEADER_READ


# -- prefetch, offline, pull, plan


def test_what_was_prefetched_loads_offline_without_a_request(
    folder: Path, url: str, proxy: Proxy, options: Options
) -> None:
    weightcache.prefetch(url, storage_options=options)
    proxy.reset()
    with weightcache.load_model(url, "cpu", offline=True, storage_options=options) as model:
        assert_same(model, tensors_of(folder))
        assert model.files["tokenizer.json"].read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert proxy.requests == []


def test_prefetching_twice_fetches_once(url: str, proxy: Proxy, options: Options) -> None:
    weightcache.prefetch(url, storage_options=options)
    proxy.reset()
    assert weightcache.prefetch(url, storage_options=options).bytes["origin"] == 0
    assert paths(proxy) == []


@pytest.mark.usefixtures("collected")
def test_offline_with_an_empty_cache_is_an_offline_error(url: str, proxy: Proxy, options: Options) -> None:
    with pytest.raises(errors.OfflineError, match="not on this node"):
        weightcache.load_model(url, "cpu", offline=True, storage_options=options)
    assert proxy.requests == []


@pytest.mark.usefixtures("collected")
def test_offline_with_half_a_model_is_an_offline_error(layers_url: str, proxy: Proxy, options: Options) -> None:
    with weightcache.load_model(layers_url, "cpu", include="layers.0.*", storage_options=options) as model:
        assert model.wait_stored(TIMEOUT_S)
    proxy.reset()
    with pytest.raises(errors.OfflineError, match=str((len(LAYERS) - 1) * LAYER_BYTES)):
        weightcache.load_model(layers_url, "cpu", offline=True, storage_options=options)
    assert proxy.requests == []


@pytest.fixture
def motley(folder: Path) -> Path:
    """The tiny model with files of other formats and subfolders beside its weights."""
    for name in ("pytorch_model.bin", "model-q4.gguf", "onnx/model.onnx", "1_Pooling/config.json", "empty.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"" if name == "empty.txt" else tensor_bytes(0, name, "U8", (5000,)))
    return folder


def test_pull_writes_every_file_bit_for_bit(motley: Path, bucket: Bucket, tmp_path: Path, options: Options) -> None:
    weightcache.pull(bucket.upload(motley, "motley"), tmp_path / "pulled", storage_options=options)
    assert contents(tmp_path / "pulled") == contents(motley)


def test_pull_without_weights_writes_what_lies_beside_them(
    motley: Path, bucket: Bucket, tmp_path: Path, options: Options
) -> None:
    url, target = bucket.upload(motley, "motley"), tmp_path / "pulled"
    report = weightcache.pull(url, target, weights=False, storage_options=options)
    weights = (".safetensors", ".bin", ".gguf", ".onnx")
    beside = {name: content for name, content in contents(motley).items() if not name.endswith(weights)}
    assert contents(target) == beside
    assert report.bytes["origin"] == sum(map(len, beside.values()))


def test_pull_of_headers_tells_the_tensors_and_is_no_model(motley: Path, bucket: Bucket, tmp_path: Path) -> None:
    url, options = bucket.upload(motley, "motley"), bucket.server.storage_options()
    weightcache.pull(url, tmp_path / "pulled", weights=False, headers=True, storage_options=options)
    pulled = contents(tmp_path / "pulled")
    for path in motley.glob("*.safetensors"):
        whole = path.read_bytes()
        assert pulled[path.name] == whole[: 8 + int.from_bytes(whole[:8], "little")]
    assert "pytorch_model.bin" not in pulled
    with pytest.raises(weightcache.errors.FormatError, match="cut short"):
        weightcache.load_model(tmp_path / "pulled", "cpu")


def test_pull_replaces_what_had_a_files_name(motley: Path, bucket: Bucket, tmp_path: Path, options: Options) -> None:
    target = tmp_path / "pulled"
    (target / "onnx").mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin", "onnx/model.onnx"):
        (target / name).write_bytes(bytes(100_000))
    weightcache.pull(bucket.upload(motley, "motley"), target, storage_options=options)
    assert contents(target) == contents(motley)


def test_pull_after_a_load_fetches_no_weights_again(
    layers: Path, layers_url: str, tmp_path: Path, proxy: Proxy, options: Options
) -> None:
    fill(layers_url, options)
    proxy.reset()
    weightcache.pull(layers_url, tmp_path / "pulled", storage_options=options)
    assert contents(tmp_path / "pulled") == contents(layers)
    assert proxy.body_bytes(WEIGHTS) < HEADER_READ  # the header's own chunk is of no use to a load


@pytest.mark.usefixtures("collected")
def test_pull_refuses_to_leave_the_folder_through_a_link(
    motley: Path, bucket: Bucket, tmp_path: Path, options: Options
) -> None:
    target, outside = tmp_path / "pulled", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    (target / "onnx").symlink_to(outside)
    with pytest.raises(errors.UnsafePathError, match="onnx"):
        weightcache.pull(bucket.upload(motley, "motley"), target, storage_options=options)
    assert contents(outside) == {}
    assert contents(target) == {}


def test_plan_reads_no_weights(layers_url: str, proxy: Proxy, options: Options) -> None:
    weightcache.plan(layers_url, storage_options=options)
    assert proxy.body_bytes(WEIGHTS) == HEADER_READ


def test_a_plan_is_what_the_load_then_does(layers_url: str, options: Options) -> None:
    with weightcache.load_model(layers_url, "cpu", include="layers.[02].*", storage_options=options) as model:
        assert model.wait_stored(TIMEOUT_S)
    planned = weightcache.plan(layers_url, exclude="layers.5.*", storage_options=options)
    with weightcache.load_model(layers_url, "cpu", exclude="layers.5.*", storage_options=options) as model:
        report = model.report
    assert planned.disk_bytes == 2 * LAYER_BYTES
    assert (planned.origin_bytes, planned.disk_bytes) == (report.bytes["origin"], report.bytes["disk"])
    assert (planned.n_tensors, planned.tensor_bytes) == (report.n_tensors, report.tensor_bytes)
    assert planned.revision == report.revision


# -- what a loaded model is


def test_a_tensor_outlives_its_model(folder: Path, url: str, options: Options) -> None:
    model = weightcache.load_model(url, "cpu", storage_options=options)
    tensors = dict(model)
    model.close()
    del model
    gc.collect()
    assert_same(tensors, tensors_of(folder))


def test_files_are_real_and_code_is_never_run(folder: Path, url: str, cache: Path, options: Options) -> None:
    with weightcache.load_model(url, "cpu", storage_options=options) as model:
        assert all(path.is_relative_to(cache) for path in model.files.values())
        found = {name: path.read_bytes() for name, path in model.files.items()}
        assert model.config == json.loads((folder / "config.json").read_bytes())
    assert found == {name: body for name, body in contents(folder).items() if not re.search(WEIGHTS, name)}


def test_writing_into_tensors_at_once_never_corrupts_the_cache(layers: Path, layers_url: str, options: Options) -> None:
    with weightcache.load_model(layers_url, "cpu", storage_options=options) as model:
        for tensor in model.values():
            tensor.zero_()
        assert model.wait_stored(TIMEOUT_S)
    assert weightcache.verify(deep=True).sound
    with weightcache.load_model(layers_url, "cpu", storage_options=options) as model:
        assert model.report.warnings == []
        assert_same(model, tensors_of(layers))


def test_progress_ends_at_the_total(url: str, options: Options) -> None:
    told: list[tuple[int, int]] = []
    with weightcache.load_model(
        url, "cpu", storage_options=options, progress=lambda done, total: told.append((done, total))
    ) as model:
        total = sum(model.report.bytes.values())
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_report_is_json_with_every_stage(url: str, options: Options) -> None:
    with weightcache.load_model(url, "cpu", storage_options=options) as model:
        told = json.loads(json.dumps(model.report.as_dict()))
    assert told["seconds"].keys() == STAGES


def test_every_byte_that_moves_is_noted_in_its_lane(url: str, options: Options) -> None:
    with weightcache.load_model(url, "cpu", storage_options=options) as cold:
        cold.wait_stored()
    with weightcache.load_model(url, "cpu", storage_options=options) as warm:
        warm.wait_stored()
    noted = [lane_bytes(model.report.as_dict(n_spans=1000)) for model in (cold, warm)]
    origin, stored, disk = cold.report.bytes["origin"], cold.report.stored_bytes, warm.report.bytes["disk"]
    assert noted == [{"stage": 0, "origin": origin, "verify": origin, "store": stored}, {"stage": 0, "disk": disk}]
    assert min(origin, stored, disk) > 0


def lane_bytes(report: dict[str, Any]) -> dict[str, int]:
    lanes: dict[str, int] = {}
    for lane, _, start_s, stop_s, nbytes in report["spans"]:
        assert 0 <= start_s <= stop_s
        lanes[lane] = lanes.get(lane, 0) + nbytes
    return lanes


def test_a_local_folder_in_place_is_noted(folder: Path) -> None:
    with weightcache.load_model(folder, "cpu") as model:
        noted = lane_bytes(model.report.as_dict(n_spans=1000))
    assert noted == {"stage": 0, "origin": model.report.bytes["origin"]}


def test_a_process_that_ends_after_its_load_has_stored_everything(
    layers: Path, layers_url: str, options: Options, cache: Path
) -> None:
    program = (
        "import json, sys, weightcache\n"
        "weightcache.load_model(sys.argv[1], 'cpu', storage_options=json.loads(sys.argv[2]))\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, layers_url, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert staged_files(cache) == []
    with weightcache.load_model(layers_url, "cpu", offline=True, storage_options=options) as model:
        assert_same(model, tensors_of(layers))


# -- other origins and modes


def test_a_memory_url_loads(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(f"{folder}/", "/integration-load/", recursive=True)
    try:
        with weightcache.load_model("memory://integration-load", "cpu") as model:
            assert_same(model, tensors_of(folder))
    finally:
        memory.rm("/integration-load", recursive=True)


def test_an_http_url_loads(folder: Path, http_folder: Callable[[Path], HttpServer]) -> None:
    server = http_folder(folder.parent)
    with weightcache.load_model(f"{server.endpoint}/model", "cpu") as model:
        assert_same(model, tensors_of(folder))


def test_a_local_folder_is_read_in_place(folder: Path, cache: Path) -> None:
    with weightcache.load_model(folder, "cpu") as model:
        assert_same(model, tensors_of(folder))
        assert model.files["config.json"] == folder / "config.json"
    assert chunk_files(cache) == {}


def test_a_local_folder_is_stored_on_demand(folder: Path, cache: Path) -> None:
    with weightcache.load_model(folder, "cpu", cache="disk") as model:
        assert_same(model, tensors_of(folder))
        assert model.wait_stored(TIMEOUT_S)
    with weightcache.load_model(folder, "cpu", cache="disk") as again:
        assert_same(again, tensors_of(folder))
        assert again.report.bytes["origin"] == 0
    assert chunk_files(cache)


def test_cache_none_leaves_nothing_in_the_cache(folder: Path, url: str, cache: Path, options: Options) -> None:
    with weightcache.load_model(url, "cpu", cache="none", storage_options=options) as model:
        assert_same(model, tensors_of(folder))
    assert contents(cache) == {}


def test_with_cache_none_files_live_until_the_model_is_closed(folder: Path, url: str, options: Options) -> None:
    model = weightcache.load_model(url, "cpu", cache="none", storage_options=options)
    path = model.files["tokenizer.json"]
    assert path.read_bytes() == (folder / "tokenizer.json").read_bytes()
    model.close()
    assert not path.exists()


@pytest.mark.usefixtures("collected")
def test_a_stalled_origin_is_a_deadline_error(url: str, proxy: Proxy, options: Options) -> None:
    proxy.script("GET .*" + WEIGHTS, "stall " * 20)
    with pytest.raises(errors.DeadlineError, match="timeout_s"):
        weightcache.load_model(url, "cpu", timeout_s=0.3, storage_options=options)


def test_loads_in_many_threads_are_all_whole(folder: Path, url: str, options: Options) -> None:
    with ThreadPoolExecutor(4) as threads:
        loads = [threads.submit(weightcache.load_model, url, "cpu", storage_options=options) for _ in range(4)]
        models = [load.result(TIMEOUT_S) for load in loads]
    for model in models:
        assert_same(model, tensors_of(folder))
        model.close()


def test_a_plan_names_tensors_and_each_can_be_asked_for_alone(tmp_path: Path) -> None:
    shapes: Shapes = {"a[0].weight": ("F32", (4,)), "a0.weight": ("F32", (8,))}
    write_safetensors(tmp_path / "model.safetensors", shapes)
    assert weightcache.plan(tmp_path).names == ("a[0].weight", "a0.weight")
    for name in shapes:
        with weightcache.load_model(tmp_path, "cpu", include=[glob.escape(name)]) as model:
            assert list(model) == [name]
