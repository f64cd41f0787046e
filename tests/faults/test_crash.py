"""The cache after what no process survives: a kill at every step of publishing, lost and hostile files, a full disk."""

from __future__ import annotations

import json
import logging
import os
import pickle
import resource
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import models
import pytest
from cache_folder import chunk_files, occupied_bytes, open_below, snapshot, staged_files
from children import Child, wait_until
from reference import assert_same, tensors_of

import weightcache
from weightcache.digest import Digest
from weightcache.errors import CacheFormatError, CapacityError
from weightcache.manifest import Chunk
from weightcache.report import Report
from weightcache.tiers.disk import DiskTier

CRASHING = Path(__file__).with_name("crashing.py")
MIB = 1 << 20
TENSORS = {"a.weight": ("F32", (512, 512)), "b.weight": ("F32", (512, 513)), "c.bias": ("F32", (77,))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of five chunks: a header, two tensors of a chunk each, one with a small neighbour, a configuration."""
    (tmp_path / "model").mkdir()
    models.write_safetensors(tmp_path / "model" / "model.safetensors", TENSORS)
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path, folder: Path) -> Path:
    """A cache folder that holds the model, used by nobody."""
    weightcache.prefetch(folder)
    at_rest(tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def in_memory(folder: Path) -> Iterator[str]:
    """The model where only a disk tier could keep it: the URL of a copy in fsspec's memory."""
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/{folder.parent.name}/{path.name}", path.read_bytes())
    yield f"memory://{folder.parent.name}"
    memory.rm(f"/{folder.parent.name}", recursive=True)


def at_rest(cache: Path) -> None:
    wait_until(lambda: not open_below(cache))


def load_and_check(folder: Path, mode: str = "disk") -> Report:
    """Load the model through the disk tier, compare every bit, and wait until all is stored."""
    with weightcache.load_model(folder, "cpu", cache=mode) as model:
        assert_same(model, tensors_of(folder))
        assert model.wait_stored(60)
        return model.report


# -- killed while publishing


@pytest.fixture
def caches() -> Iterator[Path]:
    """A folder for a hundred caches, in memory: what a kill leaves does not depend on the disk."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="crash-", dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("step", ["sync", "rename", "catalogue"])
def test_g02_g03_g11_a_kill_at_any_step_of_publishing_leaves_a_sound_cache(
    folder: Path, caches: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    with Child(CRASHING, folder, caches, step) as child:
        n_kills = child.hear()
        assert child.wait() == 0
    assert n_kills >= 10
    let_live = caches / f"{step}-{n_kills + 1}"
    whole = {name: path.read_bytes() for name, path in chunk_files(let_live).items()}
    for n in range(1, n_kills + 1):
        cache = caches / f"{step}-{n}"
        monkeypatch.setenv("WEIGHTCACHE_DIR", str(cache))
        with closing(DiskTier(cache)) as disk:
            assert staged_files(cache) == []
            assert disk.leased() == set()
            # Whatever has a chunk's name is that chunk, whole and durable; only such chunks are shown.
            assert {name: path.read_bytes() for name, path in chunk_files(cache).items()}.items() <= whole.items()
            shown = disk.look([Digest(name) for name in whole])
            assert shown <= {Digest(name) for name in chunk_files(cache)}
            assert disk.used_bytes() == occupied_bytes(cache)
            there = sum(chunk.nbytes for chunk in known_chunks(disk) if chunk.digest in shown)
        report = load_and_check(folder)
        assert report.bytes["disk"] == there
        assert report.warnings == []
        assert weightcache.verify(deep=True).sound
        with closing(DiskTier(cache)) as disk:
            assert disk.used_bytes() == occupied_bytes(cache)


def known_chunks(disk: DiskTier) -> list[Chunk]:
    """Return the chunks that a load needs and whose digests are known, from records or from what was learned."""
    return [
        chunk
        for record in disk.records.models()
        for key, path, _ in record.shards
        if (shard := disk.recall_shard(key, path=path)) is not None and shard.tensors
        for chunk in shard.chunks[1:]  # the first is the header
        if chunk.digest is not None
    ]


# -- the catalogue is a cache


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def lose(cache: Path) -> None:
    shutil.rmtree(cache / "catalogue")


def lose_the_file(cache: Path) -> None:
    (cache / "catalogue" / "cache.db").unlink()


def truncate(nbytes: int) -> Callable[[Path], None]:
    return lambda cache: os.truncate(cache / "catalogue" / "cache.db", nbytes)


def fill_with_garbage(cache: Path) -> None:
    database = cache / "catalogue" / "cache.db"
    database.write_bytes(os.urandom(database.stat().st_size))


def fill_pages_with_garbage(cache: Path) -> None:
    """Spoil all but the header that says it is a database."""
    database = cache / "catalogue" / "cache.db"
    with database.open("r+b") as file:
        file.seek(100)
        file.write(os.urandom(database.stat().st_size - 100))


DAMAGES = {
    "lost": lose,
    "file lost": lose_the_file,
    "empty": truncate(0),
    "truncated in its header": truncate(50),
    "truncated in a page": truncate(5000),
    "garbage": fill_with_garbage,
    "garbage in its pages": fill_pages_with_garbage,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_g07_a_damaged_catalogue_is_rebuilt_from_the_chunks(folder: Path, cache: Path, damage: str) -> None:
    DAMAGES[damage](cache)
    report = load_and_check(folder)
    assert report.bytes["origin"] == 0
    assert report.warnings == []
    assert weightcache.verify(deep=True).sound
    with closing(DiskTier(cache)) as disk:
        assert disk.used_bytes() == occupied_bytes(cache)


ROWS = ["chunk:", "used_bytes", "complete"]


@pytest.mark.parametrize("kind", ["pickled", "not JSON", "another shape"])
@pytest.mark.parametrize("row", ROWS)
def test_g07_g19_hostile_rows_run_nothing_and_cost_no_byte(
    tmp_path: Path, folder: Path, cache: Path, row: str, kind: str
) -> None:
    mark = tmp_path / "was-run"
    value = {"pickled": pickle.dumps(Hostile(mark)), "not JSON": "{", "another shape": '{"a": [1]}'}[kind]
    with closing(sqlite3.connect(cache / "catalogue" / "cache.db")) as database:
        mode = 4 if kind == "pickled" else 1  # diskcache's marks of pickled and of raw values
        changed = database.execute("UPDATE Cache SET mode = ?, value = ? WHERE key LIKE ?", (mode, value, f"{row}%"))
        assert changed.rowcount
        database.commit()
    load_and_check(folder)  # may fall back; whoever opens it next finds it rebuilt
    report = load_and_check(folder)
    assert report.bytes["origin"] == 0
    assert not mark.exists()
    assert weightcache.verify(deep=True).sound
    with closing(DiskTier(cache)) as disk:
        assert disk.used_bytes() == occupied_bytes(cache)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1}', os.urandom(500)], ids=range(5))
def test_damaged_records_are_described_anew(folder: Path, cache: Path, content: bytes) -> None:
    records = [*cache.glob("shards/*/*.json"), *cache.glob("models/*/record.json")]
    assert len(records) == 3
    for path in records:
        path.write_bytes(content)
    load_and_check(folder)
    report = load_and_check(folder)
    assert report.bytes["origin"] == 0
    assert len(weightcache.models()) == 1


# -- a disk that is full, and folders that cannot be used


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mount a small file system in memory: `mounted("size=2m")`; `mounted("remount,ro")` changes it."""
    if os.geteuid():
        pytest.skip("only root can mount a file system")
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    while os.path.ismount(place):
        wait_until(lambda: not open_below(place))
        subprocess.run(["umount", place], check=True)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_g08_a_full_disk_costs_one_warning(
    folder: Path, mounted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = mounted("size=1536k")  # holds the catalogue and one chunk
    monkeypatch.setenv("WEIGHTCACHE_DIR", str(place / "cache"))
    monkeypatch.setenv("WEIGHTCACHE_DISK_BUDGET_BYTES", "1GB")
    report = load_and_check(folder)
    assert len(report.warnings) == 1
    assert "full" in report.warnings[0] or "No space" in report.warnings[0]
    assert len(warnings_of(caplog)) == 1
    assert staged_files(place / "cache") == []
    assert len(load_and_check(folder).warnings) <= 1


def test_g08_a_file_size_limit_costs_one_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, hard))
    try:
        report = load_and_check(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(report.warnings) == len(warnings_of(caplog)) == 1
    assert "File too large" in report.warnings[0]
    assert load_and_check(folder).warnings == []
    assert load_and_check(folder).bytes["origin"] == 0
    with closing(DiskTier(tmp_path / "cache")) as disk:
        assert disk.used_bytes() == occupied_bytes(disk.root)


def fill_up(place: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        (place / "filler").write_bytes(bytes(64 * MIB))


def fill_and_lock(place: Path) -> None:
    weightcache.prefetch(place.parent / "model")
    at_rest(place)


@pytest.mark.parametrize("prepare", [fill_up, fill_and_lock, None], ids=["full", "filled, read-only", "read-only"])
def test_g08_a_cache_folder_that_cannot_be_used_costs_one_warning(
    folder: Path,
    in_memory: str,
    mounted: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    prepare: Callable[[Path], None] | None,
) -> None:
    place = mounted("size=16m")
    monkeypatch.setenv("WEIGHTCACHE_DIR", str(place / "cache"))
    if prepare is not None:
        prepare(place)
    if prepare is not fill_up:
        mounted("remount,ro,size=16m")
    with weightcache.load_model(in_memory, "cpu") as model:
        assert_same(model, tensors_of(folder))
        assert model.files["config.json"].read_text() == "{}"
        assert len(model.report.warnings) == len(warnings_of(caplog)) == 1
    with pytest.raises(CapacityError, match="WEIGHTCACHE_DIR"):
        weightcache.load_model(in_memory, "cpu", cache="disk")


def test_a_file_in_place_of_the_cache_folder_is_left_alone(
    folder: Path, in_memory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("mine")
    with weightcache.load_model(in_memory, "cpu") as model:
        assert_same(model, tensors_of(folder))
        assert len(model.report.warnings) == len(warnings_of(caplog)) == 1
    with pytest.raises(CapacityError, match="WEIGHTCACHE_DIR"):
        weightcache.load_model(in_memory, "cpu", cache="disk")
    assert (tmp_path / "cache").read_text() == "mine"


@pytest.mark.parametrize("marker", ['{"version": 99}', '{"version": "1"}', '{"version": null}', "{}", "[]", "", "\xff"])
def test_g18_a_cache_folder_of_an_unknown_format_is_refused_untouched(folder: Path, cache: Path, marker: str) -> None:
    (cache / "weightcache.json").write_text(marker, encoding="latin-1")
    before = snapshot(cache)
    for mode in ("disk", "auto"):
        with pytest.raises(CacheFormatError, match="use another"):
            weightcache.load_model(f"memory://nowhere/{mode}", "cpu", cache=mode)
    with pytest.raises(CacheFormatError):
        weightcache.models()
    assert snapshot(cache) == before


def test_g18_a_record_of_an_unknown_format_is_refused_untouched(folder: Path, cache: Path) -> None:
    [path, *_] = cache.glob("shards/*/*.json")
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"version": 99}))
    before = path.read_bytes()
    with pytest.raises(CacheFormatError, match="version 99"):
        weightcache.load_model(folder, "cpu", cache="disk")
    assert path.read_bytes() == before
