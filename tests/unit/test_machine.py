"""What this machine grants, read from a made-up tree, and from a real memory cgroup where one can be made."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from children import wait_until

from weightcache import _engine, machine
from weightcache.errors import CapacityError
from weightcache.tiers import host

MIB = 1 << 20
GIB = 1 << 30


def lay_out(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB available and no limits; its files lie below this folder."""
    for name in ("MEMINFO", "HUGE_PAGES", "CGROUPS", "CGROUP_MEMBERSHIP", "PCI_DEVICES", "NODES"):
        monkeypatch.setattr(machine, name, tmp_path / name.lower())
    lay_out(tmp_path, {"meminfo": meminfo(available=8 * GIB), "cgroup_membership": "0::/a/b\n"})
    return tmp_path


def meminfo(available: int, lists: int = 0, files: int = 0) -> str:
    """Spell /proc/meminfo: `lists` on the lists of files, of which `files` are files, and 1 GiB of shmem."""
    facts = {
        "MemAvailable": available,
        "Buffers": 0,
        "Cached": files + GIB,
        "Active(file)": lists // 2,
        "Inactive(file)": lists - lists // 2,
        "Shmem": GIB,
    }
    return "".join(f"{name}:  {nbytes >> 10} kB\n" for name, nbytes in facts.items()) + "HugePages_Free:   7\n"


def memory_v2(limit: int | str, used: int, lists: int = 0, files: int = 0) -> dict[str, str]:
    stat = f"anon 5\nfile {files}\nshmem 0\ninactive_file {lists}\nactive_file 0\n"
    return {"memory.max": f"{limit}\n", "memory.current": f"{used}\n", "memory.stat": stat}


def memory_v1(limit: int, used: int, lists: int = 0, files: int = 0) -> dict[str, str]:
    stat = f"cache 1\ntotal_cache {files}\ntotal_shmem 0\ntotal_inactive_file 0\ntotal_active_file {lists}\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{used}\n", "memory.stat": stat}


