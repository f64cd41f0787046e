"""Journals: what is appended is there, whole, once; nothing that goes wrong disturbs whoever appends."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from weightcache import journal
from weightcache.errors import CapacityError
from weightcache.journal import Journal

NOVEMBER_S = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()
OCTOBER_S = datetime(2026, 10, 1, tzinfo=UTC).timestamp()
N_APPENDED = 500
APPENDER = """
import sys
from pathlib import Path
from test_journal import NOTES, Note
for number in range(int(sys.argv[2])):
    NOTES.append(Path(sys.argv[1]), [Note(1e9, sys.argv[3] * 100)])
"""


@dataclass(frozen=True)
class Note:
    """The least that a journal can hold."""

    time_s: float
    text: str

    def to_line(self) -> bytes:
        return f"{int(self.time_s)} {self.text}\n".encode()

    @classmethod
    def from_line(cls, line: bytes) -> Note:
        time_s, text = line.decode().rstrip("\n").split(" ")
        return cls(float(time_s), text)


NOTES = Journal("notes", "what was noted", Note.from_line)
NOTE = Note(NOVEMBER_S, "a")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The cache folder, which is there."""
    (tmp_path / "cache").mkdir(mode=0o700)
    return tmp_path / "cache"


def november(root: Path) -> Path:
    return root / "notes" / "2026-11.jsonl"


def read(root: Path, since_s: float = 0.0) -> list[Note]:
    return list(NOTES.read(root, since_s))


def test_what_is_appended_is_read_again_by_month(root: Path) -> None:
    earlier = replace(NOTE, time_s=OCTOBER_S)
    NOTES.append(root, [NOTE, NOTE])
    NOTES.append(root, [earlier])
    assert read(root) == [earlier, NOTE, NOTE]
    assert sorted(path.name for path in (root / "notes").iterdir()) == ["2026-10.jsonl", "2026-11.jsonl"]


def test_reading_begins_where_asked(root: Path) -> None:
    NOTES.append(root, [NOTE, replace(NOTE, time_s=NOVEMBER_S + 1)])
    NOTES.append(root, [replace(NOTE, time_s=OCTOBER_S)])
    assert read(root, NOVEMBER_S + 1) == [replace(NOTE, time_s=NOVEMBER_S + 1)]


def test_g24_journal_is_its_owners_alone(root: Path) -> None:
    before = os.umask(0)
    try:
        NOTES.append(root, [NOTE])
    finally:
        os.umask(before)
    assert (november(root).stat().st_mode & 0o777, november(root).parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_nothing_is_written_for_nothing(root: Path) -> None:
    NOTES.append(root, [])
    assert list(root.iterdir()) == []


def test_torn_line_spoils_no_other(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    NOTES.append(root, [NOTE])
    with november(root).open("ab") as file:
        file.write(NOTE.to_line()[:4])
    NOTES.append(root, [NOTE])
    assert read(root) == [NOTE, NOTE]
    assert [record.message for record in caplog.records] == [
        f"1 lines of {november(root)} cannot be read and are left out"
    ]


def test_month_that_is_full_takes_no_more_and_says_so_once(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MONTH_LIMIT_NBYTES", 2 * len(NOTE.to_line()))
    for _ in range(5):
        NOTES.append(root, [NOTE])
    assert read(root) == [NOTE, NOTE]
    [record] = caplog.records
    assert f"{november(root)}: it has {2 * len(NOTE.to_line())} bytes" in record.message


def test_journal_that_cannot_be_written_is_said_once(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "notes").write_text("a file")
    for _ in range(3):
        NOTES.append(root, [NOTE])
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith(f"what was noted is not kept in {november(root)}: ")


def test_journal_is_no_link(root: Path, tmp_path: Path) -> None:
    (root / "notes").mkdir()
    november(root).symlink_to(tmp_path / "elsewhere")
    NOTES.append(root, [NOTE])
    assert not (tmp_path / "elsewhere").exists()


def test_journal_that_cannot_be_read_is_an_error(root: Path) -> None:
    november(root).mkdir(parents=True)
    with pytest.raises(CapacityError, match=f"{november(root)} cannot be read"):
        read(root)


def test_processes_append_at_the_same_time(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = [sys.executable, "-c", APPENDER, str(root), str(N_APPENDED)]
    writers = [subprocess.Popen([*command, name], cwd=Path(__file__).parent) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    texts = [note.text for note in read(root)]
    assert sorted(texts) == ["a" * 100] * N_APPENDED + ["b" * 100] * N_APPENDED
    assert caplog.records == []
