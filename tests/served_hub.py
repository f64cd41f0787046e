"""Own a Hub face that answers on a thread of the test's process, and questions to it that no client would ask so."""

from __future__ import annotations

import asyncio
import http.client
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import uvloop

from weightcache.daemon.hub import Hub
from weightcache.daemon.settings import HubSettings

PATIENCE_S = 300.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class ServedHub:
    """The Hub face of these models, by the settings that this process's environment names."""

    def __init__(self, models: Mapping[str, str], upstream: str = "") -> None:
        self.hub = Hub(HubSettings(models=models, upstream=upstream), may_attach=False)
        self.port = 0
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="served-hub")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self.hub.serve(("127.0.0.1", 0)), self._loop).result(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.hub.close(), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """Ask for a path as it is; `Accept_Encoding` is spelled with a dash."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()
