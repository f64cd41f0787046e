"""Own the decision whether bytes may take a way: verbs, edges, rulings, and the one function that rules. Pure.

Never lets through what it cannot tell: where a policy lists a kind of place and an end's is not known, it refuses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from weightcache.errors import ResidencyError
from weightcache.residency import KINDS, Policy, Site

Owned = tuple[str, Policy]  # with its owner, as errors shall name it


class Verb(StrEnum):
    """Why bytes would move. Policies judge all alike; errors and the audit log say which it was."""

    READ = "read"
    FAIL_OVER = "fail-over"
    HEDGE = "hedge"
    REDIRECT = "redirect"
    PROBE = "probe"
    PUBLISH = "publish"
    REPLICATE = "replicate"
    PREFETCH = "prefetch"
    KEEP = "keep"  # in a cache of this node


@dataclass(frozen=True, slots=True)
class Edge:
    """A way that bytes of a model would take, from one site to another.

    Attributes:
        verb: Why they would move.
        model: Its name.
        source, target: Where they come from and where they get to.
        source_name, target_name: Who is there: a replica, a host, this node.

    Names end up in errors and in the audit log, so of a URL neither its user nor its query is kept: a redirect's may be
    a signature.
    """

    verb: Verb
    model: str
    source: Site
    target: Site
    source_name: str
    target_name: str

    def __post_init__(self) -> None:
        for attribute in ("model", "source_name", "target_name"):
            object.__setattr__(self, attribute, _without_secrets(getattr(self, attribute)))

    def __str__(self) -> str:
        source, target = self.ends()
        return f"{self.verb} of {self.model} from {source} to {target}"

    def ends(self) -> tuple[str, str]:
        """Return source and target, for messages."""
        return f"{self.source_name} ({self.source})", f"{self.target_name} ({self.target})"


@dataclass(frozen=True, slots=True)
class Ruling:
    """A decision: the edge, whether it is allowed, and by which rule."""

    edge: Edge
    allowed: bool
    rule: str


def judge(edge: Edge, policies: Sequence[Owned]) -> Ruling:
    """Rule on an edge: every policy must allow both of its ends."""
    for owner, policy in policies:
        for end, site in (("source", edge.source), ("target", edge.target)):
            if objection := _objection(policy, end, site):
                return Ruling(edge, False, f"{owner} {objection}")
    owners = [owner for owner, policy in policies if policy != Policy()]
    return Ruling(edge, True, f"within the policy of {', '.join(owners)}" if owners else "no policy")


def authorize(edge: Edge, policies: Sequence[Owned], note: Callable[[Ruling], object] = lambda _: None) -> Ruling:
    """Stand in the way of bytes: return the ruling that lets them pass. To be called before anything is dialled.

    Args:
        edge: What is asked.
        policies: All that rule.
        note: Is told every ruling, those that refuse too: a list's `append`, for `audit.append`.

    Raises:
        ResidencyError: A policy forbids the edge, or needs to know of an end what is not known.
    """
    ruling = judge(edge, policies)
    note(ruling)
    if not ruling.allowed:
        source, target = edge.ends()
        raise ResidencyError(
            f"{edge} is forbidden: {ruling.rule}; use a replica within the policy, or declare in weightcache.toml what "
            "is not known of a place",
            verb=str(edge.verb),
            model=edge.model,
            source=source,
            target=target,
            rule=ruling.rule,
        )
    return ruling


def _objection(policy: Policy, end: str, site: Site) -> str:
    """Return the rule that refuses a site, or an empty string."""
    for kind, attribute in KINDS.items():
        name = getattr(site, attribute)
        allowed, denied = getattr(policy.allow, kind), getattr(policy.deny, kind)
        hits = [entry for entry in denied if _matches(name, entry)]
        if denied and (hits or not name):
            rule = f"denies {kind} {_spell(hits or denied)}"
        elif allowed and not any(_matches(name, entry) for entry in allowed):
            rule = f"allows {kind} {_spell(allowed)}"
        else:
            continue
        return f"{rule}, and the {end}'s {attribute} is {repr(name) if name else 'not known'}"
    return ""


def _matches(name: str, entry: str) -> bool:
    # Nothing matches an unknown name: no entry is empty, nor is what stands before its star.
    return name.startswith(entry[:-1]) if entry.endswith("*") else name == entry


def _spell(entries: Sequence[str]) -> str:
    return f"{', '.join(map(repr, entries)):.200}"


def _without_secrets(name: str) -> str:
    scheme, mark, rest = name.partition("://")
    if not mark:
        return name
    rest = re.split("[?#]", rest, maxsplit=1)[0]
    if not scheme.lower().startswith(("abfs", "wasb")):  # Azure has a container there
        rest = re.sub(r"^[^/]*@", "", rest)
    return scheme + mark + rest
