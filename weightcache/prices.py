"""Own what traffic costs: the list prices of object stores, and whose store a replica is at. Pure.

Never knows a discount, and never guesses: a store that is not known costs 0 and says so.

A price is what a store's list says for its first tier of traffic to the internet; free shares are not deducted.
Traffic inside one region of AWS is free: who loads there sets its egress to 0 in the configuration.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from weightcache.ledger import Ledger

AS_OF = "2026-11"
LISTED = f"list prices of {AS_OF} to the internet, first tier"
CONFIGURED = "prices set in the configuration"
UNKNOWN = "unknown"
UNPRICED = "no price is known, counted as 0"

GB = 10**9  # as everywhere here; some stores bill 2^30 bytes, which is 7 % less
Overrides = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Price:
    """What a provider asks, in USD: for a GB (10^9 bytes) sent, for 1000 GETs or HEADs, for 1000 listings."""

    provider: str
    egress_usd_per_gb: float = 0.0
    get_usd_per_1000: float = 0.0
    list_usd_per_1000: float = 0.0
    note: str = LISTED


# Listings are of the class of writes; at B2, where writes are free, of class C.
_TABLE = {
    price.provider: price
    for price in (
        Price("aws", 0.09, 0.0004, 0.005),
        Price("gcs", 0.12, 0.0004, 0.005),
        Price("azure", 0.087, 0.0005, 0.0065),
        Price("r2", 0.0, 0.00036, 0.0045),
        Price("tigris", 0.0, 0.0005, 0.005),
        Price("b2", 0.01, 0.0004, 0.004),
    )
}
PROVIDERS = tuple(_TABLE)
KEYS = ("egress_usd_per_gb", "get_usd_per_1000", "list_usd_per_1000")

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


def price_of(place: str, overrides: Overrides) -> Price:
    """Return what traffic from a replica costs.

    Args:
        place: As `ledger.place_of` spells it.
        overrides: Prices by provider or host, as they are configured. Those of a host, the longest that fits, beat those
            of its provider; what one leaves out is taken from the next, at last from the table.
    """
    parts = urlsplit(place)
    host = (parts.hostname or "").lower() if parts.scheme in ("http", "https") else ""
    provider = provider_of(parts.scheme, host)
    listed = _TABLE.get(provider, Price(UNKNOWN, note=UNPRICED))
    hosts = sorted((name for name in overrides if host and _is_below(host, name)), key=len)
    configured = [overrides[name] for name in (provider, *hosts) if name in overrides]
    if not configured:
        return listed
    amounts = {key: getattr(listed, key) for key in KEYS}
    for each in configured:
        amounts |= each
    return Price(hosts[-1] if provider == UNKNOWN else provider, **amounts, note=CONFIGURED)


def cost_usd(ledger: Ledger, price: Price) -> float:
    """Return what was asked of a replica costs."""
    requests = ledger.n_gets * price.get_usd_per_1000 + ledger.n_lists * price.list_usd_per_1000
    return egress_usd(ledger.received_bytes, price) + requests / 1000


def egress_usd(nbytes: int, price: Price) -> float:
    """Return what bytes cost that leave the store."""
    return nbytes / GB * price.egress_usd_per_gb


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
