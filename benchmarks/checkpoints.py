"""Own the models on disk that the benchmarks load: written when they are first asked for, real shapes, random bytes.

Never uploads or loads one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import measuring
from models import (
    LLAMA_1B_CONFIG,
    llama_shapes,
    minilm_folder,
    random_pieces,
    tensor_nbytes,
    write_llama_1b,
    write_many_small,
    write_safetensors,
    write_sharded,
)

N_HERD = 8
TUNED_SHARE = 0.1  # of the bytes of all tensors that a fine-tune changes, at most
ADAPTER_RANK = 16
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
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
        """Return the folder of a model, written if need be.

        llama, llama-tuned (the same but for TUNED_SHARE of its tensors), llama-adapter (a LoRA of it), herd, small, minilm,
        or a single file.
        """
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
        elif name == "llama-tuned":
            shutil.copytree(self.folder_of("llama"), folder)
            _tune(folder)
        elif name == "llama-adapter":
            _write_adapter(self.folder_of("llama"), folder)
        elif name == "llama" and not self._quick:
            write_llama_1b(folder)
        else:
            n_layers = 1 if self._quick else self._herd_layers()
            vocabulary = 32_000 if self._quick else LLAMA_1B_CONFIG["vocab_size"]
            config = LLAMA_1B_CONFIG | {"num_hidden_layers": n_layers, "vocab_size": vocabulary}
            write_sharded(folder, llama_shapes(config), n_shards=2)
            (folder / "config.json").write_text(json.dumps(config))
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


def _tune(folder: Path) -> None:
    """Give tensors drawn by lot other bytes, as many as have TUNED_SHARE of all bytes."""
    tensors = [(path, *entry) for path in sorted(folder.glob("*.safetensors")) for entry in _tensors_of(path)]
    left = int(TUNED_SHARE * sum(tensor_nbytes(dtype, shape) for _, _, dtype, shape, _ in tensors))
    Random(0).shuffle(tensors)
    for path, name, dtype, shape, start in tensors:
        nbytes = tensor_nbytes(dtype, shape)
        if nbytes <= left:
            left -= nbytes
            with path.open("r+b") as file:
                file.seek(start)
                for piece in random_pieces(1, name, dtype, shape):
                    file.write(piece.data)


def _write_adapter(base: Path, folder: Path) -> None:
    """Write a LoRA of ADAPTED of all layers, as PEFT names it."""
    folder.mkdir()
    shapes = {}
    for path in sorted(base.glob("*.safetensors")):
        for name, _, shape, _ in _tensors_of(path):
            if name.split(".")[-2] in ADAPTED:
                n_out, n_in = shape
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                shapes[f"{stem}.lora_A.weight"] = ("F32", (ADAPTER_RANK, n_in))
                shapes[f"{stem}.lora_B.weight"] = ("F32", (n_out, ADAPTER_RANK))
    write_safetensors(folder / "adapter_model.safetensors", dict(sorted(shapes.items())))
    config = {"peft_type": "LORA", "r": ADAPTER_RANK, "target_modules": list(ADAPTED)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _tensors_of(path: Path) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Return name, dtype, shape and first byte of each tensor of a file."""
    with path.open("rb") as file:
        nbytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(nbytes))
    header.pop("__metadata__", None)
    return [
        (name, entry["dtype"], tuple(entry["shape"]), 8 + nbytes + entry["data_offsets"][0])
        for name, entry in header.items()
    ]
