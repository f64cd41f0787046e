"""Residency, against a reference that is written once more, naively, over the written forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reference_residency import ATTRIBUTES, PolicyForm, SiteForm, may_lie
from strategies import examples, policy_forms, site_forms

from weightcache.errors import ResidencyError
from weightcache.policy import Edge, Ruling, Verb, authorize, judge
from weightcache.residency import Policy, Site

many = settings(examples, max_examples=500)
verbs = st.sampled_from(Verb)
# Each policy alone refuses half of all sites, so there are seldom more than two.
policies = st.lists(policy_forms, max_size=3)
topologies = st.dictionaries(st.sampled_from("abcde"), site_forms, min_size=1)


def owned(forms: Sequence[PolicyForm]) -> list[tuple[str, Policy]]:
    return [(f"policy {number}", Policy.from_form(form, "a test")) for number, form in enumerate(forms)]


def way(source: SiteForm, target: SiteForm, verb: Verb = Verb.READ) -> Edge:
    return Edge(verb, "model", Site(**source), Site(**target), "there", "here")


@many
@given(topologies, policies)
def test_g26_edges_that_are_allowed_are_those_of_the_reference(
    topology: Mapping[str, SiteForm], forms: Sequence[PolicyForm]
) -> None:
    allowed = {
        (verb, source, target)
        for verb, source, target in product(Verb, topology, topology)
        if judge(way(topology[source], topology[target], verb), owned(forms)).allowed
    }
    fit = [name for name, site in topology.items() if may_lie(site, forms)]
    assert allowed == set(product(Verb, fit, fit))


@many
@given(site_forms, site_forms, policies, policy_forms, st.integers(0, 3))
def test_g26_adding_a_policy_never_allows_what_was_forbidden(
    source: SiteForm, target: SiteForm, forms: list[PolicyForm], added: PolicyForm, at: int
) -> None:
    edge = way(source, target)
    more = [*forms[:at], added, *forms[at:]]
    assert judge(edge, owned(more)).allowed <= judge(edge, owned(forms)).allowed


@many
@given(site_forms, site_forms, policies)
def test_g26_both_ends_count_and_count_alike(source: SiteForm, target: SiteForm, forms: Sequence[PolicyForm]) -> None:
    allowed = judge(way(source, target), owned(forms)).allowed
    assert allowed == judge(way(target, source), owned(forms)).allowed
    assert allowed == all(judge(way(site, site), owned(forms)).allowed for site in (source, target))


@many
@given(site_forms, site_forms, policies, st.sampled_from(ATTRIBUTES), st.booleans())
def test_g26_what_a_policy_lists_and_a_site_does_not_say_is_forbidden(
    site: SiteForm, other: SiteForm, forms: Sequence[PolicyForm], about: tuple[str, str], is_source: bool
) -> None:
    kind, attribute = about
    assume(any(kind in form.get(side, {}) for form in forms for side in ("allow", "deny")))
    unknown = {**site, attribute: ""}
    edge = way(unknown, other) if is_source else way(other, unknown)
    assert not judge(edge, owned(forms)).allowed


@many
@given(site_forms, site_forms, policies, verbs)
def test_g26_authorize_raises_exactly_what_is_judged_forbidden(
    source: SiteForm, target: SiteForm, forms: Sequence[PolicyForm], verb: Verb
) -> None:
    edge, noted = way(source, target, verb), list[Ruling]()
    ruling = judge(edge, owned(forms))
    if ruling.allowed:
        assert authorize(edge, owned(forms), noted.append) == ruling
    else:
        with pytest.raises(ResidencyError) as caught:
            authorize(edge, owned(forms), noted.append)
        assert caught.value.facts["rule"] == ruling.rule
    assert noted == [ruling]


@many
@given(site_forms, site_forms, policies)
def test_rule_names_a_policy_and_an_end_that_do_not_fit(
    source: SiteForm, target: SiteForm, forms: Sequence[PolicyForm]
) -> None:
    ruling = judge(way(source, target), owned(forms))
    assume(not ruling.allowed)
    named = [form for number, form in enumerate(forms) if ruling.rule.startswith(f"policy {number} ")]
    [end] = [site for name, site in (("source", source), ("target", target)) if f"the {name}'s " in ruling.rule]
    assert len(named) == 1
    assert not may_lie(end, named)


@many
@given(policy_forms)
def test_form_is_read_as_it_is_written(form: PolicyForm) -> None:
    policy = Policy.from_form(form, "a test")
    assert Policy.from_form(policy.to_form(), "a test") == policy
    written = {(side, kind): set(names) for side in form for kind, names in form[side].items()}
    assert {(side, kind): set(names) for side, of in policy.to_form().items() for kind, names in of.items()} == written
