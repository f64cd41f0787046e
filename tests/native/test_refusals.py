"""What the engine does where the kernel, or a container's seccomp filter, refuses a call."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = {
    "x86_64": {"madvise": 28, "pread64": 17, "cachestat": 451},
    "aarch64": {"madvise": 233, "pread64": 67, "cachestat": 451},
}
MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23

# Installs a seccomp filter: the numbered call fails with the errno, if its third argument is the given one.
REFUSE = """if True:
    import ctypes, errno, os, struct, sys
    from weightcache._engine import ALIGNMENT, Memory, read_into, resident_nbytes

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
    script = f"{REFUSE}\n    refuse({number}, errno.{error}, {third})\n    {body}"
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
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


def test_direct_read_refused_is_einval(path: Path) -> None:
    body = f"""
    fd = os.open({str(path)!r}, os.O_RDONLY)
    try:
        read_into(fd, 0, bytearray(1))
    except OSError as error:
        print(errno.errorcode[error.errno])
    """
    assert run_refusing("pread64", "EINVAL", body) == "EINVAL"


def test_interrupted_read_goes_on_until_a_signal_handler_raises(path: Path) -> None:
    body = f"""
    import signal

    def ring(*_):
        print("handler ran")
        sys.exit()

    fd = os.open({str(path)!r}, os.O_RDONLY)
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    read_into(fd, 0, bytearray(1))
    """
    assert run_refusing("pread64", "EINTR", body) == "handler ran"


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
