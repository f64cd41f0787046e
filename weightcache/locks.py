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
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from weightcache.digest import checksum
from weightcache.files import create_locked, remove_dead

N_STAMPS = 1 << 16
STAMP_NBYTES = 8
BEAT_S = 0.3
STALE_S = 1.2  # a leader whose stamp stays as it is for so long is stopped; a dead one is seen at once


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
    flights of one process exclude each other like those of two. A leader that is stopped keeps its locks, so leaders
    show that they run, by a stamp in the file that changes every BEAT_S. Thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._led: dict[str, int] = {}  # where each one's stamp lies
        self._closed = threading.Event()
        self._beating: threading.Thread | None = None

    def lead(self, name: str) -> bool:
        """Become the leader for `name`, or return False because another is."""
        if not self._set(fcntl.F_WRLCK, name):
            return False
        with self._lock:
            self._led[name] = _offset(name) % N_STAMPS * STAMP_NBYTES
            if self._beating is None:
                self._beating = threading.Thread(target=self._beat, name="weightcache-flight", daemon=True)
                self._beating.start()
        return True

    def land(self, name: str) -> None:
        """Stop leading `name`."""
        with self._lock:
            self._led.pop(name, None)
        self._set(fcntl.F_UNLCK, name)

    def stamp(self, name: str) -> bytes:
        """Return what changes while the leader of `name` runs."""
        with contextlib.suppress(OSError):
            return os.pread(self._fd, STAMP_NBYTES, _offset(name) % N_STAMPS * STAMP_NBYTES)
        return b""

    def close(self) -> None:
        """Stop leading everything. May be called twice."""
        self._closed.set()
        if self._beating is not None:
            self._beating.join()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _beat(self) -> None:
        while True:
            stamp = struct.pack("q", time.monotonic_ns())
            with self._lock:
                places = set(self._led.values())
            for place in places:
                with contextlib.suppress(OSError):  # others wait a little longer for what they could do themselves
                    os.pwrite(self._fd, stamp, place)
            if self._closed.wait(BEAT_S):
                return

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


class Precedence:
    """Loads that somebody waits for come before prefetches, in all processes that share a file."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def take(self) -> bool:
        """Come first, until closed; False where somebody just looks, or holds the lock for longer than he may."""
        return self._lock(fcntl.LOCK_SH)

    def is_given(self) -> bool:
        """Tell whether nobody comes first just now."""
        given = self._lock(fcntl.LOCK_EX)
        self._lock(fcntl.LOCK_UN)
        return given

    def _lock(self, operation: int) -> bool:
        try:
            fcntl.flock(self._fd, operation | fcntl.LOCK_NB)
        except OSError as exc:
            # A file system without locks lets all go at once.
            return exc.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        return True

    def close(self) -> None:
        """Let others come first. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a file's lock for the length of the block, waiting for it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
