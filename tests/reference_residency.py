"""Own where bytes may lie, said once more and naively, over the written forms of sites and policies.

Never imports weightcache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

PolicyForm = Mapping[str, Mapping[str, Sequence[str]]]
SiteForm = Mapping[str, str]
ATTRIBUTES = (("jurisdictions", "jurisdiction"), ("regions", "region"), ("providers", "provider"))


def may_lie(site: SiteForm, forms: Sequence[PolicyForm]) -> bool:
    """Tell whether bytes may lie at a site."""
    for form in forms:
        for kind, attribute in ATTRIBUTES:
            for side in ("allow", "deny"):
                if kind in form.get(side, {}):
                    known = site[attribute] != ""
                    listed = any(fnmatchcase(site[attribute], entry) for entry in form[side][kind])
                    if not known or listed != (side == "allow"):
                        return False
    return True
