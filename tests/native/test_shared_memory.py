"""What `_engine.SharedMemory` and `SealedMemory` promise, between real processes: one copy, one writer, never SIGBUS."""

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from weightcache._engine import PAGES_HUGE, PAGES_HUGETLB, PAGES_SMALL, SealedMemory, SharedMemory

MIB = 1 << 20
HUGE_PAGE = 2 * MIB
SIZES = [0, 1, 4096, 4097, HUGE_PAGE - 1, HUGE_PAGE, HUGE_PAGE + 1, 9 * MIB]
DEADLINE_S = 60.0
F_SEAL_FUTURE_WRITE = 0x10  # the fcntl module has no name for it
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
RESERVED = Path("/proc/sys/vm/nr_hugepages")

# What a peer is: it gets descriptors with a line to do, and answers with a value.
PEER = """if True:
    import os, socket, sys
    from weightcache._engine import SealedMemory, SharedMemory

    link = socket.socket(fileno=int(sys.argv[1]))
    kept = []
    while True:
        line, fds, _, _ = socket.recv_fds(link, 65536, 4)
        if not line:
            break
        value = eval(line)
        for fd in fds:
            os.close(fd)
        answer = [value] if isinstance(value, SharedMemory) else []
        socket.send_fds(link, [repr(value).encode()], [each.fd for each in answer])
"""


class Peer:
    """Another process, not forked from this one's memory, with a socket that carries descriptors."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket) -> None:
        self.process = process
        self._link = link
        self.received: list[int] = []

    def do(self, line: str, *fds: int) -> str:
        """Evaluate an expression there, where `fds` are these and `kept` is a list; return the value's repr."""
        socket.send_fds(self._link, [line.encode()], list(fds))
        value, received, _, _ = socket.recv_fds(self._link, 65536, 4)
        assert value, f"the peer ended with {self.process.wait(DEADLINE_S)}"
        self.received += received
        return value.decode()


@contextmanager
def started_peer() -> Iterator[Peer]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(DEADLINE_S)
        process = subprocess.Popen([sys.executable, "-c", PEER, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        peer = Peer(process, ours)
        try:
            yield peer
        finally:
            process.kill()
            process.wait()
            for fd in peer.received:
                os.close(fd)


@pytest.fixture
def peer() -> Iterator[Peer]:
    with started_peer() as peer:
        yield peer


def filled(content: bytes) -> SharedMemory:
    memory = SharedMemory(len(content))
    memory.populate(0, len(content))
    memoryview(memory)[:] = content
    memory.freeze()
    return memory


def punch_hole(fd: int) -> None:
    keep_size_and_punch = 0x01 | 0x02
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, keep_size_and_punch, ctypes.c_long(0), ctypes.c_long(4096)):
        raise OSError(ctypes.get_errno(), "fallocate")


def smaps_nbytes(memory: SharedMemory | SealedMemory, field: str) -> int:
    smaps = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{memory.address:x}-.*?^{field}: +(\d+) kB", smaps, re.MULTILINE | re.DOTALL)
    assert found
    return int(found[1]) * 1024


def backed_nbytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


# -- before it is frozen


@pytest.mark.parametrize("nbytes", SIZES)
def test_memory_is_an_aligned_writable_buffer_of_zeroes(nbytes: int) -> None:
    memory = SharedMemory(nbytes)
    view = memoryview(memory)
    assert memory.nbytes == view.nbytes == nbytes
    assert memory.address % HUGE_PAGE == 0
    assert (view.format, view.ndim, view.contiguous, view.readonly) == ("B", 1, True, False)
    assert os.fstat(memory.fd).st_size >= nbytes
    assert not os.get_inheritable(memory.fd)
    assert bytes(view) == bytes(nbytes)
    view[:] = b"x" * nbytes
    assert bytes(memory) == b"x" * nbytes


@pytest.mark.parametrize("nbytes", [1, 4097, 9 * MIB, 70 * MIB])
def test_populate_backs_every_page(nbytes: int) -> None:
    memory = SharedMemory(nbytes)
    assert backed_nbytes(memory.fd) <= HUGE_PAGE
    memory.populate(0, nbytes)
    assert backed_nbytes(memory.fd) >= nbytes
    assert memory.pages == PAGES_HUGETLB or smaps_nbytes(memory, "Rss") >= nbytes


def test_populate_backs_its_range_only_and_keeps_content() -> None:
    memory = SharedMemory(16 * MIB)
    memoryview(memory)[4 * MIB : 4 * MIB + 3] = b"abc"
    memory.populate(4 * MIB - 1, 4 * MIB + 1)
    assert backed_nbytes(memory.fd) <= 3 * HUGE_PAGE
    assert bytes(memoryview(memory)[4 * MIB - 1 : 4 * MIB + 4]) == b"\0abc\0"


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 4097), (4097, 4097), (0, sys.maxsize)])
def test_populate_outside_the_memory_is_a_value_error(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="does not lie within"):
        SharedMemory(4096).populate(start, stop)


