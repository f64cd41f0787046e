"""What a response must be before its body becomes data: each field is wrong once; and what its other headers mean."""

from __future__ import annotations

import email.utils
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weightcache import errors
from weightcache.errors import OriginChangedError, TransientOriginError
from weightcache.origins.answers import LONGEST_RETRY_AFTER_S, Answer, http_time, is_part, refusal
from weightcache.origins.base import Stat

STAT = Stat("model.safetensors", 1000, '"1f"')
HUGE = "9" * 19
PART = {"content-range": "bytes 10-19/1000", "content-length": "10", "etag": '"1f"'}
WHOLE = {"content-length": "1000", "etag": '"1f"'}


def answer(status: int, headers: dict[str, str | None], *more: tuple[str, str]) -> Answer:
    pairs = [(name, value) for name, value in headers.items() if value is not None] + list(more)
    return Answer(status, tuple((name.encode(), value.encode("latin-1")) for name, value in pairs))


def judge(said: Answer, start: int = 10, stop: int = 20, stat: Stat = STAT) -> bool:
    return is_part(said, stat, start, stop, said.get("etag"))


# -- the table


@pytest.mark.parametrize(
    ("status", "headers", "start", "stop"),
    [
        (206, PART, 10, 20),
        (206, PART | {"content-encoding": "identity"}, 10, 20),
        (206, PART | {"content-encoding": "Identity"}, 10, 20),
        (206, PART | {"content-type": "text/html", "x-unknown": "y"}, 10, 20),
        (206, PART | {"content-range": "bytes 0-999/1000", "content-length": "1000"}, 0, 1000),
        (200, WHOLE, 0, 1000),
    ],
)
def test_the_bytes_asked_for_are_data(status: int, headers: dict[str, str | None], start: int, stop: int) -> None:
    assert judge(answer(status, headers), start, stop)


@pytest.mark.parametrize("status", [300, 301, 304, 403, 404, 412, 416, 429, 500, 503, 599])
def test_a_refusal_is_no_data_whatever_else_it_says(status: int) -> None:
    assert not judge(answer(status, PART))


@pytest.mark.parametrize("status", [200, 201, 202, 203, 204, 205, 207, 226, 299])
def test_g06_another_success_than_206_never_becomes_data(status: int) -> None:
    with pytest.raises(TransientOriginError, match=r"\[10, 20\) of 1000 bytes"):
        judge(answer(status, PART))


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            {"content-range": value}
            for value in (
                None,
                "",
                "bytes",
                "bytes 11-20/1000",
                "bytes 9-18/1000",
                "bytes 10-20/1000",
                "bytes 10-18/1000",
                "bytes 10-19/1001",
                "bytes 10-19/999",
                "bytes 10-19/*",
                "bytes */1000",
                "bytes 19-10/1000",
                "bytes 10-19",
                "bites 10-19/1000",
                "Bytes 10-19/1000",
                "bytes=10-19/1000",
                "bytes 10-19/1000, bytes 10-19/1000",
                "bytes +10-19/1000",
                "bytes 1_0-19/1000",
                "bytes -10-19/1000",
                "bytes 10 - 19/1000",
                f"bytes 10-19/{HUGE}9",
                f"bytes {HUGE}9-19/1000",
            )
        ),
        *({"content-length": value} for value in (None, "9", "11", "0", "1000", HUGE)),
        {"content-encoding": "gzip"},
        {"content-encoding": "identity, gzip"},
        {"content-encoding": "br"},
        {"transfer-encoding": "chunked"},
        {"transfer-encoding": "identity"},
        {"etag": None},
    ],
    ids=str,
)
def test_g06_a_part_with_one_field_wrong_never_becomes_data(wrong: dict[str, str | None]) -> None:
    with pytest.raises(TransientOriginError, match=r"\[10, 20\) of 1000 bytes"):
        judge(answer(206, PART | wrong))


@pytest.mark.parametrize(
    "wrong",
    [
        {"content-length": "999"},
        {"content-length": None},
        {"content-range": "bytes 0-999/1000"},  # of a 206, which it is not
        {"content-encoding": "gzip"},
        {"transfer-encoding": "chunked"},
        {"etag": None},
    ],
    ids=str,
)
def test_g06_a_whole_file_with_one_field_wrong_never_becomes_data(wrong: dict[str, str | None]) -> None:
    with pytest.raises(TransientOriginError):
        judge(answer(200, WHOLE | wrong), 0, 1000)


@pytest.mark.parametrize(("start", "stop"), [(0, 999), (1, 1000), (0, 1)])
def test_g06_a_whole_file_is_no_part_of_it(start: int, stop: int) -> None:
    with pytest.raises(TransientOriginError):
        judge(answer(200, WHOLE), start, stop)


@pytest.mark.parametrize("etag", ['"2f"', '"1F"', "1f", 'W/"1f"', ""])
def test_g05_another_state_is_a_change(etag: str) -> None:
    with pytest.raises(OriginChangedError, match=r"model\.safetensors"):
        judge(answer(206, PART | {"etag": etag}))


