"""Own the measurements of gpu.py: the program of the subprocess that each step gets.

Never decides what is measured when. It hears a job as one line of JSON on its standard input, and prints each row as a
line of JSON as soon as it has it: what it measured before its time was over is not lost.

A job holds the step's name, when its time is over, the driver's library, the ordinal and NUMA node of the card, whether it is
`quick`, folders of models, and what earlier steps found best.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_parts as parts
import measuring
import numpy as np
import torch
from gpu_parts import MIB, Card, Files
from rows import GB, Row, Spread

from weightcache import _engine
from weightcache.operations import Operations

REPEATS = 5
COLD_REPEATS = 3
REGISTERED_NBYTES = 1 << 30  # at once, as the product does

LINK_TORCH = "link, torch pinned"
LINK_ENGINE = "link, engine registered"
RING = "page cache -> VRAM, ring"
HOST_RING = "host image -> VRAM, through the ring"
HOST_REGISTERED = "host image -> VRAM, registered"
CACHED = "page cache -> VRAM"
DISK_HOST = "disk -> host image, unverified"
DISK = "disk -> VRAM"
OURS, HOSTED, FIRST = "load_model", "load_model, hosted", "stream, first tensor"
WARM, COLD = ", page cache warm", ", page cache cold"


class Skipped(Exception):
    """A measurement cannot be made here; the message says why."""


class Step:
    """A step under way: its job, its card, its time, and where its rows go."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job
        self.quick: bool = job["quick"]

    @functools.cached_property
    def card(self) -> Card:
        return Card(self.job["library"], self.job["ordinal"], self.job["numa_node"])

    @property
    def left_s(self) -> float:
        return float(self.job["until_s"] - time.monotonic())  # the same clock in all processes

    def say(self, case: str, **row: Any) -> None:
        print(json.dumps({"case": case, **row}), flush=True)

    def measure(
        self,
        case: str,
        nbytes: int,
        run: Callable[[], Mapping[str, float] | None],
        *,
        before: Callable[[], str] = lambda: "",
        share: float = 0.5,
        repeats: int = REPEATS,
        **facts: Any,
    ) -> None:
        """Run a case so often as is wanted and as a share of the step's time allows, at least once; say the row.

        Args:
            run: What is timed; it may return `seconds` and `cpu_s` that it timed itself.
            before: Run before each, untimed; returns the page cache's state.
        """
        results: list[dict[str, Any]] = []
        until, slowest = time.monotonic() + share * self.left_s, 0.0
        while len(results) < repeats and (not results or time.monotonic() + slowest < until):
            began = time.monotonic()
            state, base = before(), _peak_from_now()
            timed, own = _timed(run)
            peak = max(0, _peak() - base)
            results.append({**timed, **(own or {}), "peak_bytes": peak, "page_cache": state, "facts": facts})
            slowest = max(slowest, time.monotonic() - began)
        self.say(**Row.of(case, nbytes, results).as_dict())

    @contextlib.contextmanager
    def trying(self, case: str) -> Iterator[None]:
        """Go on after the block if it fails, and say why it did."""
        try:
            yield
        except Skipped as reason:
            self.say(case, skipped=str(reason))
        except Exception as error:
            traceback.print_exc(limit=-3)
            self.say(case, failed=f"{type(error).__name__}: {error}")


