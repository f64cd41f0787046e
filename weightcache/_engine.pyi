"""Owns memory for weights, moves bytes of files into it and sums them, with the GIL released; sources in ext/.

Reads files by descriptor or by name, and chooses by itself only between past and through the page cache. A refusal
is an OSError with its errno, or a DriverError.

Sizes and offsets are bytes. Every function may run in several threads at once. Long calls look at signals
between steps, so that a handler which raises (KeyboardInterrupt) ends them early, in the main thread.
"""

from collections.abc import Callable
from typing import Final, final

from typing_extensions import Buffer

ALIGNMENT: Final = 4096
"""What O_DIRECT wants of offset, address and length to read in place; `run` bridges the rest."""

@final
class Memory:
    """Private anonymous memory, zero-filled unless reused: a writable, contiguous buffer of `nbytes` bytes.

    It starts on a multiple of 2 MiB and asks for transparent huge pages. Nothing is populated until written
    or `populate`d. Views of it (memoryview, numpy.frombuffer, torch.frombuffer) keep it alive; when the last is
    gone it goes to the pool (`pool_limit`), or is unmapped. After a fork the child has its own copy on write.
    A page that nobody may touch follows the mapping.

    Memory taken from the pool holds whatever was written into it last, or zeroes, page by page.

    Args:
        nbytes: size, may be 0. The mapping is rounded up: to 2 MiB from there on, to a page below. One from the
            pool may be a quarter larger than that.
        numa_node: the node whose memory the kernel shall prefer; others serve where it has none. -1: no matter.
        fresh: never take it from the pool: zero-filled, and not populated.

    Raises:
        ValueError: nbytes is negative, or numa_node less than -1.
        OSError: the kernel has no room (ENOMEM).
    """

    def __new__(cls, nbytes: int, numa_node: int = -1, *, fresh: bool = False) -> Memory: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def nbytes(self) -> int:
        """Size as asked for."""

    @property
    def address(self) -> int:
        """Address of the first byte, a multiple of 2 MiB."""

    @property
    def huge_refused_errno(self) -> int:
        """Why MADV_HUGEPAGE was refused; 0 where it was granted, which promises no free huge pages."""

    @property
    def numa_refused_errno(self) -> int:
        """Why the kernel would not prefer the node; 0 where it does, or none was asked for."""

    def populate(self, start: int, stop: int, /) -> None:
        """Back each page that overlaps `[start, stop)` with real memory; content stays as it is.

        Several threads may populate and write the same bytes at once. After an exception the pages before
        some 64 MiB step are populated; the call may be repeated.

        Raises:
            ValueError: not `0 <= start <= stop <= nbytes`.
            OSError: out of memory (ENOMEM), or a page cannot be had (EFAULT, EHWPOISON).
        """

    def huge_nbytes(self) -> int:
        """Return how many bytes of the mapping lie in transparent huge pages now; 0 where that is hidden.

        Walks /proc/self/smaps: for reports, not for hot paths.
        """

PAGES_SMALL: Final = 0
"""Pages of this kernel's own size."""
PAGES_HUGE: Final = 1
"""Huge pages where the kernel has them free, of shmem."""
PAGES_HUGETLB: Final = 2
"""Huge pages of 2 MiB that the operator reserved (vm.nr_hugepages), all of them set aside for one memory."""

