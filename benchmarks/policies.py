"""Own the ways to choose what leaves a simulated tier: weightcache's, and those it is compared with.

Never counts bytes: the tier does, for all alike.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Protocol

from traces import Model

from weightcache.digest import Digest
from weightcache.tiers.eviction import Resident, Uses, choose_victims, used_again


class Policy(Protocol):
    """What a tier asks. `models` are those of the trace, `there` those in the tier, `used` among them."""

    def used(self, key: str, now_s: float) -> None:
        """Be told of a use of a model that is in the tier now."""

    def victims(self, there: Collection[str], held: Collection[str], to_free: int, now_s: float) -> Iterator[str]:
        """Yield models to evict, none of those held, until no more are asked for. Those yielded are gone."""


class Lru:
    """Least recently used first."""

    def __init__(self, models: Mapping[str, Model], budget_bytes: int) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def used(self, key: str, now_s: float) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def victims(self, there: Collection[str], held: Collection[str], to_free: int, now_s: float) -> Iterator[str]:
        for key in list(self._order):
            if key not in held:
                del self._order[key]
                yield key


class Lfu:
    """Least often used since it came first, of equals the least recently used."""

    def __init__(self, models: Mapping[str, Model], budget_bytes: int) -> None:
        self._uses: dict[str, tuple[int, float]] = {}

    def used(self, key: str, now_s: float) -> None:
        self._uses[key] = (self._uses.get(key, (0, 0.0))[0] + 1, now_s)

    def victims(self, there: Collection[str], held: Collection[str], to_free: int, now_s: float) -> Iterator[str]:
        for key in sorted(self._uses, key=self._uses.__getitem__):
            if key not in held:
                del self._uses[key]
                yield key


class Gdsf:
    """GDSF with its clock (Cherkasova 1998) over whole models: seconds a byte are the same for all, so uses + clock."""

    def __init__(self, models: Mapping[str, Model], budget_bytes: int) -> None:
        self._clock = 0.0
        self._value: dict[str, tuple[float, float]] = {}
        self._n: dict[str, int] = {}

    def used(self, key: str, now_s: float) -> None:
        self._n[key] = self._n.get(key, 0) + 1
        self._value[key] = (self._clock + self._n[key], now_s)

    def victims(self, there: Collection[str], held: Collection[str], to_free: int, now_s: float) -> Iterator[str]:
        for key in sorted(self._value, key=self._value.__getitem__):
            if key not in held:
                self._clock = self._value.pop(key)[0]
                del self._n[key]
                yield key


class S3Fifo:
    """S3-FIFO (Yang et al., SOSP 2023) over whole models: a small queue of a tenth of the bytes, a main one, ghosts."""

    def __init__(self, models: Mapping[str, Model], budget_bytes: int) -> None:
        self._models = models
        self._small_bytes, self._main_bytes = budget_bytes // 10, budget_bytes - budget_bytes // 10
        self._small: OrderedDict[str, None] = OrderedDict()
        self._main: OrderedDict[str, None] = OrderedDict()
        self._ghosts: OrderedDict[str, None] = OrderedDict()
        self._n: dict[str, int] = {}

    def used(self, key: str, now_s: float) -> None:
        if key in self._n:
            self._n[key] = min(3, self._n[key] + 1)
            return
        self._n[key] = 0
        (self._main if key in self._ghosts else self._small)[key] = None
        self._ghosts.pop(key, None)

    def victims(self, there: Collection[str], held: Collection[str], to_free: int, now_s: float) -> Iterator[str]:
        passed = 0  # over those held, which go to the end
        while passed <= len(self._small) + len(self._main):
            from_small = self._small and (self._bytes(self._small) > self._small_bytes or not self._main)
            queue = self._small if from_small else self._main
            if not queue:
                return
            key, _ = queue.popitem(last=False)
            if key in held:
                queue[key] = None
                passed += 1
            elif self._n[key] > (1 if from_small else 0):
                self._n[key] = 0 if from_small else self._n[key] - 1
                self._main[key] = None
            else:
                del self._n[key]
                if from_small:
                    self._remember(key)
                yield key

    def _remember(self, key: str) -> None:
        self._ghosts[key] = None
        while self._bytes(self._ghosts) > self._main_bytes:
            self._ghosts.popitem(last=False)

    def _bytes(self, queue: Collection[str]) -> int:
        return sum(self._models[key].nbytes for key in queue)


class Ours:
    """weightcache's own choice, as the disk tier makes it: uses are remembered of models that have left, too."""

    def __init__(self, models: Mapping[str, Model], budget_bytes: int) -> None:
        self._models = models
        self._nbytes = {_digest(part): nbytes for model in models.values() for part, nbytes in model.parts.items()}
        self._chunks = {key: frozenset(map(_digest, model.parts)) for key, model in models.items()}
        self._uses: dict[str, Uses] = {}
        self._last_s: dict[str, float] = {}

    def used(self, key: str, now_s: float) -> None:
        self._last_s[key] = now_s
        self._uses[key] = used_again(self._uses.get(key, ()), now_s)

    def victims(self, there: Collection[str], held: Collection[str], to_free: int, now_s: float) -> Iterator[str]:
        residents = [
            Resident(
                key,
                self._chunks[key],
                self._last_s.get(key, now_s),
                self._uses.get(key, ()),
                key in held,
                expected_per_s=self.expected_per_s(key, now_s),
            )
            for key in there
        ]
        choice = choose_victims(residents, self._nbytes, to_free, now_s)
        self._uses |= choice.bequests
        yield from (victim.key for victim in choice.victims)

    def expected_per_s(self, key: str, now_s: float) -> float | None:
        """Return what a forecast expects of a model; there is none."""
        return None


POLICIES: Mapping[str, Callable[[Mapping[str, Model], int], Policy]] = {
    "weightcache": Ours,
    "LRU": Lru,
    "LFU": Lfu,
    "GDSF, clock": Gdsf,
    "S3-FIFO": S3Fifo,
}


def _digest(part: str) -> Digest:
    return Digest(hashlib.sha256(part.encode()).hexdigest())
