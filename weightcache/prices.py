"""Own what traffic and storage cost: the list prices of object stores, and whose store a replica is at. Pure.

Never knows a discount, and never guesses: a store that is not known costs 0 and says so.

A load's price is what a store's list says for its first tier of traffic to the internet; free shares are not deducted.
A month's egress goes through the tiers and the free share, where they are known.
Traffic inside one region of AWS is free: who loads there sets its egress to 0 in the configuration.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from weightcache.errors import ConfigError, nearest
from weightcache.ledger import Ledger
from weightcache.tables import as_table, read_table, read_usd

AS_OF = "2026-11"
TO_THE_INTERNET = f"list prices of {AS_OF} to the internet"
LISTED = f"{TO_THE_INTERNET}, first tier"
CONFIGURED = "prices set in the configuration"
UNKNOWN = "unknown"
UNPRICED = "no price is known, counted as 0"

GB = 10**9  # as everywhere here; some stores bill 2^30 bytes, which is 7 % less
Overrides = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Price:
    """What a provider asks, in USD.

    Attributes:
        provider: Whose price it is.
        egress_usd_per_gb: For a GB (10^9 bytes) sent, in the first tier.
        get_usd_per_1000: For 1000 GETs or HEADs.
        list_usd_per_1000: For 1000 listings.
        note: Where the price is from.
        storage_usd_per_gb_month: For a GB kept a month.
        egress_tiers: (GB, USD): from so many GB a month on, a GB sent costs so much. None: all of it costs the same.
    """

    provider: str
    egress_usd_per_gb: float = 0.0
    get_usd_per_1000: float = 0.0
    list_usd_per_1000: float = 0.0
    note: str = LISTED
    storage_usd_per_gb_month: float = 0.0
    egress_tiers: tuple[tuple[float, float], ...] = ()


# The free share of AWS is the beginning of its first tier of 10 TB, not before it.
_AWS_TIERS = ((0, 0.0), (100, 0.09), (10_000, 0.085), (50_000, 0.07), (150_000, 0.05))
_AZURE_TIERS = ((0, 0.0), (100, 0.087))
# Listings are of the class of writes; at B2, where writes are free, of class C.
_TABLE = {
    price.provider: price
    for price in (
        Price("aws", 0.09, 0.0004, 0.005, storage_usd_per_gb_month=0.023, egress_tiers=_AWS_TIERS),
        Price("gcs", 0.12, 0.0004, 0.005, storage_usd_per_gb_month=0.020),
        Price("azure", 0.087, 0.0005, 0.0065, storage_usd_per_gb_month=0.018, egress_tiers=_AZURE_TIERS),
        Price("r2", 0.0, 0.00036, 0.0045, storage_usd_per_gb_month=0.015),
        Price("tigris", 0.0, 0.0005, 0.005, storage_usd_per_gb_month=0.020),
        Price("b2", 0.01, 0.0004, 0.004, storage_usd_per_gb_month=0.006),
    )
}
PROVIDERS = tuple(_TABLE)
KEYS = ("egress_usd_per_gb", "get_usd_per_1000", "list_usd_per_1000", "storage_usd_per_gb_month")

_BY_HOST = {
    "amazonaws.com": "aws",
    "storage.googleapis.com": "gcs",
    "storage.cloud.google.com": "gcs",
    "blob.core.windows.net": "azure",
    "dfs.core.windows.net": "azure",
    "r2.cloudflarestorage.com": "r2",
    "r2.dev": "r2",
    "t3.storage.dev": "tigris",
    "fly.storage.tigris.dev": "tigris",
    "backblazeb2.com": "b2",
}
_BY_SCHEME = {
    "s3": "aws",
    "s3a": "aws",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "wasb": "azure",
    "wasbs": "azure",
}


def provider_of(scheme: str, endpoint_host: str) -> str:
    """Return whose store this is, or `unknown`.

    Args:
        scheme: Of the URI, or of the endpoint.
        endpoint_host: The endpoint's host without its port; empty where the scheme's own is meant.
    """
    if not endpoint_host:
        return _BY_SCHEME.get(scheme, UNKNOWN)
    return next((name for suffix, name in _BY_HOST.items() if _is_below(endpoint_host, suffix)), UNKNOWN)


def price_of(place: str, overrides: Overrides, declared: str = "") -> Price:
    """Return what traffic from a replica costs.

    Args:
        place: As `ledger.place_of` spells it.
        overrides: Prices by provider or host, as they are configured. Those of a host, the longest that fits, beat those
            of its provider; what one leaves out is taken from the next, at last from the table.
        declared: The provider, where the place does not show it.
    """
    parts = urlsplit(place)
    host = (parts.hostname or "").lower() if parts.scheme in ("http", "https") else ""
    provider = provider_of(parts.scheme, host)
    if provider == UNKNOWN and declared:
        provider = declared
    listed = _TABLE.get(provider, Price(provider, note=UNPRICED))
    hosts = sorted((name for name in overrides if host and _is_below(host, name)), key=len)
    given: dict[str, float] = {}
    for name in (provider, *hosts):
        given |= overrides.get(name, {})
    if not given:
        return listed
    price = replace(listed, provider=hosts[-1] if provider == UNKNOWN else provider, note=CONFIGURED)
    return with_amounts(price, given)


def with_amounts(price: Price, amounts: Mapping[str, float]) -> Price:
    """Return a price in which these amounts hold; a configured egress has no tiers."""
    tiers = () if "egress_usd_per_gb" in amounts else price.egress_tiers
    return replace(price, note=CONFIGURED, egress_tiers=tiers, **amounts)  # type: ignore[arg-type]


def read_overrides(given: object, source: str) -> dict[str, dict[str, float]]:
    """Read `[prices.<provider or host>]` tables. Raises ConfigError."""
    overrides: dict[str, dict[str, float]] = {}
    for name, table in as_table(given, "prices", source).items():
        spelled = f"prices.{name}"
        if name not in PROVIDERS and not is_host(name):
            raise ConfigError(
                f"unknown provider {spelled!r} in {source}{nearest(name, PROVIDERS)}: expected {', '.join(PROVIDERS)} or a "
                'host, as in [prices."minio.example.com"]',
                setting=spelled,
                source=source,
            )
        amounts = read_table(table, spelled, source, dict.fromkeys(KEYS, read_usd))
        if amounts:
            overrides[name.lower()] = amounts
    return overrides


def cost_usd(ledger: Ledger, price: Price) -> float:
    """Return what was asked of a replica costs."""
    requests = ledger.n_gets * price.get_usd_per_1000 + ledger.n_lists * price.list_usd_per_1000
    return egress_usd(ledger.received_bytes, price) + requests / 1000


def egress_usd(nbytes: int, price: Price) -> float:
    """Return what bytes cost that leave the store."""
    return nbytes / GB * price.egress_usd_per_gb


def month_egress_usd(nbytes: int, price: Price) -> float:
    """Return what a month's bytes cost that leave the store, if nothing else of the account does."""
    tiers = price.egress_tiers or ((0, price.egress_usd_per_gb),)
    ends = [start for start, _ in tiers[1:]] + [math.inf]
    gb = nbytes / GB
    return sum(max(0.0, min(gb, end) - start) * usd for (start, usd), end in zip(tiers, ends, strict=True))


def terms(price: Price) -> str:
    """Spell out what a month is priced by."""
    if price.note == UNPRICED:
        return UNPRICED
    first, *others = price.egress_tiers or ((0, price.egress_usd_per_gb),)
    steps = "".join(f", {usd:g} from {_gb(start)}" for start, usd in others)
    note = TO_THE_INTERNET if price.note == LISTED else price.note
    return (
        f"{price.storage_usd_per_gb_month:g} USD a GB and month; egress {first[1]:g} USD a GB{steps}; "
        f"{price.get_usd_per_1000:g} USD for 1000 GETs ({note})"
    )


def _gb(gb: float) -> str:
    return f"{gb / 1000:g} TB" if gb >= 1000 else f"{gb:g} GB"


def is_host(name: str) -> bool:
    """Tell whether a name can be a host's: it has a dot, or is an address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        labels = name.split(".")
        return (len(labels) > 1 or name == "localhost") and all(
            label and label.replace("-", "").replace("_", "").isalnum() for label in labels
        )
    return True


def _is_below(host: str, suffix: str) -> bool:
    return host == suffix or host.endswith(f".{suffix}")
