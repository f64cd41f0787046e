"""Own writing below an fsspec URL as registries need it, as well as its file system can.

Never claims a condition that the file system does not keep: few can refuse to overwrite, and none to overwrite a changed
file, so `put` looks before it writes, and whoever writes between loses what was there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime

from weightcache.errors import ConflictError, ModelNotFoundError
from weightcache.origins.base import Entry
from weightcache.origins.generic import UNNAMED, FsspecOrigin


class WritableFsspec(FsspecOrigin):
    """A folder behind any fsspec URL that is written to."""

    async def entries(self, prefix: str) -> Sequence[Entry]:
        self.ledger.n_lists += 1
        return await self._call(lambda: self._entries(prefix))

    async def put(self, name: str, content: bytes | memoryview, only_if: str | None = None) -> None:
        if only_if is not None:
            try:
                found = (await self._call(lambda: self._look_at(name))).etag or UNNAMED
            except ModelNotFoundError:
                found = ""
            if found != only_if:
                raise ConflictError(
                    f"{self._path(name)} was written by another meanwhile: look at what it is now, and try again",
                    uri=self.uri,
                    name=name,
                )
        await self._call(lambda: self._put(name, bytes(content)))

    async def delete(self, name: str) -> None:
        try:
            await self._call(lambda: self._filesystem().rm_file(self._path(name)))
        except ModelNotFoundError:
            pass

    async def has_conditions(self) -> bool:
        return False

    def _put(self, name: str, content: bytes) -> None:
        fs, path = self._filesystem(), self._path(name)
        fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        fs.pipe_file(path, content)

    def _entries(self, prefix: str) -> Sequence[Entry]:
        fs = self._filesystem()
        root = fs._strip_protocol(self.uri).rstrip("/")
        below = f"{root}/{prefix}".rpartition("/")[0]
        try:
            found = self._find(fs, below)
        except FileNotFoundError:
            return []
        start = below[len(root) :].strip("/")
        names = ((f"{start}/{name}" if start else name, info) for name, info in found.items())
        return [Entry(name, int(info["size"] or 0), _time_of(info)) for name, info in names if name.startswith(prefix)]


def _time_of(info: object) -> float:
    """Return when a file was written; never, where its file system does not say, so that nobody takes it for old."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        value = info.get(key) if isinstance(info, dict) else None
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):
            try:
                return datetime.fromisoformat(value).timestamp()
            except ValueError:
                continue
    return math.inf
