"""The reservation of huge pages, in a made-up pool whose pages are found at once, and in pools that give none."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightcache.daemon.hugepages import PAGE_NBYTES, reserve


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """A pool of 10 free pages, 2 of them promised; what is written is granted."""
    (tmp_path / "nr_hugepages").write_text("10\n")
    (tmp_path / "free_hugepages").symlink_to("nr_hugepages")
    (tmp_path / "resv_hugepages").write_text("2\n")
    return tmp_path


def test_what_is_missing_is_reserved(pool: Path) -> None:
    found = reserve(32 * PAGE_NBYTES - 1, pool)
    assert (found.is_whole, found.n_free) == (True, 32)
    assert (pool / "nr_hugepages").read_text() == "34"


def test_what_is_there_is_left_as_it_is(pool: Path) -> None:
    assert reserve(8 * PAGE_NBYTES, pool).is_whole
    assert (pool / "nr_hugepages").read_text() == "10\n"


def test_no_more_is_asked_for_than_memory_is_left_for(pool: Path) -> None:
    assert not reserve(1 << 60, pool).is_whole


def test_pages_that_are_not_found_are_told(pool: Path) -> None:
    (pool / "free_hugepages").unlink()
    (pool / "free_hugepages").write_text("5\n")
    found = reserve(32 * PAGE_NBYTES, pool)
    assert not found.is_whole
    assert "32 huge pages of 2 MiB that huge_bytes wants, 3 were" in str(found)
    assert "free memory is too little, or in pieces" in str(found)


def test_a_kernel_without_them_is_told(tmp_path: Path) -> None:
    assert "No such file" in str(reserve(PAGE_NBYTES, tmp_path / "none"))
