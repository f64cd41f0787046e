"""Tensors over an image: each dtype and shape as safetensors' own loader has it, and memory that outlives the model."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Mapping
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from strategies import examples

import weightcache
from weightcache.errors import DeviceError, MismatchError
from weightcache.header import TensorEntry
from weightcache.tensors import TORCH_DTYPES, Binder, check_fit, fill_module, torch_form
from weightcache.tiers.device import resolve_device

NO_DRIVER = "libno-such-driver.so.1"
NOT_IN_TORCH = ("F6_E2M3", "F6_E3M2")


def write(folder: Path, shapes: models.Shapes) -> Path:
    folder.mkdir(exist_ok=True)
    models.write_safetensors(folder / "model.safetensors", shapes)
    return folder


def raw(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes; floats may be NaN, so bytes are what is compared."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (name, ours[name].dtype, ours[name].shape) == (name, tensor.dtype, tensor.shape)
        assert raw(ours[name]) == raw(tensor), name


@pytest.mark.parametrize("dtype", sorted(models.DTYPE_BITS.keys() - set(NOT_IN_TORCH)))
def test_dtype_is_bound_as_safetensors_loads_it(tmp_path: Path, dtype: str) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "matrix": (dtype, (3, 8)),
        "one": (dtype, (1, 2)),
        "cube": (dtype, (2, 1, 4)),
        "empty": (dtype, (0, 4)),
        "hollow": (dtype, (4, 0, 2)),
        "long": (dtype, (5000,)),
    }
    if models.DTYPE_BITS[dtype] >= 8:
        shapes["scalar"] = (dtype, ())
    folder = write(tmp_path / "m", shapes)
    with weightcache.load_model(folder, "cpu") as model:
        assert_same(model, load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("dtype", NOT_IN_TORCH)
def test_six_bit_floats_come_as_their_bytes(tmp_path: Path, dtype: str) -> None:
    shapes = {"matrix": (dtype, (3, 8)), "empty": (dtype, (0, 4)), "ragged": (dtype, (2, 2))}
    with weightcache.load_model(write(tmp_path / "m", shapes), "cpu") as model:
        assert {tensor.dtype for tensor in model.values()} == {torch.uint8}
        assert {name: tuple(tensor.shape) for name, tensor in model.items()} == {
            "matrix": (3, 6),
            "empty": (0, 3),
            "ragged": (3,),
        }
        assert raw(model["matrix"]) == models.tensor_bytes(0, "matrix", dtype, (3, 8))


def test_four_bit_floats_come_two_to_an_element(tmp_path: Path) -> None:
    with weightcache.load_model(write(tmp_path / "m", {"t": ("F4", (3, 8))}), "cpu") as model:
        assert (model["t"].dtype, tuple(model["t"].shape)) == (torch.float4_e2m1fn_x2, (3, 4))


def test_eight_bit_scales_have_their_own_dtype(tmp_path: Path) -> None:
    with weightcache.load_model(write(tmp_path / "m", {"t": ("F8_E8M0", (3, 8))}), "cpu") as model:
        assert (model["t"].dtype, tuple(model["t"].shape)) == (torch.float8_e8m0fnu, (3, 8))


def test_torch_without_the_newest_dtypes_gets_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    older = {name: dtype for name, dtype in TORCH_DTYPES.items() if name not in ("F4", "F8_E8M0")}
    monkeypatch.setattr("weightcache.tensors.TORCH_DTYPES", older)
    assert torch_form(TensorEntry("t", "F4", (3, 8), 0, 12)) == (torch.uint8, (3, 4))
    assert torch_form(TensorEntry("t", "F8_E8M0", (3, 8), 0, 24)) == (torch.uint8, (3, 8))


@examples
@given(
    st.lists(
        st.tuples(st.sampled_from(["U8", "BF16", "F32", "F64", "C64"]), st.lists(st.integers(0, 3), max_size=4)),
        max_size=8,
    )
)
def test_bound_tensor_reads_the_bytes_at_its_offset(forms: list[tuple[str, list[int]]]) -> None:
    memory = np.random.default_rng(0).integers(0, 2, 1 << 14, dtype=np.uint8)
    binder = Binder.over(memory, torch.device("cpu"))
    offset = 0
    for dtype, shape in forms:
        nbytes = models.tensor_nbytes(dtype, tuple(shape))
        tensor = binder.bind(TensorEntry("t", dtype, tuple(shape), 7, 7 + nbytes), offset)
        assert (tuple(tensor.shape), tensor.is_contiguous()) == (tuple(shape), True)
        assert raw(tensor) == memory[offset : offset + nbytes].tobytes()
        offset += -(-nbytes // 16) * 16


def test_bound_tensor_is_a_view_of_the_memory() -> None:
    memory = np.zeros(64, np.uint8)
    tensor = Binder.over(memory, torch.device("cpu")).bind(TensorEntry("t", "I32", (2,), 0, 8), 8)
    memory[8] = 5
    assert tensor.tolist() == [5, 0]


def test_misaligned_small_tensors_are_copied_and_right(tmp_path: Path) -> None:
    shapes = {"a": ("U8", (1,)), "b": ("F32", (3,)), "c": ("BF16", (1,)), "d": ("F64", ()), "e": ("C64", (2, 2))}
    folder = write(tmp_path / "m", shapes)
    with weightcache.load_model(folder, "cpu") as model:
        assert_same(model, load_file(folder / "model.safetensors"))
        assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in model.values())


def test_six_thousand_tensors_are_right(tmp_path: Path) -> None:
    dtypes = ("BF16", "F32", "I8", "F16", "F8_E4M3", "I64", "BOOL", "U8")
    shapes = {f"layer.{number}": (dtypes[number % 8], (number % 97,)) for number in range(6000)}
    folder = write(tmp_path / "m", shapes)
    with weightcache.load_model(folder, "cpu") as model:
        assert len(model) == 6000
        assert_same(model, load_file(folder / "model.safetensors"))


def test_tensors_outlive_the_model(tmp_path: Path) -> None:
    shapes = {"large": ("F32", (500, 700)), "odd": ("U8", (3,)), "small": ("F32", (5,))}
    folder = write(tmp_path / "m", shapes)
    model = weightcache.load_model(folder, "cpu")
    kept = dict(model)
    model.close()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert_same(kept, load_file(folder / "model.safetensors"))


def test_tensors_outlive_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"t": ("F32", (500, 700))})
    expected = load_file(folder / "model.safetensors")["t"].clone()
    with weightcache.load_model(folder, "cpu") as model:
        (folder / "model.safetensors").write_bytes(b"")
        assert raw(model["t"]) == raw(expected)


def test_model_is_a_mapping_until_it_is_closed(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"a": ("U8", (1,)), "b": ("U8", (2,))})
    model = weightcache.load_model(folder, "cpu")
    assert (list(model), len(model), "a" in model, "c" in model) == (["a", "b"], 2, True, False)
    assert f"{folder} 2 tensors on cpu" in repr(model)
    model.close()
    model.close()
    assert len(model) == 0


@pytest.mark.parametrize(
    ("files", "config"),
    [
        ({"config.json": '{"a": 1}', "model_index.json": '{"b": 1}'}, {"a": 1}),
        ({"model_index.json": '{"b": 1}'}, {"b": 1}),
        ({"config.json": "[1]"}, {}),
        ({}, {}),
    ],
)
def test_config_is_the_models_own(tmp_path: Path, files: dict[str, str], config: dict[str, int]) -> None:
    folder = write(tmp_path / "m", {"a": ("U8", (1,))})
    for name, text in files.items():
        (folder / name).write_text(text)
    with weightcache.load_model(folder / "model.safetensors", "cpu") as model:
        assert model.config == {}
    if "model_index.json" in files:
        (folder / "part").mkdir()
        (folder / "model.safetensors").rename(folder / "part" / "model.safetensors")
    with weightcache.load_model(folder, "cpu") as model:
        assert model.config == config
        assert {name: json.loads(path.read_text()) for name, path in model.files.items() if "json" in name} == {
            name: json.loads(text) for name, text in files.items()
        }


# Devices


def test_auto_says_what_it_chose() -> None:
    chosen, why = resolve_device("auto", NO_DRIVER)
    assert chosen.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert why.startswith(str(chosen))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x", 3.5])
def test_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(DeviceError, match="device"):
        resolve_device(device, NO_DRIVER)


# Modules


class Tied(torch.nn.Module):
    """A module whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(4, 2)
        self.head = torch.nn.Linear(2, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.zeros(3))


