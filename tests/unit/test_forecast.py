"""What is foretold of a model's next use, what a forecast may waste, and what its state may not be."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from weightcache.errors import FormatError
from weightcache.forecast import MOST_MODELS, RANGE_MIN, STANDARD_KEEP_S, WASTE_HALF_S, WINDOW, Forecast

MINUTE_S = 60.0
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
GB = 10**9


def used_at(times: Iterable[float], model: str = "m", base: str = "") -> Forecast:
    forecast = Forecast()
    for at_s in times:
        forecast.used(model, at_s, base)
    return forecast


def hourly(n: int = 12, model: str = "m", base: str = "") -> Forecast:
    """Return a forecast of a model that was used every hour, last at n - 1 hours."""
    return used_at((HOUR_S * number for number in range(n)), model, base)


def due(forecast: Forecast, now_s: float) -> list[str]:
    return [each.model for each in forecast.due(now_s)]


def test_a_model_used_every_hour_is_due_shortly_before_the_next() -> None:
    forecast = hourly()
    last_s = 11 * HOUR_S
    found = [minute for minute in range(1, 120) if due(forecast, last_s + minute * MINUTE_S)]
    assert found == [*range(57, 67)]


def test_what_is_due_says_when_and_why() -> None:
    forecast = hourly()
    forecast.used("m", 12 * HOUR_S + 120)
    [found] = forecast.due(13 * HOUR_S)
    assert (found.model, found.expected_from_s, found.expected_until_s) == (
        "m",
        13 * HOUR_S + 120,
        13 * HOUR_S + 120 + 3 * MINUTE_S,
    )
    assert found.why == "of the 12 times that it was idle for as long as now, 12 ended after 60 to 62 minutes"


def test_nothing_is_due_before_three_idle_times_are_known() -> None:
    assert due(hourly(3), 3 * HOUR_S) == []
    assert due(hourly(4), 4 * HOUR_S) == ["m"]


def test_a_job_of_every_day_is_due_until_it_is_late_by_a_tenth_of_the_day() -> None:
    forecast = used_at(DAY_S * number for number in range(5))
    found = [hour for hour in range(1, 48) if due(forecast, 4 * DAY_S + hour * HOUR_S)]
    assert found == [24, 25, 26]


def test_after_a_weekend_a_job_of_working_days_is_due_on_monday_alone() -> None:
    forecast = used_at(DAY_S * day for day in range(26) if day % 7 < 5)  # the last is a Friday
    found = {day for day in range(1, 5) for hour in range(24) if due(forecast, (25 + day) * DAY_S - hour * HOUR_S)}
    assert 3 in found
    assert not due(forecast, 25 * DAY_S + 36 * HOUR_S)


def test_what_comes_at_random_is_never_due() -> None:
    draw = random.Random(1)
    at_s, times = 0.0, []
    for _ in range(100):
        at_s += draw.expovariate(1 / (5 * HOUR_S))
        times.append(at_s)
    forecast = used_at(times)
    n_due = sum(bool(due(forecast, at_s + minute * MINUTE_S)) for minute in range(0, 600, 5))
    assert n_due <= 6


def test_what_idles_past_the_range_is_not_foretold() -> None:
    forecast = used_at(10 * DAY_S * number for number in range(10))
    assert [day for day in range(91, 120) if due(forecast, day * DAY_S)] == []


def test_uses_within_a_minute_are_one() -> None:
    forecast = used_at(HOUR_S * number + second for number in range(6) for second in range(0, 50, 10))
    [found] = forecast.due(6 * HOUR_S)
    assert (found.expected_from_s, found.expected_until_s) == (6 * HOUR_S - 20, 6 * HOUR_S + 40)


def test_a_habit_that_changed_is_forgotten_within_the_window() -> None:
    forecast = hourly(2 * WINDOW)
    at_s = (2 * WINDOW - 1) * HOUR_S
    for number in range(1, WINDOW + 1):
        forecast.used("m", at_s + number * 5 * HOUR_S)
    last_s = at_s + WINDOW * 5 * HOUR_S
    assert due(forecast, last_s + HOUR_S) == []
    assert due(forecast, last_s + 5 * HOUR_S) == ["m"]


def test_a_base_inherits_the_uses_of_its_fine_tunes() -> None:
    forecast = Forecast()
    for number in range(12):
        forecast.used(f"tune{number}", HOUR_S * number, "base")
    assert due(forecast, 12 * HOUR_S) == ["base"]


def test_the_surest_is_due_first() -> None:
    forecast = hourly(4, "few")
    for number in range(-20, 4):
        forecast.used("many", HOUR_S * number)
    assert due(forecast, 4 * HOUR_S) == ["many", "few"]


# -- how long it is kept


def test_a_model_without_a_past_is_kept_for_the_standard_time() -> None:
    forecast = used_at([1000.0])
    assert forecast.keep_until("m", 1000.0) == 1000.0 + STANDARD_KEEP_S
    assert forecast.keep_until("unknown", 1000.0) == 1000.0


def test_a_model_that_is_foretold_need_not_be_kept_in_between() -> None:
    forecast = hourly()
    last_s = 11 * HOUR_S
    assert forecast.keep_until("m", last_s + 1) == last_s + 3 * MINUTE_S
    assert forecast.keep_until("m", last_s + 58 * MINUTE_S) == last_s + 66 * MINUTE_S


def test_a_model_whose_past_foretold_nothing_is_kept_for_the_standard_time() -> None:
    draw = random.Random(2)
    at_s = 0.0
    forecast = Forecast()
    for _ in range(60):
        at_s += draw.expovariate(1 / (5 * HOUR_S))
        forecast.used("m", at_s)
    assert forecast.keep_until("m", at_s + 30 * MINUTE_S) == at_s + STANDARD_KEEP_S


@pytest.mark.parametrize(
    ("minute", "expected"), [(2, None), (30, 0.0), (60, pytest.approx(11 / 12 / 360)), (120, None)]
)
def test_uses_expected_of_a_model_used_every_hour(minute: int, expected: object) -> None:
    assert hourly().expected_per_s("m", 11 * HOUR_S + minute * MINUTE_S) == expected


def test_nothing_is_expected_of_a_model_that_is_not_known() -> None:
    assert Forecast().expected_per_s("m", 0.0) is None


# -- what it wastes


def test_what_was_fetched_ahead_and_left_unused_is_wasted() -> None:
    forecast = hourly()
    forecast.fetched("m", 3 * GB, 12 * HOUR_S, is_ahead=True)
    forecast.fetched("other", 9 * GB, 12 * HOUR_S, is_ahead=False)
    assert forecast.wasted("m", 12 * HOUR_S) == 3 * GB
    assert forecast.wasted("m", 12 * HOUR_S) == 0
    assert forecast.wasted_share == pytest.approx(0.25)


def test_what_was_fetched_ahead_and_used_is_not_wasted() -> None:
    forecast = hourly()
    forecast.fetched("m", GB, 12 * HOUR_S, is_ahead=True)
    forecast.used("m", 12 * HOUR_S)
    assert forecast.wasted("m", 13 * HOUR_S) == 0
    assert forecast.wasted_share == 0.0


def test_nothing_is_due_while_too_much_was_wasted() -> None:
    forecast = hourly()
    forecast.fetched("m", 2 * GB, 12 * HOUR_S, is_ahead=True)
    forecast.wasted("m", 12 * HOUR_S)
    assert forecast.due(12 * HOUR_S) == []
    forecast.fetched("other", 18 * GB, 12 * HOUR_S, is_ahead=False)
    assert due(forecast, 12 * HOUR_S) == ["m"]


def test_no_model_is_let_go_while_nothing_would_bring_it_back() -> None:
    forecast = hourly()
    forecast.fetched("m", GB, 11 * HOUR_S, is_ahead=True)
    forecast.wasted("m", 11 * HOUR_S)
    assert forecast.expected_per_s("m", 11.5 * HOUR_S) is None


def test_what_was_wasted_long_ago_counts_less() -> None:
    forecast = hourly()
    forecast.fetched("m", GB, 0.0, is_ahead=True)
    forecast.wasted("m", 0.0)
    forecast.fetched("m", GB, WASTE_HALF_S, is_ahead=False)
    assert forecast.wasted_share == pytest.approx(1 / 3)


# -- its state


uses = st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1e9), st.sampled_from(["", "d"])), max_size=30)


@examples
@given(uses, st.floats(0, 2e9))
def test_a_state_taken_up_again_foretells_the_same(uses: list[tuple[str, float, str]], now_s: float) -> None:
    forecast = Forecast()
    for model, at_s, base in uses:
        forecast.used(model, at_s, base)
        forecast.fetched(model, GB, at_s, is_ahead=True)
    again = Forecast.from_form(json.loads(json.dumps(forecast.to_form())))
    assert again.to_form() == forecast.to_form()
    assert again.due(now_s) == forecast.due(now_s)
    assert [again.keep_until(name, now_s) for name in "abcd"] == [forecast.keep_until(name, now_s) for name in "abcd"]


def test_the_models_used_last_are_remembered() -> None:
    forecast = Forecast()
    for number in range(MOST_MODELS + 5):
        forecast.used(f"m{number}", float(number))
    assert list(forecast.to_form()["models"]) == [f"m{number}" for number in range(5, MOST_MODELS + 5)]


GOOD = {"version": 1, "models": {"m": [0.0, [60], 0.5, 0]}, "counted": [0.0, 0.0, 0.0]}


def test_the_good_state_is_taken_up() -> None:
    assert Forecast.from_form(GOOD).to_form() == GOOD


@pytest.mark.parametrize(
    "form",
    [
        None,
        [],
        {},
        GOOD | {"version": 2},
        GOOD | {"models": []},
        GOOD | {"models": {"m": []}},
        GOOD | {"models": {"m": None}},
        GOOD | {"models": {"m": [0.0, [60] * (WINDOW + 1), 0.5, 0]}},
        GOOD | {"models": {"m": [0.0, [-1], 0.5, 0]}},
        GOOD | {"models": {"m": [0.0, [RANGE_MIN + 1], 0.5, 0]}},
        GOOD | {"models": {"m": [0.0, [1.5], 0.5, 0]}},
        GOOD | {"models": {"m": [0.0, ["60"], 0.5, 0]}},
        GOOD | {"models": {"m": [0.0, {"60": 1}, 0.5, 0]}},
        GOOD | {"models": {"m": [float("nan"), [60], 0.5, 0]}},
        GOOD | {"models": {"m": [float("inf"), [60], 0.5, 0]}},
        GOOD | {"models": {"m": [10**400, [60], 0.5, 0]}},
        GOOD | {"models": {"m": [-1.0, [60], 0.5, 0]}},
        GOOD | {"models": {"m": [0.0, [60], 1.5, 0]}},
        GOOD | {"models": {"m": [0.0, [60], True, 0]}},
        GOOD | {"models": {"m": [0.0, [60], 0.5, -1]}},
        GOOD | {"models": {"m": [0.0, [60], 0.5, 1 << 63]}},
        GOOD | {"models": {str(number): [0.0, [], 0.0, 0] for number in range(MOST_MODELS + 1)}},
        GOOD | {"counted": [0.0, 0.0]},
        GOOD | {"counted": [0.0, 0.0, float("nan")]},
        {"version": 1, "models": {}},
    ],
    ids=lambda form: repr(form)[:60],
)
def test_g21_what_is_no_state_is_refused(form: object) -> None:
    with pytest.raises(FormatError, match="no state of a forecast"):
        Forecast.from_form(form)
