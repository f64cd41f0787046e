"""Own the browser of the tests: one for all of them, or a skip that says how to get it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from chromium import NAMES, Chromium, OpenPage, Tab, find_chromium
from served_page import Serve, ServedPage


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """One browser for all tests."""
    program = find_chromium()
    if program is None:
        pytest.skip(f"the page was not looked at: none of {', '.join(NAMES)} is on PATH (apt-get install chromium)")
    with Chromium(program, tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve the page of a state until the test ends: `serve(state)`."""
    with ExitStack() as pages:
        yield lambda state, **where: pages.enter_context(ServedPage(state, **where))


@pytest.fixture
def open_page(chromium: Chromium) -> Iterator[OpenPage]:
    """Open a served page in a tab, and wait until it shows the daemon's state: `open_page(page, width=…)`."""
    with ExitStack() as tabs:

        def open_page(page: ServedPage, **settings: Any) -> Tab:
            tab = tabs.enter_context(chromium.open_tab(**settings))
            tab.go(page.url, "document.querySelector('#tier-list .tier') !== null")
            return tab

        yield open_page
