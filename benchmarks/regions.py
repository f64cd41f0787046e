"""Own the three regions: one folder served behind three links, what befalls the nearest, and what came from each when.

Never loads anything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

from links import LinkShape
from web import Web, WebShape

STORE = "regions"
NEAR, MIDDLE, FAR = "near", "middle", "far"
SHAPES = {NEAR: LinkShape(20, 1000), MIDDLE: LinkShape(40, 500), FAR: LinkShape(80, 200)}
SLOW_SHARE = 0.1
SAMPLE_S = 0.02
WINDOW_S = 0.25  # over which it is asked who gave more: 31 MB of the nearest, two ranges
HELD_S = 1.0  # so long it must stay so: a range or two asked for beside are not yet a choice


class NeverBefell(RuntimeError):
    """A region was left before what was to befall it could: this machine was busy, and the run says nothing."""


class Sample(NamedTuple):
    """What had come so far from the nearest region, and from the others together."""

    at_s: float
    near: int
    others: int


class Regions:
    """An nginx behind each of SHAPES, while the `with` block runs.

    Args:
        root: The folder that they serve, a registry.
        folder: For what they need themselves.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self._root = root
        self._webs = {name: Web(WebShape(link=shape), root.parent, folder / name) for name, shape in SHAPES.items()}
        self._held = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as held:
            for web in self._webs.values():
                held.enter_context(web)
            self._held = held.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def configuration(self, names: Sequence[str]) -> str:
        """Return the configuration of a node that knows these regions, as the replicas of STORE."""
        lines = [f"[stores.{STORE}]"]
        for name in names:
            url = f"{self._webs[name].endpoint}/{self._root.name}"
            lines += [f"[[stores.{STORE}.replicas]]", f'name = "{name}"', f'url = "{url}"']
        return "\n".join(lines) + "\n"

    def cpu_s(self) -> float:
        """Return the CPU seconds that the servers have used."""
        return sum(web.cpu_s() for web in self._webs.values())

    def describe(self) -> dict[str, Any]:
        """Say how long dialling takes, by region."""
        return {"dial_ms": {name: web.describe()["dial_ms"] for name, web in self._webs.items()}}

    @contextmanager
    def watching(self, event: str, after_nbytes: int) -> Iterator[dict[str, Any]]:
        """Watch what comes while the block runs, and let something happen to the nearest region meanwhile.

        Args:
            event: `cut`: nothing comes through its link any more; `killed`: its server ends; `slowed`: its link has
                SLOW_SHARE of its rate; or empty.
            after_nbytes: So many have come from it then.

        Yields what is filled in when the block ends: `near_share` of all bytes, and after an event `left_after_s`, see
            `left_after_s`. Then all is as it was.
        """
        seen: dict[str, Any] = {}
        samples = [self._sample()]
        ended = threading.Event()
        event_at: list[float] = []

        def watch() -> None:
            while not ended.wait(SAMPLE_S):
                samples.append(self._sample())
                if event and not event_at and samples[-1].near - samples[0].near >= after_nbytes:
                    self._befall(event)
                    event_at.append(time.perf_counter())

        watcher = threading.Thread(target=watch, name="regions-watch")
        watcher.start()
        try:
            yield seen
        finally:
            ended.set()
            watcher.join()
            self._mend()
        near, others = samples[-1].near - samples[0].near, samples[-1].others - samples[0].others
        seen["near_share"] = near / (near + others)
        if event and not event_at:
            raise NeverBefell(f"only {near} bytes came from the nearest region, so it was never {event}")
        if event:
            seen["left_after_s"] = left_after_s(samples, event_at[0])

    def _sample(self) -> Sample:
        near, *others = (web.link.received_bytes for web in self._webs.values() if web.link is not None)
        return Sample(time.perf_counter(), near, sum(others))

    def _befall(self, event: str) -> None:
        web = self._webs[NEAR]
        assert web.link is not None
        match event:
            case "cut":
                web.link.cut()
            case "killed":
                web.kill()
            case "slowed":
                web.link.slow(SLOW_SHARE)
            case _:
                raise ValueError(f"nothing is called {event!r}")

    def _mend(self) -> None:
        web = self._webs[NEAR]
        assert web.link is not None
        web.link.mend()
        web.start()


def left_after_s(samples: Sequence[Sample], event_at: float) -> float:
    """Return how long after an event at least half of all bytes came from elsewhere, and went on to for HELD_S.

    Where that never was, how long the load went on: to the last byte that came.
    """
    samples = [each for each in samples if (each.near, each.others) != (samples[-1].near, samples[-1].others)]
    since: float | None = None
    first = 0
    for sample in samples:
        while samples[first + 1].at_s <= sample.at_s - WINDOW_S:
            first += 1
        others, near = sample.others - samples[first].others, sample.near - samples[first].near
        if sample.at_s < event_at or not others or others < near:
            since = None
        elif since is None:
            since = sample.at_s
        if since is not None and sample.at_s - since >= HELD_S:
            break
    return (since if since is not None else samples[-1].at_s) - event_at
