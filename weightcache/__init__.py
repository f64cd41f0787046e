"""Bring model weights from object storage to tensors near the speed of the hardware, and keep them near.

    import weightcache
    model = weightcache.load_model("s3://bucket/llama-3-8b")

This module is the public face; nothing else in the package is public. Importing it opens nothing and does not import
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightcache import errors
from weightcache._version import __version__
from weightcache.errors import WeightcacheError

if TYPE_CHECKING:
    import os

    import torch

    from weightcache.cache import PlannedLoad
    from weightcache.diagnosis import Finding
    from weightcache.report import Report
    from weightcache.session import Request
    from weightcache.spending import Cost
    from weightcache.tensors import LoadedModel
    from weightcache.upkeep import CachedModel, Verification

__all__ = [
    "WeightcacheError",
    "__version__",
    "cost",
    "doctor",
    "errors",
    "evict",
    "load_into",
    "load_model",
    "metrics",
    "models",
    "pin",
    "plan",
    "prefetch",
    "pull",
    "stream",
    "unpin",
    "verify",
]

Progress = Callable[[int, int], None]


def load_model(
    uri: str | os.PathLike[str],
    device: str | torch.device = "auto",
    *,
    dtype: str | torch.dtype | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    cache: str = "auto",
    offline: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a model's tensors.

    The first load streams from the origin to the device and fills the disk tier behind; later ones come from disk, or
    from host memory where it was prefetched there. Every byte is verified before it is visible.

    Args:
        uri: A folder or prefix that holds safetensors (any fsspec URL or path), or one safetensors file.
        device: "auto" is the current CUDA device where there is one, else the CPU. On a CUDA device the tensors lie in
            one piece of torch's memory, each at a 256-byte boundary; work enqueued before on the current stream is
            waited for, and what is enqueued on any stream afterwards sees them.
        dtype: Convert floating-point tensors of 16 bits and more to this one, on the device; others stay as they are.
        include: Name patterns (`*`, `?`, `[…]`) of the tensors wanted; only the chunks that hold them are read.
        exclude: Name patterns of tensors to leave out.
        cache: "disk" keeps the chunks in the disk tier, "none" does not, "auto" does unless the folder is on a disk of
            this machine.
        offline: Never dial. The default is the setting `offline` (WEIGHTCACHE_OFFLINE).
        storage_options: For the origin, as everywhere in fsspec.
        timeout_s: Longest time for the whole load. The default is the setting, without limit.
        progress: Called with (bytes done, bytes in all) from worker threads.

    Returns:
        A mapping from tensor names to tensors, with `config`, `files`, `report` and `close()`.

    Raises:
        WeightcacheError: One of `weightcache.errors`; nothing of the model is visible then.
    """
    from weightcache import cache as conductor

    request = _request(uri, include, exclude, cache, offline, storage_options, timeout_s, progress)
    return conductor.load(request, device, dtype)


def stream(
    uri: str | os.PathLike[str],
    device: str | torch.device = "auto",
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    order: Sequence[str] = (),
    cache: str = "auto",
    offline: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) as tensors arrive, verified, in no fixed order.

    The model comes in groups of tensors of some 256 MiB, or of one larger tensor, two at a time: that is what is held
    beside the tensors that the caller keeps. A yielded tensor stays valid as long as it is held, and keeps its group's
    memory. Arguments and errors are those of `load_model`; an error may come after some tensors were yielded. Leaving
    the loop early stops the transfer.

    Args:
        order: Names of the tensors whose groups come first, in this order, as an earlier run used them; the others follow
            as they lie in their files.
    """
    from weightcache import cache as conductor

    request = _request(uri, include, exclude, cache, offline, storage_options, timeout_s, progress)
    return conductor.stream(replace(request, order=tuple(order)), device)


def load_into(
    module: torch.nn.Module,
    uri: str | os.PathLike[str],
    *,
    strict: bool = True,
    cache: str = "auto",
    offline: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Fill a module's parameters and buffers in place with the tensors of the same names.

    Names and shapes are checked before a weight byte is read, so a module that does not fit is left untouched.

    Args:
        module: Its parameters keep their identity, dtype and device. After an error that came later it may be partly
            filled.
        strict: Names must match both ways. False loads, and reads, only what matches.

    Raises:
        MismatchError: Names or shapes that do not fit. Otherwise as `load_model`, whose other arguments these are.
    """
    from weightcache import cache as conductor

    request = _request(uri, None, None, cache, offline, storage_options, timeout_s, progress)
    return conductor.load_into(request, module, strict=strict)


