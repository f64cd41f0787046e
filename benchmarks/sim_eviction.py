"""Answer what eviction by value saves, and what the forecast saves, on simulated nodes.

Questions (each runs alone with `--only`, by the beginning of its name) and their targets:

    zipf, azure, fleet   The bytes that a disk tier misses, and the seconds that loads wait for them, with weightcache's choice
                         of what leaves and four others, on each trace (traces.py): on the fleet's at most 0.9 of LRU's
                         bytes, on the others at most 1.02, with every budget, from the worst seed.
    forecast             The same on the azure trace in a host tier filled from disk, with weightcache's choice, without and
                         with prefetches by the forecast, with a budget of a quarter: at most 0.6 of the cold seconds (median
                         of the seeds), and at most 0.1 of all bytes fetched are fetched ahead and not used (worst seed).
                         Other budgets: told.

    python benchmarks/sim_eviction.py --quick     one seed, one budget
    python benchmarks/sim_eviction.py             five seeds, a quarter of an hour; writes
                                                  benchmarks/results/<date>-eviction.json

All choose for the same tier: whole models leave, and of them what no other model there has; when a load would pass the
budget, until 0.9 of it is reached; what is being loaded stays. Budgets are shares of what is used more than once. A miss
brings what is missing after 0.25 s at 1 Gbit/s, as is assumed of an origin that was never measured, or at 2 GB/s from disk.
Nothing is counted in the first quarter of a trace.

"bound" is Belady's rule byte by byte: parts of a model may leave, what is used last in the future leaves first, and no
watermark is kept. Each byte costs the same, so no choice can miss fewer; of the seconds it is no bound.

With the forecast the node asks once a minute what is due, and fetches it, one model after another, where the choice would
not have it leave again at once. A use while it comes waits for the rest. A load always comes first: it may have any model
leave. Nothing here depends on the machine.
"""

from __future__ import annotations

import argparse
import datetime
import heapq
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import measuring
from policies import POLICIES, Ours, Policy
from rows import Spread, Verdict
from traces import HOUR_S, TRACES, Model, Trace

from weightcache.choosing import ASSUMED_BYTES_PER_S, ASSUMED_LATENCY_S
from weightcache.forecast import Forecast
from weightcache.tiers.eviction import HIGH_WATERMARK, LOW_WATERMARK

SEEDS = (1, 2, 3, 4, 5)
SHARES = (0.1, 0.25, 0.5)  # of what is used more than once
JUDGED_SHARE = 0.25
DISK_BYTES_PER_S = 2e9
TARGETS = {"zipf": 1.02, "azure": 1.02, "fleet": 0.9}  # of LRU's missed bytes
COLD_TARGET = 0.6
WASTE_TARGET = 0.1
UNCOUNTED = 0.25  # of a trace
TICK_S = 60.0
BOUND = "bound"
OURS = "weightcache"
TB = 10**12


Make = Callable[[Mapping[str, Model], int], Policy]


@dataclass
class Count:
    """What a run came to."""

    missed_bytes: int = 0
    cold_s: float = 0.0
    used_bytes: int = 0
    ahead_bytes: int = 0
    wasted_bytes: int = 0


@dataclass
class Tier:
    """A tier of whole models whose parts may be shared."""

    models: Mapping[str, Model]
    budget_bytes: int
    policy: Policy
    there: set[str] = field(default_factory=set)
    owners: dict[str, int] = field(default_factory=dict)
    used_bytes: int = 0

    def missing_bytes(self, key: str) -> int:
        return sum(nbytes for part, nbytes in self.models[key].parts.items() if part not in self.owners)

    def bring(self, key: str, held: Iterable[str], now_s: float) -> list[str]:
        """Take a model in, evicting what it takes of those not held; return who left. It must fit by itself."""
        if key in self.there:
            return []
        self.there.add(key)
        for part, nbytes in self.models[key].parts.items():
            self.used_bytes += 0 if part in self.owners else nbytes
            self.owners[part] = self.owners.get(part, 0) + 1
        gone: list[str] = []
        if self.used_bytes > HIGH_WATERMARK * self.budget_bytes:
            low = int(LOW_WATERMARK * self.budget_bytes)
            others = [each for each in self.there if each != key]
            for victim in self.policy.victims(others, {key, *held}, self.used_bytes - low, now_s):
                self._drop(victim)
                gone.append(victim)
                if self.used_bytes <= low:
                    break
        return gone

    def _drop(self, key: str) -> None:
        self.there.remove(key)
        for part, nbytes in self.models[key].parts.items():
            self.owners[part] -= 1
            if not self.owners[part]:
                del self.owners[part]
                self.used_bytes -= nbytes


