"""Own the estimate of what a month of loads costs, store by store, and what the disk cache saves of it. Pure.

Never looks at what was loaded: that is spending.py's. All loads are taken to come over the internet, one model's alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from weightcache.errors import ConfigError
from weightcache.prices import GB, PROVIDERS, Overrides, Price, month_egress_usd, price_of, terms
from weightcache.stores import Store

RANGE_NBYTES = 16 << 20  # a load's largest range by default: what one GET brings


@dataclass(frozen=True, slots=True)
class Case:
    """What is simulated: a model's bytes, its loads a month, and how many of them are cold with the disk cache."""

    model_bytes: int
    n_loads: int
    n_nodes: int
    n_cold: int

    @property
    def n_gets(self) -> int:
        """GETs of one cold load."""
        return -(-self.model_bytes // RANGE_NBYTES)


@dataclass(frozen=True, slots=True)
class Month:
    """What a month costs at one store, in USD: a provider's, or a replica's of the configuration.

    Attributes:
        store: The provider, or `store/replica`.
        storage_usd: To keep the model, with or without the cache.
        egress_usd, requests_usd: Every load cold; `cached_…` with the disk cache.
        priced_by: The prices and tiers used.
    """

    store: str
    storage_usd: float
    egress_usd: float
    requests_usd: float
    cached_egress_usd: float
    cached_requests_usd: float
    priced_by: str

    @property
    def usd(self) -> float:
        """All of it, every load cold."""
        return self.storage_usd + self.egress_usd + self.requests_usd

    @property
    def cached_usd(self) -> float:
        """All of it, with the disk cache."""
        return self.storage_usd + self.cached_egress_usd + self.cached_requests_usd

    @property
    def saved_usd(self) -> float:
        """What the disk cache saves."""
        return self.usd - self.cached_usd


@dataclass(frozen=True, slots=True)
class Simulation:
    """A case, and a month of it at each store."""

    case: Case
    months: tuple[Month, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        case = {field.name: getattr(self.case, field.name) for field in fields(Case)} | {"n_gets": self.case.n_gets}
        sums = ("usd", "cached_usd", "saved_usd")
        names = (*(field.name for field in fields(Month)), *sums)
        return {**case, "months": [{name: getattr(month, name) for name in names} for month in self.months]}


def make_case(model_gb: float, n_loads: int, n_nodes: int, hit_share: float | None) -> Case:
    """Understand what is to be simulated; see `weightcache.simulate_cost`. Raises ConfigError."""
    if not 0 < model_gb < 10**6:
        raise ConfigError(f"model_gb={model_gb!r}: expected the GB of a model, more than 0")
    for name, count in (("n_loads", n_loads), ("n_nodes", n_nodes)):
        if not 1 <= count < 10**9:
            raise ConfigError(f"{name}={count!r}: expected a whole number, at least 1")
    if hit_share is not None and not 0 <= hit_share <= 1:
        raise ConfigError(f"hit_share={hit_share!r}: expected the share of loads that come from disk, from 0 to 1")
    n_cold = min(n_nodes, n_loads)
    if hit_share is not None:
        n_cold = math.ceil(round(n_loads * (1 - hit_share), 6))  # 10 x (1 - 0.7) is a little more than 3
    return Case(round(model_gb * GB), n_loads, n_nodes, n_cold)


def simulate(case: Case, stores: Mapping[str, Store], overrides: Overrides) -> Simulation:
    """Price a case at every provider of the table and every configured replica."""
    prices = {provider: price_of("", overrides, provider) for provider in PROVIDERS}
    for store in stores.values():
        prices |= {f"{store.name}/{replica.name}": replica.price(overrides) for replica in store.replicas}
    return Simulation(case, tuple(_month(case, store, price) for store, price in prices.items()))


def _month(case: Case, store: str, price: Price) -> Month:
    def egress_usd(n_cold: int) -> float:
        return month_egress_usd(n_cold * case.model_bytes, price)

    def requests_usd(n_cold: int) -> float:
        return n_cold * case.n_gets * price.get_usd_per_1000 / 1000

    return Month(
        store=store,
        storage_usd=case.model_bytes / GB * price.storage_usd_per_gb_month,
        egress_usd=egress_usd(case.n_loads),
        requests_usd=requests_usd(case.n_loads),
        cached_egress_usd=egress_usd(case.n_cold),
        cached_requests_usd=requests_usd(case.n_cold),
        priced_by=terms(price),
    )
