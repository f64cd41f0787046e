"""Own what a load is compared with: a checkpoint as safetensors itself reads it, bit for bit.

Never imports weightcache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Read every safetensors file below a folder; a subfolder's tensors are named `<subfolder>/<tensor>`."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        below = path.parent.relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        tensors |= {prefix + name: tensor for name, tensor in load_file(path).items()}
    return tensors


def raw(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes: random floats may be NaN, which equal nothing."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Check names, dtypes, shapes and every bit."""
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(got[name]) == raw(tensor), f"the bytes of {name} differ"


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return one hash over names, dtypes, shapes and bytes: what a child process can print."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        whole.update(raw(tensor))
    return whole.hexdigest()


def hashes(folder: str | Path) -> dict[str, str]:
    """Return the hash of each file below a folder, by its name there."""
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
