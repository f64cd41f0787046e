"""Own a batch of the engine's operations: put together one by one, carried out in one call, each with its own end.

Never opens a file, never holds memory (its caller keeps sources and targets alive until the call returns), and never
says what an error means for a model.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from weightcache import _engine
from weightcache.errors import CapacityError, DeviceError, WeightcacheError

# struct wc_op and struct wc_span of ext/run.h.
_OPERATION = np.dtype(
    [
        ("fd", "i4"),
        ("flags", "u4"),
        ("name", "u8"),
        ("offset", "u8"),
        ("nbytes", "u8"),
        ("target", "u8"),
        ("first_span", "u4"),
        ("n_spans", "u4"),
        ("checksum", "u8"),
        ("status", "i4"),
        ("reread", "u4"),
        ("moved", "u8"),
    ]
)
_SPAN = np.dtype([("from", "u8"), ("to", "u8"), ("nbytes", "u8")])
assert (_OPERATION.itemsize, _SPAN.itemsize) == (_engine.OP_NBYTES, _engine.SPAN_NBYTES)
_COUNTERS = ("direct", "cached", "checked", "copied", "by_device", "done", "reread", "refused")
assert len(_COUNTERS) == _engine.N_COUNTERS
_DRIVER_ERRORS_BELOW = -1_000_000  # as in ext/cuda.h


@dataclass(frozen=True, slots=True)
class HostPlace:
    """Where bytes go in host memory.

    Attributes:
        address: Of the first byte.
        is_padded: The memory goes on to the next multiple of 4 KiB and may be written there.
        is_fresh: It was perhaps never touched: it is populated first.
    """

    address: int
    is_padded: bool = False
    is_fresh: bool = False


@dataclass(frozen=True, slots=True)
class DevicePlace:
    """Where bytes go in a device's memory: spans (from, to, nbytes), ascending by `from`, an offset in the bytes.

    What no span names is read and checked, and goes nowhere.
    """

    spans: Sequence[tuple[int, int, int]]


Place = HostPlace | DevicePlace


@dataclass(frozen=True, slots=True)
class Target:
    """The device that device places lie on: the engine's, and torch's current stream there, which goes first."""

    device: _engine.Device
    after: int = 0


class Stop:
    """Ends a run early, from any thread: it returns soon after, with the operations it did not carry out cancelled."""

    def __init__(self) -> None:
        self.flag = np.zeros(2, "i4")  # one is used; the engine wants eight bytes

    def set(self) -> None:
        self.flag[0] = 1

    def is_set(self) -> bool:
        return bool(self.flag[0])


class Stopped(Exception):
    """A run ended because it was told to."""


class Counters:
    """What runs have done so far. Safe to read while one lasts; safe to hand to several runs."""

    def __init__(self) -> None:
        self.array: npt.NDArray[np.uint64] = np.zeros(_engine.N_COUNTERS, "u8")

    def __getattr__(self, name: str) -> int:
        if name not in _COUNTERS:
            raise AttributeError(name)
        return int(self.array[_COUNTERS.index(name)])


@dataclass(frozen=True, slots=True)
class Crew:
    """Who carries operations out, and under whose eyes.

    Attributes:
        threads: Of the engine, at most.
        target: The device, wanted where an operation goes to one.
        cpus: One byte a processor, 1 where the threads may run; empty for anywhere.
        counters: Counted on while a run lasts.
        stop: Ends a run early.
    """

    threads: int
    target: Target | None = None
    cpus: bytes = b""
    counters: Counters = field(default_factory=Counters)
    stop: Stop = field(default_factory=Stop)


@dataclass(frozen=True, slots=True)
class Failure:
    """The operation whose error came first, and that error: an errno, or a driver's code where errno is 0."""

    index: int
    errno: int
    driver_code: int

    def as_error(self, what: str) -> WeightcacheError | OSError:
        """Return the error to raise: of the device, of memory that cannot be had, or the system's."""
        if self.driver_code:
            return DeviceError(
                f"{what}: the driver failed with CUDA error {self.driver_code}; the device may have to be reset: see "
                "nvidia-smi, and dmesg for Xid errors",
                driver_code=self.driver_code,
            )
        if self.errno == errno.ENOMEM:
            return CapacityError(f"{what}: no memory could be had for it; free some, or raise the limit")
        return OSError(self.errno, os.strerror(self.errno))


