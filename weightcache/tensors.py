"""Own the binding of an image to torch tensors: LoadedModel.

Never copies a tensor that lies well, and never outlives its memory: a tensor keeps the image alive.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from weightcache.errors import ConfigError, MismatchError
from weightcache.header import TensorEntry
from weightcache.report import Report

CPU = torch.device("cpu")

# safetensors 0.8 names to torch. F4 is packed two to an element; torch has no 6-bit type, so F6 comes as its bytes.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    **{
        name: getattr(torch, spelled)
        for name, spelled in (("F8_E8M0", "float8_e8m0fnu"), ("F4", "float4_e2m1fn_x2"))
        if hasattr(torch, spelled)
    },
}

PLAIN = frozenset(TORCH_DTYPES) - {"F4"}  # one element here is one element there


CONVERTIBLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class Binder:
    """Makes tensors over one memory: a view of a few microseconds each, no copy."""

    def __init__(self, base: torch.Tensor) -> None:
        """`base` is the memory as a contiguous uint8 tensor, a multiple of 16 bytes long."""
        self._base = base
        self._typed: dict[str, tuple[torch.Tensor, int]] = {}  # by safetensors dtype: typed base, bytes an element

    @classmethod
    def over(cls, memory: Any, device: torch.device) -> Binder:
        """Bind to writable host memory that speaks the buffer protocol, or to a copy of it on a device."""
        base = torch.frombuffer(memory, dtype=torch.uint8)
        return cls(base if device.type == "cpu" else base.to(device))

    def bind(self, entry: TensorEntry, offset: int) -> torch.Tensor:
        """Return the tensor whose bytes lie at `offset`."""
        typed = self._typed.get(entry.dtype)
        if typed is None or entry.start == entry.stop:
            dtype, shape = torch_form(entry)
            if entry.start == entry.stop:
                return torch.empty(shape, dtype=dtype, device=self._base.device)
            typed = self._typed[entry.dtype] = self._base.view(dtype), dtype.itemsize
        shape = entry.shape if entry.dtype in PLAIN else torch_form(entry)[1]
        base, itemsize = typed
        return base.as_strided(shape, _strides(shape), offset // itemsize)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    if len(shape) < 2:
        return (1,) * len(shape)
    if len(shape) == 2:
        return (shape[1], 1)
    return (math.prod(shape[1:]), *_strides(shape[1:]))


def torch_form(entry: TensorEntry) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return torch's dtype and shape for a tensor: packed types shrink the last dimension."""
    dtype = TORCH_DTYPES.get(entry.dtype, torch.uint8)
    if entry.dtype in PLAIN:
        return dtype, entry.shape
    bits = 4 if entry.dtype == "F4" else 6 if entry.dtype.startswith("F6") else 8
    if entry.dtype not in TORCH_DTYPES and bits == 4:
        dtype = torch.uint8
    if not entry.shape:
        return dtype, (entry.nbytes,)
    last, rest = divmod(entry.shape[-1] * bits, 8)
    return dtype, (*entry.shape[:-1], last) if rest == 0 else (entry.nbytes,)


def converted_dtype(entry: TensorEntry, wanted: torch.dtype | None) -> torch.dtype:
    """Return the dtype a tensor is to have: floating-point weights are converted, all else stays as it is.

    Packed, 8-bit and integer types carry scales or meanings that a plain conversion would lose.
    """
    own = torch_form(entry)[0]
    return wanted if wanted is not None and own in CONVERTIBLE else own


