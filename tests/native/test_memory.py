"""What `_engine.Memory` promises: alignment, zeroes, life time, population."""

import ctypes
import errno
import gc
import mmap
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from weightcache._engine import Memory

MIB = 1 << 20
HUGE_PAGE = 2 * MIB
SIZES = [0, 1, 4096, 4097, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 9 * MIB]


def smaps_nbytes(memory: Memory, field: str) -> int:
    """Return one field, in bytes, of the mapping that starts at the memory's address."""
    smaps = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{memory.address:x}-.*?^{field}: +(\d+) kB", smaps, re.MULTILINE | re.DOTALL)
    assert found
    return int(found[1]) * 1024


def huge_pages_offered() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


@pytest.mark.parametrize("nbytes", SIZES)
def test_memory_is_an_aligned_writable_buffer_of_its_size(nbytes: int) -> None:
    memory = Memory(nbytes)
    view = memoryview(memory)
    assert memory.nbytes == view.nbytes == nbytes
    assert memory.address % HUGE_PAGE == 0
    assert (view.format, view.ndim, view.contiguous, view.readonly) == ("B", 1, True, False)


@pytest.mark.parametrize("nbytes", SIZES)
def test_memory_starts_as_zeroes(nbytes: int) -> None:
    assert bytes(Memory(nbytes)) == bytes(nbytes)


def test_mapping_is_rounded_to_huge_pages_only_when_it_holds_one() -> None:
    assert smaps_nbytes(Memory(HUGE_PAGE + 1), "Size") == 2 * HUGE_PAGE
    assert smaps_nbytes(Memory(4097), "Size") == max(8192, mmap.PAGESIZE)


def test_attributes_are_read_only() -> None:
    memory = Memory(1)
    for name in ("nbytes", "address", "huge_refused_errno"):
        with pytest.raises(AttributeError):
            setattr(memory, name, 0)


def test_negative_size_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="got -1"):
        Memory(-1)


def test_size_beyond_the_address_space_is_an_os_error() -> None:
    for nbytes in (1 << 60, sys.maxsize):
        with pytest.raises(OSError, match="Cannot allocate memory"):
            Memory(nbytes)


def test_writes_show_in_every_view() -> None:
    memory = Memory(8)
    torch.frombuffer(memory, dtype=torch.int32)[0] = 7
    np.frombuffer(memory, dtype=np.int32)[1] = 9
    assert memoryview(memory).cast("i").tolist() == [7, 9]


@pytest.mark.parametrize(
    "view_of",
    [
        memoryview,
        lambda memory: torch.frombuffer(memory, dtype=torch.uint8),
        lambda memory: np.frombuffer(memory, dtype=np.uint8),
    ],
    ids=["memoryview", "torch", "numpy"],
)
def test_a_view_keeps_the_memory_alive(view_of) -> None:
    memory = Memory(HUGE_PAGE)
    view = view_of(memory)
    view[-1] = 5
    del memory
    gc.collect()
    assert view[-1] == 5


def test_many_memories_leave_no_mapping_or_descriptor_behind() -> None:
    def counts() -> tuple[int, int]:
        gc.collect()
        maps = Path("/proc/self/maps").read_text().count("\n")
        return maps, len(list(Path("/proc/self/fd").iterdir()))

    def use(count: int) -> None:
        memories = [Memory(HUGE_PAGE * (i % 3)) for i in range(count)]
        for memory in memories:
            memory.populate(0, min(memory.nbytes, 1))
        memories[0].huge_nbytes()

    use(100)
    maps, fds = counts()
    use(100)
    maps_after, fds_after = counts()
    assert fds_after == fds
    assert maps_after <= maps + 10  # the interpreter's own; a leak would be 200


@pytest.mark.parametrize("nbytes", [1, 4097, 9 * MIB, 70 * MIB])
def test_populate_backs_every_page(nbytes: int) -> None:
    memory = Memory(nbytes)
    assert smaps_nbytes(memory, "Rss") == 0
    memory.populate(0, nbytes)
    assert smaps_nbytes(memory, "Rss") == smaps_nbytes(memory, "Size")


def test_populate_backs_the_pages_of_its_range_only() -> None:
    memory = Memory(16 * MIB)
    memory.populate(4 * MIB - 1, 4 * MIB + 1)
    assert 0 < smaps_nbytes(memory, "Rss") <= 2 * HUGE_PAGE


def test_populate_of_nothing_is_allowed() -> None:
    memory = Memory(4096)
    for at in (0, 5, 4096):
        memory.populate(at, at)
    Memory(0).populate(0, 0)
    assert smaps_nbytes(memory, "Rss") == 0


def test_populate_keeps_content() -> None:
    memory = Memory(9 * MIB)
    view = memoryview(memory)
    view[5 * MIB : 5 * MIB + 3] = b"abc"
    memory.populate(0, memory.nbytes)
    assert bytes(view) == bytes(5 * MIB) + b"abc" + bytes(4 * MIB - 3)


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 4097), (4097, 4097), (0, sys.maxsize)])
def test_populate_outside_the_memory_is_a_value_error(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="does not lie within"):
        Memory(4096).populate(start, stop)


def test_threads_may_populate_while_others_write() -> None:
    memory = Memory(96 * MIB)
    pattern = np.arange(memory.nbytes // 8)
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def run(work) -> None:
        try:
            barrier.wait(30)
            work()
        except BaseException as error:
            errors.append(error)

    def write() -> None:
        np.frombuffer(memory, dtype=np.int64)[:] = pattern

    works = [write] + [lambda: memory.populate(0, memory.nbytes)] * 3
    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert errors == []
    assert np.array_equal(np.frombuffer(memory, dtype=np.int64), pattern)


@pytest.mark.skipif(not huge_pages_offered(), reason="transparent huge pages are off on this machine")
def test_huge_nbytes_counts_this_memory_alone() -> None:
    memories = [Memory(3 * HUGE_PAGE) for _ in range(3)]
    memories[1].populate(0, memories[1].nbytes)
    assert [memory.huge_refused_errno for memory in memories] == [0, 0, 0]
    assert [memory.huge_nbytes() for memory in memories] == [0, smaps_nbytes(memories[1], "AnonHugePages"), 0]


def test_the_page_past_the_end_cannot_be_written() -> None:
    memory = Memory(HUGE_PAGE)
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/dev/zero").open("rb") as file:
        address = ctypes.c_void_p(memory.address + memory.nbytes)
        assert libc.read(file.fileno(), address, ctypes.c_size_t(1)) == -1
    assert ctypes.get_errno() == errno.EFAULT


def test_sigint_ends_a_long_populate() -> None:
    script = """if True:
        import os, signal, threading
        from pathlib import Path
        from weightcache._engine import Memory

        def resident():
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

        def interrupt():
            while resident() < base + (128 << 20):
                pass
            os.kill(os.getpid(), signal.SIGINT)

        memory = Memory(4 << 30)
        base = resident()
        threading.Thread(target=interrupt).start()
        try:
            memory.populate(0, memory.nbytes)
        except KeyboardInterrupt:
            print("interrupted", "early" if resident() < base + memory.nbytes // 2 else "late")
    """
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("interrupted early\n", "")
