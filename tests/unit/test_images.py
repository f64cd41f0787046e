"""Images in host memory while they are filled, and the tier that keeps them within a budget."""

from __future__ import annotations

import asyncio

import pytest

from weightcache import _engine
from weightcache.errors import CapacityError, ImageLostError
from weightcache.layout import Layout
from weightcache.tiers.host import HeldImage, HostTier

NBYTES = 4096
HOUR_S = 3600.0
KEYS = [(0, 0), (0, 1), (1, 0)]


def image(uri: str = "a", revision: str = "1", nbytes: int = NBYTES) -> HeldImage:
    layout = Layout(nbytes, dict.fromkeys(KEYS, 0), ())
    return HeldImage(uri, revision, layout, _engine.SharedMemory(nbytes))


def full(uri: str = "a", revision: str = "1", nbytes: int = NBYTES) -> HeldImage:
    held = image(uri, revision, nbytes)
    for key in KEYS:
        held.arrived(key)
    held.freeze()
    return held


def kept(tier: HostTier, held: HeldImage, now_s: float = 0.0) -> HeldImage:
    """Keep an image that is full already, and let go of it."""
    tier.keep(held.uri, held, now_s)
    tier.let_go(held)
    return held


# -- arriving


def test_what_is_there_is_told_at_once_and_what_arrives_when_it_does() -> None:
    held = image()
    held.arrived(KEYS[1])

    async def work() -> list[list[tuple[int, int]]]:
        told = []
        async for keys in held.arriving(KEYS):
            told.append(keys)
            held.arrived(KEYS[0])
            if len(told) == 2:
                held.arrived(KEYS[2])
        return told

    assert asyncio.run(work()) == [[KEYS[1]], [KEYS[0]], [KEYS[2]]]


def test_who_waits_for_an_image_that_is_given_up_is_told_why() -> None:
    held, tier = image(), HostTier()
    tier.keep("a", held, 0.0)

    async def work() -> None:
        waiting = asyncio.create_task(held.wait(KEYS))
        await asyncio.sleep(0)
        tier.give_up(held, "the origin is gone")
        await waiting

    with pytest.raises(ImageLostError, match="the origin is gone"):
        asyncio.run(work())
    assert tier.images() == []


def test_what_arrived_before_an_image_was_given_up_can_be_taken() -> None:
    held = image()
    held.arrived(KEYS[0])
    held.failure = "gone"
    asyncio.run(held.wait(KEYS[:1]))


def test_an_image_is_full_when_all_has_arrived() -> None:
    held = image()
    for key in KEYS:
        assert not held.is_full
        held.arrived(key)
    assert held.is_full


# -- keeping


def test_a_second_filler_of_one_state_gets_the_first_s_image() -> None:
    tier, first = HostTier(), image()
    assert tier.keep("a", first, 0.0) is first
    assert tier.keep("a", image(), 1.0) is first
    assert first.n_users == 2


def test_a_new_state_takes_the_place_of_the_old_which_counts_while_it_is_used() -> None:
    tier = HostTier()
    old = kept(tier, full())
    assert tier.hold("a", "1", KEYS, 1.0) is old
    kept(tier, full(revision="2"))
    assert tier.used_bytes() == 2 * NBYTES
    assert tier.hold("a", "1", KEYS, 2.0) is None
    tier.let_go(old)
    assert tier.used_bytes() == NBYTES


@pytest.mark.parametrize("budget", [2 * NBYTES, 3 * NBYTES - 1])
def test_the_least_recently_used_leaves_for_a_new_one(budget: int) -> None:
    tier = HostTier()
    old, new = kept(tier, full("old"), 1.0), kept(tier, full("new"), 2.0)
    with tier.room(NBYTES, budget, 3.0):
        assert tier.images() == [new]
    assert old not in tier.images()


def test_what_is_used_or_is_to_stay_does_not_leave() -> None:
    tier = HostTier()
    used, stays = kept(tier, full("used")), kept(tier, full("stays"))
    assert tier.hold_again(used, 1.0)
    tier.until_s["stays"] = 10.0
    with pytest.raises(CapacityError, match="no room for an image"), tier.room(NBYTES, 2 * NBYTES, 9.0):
        pass
    with tier.room(NBYTES, 2 * NBYTES, 11.0):
        assert tier.images() == [used]
    tier.until_s["used"] = 0.0
    tier.let_go(used)
    with pytest.raises(CapacityError), tier.room(2 * NBYTES, 2 * NBYTES, 1e12):
        pass
    assert stays not in tier.images()


def busy(tier: HostTier) -> HeldImage:
    """Keep an image that is used every hour."""
    held = kept(tier, full("busy"))
    for now_s in (HOUR_S, 2 * HOUR_S):
        tier.hold_again(held, now_s)
        tier.let_go(held)
    return held


def test_what_nobody_waits_for_does_not_come_for_what_is_worth_more() -> None:
    tier = HostTier()
    held = busy(tier)
    with pytest.raises(CapacityError, match="models of more value would leave"):
        tier.admit("a", "a", NBYTES, NBYTES, 3 * HOUR_S)
    assert tier.images() == [held]


def test_what_nobody_waits_for_comes_where_there_is_room() -> None:
    tier = HostTier()
    busy(tier)
    tier.admit("a", "a", NBYTES, 2 * NBYTES, 3 * HOUR_S)


def test_what_is_expected_comes_for_what_is_worth_less() -> None:
    tier = HostTier()
    busy(tier)
    tier.expected_per_s = {"a": 1.0}
    tier.admit("a", "a", NBYTES, NBYTES, 3 * HOUR_S)


def test_what_was_used_more_often_before_it_left_comes_for_what_is_worth_less() -> None:
    tier = HostTier()
    busy(tier)
    tier.drop("busy")
    kept(tier, full("once"), 3 * HOUR_S)
    tier.admit("busy", "busy", NBYTES, NBYTES, 4 * HOUR_S)


def test_rooms_that_are_promised_count() -> None:
    tier = HostTier()
    with tier.room(NBYTES, 2 * NBYTES, 0.0):
        with pytest.raises(CapacityError), tier.room(2 * NBYTES, 2 * NBYTES, 0.0):
            pass
        with tier.room(NBYTES, 2 * NBYTES, 0.0):
            pass


def test_an_image_that_is_no_longer_kept_is_not_held_again() -> None:
    tier = HostTier()
    held = kept(tier, full())
    assert tier.hold_again(held, 0.0)
    tier.drop("a")
    assert not tier.hold_again(held, 0.0)


def test_only_idle_images_are_dropped_where_that_is_asked() -> None:
    tier = HostTier()
    held = kept(tier, full())
    tier.hold_again(held, 0.0)
    assert tier.drop("a", idle_only=True) == 0
    tier.let_go(held)
    assert tier.drop("a", idle_only=True) == NBYTES
