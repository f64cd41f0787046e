"""Connections on their way when their origin is left for another."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack

import pytest

from weightcache import errors
from weightcache.ledger import Ledger
from weightcache.origins.pace import throttle
from weightcache.origins.plane import Plane, Wiring


def test_a_connection_that_is_being_made_is_given_up_when_its_origin_is_left() -> None:
    with ExitStack() as held:
        listener = held.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(2):  # and nobody else gets through
            queued = held.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(listener.getsockname())

        async def leave() -> None:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/file"
            plane = Plane(url, Wiring(60.0), Ledger(), throttle(0))
            asking = asyncio.create_task(plane.request("GET", url, {}, lambda answer: False))
            await asyncio.sleep(0)  # it begins
            plane.drop()
            async with asyncio.timeout(10):
                with pytest.raises(errors.TransientOriginError, match=r"no connection to .* in 0\.\d s"):
                    await asking
            await plane.close()

        asyncio.run(leave())