def allocate_converted(
    entries: Mapping[str, TensorEntry],
    dtype: torch.dtype,
    allocate: Callable[[int], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Make the tensors of a converted model, in one piece of memory, each at a 256-byte boundary.

    `allocate` returns bytes of the device's memory.
    """
    offsets: dict[str, int] = {}
    end = 0
    for name, entry in entries.items():
        offsets[name] = end
        nbytes = math.prod(torch_form(entry)[1]) * converted_dtype(entry, dtype).itemsize
        end += -(-nbytes // 256) * 256
    base = allocate(end or 256)
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in entries.items():
        shape, kept = torch_form(entry)[1], converted_dtype(entry, dtype)
        nbytes = math.prod(shape) * kept.itemsize
        tensors[name] = base[offsets[name] : offsets[name] + nbytes].view(kept).view(shape)
    return tensors


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype meant. Raises ConfigError for what tensors cannot be converted to."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if found not in CONVERTIBLE:
        raise ConfigError(f"dtype={dtype!r}: expected one of {', '.join(sorted(str(each) for each in CONVERTIBLE))}")
    return found


class LoadedModel(Mapping[str, torch.Tensor]):
    """A model's tensors by name, with its configuration, files and report.

    The tensors are views over one memory that lives as long as any of them. `close` ends the hold on the model's files
    in the cache; tensors already taken stay valid. Also a context manager. Reading is thread-safe.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        files: Mapping[str, Path],
        report: Report,
        release: Callable[[], None],
        wait_stored: Callable[[float | None], bool],
    ) -> None:
        self._tensors = dict(tensors)
        self._wait_stored = wait_stored
        self._finalizer = weakref.finalize(self, release)
        self.files = dict(files)
        self.report = report

    @property
    def config(self) -> dict[str, Any]:
        """The model's config.json (in a diffusers layout model_index.json); empty if it has none."""
        for name in ("config.json", "model_index.json"):
            if name in self.files:
                loaded = json.loads(self.files[name].read_bytes())
                return loaded if isinstance(loaded, dict) else {}
        return {}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"<LoadedModel {self.report.uri} {len(self)} tensors on {self.report.device}>"

    def wait_stored(self, timeout_s: float | None = None) -> bool:
        """Wait until all that this load keeps is on disk. Returns False when the time ran out."""
        return self._wait_stored(timeout_s)

    def close(self) -> None:
        """Drop the tensors and the hold on the cache. May be called twice."""
        self._tensors = {}
        self._finalizer()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_fit(module: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]], *, strict: bool) -> set[str]:
    """Check that a model fits a module before anything is moved, and return the names to load.

    Args:
        module: Its parameters and buffers are the targets.
        shapes: Shape of each of the model's tensors, as torch counts it.
        strict: Names must match both ways; a tied parameter counts as there if any of its names is.

    Raises:
        MismatchError: Names or shapes that do not fit, or targets without memory.
    """
    targets = module.state_dict(keep_vars=True)
    shared = shapes.keys() & targets.keys()
    filled = {id(targets[name]) for name in shared}
    missing = sorted(name for name in targets.keys() - shared if id(targets[name]) not in filled)
    unexpected = sorted(shapes.keys() - shared)
    if strict and (missing or unexpected):
        raise MismatchError(
            f"the model does not fit the {type(module).__name__}: {len(missing)} names missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])}); pass strict=False to load what matches",
            missing=missing,
            unexpected=unexpected,
        )
    for name in sorted(shared):
        if targets[name].shape != shapes[name]:
            raise MismatchError(
                f"tensor {name!r} has shape {shapes[name]}, the module expects {tuple(targets[name].shape)}",
                tensor=name,
            )
        if targets[name].is_meta:
            raise MismatchError(
                f"{name!r} is on the meta device and has no memory to fill: call module.to_empty(device=…) first",
                tensor=name,
            )
    return shared


def devices_of(module: torch.nn.Module, names: Iterable[str]) -> dict[torch.device, set[str]]:
    """Return the devices to load to, each with the names there: where the targets lie, or the CPU for what is no GPU."""
    targets = module.state_dict(keep_vars=True)
    found: dict[torch.device, set[str]] = {}
    for name in names:
        device = targets[name].device
        found.setdefault(device if device.type == "cuda" else CPU, set()).add(name)
    return found


def fill_module(module: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy tensors into the parameters and buffers of the same names, in place; they keep identity, dtype and device."""
    targets = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in tensors:
            targets[name].copy_(value)