def prefetch(
    uri: str | os.PathLike[str],
    tier: str = "disk",
    *,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Bring a model to a tier of this node, so that the next load is warm or hot.

    Args:
        tier: "disk", durable when this returns; or "host": this process's page-lockable memory, from which its loads
            to the CPU are attached without a copy (who writes into a tensor gets a copy of that page) and those to a
            device copied from it, from the second on without the processor's help. It stays until `evict`, the budget
            `host_budget_bytes`, or the process's end.
    """
    from weightcache import cache as conductor

    request = _request(uri, None, None, "disk", None, storage_options, timeout_s, progress)
    return conductor.prefetch(request, tier)


def pull(
    uri: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    cache: str = "auto",
    offline: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write all files of a model, those in other weight formats included, bit for bit into a folder.

    Each file appears whole or not at all, and replaces what had its name.
    """
    from pathlib import Path

    from weightcache import cache as conductor

    request = _request(uri, None, None, cache, offline, storage_options, timeout_s, progress)
    return conductor.pull(request, Path(folder))


def plan(
    uri: str | os.PathLike[str],
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    cache: str = "auto",
    offline: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
) -> PlannedLoad:
    """Decide what a load would do, reading headers but no weight byte."""
    from weightcache import cache as conductor

    return conductor.plan(_request(uri, include, exclude, cache, offline, storage_options, timeout_s, None))


def models() -> list[CachedModel]:
    """Return the models that this node's cache holds, most recently used first."""
    from weightcache import upkeep

    return upkeep.models()


def verify(
    *, deep: bool = False, repair: bool = False, storage_options: Mapping[str, Any] | None = None
) -> Verification:
    """Check the cache.

    Args:
        deep: Recompute every chunk's digest, not only look at presence and size.
        repair: Set rotten chunks aside and fetch them, and lost ones, again from their models' origins.
        storage_options: For those origins.
    """
    from weightcache import upkeep

    return upkeep.verify(deep=deep, repair=repair, storage_options=storage_options or {})


def evict(uri: str | os.PathLike[str]) -> int:
    """Remove a model from the cache. Returns the bytes freed.

    Raises:
        ModelNotFoundError: It is not in the cache.
        InUseError: A process holds it, or it is pinned.
    """
    from weightcache import upkeep

    return upkeep.evict(str(uri))


def pin(uri: str | os.PathLike[str]) -> None:
    """Keep a cached model from eviction until `unpin`. Raises ModelNotFoundError when it is not in the cache."""
    from weightcache import upkeep

    upkeep.pin(str(uri), pinned=True)


def unpin(uri: str | os.PathLike[str]) -> None:
    """End a pin."""
    from weightcache import upkeep

    upkeep.pin(str(uri), pinned=False)


def cost(since: str | None = None, by: str = "replica") -> list[Cost]:
    """Sum up what this node's loads asked of origins, and what that cost.

    A load is counted when what it writes to the cache folder is written (`model.wait_stored()`); those that used none, or
    dialled nothing, are not. It is priced when it is made: by the list to the internet, first tier, free shares not
    deducted, unless the configuration has other prices.

    Args:
        since: An age (`7d`, `12h`, `2w`), or the month or day (UTC) to begin with; all that is known otherwise.
        by: "replica" or "model", the dearest first; or "month".
    """
    from weightcache import spending

    return spending.cost(since, by)


def metrics() -> str:
    """Return the counters of this process in Prometheus's text format."""
    from weightcache import meters

    return meters.text()


def doctor() -> list[Finding]:
    """Look at what on this machine decides how fast and how safe loading is; each finding with advice."""
    from weightcache import diagnosis

    return diagnosis.examine()


def _request(
    uri: str | os.PathLike[str],
    include: str | Sequence[str] | None,
    exclude: str | Sequence[str] | None,
    cache: str,
    offline: bool | None,
    storage_options: Mapping[str, Any] | None,
    timeout_s: float | None,
    progress: Progress | None,
) -> Request:
    from weightcache.session import Request

    return Request(
        uri=str(uri),
        storage_options=storage_options or {},
        cache=cache,
        offline=offline,
        include=include,
        exclude=exclude,
        timeout_s=timeout_s,
        progress=progress,
    )