def test_threads_may_populate_while_others_write() -> None:
    memory = SharedMemory(32 * MIB)
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
    memory.freeze()
    assert np.array_equal(np.frombuffer(memory, dtype=np.int64), pattern)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((-1,), ValueError), ((1, "a", -2), ValueError), ((1, "a\0b"), ValueError), ((1, "a" * 250), OSError)],
)
def test_arguments_that_make_no_sense_are_refused(arguments: tuple, error: type[Exception]) -> None:
    with pytest.raises(error):
        SharedMemory(*arguments)


def test_size_beyond_everything_is_an_os_error() -> None:
    for nbytes in (1 << 60, sys.maxsize):
        with pytest.raises(OSError):
            SharedMemory(nbytes)


def test_name_shows_in_proc() -> None:
    memory = SharedMemory(1, "my model")
    assert "/memfd:my model" in str(Path(f"/proc/self/fd/{memory.fd}").readlink())


def test_node_that_is_not_there_is_no_failure() -> None:
    memory = SharedMemory(HUGE_PAGE, numa_node=1023)
    assert memory.numa_refused_errno != 0
    assert SharedMemory(HUGE_PAGE).numa_refused_errno == 0


def test_nobody_can_resize_it_from_the_start() -> None:
    memory = SharedMemory(HUGE_PAGE)
    for nbytes in (0, 2 * HUGE_PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, nbytes)


def test_many_memories_leave_no_mapping_or_descriptor_behind() -> None:
    def counts() -> tuple[int, int]:
        gc.collect()
        return Path("/proc/self/maps").read_text().count("\n"), len(list(Path("/proc/self/fd").iterdir()))

    def use(count: int) -> None:
        for i in range(count):
            memory = SharedMemory(HUGE_PAGE * (i % 2))
            if i % 4:
                memory.freeze()
                SealedMemory(memory.fd)
            with pytest.raises(ValueError):
                SealedMemory(memory.fd, 1 << 40)

    use(20)
    maps, fds = counts()
    use(100)
    maps_after, fds_after = counts()
    assert fds_after == fds
    assert maps_after <= maps + 10  # the interpreter's own; a leak would be 100


# -- sealing and freezing


def test_frozen_memory_is_read_only_at_the_same_address() -> None:
    memory = SharedMemory(HUGE_PAGE + 1)
    memoryview(memory)[:3] = b"abc"
    address = memory.address
    memory.freeze()
    view = memoryview(memory)
    assert (memory.address, view.readonly) == (address, True)
    assert bytes(view) == b"abc" + bytes(HUGE_PAGE - 2)
    with pytest.raises(TypeError):
        view[0] = 1
    memory.freeze()
    memory.populate(0, memory.nbytes)


@pytest.mark.parametrize("nbytes", [4096, HUGE_PAGE])
def test_nobody_can_write_but_through_the_maker_s_mapping(nbytes: int) -> None:
    memory = SharedMemory(nbytes)
    memoryview(memory)[:4096] = b"abcd" * 1024
    assert fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    attempts = [
        lambda: os.pwrite(memory.fd, b"x", 0),
        lambda: os.ftruncate(memory.fd, 0),
        lambda: punch_hole(memory.fd),
        lambda: mmap.mmap(memory.fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        lambda: fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, 0),
    ]
    for attempt in attempts:
        with pytest.raises(PermissionError):
            attempt()
    memoryview(memory)[:4] = b"more"
    assert bytes(memory)[:8] == b"moreabcd"


