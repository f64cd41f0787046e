"""What the stand-in libcuda promises: the driver's answers, late work, and that each mistake is found and only that."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint64
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from standin import FLAGS, HERE, SIGNATURES, SOURCES, StandIn, build_standin

MODES = ["late", "early", "random", "threads"]
LAZY_MODES = ["late", "random", "threads"]
N = 4096
POISON = 0xDB
PAGE = mmap.PAGESIZE
DEADLINE_S = 30.0

INVALID_VALUE, OUT_OF_MEMORY, NOT_INITIALIZED, NO_DEVICE, INVALID_DEVICE = 1, 2, 3, 100, 101
INVALID_CONTEXT, INVALID_HANDLE, NOT_READY, ILLEGAL_ADDRESS = 201, 400, 600, 700
ALREADY_REGISTERED, NOT_REGISTERED, NOT_SUPPORTED = 712, 713, 801

Bytes = NDArray[np.uint8]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_standin(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def fresh(library: Path) -> Iterator[StandIn]:
    """The library as after loading, and left so."""
    standin = StandIn(library)
    standin.reset()
    yield standin
    standin.reset()
    standin.call("cuCtxSetCurrent", None)


@pytest.fixture
def standin(fresh: StandIn) -> StandIn:
    """Two devices, the context of device 0 current, mode late."""
    fresh.configure("devices=2")
    fresh.retain(0)
    return fresh


@pytest.fixture(params=MODES)
def in_mode(request: pytest.FixtureRequest, standin: StandIn) -> StandIn:
    standin.configure(f"mode={request.param}")
    return standin


class Bench:
    """Page-locked host memory, device memory and a stream, N bytes each way and a little more."""

    def __init__(self, standin: StandIn) -> None:
        self.standin = standin
        self.host = np.full(4 * N, 1, dtype=np.uint8)
        self.device = np.zeros(4 * N, dtype=np.uint8)
        self.source, self.target = self.host.ctypes.data, self.device.ctypes.data
        standin.register(self.source, self.host.nbytes)
        standin.adopt(self.target, self.device.nbytes)
        self.stream, self.other = standin.stream(), standin.stream()

    def copy(self, stream: int | None = None, *, at: int = 0, to: int | None = None, nbytes: int = N) -> None:
        """Queue a copy of host[at:] to device[to:], on self.stream unless another is given."""
        to = at if to is None else to
        stream = self.stream if stream is None else stream
        self.standin.copy_in(self.target + to, self.source + at, nbytes, stream)

    def order(self, first: int | None, second: int | None) -> int:
        """Let one stream wait for what is queued on the other; return the event."""
        event = self.standin.event()
        self.standin.record(event, first)
        self.standin.wait(second, event)
        return event


@pytest.fixture
def bench(standin: StandIn) -> Bench:
    return Bench(standin)


@pytest.fixture
def bench_in_mode(in_mode: StandIn) -> Bench:
    return Bench(in_mode)


def address(array: Bytes) -> int:
    return array.ctypes.data


def mapped(nbytes: int, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> int:
    """Map anonymous memory that nothing unmaps for us."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    start = libc.mmap(None, c_size_t(nbytes), prot, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, c_size_t(0))
    assert start != ctypes.c_void_p(-1).value
    return int(start)


def unmap(start: int, nbytes: int) -> None:
    assert ctypes.CDLL(None).munmap(ctypes.c_void_p(start), c_size_t(nbytes)) == 0


def until_ready(standin: StandIn, event: int) -> int:
    """Query until the event is complete; return how often it was not."""
    deadline_s = time.monotonic() + DEADLINE_S
    for refusals in itertools.count():
        code = standin.call("cuEventQuery", event)
        if code == 0:
            return refusals
        assert code == NOT_READY
        assert time.monotonic() < deadline_s
    raise AssertionError


