"""Own listening for HTTP, and the knowledge of who came by another name (DNS rebinding).

Never decides what is answered.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from weightcache.errors import ConfigError

if TYPE_CHECKING:
    from aiohttp import web

CLOSE_S = 1.0  # what is not answered by then, at the end, is cut off


class Listener:
    """A server of HTTP that listens."""

    def __init__(self, runner: web.ServerRunner) -> None:
        self._runner = runner

    @property
    def port(self) -> int:
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stop listening, and close all connections. May be called twice."""
        await self._runner.cleanup()


async def listen(
    what: str, address: tuple[str, int], answer: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
) -> Listener:
    """Answer on this loop until the listener is closed.

    Args:
        what: Whose answers these are, for errors.
        address: Host and port; port 0 takes a free one.

    Raises:
        ConfigError: aiohttp is not installed, or nobody can listen there.
    """
    try:
        from aiohttp import web
    except ModuleNotFoundError as exc:
        raise ConfigError(f'{what} needs the extra of the daemon: pip install "weightcache[daemon]"') from exc
    host, port = address
    runner = web.ServerRunner(web.Server(answer, access_log=None), shutdown_timeout=CLOSE_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as exc:
        await runner.cleanup()
        raise ConfigError(
            f"{what} cannot listen at {host}:{port} ({exc.strerror or exc}): set another address, or port 0 for a free one"
        ) from exc
    return Listener(runner)


def is_named_so(hosts: list[str], listens_at: str) -> bool:
    """Tell whether a request's Host headers name this machine as it may be named: as loopback, or as it was configured.

    A page of another site that lets its own name point here sends that name. Where the daemon listens at every address of
    the machine, any address will do: an address cannot be pointed elsewhere.
    """
    parts = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(:\d{1,5})?", hosts[0]) if len(hosts) == 1 else None
    if parts is None:
        return False
    name = parts[1].strip("[]").lower()
    if name in ("localhost", listens_at.lower()):
        return True
    try:
        named = ipaddress.ip_address(name)
    except ValueError:
        return False
    return named.is_loopback or (listens_at in ("0.0.0.0", "::"))