def test_freeze_backs_what_nobody_populated() -> None:
    memory = SharedMemory(9 * MIB)
    memory.freeze()
    assert backed_nbytes(memory.fd) >= 9 * MIB
    assert bytes(SealedMemory(memory.fd, 9 * MIB)) == bytes(9 * MIB)


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_view_keeps_the_memory_alive(is_frozen: bool) -> None:
    memory = SharedMemory(HUGE_PAGE)
    memoryview(memory)[-1] = 5
    if is_frozen:
        memory.freeze()
    view = memoryview(memory)
    del memory
    gc.collect()
    assert view[-1] == 5


# -- other processes


def test_another_process_reads_the_same_memory(peer: Peer) -> None:
    content = os.urandom(5 * MIB + 3)
    memory = filled(content)
    assert peer.do(f"kept.append(SealedMemory(fds[0], {len(content)}))", memory.fd) == "None"
    assert peer.do("__import__('zlib').crc32(kept[0])") == str(zlib.crc32(content))


def test_attaching_maps_all_and_reads_nothing() -> None:
    memory = filled(b"x" * (64 * MIB))
    attached = SealedMemory(memory.fd)
    assert smaps_nbytes(attached, "Size") == 64 * MIB
    assert smaps_nbytes(attached, "Rss") == 0
    assert memoryview(attached)[63 * MIB] == ord("x")
    assert smaps_nbytes(attached, "Anonymous") == 0


def test_what_a_process_writes_only_it_sees(peer: Peer) -> None:
    memory = filled(b"a" * HUGE_PAGE)
    ours = SealedMemory(memory.fd)
    if not ours.is_private:
        pytest.skip("reserved huge pages, and none left for private copies")
    with started_peer() as another:
        for each in (peer, another):
            each.do("kept.append(memoryview(SealedMemory(fds[0])))", memory.fd)
        assert peer.do("kept[0].__setitem__(slice(4096, 4099), b'xyz')") == "None"
        assert peer.do("bytes(kept[0][4095:4100])") == "b'axyza'"
        memoryview(ours)[4098:4099] = b"o"
        assert another.do("bytes(kept[0][4095:4100])") == "b'aaaaa'"
    assert bytes(ours)[4095:4100] == b"aaaoa"
    assert bytes(memory) == b"a" * HUGE_PAGE
    assert peer.do("bytes(kept[0][4095:4100])") == "b'axyza'"


def test_tensor_over_attached_memory_can_be_written() -> None:
    memory = filled(bytes(4096))
    attached = SealedMemory(memory.fd)
    if not attached.is_private:
        pytest.skip("reserved huge pages, and none left for private copies")
    tensor = torch.frombuffer(attached, dtype=torch.float32)
    tensor += 1
    assert tensor.sum() == 1024
    assert not any(bytes(memory))


def test_mapping_outlives_its_maker_and_every_descriptor(peer: Peer) -> None:
    peer.do("kept.append(SharedMemory(4096))")
    peer.do("memoryview(kept[0]).__setitem__(slice(0, 3), b'abc')")
    assert "SharedMemory" in peer.do("kept[0].freeze() or kept[0]")
    [fd] = peer.received
    attached = SealedMemory(fd)
    assert attached.fd != fd
    peer.process.send_signal(signal.SIGKILL)
    peer.process.wait(DEADLINE_S)
    os.close(peer.received.pop())
    assert bytes(attached)[:4] == b"abc\0"
    again = SealedMemory(attached.fd, 3)
    del attached
    assert bytes(again) == b"abc"


def test_child_of_a_fork_keeps_the_mapping() -> None:
    script = """if True:
        import os
        from weightcache._engine import SealedMemory, SharedMemory

        memory = SharedMemory(4096)
        memoryview(memory)[:3] = b"abc"
        memory.freeze()
        attached = SealedMemory(memory.fd)
        pid = os.fork()
        if pid == 0:
            assert bytes(attached)[:3] == bytes(memory)[:3] == b"abc"
            del memory
            memoryview(attached)[:3] = b"xyz"
            os._exit(0 if bytes(attached)[:3] == b"xyz" else 1)
        _, status = os.waitpid(pid, 0)
        print(status, bytes(attached)[:3], bytes(memory)[:3])
    """
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0 b'abc' b'abc'\n", "")


# -- what is not attached


