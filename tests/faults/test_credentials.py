"""Credentials that end under way, clocks that differ, buckets in other regions: found out by the load itself, once."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import models
import pytest
import torch
from hostile import ALWAYS, Answer, Fault, HostileServer, Peer, objects_of
from reference import assert_same, tensors_of

import weightcache
from weightcache.errors import AccessDeniedError, OriginError, ResidencyError, WeightcacheError
from weightcache.origins.pace import throttle
from weightcache.origins.plane import Wiring
from weightcache.origins.s3 import S3Origin

N_TENSORS = 6
SHAPES: models.Shapes = {f"layer.{number}.weight": ("F32", (256, 1024)) for number in range(N_TENSORS)}
SECRET = "hush-7f3a9c"
WEIGHTS = r"^GET \S+\.safetensors\S* "
HOUR_S = 3600.0
TOLERANCE_S = 900.0  # S3's own
HERE = "us-east-1"
THERE = "eu-north-1"
NAMES = ("bucket/model", "bucket/model/model.safetensors")  # listed, and asked for by HEAD


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tensors of 1 MiB, each a chunk and a request."""
    folder = tmp_path_factory.mktemp("model")
    models.write_safetensors(folder / "model.safetensors", SHAPES)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, torch.Tensor]:
    return tensors_of(folder)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileServer]:
    monkeypatch.setenv("WEIGHTCACHE_RANGE_BYTES", "1MiB")
    monkeypatch.setenv("AWS_DEFAULT_REGION", HERE)
    with HostileServer(objects_of(folder, "bucket/model")) as server:
        yield server


class Signed:
    """What a request's signature says of itself; the signature is not looked at."""

    def __init__(self, peer: Peer) -> None:
        assert peer.exchange is not None
        query = {name: values[0] for name, values in parse_qs(urlsplit(peer.exchange.path).query).items()}
        self.key, _, self.region, *_ = query["X-Amz-Credential"].split("/")
        self.token = query.get("X-Amz-Security-Token", "")
        stamp = datetime.strptime(query["X-Amz-Date"], "%Y%m%dT%H%M%SZ")
        self.at_s = stamp.replace(tzinfo=UTC).timestamp()


class Gate:
    """Lets requests through that a judge finds nothing wrong with; counts what it refused."""

    def __init__(
        self, server: HostileServer, judge: Callable[[Signed], dict[str, str] | None], where: str = "^(GET|HEAD) "
    ) -> None:
        self.refused: list[str] = []
        self.passed: list[Signed] = []
        self.delay_s = 0.0
        server.script(where, self._fault(judge), ALWAYS)

    def _fault(self, judge: Callable[[Signed], dict[str, str] | None]) -> Fault:
        async def fault(answer: Answer, peer: Peer) -> None:
            assert peer.exchange is not None
            signed = Signed(peer)
            verdict = judge(signed)
            if verdict is None:
                self.passed.append(signed)
                await asyncio.sleep(self.delay_s)
            else:
                self.refused.append(peer.exchange.method)
                refuse(answer, **verdict)
            await peer.answer(answer)

        return fault


def refuse(
    answer: Answer, code: str, status: str = "403 Forbidden", message: str = "", region: str = "", **headers: str
) -> None:
    """Become an S3 error."""
    answer.head.start = f"HTTP/1.1 {status}"
    for name in ("Content-Range", "ETag"):
        answer.head.remove(name)
    answer.head.set("Content-Type", "application/xml")
    for name, value in headers.items():
        answer.head.set(name.replace("_", "-"), value)
    named = f"<Region>{region}</Region>" if region else ""
    answer.replace_body(f"<Error><Code>{code}</Code><Message>{message}</Message>{named}</Error>".encode())


