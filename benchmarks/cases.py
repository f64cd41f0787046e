"""Own the loaders that are compared, and one measured run: the program of the subprocess that each run gets.

Never decides what is compared with what. Speaks JSON lines: it hears a job, imports what its loader needs, puts page
cache and free memory into the state wanted, says "ready", waits for a line, runs, and says what it measured, or why it
failed.
"""

from __future__ import annotations

import gc
import http.client
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import engine_cases
import loader_cases
import measuring
import origin_cases
import registry_cases
import safetensors.torch
import stack_cases
import torch
from images import Image, Piece
from measuring import Job, Loaded, Loader

MIB = 1 << 20
RANGE_NBYTES = 16 * MIB  # weightcache's own, see Settings.range_bytes
N_CONNECTIONS = 16  # likewise
DIRECT_NBYTES = 8 * MIB  # a direct read; with N_READERS the fastest of ten settings tried, 15 % above 4 of 16 MiB
N_READERS = 8
HUB_WORKERS = 8  # as huggingface_hub.snapshot_download does

# -- weightcache


def weightcache(job: Job, *, offline: bool = False) -> Callable[[], Loaded]:
    """Load by URI; whether that is cold, warm or in place depends on the cache folder and the URI."""
    load = _weightcache_with_imports().load_model

    def run() -> Loaded:
        model = load(job["uri"], device="cpu", storage_options=job["storage_options"], offline=offline)

        def facts() -> dict[str, Any]:
            image = max(tensor.untyped_storage().nbytes() for tensor in model.values())
            report = model.report
            return {"image_bytes": image, "n_requests": report.n_requests, "report": report.as_dict()}

        return Loaded(measuring.touch(model), model.wait_stored if job["stores"] else None, facts)

    return run


def weightcache_offline(job: Job) -> Callable[[], Loaded]:
    """Load what the node has, without asking the origin whether it is still current."""
    return weightcache(job, offline=True)


def weightcache_hosted(job: Job) -> Callable[[], Loaded]:
    """Load what this process has brought to host memory before; bound, not touched: nothing is moved until it is read."""
    module = _weightcache_with_imports()
    module.prefetch(job["uri"], tier="host", storage_options=job["storage_options"])

    def run() -> Loaded:
        model = module.load_model(job["uri"], device="cpu", storage_options=job["storage_options"])
        return Loaded(model, facts=lambda: {"report": model.report.as_dict()})

    return run


def plan(job: Job) -> Callable[[], Loaded]:
    """Plan a load without loading."""
    module = _weightcache_with_imports()

    def run() -> Loaded:
        planned = module.plan(job["uri"], storage_options=job["storage_options"])
        return Loaded(facts=lambda: {"plan": planned.as_dict()})

    return run


def bind_stage(job: Job) -> Callable[[], Loaded]:
    """Count what a load spends on binding; copies of badly aligned tensors are part of it."""
    load = weightcache(job)

    def run() -> Loaded:
        loaded = load()
        loaded.seconds = loaded.facts()["report"]["seconds"]["bind"]
        return loaded

    return run


