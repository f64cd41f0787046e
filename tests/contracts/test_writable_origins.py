"""Every origin that can be written to keeps the contract, on a real S3 server, a real folder and fsspec's memory."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from servers import Bucket, Proxy
from writable_contract import Open, WritableContract

from weightcache.access import Access
from weightcache.config import read_settings
from weightcache.opening import open_writable
from weightcache.origins.base import WritableOrigin
from weightcache.origins.s3 import S3Origin
from weightcache.runtime import all_of, runtime
from weightcache.uri import Name


def opened(name: Name, options: dict[str, Any]) -> WritableOrigin:
    settings = read_settings()
    return open_writable(name, settings, options, runtime(), Access(settings, name)).inner


class TestS3(WritableContract):
    @pytest.fixture
    def origin(self, bucket: Bucket) -> Open:
        name = Name("s3", f"{bucket.url}/registry")
        return lambda: opened(name, bucket.server.storage_options())

    def test_a_registry_has_more_files_than_a_model_may_have(self, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(S3Origin._pages, "__defaults__", (1,))

        async def work(origin: WritableOrigin) -> int:
            await all_of(origin.put(f"chunks/{number}", b"1") for number in range(1001))
            return len(await origin.entries("chunks/"))

        assert run(work) == 1001

    def test_a_write_while_another_writes_the_same_is_tried_again(self, bucket: Bucket, proxy: Proxy) -> None:
        proxy.script("^PUT .*/weightcache.trial", "ok ok")
        proxy.script("^PUT ", "409")
        name = Name("s3", f"{bucket.url}/registry")
        settings = read_settings()
        origin = open_writable(
            name, settings, bucket.server.storage_options(proxy.endpoint), runtime(), Access(settings, name)
        )

        async def work() -> bytes:
            try:
                await origin.put("tag", b"mine", only_if="")
                return (await origin.get("tag", 100)).content
            finally:
                await origin.close()

        assert runtime().run(work()) == b"mine"


class TestS3WithoutConditions(WritableContract):
    keeps_conditions = False

    @pytest.fixture(params=["blind", "picky"])
    def origin(self, request: pytest.FixtureRequest, bucket: Bucket, proxy: Proxy) -> Open:
        proxy.script("^PUT ", f"{request.param} " * 1000)
        name = Name("s3", f"{bucket.url}/registry")
        return lambda: opened(name, bucket.server.storage_options(proxy.endpoint))


class TestFolder(WritableContract):
    @pytest.fixture
    def origin(self, tmp_path: Path) -> Open:
        name = Name("file", str(tmp_path / "registry"))
        return lambda: opened(name, {})


class TestFsspec(WritableContract):
    keeps_conditions = False

    @pytest.fixture
    def origin(self) -> Open:
        root = f"memory://registry-{uuid.uuid4().hex}"
        fsspec.filesystem("memory").makedirs(root, exist_ok=True)
        return lambda: opened(Name("memory", root), {})
