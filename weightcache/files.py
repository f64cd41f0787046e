"""Own files on this machine's disk: writing them past the page cache, and publishing them atomically.

Never shows half a file under its name, and never maps one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

STAGED_SUFFIX = ".staged"
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "gpfs", "afs", "beegfs", "virtiofs", "glusterfs", "efs"}
)


@contextlib.contextmanager
def staged(staging: Path, nbytes: int = 0) -> Iterator[tuple[int, Path]]:
    """Open a new file of zeros under a temporary name in `staging`, for `publish` to make visible.

    Yields (descriptor, path). The file is locked while its writer lives, so that `sweep` knows litter from work, and
    is removed if it was not published.
    """
    fd, path = create_locked(staging, suffix=STAGED_SUFFIX)
    try:
        os.ftruncate(fd, nbytes)
        yield fd, path
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def create_locked(folder: Path, *, prefix: str = "", suffix: str = "") -> tuple[int, Path]:
    """Create a file of a new name that shows by its lock that its owner lives. Returns (descriptor, path)."""
    while True:
        path = folder / f"{prefix}{secrets.token_hex(12)}{suffix}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                return fd, path
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # someone took it for litter before it was locked


def unlock(fd: int) -> None:
    """Let go of the lock that shows that a file's writer is not done with it."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def publish(
    fd: int,
    path: Path,
    target: Path,
    *,
    folder_mode: int = 0o700,
    naming: contextlib.AbstractContextManager[None] | None = None,
) -> None:
    """Make a staged file visible as `target`, atomically and durably: sync, rename (in `naming`), sync the folder.

    Both syncs are needed: after power loss rename alone lost or tore 6 of 6 files on ext4 and xfs, syncing only the
    file still lost 1 of 6 (docs/decisions/004). Folders that are not there are made.
    """
    os.fsync(fd)
    _make_folder(target.parent, folder_mode)
    with naming or contextlib.nullcontext():
        path.rename(target)
    sync_folder(target.parent)


def _make_folder(folder: Path, mode: int) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent, mode)
        folder.mkdir(mode=mode, exist_ok=True)
        sync_folder(folder.parent)


def publish_bytes(content: bytes, target: Path, staging: Path) -> None:
    """Write `content` as the file `target`, which appears whole or not at all."""
    with staged(staging) as (fd, path):
        write_all(fd, content)
        publish(fd, path, target)


def write_all(fd: int, content: bytes | memoryview) -> None:
    """Write everything at the descriptor's position. Raises OSError."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def write_past_page_cache(fd: int, *pieces: memoryview) -> None:
    """Write whole 4 KiB pages from memory aligned to them, directly where the file system can. Raises OSError.

    Filling the page cache costs more processor time than all else in a write, and the bytes are in memory already
    (docs/decisions/005).
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        for piece in pieces:
            write_all(fd, piece)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        os.lseek(fd, 0, os.SEEK_SET)
        for piece in pieces:
            write_all(fd, piece)


def file_system_of(path: Path) -> str:
    """Return the type of the file system that `path` lies on, as mountinfo spells it (`ext4`, `nfs4`), or `unknown`."""
    found, deepest = "unknown", -1
    try:
        resolved = path.resolve()
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        mounted, _, rest = line.partition(" - ")
        point = Path(mounted.split()[4].encode().decode("unicode_escape"))
        if resolved.is_relative_to(point) and len(point.parts) >= deepest:
            found, deepest = rest.split()[0], len(point.parts)
    return found


def is_network(file_system: str) -> bool:
    """Tell whether the bytes of such a file system come over a network or through a user-space server."""
    return file_system in NETWORK_FILE_SYSTEMS or file_system.startswith("fuse")


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sweep(staging: Path) -> int:
    """Remove staged files whose writers are dead. Returns how many."""
    return sum(remove_dead(path) for path in staging.glob(f"*{STAGED_SUFFIX}"))


def remove_dead(path: Path, *, keep_as: Path | None = None) -> bool:
    """Remove a file made by `create_locked`, or give it another name, unless its owner lives; tell whether it is gone.

    What lies there instead of such a file, a link or a pipe, has no owner.
    """
    fd = -1
    try:
        with contextlib.suppress(FileNotFoundError):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                if exc.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return False
                if exc.errno not in (errno.ELOOP, errno.ENXIO):
                    raise
            # Under the lock, so that an owner that waits for it sees the file gone.
            if keep_as is not None:
                path.rename(keep_as)
            else:
                path.unlink()
        return True
    finally:
        if fd >= 0:
            os.close(fd)
