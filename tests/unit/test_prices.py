"""Whose store a replica is at, and what traffic from there costs."""

from __future__ import annotations

import pytest

from weightcache.ledger import Ledger
from weightcache.prices import (
    CONFIGURED,
    LISTED,
    PROVIDERS,
    UNKNOWN,
    UNPRICED,
    Price,
    cost_usd,
    egress_usd,
    is_host,
    month_egress_usd,
    price_of,
    provider_of,
    terms,
)


@pytest.mark.parametrize(
    ("place", "provider"),
    [
        ("s3://bucket", "aws"),
        ("https://s3.eu-west-1.amazonaws.com/bucket", "aws"),
        ("https://bucket.vpce-1.s3.eu-west-1.vpce.amazonaws.com/bucket", "aws"),
        ("https://account.r2.cloudflarestorage.com/bucket", "r2"),
        ("https://account.EU.r2.CloudflareStorage.com/bucket", "r2"),
        ("https://t3.storage.dev/bucket", "tigris"),
        ("https://fly.storage.tigris.dev/bucket", "tigris"),
        ("https://storage.googleapis.com/bucket", "gcs"),
        ("gs://bucket", "gcs"),
        ("https://account.blob.core.windows.net", "azure"),
        ("az://container", "azure"),
        ("abfss://container@account.dfs.core.windows.net", "azure"),
        ("https://s3.us-west-004.backblazeb2.com/bucket", "b2"),
        ("http://127.0.0.1:9000/bucket", UNKNOWN),
        ("http://10.0.0.7/bucket", UNKNOWN),
        ("https://notamazonaws.com/bucket", UNKNOWN),
        ("https://amazonaws.com.example.org/bucket", UNKNOWN),
        ("https://amazonaws.com@example.org/bucket", UNKNOWN),
        ("hf://org", UNKNOWN),
        ("unknown/bucket", UNKNOWN),
    ],
)
def test_provider_is_known_by_its_host_or_scheme(place: str, provider: str) -> None:
    assert price_of(place, {}).provider == provider


def test_provider_of_a_scheme_without_an_endpoint() -> None:
    assert [provider_of("s3", ""), provider_of("s3", "t3.storage.dev"), provider_of("ftp", "")] == [
        "aws",
        "tigris",
        UNKNOWN,
    ]


def test_every_provider_has_a_price_for_listings() -> None:
    places = ("s3://b", "gs://b", "az://b", "https://a.r2.dev", "https://t3.storage.dev/b", "https://b.backblazeb2.com")
    prices = [price_of(place, {}) for place in places]
    assert [price.provider for price in prices] == list(PROVIDERS)
    assert all(price.list_usd_per_1000 > price.get_usd_per_1000 > 0 and price.note == LISTED for price in prices)


def test_a_cost_is_egress_gets_and_listings() -> None:
    ledger = Ledger(n_gets=2000, n_lists=1000, n_retries=7, n_hedges=7, received_bytes=10**10, wasted_bytes=10**9)
    assert cost_usd(ledger, Price("x", 0.09, 0.0004, 0.005)) == pytest.approx(0.9 + 0.0008 + 0.005)
    assert egress_usd(10**9, Price("x", 0.09)) == pytest.approx(0.09)


def test_what_is_unknown_costs_nothing_and_says_so() -> None:
    price = price_of("http://127.0.0.1:9000/bucket", {})
    assert (price.provider, price.note) == (UNKNOWN, UNPRICED)
    assert cost_usd(Ledger(n_gets=1000, n_lists=1000, received_bytes=10**12), price) == 0


def test_provider_is_priced_as_configured_and_otherwise_as_listed() -> None:
    price = price_of("s3://bucket", {"aws": {"egress_usd_per_gb": 0.0}})
    assert price == Price("aws", 0.0, 0.0004, 0.005, CONFIGURED, storage_usd_per_gb_month=0.023)
    assert price_of("gs://bucket", {"aws": {"egress_usd_per_gb": 0.0}}).note == LISTED


def test_unknown_host_is_priced_as_configured() -> None:
    overrides = {"example.com": {"egress_usd_per_gb": 0.5}}
    assert price_of("https://minio.example.com:9000/b", overrides) == Price("example.com", 0.5, note=CONFIGURED)
    assert price_of("https://minio.badexample.com/b", overrides).provider == UNKNOWN
    assert price_of("s3://example.com", overrides).provider == "aws"  # a bucket's name is no host


def test_longest_host_beats_shorter_ones_and_the_provider() -> None:
    overrides = {
        "s3.eu-west-1.amazonaws.com": {"egress_usd_per_gb": 0.02},
        "amazonaws.com": {"egress_usd_per_gb": 0.03, "get_usd_per_1000": 0.3},
        "aws": {"egress_usd_per_gb": 0.04, "get_usd_per_1000": 0.4, "list_usd_per_1000": 4.0},
    }
    price = price_of("https://s3.eu-west-1.amazonaws.com/bucket", overrides)
    assert price == Price("aws", 0.02, 0.3, 4.0, CONFIGURED, storage_usd_per_gb_month=0.023)


def test_declared_provider_counts_where_the_place_shows_none() -> None:
    assert price_of("https://models.example.com/b", {}, "b2") == price_of("https://s3.backblazeb2.com/b", {})
    assert price_of("https://t3.storage.dev/b", {}, "b2").provider == "tigris"
    assert price_of("https://models.example.com/b", {}, "home") == Price("home", note=UNPRICED)


@pytest.mark.parametrize(
    ("gb", "usd"),
    [
        (0, 0.0),
        (100, 0.0),
        (101, 0.09),
        (10_000, 891.0),
        (10_001, 891.085),
        (50_000, 891 + 3400),
        (150_000, 891 + 3400 + 7000),
        (150_001, 891 + 3400 + 7000 + 0.05),
    ],
)
def test_egress_of_a_month_goes_through_the_tiers(gb: int, usd: float) -> None:
    assert month_egress_usd(gb * 10**9, price_of("s3://bucket", {})) == pytest.approx(usd)
    assert month_egress_usd(gb * 10**9, Price("x", 0.01)) == pytest.approx(gb * 0.01)


def test_first_tier_is_what_a_load_is_priced_by() -> None:
    for provider in PROVIDERS:
        price = price_of("", {}, provider)
        paid = [usd for _, usd in price.egress_tiers if usd]
        assert paid[:1] in ([], [price.egress_usd_per_gb])
        assert sorted(price.egress_tiers) == list(price.egress_tiers)


def test_terms_say_every_price_and_where_it_is_from() -> None:
    assert terms(price_of("", {}, "azure")) == (
        "0.018 USD a GB and month; egress 0 USD a GB, 0.087 from 100 GB; 0.0005 USD for 1000 GETs "
        "(list prices of 2026-11 to the internet)"
    )
    assert terms(Price("x", note=UNPRICED)) == UNPRICED


@pytest.mark.parametrize("name", ["minio.example.com", "localhost", "127.0.0.1", "::1", "a-b.example.com"])
def test_host_can_be_told(name: str) -> None:
    assert is_host(name)


@pytest.mark.parametrize("name", ["asw", "", "https://example.com", "example.com/bucket", "host:9000", "a..b", "."])
def test_what_is_no_host_can_be_told(name: str) -> None:
    assert not is_host(name)
