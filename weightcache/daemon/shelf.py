"""Own models that are open to be read by several at once: described anew every few seconds, closed when nobody reads them.

Never reads one. Everything here runs on one loop; opening and closing wait on threads.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from weightcache.errors import WeightcacheError
from weightcache.reading import OpenModel

REUSE_S = 2.0  # a client asks several things at once, each of which would cost a listing


@dataclass
class _Shelved:
    """A model that is open, or being opened, until its time is up and nobody reads it."""

    opening: asyncio.Future[OpenModel]
    n_users: int = 0
    is_due: bool = False


class Shelf:
    """Open models by their URIs.

    Args:
        open_now: Opens one; called on a thread.
        on_thread: Waits for a call that a thread makes.
    """

    def __init__(self, open_now: Callable[[str], OpenModel], on_thread: Callable[..., Awaitable[Any]]) -> None:
        self._open_now = open_now
        self._on_thread = on_thread
        self._models: dict[str, _Shelved] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close all models, each when nobody reads it. May be called twice."""
        for uri in list(self._models):
            self._expire(uri)
        await asyncio.gather(*self._closing)

    @contextlib.asynccontextmanager
    async def open(self, uri: str) -> AsyncIterator[OpenModel]:
        """Hold a model open for the length of the block; described anew when that is longer ago than REUSE_S."""
        shelved = self._models.get(uri)
        if shelved is None:
            loop = asyncio.get_running_loop()
            shelved = self._models[uri] = _Shelved(asyncio.ensure_future(self._on_thread(self._open_now, uri)))
            loop.call_later(REUSE_S, self._expire, uri, shelved)
        shelved.n_users += 1
        try:
            # Shielded: others wait for the same one.
            yield await asyncio.shield(shelved.opening)
        except WeightcacheError:
            self._expire(uri, shelved)
            raise
        finally:
            shelved.n_users -= 1
            self._close_unused(shelved)

    def _expire(self, uri: str, only: _Shelved | None = None) -> None:
        """Describe a model anew at the next request."""
        shelved = self._models.get(uri)
        if shelved is not None and only in (None, shelved):
            del self._models[uri]
            shelved.is_due = True
            self._close_unused(shelved)

    def _close_unused(self, shelved: _Shelved) -> None:
        if not shelved.is_due or shelved.n_users:
            return
        shelved.is_due = False

        async def close() -> None:
            with contextlib.suppress(WeightcacheError):
                model = await shelved.opening
                await self._on_thread(model.close)

        task = asyncio.create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
