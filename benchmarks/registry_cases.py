"""Own what bench_registry.py compares where a model is published: weightcache, and plain parallel writes of the same bytes.

Never decides what is compared with what. The others write the chunks that publishing writes, each as an object with a key
of the same form, N_WRITES at a time, read from the model's files as ours are. Their clients are made before the clock;
connections are dialled within it. None of them hashes a body that it sends, where it can be told not to.
"""

from __future__ import annotations

import asyncio
import http.client
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from measuring import Job, Loaded
from origin_cases import open_obstore

N_WRITES = 16  # as many as weightcache has under way
REGION = "us-east-1"


# -- weightcache


def publish(job: Job) -> Callable[[], Loaded]:
    """Publish the folder."""
    import s3fs  # noqa: F401
    import uvloop  # noqa: F401

    import weightcache
    import weightcache.origins.local_writer
    import weightcache.origins.s3_writer
    import weightcache.registries

    def run() -> Loaded:
        done = weightcache.publish(job["uri"], job["destination"], destination_options=job["storage_options"])
        return Loaded(facts=done.as_dict)

    return run


def publish_again(job: Job) -> Callable[[], Loaded]:
    """Publish the folder where it was published before the clock: nothing is to be uploaded."""
    run = publish(job)
    run()
    return run


# -- peers


class Part(NamedTuple):
    """A range of a file, and the key of the object that it becomes."""

    path: str
    start: int
    nbytes: int
    key: str

    def read(self) -> bytes:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(fd, self.nbytes, self.start)
        finally:
            os.close(fd)


def boto3_puts(job: Job) -> Callable[[], Loaded]:
    """Write by boto3's put_object on threads; over HTTP it insists on the SHA-256 of every body."""
    client = _boto3_client(job)

    def write(part: Part) -> None:
        client.put_object(Bucket=job["bucket"], Key=part.key, Body=part.read())

    return _on_threads(job, write)


def obstore_puts(job: Job) -> Callable[[], Loaded]:
    """Write by obstore's put on threads; its Rust side releases the GIL."""
    store, _ = open_obstore(job)
    return _on_threads(job, lambda part: store.put(part.key, part.read(), use_multipart=False))


def plain_puts(job: Job) -> Callable[[], Loaded]:
    """Write by http.client on threads, to URLs signed before the clock: the least a client can do."""
    client = _boto3_client(job)
    parts = _parts(job)
    urls = {
        part.key: client.generate_presigned_url("put_object", {"Bucket": job["bucket"], "Key": part.key})
        for part in parts
    }
    server = urlsplit(job["storage_options"]["endpoint_url"]).netloc
    waiting = iter(parts)

    def serve(number: int) -> None:
        with closing(http.client.HTTPConnection(server)) as connection:
            for part in waiting:
                address = urlsplit(urls[part.key])
                connection.request("PUT", f"{address.path}?{address.query}", body=part.read())
                answer = connection.getresponse()
                answer.read()
                if answer.status >= 300:
                    raise OSError(f"{part.key} was answered by {answer.status}")

    def run() -> Loaded:
        with ThreadPoolExecutor(N_WRITES) as pool:
            list(pool.map(serve, range(N_WRITES)))
        return Loaded()

    return run


def aiobotocore_puts(job: Job) -> Callable[[], Loaded]:
    """Write by aiobotocore on uvloop; it insists on the SHA-256 of every body, too."""
    import uvloop
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    parts = _parts(job)
    config = AioConfig(**_config(job))
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    held = AsyncExitStack()
    client = runner.run(held.enter_async_context(get_session().create_client("s3", config=config, **_place(job))))
    waiting = iter(parts)

    async def serve() -> None:
        for part in waiting:
            body = await asyncio.to_thread(part.read)
            await client.put_object(Bucket=job["bucket"], Key=part.key, Body=body)

    async def write_all() -> None:
        async with held, asyncio.TaskGroup() as group:
            for _ in range(N_WRITES):
                group.create_task(serve())

    def run() -> Loaded:
        with runner:
            runner.run(write_all())
        return Loaded()

    return run


# -- what they share


def _parts(job: Job) -> list[Part]:
    """Return the chunks of the model, with keys like those that publishing gives them."""
    from weightcache.origins.chunked import chunk_name
    from weightcache.report import Report
    from weightcache.session import Request, describe_model, open_session

    session = open_session(Request(job["uri"], cache="none"), Report(job["uri"]))
    session.threads.run(describe_model(session))
    chunks = [(shard.path, chunk) for shard in session.manifest.shards for chunk in shard.chunks]
    return [
        Part(f"{job['uri']}/{path}", chunk.start, chunk.nbytes, chunk_name(f"{number * 2654435761 % 2**32:08x}" * 8))
        for number, (path, chunk) in enumerate(chunks)
    ]


def _on_threads(job: Job, write: Callable[[Part], object]) -> Callable[[], Loaded]:
    parts = _parts(job)

    def run() -> Loaded:
        with ThreadPoolExecutor(N_WRITES) as pool:
            list(pool.map(write, parts))
        return Loaded()

    return run


def _boto3_client(job: Job) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(**_config(job)), **_place(job))


def _place(job: Job) -> dict[str, str]:
    options = job["storage_options"]
    return {
        "endpoint_url": options["endpoint_url"],
        "aws_access_key_id": options["key"],
        "aws_secret_access_key": options["secret"],
        "region_name": REGION,
    }


def _config(job: Job) -> dict[str, Any]:
    return {
        "signature_version": "s3v4",
        "max_pool_connections": N_WRITES,
        "s3": {"addressing_style": "path"},
        "request_checksum_calculation": "when_required",
    }


LOADERS = (publish, publish_again, boto3_puts, obstore_puts, plain_puts, aiobotocore_puts)
