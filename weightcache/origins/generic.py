"""Own any fsspec URL that has no faster way of its own: gs, az, hf, memory and the like.

Never trusts a file system to honour a range: what comes back must have the length that was asked for.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, TypeVar

import fsspec

from weightcache.errors import (
    AccessDeniedError,
    ConfigError,
    FormatError,
    ModelNotFoundError,
    OriginChangedError,
    TransientOriginError,
    WeightcacheError,
)
from weightcache.ledger import Ledger
from weightcache.origins.base import Small, Stat
from weightcache.origins.pace import Throttle

T = TypeVar("T")

UNNAMED = "unnamed"  # the state of a small file whose file system tells no states apart


class FsspecOrigin:
    """A folder behind any fsspec URL; its blocking calls run on threads of its own.

    Args:
        scheme: The fsspec protocol.
        uri: The folder's URL.
        storage_options: Handed to the file system as they are.
        throttle: The bandwidth this process may use.
        n_threads: Calls in flight.
        file: The one file of the folder that counts, if a file was named.
    """

    def __init__(
        self,
        scheme: str,
        uri: str,
        storage_options: Mapping[str, Any],
        throttle: Throttle,
        n_threads: int,
        file: str | None = None,
    ) -> None:
        self._scheme = scheme
        self._uri = uri
        self._file = file
        self._options = dict(storage_options)
        self._throttle = throttle
        self._threads = ThreadPoolExecutor(n_threads, "weightcache-origin")
        self._fs: Any = None
        self.ledger = Ledger()

    @property
    def ledgers(self) -> Sequence[Ledger]:
        return [self.ledger]

    @property
    def uri(self) -> str:
        return self._uri

    async def list(self) -> Sequence[Stat]:
        self.ledger.n_lists += 1
        return await self._call(self._list)

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        stop = start + sum(len(view) for view in views)
        self.ledger.n_gets += 1
        body = await self._call(lambda: self._filesystem().cat_file(self._path(stat.path), start=start, end=stop))
        self.ledger.received_bytes += len(body)
        await asyncio.sleep(self._throttle.pause_s(len(body)))
        if len(body) != stop - start:
            await self.check_unchanged([stat])  # a file that shrank is no transient failure
            raise TransientOriginError(
                f"the server answered {len(body)} bytes, expected the {stop - start} of [{start}, {stop})"
            )
        at = 0
        for view in views:
            view[:] = body[at : at + len(view)]
            at += len(view)

    async def get(self, name: str, limit_nbytes: int) -> Small:
        self.ledger.n_gets += 1
        small = await self._call(lambda: self._get(name, limit_nbytes))
        self.ledger.received_bytes += len(small.content)
        return small

    def drop(self) -> None:
        pass  # a call that blocks a thread cannot be broken off

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)  # a stalled call may take as long as it likes

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        """Raise OriginChangedError unless the files are still in these states; there is no If-Match in fsspec."""
        await self._call(lambda: self._filesystem().invalidate_cache())
        for stat in stats:
            if await self._call(functools.partial(self._look_at, stat.path)) != stat:
                raise OriginChangedError(
                    f"{self._uri}/{stat.path} changed while it was read; load again when its writer is done"
                )

    async def _call(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: self._translated(work))

    def _translated(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except WeightcacheError:
            raise
        except FileNotFoundError as exc:
            raise ModelNotFoundError(f"nothing at {self._uri} ({exc}): check the name", uri=self._uri) from exc
        except PermissionError as exc:
            raise AccessDeniedError(
                f"{self._scheme} refused access to {self._uri}: check the credentials", uri=self._uri
            ) from exc
        except (ImportError, TypeError, ValueError) as exc:
            raise ConfigError(f"the {self._scheme} file system cannot be used for {self._uri}: {exc}") from exc
        except Exception as exc:
            status = getattr(exc, "status", None) or getattr(exc, "code", None)
            if status in (401, 403):
                raise AccessDeniedError(f"{self._uri} answered {status}: check the credentials", uri=self._uri) from exc
            raise TransientOriginError(f"{self._uri}: {type(exc).__name__}: {exc}") from exc

    def _filesystem(self) -> Any:
        if self._fs is None:
            self._fs = fsspec.filesystem(self._scheme, **{"use_listings_cache": False, **self._options})
        return self._fs

    def _path(self, name: str) -> str:
        return f"{self._uri}/{name}"

    def _look_at(self, name: str) -> Stat:
        return self._stat(name, self._filesystem().info(self._path(name)))

    def _get(self, name: str, limit_nbytes: int) -> Small:
        stat = self._look_at(name)
        if stat.nbytes > limit_nbytes:
            raise FormatError(f"{self._path(name)} has {stat.nbytes} bytes, expected at most {limit_nbytes}")
        return Small(self._filesystem().cat_file(self._path(name)), stat.etag or UNNAMED)

    def _list(self) -> Sequence[Stat]:
        fs = self._filesystem()
        fs.invalidate_cache()  # some keep listings whatever they are told, and fsspec keeps them for the whole process
        if self._file is not None:
            return [self._look_at(self._file)]
        root = fs._strip_protocol(self._uri).rstrip("/")
        found = self._find(fs, root)
        if not found:
            raise ModelNotFoundError(
                f"nothing at {self._uri}: expected a folder with safetensors; check the name and the credentials",
                uri=self._uri,
            )
        return [self._stat(name, info) for name, info in sorted(found.items())]

    def _find(self, fs: Any, root: str) -> dict[str, Mapping[str, Any]]:
        listed = fs.find(root, detail=True)
        names = ((path[len(root) :].removeprefix("/"), info) for path, info in listed.items())
        return {name: info for name, info in names if name and not name.endswith("/")}  # markers of folders

    def _stat(self, name: str, info: Mapping[str, Any]) -> Stat:
        if info.get("size") is None:
            raise ModelNotFoundError(
                f"{self._uri}/{name}: the server does not say its size (Content-Length), so no range of it can be "
                "planned; serve it from a server that does",
                uri=self._uri,
            )
        states = (
            "ETag",
            "etag",
            "md5Hash",
            "Content-MD5",
            "blob_id",
            "mtime",
            "LastModified",
            "last_modified",
            "updated",
            "created",
        )
        state = next((info[key] for key in states if info.get(key)), "")
        # Some file systems list a number of seconds and look up a datetime.
        return Stat(name, int(info["size"]), str(state.timestamp() if isinstance(state, datetime) else state))
