"""Bring model weights from object storage to tensors near the speed of the hardware, and keep them near.

    import weightcache
    model = weightcache.load_model("s3://bucket/llama-3-8b")

This module is the public face; nothing else in the package is public. Importing it opens nothing and does not import
torch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weightcache import errors
from weightcache._version import __version__
from weightcache.errors import WeightcacheError

if TYPE_CHECKING:
    import os

    import torch

    from weightcache.cache import PlannedLoad, TensorStream
    from weightcache.checking import RegistryCheck
    from weightcache.comparing import Difference
    from weightcache.config import Configuration
    from weightcache.diagnosis import Finding
    from weightcache.hubcache import Materialised, Removed
    from weightcache.publishing import Publication
    from weightcache.reading import Listing
    from weightcache.registries import RevisionRow, TagRow
    from weightcache.replicating import Replication
    from weightcache.report import Report
    from weightcache.session import Request
    from weightcache.simulation import Simulation
    from weightcache.spending import Cost
    from weightcache.sweeping import Garbage
    from weightcache.tensors import LoadedModel
    from weightcache.upkeep import CachedModel, Verification

__all__ = [
    "WeightcacheError",
    "__version__",
    "check",
    "configuration",
    "cost",
    "diff",
    "doctor",
    "errors",
    "evict",
    "gc",
    "keygen",
    "list_files",
    "load_into",
    "load_model",
    "materialise",
    "metrics",
    "models",
    "pin",
    "plan",
    "prefetch",
    "publish",
    "pull",
    "read",
    "remove",
    "remove_materialised",
    "replicate",
    "revisions",
    "rulings",
    "serve",
    "serve_hub",
    "sign",
    "simulate_cost",
    "status",
    "stream",
    "tag",
    "tags",
    "trusted_keys",
    "unpin",
    "verify",
    "warm",
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
    artefacts: str | os.PathLike[str] | None = None,
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
        artefacts: A folder; the bundles of compiled code that a published revision carries for exactly this machine are
            placed there, each in a folder of its own name, before the load. Why one was left out is in `report.choices`.
            Whoever uses them runs what the publisher compiled: demand signatures of the store.
        timeout_s: Longest time for the whole load. The default is the setting, without limit.
        progress: Called with (bytes done, bytes in all) from worker threads.

    Returns:
        A mapping from tensor names to tensors, with `config`, `files`, `report` and `close()`.

    Raises:
        WeightcacheError: One of `weightcache.errors`; nothing of the model is visible then.
    """
    from pathlib import Path

    from weightcache import cache as conductor

    request = _request(uri, include, exclude, cache, offline, storage_options, timeout_s, progress)
    placed = conductor.place_artefacts(request, Path(artefacts)) if artefacts is not None else {}
    model = conductor.load(request, device, dtype)
    model.report.choices |= {f"artefact {name}": told for name, told in placed.items()}
    return model


