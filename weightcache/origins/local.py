"""Own reading a folder on this machine, in place, through the engine.

Never follows a link out of the folder, and never maps a file: the file may shrink under a reader.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat as modes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from weightcache.errors import (
    AccessDeniedError,
    FormatError,
    ModelNotFoundError,
    OriginChangedError,
    OriginError,
    UnsafePathError,
)
from weightcache.ledger import Ledger
from weightcache.manifest import MAX_PATH_NBYTES
from weightcache.operations import Crew, HostPlace, Operations, Place, address_of
from weightcache.origins.base import Small, Stat
from weightcache.runtime import ended

Told = Callable[[Sequence[int]], None]


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes `[start, start + nbytes)` of a file, and where they go."""

    stat: Stat
    start: int
    nbytes: int
    place: Place


class LocalOrigin:
    """A folder of this machine's file system; reads run on the given workers."""

    def __init__(self, folder: Path, workers: Executor, file: str | None = None) -> None:
        self._folder = folder
        self._workers = workers
        self._file = file
        self.ledger = Ledger()  # nothing is asked of anybody: bytes alone are counted

    @property
    def ledgers(self) -> Sequence[Ledger]:
        return [self.ledger]

    @property
    def uri(self) -> str:
        return str(self._folder)

    async def list(self) -> Sequence[Stat]:
        return await asyncio.get_running_loop().run_in_executor(self._workers, self._list)

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        crew = Crew(threads=1)
        await ended(self._workers.submit(self._read_into, stat, start, views, crew), crew.stop.set)
        self.ledger.received_bytes += sum(map(len, views))

    async def get(self, name: str, limit_nbytes: int) -> Small:
        return await asyncio.get_running_loop().run_in_executor(self._workers, self._get, name, limit_nbytes)

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        pass  # every read looks at the file's state before and after

    def drop(self) -> None:
        pass  # a call that blocks a thread cannot be broken off

    async def close(self) -> None:
        pass

    def path(self, name: str) -> Path:
        """Return where a listed file lies."""
        return self._folder / name

    def _list(self) -> Sequence[Stat]:
        if self._file is not None:
            return [self._stat(self._file)]
        if not self._folder.is_dir():
            raise ModelNotFoundError(f"no folder {self._folder}: expected a folder with safetensors", uri=self.uri)
        found = [self._stat(name) for name in self._walk("")]
        if not found:
            raise ModelNotFoundError(f"the folder {self._folder} is empty: expected safetensors", uri=self.uri)
        return found

    def _get(self, name: str, limit_nbytes: int) -> Small:
        with self._open(replace(self._stat(name), etag="")) as fd:
            found = os.fstat(fd)
            if found.st_size > limit_nbytes:
                raise FormatError(f"{self.path(name)} has {found.st_size} bytes, expected at most {limit_nbytes}")
            return Small(os.pread(fd, found.st_size, 0), _etag(found))

    def _walk(self, below: str) -> Iterator[str]:
        try:
            entries = sorted(os.scandir(self._folder / below), key=lambda entry: entry.name)
        except PermissionError as exc:
            raise AccessDeniedError(f"no permission to list {self._folder / below}", uri=self.uri) from exc
        if len(below.encode(errors="surrogateescape")) > MAX_PATH_NBYTES:
            raise UnsafePathError(
                f"folders of {self._folder} are nested too deep: expected file names of at most {MAX_PATH_NBYTES} bytes",
                path=self.uri,
            )
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name != ".git":
                    yield from self._walk(name)
            else:
                yield name

    def _stat(self, name: str) -> Stat:
        path = self._folder / name
        try:
            found = path.stat()
        except FileNotFoundError as exc:
            if path.is_symlink():
                raise UnsafePathError(f"{path} is a link to nothing: remove or mend it", path=str(path)) from exc
            raise ModelNotFoundError(f"no file {path}", uri=str(path)) from exc
        except PermissionError as exc:
            raise AccessDeniedError(f"no permission to read {path}", uri=str(path)) from exc
        except (OSError, ValueError) as exc:
            raise UnsafePathError(
                f"{path} cannot be looked at ({exc}): expected a regular file", path=str(path)
            ) from exc
        if not modes.S_ISREG(found.st_mode):
            raise UnsafePathError(
                f"{path} is no regular file: a model holds files and folders only; remove it", path=str(path)
            )
        if path.is_symlink() and not self._may_follow(path.resolve()):
            raise UnsafePathError(
                f"{path} is a link that leaves the model's folder (to {path.resolve()}): copy the file instead",
                path=str(path),
            )
        return Stat(name, found.st_size, _etag(found))

    def _may_follow(self, target: Path) -> bool:
        """Links may stay inside the folder, or lead to the blobs of the same Hugging Face cache entry."""
        folder = self._folder.resolve()
        if target.is_relative_to(folder):
            return True
        entry = folder.parent.parent
        return folder.parent.name == "snapshots" and target.is_relative_to(entry / "blobs")

    def read(self, ranges: Sequence[FileRange], crew: Crew, on_done: Told) -> None:
        """Bring ranges of files to their places, on this thread and the engine's; tells the indexes of those done.

        Raises:
            OriginChangedError: A file is not in the state its range names, or was not when all was read.
            OriginError: A file cannot be read.
            Stopped: The crew was told to.
        """
        with contextlib.ExitStack() as opened:
            fds: dict[str, int] = {}
            operations = Operations()
            for each in ranges:
                if each.stat.path not in fds:
                    fds[each.stat.path] = opened.enter_context(self._open(each.stat))
                operations.read_open(fds[each.stat.path], each.start, each.nbytes, each.place)

            def tell(done: Sequence[int]) -> None:
                # Nobody hears of bytes whose file is no longer in its state.
                for stat in {ranges[index].stat for index in done}:
                    self._check_unchanged(fds[stat.path], self.path(stat.path), stat)
                on_done(done)

            failure = operations.run(crew, tell)
            if failure is None:
                return
            failed = ranges[failure.index]
            if failure.errno == errno.ENODATA:
                raise OriginChangedError(
                    f"{self.path(failed.stat.path)} ended before {failed.start + failed.nbytes}, expected "
                    f"{failed.stat.nbytes} bytes; load again"
                )
            error = failure.as_error(f"bytes [{failed.start}, {failed.start + failed.nbytes}) of {failed.stat.path}")
            if not isinstance(error, OSError):
                raise error
            raise OriginError(
                f"cannot read {self.path(failed.stat.path)} at {failed.start}: {error.strerror}; look at the disk"
            ) from error

    def copy_to(self, stat: Stat, fd: int) -> bool:
        """Copy a file whole to an open one within the kernel, where file systems let: some share its blocks then.

        Returns False where they do not, or only in part. Raises OriginChangedError, and OSError of what is written to.
        """
        with self._open(stat) as source:
            try:
                at = 0
                while at < stat.nbytes:
                    n_copied = os.copy_file_range(source, fd, stat.nbytes - at, at, at)
                    if not n_copied:
                        return False
                    at += n_copied
            except OSError as exc:
                if exc.errno in (errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    return False
                raise
            self._check_unchanged(source, self.path(stat.path), stat)
        return True

    @contextlib.contextmanager
    def _open(self, stat: Stat) -> Iterator[int]:
        """Open a file for the length of the block, which must find it in its state."""
        path = self.path(stat.path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except PermissionError as exc:
            raise AccessDeniedError(f"no permission to read {path}", uri=str(path)) from exc
        except OSError as exc:
            if not stat.etag:  # nobody has looked at it before
                raise ModelNotFoundError(f"no file {path} ({exc.strerror})", uri=str(path)) from exc
            raise OriginChangedError(f"{path} is gone ({exc.strerror}): it was there when the load began") from exc
        try:
            self._check_unchanged(fd, path, stat)
            yield fd
        finally:
            os.close(fd)

    def _read_into(self, stat: Stat, start: int, views: Sequence[memoryview], crew: Crew) -> None:
        ranges: list[FileRange] = []
        for view in views:
            if view:
                ranges.append(FileRange(stat, start, len(view), HostPlace(address_of(view))))
            start += len(view)
        self.read(ranges, crew, lambda done: None)

    def _check_unchanged(self, fd: int, path: Path, stat: Stat) -> None:
        if stat.etag and _etag(os.fstat(fd)) != stat.etag:
            raise OriginChangedError(f"{path} changed while it was read; load again when its writer is done")


def _etag(found: os.stat_result) -> str:
    return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"
