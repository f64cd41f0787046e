"""Where S3 is, told without dialling: it is part of a model's name on this node."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from weightcache.errors import ConfigError
from weightcache.origins.s3 import endpoint_of
from weightcache.stores import Replica


def test_options_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all")
    assert endpoint_of({"endpoint_url": "http://given/"}) == "http://given"
    assert endpoint_of({"client_kwargs": {"endpoint_url": "http://nested"}}) == "http://nested"


def test_the_name_for_s3_comes_before_the_general_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert endpoint_of({}) == ""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all")
    assert endpoint_of({}) == "http://all"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3")
    assert endpoint_of({}) == "http://s3"


def test_a_profile_names_its_endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[profile tigris]\nendpoint_url = https://t3.example\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    assert endpoint_of({"profile": "tigris"}) == "https://t3.example"
    with pytest.raises(ConfigError, match="nobody"):
        endpoint_of({"profile": "nobody"})


def test_configured_endpoints_can_be_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all")
    assert endpoint_of({"config_kwargs": {"ignore_configured_endpoint_urls": True}}) == ""
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert endpoint_of({}) == ""
    assert endpoint_of({"endpoint_url": "http://given"}) == "http://given"


@pytest.mark.parametrize(
    ("endpoint", "dialled"), [("", "https://s3.eu-west-1.amazonaws.com"), ("http://given:9000", "http://given:9000")]
)
def test_replica_is_where_its_table_says(endpoint: str, dialled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://all")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    replica = Replica("r", "s3://bucket/registry", endpoint)
    assert endpoint_of(replica.options) == endpoint

    async def dialled_by_a_client() -> str:
        client = await S3FileSystem(asynchronous=True, skip_instance_cache=True, **replica.options).set_session()
        try:
            return str(client.meta.endpoint_url)
        finally:
            await client.close()

    assert asyncio.run(dialled_by_a_client()) == dialled


def test_g27_credentials_in_an_endpoint_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        endpoint_of({"endpoint_url": "http://user:hidden@host"})
    assert "hidden" not in str(refused.value)
