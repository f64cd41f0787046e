"""Own the traces of simulated nodes: which models there are, what they share, and when each is used.

Never simulates a tier, and draws everything from a seed.

    zipf    300 models of 0.5 to 140 GB (log-normal, median 8 GB); uses come at random (Poisson, 20 an hour for 60 days) and
            fall on models by Zipf's law, exponent 0.9, whatever their size.
    azure   100 models of 1 to 80 GB (log-normal, median 12 GB), two weeks. How often, after Shahrad et al., "Serverless in the
            Wild" (USENIX ATC 2020), section 3: 45 % of applications are used at most once an hour on average, 81 % at most
            once a minute, over many orders of magnitude; here evenly on a logarithmic scale from once a week, and cut at
            once in 10 minutes, since a model in steady use is not loaded anew. How evenly: the paper finds timers, Poisson
            arrivals and much more irregular ones side by side; the shares are ours: 30 % timers (a period from 10 minutes to
            a day, jittered by 2 %), 30 % Poisson by the time of day (twice as many at noon, none at midnight), 40 % sessions
            of 2 to 14 uses with log-normal pauses.
    fleet   8 bases of 4 to 30 GB, 40 fine-tunes of each at any time, which have 90 % of their bytes from the base, 30 days.
            Uses (15 an hour) fall on bases and on fine-tunes by Zipf's law, exponent 1.0; a base itself has 5 % of its
            family's. Every week a quarter of the fine-tunes is replaced by newer ones. Every night 80 new fine-tunes are
            evaluated within 3 hours, each once, and never used again: 60 of the fleet's bases, 20 of bases nobody else uses.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

GB = 10**9
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
SHARED = 0.9  # of a fine-tune's bytes are its base's
PERIODS_S = [60.0 * minutes for minutes in (10, 15, 20, 30, 60, 120, 180, 240, 360, 480, 720, 1440, 1440)]


@dataclass(frozen=True, slots=True)
class Model:
    """A model: its parts, by the name by which others share them, and the base it was made from, or none."""

    parts: Mapping[str, int]
    base: str = ""

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Trace:
    """Models by name, and their uses (seconds, name), in order."""

    name: str
    models: Mapping[str, Model]
    uses: tuple[tuple[float, str], ...]

    def distinct_bytes(self) -> int:
        """Return what a tier would need to hold everything that is used more than once."""
        seen: set[str] = set()
        again: set[str] = set()
        for _, key in self.uses:
            (again if key in seen else seen).add(key)
        return sum({part: nbytes for key in again for part, nbytes in self.models[key].parts.items()}.values())


def zipf(seed: int) -> Trace:
    draw = random.Random(seed)
    models = {f"m{number}": Model({f"m{number}": _size(draw, 8, 1.0, 0.5, 140)}) for number in range(300)}
    names = draw.sample(sorted(models), len(models))
    weights = [1 / (rank + 1) ** 0.9 for rank in range(len(names))]
    times = list(_poisson(draw, 20 / HOUR_S, 60 * DAY_S))
    return Trace("zipf", models, tuple(zip(times, draw.choices(names, weights, k=len(times)), strict=True)))


def azure(seed: int) -> Trace:
    draw = random.Random(seed)
    models: dict[str, Model] = {}
    uses: list[tuple[float, str]] = []
    for number in range(100):
        name = f"m{number}"
        models[name] = Model({name: _size(draw, 12, 0.9, 1, 80)})
        a_day = _between(draw, 1 / 7, 24) if draw.random() < 0.45 else _between(draw, 24, 144)
        kind = draw.random()
        if kind < 0.3:
            times = _timer(draw, DAY_S / a_day)
        elif kind < 0.6:
            times = _daily(draw, a_day / DAY_S)
        else:
            times = _sessions(draw, a_day / DAY_S)
        uses += [(at_s, name) for at_s in times]
    return Trace("azure", models, tuple(sorted(uses)))


def fleet(seed: int) -> Trace:
    draw = random.Random(seed)
    models: dict[str, Model] = {}

    def tune(name: str, base: str, base_bytes: int) -> None:
        shared = {f"{base}:shared": int(SHARED * base_bytes)}
        models[name] = Model(shared | {name: base_bytes - int(SHARED * base_bytes)}, base)

    bases = {f"base{number}": _size(draw, 12, 0.6, 4, 30) for number in range(8)}
    families: dict[str, list[str]] = {}
    for base, nbytes in bases.items():
        tune(base, base, nbytes)
        models[base] = Model(models[base].parts)
        families[base] = [f"{base}-tune{number}" for number in range(40)]
        for name in families[base]:
            tune(name, base, nbytes)
    uses: list[tuple[float, str]] = []
    n_made = 0
    for week in range(5):
        for base, family in families.items() if week else ():
            for at in draw.sample(range(len(family)), len(family) // 4):
                n_made += 1
                family[at] = f"{base}-newer{n_made}"
                tune(family[at], base, bases[base])
        names = [name for family in families.values() for name in family]
        draw.shuffle(names)
        weights = [1 / (rank + 1) for rank in range(len(names))]
        names += bases
        weights += [0.05 * sum(weights) / len(bases)] * len(bases)
        times = list(_poisson(draw, 15 / HOUR_S, min(7, 30 - 7 * week) * DAY_S))
        uses += zip((week * 7 * DAY_S + at for at in times), draw.choices(names, weights, k=len(times)), strict=True)
    for night in range(30):
        for number in range(80):
            base, nbytes = draw.choice(sorted(bases.items()))
            if number >= 60:
                base, nbytes = f"odd{night}-{number}", _size(draw, 12, 0.6, 4, 30)
            name = f"scan{night}-{number}"
            tune(name, base, nbytes)
            uses.append((night * DAY_S + (1 + 3 * number / 80) * HOUR_S, name))
    return Trace("fleet", models, tuple(sorted(uses)))


TRACES = {trace.__name__: trace for trace in (zipf, azure, fleet)}


def _size(draw: random.Random, median_gb: float, sigma: float, least_gb: float, most_gb: float) -> int:
    return int(GB * min(max(draw.lognormvariate(math.log(median_gb), sigma), least_gb), most_gb))


def _between(draw: random.Random, low: float, high: float) -> float:
    """Draw evenly on a logarithmic scale."""
    return math.exp(draw.uniform(math.log(low), math.log(high)))


def _poisson(draw: random.Random, per_s: float, until_s: float) -> Iterator[float]:
    at_s = draw.expovariate(per_s)
    while at_s < until_s:
        yield at_s
        at_s += draw.expovariate(per_s)


def _timer(draw: random.Random, period_s: float) -> Iterator[float]:
    period_s = min(PERIODS_S, key=lambda each: abs(math.log(each / period_s)))
    at_s = draw.uniform(0, period_s)
    while at_s < 14 * DAY_S:
        yield max(0.0, at_s + draw.gauss(0, 0.02) * period_s)
        at_s += period_s


def _daily(draw: random.Random, per_s: float) -> Iterator[float]:
    for at_s in _poisson(draw, 2 * per_s, 14 * DAY_S):
        if draw.random() < (1 - math.cos(2 * math.pi * at_s / DAY_S)) / 2:
            yield at_s


def _sessions(draw: random.Random, per_s: float) -> Iterator[float]:
    mean_n = 8.0
    pause_s = mean_n / per_s
    at_s = draw.uniform(0, pause_s)
    while at_s < 14 * DAY_S:
        for _ in range(draw.randint(2, 14)):
            yield at_s
            at_s += draw.expovariate(1 / min(600.0, pause_s / 20))
        at_s += draw.lognormvariate(math.log(pause_s) - 0.5, 1.0)