EMBED, HEAD = {"embed.weight": (4, 2)}, {"head.weight": (4, 2)}
SCALE = {"scale": (3,)}


@pytest.mark.parametrize("shapes", [EMBED | HEAD | SCALE, EMBED | SCALE, HEAD | SCALE])
def test_tied_parameter_fits_by_any_of_its_names(shapes: dict[str, tuple[int, ...]]) -> None:
    assert check_fit(Tied(), shapes, strict=True) == shapes.keys()


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (EMBED, "1 names missing (scale)"),
        (EMBED | SCALE | {"lm.weight": (4, 2)}, "1 unexpected (lm.weight)"),
        (EMBED | {"scale": (4,)}, "'scale' has shape (4,), the module expects (3,)"),
    ],
)
def test_model_that_does_not_fit_is_refused(shapes: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(MismatchError) as caught:
        check_fit(Tied(), shapes, strict=True)
    assert says in str(caught.value)


def test_model_that_fits_in_part_is_taken_in_part_on_request() -> None:
    assert check_fit(Tied(), EMBED | {"lm.weight": (4, 2)}, strict=False) == {"embed.weight"}


def test_module_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    with pytest.raises(MismatchError, match="to_empty"):
        check_fit(module, {"weight": (2, 2), "bias": (2,)}, strict=True)


def test_filling_keeps_identity_and_dtype() -> None:
    module = torch.nn.Linear(2, 1).to(torch.float64)
    before = module.weight
    fill_module(module, [("weight", torch.tensor([[1.0, 2.0]])), ("bias", torch.tensor([3.0]))])
    assert module.weight is before
    assert (module.weight.tolist(), module.bias.tolist()) == ([[1.0, 2.0]], [3.0])
    assert (module.weight.dtype, module.weight.requires_grad) == (torch.float64, True)
