"""Every origin keeps the origin contract; S3 has more to prove: endpoints, credentials, addressing, pages."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from origin_contract import BODY, OriginContract, Place, read_unchanged, use
from servers import DOMAIN, Bucket, HttpServer, Proxy

import weightcache
from weightcache.errors import (
    AccessDeniedError,
    ConfigError,
    ModelNotFoundError,
    OriginUnreachableError,
    TransientOriginError,
    UnsafePathError,
)
from weightcache.origins.base import Origin, Stat
from weightcache.origins.generic import FsspecOrigin
from weightcache.origins.local import LocalOrigin
from weightcache.origins.pace import throttle
from weightcache.origins.plane import Wiring
from weightcache.origins.s3 import S3Origin
from weightcache.origins.web import WebOrigin

N_CONNECTIONS = 8
WIRING = Wiring(patience_s=20.0)


# -- local


class Folder:
    """A folder on this machine."""

    def __init__(self, folder: Path, workers: ThreadPoolExecutor) -> None:
        self.folder = folder
        self._workers = workers

    def put(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def remove(self, name: str) -> None:
        (self.folder / name).unlink()

    def open(self, *, missing: bool = False) -> LocalOrigin:
        return LocalOrigin(self.folder / "missing" if missing else self.folder, self._workers)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    with ThreadPoolExecutor(4) as workers:
        (tmp_path / "origin").mkdir()
        yield Folder(tmp_path / "origin", workers)


class TestLocalOrigin(OriginContract):
    @pytest.fixture
    def place(self, folder: Folder) -> Folder:
        return folder


def listed(place: Place) -> list[str]:
    return sorted(stat.path for stat in use(place, lambda origin: origin.list()))


def test_an_empty_folder_is_not_found(folder: Folder) -> None:
    with pytest.raises(ModelNotFoundError, match="empty"):
        listed(folder)


def test_a_git_folder_is_no_part_of_a_model(folder: Folder) -> None:
    folder.put("weights", BODY)
    folder.put(".git/objects/aa/bb", b"x")
    assert listed(folder) == ["weights"]


def test_links_inside_the_folder_are_followed(folder: Folder) -> None:
    folder.put("blobs/weights", BODY)
    (folder.folder / "weights").symlink_to("blobs/weights")

    async def work(origin: Origin) -> list[bytes]:
        return [await read_unchanged(origin, stat) for stat in await origin.list()]

    assert use(folder, work) == [BODY, BODY]


def test_g20_links_out_of_the_folder_are_refused(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    folder.put("weights", BODY)
    (folder.folder / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafePathError, match=r"config\.json"):
        listed(folder)


def test_g20_what_is_no_regular_file_is_refused_without_waiting(folder: Folder) -> None:
    os.mkfifo(folder.folder / "pipe")
    with pytest.raises(UnsafePathError, match="pipe"):
        listed(folder)


def test_hugging_face_snapshots_lead_to_their_blobs(tmp_path: Path) -> None:
    entry = tmp_path / "models--org--name"
    (entry / "blobs").mkdir(parents=True)
    (entry / "blobs" / "123").write_bytes(BODY)
    (entry / "snapshots" / "abc").mkdir(parents=True)
    (entry / "snapshots" / "abc" / "weights").symlink_to("../../blobs/123")
    with ThreadPoolExecutor(1) as workers:
        assert listed(Folder(entry / "snapshots" / "abc", workers)) == ["weights"]


# -- fsspec


class MemoryPlace:
    """A folder of fsspec's memory file system."""

    def __init__(self) -> None:
        self.uri = f"memory://{secrets.token_hex(6)}/model"
        self._fs = fsspec.filesystem("memory")

    def put(self, name: str, content: bytes) -> None:
        self._fs.pipe_file(f"{self.uri}/{name}", content)

    def remove(self, name: str) -> None:
        self._fs.rm_file(f"{self.uri}/{name}")

    def open(self, *, missing: bool = False) -> FsspecOrigin:
        return FsspecOrigin("memory", f"{self.uri}/missing" if missing else self.uri, {}, throttle(0), N_CONNECTIONS)

    def clear(self) -> None:
        if self._fs.exists(self.uri):
            self._fs.rm(self.uri, recursive=True)


