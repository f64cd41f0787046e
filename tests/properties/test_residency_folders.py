"""Residency end to end: a weightcache.toml, folders as replicas, the public face; the spy hears which files are opened.

The oracle is that of test_residency_network.py, which has far more cases and faults.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from models import write_safetensors
from reference import assert_same, tensors_of
from reference_residency import PolicyForm, SiteForm, may_lie
from strategies import HOME, examples, rules, sites
from tiny_registry import CHUNKS, CONTENTS, SHARDS, TAG, registry_files

import weightcache
from weightcache import errors

N_CASES = 150
FAULTS = ("no folder", "no chunk", "rotten", "short", "empty")
ABOUT = "weightcache.json"

_opened: list[str] = []
_is_armed = False


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _is_armed and event in ("open", "os.scandir", "os.listdir") and isinstance(arguments[0], (str, os.PathLike)):
        _opened.append(os.fspath(arguments[0]))


sys.addaudithook(_hear)


@dataclass
class Case:
    """A node, a store of folders, and what is done with it: `to` is replicated to, or all that are written to."""

    node: SiteForm
    rules: PolicyForm
    store: PolicyForm
    registry: PolicyForm
    models: Mapping[str, PolicyForm]
    replicas: Sequence[tuple[SiteForm, str, bool]]  # site, fault, whether it is written to
    verb: str
    given_rules: PolicyForm
    to: int

    @property
    def publish_to(self) -> int | None:
        return next((number for number, (_, _, is_writable) in enumerate(self.replicas) if is_writable), None)

    def fits(self, number: int, *forms: PolicyForm) -> bool:
        return may_lie(self.node, forms) and may_lie(self.replicas[number][0], forms)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kinds = st.sampled_from(list(product(("ok",) * 8 + FAULTS, (False, True, True))))
    verb = draw(st.sampled_from(("load", "load", "prefetch", "publish", "replicate")))
    replicas = draw(st.lists(st.tuples(sites, kinds), min_size=2 if verb == "replicate" else 1, max_size=5))
    case = Case(
        node=draw(sites),
        rules=draw(rules),
        store=draw(rules),
        registry=draw(rules),
        models={model: draw(rules) for model in CONTENTS},
        replicas=[(site, *kind) for site, kind in replicas],
        verb=verb,
        given_rules=draw(rules),
        to=draw(st.integers(1, len(replicas))),
    )
    if verb == "replicate" and draw(st.booleans()):  # most find nothing to do otherwise
        case.node, case.rules, case.store = HOME, {}, {}
        case.replicas = [(HOME, "ok", True), *((site, "empty", True) for site, _, _ in case.replicas[1:])]
    return case


def toml_of(form: Mapping[str, Any]) -> str:
    sides = {side: ", ".join(f"{kind} = {names!r}" for kind, names in places.items()) for side, places in form.items()}
    return "\n".join(f"{side} = {{ {places} }}" for side, places in sides.items()) + "\n"


@dataclass
class Folders:
    """Where a case is played: a configuration, a cache, the replicas r0, r1, … and a plain model."""

    root: Path

    def lay_out(self, case: Case) -> None:
        shutil.rmtree(self.root / "play", ignore_errors=True)
        text = "[node]\n" + "".join(f'{kind} = "{name}"\n' for kind, name in case.node.items() if name)
        text += toml_of(case.rules) + "[stores.prod]\n" + toml_of(case.store)
        for number, (site, fault, is_writable) in enumerate(case.replicas):
            text += f'[[stores.prod.replicas]]\nname = "r{number}"\nurl = "{self.replica(number)}"\n'
            text += "".join(f'{kind} = "{name}"\n' for kind, name in site.items() if name)
            text += 'access = "write"\n' if is_writable else ""
            self.fill(number, case, fault)
        (self.root / "play").mkdir(exist_ok=True)
        (self.root / "play" / "weightcache.toml").write_text(text)

    def replica(self, number: int) -> Path:
        return self.root / "play" / f"r{number}"

    def fill(self, number: int, case: Case, fault: str) -> None:
        if fault == "no folder":
            return
        for name, content in registry_files(case.registry, case.models).items() if fault != "empty" else ():
            if name.startswith("chunks/") and int(name[-1], 16) % 2:
                if fault == "no chunk":
                    continue
                content = bytes(len(content)) if fault == "rotten" else content[:-1] if fault == "short" else content
            path = self.replica(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.replica(number).mkdir(parents=True, exist_ok=True)

    def files(self, number: int) -> dict[str, bytes]:
        folder = self.replica(number)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def touched(self, number: int) -> set[str]:
        """Return the names of the files of a replica that were opened, and of its folders that were listed."""
        folder = f"{self.replica(number)}/"
        return {f"{path}/".removeprefix(folder).rstrip("/") for path in _opened if f"{path}/".startswith(folder)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    root = tmp_path_factory.mktemp("residency")
    (root / "plain").mkdir()
    write_safetensors(root / "plain" / "model.safetensors", {"a": ("F32", (1000,)), "b": ("U8", (5,))})
    yield Folders(root)


def do(case: Case, folders: Folders) -> Any:
    model = f"wc://prod/llama@{TAG}"
    match case.verb:
        case "load":
            with weightcache.load_model(model, "cpu") as loaded:
                tensors = {name: bytes(loaded[name].numpy()) for name in loaded}
                loaded.wait_stored()
                return tensors
        case "prefetch":
            return weightcache.prefetch(model)
        case "publish":
            return weightcache.publish(folders.root / "plain", f"wc://prod/new@{TAG}", policy=case.given_rules)
        case _:
            to = f"r{case.to}" if case.to < len(case.replicas) else ""
            return weightcache.replicate("wc://prod/llama", to=to)


EXPECTED = {entry.name: CONTENTS["llama"][entry.start : entry.stop] for entry in SHARDS["llama"].tensors}


def check(case: Case, folders: Folders, seen: Counter[str]) -> None:
    global _is_armed
    folders.lay_out(case)
    before = [folders.files(number) for number in range(len(case.replicas))]
    _opened.clear()
    _is_armed = True
    try:
        outcome = do(case, folders)
    except errors.WeightcacheError as exc:
        outcome = exc
    finally:
        _is_armed = False
    rulings = weightcache.rulings()
    passed = {(row["verb"], end["name"]) for row in rulings if row["allowed"] for end in (row["source"], row["target"])}
    first, own = (case.rules, case.store), {"publish": case.given_rules}.get(case.verb, case.models["llama"])
    for number, (_, fault, _) in enumerate(case.replicas):
        touched, is_changed = folders.touched(number), folders.files(number) != before[number]
        has_registry = fault not in ("no folder", "empty")
        if touched:
            assert case.fits(number, *first), f"{touched} of r{number} must not be touched"
            assert any(name == f"r{number}" for _, name in passed), f"r{number} was touched and not ruled on"
        if touched - {ABOUT, "."} and case.verb != "publish":
            assert case.fits(number, *first, case.registry)
        if any(name.startswith("chunks/") and len(name) > 64 for name in touched) or is_changed:
            assert case.fits(number, *first, own, *([case.registry] if has_registry or case.verb != "publish" else []))
    if isinstance(outcome, errors.ResidencyError):
        assert outcome.facts["rule"] in {row["rule"] for row in rulings if not row["allowed"]}
        assert [folders.files(number) for number in range(len(case.replicas))] == before or case.verb == "replicate"
    if case.verb in ("load", "prefetch"):
        check_reading(case, outcome)
        if not isinstance(outcome, Exception):
            assert ("keep", "the cache of this node") in passed
    if case.verb == "publish":
        check_publishing(case, folders, outcome)
    if case.verb == "replicate" and not isinstance(outcome, Exception):
        for done in outcome:
            number = int(done.target.rpartition("/r")[2])
            assert CHUNKS["llama"].items() <= folders.files(number).items() or case.replicas[number][1] in FAULTS
    seen[f"{case.verb} {type(outcome).__name__ if isinstance(outcome, Exception) else 'done'}"] += 1


def check_reading(case: Case, outcome: Any) -> None:
    forms: list[PolicyForm] = []
    for more in ((case.rules, case.store), (case.registry,), (case.models["llama"],)):
        forms += more
        allowed = [number for number in range(len(case.replicas)) if case.fits(number, *forms)]
        if not allowed:
            assert isinstance(outcome, errors.ResidencyError), outcome
            return
        if not any(case.replicas[number][1] == "ok" for number in allowed):
            return
    assert not isinstance(outcome, Exception), outcome
    if case.verb == "load":
        assert outcome == EXPECTED


def check_publishing(case: Case, folders: Folders, outcome: Any) -> None:
    to = case.publish_to
    if to is None:
        assert isinstance(outcome, (errors.ConfigError, errors.ResidencyError))
        return
    is_there = case.replicas[to][1] not in ("no folder", "empty")
    forms = (case.rules, case.store, case.given_rules, *([case.registry] if is_there else []))
    if not case.fits(to, *forms):
        assert isinstance(outcome, errors.ResidencyError), outcome
        return
    assert not isinstance(outcome, Exception), outcome
    with weightcache.load_model(f"{folders.replica(to)}/new@{TAG}", "cpu") as loaded:
        assert_same(loaded, tensors_of(folders.root / "plain"))


def test_g26_no_file_is_opened_where_a_policy_forbids_it(folders: Folders) -> None:
    seen: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WEIGHTCACHE_CONFIG", str(folders.root / "play" / "weightcache.toml"))
        patch.setenv("WEIGHTCACHE_DIR", str(folders.root / "play" / "cache"))

        @hypothesis_settings(examples, max_examples=N_CASES, database=None)
        @given(cases())
        def each(case: Case) -> None:
            check(case, folders, seen)

        each()
    for verb in ("load", "prefetch", "publish"):
        assert seen[f"{verb} done"], f"no {verb} is allowed and ends well: {seen}"
        assert seen[f"{verb} ResidencyError"], f"no {verb} is forbidden: {seen}"
