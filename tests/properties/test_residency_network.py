"""Residency, on a network that is a spy: whatever policies say and whatever fails, no dial goes where none may go.

The oracle is naive. It knows the written policies and sites, and which of the policies are known when a file of a registry
is asked for; it knows nothing of how replicas are chosen, tried again or asked beside.

CI runs N_CASES; all 20,000 by hand: RESIDENCY_CASES=20000.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from reference_residency import PolicyForm, SiteForm, may_lie
from spy_network import FAULTS, Dial, Network, Spot, SpyOrigin
from strategies import HOME, examples, rules, site_forms, sites
from tiny_registry import CHUNKS, CONTENTS, NBYTES, SIZES, TAG, registry_files
from turned_clock import make_loop

import weightcache.cache as conductor
from weightcache import access, audit, errors, opening, registries, session
from weightcache.config import Settings
from weightcache.origins import resilient
from weightcache.policy import Ruling, Verb
from weightcache.policy import authorize as real_authorize
from weightcache.registry import ABOUT, tag_name
from weightcache.report import Report
from weightcache.residency import Policy, Site
from weightcache.runtime import Runtime
from weightcache.session import Request
from weightcache.stores import Replica, Store

N_CASES = int(os.environ.get("RESIDENCY_CASES", "2000"))
CDNS: Mapping[str, SiteForm] = {  # what redirects lead to: nothing is known of a host but what its name says
    "cdn.r2.dev": {"provider": "r2", "region": "", "jurisdiction": ""},
    "cdn.example": {"provider": "", "region": "", "jurisdiction": ""},
}
# Whom fail-overs, hedges and probes may ask is settled when a store is opened: they are never refused.
REFUSED = (Verb.READ, Verb.PREFETCH, Verb.REDIRECT, Verb.PUBLISH, Verb.REPLICATE)
STRANGER = "stranger.example"  # a host that is not configured

# -- cases


@dataclass
class StoreCase:
    """A store: its own rules, those of its registry, and its replicas; those in `writable` are written to."""

    name: str
    rules: PolicyForm
    registry: PolicyForm
    spots: list[Spot]
    writable: Sequence[bool]
    prices: Sequence[float]

    @property
    def written_to(self) -> list[Spot]:
        return [spot for spot, writable in zip(self.spots, self.writable, strict=True) if writable]

    @property
    def publish_to(self) -> Spot | None:
        return next(iter(self.written_to), None)

    def configured(self) -> Store:
        replicas = tuple(
            Replica(name_of(spot), spot.url, "", Site(**spot.site), price, is_writable=writable)
            for spot, writable, price in zip(self.spots, self.writable, self.prices, strict=True)
        )
        names = [replica.name for replica in replicas if replica.is_writable]
        return Store(self.name, replicas, Policy.from_form(self.rules, "a test"), (), names[0] if names else "")


@dataclass
class Case:
    """A node, two stores with the same models, and what is done: `publish` copies from `other` to `prod`.

    Attributes:
        model: Which one; empty is all, which can be replicated.
        given_rules: The policy that is published.
        to: The number of the replica that is replicated to, or repaired; where there is no such, all are replicated to.
    """

    node: SiteForm
    rules: PolicyForm
    prod: StoreCase
    other: StoreCase
    models: Mapping[str, PolicyForm]
    verb: str
    model: str
    given_rules: PolicyForm | None
    to: int

    @property
    def target(self) -> Spot | None:
        return self.prod.spots[self.to] if self.to < len(self.prod.spots) else None

    def settings(self) -> Settings:
        return Settings(
            dir=Path("/dev/null/none"),
            node=Site(**self.node),
            policy=Policy.from_form(self.rules, "a test"),
            redirect_hosts=tuple(CDNS),
            stores={each.name: each.configured() for each in (self.prod, self.other)},
        )


# Few draws, which cost more than what is tested.
_faults = st.sampled_from(
    [("ok", 0, "", STRANGER)] * 300
    + list(
        product(
            (*FAULTS, "slow", "stall", "redirect", "redirect", "empty", "half"),
            (0, 0, 0, 1, 3, 5, 8, 9, 10, 11),
            ("", "", "chunks/", "models/"),
            (*CDNS, STRANGER),
        )
    )
)
_replicas = st.tuples(sites, _faults, st.sampled_from(list(product((False, True, True), (0.0, 0.02, 0.09)))))


@st.composite
def stores(draw: st.DrawFn, name: str, least: int, most: int) -> StoreCase:
    given = draw(st.lists(_replicas, min_size=least, max_size=most))
    spots = [
        Spot(f"{name}{number}.example", site, fault=fault, since=since, below=below, leads_to=leads_to)
        for number, (site, (fault, since, below, leads_to), _) in enumerate(given)
    ]
    return StoreCase(name, draw(rules), draw(rules), spots, *zip(*(each for _, _, each in given), strict=True))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    verb = draw(st.sampled_from(("load",) * 4 + ("prefetch", "plan") + ("publish", "replicate", "repair") * 2))
    prod = draw(stores("prod", 2 if verb in ("replicate", "repair") else 1, 6))
    case = Case(
        node=draw(sites),
        rules=draw(rules),
        prod=prod,
        other=draw(stores("other", 1, 2 if verb == "publish" else 1)),
        models={model: draw(rules) for model in CONTENTS},
        verb=verb,
        model=draw(st.sampled_from((*CONTENTS, "") if verb == "replicate" else tuple(CONTENTS))),
        given_rules=draw(st.one_of(st.none(), rules)),
        to=draw(st.integers(1, len(prod.spots))),
    )
    if verb in ("publish", "replicate", "repair") and draw(st.booleans()):
        prepare(case, draw(site_forms), draw(st.booleans()))
    return case


def prepare(case: Case, site: SiteForm, is_source: bool) -> None:
    """Let nothing decide on a copy but what the registry and its models say, and where its target or source lies."""
    case.node, case.rules, case.prod.rules = HOME, {}, {}
    case.to = case.to % len(case.prod.spots) or 1
    case.prod.writable = (True,) * len(case.prod.spots)
    case.prod.spots[0].fault = case.other.spots[0].fault = "ok"
    ends = [case.other.spots[0], case.prod.spots[0]] if case.verb == "publish" else case.prod.spots[: case.to + 1]
    ends[-1].site, ends[0].site = (HOME, site) if is_source else (site, HOME)
    if case.verb != "publish":
        case.prod.spots[case.to].fault = "empty" if case.verb == "replicate" else "half"


# -- the network in place of the world


class Inline(Executor):
    """Does what it is given at once."""

    def submit(self, work: Callable[..., Any], /, *arguments: Any, **more: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*arguments, **more))
        except BaseException as exc:
            future.set_exception(exc)
        return future


class TurnedRuntime(Runtime):
    """A runtime without threads, on a loop whose clock is turned."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.n_workers = 1
        self.workers = self.writers = Inline()  # type: ignore[assignment]
        self.run = runner.run  # type: ignore[method-assign]