class TestFsspecOriginOverMemory(OriginContract):
    @pytest.fixture
    def place(self) -> Iterator[MemoryPlace]:
        place = MemoryPlace()
        yield place
        place.clear()


class HttpPlace:
    """A folder behind a web server."""

    def __init__(self, folder: Folder, server: HttpServer) -> None:
        self.put, self.remove = folder.put, folder.remove
        self._server = server

    def open(self, *, missing: bool = False) -> WebOrigin:
        return open_web(f"{self._server.endpoint}/missing" if missing else self._server.endpoint)


def open_web(uri: str, **options: Any) -> WebOrigin:
    return WebOrigin(uri, options, WIRING, throttle(0))


class TestWebOrigin(OriginContract):
    @pytest.fixture
    def place(self, folder: Folder, http_folder: Callable[[Path], HttpServer]) -> HttpPlace:
        return HttpPlace(folder, http_folder(folder.folder))


@pytest.mark.parametrize("word", ["whole", "short", "503"])
def test_g06_what_is_not_the_range_asked_for_never_becomes_data(
    folder: Folder, http_folder: Callable[[Path], HttpServer], word: str
) -> None:
    folder.put("model.safetensors", BODY)
    with Proxy(http_folder(folder.folder).address) as proxy:

        async def work(origin: WebOrigin) -> None:
            [stat] = await origin.list()
            proxy.script("GET .*safetensors", word)
            memory = bytearray(100)
            with pytest.raises(TransientOriginError):
                await origin.read_into(stat, 1000, [memoryview(memory)])

        async def run() -> None:
            origin = open_web(proxy.endpoint)
            try:
                await work(origin)
            finally:
                await origin.close()

        asyncio.run(run())


def test_a_web_server_that_lists_nothing_is_asked_for_well_known_names(
    folder: Folder, http_folder: Callable[[Path], HttpServer]
) -> None:
    folder.put("config.json", b"{}")
    folder.put("model.safetensors", BODY)
    folder.put("unknown.json", b"{}")
    with Proxy(http_folder(folder.folder).address) as proxy:
        proxy.script("GET /$", "404")

        class Silent:
            def open(self, *, missing: bool = False) -> WebOrigin:
                return open_web(proxy.endpoint)

        assert listed(Silent()) == ["config.json", "model.safetensors"]


def test_a_web_folder_may_have_any_name(folder: Folder, http_folder: Callable[[Path], HttpServer]) -> None:
    folder.put("my mödel/100%/model.safetensors", BODY)

    async def run() -> dict[str, bytes]:
        origin = open_web(f"{http_folder(folder.folder).endpoint}/my mödel")
        try:
            return {stat.path: await read_unchanged(origin, stat) for stat in await origin.list()}
        finally:
            await origin.close()

    assert asyncio.run(run()) == {"100%/model.safetensors": BODY}


def test_a_listing_that_fails_leaves_no_look_under_way(
    folder: Folder, http_folder: Callable[[Path], HttpServer]
) -> None:
    for number in range(60):
        folder.put(f"{number:03}.json", b"{}")
    with Proxy(http_folder(folder.folder).address) as proxy:
        proxy.script("HEAD /000", "403")
        proxy.script("HEAD /001", "429")

        async def run() -> int:
            origin = open_web(proxy.endpoint)
            try:
                with pytest.raises(TransientOriginError):
                    await origin.list()
                return len(proxy.requests)
            finally:
                await origin.close()

        n_asked = asyncio.run(run())
        assert n_asked < 60
        assert len(proxy.requests) <= n_asked + 16  # those that had left


def test_g09_a_server_that_closes_what_it_accepts_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def hang_up() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    listener.accept()[0].close()

        closer = threading.Thread(target=hang_up)
        closer.start()
        try:
            for _ in range(5):
                with pytest.raises(OriginUnreachableError):
                    weightcache.plan(f"http://127.0.0.1:{listener.getsockname()[1]}/m", cache="none")
        finally:
            stop.set()
            socket.create_connection(listener.getsockname()).close()
            closer.join()