def stream(
    uri: str | os.PathLike[str],
    device: str | torch.device = "auto",
    *,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    order: Sequence[str] | Callable[[str], Any] = (),
    ahead_share: float = 0.0,
    cache: str = "auto",
    offline: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> TensorStream:
    """Yield (name, tensor) as tensors arrive, verified, in no fixed order.

    The model comes in groups of tensors of some 256 MiB, or of one larger tensor, two at a time: that is what is held
    beside the tensors that the caller keeps. A yielded tensor stays valid as long as it is held, and keeps its group's
    memory. Arguments and errors are those of `load_model`; an error may come after some tensors were yielded. Leaving
    the loop early stops the transfer. The iterator's `report` says where the bytes came from, and when; its `names`,
    which waits for the model to be described, what comes.

    Args:
        order: Names of the tensors whose groups come first, in this order, as an earlier run used them; the others follow
            as they lie in their files. Or a key to sort all names by, called on a thread of weightcache's that it must not
            hold up.
        ahead_share: Share of the memory that is free when the model is described, the device's or the host's, that groups
            may take before they are asked for; two are allowed in any case.

    Raises:
        ConfigError: A name in `order` that is not wanted, or an `ahead_share` that is not between 0 and 1.
    """
    from weightcache import cache as conductor

    if not 0 <= ahead_share <= 1:
        raise errors.ConfigError(f"ahead_share={ahead_share!r}: expected a share, between 0 and 1")

    request = _request(uri, include, exclude, cache, offline, storage_options, timeout_s, progress)
    order = order if callable(order) else tuple(order)
    return conductor.TensorStream(replace(request, order=order, ahead_share=ahead_share), device)


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
        tier: "disk", durable when this returns; or "host": memory from which loads to the CPU are attached without a
            copy (who writes into a tensor gets a copy of that page) and those to a device copied. It is this process's,
            page-lockable, and a model stays there until `evict`, the budget `host_budget_bytes`, or the process's end;
            `warm` brings it to the node daemon's, for all processes.
    """
    from weightcache import cache as conductor

    request = _request(uri, None, None, "disk", None, storage_options, timeout_s, progress)
    return conductor.prefetch(request, tier)


def warm(
    uri: str | os.PathLike[str],
    tier: str = "host",
    *,
    until_s: float | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Have the node daemon bring a model to host memory, or to disk, for all processes of this node.

    Args:
        tier: "host" or "disk".
        until_s: Seconds from now for which it stays in host memory, used or not; 0 is until it is evicted. Without it,
            it stays as long as it is worth its room.
        progress: Called with (bytes done, bytes in all), about twice a second.

    Raises:
        DaemonError: No daemon answers, or it refuses.
    """
    from weightcache import upkeep

    return upkeep.warm(_request(uri, None, None, "auto", None, storage_options, None, progress), tier, until_s)


def status() -> dict[str, Any]:
    """Return what the node daemon says of itself: tiers, models, transfers, loads, decisions (docs/daemon.md).

    Raises:
        DaemonError: No daemon answers.
    """
    from weightcache import upkeep

    return upkeep.status()


def serve() -> None:
    """Run the node daemon until SIGTERM or SIGINT; call it in the main thread of a process that does nothing else.

    Raises:
        ConfigError: Settings that cannot be used.
        DaemonError: Another daemon serves the socket, or it cannot be made.
    """
    from weightcache.daemon import node

    node.serve()


def serve_hub(
    models: Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    address: str | None = None,
    upstream: str | None = None,
    on_ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Answer as a Hugging Face Hub until SIGTERM or SIGINT, for stacks that take models from one: `HF_ENDPOINT=<url>`.

    Call it in the main thread of a process that does nothing else; the node daemon does the same where `[hub]` is
    configured. Files come verified from host memory, the disk tier or their origin, and are kept on disk.

    Args:
        models: URIs of models by the names of their repositories, `org/name`; beside those of `[hub.models]`. `org/*` is
            every name of an organisation, and `{name}` in its URI that name.
        address: `host:port`, port 0 for a free one. The default is that of `[hub]`, else 127.0.0.1:8377. Whoever reaches it
            can read all of these models.
        upstream: The Hub that other repositories are fetched from, through this node's cache; the default is that of
            `[hub]`, else there are no others.
        on_ready: Called with the URL when requests are answered.

    Raises:
        ConfigError: Settings that cannot be used, or an address that cannot be listened at.
    """
    from weightcache.daemon import hub

    hub.serve({repo: str(uri) for repo, uri in (models or {}).items()}, address, upstream, on_ready)


def materialise(
    uri: str | os.PathLike[str],
    repo: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    cache: str = "auto",
    offline: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> Materialised:
    """Lay a model out in the Hugging Face cache, where every stack finds it offline by its repository's name.

    Files that lie there whole are not written again; the snapshot and `refs/main` appear last, so that a stack sees all of
    the model or what was there before. A file of a local folder shares its blocks where the file system can (XFS, Btrfs).

    Args:
        repo: `org/name`, by which stacks ask for it.
        cache_dir: The default is where huggingface_hub looks: HF_HUB_CACHE, or `hub` below HF_HOME.
        cache: "none" keeps nothing beside in this node's own cache, which the next load would be warm from.

    Raises:
        CapacityError: There is no room for it; what was written whole stays, and is used by the next call.
    """
    from pathlib import Path

    from weightcache import hubcache

    request = _request(uri, None, None, cache, offline, storage_options, timeout_s, progress)
    return hubcache.materialise(request, repo, None if cache_dir is None else Path(cache_dir))


def remove_materialised(repo: str, *, cache_dir: str | os.PathLike[str] | None = None) -> Removed:
    """Remove from the Hugging Face cache what `materialise` laid there; what others downloaded stays.

    Raises:
        ModelNotFoundError: Nothing of this repository was laid there.
    """
    from pathlib import Path

    from weightcache import hubcache

    return hubcache.remove(repo, None if cache_dir is None else Path(cache_dir))


def pull(
    uri: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    weights: bool = True,
    headers: bool = False,
    cache: str = "auto",
    offline: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write all files of a model, those in other weight formats included, bit for bit into a folder.

    Each file appears whole or not at all, and replaces what had its name.

    Args:
        weights: False leaves the weights out: configuration, tokenizer and code as data, for stacks that want a folder of
            them beside weights from here.
        headers: Without weights, begin each safetensors file of the model nevertheless: its header alone, for stacks that
            read names and dtypes before they load. Whoever takes such a file for weights is told that it is cut short.
    """
    from pathlib import Path

    from weightcache import cache as conductor

    request = _request(uri, None, None, cache, offline, storage_options, timeout_s, progress)
    return conductor.pull(request, Path(folder), weights=weights, headers=headers)


def list_files(
    uri: str | os.PathLike[str],
    *,
    cache: str = "auto",
    offline: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
) -> Listing:
    """Tell a model's files and its revision, reading no byte of them but safetensors headers that are not known yet.

    A model without safetensors will do: GGUF, a tokenizer, whatever lies in the folder.
    """
    from weightcache import reading

    return reading.list_files(_request(uri, None, None, cache, offline, storage_options, timeout_s, None))


def read(
    uri: str | os.PathLike[str],
    path: str,
    start: int = 0,
    stop: int | None = None,
    *,
    cache: str = "auto",
    offline: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
) -> Generator[memoryview, None, None]:
    """Yield the bytes `[start, stop)` of one file of a model, in order, each verified, in pieces of at most 16 MiB.

    They come from where they are: host memory, the node daemon's included, the disk tier, else the origin, and are kept on
    disk as a load would. Some 128 MiB are held at a time, beside what the caller keeps; a piece stays valid as long as it
    is held. Nothing is opened before the first piece is asked for; closing the iterator early stops the transfer.

    Args:
        path: As `list_files` tells it.
        start: Where to begin, in bytes.
        stop: Where to end; the default is the file's end.

    Raises:
        ModelNotFoundError: No such model, or no such file in it.
        UriError: A range that does not lie in the file. Otherwise as `load_model`, whose other arguments these are.
    """
    from weightcache import reading

    request = _request(uri, None, None, cache, offline, storage_options, timeout_s, None)
    return reading.read(request, path, start, stop)


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


def publish(
    uri: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    base: str = "",
    policy: Mapping[str, Any] | None = None,
    artefacts: Mapping[str, str | os.PathLike[str]] | None = None,
    facts: Mapping[str, str] | None = None,
    replicas: int = 1,
    storage_options: Mapping[str, Any] | None = None,
    destination_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> Publication:
    """Publish a model to a registry: only chunks that are missing there are uploaded, and the tag moves last.

    Readers see the whole new revision or the old one. Killed at any moment, it leaves a registry that is sound, and the
    next call goes on from what is there.

    Args:
        uri: The model: any folder or URL that `load_model` takes, or a revision of another registry.
        destination: `registry/model@tag`, the registry at any fsspec URL that can be written to; it is made if there is
            none. Without a tag it is `latest`.
        base: The revision this one was made from, as a URI, or `model@tag` of the same registry; recorded, by its digest
            where it is in the same registry.
        policy: Where the model's bytes may be, `{"allow": {"jurisdictions": ["eu"]}}`; part of the revision. The default is
            the policy of the revision that is published from, if it has one.
        artefacts: Folders of compiled code by the names of their bundles, carried beside the weights.
        facts: What the bundles are for. The default is this machine.
        replicas: How many replicas of the store must have it before this returns.
        storage_options: For the model's origin.
        destination_options: For the registry's.
        progress: Called with (bytes done, bytes in all) from the loop thread.

    Raises:
        ConflictError: Another publisher moved the tag meanwhile; the revision is published, by its digest.
        WeightcacheError: Another of `weightcache.errors`; the tag is what it was.
    """
    from weightcache import registries

    request = _request(uri, None, None, "none", None, storage_options, timeout_s, progress)
    return registries.publish(
        request,
        str(destination),
        destination_options or {},
        base,
        policy,
        registries.bundles_of(artefacts or {}, facts),
        replicas,
    )


def tags(uri: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> list[TagRow]:
    """Return the tags of a model of a registry (`registry/model`), or of all its models, the last moved first."""
    from weightcache import registries

    return registries.tags(str(uri), storage_options or {})


def revisions(uri: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> list[RevisionRow]:
    """Return the revisions of a model of a registry (`registry/model`), or of all its models, the last written first."""
    from weightcache import registries

    return registries.revisions(str(uri), storage_options or {})


def tag(uri: str, revision: str, *, storage_options: Mapping[str, Any] | None = None) -> TagRow:
    """Let a tag name a revision.

    Args:
        uri: `registry/model@tag`.
        revision: `blake3:…` of the same model, or another of its tags.

    Raises:
        ModelNotFoundError: There is no such revision.
        ConflictError: Another moved the tag at the same moment; it stays as it is.
    """
    from weightcache import registries

    return registries.move_tag(uri, revision, storage_options or {})


def replicate(
    uri: str,
    *,
    source: str = "",
    to: str = "",
    dry: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Replication]:
    """Copy what other replicas of a store lack: chunks first, verified, then revisions with their signatures, then tags.

    Args:
        uri: `wc://store`, or `wc://store/model` for one model.
        source: The replica to copy from; the default is the one that is published to.
        to: The replica to copy to; the default is every other that can be written to and does not replicate itself.
        dry: Only say what would be copied, how far behind the replica is, and what it would cost.
        progress: Called with (bytes done, bytes in all) from the loop thread.

    Returns:
        What was done, a replica each.

    Raises:
        ResidencyError: A policy forbids a revision to go there; nothing of it moved.
    """
    from weightcache import registries

    return registries.replicate(str(uri), storage_options or {}, source=source, to=to, dry=dry, progress=progress)


def keygen(path: str | os.PathLike[str]) -> str:
    """Make an Ed25519 key: the private one as a file that only its owner reads. Returns the public one, `ed25519:…`.

    Raises:
        ConfigError: Something is there already, or it cannot be written.
    """
    from pathlib import Path

    from weightcache import signatures

    return str(signatures.generate(Path(path)))


def sign(uri: str, key: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> tuple[str, int]:
    """Sign a published revision (`registry/model@tag`) with a private key from `keygen`.

    Returns the revision's digest and the signature's serial, which is higher than that of every earlier one of the model:
    nodes refuse a tag that goes back to a lower one than they have seen.
    """
    from pathlib import Path

    from weightcache import registries

    return registries.sign(uri, Path(key), storage_options or {})


def trusted_keys(store: str, key: str | None = None) -> list[str]:
    """Return the public keys that a store of the configuration trusts, and one more that is checked for its form.

    Raises:
        ConfigError: No such store, or no such key.
    """
    from weightcache import access

    return access.trusted_keys(store, key)


def rulings(since: str | None = None) -> list[dict[str, Any]]:
    """Return what policies allowed and forbade on this node, oldest first.

    Args:
        since: An age (`7d`, `12h`, `2w`), or the month or day (UTC) to begin with; all that is known otherwise.
    """
    from weightcache import access

    return access.rulings(since)


def diff(
    uri: str | os.PathLike[str], other: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
) -> Difference:
    """Tell which tensors, files and bytes a published revision has that another has not."""
    from weightcache import registries

    return registries.diff(str(uri), str(other), storage_options or {})


def remove(uri: str, *, replica: str = "", storage_options: Mapping[str, Any] | None = None) -> str:
    """Remove from a registry a tag (`registry/model@tag`), a revision (`@blake3:…`) that no tag names, or a whole model.

    Chunks stay until `gc`. Returns what was removed, in words.

    Args:
        replica: Of a store, which one; the default is the one that is published to. The others keep what they have.

    Raises:
        ModelNotFoundError: It is not there.
        InUseError: A tag names the revision, or somebody publishes it just now.
    """
    from weightcache import registries

    return registries.remove(uri, storage_options or {}, replica)


def gc(
    uri: str | os.PathLike[str],
    *,
    dry: bool = True,
    grace_s: float = 3600.0,
    untagged_s: float | None = None,
    replica: str = "",
    storage_options: Mapping[str, Any] | None = None,
) -> Garbage:
    """Remove from a registry the chunks that no revision needs. Safe beside publishers and readers of revisions.

    Args:
        dry: Only say what would be removed.
        grace_s: Chunks written later than so long ago stay.
        untagged_s: Revisions that no tag names go, too, when they were written longer ago than this.
        replica: Of a store, which one; the default is the one that is published to.

    Raises:
        InUseError: Another sweep runs.
    """
    from weightcache import registries

    return registries.gc(
        str(uri), storage_options or {}, dry=dry, grace_s=grace_s, untagged_s=untagged_s, replica=replica
    )


def check(
    uri: str | os.PathLike[str],
    *,
    deep: bool = False,
    repair_from: Sequence[str] = (),
    replica: str = "",
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RegistryCheck:
    """Check a registry: every tag, revision and chunk.

    Args:
        deep: Read every chunk and compute its digest, not only look at presence and size.
        repair_from: Registries, or names of other replicas of the same store, that lost and rotten chunks, and damaged
            revisions, are written anew from.
        replica: Of a store, which one is checked; the default is the one that is published to.
        progress: Called with (bytes done, bytes in all) of a deep check.
    """
    from weightcache import registries

    return registries.check(
        str(uri), storage_options or {}, deep=deep, repair_from=repair_from, progress=progress, replica=replica
    )


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


def simulate_cost(
    model_gb: float = 140.0, n_loads: int = 100, n_nodes: int = 1, hit_share: float | None = None
) -> Simulation:
    """Estimate what a month of loads over the internet costs at each provider and configured replica.

    Once with every load cold, once with the disk cache. Priced by the list, AWS's tiers and the free shares of AWS and
    Azure included, unless the configuration has other prices; each month says by what.

    Args:
        model_gb: GB (10^9 bytes) of the model, which is kept in the store all month.
        n_loads: Loads a month, of all nodes together.
        n_nodes: Each loads cold once with the disk cache, and from disk afterwards.
        hit_share: The share of loads that come from disk instead of that rule, from 0 to 1.
    """
    from weightcache import simulation
    from weightcache.config import read_settings

    case = simulation.make_case(model_gb, n_loads, n_nodes, hit_share)
    settings = read_settings()
    return simulation.simulate(case, settings.stores, settings.prices)


def configuration(file: str | os.PathLike[str] | None = None) -> Configuration:
    """Read the configuration and say what of it differs from the defaults; dials nothing.

    Args:
        file: A `weightcache.toml` to read in place of this process's own; its environment counts all the same.

    Raises:
        ConfigError: A file, name or value that cannot be used.
    """
    from pathlib import Path

    from weightcache.config import read_configuration

    return read_configuration(file=None if file is None else Path(file))


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
