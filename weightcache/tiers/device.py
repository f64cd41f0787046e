"""Own the devices of this process: the driver opened once, a ring of page-locked slots each, and slabs of their memory.

Never allocates device memory but through torch, and never waits for torch's streams: copies are ordered after them.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from weightcache import _engine
from weightcache.errors import CapacityError, DeviceError
from weightcache.layout import ChunkKey, Packing, Placement
from weightcache.machine import cpus_of_node, memory_available_bytes, numa_node_of
from weightcache.operations import Crew, DevicePlace, Operations, Target, address_of
from weightcache.tiers.host import Scratch

log = logging.getLogger(__name__)

SLOT_NBYTES = 8 << 20  # from 4 MiB on, two copies in flight keep a link at 97 % (docs/decisions/011)
SLOTS_A_THREAD = 3  # one being read, one being copied, one to spare
SLAB_MULTIPLE_NBYTES = 256  # so that every dtype can view the whole of it


class Device:
    """A CUDA device as loads use it. Made once per process and device, by `device_of`; safe to use from threads."""

    def __init__(self, driver: _engine.Driver, ordinal: int, threads: int) -> None:
        self.ordinal = ordinal
        self.driver = driver
        self.name, self.bus_id, self.total_bytes = driver.describe(ordinal)
        n_slots = min(SLOTS_A_THREAD * threads, _engine.MAX_SLOTS)
        node = numa_node_of(self.bus_id)
        near = cpus_of_node(node) if node >= 0 else frozenset[int]()
        self.cpus = bytes(cpu in near for cpu in range(max(near, default=-1) + 1))
        self.engine = _engine.Device(driver, ordinal, SLOT_NBYTES, n_slots, node)

    def describe_ring(self) -> str:
        """Say how the ring is page-locked, and why not better."""
        kind, refused, slot_nbytes, n_slots = self.engine.ring()
        size = f"{n_slots} slots of {slot_nbytes >> 20} MiB"
        why = self.driver.error_name(refused) if refused else ""
        return {
            "registered": f"{size}, page-locked",
            "allocated": f"{size}, page-locked by the driver: it refused to register huge pages ({why})",
            "pageable": f"{size}, pageable and so slower: the driver refused to page-lock them ({why})",
        }[kind]

    def register(self, address: int, nbytes: int) -> Callable[[], None]:
        """Let the device read frozen host memory by itself. Returns what undoes that."""
        self.engine.register(address, nbytes, frozen=True)

        def undo() -> None:
            # The device was closed, failed for good, or is another process's: nothing reads by that registration then.
            with contextlib.suppress(ValueError, OSError, _engine.DriverError):
                self.engine.unregister(address)

        return undo

    def close(self) -> None:
        self.engine.close()


@dataclass(frozen=True, slots=True)
class Landing:
    """A device and torch's stream there that its new memory is used on: the caller's current one."""

    device: Device
    torch_device: torch.device
    stream: torch.cuda.Stream | None  # None for a stand-in

    @property
    def target(self) -> Target:
        return Target(self.device.engine, self.stream.cuda_stream if self.stream else 0)

    def finish(self) -> None:
        """Wait for what was enqueued on the stream, so that every stream sees it."""
        if self.stream is not None:
            self.stream.synchronize()

    def free_nbytes(self) -> int:
        """Return how much of the device's memory nobody has allocated."""
        return memory_available_bytes() if self.stream is None else torch.cuda.mem_get_info(self.torch_device)[0]

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Return `nbytes` of device memory as uint8, at a 256-byte boundary, from torch's allocator.

        Raises:
            CapacityError: The device has no room.
        """
        if self.stream is None:
            return self._pose(nbytes)
        try:
            with torch.cuda.device(self.torch_device), torch.cuda.stream(self.stream):
                return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError as exc:
            free, total = torch.cuda.mem_get_info(self.torch_device)
            raise CapacityError(
                f"{self.torch_device} has no room for {nbytes} bytes of tensors ({free} of {total} bytes are free): free "
                "some, load fewer tensors with include=, or load to another device",
                wanted_bytes=nbytes,
                free_bytes=free,
            ) from exc

    def _pose(self, nbytes: int) -> torch.Tensor:
        """Return host memory that poses as the stand-in's device memory, for as long as copies may go there."""
        memory = _engine.Memory(nbytes, fresh=True)
        base = torch.frombuffer(memory, dtype=torch.uint8)
        self.device.driver.adopt(memory.address, nbytes, self.device.ordinal)
        weakref.finalize(base, _forget, self.device.driver, memory.address, nbytes, self.device.ordinal).atexit = False
        return base


def _forget(driver: _engine.Driver, address: int, nbytes: int, ordinal: int) -> None:
    with contextlib.suppress(OSError):  # it was reset meanwhile
        driver.forget(address, nbytes, ordinal)


