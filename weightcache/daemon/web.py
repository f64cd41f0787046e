"""Own what the daemon says over HTTP: the page, the state behind it, metrics, and whether it is alive and ready.

Never changes anything, never answers who came by another name (DNS rebinding), and never repeats what a request said.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightcache.daemon.listening import Listener, is_named_so, listen
from weightcache.waterfall import bottleneck

if TYPE_CHECKING:
    from aiohttp import web

DASHBOARD = Path(__file__).with_name("dashboard")
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "weightcache",
    "X-Content-Type-Options": "nosniff",
}
METHODS = ("GET", "HEAD")


@dataclass(frozen=True, slots=True)
class _Answer:
    text: str
    content_type: str = "text/plain"
    status: HTTPStatus = HTTPStatus.OK


async def serve(
    state: Callable[[], dict[str, Any]],
    metrics: Callable[[], str],
    is_ready: Callable[[], str],
    address: tuple[str, int],
) -> Listener:
    """Serve the page on this loop until it is closed.

    Args:
        state: Returns the state document; called on the loop thread, at each request for it, as the next two are.
        metrics: Returns the metrics in Prometheus's text format.
        is_ready: Returns why the daemon cannot serve loads, or nothing when it can.
        address: Host and port to listen at; port 0 takes a free one.

    Raises:
        ConfigError: aiohttp is not installed, or nobody can listen there.
    """
    page = {path: _Answer((DASHBOARD / name).read_text("utf-8"), kind) for path, (name, kind) in PAGE.items()}

    def find(path: str) -> _Answer:
        if path in page:
            return page[path]
        if path == "/api/state":
            return _Answer(json.dumps(_judged(state()), separators=(",", ":")), "application/json")
        if path == "/metrics":
            return _Answer(metrics())
        if path == "/healthz":
            return _Answer("alive\n")
        if path == "/readyz":
            why_not = is_ready()
            return _Answer(f"{why_not}\n", status=HTTPStatus.SERVICE_UNAVAILABLE) if why_not else _Answer("ready\n")
        return _Answer("no such page: see /\n", status=HTTPStatus.NOT_FOUND)

    async def answer(request: web.BaseRequest) -> web.Response:
        from aiohttp import web

        headers = HEADERS
        if not is_named_so(request.headers.getall("Host", []), address[0]):
            told = _Answer(
                "not by this name: ask for localhost, or for the address that the daemon was told to listen at\n",
                status=HTTPStatus.MISDIRECTED_REQUEST,
            )
        elif request.method not in METHODS:
            told = _Answer("this page only answers GET and HEAD\n", status=HTTPStatus.METHOD_NOT_ALLOWED)
            headers = {**HEADERS, "Allow": ", ".join(METHODS)}
        else:
            told = find(request.path)
        return web.Response(
            text=told.text, status=told.status, content_type=told.content_type, charset="utf-8", headers=headers
        )

    return await listen("the daemon's page", address, answer)


def _judged(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state with each load's bottleneck beside its report, against the best that this machine has shown."""
    loads = [{**load, "bottleneck": _judge(load["report"], state["limits"])} for load in state["loads"]]
    return {**state, "loads": loads}


def _judge(report: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        found = bottleneck(report, limits)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None  # a client's report, which is not what it should be
    return found.as_dict() if found else None
