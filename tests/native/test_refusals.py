"""What the engine does where the kernel, or a container's seccomp filter, refuses a call."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from engine import opened, read
from standin import HERE

from weightcache._engine import DONE, PAST_CACHE

CALLS = {
    "x86_64": {
        "madvise": 28, "pread64": 17, "cachestat": 451, "mbind": 237, "fallocate": 285, "memfd_create": 319,
        "fcntl": 72, "openat": 257, "mprotect": 10,
    },
    "aarch64": {
        "madvise": 233, "pread64": 67, "cachestat": 451, "mbind": 235, "fallocate": 47, "memfd_create": 279,
        "fcntl": 25, "openat": 56, "mprotect": 226,
    },
}  # fmt: skip
MADV_FREE = 8
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23

# Installs a seccomp filter, which new threads get too: the numbered call fails with the errno, if its third argument is
# the given one.
REFUSE = """if True:
    import ctypes, errno, os, struct, sys
    from weightcache._engine import *
    from engine import address, op, read, run

    def refuse(call, errno, third=None):
        program = [(0x20, 0, 0, 0), (0x15, 0, 1 if third is None else 3, call)]
        if third is not None:
            program += [(0x20, 0, 0, 16 + 2 * 8), (0x15, 0, 1, third)]
        program += [(0x06, 0, 0, 0x00050000 | errno), (0x06, 0, 0, 0x7FFF0000)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
        filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        for arguments in ((38, 1, 0, 0, 0), (22, 2, filter, 0, 0)):  # NO_NEW_PRIVS, SECCOMP_MODE_FILTER
            if prctl(*arguments):
                print("no seccomp:", os.strerror(ctypes.get_errno()))
                sys.exit()
"""

pytestmark = pytest.mark.skipif(platform.machine() not in CALLS, reason="system call numbers unknown here")


def run_refusing(call: str, error: str, body: str, third: int | None = None) -> str:
    """Run body in a new process whose kernel refuses the call; return what it printed."""
    number = CALLS[platform.machine()][call]
    return run_script(f"{REFUSE}\n    refuse({number}, errno.{error}, {third})\n    {body}")


def run_script(script: str) -> str:
    """Run a script that refuses something in a new process; return what it printed."""
    env = dict(os.environ, PYTHONPATH=str(HERE))
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True, env=env)
    assert done.stderr == ""
    if done.stdout.startswith("no seccomp"):
        pytest.skip(done.stdout)
    return done.stdout.strip()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "content"
    path.write_bytes(os.urandom(3 * (1 << 20) + 123))
    return path


def test_memory_without_huge_pages_says_why() -> None:
    body = "memory = Memory(4 << 20); print(memory.huge_refused_errno == errno.EINVAL, memory.huge_nbytes())"
    assert run_refusing("madvise", "EINVAL", body, MADV_HUGEPAGE) == "True 0"


def test_node_refused_by_a_container_is_readable() -> None:
    body = "memory = Memory(4096, 0); print(memory.numa_refused_errno == errno.EPERM, any(memoryview(memory)))"
    assert run_refusing("mbind", "EPERM", body) == "True False"


def test_memory_that_cannot_be_given_back_is_not_kept() -> None:
    body = "pool_limit(64 << 20); Memory(4 << 20); print(pool_nbytes())"
    assert run_refusing("madvise", "EINVAL", body, MADV_FREE) == "0"


def test_populate_touches_pages_where_the_kernel_cannot() -> None:
    body = """
    memory = Memory(70 << 20)
    view = memoryview(memory)
    view[8192:8195] = b"abc"
    memory.populate(0, memory.nbytes)
    states = (ctypes.c_ubyte * (memory.nbytes // ALIGNMENT))()
    address, nbytes = ctypes.c_void_p(memory.address), ctypes.c_size_t(memory.nbytes)
    assert ctypes.CDLL(None).mincore(address, nbytes, states) == 0
    print(set(states), bytes(view[8191:8196]), any(view[8195:]))
    """
    assert run_refusing("madvise", "EINVAL", body, MADV_POPULATE_WRITE) == "{1} b'\\x00abc\\x00' False"


def test_populate_without_memory_is_an_os_error() -> None:
    body = """
    try:
        Memory(4096).populate(0, 4096)
    except OSError as error:
        print(errno.errorcode[error.errno])
    """
    assert run_refusing("madvise", "ENOMEM", body, MADV_POPULATE_WRITE) == "ENOMEM"


@pytest.mark.parametrize("error", ["ENOSPC", "ENOMEM"])
def test_shared_memory_without_room_is_an_os_error(error: str) -> None:
    body = f"""
    memory = SharedMemory(1 << 20)
    for fill in (lambda: memory.populate(0, 1), memory.freeze):
        try:
            fill()
        except OSError as refused:
            assert refused.errno == errno.{error}
    memoryview(memory)[:3] = b"abc"
    print(memoryview(memory).readonly, bytes(memory)[:4])
    """
    assert run_refusing("fallocate", error, body) == "False b'abc\\x00'"


def test_shared_memory_that_would_fault_is_an_os_error() -> None:
    body = """
    try:
        SharedMemory(1 << 20).populate(0, 1)
    except OSError as refused:
        print(errno.errorcode[refused.errno])
    """
    assert run_refusing("madvise", "EFAULT", body, MADV_POPULATE_WRITE) == "ENOMEM"


def test_shared_memory_is_touched_where_the_kernel_cannot_populate() -> None:
    body = """
    memory = SharedMemory(3 << 20)
    memory.populate(0, memory.nbytes)
    memory.freeze()
    print(SealedMemory(memory.fd).nbytes >= memory.nbytes, any(bytes(memory)))
    """
    assert run_refusing("madvise", "EINVAL", body, MADV_POPULATE_WRITE) == "True False"


def test_no_memfd_is_an_os_error() -> None:
    body = """
    try:
        SharedMemory(4 << 20)
    except OSError as refused:
        print(errno.errorcode[refused.errno])
    """
    assert run_refusing("memfd_create", "ENOSYS", body) == "ENOSYS"


@pytest.mark.parametrize("error", ["ENOSYS", "EPERM", "EOPNOTSUPP"])
def test_resident_counts_by_mincore_without_cachestat(error: str, path: Path) -> None:
    size = path.stat().st_size
    body = f"""
    fd = os.open({str(path)!r}, os.O_RDWR)
    os.fsync(fd)
    assert resident_nbytes(fd, 0, 0) == 0
    warm = resident_nbytes(fd, 0, {size}), resident_nbytes(fd, 5000, 100), resident_nbytes(fd, 4096, 4096)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    print(*warm, resident_nbytes(fd, 0, {size}), resident_nbytes(fd, 0, 1 << 30))
    """
    assert run_refusing("cachestat", error, body) == f"{size} 100 4096 0 0"


# Reads. `read_all` prints whether the bytes are right, the status, the errno that refused O_DIRECT, and bytes each way.
READ_ALL = """
    def read_all(nbytes, flags=PAST_CACHE, start=0):
        memory = memoryview(Memory(4 << 20))
        target = memory[start:start + nbytes]
        ended = read(fd, 0, target, flags)
        right = bytes(target) == content[:nbytes]
        refused = errno.errorcode.get(ended.counters["refused"])
        print(right, ended.statuses, refused, ended.counters["direct"], ended.counters["cached"])

    content = open(PATH, "rb").read()
    fd = os.open(PATH, os.O_RDONLY)
"""
O_LARGEFILE_DIRECT = os.O_DIRECT | (0x8000 if platform.machine() == "x86_64" else 0x20000)


def run_reading(path: Path, call: str, error: str, body: str, third: int | None = None) -> str:
    """As run_refusing, with `read_all` for the file."""
    before = READ_ALL.replace("PATH", repr(str(path)))
    number = CALLS[platform.machine()][call]
    return run_script(f"{REFUSE}{before}\n    refuse({number}, errno.{error}, {third})\n    {body}")


def test_a_file_system_that_refuses_direct_reads_is_read_through_the_cache(path: Path) -> None:
    printed = run_reading(path, "fcntl", "EINVAL", "read_all(3 << 20)", O_LARGEFILE_DIRECT)
    assert printed == f"True [1] EINVAL 0 {3 << 20}"


def test_a_refusal_that_comes_with_the_first_direct_read_is_one_too(path: Path) -> None:
    # The direct read of 5,000 bytes is of one page in place; the one through the cache is of all.
    assert run_reading(path, "pread64", "EINVAL", "read_all(5000)", 4096) == "True [1] EINVAL 0 5000"


def test_a_cold_file_is_read_through_the_cache_where_nobody_tells_what_is_in_it(path: Path) -> None:
    body = "os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED); read_all(3 << 20, 0)"
    assert run_reading(path, "cachestat", "EBADF", body) == f"True [1] None 0 {3 << 20}"


def test_a_descriptor_that_cannot_be_opened_again_is_read_through_the_cache(path: Path) -> None:
    assert run_reading(path, "openat", "EACCES", "read_all(3 << 20)") == f"True [1] EACCES 0 {3 << 20}"


def test_a_read_refused_both_ways_is_its_errno(path: Path) -> None:
    assert run_reading(path, "pread64", "EINVAL", "read_all(5000)") == "False [-22] EINVAL 0 0"


def test_a_read_error_is_its_errno(path: Path) -> None:
    assert run_reading(path, "pread64", "EIO", "read_all(5000, 0)") == "False [-5] None 0 0"


def test_an_interrupted_read_goes_on_until_a_signal_handler_raises(path: Path) -> None:
    body = """
    import signal

    def ring(*_):
        print("handler ran")
        sys.exit()

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    read_all(5000)
    """
    assert run_reading(path, "pread64", "EINTR", body) == "handler ran"


def test_an_interrupted_read_goes_on_until_it_is_stopped(path: Path) -> None:
    body = """
    import numpy, threading
    stop, target = numpy.zeros(2, "i4"), bytearray(5000)


    def end():
        while len(os.listdir("/proc/self/task")) < 3:  # until the engine's thread is there
            pass
        stop[0] = 1

    threading.Thread(target=end).start()
    print(run([op(fd, nbytes=5000, target=address(target))], stop=stop).statuses)
    """
    assert run_reading(path, "pread64", "EINTR", body) == "[-125]"


def test_fresh_memory_that_cannot_be_had_is_an_error(path: Path) -> None:
    body = "read_all(5000, POPULATE)"
    assert run_reading(path, "madvise", "ENOMEM", body, MADV_POPULATE_WRITE) == "False [-12] None 0 0"


def test_fresh_memory_is_touched_where_the_kernel_cannot_populate(path: Path) -> None:
    body = "read_all(5000, POPULATE)"
    assert run_reading(path, "madvise", "EINVAL", body, MADV_POPULATE_WRITE) == "True [1] None 0 5000"


def test_ramfs_which_has_no_direct_reads_is_read_through_the_cache(tmp_path: Path) -> None:
    mount = ["mount", "-t", "ramfs", "ramfs", str(tmp_path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if mounted.returncode:
        pytest.skip(f"ramfs cannot be mounted: {mounted.stderr}")
    try:
        content = os.urandom((3 << 20) + 5)
        (tmp_path / "content").write_bytes(content)
        target = bytearray(3 << 20)
        with opened(tmp_path / "content") as fd:
            ended = read(fd, 1, target, PAST_CACHE)
        assert (ended.statuses, ended.counters["refused"], ended.counters["direct"]) == ([DONE], errno.EINVAL, 0)
        assert target == content[1 : 1 + len(target)]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_memory_that_cannot_be_mapped_is_not_unmapped_again(tmp_path: Path) -> None:
    library = tmp_path / "memory.so"
    source = HERE.parents[1] / "ext" / "memory.c"
    subprocess.run(["gcc", "-std=c11", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    body = """
    memory = (ctypes.c_uint64 * 16)()  # its first field is start
    print(library.wc_memory_map(memory, ctypes.c_size_t(1 << 22)), memory[0])
    """
    number = CALLS[platform.machine()]["mprotect"]
    before = f"\n    library = ctypes.CDLL({str(library)!r})"
    assert run_script(f"{REFUSE}{before}\n    refuse({number}, errno.ENOMEM, 3)\n    {body}") == "-12 0"


def test_mincore_leaves_no_mapping_behind(path: Path) -> None:
    body = f"""
    def mappings():
        with open("/proc/self/maps") as maps:
            return len(list(maps))

    fd = os.open({str(path)!r}, os.O_RDONLY)
    before = mappings()
    for _ in range(100):
        resident_nbytes(fd, 0, 4096)
    print(mappings() <= before + 10)  # the interpreter's own; a leak would be 100
    """
    assert run_refusing("cachestat", "ENOSYS", body) == "True"
