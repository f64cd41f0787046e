"""The ledger of a cache folder: what is written, what is read again, and what neither may be disturbed by."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from weightcache.errors import ConfigError
from weightcache.ledger import Ledger
from weightcache.prices import CONFIGURED, LISTED, UNPRICED, Price, price_of
from weightcache.report import Report
from weightcache.spending import Cost, Entry, append, bill, cost, enter, read, read_since

URI = "s3://bucket/model"
NOVEMBER_S = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()
OCTOBER_S = datetime(2026, 10, 1, tzinfo=UTC).timestamp()
ENTRY = Entry(NOVEMBER_S, URI, "aws", LISTED, Ledger("s3://bucket", 1, 2, 3, 4, 5, 6), 0.25, 7, 0.5)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The cache folder, which is there."""
    (tmp_path / "cache").mkdir(mode=0o700)
    return tmp_path / "cache"


def november(root: Path) -> Path:
    return root / "ledger" / "2026-11.jsonl"


# -- a load


def test_replica_that_was_asked_is_billed() -> None:
    ledgers = [Ledger("s3://unused"), Ledger("s3://bucket", n_gets=1000, received_bytes=10**9)]
    [entry] = bill(URI, ledgers, 2 * 10**9, listed, NOVEMBER_S)
    assert (entry.uri, entry.provider, entry.prices, entry.ledger) == (URI, "aws", LISTED, ledgers[1])
    assert entry.usd == pytest.approx(0.09 + 0.0004)
    assert (entry.saved_bytes, entry.saved_usd) == (2 * 10**9, pytest.approx(0.18))


def listed(place: str) -> Price:
    return price_of(place, {})


def test_saved_bytes_are_billed_once() -> None:
    ledgers = [Ledger("s3://bucket", n_lists=1), Ledger("https://t3.storage.dev/bucket", n_gets=1)]
    assert [(entry.provider, entry.saved_bytes) for entry in bill(URI, ledgers, 8, listed, NOVEMBER_S)] == [
        ("aws", 8),
        ("tigris", 0),
    ]


def test_bill_does_not_change_with_its_ledger() -> None:
    ledger = Ledger("s3://bucket", n_gets=1)
    [entry] = bill(URI, [ledger], 0, listed, NOVEMBER_S)
    ledger.n_gets = 2
    assert entry.ledger.n_gets == 1


def test_report_adds_up_what_is_entered() -> None:
    report = Report(URI)
    other = dataclasses.replace(ENTRY, ledger=Ledger("https://host", n_gets=9), provider="unknown", prices=UNPRICED)
    for _ in range(2):
        enter([ENTRY, other], report)
    enter([], report)
    told = report.as_dict()
    assert list(told["replicas"]) == ["s3://bucket", "https://host"]
    assert told["replicas"]["s3://bucket"] == {
        "provider": "aws",
        "n_gets": 2,
        "n_lists": 4,
        "n_retries": 6,
        "n_hedges": 8,
        "received_bytes": 10,
        "wasted_bytes": 12,
        "usd": 0.5,
    }
    assert told["usd"] == report.usd == 1.0
    assert told["choices"]["price"] == f"aws: {LISTED}; unknown: {UNPRICED}"


# -- the file


def test_what_is_appended_is_read_again(root: Path) -> None:
    append(root, [ENTRY, ENTRY])
    append(root, [dataclasses.replace(ENTRY, time_s=OCTOBER_S)])
    assert list(read(root)) == [dataclasses.replace(ENTRY, time_s=OCTOBER_S), ENTRY, ENTRY]
    assert sorted(path.name for path in (root / "ledger").iterdir()) == ["2026-10.jsonl", "2026-11.jsonl"]


def test_line_says_what_it_holds(root: Path) -> None:
    append(root, [ENTRY])
    [line] = november(root).read_text().splitlines()
    assert json.loads(line) == {
        "v": 1,
        "time": "2026-11-26T12:00:00+00:00",
        "uri": URI,
        "replica": "s3://bucket",
        "provider": "aws",
        "prices": LISTED,
        "n_gets": 1,
        "n_lists": 2,
        "n_retries": 3,
        "n_hedges": 4,
        "received_bytes": 5,
        "wasted_bytes": 6,
        "usd": 0.25,
        "saved_bytes": 7,
        "saved_usd": 0.5,
    }


