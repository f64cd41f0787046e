"""Own the dtypes a safetensors file may name, and how many bits an element of each takes.

Never imports a framework: how a dtype maps to torch is the binder's matter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from weightcache.errors import nearest

# The 22 variants safetensors 0.8.0 accepts; tests/properties/test_header_differential.py asks the installed
# package for its list and its sizes.
BITS: Final[Mapping[str, int]] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)


def tensor_nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Compute the bytes a tensor takes; `shape` counts elements, packed ones too.

    Raises:
        ValueError: the dtype is unknown, or sub-byte elements do not fill whole bytes.
    """
    nbytes, spare = divmod(_bits(dtype) * math.prod(shape), 8)
    if spare:
        raise ValueError(f"{dtype} of shape {list(shape)} takes {nbytes * 8 + spare} bits, expected whole bytes of 8")
    return nbytes


@functools.cache
def alignment_bytes(dtype: str) -> int:
    """Return the alignment a tensor's first byte needs: its element's size, or 1 for packed dtypes.

    Raises:
        ValueError: the dtype is unknown.
    """
    return max(1, _bits(dtype) // 8)


def _bits(dtype: str) -> int:
    bits = BITS.get(dtype)
    if bits is None:
        raise ValueError(f"unknown dtype {dtype!r}{nearest(dtype, BITS)}")
    return bits
