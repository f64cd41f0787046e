"""The engine's C and the stand-in under the sanitizers: plans without a report, and each sanitizer shown to fire."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from plans import Plans

SEED = 11
N_PLANS = {"late": 300, "threads": 300}
BROKEN = 99  # the WC_BUG of plans.c


@dataclass(frozen=True)
class Sanitizer:
    """One build: gcc's flags, and how a program of it is started."""

    name: str
    flags: tuple[str, ...]
    wrapper: tuple[str, ...] = ()


ADDRESS = Sanitizer("address", ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"))
# Before gcc 14 its runtime gives up where addresses are as random as newer kernels have them.
THREAD = Sanitizer("thread", ("-fsanitize=thread",), ("setarch", platform.machine(), "-R"))
WAYS = (
    (ADDRESS, "heap", "heap-buffer-overflow"),
    (ADDRESS, "undefined", "signed integer overflow"),
    (THREAD, "race", "data race"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sanitizers")


def run(folder: Path, sanitizer: Sanitizer, mode: str, n_plans: int, bug: int = 0) -> tuple[int, str, str]:
    allowed = sanitizer.wrapper and subprocess.run([*sanitizer.wrapper, "true"], capture_output=True).returncode == 0
    wrapper = sanitizer.wrapper if allowed else ()
    status, printed, complaints = Plans(folder, bug, sanitizer.flags).run(mode, SEED, n_plans, *wrapper)
    if "unexpected memory mapping" in complaints:
        pytest.skip(f"{' '.join(sanitizer.wrapper)} is refused here, and without it: {complaints}")
    return status, printed, complaints


@pytest.mark.parametrize("mode", N_PLANS)
@pytest.mark.parametrize("sanitizer", (ADDRESS, THREAD), ids=lambda sanitizer: sanitizer.name)
def test_plans_give_no_report(folder: Path, sanitizer: Sanitizer, mode: str) -> None:
    status, printed, complaints = run(folder, sanitizer, mode, N_PLANS[mode])
    assert (status, complaints) == (0, ""), printed + complaints
    print(printed, end="")


@pytest.mark.parametrize(("sanitizer", "way", "report"), WAYS, ids=[way for _, way, _ in WAYS])
def test_each_sanitizer_fires(folder: Path, sanitizer: Sanitizer, way: str, report: str) -> None:
    status, _, complaints = run(folder, sanitizer, way, 0, BROKEN)
    assert status != 0
    assert report in complaints
