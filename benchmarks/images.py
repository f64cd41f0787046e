"""Own the memory that files are received into: where each range belongs, and the tensors that lie there in the end.

Never receives a byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from measuring import Tensors

from weightcache import _engine


class Piece(NamedTuple):
    """A range of a file, and its place."""

    name: str
    start: int
    view: memoryview

    @property
    def stop(self) -> int:
        return self.start + len(self.view)


def warm_torch() -> None:
    """Make torch do once what `Image.tensors` wants of it: its first calls take long."""
    torch.zeros(4, dtype=torch.uint8)[:2].view(torch.bfloat16).view([1])


class Image:
    """Files one after the other in private huge pages.

    Args:
        sizes: Bytes of each file, by name.
        is_populated: Back all of it with real memory now; otherwise who writes first does.
    """

    def __init__(self, sizes: Mapping[str, int], *, is_populated: bool = True) -> None:
        self._sizes = dict(sizes)
        self._bases: dict[str, int] = {}
        total = 0
        for name, nbytes in sizes.items():
            self._bases[name] = total
            total += -(-nbytes // _engine.ALIGNMENT) * _engine.ALIGNMENT
        self.memory = _engine.Memory(total, fresh=not is_populated)
        if is_populated:
            self.memory.populate(0, total)
            warm_torch()

    def pieces(self, limit: int) -> list[Piece]:
        """Cut the files into ranges of at most `limit` bytes."""
        view = memoryview(self.memory)
        pieces = []
        for name, nbytes in self._sizes.items():
            base = self._bases[name]
            for start in range(0, nbytes, limit):
                pieces.append(Piece(name, start, view[base + start : base + min(start + limit, nbytes)]))
        return pieces

    def populate(self, piece: Piece) -> None:
        """Back a piece with real memory."""
        base = self._bases[piece.name]
        self.memory.populate(base + piece.start, base + piece.stop)

    def tensors(self) -> Tensors:
        """Return the tensors of the files, safetensors with BF16 alone, as views."""
        tensors = {}
        whole = torch.frombuffer(self.memory, dtype=torch.uint8)
        for base in self._bases.values():
            header_nbytes = int.from_bytes(bytes(whole[base : base + 8].numpy()), "little")
            begin = base + 8 + header_nbytes
            header = json.loads(bytes(whole[base + 8 : begin].numpy()))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
                start, stop = (begin + offset for offset in entry["data_offsets"])
                tensors[name] = whole[start:stop].view(torch.bfloat16).view(entry["shape"])
        return tensors
