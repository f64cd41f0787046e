"""Own what a load says of itself: where its time went, where its bytes came from, what was decided.

Never holds a secret: URIs with credentials are refused before a report exists.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from weightcache import waterfall
from weightcache.ledger import COUNTS, Ledger
from weightcache.spans import MOST, STAGE, Spans


@dataclass(slots=True)
class Report:
    """One load, as it was.

    Attributes:
        uri: The model as it was named.
        revision: The state that was loaded.
        device: Where its tensors lie; empty where none were made.
        n_tensors, tensor_bytes: What was bound.
        seconds: By stage, one after the other: import (torch and the S3 client, once a process), open, describe, look,
            move, bind, files. A stage within another counts as its own alone.
        bytes: By tier they came from: `origin`, `disk`, `host`. Chunks carry small neighbours along and files beside the
            weights count too, so the sum may pass `tensor_bytes`.
        choices: What "auto" or the circumstances decided, each with its reason.
        warnings: Every fallback that was taken.
        n_requests, n_retries: At the origin, headers and listings included.
        replicas: What each replica was asked for that was dialled, by its place: `provider`, `n_gets`, `n_lists`,
            `n_retries`, `n_hedges`, `received_bytes`, `wasted_bytes`, and what that cost, `usd`.
        metadata_bytes: Headers, indexes and the like, read to describe the model.
        stored_bytes: Written to the disk tier behind this load, so far.
        spans: When stages began and ended, and what moved meanwhile, so far.
    """

    uri: str
    revision: str = ""
    device: str = ""
    n_tensors: int = 0
    tensor_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=lambda: {"origin": 0, "disk": 0, "host": 0})
    choices: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    n_requests: int = 0
    n_retries: int = 0
    replicas: dict[str, dict[str, Any]] = field(default_factory=dict)
    metadata_bytes: int = 0
    stored_bytes: int = 0
    spans: Spans = field(default_factory=Spans, repr=False, compare=False)
    _nested_s: float = field(default=0.0, init=False, repr=False, compare=False)  # of stages within the one under way

    @property
    def total_s(self) -> float:
        """Seconds from the call to the last tensor."""
        return sum(self.seconds.values())

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes brought per second of the whole load, imports left out."""
        spent = self.total_s - self.seconds.get("import", 0.0)
        return sum(self.bytes.values()) / 1e9 / spent if spent else 0.0

    @property
    def usd(self) -> float:
        """What was asked of all replicas cost; `choices["price"]` says at which prices."""
        return float(sum(facts["usd"] for facts in self.replicas.values()))

    def enter(self, ledger: Ledger, provider: str, usd: float) -> None:
        """Add what a replica was asked for, and what that cost."""
        facts = self.replicas.setdefault(ledger.replica, {"provider": provider, **dict.fromkeys(COUNTS, 0), "usd": 0.0})
        for name, number in ledger.counts().items():
            facts[name] += number
        facts["usd"] += usd

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of the block as this stage's, but for that of stages within it."""
        began, outer_s = time.perf_counter(), self._nested_s
        self._nested_s = 0.0
        try:
            yield
        finally:
            spent_s = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + spent_s - self._nested_s
            self._nested_s = outer_s + spent_s
            self.spans.note(STAGE, name, began)

    @classmethod
    def from_dict(cls, form: Mapping[str, Any]) -> Report:
        """Read the plain values of another process's report back."""
        names = set(cls.__slots__) - {"seconds", "spans"}
        report = cls(**{name: value for name, value in form.items() if name in names})
        report.seconds = {stage: spent_s for stage, spent_s in form["seconds"].items() if stage != "total"}
        return report

    def trace(self) -> dict[str, Any]:
        """Return the load as a trace, a JSON object that ui.perfetto.dev shows."""
        return waterfall.trace(self.as_dict(n_spans=MOST))

    def html(self) -> str:
        """Return the load as a page of its own: its waterfall, its numbers, and the bottleneck by what it measured itself."""
        return waterfall.page(self.as_dict(n_spans=MOST))

    def as_dict(self, n_spans: int = 0) -> dict[str, Any]:
        """Return the report as plain values, for JSON.

        Args:
            n_spans: Most spans to tell, as `[lane, name, start_s, stop_s, nbytes]`, neighbours joined where there are more.
                Of none, `spans` is left out: 20,000 are a megabyte, and most readers want the sums.
        """
        facts: dict[str, Any] = {
            "uri": self.uri,
            "revision": self.revision,
            "device": self.device,
            "n_tensors": self.n_tensors,
            "tensor_bytes": self.tensor_bytes,
            "seconds": {
                **{name: round(value, 6) for name, value in self.seconds.items()},
                "total": round(self.total_s, 6),
            },
            "bytes": dict(self.bytes),
            "gb_per_s": round(self.gb_per_s, 3),
            "n_requests": self.n_requests,
            "n_retries": self.n_retries,
            "replicas": {place: {**facts, "usd": round(facts["usd"], 9)} for place, facts in self.replicas.items()},
            "usd": round(self.usd, 9),
            "metadata_bytes": self.metadata_bytes,
            "stored_bytes": self.stored_bytes,
            "choices": dict(self.choices),
            "warnings": list(self.warnings),
        }
        if n_spans:
            facts["spans"] = [
                [lane, name, round(start_s, 6), round(stop_s, 6), nbytes]
                for lane, name, start_s, stop_s, nbytes in self.spans.noted(n_spans)
            ]
        return facts