@dataclass
class World:
    """What the package sees of the world, and what it writes of its rulings."""

    settings: Settings = field(default_factory=lambda: Settings(Path("/dev/null/none")))
    network: Network = field(default_factory=lambda: Network([]))
    audited: list[Ruling] = field(default_factory=list)
    mutant: tuple[Verb, str] | None = None  # ways of this verb are not ruled on, or all let through

    def begin(self, case: Case) -> None:
        for store in (case.prod, case.other):
            for spot in store.spots:
                # Half of what is published is there already.
                there = ["tuned"] if case.verb == "publish" and store is case.prod else list(case.models)
                files = registry_files(store.registry, {model: case.models[model] for model in there})
                lost = {"empty": set(files), "half": {name for name in files if name[-1] in "02468ace"}}
                spot.files = {name: files[name] for name in files.keys() - lost.get(spot.fault, set())}
        self.settings = case.settings()
        self.network = Network([*case.prod.spots, *case.other.spots])
        self.audited = []

    def authorize(self, edge: Any, policies: Any, note: Callable[[Ruling], object]) -> Ruling | None:
        if self.mutant == (edge.verb, "not ruled on"):
            return None
        if self.mutant == (edge.verb, "let through"):
            policies = []

        def noted(ruling: Ruling) -> None:
            self.network.events.append(ruling)
            note(ruling)

        return real_authorize(edge, policies, noted)


@contextmanager
def silence() -> Iterator[None]:
    """Keep warnings of thousands of faults out of the record of a failure."""
    log = logging.getLogger("weightcache")
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()

    def make(name: Any, settings: Settings, options: Any, threads: Any, access: Any) -> SpyOrigin:
        return SpyOrigin(world.network, name.root, opening._wiring(name, settings, options, access))

    with pytest.MonkeyPatch.context() as patch, silence(), asyncio.Runner(loop_factory=make_loop) as runner:
        threads = TurnedRuntime(runner)
        for module in (session, registries):
            patch.setattr(module, "read_settings", lambda: world.settings)
            patch.setattr(module, "runtime", lambda n_threads: threads)
        patch.setattr(opening, "make_origin", make)
        patch.setattr(opening, "_make_writable", make)
        patch.setattr(access, "authorize", world.authorize)
        patch.setattr(audit, "append", lambda root, rulings, now_s: world.audited.extend(rulings))
        patch.setattr(resilient, "PIECE_NBYTES", 256)
        yield world