# -- S3


class S3Place:
    """A prefix of a bucket."""

    def __init__(self, bucket: Bucket, **options: Any) -> None:
        self.bucket = bucket
        self._options = options or bucket.server.storage_options()

    def put(self, name: str, content: bytes) -> None:
        self.bucket.put(f"models/name/{name}", content)

    def remove(self, name: str) -> None:
        self.bucket.client.delete_object(Bucket=self.bucket.name, Key=f"models/name/{name}")

    def open(self, *, missing: bool = False) -> S3Origin:
        return self.open_with(self._options, "models/missing" if missing else "models/name")

    def open_with(self, options: dict[str, Any], prefix: str = "models/name", file: str | None = None) -> S3Origin:
        uri = f"{self.bucket.url}/{prefix}" if prefix else self.bucket.url
        return S3Origin(uri, options, WIRING, throttle(0), file)


@pytest.fixture
def place(bucket: Bucket) -> S3Place:
    return S3Place(bucket)


class TestS3Origin(OriginContract):
    @pytest.fixture
    def place(self, bucket: Bucket) -> S3Place:
        return S3Place(bucket)


def names_with(
    place: S3Place, options: dict[str, Any], prefix: str = "models/name", file: str | None = None
) -> list[str]:
    """List the place by an origin with these options."""

    async def run() -> Sequence[Stat]:
        origin = place.open_with(options, prefix, file)
        try:
            return await origin.list()
        finally:
            await origin.close()

    return sorted(stat.path for stat in asyncio.run(run()))


def test_more_keys_than_one_page_are_listed(place: S3Place) -> None:
    names = [f"shard-{number:05}" for number in range(1500)]
    with ThreadPoolExecutor(16) as threads:
        concurrent.futures.wait([threads.submit(place.put, name, b"x") for name in names])
    assert listed(place) == names


def test_neighbours_of_the_prefix_and_folder_markers_are_no_part_of_it(place: S3Place) -> None:
    place.put("weights", BODY)
    place.bucket.put("models/name-2/weights", BODY)
    place.bucket.client.put_object(Bucket=place.bucket.name, Key="models/name/sub/", Body=b"")
    assert listed(place) == ["weights"]


def test_a_whole_bucket_is_a_folder(place: S3Place) -> None:
    place.put("weights", BODY)
    assert names_with(place, place.bucket.server.storage_options(), "") == ["models/name/weights"]


def test_one_named_object_is_listed_alone(place: S3Place) -> None:
    place.put("weights", BODY)
    place.put("other", BODY)
    options = place.bucket.server.storage_options()
    assert names_with(place, options, file="weights") == ["weights"]
    with pytest.raises(ModelNotFoundError, match="models/name"):
        names_with(place, options, file="missing")


def test_no_bucket_is_not_found(place: S3Place) -> None:
    options = place.bucket.server.storage_options()

    async def run() -> None:
        origin = S3Origin("s3://no-such-bucket/name", options, WIRING, throttle(0))
        try:
            await origin.list()
        finally:
            await origin.close()

    with pytest.raises(ModelNotFoundError, match="no-such-bucket"):
        asyncio.run(run())


@pytest.mark.parametrize("wrong", [{"secret": "wrong"}, {"key": "nobody"}], ids=["secret", "key"])
def test_wrong_credentials_are_denied(place: S3Place, wrong: dict[str, str]) -> None:
    place.put("weights", BODY)
    options = place.bucket.server.storage_options() | wrong
    with pytest.raises(AccessDeniedError, match="refused") as caught:
        names_with(place, options)
    assert options["secret"] not in str(caught.value)


def test_no_credentials_are_denied_without_asking_the_network(place: S3Place, proxy: Proxy) -> None:
    place.put("weights", BODY)
    with pytest.raises(AccessDeniedError, match="AWS_ACCESS_KEY_ID"):
        names_with(place, {"endpoint_url": proxy.endpoint})
    assert proxy.requests == []