def load(server: HostileServer, name: str = "bucket/model", **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Load without the disk tier; return copies of the tensors, and the report."""
    given = {"endpoint_url": server.endpoint, **options}
    with weightcache.load_model(f"s3://{name}", "cpu", storage_options=given, cache="none", timeout_s=30) as model:
        return {name: model[name].clone() for name in model}, model.report


def load_with_key(server: HostileServer, name: str = "bucket/model") -> dict[str, torch.Tensor]:
    return load(server, name, key="key", secret=SECRET)[0]


def fail(work: Callable[[], object]) -> WeightcacheError:
    with pytest.raises(WeightcacheError) as caught:
        work()
    assert SECRET not in f"{caught.value!r} {caught.value.facts}"
    return caught.value


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- credentials that end


LIFE_S = 1.5
DELAY_S = 0.5  # of each answer, so that a load takes several lives

PROCESS = """
import json, sys, time
from datetime import datetime, timezone
_, calls, life_s, fails_after = sys.argv
with open(calls, "a+") as file:
    file.seek(0)
    number = len(file.readlines())
    file.write("called\\n")
if number >= int(fails_after):
    sys.exit("no more for you")
until_s = time.time() + float(life_s)
print(json.dumps({
    "Version": 1,
    "AccessKeyId": f"key{number}",
    "SecretAccessKey": "SECRET",
    "SessionToken": f"until-{until_s}",
    "Expiration": datetime.fromtimestamp(until_s, timezone.utc).isoformat(),
}))
"""


class Issuer:
    """A `credential_process`: each call gives a token that ends soon."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._calls = folder / "calls"
        (folder / "issue.py").write_text(PROCESS.replace("SECRET", SECRET))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
        self.set()

    def set(self, life_s: float = LIFE_S, fails_after: int = 1_000) -> None:
        script = f"{sys.executable} -I -S {self._folder / 'issue.py'} {self._calls} {life_s} {fails_after}"
        self.set_command(script)

    def set_command(self, command: str) -> None:
        (self._folder / "config").write_text(f"[default]\ncredential_process = {command}\n")

    @property
    def n_calls(self) -> int:
        return len(self._calls.read_text().splitlines()) if self._calls.exists() else 0


@pytest.fixture
def issuer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Issuer:
    return Issuer(tmp_path, monkeypatch)


def judge_token(signed: Signed) -> dict[str, str] | None:
    until_s = float(signed.token.removeprefix("until-"))
    return None if time.time() < until_s else {"code": "ExpiredToken", "message": "The provided token has expired."}


def test_g15_a_load_outlives_its_tokens(
    server: HostileServer,
    issuer: Issuer,
    expected: dict[str, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_CONNECTIONS", "1")
    caplog.set_level(logging.DEBUG, "weightcache")
    gate = Gate(server, judge_token)
    gate.delay_s = DELAY_S
    loaded, report = load(server)
    assert_same(loaded, expected)
    tokens = {signed.token for signed in gate.passed}
    assert len(tokens) >= 3
    assert len({signed.key for signed in gate.passed}) == len(tokens)
    assert issuer.n_calls < len(gate.passed)
    assert report.n_retries == len(gate.refused)
    assert warnings_of(caplog) == []
    assert SECRET not in caplog.text
    assert "until-" not in caplog.text


def test_g15_ranges_read_together_outlive_their_tokens(
    server: HostileServer, issuer: Issuer, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_CONNECTIONS", "3")
    gate = Gate(server, judge_token)
    gate.delay_s = 2 * DELAY_S
    assert_same(load(server)[0], expected)
    assert len({signed.token for signed in gate.passed}) >= 2


def test_g15_tokens_that_are_refused_at_once_are_refused(server: HostileServer, issuer: Issuer) -> None:
    gate = Gate(server, lambda signed: {"code": "ExpiredToken"})
    assert isinstance(fail(lambda: load(server)), AccessDeniedError)
    assert len(gate.refused) == 1


@pytest.mark.parametrize("how", ["fails", "fails later", "expired", "missing", "no JSON"])
def test_g15_credentials_that_cannot_be_had_are_a_clear_error(
    server: HostileServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_CONNECTIONS", "1")
    gate = Gate(server, judge_token)
    gate.delay_s = DELAY_S
    if how == "missing":
        issuer.set_command("/nowhere/issue")
    elif how == "no JSON":
        issuer.set_command("/bin/echo hello")
    else:
        issuer.set(*{"fails": (LIFE_S, 0), "fails later": (LIFE_S, 3), "expired": (-HOUR_S, 1000)}[how])
    error = fail(lambda: load(server))
    assert isinstance(error, WeightcacheError)
    assert error.code in ("access-denied", "config")
    assert "s3://bucket/model" in str(error)
    assert bool(gate.passed) is (how == "fails later")


# -- clocks


Clock = Callable[[Signed], dict[str, str] | None]


def clock(
    ahead_s: float, code: str = "RequestTimeTooSkewed", message: str = "", *, keeps_refusing: bool = False
) -> Clock:
    """Judge by a clock that differs from this machine's."""

    def judge(signed: Signed) -> dict[str, str] | None:
        now_s = time.time() + ahead_s
        if abs(signed.at_s - now_s) <= TOLERANCE_S and not keeps_refusing:
            return None
        return {"code": code, "message": message, "Date": formatdate(now_s, usegmt=True)}

    return judge


@pytest.mark.parametrize("name", NAMES, ids=["listed", "named"])
@pytest.mark.parametrize(
    ("ahead_s", "code", "message"),
    [
        (HOUR_S, "RequestTimeTooSkewed", "The difference between the request time and the current time is too large."),
        (-HOUR_S, "RequestTimeTooSkewed", ""),
        (24 * 365 * HOUR_S, "AccessDenied", "Request has expired"),
        (-HOUR_S, "AccessDenied", "Request is not valid yet"),
    ],
)
def test_g15_a_clock_that_differs_is_corrected_once(
    server: HostileServer,
    expected: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
    name: str,
    ahead_s: float,
    code: str,
    message: str,
) -> None:
    gate = Gate(server, clock(ahead_s, code, message))
    assert_same(load_with_key(server, name), expected)
    assert gate.refused == ["HEAD" if name.endswith("safetensors") else "GET"]
    [warning] = warnings_of(caplog)
    assert "clock" in warning
    assert f"{ahead_s:.0f} s" in warning or f"{ahead_s - 1:.0f} s" in warning


@pytest.mark.parametrize("n_connections", [1, 8])
def test_g15_a_clock_that_differs_is_corrected_where_only_objects_are_refused(
    server: HostileServer,
    expected: dict[str, torch.Tensor],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    n_connections: int,
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_CONNECTIONS", str(n_connections))
    gate = Gate(server, clock(HOUR_S), WEIGHTS + "bytes=[1-9]")
    assert_same(load_with_key(server), expected)
    assert 1 <= len(gate.refused) <= n_connections
    assert len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("name", NAMES, ids=["listed", "named"])
def test_a_clock_that_is_refused_after_its_correction_is_denied(server: HostileServer, name: str) -> None:
    gate = Gate(server, clock(HOUR_S, keeps_refusing=True))
    assert isinstance(fail(lambda: load_with_key(server, name)), AccessDeniedError)
    assert len(gate.refused) == 2


@pytest.mark.parametrize(
    "date", [None, "", "noon", "Fri, 31 Dec 9999 23:59:59 GMT", "1 Jan 99999999999 00:00:00 GMT", "now"]
)
def test_a_clock_that_tells_no_other_time_is_denied(
    server: HostileServer, caplog: pytest.LogCaptureFixture, date: str | None
) -> None:
    said = formatdate(usegmt=True) if date == "now" else date
    gate = Gate(server, lambda _: {"code": "RequestTimeTooSkewed"} | ({} if said is None else {"Date": said}))
    assert isinstance(fail(lambda: load_with_key(server)), AccessDeniedError)
    assert len(gate.refused) == 1
    assert warnings_of(caplog) == []


# -- regions


def region(form: str, there: str = THERE) -> Clock:
    """Judge as a bucket that lies elsewhere; `form` is how it says where."""

    def judge(signed: Signed) -> dict[str, str] | None:
        if signed.region == there:
            return None
        if form == "moved":
            return {"code": "PermanentRedirect", "status": "301 Moved Permanently", "x_amz_bucket_region": there}
        malformed = {"code": "AuthorizationHeaderMalformed", "status": "400 Bad Request"}
        return malformed | ({"x_amz_bucket_region": there} if form == "header" else {"region": there})

    return judge


@pytest.mark.parametrize("form", ["moved", "header", "body"])
def test_a_bucket_in_another_region_is_found_once(
    server: HostileServer, expected: dict[str, torch.Tensor], form: str
) -> None:
    gate = Gate(server, region(form))
    assert_same(load_with_key(server), expected)
    assert gate.refused == ["GET"]
    assert len(gate.passed) > N_TENSORS


@pytest.mark.parametrize("form", ["moved", "header"])  # the answer to a HEAD has no body
def test_a_named_object_in_another_region_is_found_once(
    server: HostileServer, expected: dict[str, torch.Tensor], form: str
) -> None:
    gate = Gate(server, region(form))
    assert_same(load_with_key(server, "bucket/model/model.safetensors"), expected)
    assert gate.refused == ["HEAD"]


@pytest.mark.parametrize("there", ["eu-west-1", "../../x", "evil.example/", ""])
def test_a_bucket_that_is_in_no_region_is_an_error(server: HostileServer, there: str) -> None:
    def judge(signed: Signed) -> dict[str, str]:
        return {"code": "PermanentRedirect", "status": "301 Moved Permanently", "x_amz_bucket_region": there}

    gate = Gate(server, judge)
    error = fail(lambda: load_with_key(server))
    assert type(error) is OriginError
    assert "PermanentRedirect" in str(error)
    assert len(gate.refused) == (2 if there == "eu-west-1" else 1)


@pytest.mark.parametrize("form", ["moved", "header", "body"])
def test_g26_a_region_that_is_forbidden_is_not_asked(server: HostileServer, form: str) -> None:
    told: list[str] = []

    def check_region(region: str) -> None:
        told.append(region)
        raise ResidencyError(f"not from {region}")

    async def listed() -> object:
        options = {"endpoint_url": server.endpoint, "key": "key", "secret": SECRET}
        origin = S3Origin("s3://bucket/model", options, Wiring(5.0, check_region=check_region), throttle(0))
        try:
            return await origin.list()
        finally:
            await origin.close()

    gate = Gate(server, region(form))
    with pytest.raises(ResidencyError, match=f"not from {THERE}"):
        asyncio.run(listed())
    assert (told, gate.refused, gate.passed) == ([THERE], ["GET"], [])


@pytest.mark.parametrize("first", ["clock", "region"])
def test_a_clock_and_a_region_are_both_corrected(
    server: HostileServer, expected: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture, first: str
) -> None:
    judges = [clock(HOUR_S), region("moved")]
    if first == "region":
        judges.reverse()
    gate = Gate(server, lambda signed: judges[0](signed) or judges[1](signed))
    assert_same(load_with_key(server), expected)
    assert len(gate.refused) == 2
    assert len(warnings_of(caplog)) == 1