@final
class SharedMemory:
    """Memory that other processes can map to be read: zeroes in a memfd, writable here until `freeze`.

    It takes the best pages to be had: reserved huge ones where enough are free; huge ones of shmem where the
    kernel makes them, which one is made to find out; small ones. `pages` and the errnos tell. Otherwise nothing
    is backed until `populate`d, and what is not should not be written: where a limit of the hugetlb cgroup or a
    cpuset leaves no page for it, that ends the process (SIGBUS).

    Views of it keep it alive; when the last is gone it is unmapped and its descriptor closed. Other processes
    keep what they mapped. After a fork parent and child write into the same bytes. From the start nobody can make the
    memfd shorter or longer, or write into it but through this object.

    Args:
        nbytes: size, may be 0. The memfd is rounded up: to 2 MiB from there on, to a page below.
        name: shows as `/memfd:name` in /proc, at most 249 bytes.
        numa_node: the node whose memory the kernel shall prefer; others serve where it has none. -1: no matter.

    Raises:
        ValueError: nbytes is negative, numa_node less than -1, or the name holds a null.
        OSError: no room (ENOMEM, ENOSPC), no descriptor (EMFILE), a name too long (EINVAL), no memfd here (ENOSYS).
    """

    def __new__(cls, nbytes: int, name: str = "weightcache", numa_node: int = -1) -> SharedMemory: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, view: memoryview, /) -> None: ...
    @property
    def nbytes(self) -> int:
        """Size as asked for; the memfd may be longer."""

    @property
    def address(self) -> int:
        """Address of the first byte, a multiple of 2 MiB."""

    @property
    def fd(self) -> int:
        """The memfd, to be handed to others; close-on-exec, and closed with this object."""

    @property
    def pages(self) -> int:
        """`PAGES_SMALL`, `PAGES_HUGE` or `PAGES_HUGETLB`."""

    @property
    def hugetlb_refused_errno(self) -> int:
        """Why there are no reserved pages: ENOMEM too few are free, EFBIG they are larger than all of this; or 0."""

    @property
    def huge_refused_errno(self) -> int:
        """Why MADV_HUGEPAGE was refused; 0 where it was granted, which promises nothing, or was not asked for."""

    @property
    def numa_refused_errno(self) -> int:
        """Why the kernel would not prefer the node; 0 where it does, or none was asked for."""

    def populate(self, start: int, stop: int, /) -> None:
        """Back each page that overlaps `[start, stop)` with real memory; content stays as it is.

        Several threads may populate and write the same bytes at once. Where a memory cgroup is full, the kernel
        kills before it refuses: ask `machine.memory_available_bytes` first. Does nothing once frozen.

        Raises:
            ValueError: not `0 <= start <= stop <= nbytes`.
            OSError: no memory is to be had (ENOMEM, ENOSPC). Nothing else happens, no signal is sent.
        """

    def freeze(self) -> None:
        """Let this mapping be read only: buffers got afterwards are, and writing through older ones ends the process.

        Backs what was not populated, with zeroes. Its pages can still be registered for a device. May be called again.

        Raises:
            OSError: no memory is to be had.
        """

    def huge_nbytes(self) -> int:
        """Return how many bytes this process has mapped in huge pages now; all, where they are reserved ones.

        Walks /proc/self/smaps: for reports, not for hot paths.
        """

@final
class SealedMemory:
    """A `SharedMemory` that another process fills, or has filled, mapped without a copy.

    The buffer is writable: a page that is written becomes a private copy, which nobody else sees. What the other
    process does to itself, its end too, changes nothing here. Nothing can be truncated, so no read can fail.

    With reserved huge pages the kernel must set one aside for each that could be copied. Where so many are not
    free the buffer is read-only, and `is_private` False. Where they are, they are this process's own: a child of
    a fork that writes may find none left, and is killed.

    Args:
        fd: the memfd; duplicated, so the caller closes their own.
        nbytes: size of the buffer; -1: all that is in the memfd, which may be longer than what its maker asked for.
        partial: it is still being filled and may have holes. What is not there yet must not be touched: a read would
            back it, and end the process (SIGBUS) where there is no memory.

    Raises:
        ValueError: fd is no memfd, or not sealed against writing, shrinking, growing and sealing, has holes though it
            is not partial, or holds less than nbytes.
        OSError: fd is not open, or there is no room to map it.
    """

    def __new__(cls, fd: int, nbytes: int = -1, *, partial: bool = False) -> SealedMemory: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, view: memoryview, /) -> None: ...
    @property
    def nbytes(self) -> int:
        """Size of the buffer."""

    @property
    def address(self) -> int:
        """Address of the first byte, a multiple of 2 MiB."""

    @property
    def fd(self) -> int:
        """The memfd, as a descriptor of this object's own; close-on-exec, and closed with it."""

    @property
    def is_private(self) -> bool:
        """Whether the buffer is writable, each page being copied when it is first written."""

    def huge_nbytes(self) -> int:
        """Return how many bytes this process has mapped in huge pages now, as `SharedMemory.huge_nbytes`.

        Pages are mapped when they are first read; one that was written is mapped small.
        """

