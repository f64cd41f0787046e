"""Own the audit log: the rulings on this node's ways of bytes, a line each in the cache folder.

Never fails a load, and never holds a secret: an edge's names have none.

    audit/YYYY-MM.jsonl         the rulings of one month (UTC), a JSON object a line; see journal.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from weightcache.journal import Journal, as_count, as_text
from weightcache.policy import Edge, Ruling, Verb
from weightcache.residency import Site

LINE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A ruling, when it was written (seconds since the epoch), and how often it was made in one load."""

    time_s: float
    ruling: Ruling
    n_times: int = 1

    def to_line(self) -> bytes:
        edge = self.ruling.edge
        form = {
            "v": LINE_VERSION,
            "time": datetime.fromtimestamp(int(self.time_s), UTC).isoformat(),
            "verb": str(edge.verb),
            "model": edge.model,
            "source": _end_to_form(edge.source_name, edge.source),
            "target": _end_to_form(edge.target_name, edge.target),
            "allowed": self.ruling.allowed,
            "rule": self.ruling.rule,
            "n_times": self.n_times,
        }
        return json.dumps(form, separators=(",", ":")).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Entry:
        """Read a line. Raises ValueError, TypeError, KeyError or RecursionError for what `to_line` did not write."""
        form = json.loads(line)
        if form["v"] != LINE_VERSION:
            raise ValueError(f"version {form['v']!r}")
        if not isinstance(form["allowed"], bool):
            raise TypeError("not a flag")
        source_name, source = _end_from_form(form["source"])
        target_name, target = _end_from_form(form["target"])
        edge = Edge(Verb(form["verb"]), as_text(form["model"]), source, target, source_name, target_name)
        time_s = datetime.fromisoformat(as_text(form["time"])).timestamp()
        return cls(time_s, Ruling(edge, form["allowed"], as_text(form["rule"])), as_count(form["n_times"]))


def _end_to_form(name: str, site: Site) -> dict[str, str]:
    return {"name": name, "provider": site.provider, "region": site.region, "jurisdiction": site.jurisdiction}


def _end_from_form(form: Any) -> tuple[str, Site]:
    site = Site(as_text(form["provider"]), as_text(form["region"]), as_text(form["jurisdiction"]))
    return as_text(form["name"]), site


_JOURNAL = Journal("audit", "what policies allowed and forbade", Entry.from_line)


def append(root: Path, rulings: Iterable[Ruling], now_s: float) -> None:
    """Write the rulings of one load into the log of a cache folder, equal ones once; what goes wrong is logged once."""
    _JOURNAL.append(root, [Entry(now_s, ruling, n_times) for ruling, n_times in Counter(rulings).items()])


def read(root: Path, since_s: float = 0.0) -> Iterator[Entry]:
    """Yield the entries of a cache folder from a moment on; lines that are torn or foreign are left out, with a warning."""
    return _JOURNAL.read(root, since_s)