class Operations:
    """Operations to be carried out together. Made for one use, by one thread."""

    def __init__(self, folder_fd: int = -1) -> None:
        self._folder_fd = folder_fd
        self._rows: list[tuple[int, ...]] = []
        self._spans: list[tuple[int, int, int]] = []
        self._names = bytearray()
        self._array: npt.NDArray[np.void] = np.zeros(0, _OPERATION)

    def __len__(self) -> int:
        return len(self._rows)

    def read_named(
        self,
        name: str,
        offset: int,
        nbytes: int,
        place: Place,
        *,
        checksum: int | None = None,
        past_cache: bool = False,
    ) -> None:
        """Bring bytes of a file below the folder to their place, checked where a checksum is given."""
        flags = _engine.PAST_CACHE if past_cache else 0
        self._add(-1, flags, len(self._names), offset, nbytes, place, checksum)
        self._names += name.encode() + b"\0"

    def read_open(self, fd: int, offset: int, nbytes: int, place: Place) -> None:
        """Bring bytes of an open file to their place; its descriptor may be shared."""
        self._add(fd, 0, 0, offset, nbytes, place, None)

    def copy(self, address: int, nbytes: int, place: Place) -> None:
        """Bring bytes of host memory to their place."""
        self._add(-1, _engine.FROM_MEMORY, 0, address, nbytes, place, None)

    def _add(
        self, fd: int, flags: int, name: int, offset: int, nbytes: int, place: Place, checksum: int | None
    ) -> None:
        target, first_span = 0, len(self._spans)
        if isinstance(place, DevicePlace):
            flags |= _engine.TO_DEVICE
            self._spans += place.spans
        else:
            target = place.address
            flags |= _engine.PADDED * place.is_padded | _engine.POPULATE * place.is_fresh
        if checksum is not None:
            flags |= _engine.CHECK
        n_spans = len(self._spans) - first_span
        self._rows.append((fd, flags, name, offset, nbytes, target, first_span, n_spans, checksum or 0, 0, 0, 0))

    def run(self, crew: Crew, on_done: Callable[[Sequence[int]], None] | None = None) -> Failure | None:
        """Carry all of them out; return the error that came first, or None when each is done.

        The first error cancels what has not begun. When this returns nothing is under way any more, and what is done
        is done: on a device too, for any stream.

        Args:
            crew: The threads, the device, and who counts and stops.
            on_done: Told, on this thread, the indexes of operations in the order they are done. What it raises ends
                the run and comes out of here.

        Raises:
            Stopped: The crew's stop was set.
            DeviceError: The device cannot be used at all.
            CapacityError: No thread could be had.
            KeyboardInterrupt: Within some 50 ms, in the main thread.
        """
        self._array = np.array(self._rows, _OPERATION)
        try:
            failed = _engine.run(
                self._array.data,
                np.array(self._spans, _SPAN).data,
                bytes(self._names),
                self._folder_fd,
                crew.target.device if crew.target else None,
                crew.target.after if crew.target else 0,
                crew.threads,
                crew.cpus,
                crew.counters.array.data,
                crew.stop.flag.data,
                on_done,
            )
        except _engine.DriverError as exc:
            raise DeviceError(f"the device cannot be used: {exc.args[1]} ({exc.args[0]})") from exc
        except OSError as exc:
            if exc.errno == errno.ECHILD:
                raise DeviceError("CUDA cannot be used in a process that was forked after it was: use 'spawn'") from exc
            if exc.errno == errno.EBUSY:
                raise DeviceError("a CUDA graph is being captured on the stream of this load: load before") from exc
            raise CapacityError(f"no thread could be had ({exc.strerror}): raise the limit of processes") from exc
        if failed is None:
            if crew.stop.is_set() and not (self._array["status"] == _engine.DONE).all():
                raise Stopped
            return None
        row = self._array[failed]
        status = int(row["status"])
        if status <= _DRIVER_ERRORS_BELOW:
            return Failure(failed, 0, _DRIVER_ERRORS_BELOW - status)
        return Failure(failed, -status, 0)

    def is_done(self, index: int) -> bool:
        """Tell whether an operation was done in the run."""
        return int(self._array[index]["status"]) == _engine.DONE


def address_of(view: memoryview) -> int:
    """Return the address of a contiguous view's first byte; the view must be held as long as it is used."""
    return int(np.frombuffer(view, "u1").__array_interface__["data"][0])