def bind_views(job: Job) -> Callable[[], Loaded]:
    """Bind the tensors of the first file over memory that is there; where each one lies makes no difference."""
    _weightcache_with_imports()
    from weightcache import _engine
    from weightcache.header import header_stop, parse_header
    from weightcache.tensors import Binder

    path = Path(job["files"][0])
    nbytes = path.stat().st_size
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(header_stop(length, nbytes, source=path.name) - len(length))
    entries = parse_header(header, nbytes, source=path.name).tensors
    memory = _engine.Memory(-(-nbytes // 4096) * 4096)

    def run() -> Loaded:
        binder = Binder.over(memory, torch.device("cpu"))
        tensors = {entry.name: binder.bind(entry, entry.start // 16 * 16) for entry in entries}
        return Loaded(facts=lambda: {"n_tensors": len(tensors)})

    return run


def _weightcache_with_imports() -> Any:
    """Import all that a load would import, so that no case pays for imports within its time."""
    import s3fs  # noqa: F401
    import uvloop  # noqa: F401

    import weightcache
    import weightcache.cache
    import weightcache.origins.local
    import weightcache.origins.s3
    import weightcache.tensors

    return weightcache


# -- peers on local files


def load_file(job: Job) -> Callable[[], Loaded]:
    """Map the files with safetensors and read a byte of every page."""
    return lambda: Loaded(measuring.touch(_load_files(job["files"])))


def load_file_cloned(job: Job) -> Callable[[], Loaded]:
    """Map the files with safetensors and copy every tensor to memory of its own."""
    return lambda: Loaded({name: tensor.clone() for name, tensor in _load_files(job["files"]).items()})


def load_file_pread(job: Job) -> Callable[[], Loaded]:
    """Read the files with safetensors' other backend, into memory of its own."""
    return lambda: Loaded(measuring.touch(_load_files(job["files"], backend="pread")))


def fastsafetensors(job: Job) -> Callable[[], Loaded]:
    """Read the files with fastsafetensors, without GPUDirect."""
    from fastsafetensors import fastsafe_open

    def run() -> Loaded:
        with fastsafe_open(list(job["files"]), device="cpu", nogds=True) as opened:
            return Loaded(measuring.touch({name: opened.get_tensor(name) for name in opened.keys()}))  # noqa: SIM118

    return run


def runai_streamer(job: Job) -> Callable[[], Loaded]:
    """Stream files, or objects where the job has a URI, with the Run:ai model streamer."""
    from runai_model_streamer import SafetensorsStreamer

    paths = list(job["objects"] if job["storage_options"] else job["files"])

    def run() -> Loaded:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(paths)
            return Loaded(measuring.touch(dict(streamer.get_tensors())))

    return run


def raw_direct(job: Job) -> Callable[[], Loaded]:
    """Read the files with O_DIRECT, N_READERS at a time, into memory populated before the clock: the disk's limit."""
    from weightcache import _engine

    align = _engine.ALIGNMENT  # of offset, length and address; a file's last block is read short
    sizes = {path: -(-Path(path).stat().st_size // align) * align for path in job["files"]}
    image = Image(sizes)

    def read(piece: Piece) -> None:
        path, start, view = piece
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            if os.preadv(fd, [view], start) <= len(view) - align:
                raise OSError(f"a short read at {start}")
        finally:
            os.close(fd)

    def run() -> Loaded:
        with ThreadPoolExecutor(N_READERS) as pool:
            list(pool.map(read, image.pieces(DIRECT_NBYTES)))
        return Loaded(facts=lambda: {"nbytes": image.memory.nbytes})

    return run


def _load_files(files: list[str], **options: str) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        tensors |= safetensors.torch.load_file(path, **options)
    return tensors


# -- peers that download


def boto3(job: Job) -> Callable[[], Loaded]:
    """Download each shard with boto3 and its default TransferConfig, then load_file."""
    import boto3 as library

    options = job["storage_options"]

    def run() -> Loaded:
        client = library.client(
            "s3",
            endpoint_url=options["endpoint_url"],
            aws_access_key_id=options["key"],
            aws_secret_access_key=options["secret"],
            region_name="us-east-1",
        )
        paths = [str(Path(job["target"]) / name) for name in job["names"]]
        for name, path in zip(job["names"], paths, strict=True):
            client.download_file(job["bucket"], f"{job['prefix']}/{name}", path)
        return _downloaded(paths)

    return run


def s3fs(job: Job) -> Callable[[], Loaded]:
    """Download the folder with s3fs, then load_file."""
    from s3fs import S3FileSystem

    def run() -> Loaded:
        filesystem = S3FileSystem(skip_instance_cache=True, **job["storage_options"])
        paths = [str(Path(job["target"]) / name) for name in job["names"]]
        filesystem.get(list(job["objects"]), paths)
        return _downloaded(paths)

    return run


def hub(job: Job) -> Callable[[], Loaded]:
    """Download the shards with huggingface_hub, at once, as snapshot_download does; then load_file."""
    from huggingface_hub import hf_hub_download

    def run() -> Loaded:
        with ThreadPoolExecutor(HUB_WORKERS) as pool:
            paths = list(pool.map(lambda name: hf_hub_download(job["repository"], name), job["names"]))
        return _downloaded(paths)

    return run


def raw_get(job: Job) -> Callable[[], Loaded]:
    """Receive all ranges over N_CONNECTIONS plain connections into memory populated before the clock, unverified."""
    urls: Mapping[str, str] = job["urls"]
    image = Image(job["sizes"])
    pieces = image.pieces(RANGE_NBYTES)

    def receive(own: list[Piece]) -> None:
        with closing(http.client.HTTPConnection(urlsplit(next(iter(urls.values()))).netloc)) as connection:
            for name, start, view in own:
                address = urlsplit(urls[name])
                headers = {"Range": f"bytes={start}-{start + len(view) - 1}"}
                connection.request("GET", f"{address.path}?{address.query}", headers=headers)
                answer = connection.getresponse()
                while view:
                    view = view[answer.readinto(view) :]
                answer.read()

    def run() -> Loaded:
        with ThreadPoolExecutor(N_CONNECTIONS) as pool:
            list(pool.map(receive, [pieces[first::N_CONNECTIONS] for first in range(N_CONNECTIONS)]))
        return Loaded(facts=lambda: {"nbytes": image.memory.nbytes})

    return run


def _downloaded(paths: list[str]) -> Loaded:
    return Loaded(measuring.touch(_load_files(paths)), store=lambda: _sync(paths))


def _sync(paths: list[str]) -> None:
    for path in paths:
        with Path(path).open("rb") as file:
            os.fsync(file.fileno())


LOADERS: Mapping[str, Loader] = {
    each.__name__: each
    for each in (
        weightcache,
        weightcache_offline,
        plan,
        bind_stage,
        bind_views,
        load_file,
        load_file_cloned,
        load_file_pread,
        fastsafetensors,
        runai_streamer,
        raw_direct,
        boto3,
        s3fs,
        hub,
        raw_get,
        weightcache_hosted,
        *engine_cases.LOADERS,
        *loader_cases.LOADERS,
        *origin_cases.LOADERS,
        *registry_cases.LOADERS,
        *stack_cases.LOADERS,
    )
}


# -- one run


def measure(run: Callable[[], Loaded]) -> dict[str, Any]:
    """Run once; return seconds, CPU seconds, memory, facts and the fingerprint of what was loaded."""
    gc.collect()  # what the imports left is not the loader's
    base = measuring.rss_nbytes()
    measuring.reset_peak()
    began, cpu_began = time.perf_counter(), time.process_time()
    loaded = run()
    result: dict[str, Any] = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu_began}
    result |= {name: value for name in ("seconds", "cpu_s") if (value := getattr(loaded, name)) is not None}
    if loaded.store is not None:
        loaded.store()
        result["stored_s"] = time.perf_counter() - began
        result["stored_cpu_s"] = time.process_time() - cpu_began
    result["base_rss_bytes"] = base
    result["peak_bytes"] = measuring.peak_nbytes() - base
    result["facts"] = loaded.facts()
    result["fingerprint"] = measuring.fingerprint(loaded.tensors) if loaded.tensors else ""
    return result


def set_page_cache(wanted: str, files: list[Path]) -> str:
    """Bring the files that are about to be read into the state wanted, and say what it is."""
    if wanted == "cold":
        return measuring.make_cold(files)
    if wanted == "warm":
        return measuring.make_warm(files)
    return "nothing on this disk"


def main() -> None:
    warnings.resetwarnings()  # a peer's deprecation is no failure of the measurement
    job = json.loads(sys.stdin.readline())
    os.environ.update(job["environment"])
    try:
        run = LOADERS[job["loader"]](job)
        state = set_page_cache(job["page_cache"], measuring.files_below(Path(job["reads"])) if job["reads"] else [])
        if job["back_nbytes"]:
            measuring.back_memory(job["back_nbytes"])
        print(json.dumps("ready"), flush=True)
        sys.stdin.readline()
        result = {"page_cache": state, **measure(run)}
    except Exception as error:
        traceback.print_exc(limit=-3)  # the deepest frames
        result = {"failed": f"{type(error).__name__}: {error}"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
