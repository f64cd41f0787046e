"""Loads to a device, through the stand-in libcuda: every way a byte can come, in every order the driver may choose.

What the stand-in finds wrong, or finds left over, fails the test.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
from cache_folder import chunk_files, flip_byte
from hosted import Hosted, host
from nodes import Node, wait_until
from reference import assert_same, raw, tensors_of
from servers import Bucket, Proxy
from standin import StandIn, build_standin

import weightcache
from weightcache import delivery, windows
from weightcache.errors import CapacityError, ConfigError, DeviceError, OriginChangedError
from weightcache.layout import DEVICE_ALIGNMENT_NBYTES
from weightcache.report import Report
from weightcache.tiers import device as devices
from weightcache.tiers.host import host_tier

MODES = ("late", "early", "random", "threads")
SHAPES: models.Shapes = {
    "a.weight": ("BF16", (1024, 1536)),
    "b.odd": ("U8", (1001,)),
    "c.small": ("F32", (7,)),
    "d.empty": ("F16", (0, 4)),
    "e.scalar": ("I64", ()),
    "f.weight": ("F16", (2048, 1024)),
    "g.large": ("F32", (3000, 2048)),
    "h.mask": ("BOOL", (33,)),
    "i.weight": ("F32", (512, 512)),
}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_standin(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def standin(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setenv("WEIGHTCACHE_LIBCUDA", str(library))
    driver = StandIn(library)
    driver.reset()
    yield driver
    for image in host_tier.images():
        host_tier.drop(image.uri)
    devices.close_devices()
    assert driver.violations() == []
    assert driver.leaks() == []
    driver.reset()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    models.write_safetensors(folder / "model.safetensors", SHAPES)
    (folder / "config.json").write_text('{"model_type": "test"}')
    return folder


@pytest.fixture
def hosted(folder: Path, bucket: Bucket, proxy: Proxy) -> Hosted:
    return host(folder, bucket, proxy)


# -- the ways


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_in_place_comes_to_the_device(standin: StandIn, folder: Path, mode: str) -> None:
    standin.configure(f"mode={mode},seed=3")
    with weightcache.load_model(folder, "cuda:0") as model:
        assert model.report.device == "cuda:0"
        assert_same(model, tensors_of(folder))
        assert model.config == {"model_type": "test"}


@pytest.mark.parametrize("mode", MODES)
def test_a_bucket_comes_to_the_device_and_to_disk_and_from_there_again(
    standin: StandIn, hosted: Hosted, mode: str
) -> None:
    standin.configure(f"mode={mode},seed=3")
    with weightcache.load_model(hosted.url, "cuda:0", storage_options=hosted.options) as model:
        assert_same(model, hosted.tensors)
        assert model.report.bytes["disk"] == 0
        assert model.wait_stored(60)
    with weightcache.load_model(hosted.url, "cuda:0", storage_options=hosted.options) as model:
        assert_same(model, hosted.tensors)
        assert (model.report.bytes["origin"], model.report.warnings) == (0, [])
        assert "through the ring" in model.report.choices["to the device"]


def test_what_comes_to_the_device_is_noted(standin: StandIn, hosted: Hosted, no_images: None) -> None:
    with weightcache.load_model(hosted.url, "cuda:0", storage_options=hosted.options) as cold:
        cold.wait_stored()
    assert nbytes_of(cold.report, "device") >= cold.report.tensor_bytes
    weightcache.prefetch(hosted.url, tier="host", storage_options=hosted.options)
    with weightcache.load_model(hosted.url, "cuda:0", storage_options=hosted.options) as hot:
        assert nbytes_of(hot.report, "host") == hot.report.bytes["host"] > 0


def nbytes_of(report: Report, lane: str) -> int:
    return sum(span.nbytes for span in report.spans.noted() if span.lane == lane)


@pytest.mark.parametrize("mode", MODES)
def test_an_image_in_host_memory_comes_to_the_device(standin: StandIn, folder: Path, mode: str) -> None:
    standin.configure(f"mode={mode},seed=3")
    weightcache.prefetch(folder, tier="host")
    ways = []
    for _ in range(3):
        with weightcache.load_model(folder, "cuda:0") as model:
            assert_same(model, tensors_of(folder))
            assert (model.report.bytes["origin"], model.report.bytes["disk"]) == (0, 0)
            ways.append(model.report.choices["to the device"].partition(" bytes ")[2])
    assert ways == ["through the ring", "from registered memory", "from registered memory"]


@pytest.mark.parametrize("mode", MODES)
def test_the_daemon_s_image_comes_to_the_device_also_while_it_is_being_filled(
    standin: StandIn, hosted: Hosted, mode: str
) -> None:
    standin.configure(f"mode={mode},seed=3")
    with Node():
        for _ in range(2):
            with weightcache.load_model(hosted.url, "cuda:0", storage_options=hosted.options) as model:
                assert_same(model, hosted.tensors)
                assert model.report.choices["daemon"].startswith("attached")
                assert "through the ring" in model.report.choices["to the device"]
                assert (model.report.bytes["origin"], model.report.bytes["disk"]) == (0, 0)
        got = weightcache.stream(hosted.url, "cuda:0", storage_options=hosted.options)
        assert_same(dict(got), hosted.tensors)


def test_a_rotten_chunk_is_fetched_again_on_the_way(standin: StandIn, hosted: Hosted, tmp_path: Path) -> None:
    with weightcache.load_model(hosted.url, "cpu", storage_options=hosted.options) as model:
        assert model.wait_stored(60)
    flip_byte(max(chunk_files(tmp_path / "cache").values(), key=lambda path: path.stat().st_size), 1234)
    with weightcache.load_model(hosted.url, "cuda:0", storage_options=hosted.options) as model:
        assert_same(model, hosted.tensors)
        assert model.report.warnings == ["1 chunks on disk were lost or rotten and fetched again"]


def test_parts_of_a_model_come_alone(standin: StandIn, folder: Path) -> None:
    with weightcache.load_model(folder, "cuda:0", include=["c.*", "i.*"]) as model:
        assert set(model) == {"c.small", "i.weight"}
        assert raw(model["i.weight"]) == raw(tensors_of(folder)["i.weight"])
        assert model.report.bytes["origin"] < 2 << 20


# -- the slab


def test_tensors_lie_in_one_slab_at_256_byte_boundaries(standin: StandIn, folder: Path) -> None:
    with weightcache.load_model(folder, "cuda:0") as model:
        filled = [tensor for tensor in model.values() if tensor.numel()]
        assert len({tensor.untyped_storage().data_ptr() for tensor in filled}) == 1
        assert all(tensor.data_ptr() % DEVICE_ALIGNMENT_NBYTES == 0 for tensor in filled)
        slab_nbytes = filled[0].untyped_storage().nbytes()
        assert slab_nbytes <= model.report.tensor_bytes + DEVICE_ALIGNMENT_NBYTES * (len(model) + 1)


def test_neighbours_are_copied_together(standin: StandIn, tmp_path: Path) -> None:
    """6,000 small tensors are a handful of copies, not 6,000."""
    folder = tmp_path / "many"
    folder.mkdir()
    models.write_safetensors(folder / "model.safetensors", {f"t{n:04}": ("F32", (64,)) for n in range(6000)})
    with weightcache.load_model(folder, "cuda:0") as model:
        assert len(model) == 6000
    assert standin.facts().copies < 10


def test_several_devices_in_one_process(standin: StandIn, folder: Path) -> None:
    standin.configure("devices=2")
    with (
        weightcache.load_model(folder, "cuda:0") as first,
        weightcache.load_model(folder, torch.device("cuda", 1)) as second,
    ):
        assert (first.report.device, second.report.device) == ("cuda:0", "cuda:1")
        assert_same(first, tensors_of(folder))
        assert_same(second, tensors_of(folder))
    with pytest.raises(DeviceError, match="'cuda:2' is not there: 2 CUDA devices"):
        weightcache.load_model(folder, "cuda:2")


# -- streams


def test_a_streamed_tensor_stays_valid_as_long_as_it_is_held(
    standin: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW_NBYTES", 1 << 20)
    assert_same(dict(weightcache.stream(folder, "cuda:0")), tensors_of(folder))


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """A checkpoint of twelve tensors, each a group of its own."""
    folder = tmp_path / "layers"
    folder.mkdir()
    models.write_safetensors(folder / "model.safetensors", {f"t{n}": ("F32", (512, 1024)) for n in range(12)})
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[object]]:
    """The memory of each group of tensors that streams have made room for."""
    monkeypatch.setattr(windows, "WINDOW_NBYTES", 1 << 20)
    found: list[weakref.ref[object]] = []
    make = windows.home_for

    def remember(*arguments: object) -> object:
        home = make(*arguments)  # type: ignore[arg-type]
        found.append(weakref.ref(home))
        return home

    monkeypatch.setattr(windows, "home_for", remember)
    return found


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_a_stream_holds_few_groups_of_tensors_at_a_time(
    standin: StandIn, layers: Path, made: list[weakref.ref[object]], device: str
) -> None:
    n_alive = []
    for _, tensor in weightcache.stream(layers, device):
        del tensor
        gc.collect()
        n_alive.append(sum(home() is not None for home in made))
    assert len(made) == 12
    assert max(n_alive) <= windows.WINDOWS_AHEAD


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_a_stream_runs_ahead_within_a_share_of_what_is_free(
    standin: StandIn, layers: Path, made: list[weakref.ref[object]], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    for module in (windows, devices):
        monkeypatch.setattr(module, "memory_available_bytes", lambda: 50 << 20)
    done = [0]
    stream = weightcache.stream(layers, device, ahead_share=0.2, progress=lambda nbytes, _: done.__setitem__(0, nbytes))
    assert len(stream.names) == 12
    wait_until(lambda: done[0] >= 5 * (2 << 20))
    assert len(made) == 5
    assert_same(dict(stream), tensors_of(layers))


def test_a_stream_that_is_left_early_stops(standin: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW_NBYTES", 1 << 20)
    stream = weightcache.stream(folder, "cuda:0")
    next(stream)
    stream.close()


# -- conversion


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_floating_point_tensors_are_converted_and_others_kept(
    standin: StandIn, folder: Path, device: str, dtype: str | torch.dtype
) -> None:
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with weightcache.load_model(folder, device, dtype=dtype) as model:
        for name, tensor in tensors_of(folder).items():
            expected = tensor.to(wanted) if tensor.is_floating_point() else tensor
            assert model[name].dtype == expected.dtype
            assert raw(model[name]) == raw(expected), name
        assert model.config == {"model_type": "test"}
        assert str(wanted) in model.report.choices["dtype"]


@pytest.mark.parametrize("dtype", ["int8", "brain16", torch.uint8])
def test_a_dtype_that_is_none_of_floating_point_is_refused(folder: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"expected one of .*torch\.bfloat16"):
        weightcache.load_model(folder, "cpu", dtype=dtype)


# -- what fails


def test_without_a_driver_the_device_is_refused_with_the_reason(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCACHE_LIBCUDA", "libno-such-driver.so.1")
    with pytest.raises(DeviceError, match=r"no driver: libno-such-driver\.so\.1.*device='cpu'"):
        weightcache.load_model(folder, "cuda:0")
    with weightcache.load_model(folder) as model:
        assert model.report.choices["device"] == "cpu: torch sees no CUDA device"


@pytest.mark.parametrize("mode", MODES)
def test_an_error_of_the_device_is_told_and_nothing_is_left(standin: StandIn, folder: Path, mode: str) -> None:
    standin.configure(f"mode={mode},seed=5,fail=cuMemcpyHtoDAsync_v2:2:700,sticky=1")
    with pytest.raises(DeviceError, match="CUDA error 700"):
        weightcache.load_model(folder, "cuda:0")
    devices.close_devices()
    assert standin.leaks() == []
    standin.reset()
    with weightcache.load_model(folder, "cuda:0") as model:
        assert_same(model, tensors_of(folder))


@pytest.mark.parametrize(
    ("fail", "kind"),
    [
        ("fail=cuMemHostRegister_v2:1:2", "page-locked by the driver"),
        ("fail=cuMemHostRegister_v2:1:2,fail=cuMemHostAlloc:1:2", "pageable and so slower"),
    ],
)
def test_a_ring_that_cannot_be_locked_as_wished_is_said_and_right(
    standin: StandIn, folder: Path, fail: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    standin.configure(fail)
    with weightcache.load_model(folder, "cuda:0") as model:
        assert_same(model, tensors_of(folder))
        assert kind in model.report.choices["ring"]
        assert kind in caplog.text


def test_an_image_that_cannot_be_registered_goes_through_the_ring(standin: StandIn, folder: Path) -> None:
    weightcache.prefetch(folder, tier="host")
    weightcache.load_model(folder, "cuda:0").close()
    standin.configure("fail=cuMemHostRegister_v2:1:2,fail=cuMemHostRegister_v2:2:2,fail=cuMemHostRegister_v2:3:2")
    with weightcache.load_model(folder, "cuda:0") as model:
        assert_same(model, tensors_of(folder))
        assert "could be registered" in model.report.choices["registration"]
        assert "through the ring" in model.report.choices["to the device"]


def test_an_image_is_registered_for_one_device(standin: StandIn, folder: Path) -> None:
    standin.configure("devices=2")
    weightcache.prefetch(folder, tier="host")
    for device in ("cuda:0", "cuda:0", "cuda:1", "cuda:1", "cuda:0"):
        with weightcache.load_model(folder, device) as model:
            assert_same(model, tensors_of(folder))
    assert standin.facts().registrations == 3  # a ring each, and the image


def test_a_full_disk_does_not_stop_a_load_to_the_device(
    standin: StandIn, hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_DISK_BUDGET_BYTES", "1MiB")
    with weightcache.load_model(hosted.url, "cuda:0", storage_options=hosted.options) as model:
        assert_same(model, hosted.tensors)
        assert model.wait_stored(60)
        assert any("the disk tier failed" in warning for warning in model.report.warnings)


def test_a_disk_slower_than_the_origin_keeps_less_and_holds_nothing_up(
    standin: StandIn, hosted: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "LEAST_WAITING_NBYTES", 1)
    monkeypatch.setattr(delivery, "memory_available_bytes", lambda: 2)
    with weightcache.load_model(hosted.url, "cuda:0", storage_options=hosted.options) as model:
        assert_same(model, hosted.tensors)
        assert any("slower than the origin" in warning for warning in model.report.warnings)
    with weightcache.load_model(hosted.url, "cpu", storage_options=hosted.options) as model:
        assert_same(model, hosted.tensors)
        assert model.report.bytes["origin"] > 0


def test_g16_a_forked_child_gets_a_clear_error_and_the_parent_goes_on(standin: StandIn, folder: Path) -> None:
    weightcache.load_model(folder, "cuda:0").close()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            weightcache.load_model(folder, "cuda:0")
            said = b"loaded"
        except DeviceError as exc:
            said = str(exc).encode()
        except BaseException as exc:
            said = repr(exc).encode()
        os.write(write_end, said)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as heard:
        assert b"forked" in heard.read()
    os.waitpid(child, 0)
    with weightcache.load_model(folder, "cuda:0") as model:
        assert_same(model, tensors_of(folder))


# -- images in host memory


def test_a_held_image_is_attached_without_a_copy(folder: Path, no_images: None) -> None:
    weightcache.prefetch(folder, tier="host")
    with weightcache.load_model(folder, "cpu") as model:
        assert_same(model, tensors_of(folder))
        assert model.report.bytes["host"] >= model.report.tensor_bytes
        assert (model.report.bytes["origin"], model.report.bytes["disk"]) == (0, 0)
        [image] = host_tier.images()
        assert image.address != model["a.weight"].untyped_storage().data_ptr()


def test_who_writes_into_a_held_image_changes_it_for_nobody_else(folder: Path, no_images: None) -> None:
    weightcache.prefetch(folder, tier="host")
    with weightcache.load_model(folder, "cpu") as one, weightcache.load_model(folder, "cpu") as other:
        one["i.weight"].fill_(1)
        assert_same(other, tensors_of(folder))
    with weightcache.load_model(folder, "cpu") as later:
        assert_same(later, tensors_of(folder))


def test_tensors_outlive_the_image_they_came_from(folder: Path, no_images: None) -> None:
    weightcache.prefetch(folder, tier="host")
    model = weightcache.load_model(folder, "cpu")
    assert weightcache.evict(folder) > 0
    assert host_tier.images() == []
    assert_same(model, tensors_of(folder))


def test_an_image_that_a_model_is_attached_to_stays(
    tmp_path: Path, no_images: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_HOST_BUDGET_BYTES", "5MiB")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        models.write_safetensors(tmp_path / name / "model.safetensors", {"t": ("F32", (768, 1024))})
    weightcache.prefetch(tmp_path / "one", tier="host")
    with weightcache.load_model(tmp_path / "one", "cpu"):
        with pytest.raises(CapacityError, match="in use or kept"):
            weightcache.prefetch(tmp_path / "two", tier="host")
        assert [model.in_use for model in weightcache.models() if model.tier == "host"] == [True]
    weightcache.prefetch(tmp_path / "two", tier="host")


def test_what_was_prefetched_to_host_memory_needs_no_origin(hosted: Hosted, no_images: None) -> None:
    weightcache.prefetch(hosted.url, tier="host", storage_options=hosted.options)
    hosted.proxy.reset()
    with weightcache.load_model(hosted.url, "cpu", offline=True, storage_options=hosted.options) as model:
        assert_same(model, hosted.tensors)
        assert model.config == {"model_type": "test"}
        assert model.report.bytes == {"origin": 0, "disk": 0, "host": model.report.bytes["host"]}
    assert hosted.served_bytes() == 0


def test_g05_a_folder_that_changes_under_a_stream_shows_nothing_of_its_new_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "WINDOW_NBYTES", 1 << 20)
    before = tensors_of(folder)
    before = {name: tensor.clone() for name, tensor in before.items()}
    shown = {}
    stream = weightcache.stream(folder, "cpu")
    name, tensor = next(stream)
    shown[name] = tensor
    models.write_safetensors(folder / "model.safetensors", SHAPES, seed=9)
    with pytest.raises(OriginChangedError, match="load again"):
        for name, tensor in stream:
            shown[name] = tensor
    assert len(shown) < len(before)
    assert_same(shown, {name: before[name] for name in shown})


def test_an_image_of_another_state_is_not_used(folder: Path, no_images: None) -> None:
    weightcache.prefetch(folder, tier="host")
    models.write_safetensors(folder / "model.safetensors", dict(SHAPES), seed=7)
    with weightcache.load_model(folder, "cpu") as model:
        assert_same(model, tensors_of(folder))
        assert model.report.bytes["host"] == 0


def test_g13_the_host_budget_holds(tmp_path: Path, no_images: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCACHE_HOST_BUDGET_BYTES", "5MiB")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        models.write_safetensors(tmp_path / name / "model.safetensors", {"t": ("F32", (768, 1024))})
        weightcache.prefetch(tmp_path / name, tier="host")
    assert len(host_tier.images()) == 1
    (tmp_path / "large").mkdir()
    models.write_safetensors(tmp_path / "large" / "model.safetensors", {"t": ("F32", (2048, 1024))})
    with pytest.raises(CapacityError, match="host budget"):
        weightcache.prefetch(tmp_path / "large", tier="host")


@pytest.fixture
def no_images() -> Iterator[None]:
    yield
    for image in host_tier.images():
        host_tier.drop(image.uri)
