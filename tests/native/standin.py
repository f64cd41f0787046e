"""Own the stand-in libcuda for Python: build it, and look inside the copy that the engine has loaded.

Never imports weightcache. What the library does, finds and can be told is documented in standin_cuda.h.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_ulonglong, c_void_p
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SOURCES = [HERE / "standin_cuda.c", HERE / "standin_machine.c"]
HEADERS = [HERE / "standin_cuda.h", HERE / "standin_machine.h"]
FLAGS = ["-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-fPIC", "-pthread"]

SUCCESS = 0
NON_BLOCKING = 1
NO_TIMING = 2

SIGNATURES: dict[str, list[Any]] = {
    "cuGetErrorName": [c_int, c_void_p],
    "cuGetErrorString": [c_int, c_void_p],
    "cuInit": [c_uint],
    "cuDriverGetVersion": [c_void_p],
    "cuDeviceGetCount": [c_void_p],
    "cuDeviceGet": [c_void_p, c_int],
    "cuDeviceGetName": [c_void_p, c_int, c_int],
    "cuDeviceTotalMem_v2": [c_void_p, c_int],
    "cuDeviceGetPCIBusId": [c_void_p, c_int, c_int],
    "cuDeviceGetAttribute": [c_void_p, c_int, c_int],
    "cuDevicePrimaryCtxRetain": [c_void_p, c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuCtxGetCurrent": [c_void_p],
    "cuStreamCreate": [c_void_p, c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamIsCapturing": [c_void_p, c_void_p],
    "cuStreamWaitEvent": [c_void_p, c_void_p, c_uint],
    "cuEventCreate": [c_void_p, c_uint],
    "cuEventDestroy_v2": [c_void_p],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuMemHostAlloc": [c_void_p, c_size_t, c_uint],
    "cuMemFreeHost": [c_void_p],
    "cuMemAlloc_v2": [c_void_p, c_size_t],
    "cuMemFree_v2": [c_ulonglong],
    "cuMemcpyHtoDAsync_v2": [c_ulonglong, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoHAsync_v2": [c_void_p, c_ulonglong, c_size_t, c_void_p],
    "cuMemcpyDtoH_v2": [c_void_p, c_ulonglong, c_size_t],
    "cuMemsetD8Async": [c_ulonglong, c_ubyte, c_size_t, c_void_p],
    "cuThreadExchangeStreamCaptureMode": [c_void_p],
}


def build_standin(folder: Path, *defines: str, flags: tuple[str, ...] = ()) -> Path:
    """Compile the library into a folder and return its path; what is there already is not built again.

    Args:
        folder: an existing one; the file's name tells sources, defines and flags apart.
        defines: such as `WCS_WITHOUT_cuMemHostRegister_v2`, which leaves that symbol out.
        flags: more of gcc's, such as `-fsanitize=thread`.
    """
    arguments = [*FLAGS, *flags, *(f"-D{define}" for define in defines)]
    content = hashlib.sha256(repr(arguments).encode())
    for path in SOURCES + HEADERS:
        content.update(path.read_bytes())
    library = folder / f"libstandin-{content.hexdigest()[:16]}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["gcc", *arguments, "-shared", *map(str, SOURCES), "-o", str(part)], check=True)
        part.replace(library)
    return library


class _Facts(ctypes.Structure):
    pass


@dataclass(frozen=True, slots=True)
class Facts:
    """The numbers of `struct wcs_facts`, in its order; they are explained there."""

    contexts: int
    streams: int
    events: int
    registrations: int
    host_allocations: int
    device_allocations: int
    registered_nbytes: int
    registered_nbytes_peak: int
    copies: int
    copied_nbytes: int
    unpinned_copies: int
    in_flight_nbytes: int
    in_flight_nbytes_peak: int
    calls: int
    failures: int
    violations: int


_Facts._fields_ = [(field.name, c_uint64) for field in fields(Facts)]


class DriverError(Exception):
    """A driver call that a test expected to succeed did not."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"{name} returned {code}")
        self.code = code


