"""Own the choice of what leaves a tier. Pure: the clock's readings are part of what is handed in.

Never evicts a model that is leased or pinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from weightcache.digest import Digest

HIGH_WATERMARK = 1.0  # of the budget: eviction starts when a write would pass it
LOW_WATERMARK = 0.9  # of the budget: eviction stops below it, so that the next writes need none


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in the tier: its chunks, its last use (seconds, any origin), and whether it is held."""

    key: str
    chunks: frozenset[Digest]
    last_use_s: float
    n_uses: int = 1
    held: bool = False


def choose_victims(models: Iterable[Resident], nbytes: Mapping[Digest, int], to_free: int) -> list[Resident]:
    """Choose whole models to evict, least valuable first, until `to_free` bytes would be free.

    Value is recency of use. A chunk counts as freed when no remaining model has it, so evicting a fine-tune frees what
    it does not share with its base.

    Args:
        models: All models of the tier.
        nbytes: Size of each chunk that the tier holds.
        to_free: Bytes wanted; all evictable models together may free less.
    """
    residents = sorted(models, key=lambda model: (model.last_use_s, model.key))
    owners: dict[Digest, int] = {}
    for model in residents:
        for digest in model.chunks:
            owners[digest] = owners.get(digest, 0) + 1
    victims: list[Resident] = []
    freed = 0
    for model in residents:
        if freed >= to_free:
            break
        if model.held:
            continue
        victims.append(model)
        for digest in model.chunks:
            owners[digest] -= 1
            if owners[digest] == 0:
                freed += nbytes.get(digest, 0)
    return victims