@contextmanager
def memfd(nbytes: int, seals: int) -> Iterator[int]:
    fd = os.memfd_create("of another's making", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, nbytes)
        os.posix_fallocate(fd, 0, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


def test_memfd_of_another_s_making_is_attached_if_it_is_sealed() -> None:
    with memfd(5000, SEALS) as fd:
        assert bytes(SealedMemory(fd)) == bytes(5000)


@pytest.mark.parametrize(
    "missing", [fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, F_SEAL_FUTURE_WRITE, fcntl.F_SEAL_SEAL, SEALS]
)
def test_memfd_with_a_seal_missing_is_refused(missing: int) -> None:
    with memfd(4096, SEALS & ~missing) as fd, pytest.raises(ValueError, match="is not sealed"):
        SealedMemory(fd)


def test_memory_that_is_being_filled_is_read_as_it_grows(peer: Peer) -> None:
    memory = SharedMemory(4 * HUGE_PAGE)
    with pytest.raises(ValueError, match="holes"):
        SealedMemory(memory.fd)
    peer.do("kept.append(memoryview(SealedMemory(fds[0], partial=True)))", memory.fd)
    for at in (0, 3 * HUGE_PAGE):
        memory.populate(at, at + 4096)
        memoryview(memory)[at : at + 3] = b"abc"
        assert peer.do(f"bytes(kept[0][{at}:{at + 4}])") == "b'abc\\x00'"
    assert backed_nbytes(memory.fd) <= 2 * HUGE_PAGE


def test_memfd_with_a_hole_is_refused() -> None:
    fd = os.memfd_create("hollow", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, 1 << 40)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    with pytest.raises(ValueError, match="holes"):
        SealedMemory(fd)
    os.close(fd)


def test_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4096))
    with (tmp_path / "file").open("rb") as file, pytest.raises(ValueError, match="no memfd"):
        SealedMemory(file.fileno())


def test_file_in_memory_is_refused() -> None:
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR)
    os.write(fd, bytes(4096))
    with pytest.raises(ValueError):
        SealedMemory(fd)
    os.close(fd)


def test_pipe_and_closed_descriptor_are_refused() -> None:
    ours, theirs = os.pipe()
    os.close(theirs)
    with pytest.raises(ValueError, match="no memfd"):
        SealedMemory(ours)
    os.close(ours)
    for fd in (ours, -1):
        with pytest.raises(OSError) as refused:
            SealedMemory(fd)
        assert refused.value.errno == errno.EBADF


def test_memfd_smaller_than_expected_is_refused() -> None:
    memory = filled(bytes(4096))
    assert SealedMemory(memory.fd, 0).nbytes == 0
    with pytest.raises(ValueError, match="less than 4097"):
        SealedMemory(memory.fd, 4097)
    with pytest.raises(ValueError, match="got -2"):
        SealedMemory(memory.fd, -2)


# -- kinds of pages


@contextmanager
def setting(path: Path, value: str) -> Iterator[None]:
    """Set a kernel setting while the block runs; skip where that is not allowed."""
    try:
        before = path.read_text()
        path.write_text(value)
    except OSError as exc:
        pytest.skip(f"{path} cannot be set: {exc}")
    chosen = re.search(r"\[(\w+)\]", before)
    try:
        yield
    finally:
        path.write_text(chosen[1] if chosen else before)