def test_anonymous_access_to_a_private_bucket_is_denied(place: S3Place) -> None:
    place.put("weights", BODY)
    with pytest.raises(AccessDeniedError):
        names_with(place, {"anon": True, "endpoint_url": place.bucket.server.endpoint})


def test_a_profile_that_is_not_there_is_a_setting_that_cannot_be_used(place: S3Place) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        names_with(place, {"profile": "nowhere", "endpoint_url": place.bucket.server.endpoint})


@pytest.mark.parametrize("form", ["endpoint_url", "client_kwargs"])
def test_the_endpoint_may_come_by_storage_options(place: S3Place, proxy: Proxy, form: str) -> None:
    place.put("weights", BODY)
    options: dict[str, Any] = place.bucket.server.storage_options()
    del options["endpoint_url"]
    if form == "endpoint_url":
        options["endpoint_url"] = proxy.endpoint
    else:
        options["client_kwargs"] = {"endpoint_url": proxy.endpoint}
    assert names_with(place, options) == ["weights"]
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_endpoint_and_credentials_may_come_from_the_environment(
    place: S3Place, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place.put("weights", BODY)
    server = place.bucket.server
    monkeypatch.setenv(name, proxy.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    assert names_with(place, {}) == ["weights"]
    assert len(proxy.requests) == 1


@pytest.mark.parametrize("by", ["environment", "storage_options"])
def test_endpoint_and_credentials_may_come_from_a_profile(
    place: S3Place, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: str
) -> None:
    place.put("weights", BODY)
    server = place.bucket.server
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id = nobody\naws_secret_access_key = wrong\n"
        f"[lab]\naws_access_key_id = {server.key}\naws_secret_access_key = {server.secret}\n"
    )
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {proxy.endpoint}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    if by == "environment":
        monkeypatch.setenv("AWS_PROFILE", "lab")
    assert names_with(place, {"profile": "lab"} if by == "storage_options" else {}) == ["weights"]
    assert len(proxy.requests) == 1


def test_path_addressing_can_be_demanded(place: S3Place, proxy: Proxy) -> None:
    place.put("weights", BODY)
    options: dict[str, Any] = place.bucket.server.storage_options(proxy.endpoint)
    options["config_kwargs"] = {"s3": {"addressing_style": "path"}}
    assert names_with(place, options) == ["weights"]
    assert proxy.requests[0].path.startswith(f"/{place.bucket.name}?")


def test_virtual_addressing_can_be_demanded(place: S3Place, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    place.put("weights", BODY)
    resolve = socket.getaddrinfo

    def resolve_localhost(host: Any, *arguments: Any, **kwargs: Any) -> Any:
        """Names below localhost are this machine (RFC 6761), which not every resolver knows."""
        return resolve("127.0.0.1" if str(host).endswith(".localhost") else host, *arguments, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve_localhost)
    port = proxy.address.rpartition(":")[2]
    options: dict[str, Any] = place.bucket.server.storage_options(f"http://{DOMAIN}:{port}")
    options["config_kwargs"] = {"s3": {"addressing_style": "virtual"}}
    assert names_with(place, options) == ["weights"]
    assert proxy.requests[0].path.startswith("/?list-type=2")


def test_a_requester_who_pays_says_so_and_signs_it(place: S3Place, proxy: Proxy) -> None:
    place.put("weights", BODY)
    options = place.bucket.server.storage_options(proxy.endpoint) | {"requester_pays": True}

    async def run() -> bytes:
        origin = place.open_with(options)
        try:
            [stat] = await origin.list()
            return await read_unchanged(origin, stat)
        finally:
            await origin.close()

    assert asyncio.run(run()) == BODY
    assert all("x-amz-request-payer" in request.path for request in proxy.requests)


@pytest.mark.parametrize(("wrong", "right"), [("endpont_url", "endpoint_url"), ("secret_key", "secret")])
def test_an_option_that_is_spelled_wrongly_is_refused(place: S3Place, wrong: str, right: str) -> None:
    options = place.bucket.server.storage_options()
    with pytest.raises(ConfigError, match=rf"'{wrong}'.*did you mean '{right}'"):
        place.open_with(options | {wrong: options[right]})
