"""That the plans would notice: each of eight mistakes built into the engine is caught, and for its own reason.

`pytest -s` prints the table: the mistake, the plan that caught it, and the message that did.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from plans import Plans

SEED = 7
N_PLANS = 400
# What follows from a mistake is no reason by itself, but nothing else may turn up beside the reason.
WRONG_BYTES = r"bytes of operation \d+ are wrong"
MISCOUNTED = r"the device copied \d+ bytes, counted were|bytes (were|are) in flight"
STILL_THERE = r"source-changed|range-in-flight|overlapping-copies|destroyed-in-flight"


@dataclass(frozen=True)
class Mistake:
    """One WC_BUG of ext/run.c and ext/stream.c: what it is, where it shows, and the messages that name it."""

    bug: int
    what: str
    reason: str
    consequences: str = "nothing"
    mode: str = "late"


MISTAKES = (
    Mistake(1, "a slot is used again before its event", "source-changed", f"{WRONG_BYTES}|{MISCOUNTED}|{STILL_THERE}"),
    Mistake(
        2,
        "the last copies are not waited for",
        r"wrong when the run has ended|in flight after the last run",
        f"{WRONG_BYTES}|{MISCOUNTED}|{STILL_THERE}",
    ),
    Mistake(3, "the copy is from another slot", r"wrong when the run has ended", f"{WRONG_BYTES}|source-changed"),
    Mistake(
        4,
        "memory is unregistered while a run reads it",
        r"range-in-flight: cuMemHostUnregister|copies were of pageable memory|straddles-registrations",
        f"{WRONG_BYTES}|{MISCOUNTED}",
        mode="threads",
    ),
    Mistake(
        5,
        "torch's stream is not waited for",
        r"overlapping-copies: cuMemcpyHtoDAsync_v2: .* while in flight: cuMemsetD8Async",
        WRONG_BYTES,
    ),
    Mistake(6, "a copy runs across registrations", "straddles-registrations", r"operation \d+ has status -1000001"),
    Mistake(
        7, "a wrong checksum is taken for right", r"is done, but had to fail with -74", "none failed, and one had to"
    ),
    Mistake(
        8,
        "a copy's error is ignored",
        r"cuMemcpyHtoDAsync_v2 failed with \d+ and no operation did",
        f"{WRONG_BYTES}|{MISCOUNTED}|had to fail",
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutants")


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: f"{mistake.bug}-{mistake.what.replace(' ', '-')}")
def test_each_mistake_is_caught_for_its_own_reason(folder: Path, mistake: Mistake) -> None:
    status, printed, complaints = Plans(folder, mistake.bug).run(mistake.mode, SEED, N_PLANS)
    lines = printed.splitlines()
    assert (status, complaints) == (1, ""), "not caught: " + printed
    reasons = [line for line in lines if re.search(mistake.reason, line)]
    assert reasons, f"caught, but for another reason:\n{printed}"
    others = [line for line in lines if not re.search(f"{mistake.reason}|{mistake.consequences}", line)]
    assert not others, f"caught, and something else beside it:\n{printed}"
    print(f"\n{mistake.bug}  {mistake.what:<44} {re.sub('0x[0-9a-f]+', '…', reasons[0])[:150]}")


@pytest.mark.parametrize("mode", sorted({mistake.mode for mistake in MISTAKES}))
def test_without_a_mistake_the_same_plans_come_out_right(folder: Path, mode: str) -> None:
    status, printed, complaints = Plans(folder).run(mode, SEED, N_PLANS)
    assert (status, complaints) == (0, ""), printed
