"""Own where bytes lie and where they may: a site, and the residency policy with its written form. Pure.

Never decides about a move of bytes: that is `policy.authorize`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from weightcache.errors import ConfigError, nearest

# What a policy lists, and which attribute of a site that is about.
KINDS = {"jurisdictions": "jurisdiction", "regions": "region", "providers": "provider"}
SIDES = ("allow", "deny")
UNKNOWN = "unknown"  # as `prices` calls a provider that it does not know: no name, a policy must not take it for one
_NAME = re.compile(r"[a-z0-9_.:-]{1,255}")


@dataclass(frozen=True, slots=True)
class Site:
    """Where bytes lie or are processed. Names are in lower case; an empty one is not known."""

    provider: str = ""
    region: str = ""
    jurisdiction: str = ""

    def __post_init__(self) -> None:
        for attribute in KINDS.values():
            name = getattr(self, attribute).strip().lower()
            object.__setattr__(self, attribute, "" if name == UNKNOWN else name)

    def __str__(self) -> str:
        if self == Site():
            return "an unknown place"
        return f"{self.provider or '?'}/{self.region or '?'} in {self.jurisdiction or '?'}"


@dataclass(frozen=True, slots=True)
class Places:
    """Names of places by kind, in lower case, sorted. A kind without names says nothing; a region may end in `*`.

    Raises ValueError for what is not a name.
    """

    jurisdictions: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for kind in KINDS:
            names = tuple(sorted({name.lower() for name in getattr(self, kind)}))
            for name in names:
                if not _NAME.fullmatch(name.removesuffix("*") if kind == "regions" else name) or name == UNKNOWN:
                    raise ValueError(f"{name!r:.80} among {kind}: expected a name such as eu, of regions also eu-*")
            object.__setattr__(self, kind, names)


@dataclass(frozen=True, slots=True)
class Policy:
    """Where bytes may lie and be processed; an empty one allows every place.

    A place must be among the allowed of each kind that has any, and among none of the denied. Where a kind is listed on
    either side and the place's own name of that kind is not known, the place is refused.
    """

    allow: Places = Places()
    deny: Places = Places()

    @classmethod
    def from_form(cls, form: object, source: str) -> Policy:
        """Read `{"allow": {"jurisdictions": ["eu"], "regions": ["eu-*"], "providers": [...]}, "deny": {...}}`.

        Args:
            form: From JSON or TOML.
            source: Where it stands, for messages.

        Raises:
            ConfigError: Anything else; an empty list or table too, which could mean all or nothing.
        """
        given = _table(form, "", SIDES, source)
        return cls(**{side: _read_places(places, side, source) for side, places in given.items()})

    def to_form(self) -> dict[str, dict[str, list[str]]]:
        """Return the form that `from_form` reads."""
        sides = ((side, getattr(self, side)) for side in SIDES)
        return {
            side: {kind: list(getattr(places, kind)) for kind in KINDS if getattr(places, kind)}
            for side, places in sides
            if places != Places()
        }


def _read_places(form: object, side: str, source: str) -> Places:
    given = _table(form, side, KINDS, source)
    if not given:
        raise _error(side, source, f"is empty: expected {', '.join(KINDS)}, or no {side} at all")
    for kind, names in given.items():
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise _error(f"{side}.{kind}", source, f"is {names!r:.80}: expected a list of names, at least one")
    try:
        return Places(**{kind: tuple(names) for kind, names in given.items()})  # type: ignore[arg-type]
    except ValueError as exc:
        raise _error(side, source, f"has {exc}") from exc


def _table(form: object, name: str, known: Collection[str], source: str) -> Mapping[str, object]:
    if not isinstance(form, dict):
        raise _error(name, source, f"is {form!r:.80}: expected a table with {', '.join(known)}")
    for key in form:
        if key not in known:
            spelled = f"{name}.{key}" if name else key
            raise _error(spelled[:80], source, f"is not known{nearest(key, known)}: expected {', '.join(known)}")
    return form


def _error(name: str, source: str, what: str) -> ConfigError:
    subject = f"{name!r} of the residency policy" if name else "the residency policy"
    return ConfigError(f"{subject} in {source} {what}", setting=name, source=source)
