"""Own the locks between processes: leases on models, and the flight lock that makes equal fetches one.

Never lets correctness rest on a lock: they save work and keep bytes from eviction, the kernel drops them when their
process dies, and everything holds without them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from weightcache.digest import checksum
from weightcache.files import create_locked, remove_dead


class Lease:
    """A temporary hold on a model; ends with `release` or with the process.

    A lease is a file that its owner keeps locked, so it is judged by the kernel and not by a clock.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self._fd, self._path = create_locked(folder, prefix=f"{model}.")
        self._owner_pid = os.getpid()

    def release(self) -> None:
        """End the hold; a forked child only lets go of its copy. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if os.getpid() == self._owner_pid:
                self._path.unlink(missing_ok=True)
            os.close(fd)


def leased_models(folder: Path) -> set[str]:
    """Return the models that a live process holds; leases of dead ones are removed."""
    return {path.name.partition(".")[0] for path in folder.iterdir() if not remove_dead(path)}


class Flight:
    """Single flight across processes and threads: whoever locks a chunk's byte of one file is its leader.

    Open-file-description locks on single bytes: the kernel keeps them, drops them when the owner dies, and two
    flights of one process exclude each other like those of two.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def lead(self, name: str) -> bool:
        """Become the leader for `name`, or return False because another is."""
        return self._set(fcntl.F_WRLCK, name)

    def land(self, name: str) -> None:
        """Stop leading `name`."""
        self._set(fcntl.F_UNLCK, name)

    def close(self) -> None:
        """Stop leading everything. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _set(self, kind: int, name: str) -> bool:
        # struct flock: l_type, l_whence, l_start, l_len, l_pid (0 is demanded for this kind of lock).
        request = struct.pack("hhqqi4x", kind, os.SEEK_SET, _offset(name), 1, 0)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, request)
        except OSError as exc:
            # A file system without locks makes everyone a leader: more bytes, the same result.
            return exc.errno not in (errno.EAGAIN, errno.EACCES)
        return True


def _offset(name: str) -> int:
    # Two names on one byte cost a wait, never a wrong byte.
    return checksum(name.encode()) >> 2


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a file's lock for the length of the block, waiting for it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