class Slab:
    """A model's tensors in one piece of device memory, filled by the engine."""

    def __init__(self, packing: Packing, landing: Landing, scratch: Scratch) -> None:
        self.packing = packing
        self.landing = landing
        self.base = landing.allocate(
            -(-packing.nbytes // SLAB_MULTIPLE_NBYTES) * SLAB_MULTIPLE_NBYTES or SLAB_MULTIPLE_NBYTES
        )
        self._address = self.base.data_ptr()
        self._scratch = scratch

    @property
    def tensors(self) -> tuple[Placement, ...]:
        return self.packing.tensors

    def holds(self, key: ChunkKey) -> bool:
        return key in self.packing.spans

    def place(self, key: ChunkKey) -> DevicePlace:
        """Return where a chunk's tensors go at once."""
        return DevicePlace([(start, self._address + to, nbytes) for start, to, nbytes in self.packing.spans[key]])

    def claim(self, keys: Sequence[ChunkKey]) -> list[memoryview]:
        """Return host memory in which fetched chunks are verified."""
        return self._scratch.claim(keys)

    def accept(self, key: ChunkKey, view: memoryview, crew: Crew) -> None:
        """Bring a verified chunk to the device; it is there when this returns."""
        operations = Operations()
        operations.copy(address_of(view), len(view), self.place(key))
        failure = operations.run(crew)
        if failure is not None:
            raise failure.as_error(f"{len(view)} bytes to {self.landing.torch_device}")

    def settle(self, placement: Placement) -> None:
        """Do nothing: every tensor is copied to a place that its dtype likes."""


def resolve_device(device: str | torch.device, libcuda: str) -> tuple[torch.device, str]:
    """Return the device meant and, for "auto", why.

    Raises:
        DeviceError: A device this process does not have.
    """
    if device == "auto":
        if torch.cuda.is_available():
            current = torch.device("cuda", torch.cuda.current_device())
            return current, f"{current}: the current CUDA device"
        return torch.device("cpu"), "cpu: torch sees no CUDA device"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as exc:
        raise DeviceError(f"no such device: {device!r}; expected auto, cpu, cuda or cuda:N") from exc
    if chosen.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {str(chosen)!r} cannot be loaded to: expected cpu or cuda")
    if chosen.type == "cuda":
        n_devices, why = torch.cuda.device_count() if torch.cuda.is_available() else 0, ""
        if n_devices == 0:
            try:
                driver = driver_of(libcuda)
                n_devices = driver.count() if driver.is_stand_in else 0
            except DeviceError as exc:
                why = f" ({exc})"
        if chosen.index is None:
            chosen = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)
        if chosen.index >= n_devices:
            raise DeviceError(
                f"device {str(device)!r} is not there: {n_devices} CUDA devices can be used{why}; see weightcache doctor, "
                "or load with device='cpu'"
            )
    return chosen, ""


_lock = threading.Lock()
_drivers: dict[str, _engine.Driver] = {}
_devices: dict[tuple[str, int], Device] = {}
_owner_pid = os.getpid()


def driver_of(path: str) -> _engine.Driver:
    """Open the driver, once a process. Raises DeviceError with the reason why there is none."""
    check_fork(path)
    with _lock:
        if path not in _drivers:
            try:
                _drivers[path] = _engine.Driver(path)
            except _engine.DriverError as exc:
                raise DeviceError(
                    f"no CUDA device can be used: {exc.args[1]}; see weightcache doctor, or load with device='cpu'"
                ) from exc
            if _drivers[path].is_stand_in:
                log.warning("%s is no CUDA driver but a stand-in: its devices are host memory", path)
        return _drivers[path]


def check_fork(path: str) -> None:
    """Raise DeviceError in a process that was forked from one that had opened the driver."""
    if os.getpid() != _owner_pid and path in _drivers:
        raise DeviceError(
            "CUDA cannot be used in a process that was forked after it was: start processes with multiprocessing's "
            "'spawn', or load before in none of them"
        )


def check_capture(chosen: torch.device) -> None:
    """Raise DeviceError while the caller's current stream is being captured: what is copied then would not be."""
    if torch.cuda.is_available():
        with torch.cuda.device(chosen):
            if torch.cuda.is_current_stream_capturing():
                raise DeviceError(f"a CUDA graph is being captured on the current stream of {chosen}: load before")


def land(path: str, chosen: torch.device, threads: int) -> Landing:
    """Open a device, once a process, for a load that its caller's thread begins now.

    Raises:
        DeviceError: There is none, or it cannot be used by our engine.
    """
    driver = driver_of(path)
    ordinal = chosen.index or 0
    stream = None if driver.is_stand_in else torch.cuda.current_stream(chosen)
    with _lock:
        device = _devices.get((path, ordinal))
        if device is None:
            try:
                device = Device(driver, ordinal, threads)
            except (_engine.DriverError, OSError) as exc:
                raise DeviceError(
                    f"cuda:{ordinal} cannot be used: {exc.args[1]} ({exc.args[0]}); see nvidia-smi and weightcache doctor"
                ) from exc
            _devices[path, ordinal] = device
            if device.engine.ring()[0] != "registered":
                log.warning("cuda:%d: %s", ordinal, device.describe_ring())
    return Landing(device, chosen, stream)


@atexit.register
def close_devices() -> None:
    """Close every device and driver; for the end of the process, and for tests."""
    if os.getpid() != _owner_pid:
        return
    with _lock:
        for device in _devices.values():
            with contextlib.suppress(BufferError):  # a daemon thread may still be loading
                device.close()
        _devices.clear()
        _drivers.clear()


def _after_fork_in_child() -> None:
    global _lock, _owner_pid
    _lock = threading.Lock()
    if not _drivers:  # CUDA was never begun: the child may
        _owner_pid = os.getpid()


os.register_at_fork(after_in_child=_after_fork_in_child)
