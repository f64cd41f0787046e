"""The catalogue ends what it has begun."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from weightcache.tiers.catalogue import Catalogue, CatalogueUnavailableError

DEADLINE_S = 20.0


def test_closing_lets_a_call_under_way_in_another_thread_end(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "catalogue")
    begun, closed = threading.Event(), threading.Event()
    refused: list[bool] = []

    def write() -> None:
        with catalogue.transaction():
            catalogue.set("row", 1)
            begun.set()
            refused.append(closed.wait(DEADLINE_S))

    writer = threading.Thread(target=write)
    writer.start()
    assert begun.wait(DEADLINE_S)
    catalogue.close()
    closed.set()
    writer.join()

    assert refused == [True]
    with pytest.raises(CatalogueUnavailableError, match="it was closed"):
        catalogue.get("row")
    again = Catalogue(tmp_path / "catalogue")
    assert again.get("row") == 1
    again.close()
