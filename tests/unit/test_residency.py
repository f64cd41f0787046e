"""Sites, and the written form of residency policies."""

from __future__ import annotations

import pytest

from weightcache.errors import ConfigError
from weightcache.prices import UNKNOWN
from weightcache.residency import Places, Policy, Site

FORM = {
    "allow": {"jurisdictions": ["ch", "eu"], "regions": ["eu-*"], "providers": ["tigris"]},
    "deny": {"regions": ["eu-north-1"]},
}
POLICY = Policy(Places(("eu", "ch"), ("eu-*",), ("tigris",)), Places(regions=("eu-north-1",)))


def test_site_is_in_lower_case() -> None:
    assert Site(" AWS", "EU-West-1", "EU ") == Site("aws", "eu-west-1", "eu")


def test_g26_provider_without_a_price_is_not_known() -> None:
    assert Site(UNKNOWN, "Unknown") == Site()


@pytest.mark.parametrize(
    ("site", "text"),
    [
        (Site("aws", "eu-west-1", "eu"), "aws/eu-west-1 in eu"),
        (Site("tigris"), "tigris/? in ?"),
        (Site(jurisdiction="eu"), "?/? in eu"),
        (Site(), "an unknown place"),
    ],
)
def test_site_can_be_read(site: Site, text: str) -> None:
    assert str(site) == text


def test_policy_is_read_from_its_form() -> None:
    assert Policy.from_form(FORM, "a file") == POLICY


def test_policy_gives_its_form_back() -> None:
    assert POLICY.to_form() == FORM
    assert Policy.from_form({}, "a file").to_form() == {}


def test_equal_policies_are_one_whatever_their_order_and_case() -> None:
    other = {
        "deny": {"regions": ["EU-North-1", "eu-north-1"]},
        "allow": FORM["allow"] | {"jurisdictions": ["EU", "CH"]},
    }
    assert {Policy.from_form(other, "a file"), POLICY} == {POLICY}


@pytest.mark.parametrize(
    ("form", "says"),
    [
        (None, "the residency policy in a file is None: expected a table with allow, deny"),
        ([], "expected a table"),
        ({"alow": {}}, "'alow' of the residency policy in a file is not known (did you mean 'allow'?)"),
        (
            {"allow": {"region": ["eu"]}},
            "'allow.region' of the residency policy in a file is not known (did you mean 'regions'?)",
        ),
        ({"deny": ["us"]}, "'deny' of the residency policy in a file is ['us']: expected a table"),
        (
            {"deny": {}},
            "'deny' of the residency policy in a file is empty: expected jurisdictions, regions, providers, or no",
        ),
        ({"deny": {"regions": []}}, "'deny.regions' of the residency policy in a file is []: expected a list of names"),
        (
            {"deny": {"regions": "us"}},
            "'deny.regions' of the residency policy in a file is 'us': expected a list of names",
        ),
        ({"deny": {"regions": ["us", 1]}}, "is ['us', 1]: expected a list of names"),
        ({"deny": {"regions": [""]}}, "'deny' of the residency policy in a file has '' among regions: expected a name"),
        ({"deny": {"regions": ["*"]}}, "'*' among regions"),
        ({"deny": {"regions": ["eu-*-1"]}}, "'eu-*-1' among regions: expected a name such as eu, of regions also eu-*"),
        ({"deny": {"jurisdictions": ["e*"]}}, "'e*' among jurisdictions"),
        ({"deny": {"providers": ["a w s"]}}, "'a w s' among providers"),
        ({"deny": {"providers": ["unknown"]}}, "'unknown' among providers"),
        ({"deny": {"providers": ["a" * 256]}}, "among providers"),
    ],
)
def test_form_that_is_wrong_is_an_error_that_names_the_place(form: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Policy.from_form(form, "a file")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 300


def test_name_that_is_none_is_refused_without_a_form_too() -> None:
    with pytest.raises(ValueError, match="among regions"):
        Places(regions=("",))