def seconds(nbytes: int, bytes_per_s: float = ASSUMED_BYTES_PER_S) -> float:
    return ASSUMED_LATENCY_S + nbytes / bytes_per_s if nbytes else 0.0


def run(trace: Trace, budget_bytes: int, make: Make, bytes_per_s: float = ASSUMED_BYTES_PER_S) -> Count:
    """Play a trace through a tier that fetches what is asked for, when it is."""
    tier = Tier(trace.models, budget_bytes, make(trace.models, budget_bytes))
    count = Count()
    counts_from = UNCOUNTED * trace.uses[-1][0]
    for now_s, key in trace.uses:
        missing = tier.missing_bytes(key)
        if now_s >= counts_from:
            count.missed_bytes += missing
            count.cold_s += seconds(missing, bytes_per_s)
            count.used_bytes += trace.models[key].nbytes
        if trace.models[key].nbytes <= LOW_WATERMARK * budget_bytes:
            tier.bring(key, (), now_s)
            tier.policy.used(key, now_s)
    return count


def run_bound(trace: Trace, budget_bytes: int) -> Count:
    """Play a trace through Belady's rule byte by byte."""
    count = Count()
    counts_from = UNCOUNTED * trace.uses[-1][0]
    coming: dict[str, int] = {}
    next_uses: list[dict[str, int]] = []
    for at in range(len(trace.uses) - 1, -1, -1):
        parts = trace.models[trace.uses[at][1]].parts
        next_uses.append({part: coming.get(part, len(trace.uses)) for part in parts})
        coming |= dict.fromkeys(parts, at)
    here: dict[str, int] = {}
    used_at: dict[str, int] = {}  # next
    farthest: list[tuple[int, str]] = []
    held_bytes = 0
    for (now_s, key), upcoming in zip(trace.uses, reversed(next_uses), strict=True):
        missing = 0
        for part, nbytes in trace.models[key].parts.items():
            missing += nbytes - here.get(part, 0)
            here[part], used_at[part] = nbytes, upcoming[part]
            heapq.heappush(farthest, (-upcoming[part], part))
        held_bytes += missing
        while held_bytes > budget_bytes:
            at, part = farthest[0]
            if part not in here or used_at[part] != -at:
                heapq.heappop(farthest)
                continue
            taken = min(here[part], held_bytes - budget_bytes)
            here[part] -= taken
            held_bytes -= taken
            if not here[part]:
                del here[part]
                heapq.heappop(farthest)
        if now_s >= counts_from:
            count.missed_bytes += missing
            count.cold_s += seconds(missing)
            count.used_bytes += trace.models[key].nbytes
    return count


class Expecting(Ours):
    """weightcache's choice where there is a forecast."""

    def __init__(self, models: Mapping[str, Model], budget_bytes: int, forecast: Forecast) -> None:
        super().__init__(models, budget_bytes)
        self._forecast = forecast

    def expected_per_s(self, key: str, now_s: float) -> float | None:
        return self._forecast.expected_per_s(key, now_s)

    def would_stay(self, key: str, there: Iterable[str], to_free: int, now_s: float) -> bool:
        """Tell whether a model that comes would not be the one to leave again."""
        return to_free <= 0 or key not in self.victims([*there, key], (), to_free, now_s)


