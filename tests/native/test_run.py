"""What `_engine.run`, `Driver` and `Device` promise to Python; randomised plans of the same in C are in plans.c."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from engine import COUNTERS, DRIVER_ERROR, OPERATION, SPAN, Ended, address, op, opened, run
from numpy.typing import NDArray
from standin import HERE, StandIn, build_standin

from weightcache import _engine
from weightcache._engine import (
    CHECK,
    DONE,
    FROM_MEMORY,
    MAX_SLOTS,
    N_COUNTERS,
    OP_NBYTES,
    POPULATE,
    SPAN_NBYTES,
    TO_DEVICE,
    Device,
    Driver,
    DriverError,
)  # fmt: skip

PAGE = 4096
CANCELED = -errno.ECANCELED
DEADLINE_S = 60.0
Bytes = NDArray[np.uint8]


def random_bytes(nbytes: int) -> Bytes:
    return np.random.default_rng(1).integers(0, 256, nbytes, "u1")


class Bench:
    """A device of the stand-in with a ring of two slots of a page, memory of the host, and memory on it."""

    def __init__(self, standin: StandIn, ordinal: int = 0, n_pages: int = 16) -> None:
        self.standin = standin
        self.driver = Driver(str(standin.path))
        self.device = Device(self.driver, ordinal, PAGE, 2)
        self.source = random_bytes(n_pages * PAGE)
        self.slab: Bytes = np.zeros_like(self.source)
        self.driver.adopt(address(self.slab), self.slab.nbytes, ordinal)

    def copies(self, *sizes: int) -> tuple[list[tuple[int, ...]], list[tuple[int, int, int]]]:
        """Return operations that bring the source's bytes to the slab, one a size, and their spans."""
        ops, spans, at = [], [], 0
        for index, nbytes in enumerate(sizes):
            source, target = address(self.source) + at, address(self.slab) + at
            ops.append(op(flags=FROM_MEMORY | TO_DEVICE, offset=source, nbytes=nbytes, first_span=index, n_spans=1))
            spans.append((0, target, nbytes))
            at += nbytes
        return ops, spans

    def load(self, **others: Any) -> Ended:
        """Bring all of the source to the slab, by operations of three pages and one of the rest."""
        sizes = [3 * PAGE] * (self.source.nbytes // (3 * PAGE))
        return run(*self.copies(*sizes, self.source.nbytes - sum(sizes)), device=self.device, **others)


@pytest.fixture
def bench(driver_standin: StandIn) -> Iterator[Bench]:
    bench = Bench(driver_standin)
    yield bench
    bench.device.close()


class Endless:
    """Copies on the host that take seconds in all: somebody has to end them before."""

    def __init__(self, n_ops: int = 100_000, nbytes: int = 1 << 18) -> None:
        self.source, self.target = np.ones(nbytes, "u1"), np.zeros(nbytes, "u1")
        one = op(flags=FROM_MEMORY, offset=address(self.source), nbytes=nbytes, target=address(self.target))
        self.ops = np.full(n_ops, np.array([one], OPERATION)[0], OPERATION)
        self.counters = np.zeros(N_COUNTERS, "u8")
        self.stop = np.zeros(2, "i4")

    def run(self, on_done: Callable[[list[int]], object] | None = None) -> int | None:
        return _engine.run(self.ops, threads=1, counters=self.counters, stop=self.stop, on_done=on_done)

    def n_done(self) -> int:
        return int(self.counters[COUNTERS.index("done")])

    def until_it_runs(self) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not self.n_done():
            assert time.monotonic() < deadline_s

    def was_cut_short(self) -> bool:
        """Whether the rest was cancelled, and every operation has an end."""
        statuses = self.ops["status"]
        n_done = int((statuses == DONE).sum())
        return bool(0 < n_done < len(statuses) and (statuses == CANCELED).sum() == len(statuses) - n_done)


def threads_of_the_engine() -> list[int]:
    """Return the ids of the engine's threads that live now."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().strip() == "weightcache-io":
                found.append(int(task.name))
        except (FileNotFoundError, ProcessLookupError):  # it has ended since
            pass
    return found


def run_script(script: str, *arguments: object) -> str:
    """Run Python in a process of its own; return what it printed."""
    env = dict(os.environ, PYTHONPATH=str(HERE))
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        timeout=DEADLINE_S, capture_output=True, text=True, env=env,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# Operations and their ends.


def test_bytes_get_to_the_device(bench: Bench) -> None:
    ended = bench.load()
    assert (ended.failed, set(ended.statuses)) == (None, {DONE})
    assert (bench.slab == bench.source).all()


def test_no_operations_are_done_at_once() -> None:
    assert run([]).failed is None


def test_an_operation_goes_where_its_spans_say(bench: Bench) -> None:
    source, slab = address(bench.source), address(bench.slab)
    one = op(flags=FROM_MEMORY | TO_DEVICE, offset=source, nbytes=3 * PAGE, n_spans=2)
    assert run([one], [(5, slab + 100, 2 * PAGE), (2 * PAGE + 5, slab, 7)], device=bench.device).failed is None
    assert (bench.slab[100 : 100 + 2 * PAGE] == bench.source[5 : 2 * PAGE + 5]).all()
    assert (bench.slab[:7] == bench.source[2 * PAGE + 5 :][:7]).all()
    assert not bench.slab[7:100].any()
    assert not bench.slab[100 + 2 * PAGE :].any()


def test_registered_memory_is_read_by_the_device_itself(bench: Bench) -> None:
    bench.device.register(address(bench.source), 6 * PAGE)
    counters = bench.load().counters
    bench.device.unregister(address(bench.source))
    assert (counters["by_device"], counters["copied"]) == (6 * PAGE, 10 * PAGE)
    assert (bench.slab == bench.source).all()


@pytest.mark.parametrize("flags", [0, FROM_MEMORY, POPULATE, FROM_MEMORY | POPULATE])
def test_nothing_may_go_nowhere(flags: int, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as file:
        for target in (0, 5):  # the page of which nobody can populate
            assert run([op(file.fileno(), flags=flags, target=target)]).statuses == [DONE]


def test_the_first_error_cancels_the_rest(tmp_path: Path) -> None:
    missing = op(name=0, nbytes=0)
    with opened(tmp_path) as folder:
        ended = run([missing] * 9, names=b"missing\0", folder=folder, threads=1)
    assert (ended.failed, ended.statuses) == (0, [-errno.ENOENT] + [CANCELED] * 8)


def test_counters_are_added_to() -> None:
    counters = np.ones(N_COUNTERS, "u8")
    for _ in range(2):
        _engine.run(np.array([op()], OPERATION), names=b"\0", counters=counters)  # "" is not there
        _engine.run(np.array([op(flags=FROM_MEMORY)], OPERATION), counters=counters)
    assert counters[COUNTERS.index("done")] == 3


# Errors of the driver during a run.


def test_an_error_of_a_piece_is_its_operations_whatever_comes_after(bench: Bench) -> None:
    bench.standin.configure("fail=cuEventSynchronize:1:719,not_ready=9")
    cut_short = run(*bench.copies(8 * PAGE), device=bench.device, threads=1)
    assert (cut_short.failed, cut_short.statuses) == (0, [DRIVER_ERROR - 719])


def test_an_operation_is_not_done_when_only_its_last_piece_arrived(bench: Bench) -> None:
    bench.standin.configure("fail=cuEventSynchronize:1:719,not_ready=9")
    told: list[int] = []
    ended = run(*bench.copies(2 * PAGE), device=bench.device, threads=1, on_done=told.extend)
    assert (ended.failed, ended.statuses, told) == (0, [DRIVER_ERROR - 719], [])


def test_nothing_is_under_way_after_a_wait_that_failed(bench: Bench) -> None:
    bench.standin.configure("fail=cuEventSynchronize:2:719,not_ready=9")
    run(*bench.copies(PAGE, PAGE), device=bench.device, threads=1)
    assert bench.standin.facts().in_flight_nbytes == 0


def test_a_copy_that_failed_is_not_counted(bench: Bench) -> None:
    bench.standin.configure("fail=cuMemcpyHtoDAsync_v2:3:719")
    ended = run(*bench.copies(8 * PAGE), device=bench.device, threads=1)
    assert ended.counters["copied"] == bench.standin.facts().copied_nbytes == 2 * PAGE


def test_everything_is_given_back_after_an_error_for_good(bench: Bench) -> None:
    bench.standin.configure("fail=cuMemcpyHtoDAsync_v2:3:700,sticky=1")
    ended = run(*bench.copies(8 * PAGE, PAGE), device=bench.device, threads=1)
    assert (ended.failed, ended.statuses) == (0, [DRIVER_ERROR - 700, CANCELED])
    bench.device.close()
    assert bench.standin.leaks() == []


def test_an_error_before_the_run_is_raised_and_nothing_runs(bench: Bench) -> None:
    bench.standin.configure("fail=cuEventRecord:1:719")
    with pytest.raises(DriverError) as caught:
        bench.load()
    assert caught.value.args == (719, "CUDA_ERROR_LAUNCH_FAILED")
    assert not bench.slab.any()


# While it lasts.


def test_on_done_is_told_each_operation_once_in_order(bench: Bench) -> None:
    told: list[int] = []
    bench.load(threads=1, on_done=told.extend)
    assert told == list(range(6))


def test_on_done_is_told_on_the_callers_thread(bench: Bench) -> None:
    threads: set[int] = set()
    bench.load(on_done=lambda _: threads.add(threading.get_ident()))
    assert threads == {threading.get_ident()}


def test_what_on_done_is_told_is_on_the_device(bench: Bench) -> None:
    wrong: list[int] = []

    def look(indexes: list[int]) -> None:
        for index in indexes:
            part = slice(index * 3 * PAGE, (index + 1) * 3 * PAGE)
            if (bench.slab[part] != bench.source[part]).any():
                wrong.append(index)

    bench.load(on_done=look)
    assert wrong == []


def test_what_on_done_raises_ends_the_run_and_comes_out() -> None:
    endless, calls = Endless(), []

    def refuse(indexes: list[int]) -> None:
        calls.append(indexes)
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        endless.run(refuse)
    assert len(calls) == 1
    assert endless.was_cut_short()
    assert threads_of_the_engine() == []


def test_on_done_that_cannot_be_called_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        run([op(flags=FROM_MEMORY)], on_done=3)


def test_another_thread_sees_the_counters_move() -> None:
    endless, seen = Endless(), threading.Event()

    def watch() -> None:
        endless.until_it_runs()
        seen.set()

    watcher = threading.Thread(target=watch)
    watcher.start()

    def wait(_: list[int]) -> None:
        assert seen.wait(DEADLINE_S)
        endless.stop[0] = 1

    endless.run(wait)
    watcher.join()
    assert endless.was_cut_short()


def test_another_thread_may_stop_it_which_is_no_error() -> None:
    endless = Endless()

    def stop() -> None:
        endless.until_it_runs()
        endless.stop[0] = 1

    thread = threading.Thread(target=stop)
    thread.start()
    failed = endless.run()
    thread.join()
    assert failed is None
    assert endless.was_cut_short()


def test_nothing_is_done_when_it_is_stopped_before() -> None:
    stop = np.ones(2, "i4")
    ended = run([op(flags=FROM_MEMORY)] * 3, stop=stop)
    assert (ended.failed, ended.statuses) == (None, [CANCELED] * 3)


def test_a_handler_that_raises_ends_the_run() -> None:
    endless = Endless()

    def refuse(number: int, _: object) -> None:
        raise InterruptedError(number)

    def send() -> None:
        endless.until_it_runs()
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, refuse)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        with pytest.raises(InterruptedError):
            endless.run()
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    assert endless.was_cut_short()
    assert threads_of_the_engine() == []


def test_sigint_is_a_keyboard_interrupt_that_leaves_nothing_running() -> None:
    script = """if True:
        import os, signal, threading
        from test_run import Endless, threads_of_the_engine

        endless = Endless()

        def interrupt():
            endless.until_it_runs()
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            endless.run()
        except KeyboardInterrupt:
            print("interrupted", endless.was_cut_short(), threads_of_the_engine())
        thread.join()
    """
    assert run_script(script) == "interrupted True []\n"


def test_a_signal_that_nobody_minds_is_no_end() -> None:
    endless = Endless(n_ops=2000)
    handled: list[int] = []

    def send() -> None:
        endless.until_it_runs()
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, lambda number, _: handled.append(number))
    sender = threading.Thread(target=send)
    sender.start()
    try:
        assert endless.run() is None
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    assert handled == [signal.SIGUSR1]
    assert (endless.ops["status"] == DONE).all()


def test_threads_have_a_name_and_are_as_many_as_asked_for() -> None:
    endless, seen = Endless(), []

    def look(_: list[int]) -> None:
        seen.append(len(threads_of_the_engine()))
        endless.stop[0] = 1

    _engine.run(endless.ops, threads=3, stop=endless.stop, on_done=look)
    assert seen[0] == 3
    assert threads_of_the_engine() == []


def test_threads_run_where_they_are_told() -> None:
    allowed = os.sched_getaffinity(0)
    chosen, seen, endless = max(allowed), [], Endless()

    def look(_: list[int]) -> None:
        seen.extend(os.sched_getaffinity(thread) for thread in threads_of_the_engine())
        endless.stop[0] = 1

    cpus = bytes(int(cpu == chosen) for cpu in range(chosen + 1))
    _engine.run(endless.ops, threads=1, cpus=cpus, stop=endless.stop, on_done=look)
    assert seen[0] == {chosen}


def test_where_no_processor_asked_for_is_there_a_run_takes_any() -> None:
    assert run([op(flags=FROM_MEMORY)], cpus=bytes(1023) + b"\1").failed is None


def test_a_stream_being_captured_is_refused(bench: Bench) -> None:
    bench.standin.configure("capturing=1")
    with pytest.raises(OSError, match="busy"):
        run([op(flags=FROM_MEMORY)], device=bench.device)
    bench.standin.configure("capturing=0")
    assert run([op(flags=FROM_MEMORY)], device=bench.device).failed is None


def test_what_only_says_it_is_a_device_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a Device"):
        run([op(flags=FROM_MEMORY)], device=mock.create_autospec(Device, instance=True))


def test_runs_of_several_threads_share_a_device(bench: Bench) -> None:
    ends: list[Ended] = []
    halves = [np.zeros_like(bench.source) for _ in range(4)]

    def load(slab: Bytes) -> None:
        one = op(flags=FROM_MEMORY | TO_DEVICE, offset=address(bench.source), nbytes=slab.nbytes, n_spans=1)
        ends.append(run([one], [(0, address(slab), slab.nbytes)], device=bench.device, threads=2))

    for slab in halves:
        bench.driver.adopt(address(slab), slab.nbytes, 0)
    threads = [threading.Thread(target=load, args=(slab,)) for slab in halves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    assert [ended.statuses for ended in ends] == [[DONE]] * 4
    assert all((slab == bench.source).all() for slab in halves)


# What is refused before anything runs.


def of_zeroes(nbytes: int) -> memoryview:
    return memoryview(np.zeros(nbytes // 8 + 1, "u8")).cast("B")[:nbytes]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ops": of_zeroes(OP_NBYTES - 1)},
        {"ops": of_zeroes(OP_NBYTES + 4)[4:]},
        {"spans": of_zeroes(SPAN_NBYTES + 1)},
        {"spans": of_zeroes(SPAN_NBYTES + 4)[4:]},
        {"counters": of_zeroes(8 * N_COUNTERS - 8)},
        {"counters": of_zeroes(8 * N_COUNTERS + 4)[4:]},
        {"stop": of_zeroes(4)},
        {"stop": of_zeroes(12)[4:]},
        {"names": b"name"},
        {"threads": 0},
        {"threads": -1},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_wrong_sizes_are_refused(wrong: dict[str, Any]) -> None:
    ops = np.array([op(flags=FROM_MEMORY)], OPERATION)
    with pytest.raises(ValueError, match="expected"):
        _engine.run(**({"ops": ops} | wrong))
    assert ops["status"][0] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"ops": bytes(OP_NBYTES)},
        {"ops": np.zeros(2 * OP_NBYTES, "u1")[::2]},
        {"ops": 3},
        {"counters": bytes(8 * N_COUNTERS)},
        {"stop": bytes(8)},
        {"device": 3},
        {"device": "cuda"},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_wrong_objects_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, BufferError, ValueError)):
        _engine.run(**({"ops": np.array([op(flags=FROM_MEMORY)], OPERATION)} | wrong))


def test_buffers_are_released_whatever_came_of_it() -> None:
    ops = bytearray(np.array([op(flags=FROM_MEMORY)], OPERATION).tobytes())
    _engine.run(ops)
    with pytest.raises(ValueError):
        _engine.run(ops, threads=0)
    with pytest.raises(ValueError):
        _engine.run(ops, names=b"name")
    ops.extend(b"resized: nobody holds a view")


HUGE = 1 << 63


@pytest.mark.parametrize(
    "wrong",
    [
        {"flags": 64},
        {"flags": FROM_MEMORY, "nbytes": HUGE},
        {"flags": FROM_MEMORY, "offset": HUGE},
        {"flags": FROM_MEMORY, "offset": HUGE - 1, "nbytes": 1},
        {"flags": FROM_MEMORY, "nbytes": 1, "target": 1},
        {"flags": FROM_MEMORY, "offset": 1, "nbytes": 1},
        {"flags": FROM_MEMORY | CHECK},
        {"flags": CHECK, "offset": 1},
        {"name": 5},
        {"name": HUGE},
        {"flags": FROM_MEMORY | TO_DEVICE, "first_span": 3},
        {"flags": FROM_MEMORY | TO_DEVICE, "n_spans": 3},
        {"flags": FROM_MEMORY | TO_DEVICE, "first_span": 2, "n_spans": 1},
        {"flags": FROM_MEMORY | TO_DEVICE, "offset": 1, "nbytes": 9, "n_spans": 1},
        {"flags": FROM_MEMORY | TO_DEVICE, "offset": 1, "nbytes": 20, "n_spans": 2},
    ],
    ids=lambda wrong: "-".join(f"{name}={value}" for name, value in wrong.items()),
)
def test_an_operation_that_makes_no_sense_is_named_before_anything_runs(bench: Bench, wrong: dict[str, int]) -> None:
    target = np.zeros(1, "u1")
    good = op(flags=FROM_MEMORY, offset=address(b"x"), nbytes=1, target=address(target))
    spans = [(0, address(bench.slab), 10), (9, address(bench.slab) + 10, 10)]  # the second begins within the first
    ops = np.array([good, op(**wrong), op(flags=64)], OPERATION)
    with pytest.raises(ValueError, match=r"operation 1 makes no sense"):
        _engine.run(ops, np.array(spans, SPAN), names=b"name\0", device=bench.device)
    assert target[0] == 0
    assert bench.standin.facts().copies == 0


def test_an_operation_to_no_device_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="operation 0 makes no sense"):
        run([op(flags=FROM_MEMORY | TO_DEVICE)])


def test_a_span_to_nowhere_makes_no_sense(bench: Bench) -> None:
    with pytest.raises(ValueError, match="operation 0 makes no sense"):
        run([op(flags=FROM_MEMORY | TO_DEVICE, n_spans=1)], [(0, 0, 0)], device=bench.device)


# The device.


def test_a_closed_device_holds_nothing(bench: Bench) -> None:
    bench.device.register(address(bench.source), PAGE)
    bench.load()
    bench.device.close()
    facts = bench.standin.facts()
    held = (facts.contexts, facts.streams, facts.events, facts.registrations, facts.host_allocations)
    assert held == (0, 0, 0, 0, 0)


def test_a_forgotten_device_holds_nothing(driver_standin: StandIn) -> None:
    Device(Driver(str(driver_standin.path)), 0, PAGE, 3)
    assert driver_standin.leaks() == []


def test_a_device_may_be_closed_twice_and_is_of_no_use_then(bench: Bench) -> None:
    bench.device.close()
    bench.device.close()
    uses: list[Callable[[], object]] = [
        bench.load, bench.device.ring, lambda: bench.device.register(8, 8), lambda: bench.device.unregister(8),
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(ValueError, match="the device is closed"):
            use()


def test_a_device_in_use_is_not_closed(bench: Bench) -> None:
    with pytest.raises(BufferError, match="in use"):
        bench.load(on_done=lambda _: bench.device.close())
    assert bench.load().failed is None


def test_the_callers_context_stays(driver_standin: StandIn) -> None:
    driver_standin.configure("devices=2")
    with driver_standin.context(1) as context:
        bench = Bench(driver_standin)
        bench.device.register(address(bench.source), PAGE)
        bench.load()
        bench.device.close()
        assert driver_standin._made("cuCtxGetCurrent") == context


def test_work_of_another_stream_comes_before(bench: Bench) -> None:
    standin = bench.standin
    with standin.context():
        stream = standin.stream()
        standin.fill(address(bench.slab), 0xEE, bench.slab.nbytes, stream)
        bench.load(after=stream)
        standin.synchronize(stream)
        standin.destroy_stream(stream)
    assert (bench.slab == bench.source).all()


def test_several_devices_in_one_process(driver_standin: StandIn) -> None:
    driver_standin.configure("devices=3")
    benches = [Bench(driver_standin, ordinal) for ordinal in range(3)]
    for bench in benches:
        assert bench.load().failed is None
        assert (bench.slab == bench.source).all()
        bench.device.close()


@pytest.mark.parametrize(("slot_nbytes", "n_slots"), [(0, 1), (PAGE + 1, 1), (PAGE, 0), (PAGE, MAX_SLOTS + 1)])
def test_a_ring_that_makes_no_sense_is_an_os_error(driver_standin: StandIn, slot_nbytes: int, n_slots: int) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        Device(Driver(str(driver_standin.path)), 0, slot_nbytes, n_slots)


def test_a_device_that_is_not_there_is_a_driver_error(driver_standin: StandIn) -> None:
    with pytest.raises(DriverError) as caught:
        Device(Driver(str(driver_standin.path)), 1, PAGE, 1)
    assert caught.value.args == (101, "CUDA_ERROR_INVALID_DEVICE")


def test_a_device_wants_a_driver() -> None:
    with pytest.raises(TypeError, match="expected a Driver"):
        Device("libcuda.so.1", 0, PAGE, 1)  # type: ignore[arg-type]


RINGS = (
    ("", ("registered", 0, PAGE, 2)),
    ("fail=cuMemHostRegister_v2:1:801", ("allocated", 801, PAGE, 2)),
    ("fail=cuMemHostRegister_v2:1:2,fail=cuMemHostAlloc:1:2", ("pageable", 2, PAGE, 2)),
)


@pytest.mark.parametrize(("settings", "ring"), RINGS, ids=[ring[0] for _, ring in RINGS])
def test_the_ring_is_locked_as_well_as_can_be_and_right(
    driver_standin: StandIn, settings: str, ring: tuple[str, int, int, int]
) -> None:
    driver_standin.configure(settings)
    bench = Bench(driver_standin)
    assert bench.load().failed is None
    assert (bench.slab == bench.source).all()
    assert bench.device.ring() == ring
    assert (driver_standin.facts().unpinned_copies > 0) == (ring[0] == "pageable")
    bench.device.close()


def test_what_overlaps_a_registration_is_refused(bench: Bench) -> None:
    start = address(bench.source)
    bench.device.register(start + 100, 100)
    for first, nbytes in ((start, 101), (start + 199, 1), (start + 150, 10), (start, PAGE)):
        with pytest.raises(FileExistsError):
            bench.device.register(first, nbytes)
    bench.device.register(start + 200, 100)
    with pytest.raises(FileNotFoundError):
        bench.device.unregister(start)


def test_a_registration_that_the_driver_refuses_is_its_error(bench: Bench) -> None:
    bench.standin.configure("fail=cuMemHostRegister_v2:1:2")
    with pytest.raises(DriverError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        bench.device.register(address(bench.source), PAGE)
    assert bench.load().counters["by_device"] == 0


def test_a_forked_child_is_told_and_the_parent_goes_on(standin_path: Path) -> None:
    script = """if True:
        import errno, os, sys
        from pathlib import Path
        from engine import address
        from standin import StandIn
        from test_run import Bench, PAGE

        bench = Bench(StandIn(Path(sys.argv[1])))
        child = os.fork()
        if child == 0:
            for use in (bench.load, lambda: bench.device.register(address(bench.source), PAGE)):
                try:
                    use()
                except OSError as error:
                    print(errno.errorcode[error.errno], end=" ")
            bench.device.close()
            print(bench.standin.violations(), flush=True)
            os._exit(0)
        print(os.waitpid(child, 0)[1], bench.load().failed, (bench.slab == bench.source).all())
        bench.device.close()
        print(bench.standin.leaks(), bench.standin.violations())
    """
    assert run_script(script, standin_path) == "ECHILD ECHILD []\n0 None True\n[] []\n"


# The driver.


def test_no_library_is_a_driver_error_with_a_reason() -> None:
    with pytest.raises(DriverError) as caught:
        Driver("libnothing.so.1")
    code, reason = caught.value.args
    assert code == 0
    assert reason.startswith("no driver: libnothing.so.1")


@pytest.mark.parametrize("name", ["cuMemHostRegister_v2", "cuThreadExchangeStreamCaptureMode"])
def test_a_missing_symbol_is_a_driver_error_that_names_it(standin_path: Path, name: str) -> None:
    library = build_standin(standin_path.parent, f"WCS_WITHOUT_{name}")
    with pytest.raises(DriverError) as caught:
        Driver(str(library))
    assert caught.value.args == (0, f"the driver {library} lacks {name}: a newer one has it")


@pytest.mark.parametrize(
    ("settings", "code", "name"),
    [
        ("devices=0", 100, "CUDA_ERROR_NO_DEVICE"),
        ("fail=cuInit:1:3", 3, "CUDA_ERROR_NOT_INITIALIZED"),
        ("fail=cuInit:1:999", 999, "CUDA_ERROR_UNKNOWN"),
        ("fail=cuInit:1:803", 803, "unknown"),
    ],
)
def test_a_driver_that_does_not_start_says_why(driver_standin: StandIn, settings: str, code: int, name: str) -> None:
    driver_standin.configure(settings)
    with pytest.raises(DriverError) as caught:
        Driver(str(driver_standin.path))
    assert caught.value.args == (code, f"the driver {driver_standin.path} does not start: {name} ({code})")


def test_a_driver_describes_its_devices(driver_standin: StandIn) -> None:
    driver_standin.configure("devices=2,memory=5000")
    driver = Driver(str(driver_standin.path))
    assert (driver.is_stand_in, driver.count(), driver.version()) == (True, 2, 12040)
    assert driver.describe(1) == ("Stand-in 1", "FFFF:01:00.0", 5000)
    assert (driver.error_name(700), driver.error_name(12345)) == (
        "CUDA_ERROR_ILLEGAL_ADDRESS", "an error of no name",
    )  # fmt: skip
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_DEVICE"):
        driver.describe(2)


def test_memory_that_cannot_pose_as_a_devices_is_an_os_error(driver_standin: StandIn) -> None:
    driver = Driver(str(driver_standin.path))
    memory = np.zeros(8, "u1")
    with pytest.raises(OSError, match="Invalid argument"):
        driver.adopt(address(memory), memory.nbytes, 1)
    with pytest.raises(FileNotFoundError):
        driver.forget(address(memory), memory.nbytes, 0)
