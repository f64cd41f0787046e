"""Own what the steps of gpu.py work on: models as files, the card and its memory, host memory by kind, and loaders.

Never measures. All device memory comes from `Card.allocate`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import torch

from weightcache import _engine
from weightcache.operations import DevicePlace, HostPlace, Operations, Target

sys.path.insert(0, str(measuring.REPOSITORY / "tests"))

from models import INDEX_NAME, LLAMA_1B_CONFIG, Shapes, llama_shapes, tensor_nbytes

Tensors = Mapping[str, torch.Tensor]
MIB = 1 << 20
OPERATION_NBYTES = 16 * MIB  # a chunk of the product
COPY_NBYTES = 64 * MIB  # one operation from host memory
BLOCK_NBYTES = 64 * MIB  # of random bytes, written again and again
SHARD_NBYTES = 4 * 10**9
STAND_IN = "torch has no CUDA: the driver is a stand-in"
PROT_READ, PROT_WRITE = 1, 2
MAP_HUGETLB = 0x40000  # mmap(2); Python names it from 3.13 on
CHECKED_TENSORS, CHECKED_NBYTES = 64, 64 << 10
CHECKED_SLAB_NBYTES = 1 << 30


# -- models


def _llama_8b() -> Shapes:
    config = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
    shapes = llama_shapes(LLAMA_1B_CONFIG | config)
    return shapes | {"lm_head.weight": shapes["model.embed_tokens.weight"]}


def _qwen3_30b_a3b() -> Shapes:
    """Return a mixture of experts: 18,867 tensors, most of 3 MB."""
    hidden, inner, vocabulary = 2048, 768, 151936
    shapes = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, hidden))
    for number in range(48):
        layer = f"model.layers.{number}."
        for name, shape in {"q_proj": (4096, hidden), "k_proj": (512, hidden), "v_proj": (512, hidden)}.items():
            shapes[f"{layer}self_attn.{name}.weight"] = shape
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, 4096)
        shapes[f"{layer}mlp.gate.weight"] = (128, hidden)
        for name, length in {"self_attn.q_norm": 128, "self_attn.k_norm": 128}.items():
            shapes[f"{layer}{name}.weight"] = (length,)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (hidden,)
        for expert in range(128):
            for name in ("gate_proj", "up_proj"):
                shapes[f"{layer}mlp.experts.{expert}.{name}.weight"] = (inner, hidden)
            shapes[f"{layer}mlp.experts.{expert}.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def _one_layer(vocabulary: int) -> Shapes:
    return llama_shapes(LLAMA_1B_CONFIG | {"num_hidden_layers": 1, "vocab_size": vocabulary})


MODELS: Mapping[str, Callable[[], Shapes]] = {
    "llama-1b": lambda: llama_shapes(LLAMA_1B_CONFIG),
    "llama-8b": _llama_8b,
    "qwen3-30b-a3b": _qwen3_30b_a3b,
    "one-layer": lambda: _one_layer(32_000),
    "one-layer-less": lambda: _one_layer(8_000),
}
"""Real names and shapes: 2.5, 16 and 61 GB; and two small ones for --quick."""


def model_nbytes(name: str) -> int:
    """Return the bytes of a model's tensors."""
    return sum(tensor_nbytes(*shape) for shape in MODELS[name]().values())


