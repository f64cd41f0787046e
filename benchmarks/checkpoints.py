"""Own the models on disk that the benchmarks load: written when they are first asked for, real shapes, random bytes.

Never uploads or loads one.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import measuring
from models import (
    LLAMA_1B_CONFIG,
    llama_shapes,
    minilm_folder,
    tensor_nbytes,
    write_llama_1b,
    write_many_small,
    write_safetensors,
    write_sharded,
)

N_HERD = 8
PROCESS_NBYTES = 400 << 20  # a process with torch and the S3 client, generously
SINGLE_N_TENSORS = {  # of 16 MiB; by model and `quick`
    "single": {False: 120, True: 8},
    "single-1000mbit": {False: 60, True: 15},  # 8 s and 2 s at that rate
    "single-200mbit": {False: 15, True: 4},  # 10 s and 3 s
}


class Checkpoints:
    """Models below one folder.

    Args:
        quick: Write smaller ones.
    """

    def __init__(self, folder: Path, *, quick: bool) -> None:
        self._folder = folder
        self._quick = quick

    def folder_of(self, name: str) -> Path:
        """Return the folder of a model, written if need be: llama, herd, small, minilm, or a single file."""
        folder = self._folder / name
        if folder.exists():
            return folder
        if name == "minilm":
            shutil.copytree(minilm_folder(), folder)
        elif name == "small":
            write_many_small(folder)
        elif name in SINGLE_N_TENSORS:
            folder.mkdir(parents=True)
            n_tensors = SINGLE_N_TENSORS[name][self._quick]
            shapes = {f"layers.{number:03}.weight": ("BF16", (4096, 2048)) for number in range(n_tensors)}
            write_safetensors(folder / "model.safetensors", shapes)
        elif name == "llama" and not self._quick:
            write_llama_1b(folder)
        else:
            n_layers = 1 if self._quick else self._herd_layers()
            vocabulary = 32_000 if self._quick else LLAMA_1B_CONFIG["vocab_size"]
            config = LLAMA_1B_CONFIG | {"num_hidden_layers": n_layers, "vocab_size": vocabulary}
            write_sharded(folder, llama_shapes(config), n_shards=2)
        for path in measuring.files_below(folder):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return folder

    def _herd_layers(self) -> int:
        """Return of how many layers a Llama may be so that N_HERD processes can hold one each in this memory."""
        room = measuring.available_memory_nbytes() * 3 // 4 // N_HERD - PROCESS_NBYTES
        for n_layers in range(LLAMA_1B_CONFIG["num_hidden_layers"], 1, -1):
            shapes = llama_shapes(LLAMA_1B_CONFIG | {"num_hidden_layers": n_layers})
            if sum(tensor_nbytes(*shape) for shape in shapes.values()) <= room:
                break
        return n_layers
