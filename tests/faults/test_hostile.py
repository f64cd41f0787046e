"""Loads from a server that breaks every rule: right bytes, or an error that names the model; never silence, never a hang.

Each row of TABLE is a load with a cold cache, then an honest one with the same cache, which must give right bytes: nothing
wrong was kept. `python tests/faults/hostile_table.py` prints what came of each row.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import models
import pytest
import torch
from cache_folder import chunk_files
from hostile import ALWAYS, CONNECT, HostileServer, Rule, make_certificates, objects_of, parse_range
from hostile_faults import FAULTS
from reference import assert_same, raw, tensors_of

import weightcache
from weightcache import errors

T = TypeVar("T")

MIB = 1 << 20
SHAPES: models.Shapes = {
    **{f"layer.{number}.weight": ("F32", (256, 1024)) for number in range(3)},
    "tail.weight": ("F32", (96, 128)),  # so short that no client need stop reading within a forged answer
}
SECRET = "hush-7f3a9c"
ATTEMPTS = 3
REQUEST_TIMEOUT_S = 1
TIMEOUT_S = 8.0
HANG_S = 2 * TIMEOUT_S  # a load that takes longer has forgotten its deadline
MAX_GROWTH_BYTES = 64 * MIB + 8 * MIB  # G21, and the image and what is being received

NAMES = ("bucket/model", "model.safetensors", "evil.safetensors", r"a\x00b")  # one of them stands in every error
FINAL = ("AccessDeniedError", "ModelNotFoundError")  # asked for once

# Places: `listing`; `head`, the HEAD of a named file; `size`, where a size is learned (S3: listing, http: HEAD);
# `header`, the first bytes of the safetensors file; `first`, `middle`, `last`, the read that holds that byte of the weights;
# `weights`, any read of the file; `digest`, weights whose digest is known from a load before; `connection`, before the first
# byte; `certificate`; `address`.
# Outcomes: right bytes (by any way), `resumed` (right bytes, none that had come was asked for again), `restarted` (right bytes
# of a load that began anew, with a warning), or an error's class.
TABLE = """
200-whole                   header      once    s3                  right
200-whole                   first       once    tls-s3 http         right
200-whole                   middle      always  http                OriginError
200-range                   first       once    s3                  right
200-range                   last        always  http                OriginError
204                         first       once    http                right
204                         header      always  http                OriginError
206-no-content-range        first       once    s3                  right
206-no-content-range        header      always  http                OriginError
206-content-range-garbage   middle      once    s3                  right
206-content-range-garbage   first       always  http                OriginError
206-content-range-backwards first       once    http                right
206-content-range-exclusive first       once    tls-s3              right
206-wrong-total             middle      once    http                right
206-wrong-total             first       always  tls-s3              OriginError
206-shifted-later           header      once    http                right
206-shifted-later           first       once    tls-s3 http         right
206-shifted-later           middle      always  tls-s3              OriginError
206-shifted-earlier         last        once    tls-http            right
206-elsewhere               middle      once    s3 http             right
206-elsewhere               header      always  http                OriginError
206-fewer                   first       once    s3                  right
206-fewer                   last        always  http                right|OriginError
206-more                    middle      once    s3                  right
206-more                    first       always  http                OriginError
206-multipart               first       once    http                right
206-multipart               header      always  s3                  OriginError
400                         first       always  s3                  OriginError
400                         listing     always  http                OriginError
401                         listing     always  s3                  AccessDeniedError
401                         first       always  tls-http            AccessDeniedError
403                         listing     always  http                right
403                         middle      always  s3 http             AccessDeniedError
404                         listing     always  s3                  ModelNotFoundError
404                         middle      always  s3 http             ModelNotFoundError
408                         first       once    tls-s3              right
412                         middle      once    s3 http             restarted
412                         middle      always  s3 http             OriginChangedError
416                         last        always  http                OriginError
429                         listing     once    tls-s3              right
429                         first       always  http                OriginUnreachableError
429-retry-after-1           first       once    http                right
500                         header      once    tls-s3              right
500                         listing     always  http                OriginUnreachableError
502-html                    listing     once    http                right
502-html                    middle      always  s3                  OriginUnreachableError
503                         listing     once    http                right
503                         last        always  s3                  OriginUnreachableError
503-retry-after-1h          first       always  s3                  OriginUnreachableError|DeadlineError
503-retry-after-garbage     first       once    http                right
503-flood                   listing     once    tls-s3              right
503-flood                   first       once    http                right
504                         first       once    tls-s3              right
301-other-host              listing     always  s3 http             OriginError
301-other-host              first       always  tls-s3 http         OriginError
302-other-host              head        always  s3 http             OriginError
302-other-host              header      always  s3 http             OriginError
307-other-host              listing     always  tls-s3 tls-http     OriginError
307-other-host              middle      always  http                OriginError
302-loop                    first       always  tls-s3              OriginError
200-html                    listing     always  s3                  OriginError|FormatError
200-html                    listing     always  http                right|ModelNotFoundError|OriginError|FormatError
200-html                    header      once    http                right
200-html                    middle      once    tls-s3              right
200-html                    first       always  http                OriginError
short                       listing     once    s3 http             right
short                       header      once    http                right
short                       first       once    s3 http tls-s3      resumed
short                       last        once    s3                  resumed
short-reset                 middle      once    tls-s3              right
short-without-close-notify  middle      once    tls-s3 tls-http     resumed
short-without-length        listing     once    s3                  right
short-without-length        middle      once    http                right
short-without-length        header      always  http                right|OriginError
long                        first       once    tls-s3              right
long                        middle      always  tls-s3              right|OriginError
long-announced              first       once    http                right
long-announced              header      always  http                OriginError
length-missing              middle      always  tls-s3              right|OriginError
length-missing-in-head      head        always  s3                  right|OriginError
length-missing-in-head      head        always  http                right|OriginError|ModelNotFoundError
length-negative             first       once    http                right
length-negative             header      always  s3                  OriginError
length-huge                 middle      once    s3                  right
length-huge                 listing     once    s3                  right
length-overflowing          first       once    http                right
length-garbage              first       once    s3                  right
length-garbage              last        always  http                OriginError
length-plus                 header      once    http                right
length-list                 first       once    tls-s3              right
length-twice                first       once    http                right
length-twice                middle      always  tls-s3              OriginError
chunked                     listing     always  s3 http             right
chunked                     middle      once    http                right
chunked                     first       always  tls-s3              right|OriginError
chunked-and-length          first       once    http                right
chunked-unfinished          listing     once    s3                  right
chunked-unfinished          middle      once    http                right
chunked-garbage             first       once    s3                  right
chunked-huge                first       once    http                right
gzip                        first       once    s3                  right
gzip                        header      always  http                OriginError
gzip-announced              middle      once    s3                  right
flood                       listing     always  s3 http             OriginError|FormatError
flipped-bit                 digest      once    s3 http tls-s3      right
flipped-bit                 digest      always  s3 http             IntegrityError
etag-missing                first       once    http                right
etag-missing                middle      always  tls-s3              OriginError
etag-other                  first       once    s3 http             restarted
etag-other                  last        always  s3 http             OriginChangedError
etag-changing               weights     always  s3 http             OriginChangedError
etag-weak                   weights     always  http                right|OriginError
head-of-1mb                 listing     once    http                right
head-of-1mb                 first       always  s3                  OriginError
head-of-10000-fields        first       once    http                right
head-of-10000-fields        middle      always  s3                  OriginError
head-flood                  header      once    s3                  right
head-drip                   first       once    http                right
head-bare-lf                first       once    s3                  right
status-line-garbage         first       once    http                right
status-line-garbage         listing     always  http                OriginUnreachableError
http-0.9                    header      once    s3                  right
http-2                      first       once    http                right
binary-garbage              first       once    tls-s3              right
binary-garbage              middle      always  s3                  OriginUnreachableError
100-continue                first       always  http                right
1xx-flood                   first       once    s3                  right
1xx-drip                    first       once    http                right
closed                      listing     once    s3                  right
closed                      middle      always  http                OriginUnreachableError
reset                       first       once    s3 http             right
reset                       header      always  s3                  OriginUnreachableError
silent                      listing     once    s3                  right
silent                      first       once    tls-s3              right
stall-after-head            header      once    http                right
stall-after-head            middle      always  s3                  OriginUnreachableError
stall-half-way              first       once    s3 http tls-s3      resumed
trickle                     listing     once    s3                  right
trickle                     middle      once    s3 http tls-s3      right
closed-after-answer         weights     always  s3 http             right
answer-behind-the-answer    first       once    s3 http tls-s3      right
answer-behind-the-answer    middle      always  http                right|OriginError
answer-behind-the-answer    last        once    s3 http             right
listing-cut                 listing     once    s3                  right|OriginError|FormatError
listing-not-xml             listing     always  s3                  OriginError|FormatError
listing-other-xml           listing     always  s3                  OriginError|FormatError
listing-bomb                listing     always  s3                  OriginError|FormatError
listing-external-entity     listing     always  s3                  OriginError|FormatError
listing-dot-dot             listing     always  s3                  UnsafePathError
listing-dot-dot             listing     always  http                right|UnsafePathError
listing-absolute            listing     always  s3                  UnsafePathError
listing-other-prefix        listing     always  s3                  OriginError|FormatError
listing-nul                 listing     always  s3                  FormatError|OriginError
listing-same-key-twice      listing     always  s3                  right|FormatError|OriginError
listing-cut-short           listing     always  s3                  OriginError|FormatError
listing-same-token          listing     always  s3                  OriginError|FormatError
listing-endless             listing     always  s3 http             OriginError|FormatError
listing-empty               listing     always  s3                  ModelNotFoundError
listing-empty               listing     always  http                right|ModelNotFoundError
listing-sizeless            listing     always  s3                  OriginError|FormatError
size-smaller                size        always  s3                  OriginError|FormatError
size-larger                 size        always  s3 http             OriginError|FormatError
size-zero                   size        always  http                OriginError|FormatError
size-negative               size        always  s3                  OriginError|FormatError
size-negative               size        always  http                right|OriginError|FormatError
size-huge                   size        always  s3                  OriginError|FormatError
size-overflowing            size        always  http                right|OriginError|FormatError
size-garbage                size        always  s3                  OriginError|FormatError
size-arabic                 size        always  s3                  OriginError|FormatError
refused                     address     always  s3 http             OriginUnreachableError
name-unknown                address     always  http                OriginError
unknown-ca                  certificate always  tls-s3 tls-http     OriginError
wrong-name                  certificate always  tls-s3 tls-http     OriginError
expired                     certificate always  tls-s3 tls-http     OriginError
tls-garbage                 connection  once    tls-s3 tls-http     right
tls-garbage                 connection  always  tls-s3 tls-http     OriginError
tls-is-plain-http           connection  always  tls-s3              OriginError
silent                      connection  once    tls-http            right
reset                       connection  once    s3                  right
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One load under one fault."""

    fault: str
    place: str
    times: str
    wire: str
    expected: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.fault}-{self.place}-{self.times}-{self.wire}"


def read_table() -> Iterator[Row]:
    for line in TABLE.split("\n"):
        if line:
            fault, place, times, *wires, expected = line.split()
            yield from (Row(fault, place, times, wire, tuple(expected.split("|"))) for wire in wires)


@dataclass
class Site:
    """A model at a hostile server, over one wire, and the second server that nobody may be sent to."""

    server: HostileServer
    trap: HostileServer
    wire: str
    ca: str
    file: str = ""
    endpoint: str = field(init=False)

    def __post_init__(self) -> None:
        self.endpoint = self.server.endpoint

    @property
    def url(self) -> str:
        return ("s3:/" if self.wire.endswith("s3") else self.endpoint) + "/bucket/model" + self.file

    def options(self) -> dict[str, Any]:
        verify = {"verify": self.ca} if self.wire.startswith("tls") else {}
        if self.wire.endswith("s3"):
            return {"key": "key", "secret": SECRET, "endpoint_url": self.endpoint, "client_kwargs": verify}
        return {"headers": {"Authorization": f"Bearer {SECRET}", "X-Token": SECRET}, **verify}

    def load(self) -> tuple[dict[str, torch.Tensor], Any]:
        """Load within the hard deadline; return copies of the tensors, and the report."""

        def work() -> tuple[dict[str, torch.Tensor], Any]:
            with weightcache.load_model(self.url, "cpu", storage_options=self.options(), timeout_s=TIMEOUT_S) as model:
                assert model.wait_stored(HANG_S)
                return {name: model[name].clone() for name in model}, model.report

        return within(HANG_S, work)


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return or raise what the work does; fail the test, not hang it, when that takes too long."""
    outcome: list[T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as exc:
            outcome.append(exc)

    thread = threading.Thread(target=run, name="hostile-load", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        pytest.fail(f"still not back after {seconds} s: the load hangs")
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tensors of 1 MiB and a small one, each a chunk and a request, asked for one after the other."""
    folder = tmp_path_factory.mktemp("model")
    models.write_safetensors(folder / "model.safetensors", SHAPES)
    return folder


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    return make_certificates(tmp_path_factory.mktemp("ca"))


@pytest.fixture
def site(
    row: Row, folder: Path, certificates: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    monkeypatch.setenv("WEIGHTCACHE_RANGE_BYTES", "1MiB")
    monkeypatch.setenv("WEIGHTCACHE_CONNECTIONS", "1")
    monkeypatch.setenv("WEIGHTCACHE_REQUEST_TIMEOUT_S", str(REQUEST_TIMEOUT_S))
    ca, contexts = certificates
    objects = objects_of(folder, "bucket/model")
    with (
        HostileServer(objects) as trap,
        HostileServer(objects, contexts if row.wire.startswith("tls") else None, trap.endpoint) as server,
    ):
        yield Site(server, trap, row.wire, ca, "/model.safetensors" if row.place == "head" else "")


def break_it(row: Row, site: Site, tmp_path: Path) -> Rule | None:
    """Make the server as bad as the row says; return the rule, where there is one."""
    content = site.server.objects["bucket/model/model.safetensors"]
    data_start = 8 + int.from_bytes(content[:8], "little")
    is_s3 = site.wire.endswith("s3")
    listing = r"^GET \S+list-type=2" if is_s3 else r"^GET \S+/ "
    head = r"^HEAD \S+safetensors"
    read = r"^GET \S+\.safetensors\S* "
    middles = {name: data_start + MIB * number + MIB // 2 for number, name in enumerate(("first", "middle", "last"))}
    match row.place:
        case "certificate":
            site.server.show(row.fault)
            return None
        case "address":
            if row.fault == "name-unknown":
                site.endpoint = "http://weights.invalid"
            else:
                site.server.refuse()
            return None
        case "digest":
            site.load()
            [chunk, *_] = [path for path in chunk_files(tmp_path / "cache").values() if path.stat().st_size == MIB]
            chunk.unlink()
            site.server.reset()
    patterns = {
        "listing": listing,
        "head": head,
        "size": listing if is_s3 else head,
        "header": read + "bytes=0-",
        "connection": f"^{CONNECT}",
    }
    pattern = patterns.get(row.place, read + "bytes=[1-9]" if row.place in middles else read)
    times = 1 if row.times == "once" else ALWAYS
    return site.server.script(pattern, FAULTS[row.fault], times, middles.get(row.place))


def how_it_came_right(site: Site, rule: Rule | None, report: Any) -> str:
    """Say what it took to get right bytes."""
    if any("changed" in warning for warning in report.warnings):
        return "restarted"
    asked = [parse_range(request.range, 1 << 62) for request in site.server.requests if request.range]
    broken = [parse_range(line.rpartition(" ")[2], 1 << 62) for line in (rule.taken if rule else ())]
    if any(a and b and b[0] < a[0] < b[1] == a[1] for a in asked for b in broken):
        return "resumed"
    gets = Counter((request.path, request.range) for request in site.server.requests if request.method == "GET")
    if report.n_retries or max(gets.values()) > 1:
        return "asked again"
    return "taken as it is"


def is_same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    return got.keys() == expected.keys() and all(raw(got[name]) == raw(tensor) for name, tensor in expected.items())


def classes_named(names: tuple[str, ...]) -> tuple[type[BaseException], ...]:
    return tuple(getattr(errors, name) for name in names if name.endswith("Error"))


def peak_bytes() -> int:
    """Return the largest size this process had since `forget_peak()`."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


@pytest.mark.parametrize("row", list(read_table()), ids=str)
def test_g06_right_bytes_or_a_named_error(
    row: Row, site: Site, folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    expected = tensors_of(folder)
    rule = break_it(row, site, tmp_path)
    peak, begun = forget_peak(), time.monotonic()
    error: BaseException | None = None
    try:
        tensors, report = site.load()
        outcome = how_it_came_right(site, rule, report) if is_same(tensors, expected) else "wrong bytes"
    except (Exception, pytest.fail.Exception) as exc:
        tensors, outcome, error = {}, type(exc).__name__, exc
    seconds, growth = time.monotonic() - begun, peak_bytes() - peak
    n_requests = len(site.server.requests)
    for name, value in (("row", row), ("outcome", outcome), ("seconds", seconds), ("requests", n_requests)):
        record_property(name, value)

    leaked = [name for head in site.trap.heads for name, value in head.headers if SECRET in value]
    assert site.trap.heads == [], f"a redirect to another host was followed; secrets it got: {leaked or 'none'}"
    if error is None:
        assert_same(tensors, expected)
        assert "right" in row.expected or outcome in row.expected, f"{outcome}, expected {' or '.join(row.expected)}"
    else:
        check_error(row, site, error)
    assert seconds < TIMEOUT_S or outcome == "DeadlineError"
    assert growth < MAX_GROWTH_BYTES, f"{growth} bytes of memory were used"
    if rule is not None:
        check_attempts(row, rule, outcome)

    site.endpoint = site.server.endpoint
    if row.fault == "refused":
        site.server.accept()
    site.server.reset()
    assert_same(site.load()[0], expected)
    assert weightcache.verify(deep=True).sound


def check_error(row: Row, site: Site, error: BaseException) -> None:
    """Check that an error is one of the expected, says what failed, and tells no secret."""
    named = classes_named(row.expected)
    if not isinstance(error, named) or (
        type(error) in (errors.DeadlineError, errors.TransientOriginError) and type(error) not in named
    ):
        raise AssertionError(f"{type(error).__name__}, expected {' or '.join(row.expected)}: {error}") from error
    told = f"{error!r} {vars(error)}"
    assert any(name in str(error) for name in NAMES), f"neither the model nor a file is named: {error}"
    assert SECRET not in told


def check_attempts(row: Row, rule: Rule, outcome: str) -> None:
    """Check that the fault was met at all, and not more often than G14 allows."""
    assert rule.taken, "no request met the fault: the row tests nothing"
    if row.times == "always" and outcome.endswith("Error"):
        allowed = 1 if outcome in FINAL else 2 if outcome == "OriginChangedError" else ATTEMPTS
        n_asked = max(Counter(rule.taken).values())
        assert n_asked <= allowed, f"the same was asked for {n_asked} times, expected at most {allowed}"
