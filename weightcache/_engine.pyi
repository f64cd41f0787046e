"""Owns memory for weights and moves bytes of files into it with the GIL released; sources in ext/.

Never opens or closes a file, and never chooses another path: a refusal is an OSError with its errno.

Sizes and offsets are bytes. Every function may run in several threads at once. Long calls look at signals
between steps, so that a handler which raises (KeyboardInterrupt) ends them early, in the main thread.
"""

from typing import Final, final

from typing_extensions import Buffer

ALIGNMENT: Final = 4096
"""What O_DIRECT wants of offset, address and length to read in place; `read_into` bridges the rest."""

@final
class Memory:
    """Private anonymous memory, zero-filled: a writable, contiguous buffer of `nbytes` unsigned bytes.

    It starts on a multiple of 2 MiB and asks for transparent huge pages. Nothing is populated until written
    or `populate`d. Views of it (memoryview, numpy.frombuffer, torch.frombuffer) keep it alive; it is unmapped
    when the last is gone. After a fork the child has its own copy on write. A page that nobody may touch
    follows it.

    Args:
        nbytes: size, may be 0. The mapping is rounded up: to 2 MiB from there on, to a page below.

    Raises:
        ValueError: nbytes is negative.
        OSError: the kernel has no room (ENOMEM).
    """

    def __new__(cls, nbytes: int) -> Memory: ...
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

def read_into(fd: int, offset: int, target: Buffer, /) -> int:
    """Fill `target` with the file's bytes from `offset` on; return how many, fewer only at the file's end.

    With O_DIRECT set on `fd` any offset, length and address is right. Whole blocks go to their place at once
    where `offset` and the target's address agree modulo `ALIGNMENT`; otherwise all is copied once more.

    `target` is writable, contiguous, held during the call, and never written outside; what lies past the
    returned count is undefined, and after an exception all of it. The file's own position is left alone.

    Raises:
        ValueError: offset is negative.
        TypeError, BufferError: target is read-only or not contiguous.
        OSError: the read failed. EINVAL with O_DIRECT: this file system refuses it, read without.
    """

def resident_nbytes(fd: int, offset: int, nbytes: int, /) -> int:
    """Return how many bytes of `[offset, offset + nbytes)` the page cache holds: whole pages, at most nbytes.

    Reads nothing in. Asks cachestat(2); before Linux 6.5, or where that is refused, mincore(2) on a mapping,
    which counts a file that this user could not write as resident throughout.

    Raises:
        ValueError: offset or nbytes is negative.
        OSError: the file cannot be asked.
    """
