"""The audit log: every ruling of a load, equal ones once, readable again, and no secret among them."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path

import pytest

from weightcache.audit import Entry, append, read
from weightcache.policy import Edge, Ruling, Verb, judge
from weightcache.residency import Places, Policy, Site

NOW_S = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()
POLICY = Policy(allow=Places(jurisdictions=("eu",)))
EU = Site("tigris", "eu-central", "eu")
READ = Edge(Verb.READ, "wc://prod/llama", EU, EU, "prod-eu", "this node")
HEDGE = Edge(Verb.HEDGE, "wc://prod/llama", Site("aws"), EU, "prod-us", "this node")
ALLOWED, REFUSED = (judge(edge, [("weightcache.toml", POLICY)]) for edge in (READ, HEDGE))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The cache folder, which is there."""
    (tmp_path / "cache").mkdir(mode=0o700)
    return tmp_path / "cache"


def november(root: Path) -> Path:
    return root / "audit" / "2026-11.jsonl"


def test_rulings_are_read_again(root: Path) -> None:
    append(root, [ALLOWED, REFUSED], NOW_S)
    append(root, [REFUSED], NOW_S + 60)
    assert list(read(root)) == [Entry(NOW_S, ALLOWED), Entry(NOW_S, REFUSED), Entry(NOW_S + 60, REFUSED)]
    assert list(read(root, NOW_S + 60)) == [Entry(NOW_S + 60, REFUSED)]


def test_equal_rulings_of_a_load_are_one_line_with_their_number(root: Path) -> None:
    append(root, [ALLOWED, REFUSED, ALLOWED, ALLOWED], NOW_S)
    assert list(read(root)) == [Entry(NOW_S, ALLOWED, 3), Entry(NOW_S, REFUSED, 1)]


def test_line_says_what_it_holds(root: Path) -> None:
    append(root, [REFUSED], NOW_S)
    [line] = november(root).read_text().splitlines()
    assert json.loads(line) == {
        "v": 1,
        "time": "2026-11-26T12:00:00+00:00",
        "verb": "hedge",
        "model": "wc://prod/llama",
        "source": {"name": "prod-us", "provider": "aws", "region": "", "jurisdiction": ""},
        "target": {"name": "this node", "provider": "tigris", "region": "eu-central", "jurisdiction": "eu"},
        "allowed": False,
        "rule": "weightcache.toml allows jurisdictions 'eu', and the source's jurisdiction is not known",
        "n_times": 1,
    }


def test_g24_log_is_its_owners_alone(root: Path) -> None:
    append(root, [ALLOWED], NOW_S)
    assert november(root).stat().st_mode & 0o777 == 0o600


def test_g27_signature_of_a_redirect_is_not_in_the_log(root: Path) -> None:
    target = "https://user:password@elsewhere/model?X-Amz-Signature=secret"
    append(root, [judge(Edge(Verb.REDIRECT, "m", EU, EU, "prod", target), [])], NOW_S)
    content = november(root).read_text()
    assert "https://elsewhere/model" in content
    assert "secret" not in content and "password" not in content


def test_log_that_cannot_be_written_is_said_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "audit").write_text("a file")
    for _ in range(3):
        append(root, [ALLOWED], NOW_S)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


LINE = Entry(NOW_S, ALLOWED).to_line()
FOREIGN = [
    b"not JSON",
    b"{}",
    b"[" * 50_000,
    LINE.replace(b'"v":1', b'"v":2'),
    LINE.replace(b'"verb":"read"', b'"verb":"steal"'),
    LINE.replace(b'"verb":"read"', b'"verb":[]'),
    LINE.replace(b'"allowed":true', b'"allowed":1'),
    LINE.replace(b'"provider":"tigris"', b'"provider":null'),
    LINE.replace(b'"n_times":1', b'"n_times":-1'),
    LINE.replace(b'"rule"', b'"Rule"'),
    LINE.replace(b'"source":{', b'"source":1,"other":{'),
]


@pytest.mark.parametrize("line", FOREIGN, ids=range(len(FOREIGN)))
def test_foreign_line_is_left_out(root: Path, line: bytes) -> None:
    append(root, [ALLOWED], NOW_S)
    with november(root).open("ab") as file:
        file.write(line.rstrip() + b"\n")
    append(root, [ALLOWED], NOW_S)
    assert list(read(root)) == [Entry(NOW_S, ALLOWED)] * 2


def test_ruling_is_read_as_it_was_made() -> None:
    ruling = Ruling(READ, True, "no policy — \u00fc\n")
    assert Entry.from_line(Entry(NOW_S, ruling, 2).to_line()) == Entry(NOW_S, ruling, 2)
