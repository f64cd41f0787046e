"""Own what this node's loads have cost: a line a load and replica in the cache folder, and its sums.

Never fails a load, and never holds a secret: what cannot be written is logged once, and left out of the sums.

    ledger/YYYY-MM.jsonl        the loads of one month (UTC), a JSON object a line; see journal.py
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from weightcache import meters
from weightcache.config import read_settings
from weightcache.errors import ConfigError, nearest
from weightcache.journal import Journal, as_count, as_text
from weightcache.ledger import COUNTS, Ledger
from weightcache.prices import Price, cost_usd, egress_usd
from weightcache.report import Report

LINE_VERSION = 1
KINDS = ("replica", "model", "month")
_DAY_S = 86400
_UNITS_S = {"h": 3600, "d": _DAY_S, "w": 7 * _DAY_S}


@dataclass(frozen=True, slots=True)
class Entry:
    """What one load asked of one replica, and what that cost.

    Attributes:
        time_s: When it was done, since the epoch.
        uri: The model.
        provider: Whose store the replica is at.
        prices: Where the prices are from.
        ledger: What was counted.
        usd: What it cost.
        saved_bytes: Came from this node's tiers instead; of several replicas, the first has them.
        saved_usd: What it would have cost that these bytes leave the store; requests are not guessed.
    """

    time_s: float
    uri: str
    provider: str
    prices: str
    ledger: Ledger
    usd: float
    saved_bytes: int = 0
    saved_usd: float = 0.0

    def to_line(self) -> bytes:
        form = {
            "v": LINE_VERSION,
            "time": datetime.fromtimestamp(int(self.time_s), UTC).isoformat(),
            "uri": self.uri,
            "replica": self.ledger.replica,
            "provider": self.provider,
            "prices": self.prices,
            **self.ledger.counts(),
            "usd": self.usd,
            "saved_bytes": self.saved_bytes,
            "saved_usd": self.saved_usd,
        }
        return json.dumps(form, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Entry:
        """Read a line. Raises ValueError, TypeError, KeyError or RecursionError for what `to_line` did not write."""
        form = json.loads(line)
        if form["v"] != LINE_VERSION:
            raise ValueError(f"version {form['v']!r}")
        return cls(
            time_s=datetime.fromisoformat(as_text(form["time"])).timestamp(),
            uri=as_text(form["uri"]),
            provider=as_text(form["provider"]),
            prices=as_text(form["prices"]),
            ledger=Ledger(as_text(form["replica"]), **{name: as_count(form.get(name, 0)) for name in COUNTS}),
            usd=_amount(form["usd"]),
            saved_bytes=as_count(form["saved_bytes"]),
            saved_usd=_amount(form["saved_usd"]),
        )


def _amount(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError("not an amount")
    return float(value)


_JOURNAL = Journal("ledger", "what loads cost", Entry.from_line)


def bill(
    uri: str, ledgers: Sequence[Ledger], saved_bytes: int, price_of: Callable[[str], Price], now_s: float
) -> list[Entry]:
    """Price what a load asked for: an entry for each replica that was asked for anything.

    Args:
        price_of: Returns the price of a replica's place.
    """
    entries: list[Entry] = []
    for ledger in ledgers:
        if ledger.n_requests:
            price = price_of(ledger.replica)
            saved = 0 if entries else saved_bytes
            usd, saved_usd = cost_usd(ledger, price), egress_usd(saved, price)
            counted = replace(ledger)
            entries.append(Entry(now_s, uri, price.provider, price.note, counted, usd, saved, saved_usd))
    return entries


def enter(entries: Sequence[Entry], report: Report) -> None:
    """Enter what a load asked for into its report and the process's counters."""
    for entry in entries:
        report.enter(entry.ledger, entry.provider, entry.usd)
        replica, counts = entry.ledger.replica, entry.ledger
        meters.add("weightcache_origin_requests_total", counts.n_gets, replica=replica, kind="get")
        meters.add("weightcache_origin_requests_total", counts.n_lists, replica=replica, kind="list")
        meters.add("weightcache_origin_retries_total", counts.n_retries, replica=replica)
        meters.add("weightcache_origin_hedges_total", counts.n_hedges, replica=replica)
        meters.add("weightcache_origin_bytes_total", counts.received_bytes, replica=replica)
        meters.add("weightcache_origin_wasted_bytes_total", counts.wasted_bytes, replica=replica)
        meters.add("weightcache_origin_usd_total", entry.usd, replica=replica)
    if entries:
        told = dict.fromkeys(f"{entry.provider}: {entry.prices}" for entry in entries)
        report.choices["price"] = "; ".join(told)


