"""Own a network that is a spy: registries at hosts, what goes wrong there, and every dial in the order it happened.

Never opens a socket: what lies below `Plane._ask` is played here, on a loop whose clock may be turned.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from weightcache.errors import (
    ConflictError,
    ModelNotFoundError,
    OriginChangedError,
    TransientOriginError,
)
from weightcache.origins.answers import Answer
from weightcache.origins.base import Entry
from weightcache.origins.pace import throttle
from weightcache.origins.plane import Plane, Wiring, host_of
from weightcache.origins.web import WebOrigin

FAULTS = ("down", "404", "403", "500", "503", "stall", "slow", "breaks", "rotten", "lacks", "redirect")
ROOT = "registry"
TAKES_S = 0.02
STALLS_S = 15.0
SLOW_S = 4.0


@dataclass
class Spot:
    """A registry at a host.

    Attributes:
        host: Its name.
        site: Where its bytes lie.
        files: By name below its root.
        fault: One of FAULTS, or "ok".
        since: How many requests it answers before that begins.
        below: The names that it strikes begin so.
        leads_to: The host that "redirect" names.
    """

    host: str
    site: Mapping[str, str]
    files: dict[str, bytes] = field(default_factory=dict, repr=False)
    fault: str = "ok"
    since: int = 0
    below: str = ""
    leads_to: str = ""
    n_asked: int = field(default=0, repr=False)
    n_written: int = field(default=0, repr=False)
    etags: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def url(self) -> str:
        return f"https://{self.host}/{ROOT}"

    def strikes(self, name: str) -> str:
        """Count a request, and return what goes wrong with it."""
        self.n_asked += 1
        return self.fault if self.n_asked > self.since and name.startswith(self.below) else "ok"

    def etag(self, name: str) -> str:
        return self.etags.get(name, '"0"')

    def write(self, name: str, content: bytes) -> None:
        self.n_written += 1
        self.files[name], self.etags[name] = content, f'"{self.n_written}"'


@dataclass(frozen=True)
class Dial:
    """A request as it reached a host: what it wanted of which file, of the registry at which spot."""

    host: str
    method: str
    name: str
    spot: Spot


class Network:
    """Hosts by name. `events` has every dial; who watches rulings adds them in between."""

    def __init__(self, spots: Sequence[Spot]) -> None:
        self.spots = {spot.host: spot for spot in spots}
        self.events: list[Any] = []

    @property
    def dials(self) -> list[Dial]:
        return [event for event in self.events if isinstance(event, Dial)]

    async def ask(
        self, plane: SpyPlane, method: str, url: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[str, Answer]:
        """Return what a host says to a request, and what is wrong with it."""
        parts = urlsplit(url)
        host, _, name = unquote(parts.path).rpartition(f"/{ROOT}/")
        dialled, host = host_of(url).name, host.removeprefix("/for/")  # whom a redirect's target stands in for
        spot = self.spots[host or dialled]
        self.events.append(Dial(dialled, method, name, spot))
        fault = "ok" if host else spot.strikes(name)
        await plane.pause(STALLS_S if fault == "stall" else SLOW_S if fault == "slow" else TAKES_S)
        if fault in ("down", "stall"):
            raise TransientOriginError(f"no answer from {dialled}", received_bytes=0)
        if fault == "lacks" and name.startswith("chunks/") and int(name[-1], 16) % 2:
            return fault, _answer(404)
        if fault.isdecimal():
            return fault, _answer(int(fault), **({"retry-after": "1"} if fault == "503" else {}))
        if fault == "redirect":
            return fault, _answer(307, location=f"https://{spot.leads_to}/for/{spot.host}/{ROOT}/{name}?{parts.query}")
        return fault, _serve(spot, method, name, parse_qs(parts.query), headers, body)


def _serve(
    spot: Spot, method: str, name: str, query: Mapping[str, list[str]], headers: Mapping[str, str], body: bytes
) -> Answer:
    if "list" in query:
        found = [
            [each, len(content), 1000.0] for each, content in spot.files.items() if each.startswith(query["list"][0])
        ]
        return _answer(200, json.dumps(found).encode())
    etag = spot.etag(name) if name in spot.files else ""
    if method == "PUT":
        wanted = headers.get("If-Match", "" if "If-None-Match" in headers else etag)
        if wanted != etag:
            return _answer(412)
        spot.write(name, body)
        return _answer(200)
    if method == "DELETE":
        spot.files.pop(name, None)
        return _answer(204)
    if name not in spot.files:
        return _answer(404)
    content = spot.files[name]
    if "Range" in headers:
        start, last = map(int, headers["Range"].removeprefix("bytes=").split("-"))
        part = content[start : last + 1]
        return _answer(206, part, etag=etag, **{"content-range": f"bytes {start}-{last}/{len(content)}"})
    return _answer(200, content, etag=etag)


def _answer(status: int, body: bytes = b"", **headers: str) -> Answer:
    told = {"content-length": str(len(body)), **headers}
    return Answer(status, tuple((name.encode(), value.encode()) for name, value in told.items()), body)


class SpyPlane(Plane):
    """A data plane whose dials go to a Network; redirects are followed, or not, as ever."""

    def __init__(self, network: Network, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._network = network
        self._pauses: set[asyncio.Future[None]] = set()

    async def _ask(
        self, method: str, url: str, headers: Any, judge: Any, views: Any, limit: Any, is_listing: Any, body: Any
    ) -> Answer:
        self._ledger.n_gets += 1
        fault, answer = await self._network.ask(self, method, url, headers, bytes(body))
        if not judge(answer):
            if fault == "breaks":
                raise TransientOriginError("the answer broke off", received_bytes=0)
            if fault == "rotten" and method == "GET" and "/revisions/" in urlsplit(url).path:
                answer = replace(answer, body=answer.body[:-1])
            self._ledger.received_bytes += len(answer.body)
            return answer
        content = answer.body
        if fault == "rotten":
            content = bytes(255 - byte for byte in content)
        if fault == "breaks":
            content = content[: len(content) * 2 // 3]
        self._ledger.received_bytes += len(content)
        at = 0
        for view in views:
            part = content[at : at + len(view)]
            view[: len(part)] = part
            at += len(view)
        if fault == "breaks":
            raise TransientOriginError("the body broke off", received_bytes=len(content))
        return answer

    async def pause(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        over = loop.create_future()
        timer = loop.call_later(seconds, lambda: over.done() or over.set_result(None))
        self._pauses.add(over)
        try:
            await over
        finally:
            timer.cancel()
            self._pauses.discard(over)

    def drop(self) -> None:
        for over in self._pauses:
            if not over.done():
                over.set_exception(TransientOriginError("left", is_left=True, received_bytes=0))


class SpyOrigin(WebOrigin):
    """A registry of the network. Reads are a web folder's own; writes are asked for as S3's are."""

    def __init__(self, network: Network, uri: str, wiring: Wiring) -> None:
        super().__init__(uri, {}, wiring, throttle(0))
        self._plane = SpyPlane(network, uri, wiring, self.ledger, throttle(0))

    async def entries(self, prefix: str) -> Sequence[Entry]:
        answer = await self._plane.request(
            "GET", f"{self._url('')}?list={prefix}", {}, lambda answer: False, limit_nbytes=1 << 30, is_listing=True
        )
        if answer.status >= 300:
            raise self._refusal(answer, prefix)
        return [Entry(*each) for each in json.loads(answer.body)]

    async def put(self, name: str, content: bytes | memoryview, only_if: str | None = None) -> None:
        conditions = {} if only_if is None else {"If-Match": only_if} if only_if else {"If-None-Match": "*"}
        answer = await self._plane.request("PUT", self._url(name), conditions, lambda answer: False, body=content)
        if answer.status >= 300:
            error = self._refusal(answer, name)
            if (isinstance(error, OriginChangedError) and only_if is not None) or (
                isinstance(error, ModelNotFoundError) and only_if
            ):
                raise ConflictError(f"{name} was written by another") from error
            raise error

    async def delete(self, name: str) -> None:
        answer = await self._plane.request("DELETE", self._url(name), {}, lambda answer: False)
        if answer.status >= 300:
            raise self._refusal(answer, name)

    async def has_conditions(self) -> bool:
        return True
