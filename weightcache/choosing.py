"""Own the choice among replicas: in which order to ask them, and why. Pure.

Never asks a replica that policy does not allow: those are not handed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ASSUMED_LATENCY_S = 0.25  # of a replica that was never asked: another continent's
ASSUMED_BYTES_PER_S = 125e6  # 1 Gbit/s; what was never measured is tried before what is known to be slow
EQUAL_SHARE = 1.25  # replicas whose estimates differ by less are equally fast, and the cheaper one is asked
GB = 10**9


@dataclass(frozen=True, slots=True)
class Candidate:
    """A replica that may be asked.

    Attributes:
        name: Of the replica.
        latency_s: To the first byte of an answer; None where it was never measured.
        bytes_per_s: Of whole loads from it; None where it was never measured.
        usd_per_gb: What a GB costs that leaves it.
        is_healthy: Whether it answered rightly of late.
        is_slow: Whether it was left of late because it had become slow.
    """

    name: str
    latency_s: float | None = None
    bytes_per_s: float | None = None
    usd_per_gb: float = 0.0
    is_healthy: bool = True
    is_slow: bool = False

    def seconds(self, nbytes: int) -> float:
        """Return how long so many bytes are expected to take."""
        latency_s = ASSUMED_LATENCY_S if self.latency_s is None else self.latency_s
        return latency_s + nbytes / (self.bytes_per_s or ASSUMED_BYTES_PER_S)

    def describe(self, nbytes: int) -> str:
        """Say what is known of it."""
        if not self.is_healthy:
            return f"{self.name}: does not answer"
        latency = "? ms" if self.latency_s is None else f"{self.latency_s * 1000:.0f} ms"
        rate = "? MB/s" if self.bytes_per_s is None else f"{self.bytes_per_s / 1e6:.0f} MB/s"
        slow = ", slow just now" if self.is_slow else ""
        price = f"{self.usd_per_gb * nbytes / GB:.4g} USD"
        return f"{self.name}: {latency}, {rate}, {self.seconds(nbytes):.3g} s, {price}{slow}"


def rank(candidates: Sequence[Candidate], nbytes: int) -> list[Candidate]:
    """Return the candidates in the order in which they are to be asked.

    Healthy ones first, then those that are not slow just now; of these the fastest for so many bytes, but of those that are
    about as fast as it the cheapest.
    """
    rest = list(candidates)
    ranked: list[Candidate] = []
    while rest:
        usable = [each for each in rest if each.is_healthy and not each.is_slow]
        usable = usable or [each for each in rest if each.is_healthy] or rest
        fastest = min(each.seconds(nbytes) for each in usable)
        equal = [each for each in usable if each.seconds(nbytes) <= fastest * EQUAL_SHARE]
        best = min(equal, key=lambda each: (each.usd_per_gb, each.seconds(nbytes), each.name))
        ranked.append(best)
        rest.remove(best)
    return ranked


def explain(ranked: Sequence[Candidate], nbytes: int) -> str:
    """Say which replica is asked first, and what was known of it and of the others."""
    told = "; ".join(each.describe(nbytes) for each in ranked)
    return f"{ranked[0].name} of {len(ranked)} allowed ({told})"