# -- the oracle


def fits(case: Case, site: SiteForm, forms: Sequence[PolicyForm]) -> bool:
    return may_lie(case.node, forms) and may_lie(site, forms)


def every_spot(case: Case) -> list[Spot]:
    return [*case.prod.spots, *case.other.spots]


def serves(spot: Spot, forms: Sequence[PolicyForm]) -> bool:
    """Tell whether a replica certainly answers rightly, if perhaps by another host."""
    if spot.fault == "redirect":
        return spot.leads_to in CDNS and may_lie(CDNS[spot.leads_to], forms)
    return spot.fault in ("ok", "slow")


def known(case: Case, store: StoreCase, model: str) -> list[list[PolicyForm]]:
    """Return the policies that are known when weightcache.json is asked for, when a tag or manifest, and when a chunk."""
    first = [case.rules, store.rules]
    return [first, [*first, store.registry], [*first, store.registry, case.models[model]]]


def stage_of(name: str) -> int:
    return 0 if name == ABOUT else 2 if name.startswith("chunks/") else 1


def expected_of_reading(case: Case, store: StoreCase, model: str) -> str:
    """Return what must come of reading a model: "bytes", "refused", or "any" where nobody is sure to answer."""
    for forms in known(case, store, model):
        allowed = [spot for spot in store.spots if fits(case, spot.site, forms)]
        if not allowed:
            return "refused"
        if not any(serves(spot, forms) for spot in allowed):
            return "any"
    return "bytes"


def policies_of_publishing(case: Case) -> list[PolicyForm]:
    """Return what rules where a copy may go: the source's policies, those of where it goes, and its own."""
    own = case.given_rules if case.given_rules is not None else {}
    return [*known(case, case.other, case.model)[2], case.prod.rules, own]


def expected_of_publishing(case: Case) -> str:
    spot = case.prod.publish_to
    if spot is None:
        return "any"  # of errors, see `check_publishing`
    if not fits(case, spot.site, [case.rules, case.prod.rules]):
        return "refused"
    reading = expected_of_reading(case, case.other, case.model)
    if reading != "bytes":
        return reading
    forms = policies_of_publishing(case)
    if not fits(case, spot.site, forms):
        return "refused"
    if spot.fault not in ("ok", "slow", "empty"):
        return "any"
    is_there = spot.fault != "empty"
    return "bytes" if fits(case, spot.site, [*forms, *([case.prod.registry] if is_there else [])]) else "refused"


# -- what is done


def read(case: Case, verb: Verb) -> bytes:
    """Read a model whole, as a load or prefetch does."""
    uri = f"wc://prod/{case.model}@{TAG}"
    got = bytearray(NBYTES)
    opened = session.open_session(Request(uri, cache="none", verb=verb), Report(uri))

    def keys() -> list[tuple[int, int]]:
        return [(0, index) for index in range(len(opened.manifest.shards[0].chunks))]

    def take(key: tuple[int, int], view: memoryview) -> None:
        chunk = opened.manifest.shards[0].chunks[key[1]]
        got[chunk.start : chunk.stop] = view

    conductor._through(opened, keys, take, opened.report)
    return bytes(got)


def name_of(spot: Spot | None) -> str:
    return spot.host.partition(".")[0] if spot is not None else ""


def do(case: Case) -> Any:
    match case.verb:
        case "load":
            return read(case, Verb.READ)
        case "prefetch":
            return read(case, Verb.PREFETCH)
        case "plan":
            return conductor.plan(Request(f"wc://prod/{case.model}@{TAG}", cache="none")).origin_bytes
        case "repair":
            to, sources = name_of(case.target), [name_of(case.prod.publish_to)]
            deep = case.given_rules is None  # else lost chunks alone are found, and no chunk is read there
            return registries.check("wc://prod", {}, deep=deep, repair_from=sources, progress=None, replica=to)
        case "publish":
            request = Request(f"wc://other/{case.model}@{TAG}")
            return registries.publish(request, f"wc://prod/new@{TAG}", {}, "", case.given_rules)
        case _:
            uri = f"wc://prod/{case.model}".rstrip("/")
            return registries.replicate(uri, {}, source="", to=name_of(case.target), dry=False, progress=None)


