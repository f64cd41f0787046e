"""Ranges of a model's files, as they are read from where they are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
from reference import hashes

import weightcache
from weightcache.errors import ModelNotFoundError, UriError

MIB = 1 << 20
NBYTES = 17 * MIB + 5  # two chunks
EDGE = 16 * MIB  # between them


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    models.write_tiny_sharded(folder)
    (folder / "a.gguf").write_bytes(os.urandom(NBYTES))
    (folder / "empty").touch()
    return folder


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder on another file system than that of other tests, where the machine has one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.parametrize("cache", ["none", "disk"])
@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, None), (0, 0), (NBYTES, None), (EDGE - 1, EDGE + 1), (0, EDGE), (EDGE, NBYTES), (5, 6), (EDGE + 3, EDGE + 9)],
)
def test_range_is_that_of_the_file(folder: Path, cache: str, start: int, stop: int | None) -> None:
    read = b"".join(weightcache.read(folder, "a.gguf", start, stop, cache=cache))
    assert read == (folder / "a.gguf").read_bytes()[start:stop]


def test_every_file_that_is_listed_can_be_read(folder: Path, tmp_path: Path) -> None:
    for file in weightcache.list_files(folder).files:
        path = tmp_path / "read" / file.path
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join(weightcache.read(folder, file.path)))
        assert path.stat().st_size == file.nbytes
    assert hashes(tmp_path / "read") == hashes(folder)


def test_file_that_changed_has_another_identity_and_the_others_have_theirs(folder: Path) -> None:
    before = {file.path: file.identity for file in weightcache.list_files(folder).files}
    (folder / "config.json").write_text("{}")
    after = {file.path: file.identity for file in weightcache.list_files(folder).files}
    assert [path for path, identity in after.items() if identity != before[path]] == ["config.json"]


def test_file_that_is_not_there_is_named_with_the_nearest(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no file 'a\.ggug' \(did you mean 'a\.gguf'\?\)"):
        next(weightcache.read(folder, "a.ggug"))


@pytest.mark.parametrize(("start", "stop"), [(-1, None), (2, 1), (0, NBYTES + 1), (NBYTES + 1, None)])
def test_range_outside_of_the_file_is_refused(folder: Path, start: int, stop: int | None) -> None:
    with pytest.raises(UriError, match="expected one within its"):
        next(weightcache.read(folder, "a.gguf", start, stop))


def test_reader_that_leaves_early_stops_the_transfer(folder: Path) -> None:
    pieces = weightcache.read(folder, "a.gguf", cache="disk")
    next(pieces)
    pieces.close()  # what is still open, or runs, fails the test as a leak
    assert list(pieces) == []


def test_model_of_another_file_system_is_materialised_by_a_copy(elsewhere: Path, tmp_path: Path) -> None:
    models.write_tiny_sharded(elsewhere / "model")
    laid = weightcache.materialise(elsewhere / "model", "org/tiny", cache_dir=tmp_path / "hf")
    assert hashes(laid.path) == hashes(elsewhere / "model")
