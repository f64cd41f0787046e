"""The choice of victims: what it always keeps to, by brute force, and what each part of a model's value is for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from weightcache.digest import Digest
from weightcache.tiers.eviction import (
    N_USES,
    PROBATION_S,
    SAME_USE_S,
    Choice,
    Resident,
    choose_victims,
    merged,
    rate_of,
    used_again,
)

DIGESTS = [Digest(f"{number:064x}") for number in range(8)]
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
NOW_S = 1e9
GB = 10**9

moments = st.sampled_from([NOW_S - age for age in (0.0, 60.0, HOUR_S, 5 * HOUR_S, DAY_S, 8 * DAY_S, NOW_S)])
residents = st.builds(
    Resident,
    key=st.text("abcdef", min_size=1, max_size=3),
    chunks=st.frozensets(st.sampled_from(DIGESTS)),
    last_use_s=moments,
    uses=st.frozensets(moments, max_size=3).map(lambda each: tuple(sorted(each, reverse=True))),
    held=st.booleans(),
    own_bytes=st.sampled_from([0, 0, 5]),
    bytes_per_s=st.sampled_from([1e6, 1e9]),
    expected_per_s=st.sampled_from([None, None, 0.0, 1.0]),
)
tiers = st.lists(residents, max_size=6, unique_by=lambda resident: resident.key)
holdings = st.dictionaries(st.sampled_from(DIGESTS), st.integers(1, 100))
amounts = st.integers(-5, 500)


def freed(models: list[Resident], victims: list[Resident], nbytes: dict[Digest, int]) -> int:
    """Return the bytes that no model needs any more, and that one of the victims did."""
    kept = [model for model in models if model not in victims]
    needed = frozenset[Digest]().union(*(model.chunks for model in kept))
    gone = frozenset[Digest]().union(*(model.chunks for model in victims)) - needed
    return sum(nbytes.get(digest, 0) for digest in gone) + sum(victim.own_bytes for victim in victims)


def choose(models: list[Resident], nbytes: dict[Digest, int], to_free: int) -> list[Resident]:
    return list(choose_victims(models, nbytes, to_free, NOW_S).victims)


@examples
@given(tiers, holdings, amounts)
def test_held_model_is_never_chosen(models: list[Resident], nbytes: dict[Digest, int], to_free: int) -> None:
    assert not any(victim.held for victim in choose(models, nbytes, to_free))


@examples
@given(tiers, holdings, amounts)
def test_enough_is_freed_whenever_that_is_possible(
    models: list[Resident], nbytes: dict[Digest, int], to_free: int
) -> None:
    possible = freed(models, [model for model in models if not model.held], nbytes)
    assert freed(models, choose(models, nbytes, to_free), nbytes) >= min(to_free, possible)


@examples
@given(tiers, holdings, amounts)
def test_the_choice_ends_as_soon_as_enough_is_free(
    models: list[Resident], nbytes: dict[Digest, int], to_free: int
) -> None:
    victims = choose(models, nbytes, to_free)
    assert not victims or freed(models, victims[:-1], nbytes) < to_free


@examples
@given(tiers, holdings, amounts, st.randoms())
def test_choice_does_not_depend_on_the_order_of_the_models(
    models: list[Resident], nbytes: dict[Digest, int], to_free: int, random: st.randoms
) -> None:
    shuffled = random.sample(models, len(models))
    assert choose_victims(shuffled, nbytes, to_free, NOW_S) == choose_victims(models, nbytes, to_free, NOW_S)


@examples
@given(tiers, holdings, amounts)
def test_who_inherits_stays_and_loses_none_of_its_own_newest_uses(
    models: list[Resident], nbytes: dict[Digest, int], to_free: int
) -> None:
    choice = choose_victims(models, nbytes, to_free, NOW_S)
    left = {model.key: model for model in models if model not in choice.victims}
    assert choice.bequests.keys() <= left.keys()
    for key, uses in choice.bequests.items():
        assert uses[0] >= max(left[key].uses, default=0.0)
        assert set(left[key].uses) <= set(uses) or len(uses) == N_USES


@examples
@given(st.lists(st.floats(0, 1e10), max_size=30))
def test_uses_are_few_and_apart_and_their_rate_is_a_number(times: list[float]) -> None:
    uses: tuple[float, ...] = ()
    for at_s in sorted(times):
        uses = used_again(uses, at_s)
    assert len(uses) <= N_USES
    assert all(newer - older >= SAME_USE_S for newer, older in pairwise(uses))
    last_s = max(times, default=0.0)
    assert 0 < rate_of(Resident("m", frozenset(), last_s, uses), last_s) <= len(uses) / SAME_USE_S + 1 / PROBATION_S


def test_nothing_is_chosen_where_nothing_must_go() -> None:
    assert choose_victims([Resident("a", frozenset(DIGESTS), NOW_S)], dict.fromkeys(DIGESTS, 1), 0, NOW_S) == Choice(
        (), {}
    )


# -- what a use is worth


def ago(*ages_s: float) -> tuple[float, ...]:
    return tuple(NOW_S - age_s for age_s in ages_s)


def alone(key: str, uses: tuple[float, ...], nbytes: int = GB, **more: float) -> Resident:
    """Return a model that shares nothing."""
    return Resident(key, frozenset(), uses[0], uses, own_bytes=nbytes, **more)


def leaves_first(*models: Resident) -> str:
    return choose(list(models), {}, 1)[0].key


def test_eight_processes_of_one_start_are_one_use() -> None:
    uses: tuple[float, ...] = ()
    for number in range(8):
        uses = used_again(uses, NOW_S + number)
    assert uses == (NOW_S,)


def test_a_model_in_steady_use_gathers_uses() -> None:
    uses: tuple[float, ...] = ()
    for minute in range(60):
        uses = used_again(uses, NOW_S + 60 * minute)
    assert uses == tuple(NOW_S + 60 * minute for minute in range(55, -5, -5))


def test_of_models_used_twice_in_a_row_the_last_use_counts() -> None:
    again = Resident("again", frozenset(), NOW_S - 1, ago(9), own_bytes=GB)
    assert leaves_first(again, alone("between", ago(5))) == "between"


def test_of_models_used_once_the_oldest_leaves() -> None:
    assert leaves_first(alone("a", ago(60)), alone("b", ago(3 * HOUR_S)), alone("c", ago(HOUR_S))) == "b"


def test_a_scan_of_models_used_once_does_not_displace_one_that_is_used_daily() -> None:
    daily = alone("daily", ago(20 * HOUR_S, 44 * HOUR_S))
    scan = [alone(f"scan{number}", ago(60.0 * number)) for number in range(50)]
    victims = choose([daily, *scan], {}, 50 * GB)
    assert [victim.key for victim in victims] == [f"scan{number}" for number in range(49, -1, -1)]


def test_what_was_last_used_before_probation_leaves_before_a_newcomer() -> None:
    old = alone("old", ago(PROBATION_S + HOUR_S, PROBATION_S + 2 * HOUR_S))
    assert leaves_first(old, alone("new", ago(60))) == "old"


def test_the_rarer_used_leaves_before_the_longer_unused() -> None:
    hourly = alone("hourly", ago(*(HOUR_S * number for number in range(1, 9))))
    assert leaves_first(hourly, alone("daily", ago(60, DAY_S, 2 * DAY_S))) == "daily"


def test_a_burst_that_is_over_ages() -> None:
    burst = alone("burst", ago(*(3 * DAY_S + SAME_USE_S * number for number in range(8))))
    assert leaves_first(burst, alone("hourly", ago(HOUR_S, 2 * HOUR_S, 3 * HOUR_S))) == "burst"


def test_of_models_used_equally_often_the_longer_unused_leaves() -> None:
    burst = alone("burst", ago(*(7 * HOUR_S - SAME_USE_S * number for number in range(7, -1, -1))))
    assert leaves_first(burst, alone("steady", ago(*(HOUR_S * (number + 0.7) for number in range(8))))) == "burst"


def test_the_model_that_comes_back_faster_leaves() -> None:
    near = alone("near", ago(60, HOUR_S), bytes_per_s=1e9)
    assert leaves_first(near, alone("far", ago(HOUR_S, 2 * HOUR_S), bytes_per_s=1e7)) == "near"


def test_of_models_used_alike_the_larger_leaves() -> None:
    small = alone("small", ago(HOUR_S, 2 * HOUR_S), 10**6)
    assert leaves_first(small, alone("large", ago(60, HOUR_S), 100 * GB)) == "large"


@pytest.mark.parametrize(("expected_per_s", "first"), [(0.0, "foretold"), (None, "other"), (1.0, "other")])
def test_what_a_forecast_expects_counts_instead_of_the_past(expected_per_s: float | None, first: str) -> None:
    foretold = alone("foretold", ago(60, HOUR_S), expected_per_s=expected_per_s)
    assert leaves_first(foretold, alone("other", ago(HOUR_S, 3 * HOUR_S))) == first


# -- what is shared


def family(n_tunes: int) -> tuple[list[Resident], dict[Digest, int]]:
    """Return fine-tunes of one base, each used once, with 90 % of their bytes from it, and the sizes of all chunks."""
    digests = [Digest.of(str(number).encode()) for number in range(n_tunes + 1)]
    tunes = [
        Resident(f"tune{number}", frozenset({digests[0], digests[number + 1]}), NOW_S - HOUR_S * (n_tunes - number))
        for number in range(n_tunes)
    ]
    return tunes, dict.fromkeys(digests, GB) | {digests[0]: 9 * GB}


def test_chunk_shared_with_a_remaining_model_frees_nothing() -> None:
    (old, new), nbytes = family(2)
    assert choose([old, new], nbytes, GB) == [old]
    assert [victim.key for victim in choose([old, new], nbytes, GB + 1)] == [old.key, new.key]
    assert choose([replace(new, held=True), old], nbytes, GB + 1) == [old]


def test_the_last_of_a_family_inherits_the_uses_of_those_who_left() -> None:
    tunes, nbytes = family(5)
    choice = choose_victims(tunes, nbytes, 4 * GB, NOW_S)
    assert choice.victims == tuple(tunes[:4])
    assert choice.bequests == {"tune4": merged(ago(HOUR_S), ago(*(HOUR_S * number for number in range(2, 6))))}


def test_a_base_of_many_rare_fine_tunes_outlives_a_model_that_is_used_more_often_than_each() -> None:
    tunes, nbytes = family(6)
    other = alone("other", ago(HOUR_S, 20 * HOUR_S), 10 * GB)
    assert [victim.key for victim in choose([*tunes, other], nbytes, 15 * GB)] == [
        *(f"tune{n}" for n in range(5)),
        "other",
    ]


def test_two_names_of_one_model_do_not_protect_each_other() -> None:
    chunks = frozenset(DIGESTS)
    names = [Resident("name", chunks, NOW_S - 8 * DAY_S), Resident("alias", chunks, NOW_S - 9 * DAY_S)]
    victims = choose([*names, alone("other", ago(60), 8)], dict.fromkeys(DIGESTS, 1), 8)
    assert [victim.key for victim in victims] == ["alias", "name"]


def test_a_few_shared_bytes_make_no_heir() -> None:
    tokenizer, weights, others = DIGESTS[:3]
    leaving = Resident("leaving", frozenset({tokenizer, weights}), NOW_S - DAY_S)
    staying = Resident("staying", frozenset({tokenizer, others}), NOW_S - HOUR_S)
    choice = choose_victims([leaving, staying], {tokenizer: 1, weights: 100, others: 100}, 100, NOW_S)
    assert (choice.victims, choice.bequests) == ((leaving,), {})
