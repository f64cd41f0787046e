"""The choice of victims, against a model that counts by brute force."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from strategies import examples

from weightcache.digest import Digest
from weightcache.tiers.eviction import Resident, choose_victims

DIGESTS = [Digest(f"{number:064x}") for number in range(8)]

residents = st.builds(
    Resident,
    key=st.text("abcdef", min_size=1, max_size=3),
    chunks=st.frozensets(st.sampled_from(DIGESTS)),
    last_use_s=st.sampled_from([0.0, 1.0, 2.0, 2.5, 1e9]),
    held=st.booleans(),
)
tiers = st.lists(residents, max_size=6, unique_by=lambda resident: resident.key)
holdings = st.dictionaries(st.sampled_from(DIGESTS), st.integers(1, 100))
amounts = st.integers(-5, 500)


def freed(models: list[Resident], victims: list[Resident], nbytes: dict[Digest, int]) -> int:
    """Return the bytes that no model needs any more, and that one of the victims did."""
    kept = [model for model in models if model not in victims]
    needed = frozenset[Digest]().union(*(model.chunks for model in kept))
    gone = frozenset[Digest]().union(*(model.chunks for model in victims)) - needed
    return sum(nbytes.get(digest, 0) for digest in gone)


def evictable(models: list[Resident]) -> list[Resident]:
    """Return the models that may go, least recently used first."""
    return sorted((m for m in models if not m.held), key=lambda model: (model.last_use_s, model.key))


@examples
@given(tiers, holdings, amounts)
def test_held_model_is_never_chosen(models: list[Resident], nbytes: dict[Digest, int], to_free: int) -> None:
    assert not any(victim.held for victim in choose_victims(models, nbytes, to_free))


@examples
@given(tiers, holdings, amounts)
def test_victims_are_the_fewest_least_recently_used_that_free_enough(
    models: list[Resident], nbytes: dict[Digest, int], to_free: int
) -> None:
    order = evictable(models)
    enough = (n for n in range(len(order) + 1) if freed(models, order[:n], nbytes) >= to_free)
    assert choose_victims(models, nbytes, to_free) == order[: next(enough, len(order))]


@examples
@given(tiers, holdings, amounts)
def test_enough_is_freed_whenever_that_is_possible(
    models: list[Resident], nbytes: dict[Digest, int], to_free: int
) -> None:
    possible = freed(models, evictable(models), nbytes)
    assert freed(models, choose_victims(models, nbytes, to_free), nbytes) >= min(to_free, possible)


@examples
@given(tiers, holdings, amounts, st.randoms())
def test_choice_does_not_depend_on_the_order_of_the_models(
    models: list[Resident], nbytes: dict[Digest, int], to_free: int, random: st.randoms
) -> None:
    shuffled = random.sample(models, len(models))
    assert choose_victims(shuffled, nbytes, to_free) == choose_victims(models, nbytes, to_free)


def test_chunk_shared_with_a_remaining_model_frees_nothing() -> None:
    shared, own, base = DIGESTS[:3]
    tune = Resident("tune", frozenset([shared, own]), 1.0)
    model = Resident("base", frozenset([shared, base]), 2.0)
    nbytes = {shared: 90, own: 10, base: 10}
    assert choose_victims([model, tune], nbytes, 10) == [tune]
    assert choose_victims([model, tune], nbytes, 11) == [tune, model]
    assert choose_victims([replace(model, held=True), tune], nbytes, 11) == [tune]


def test_nothing_is_chosen_where_nothing_must_go() -> None:
    assert choose_victims([Resident("a", frozenset(DIGESTS), 1.0)], dict.fromkeys(DIGESTS, 1), 0) == []