def below(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    return {f"cgroups/{folder}/{name}": text for name, text in files.items()}


# -- memory


def test_this_machine_says_something_that_makes_sense() -> None:
    assert 0 < machine.memory_available_bytes() <= machine.meminfo()["MemTotal"] + machine.meminfo()["SwapTotal"]
    assert machine.memory_limit_bytes() > 0
    assert machine.processor_quota() > 0


def test_memory_without_limits_is_what_the_machine_has(tree: Path) -> None:
    assert machine.memory_available_bytes() == 8 * GIB
    assert machine.memory_limit_bytes() == machine.NO_LIMIT
    assert machine.meminfo()["HugePages_Free"] == 7


@pytest.mark.parametrize(
    ("membership", "files", "available"),
    [
        ("0::/a/b\n", below("a/b", memory_v2(4 * GIB, GIB)), 3 * GIB),
        ("0::/a/b\n", below("a/b", memory_v2(4 * GIB, 3 * GIB, lists=2 * GIB, files=2 * GIB)), 3 * GIB),
        ("0::/a/b\n", below("a/b", memory_v2(4 * GIB, 0)) | below("a", memory_v2(3 * GIB, GIB)), 2 * GIB),
        ("0::/a/b\n", below("a/b", memory_v2("max", GIB)), 8 * GIB),
        ("0::/a/b\n", below("a/b", memory_v2(GIB, 2 * GIB)), 0),
        ("0::/of/the/host\n", below("", memory_v2(4 * GIB, GIB)), 3 * GIB),
        ("4:memory:/a\n", below("memory/a", memory_v1(4 * GIB, 3 * GIB, lists=GIB, files=GIB)), 2 * GIB),
        ("4:memory:/a\n", below("memory/a", memory_v1(9223372036854771712, GIB)), 8 * GIB),
        ("4:cpu:/a\n", below("memory/a", memory_v1(4 * GIB, GIB)), 8 * GIB),
        ("0::/a/b\n", {"cgroups/a/b/memory.max": "1\n"}, 8 * GIB),  # and nothing else can be read
    ],
)
def test_memory_below_limits_is_what_the_least_of_them_leaves(
    tree: Path, membership: str, files: Mapping[str, str], available: int
) -> None:
    lay_out(tree, {"cgroup_membership": membership, **files})
    assert machine.memory_available_bytes() == available


def test_memory_used_again_is_not_free_though_the_kernel_counts_it_so(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_engine, "pool_nbytes", lambda: 0)
    lay_out(tree, {"meminfo": meminfo(8 * GIB, lists=5 * GIB, files=2 * GIB)})
    assert machine.memory_available_bytes() == 5 * GIB
    lay_out(tree, below("a/b", memory_v2(6 * GIB, 5 * GIB, lists=5 * GIB, files=2 * GIB)))
    assert machine.memory_available_bytes() == 3 * GIB
    monkeypatch.setattr(_engine, "pool_nbytes", lambda: GIB)
    assert machine.memory_available_bytes() == 4 * GIB


def test_machine_that_hides_everything_has_no_limit(tree: Path) -> None:
    (tree / "meminfo").unlink()
    (tree / "cgroup_membership").unlink()
    assert machine.memory_available_bytes() == machine.NO_LIMIT
    with pytest.raises(OSError):
        machine.meminfo()


# -- huge pages, nodes


def test_setting_is_the_word_in_brackets(tree: Path) -> None:
    assert machine.huge_pages() == machine.shared_huge_pages() == "none"
    lay_out(tree, {"huge_pages/enabled": "always [madvise] never\n", "huge_pages/shmem_enabled": "[always] never\n"})
    assert (machine.huge_pages(), machine.shared_huge_pages()) == ("madvise", "always")


@pytest.mark.parametrize(
    ("pci_bus_id", "node"),
    [
        ("0000:3B:00.0", 1),
        ("00000000:3B:00.0", 1),
        ("0000:3b:00.0", 1),
        ("3b:00.0", 1),
        ("0000:3C:00.0", -1),
        ("0000:3D:00.0", -1),
        ("0000:3E:00.0", -1),
        ("0000:../x", -1),
        ("", -1),
    ],
)
def test_node_of_a_device_is_found_by_its_bus_id(tree: Path, pci_bus_id: str, node: int) -> None:
    nodes = {"3b": "1\n", "3c": "-1\n", "3d": "no number\n"}
    lay_out(tree, {f"pci_devices/0000:{bus}:00.0/numa_node": text for bus, text in nodes.items()})
    assert machine.numa_node_of(pci_bus_id) == node


def test_processors_of_a_node_are_those_allowed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 9, 20})
    lay_out(tree, {"nodes/node0/cpulist": "0-2,8,20-31\n", "nodes/node1/cpulist": "\n"})
    assert machine.cpus_of_node(0) == {0, 2, 20}
    assert machine.cpus_of_node(1) == machine.cpus_of_node(2) == machine.cpus_of_node(-1) == frozenset()


def test_processors_of_this_machine_s_nodes_are_all_its_own() -> None:
    nodes = [int(path.name.removeprefix("node")) for path in machine.NODES.glob("node[0-9]*")]
    if not nodes:
        pytest.skip("this kernel knows no nodes")
    assert frozenset().union(*map(machine.cpus_of_node, nodes)) == os.sched_getaffinity(0)


# -- the host tier asks first


def test_image_larger_than_what_is_available_is_a_capacity_error(tree: Path) -> None:
    lay_out(tree, below("a/b", memory_v2(GIB, GIB - 100 * MIB)))
    assert host.allocate(100 * MIB).nbytes == 100 * MIB
    assert host.allocate_shared(100 * MIB, "image").nbytes == 100 * MIB
    for allocate in (host.allocate, lambda nbytes: host.allocate_shared(nbytes, "image")):
        with pytest.raises(CapacityError, match=f"{200 * MIB} bytes .* {100 * MIB} are available") as refused:
            allocate(200 * MIB)
        assert refused.value.facts == {"wanted_bytes": 200 * MIB, "available_bytes": 100 * MIB}


@pytest.mark.usefixtures("tree")
def test_size_beyond_the_address_space_is_a_capacity_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for allocate in (host.allocate, lambda nbytes: host.allocate_shared(nbytes, "image")):
        with pytest.raises(CapacityError, match="no room for"):
            allocate(1 << 59)
    monkeypatch.setattr(machine, "memory_available_bytes", lambda: machine.NO_LIMIT)
    with pytest.raises(CapacityError, match="no room for"):
        host.allocate(1 << 59)


