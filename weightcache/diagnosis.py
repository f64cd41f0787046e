"""Own the doctor: what on this machine decides how fast and how safe loading is, each finding with advice.

Never dials, never shows a secret, and never fails: a check that cannot be done is itself a finding. It writes in the
cache folder alone, and removes what it wrote to measure.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from weightcache import _engine
from weightcache._version import __version__
from weightcache.config import MIB, read_settings
from weightcache.digest import checksum
from weightcache.errors import CapacityError, ConfigError, WeightcacheError
from weightcache.files import file_system_of, is_network, read_file, staged, write_all
from weightcache.tiers.disk import DiskTier

PROBE_NBYTES = 128 * MIB
PROBE_READ_NBYTES = 16 * MIB  # a chunk's limit: what a load reads at once
N_PROBE_READERS = 4  # four direct reads in flight reach the disk's ceiling (docs/decisions/003)
SLOW_DISK_GB_PER_S = 1.0
HUGE_PROBE_NBYTES = 32 * MIB
SMALL_SHARED_NBYTES = 1 << 30  # containers get 64 MiB unless told otherwise
FEW_PROCESSORS = 4
FEW_OPEN_FILES = 1024
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
NO_LIMIT = 1 << 60  # cgroup v1 spells "none" as a number just below 2^63

# Botocore's ways to credentials that dial or run a program, and so are not tried, by the key that chooses them.
UNTRIED_METHODS = {
    "role_arn": "assume-role",
    "sso_session": "sso",
    "sso_start_url": "sso",
    "login_session": "login",
    "credential_process": "custom-process",
}
# Those that only read. The web identity's role is assumed at first use; loading tells whether it is set up.
READ_FIRST = ("env", "assume-role-with-web-identity")
READ_LAST = ("shared-credentials-file", "config-file")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `ok` is False for what is broken; advice on what is ok would make it better."""

    name: str
    value: str
    ok: bool = True
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a check saw: a Finding without its name."""

    value: str
    advice: str = ""
    ok: bool = True


def examine() -> list[Finding]:
    """Look at everything; takes some seconds. The cache folder is made if it is not there, as a load would."""
    return [_examine(name, check) for name, check in CHECKS.items()]


def _examine(name: str, check: Callable[[], _Seen]) -> Finding:
    try:
        seen = check()
    except WeightcacheError as exc:
        seen = _Seen(str(exc), "do what the message says", ok=False)
    except Exception as exc:  # whatever is wrong with this machine, the rest of it is still to be looked at
        seen = _Seen(f"cannot be examined: {type(exc).__name__}: {exc}", "mend this, or report it as a bug", ok=False)
    return Finding(name, seen.value, seen.ok, seen.advice)


# -- software and GPU


def _software() -> _Seen:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return _Seen(f"{__version__} on {python}, Linux {platform.release()} {platform.machine()}")


def _torch() -> _Seen:
    try:
        import torch
    except (ImportError, OSError) as exc:
        return _Seen(f"cannot be imported: {exc}", "reinstall it: https://pytorch.org/get-started", ok=False)
    built = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return _Seen(f"{torch.__version__}, built {built}")


def _gpu() -> _Seen:
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return _Seen("; ".join(f"{device.name}, {_size(device.total_memory)}" for device in devices))
    built = torch.version.cuda
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        advice = "if there is a GPU, install its driver; in a container, start it with --gpus all"
        return _Seen(f"none, there is no driver: {exc}", advice if built else "")
    if not built:
        advice = "install a torch with CUDA: https://pytorch.org/get-started"
        return _Seen("not usable: there is a driver, but this torch is built without CUDA", advice)
    advice = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver must be as new as torch's CUDA"
    return _Seen(f"not usable: there is a driver, but torch with CUDA {built} sees no device", advice)


# -- disk


def _cache_folder() -> _Seen:
    settings = read_settings()
    with closing(DiskTier(settings.dir, settings.disk_budget_bytes)) as disk:
        used, budget = disk.used_bytes(), disk.budget_bytes
    volume = os.statvfs(settings.dir)
    free = volume.f_bavail * volume.f_frsize
    file_system = file_system_of(settings.dir)
    value = f"{settings.dir} on {file_system}; {_size(free)} free, budget {_size(budget)}, used {_size(used)}"
    if is_network(file_system):
        return _Seen(value, "this lies on a network: set WEIGHTCACHE_DIR to a folder on a local disk")
    if file_system in ("tmpfs", "ramfs"):
        return _Seen(value, "this takes memory and is lost at the next boot: set WEIGHTCACHE_DIR to a folder on a disk")
    if budget > free + used:
        return _Seen(value, "the budget is more than there is: lower WEIGHTCACHE_DISK_BUDGET_BYTES or free some space")
    return _Seen(value)


def _disk_speed() -> _Seen:
    settings = read_settings()
    try:
        with (
            closing(DiskTier(settings.dir, settings.disk_budget_bytes)) as disk,
            staged(disk.staging) as (fd, path),
        ):
            write_s, read_s, n_resident = _probe(fd, path)
    except (CapacityError, OSError) as exc:
        return _Seen(f"not measured: {exc}", "set WEIGHTCACHE_DIR to a folder that can be written", ok=False)
    write, read = (PROBE_NBYTES / 1e9 / seconds for seconds in (write_s, read_s))
    way = "through the page cache: O_DIRECT is refused here" if n_resident > PROBE_NBYTES // 2 else "direct"
    value = f"write {write:.2f} GB/s, read {read:.2f} GB/s ({way})"
    advice = "no load from the cache is faster than its disk: set WEIGHTCACHE_DIR to a folder on a local NVMe disk"
    return _Seen(value, advice if read < SLOW_DISK_GB_PER_S else "")


def _probe(fd: int, path: Path) -> tuple[float, float, int]:
    """Write random bytes durably and read them back as a load does.

    Returns:
        Seconds to write, seconds to read, and the bytes that the page cache holds afterwards.
    """
    written = os.urandom(PROBE_NBYTES)
    began = time.perf_counter()
    write_all(fd, written)
    os.fsync(fd)
    write_s = time.perf_counter() - began
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    memory = _engine.Memory(PROBE_NBYTES)
    memory.populate(0, PROBE_NBYTES)
    view = memoryview(memory)

    def read(start: int) -> int:
        return read_file(path, fd, start, view[start : start + PROBE_READ_NBYTES])

    with ThreadPoolExecutor(N_PROBE_READERS, "weightcache-doctor") as readers:
        began = time.perf_counter()
        n_read = sum(readers.map(read, range(0, PROBE_NBYTES, PROBE_READ_NBYTES)))
        read_s = time.perf_counter() - began
    if n_read != PROBE_NBYTES or checksum(view) != checksum(written):
        raise OSError(f"{path} came back other than it was written: do not use this disk")
    return write_s, read_s, _engine.resident_nbytes(fd, 0, PROBE_NBYTES)


# -- memory


def _huge_pages() -> _Seen:
    mode = _chosen(HUGE_PAGES / "enabled")
    memory = _engine.Memory(HUGE_PROBE_NBYTES)
    memory.populate(0, HUGE_PROBE_NBYTES)
    granted = memory.huge_nbytes()
    value = f"{mode}; {_size(granted)} of {_size(HUGE_PROBE_NBYTES)} granted"
    if mode == "never":
        return _Seen(value, f"memory is filled faster in huge pages: echo madvise > {HUGE_PAGES}/enabled")
    if mode != "none" and granted < HUGE_PROBE_NBYTES:
        return _Seen(value, "free memory is in small pieces: echo 1 > /proc/sys/vm/compact_memory")
    return _Seen(value)


def _shared_huge_pages() -> _Seen:
    return _Seen(_chosen(HUGE_PAGES / "shmem_enabled"))


def _reserved_pages() -> _Seen:
    facts = _meminfo()
    free = facts.get("HugePages_Free", 0)
    nbytes = free * facts.get("Hugepagesize", 0)
    advice = f"nothing uses these {_size(nbytes)}, and weightcache cannot: give them back with sysctl vm.nr_hugepages=0"
    return _Seen(f"{facts.get('HugePages_Total', 0)} pages, {free} free", advice if free else "")


def _memory() -> _Seen:
    available = _meminfo()["MemAvailable"]
    limits = [int(text) for text in _cgroup("memory", "memory.max", "memory.limit_in_bytes") if text.isdecimal()]
    limit = min(limits, default=NO_LIMIT)
    if limit >= NO_LIMIT:
        return _Seen(f"{_size(available)} available, no cgroup limit")
    advice = "no larger model can be loaded here: raise the memory limit of the container or service"
    return _Seen(f"{_size(available)} available, cgroup limit {_size(limit)}", advice if limit < available else "")


def _locked_memory() -> _Seen:
    return _Seen(_limit(resource.RLIMIT_MEMLOCK, _size))


def _shared_memory() -> _Seen:
    volume = os.statvfs("/dev/shm")
    size, free = volume.f_blocks * volume.f_frsize, volume.f_bavail * volume.f_frsize
    advice = "serving stacks of several processes need more: start the container with --shm-size=8g"
    return _Seen(f"{_size(size)}, {_size(free)} free", advice if size < SMALL_SHARED_NBYTES else "")


# -- processors and open files


def _processors() -> _Seen:
    n_allowed = len(os.sched_getaffinity(0))
    quota = min(map(_quota, _cgroup("cpu", "cpu.max", "cpu.cfs_quota_us")), default=float("inf"))
    value = f"{n_allowed} of {os.cpu_count()} allowed"
    if quota < n_allowed:
        value += f", the time of {quota:g} by cgroup"
    few = min(quota, n_allowed) < FEW_PROCESSORS
    return _Seen(value, "reading and verifying run on all of them: allow 4 or more" if few else "")


def _quota(text: str) -> float:
    """Read cgroup v2's `quota period`, or v1's quota of its usual 100 ms, as processors; infinite without a quota."""
    quota, _, period = text.partition(" ")
    return int(quota) / int(period or 100_000) if quota.isdecimal() else float("inf")


def _open_files() -> _Seen:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < FEW_OPEN_FILES
    advice = f"raise it: ulimit -n {FEW_OPEN_FILES}, or more; for a service, LimitNOFILE={FEW_OPEN_FILES}"
    return _Seen(_limit(resource.RLIMIT_NOFILE, str), advice if few else "")


# -- S3


def _s3_credentials() -> _Seen:
    from botocore.exceptions import BotoCoreError

    try:
        method = _credential_method()
    except BotoCoreError as exc:
        return _Seen(f"cannot be used: {exc}", "correct the AWS_ names, or the profile in ~/.aws", ok=False)
    if method:
        return _Seen(f"found: {method}")
    advice = (
        "the role of a container or an instance is only asked for when a model is loaded; without one, set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; a public bucket needs storage_options={'anon': True}"
    )
    return _Seen("none in the environment or in files", advice)


def _credential_method() -> str:
    """Return botocore's name of its way to credentials, empty for none; tries no way that dials or runs a program."""
    from botocore.session import Session

    session = Session()
    ways = session.get_component("credential_provider")
    profile = session.get_scoped_config()
    for name in READ_FIRST:
        if ways.get_provider(name).load():
            return name
    for key, name in UNTRIED_METHODS.items():
        if key in profile:
            return f"{name}, not tried"
    return next((name for name in READ_LAST if ways.get_provider(name).load()), "")


