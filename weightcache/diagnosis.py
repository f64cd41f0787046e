"""Own the doctor: what on this machine decides how fast and how safe loading is, each finding with advice.

Never dials, never shows a secret, and never fails: a check that cannot be done is itself a finding. It writes in the
cache folder alone, and removes what it wrote to measure.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from weightcache import _engine, machine
from weightcache._version import __version__
from weightcache.config import MIB, read_settings
from weightcache.digest import checksum
from weightcache.errors import CapacityError, ConfigError, DeviceError, WeightcacheError
from weightcache.files import file_system_of, is_network, staged, write_all
from weightcache.operations import Counters, Crew, HostPlace, Operations
from weightcache.tiers.disk import DiskTier

PROBE_NBYTES = 128 * MIB
PROBE_READ_NBYTES = 16 * MIB  # a chunk's limit: what a load reads at once
N_PROBE_READERS = 4  # four direct reads in flight reach the disk's ceiling (docs/decisions/003)
SLOW_DISK_GB_PER_S = 1.0
HUGE_PROBE_NBYTES = 32 * MIB
SMALL_SHARED_NBYTES = 1 << 30  # containers get 64 MiB unless told otherwise
FEW_PROCESSORS = 4
FEW_OPEN_FILES = 1024

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

    from weightcache.tiers.device import driver_of

    built, n_seen = torch.version.cuda, torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        driver = driver_of(read_settings().libcuda)
    except DeviceError as exc:
        advice = "if there is a GPU, install its driver; in a container, start it with --gpus all"
        if n_seen:
            return _Seen(f"{n_seen} that torch sees, filled by torch's own copies: {exc}", advice)
        return _Seen(f"none: {exc}", advice if built else "")
    kind = "a stand-in for a driver" if driver.is_stand_in else f"driver for CUDA {driver.version() // 1000}"
    devices = [driver.describe(index) for index in range(driver.count())]
    found = "; ".join(f"{name}, {_size(nbytes)}, {bus_id}" for name, bus_id, nbytes in devices) or "no device"
    if n_seen or driver.is_stand_in:
        return _Seen(f"{found} ({kind})")
    if not built:
        advice = "install a torch with CUDA: https://pytorch.org/get-started"
        return _Seen(f"not usable, this torch is built without CUDA: {found} ({kind})", advice)
    advice = "look at nvidia-smi and CUDA_VISIBLE_DEVICES; the driver must be as new as torch's CUDA"
    return _Seen(f"not usable, torch with CUDA {built} sees none: {found} ({kind})", advice)


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
            write_s, read_s, ways = _probe(fd, path)
    except (CapacityError, OSError) as exc:
        return _Seen(f"not measured: {exc}", "set WEIGHTCACHE_DIR to a folder that can be written", ok=False)
    write, read = (PROBE_NBYTES / 1e9 / seconds for seconds in (write_s, read_s))
    way = "past the page cache (O_DIRECT)" if ways.direct else "through the page cache"
    if ways.refused:
        way += f": O_DIRECT is refused here ({os.strerror(ways.refused)})"
    value = f"write {write:.2f} GB/s, read {read:.2f} GB/s ({way})"
    advice = "no load from the cache is faster than its disk: set WEIGHTCACHE_DIR to a folder on a local NVMe disk"
    return _Seen(value, advice if read < SLOW_DISK_GB_PER_S else "")


def _probe(fd: int, path: Path) -> tuple[float, float, Counters]:
    """Write random bytes durably and read them back as a load does.

    Returns:
        Seconds to write, seconds to read, and which way was read.
    """
    written = os.urandom(PROBE_NBYTES)
    began = time.perf_counter()
    write_all(fd, written)
    os.fsync(fd)
    write_s = time.perf_counter() - began
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    memory = _engine.Memory(PROBE_NBYTES)
    memory.populate(0, PROBE_NBYTES)
    operations, counters = Operations(), Counters()
    for start in range(0, PROBE_NBYTES, PROBE_READ_NBYTES):
        nbytes = min(PROBE_READ_NBYTES, PROBE_NBYTES - start)
        operations.read_open(fd, start, nbytes, HostPlace(memory.address + start))
    began = time.perf_counter()
    failure = operations.run(Crew(N_PROBE_READERS, counters=counters))
    read_s = time.perf_counter() - began
    if failure is not None:
        raise failure.as_error(str(path))
    if checksum(memory) != checksum(written):
        raise OSError(f"{path} came back other than it was written: do not use this disk")
    return write_s, read_s, counters


# -- memory


def _huge_pages() -> _Seen:
    mode = machine.huge_pages()
    memory = _engine.Memory(HUGE_PROBE_NBYTES, fresh=True)
    memory.populate(0, HUGE_PROBE_NBYTES)
    granted = memory.huge_nbytes()
    value = f"{mode}; {_size(granted)} of {_size(HUGE_PROBE_NBYTES)} granted"
    if mode == "never":
        return _Seen(value, f"memory is filled faster in huge pages: echo madvise > {machine.HUGE_PAGES}/enabled")
    if mode != "none" and granted < HUGE_PROBE_NBYTES:
        return _Seen(value, "free memory is in small pieces: echo 1 > /proc/sys/vm/compact_memory")
    return _Seen(value)


def _shared_huge_pages() -> _Seen:
    return _Seen(machine.shared_huge_pages())


def _reserved_pages() -> _Seen:
    facts = machine.meminfo()
    total, free = facts.get("HugePages_Total", 0), facts.get("HugePages_Free", 0)
    room = f": images of the host tier lie there, up to {_size(free * facts['Hugepagesize'])}" if free else ""
    wanted = read_settings().daemon.huge_bytes
    advice = (
        f"huge_bytes wants {_size(wanted)}: weightcache status says what became of that; at boot there is most room"
    )
    is_less = total * facts.get("Hugepagesize", 0) < wanted
    return _Seen(f"{total} pages, {free} free{room}", advice if is_less else "")


def _memory() -> _Seen:
    available = machine.meminfo()["MemAvailable"]
    limit = machine.memory_limit_bytes()
    if limit >= machine.NO_LIMIT:
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
    quota = machine.processor_quota()
    value = f"{n_allowed} of {os.cpu_count()} allowed"
    if quota < n_allowed:
        value += f", the time of {quota:g} by cgroup"
    few = min(quota, n_allowed) < FEW_PROCESSORS
    return _Seen(value, "reading and verifying run on all of them: allow 4 or more" if few else "")


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


# -- words


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
