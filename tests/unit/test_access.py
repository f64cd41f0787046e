"""What one request may touch: where places lie, which policies rule, and that every ruling is written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightcache import audit, errors
from weightcache.access import Access
from weightcache.config import Settings
from weightcache.origins.plane import Host
from weightcache.policy import Verb
from weightcache.residency import Places, Policy, Site
from weightcache.stores import Replica, Store
from weightcache.uri import parse_uri

EU = Policy(allow=Places(jurisdictions=("eu",)))
NODE = Site("aws", "eu-central-1", "eu")
FRANKFURT = Site("aws", "eu-central-1", "eu")
SCHEMES = ("s3", "https", "gs", "hf")
REPLICAS = (
    Replica("frankfurt", "s3://models/registry", "", FRANKFURT),
    Replica("somewhere", "s3://wide", "", Site("aws", "", "eu")),
    Replica("cellar", "s3://models/registry", "http://minio.example:9000", Site("", "cellar", "eu")),
    Replica("shelf", "/mnt/registry", "", Site("", "", "us")),
    Replica("mounted", "/mnt/registry/far", "", Site("", "", "ch")),
)


def access_to(uri: str, folder: Path = Path("/dev/null/none"), policy: Policy = EU, verb: Verb = Verb.READ) -> Access:
    settings = Settings(dir=folder, node=NODE, policy=policy, stores={"prod": Store("prod", REPLICAS)})
    return Access(settings, parse_uri(uri, SCHEMES, "/", settings.stores), verb)


@pytest.mark.parametrize(
    ("uri", "endpoint", "site"),
    [
        ("s3://models/registry", "", FRANKFURT),
        ("s3://models/registry/llama@v1", "", FRANKFURT),
        ("s3://models/registry/llama", "", FRANKFURT),  # which may turn out to be its latest
        ("s3://models/registry-of-others", "", Site("aws")),
        ("s3://models", "", Site("aws")),
        ("s3://models/registry", "http://minio.example:9000", Site("", "cellar", "eu")),
        ("s3://models/registry", "http://elsewhere.example", Site()),
        ("s3://models/registry", "https://t3.storage.dev", Site("tigris")),
        ("https://bucket.r2.dev/registry", "", Site("r2")),
        ("https://example.com/registry", "", Site()),
        ("gs://models/registry", "", Site("gcs")),
        ("hf://org/name", "", Site()),
        ("/mnt/registry/llama", "", Site("", "", "us")),
        ("/mnt/registry/far/llama", "", Site("", "", "ch")),
        ("/mnt/registry2/llama", "", NODE),
    ],
)
def test_a_place_lies_where_a_replica_of_it_is_said_to_or_else_where_its_host_is_known_to(
    uri: str, endpoint: str, site: Site
) -> None:
    access = access_to(uri)
    assert access.site_of(parse_uri(uri, SCHEMES, "/"), endpoint) == site


@pytest.mark.parametrize(
    ("uri", "region", "allowed"),
    [
        ("s3://models/registry/llama@v1", "eu-central-1", True),
        ("s3://models/registry/llama@v1", "us-east-1", False),
        ("s3://wide/llama@v1", "us-east-1", True),  # its jurisdiction is known, and no region was
        ("s3://unknown/llama@v1", "eu-central-1", False),
    ],
)
def test_g26_a_bucket_that_turns_out_to_be_elsewhere_is_ruled_on(uri: str, region: str, allowed: bool) -> None:
    access = access_to(uri)
    name = parse_uri(uri, SCHEMES, "/")
    if allowed:
        access.check_region(name, region)
    else:
        with pytest.raises(errors.ResidencyError, match=f"redirect of .* from s3://.* in {region}"):
            access.check_region(name, region)


def test_g26_of_a_host_that_another_named_only_the_provider_is_known() -> None:
    host = Host("https", "cdn.r2.dev", 443)
    access_to("wc://prod/llama", policy=Policy(allow=Places(providers=("r2", "aws")))).check_redirect(host)
    with pytest.raises(errors.ResidencyError, match=r"from cdn\.r2\.dev"):
        access_to("wc://prod/llama").check_redirect(host)


def test_a_read_is_for_what_the_request_is_for() -> None:
    access = access_to("wc://prod/llama", verb=Verb.PREFETCH, policy=Policy(deny=Places(jurisdictions=("us",))))
    with pytest.raises(errors.ResidencyError, match=r"^prefetch of wc://prod/llama"):
        access.check_read(Verb.READ, Site("", "", "us"), "x")
    with pytest.raises(errors.ResidencyError, match=r"^hedge of wc://prod/llama"):
        access.check_read(Verb.HEDGE, Site("", "", "us"), "x")


def test_policies_that_are_added_or_joined_rule_from_then_on() -> None:
    access, other = access_to("wc://prod/llama", policy=Policy()), access_to("s3://models/m@v1", policy=Policy())
    access.check_write(Verb.PUBLISH, Site(), "there")
    other.add("model m", EU)
    access.join(other)
    with pytest.raises(errors.ResidencyError, match="model m allows jurisdictions 'eu'"):
        access.check_write(Verb.PUBLISH, Site(), "there")


def test_rulings_are_written_down_once_with_how_often_they_were_made(tmp_path: Path) -> None:
    access = access_to("wc://prod/llama", tmp_path / "cache")
    for _ in range(3):
        access.check_read(Verb.READ, FRANKFURT, "frankfurt")
    with pytest.raises(errors.ResidencyError):
        access.check_read(Verb.READ, Site(), "nowhere")
    access.close()
    access.close()
    found = [
        (each.ruling.edge.source_name, each.ruling.allowed, each.n_times) for each in audit.read(tmp_path / "cache")
    ]
    assert found == [("frankfurt", True, 3), ("nowhere", False, 1)]


def test_without_a_policy_and_a_store_nothing_is_written_down(tmp_path: Path) -> None:
    access = access_to("s3://bucket/model", tmp_path / "cache", Policy())
    access.check_read(Verb.READ, Site(), "bucket")
    access.close()
    assert not (tmp_path / "cache").exists()