def run_forecast(trace: Trace, budget_bytes: int) -> Count:
    """Play a trace through a tier that fetches ahead what a forecast says is due."""
    forecast = Forecast()
    policy = Expecting(trace.models, budget_bytes, forecast)
    tier = Tier(trace.models, budget_bytes, policy)
    count = Count()
    counts_from = UNCOUNTED * trace.uses[-1][0]
    arrives_s: dict[str, float] = {}
    idle_from_s = tick_s = 0.0
    most_bytes = int(LOW_WATERMARK * budget_bytes)

    def note_gone(gone: Iterable[str], now_s: float) -> None:
        for key in gone:
            wasted = forecast.wasted(key, now_s)
            count.wasted_bytes += wasted if now_s >= counts_from else 0

    def prefetch(now_s: float) -> float:
        """Fetch what is due, as long as the link is idle; return when it is idle again."""
        for key in (each.model for each in forecast.due(now_s)):
            missing = tier.missing_bytes(key)
            to_free = tier.used_bytes + missing - budget_bytes
            if not missing or trace.models[key].nbytes > most_bytes:
                continue
            if not policy.would_stay(key, tier.there, to_free + budget_bytes - most_bytes if to_free > 0 else 0, now_s):
                continue
            note_gone(tier.bring(key, (), now_s), now_s)
            forecast.fetched(key, missing, now_s, is_ahead=True)
            count.ahead_bytes += missing if now_s >= counts_from else 0
            arrives_s[key] = now_s + seconds(missing, DISK_BYTES_PER_S)
            return arrives_s[key]
        return now_s

    for now_s, key in trace.uses:
        while tick_s < now_s:
            idle_from_s = max(idle_from_s, tick_s)
            tick_s += TICK_S
            while idle_from_s < min(tick_s, now_s) and (arrives := prefetch(idle_from_s)) > idle_from_s:
                idle_from_s = arrives
        missing = tier.missing_bytes(key)
        if now_s >= counts_from:
            count.missed_bytes += missing
            late_s = max(0.0, arrives_s.get(key, 0.0) - now_s)
            count.cold_s += seconds(missing, DISK_BYTES_PER_S) if missing else late_s
            count.used_bytes += trace.models[key].nbytes
        if missing:
            forecast.fetched(key, missing, now_s, is_ahead=False)
        if trace.models[key].nbytes <= most_bytes:
            note_gone(tier.bring(key, (), now_s), now_s)
            tier.policy.used(key, now_s)
        forecast.used(key, now_s, trace.models[key].base)
    return count


@dataclass
class Result:
    """One question's table, its verdicts, and its rows for the file."""

    lines: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, share: float, case: str, spreads: Mapping[str, Spread]) -> None:
        self.lines.append(f"  {share:>4.0%}  {case:<18}" + "  ".join(f"{each!s:<22}" for each in spreads.values()))
        self.rows.append(
            {"budget_share": share, "case": case, **{name: asdict(spread) for name, spread in spreads.items()}}
        )


def compare(name: str, shares: Sequence[float], seeds: Sequence[int]) -> Result:
    """Play a trace, from each seed, through each policy with each budget."""
    result = Result()
    traces = [TRACES[name](seed) for seed in seeds]
    for share in shares:
        counts: dict[str, list[Count]] = {}
        for case in (*POLICIES, BOUND):
            make = POLICIES.get(case)
            budgets = [int(share * trace.distinct_bytes()) for trace in traces]
            played = zip(traces, budgets, strict=True)
            counts[case] = [run(*each, make) if make else run_bound(*each) for each in played]
            say(f"{name}, budget {share:.0%}: {case} done")
        for case, ran in counts.items():
            of_lru = _ratios(ran, counts["LRU"], "missed_bytes")
            spreads = {
                "missed_share": Spread.of([count.missed_bytes / count.used_bytes for count in ran]),
                "missed_tb": Spread.of([count.missed_bytes / TB for count in ran]),
                "cold_h": Spread.of([count.cold_s / HOUR_S for count in ran]),
                "missed_bytes_of_lru": of_lru,
                "cold_s_of_lru": _ratios(ran, counts["LRU"], "cold_s"),
            }
            result.add(share, case, spreads)
            if case == OURS:
                what = f"missed bytes of weightcache / LRU, {name}, budget {share:.0%}, worst seed"
                result.verdicts.append(Verdict(what, of_lru.high, TARGETS[name], "x"))
    return result


