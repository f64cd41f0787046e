"""Own the choice of what leaves a tier, by value, and the count of uses it rests on. Pure: clocks are handed in.

Never evicts a model that is held: leased or pinned.

Value is GDSF's, frequency x seconds to reload / bytes freed, of what would really leave: the bytes that no other model
of the tier has. Frequency follows from a model's last N_USES uses (as LRU-K's, O'Neil et al. 1993): it ages by itself, has
no clock for processes to share, and is the same for a node that loads every minute or every day.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from weightcache.choosing import ASSUMED_BYTES_PER_S, ASSUMED_LATENCY_S
from weightcache.digest import Digest

HIGH_WATERMARK = 1.0  # of the budget: eviction starts when a write would pass it
LOW_WATERMARK = 0.9  # of the budget: eviction stops below it, so that the next writes need none
N_USES = 16  # remembered of a model; with 8, traces miss up to 5 % more (docs/decisions/018)
SAME_USE_S = 300.0  # the eight processes of one start are one use, and so is a start that fails and is tried again
PROBATION_S = 7 * 86400.0  # a model that was used once is taken to be used once in so long, until it is used again

Uses = tuple[float, ...]
"""When a model was used, newest first, in seconds since the epoch; of uses that count as one, the first."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in the tier.

    Attributes:
        key: Names it.
        chunks: What it has here and may share with others.
        last_use_s: Its last use.
        uses: Its last uses, where they are known.
        held: It may not leave.
        own_bytes: What it has here beside chunks: a model's files, or a whole image.
        bytes_per_s: How fast its bytes would come back.
        expected_per_s: Uses a second that a forecast expects just now, where there is one that knows.
    """

    key: str
    chunks: frozenset[Digest]
    last_use_s: float
    uses: Uses = ()
    held: bool = False
    own_bytes: int = 0
    bytes_per_s: float = ASSUMED_BYTES_PER_S
    expected_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to leave, in this order, and the uses that those who stay inherit, by key."""

    victims: tuple[Resident, ...]
    bequests: Mapping[str, Uses]


def used_again(uses: Uses, now_s: float) -> Uses:
    """Return a model's uses with one more; one that follows within SAME_USE_S of the last is the same."""
    if uses and abs(now_s - uses[0]) < SAME_USE_S:
        return uses
    return merged(uses, (now_s,))


def merged(uses: Uses, others: Uses) -> Uses:
    """Return the newest of two models' uses."""
    return tuple(sorted({*uses, *others}, reverse=True)[:N_USES])


def rate_of(model: Resident, now_s: float) -> float:
    """Return the uses a second to be expected of a model: one in its mean gap and the time that it has been idle now.

    The gap alone is LRU-K's and forgets a burst too late; the idle time alone is LRU's. One use makes no gap: such a model is
    on probation.
    """
    if model.expected_per_s is not None:
        return model.expected_per_s
    idle_s = max(0.0, now_s - max((model.last_use_s, *model.uses[:1])))
    presumed_s = max(PROBATION_S, idle_s)
    if len(model.uses) < 2:
        return 1 / presumed_s
    gap_s = max(SAME_USE_S, now_s - model.uses[-1]) / (len(model.uses) - 1)
    return 1 / min(presumed_s, gap_s + idle_s)


def choose_victims(models: Iterable[Resident], nbytes: Mapping[Digest, int], to_free: int, now_s: float) -> Choice:
    """Choose whole models to evict, least valuable first, until `to_free` bytes would be free.

    A chunk is freed when no remaining model has it. So a fine-tune that leaves frees what it does not share with its base,
    and its uses, which were uses of the base's bytes too, pass to the most valuable model that is mostly made of them: a
    base that many rare fine-tunes ask for is not taken for one that is rarely asked for.

    Args:
        models: All models of the tier.
        nbytes: Size of each chunk that the tier holds.
        to_free: Bytes wanted; all evictable models together may free less.
        now_s: The moment, as in `uses`.
    """
    given = {model.key: model for model in models}
    left = dict(given)  # with the uses they inherit
    owners: dict[Digest, int] = {}
    for model in left.values():
        for digest in model.chunks:
            owners[digest] = owners.get(digest, 0) + 1
    victims: list[Resident] = []
    bequests: dict[str, Uses] = {}

    def lost_bytes(model: Resident) -> int:
        return model.own_bytes + sum(nbytes.get(digest, 0) for digest in model.chunks if owners[digest] == 1)

    def value(model: Resident) -> tuple[float, float, str]:
        lost = lost_bytes(model)
        seconds_per_byte = 1 / model.bytes_per_s + (ASSUMED_LATENCY_S / lost if lost else 0.0)
        return rate_of(model, now_s) * seconds_per_byte, model.last_use_s, model.key

    values = {model.key: value(model) for model in left.values() if not model.held}
    while to_free > 0 and values:
        victim = left.pop(min(values, key=values.__getitem__))
        del values[victim.key]
        victims.append(given[victim.key])
        to_free -= lost_bytes(victim)
        for digest in victim.chunks:
            owners[digest] -= 1
        sharers = [each for each in left.values() if not each.chunks.isdisjoint(victim.chunks)]
        heirs = [each for each in sharers if _is_mostly_in(each, victim, nbytes)]
        if heirs:
            heir = max(heirs, key=value)
            bequests[heir.key] = merged(heir.uses or (heir.last_use_s,), victim.uses or (victim.last_use_s,))
            left[heir.key] = replace(heir, uses=bequests[heir.key])
        for each in sharers:
            if each.key in values:
                values[each.key] = value(left[each.key])
    for victim in victims:
        bequests.pop(victim.key, None)
    return Choice(tuple(victims), bequests)


def _is_mostly_in(model: Resident, other: Resident, nbytes: Mapping[Digest, int]) -> bool:
    """Tell whether most of a model's bytes are another's too."""
    shared = sum(nbytes.get(digest, 0) for digest in model.chunks & other.chunks)
    return 2 * shared > model.own_bytes + sum(nbytes.get(digest, 0) for digest in model.chunks)