def _s3_endpoint() -> _Seen:
    endpoint, region = _endpoint_and_region()
    at_aws = (urlsplit(endpoint).hostname or "").endswith(".amazonaws.com")
    advice = "each first request is sent on to the bucket's region: set AWS_DEFAULT_REGION to it"
    return _Seen(f"{_place(endpoint)}, region {region or 'not set'}", advice if at_aws and not region else "")


def _proxy() -> _Seen:
    from botocore.utils import get_environ_proxies

    endpoint, _ = _endpoint_and_region()
    parts = urlsplit(endpoint)
    proxy = get_environ_proxies(endpoint).get(parts.scheme)
    if not proxy:
        return _Seen("none before the S3 endpoint")
    advice = f"weights pass through it: if {parts.hostname} can be reached without, add it to NO_PROXY"
    return _Seen(f"{_place(proxy)} before the S3 endpoint", advice)


def _endpoint_and_region() -> tuple[str, str]:
    """Return what an S3 client of this process would dial, by making one, which dials nothing."""
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    session = Session()
    try:
        client = session.create_client(
            "s3",
            aws_access_key_id="unused",  # so that none are looked for
            aws_secret_access_key="unused",
            config=Config(defaults_mode="legacy"),  # "auto" would ask the instance for its region
        )
    except BotoCoreError as exc:
        raise ConfigError(f"{exc}: correct the AWS_ names, or the profile in ~/.aws") from exc
    except ValueError:  # it quotes the URL, which may hold a password
        raise ConfigError("the S3 endpoint is not a URL: correct AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL") from None
    client.close()
    return str(client.meta.endpoint_url), str(session.get_config_variable("region") or "")


