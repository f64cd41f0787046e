"""What `_engine.Memory` promises: alignment, zeroes, life time, population, its pool, its node."""

import ctypes
import errno
import gc
import mmap
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from weightcache._engine import Memory, pool_limit, pool_nbytes

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
    for name in ("nbytes", "address", "huge_refused_errno", "numa_refused_errno"):
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
        from weightcache._engine import Memory, pool_limit, pool_nbytes

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


# -- a node


def test_memory_prefers_the_node_it_is_asked_to() -> None:
    memory = Memory(HUGE_PAGE, numa_node=0)
    if memory.numa_refused_errno:
        pytest.skip(f"mbind is refused here: errno {memory.numa_refused_errno}")
    numa_maps = Path("/proc/self/numa_maps")
    if not numa_maps.exists():
        pytest.skip("this kernel knows no nodes")
    [line] = [line for line in numa_maps.read_text().splitlines() if line.startswith(f"{memory.address:x} ")]
    assert line.split()[1] in ("prefer:0", "prefer=static:0", "prefer (many):0")


@pytest.mark.parametrize("node", [1023, 1024, 2**31 - 1])
def test_node_that_is_not_there_is_no_failure(node: int) -> None:
    memory = Memory(4096, node)
    assert memory.numa_refused_errno != 0
    assert bytes(memory) == bytes(4096)


def test_no_node_is_asked_for_unless_wanted() -> None:
    assert Memory(1).numa_refused_errno == Memory(1, numa_node=-1).numa_refused_errno == 0
    with pytest.raises(ValueError, match="got -2"):
        Memory(1, -2)


# -- the pool


@pytest.fixture(autouse=True)
def no_pool() -> None:
    """Keep nothing of what loads before had kept."""
    pool_limit(0)


@pytest.fixture
def pool(no_pool: None) -> Iterator[None]:
    """Keep up to 64 MiB of freed memory."""
    pool_limit(64 * MIB)
    yield
    pool_limit(0)


def freed(nbytes: int, numa_node: int = -1) -> int:
    """Make memory, let it go, return its address."""
    return Memory(nbytes, numa_node, fresh=True).address


def advise(address: int, nbytes: int, advice: int) -> None:
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    assert madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), advice) == 0, ctypes.get_errno()


def is_mapped(address: int) -> bool:
    return f"\n{address:x}-" in Path("/proc/self/maps").read_text()


def test_nothing_is_kept_unless_asked_for() -> None:
    address = freed(HUGE_PAGE)
    assert pool_nbytes() == 0
    assert not is_mapped(address)


@pytest.mark.usefixtures("pool")
def test_freed_memory_is_used_again() -> None:
    address = freed(4 * HUGE_PAGE)
    assert pool_nbytes() == 4 * HUGE_PAGE
    memory = Memory(4 * HUGE_PAGE - 5)
    assert (memory.address, memory.nbytes, len(bytes(memory))) == (address, 4 * HUGE_PAGE - 5, 4 * HUGE_PAGE - 5)
    assert pool_nbytes() == 0


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize(
    ("kept", "wanted", "fits"),
    [(5, 4, True), (5, 3, False), (6, 4, False), (4, 5, False), (10, 8, True), (11, 8, False)],
)
def test_memory_up_to_a_quarter_larger_fits(kept: int, wanted: int, fits: bool) -> None:
    address = freed(kept * HUGE_PAGE)
    memory = Memory(wanted * HUGE_PAGE)
    assert (memory.address == address) == fits
    assert pool_nbytes() == (0 if fits else kept * HUGE_PAGE)
    del memory
    assert pool_nbytes() == (kept if fits else kept + wanted) * HUGE_PAGE


@pytest.mark.usefixtures("pool")
def test_tightest_fit_is_taken() -> None:
    held = [Memory(pages * HUGE_PAGE) for pages in (5, 4, 5)]
    address = held[1].address
    held.clear()
    assert Memory(4 * HUGE_PAGE).address == address


@pytest.mark.usefixtures("pool")
def test_memory_of_another_node_does_not_fit() -> None:
    address = freed(HUGE_PAGE, numa_node=0)
    assert Memory(HUGE_PAGE).address != address
    assert Memory(HUGE_PAGE, numa_node=0).address == address


@pytest.mark.usefixtures("pool")
def test_fresh_memory_is_never_from_the_pool() -> None:
    memory = Memory(HUGE_PAGE)
    memoryview(memory)[:3] = b"abc"
    address = memory.address
    del memory
    fresh = Memory(HUGE_PAGE, fresh=True)
    assert fresh.address != address
    assert bytes(fresh) == bytes(HUGE_PAGE)
    with pytest.raises(TypeError):
        Memory(HUGE_PAGE, -1, True)


@pytest.mark.usefixtures("pool")
def test_small_memory_is_not_kept() -> None:
    freed(HUGE_PAGE - 4096)
    assert pool_nbytes() == 0


