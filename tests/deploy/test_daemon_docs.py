"""docs/daemon.md: its configuration is read, what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

from weightcache.config import read_configuration
from weightcache.meters import METERS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "daemon.md").read_text()


def test_configuration_of_the_docs_is_understood(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    (tmp_path / "weightcache.toml").write_text(block)
    read_configuration({}, tmp_path / "weightcache.toml")


def test_metrics_of_the_docs_are_measured() -> None:
    named = {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall(r"\bweightcache_[a-z_]+", TEXT)}
    assert len(named) >= 5 and named <= METERS.keys()


def test_files_and_headings_of_the_docs_are_there() -> None:
    files = {
        *re.findall(r"\bdeploy/[\w/.-]*\w", TEXT),
        *(f"docs/{name}" for name in re.findall(r"\]\(([\w/.-]+)", TEXT)),
    }
    assert len(files) >= 8
    assert [name for name in files if not (ROOT / name).exists()] == []
    headings = {line.removeprefix("## ").lower().replace(" ", "-") for line in TEXT.splitlines() if line[:3] == "## "}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= headings
