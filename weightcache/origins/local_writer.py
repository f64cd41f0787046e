"""Own writing into a folder of this machine as registries need it: files that appear whole, on conditions.

Never leaves litter that outlives its writer's successor, and never follows a link out of the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TypeVar

from weightcache.errors import AccessDeniedError, CapacityError, ConflictError, ModelNotFoundError, UnsafePathError
from weightcache.files import publish, staged, sweep, write_all
from weightcache.locks import exclusive
from weightcache.manifest import RESERVED_PREFIX
from weightcache.origins.base import Entry
from weightcache.origins.local import LocalOrigin

T = TypeVar("T")


class WritableFolder(LocalOrigin):
    """A folder of this machine that is written to; processes of one machine exclude each other by a lock."""

    def __init__(self, folder: Path, workers: Executor) -> None:
        super().__init__(folder, workers)
        self._staging = folder / f"{RESERVED_PREFIX}staging"

    async def entries(self, prefix: str) -> Sequence[Entry]:
        return await self._on_worker(lambda: list(self._entries(prefix)))

    async def put(self, name: str, content: bytes | memoryview, only_if: str | None = None) -> None:
        await self._on_worker(lambda: self._put(name, content, only_if))

    async def delete(self, name: str) -> None:
        await self._on_worker(lambda: self._target(name).unlink(missing_ok=True))

    async def has_conditions(self) -> bool:
        return True

    async def _on_worker(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._workers, work)
        except PermissionError as exc:
            raise AccessDeniedError(f"no permission to write into {self._folder}", uri=self.uri) from exc
        except OSError as exc:
            raise CapacityError(
                f"cannot write into {self._folder}: {exc.strerror or exc}; look at the disk", path=self.uri
            ) from exc

    def _entries(self, prefix: str) -> Iterator[Entry]:
        below = self._folder / prefix.rpartition("/")[0]
        for path in sorted(below.rglob("*")) if below.is_dir() else ():
            name = path.relative_to(self._folder).as_posix()
            if not name.startswith(prefix) or name.startswith(RESERVED_PREFIX):
                continue
            with contextlib.suppress(FileNotFoundError):  # removed while we look
                if path.is_file():
                    found = path.stat()
                    yield Entry(name, found.st_size, found.st_mtime)

    def _target(self, name: str) -> Path:
        target = self._folder / name
        if not target.parent.resolve().is_relative_to(self._folder.resolve()):
            raise UnsafePathError(f"{target} leaves {self._folder} by a link: remove it", path=str(target))
        return target

    def _put(self, name: str, content: bytes | memoryview, only_if: str | None) -> None:
        target = self._target(name)
        self._staging.mkdir(parents=True, exist_ok=True)
        sweep(self._staging)
        with staged(self._staging) as (fd, path):
            write_all(fd, content)
            os.fchmod(fd, 0o644)
            naming = contextlib.nullcontext() if only_if is None else self._if_in_state(name, only_if)
            publish(fd, path, target, folder_mode=0o755, naming=naming)

    @contextlib.contextmanager
    def _if_in_state(self, name: str, etag: str) -> Iterator[None]:
        """Let nobody else write on a condition meanwhile. Raises ConflictError unless the file is in this state."""
        with exclusive(self._staging / "lock"):
            try:
                found = self._stat(name).etag
            except ModelNotFoundError:
                found = ""
            if found != etag:
                raise ConflictError(
                    f"{self._target(name)} was written by another meanwhile: look at what it is now, and try again",
                    uri=self.uri,
                    name=name,
                )
            yield