def _place(url: str) -> str:
    """Return a URL's scheme, host and port: what is left holds no password."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


# -- reading the system


def _chosen(path: Path) -> str:
    """Return the word in brackets of a kernel setting such as `always [madvise] never`; `none` if it is not there."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except FileNotFoundError:
        return "none"


def _meminfo() -> Mapping[str, int]:
    """Return /proc/meminfo: sizes in bytes, HugePages_* in pages."""
    facts: dict[str, int] = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        number, _, unit = rest.strip().partition(" ")
        facts[name] = int(number) * (1024 if unit == "kB" else 1)
    return facts


def _cgroup(controller: str, name: str, name_v1: str) -> list[str]:
    """Return what a file says in this process's cgroup and in each above it, of both versions of cgroups."""
    found: list[str] = []
    for line in CGROUP_MEMBERSHIP.read_text().splitlines():
        _, controllers, below = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, file = (CGROUPS / controller, name_v1) if controllers else (CGROUPS, name)
        folder = root / below.lstrip("/")  # in a container it may be the host's; then only the root is there
        for each in (folder, *folder.parents):
            if each.is_relative_to(root) and (each / file).is_file():
                found.append((each / file).read_text().strip())
    return found


def _limit(kind: int, spell: Callable[[int], str]) -> str:
    soft, hard = ("unlimited" if each == resource.RLIM_INFINITY else spell(each) for each in resource.getrlimit(kind))
    return soft if soft == hard else f"{soft}, can be raised to {hard}"


def _size(nbytes: int) -> str:
    for power, unit in ((12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if nbytes >= 10**power:
            return f"{nbytes / 10**power:.1f} {unit}"
    return f"{nbytes} B"


CHECKS: Mapping[str, Callable[[], _Seen]] = {
    "weightcache": _software,
    "torch": _torch,
    "gpu": _gpu,
    "cache folder": _cache_folder,
    "disk speed": _disk_speed,
    "huge pages": _huge_pages,
    "shared huge pages": _shared_huge_pages,
    "reserved huge pages": _reserved_pages,
    "memory": _memory,
    "locked memory": _locked_memory,
    "/dev/shm": _shared_memory,
    "processors": _processors,
    "open files": _open_files,
    "s3 credentials": _s3_credentials,
    "s3 endpoint": _s3_endpoint,
    "proxy": _proxy,
}
