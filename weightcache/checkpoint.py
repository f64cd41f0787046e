"""Own reading a plain checkpoint folder into a manifest: which files are the model, and what their headers say.

Never reads a weight byte and never runs what a file holds: pickled weights are refused, code is carried as data.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from weightcache.chunking import cut_file, cut_safetensors
from weightcache.errors import FormatError, IncompleteModelError, ModelNotFoundError, UnsafeFormatError
from weightcache.header import LENGTH_NBYTES, header_stop, parse_header
from weightcache.manifest import Manifest, Role, Shard, check_paths
from weightcache.origins.base import Origin, Stat
from weightcache.registry import ABOUT
from weightcache.runtime import all_of

SAFETENSORS = ".safetensors"
INDEX = ".safetensors.index.json"
# In a folder with several checkpoints (variants, duplicates) the stacks load the one of these names.
CANONICAL = ("model", "diffusion_pytorch_model", "adapter_model")
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
FOREIGN = (
    *PICKLED,
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ggml",
    ".ot",
    ".npz",
    ".npy",
    ".tflite",
    ".mlmodel",
    ".nemo",
    ".pdparams",
    ".zip",
    ".tar",
    ".gz",
)
MAX_FILE_NBYTES = 256 << 20  # a larger file beside the weights is no configuration: carried by pull alone
MAX_INDEX_NBYTES = 64 << 20
# Counted before JSON is made of it, where two bytes can cost a hundred: five times the 211,000 tensors of Kimi K2, in
# one object within another.
MAX_INDEX_COMMAS = 1_000_000
MAX_INDEX_BRACKETS = 1000
FIRST_READ_NBYTES = 128 << 10  # holds the header of 95 % of shards, and costs a loopback or WAN request the same
DIFFUSERS_INDEX = "model_index.json"


class ShardMemory(Protocol):
    """What is remembered of shards between loads."""

    def recall(self, stat: Stat, prefix: str) -> Shard | None:
        """Return the shard as it was described before, if its state is the same."""

    def remember(self, stat: Stat, shard: Shard) -> None:
        """Keep a description for the next load."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One folder of safetensors within a checkpoint."""

    folder: str
    prefix: str
    shards: tuple[str, ...]
    index: str | None
    weight_map: Mapping[str, str] = field(default_factory=dict)


async def describe(origin: Origin, memory: ShardMemory, *, needs_weights: bool = True) -> Manifest:
    """Build the manifest of a checkpoint folder from its listing and its headers.

    Args:
        origin: The folder.
        memory: What is known of its files.
        needs_weights: Refuse a folder without safetensors. False takes any but a registry: its files are carried as data.

    Raises:
        ModelNotFoundError: No safetensors in the folder.
        UnsafeFormatError: Weights, but only in pickled form.
        IncompleteModelError: An index names what is not there.
        UnsafePathError: A file name that would leave the folder.
        FormatError: A header that breaks the format; names the file and the field.
    """
    stats = {stat.path: stat for stat in await origin.list()}
    check_paths(stats)
    parts = [await _read_index(origin, stats, part) for part in _find_parts(origin.uri, stats, needs_weights)]
    prefixes = {path: part.prefix for part in parts for path in part.shards}
    described = await all_of(_describe_shard(origin, memory, stats[path], prefix) for path, prefix in prefixes.items())
    shards = {shard.path: shard for shard in described}
    for part in parts:
        _check_index(part, shards)
    for path in stats.keys() - shards.keys():
        shards[path] = _describe_file(memory, stats[path])
    return Manifest.plain(shards.values())


def _describe_file(memory: ShardMemory, stat: Stat) -> Shard:
    remembered = memory.recall(stat, "")
    if remembered is not None and not remembered.tensors:
        return remembered
    foreign = stat.path.endswith((SAFETENSORS, *FOREIGN)) or stat.nbytes > MAX_FILE_NBYTES
    role = Role.FOREIGN if foreign else Role.FILE
    shard = Shard(stat.path, stat.nbytes, stat.etag, role, cut_file(stat.nbytes))
    memory.remember(stat, shard)
    return shard


def _find_parts(uri: str, stats: Mapping[str, Stat], needs_weights: bool) -> list[_Part]:
    """Choose which safetensors are the model: the root's, or in a diffusers layout those of every component."""
    folders: dict[str, list[str]] = {}
    for path in stats:
        if path.endswith((SAFETENSORS, INDEX)):
            folder, _, name = path.rpartition("/")
            folders.setdefault(folder, []).append(name)
    if "" in folders and DIFFUSERS_INDEX not in stats:
        folders = {"": folders[""]}
    elif len(folders) > 1:
        folders.pop("", None)  # the whole pipeline once more, as one file
    if not folders and (needs_weights or ABOUT in stats):
        raise _nothing_to_load(uri, stats)
    return [_choose(folder, sorted(names)) for folder, names in sorted(folders.items())]


def _choose(folder: str, names: Sequence[str]) -> _Part:
    base = f"{folder}/" if folder else ""
    indexes = [name for name in names if name.endswith(INDEX)]
    files = [name for name in names if name.endswith(SAFETENSORS)]
    for stem in CANONICAL:
        if stem + INDEX in indexes:
            return _Part(folder, base, (), base + stem + INDEX)
        if stem + SAFETENSORS in files:
            return _Part(folder, base, (f"{base}{stem}{SAFETENSORS}",), None)
    if len(indexes) > 1:
        raise FormatError(
            f"several indexes in {folder or 'the folder'}: {', '.join(indexes)}; keep the one to be loaded"
        )
    if indexes:
        return _Part(folder, base, (), base + indexes[0])
    return _Part(folder, base, tuple(base + name for name in files), None)


