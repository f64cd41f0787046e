"""Own what bench_origin.py compares: ways to receive the ranges of a model's files into an image.

Never decides what is compared with what. Options of the cases:

    range_nbytes, connections   of one request, and requests in flight
    is_fresh                    whether the image is made within the clock; else it is one that was populated before
    is_digested                 ours: whether BLAKE3 of each range is computed beside, on N_DIGEST_THREADS threads

Clients are made, and folders listed, before the clock; connections are dialled within it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import measuring
from images import Image, Piece, warm_torch
from measuring import Job, Loaded

N_DIGEST_THREADS = 2
OBSTORE_TIMEOUT = "300s"  # its own 30 s are for a whole answer, and on a slow link one may take longer


# -- weightcache


def receive(job: Job) -> Callable[[], Loaded]:
    """Receive by weightcache's origin alone: no plan, no checkpoint, no cache."""
    options = job["options"]
    # Before the runtime is made: settings are read once a session, threads counted once a process.
    os.environ["WEIGHTCACHE_CONNECTIONS"] = str(options["connections"])
    os.environ["WEIGHTCACHE_THREADS"] = str(N_DIGEST_THREADS)
    from weightcache.report import Report
    from weightcache.session import Request, open_session

    report = Report(uri=job["uri"])
    session = open_session(Request(job["uri"], storage_options=job["storage_options"], cache="none"), report)
    stats = {stat.path: stat for stat in session.threads.run(session.origin.list())}
    image_of = _image_maker(job)

    def run() -> Loaded:
        image = image_of()

        async def bring() -> None:

            async def one(piece: Piece) -> None:
                async with session.origin.slot():
                    if options["is_fresh"]:
                        await session.threads.on_worker(image.populate, piece)
                    await session.origin.read_into(stats[piece.name], piece.start, [piece.view])
                if options["is_digested"]:
                    await session.threads.on_worker(_digest, piece)

            async with asyncio.TaskGroup() as group:
                for piece in image.pieces(options["range_nbytes"]):
                    group.create_task(one(piece))
            await session.close_origin()

        session.threads.run(bring())

        def facts() -> dict[str, Any]:
            image_bytes = image.memory.nbytes if options["is_fresh"] else 0  # else it is part of the base
            return {"n_requests": report.n_requests, "n_retries": report.n_retries, "image_bytes": image_bytes}

        return Loaded(image.tensors(), facts=facts)

    return run


def _digest(piece: Piece) -> None:
    from weightcache.digest import Digest

    Digest.of(piece.view)


# -- peers