def test_the_oldest_leave_first(pool: None) -> None:
    pool_limit(3 * HUGE_PAGE)
    held = [Memory(HUGE_PAGE) for _ in range(5)]
    addresses = [memory.address for memory in held]
    while held:
        del held[0]
        assert pool_nbytes() <= 3 * HUGE_PAGE
    assert [is_mapped(address) for address in addresses] == [False, False, True, True, True]
    freed(4 * HUGE_PAGE)  # more than all
    assert pool_nbytes() == 3 * HUGE_PAGE
    pool_limit(HUGE_PAGE)
    assert [is_mapped(address) for address in addresses] == [False, False, False, False, True]
    pool_limit(0)
    assert (pool_nbytes(), is_mapped(addresses[-1])) == (0, False)


def test_pool_keeps_few_mappings_however_small(pool: None) -> None:
    pool_limit(1 << 40)
    held = [Memory(HUGE_PAGE) for _ in range(100)]
    held.clear()
    assert pool_nbytes() == 64 * HUGE_PAGE


def test_negative_limit_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="got -1"):
        pool_limit(-1)


@pytest.mark.usefixtures("pool")
def test_a_view_keeps_the_memory_from_the_pool() -> None:
    memory = Memory(HUGE_PAGE)
    view = memoryview(memory)
    address = memory.address
    view[0] = 7
    del memory
    assert pool_nbytes() == 0
    assert Memory(HUGE_PAGE).address != address
    view.release()
    assert Memory(HUGE_PAGE).address == address


@pytest.mark.usefixtures("pool")
def test_populate_backs_what_the_kernel_took_back() -> None:
    memory = Memory(4 * HUGE_PAGE)
    memory.populate(0, memory.nbytes)
    address = memory.address
    del memory
    advise(address + HUGE_PAGE, 2 * HUGE_PAGE, mmap.MADV_DONTNEED)  # what pressure does, at a time of our choosing
    memory = Memory(4 * HUGE_PAGE)
    assert memory.address == address
    assert smaps_nbytes(memory, "Rss") == 2 * HUGE_PAGE
    memory.populate(0, memory.nbytes)
    assert smaps_nbytes(memory, "Rss") == 4 * HUGE_PAGE
    assert smaps_nbytes(memory, "LazyFree") == 0
    assert not any(memoryview(memory)[HUGE_PAGE : 3 * HUGE_PAGE])


@pytest.mark.usefixtures("pool")
def test_memory_in_the_pool_is_free_to_be_taken_until_it_is_used_again() -> None:
    pageout = 21
    memory = Memory(4 * HUGE_PAGE)
    memoryview(memory)[:] = b"a" * memory.nbytes
    address = memory.address
    del memory
    memory = Memory(4 * HUGE_PAGE)
    assert smaps_nbytes(memory, "LazyFree") == 4 * HUGE_PAGE
    memoryview(memory)[:] = b"b" * memory.nbytes
    try:
        advise(address, memory.nbytes, pageout)
    except AssertionError:
        pytest.skip("this kernel has no MADV_PAGEOUT")
    assert bytes(memory) == b"b" * memory.nbytes


@pytest.mark.usefixtures("pool")
@pytest.mark.skipif(not huge_pages_offered(), reason="transparent huge pages are off on this machine")
def test_huge_pages_stay_huge_in_the_pool() -> None:
    memory = Memory(4 * HUGE_PAGE)
    memory.populate(0, memory.nbytes)
    huge = memory.huge_nbytes()
    del memory
    assert Memory(4 * HUGE_PAGE).huge_nbytes() == huge


@pytest.mark.usefixtures("pool")
def test_threads_never_get_the_same_memory() -> None:
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def run(number: int) -> None:
        try:
            barrier.wait(30)
            for turn in range(300):
                memory = Memory((1 + (turn + number) % 3) * HUGE_PAGE)
                mine = np.frombuffer(memory, dtype=np.uint8)[:: HUGE_PAGE // 4]
                mine[:] = number
                if turn % 50 == 0:
                    pool_limit((8 + number) * MIB)
                assert (mine == number).all()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert errors == []
    assert pool_nbytes() <= 11 * MIB


def test_child_of_a_fork_has_an_empty_pool_and_leaves_the_parent_s_alone() -> None:
    script = """if True:
        import os
        from pathlib import Path
        from weightcache._engine import Memory, pool_limit, pool_nbytes

        def maps():
            return Path("/proc/self/maps").read_text()

        pool_limit(16 << 20)
        memory = Memory(4 << 20)
        memoryview(memory)[:3] = b"abc"
        address = memory.address
        del memory
        pid = os.fork()
        if pid == 0:
            assert pool_nbytes() == 0 and f"\\n{address:x}-" not in maps()
            other = Memory(4 << 20)
            assert not any(memoryview(other)[:4096])
            del other
            assert pool_nbytes() == 4 << 20
            kept = Memory(4 << 20)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        again = Memory(4 << 20)
        print(status, again.address == address, pool_nbytes())
        pid = os.fork()  # reused memory is inherited as any other
        if pid == 0:
            memoryview(again)[:3] = b"xyz"
            os._exit(0)
        os.waitpid(pid, 0)
        memoryview(again)[:3] = b"abc"
        print(bytes(memoryview(again)[:3]))
    """
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0 True 0\nb'abc'\n", "")