# -- what must hold


def check(world: World, case: Case, seen: Counter[str]) -> None:
    world.begin(case)
    before = {spot.host: dict(spot.files) for spot in every_spot(case)}
    try:
        outcome = do(case)
    except errors.WeightcacheError as exc:
        outcome = exc
    events = world.network.events
    assert Counter(world.audited) == Counter(event for event in events if isinstance(event, Ruling))
    for number, event in enumerate(events):
        if isinstance(event, Dial):
            check_dial(case, event, events[:number])
    if isinstance(outcome, errors.ResidencyError):
        check_rule(case, outcome)
        assert any(not ruling.allowed for ruling in world.audited)
    checks = {"publish": check_publishing, "replicate": check_replicating, "repair": check_repairing}
    checks.get(case.verb, check_reading)(case, outcome, before)
    how = type(outcome).__name__ if isinstance(outcome, Exception) else "done"
    seen[f"{case.verb} {how}"] += 1
    for ruling in world.audited:
        seen[f"{ruling.edge.verb} {'allowed' if ruling.allowed else 'refused'}"] += 1


def check_dial(case: Case, dial: Dial, before: Sequence[Any]) -> None:
    """Check that a dial is one that the policies known by then allow, and that it was ruled on."""
    assert dial.host in (dial.spot.host, *CDNS)
    site = CDNS.get(dial.host, dial.spot.site)
    is_prod = dial.spot in case.prod.spots
    if case.verb == "publish" and is_prod:
        is_known = dial.name != ABOUT and dial.spot.fault != "empty"
        forms = policies_of_publishing(case) + ([case.prod.registry] if is_known else [])
    elif case.verb in ("replicate", "repair"):
        forms = known(case, case.prod, "llama")[min(1, stage_of(dial.name))]
        if dial.name.startswith("chunks/") or dial.method != "GET":
            # Of a model whose policy allows it; what is no file of a model is written for any of them.
            about = [model for model in case.models if dial.name in CHUNKS[model] or f"models/{model}/" in dial.name]
            fit = [model for model in about or case.models if fits(case, site, [*forms, case.models[model]])]
            assert fit, f"{dial} went where it must not"
    else:
        forms = known(case, case.prod if is_prod else case.other, case.model)[stage_of(dial.name)]
    assert fits(case, site, forms), f"{dial} went where it must not"
    name = dial.host if dial.host in CDNS else name_of(dial.spot)
    rulings = [event for event in before if isinstance(event, Ruling)]
    if case.verb in ("publish", "replicate", "repair") and is_prod:
        assert any(ruling.allowed and name in (ruling.edge.source_name, ruling.edge.target_name) for ruling in rulings)
    else:  # nothing comes between a ruling and its dial here
        last = before[-1] if before else None
        assert isinstance(last, Ruling), f"{dial} was not ruled on"
        assert (last.allowed, last.edge.source_name) == (True, name)


def check_rule(case: Case, error: errors.ResidencyError) -> None:
    """Check that the rule which is named is one of the policy that is named, and does not let an end's site be."""
    rule = str(error.facts["rule"])
    models = [case.models[model] for model in case.models] + ([case.given_rules] if case.given_rules else [])
    stores = (case.prod, case.other)
    owners: dict[str, Sequence[PolicyForm]] = {
        "this node ": [case.rules],
        **{f"store {store.name} ": [store.rules] for store in stores},
        "registry ": [store.registry for store in stores],
        "model ": models,
    }
    [forms] = [forms for owner, forms in owners.items() if rule.startswith(owner)]
    sites = [case.node, *(spot.site for spot in every_spot(case)), *CDNS.values()]
    assert any(not may_lie(site, [form]) for site in sites for form in forms)
    assert rule in str(error)


def check_reading(case: Case, outcome: Any, before: Any) -> None:
    expected = expected_of_reading(case, case.prod, case.model)
    if case.verb == "plan" and expected == "any":
        pass
    elif expected == "refused":
        assert isinstance(outcome, errors.ResidencyError), outcome
    elif expected == "bytes":
        assert outcome == (sum(SIZES) if case.verb == "plan" else CONTENTS[case.model])
    if not isinstance(outcome, Exception) and case.verb != "plan":
        assert outcome == CONTENTS[case.model]


