"""Own the knowledge of what this machine grants: memory, huge pages, cgroups, processors and the nodes they belong to.

Never changes anything, and never dials: it reads /proc and /sys each time it is asked, for both versions of cgroups.

Sizes are bytes. What a container hides is no failure: such a limit is not there, such a node not known.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from weightcache import _engine

MEMINFO = Path("/proc/meminfo")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
PCI_DEVICES = Path("/sys/bus/pci/devices")
NODES = Path("/sys/devices/system/node")
NO_LIMIT = 1 << 60  # cgroup v1 spells "none" as a number just below 2^63
UNKNOWN_NODE = -1

_PCI_BUS_ID = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", re.IGNORECASE)


# -- memory


def meminfo() -> Mapping[str, int]:
    """Return /proc/meminfo: sizes in bytes, HugePages_* in pages. Raises OSError."""
    facts: dict[str, int] = {}
    for line in MEMINFO.read_text().splitlines():
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        facts[name] = int(number) * (1024 if unit == "kB" else 1)
    return facts


def memory_limit_bytes() -> int:
    """Return the least memory limit of this process's cgroup and those above it; NO_LIMIT without one."""
    limits = cgroup_values("memory", "memory.max", "memory.limit_in_bytes")
    return min([NO_LIMIT, *(int(text) for text in limits if text.isdecimal())])


def memory_available_bytes() -> int:
    """Return how much memory this process can fill before something is swapped out, refused or killed.

    That is the least of what the machine has available and of what each enclosing cgroup has left below its limit;
    files that are only cached, and what lies in the engine's pool, count as left. Memory that others have mapped and
    not filled yet counts as well, so two loads that begin at once may both be told the same.

    Where nothing can be read, it is NO_LIMIT.
    """
    pool = _engine.pool_nbytes()
    available = [NO_LIMIT]
    with contextlib.suppress(OSError, KeyError):
        facts = meminfo()
        lists = facts["Active(file)"] + facts["Inactive(file)"]
        files = facts["Cached"] + facts.get("Buffers", 0) - facts["Shmem"]
        available.append(facts["MemAvailable"] - _not_to_be_taken(lists, files, pool))
    with contextlib.suppress(OSError):
        for folder, is_v1 in _cgroups("memory"):
            with contextlib.suppress(OSError, KeyError, ValueError):
                available.append(_left_in(folder, is_v1, pool))
    return max(0, min(available))


def _left_in(folder: Path, is_v1: bool, pool: int) -> int:
    """Return a cgroup's limit less what it uses and cannot give up. Raises OSError, KeyError, ValueError."""
    limit = (folder / ("memory.limit_in_bytes" if is_v1 else "memory.max")).read_text().strip()
    if not limit.isdecimal() or int(limit) >= NO_LIMIT:
        return NO_LIMIT
    used = int((folder / ("memory.usage_in_bytes" if is_v1 else "memory.current")).read_text())
    facts = {name: int(number) for name, number in map(str.split, (folder / "memory.stat").read_text().splitlines())}
    prefix, cached = ("total_", "cache") if is_v1 else ("", "file")  # v1 counts those below it apart
    lists = facts[f"{prefix}active_file"] + facts[f"{prefix}inactive_file"]
    files = facts[prefix + cached] - facts[f"{prefix}shmem"]
    return int(limit) - (used - lists + _not_to_be_taken(lists, files, pool))


def _not_to_be_taken(lists: int, files: int, pool: int) -> int:
    """Return how much on the kernel's lists of cached files is memory in use.

    What the pool held (MADV_FREE) stays on these lists when it is used again, until the kernel looks at it: it would
    be counted as free. What is on the lists and is no file can be taken only if it lies in a pool now.
    """
    return max(0, lists - files - pool)


# -- huge pages


def chosen(path: Path) -> str:
    """Return the word in brackets of a kernel setting such as `always [madvise] never`; `none` if it is not there."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except FileNotFoundError:
        return "none"


def huge_pages() -> str:
    """Return when private memory lies in huge pages: `always`, `madvise` or `never`; `none` if unknown here."""
    return chosen(HUGE_PAGES / "enabled")


def shared_huge_pages() -> str:
    """Return when shared memory does: `always`, `within_size`, `advise`, `never`, `deny` or `force`; else `none`."""
    return chosen(HUGE_PAGES / "shmem_enabled")


# -- processors


def processor_quota() -> float:
    """Return how many processors' time the cgroups grant; infinite without a quota. Raises OSError."""
    return min(map(_quota, cgroup_values("cpu", "cpu.max", "cpu.cfs_quota_us")), default=float("inf"))


def _quota(text: str) -> float:
    """Read cgroup v2's `quota period`, or v1's quota of its usual 100 ms, as processors; infinite without a quota."""
    quota, _, period = text.partition(" ")
    return int(quota) / int(period or 100_000) if quota.isdecimal() else float("inf")


def numa_node_of(pci_bus_id: str) -> int:
    """Return the node a device is attached to, UNKNOWN_NODE where that is not known or does not matter.

    Args:
        pci_bus_id: As CUDA and NVML spell it: `0000:3B:00.0`, `00000000:3B:00.0`.
    """
    found = _PCI_BUS_ID.fullmatch(pci_bus_id)
    if found is None:
        return UNKNOWN_NODE
    address = f"{int(found[1] or '0', 16):04x}:{found[2].lower()}"
    try:
        return max(UNKNOWN_NODE, int((PCI_DEVICES / address / "numa_node").read_text()))
    except (OSError, ValueError):
        return UNKNOWN_NODE


def cpus_of_node(node: int) -> frozenset[int]:
    """Return the processors of a node that this process may use; empty where the node is not known."""
    try:
        text = (NODES / f"node{node}" / "cpulist").read_text().strip()
    except OSError:
        return frozenset()
    cpus: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus & os.sched_getaffinity(0))


# -- cgroups


def cgroup_values(controller: str, name: str, name_v1: str) -> list[str]:
    """Return what a file says in this process's cgroup and in each above it, of both versions. Raises OSError."""
    files = (folder / (name_v1 if is_v1 else name) for folder, is_v1 in _cgroups(controller))
    return [file.read_text().strip() for file in files if file.is_file()]


def _cgroups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Yield this process's cgroup and each above it, with whether it is of version 1. Raises OSError."""
    for line in CGROUP_MEMBERSHIP.read_text().splitlines():
        _, controllers, below = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUPS / controller if controllers else CGROUPS
        folder = root / below.lstrip("/")  # in a container it may be the host's; then only the root is there
        for each in (folder, *folder.parents):
            if each.is_relative_to(root):
                yield each, bool(controllers)
