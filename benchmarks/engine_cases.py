"""Own what bench_engine.py compares below load_model: the engine's operations into a ready image, and raw limits.

Never decides what is compared with what, and never puts the page cache into a state: see cases.py.

An image is memory in huge pages that was populated before the clock started: what a process has that loads again.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import measuring
from images import Image
from measuring import Job, Loaded

from weightcache.operations import Counters, HostPlace, Operations

MIB = 1 << 20
OPERATION_NBYTES = 16 * MIB  # a chunk of the product
COPY_NBYTES = 8 * MIB  # of one plain read
FIO_BLOCK, FIO_DEPTH = 4 * MIB, 8  # as fast as any other setting tried on a virtual disk
HUGE_PAGE_NBYTES = 2 * MIB
FIO_TIMEOUT_S = 300.0


def engine_image(job: Job) -> Callable[[], Loaded]:
    """Bring a file into an image by operations of 16 MiB, with options `threads` and whether `verified`."""
    path, image = Path(job["files"][0]), _image(job)
    folder_fd = os.open(path.parent, os.O_RDONLY)
    nbytes = path.stat().st_size
    sums = measuring.checksums(path, OPERATION_NBYTES) if job["options"]["verified"] else []
    counters = Counters()

    def run() -> Loaded:
        operations = Operations(folder_fd)
        for number, start in enumerate(range(0, nbytes, OPERATION_NBYTES)):
            place = HostPlace(image.memory.address + start, is_padded=True)
            size = min(OPERATION_NBYTES, nbytes - start)
            operations.read_named(path.name, start, size, place, checksum=sums[number] if sums else None)
        measuring.carry_out(operations, job["options"]["threads"], counters=counters)

        def facts() -> dict[str, object]:
            read = {name: getattr(counters, name) for name in ("direct", "cached", "checked", "reread", "refused")}
            return {**read, "image": {"bytes": image.memory.nbytes, "huge_bytes": image.memory.huge_nbytes()}}

        return Loaded(image.tensors(), facts=facts)

    return run


def plain_copy(job: Job) -> Callable[[], Loaded]:
    """Read a file through the page cache into an image, COPY_NBYTES a call, on one thread: what a copy costs."""
    path, image = Path(job["files"][0]), _image(job)
    fd, nbytes = os.open(path, os.O_RDONLY), path.stat().st_size
    view = memoryview(image.memory)

    def run() -> Loaded:
        at = 0
        while at < nbytes:
            at += os.preadv(fd, [view[at : min(at + COPY_NBYTES, nbytes)]], at)
        return Loaded(image.tensors())

    return run


def fio(job: Job) -> Callable[[], Loaded]:
    """Read a file with fio and O_DIRECT, into huge pages: the disk's limit as others measure it, in its own seconds."""
    path = Path(job["files"][0])
    has_reserved = measuring.free_reserved_pages() * HUGE_PAGE_NBYTES >= 2 * FIO_BLOCK * FIO_DEPTH
    command = ["fio", "--name=raw", f"--filename={path}", "--rw=read", "--direct=1", f"--bs={FIO_BLOCK}", "--readonly"]
    command += ["--ioengine=libaio", f"--iodepth={FIO_DEPTH}", "--output-format=json"]
    command += ["--iomem=mmaphuge" if has_reserved else "--iomem=malloc"]
    environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # malloc asks for transparent huge pages

    def run() -> Loaded:
        answer = subprocess.run(
            command, env=environment, cwd="/", capture_output=True, timeout=FIO_TIMEOUT_S, check=True, text=True
        )
        told = json.loads(answer.stdout[answer.stdout.index("{") :])
        ran = told["jobs"][0]
        nbytes = path.stat().st_size
        if ran["read"]["io_bytes"] < nbytes // FIO_BLOCK * FIO_BLOCK:  # it leaves out the last, partial block
            raise OSError(f"fio read {ran['read']['io_bytes']} of {nbytes} bytes")
        return Loaded(
            facts=lambda: {
                "fio": told["fio version"],
                "buffers": "hugetlb" if has_reserved else "malloc, THP asked for",
            },
            seconds=nbytes / ran["read"]["bw_bytes"],
            cpu_s=(ran["usr_cpu"] + ran["sys_cpu"]) / 100 * ran["job_runtime"] / 1000,
        )

    return run


def _image(job: Job) -> Image:
    path = Path(job["files"][0])
    return Image({path.name: path.stat().st_size})


LOADERS = (engine_image, plain_copy, fio)
