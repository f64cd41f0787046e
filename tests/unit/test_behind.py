"""Work behind a load: what it used is let go of when it counts as done."""

from __future__ import annotations

import concurrent.futures.thread
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from weightcache.behind import Behind


class Model:
    def store(self, content: bytes) -> None:
        pass


def test_g13_what_work_used_is_gone_when_all_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread pool holds its last work item for a moment longer than its future is pending."""
    run = concurrent.futures.thread._WorkItem.run
    gone = threading.Event()

    def run_and_linger(item: Any) -> None:
        run(item)
        gone.wait(10)

    monkeypatch.setattr(concurrent.futures.thread._WorkItem, "run", run_and_linger)
    gc.disable()
    try:
        with ThreadPoolExecutor(1) as writers:
            behind = Behind(writers)
            model = Model()
            seen = weakref.ref(model)
            behind.submit(model.store, b"content")
            behind.seal(lambda: None)
            assert behind.settled.wait(10)
            del model
            assert seen() is None
            gone.set()
    finally:
        gone.set()
        gc.enable()


def test_the_last_thing_is_done_when_all_else_is() -> None:
    done: list[str] = []
    with ThreadPoolExecutor(2) as writers:
        behind = Behind(writers)
        for number in range(5):
            behind.submit(done.append, str(number))
        behind.seal(lambda: done.append("last"))
        assert behind.settled.wait(10)
    assert (sorted(done[:-1]), done[-1]) == ([str(number) for number in range(5)], "last")