def pool_limit(nbytes: int, /) -> None:
    """Keep the mappings of dead `Memory` objects for the next ones, up to `nbytes` in this process; 0 at first.

    The next `Memory` of a fitting size and the same node takes one: equal, or up to a quarter larger. The oldest
    leave first, at most 64 are kept, none below 2 MiB. A lower limit unmaps what is too much before it returns.

    What is kept counts as used by this process, and as free to be taken: the kernel takes it back, page by page,
    when it runs short (MADV_FREE). A child does not get it at a fork and starts with an empty pool of this limit.

    Raises:
        ValueError: nbytes is negative.
    """

def pool_nbytes() -> int:
    """Return how many bytes of mappings are kept for reuse, taken back by the kernel or not."""

class DriverError(RuntimeError):
    """The driver failed: `args` are its error's code, 0 where it has none, and that error's name or a reason."""

@final
class Driver:
    """The NVIDIA driver, opened at run time and never closed before its devices are.

    Args:
        path: a library's name or path, as dlopen(3) takes it.

    Raises:
        DriverError: no such library, a symbol missing in it, or it refuses to start; with the reason.
    """

    def __new__(cls, path: str = "libcuda.so.1") -> Driver: ...
    @property
    def is_stand_in(self) -> bool:
        """Whether this is no driver but a library that poses as one: its devices' memory is the host's."""

    def count(self) -> int:
        """Return how many devices it shows."""

    def version(self) -> int:
        """Return the CUDA version it knows: 1000 * major + 10 * minor."""

    def describe(self, ordinal: int, /) -> tuple[str, str, int]:
        """Return a device's name, PCI bus id and bytes of memory."""

    def error_name(self, code: int, /) -> str:
        """Return the driver's name of an error."""

    def adopt(self, address: int, nbytes: int, ordinal: int, /) -> None:
        """Let host memory pose as a device's. ValueError where this is no stand-in."""

    def forget(self, address: int, nbytes: int, ordinal: int, /) -> None:
        """Undo `adopt`."""

@final
class Device:
    """A device: the primary context that torch uses too, one copy stream, a ring of page-locked slots.

    It changes no thread's current context, and allocates no device memory. Not usable after a fork, in the child.

    Args:
        driver: kept alive.
        ordinal: which, as the driver counts.
        slot_nbytes: a multiple of 4096.
        n_slots: 1 to `MAX_SLOTS`; with fewer than a run has threads, fewer threads work.
        numa_node: where the ring's memory shall lie; -1: no matter.

    Raises:
        DriverError: the device cannot be used.
        OSError: no memory for the ring, or a size that makes no sense (EINVAL).
    """

    def __new__(cls, driver: Driver, ordinal: int, slot_nbytes: int, n_slots: int, numa_node: int = -1) -> Device: ...
    def register(self, address: int, nbytes: int, frozen: bool = False) -> None:
        """Page-lock host memory, so that the device reads it by itself; waits until no run uses the device.

        Never from `on_done`: it would wait for its own run. Memory is registered for one device of a process.
        The memory must be mapped to be written, or frozen, and stay mapped until `unregister` or `close`.

        Raises:
            DriverError: refused.
            OSError: it overlaps what is registered (EEXIST), there are too many (ENOSPC), or this is a forked
                child (ECHILD).
        """

    def unregister(self, address: int, /) -> None:
        """Undo `register`; waits until no run uses the device. OSError (ENOENT): nothing is registered there."""

    def ring(self) -> tuple[str, int, int, int]:
        """Return how the ring is page-locked, why not better, bytes of a slot, and slots.

        `registered` is our memory; `allocated` the driver's, where it refused ours; `pageable` is neither. The
        second is the driver's error that kept it from the first, or 0.
        """

    def close(self) -> None:
        """Wait for the device and let go of everything; may be called twice. BufferError: it is in use."""

