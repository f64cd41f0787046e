"""Own the process's threads: one loop thread (asyncio on uvloop), workers that read and verify, writers behind.

Never holds a model or a file. Threads start at first use and are named weightcache-*; after a fork the child starts
its own.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import gc
import logging
import os
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, Generic, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

N_WRITERS = 2
EXIT_PATIENCE_S = 60.0


class Runtime:
    """The threads. `workers` and `writers` are executors; coroutines run through `run`."""

    def __init__(self, n_workers: int) -> None:
        import uvloop

        self.n_workers = n_workers
        self.loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        self.workers = concurrent.futures.ThreadPoolExecutor(n_workers, "weightcache-worker")
        self.writers = concurrent.futures.ThreadPoolExecutor(N_WRITERS, "weightcache-writer")
        self._under_way: set[asyncio.Task[None]] = set()  # the loop thread's, as is what follows
        self._is_stopped = False
        self._thread = threading.Thread(target=self._serve, name="weightcache-loop", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Job[T]:
        """Start a coroutine on the loop thread."""
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("weightcache was called from its own loop thread")
        return Job(self.loop, coroutine, self._enter)

    def _enter(self, task: asyncio.Task[None]) -> None:
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        if self._is_stopped:
            task.cancel()

    def submit(self, work: Callable[..., T], *arguments: object) -> tuple[concurrent.futures.Future[None], list[T]]:
        """Have a worker thread do work. Returns its future, and a list that holds the result when that is done."""
        outcome: list[T] = []
        held = [(work, arguments)]

        def step() -> None:
            # Popped, so that what it holds is let go of before it counts as done, not a moment later; and not as the
            # future's result: a future that a loop waited for is part of a cycle, and the views of memory it held
            # would keep a whole image until garbage is collected.
            work, arguments = held.pop()
            outcome.append(work(*arguments))

        return self.workers.submit(step), outcome

    async def on_worker(self, work: Callable[..., T], *arguments: object) -> T:
        """Have a worker thread do work, and wait for it. Cancelled, it goes on by itself."""
        future, outcome = self.submit(work, *arguments)
        await asyncio.wrap_future(future)
        return outcome.pop()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop thread and wait. Ctrl-C cancels it and waits until it has cleaned up."""
        job = self.start(coroutine)
        try:
            return job.result()
        except BaseException:
            job.cancel()
            raise
        finally:
            del job  # which holds the error, which holds this frame

    def stop(self) -> None:
        """Cancel every coroutine that was started, and each that still is, and drop writes that wait; then `close` is swift.

        Waits until those that ran have cleaned up.
        """
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result()
        self.writers.shutdown(wait=False, cancel_futures=True)

    async def _stop(self) -> None:
        self._is_stopped = True
        under_way = list(self._under_way)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    def close(self) -> None:
        """End all threads; writes that wait are finished first."""
        self.writers.shutdown(wait=True)
        self.workers.shutdown(wait=True, cancel_futures=True)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Job(Generic[T]):
    """A coroutine under way on the loop thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T],
        on_start: Callable[[asyncio.Task[None]], None],
    ) -> None:
        self._ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._given: list[T] = []
        self._loop = loop
        self._coroutine = coroutine
        self._task: asyncio.Task[None] | None = None
        self._on_start = on_start
        loop.call_soon_threadsafe(self._start)

    def result(self) -> T:
        """Wait until it has ended, and return what it returned, or raise what it raised. Once."""
        self._ended.result()
        return self._given.pop()

    def cancel(self) -> None:
        """Stop it, and wait until it has cleaned up. Does nothing when it is done."""
        if not self._ended.done():
            self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())
            concurrent.futures.wait([self._ended], timeout=EXIT_PATIENCE_S)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._finish)
        self._on_start(self._task)

    async def _run(self) -> None:
        # Not as the task's result: the loop thread holds the task a moment longer than the caller waits, and with it
        # would hold a model that the caller has let go of.
        self._given.append(await self._coroutine)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._coroutine.close()  # it may never have begun
        if task.cancelled():
            self._ended.set_exception(concurrent.futures.CancelledError())
        elif (exc := task.exception()) is not None:
            _let_go(exc)
            self._ended.set_exception(exc)
        else:
            self._ended.set_result(None)


async def ended(future: concurrent.futures.Future[T], stop: Callable[[], object]) -> T:
    """Wait for work of another thread. Cancelled, it is told to stop, and waited for nevertheless: nothing moves afterwards."""
    running = asyncio.wrap_future(future)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop()
        future.cancel()
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # seen: the cancellation is what is told
        raise


async def all_of(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines together and return what they returned. The first error ends all, and is raised when they have."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Let no garbage be collected during the block, which makes thousands of objects that stay.

    Each few hundred of them would have the collector walk what the process has, torch's half a million objects included:
    0.15 s at a time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _let_go(exc: BaseException | None) -> None:
    """Drop the locals of the frames that an error has left: they form cycles, and hold a model's memory."""
    while exc is not None:
        traceback.clear_frames(exc.__traceback__)
        if isinstance(exc, BaseExceptionGroup):
            for each in exc.exceptions:
                traceback.clear_frames(each.__traceback__)
        exc = exc.__context__


_lock = threading.Lock()
_current: Runtime | None = None


def runtime(n_workers: int = 0) -> Runtime:
    """Return the process's runtime, made at the first call.

    Args:
        n_workers: Worker threads if it is made now; 0 means as many as processors, at least 4 and at most 8 (four
            direct reads in flight reach the disk's ceiling, docs/decisions/003).
    """
    global _current
    with _lock:
        if _current is None:
            n_processors = len(os.sched_getaffinity(0))
            _current = Runtime(n_workers or min(8, max(4, n_processors)))
            atexit.register(_close, _current)
        return _current


def _close(owned: Runtime) -> None:
    global _current
    if _current is owned:
        owned.close()
        _current = None


def _after_fork_in_child() -> None:
    # The threads stayed in the parent; what they hold must not be waited for here.
    global _current, _lock
    _lock = threading.Lock()
    _current = None


os.register_at_fork(after_in_child=_after_fork_in_child)
