"""The order in which replicas are asked, and how it is explained."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from weightcache.choosing import ASSUMED_BYTES_PER_S, ASSUMED_LATENCY_S, EQUAL_SHARE, Candidate, explain, rank

MB = 1_000_000
measured = st.one_of(st.none(), st.floats(1e-3, 1e10))
sizes = st.integers(0, 1 << 40)
candidates = st.lists(
    st.builds(
        Candidate,
        st.text("abcdefgh", min_size=1, max_size=3),
        measured,
        measured,
        st.sampled_from((0.0, 0.02, 0.09)),
        is_healthy=st.booleans(),
        is_slow=st.booleans(),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda each: each.name,
)


def standing(candidate: Candidate) -> int:
    return 2 if not candidate.is_healthy else 1 if candidate.is_slow else 0


@examples
@given(candidates, sizes)
def test_each_is_ranked_once(given: list[Candidate], nbytes: int) -> None:
    assert sorted(rank(given, nbytes), key=id) == sorted(given, key=id)


@examples
@given(candidates, sizes)
def test_the_healthy_come_first_then_the_slow_then_the_rest(given: list[Candidate], nbytes: int) -> None:
    order = [standing(each) for each in rank(given, nbytes)]
    assert order == sorted(order)


@examples
@given(candidates, sizes)
def test_none_comes_before_one_as_well_that_is_faster_by_more_than_an_equal_share(
    given: list[Candidate], nbytes: int
) -> None:
    for number, first in enumerate(ranked := rank(given, nbytes)):
        for later in ranked[number + 1 :]:
            if standing(first) == standing(later) and first.is_slow == later.is_slow:
                assert first.seconds(nbytes) <= later.seconds(nbytes) * EQUAL_SHARE


@examples
@given(candidates, sizes)
def test_of_the_equally_fast_the_cheaper_comes_first(given: list[Candidate], nbytes: int) -> None:
    well = [each for each in given if standing(each) == 0]
    if not well:
        return
    fastest = min(each.seconds(nbytes) for each in well)
    equal = [each for each in well if each.seconds(nbytes) <= fastest * EQUAL_SHARE]
    assert rank(given, nbytes)[0].usd_per_gb == min(each.usd_per_gb for each in equal)


@examples
@given(candidates, sizes, st.randoms())
def test_the_order_of_the_question_is_not_that_of_the_answer(
    given: list[Candidate], nbytes: int, shuffler: random.Random
) -> None:
    shuffled = list(given)
    shuffler.shuffle(shuffled)
    assert rank(shuffled, nbytes) == rank(given, nbytes)


def test_latency_decides_for_few_bytes_and_rate_for_many() -> None:
    near, wide = Candidate("near", 0.01, 10.0 * MB), Candidate("wide", 0.5, 100.0 * MB)
    assert [each.name for each in rank([wide, near], 1000)] == ["near", "wide"]
    assert [each.name for each in rank([wide, near], 1000 * MB)] == ["wide", "near"]


def test_what_was_never_measured_is_asked_before_what_is_known_to_be_slow_and_after_what_is_fast() -> None:
    new = Candidate("new")
    assert new.seconds(MB) == ASSUMED_LATENCY_S + MB / ASSUMED_BYTES_PER_S
    slow = Candidate("slow", 0.01, ASSUMED_BYTES_PER_S / 10)
    fast = Candidate("fast", 0.01, ASSUMED_BYTES_PER_S * 10)
    assert [each.name for each in rank([slow, new, fast], 1000 * MB)] == ["fast", "new", "slow"]


def test_a_rate_of_nothing_is_no_rate() -> None:
    assert Candidate("a", 0.1, 0.0).seconds(MB) == Candidate("a", 0.1).seconds(MB)


@pytest.mark.parametrize(
    ("candidate", "told"),
    [
        (Candidate("a", 0.012, 250e6, 0.09), "a: 12 ms, 250 MB/s, 4.01 s, 0.09 USD"),
        (Candidate("a"), "a: ? ms, ? MB/s, 8.25 s, 0 USD"),
        (Candidate("a", 0.012, 250e6, is_slow=True), "a: 12 ms, 250 MB/s, 4.01 s, 0 USD, slow just now"),
        (Candidate("a", 0.012, 250e6, is_healthy=False), "a: does not answer"),
    ],
)
def test_what_is_known_is_told(candidate: Candidate, told: str) -> None:
    assert candidate.describe(1000 * MB) == told


def test_the_choice_is_explained_by_all() -> None:
    ranked = rank([Candidate("a", 0.02, 10e6), Candidate("b", 0.01, 100e6)], MB)
    assert explain(ranked, MB) == "b of 2 allowed (b: 10 ms, 100 MB/s, 0.02 s, 0 USD; a: 20 ms, 10 MB/s, 0.12 s, 0 USD)"