class Pages:
    """Shared memory as the engine describes it."""

    def __init__(self, pages: int, hugetlb: int, huge: int = 0) -> None:
        self.pages, self.hugetlb_refused_errno, self.huge_refused_errno = pages, hugetlb, huge


@pytest.mark.parametrize(
    ("memory", "setting", "words"),
    [
        (Pages(_engine.PAGES_HUGETLB, 0), "never", "hugetlb 2 MiB"),
        (Pages(_engine.PAGES_HUGE, errno.ENOMEM), "advise", "shmem huge pages: too few reserved ones are free"),
        (
            Pages(_engine.PAGES_HUGE, errno.ENOSYS),
            "advise",
            "shmem huge pages: reserved ones: Function not implemented",
        ),
        (Pages(_engine.PAGES_SMALL, errno.EFBIG), "advise", ": smaller than a huge page"),
        (Pages(_engine.PAGES_SMALL, errno.ENOMEM), "never", "are free; of shmem shmem_enabled is never"),
        (Pages(_engine.PAGES_SMALL, errno.ENOMEM), "advise", "are free; of shmem none is free"),
        (Pages(_engine.PAGES_SMALL, errno.ENOMEM, errno.EINVAL), "none", "are free; of shmem Invalid argument"),
    ],
)
def test_pages_of_shared_memory_are_named_with_the_reason(tree: Path, memory: Pages, setting: str, words: str) -> None:
    lay_out(tree, {"huge_pages/shmem_enabled": f"x [{setting}] y\n"})
    assert host.shared_pages(memory).endswith(words)  # type: ignore[arg-type]


# -- a real cgroup

IN_A_CGROUP = """if True:
    import sys
    from pathlib import Path
    from weightcache import _engine, machine
    from weightcache.errors import CapacityError
    from weightcache.tiers import host

    MIB = 1 << 20
    (Path(sys.argv[1]) / "cgroup.procs").write_text("0")
"""


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup of 256 MiB."""
    v1 = machine.CGROUPS / "memory"
    folder = (v1 if v1.is_dir() else machine.CGROUPS) / f"weightcache-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(256 * MIB))
    except OSError as exc:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {exc}")
    yield folder

    def removed() -> bool:
        try:
            folder.rmdir()
        except OSError:
            return False
        return True

    wait_until(removed)


def run_in(cgroup: Path, body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"{IN_A_CGROUP}\n    {body}", str(cgroup)], timeout=60, capture_output=True, text=True
    )


def test_full_cgroup_kills_who_does_not_ask(cgroup: Path) -> None:
    done = run_in(cgroup, "_engine.Memory(512 * MIB).populate(0, 512 * MIB); print('lives')")
    assert (done.returncode, done.stdout) == (-9, "")


def test_image_beyond_the_cgroup_is_refused_and_nobody_is_killed(cgroup: Path) -> None:
    body = """
    for allocate in (host.allocate, lambda nbytes: host.allocate_shared(nbytes, "image")):
        try:
            allocate(512 * MIB)
        except CapacityError as refused:
            print(refused.facts["wanted_bytes"] >> 20, 128 * MIB < refused.facts["available_bytes"] < 256 * MIB)
    memory = host.allocate(128 * MIB)
    memory.populate(0, memory.nbytes)
    print("lives")
    """
    done = run_in(cgroup, body)
    assert (done.returncode, done.stdout, done.stderr) == (0, "512 True\n512 True\nlives\n", "")


def test_pool_counts_as_available_in_a_cgroup_and_what_left_it_does_not(cgroup: Path) -> None:
    body = """
    _engine.pool_limit(128 * MIB)
    before = machine.memory_available_bytes()

    def lost():
        return round((before - machine.memory_available_bytes()) / (32 * MIB))

    memory = host.allocate(128 * MIB)
    memory.populate(0, memory.nbytes)
    print("used", lost())
    del memory
    print("in the pool", lost(), _engine.pool_nbytes() // MIB)
    memory = host.allocate(128 * MIB)
    memoryview(memory)[::4096] = b"x" * (memory.nbytes // 4096)
    print("used again", lost(), _engine.pool_nbytes())
    del memory
    memory = host.allocate(192 * MIB)  # the pool's is taken back, not the process killed
    memory.populate(0, memory.nbytes)
    print("lives")
    """
    done = run_in(cgroup, body)
    words = ["used 4", "in the pool 0 128", "used again 4 0", "lives"]
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, words, "")