def append(root: Path, entries: Sequence[Entry]) -> None:
    """Write entries of one time into the ledger of a cache folder; what goes wrong is logged, once a process."""
    _JOURNAL.append(root, entries)


def read(root: Path, since_s: float = 0.0) -> Iterator[Entry]:
    """Yield the entries of a cache folder from a moment on; lines that are torn or foreign are left out, with a warning."""
    return _JOURNAL.read(root, since_s)


@dataclass(frozen=True, slots=True)
class Cost:
    """What was asked of origins, and its price: of one replica, model or month, which `name` is.

    Attributes:
        n_gets, n_lists, n_retries, n_hedges: Requests, as in `model.report.replicas`.
        received_bytes: Of bodies; `wasted_bytes` of them were of no use.
        usd: At the prices that held when each load was made.
        saved_bytes: Came from this node's tiers instead, and would have cost `saved_usd` to leave the store.
        prices: Where the prices are from, each once.
    """

    name: str
    n_gets: int = 0
    n_lists: int = 0
    n_retries: int = 0
    n_hedges: int = 0
    received_bytes: int = 0
    wasted_bytes: int = 0
    usd: float = 0.0
    saved_bytes: int = 0
    saved_usd: float = 0.0
    prices: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"prices": list(self.prices)}


def cost(since: str | None, by: str) -> list[Cost]:
    """Sum up the ledger of the cache folder; see `weightcache.cost`."""
    if by not in KINDS:
        raise ConfigError(f"by={by!r}: expected one of {', '.join(KINDS)}{nearest(by, KINDS)}")
    since_s = read_since(since, time.time()) if since is not None else 0.0
    costs: dict[str, Cost] = {}
    for entry in read(read_settings().dir, since_s):
        name = _name(entry, by)
        costs[name] = _add(costs.get(name, Cost(name)), entry)
    if by == "month":
        return sorted(costs.values(), key=lambda cost: cost.name)
    return sorted(costs.values(), key=lambda cost: (-cost.usd, -cost.received_bytes, cost.name))


def read_since(text: str, now_s: float) -> float:
    """Read a moment: an age (`7d`, `12h`, `2w`), or the month or day (UTC) that it begins. Raises ConfigError."""
    age = re.fullmatch(r"(\d{1,5})([hdw])", text)
    if age:
        return max(0.0, now_s - int(age[1]) * _UNITS_S[age[2]])
    try:
        form = {7: "%Y-%m", 10: "%Y-%m-%d"}[len(text)]
        return max(0.0, datetime.strptime(text, form).replace(tzinfo=UTC).timestamp())
    except (KeyError, ValueError) as exc:
        raise ConfigError(f"since={text!r}: expected an age such as 7d, a month such as 2026-11 or a day") from exc


def _name(entry: Entry, by: str) -> str:
    if by == "month":
        return datetime.fromtimestamp(entry.time_s, UTC).strftime("%Y-%m")
    return entry.uri if by == "model" else entry.ledger.replica


def _add(cost: Cost, entry: Entry) -> Cost:
    return Cost(
        cost.name,
        **{count: getattr(cost, count) + number for count, number in entry.ledger.counts().items()},
        usd=cost.usd + entry.usd,
        saved_bytes=cost.saved_bytes + entry.saved_bytes,
        saved_usd=cost.saved_usd + entry.saved_usd,
        prices=cost.prices if entry.prices in cost.prices else (*cost.prices, entry.prices),
    )
