"""How `_engine.run` reads files into host memory, and what `_engine.resident_nbytes` counts, on real files."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from engine import address, op, opened, read, run

from weightcache._engine import ALIGNMENT, CHECK, DONE, PADDED, PAST_CACHE, Memory, checksum, resident_nbytes

MIB = 1 << 20
CONTENT = random.Random(1).randbytes(9 * MIB + 1234)
GUARD = b"\xa5" * ALIGNMENT

ENDS = [len(CONTENT) + past for past in (-1, 0, 1, 5000)]
OFFSETS = [0, 1, 512, 4095, 4096, 4097, 5 * MIB + 7, *ENDS]
LENGTHS = [0, 1, 511, 4095, 4096, 4097, 3 * 4096 + 5, 4 * MIB + 1, 9 * MIB]
SHIFTS = [0, 1, 512, 4095]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of CONTENT that is on disk, so that its pages can be dropped."""
    path = tmp_path_factory.mktemp("reader") / "content"
    path.write_bytes(CONTENT)
    with opened(path) as fd:
        os.fsync(fd)
    return path


@pytest.fixture
def fd(path: Path) -> Iterator[int]:
    with opened(path) as fd:
        yield fd


@pytest.fixture(params=[0, PAST_CACHE], ids=["buffered", "direct"])
def flags(request: pytest.FixtureRequest, path: Path) -> int:
    """Through the page cache, where the whole file is, and past it."""
    path.read_bytes()
    if request.param == PAST_CACHE:
        with opened(path) as fd:
            if read(fd, 0, bytearray(1), PAST_CACHE).counters["refused"]:
                pytest.skip("this file system refuses O_DIRECT")
    return int(request.param)


def resident(fd: int) -> int:
    return resident_nbytes(fd, 0, len(CONTENT))


def drop(fd: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert resident(fd) == 0


# Bytes, and nothing but them.


@pytest.mark.parametrize("shift", SHIFTS)
def test_target_gets_the_files_bytes_and_nothing_around_it_changes(fd: int, flags: int, shift: int) -> None:
    memory = memoryview(Memory(2 * ALIGNMENT + max(SHIFTS) + max(LENGTHS)))
    start = ALIGNMENT + shift
    for length in LENGTHS:
        for offset in OFFSETS:
            stop = start + length
            memory[start - ALIGNMENT : start] = memory[stop : stop + ALIGNMENT] = GUARD
            [status] = read(fd, offset, memory[start:stop], flags).statuses
            assert memory[start - ALIGNMENT : start] == memory[stop : stop + ALIGNMENT] == GUARD
            if length and offset + length > len(CONTENT):
                assert status == -errno.ENODATA
            else:
                assert status == DONE
                assert memory[start:stop] == CONTENT[offset : offset + length]


@pytest.mark.parametrize("shift", [0, 5])
@pytest.mark.parametrize("length", [1, 4097, 5 * MIB + 9])
def test_padding_may_be_written_up_to_the_next_page_and_no_further(
    fd: int, flags: int, shift: int, length: int
) -> None:
    memory = memoryview(Memory(length + 4 * ALIGNMENT))
    memory[:] = b"\xa5" * len(memory)
    [status] = read(fd, 4096, memory[shift : shift + length], flags | PADDED).statuses
    end = shift + -(-length // ALIGNMENT) * ALIGNMENT
    assert status == DONE
    assert memory[shift : shift + length] == CONTENT[4096 : 4096 + length]
    assert memory[end : end + ALIGNMENT] == GUARD
    assert memory[:shift] == GUARD[:shift]


def test_the_last_bytes_of_a_file_may_be_padded(fd: int, flags: int) -> None:
    memory = memoryview(Memory(2 * ALIGNMENT))
    start = len(CONTENT) // ALIGNMENT * ALIGNMENT
    length = len(CONTENT) - start
    assert read(fd, start, memory[:length], flags | PADDED).statuses == [DONE]
    assert memory[:length] == CONTENT[start:]


def test_any_memory_that_can_be_written_is_a_target(fd: int, flags: int) -> None:
    target = bytearray(5000)
    assert read(fd, 3, target, flags).statuses == [DONE]
    assert target == CONTENT[3:5003]


def test_memory_that_cannot_be_written_is_an_error(fd: int, flags: int) -> None:
    with mmap.mmap(-1, 2 * ALIGNMENT, prot=mmap.PROT_READ) as target:
        at = int(np.frombuffer(target, "u1").ctypes.data)
        assert run([op(fd, flags=flags, nbytes=5000, target=at)]).statuses == [-errno.EFAULT]


def test_position_of_the_file_stays(fd: int, flags: int) -> None:
    os.lseek(fd, 77, os.SEEK_SET)
    read(fd, 0, bytearray(5000), flags)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 77


def test_flags_of_a_descriptor_stay_while_it_is_read_past_the_cache(fd: int, flags: int) -> None:
    seen: list[int] = []
    target = np.zeros(5 * MIB, "u1")
    ops = [op(fd, flags=flags, nbytes=target.nbytes, target=address(target))] * 3
    run(ops, threads=1, on_done=lambda _: seen.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))
    assert set(seen) == {0}


def test_threads_may_read_one_descriptor_at_once(fd: int, flags: int) -> None:
    target = memoryview(Memory(len(CONTENT)))
    edges = [0, 3 * MIB, 5 * MIB + 11, 5 * MIB + 12, len(CONTENT)]
    ops = [
        op(fd, flags=flags, offset=start, nbytes=stop - start, target=address(target) + start)
        for start, stop in pairwise(edges)
    ]
    assert run(ops, threads=4).statuses == [DONE] * 4
    assert target == CONTENT


def test_misaligned_direct_read_leaves_no_mapping_behind(fd: int, flags: int) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text().count("\n")

    target = bytearray(5000)
    read(fd, 1, target, flags)
    before = mappings()
    for _ in range(100):
        read(fd, 1, target, flags)
    assert mappings() <= before + 10  # the interpreter's own; a leak would be 200


def test_no_descriptor_is_left_open(fd: int, path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with opened(path.parent) as folder:
        before = descriptors()
        for one in (op(fd), op(fd, offset=len(CONTENT), nbytes=1, target=8), op(name=0), op(name=8)):
            run([one] * 3, names=b"content\0missing\0", folder=folder)
        assert descriptors() == before


# What is no file to read.


def test_a_closed_descriptor_is_an_error() -> None:
    with opened(Path("/")) as fd:
        pass
    assert read(fd, 0, bytearray(1)).statuses == [-errno.EBADF]
    with pytest.raises(OSError) as caught:
        resident_nbytes(-1, 0, 1)
    assert caught.value.errno == errno.EBADF


def test_pipes_devices_and_folders_are_refused() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end), os.fdopen(write_end), opened(Path("/dev/zero")) as device, opened(Path("/")) as folder:
        for fd in (read_end, device, folder):
            assert read(fd, 0, bytearray(1)).statuses == [-errno.EINVAL]


def test_what_is_no_file_below_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "file").write_bytes(b"content")
    os.mkfifo(tmp_path / "fifo")  # nobody writes to it: opening it must not wait
    wrong = {"missing": errno.ENOENT, "folder": errno.EINVAL, "link": errno.ELOOP, "fifo": errno.EINVAL}
    with opened(tmp_path) as folder:
        for name, expected in wrong.items():
            assert run([op(name=0)], names=name.encode() + b"\0", folder=folder).statuses == [-expected]