def check_publishing(case: Case, outcome: Any, before: Mapping[str, Mapping[str, bytes]]) -> None:
    expected, spot = expected_of_publishing(case), case.prod.publish_to
    if expected == "refused":
        assert isinstance(outcome, errors.ResidencyError), outcome
        assert all(each.files == before[each.host] for each in every_spot(case))
    elif expected == "bytes":
        assert not isinstance(outcome, Exception), outcome
    if not isinstance(outcome, Exception):
        assert spot is not None
        assert {name: spot.files[name] for name in CHUNKS[case.model]} == CHUNKS[case.model]
        assert tag_name("new", TAG) in spot.files


def check_replicating(case: Case, outcome: Any, before: Mapping[str, Mapping[str, bytes]]) -> None:
    source = case.prod.publish_to
    models = [case.model] if case.model else list(case.models)
    writable = case.prod.written_to
    targets = [spot for spot in ([case.target] if case.target else writable) if spot is not source]
    if source is None or not targets or any(spot not in writable for spot in targets):
        assert isinstance(outcome, errors.WeightcacheError)
        assert all(spot.files == before[spot.host] for spot in case.prod.spots)
        return
    first = [case.rules, case.prod.rules]
    if not fits(case, source.site, first):
        assert isinstance(outcome, errors.ResidencyError)
        return
    if source.fault not in ("ok", "slow"):
        return
    for spot in targets:
        lacks = [model for model in models if tag_name(model, TAG) not in before[spot.host]]
        forms = [*first, case.prod.registry, *(case.models[model] for model in lacks)]
        if not fits(case, source.site, forms) or not fits(case, spot.site, forms):
            assert isinstance(outcome, errors.ResidencyError), outcome
            return
        if spot.fault not in ("ok", "slow", "empty"):
            return
    assert not isinstance(outcome, Exception), outcome
    for spot in targets:
        for model in models:
            assert {name: spot.files.get(name) for name in CHUNKS[model]} == CHUNKS[model]
            assert tag_name(model, TAG) in spot.files


def check_repairing(case: Case, outcome: Any, before: Mapping[str, Mapping[str, bytes]]) -> None:
    source, target = case.prod.publish_to, case.target or case.prod.publish_to
    if source is None or target not in case.prod.written_to:
        assert isinstance(outcome, errors.WeightcacheError)
        assert all(spot.files == before[spot.host] for spot in case.prod.spots)
        return
    forms = [case.rules, case.prod.rules]
    for number, more in enumerate(([], [case.prod.registry], list(case.models.values()))):
        if number == 2 and source.fault not in ("ok", "slow"):
            return
        forms += more
        if not fits(case, target.site, forms):
            assert isinstance(outcome, errors.ResidencyError), outcome
            return
        if target.fault not in ("ok", "slow") and not (target.fault == "half" and ABOUT in target.files):
            return  # that may be found first
        if not fits(case, source.site, forms):
            assert isinstance(outcome, errors.ResidencyError), outcome
            return
    if source.fault in ("ok", "slow") and all(
        name in target.files for name in before[source.host] if "models/" in name
    ):
        assert not isinstance(outcome, Exception), outcome
        assert target.files == source.files


def hunt(world: World, n_cases: int, phases: Sequence[Phase] = tuple(Phase)) -> Counter[str]:
    """Check so many cases; return what was seen."""
    seen: Counter[str] = Counter()

    @hypothesis_settings(examples, max_examples=n_cases, phases=phases, database=None)
    @given(cases())
    def each(case: Case) -> None:
        check(world, case, seen)

    each()
    return seen


def test_g26_no_dial_goes_where_a_policy_forbids_it_whatever_fails(world: World) -> None:
    seen = hunt(world, N_CASES)
    for verb in set(Verb) - {Verb.KEEP}:
        assert seen[f"{verb} allowed"], f"no case has a {verb}"
    for verb in REFUSED:
        assert seen[f"{verb} refused"], f"no case has a {verb} that is forbidden"
    for what in ("load", "prefetch", "plan", "publish", "replicate", "repair"):
        assert seen[f"{what} done"], f"no {what} is allowed and ends well"
        assert seen[f"{what} ResidencyError"], f"no {what} is forbidden"


@pytest.mark.parametrize(
    "mutant",
    [
        *((verb, "not ruled on") for verb in Verb if verb is not Verb.KEEP),
        *((verb, "let through") for verb in REFUSED),
    ],
    ids=" ".join,
)
def test_a_verb_that_is_not_ruled_on_is_noticed(world: World, mutant: tuple[Verb, str]) -> None:
    world.mutant = mutant
    try:
        with pytest.raises(AssertionError):
            hunt(world, 2000, [Phase.generate])
    finally:
        world.mutant = None
