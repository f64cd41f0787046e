"""Own compile artefacts: bundles of files that a revision carries beside its weights, for hardware and versions named exactly.

Never runs or looks into what a bundle holds: it is data, cut, verified and signed like every other file.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from weightcache.chunking import cut_file
from weightcache.manifest import Role, Shard, check_path
from weightcache.origins.local import LocalOrigin
from weightcache.origins.resilient import Resilient
from weightcache.published import ARTEFACT_PREFIX, Bundle, path_in
from weightcache.publishing import Source
from weightcache.runtime import Runtime

# What compiled code depends on, where it is installed.
PACKAGES = ("torch", "triton", "vllm", "sglang", "transformers")


def facts_of_machine() -> dict[str, str]:
    """Return what compiled code depends on here: processor, Python, packages, and the GPU as torch sees it."""
    facts = {"machine": platform.machine(), "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "torch" in facts:
        import torch

        facts["cuda"] = torch.version.cuda or "none"
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            facts |= {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}"}
        else:
            facts["gpu"] = "none"
    return facts


def mismatch(bundle: Bundle, here: Mapping[str, str]) -> str:
    """Say why a bundle does not fit a machine; empty where it does."""
    wrong = [
        f"{name} is {here.get(name, 'unknown')!r} here, not {wanted!r}"
        for name, wanted in sorted(bundle.facts.items())
        if here.get(name) != wanted
    ]
    return ", ".join(wrong)


async def describe_bundle(bundle: Bundle, folder: Path, threads: Runtime) -> Source:
    """Describe a folder's files as a bundle's, to be published beside a model."""
    check_path(bundle.name)
    origin = Resilient(LocalOrigin(folder, threads.workers))
    stats = await origin.list()
    shards = [
        Shard(path_in(bundle.name, stat.path), stat.nbytes, stat.etag, Role.ARTEFACT, cut_file(stat.nbytes))
        for stat in stats
    ]
    return Source(shards, origin, {path_in(bundle.name, stat.path): stat.path for stat in stats})


def files_of(bundle: str, shards: Sequence[Shard]) -> dict[int, str]:
    """Return a bundle's files: the indexes of their shards, and their names in the bundle."""
    start = f"{ARTEFACT_PREFIX}{bundle}/"
    return {index: shard.path.removeprefix(start) for index, shard in enumerate(shards) if shard.path.startswith(start)}