OP_NBYTES: Final = 72
"""Bytes of `struct wc_op` (ext/run.h), whose array `run` takes; `weightcache.operations` has the numpy type."""

SPAN_NBYTES: Final = 24
"""Bytes of `struct wc_span`."""

N_COUNTERS: Final = 8
"""How many 64-bit counters `run` counts on; their order stands in ext/run.h."""

MAX_SLOTS: Final = 64
"""Most slots of a device's ring."""

FROM_MEMORY: Final = 1
TO_DEVICE: Final = 2
CHECK: Final = 4
PADDED: Final = 8
POPULATE: Final = 16
PAST_CACHE: Final = 32
"""Flags of an operation; what each means stands in ext/run.h."""

DONE: Final = 1
"""Status of an operation that is done; every other one that ended has a negative status."""

def run(
    ops: Buffer,
    spans: Buffer = b"",
    names: Buffer = b"",
    folder: int = -1,
    device: Device | None = None,
    after: int = 0,
    threads: int = 4,
    cpus: Buffer = b"",
    counters: Buffer = ...,
    stop: Buffer = ...,
    on_done: Callable[[list[int]], object] | None = None,
) -> int | None:
    """Carry operations out on threads of their own; return the index of the first that failed, or None.

    The first error cancels the rest. Every operation has its status then, and what is done is done: on the device
    too, for any stream. Nothing is under way any more, whatever was raised. `weightcache.operations` is the way to
    call it.

    Args:
        ops: writable array of `struct wc_op`; the last three fields of each are written.
        spans: array of `struct wc_span`.
        names: NUL-terminated names of files below `folder`, one after the other.
        folder: descriptor of a folder.
        device: where operations with `TO_DEVICE` go.
        after: a CUDA stream's handle on it; what that holds now comes before the first copy.
        threads: at most; named weightcache-io.
        cpus: one byte a processor, not 0 where the threads may run; empty for anywhere.
        counters: writable, 64 bytes aligned to 8; counted on while it lasts, for other threads to read.
        stop: writable, 8 bytes aligned to 8; when the first int is not 0 the run ends soon, which is no error.
        on_done: told, on this thread, the indexes of operations that are done, in the order they were. What it
            raises ends the run and comes out.

    Raises:
        ValueError: an operation that makes no sense, or buffers of wrong sizes; nothing was begun.
        DriverError, OSError: the device cannot be used (ECHILD after a fork, EBUSY while its stream is captured), no
            thread could be had; nothing was begun.
        KeyboardInterrupt: and whatever signal handlers raise, in the main thread: looked at every 50 ms, then what is
            under way is waited for.
    """

def resident_nbytes(fd: int, offset: int, nbytes: int, /) -> int:
    """Return how many bytes of `[offset, offset + nbytes)` the page cache holds: whole pages, at most nbytes.

    Reads nothing in. Asks cachestat(2); before Linux 6.5, or where that is refused, mincore(2) on a mapping,
    which counts a file that this user could not write as resident throughout.

    Raises:
        ValueError: offset or nbytes is negative.
        OSError: the file cannot be asked.
    """

def checksum(content: Buffer, /, *, step: int = 1 << 26, plain: bool = False) -> int:
    """Return XXH3-64 (seed 0, default secret) of `content`, as the xxhash package does: damage, not malice.

    `content` is contiguous, at any address, held during the call; who writes it meanwhile gets some number.

    Args:
        step: bytes between two looks at signals, a multiple of 1024; changes no result.
        plain: leave AVX2 alone, which is used where the processor has it; changes no result.

    Raises:
        ValueError: step is not a positive multiple of 1024.
        TypeError, BufferError: content is no buffer or not contiguous.
    """
