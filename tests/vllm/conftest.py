"""Own what the tests of vLLM share: they run where vLLM is installed, and say loudly where it is not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import vllm_engine as engine

SPEC = find_spec("vllm")
IS_HERE = SPEC is not None and SPEC.origin is not None  # without an origin it is this folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in own:
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # vLLM's and its libraries', by the dozen
        if not IS_HERE:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: run `make test-vllm`"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models of the same shape, as they lie on disk."""
    root = tmp_path_factory.mktemp("models")
    return engine.write_llama(root / "one", 1), engine.write_llama(root / "other", 2)


@pytest.fixture(scope="session")
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(scope="session")
def expected(folders: tuple[Path, Path], in_this_process: None) -> tuple[engine.Tokens, engine.Tokens]:
    """What vLLM generates with the two models when it loads them itself."""
    made = engine.make(model=str(folders[0]))
    one = engine.generate(made)
    engine.reload(made, str(folders[1]))
    other = engine.generate(made)
    assert one != other
    return one, other


@pytest.fixture
def make(in_this_process: None) -> Iterator[Callable[..., Any]]:
    """Make an engine in this process, gone at the end of the test."""
    yield engine.make
    gc.collect()
