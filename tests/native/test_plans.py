"""Randomised plans of the engine on the stand-in (plans.c): 10,000 of them, none with a problem.

To look for longer: SOAK_PLANS=100000 in the environment, so many for each mode, from seeds never used before.
"""

from __future__ import annotations

import os
import re
import time

import pytest
from plans import MODES, Plans, finish

SEEDS = (1, 2)  # two at once, for two processors
N_PLANS = 1250
SOAK_PLANS = int(os.environ.get("SOAK_PLANS", "0"))


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    return Plans(tmp_path_factory.mktemp("plans"))


def carry_out(plans: Plans, mode: str, seeds: tuple[int, ...], n_plans: int) -> list[str]:
    """Return the line of facts for each seed, after no problem at all."""
    lines = []
    for process in [plans.begin(mode, seed, n_plans) for seed in seeds]:
        status, printed, complaints = finish(process)
        assert (status, complaints) == (0, ""), printed + complaints
        lines.append(printed)
    return lines


@pytest.mark.parametrize("mode", MODES)
def test_plans_come_out_as_the_model_says(plans: Plans, mode: str) -> None:
    for line in carry_out(plans, mode, SEEDS, N_PLANS):
        print(line, end="")
        numbers = [int(number) for number in re.findall(r"\d+", line.partition(":")[2])]
        assert numbers[0] == N_PLANS
        assert all(numbers[1:-1]), "a kind of plan was never made"
        assert numbers[-1] == 0


@pytest.mark.skipif(not SOAK_PLANS, reason="only when SOAK_PLANS says how many")
@pytest.mark.parametrize("mode", MODES)
def test_plans_come_out_as_the_model_says_for_hours(plans: Plans, mode: str) -> None:
    seed, left = int(time.time()), SOAK_PLANS
    while left > 0:
        for line in carry_out(plans, mode, (seed, seed + 1), min(10_000, -(-left // 2))):
            print(line, end="")
        seed, left = seed + 2, left - 20_000
