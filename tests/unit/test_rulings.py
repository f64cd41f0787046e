"""Rulings: which rule refuses what, and how it is said."""

from __future__ import annotations

import pytest

from weightcache.errors import ResidencyError
from weightcache.policy import Edge, Ruling, Verb, authorize, judge
from weightcache.residency import Places, Policy, Site

EU = Site("tigris", "eu-central", "eu")
US = Site("aws", "us-east-1", "us")
NOWHERE = Site()
EU_ALONE = Policy(allow=Places(jurisdictions=("eu",)))


def edge(source: Site = EU, target: Site = EU, verb: Verb = Verb.READ) -> Edge:
    return Edge(verb, "wc://prod/llama@v3", source, target, "prod-replica", "this node")


@pytest.mark.parametrize(
    ("policy", "site", "rule"),
    [
        (EU_ALONE, US, "allows jurisdictions 'eu', and the {}'s jurisdiction is 'us'"),
        (EU_ALONE, NOWHERE, "allows jurisdictions 'eu', and the {}'s jurisdiction is not known"),
        (Policy(allow=Places(regions=("eu-*",))), US, "allows regions 'eu-*', and the {}'s region is 'us-east-1'"),
        (
            Policy(allow=Places(regions=("eu-*",))),
            Site(region="eu"),
            "allows regions 'eu-*', and the {}'s region is 'eu'",
        ),
        (
            Policy(deny=Places(regions=("us-*", "ap-1"))),
            US,
            "denies regions 'us-*', and the {}'s region is 'us-east-1'",
        ),
        (
            Policy(deny=Places(regions=("us-*", "ap-1"))),
            NOWHERE,
            "denies regions 'ap-1', 'us-*', and the {}'s region is not known",
        ),
        (Policy(deny=Places(providers=("aws",))), US, "denies providers 'aws', and the {}'s provider is 'aws'"),
        (
            Policy(Places(("eu", "us")), Places(("us",))),
            US,
            "denies jurisdictions 'us', and the {}'s jurisdiction is 'us'",
        ),
        (Policy(Places(("eu", "us"), ("eu-*",))), US, "allows regions 'eu-*', and the {}'s region is 'us-east-1'"),
    ],
)
def test_g26_rule_that_refuses_an_end_is_named(policy: Policy, site: Site, rule: str) -> None:
    for end, way in (("source", edge(source=site)), ("target", edge(target=site))):
        assert judge(way, [("weightcache.toml", policy)]) == Ruling(way, False, f"weightcache.toml {rule.format(end)}")


def test_ruling_that_allows_names_the_policies_that_say_anything() -> None:
    policies = [("weightcache.toml", EU_ALONE), ("prod", Policy()), ("llama", Policy(deny=Places(providers=("aws",))))]
    assert judge(edge(), policies) == Ruling(edge(), True, "within the policy of weightcache.toml, llama")


def test_without_a_policy_every_place_is_allowed() -> None:
    for policies in ([], [("prod", Policy())]):
        assert judge(edge(NOWHERE, US), policies) == Ruling(edge(NOWHERE, US), True, "no policy")


def test_first_policy_that_refuses_is_named() -> None:
    policies = [("mine", Policy()), ("theirs", EU_ALONE), ("others", Policy(deny=Places(jurisdictions=("us",))))]
    assert judge(edge(target=US), policies).rule.startswith("theirs allows")


def test_g26_forbidden_edge_is_an_error_that_names_the_rule() -> None:
    with pytest.raises(ResidencyError) as caught:
        authorize(edge(target=US, verb=Verb.FAIL_OVER), [("weightcache.toml", EU_ALONE)])
    rule = "weightcache.toml allows jurisdictions 'eu', and the target's jurisdiction is 'us'"
    assert str(caught.value).startswith(
        "fail-over of wc://prod/llama@v3 from prod-replica (tigris/eu-central in eu) to this node (aws/us-east-1 in us) is "
        f"forbidden: {rule}; use a replica within the policy"
    )
    assert caught.value.facts == {
        "verb": "fail-over",
        "model": "wc://prod/llama@v3",
        "source": "prod-replica (tigris/eu-central in eu)",
        "target": "this node (aws/us-east-1 in us)",
        "rule": rule,
    }


def test_allowed_edge_passes_with_its_ruling() -> None:
    assert authorize(edge(), [("prod", EU_ALONE)]) == judge(edge(), [("prod", EU_ALONE)])


def test_every_ruling_is_noted_before_it_is_raised() -> None:
    noted: list[Ruling] = []
    authorize(edge(), [("prod", EU_ALONE)], noted.append)
    with pytest.raises(ResidencyError):
        authorize(edge(target=US), [("prod", EU_ALONE)], noted.append)
    assert [(ruling.edge, ruling.allowed) for ruling in noted] == [(edge(), True), (edge(target=US), False)]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("https://key:secret@host/bucket/model?X-Amz-Signature=abc#x", "https://host/bucket/model"),
        ("https://token@host", "https://host"),
        ("https://host?sig=abc", "https://host"),
        ("s3://bucket/registry/llama@v3", "s3://bucket/registry/llama@v3"),
        (
            "abfss://container@account.dfs.core.windows.net/m?sig=abc",
            "abfss://container@account.dfs.core.windows.net/m",
        ),
        ("this node", "this node"),
        ("/models/a#b?c", "/models/a#b?c"),
    ],
)
def test_g27_secrets_of_a_url_are_in_no_edge(name: str, kept: str) -> None:
    way = Edge(Verb.REDIRECT, name, EU, EU, name, name)
    assert (way.model, way.source_name, way.target_name) == (kept, kept, kept)


def test_long_policy_makes_no_long_message() -> None:
    policy = Policy(allow=Places(jurisdictions=tuple(f"j{number}" for number in range(10_000))))
    assert len(judge(edge(), [("prod", policy)]).rule) < 300