def c_client(job: Job) -> Callable[[], Loaded]:
    """Receive by client.c: a thread with a blocking socket a connection.

    With the option `one_range_each`, every connection asks once, for its share: a plain TCP stream.
    """
    library = ctypes.CDLL(job["client"])
    library.receive_pieces.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    options = job["options"]
    address = urlsplit(next(iter(job["urls"].values())))
    image_of = _image_maker(job)
    limit = options["range_nbytes"]
    if options.get("one_range_each"):
        limit = -(-sum(job["sizes"].values()) // options["connections"])

    class CPiece(ctypes.Structure):
        """The `struct piece` of client.c."""

        _fields_ = (
            ("request", ctypes.c_char_p),
            ("request_nbytes", ctypes.c_size_t),
            ("target", ctypes.c_void_p),
            ("nbytes", ctypes.c_size_t),
        )

    def run() -> Loaded:
        image = image_of()
        pieces = image.pieces(limit)
        told = (CPiece * len(pieces))()
        for each, piece in zip(told, pieces, strict=True):
            request = _request(job["urls"][piece.name], piece)
            target = ctypes.addressof(ctypes.c_char.from_buffer(piece.view))
            each.request, each.request_nbytes, each.target, each.nbytes = request, len(request), target, len(piece.view)
        host, port = str(address.hostname).encode(), address.port or 80
        result = library.receive_pieces(host, port, ctypes.addressof(told), len(pieces), options["connections"])
        if result:
            raise OSError(-result, os.strerror(-result))
        return Loaded(image.tensors())

    return run


def obstore_ranges(job: Job) -> Callable[[], Loaded]:
    """Receive by obstore's get_range on a thread a connection; its Rust side releases the GIL."""
    store, prefix = open_obstore(job)
    options = job["options"]
    image_of = _image_maker(job)

    def bring(piece: Piece) -> None:
        path = f"{prefix}/{piece.name}"
        piece.view[:] = memoryview(store.get_range(path, start=piece.start, length=len(piece.view)))

    def run() -> Loaded:
        image = image_of()
        with ThreadPoolExecutor(options["connections"]) as pool:
            list(pool.map(bring, image.pieces(options["range_nbytes"])))
        return Loaded(image.tensors())

    return run


def open_obstore(job: Job) -> tuple[Any, str]:
    """Return a store of obstore's, and what stands before the names of files in it."""
    from obstore.store import HTTPStore, S3Store

    client = {"allow_http": True, "timeout": OBSTORE_TIMEOUT}
    if job["certificate"]:
        client["root_certificate"] = Path(job["certificate"]).read_text()
    options = job["storage_options"]
    if "key" not in options:
        return HTTPStore.from_url(job["endpoint"], client_options=client), job["bucket"]
    store = S3Store(
        job["bucket"],
        endpoint=options["endpoint_url"],
        access_key_id=options["key"],
        secret_access_key=options["secret"],
        region="us-east-1",
        unsigned_payload=True,  # what is written is not hashed first, as ours is not
        client_options=client,
    )
    return store, job["prefix"]


def aiohttp_ranges(job: Job) -> Callable[[], Loaded]:
    """Receive by aiohttp on uvloop, piece by piece as they come."""
    import aiohttp

    context = ssl.create_default_context(cafile=job["certificate"]) if job["certificate"] else True

    async def connect(held: AsyncExitStack) -> Callable[[Piece], Awaitable[None]]:
        connector = aiohttp.TCPConnector(limit=job["options"]["connections"], ssl=context)
        session = await held.enter_async_context(aiohttp.ClientSession(connector=connector))

        async def bring(piece: Piece) -> None:
            headers = {"Range": f"bytes={piece.start}-{piece.stop - 1}"}
            async with session.get(job["urls"][piece.name], headers=headers) as answer:
                answer.raise_for_status()
                at = 0
                async for part in answer.content.iter_any():
                    piece.view[at : at + len(part)] = part
                    at += len(part)

        return bring

    return _on_a_loop(job, connect)


def aiobotocore_ranges(job: Job) -> Callable[[], Loaded]:
    """Receive by aiobotocore on uvloop; without credentials, as from a public bucket, where the server is no S3."""
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session
    from botocore import UNSIGNED

    config = AioConfig(
        max_pool_connections=job["options"]["connections"], signature_version=UNSIGNED, s3={"addressing_style": "path"}
    )

    async def connect(held: AsyncExitStack) -> Callable[[Piece], Awaitable[None]]:
        making = get_session().create_client("s3", endpoint_url=job["endpoint"], region_name="us-east-1", config=config)
        client = await held.enter_async_context(making)

        async def bring(piece: Piece) -> None:
            answer = await client.get_object(
                Bucket=job["bucket"], Key=piece.name, Range=f"bytes={piece.start}-{piece.stop - 1}"
            )
            async with answer["Body"] as body:
                piece.view[:] = await body.read()

        return bring

    return _on_a_loop(job, connect)


def s3fs_ranges(job: Job) -> Callable[[], Loaded]:
    """Receive by s3fs's cat_ranges, all in one call; without credentials."""
    from s3fs import S3FileSystem

    options = job["options"]
    filesystem = S3FileSystem(
        anon=True,
        endpoint_url=job["endpoint"],
        skip_instance_cache=True,
        config_kwargs={"max_pool_connections": options["connections"], "s3": {"addressing_style": "path"}},
    )
    filesystem.connect()
    image_of = _image_maker(job)

    def run() -> Loaded:
        image = image_of()
        pieces = image.pieces(options["range_nbytes"])
        bodies = filesystem.cat_ranges(
            [f"{job['bucket']}/{piece.name}" for piece in pieces],
            [piece.start for piece in pieces],
            [piece.stop for piece in pieces],
            batch_size=options["connections"],
        )
        for piece, body in zip(pieces, bodies, strict=True):
            piece.view[:] = body
        return Loaded(image.tensors())

    return run


def tensorizer(job: Job) -> Callable[[], Loaded]:
    """Deserialise from the bucket with tensorizer what its own serialiser put there, to the CPU."""
    from tensorizer import TensorDeserializer
    from tensorizer.stream_io import open_stream

    options = job["storage_options"]

    def run() -> Loaded:
        stream = open_stream(
            job["tensorized"],
            "rb",
            s3_access_key_id=options["key"],
            s3_secret_access_key=options["secret"],
            s3_endpoint=options["endpoint_url"],
            s3_region_name="us-east-1",
            force_http=True,
        )
        with TensorDeserializer(stream, device="cpu") as deserializer:
            return Loaded(measuring.touch(dict(deserializer.items())))

    return run


# -- what they share


def _image_maker(job: Job) -> Callable[[], Image]:
    """Return what gives the image: one populated now, or a fresh one when it is called."""
    if job["options"]["is_fresh"]:
        warm_torch()
        return lambda: Image(job["sizes"], is_populated=False)
    image = Image(job["sizes"])
    return lambda: image


def _request(url: str, piece: Piece) -> bytes:
    parts = urlsplit(url)
    target = f"{parts.path}?{parts.query}" if parts.query else parts.path
    last = piece.stop - 1
    return f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nRange: bytes={piece.start}-{last}\r\n\r\n".encode()


def _on_a_loop(
    job: Job, connect: Callable[[AsyncExitStack], Coroutine[Any, Any, Callable[[Piece], Awaitable[None]]]]
) -> Callable[[], Loaded]:
    """Return a run that receives all pieces on a uvloop, as many at a time as connections.

    Args:
        connect: Makes a client, closed by the stack, and returns what brings a piece by it.
    """
    import uvloop

    options = job["options"]
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    held = AsyncExitStack()
    bring = runner.run(connect(held))
    image_of = _image_maker(job)

    async def serve(waiting: Iterator[Piece]) -> None:
        for piece in waiting:
            await bring(piece)

    async def bring_all(pieces: Iterator[Piece]) -> None:
        async with held, asyncio.TaskGroup() as group:
            for _ in range(options["connections"]):
                group.create_task(serve(pieces))

    def run() -> Loaded:
        image = image_of()
        with runner:
            runner.run(bring_all(iter(image.pieces(options["range_nbytes"]))))
        return Loaded(image.tensors())

    return run


LOADERS = (
    receive,
    c_client,
    obstore_ranges,
    aiohttp_ranges,
    aiobotocore_ranges,
    s3fs_ranges,
    tensorizer,
)
