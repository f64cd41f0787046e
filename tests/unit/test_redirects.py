"""Redirects to other hosts: each is ruled on before it is followed, whatever was asked, and what writes never follows one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from spy_network import Network, Spot, SpyOrigin

from weightcache import errors
from weightcache.origins.base import Stat
from weightcache.origins.plane import Host, Wiring

CDN = "cdn.example"
SITE = {"provider": "", "region": "", "jurisdiction": ""}
READS: dict[str, Callable[[SpyOrigin], Awaitable[Any]]] = {
    "a small file": lambda origin: origin.get("a", 100),
    "a range": lambda origin: origin.read_into(Stat("a", 4, ""), 1, [memoryview(bytearray(2))]),
    "its size": lambda origin: origin._look_at(["a"]),
    "a page of links": lambda origin: origin._links(""),
    "a listing": lambda origin: origin.entries("a"),
}
WRITES: dict[str, Callable[[SpyOrigin], Awaitable[Any]]] = {
    "put": lambda origin: origin.put("b", b"content"),
    "put of nothing": lambda origin: origin.put("b", b""),
    "put on a condition": lambda origin: origin.put("b", b"", only_if=""),
    "delete": lambda origin: origin.delete("a"),
}


class Asked:
    """A registry that redirects all, and who is asked whether that may be followed."""

    def __init__(self, *, forbids: bool, hosts: tuple[str, ...] = (CDN,)) -> None:
        self.spot = Spot("replica.example", SITE, {"a": b"abcd"}, fault="redirect", leads_to=CDN)
        self.network = Network([self.spot])
        self.hosts: list[Host] = []
        self._forbids = forbids
        wiring = Wiring(5.0, proxies={}, redirect_hosts=hosts, check_redirect=self._check)
        self.origin = SpyOrigin(self.network, self.spot.url, wiring)

    def _check(self, host: Host) -> None:
        assert [dial.host for dial in self.network.dials] == [self.spot.host] * (len(self.hosts) + 1)
        self.hosts.append(host)
        if self._forbids:
            raise errors.ResidencyError(f"not from {host.name}")

    def do(self, work: Callable[[SpyOrigin], Awaitable[Any]]) -> list[str]:
        """Do something; return whom that dialled."""

        async def run() -> None:
            try:
                await work(self.origin)
            finally:
                await self.origin.close()

        asyncio.run(run())
        return [dial.host for dial in self.network.dials]


@pytest.mark.parametrize("what", READS)
def test_g26_a_redirect_that_is_forbidden_is_not_followed(what: str) -> None:
    asked = Asked(forbids=True)
    with pytest.raises(errors.ResidencyError, match=r"not from cdn\.example"):
        asked.do(READS[what])
    assert [dial.host for dial in asked.network.dials] == [asked.spot.host]


@pytest.mark.parametrize("what", READS)
def test_a_redirect_that_is_allowed_is_followed(what: str) -> None:
    asked = Asked(forbids=False)
    assert asked.do(READS[what]) == [asked.spot.host, CDN]
    assert asked.hosts == [Host("https", CDN, 443)]


@pytest.mark.parametrize("what", WRITES)
@pytest.mark.parametrize("forbids", [False, True])
def test_g26_what_writes_follows_no_redirect(what: str, forbids: bool) -> None:
    asked = Asked(forbids=forbids)
    with pytest.raises(errors.ResidencyError if forbids else errors.OriginError):
        asked.do(WRITES[what])
    assert [dial.host for dial in asked.network.dials] == [asked.spot.host]
    assert asked.spot.files == {"a": b"abcd"}


@pytest.mark.parametrize("what", [*READS, *WRITES])
def test_g28_a_host_that_is_not_configured_is_not_dialled(what: str) -> None:
    asked = Asked(forbids=False, hosts=())
    with pytest.raises(errors.OriginError, match="name it in redirect_hosts"):
        asked.do((READS | WRITES)[what])
    assert [dial.host for dial in asked.network.dials] == [asked.spot.host]