def _timed(run: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    cpu, clock = time.process_time(), time.perf_counter()
    result = run()
    return {"seconds": time.perf_counter() - clock, "cpu_s": time.process_time() - cpu}, result


def _peak_from_now() -> int:
    with contextlib.suppress(OSError, AssertionError):  # some sandboxes have no such files
        measuring.reset_peak()
        return measuring.rss_nbytes()
    return 0


def _peak() -> int:
    with contextlib.suppress(OSError, AssertionError):
        return measuring.peak_nbytes()
    return 0


# -- the link, registration, the ring


def link(step: Step) -> None:
    """Copy page-locked memory to the card in pieces of 1 to 256 MiB, by torch and by the engine."""
    total = (64 if step.quick else 1024) * MIB
    pieces = [MIB << power for power in range(5 if step.quick else 9)]
    slab = step.card.allocate(total)
    with step.trying(LINK_TORCH):
        _link_torch(step, slab, pieces)
    with step.trying(LINK_ENGINE):
        source = parts.host_memory("transparent huge pages", total)
        for piece in pieces:  # from registered memory, a slot's bytes are one copy
            with step.card.open(piece, 4 if piece <= 64 * MIB else 2) as device:
                device.register(source.address, total)
                run = _runner(step, device, 2, lambda: parts.from_memory(source.address, total, slab.data_ptr()))
                run()
                step.measure(LINK_ENGINE, total, run, share=0.15, piece_mib=piece // MIB)
        step.say(LINK_ENGINE, right=parts.same_bytes(slab, source.bytes))


def _link_torch(step: Step, slab: torch.Tensor, pieces: list[int]) -> None:
    if not step.card.is_real:
        raise Skipped(parts.STAND_IN)
    source = torch.empty(pieces[-1], dtype=torch.uint8, pin_memory=True)
    source.fill_(1)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(piece: int) -> dict[str, float]:
        begin.record()
        for start in range(0, len(slab), piece):
            at = start % len(source)
            slab[start : start + piece].copy_(source[at : at + piece], non_blocking=True)
        end.record()
        end.synchronize()
        return {"seconds": begin.elapsed_time(end) / 1000}

    for piece in pieces:
        run(piece)
        step.measure(LINK_TORCH, len(slab), functools.partial(run, piece), share=0.1, piece_mib=piece // MIB)
    step.say("link state", **parts.pcie_link(step.card.driver.describe(step.card.ordinal)[1]))


def _runner(
    step: Step, device: _engine.Device, threads: int, batch: Callable[[], Operations]
) -> Callable[[], Mapping[str, float] | None]:
    """Return what carries out a new batch each time; putting it together is part of it, as in a load."""
    return lambda: measuring.carry_out(batch(), threads, target=step.card.target(device))


def register(step: Step) -> None:
    """Register memory by kind of page; copy from it made read-only, and across two registrations."""
    nbytes = (64 if step.quick else 1024) * MIB
    for kind in parts.HOST_MEMORY:
        with step.trying(f"register, {kind}"):
            _register(step, kind, nbytes)


def _register(step: Step, kind: str, nbytes: int) -> None:
    reserved = measuring.free_reserved_pages() * 2 * MIB
    if "hugetlb" in kind and reserved < nbytes:
        raise Skipped(f"{reserved // MIB} MiB of huge pages are reserved (vm.nr_hugepages), {nbytes // MIB} wanted")
    filled, memory = _timed(lambda: parts.host_memory(kind, nbytes))
    undone: list[float] = []

    def copy(case: str) -> None:
        slab.zero_()
        with step.trying(f"{case}, {kind}"):
            _runner(step, device, 2, lambda: parts.from_memory(memory.address, nbytes, slab.data_ptr()))()
            step.say(f"{case}, {kind}", right=parts.same_bytes(slab, memory.bytes))

    slab = step.card.allocate(nbytes)
    with step.card.open(8 * MIB, 4) as device:

        def run() -> dict[str, float]:
            timed, _ = _timed(lambda: device.register(memory.address, nbytes))
            undone.append(_timed(lambda: device.unregister(memory.address))[0]["seconds"])
            return timed

        step.measure(f"register, {kind}", nbytes, run, share=0.2, fill_s=filled["seconds"])
        step.say(f"unregister, {kind}", nbytes=nbytes, seconds=asdict(Spread.of(undone)))
        device.register(memory.address, nbytes)
        memory.protect(writable=False)
        copy("copy after mprotect(PROT_READ)")
        memory.protect(writable=True)
        device.unregister(memory.address)
        for start in (0, nbytes // 2):
            device.register(memory.address + start, nbytes // 2)
        copy("copy across two registrations")


def ring(step: Step) -> None:
    """Bring a model from the page cache to the card with rings of several shapes, and with several threads."""
    files = Files(Path(step.job["folder"]))
    slab = step.card.allocate(files.nbytes)
    state = measuring.make_warm(files.paths)
    cores, usual = len(os.sched_getaffinity(0)), _threads({})
    shapes = [(usual, slot, each) for each in (3, 2, 4) for slot in (8, 4, 16)]
    shapes += [(threads, 8, 3) for threads in (1, 2, 4, 8, 12, 16) if threads <= cores and threads != usual]
    for threads, slot, each in shapes:
        shape = {"threads": threads, "slot_nbytes": slot * MIB, "slots_a_thread": each}
        if step.left_s < 1:
            step.say(RING, skipped="no time left", ring=shape)
            continue
        with step.card.open(slot * MIB, threads * each) as device:
            batch = lambda: files.to_device(slab.data_ptr(), verified=files.can_verify)  # noqa: E731
            facts = {"ring": shape, "locking": device.ring()[0], "verified": files.can_verify}
            run = _runner(step, device, threads, batch)
            step.measure(RING, files.weight_nbytes, run, before=lambda: state, share=0.12, **facts)


def _threads(best: Mapping[str, int]) -> int:
    """Return the threads that were best, or those that a load has."""
    return best.get("threads") or min(max(len(os.sched_getaffinity(0)), 2), 8)


# -- whole models, by the engine


def paths(step: Step) -> None:
    """Bring a model to the card from the page cache, from an image in host memory, and at last from the disk."""
    files, best = Files(Path(step.job["folder"])), step.job["best"]
    nbytes, threads = files.weight_nbytes, _threads(best)
    slab = step.card.allocate(files.nbytes)
    facts = {"threads": threads, "verified": files.can_verify}

    def open_ring() -> AbstractContextManager[_engine.Device]:
        return step.card.open(best.get("slot_nbytes", 8 * MIB), threads * best.get("slots_a_thread", 3))

    def to_device() -> Operations:
        return files.to_device(slab.data_ptr(), verified=files.can_verify)

    with step.trying(CACHED), open_ring() as device:
        run = _runner(step, device, threads, to_device)
        step.measure(CACHED, nbytes, run, before=_warm(files), share=0.3, **facts)
    with step.trying(HOST_REGISTERED):
        _paths_from_host(step, files, slab, open_ring, threads)
    with step.trying(DISK), open_ring() as device:
        run = _runner(step, device, threads, to_device)
        step.measure(DISK, nbytes, run, before=_cold(files), share=0.9, repeats=COLD_REPEATS, **facts)


def _paths_from_host(
    step: Step,
    files: Files,
    slab: torch.Tensor,
    open_ring: Callable[[], AbstractContextManager[_engine.Device]],
    threads: int,
) -> None:
    """Measure from an image; say whether `slab`, filled from the page cache before, was right."""
    room = measuring.available_memory_nbytes()
    if room < files.nbytes + (2 << 30):
        raise Skipped(f"an image takes {files.nbytes / GB:.1f} GB of host memory, {room / GB:.1f} are available")
    memory = _engine.Memory(files.nbytes)
    memory.populate(0, memory.nbytes)
    wanted = np.frombuffer(memory, "u1")

    def fill() -> None:
        measuring.carry_out(files.to_host(memory.address, verified=False), threads)

    fill()
    step.say(CACHED, right=parts.same_bytes(slab, wanted))
    for case in (HOST_RING, HOST_REGISTERED):
        with open_ring() as device:
            began = time.perf_counter()
            for start in range(0, memory.nbytes if case == HOST_REGISTERED else 0, REGISTERED_NBYTES):
                device.register(memory.address + start, min(REGISTERED_NBYTES, memory.nbytes - start))
            facts = {"threads": threads, "register_s": time.perf_counter() - began}
            slab.zero_()
            batch = lambda: parts.from_memory(memory.address, memory.nbytes, slab.data_ptr())  # noqa: E731
            step.measure(case, files.weight_nbytes, _runner(step, device, threads, batch), share=0.2, **facts)
            step.say(case, right=parts.same_bytes(slab, wanted))
    cold = _cold(files)
    step.measure(DISK_HOST, files.weight_nbytes, fill, before=cold, share=0.5, repeats=COLD_REPEATS, threads=threads)


def _warm(files: Files) -> Callable[[], str]:
    """Read files into the page cache, once, and return what says so."""
    room = measuring.available_memory_nbytes()
    if room < files.weight_nbytes:
        raise Skipped(f"the page cache has room for {room / GB:.1f} of {files.weight_nbytes / GB:.1f} GB")
    state = measuring.make_warm(files.paths)
    return lambda: state


def _cold(files: Files) -> Callable[[], str]:
    return lambda: measuring.make_cold(files.paths)


# -- whole models, by loaders


def loader(step: Step) -> None:
    """Load a model with one loader, from the page cache in the states wanted; with ours also by its other ways."""
    name, files, device = step.job["loader"], Files(Path(step.job["folder"])), step.card.torch_device
    nbytes = files.weight_nbytes

    def load(files: Files) -> dict[str, float]:
        gc.collect()
        step.card.settle()
        with contextlib.ExitStack() as held:
            timed, tensors = _timed(lambda: step.card.wait_for(held.enter_context(parts.LOADERS[name](files, device))))
            if not files.are_in(tensors):
                raise RuntimeError(f"{name} delivered other bytes than the files'")
        return timed

    def first(files: Files) -> dict[str, float]:
        import weightcache

        def begin() -> Any:
            arriving = weightcache.stream(files.folder, device=device)
            step.card.wait_for(next(arriving))
            return arriving

        gc.collect()
        step.card.settle()
        timed, arriving = _timed(begin)
        arriving.close()
        return timed

    small, states = Files(Path(step.job["small"])), step.job["states"]
    runs = {name: load} | ({FIRST: first} if name == OURS else {})
    for case, run in runs.items():
        with step.trying(case):
            run(small)  # imports, libraries opened and rings made are no load's, for any of the loaders
            timed = functools.partial(run, files)
            if "warm" in states:
                step.measure(case + WARM, nbytes, timed, before=_warm(files), share=0.3)
            if "cold" in states:
                step.measure(case + COLD, nbytes, timed, before=_cold(files), share=0.4, repeats=COLD_REPEATS)
    if name == OURS and "warm" in states:
        with step.trying(HOSTED):
            import weightcache

            weightcache.prefetch(files.folder, tier="host")
            step.measure(HOSTED, nbytes, lambda: load(files), share=0.9, repeats=2 * REPEATS)


def make(step: Step) -> None:
    """Write a model."""
    folder, name = Path(step.job["folder"]), step.job["model"]
    timed, _ = _timed(lambda: parts.write_model(folder, name, min(8, len(os.sched_getaffinity(0)))))
    step.say(f"write {name}", nbytes=Files(folder).weight_nbytes, **timed)


STEPS: Mapping[str, Callable[[Step], None]] = {
    each.__name__: each for each in (make, link, register, ring, paths, loader)
}


def main() -> int:
    warnings.resetwarnings()
    step = Step(json.loads(sys.stdin.readline()))
    name = step.job["step"]
    with step.trying(name):
        STEPS[name](step)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