def foretell(name: str, shares: Sequence[float], seeds: Sequence[int]) -> Result:
    """Play the azure trace, from each seed, without and with the forecast, with each budget."""
    result = Result()
    traces = [TRACES["azure"](seed) for seed in seeds]
    for share in shares:
        budgets = [int(share * trace.distinct_bytes()) for trace in traces]
        off = [run(*each, Ours, DISK_BYTES_PER_S) for each in zip(traces, budgets, strict=True)]
        on = [run_forecast(*each) for each in zip(traces, budgets, strict=True)]
        say(f"{name}, budget {share:.0%}: done")
        for case, ran in (("without forecast", off), ("with forecast", on)):
            fetched = [count.missed_bytes + count.ahead_bytes for count in ran]
            spreads = {
                "missed_tb": Spread.of([count.missed_bytes / TB for count in ran]),
                "ahead_tb": Spread.of([count.ahead_bytes / TB for count in ran]),
                "cold_h": Spread.of([count.cold_s / HOUR_S for count in ran]),
                "cold_s_of_without": _ratios(ran, off, "cold_s"),
                "wasted_share": Spread.of([c.wasted_bytes / total for c, total in zip(ran, fetched, strict=True)]),
            }
            result.add(share, case, spreads)
        is_judged = share == JUDGED_SHARE
        for what, number, target in (
            ("cold seconds with / without forecast, median", spreads["cold_s_of_without"].median, COLD_TARGET),
            ("of all bytes fetched, those in vain, worst seed", spreads["wasted_share"].high, WASTE_TARGET),
        ):
            result.verdicts.append(
                Verdict(f"{what}, budget {share:.0%}", number, target if is_judged else None, unit="x")
            )
    return result


def _ratios(ran: Sequence[Count], others: Sequence[Count], name: str) -> Spread:
    return Spread.of([getattr(one, name) / getattr(other, name) for one, other in zip(ran, others, strict=True)])


QUESTIONS = dict.fromkeys(TRACES, compare) | {"forecast": foretell}
HEAD = {
    compare: ("missed of all bytes", "missed, TB", "cold, h", "missed / LRU's", "cold / LRU's"),
    foretell: ("missed, TB", "fetched ahead, TB", "cold, h", "cold / without", "wasted of all fetched"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], epilog=f"questions: {', '.join(QUESTIONS)}"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, one budget")
    parser.add_argument("--only", default="", metavar="NAME", help="only the questions whose names begin so")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all rows there, too")
    arguments = parser.parse_args()
    if not arguments.quick and not arguments.only:
        today = datetime.datetime.now(datetime.UTC).date()
        arguments.out = arguments.out or Path(__file__).parent / "results" / f"{today}-eviction.json"
    seeds, shares = ((1,), (JUDGED_SHARE,)) if arguments.quick else (SEEDS, SHARES)
    common = {"commit": measuring.describe_commit(measuring.REPOSITORY), "seeds": seeds, "quick": arguments.quick}
    print(f"commit {common['commit']}, seeds {seeds}: median (lowest–highest)\n")
    rows: list[dict[str, Any]] = []
    n_misses = 0
    for name, answer in QUESTIONS.items():
        if not name.startswith(arguments.only):
            continue
        result = answer(name, shares, seeds)
        head = "  ".join(f"{each:<26}" for each in HEAD[answer])
        print("\n".join([name, f"  {'':<24}{head}", *result.lines, *map(str, result.verdicts), ""]), flush=True)
        n_misses += sum(not verdict.passed for verdict in result.verdicts)
        about = {**common, "question": name}
        rows += [about | row for row in result.rows]
        rows.append(about | {"verdicts": [verdict.as_dict() for verdict in result.verdicts]})
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{n_misses} targets missed")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
