"""What `_engine.read_into` and `_engine.resident_nbytes` promise, on real files."""

import errno
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from weightcache._engine import ALIGNMENT, Memory, read_into, resident_nbytes

MIB = 1 << 20
CONTENT = random.Random(1).randbytes(9 * MIB + 1234)
GUARD = b"\xa5" * ALIGNMENT

ENDS = [len(CONTENT) + past for past in (-1, 0, 1, 5000)]
OFFSETS = [0, 1, 512, 4095, 4096, 4097, 5 * MIB + 7, *ENDS]
LENGTHS = [0, 1, 511, 4095, 4096, 4097, 3 * 4096 + 5, 4 * MIB + 1, 9 * MIB]
SHIFTS = [0, 1, 512, 4095]


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of CONTENT that is on disk, so that its pages can be dropped."""
    path = tmp_path_factory.mktemp("reader") / "content"
    path.write_bytes(CONTENT)
    with opened(path) as fd:
        os.fsync(fd)
    return path


@pytest.fixture(params=["buffered", "direct"])
def fd(request: pytest.FixtureRequest, path: Path) -> Iterator[int]:
    try:
        with opened(path, os.O_RDONLY | (os.O_DIRECT if request.param == "direct" else 0)) as fd:
            yield fd
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this file system refuses O_DIRECT")


@pytest.mark.parametrize("shift", SHIFTS)
def test_target_gets_the_files_bytes_and_nothing_around_it_changes(fd: int, shift: int) -> None:
    memory = memoryview(Memory(2 * ALIGNMENT + max(SHIFTS) + max(LENGTHS)))
    start = ALIGNMENT + shift
    for length in LENGTHS:
        for offset in OFFSETS:
            stop = start + length
            memory[start - ALIGNMENT : start] = memory[stop : stop + ALIGNMENT] = GUARD
            count = read_into(fd, offset, memory[start:stop])
            assert count == max(0, min(length, len(CONTENT) - offset))
            assert memory[start : start + count] == CONTENT[offset : offset + count]
            assert memory[start - ALIGNMENT : start] == memory[stop : stop + ALIGNMENT] == GUARD


def test_any_writable_buffer_is_a_target(fd: int) -> None:
    target = bytearray(5000)
    assert read_into(fd, 3, target) == 5000
    assert target == CONTENT[3:5003]


def test_position_of_the_file_stays(fd: int) -> None:
    os.lseek(fd, 77, os.SEEK_SET)
    read_into(fd, 0, bytearray(5000))
    assert os.lseek(fd, 0, os.SEEK_CUR) == 77


def test_threads_may_read_one_descriptor_at_once(fd: int) -> None:
    target = memoryview(Memory(len(CONTENT)))
    edges = [0, 3 * MIB, 5 * MIB + 11, 5 * MIB + 12, len(CONTENT)]
    threads = [
        threading.Thread(target=read_into, args=(fd, start, target[start:stop])) for start, stop in pairwise(edges)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert target == CONTENT


def test_misaligned_direct_read_leaves_no_mapping_behind(fd: int) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("\n")

    target = bytearray(5000)
    read_into(fd, 1, target)
    before = mappings()
    for _ in range(100):
        read_into(fd, 1, target)
    assert mappings() <= before + 10  # the interpreter's own; a leak would be 200


def test_buffer_is_released_after_success_and_failure(fd: int) -> None:
    target = bytearray(10)
    read_into(fd, 0, target)
    with pytest.raises(OSError):
        read_into(-1, 0, target)
    with pytest.raises(ValueError):
        read_into(fd, -1, target)
    target.extend(b"resized: nobody holds a view")


def test_bad_descriptor_is_an_os_error() -> None:
    for call in (lambda: read_into(-1, 0, bytearray(1)), lambda: resident_nbytes(-1, 0, 1)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EBADF


def test_pipe_is_an_os_error() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end), os.fdopen(write_end), pytest.raises(OSError) as caught:
        read_into(read_end, 0, bytearray(1))
    assert caught.value.errno == errno.ESPIPE


def test_negative_offset_is_a_value_error(fd: int) -> None:
    with pytest.raises(ValueError, match="got -1"):
        read_into(fd, -1, bytearray(1))
    with pytest.raises(ValueError, match="got -1"):
        resident_nbytes(fd, -1, 1)


def test_read_only_target_is_refused(fd: int) -> None:
    for target in (bytes(10), memoryview(bytearray(10)).toreadonly()):
        with pytest.raises((TypeError, BufferError)):
            read_into(fd, 0, target)


def test_scattered_target_is_refused(fd: int) -> None:
    with pytest.raises((TypeError, BufferError)):
        read_into(fd, 0, memoryview(bytearray(10))[::2])


def test_resident_follows_the_page_cache(path: Path) -> None:
    with opened(path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert resident_nbytes(fd, 0, len(CONTENT)) == 0
        read_into(fd, 0, bytearray(len(CONTENT)))
        assert resident_nbytes(fd, 0, len(CONTENT)) == len(CONTENT)


def test_resident_is_of_the_range_alone(path: Path) -> None:
    with opened(path) as fd:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        read_into(fd, MIB, bytearray(mmap.PAGESIZE))
        assert resident_nbytes(fd, MIB, MIB) == mmap.PAGESIZE
        assert resident_nbytes(fd, MIB + 5, 100) == 100
        assert resident_nbytes(fd, 0, MIB) == 0
        assert resident_nbytes(fd, MIB, 0) == 0


def test_direct_read_stays_out_of_the_page_cache(path: Path) -> None:
    try:
        with opened(path, os.O_RDONLY | os.O_DIRECT) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            read_into(fd, 1, bytearray(5 * MIB))
            assert resident_nbytes(fd, 0, len(CONTENT)) == 0
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("this file system refuses O_DIRECT")


def test_sigint_ends_a_long_read() -> None:
    script = """if True:
        import os, signal, threading
        from pathlib import Path
        from weightcache._engine import Memory, read_into

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

        def interrupt():
            while resident() < base + (64 << 20):
                pass
            os.kill(os.getpid(), signal.SIGINT)

        memory = Memory(4 << 30)
        fd = os.open("/dev/zero", os.O_RDONLY)
        base = resident()
        threading.Thread(target=interrupt).start()
        try:
            read_into(fd, 0, memory)
        except KeyboardInterrupt:
            print("interrupted", "early" if resident() < base + memory.nbytes // 2 else "late")
    """
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("interrupted early\n", "")