def run_script(script: str, library: Path, environment: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with `standin` loaded from the library, in a process of its own."""
    begin = (
        f"import os\nfrom pathlib import Path\nfrom standin import StandIn\nstandin = StandIn(Path({str(library)!r}))\n"
    )
    env = dict(os.environ, PYTHONPATH=str(HERE))
    if environment is not None:
        env["WEIGHTCACHE_STANDIN"] = environment
    return subprocess.run(
        [sys.executable, "-c", begin + script], timeout=DEADLINE_S, capture_output=True, text=True, env=env
    )


# The whole pattern, and its mutants.


def load(
    standin: StandIn,
    *,
    wait: bool = True,
    sync: bool = True,
    drain: bool = True,
    unregister_last: bool = True,
    order: bool = True,
) -> bool:
    """Load 16 pieces through a ring of two slots as the engine does; return whether the bytes are right."""
    pieces, slots = 16, 2
    ring, slab = np.empty(slots * N, dtype=np.uint8), np.empty(pieces * N, dtype=np.uint8)
    with standin.context():
        standin.adopt(address(slab), slab.nbytes)
        standin.register(address(ring), ring.nbytes)
        stream, begin = standin.stream(), standin.event()
        standin.fill(address(slab), 0xEE, slab.nbytes, None)  # whoever had the memory before
        standin.record(begin, None)
        if order:
            standin.wait(stream, begin)
        events = [standin.event() for _ in range(slots)]
        for piece in range(pieces):
            slot = piece % slots
            if piece >= slots and wait:
                standin.synchronize_event(events[slot])
            ring[slot * N : (slot + 1) * N] = piece + 1
            standin.copy_in(address(slab) + piece * N, address(ring) + slot * N, N, stream)
            standin.record(events[slot], stream)
        if not unregister_last:
            standin.unregister(address(ring))
        if sync:
            standin.synchronize(stream)
        right = bool((slab == np.repeat(np.arange(1, pieces + 1, dtype=np.uint8), N)).all())
        for event in [*events, begin]:
            standin.destroy_event(event)
        standin.destroy_stream(stream)
        if unregister_last:
            standin.unregister(address(ring))
        standin.forget(address(slab))
    return right


@pytest.mark.parametrize("seed", range(5))
def test_correct_use_is_right_and_leaves_no_finding(in_mode: StandIn, seed: int) -> None:
    in_mode.release()
    in_mode.configure(f"seed={seed},delay_us=20")
    assert load(in_mode)
    assert in_mode.violations() == in_mode.leaks() == []


@pytest.mark.parametrize(
    ("mistake", "kind"),
    [
        ({"wait": False}, "source-changed"),
        ({"sync": False}, "destroyed-in-flight"),
        ({"unregister_last": False}, "range-in-flight"),
        ({"order": False}, "overlapping-copies"),
    ],
    ids=["slot reused at once", "no final wait", "unregistered too early", "no wait for the memory's last user"],
)
def test_each_mistake_in_the_pattern_is_found_in_mode_late(
    standin: StandIn, mistake: dict[str, bool], kind: str
) -> None:
    load(standin, **mistake)
    assert kind in standin.kinds()


@pytest.mark.parametrize("mistake", ["wait", "sync"])
def test_bytes_are_wrong_in_mode_late_when_work_is_not_waited_for(standin: StandIn, mistake: str) -> None:
    assert not load(standin, **{mistake: False})


@pytest.mark.parametrize("mistake", ["sync", "unregister_last", "order"])
def test_what_the_host_cannot_know_is_found_even_when_work_runs_at_once(standin: StandIn, mistake: str) -> None:
    standin.configure("mode=early")
    load(standin, **{mistake: False})
    assert standin.violations()


# When work runs.


def test_late_work_runs_only_when_synchronised(bench: Bench) -> None:
    bench.copy()
    bench.copy(at=N)
    assert bench.standin.facts().copies == 0
    bench.standin.synchronize(bench.stream)
    assert bench.standin.facts().copies == 2


def test_late_event_makes_the_work_before_it_run_and_no_more(bench: Bench) -> None:
    event = bench.standin.event()
    bench.copy()
    bench.standin.record(event, bench.stream)
    bench.copy(at=N)
    bench.standin.synchronize_event(event)
    assert bench.standin.facts().copies == 1


def test_late_wait_makes_the_other_stream_run_up_to_the_event(bench: Bench) -> None:
    bench.copy()
    bench.order(bench.stream, bench.other)
    bench.copy(at=N)
    bench.copy(bench.other, at=2 * N)
    bench.standin.synchronize(bench.other)
    assert bench.standin.facts().copies == 2


def test_late_query_refuses_at_most_three_times_and_then_the_work_has_run(bench: Bench) -> None:
    refusals = []
    for _ in range(40):
        event = bench.standin.event()
        bench.copy()
        bench.standin.record(event, bench.stream)
        refusals.append(until_ready(bench.standin, event))
        assert bench.standin.facts().in_flight_nbytes == 0
    assert set(refusals) == {0, 1, 2, 3}


def test_late_query_is_the_same_for_the_same_seed(standin: StandIn) -> None:
    def history(seed: int) -> list[int]:
        standin.reset()
        standin.configure(f"seed={seed}")
        standin.retain()
        bench, refusals = Bench(standin), []
        for _ in range(20):
            event = standin.event()
            bench.copy()
            standin.record(event, bench.stream)
            refusals.append(until_ready(standin, event))
        return refusals

    assert history(7) == history(7) != history(8)


def test_early_work_runs_at_once(bench: Bench) -> None:
    bench.standin.configure("mode=early")
    bench.copy()
    assert bench.device[:N].tolist() == [1] * N


def test_random_work_runs_the_same_for_the_same_seed(standin: StandIn) -> None:
    def history(seed: int) -> list[int]:
        standin.reset()
        standin.configure(f"mode=random,seed={seed}")
        standin.retain()
        bench, ran = Bench(standin), []
        for i in range(30):
            bench.copy(bench.stream if i % 2 else bench.other, at=i % 4 * 64, to=i * 64, nbytes=64)
            ran.append(standin.facts().copies)
        return ran

    assert history(7) == history(7) != history(8)


def test_random_work_runs_without_being_demanded(bench: Bench) -> None:
    bench.standin.configure("mode=random")
    event = bench.standin.event()
    bench.copy()
    bench.standin.record(event, bench.stream)
    until_ready(bench.standin, event)
    assert bench.device[:N].tolist() == [1] * N


def test_threads_run_work_by_themselves(bench: Bench) -> None:
    bench.standin.configure("mode=threads")
    bench.copy()
    deadline_s = time.monotonic() + DEADLINE_S
    while bench.standin.facts().copies == 0:
        assert time.monotonic() < deadline_s
    assert bench.device[:N].tolist() == [1] * N


def test_threads_serve_each_device(standin: StandIn) -> None:
    standin.configure("mode=threads")
    for device in range(2):
        standin.retain(device)
        target = standin.allocate(N)
        standin.fill(target, 3, N, None)
        standin.synchronize(None)
        assert ctypes.string_at(target, N) == b"\3" * N


def test_work_of_one_stream_runs_in_order(bench_in_mode: Bench) -> None:
    bench, standin = bench_in_mode, bench_in_mode.standin
    back = standin.allocate_host(N)
    for value in range(1, 6):
        standin.fill(bench.target, value, N, bench.stream)
    standin.fill(bench.target, 9, N // 2, bench.stream)
    standin.copy_out(back, bench.target, N, bench.stream)
    standin.fill(bench.target, 0, N, bench.stream)
    standin.synchronize(bench.stream)
    assert ctypes.string_at(back, N) == b"\x09" * (N // 2) + b"\x05" * (N // 2)
    assert standin.violations() == []


def test_an_event_orders_two_streams(bench_in_mode: Bench) -> None:
    bench, standin = bench_in_mode, bench_in_mode.standin
    back = standin.allocate_host(N)
    standin.fill(bench.target, 5, N, bench.stream)
    bench.order(bench.stream, bench.other)
    standin.copy_out(back, bench.target, N, bench.other)
    bench.order(bench.other, bench.stream)
    standin.fill(bench.target, 6, N, bench.stream)
    standin.synchronize(bench.other)
    assert ctypes.string_at(back, N) == b"\5" * N
    standin.synchronize(bench.stream)
    assert standin.violations() == []


def test_an_event_of_each_device_is_of_its_own_work(in_mode: StandIn) -> None:
    for device in range(2):
        in_mode.retain(device)
        target, event = in_mode.allocate(N), in_mode.event()
        in_mode.fill(target, 4, N, None)
        in_mode.record(event, None)
        in_mode.synchronize_event(event)
        assert ctypes.string_at(target, N) == b"\4" * N
    assert in_mode.violations() == []


def test_the_default_stream_and_blocking_streams_wait_for_each_other(bench_in_mode: Bench) -> None:
    bench, standin = bench_in_mode, bench_in_mode.standin
    blocking = standin.stream(flags=0)
    for value, stream in enumerate((blocking, None, blocking, None)):
        standin.fill(bench.target, value, N, stream)
    standin.synchronize(None)
    assert bench.device[:N].tolist() == [3] * N
    assert standin.violations() == []


def test_the_default_stream_and_non_blocking_streams_do_not(bench_in_mode: Bench) -> None:
    bench_in_mode.standin.fill(bench_in_mode.target, 2, N, None)
    bench_in_mode.copy()
    assert bench_in_mode.standin.kinds() == ["overlapping-copies"]


def test_each_device_has_a_default_stream_of_its_own(standin: StandIn) -> None:
    targets = []
    for device in range(2):
        standin.retain(device)
        targets.append(standin.allocate(N))
        standin.fill(targets[device], 3, N, None)
    standin.synchronize(None)
    assert [ctypes.string_at(target, 1) for target in targets] == [bytes([POISON]), b"\3"]


def test_a_recorded_event_is_of_its_last_record(bench: Bench) -> None:
    event = bench.standin.event()
    bench.standin.record(event, bench.stream)
    bench.copy()
    bench.standin.record(event, bench.stream)
    bench.standin.synchronize_event(event)
    assert bench.standin.facts().copies == 1


def test_a_wait_is_for_the_record_of_its_moment(bench: Bench) -> None:
    event = bench.order(bench.stream, bench.other)
    bench.copy()
    bench.standin.record(event, bench.stream)
    bench.standin.synchronize(bench.other)
    assert bench.standin.facts().copies == 0


# What a reader sees too early.


def test_a_target_is_poison_until_the_copy_has_run(bench: Bench) -> None:
    bench.copy(to=64, nbytes=128)
    assert bench.device[:256].tolist() == [0] * 64 + [POISON] * 128 + [0] * 64


def test_a_host_target_is_poison_until_the_copy_has_run(bench: Bench) -> None:
    bench.standin.copy_out(bench.source, bench.target, N, bench.stream)
    assert bench.host[: N + 1].tolist() == [POISON] * N + [1]


def test_poison_spares_what_older_work_still_reads_or_writes(bench_in_mode: Bench) -> None:
    bench, standin = bench_in_mode, bench_in_mode.standin
    back = standin.allocate_host(N)
    bench.device[:N] = 8
    bench.copy(nbytes=N // 2)
    standin.copy_out(back, bench.target, N, bench.stream)
    bench.copy(at=N, to=0)
    standin.synchronize(bench.stream)
    assert ctypes.string_at(back, N) == b"\1" * (N // 2) + b"\x08" * (N // 2)


def test_a_target_becomes_poison_once_older_work_has_run(bench: Bench) -> None:
    event = bench.standin.event()
    bench.copy()
    bench.standin.record(event, bench.stream)
    bench.copy(at=N, to=N // 2)
    bench.standin.synchronize_event(event)
    assert bench.device[: 2 * N].tolist() == [1] * (N // 2) + [POISON] * N + [0] * (N // 2)


# Findings: each is made, and not made where it nearly would be.


@pytest.mark.parametrize("mode", ["late", "random"])
def test_a_changed_source_is_found(bench: Bench, mode: str) -> None:
    bench.standin.configure(f"mode={mode},seed=3")
    for at in range(0, 4 * N, 64):
        bench.copy(at=at, nbytes=64)
        bench.host[at + 63] += 1
    bench.standin.synchronize(bench.stream)
    assert set(bench.standin.kinds()) == {"source-changed"}


def test_a_changed_source_is_found_by_threads(bench: Bench) -> None:
    bench.standin.configure("mode=threads,delay_us=100000")
    for at in range(0, 8 * 64, 64):
        bench.copy(at=at, nbytes=64)
    bench.host[:] = 2
    bench.standin.synchronize(bench.stream)
    assert set(bench.standin.kinds()) == {"source-changed"}


@pytest.mark.parametrize("at", [0, 1, 31, 32, 63, 64, 70])
@pytest.mark.parametrize("bit", [0, 7])
def test_every_bit_of_a_source_counts(bench: Bench, at: int, bit: int) -> None:
    bench.copy(nbytes=71)
    bench.host[at] ^= 1 << bit
    bench.standin.synchronize(bench.stream)
    assert bench.standin.kinds() == ["source-changed"]


def test_a_source_may_change_once_its_event_is_complete(bench_in_mode: Bench) -> None:
    bench, event = bench_in_mode, bench_in_mode.standin.event()
    for value in range(5):
        bench.host[:] = value
        bench.copy()
        bench.standin.record(event, bench.stream)
        until_ready(bench.standin, event)
    assert bench.standin.violations() == []


def test_a_source_may_change_by_earlier_work_of_its_stream(bench_in_mode: Bench) -> None:
    bench, standin = bench_in_mode, bench_in_mode.standin
    bench.device[:N] = 7
    standin.copy_out(bench.source, bench.target, N, bench.stream)
    bench.copy(to=N)
    standin.synchronize(bench.stream)
    assert bench.device[N : 2 * N].tolist() == [7] * N
    assert standin.violations() == []


def test_a_pageable_source_is_read_at_the_call(bench_in_mode: Bench) -> None:
    bench, pageable = bench_in_mode, np.full(N, 5, dtype=np.uint8)
    bench.standin.copy_in(bench.target, address(pageable), N, bench.stream)
    pageable[:] = 6
    bench.standin.synchronize(bench.stream)
    assert bench.device[:N].tolist() == [5] * N
    assert bench.standin.violations() == []


def test_a_pageable_target_is_written_at_the_call(bench_in_mode: Bench) -> None:
    bench, pageable = bench_in_mode, np.zeros(N, dtype=np.uint8)
    bench.copy()
    bench.standin.copy_out(address(pageable), bench.target, N, bench.stream)
    assert pageable.tolist() == [1] * N


@pytest.mark.parametrize(
    ("start", "nbytes"), [(-1, 1), (-1, 2), (4 * N - 1, 2), (4 * N, 1)], ids=["before", "into", "out of", "after"]
)
def test_a_copy_outside_device_memory_is_found(standin: StandIn, start: int, nbytes: int) -> None:
    whole = np.zeros(6 * N, dtype=np.uint8)
    host, stream = standin.allocate_host(N), standin.stream()
    standin.adopt(address(whole) + N, 4 * N)
    code = standin.call("cuMemcpyHtoDAsync_v2", address(whole) + N + start, host, nbytes, stream)
    assert (code, standin.kinds()) == (INVALID_VALUE, ["outside-device-memory"])


def test_a_copy_across_two_device_ranges_is_found(standin: StandIn) -> None:
    whole = np.zeros(2 * N, dtype=np.uint8)
    standin.adopt(address(whole), N)
    standin.adopt(address(whole) + N, N)
    assert standin.call("cuMemsetD8Async", address(whole) + N - 1, 0, 2, None) == INVALID_VALUE
    assert standin.kinds() == ["outside-device-memory"]


def test_a_copy_to_another_devices_memory_is_found(standin: StandIn) -> None:
    target = standin.allocate(N)
    standin.retain(1)
    assert standin.call("cuMemsetD8Async", target, 0, N, None) == INVALID_VALUE
    assert standin.kinds() == ["outside-device-memory"]


def test_a_copy_from_outside_device_memory_is_found(standin: StandIn) -> None:
    host = standin.allocate_host(2 * N)
    assert standin.call("cuMemcpyDtoH_v2", host, host + N, N) == INVALID_VALUE
    assert standin.kinds() == ["outside-device-memory"]


def test_freed_and_forgotten_memory_is_outside(bench: Bench) -> None:
    freed = bench.standin.allocate(N)
    bench.standin.free(freed)
    bench.standin.forget(bench.target)
    for target in (freed, bench.target):
        assert bench.standin.call("cuMemsetD8Async", target, 0, N, None) == INVALID_VALUE
    assert bench.standin.kinds() == ["outside-device-memory"] * 2


def test_memory_may_be_adopted_again_and_extended(standin: StandIn) -> None:
    whole = np.zeros(3 * N, dtype=np.uint8)
    for start, nbytes in [(0, 2 * N), (0, 2 * N), (8, 8), (N, 2 * N)]:
        standin.adopt(address(whole) + start, nbytes)
    standin.fill(address(whole), 1, 3 * N, None)
    standin.synchronize(None)
    assert whole.all()


def test_memory_may_be_adopted_by_another_device(standin: StandIn) -> None:
    whole = np.zeros(3 * N, dtype=np.uint8)
    standin.adopt(address(whole), 3 * N, device=0)
    standin.adopt(address(whole) + N, N, device=1)
    standin.fill(address(whole), 1, N, None)
    standin.fill(address(whole) + 2 * N, 1, N, None)
    assert standin.call("cuMemsetD8Async", address(whole) + N, 1, N, None) == INVALID_VALUE


def test_memory_within_an_allocation_may_be_adopted(standin: StandIn) -> None:
    target = standin.allocate(N)
    standin.adopt(target + 8, 8)
    with pytest.raises(ValueError, match="Invalid argument"):
        standin.adopt(target + 8, 8, device=1)


@pytest.mark.parametrize(("nbytes", "device"), [(0, 0), (1, -1), (1, 2)])
def test_memory_of_no_device_or_no_size_is_not_adopted(standin: StandIn, nbytes: int, device: int) -> None:
    with pytest.raises(ValueError, match="Invalid argument"):
        standin.adopt(0x1000, nbytes, device)


def test_only_adopted_memory_is_forgotten(bench: Bench) -> None:
    with pytest.raises(ValueError, match="No such file"):
        bench.standin.forget(bench.target + 1)


def test_unordered_copies_to_one_place_are_found(bench_in_mode: Bench) -> None:
    bench_in_mode.copy(at=0)
    bench_in_mode.copy(bench_in_mode.other, at=2 * N, to=N - 1)
    assert bench_in_mode.standin.kinds() == ["overlapping-copies"]


def test_an_unordered_read_of_a_target_is_found(bench_in_mode: Bench) -> None:
    bench, host = bench_in_mode, bench_in_mode.standin.allocate_host(N)
    bench.copy()
    bench.standin.copy_out(host, bench.target, N, bench.other)
    assert bench.standin.kinds() == ["overlapping-copies"]


def test_a_target_read_by_the_default_stream_too_early_is_found(bench_in_mode: Bench) -> None:
    bench, host = bench_in_mode, bench_in_mode.standin.allocate_host(N)
    bench.copy()
    bench.standin.do("cuMemcpyDtoH_v2", host, bench.target, N)
    assert bench.standin.kinds() == ["overlapping-copies"]


def test_an_unordered_write_to_what_is_read_is_found(bench_in_mode: Bench) -> None:
    bench, host = bench_in_mode, bench_in_mode.standin.allocate_host(N)
    bench.standin.copy_out(host, bench.target, N, bench.other)
    bench.copy()
    assert bench.standin.kinds() == ["overlapping-copies"]


def test_copies_side_by_side_are_fine(bench_in_mode: Bench) -> None:
    bench_in_mode.copy(at=0)
    bench_in_mode.copy(bench_in_mode.other, at=0, to=N)
    assert bench_in_mode.standin.violations() == []


@pytest.mark.parametrize("ordered_by", ["same stream", "event", "third stream", "stream sync", "event sync", "query"])
def test_ordered_copies_to_one_place_are_fine(bench_in_mode: Bench, ordered_by: str) -> None:
    bench, standin = bench_in_mode, bench_in_mode.standin
    event, second = standin.event(), bench.other
    bench.copy()
    standin.record(event, bench.stream)
    if ordered_by == "same stream":
        second = bench.stream
    elif ordered_by == "event":
        standin.wait(second, event)
    elif ordered_by == "third stream":
        bench.order(bench.stream, None)
        bench.order(None, second)
    elif ordered_by == "stream sync":
        standin.synchronize(bench.stream)
    elif ordered_by == "event sync":
        standin.synchronize_event(event)
    else:
        until_ready(standin, event)
    bench.copy(second)
    standin.synchronize(second)
    assert standin.violations() == []


def test_an_event_recorded_too_early_orders_nothing(bench_in_mode: Bench) -> None:
    bench_in_mode.order(bench_in_mode.stream, bench_in_mode.other)
    bench_in_mode.copy()
    bench_in_mode.copy(bench_in_mode.other)
    assert bench_in_mode.standin.kinds() == ["overlapping-copies"]


@pytest.mark.parametrize("start", [-N // 2, N // 2, 3 * N // 2], ids=["into", "across two", "out of"])
def test_a_copy_that_straddles_registrations_is_found(standin: StandIn, start: int) -> None:
    whole, target = np.zeros(4 * N, dtype=np.uint8), standin.allocate(N)
    standin.register(address(whole) + N, N)
    standin.register(address(whole) + 2 * N, N)
    code = standin.call("cuMemcpyHtoDAsync_v2", target, address(whole) + N + start, N, None)
    assert (code, standin.kinds()) == (INVALID_VALUE, ["straddles-registrations"])


def test_copies_up_to_the_ends_of_a_registration_are_fine(standin: StandIn) -> None:
    whole, target = np.zeros(4 * N, dtype=np.uint8), standin.allocate(N)
    standin.register(address(whole) + N, N)
    standin.register(address(whole) + 2 * N, N)
    for at in range(4):
        standin.copy_in(target, address(whole) + at * N, N, None)
    standin.synchronize(None)
    assert standin.violations() == []
    assert standin.facts().unpinned_copies == 2


def give_up_registration(standin: StandIn, target: int, stream: int) -> Callable[[], None]:
    host = np.zeros(N, dtype=np.uint8)
    standin.register(address(host), N)
    standin.copy_in(target, address(host), N, stream)
    return lambda: standin.unregister(address(host))


def give_up_host_memory(standin: StandIn, target: int, stream: int) -> Callable[[], None]:
    host = standin.allocate_host(N)
    standin.copy_in(target, host, N, stream)
    return lambda: standin.free_host(host)


def give_up_device_memory(standin: StandIn, target: int, stream: int) -> Callable[[], None]:
    memory = standin.allocate(N)
    standin.fill(memory, 1, N, stream)
    return lambda: standin.free(memory)


def give_up_adopted_memory(standin: StandIn, target: int, stream: int) -> Callable[[], None]:
    standin.fill(target, 1, N, stream)
    return lambda: standin.forget(target)


@pytest.fixture(params=[give_up_registration, give_up_host_memory, give_up_device_memory, give_up_adopted_memory])
def giving_up(request: pytest.FixtureRequest, bench_in_mode: Bench) -> tuple[Bench, Callable[[], None]]:
    """A stream with work, and a call that takes away memory which that work uses."""
    return bench_in_mode, request.param(bench_in_mode.standin, bench_in_mode.target, bench_in_mode.stream)


def test_memory_given_up_with_work_in_flight_is_found(giving_up: tuple[Bench, Callable[[], None]]) -> None:
    bench, give_up = giving_up
    give_up()
    assert bench.standin.kinds() == ["range-in-flight"]


def test_memory_given_up_when_its_work_has_ended_is_fine(giving_up: tuple[Bench, Callable[[], None]]) -> None:
    bench, give_up = giving_up
    bench.standin.synchronize(bench.stream)
    give_up()
    assert bench.standin.violations() == []


def test_work_on_memory_given_up_never_runs(bench: Bench) -> None:
    give_up = give_up_registration(bench.standin, bench.target, bench.stream)
    give_up()
    bench.standin.synchronize(bench.stream)
    assert bench.standin.facts().copies == 0
    assert bench.device[:N].tolist() == [POISON] * N


def test_memory_unmapped_with_work_in_flight_is_found(bench: Bench) -> None:
    start = mapped(PAGE)
    bench.standin.register(start, PAGE)
    bench.standin.copy_in(bench.target, start, PAGE, bench.stream)
    unmap(start, PAGE)
    bench.standin.synchronize(bench.stream)
    assert bench.standin.kinds() == ["unmapped-in-flight"]


def test_memory_given_up_is_let_alone_even_when_its_work_is_running(bench: Bench) -> None:
    bench.standin.configure("mode=threads,delay_us=2000")
    for _ in range(20):
        start = mapped(PAGE)
        bench.standin.register(start, PAGE)
        bench.standin.copy_in(bench.target, start, PAGE, bench.stream)
        bench.standin.unregister(start)
        unmap(start, PAGE)
    assert set(bench.standin.kinds()) == {"range-in-flight"}


def test_a_stream_destroyed_with_work_in_flight_is_found(bench_in_mode: Bench) -> None:
    bench_in_mode.copy()
    bench_in_mode.standin.destroy_stream(bench_in_mode.stream)
    assert bench_in_mode.standin.kinds() == ["destroyed-in-flight"]


def test_an_event_destroyed_with_work_in_flight_is_found(bench_in_mode: Bench) -> None:
    event = bench_in_mode.standin.event()
    bench_in_mode.copy()
    bench_in_mode.standin.record(event, bench_in_mode.stream)
    bench_in_mode.standin.destroy_event(event)
    assert bench_in_mode.standin.kinds() == ["destroyed-in-flight"]


def test_a_context_released_with_work_in_flight_is_found(bench_in_mode: Bench) -> None:
    bench_in_mode.copy()
    bench_in_mode.standin.release()
    assert bench_in_mode.standin.kinds() == ["destroyed-in-flight"]


def test_a_context_still_retained_may_be_released_with_work_in_flight(bench: Bench) -> None:
    bench.standin.retain()
    bench.copy()
    bench.standin.release()
    assert bench.standin.violations() == []


def test_stream_and_event_may_go_when_an_ordered_streams_work_has_ended(bench_in_mode: Bench) -> None:
    bench, standin = bench_in_mode, bench_in_mode.standin
    bench.copy()
    event = bench.order(bench.stream, bench.other)
    standin.synchronize(bench.other)
    standin.destroy_event(event)
    standin.destroy_stream(bench.stream)
    assert standin.violations() == []


def test_an_event_may_go_when_only_later_work_is_in_flight(bench_in_mode: Bench) -> None:
    event = bench_in_mode.order(bench_in_mode.stream, bench_in_mode.other)
    bench_in_mode.copy()
    bench_in_mode.standin.destroy_event(event)
    assert bench_in_mode.standin.violations() == []


def test_an_event_outlives_its_stream(bench_in_mode: Bench) -> None:
    bench, standin, event = bench_in_mode, bench_in_mode.standin, bench_in_mode.standin.event()
    bench.copy()
    standin.record(event, bench.stream)
    standin.synchronize(bench.stream)
    standin.destroy_stream(bench.stream)
    for _ in range(300):  # more than there are slots for streams
        standin.destroy_stream(standin.stream())
    assert standin.call("cuEventQuery", event) == 0
    assert standin.violations() == []


def test_a_wait_for_an_event_never_recorded_is_found(bench: Bench) -> None:
    event = bench.standin.event()
    assert bench.standin.call("cuStreamWaitEvent", bench.stream, event, 0) == 0
    assert bench.standin.kinds() == ["never-recorded"]


def test_an_event_never_recorded_is_complete(standin: StandIn) -> None:
    event = standin.event()
    assert standin.call("cuEventQuery", event) == standin.call("cuEventSynchronize", event) == 0
    assert standin.violations() == []


@pytest.mark.parametrize(("start", "nbytes"), [(N, N), (N + 1, 1), (0, N + 1), (2 * N - 1, 2), (0, 3 * N)])
def test_an_overlapping_registration_is_found_and_refused(standin: StandIn, start: int, nbytes: int) -> None:
    whole = np.zeros(3 * N, dtype=np.uint8)
    standin.register(address(whole) + N, N)
    code = standin.call("cuMemHostRegister_v2", address(whole) + start, nbytes, 0)
    assert (code, standin.kinds()) == (ALREADY_REGISTERED, ["overlapping-registration"])


def test_a_registration_of_allocated_host_memory_is_found_and_refused(standin: StandIn) -> None:
    host = standin.allocate_host(N)
    assert standin.call("cuMemHostRegister_v2", host, N, 0) == ALREADY_REGISTERED
    assert standin.kinds() == ["overlapping-registration"]


def test_registrations_side_by_side_and_again_are_fine(standin: StandIn) -> None:
    whole = np.zeros(2 * N, dtype=np.uint8)
    for _ in range(2):
        standin.register(address(whole), N)
        standin.register(address(whole) + N, N)
        standin.unregister(address(whole))
        standin.unregister(address(whole) + N)
    assert standin.violations() == []


NEED_NO_CONTEXT = {
    "cuGetErrorName", "cuGetErrorString", "cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet",
    "cuDeviceGetName", "cuDeviceTotalMem_v2", "cuDeviceGetPCIBusId", "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease_v2", "cuCtxSetCurrent", "cuCtxGetCurrent",
}  # fmt: skip


def call_with_zeroes(standin: StandIn, name: str) -> int:
    """Call with zeroes of the right types, but with room for what it returns."""
    room = ctypes.create_string_buffer(64)
    values = [None if kind is ctypes.c_void_p else 0 for kind in SIGNATURES[name]]
    returns = name.startswith(("cuGet", "cuDeviceGet", "cuDriver", "cuDeviceTotal", "cuDevicePrimaryCtxRetain"))
    if returns or name == "cuCtxGetCurrent":
        values[1 if name.startswith("cuGetError") else 0] = room  # type: ignore[call-overload]
    return standin.call(name, *values)


@pytest.mark.parametrize("name", sorted(SIGNATURES.keys() - NEED_NO_CONTEXT))
def test_a_call_without_a_context_is_found_and_refused(fresh: StandIn, name: str) -> None:
    fresh.do("cuInit", 0)
    assert call_with_zeroes(fresh, name) == INVALID_CONTEXT
    assert fresh.kinds() == ["no-context"]


@pytest.mark.parametrize("name", sorted(SIGNATURES.keys() - {"cuGetErrorName", "cuGetErrorString", "cuInit"}))
def test_a_call_before_cuinit_is_refused(fresh: StandIn, name: str) -> None:
    expected = 0 if name == "cuDriverGetVersion" else NOT_INITIALIZED
    assert call_with_zeroes(fresh, name) == expected
    assert fresh.violations() == []


def test_a_context_is_current_in_one_thread(standin: StandIn) -> None:
    codes = []
    thread = threading.Thread(target=lambda: codes.append(standin.call("cuStreamSynchronize", None)))
    thread.start()
    thread.join(DEADLINE_S)
    assert codes == [INVALID_CONTEXT]
    assert standin.call("cuStreamSynchronize", None) == 0


def test_a_released_context_is_current_no_more(standin: StandIn) -> None:
    context = standin.retain()
    standin.release()
    assert standin.call("cuStreamSynchronize", None) == 0
    standin.release()
    assert standin.call("cuStreamSynchronize", None) == INVALID_CONTEXT
    assert standin.call("cuCtxSetCurrent", context) == INVALID_CONTEXT
    assert standin.kinds() == ["no-context", "dead-handle"]


def test_handles_of_another_device_are_found_and_refused(standin: StandIn) -> None:
    stream, event = standin.stream(), standin.event()
    standin.retain(1)
    own = standin.stream()
    for name, *arguments in [
        ("cuStreamSynchronize", stream),
        ("cuStreamDestroy_v2", stream),
        ("cuEventRecord", event, own),
        ("cuStreamWaitEvent", own, event, 0),
        ("cuEventQuery", event),
        ("cuEventSynchronize", event),
        ("cuEventDestroy_v2", event),
    ]:
        assert standin.call(name, *arguments) == INVALID_HANDLE
    assert standin.kinds() == ["wrong-context"] * 7


def test_destroyed_handles_are_found_and_refused(standin: StandIn) -> None:
    stream, event = standin.stream(), standin.event()
    standin.destroy_stream(stream)
    standin.destroy_event(event)
    standin.stream(), standin.event()  # such as might get an old one's address
    for name, handle in [("cuStreamSynchronize", stream), ("cuStreamDestroy_v2", stream), ("cuEventQuery", event)]:
        assert standin.call(name, handle) == INVALID_HANDLE
    assert standin.kinds() == ["dead-handle"] * 3


def test_a_call_in_a_forked_child_is_found_and_refused(library: Path) -> None:
    done = run_script(
        """
standin.retain()
stream = standin.stream()
child = os.fork()
if not child:
    codes = [standin.call("cuInit", 0), standin.call("cuStreamSynchronize", stream)]
    print(codes, standin.kinds(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(standin.call("cuStreamSynchronize", stream), standin.kinds())
""",
        library,
    )
    assert done.stdout.splitlines() == ["[3, 3] ['after-fork', 'after-fork']", "0 []"], done.stderr


def test_a_child_of_a_parent_that_never_began_may_begin(library: Path) -> None:
    done = run_script(
        """
standin.facts()
child = os.fork()
if not child:
    with standin.context():
        standin.destroy_stream(standin.stream())
    print(standin.violations(), standin.leaks(), flush=True)
    os._exit(0)
os.waitpid(child, 0)
""",
        library,
    )
    assert done.stdout == "[] []\n", done.stderr


# Failures on demand.


@pytest.mark.parametrize("nth", [1, 3])
def test_the_nth_call_fails_and_no_other(standin: StandIn, nth: int) -> None:
    standin.configure(f"fail=cuEventCreate:{nth}:2")
    event = c_uint64()
    codes = [standin.call("cuEventCreate", byref(event), 0) for _ in range(5)]
    assert codes == [2 if i == nth else 0 for i in range(1, 6)]
    assert standin.facts().events == 4


def test_several_failures_may_be_asked_for(standin: StandIn) -> None:
    standin.configure("fail=cuStreamSynchronize:1:700,fail=cuStreamSynchronize:3:719")
    assert [standin.call("cuStreamSynchronize", None) for _ in range(4)] == [700, 0, 719, 0]


def test_failures_asked_for_may_be_taken_back(standin: StandIn) -> None:
    standin.configure("fail=cuDeviceGet:1:2,fail=none,fail=cuDeviceGet:2:3")
    assert [standin.call("cuDeviceGet", byref(c_int()), 0) for _ in range(3)] == [0, 3, 0]
    assert standin.facts().failures == 1
    standin.configure("fail=cuDeviceGet:1:2")
    standin.configure("fail=none")
    assert standin.call("cuDeviceGet", byref(c_int()), 0) == 0


def test_a_failed_copy_is_not_queued(bench: Bench) -> None:
    bench.standin.configure("fail=cuMemcpyHtoDAsync_v2:1:700")
    assert bench.standin.call("cuMemcpyHtoDAsync_v2", bench.target, bench.source, N, bench.stream) == 700
    assert bench.standin.facts().in_flight_nbytes == 0
    assert not bench.device.any()


def test_a_failed_unregistration_is_a_leak(bench: Bench) -> None:
    bench.standin.configure("fail=cuMemHostUnregister:1:1")
    assert bench.standin.call("cuMemHostUnregister", bench.source) == 1
    assert bench.standin.facts().registrations == 1


def test_a_sticky_failure_stays(in_mode: StandIn) -> None:
    in_mode.configure("fail=cuEventCreate:2:700,sticky=1")
    event = in_mode.event()
    for name, *arguments in [
        ("cuEventCreate", byref(c_uint64()), 0),
        ("cuEventQuery", event),
        ("cuStreamSynchronize", None),
        ("cuInit", 0),
        ("cuCtxSetCurrent", None),
    ]:
        assert in_mode.call(name, *arguments) == ILLEGAL_ADDRESS
    assert in_mode.call("cuGetErrorName", 700, byref(c_char_p())) == 0


def test_a_sticky_failure_drops_the_queued_work(bench: Bench) -> None:
    bench.copy()
    bench.standin.configure("fail=cuStreamSynchronize:1:700,sticky=1")
    assert bench.standin.call("cuStreamSynchronize", bench.stream) == ILLEGAL_ADDRESS
    assert bench.device[:N].tolist() == [POISON] * N
    assert bench.standin.facts().in_flight_nbytes == 0


def test_a_sticky_failure_ends_another_threads_wait(bench: Bench) -> None:
    codes = []

    def synchronize() -> None:
        bench.standin.call("cuCtxSetCurrent", context)
        codes.append(bench.standin.call("cuStreamSynchronize", bench.stream))

    context = bench.standin.retain()
    bench.standin.configure("mode=threads,delay_us=1000000,fail=cuEventCreate:1:700,sticky=1")
    for _ in range(100):
        bench.copy()
    thread = threading.Thread(target=synchronize)
    thread.start()
    deadline_s = time.monotonic() + DEADLINE_S
    while not any("cuStreamSynchronize" in line for line in bench.standin.log()):
        assert time.monotonic() < deadline_s
    assert bench.standin.call("cuEventCreate", byref(c_uint64()), 0) == ILLEGAL_ADDRESS
    thread.join(DEADLINE_S)
    assert codes == [ILLEGAL_ADDRESS]


def test_after_a_sticky_failure_what_is_given_back_is_no_leak_and_no_finding(in_mode: StandIn) -> None:
    bench, event, standin = Bench(in_mode), in_mode.event(), in_mode
    memory, host = standin.allocate(N), standin.allocate_host(N)
    bench.copy()
    standin.record(event, bench.stream)
    standin.configure("fail=cuStreamSynchronize:1:700,sticky=1")
    for name, argument in [
        ("cuStreamSynchronize", bench.stream),
        ("cuEventDestroy_v2", event),
        ("cuStreamDestroy_v2", bench.stream),
        ("cuStreamDestroy_v2", bench.other),
        ("cuMemHostUnregister", bench.source),
        ("cuMemFree_v2", memory),
        ("cuMemFreeHost", host),
    ]:
        assert standin.call(name, argument) == ILLEGAL_ADDRESS
    assert standin.leaks() == ["context: of device 0, retained 1 times"]
    assert standin.call("cuDevicePrimaryCtxRelease_v2", 0) == ILLEGAL_ADDRESS
    assert standin.leaks() == standin.violations() == []


def test_a_registration_of_512_gib_is_refused(standin: StandIn) -> None:
    assert standin.call("cuMemHostRegister_v2", 0x10000, 512 << 30, 0) == OUT_OF_MEMORY
    assert standin.violations() == []


def test_a_read_only_registration_is_refused(standin: StandIn) -> None:
    host = np.zeros(N, dtype=np.uint8)
    assert standin.call("cuMemHostRegister_v2", address(host), N, 8) == NOT_SUPPORTED


def test_a_registration_of_a_read_only_mapping_is_refused(standin: StandIn) -> None:
    start = mapped(PAGE, mmap.PROT_READ)
    assert standin.call("cuMemHostRegister_v2", start, PAGE, 0) == INVALID_VALUE
    unmap(start, PAGE)


@pytest.mark.parametrize("gone", range(3))
def test_a_registration_with_a_hole_is_refused(standin: StandIn, gone: int) -> None:
    start = mapped(3 * PAGE)
    unmap(start + gone * PAGE, PAGE)
    assert standin.call("cuMemHostRegister_v2", start, 3 * PAGE, 0) == INVALID_VALUE
    for page in {0, 1, 2} - {gone}:
        unmap(start + page * PAGE, PAGE)


def test_registered_bytes_may_be_capped(standin: StandIn) -> None:
    whole = np.zeros(3 * N, dtype=np.uint8)
    standin.configure(f"register_cap={2 * N}")
    standin.register(address(whole), 2 * N)
    assert standin.call("cuMemHostRegister_v2", address(whole) + 2 * N, 1, 0) == OUT_OF_MEMORY
    standin.unregister(address(whole))
    standin.register(address(whole) + N, 2 * N)
    assert standin.facts().registered_nbytes_peak == 2 * N


def test_a_query_may_refuse_so_often_after_each_record(bench_in_mode: Bench) -> None:
    bench, event = bench_in_mode, bench_in_mode.standin.event()
    bench.standin.configure("not_ready=5")
    for _ in range(2):
        bench.copy()
        bench.standin.record(event, bench.stream)
        bench.standin.synchronize(bench.stream)
        assert until_ready(bench.standin, event) == 5


def test_a_query_never_refuses_after_a_synchronisation(bench_in_mode: Bench) -> None:
    bench, event = bench_in_mode, bench_in_mode.standin.event()
    bench.standin.configure("not_ready=5")
    bench.copy()
    bench.standin.record(event, bench.stream)
    bench.standin.synchronize_event(event)
    assert bench.standin.call("cuEventQuery", event) == 0


def test_streams_run_out(standin: StandIn) -> None:
    code = 0
    while not code:
        code = standin.call("cuStreamCreate", byref(c_uint64()), 1)
    assert code == OUT_OF_MEMORY
    assert standin.facts().streams == 240


def test_there_may_be_no_device(fresh: StandIn) -> None:
    fresh.configure("devices=0")
    assert fresh.call("cuInit", 0) == NO_DEVICE


def test_device_memory_is_limited(standin: StandIn) -> None:
    standin.configure(f"memory={2 * N}")
    total = c_size_t()
    standin.do("cuDeviceTotalMem_v2", byref(total), 0)
    first = standin.allocate(2 * N)
    assert (total.value, standin.call("cuMemAlloc_v2", byref(c_uint64()), 1)) == (2 * N, OUT_OF_MEMORY)
    standin.free(first)
    standin.allocate(N)


@pytest.mark.parametrize("name", ["cuMemHostRegister_v2", "cuThreadExchangeStreamCaptureMode"])
def test_a_symbol_may_be_left_out(library: Path, name: str) -> None:
    without = StandIn(build_standin(library.parent, f"WCS_WITHOUT_{name}"))
    assert [missing for missing in SIGNATURES if not without.has(missing)] == [name]


def test_nothing_is_left_out_otherwise(library: Path) -> None:
    assert all(StandIn(library).has(name) for name in SIGNATURES)


def test_a_build_is_kept(library: Path) -> None:
    assert build_standin(library.parent) == library


# Settings.


@pytest.mark.parametrize(
    "text",
    [
        "mode", "mode=", "mode=lazy", "speed=1", "seed=", "seed=-1", "seed=1x", "devices=17", "sticky=2", "exit=1",
        "fail=cuInit", "fail=cuInit:1", "fail=cuInit:0:1", "fail=cuInit:1:0", "fail=cuNothing:1:1",
        "fail=cuGetErrorName:1:1", "devices=2,speed=1",
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_and_changes_nothing(fresh: StandIn, text: str) -> None:
    with pytest.raises(ValueError, match="Invalid argument"):
        fresh.configure(text)
    fresh.do("cuInit", 0)
    count = c_int()
    fresh.do("cuDeviceGetCount", byref(count))
    assert count.value == 1


def test_the_mode_stays_while_work_is_queued(bench: Bench) -> None:
    bench.copy()
    with pytest.raises(ValueError, match="busy"):
        bench.standin.configure("mode=early")
    bench.standin.synchronize(bench.stream)
    bench.standin.configure("mode=early")


def test_the_environment_is_read_at_first_use_and_after_a_reset(library: Path) -> None:
    done = run_script(
        """
for _ in range(2):
    print(standin.call("cuInit", 0))
    standin.configure("devices=1")
    standin.reset()
""",
        library,
        "devices=0,seed=3",
    )
    assert done.stdout == "100\n100\n", done.stderr


def test_a_wrong_environment_aborts(library: Path) -> None:
    done = run_script("standin.facts()", library, "mode=lazy")
    assert done.returncode == -6
    assert "WEIGHTCACHE_STANDIN=mode=lazy: not settings" in done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_a_report_is_printed_at_exit_when_asked_for(library: Path, mode: str) -> None:
    script = "standin.retain(); standin.wait(standin.stream(), standin.event())"
    done = run_script(script, library, f"mode={mode},exit=report")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("standin: never-recorded: cuStreamWaitEvent: stream 0x")
    assert lines[-1] == "standin: 1 violations, 3 leaks, 6 calls, 0 copies of 0 bytes, 0 unpinned"
    assert len(lines) == 5


def test_nothing_is_printed_otherwise(library: Path) -> None:
    done = run_script("standin.retain(); standin.wait(standin.stream(), standin.event())", library)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_process_ends_with_work_on_its_threads(library: Path) -> None:
    script = """
standin.retain()
target = standin.allocate(64)
for _ in range(100):
    standin.fill(target, 1, 64, None)
"""
    done = run_script(script, library, "mode=threads,delay_us=100")
    assert (done.returncode, done.stderr) == (0, "")


# Looking inside.


def test_reset_forgets_everything(bench_in_mode: Bench) -> None:
    standin = bench_in_mode.standin
    bench_in_mode.copy()
    bench_in_mode.copy(bench_in_mode.other)
    standin.event(), standin.allocate(N), standin.allocate_host(N)
    standin.reset()
    assert standin.leaks() == standin.violations() == standin.log() == []
    assert not any(getattr(standin.facts(), name) for name in standin.facts().__slots__)
    assert standin.call("cuStreamSynchronize", None) == NOT_INITIALIZED


def test_handles_from_before_a_reset_are_dead(standin: StandIn) -> None:
    context, stream = standin.retain(), standin.stream()
    standin.reset()
    new = standin.retain()
    standin.stream()
    assert standin.call("cuStreamSynchronize", stream) == INVALID_HANDLE
    assert standin.call("cuCtxSetCurrent", context) == INVALID_CONTEXT
    assert new != context


def test_every_leak_is_named(bench: Bench) -> None:
    standin = bench.standin
    standin.event(), standin.allocate(N), standin.allocate_host(N)
    bench.copy()
    names = [line.partition(":")[0] for line in standin.leaks()]
    assert names == [
        "context", "stream", "stream", "event", "registration", "device allocation", "host allocation", "queued work",
    ]  # fmt: skip


def test_facts_count_what_lives(bench: Bench) -> None:
    standin = bench.standin
    standin.retain(), standin.event(), standin.allocate(N), standin.allocate_host(N)
    facts = standin.facts()
    assert (facts.contexts, facts.streams, facts.events, facts.registrations) == (2, 2, 1, 1)
    assert (facts.host_allocations, facts.device_allocations) == (1, 1)
    assert (facts.registered_nbytes, facts.registered_nbytes_peak) == (4 * N, 4 * N)


def test_facts_count_copies(bench: Bench) -> None:
    pageable = np.zeros(10, dtype=np.uint8)
    bench.copy(nbytes=100)
    bench.standin.copy_in(bench.target + N, address(pageable), 10, bench.stream)
    bench.standin.fill(bench.target + 2 * N, 1, N, bench.stream)
    queued = bench.standin.facts()
    bench.standin.synchronize(bench.stream)
    ran = bench.standin.facts()
    assert (queued.copies, queued.in_flight_nbytes, queued.unpinned_copies) == (0, 110, 1)
    assert (ran.copies, ran.copied_nbytes, ran.in_flight_nbytes, ran.in_flight_nbytes_peak) == (2, 110, 0, 110)


def test_the_log_has_each_call_with_its_arguments(bench: Bench) -> None:
    bench.copy(nbytes=100)
    assert bench.standin.log()[-1].split(maxsplit=1)[1] == (
        f"thread {threading.get_native_id()} cuMemcpyHtoDAsync_v2 stream={bench.stream:#x} event=(nil) "
        f"to={bench.target:#x} from={bench.source:#x} nbytes=100 value=0 -> 0"
    )


def test_the_log_keeps_the_last_calls(standin: StandIn) -> None:
    synchronize = standin._library.cuStreamSynchronize
    for _ in range(100_100):
        synchronize(None)
    log, calls = standin.log(), standin.facts().calls
    assert len(log) == 100_000
    assert [int(line.split(maxsplit=1)[0]) for line in (log[0], log[-1])] == [calls - 100_000, calls - 1]


def test_a_violation_says_who_what_and_where(bench: Bench) -> None:
    bench.copy(nbytes=100)
    bench.host[0] = 9
    bench.standin.synchronize(bench.stream)
    thread = threading.get_native_id()
    assert bench.standin.violations() == [
        f"source-changed: cuMemcpyHtoDAsync_v2: {bench.source:#x} + 100 to {bench.target:#x}, "
        f"queued by thread {thread} (thread {thread})"
    ]
    assert bench.standin.facts().violations == 1


def test_the_engines_dlopen_gets_the_same_library(bench: Bench, library: Path) -> None:
    assert StandIn(library).facts() == bench.standin.facts()
    assert StandIn(library).facts().registrations == 1


# The driver's plain answers.


def test_errors_have_names_and_meanings(fresh: StandIn) -> None:
    text = c_char_p()
    assert fresh.call("cuGetErrorName", 700, byref(text)) == 0
    assert text.value == b"CUDA_ERROR_ILLEGAL_ADDRESS"
    assert fresh.call("cuGetErrorString", 700, byref(text)) == 0
    assert text.value == b"an illegal memory access was encountered"
    assert (fresh.call("cuGetErrorName", 4242, byref(text)), text.value) == (INVALID_VALUE, None)


def test_devices_are_described(standin: StandIn) -> None:
    device, name, bus = c_int(), ctypes.create_string_buffer(32), ctypes.create_string_buffer(16)
    standin.do("cuDeviceGet", byref(device), 1)
    standin.do("cuDeviceGetName", name, 32, device)
    standin.do("cuDeviceGetPCIBusId", bus, 16, device)
    assert (device.value, name.value, bus.value) == (1, b"Stand-in 1", b"FFFF:01:00.0")


@pytest.mark.parametrize(("attribute", "value"), [(41, 1), (75, 9), (99, 1), (100, 0), (113, 0)])
def test_attributes_are_of_a_discrete_device(standin: StandIn, attribute: int, value: int) -> None:
    got = c_int(-1)
    standin.do("cuDeviceGetAttribute", byref(got), attribute, 0)
    assert got.value == value


@pytest.mark.parametrize("device", [-1, 2])
def test_a_device_that_is_not_there_is_refused(standin: StandIn, device: int) -> None:
    room = ctypes.create_string_buffer(64)
    for name, *arguments in [
        ("cuDeviceGet", room, device),
        ("cuDeviceGetName", room, 64, device),
        ("cuDeviceGetPCIBusId", room, 64, device),
        ("cuDeviceTotalMem_v2", room, device),
        ("cuDeviceGetAttribute", room, 41, device),
        ("cuDevicePrimaryCtxRetain", room, device),
        ("cuDevicePrimaryCtxRelease_v2", device),
    ]:
        assert standin.call(name, *arguments) == INVALID_DEVICE


def test_the_primary_context_is_one_and_counted(fresh: StandIn) -> None:
    current = c_uint64(1)
    fresh.do("cuInit", 0)
    fresh.do("cuCtxGetCurrent", byref(current))
    assert current.value == 0
    context = fresh.retain()
    assert fresh.retain() == context
    fresh.do("cuCtxGetCurrent", byref(current))
    assert current.value == context
    fresh.release()
    fresh.release()
    assert fresh.call("cuDevicePrimaryCtxRelease_v2", 0) == INVALID_CONTEXT


def test_the_capture_mode_is_exchanged_per_thread(standin: StandIn) -> None:
    mode = c_int(2)
    standin.do("cuThreadExchangeStreamCaptureMode", byref(mode))
    assert mode.value == 0
    standin.do("cuThreadExchangeStreamCaptureMode", byref(mode))
    assert mode.value == 2


def test_wrong_values_are_refused(bench: Bench) -> None:
    room = c_uint64()
    for name, *arguments in [
        ("cuInit", 1),
        ("cuStreamCreate", byref(room), 2),
        ("cuStreamCreate", None, 0),
        ("cuEventCreate", byref(room), 8),
        ("cuEventCreate", byref(room), 4),
        ("cuMemHostRegister_v2", None, N, 0),
        ("cuMemHostRegister_v2", bench.source, 0, 0),
        ("cuMemHostRegister_v2", bench.source, N, 16),
        ("cuMemHostAlloc", byref(room), 0, 0),
        ("cuMemHostAlloc", byref(room), N, 8),
        ("cuMemAlloc_v2", byref(room), 0),
        ("cuMemFree_v2", 1),
        ("cuMemFreeHost", 1),
        ("cuMemcpyHtoDAsync_v2", bench.target, None, 1, None),
        ("cuMemcpyHtoDAsync_v2", 0, bench.source, 1, None),
        ("cuMemcpyDtoHAsync_v2", None, bench.target, 1, None),
        ("cuMemcpyDtoH_v2", bench.source, 0, 1),
        ("cuThreadExchangeStreamCaptureMode", byref(c_int(3))),
    ]:
        assert bench.standin.call(name, *arguments) == INVALID_VALUE, name
    assert bench.standin.violations() == []


def test_a_copy_of_nothing_does_nothing(standin: StandIn) -> None:
    assert standin.call("cuMemcpyHtoDAsync_v2", 0, None, 0, None) == 0
    assert standin.facts().in_flight_nbytes == 0


def test_memory_not_registered_cannot_be_unregistered(bench: Bench) -> None:
    assert bench.standin.call("cuMemHostUnregister", bench.source + 1) == NOT_REGISTERED
    bench.standin.unregister(bench.source)
    assert bench.standin.call("cuMemHostUnregister", bench.source) == NOT_REGISTERED


def test_allocated_host_memory_is_page_locked(bench: Bench) -> None:
    host = bench.standin.allocate_host(N)
    bench.standin.copy_in(bench.target, host, N, bench.stream)
    assert bench.standin.facts().unpinned_copies == 0


# Under the sanitizers.

SANITIZERS = {"thread": ["thread"], "address": ["address", "undefined"]}


@pytest.fixture(scope="module")
def ring_programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """standin_ring.c and the stand-in in one program, for each of the sanitizers."""
    folder, programs = tmp_path_factory.mktemp("ring"), {}
    for sanitizer, names in SANITIZERS.items():
        programs[sanitizer] = folder / sanitizer
        sanitize = [*(f"-fsanitize={name}" for name in names), "-fno-sanitize-recover=all"]
        sources = [*SOURCES, HERE / "standin_ring.c"]
        subprocess.run(["gcc", *FLAGS, *sanitize, *sources, "-o", programs[sanitizer]], check=True)
    return programs


def run_ring(program: Path, use: str, mode: str) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, WEIGHTCACHE_STANDIN=f"mode={mode},delay_us=50")
    return subprocess.run([program, use], env=env, capture_output=True, text=True, timeout=DEADLINE_S)


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("mode", MODES)
def test_threads_using_it_well_are_clean(ring_programs: dict[str, Path], sanitizer: str, mode: str) -> None:
    done = run_ring(ring_programs[sanitizer], "correct", mode)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 bytes wrong, 0 leaks, 0 violations\n", "")


@pytest.mark.parametrize("mode", LAZY_MODES)
def test_threads_using_a_slot_again_too_early_are_found(ring_programs: dict[str, Path], mode: str) -> None:
    done = run_ring(ring_programs["address"], "hasty", mode)
    assert "source-changed" in done.stdout
    assert done.returncode == 1


def test_a_slot_used_again_too_early_is_a_data_race(ring_programs: dict[str, Path]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while "data race" not in run_ring(ring_programs["thread"], "hasty", "threads").stderr:
        assert time.monotonic() < deadline_s  # a run in which all is queued before any of it runs has no race
