"""What the daemon says over HTTP: to whom, with which headers, and what it never repeats."""

from __future__ import annotations

import http.client
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import daemon_states
import pytest
import uvloop
from served_page import ServedPage

from weightcache.daemon.listening import is_named_so
from weightcache.daemon.web import HEADERS, PAGE, serve
from weightcache.errors import ConfigError

PATHS = (*PAGE, "/api/state", "/metrics", "/healthz", "/readyz")
Ask = Callable[..., tuple[http.client.HTTPResponse, str]]


@pytest.fixture
def page() -> Iterator[ServedPage]:
    with ServedPage(daemon_states.at_rest()) as page:
        yield page


@pytest.fixture
def ask(page: ServedPage) -> Iterator[Ask]:
    """Send a request, and return the answer and its text: `ask("/", host="evil.example")`."""
    with ExitStack() as connections:

        def ask(path: str, method: str = "GET", host: str | None = None) -> tuple[http.client.HTTPResponse, str]:
            connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
            connections.enter_context(closing(connection))
            connection.request(method, path, headers={} if host is None else {"Host": host})
            answer = connection.getresponse()
            return answer, answer.read().decode()

        yield ask


# -- what is said


@pytest.mark.parametrize("path", PATHS)
def test_everything_is_answered_with_strict_headers(ask: Ask, path: str) -> None:
    answer, text = ask(path)
    assert (answer.status, bool(text)) == (200, True)
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'self'")


@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_a_body(ask: Ask, path: str) -> None:
    (got, text), (head, nothing) = ask(path), ask(path, "HEAD")
    assert (head.status, nothing) == (got.status, "")
    assert head.headers["Content-Length"] == got.headers["Content-Length"] == str(len(text.encode()))


def test_state_is_told_with_the_bottleneck_of_each_load(ask: Ask, page: ServedPage) -> None:
    answer, text = ask("/api/state")
    told = json.loads(text)
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    bottlenecks = [load.pop("bottleneck") for load in told["loads"]]
    assert told == page.state
    assert [each["what"] for each in bottlenecks] == ["origin", "disk", "host", "host"]
    assert "3.22 GB/s at best on this machine" in bottlenecks[1]["says"]


def test_report_that_is_none_does_no_harm(ask: Ask, page: ServedPage) -> None:
    page.state = daemon_states.hostile()
    answer, text = ask("/api/state")
    assert answer.status == 200
    assert json.loads(text)["loads"][-1]["bottleneck"] is None


def test_metrics_are_prometheus(ask: Ask) -> None:
    answer, text = ask("/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    assert text == "# TYPE weightcache_a_total counter\nweightcache_a_total 1\n"


def test_alive_though_not_ready(ask: Ask, page: ServedPage) -> None:
    page.why_not = "the pool is being populated"
    answer, text = ask("/readyz")
    assert (answer.status, text) == (503, "the pool is being populated\n")
    assert ask("/healthz")[0].status == 200


def test_page_names_only_files_that_are_served(ask: Ask) -> None:
    _, text = ask("/")
    assert [name for name in ("page.css", "page.js", "icon.svg") if name in text] == ["page.css", "page.js", "icon.svg"]
    assert "style=" not in text  # which the policy forbids


# -- what is refused


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_can_be_changed(ask: Ask, method: str) -> None:
    answer, _ = ask("/api/state", method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/../pyproject.toml", "/%2e%2e/web.py", "/dashboard/page.js", "//etc/passwd", "/api"])
def test_no_other_file_is_served(ask: Ask, path: str) -> None:
    assert ask(path)[0].status == 404


@pytest.mark.parametrize("path", PATHS)
def test_who_comes_by_another_name_is_refused(ask: Ask, path: str) -> None:
    answer, text = ask(path, host="rebound.example")
    assert answer.status == 421
    assert "s3://" not in text
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS


@pytest.mark.parametrize(
    ("hosts", "listens_at", "is_known"),
    [
        (["localhost"], "127.0.0.1", True),
        (["LocalHost:9000"], "127.0.0.1", True),
        (["127.0.0.1:9000"], "127.0.0.1", True),
        (["[::1]:9000"], "::1", True),
        (["node7.example:80"], "node7.example", True),
        (["10.1.2.3:80"], "10.1.2.3", True),
        (["10.1.2.3:80"], "0.0.0.0", True),
        (["10.1.2.3:80"], "127.0.0.1", False),
        (["rebound.example"], "0.0.0.0", False),
        (["rebound.example"], "127.0.0.1", False),
        (["localhost.rebound.example"], "127.0.0.1", False),
        (["127.0.0.1.rebound.example"], "127.0.0.1", False),
        (["localhost:80:80"], "127.0.0.1", False),
        (["user@localhost"], "127.0.0.1", False),
        (["localhost", "rebound.example"], "127.0.0.1", False),
        ([""], "127.0.0.1", False),
        ([], "127.0.0.1", False),
    ],
)
def test_host_is_known(hosts: list[str], listens_at: str, is_known: bool) -> None:
    assert is_named_so(hosts, listens_at) is is_known


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /<script>alert(1)</script> HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: <script>alert(1)</script>\r\nConnection: close\r\n\r\n",
        b"<script>alert(1)</script> / HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\n\r\n",
        b"GET / <script>alert(1)</script>\r\nAccept: text/html\r\n\r\n",
    ],
)
def test_nothing_of_a_request_becomes_a_page(page: ServedPage, request_head: bytes) -> None:
    with socket.create_connection(("127.0.0.1", page.port), timeout=20) as connection:
        connection.sendall(request_head)
        received = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = received.partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] 4", head)
    assert b"text/html" not in head or b"<script>" not in body


# -- at start and end


def test_missing_extra_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ConfigError, match=r'pip install "weightcache\[daemon\]"'):
        uvloop.run(serve(dict, str, str, ("127.0.0.1", 0)))


def test_taken_port_is_said(page: ServedPage) -> None:
    with (
        pytest.raises(ConfigError, match=rf"cannot listen at 127\.0\.0\.1:{page.port} .*port 0"),
        ServedPage({}, port=page.port),
    ):
        pass


def test_close_ends_connections_and_may_be_called_twice() -> None:
    async def run() -> None:
        site = await serve(dict, str, str, ("127.0.0.1", 0))
        port = site.port
        connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        await site.close()
        await site.close()
        with connection, pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=20)

    uvloop.run(run())


def test_states_of_the_tests_are_json() -> None:
    states: list[dict[str, Any]] = [daemon_states.at_rest(), daemon_states.cold_load(), daemon_states.hostile()]
    assert [json.loads(json.dumps(state, allow_nan=False)) == state for state in states] == [True] * 3
