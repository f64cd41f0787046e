"""Own the stand-in for the tests of the engine: built once, and as after loading in each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from standin import StandIn, build_standin


@pytest.fixture(scope="session")
def standin_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in's library, without sanitizers."""
    return build_standin(tmp_path_factory.mktemp("standin"))


@pytest.fixture
def driver_standin(standin_path: Path) -> Iterator[StandIn]:
    """The stand-in that `_engine.Driver(standin.path)` opens in this process; its findings fail the test."""
    standin = StandIn(standin_path)
    standin.reset()
    yield standin
    found = standin.violations() + standin.leaks()
    standin.reset()
    standin.call("cuCtxSetCurrent", None)
    assert found == []