def _nothing_to_load(uri: str, stats: Mapping[str, Stat]) -> Exception:
    pickled = sorted(path for path in stats if path.endswith(PICKLED))
    if pickled:
        return UnsafeFormatError(
            f"{uri} holds weights only as pickle ({', '.join(pickled[:3])}), which can run code when read: expected "
            "safetensors; convert them once with safetensors.torch.save_file(torch.load(path, weights_only=True), "
            "'model.safetensors')",
            uri=uri,
            files=pickled,
        )
    shown = ", ".join(sorted(stats)[:5])
    return ModelNotFoundError(
        f"no safetensors among the {len(stats)} files of {uri} ({shown}): name the folder that holds them", uri=uri
    )


async def _read_index(origin: Origin, stats: Mapping[str, Stat], part: _Part) -> _Part:
    if part.index is None:
        return part
    weight_map = await _weight_map(origin, stats[part.index])
    names = set(weight_map.values())
    base = part.prefix
    check_paths(names)
    missing = sorted(name for name in names if base + name not in stats)
    if missing:
        raise IncompleteModelError(
            f"{part.index} names {len(missing)} of {len(names)} shards that are not there: {', '.join(missing[:5])}; "
            "upload them, or upload the index again",
            index=part.index,
            missing=missing,
        )
    foreign = sorted(name for name in names if not name.endswith(SAFETENSORS))
    if foreign:
        raise FormatError(f"{part.index} names {foreign[0]!r} as a shard: expected files ending in {SAFETENSORS}")
    return replace(part, shards=tuple(sorted(base + name for name in names)), weight_map=weight_map)


def _check_index(part: _Part, shards: Mapping[str, Shard]) -> None:
    held = {path: {entry.name for entry in shards[path].tensors} for path in part.shards}
    for tensor, name in part.weight_map.items():
        path = part.prefix + name
        if tensor not in held[path]:
            where = next((other for other, names in held.items() if tensor in names), None)
            hint = f"it is in {where}" if where else "no shard has it"
            raise IncompleteModelError(
                f"{part.index} says that tensor {tensor!r} is in {name}, but {hint}: upload index and shards of one state",
                index=part.index,
                tensor=tensor,
            )


async def _weight_map(origin: Origin, stat: Stat) -> dict[str, str]:
    if stat.nbytes > MAX_INDEX_NBYTES:
        raise FormatError(f"{stat.path} has {stat.nbytes} bytes, expected at most {MAX_INDEX_NBYTES} for an index")
    raw = await read_range(origin, stat, 0, stat.nbytes)
    if raw.count(b",") > MAX_INDEX_COMMAS or raw.count(b"[") + raw.count(b"{") > MAX_INDEX_BRACKETS:
        raise FormatError(
            f"{stat.path} is no index: expected one flat weight_map of at most {MAX_INDEX_COMMAS} tensors",
            index=stat.path,
        )
    try:
        weight_map = json.loads(raw)["weight_map"]
        if not weight_map or not all(
            isinstance(key, str) and isinstance(name, str) for key, name in weight_map.items()
        ):
            raise TypeError("weight_map is not a map of names to file names")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise FormatError(
            f"{stat.path} is no index: expected JSON with a weight_map of tensor names to shards, got {exc!r}"
        ) from exc
    return dict(weight_map)


async def _describe_shard(origin: Origin, memory: ShardMemory, stat: Stat, prefix: str) -> Shard:
    remembered = memory.recall(stat, prefix)
    if remembered is not None and remembered.role is Role.WEIGHTS:
        return remembered
    source = f"{origin.uri}/{stat.path}"
    first = await read_range(origin, stat, 0, min(stat.nbytes, FIRST_READ_NBYTES))
    data_start = header_stop(first, stat.nbytes, source=source)
    if data_start <= len(first):
        raw = first[LENGTH_NBYTES:data_start]
    else:
        raw = await read_range(origin, stat, LENGTH_NBYTES, data_start)  # anew: joining would hold it twice
    header = parse_header(raw, stat.nbytes, source=source)
    shard = Shard(
        path=stat.path,
        nbytes=stat.nbytes,
        etag=stat.etag,
        role=Role.WEIGHTS,
        chunks=cut_safetensors(data_start, header.tensors),
        tensors=header.tensors,
        prefix=prefix,
        metadata=header.metadata,
    )
    memory.remember(stat, shard)
    return shard


async def read_range(origin: Origin, stat: Stat, start: int, stop: int) -> bytes:
    """Read a small range of a file, `[start, stop)`."""
    if start == stop:
        return b""
    content = io.BytesIO(bytes(stop - start))
    await origin.read_into(stat, start, [content.getbuffer()])
    return content.getvalue()  # the memory that was filled, not a copy


def select(manifest: Manifest, roles: Iterable[Role]) -> list[tuple[int, int]]:
    """Return the keys of all chunks of the shards with these roles."""
    wanted = set(roles)
    return [
        (index, chunk)
        for index, shard in enumerate(manifest.shards)
        if shard.role in wanted
        for chunk in range(len(shard.chunks))
    ]