def meminfo(name: str) -> int:
    found = re.search(rf"^{name}: +(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


@contextmanager
def reserved(n_pages: int) -> Iterator[None]:
    """Have so many huge pages of 2 MiB reserved and free; skip where they cannot be had."""
    if Path("/sys/kernel/mm/hugepages/hugepages-2048kB").is_dir() and meminfo("Hugepagesize") == 2048:
        in_use = meminfo("HugePages_Total") - meminfo("HugePages_Free") + meminfo("HugePages_Rsvd")
        with setting(RESERVED, str(in_use + n_pages)):
            if meminfo("HugePages_Free") - meminfo("HugePages_Rsvd") != n_pages:
                pytest.skip("memory is too fragmented for huge pages")
            yield
    else:
        pytest.skip("no reserved pages of 2 MiB here")


def test_small_memory_takes_small_pages() -> None:
    with reserved(2):
        memory = SharedMemory(HUGE_PAGE - 1)
        assert (memory.pages, memory.hugetlb_refused_errno, memory.huge_nbytes()) == (PAGES_SMALL, errno.EFBIG, 0)


def test_reserved_pages_are_taken_where_enough_are_free() -> None:
    with reserved(3):
        memory = SharedMemory(2 * HUGE_PAGE + 1)
        assert (memory.pages, memory.hugetlb_refused_errno) == (PAGES_HUGETLB, 0)
        assert (meminfo("HugePages_Rsvd"), meminfo("HugePages_Free")) == (
            2,
            2,
        )  # the first was taken, to see it is there
        memory.populate(0, memory.nbytes)
        memoryview(memory)[:] = b"x" * memory.nbytes
        memory.freeze()
        assert memory.huge_nbytes() == 3 * HUGE_PAGE
        assert bytes(memory) == b"x" * memory.nbytes
        del memory
        assert (meminfo("HugePages_Rsvd"), meminfo("HugePages_Free")) == (0, 3)


def test_too_few_reserved_pages_are_left_alone() -> None:
    with reserved(3):
        first = SharedMemory(2 * HUGE_PAGE)
        second = SharedMemory(2 * HUGE_PAGE)
        assert (first.pages, first.hugetlb_refused_errno) == (PAGES_HUGETLB, 0)
        assert second.pages != PAGES_HUGETLB
        assert second.hugetlb_refused_errno == errno.ENOMEM
        for memory in (second, first):  # the pages set aside are there, populated or not
            memoryview(memory)[:] = b"x" * memory.nbytes
        assert meminfo("HugePages_Free") == 1
        del first, memory
    assert bytes(second) == b"x" * second.nbytes


def test_reserved_pages_without_room_for_copies_are_attached_read_only(peer: Peer) -> None:
    with reserved(3):
        memory = filled(b"x" * (2 * HUGE_PAGE))
        assert memory.pages == PAGES_HUGETLB
        attached = SealedMemory(memory.fd)
        view = memoryview(attached)
        assert (attached.is_private, view.readonly, attached.huge_nbytes()) == (False, True, 2 * HUGE_PAGE)
        assert bytes(view) == b"x" * memory.nbytes
        assert meminfo("HugePages_Free") - meminfo("HugePages_Rsvd") == 1
        assert peer.do("kept.append(SealedMemory(fds[0])) or bytes(kept[0])[-3:]", memory.fd) == "b'xxx'"
        peer.process.kill()
        peer.process.wait(DEADLINE_S)
        del view, attached, memory


def test_reserved_pages_with_room_for_copies_are_attached_writable() -> None:
    with reserved(4):
        memory = filled(b"x" * (2 * HUGE_PAGE))
        attached = SealedMemory(memory.fd)
        assert attached.is_private
        memoryview(attached)[:] = b"y" * memory.nbytes
        assert bytes(memory) == b"x" * memory.nbytes
        del attached
        assert (meminfo("HugePages_Free"), meminfo("HugePages_Rsvd")) == (2, 0)
        del memory


@pytest.mark.skipif(not SHMEM_ENABLED.exists(), reason="this kernel has no huge pages for shmem")
def test_huge_pages_of_shmem_are_taken_where_allowed(peer: Peer) -> None:
    with setting(SHMEM_ENABLED, "advise"):
        memory = SharedMemory(4 * HUGE_PAGE)
        if memory.pages != PAGES_HUGE:
            pytest.skip("no huge page is free, or all are reserved ones")
        memory.populate(0, memory.nbytes)
        assert memory.huge_nbytes() == smaps_nbytes(memory, "ShmemPmdMapped") > 0
        memory.freeze()
        attached = SealedMemory(memory.fd)
        assert attached.huge_nbytes() == 0
        assert bytes(attached) == bytes(memory) == bytes(memory.nbytes)
        assert attached.huge_nbytes() == memory.huge_nbytes() == 4 * HUGE_PAGE
        memoryview(attached)[0] = 1
        assert attached.huge_nbytes() == 3 * HUGE_PAGE
        assert memoryview(memory)[0] == 0
        assert smaps_nbytes(attached, "Anonymous") == mmap.PAGESIZE


@pytest.mark.skipif(not SHMEM_ENABLED.exists(), reason="this kernel has no huge pages for shmem")
def test_small_pages_are_taken_where_shmem_has_no_huge_ones() -> None:
    with setting(SHMEM_ENABLED, "never"):
        memory = SharedMemory(4 * HUGE_PAGE)
        if memory.pages == PAGES_HUGETLB:
            pytest.skip("there are reserved ones")
        memory.populate(0, memory.nbytes)
        assert (memory.pages, memory.huge_refused_errno, memory.huge_nbytes()) == (PAGES_SMALL, 0, 0)
