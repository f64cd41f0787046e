"""What only a real GPU can show; skipped where torch sees none.

Run with `python -m pytest tests/gpu`, or by `python benchmarks/gpu.py`, which does at its end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from reference import assert_same, tensors_of

import weightcache
from weightcache import _engine, windows
from weightcache.errors import CapacityError
from weightcache.layout import DEVICE_ALIGNMENT_NBYTES
from weightcache.tiers.host import host_tier

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device on this machine")

SHAPES: models.Shapes = {
    "a.weight": ("BF16", (4096, 1536)),
    "b.odd": ("U8", (1001,)),
    "c.small": ("F32", (7,)),
    "d.empty": ("F16", (0, 4)),
    "e.scalar": ("I64", ()),
    "f.weight": ("F16", (8192, 4096)),
    "g.large": ("F32", (4000, 8192)),
}
DEVICES = [f"cuda:{index}" for index in range(torch.cuda.device_count())]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    models.write_safetensors(folder / "model.safetensors", SHAPES)
    return folder


@pytest.fixture(autouse=True)
def no_images() -> None:
    for image in host_tier.images():
        host_tier.drop(image.uri)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_every_bit_comes_to_the_device(folder: Path, device: str, cache: str) -> None:
    for _ in range(2):
        with weightcache.load_model(folder, device, cache=cache) as model:
            assert_same(model, tensors_of(folder))
            assert all(str(tensor.device) == device for tensor in model.values())
            assert all(tensor.data_ptr() % DEVICE_ALIGNMENT_NBYTES == 0 for tensor in model.values() if tensor.numel())
            assert model.wait_stored(120)


def test_the_ring_is_page_locked_as_wished(folder: Path) -> None:
    with weightcache.load_model(folder, "cuda:0") as model:
        assert model.report.choices["ring"].endswith("page-locked")
        assert model.report.warnings == []


def test_an_image_in_host_memory_is_registered_on_its_second_use_and_stays_read_only(folder: Path) -> None:
    weightcache.prefetch(folder, tier="host")
    ways = []
    for _ in range(3):
        with weightcache.load_model(folder, "cuda:0") as model:
            assert_same(model, tensors_of(folder))
            ways.append(model.report.choices["to the device"].partition(" bytes ")[2])
    assert ways[-1] == "from registered memory"
    with weightcache.load_model(folder, "cpu") as model:
        assert_same(model, tensors_of(folder))


def test_memory_that_was_just_freed_is_written_only_after_its_last_use(folder: Path) -> None:
    """The allocator hands memory out again while kernels that use it are still queued on the current stream."""
    nbytes = sum(tensor.nbytes for tensor in tensors_of(folder).values())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        used = torch.zeros(nbytes // 4 + 4096, dtype=torch.float32, device="cuda:0")
        torch.cuda._sleep(200_000_000)
        used.add_(1)
        result = used.clone()
        del used
        with weightcache.load_model(folder, "cuda:0") as model:
            assert_same(model, tensors_of(folder))
    torch.cuda.synchronize()
    assert bool((result == 1).all())


def test_a_load_beside_a_graph_capture_disturbs_it_not(folder: Path) -> None:
    x = torch.ones(8, device="cuda:0")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
    code = (
        "import sys, threading, torch, weightcache\n"
        "x = torch.ones(8, device='cuda:0'); g = torch.cuda.CUDAGraph(); s = torch.cuda.Stream()\n"
        "weightcache.load_model(sys.argv[1], 'cuda:0').close()\n"
        "s.wait_stream(torch.cuda.current_stream())\n"
        "done = []\n"
        "def load():\n"
        "    done.append(len(weightcache.load_model(sys.argv[1], 'cuda:0')))\n"
        "with torch.cuda.graph(g, stream=s, capture_error_mode='thread_local'):\n"
        "    t = threading.Thread(target=load); t.start(); y = x * 3; t.join()\n"
        "g.replay(); torch.cuda.synchronize(); print(done, y.sum().item())\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert shown.stdout.strip() == f"[{len(SHAPES)}] 24.0", shown.stderr
    graph.replay()
    assert y.sum().item() == 16.0


def test_streamed_tensors_stay_valid_and_memory_stays_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW_NBYTES", 16 << 20)
    assert_same(dict(weightcache.stream(folder, "cuda:0")), tensors_of(folder))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _, tensor in weightcache.stream(folder, "cuda:0"):
        del tensor
    largest = max(tensor.nbytes for tensor in tensors_of(folder).values())
    assert torch.cuda.max_memory_allocated() - before <= 3 * largest + (64 << 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversion_happens_on_the_device(folder: Path, dtype: torch.dtype) -> None:
    with weightcache.load_model(folder, "cuda:0", dtype=dtype) as model:
        for name, tensor in tensors_of(folder).items():
            expected = tensor.cuda().to(dtype) if tensor.is_floating_point() else tensor
            assert model[name].is_cuda
            assert_same({name: model[name]}, {name: expected})


def test_a_module_on_the_gpu_is_filled_in_place(tmp_path: Path) -> None:
    module = torch.nn.Linear(512, 256, device="cuda:0", dtype=torch.float32)
    folder = tmp_path / "linear"
    folder.mkdir()
    models.write_safetensors(folder / "model.safetensors", {"weight": ("F32", (256, 512)), "bias": ("F32", (256,))})
    before = module.weight.data_ptr()
    report = weightcache.load_into(module, folder)
    assert (module.weight.data_ptr(), report.device) == (before, "cuda:0")
    assert_same(dict(module.state_dict()), tensors_of(folder))


def test_a_device_that_is_too_small_is_told_with_both_sizes(folder: Path) -> None:
    free, _ = torch.cuda.mem_get_info(0)
    torch.cuda.empty_cache()
    hog = torch.empty(max(0, free - (48 << 20)), dtype=torch.uint8, device="cuda:0")
    with pytest.raises(CapacityError, match="has no room for") as caught:
        weightcache.load_model(folder, "cuda:0")
    del hog
    torch.cuda.empty_cache()
    assert caught.value.facts["wanted_bytes"] > caught.value.facts["free_bytes"]
    weightcache.load_model(folder, "cuda:0").close()


def test_the_driver_tells_what_torch_tells() -> None:
    driver = _engine.Driver()
    assert driver.count() == torch.cuda.device_count()
    assert not driver.is_stand_in
    name, _, nbytes = driver.describe(0)
    assert (name, nbytes) == (torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory)
