"""Reads of a folder of this machine that are broken off: whoever waits for one waits until nothing more is written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from weightcache.origins.base import Stat
from weightcache.origins.local import LocalOrigin

CONTENT = bytes(range(256)) * 16


class Late(Executor):
    """Begins work at once, and goes on with it when it is let go."""

    def __init__(self) -> None:
        self.began, self.go_on = threading.Event(), threading.Event()
        self.threads: list[threading.Thread] = []

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            future.set_running_or_notify_cancel()
            self.began.set()
            self.go_on.wait()
            try:
                future.set_result(work(*arguments, **more))
            except Exception as exc:
                future.set_exception(exc)

        self.threads.append(threading.Thread(target=run, name="late"))
        self.threads[-1].start()
        return future


def test_a_read_that_is_cancelled_however_often_ends_when_nothing_more_is_written(tmp_path: Path) -> None:
    (tmp_path / "chunk").write_bytes(CONTENT)
    workers, memory = Late(), bytearray(len(CONTENT))

    async def work() -> bytes:
        origin = LocalOrigin(tmp_path, workers)
        reading = asyncio.create_task(origin.read_into(Stat("chunk", len(CONTENT), ""), 0, [memoryview(memory)]))
        await asyncio.to_thread(workers.began.wait)
        ended: list[bool] = []
        for _ in range(3):
            reading.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            ended.append(reading.done())
        workers.go_on.set()
        await asyncio.wait([reading])
        at_once = bytes(memory)
        for thread in workers.threads:
            await asyncio.to_thread(thread.join)
        assert (ended, reading.cancelled(), origin.ledger.received_bytes) == ([False] * 3, True, 0)
        return at_once

    assert asyncio.run(work()) == bytes(memory) == bytes(len(CONTENT))  # it was told to stop before it began


def test_what_was_read_is_counted(tmp_path: Path) -> None:
    (tmp_path / "chunk").write_bytes(CONTENT)
    workers, memory = Late(), bytearray(100)
    workers.go_on.set()

    async def work() -> int:
        origin = LocalOrigin(tmp_path, workers)
        await origin.read_into(Stat("chunk", len(CONTENT), ""), 7, [memoryview(memory)])
        return origin.ledger.received_bytes

    assert asyncio.run(work()) == 100
    assert bytes(memory) == CONTENT[7:107]
