"""What is counted by replica, and how a replica is named."""

from __future__ import annotations

import pytest

from weightcache.ledger import COUNTS, Ledger, place_of


def test_requests_are_gets_and_listings() -> None:
    assert Ledger(n_gets=3, n_lists=2, n_retries=1).n_requests == 5


def test_counts_are_all_numbers_by_name() -> None:
    counts = Ledger("s3://bucket", 1, 2, 3, 4, 5, 6).counts()
    assert list(counts.values()) == [1, 2, 3, 4, 5, 6]
    assert tuple(counts) == COUNTS


@pytest.mark.parametrize(
    ("url", "endpoint", "place"),
    [
        ("s3://bucket/models/llama", "", "s3://bucket"),
        ("s3://bucket", "https://t3.storage.dev", "https://t3.storage.dev/bucket"),
        ("s3://bucket/a", "http://127.0.0.1:9000/", "http://127.0.0.1:9000/bucket"),
        ("s3://bucket/a", "https://host/behind/a/path/", "https://host/behind/a/path/bucket"),
        ("gs://bucket/a", "", "gs://bucket"),
        ("/mnt/registry", "", "/mnt/registry"),
        ("https://host:8000/a/b", "", "https://host:8000"),
        ("abfss://container@account.dfs.core.windows.net/a", "", "abfss://container@account.dfs.core.windows.net"),
        ("s3://bucket/a", "no url", "unknown/bucket"),
        ("s3://bucket/a", "http://[", "unknown/bucket"),
    ],
)
def test_replica_is_named_by_its_endpoint_and_bucket(url: str, endpoint: str, place: str) -> None:
    assert place_of(url, endpoint) == place


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("s3://bucket/a", "https://user:topsecret@host"),
        ("s3://bucket/a", "https://host/?token=topsecret"),
        ("s3://bucket/a", "https://host/#topsecret"),
        ("az://container/a?sig=topsecret", ""),
        ("https://user:topsecret@host/a?sig=topsecret", ""),
    ],
)
def test_g27_replica_is_named_without_secrets(url: str, endpoint: str) -> None:
    assert "topsecret" not in place_of(url, endpoint)