def test_a_file_below_the_folder_is_read_by_name(path: Path, flags: int) -> None:
    target = bytearray(5000)
    one = op(flags=flags, name=6, offset=3, nbytes=len(target), target=address(target))
    with opened(path.parent) as folder:
        assert run([one], names=b"other\0content\0", folder=folder).statuses == [DONE]
    assert target == CONTENT[3:5003]


def test_a_negative_offset_is_a_value_error(fd: int) -> None:
    with pytest.raises(ValueError, match="operation 0 makes no sense"):
        read(fd, 2**64 - 1, bytearray(1))
    with pytest.raises(ValueError, match="got -1"):
        resident_nbytes(fd, -1, 1)


# Checksums.


@pytest.mark.parametrize("length", [0, 1, 1024, 256 * 1024 + 1, 5 * MIB + 3])
def test_a_right_checksum_is_counted(fd: int, flags: int, length: int) -> None:
    target = bytearray(length)
    ended = read(fd, 4096, target, flags | CHECK, checksum=checksum(CONTENT[4096 : 4096 + length]))
    assert (ended.statuses, ended.counters["checked"], ended.counters["reread"]) == ([DONE], length, 0)
    assert target == CONTENT[4096 : 4096 + length]


def test_a_wrong_checksum_is_an_error_after_a_second_look_past_the_cache(fd: int, flags: int) -> None:
    ended = read(fd, 0, bytearray(MIB), flags | CHECK, checksum=1)
    assert (ended.failed, ended.statuses) == (0, [-errno.EBADMSG])
    assert ended.counters["reread"] == ended.ops["reread"][0] == (0 if flags else 1)
    assert ended.counters["direct"] == MIB


# The page cache.


def test_resident_follows_the_page_cache(fd: int, path: Path) -> None:
    drop(fd)
    for _ in range(20):  # the kernel may take a page back between the two
        path.read_bytes()
        if resident(fd) == len(CONTENT):
            return
    raise AssertionError(f"{resident(fd)} of {len(CONTENT)} bytes are resident right after they were read")


def test_resident_is_of_the_range_alone(fd: int) -> None:
    drop(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
    os.pread(fd, mmap.PAGESIZE, MIB)
    assert resident_nbytes(fd, MIB, MIB) == mmap.PAGESIZE
    assert resident_nbytes(fd, MIB + 5, 100) == 100
    assert resident_nbytes(fd, 0, MIB) == 0
    assert resident_nbytes(fd, MIB, 0) == 0


def test_a_direct_read_stays_out_of_the_page_cache(fd: int) -> None:
    drop(fd)
    ended = read(fd, 1, bytearray(5 * MIB), PAST_CACHE)
    if ended.counters["refused"]:
        pytest.skip("this file system refuses O_DIRECT")
    assert (ended.counters["direct"], ended.counters["cached"], resident(fd)) == (5 * MIB, 0, 0)


def test_a_large_read_goes_past_the_cache_where_little_is_in_it(fd: int) -> None:
    drop(fd)
    counters = read(fd, 0, bytearray(5 * MIB)).counters
    if counters["refused"]:
        pytest.skip("this file system refuses O_DIRECT")
    assert (counters["direct"], counters["cached"], resident(fd)) == (5 * MIB, 0, 0)


def test_a_large_read_goes_through_the_cache_where_most_is_in_it(fd: int, path: Path) -> None:
    path.read_bytes()
    counters = read(fd, 0, bytearray(5 * MIB)).counters
    assert (counters["direct"], counters["cached"]) == (0, 5 * MIB)


def test_a_small_read_goes_through_the_cache(fd: int) -> None:
    drop(fd)
    counters = read(fd, 0, bytearray(MIB - 1)).counters
    assert (counters["direct"], counters["cached"]) == (0, MIB - 1)
