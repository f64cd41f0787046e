"""Own the fixtures that run the command line in the tests' own process."""

from __future__ import annotations

import gc
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from commands import Answer, Run

import weightcache.cli


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command line as in a process of its own, but in this one: the same edge without the start."""
    root, own = logging.getLogger(), logging.getLogger("weightcache")
    before = root.handlers[:], root.level, own.level

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["weightcache", *map(str, arguments)])
        code = weightcache.cli.main()
        return subprocess.CompletedProcess(sys.argv, code, *capsys.readouterr())

    yield run
    gc.collect()  # an error that crossed threads is a cycle, and holds the files of its frames open
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    own.setLevel(before[2])


@pytest.fixture
def answer(run_here: Run) -> Answer:
    """Run a command with --json that succeeds without a word on stderr; return its one object."""

    def run(*arguments: object) -> dict[str, Any]:
        ran = run_here(*arguments, "--json")
        assert (ran.returncode, ran.stderr) == (0, "")
        found: dict[str, Any] = json.loads(ran.stdout)
        return found

    return run