def test_a_file_without_a_state_is_not_compared() -> None:
    assert judge(answer(206, PART | {"etag": '"2f"'}), stat=Stat(STAT.path, STAT.nbytes, ""))
    assert judge(answer(206, PART | {"etag": None}), stat=Stat(STAT.path, STAT.nbytes, ""))


def test_what_a_server_says_is_told_in_short() -> None:
    for wrong in ({"content-range": "x" * 5000}, {"content-encoding": "x" * 5000}, {"etag": "x" * 5000}):
        with pytest.raises((TransientOriginError, OriginChangedError)) as caught:
            judge(answer(206, PART | wrong))
        assert len(str(caught.value)) < 300


# -- headers


@pytest.mark.parametrize("name", ["content-range", "content-length", "content-encoding", "etag", "location", "x-any"])
def test_g06_a_header_with_two_values_is_none(name: str) -> None:
    said = answer(206, {}, (name, "1"), (name, "2"))
    with pytest.raises(TransientOriginError, match=name):
        said.get(name)


def test_a_header_may_be_repeated_word_for_word() -> None:
    assert answer(206, {}, ("etag", '"1f"'), ("etag", '"1f"')).get("etag") == '"1f"'
    assert judge(answer(206, PART, *PART.items()))


def test_a_header_is_read_without_the_space_around_it() -> None:
    assert answer(200, {"etag": ' "1f"\t'}).get("etag") == '"1f"'
    assert answer(200, {}).get("etag") is None


def test_a_header_need_not_be_ascii() -> None:
    assert answer(200, {"etag": '"größe"'}).get("etag") == '"größe"'


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("1", 1.0),
        ("120", 120.0),
        (" 7 ", 7.0),
        ("3601", LONGEST_RETRY_AFTER_S),
        ("9" * 400, LONGEST_RETRY_AFTER_S),
        ("", None),
        ("-1", None),
        ("+1", None),
        ("1.5", None),
        ("1e3", None),
        ("-1e999 soon", None),
        ("soon", None),
        ("0x10", None),
        ("²", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_RETRY_AFTER_S),
        ("1 Jan 99999999999999 00:00:00 GMT", None),
        ("Thu, 01 Jan 2026 00:00:00 +999999999999999999999", 0.0),
    ],
)
def test_g14_retry_after_in_each_form(value: str | None, seconds: float | None) -> None:
    assert answer(503, {"retry-after": value}).retry_after_s == seconds


def test_g14_retry_after_may_be_a_date() -> None:
    for form in (email.utils.formatdate(time.time() + 60, usegmt=True), time.asctime(time.gmtime(time.time() + 60))):
        got = answer(503, {"retry-after": form}).retry_after_s
        assert got is not None
        assert 50.0 < got <= 60.0


@given(st.text(st.characters(max_codepoint=255)))
@example("Mon, 99 Jan 2026 99:99:99 GMT")
@example("0 Jan 0 0:0:0 -9999")
def test_g14_any_retry_after_is_a_bounded_time_or_none(value: str) -> None:
    got = answer(503, {"retry-after": value}).retry_after_s
    assert got is None or 0.0 <= got <= LONGEST_RETRY_AFTER_S


DATE_WORDS = ["Mon,", "Jan", "Dec", "2026", "99", "0", "-1", "12:00:00", "99:99:99", ":", "GMT", "+9999", "-", "9" * 30]


@given(st.lists(st.sampled_from(DATE_WORDS), max_size=8).map(" ".join))
def test_any_date_is_a_time_or_none(value: str) -> None:
    got = http_time(value)
    assert got is None or isinstance(got, float)


# -- refusals


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (300, errors.OriginError),
        (304, errors.OriginError),
        (400, errors.OriginError),
        (401, errors.AccessDeniedError),
        (403, errors.AccessDeniedError),
        (404, errors.ModelNotFoundError),
        (405, errors.OriginError),
        (407, errors.AccessDeniedError),
        (408, errors.TransientOriginError),
        (410, errors.ModelNotFoundError),
        (412, errors.OriginChangedError),
        (416, errors.OriginChangedError),
        (425, errors.TransientOriginError),
        (429, errors.TransientOriginError),
        (451, errors.OriginError),
        (500, errors.TransientOriginError),
        (503, errors.TransientOriginError),
        (599, errors.TransientOriginError),
    ],
)
def test_each_status_has_its_error(status: int, error: type[Exception]) -> None:
    for said in ("", "SlowDown"):
        got = refusal(status, "s3://bucket/model", said, 1.0)
        assert type(got) is error
        assert str(status) in str(got)
        assert said in str(got)
        assert isinstance(got, errors.TransientOriginError) or "s3://bucket/model" in str(got)


@pytest.mark.parametrize(("status", "is_throttled"), [(429, True), (503, True), (500, False), (408, False)])
def test_g14_throttling_is_told(status: int, is_throttled: bool) -> None:
    facts: dict[str, Any] = refusal(status, "s3://bucket/model", "", 2.5).facts
    assert (facts["is_throttled"], facts["retry_after_s"]) == (is_throttled, 2.5)
