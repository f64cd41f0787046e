"""Own the questions: which cases answer each, on which model, and what target the answer is held against.

Never measures and never prints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import measuring
from checkpoints import N_HERD
from rows import Judge, Row, Verdict, at_most, little_memory, no_slower
from workshop import Case, CaseFailed, Result, Workshop

HERD_ROUNDS = 3
TRAFFIC_LIMIT = 1.01  # the listing's XML comes on top of the bytes of files and headers
HERD_LIMIT = 1.05
PLAN_LIMIT_S = 0.5
BIND_LIMIT_S = 0.020

OURS_FOLDER = "weightcache, folder in place"
OURS_TIER = "weightcache, disk tier"
OURS_OFFLINE = "weightcache, disk tier, offline"
OURS_COLD = "weightcache, cold"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came out: rows by case, verdicts, why cases failed, which is a miss each, or why nothing could be asked."""

    rows: Mapping[str, Row]
    verdicts: list[Verdict]
    failures: Mapping[str, str] = field(default_factory=dict)
    obstacle: str = ""


class Question(Protocol):
    """Something to find out."""

    name: str
    asks: str
    model: str

    def answer(self, workshop: Workshop, repeats: int, say: Say) -> Answer:
        """Run what it takes."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Cases against each other: interleaved, each round begun by another case, the first rounds thrown away.

    A case that fails takes no part in later rounds.

    Attributes:
        obstacle: Says why it cannot be asked on this machine; empty where it can.
    """

    name: str
    asks: str
    model: str
    cases: tuple[Case, ...]
    judges: tuple[Judge, ...]
    n_thrown_away: int = 1
    obstacle: Callable[[], str] = str

    def answer(self, workshop: Workshop, repeats: int, say: Say) -> Answer:
        if obstacle := self.obstacle():
            return Answer({}, [], obstacle=obstacle)
        cases = [case for case in self.cases if case.is_installed]
        for case in self.cases:
            if not case.is_installed:
                say(f"{self.name}: {case.name} skipped: no {case.needs.lstrip(':')} here (install it to compare)")
        results: dict[str, list[Result]] = {case.name: [] for case in cases}
        failures: dict[str, str] = {}
        for number in range(self.n_thrown_away + repeats):
            first = number % len(cases)
            for case in cases[first:] + cases[:first]:
                if case.name in failures:
                    continue
                try:
                    result = workshop.run(case, self.model)
                except CaseFailed as failed:
                    failures[case.name] = str(failed)
                    say(f"{self.name} round {number}: {case.name} failed: {failed}")
                    continue
                say(f"{self.name} round {number}: {case.name} {result['seconds']:.3f} s")
                if number >= self.n_thrown_away:
                    results[case.name].append(result)
        nbytes = workshop.nbytes(self.model)
        rows = {case.name: Row.of(case.name, nbytes, ran) for case in cases if (ran := results[case.name])}
        return Answer(rows, [verdict for judge in self.judges for verdict in judge(rows)], failures)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Counted by a proxy: a cold load fetches each byte once, a warm one fetches no chunk. Once: counts have no spread."""

    name: str
    asks: str
    model: str

    def answer(self, workshop: Workshop, repeats: int, say: Say) -> Answer:
        cache = workshop.folder / "caches" / self.name
        rows, verdicts = {}, []
        file_bytes = sum(path.stat().st_size for path in measuring.files_below(workshop.model(self.model)))
        for label in ("cold", "warm"):
            case = Case(f"weightcache, {label}, through the proxy", "weightcache", "proxy")
            workshop.proxy.reset()
            result = workshop.run(case, self.model, cache)
            report = result["facts"]["report"]
            everything, chunks = workshop.proxy.body_bytes(), workshop.proxy.body_bytes(r"\.safetensors(\?|$)")
            result["facts"] |= {"proxy_bytes": everything, "proxy_weight_bytes": chunks, "file_bytes": file_bytes}
            result["page_cache"] = f"cache folder {'empty' if label == 'cold' else 'filled by the run before'}"
            rows[case.name] = Row.of(case.name, workshop.nbytes(self.model), [result])
            say(f"{self.name}: {label} {everything} bytes, of weights {chunks}, requests {report['n_requests']}")
            if label == "cold":
                due = file_bytes + report["metadata_bytes"]
                what = f"origin bytes / (file bytes + headers and indexes, {due:,})"
                verdicts.append(Verdict(what, everything / due, TRAFFIC_LIMIT, "x"))
            else:
                verdicts.append(
                    Verdict(f"origin bytes of weights in a warm load ({everything:,} of all)", chunks, 0, " bytes")
                )
        return Answer(rows, verdicts)


@dataclass(frozen=True, slots=True)
class Herd:
    """Counted by a proxy: N_HERD processes that want one model at the same moment, over one empty cache folder."""

    name: str
    asks: str
    model: str

    def answer(self, workshop: Workshop, repeats: int, say: Say) -> Answer:
        case = Case(f"weightcache, {N_HERD} processes at once", "weightcache", "proxy")
        file_bytes = sum(path.stat().st_size for path in measuring.files_below(workshop.model(self.model)))
        rounds: list[Result] = []
        ratios: list[float] = []
        for number in range(min(repeats, HERD_ROUNDS)):
            workshop.proxy.reset()
            results = workshop.run_at_once(case, self.model, N_HERD)
            ratios.append(workshop.proxy.body_bytes() / file_bytes)
            slowest = max(results, key=lambda result: result["seconds"])
            slowest["cpu_s"] = sum(result["cpu_s"] for result in results)
            slowest["stored_cpu_s"] = sum(result["stored_cpu_s"] for result in results)
            slowest["facts"] |= {"origin_ratio": ratios[-1], "seconds": [result["seconds"] for result in results]}
            rounds.append(slowest)
            say(f"{self.name} round {number}: slowest {slowest['seconds']:.3f} s, origin bytes {ratios[-1]:.4f}x")
        rows = {case.name: Row.of(case.name, workshop.nbytes(self.model), rounds)}
        what = f"origin bytes of {N_HERD} processes / file bytes ({file_bytes:,}), worst round"
        return Answer(rows, [Verdict(what, max(ratios), HERD_LIMIT, "x")])


def _from_disk(model: str, page_cache: str) -> Comparison:
    ours = (
        Case(OURS_FOLDER, "weightcache", "folder", page_cache),
        Case(OURS_TIER, "weightcache", "tier", page_cache),
        Case(OURS_OFFLINE, "weightcache_offline", "tier", page_cache),
    )
    touched = Case("load_file, touched", "load_file", "folder", page_cache)
    copied = (
        Case("load_file(pread)", "load_file_pread", "folder", page_cache),
        Case("load_file, cloned", "load_file_cloned", "folder", page_cache),
        Case("runai streamer", "runai_streamer", "folder", page_cache, "runai_model_streamer"),
        Case("fastsafetensors", "fastsafetensors", "folder", page_cache, "fastsafetensors"),
    )
    raw = (Case("raw O_DIRECT, no tensors", "raw_direct", "folder", page_cache),) if page_cache == "cold" else ()
    peer = touched.name if page_cache == "cold" else "load_file, cloned"
    return Comparison(
        name=f"disk-{page_cache}-{model}",
        asks=f"From this disk with a {page_cache} page cache: is weightcache no slower than {peer}?",
        model=model,
        cases=(*ours, touched, *copied, *raw),
        judges=(*(no_slower(case.name, peer) for case in ours), little_memory),
    )


def _from_origin(model: str) -> Comparison:
    peers = (
        Case("boto3 + load_file", "boto3", "origin"),
        Case("s3fs + load_file", "s3fs", "origin"),
        Case("huggingface_hub + load_file", "hub", "origin"),
    )
    return Comparison(
        name=f"origin-{model}",
        asks="From an S3 server on loopback, nothing cached: is weightcache, verifying and storing, no slower?",
        model=model,
        cases=(
            Case(OURS_COLD, "weightcache", "origin"),
            *peers,
            Case("runai streamer", "runai_streamer", "origin", needs="runai_model_streamer_s3"),
            Case("raw GET, no tensors", "raw_get", "origin"),
        ),
        judges=(*(no_slower(OURS_COLD, peer.name) for peer in peers), little_memory),
    )


_PLANNING = (
    Case("plan, nothing known", "plan", "origin"),
    Case("plan, model known", "plan", "tier"),
    Case("bind stage of a warm load", "bind_stage", "tier"),
    Case("binding over a ready image", "bind_views", "tier"),
)

QUESTIONS: tuple[Question, ...] = (
    Traffic("traffic-llama", "Does a cold load fetch each byte once, and a warm one none?", "llama"),
    Traffic("traffic-small", "The same for 6,000 small tensors", "small"),
    Herd("herd", f"Do {N_HERD} processes cost the origin one copy?", "herd"),
    *(_from_disk(model, state) for model in ("llama", "small", "minilm") for state in ("cold", "warm")),
    *(_from_origin(model) for model in ("llama", "small", "minilm")),
    Comparison(
        name="plan-bind-small",
        asks="Are 6,000 tensors planned in half a second and bound in 20 ms?",
        model="small",
        cases=_PLANNING,
        judges=tuple(at_most(case.name, PLAN_LIMIT_S if case.loader == "plan" else BIND_LIMIT_S) for case in _PLANNING),
    ),
)