FOREIGN = [
    b"",
    b"not JSON",
    b"\xff\xfe",
    b"[]",
    b"{}",
    b"[" * 50_000,
    b"1" * 5000,
    b"x" * 200_000,
    ENTRY.to_line().replace(b'"v":1', b'"v":2'),
    ENTRY.to_line().replace(b'"n_gets":1', b'"n_gets":-1'),
    ENTRY.to_line().replace(b'"n_gets":1', b'"n_gets":1.5'),
    ENTRY.to_line().replace(b'"n_gets":1', b'"n_gets":true'),
    ENTRY.to_line().replace(b'"usd":0.25', b'"usd":NaN'),
    ENTRY.to_line().replace(b'"usd":0.25', b'"usd":1e999'),
    ENTRY.to_line().replace(b'"usd":0.25', b'"usd":1' + b"0" * 400),
    ENTRY.to_line().replace(b'"usd":0.25', b'"usd":"much"'),
    ENTRY.to_line().replace(b'"uri":"s3', b'"URI":"s3'),
    ENTRY.to_line().replace(b'"2026-11-26', b'"someday'),
]


@pytest.mark.parametrize("line", FOREIGN, ids=range(len(FOREIGN)))
def test_foreign_line_is_left_out(root: Path, line: bytes) -> None:
    append(root, [ENTRY])
    with november(root).open("ab") as file:
        file.write(line.rstrip() + b"\n")
    append(root, [ENTRY])
    assert list(read(root)) == [ENTRY, ENTRY]


def test_counts_of_an_older_line_that_lacks_some_are_0() -> None:
    line = ENTRY.to_line().replace(b'"n_hedges":4,', b"")
    assert Entry.from_line(line).ledger == Ledger("s3://bucket", 1, 2, 3, 0, 5, 6)


# -- sums


@pytest.fixture
def kept(root: Path) -> None:
    """Three loads: of two models, from two replicas, in two months."""
    append(root, [dataclasses.replace(ENTRY, time_s=OCTOBER_S)])
    append(root, [ENTRY])
    other = dataclasses.replace(ENTRY, uri="s3://bucket/other", usd=4.0, prices=CONFIGURED)
    append(root, [dataclasses.replace(other, ledger=Ledger("https://host", n_gets=9, received_bytes=1000))])


@pytest.mark.usefixtures("kept")
def test_costs_are_summed_up_by_replica_the_dearest_first() -> None:
    assert cost(None, "replica") == [
        Cost("https://host", 9, 0, 0, 0, 1000, 0, 4.0, 7, 0.5, (CONFIGURED,)),
        Cost("s3://bucket", 2, 4, 6, 8, 10, 12, 0.5, 14, 1.0, (LISTED,)),
    ]


@pytest.mark.usefixtures("kept")
def test_costs_are_summed_up_by_model_and_by_month() -> None:
    assert [(each.name, each.usd) for each in cost(None, "model")] == [("s3://bucket/other", 4.0), (URI, 0.5)]
    assert [(each.name, each.usd) for each in cost(None, "month")] == [("2026-10", 0.25), ("2026-11", 4.25)]
    assert cost(None, "month")[1].prices == (LISTED, CONFIGURED)


@pytest.mark.usefixtures("kept")
def test_costs_begin_where_asked() -> None:
    assert [each.name for each in cost("2026-11", "month")] == ["2026-11"]
    assert [each.name for each in cost("2026-10-01", "month")] == ["2026-10", "2026-11"]
    assert cost("2026-11-27", "month") == []


def test_folder_that_is_not_there_cost_nothing(tmp_path: Path) -> None:
    assert cost(None, "replica") == []
    assert not (tmp_path / "cache").exists()


def test_since_is_an_age_or_a_date() -> None:
    assert read_since("7d", NOVEMBER_S) == NOVEMBER_S - 7 * 86400
    assert read_since("12h", NOVEMBER_S) == NOVEMBER_S - 12 * 3600
    assert read_since("99999w", NOVEMBER_S) == 0.0
    assert read_since("2026-10", NOVEMBER_S) == OCTOBER_S
    assert read_since("2026-10-01", NOVEMBER_S) == OCTOBER_S


@pytest.mark.parametrize("text", ["", "7", "d", "-7d", "7 d", "2026", "2026-13", "2026-11-31", "yesterday", "9999999d"])
def test_since_that_makes_no_sense_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"since=.*expected an age"):
        read_since(text, NOVEMBER_S)


def test_unknown_kind_of_sum_is_an_error_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'replica'"):
        cost(None, "replicas")