def write_model(folder: Path, name: str, threads: int) -> None:
    """Write a model as shards, an index, a config and the checksums of its operations; an old one is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = MODELS[name]()
    shards: list[dict[str, Any]] = [{}]
    room = SHARD_NBYTES
    for tensor, shape in shapes.items():
        nbytes = tensor_nbytes(*shape)
        if nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_NBYTES
        shards[-1][tensor] = shape
        room -= nbytes
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    block = np.random.Generator(np.random.SFC64(0)).integers(0, 1 << 64, BLOCK_NBYTES // 8, dtype="u8")

    def write(number: int) -> tuple[str, list[int]]:
        path = folder / names[number]
        _write_shard(path, shards[number], block.copy(), number << 48)
        return path.name, measuring.checksums(path, OPERATION_NBYTES) if measuring.has_checksum() else []

    with ThreadPoolExecutor(threads) as pool:
        sums = dict(pool.map(write, range(len(shards))))
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    folder.with_suffix(".sums").write_text(json.dumps(sums))


def _write_shard(path: Path, shapes: Shapes, block: np.ndarray, counter: int) -> None:
    """Write a safetensors file whose data are the block again and again, each MiB of it counted."""
    header: dict[str, Any] = {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + tensor_nbytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    marks = block[:: MIB // 8]
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, BLOCK_NBYTES):
            marks[:] = np.arange(counter, counter + len(marks), dtype="u8")
            counter += len(marks)
            piece = memoryview(block).cast("B")[: min(BLOCK_NBYTES, offset - start)]
            while piece:
                piece = piece[file.write(piece) :]
        os.fsync(file.fileno())


class Files:
    """A model's weight files, and where each would lie in one image of all of them.

    Attributes:
        nbytes: Of the image; each file begins on a page.
        can_verify: Whether checksums could be had.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = sorted(folder.glob("*.safetensors"))
        self.weight_nbytes = sum(path.stat().st_size for path in self.paths)
        self._sums: dict[str, list[int]] = json.loads(folder.with_suffix(".sums").read_text())
        self.can_verify = all(self._sums.values())
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._bases, self.nbytes = [], 0
        for path in self.paths:
            self._bases.append(self.nbytes)
            self.nbytes += -(-path.stat().st_size // _engine.ALIGNMENT) * _engine.ALIGNMENT

    def to_host(self, address: int, *, verified: bool) -> Operations:
        """Return operations that bring all files to an image in host memory."""
        return self._read(lambda at, _: HostPlace(address + at, is_padded=True), verified)

    def to_device(self, address: int, *, verified: bool) -> Operations:
        """Return operations that bring all files to an image in device memory."""
        return self._read(lambda at, nbytes: DevicePlace([(0, address + at, nbytes)]), verified)

    def _read(self, place: Callable[[int, int], Any], verified: bool) -> Operations:
        operations = Operations(self._fd)
        for path, base in zip(self.paths, self._bases, strict=True):
            size = path.stat().st_size
            for number, start in enumerate(range(0, size, OPERATION_NBYTES)):
                nbytes = min(OPERATION_NBYTES, size - start)
                checksum = self._sums[path.name][number] if verified else None
                operations.read_named(path.name, start, nbytes, place(base + start, nbytes), checksum=checksum)
        return operations

    def entries(self) -> Iterator[tuple[str, Path, int, int]]:
        """Yield each tensor's name, file, and first and last byte there."""
        for path in self.paths:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                yield name, path, 8 + length + start, 8 + length + stop

    def are_in(self, tensors: Tensors) -> bool:
        """Tell whether these are all the files' tensors, by names, and by both ends of some of them."""
        entries = list(self.entries())
        if {entry[0] for entry in entries} != set(tensors):
            return False
        step = max(1, len(entries) // CHECKED_TENSORS)
        for name, path, start, stop in entries[::step]:
            raw = tensors[name].reshape(-1).view(torch.uint8)
            nbytes = min(CHECKED_NBYTES, stop - start)
            if raw.numel() != stop - start:
                return False
            with path.open("rb", buffering=0) as file:
                for at in (0, stop - start - nbytes):
                    wanted = os.pread(file.fileno(), nbytes, start + at)
                    if raw[at : at + nbytes].cpu().numpy().tobytes() != wanted:
                        return False
        return True


def from_memory(source: int, nbytes: int, target: int) -> Operations:
    """Return operations that bring host memory to device memory."""
    operations = Operations()
    for start in range(0, nbytes, COPY_NBYTES):
        size = min(COPY_NBYTES, nbytes - start)
        operations.copy(source + start, size, DevicePlace([(0, target + start, size)]))
    return operations


def same_bytes(slab: torch.Tensor, wanted: np.ndarray) -> bool:
    """Tell whether device memory holds what host memory holds; of much, evenly spread parts are compared."""
    step = OPERATION_NBYTES * max(1, -(-len(wanted) // CHECKED_SLAB_NBYTES))
    pieces = ((start, min(start + OPERATION_NBYTES, len(wanted))) for start in range(0, len(wanted), step))
    return all(np.array_equal(slab[start:stop].cpu().numpy(), wanted[start:stop]) for start, stop in pieces)


def pcie_link(bus_id: str) -> dict[str, str]:
    """Return a card's link as the kernel sees it now; idle cards slow theirs down."""
    folder = Path("/sys/bus/pci/devices") / bus_id.lower()
    names = ("current_link_speed", "current_link_width", "max_link_speed", "max_link_width", "numa_node")
    return {name: text for name in names if (text := measuring.read(folder / name).strip())}


# -- the card


class Card:
    """One device, as torch and the engine see it; or the stand-in's, whose memory is the host's."""

    def __init__(self, library: str, ordinal: int, numa_node: int) -> None:
        self.driver = _engine.Driver(library)
        self.ordinal = ordinal
        self.is_real = not self.driver.is_stand_in
        self._numa_node = numa_node
        if self.is_real:
            torch.empty(1, device=self.torch_device)  # makes the context, which no measurement is to pay for

    @property
    def torch_device(self) -> str:
        return f"cuda:{self.ordinal}"

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return device memory, uninitialised; the only place where gpu.py gets any."""
        if self.is_real:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        memory = torch.empty(nbytes, dtype=torch.uint8)
        place = (memory.data_ptr(), nbytes, self.ordinal)
        self.driver.adopt(*place)
        weakref.finalize(memory, self.driver.forget, *place)
        return memory

    @contextlib.contextmanager
    def open(self, slot_nbytes: int, n_slots: int) -> Iterator[_engine.Device]:
        """Open the engine's device with a ring of its own; what is registered with it is free again afterwards."""
        n_slots = min(n_slots, _engine.MAX_SLOTS)
        device = _engine.Device(self.driver, self.ordinal, slot_nbytes, n_slots, self._numa_node)
        try:
            yield device
        finally:
            device.close()

    def target(self, device: _engine.Device) -> Target:
        """Return where operations go: behind what torch's current stream holds."""
        return Target(device, torch.cuda.current_stream(self.torch_device).cuda_stream if self.is_real else 0)

    def wait_for(self, result: Any) -> Any:
        """Return what it is given, when all that was begun on the device is done."""
        if self.is_real:
            torch.cuda.synchronize(self.torch_device)
        return result

    def settle(self) -> None:
        """Wait for everything, and give unused device memory back, so that the next load pays for its own."""
        if self.is_real:
            torch.cuda.synchronize(self.torch_device)
            torch.cuda.empty_cache()


# -- host memory


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Populated host memory: what owns it, and its bytes."""

    owner: Any
    bytes: np.ndarray

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    def protect(self, *, writable: bool) -> None:
        """Let it be read only, or be written again: mprotect(2)."""
        libc = ctypes.CDLL(None, use_errno=True)
        protection = PROT_READ | PROT_WRITE if writable else PROT_READ
        if libc.mprotect(ctypes.c_void_p(self.address), ctypes.c_size_t(self.bytes.nbytes), protection):
            raise OSError(ctypes.get_errno(), f"mprotect: {os.strerror(ctypes.get_errno())}")


def map_anonymous(nbytes: int, *, flags: int = 0, advice: int | None = None) -> mmap.mmap:
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags)
    if advice is not None:
        mapping.madvise(advice)
    return mapping


def map_memfd(nbytes: int, flags: int = 0) -> mmap.mmap:
    fd = os.memfd_create("weightcache-gpu", os.MFD_CLOEXEC | flags)
    try:
        os.ftruncate(fd, nbytes)
        return mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED)
    finally:
        os.close(fd)


HOST_MEMORY: Mapping[str, Callable[[int], Any]] = {
    "4 KiB pages": lambda nbytes: map_anonymous(nbytes, advice=mmap.MADV_NOHUGEPAGE),
    "transparent huge pages": _engine.Memory,
    "memfd": map_memfd,
    "hugetlb": lambda nbytes: map_anonymous(nbytes, flags=MAP_HUGETLB),
    "memfd of hugetlb": lambda nbytes: map_memfd(nbytes, os.MFD_HUGETLB),
}
"""Kinds of host memory; the last two want reserved pages (vm.nr_hugepages)."""


def host_memory(kind: str, nbytes: int) -> HostMemory:
    """Return memory of a kind, full of random bytes."""
    owner = HOST_MEMORY[kind](nbytes)
    content = np.frombuffer(owner, "u1", nbytes)
    content.reshape(-1, MIB)[:] = np.random.Generator(np.random.SFC64(nbytes)).integers(0, 256, MIB, dtype="u1")
    content[::MIB] = np.arange(len(content[::MIB])) % 251
    return HostMemory(owner, content)


# -- loaders: each yields a model's tensors on a device, which are valid until it is left


@contextlib.contextmanager
def _load_model(files: Files, device: str) -> Iterator[Tensors]:
    import weightcache

    with contextlib.closing(weightcache.load_model(files.folder, device=device)) as model:
        yield model


@contextlib.contextmanager
def _safetensors(files: Files, device: str) -> Iterator[Tensors]:
    from safetensors.torch import load_file

    yield {name: tensor for path in files.paths for name, tensor in load_file(path, device=device).items()}


@contextlib.contextmanager
def _runai(files: Files, device: str) -> Iterator[Tensors]:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in files.paths])
        yield {name: tensor.to(device) for name, tensor in streamer.get_tensors()}


@contextlib.contextmanager
def _fastsafetensors(files: Files, device: str) -> Iterator[Tensors]:
    from fastsafetensors import fastsafe_open

    with fastsafe_open([str(path) for path in files.paths], device=device, nogds=True) as opened:
        yield {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _instanttensor(files: Files, device: str) -> Iterator[Tensors]:
    from instanttensor import safe_open

    with safe_open([str(path) for path in files.paths], framework="pt", device=device) as opened:
        yield {name: tensor.clone() for name, tensor in opened.tensors()}


LOADERS: Mapping[str, Callable[[Files, str], AbstractContextManager[Tensors]]] = {
    "load_model": _load_model,
    "safetensors": _safetensors,
    "runai_model_streamer": _runai,
    "fastsafetensors": _fastsafetensors,
    "instanttensor": _instanttensor,
}
"""By the module they need, but ours."""
