"""Stores: what their tables say, what is refused by naming the table, and that no secret is repeated."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from weightcache.config import read_configuration, read_settings
from weightcache.errors import ConfigError
from weightcache.prices import CONFIGURED, LISTED, UNPRICED
from weightcache.residency import Policy, Site
from weightcache.stores import Replica, Store, read_node, read_site, read_stores

DOCS = Path(__file__).parents[2] / "docs" / "stores.md"
KEY = "ed25519:" + "0123456789abcdef" * 4

FULL = f"""
[stores.prod]
allow = {{ jurisdictions = ["eu"] }}
deny = {{ providers = ["aws"] }}
trust = ["{KEY}"]
publish_to = "second"
[[stores.prod.replicas]]
name = "first"
url = "s3://models/registry/"
endpoint = "https://T3.storage.dev/"
provider = "tigris"
region = "fra"
jurisdiction = "EU"
egress_usd_per_gb = 0
profile = "tigris"
access = "write"
replicates_itself = true
[[stores.prod.replicas]]
name = "second"
url = "/mnt/registry"
access = "write"
"""


def read(text: str) -> dict[str, Store]:
    return read_stores(tomllib.loads(text)["stores"], "the file")


def read_replica(**table: Any) -> Replica:
    """Read a store of one replica, whose URL is there unless given."""
    store = read_stores({"prod": {"replicas": [{"url": "s3://models/registry"} | table]}}, "the file")["prod"]
    return store.replicas[0]


def refusal(given: Mapping[str, Any]) -> str:
    """Return what is said of stores that are refused."""
    with pytest.raises(ConfigError) as caught:
        read_stores(given, "the file")
    told = str(caught.value)
    assert "the file" in told
    assert "\n" not in told
    return f"{told} {caught.value.facts} {caught.value.__cause__}"


def refusal_of(**table: Any) -> str:
    return refusal({"prod": {"replicas": [{"url": "s3://models/registry"} | table]}})


# -- what is read


def test_everything_of_a_store_is_read() -> None:
    first = Replica(
        name="first",
        url="s3://models/registry",
        endpoint="https://t3.storage.dev",
        site=Site("tigris", "fra", "eu"),
        egress_usd_per_gb=0.0,
        profile="tigris",
        is_writable=True,
        replicates_itself=True,
    )
    policy = Policy.from_form({"allow": {"jurisdictions": ["eu"]}, "deny": {"providers": ["aws"]}}, "")
    second = Replica("second", "/mnt/registry", is_writable=True)
    assert read(FULL) == {"prod": Store("prod", (first, second), policy, (KEY,), "second")}


def test_what_is_left_out_is_not_known_and_not_allowed() -> None:
    store = read('[[stores.prod.replicas]]\nurl = "memory://registry"')["prod"]
    assert store == Store("prod", (Replica("memory", "memory://registry"),))
    assert (store.policy, store.trust, store.publish_to) == (Policy(), (), "")


@pytest.mark.parametrize(
    ("table", "provider"),
    [
        ({}, "aws"),
        ({"endpoint": "https://account.eu.r2.cloudflarestorage.com"}, "r2"),
        ({"endpoint": "http://10.0.0.7:9000"}, ""),
        ({"endpoint": "http://10.0.0.7:9000", "provider": "home"}, "home"),
        ({"endpoint": "https://t3.storage.dev", "provider": "Tigris"}, "tigris"),
        ({"url": "gs://models/registry"}, "gcs"),
        ({"url": "https://models.r2.dev/registry"}, "r2"),
        ({"url": "https://models.example.com/registry"}, ""),
        ({"url": "/mnt/registry"}, ""),
    ],
)
def test_provider_is_known_where_prices_know_it(table: Mapping[str, str], provider: str) -> None:
    assert read_replica(**table).site.provider == provider


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ({"region": "eu-central-1"}, "aws-eu-central-1"),
        ({"endpoint": "https://t3.storage.dev"}, "tigris"),
        ({"endpoint": "http://10.0.0.7:9000", "region": "home"}, "10.0.0.7-home"),
        ({"endpoint": "http://[::1]:9000"}, "1"),
        ({"url": "/mnt/registry"}, "file"),
        ({"url": "https://models.example.com/registry"}, "models.example.com"),
        ({"name": "mine", "region": "eu-central-1"}, "mine"),
    ],
)
def test_name_is_made_from_the_place(table: Mapping[str, str], name: str) -> None:
    assert read_replica(**table).name == name


def test_publishers_write_to_the_first_writable_replica_unless_told() -> None:
    text = FULL.replace('publish_to = "second"', "")
    assert read(text)["prod"].publish_to == "first"
    assert read(text.replace('access = "write"', "", 1))["prod"].publish_to == "second"


def test_bucket_is_dialled_at_its_endpoint_whatever_the_environment_says() -> None:
    at_aws = {"config_kwargs": {"ignore_configured_endpoint_urls": True}}
    assert read_replica().options == at_aws
    assert read_replica(profile="prod").options == {"profile": "prod", **at_aws}
    assert read_replica(endpoint="http://h:1", profile="p").options == {"profile": "p", "endpoint_url": "http://h:1"}
    assert read_replica(url="gs://models/registry").options == {}


def test_a_caller_may_give_credentials_but_no_other_place() -> None:
    given = {"key": "k", "config_kwargs": {"ignore_configured_endpoint_urls": False, "max_pool_connections": 3}}
    own = {"ignore_configured_endpoint_urls": True}
    config = {"max_pool_connections": 3, **own}
    assert read_replica().opened_with({}) == read_replica().options
    assert read_replica().opened_with(given) == {"key": "k", "config_kwargs": config}
    assert read_replica(profile="prod").opened_with({"profile": "mine"}) == {"profile": "mine", "config_kwargs": own}
    assert read_replica(endpoint="http://h:1").opened_with({"client_kwargs": {"verify": "ca.pem"}}) == {
        "endpoint_url": "http://h:1",
        "client_kwargs": {"verify": "ca.pem"},
    }
    for elsewhere in ({"endpoint_url": "http://h:2"}, {"client_kwargs": {"endpoint_url": "http://h:2"}}):
        with pytest.raises(ConfigError, match="storage_options name an endpoint"):
            read_replica(endpoint="http://h:1").opened_with(elsewhere)


@pytest.mark.parametrize(
    ("table", "egress", "note"),
    [
        ({}, 0.09, LISTED),
        ({"egress_usd_per_gb": 0.01}, 0.01, CONFIGURED),
        ({"endpoint": "https://t3.storage.dev"}, 0.0, LISTED),
        ({"endpoint": "https://models.example.com", "provider": "gcs"}, 0.12, LISTED),
        ({"endpoint": "https://models.example.com", "provider": "home"}, 0.0, UNPRICED),
        ({"url": "/mnt/registry"}, 0.0, UNPRICED),
    ],
)
def test_replica_is_priced_by_itself_or_its_provider(table: Mapping[str, Any], egress: float, note: str) -> None:
    price = read_replica(**table).price({})
    assert (price.egress_usd_per_gb, price.note) == (egress, note)


def test_price_of_a_replica_beats_that_of_its_provider() -> None:
    overrides = {"aws": {"egress_usd_per_gb": 0.5, "get_usd_per_1000": 0.7}}
    price = read_replica(egress_usd_per_gb=0.2).price(overrides)
    assert (price.egress_usd_per_gb, price.get_usd_per_1000) == (0.2, 0.7)


# -- what is refused


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (5, "setting 'stores' in the file: expected a table"),
        ({"prod": 5}, "setting 'stores.prod' in the file: expected a table"),
        ({"Prod": {}}, "'stores.Prod' in the file: expected a name of 1 to 63"),
        ({"p" * 64: {}}, "expected a name of"),
        ({"a/b": {}}, "'stores.a/b' in the file: expected a name of"),
        ({"": {}}, "expected a name of"),
        ({"prod": {}}, "[stores.prod] in the file has no replicas: expected a table [[stores.prod.replicas]]"),
        ({"prod": {"replicas": []}}, "has no replicas"),
        ({"prod": {"replicas": {}}}, "'stores.prod.replicas' in the file: expected tables, each"),
        ({"prod": {"replicas": ["s3://b"]}}, "'stores.prod.replicas' in the file: expected tables, each"),
        ({"prod": {"replica": []}}, "unknown setting 'stores.prod.replica' in the file (did you mean 'replicas'?)"),
        ({"prod": {"replicas": [{}]}}, "[stores.prod.replicas #1] in the file has no url"),
        ({"prod": {"replicas": [{"url": "/r"}], "alow": {}}}, "'stores.prod.alow' in the file (did you mean 'allow'?)"),
    ],
)
def test_table_that_is_no_store_is_refused(given: Any, says: str) -> None:
    assert says in refusal(given)


@pytest.mark.parametrize("rule", [{"jurisdiction": ["eu"]}, 5])
def test_policy_that_cannot_be_read_is_refused_with_its_table(rule: Any) -> None:
    told = refusal({"prod": {"allow": rule, "replicas": [{"url": "/r"}]}})
    assert "[stores.prod] of the file" in told


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"urll": "s3://b"}, "unknown setting 'stores.prod.replicas #1.urll' in the file (did you mean 'url'?)"),
        ({"name": "A"}, "'stores.prod.replicas #1.name' in the file is 'A': expected 1 to 63"),
        ({"name": ""}, "is '': expected 1 to 63"),
        ({"region": "eu central"}, "is 'eu central': expected a name such as"),
        ({"jurisdiction": 5}, "is 5: expected a name such as"),
        ({"provider": ""}, "is '': expected a name such as"),
        ({"profile": ""}, "is '': expected the name of a profile"),
        ({"access": "rw"}, 'is \'rw\': expected "read" or "write"'),
        ({"access": True}, 'is True: expected "read" or "write"'),
        ({"replicates_itself": 1}, "is 1: expected true or false"),
        ({"egress_usd_per_gb": "0"}, "is '0': expected a number of USD"),
        ({"egress_usd_per_gb": -1}, "is -1: expected a number of USD"),
        ({"url": 5}, "'stores.prod.replicas #1.url' in the file: expected the URL of a registry's folder"),
        ({"url": "registry"}, "expected the URL of a registry's folder"),
        ({"url": "wc://prod"}, "expected the URL of a registry's folder"),
        ({"url": "s3://"}, "names no folder"),
        ({"url": "s3://b/r?x=1"}, "names no folder"),
        ({"url": "http://[::1/r"}, "not a URL"),
        ({"url": "s3://b/m/model.safetensors"}, "names one file: expected the folder of a registry"),
        ({"url": "s3://b/r/model.bin"}, "is a pickle file"),
        ({"url": "s3://b/r/llama@v1"}, "s3://b/r/llama@v1 names one model: expected the folder of a registry"),
        ({"url": "gs://b/r", "endpoint": "https://h"}, "has endpoint, which means nothing for gs://b/r"),
        ({"url": "/r", "profile": "p"}, "has profile, which means nothing for /r"),
        ({"url": "https://h/r", "access": "write"}, "is writable, which a web folder is not"),
        ({"endpoint": "t3.storage.dev"}, "expected the URL of an S3 endpoint"),
        ({"endpoint": "ftp://h"}, "expected the URL of an S3 endpoint"),
        ({"endpoint": "https://"}, "expected the URL of an S3 endpoint"),
        ({"endpoint": "https://[::1"}, "expected the URL of an S3 endpoint"),
        ({"endpoint": 5}, "expected the URL of an S3 endpoint"),
        (
            {"endpoint": "https://t3.storage.dev", "provider": "aws"},
            "has provider 'aws', but t3.storage.dev is 'tigris'",
        ),
        ({"provider": "tigris"}, "has provider 'tigris', but s3://models/registry is 'aws'"),
    ],
)
def test_replica_that_cannot_be_one_is_refused(table: Mapping[str, Any], says: str) -> None:
    assert says in refusal_of(**table)


def test_replicas_are_told_apart() -> None:
    replicas = [{"url": "s3://a/r", "region": "x"}, {"url": "s3://b/r", "region": "x"}]
    assert "[stores.prod] in the file has two replicas named 'aws-x'" in refusal({"prod": {"replicas": replicas}})
    replicas = [{"url": "s3://a/r", "name": "x"}, {"url": "S3://a/r//", "name": "y"}]
    assert "has one place twice, as 'x' and 'y'" in refusal({"prod": {"replicas": replicas}})
    replicas = [{"url": "s3://a/r", "name": "x"}, {"url": "s3://a/r", "name": "y", "endpoint": "http://h"}]
    assert len(read_stores({"prod": {"replicas": replicas}}, "the file")["prod"].replicas) == 2


@pytest.mark.parametrize("name", ["first", "third"])
def test_publishers_need_a_replica_that_is_writable(name: str) -> None:
    replicas = [{"name": "first", "url": "/a"}, {"name": "second", "url": "/b", "access": "write"}]
    told = refusal({"prod": {"replicas": replicas, "publish_to": name}})
    assert f"[stores.prod] in the file publishes to {name!r}" in told


@pytest.mark.parametrize(
    "trust", [KEY, "HUSH", [], [5], ["HUSH"], ["ed25519:HUSH"], [KEY.upper()], [f"{KEY}0"], [KEY, "HUSH"]]
)
def test_trust_that_is_no_list_of_public_keys_is_refused(trust: Any) -> None:
    told = refusal({"prod": {"trust": trust, "replicas": [{"url": "/r"}]}})
    assert "'stores.prod.trust' in the file" in told
    assert "HUSH" not in told


@pytest.mark.parametrize(
    "table",
    [
        {"url": "s3://AKIA:HUSH@bucket/r"},
        {"url": "s3://HUSH@bucket/r"},
        {"url": "https://user:HU/SH@host/r"},
        {"url": "https://host/r?token=HUSH"},
        {"url": "wc://user:HUSH@prod"},
        {"url": "AKIA:HUSH@bucket"},
        {"endpoint": "https://user:HUSH@host"},
        {"endpoint": "https://HUSH@host"},
        {"endpoint": "https://host/?token=HUSH"},
        {"endpoint": "https://user:HUSH@[::1"},
        {"endpoint": "user:HUSH@host"},
        {"secret_access_key": "HUSH"},
        {"endpoint": "https://host:HUSH"},
    ],
)
def test_g27_secret_in_a_replica_is_refused_and_not_repeated(table: Mapping[str, Any]) -> None:
    told = refusal_of(**table)
    assert not [word for word in ("HUSH", "HU/", "AKIA:H") if word in told]


@pytest.mark.parametrize(
    "given",
    [
        {"prod": "s3://AKIA:HUSH@bucket"},
        {"prod": {"replicas": "s3://AKIA:HUSH@bucket"}},
        {"prod": {"replicas": ["s3://AKIA:HUSH@bucket"]}},
        {"prod": {"replicas": {"url": "s3://AKIA:HUSH@bucket"}}},
    ],
)
def test_g27_secret_where_a_table_is_expected_is_not_repeated(given: Mapping[str, Any]) -> None:
    assert "HUSH" not in refusal(given)


# -- where the node is


def test_node_is_a_place_and_a_policy() -> None:
    form = {"provider": "AWS", "region": "eu-central-1", "jurisdiction": "eu", "allow": {"jurisdictions": ["eu"]}}
    policy = Policy.from_form({"allow": {"jurisdictions": ["eu"]}}, "")
    assert read_node(form, "the file") == (Site("aws", "eu-central-1", "eu"), policy)
    assert read_node({}, "the file") == (Site(), Policy())


def test_site_is_read_from_one_text() -> None:
    assert read_site("AWS/eu-central-1/eu") == Site("aws", "eu-central-1", "eu")
    assert read_site("//eu") == Site("", "", "eu")
    for text in ("", "aws", "aws/x", "aws/x/eu/y", "aws/x y/eu"):
        with pytest.raises(ValueError, match="provider/region/jurisdiction"):
            read_site(text)


# -- the documentation


def toml_blocks() -> list[str]:
    return re.findall(r"```toml\n(.*?)```", DOCS.read_text(), re.DOTALL)


def test_documentation_has_an_example_of_every_kind_of_store() -> None:
    text = "".join(toml_blocks())
    assert [
        word
        for word in (
            "t3.storage.dev",
            ".eu.r2.cloudflarestorage.com",
            "gs://",
            "storage.googleapis.com",
            "trust",
            "[node]",
        )
        if word not in text
    ] == []


@pytest.mark.parametrize("block", toml_blocks())
def test_documented_configuration_is_one(block: str, tmp_path: Path) -> None:
    path = tmp_path / "weightcache.toml"
    path.write_text(block)
    configuration = read_configuration({"HOME": str(tmp_path)}, path)
    assert configuration.sources  # it says something
    assert read_settings({"HOME": str(tmp_path), "WEIGHTCACHE_CONFIG": str(path)}) == configuration.settings