class StandIn:
    """The loaded library: the same copy that any dlopen() of this path in the process gets.

    `call(name, ...)` returns the driver's code whatever it is; the methods named after things raise
    DriverError unless the call succeeds. Addresses and handles are plain integers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        for name, signature in SIGNATURES.items():
            if hasattr(self._library, name):
                getattr(self._library, name).argtypes = signature
        self._library.wcs_configure.argtypes = [c_char_p]
        self._library.wcs_adopt.argtypes = [c_void_p, c_size_t, c_int]
        self._library.wcs_forget.argtypes = [c_void_p]
        for name in ("wcs_violations", "wcs_log", "wcs_leaks"):
            getattr(self._library, name).argtypes = [c_void_p, c_size_t]
            getattr(self._library, name).restype = c_size_t
        self._library.wcs_leaks.restype = c_int

    def has(self, name: str) -> bool:
        return hasattr(self._library, name)

    # Settings and findings.

    def configure(self, text: str) -> None:
        """Change the settings named in `text`; ValueError when they are not settings, or not now."""
        if rc := self._library.wcs_configure(text.encode()):
            raise ValueError(f"wcs_configure({text!r}): {os.strerror(-rc)}")

    def reset(self) -> None:
        self._library.wcs_reset()

    def adopt(self, start: int, nbytes: int, device: int = 0) -> None:
        """Let host memory pose as device memory."""
        if rc := self._library.wcs_adopt(start, nbytes, device):
            raise ValueError(f"wcs_adopt({start:#x}, {nbytes}, {device}): {os.strerror(-rc)}")

    def forget(self, start: int) -> None:
        if rc := self._library.wcs_forget(start):
            raise ValueError(f"wcs_forget({start:#x}): {os.strerror(-rc)}")

    def violations(self) -> list[str]:
        return self._lines("wcs_violations")

    def kinds(self) -> list[str]:
        """Return the kinds of the violations, in order."""
        return [line.partition(":")[0] for line in self.violations()]

    def log(self) -> list[str]:
        return self._lines("wcs_log")

    def leaks(self) -> list[str]:
        room = 1 << 20
        text = ctypes.create_string_buffer(room)
        self._library.wcs_leaks(text, room)
        return text.value.decode().splitlines()

    def facts(self) -> Facts:
        facts = _Facts()
        self._library.wcs_facts(byref(facts))
        return Facts(*(getattr(facts, field.name) for field in fields(Facts)))

    def _lines(self, function: str) -> list[str]:
        room = 1 << 16
        while True:
            text = ctypes.create_string_buffer(room)
            length = getattr(self._library, function)(text, room)
            if length < room:
                return text.value.decode().splitlines()
            room = length + (1 << 16)  # other threads may add lines meanwhile

    # The driver.

    def call(self, name: str, *arguments: Any) -> int:
        """Call a driver function and return its CUresult."""
        code: int = getattr(self._library, name)(*arguments)
        return code

    def do(self, name: str, *arguments: Any) -> None:
        """Call a driver function that must succeed."""
        if code := self.call(name, *arguments):
            raise DriverError(name, code)

    def _made(self, name: str, *arguments: Any) -> int:
        made = c_uint64()
        self.do(name, byref(made), *arguments)
        return made.value

    def retain(self, device: int = 0) -> int:
        """Initialise, retain the device's primary context, and make it current in this thread."""
        self.do("cuInit", 0)
        context = self._made("cuDevicePrimaryCtxRetain", device)
        self.do("cuCtxSetCurrent", context)
        return context

    def release(self, device: int = 0) -> None:
        self.do("cuDevicePrimaryCtxRelease_v2", device)

    @contextmanager
    def context(self, device: int = 0) -> Iterator[int]:
        """Hold the device's primary context, current in this thread."""
        context = self.retain(device)
        try:
            yield context
        finally:
            self.do("cuCtxSetCurrent", None)
            self.release(device)

    def stream(self, flags: int = NON_BLOCKING) -> int:
        return self._made("cuStreamCreate", flags)

    def event(self, flags: int = NO_TIMING) -> int:
        return self._made("cuEventCreate", flags)

    def record(self, event: int, stream: int | None) -> None:
        self.do("cuEventRecord", event, stream)

    def wait(self, stream: int | None, event: int) -> None:
        self.do("cuStreamWaitEvent", stream, event, 0)

    def synchronize(self, stream: int | None) -> None:
        self.do("cuStreamSynchronize", stream)

    def synchronize_event(self, event: int) -> None:
        self.do("cuEventSynchronize", event)

    def destroy_stream(self, stream: int) -> None:
        self.do("cuStreamDestroy_v2", stream)

    def destroy_event(self, event: int) -> None:
        self.do("cuEventDestroy_v2", event)

    def register(self, start: int, nbytes: int, flags: int = 0) -> None:
        self.do("cuMemHostRegister_v2", start, nbytes, flags)

    def unregister(self, start: int) -> None:
        self.do("cuMemHostUnregister", start)

    def allocate_host(self, nbytes: int) -> int:
        return self._made("cuMemHostAlloc", nbytes, 0)

    def free_host(self, start: int) -> None:
        self.do("cuMemFreeHost", start)

    def allocate(self, nbytes: int) -> int:
        """Allocate device memory."""
        return self._made("cuMemAlloc_v2", nbytes)

    def free(self, start: int) -> None:
        self.do("cuMemFree_v2", start)

    def copy_in(self, target: int, source: int, nbytes: int, stream: int | None) -> None:
        """Queue a copy from the host to the device."""
        self.do("cuMemcpyHtoDAsync_v2", target, source, nbytes, stream)

    def copy_out(self, target: int, source: int, nbytes: int, stream: int | None) -> None:
        """Queue a copy from the device to the host."""
        self.do("cuMemcpyDtoHAsync_v2", target, source, nbytes, stream)

    def fill(self, target: int, value: int, nbytes: int, stream: int | None) -> None:
        self.do("cuMemsetD8Async", target, value, nbytes, stream)
