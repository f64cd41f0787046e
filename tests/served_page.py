"""Own the daemon's page as tests see it: served on 127.0.0.1 at a free port by a thread, from a state that a test holds.

Never runs a daemon.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any, Self

import uvloop

from weightcache.daemon.web import serve

PATIENCE_S = 20.0


class ServedPage:
    """The page of `state`, which may be changed while it is served."""

    def __init__(self, state: dict[str, Any], host: str = "127.0.0.1", port: int = 0) -> None:
        self.state = state
        self.why_not = ""  # not ready
        self.port = 0
        self._address = host, port
        self._loop = uvloop.new_event_loop()
        self._ends = asyncio.Event()
        self._begun = threading.Event()
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, name="served-page")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._begun.wait(PATIENCE_S)
        if self._failures:
            self._thread.join()
            raise self._failures[0]
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ends.set)
            self._thread.join()

    close = __exit__

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as exc:
            self._failures.append(exc)
        finally:
            self._begun.set()
            self._loop.close()

    async def _serve(self) -> None:
        metrics = "# TYPE weightcache_a_total counter\nweightcache_a_total 1\n"
        site = await serve(lambda: self.state, lambda: metrics, lambda: self.why_not, self._address)
        try:
            self.port = site.port
            self._begun.set()
            await self._ends.wait()
        finally:
            await site.close()


Serve = Callable[..., ServedPage]
