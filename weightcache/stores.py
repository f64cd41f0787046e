"""Own the stores of the configuration: what a logical name stands for, and where each of its replicas lies. Pure.

Never dials, and never holds a secret: credentials are found by the profile a replica names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from weightcache.errors import ConfigError, WeightcacheError, nearest
from weightcache.ledger import place_of
from weightcache.prices import UNKNOWN, Overrides, Price, price_of, provider_of, with_amounts
from weightcache.residency import Policy, Site
from weightcache.tables import Reader, Unshown, as_table, read_flag, read_table, read_usd
from weightcache.uri import LOGICAL, Name, parse_uri

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_PLACE = re.compile(r"[a-z0-9][a-z0-9._:-]{0,62}")
_KEY = re.compile(r"ed25519:[0-9a-f]{64}")
_WEB = ("http", "https")


@dataclass(frozen=True, slots=True)
class Replica:
    """A registry at one place.

    Attributes:
        name: Unique in its store.
        url: The registry's folder: an fsspec URL without a trailing slash, or an absolute path.
        endpoint: Where its bucket is found; empty where the scheme says it, whatever the AWS configuration says.
        site: Where its bytes lie. What is not known is empty, and no policy that asks for it allows it.
        egress_usd_per_gb: What a GB costs that leaves it; None is what the prices say.
        profile: Of the AWS configuration; empty is the default one.
        is_writable: Whether anything may be published or copied to it.
        replicates_itself: A global bucket: it stands for copies that the provider makes, which are verified, never made.
    """

    name: str
    url: str
    endpoint: str = ""
    site: Site = field(default_factory=Site)
    egress_usd_per_gb: float | None = None
    profile: str = ""
    is_writable: bool = False
    replicates_itself: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What its file system is opened with. Bytes must not go elsewhere because AWS_ENDPOINT_URL is set on a node."""
        if not self.url.startswith("s3://"):
            return {}
        profile = {"profile": self.profile} if self.profile else {}
        if self.endpoint:
            return {**profile, "endpoint_url": self.endpoint}
        return {**profile, "config_kwargs": {"ignore_configured_endpoint_urls": True}}

    def opened_with(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return `options` with what a caller gives beside. Raises ConfigError where that says another place."""
        if given.get("endpoint_url") or (given.get("client_kwargs") or {}).get("endpoint_url"):
            raise ConfigError(
                f"storage_options name an endpoint, but policies judge replica {self.name} by its own: leave it out"
            )
        options = {**self.options, **given}
        if "config_kwargs" in given:
            options["config_kwargs"] = {**given["config_kwargs"], **self.options.get("config_kwargs", {})}
        return options

    def price(self, overrides: Overrides) -> Price:
        """Return what traffic from it costs: what is configured for itself beats the tables and the list."""
        price = price_of(place_of(self.url, self.endpoint), overrides, self.site.provider)
        own = self.egress_usd_per_gb
        return price if own is None else with_amounts(price, {"egress_usd_per_gb": own})

    def as_dict(self, overrides: Overrides) -> dict[str, Any]:
        """Return plain values, with the prices that hold, for JSON."""
        names = ("name", "url", "endpoint", "profile", "replicates_itself")
        access = "write" if self.is_writable else "read"
        own = {name: getattr(self, name) for name in names} | asdict(self.site) | {"access": access}
        return own | {"price": asdict(self.price(overrides))}


@dataclass(frozen=True, slots=True)
class Store:
    """Equal registries under one name: `wc://<name>/model@tag`.

    Attributes:
        replicas: As they are configured; the order says nothing of which is read.
        policy: Where its bytes may lie and be processed.
        trust: Public keys, of which one must have signed what is read, `ed25519:` and 64 hex digits; empty demands none.
        publish_to: The writable replica that publishers write to and whose tags decide; empty where none is writable.
    """

    name: str
    replicas: tuple[Replica, ...]
    policy: Policy = field(default_factory=Policy)
    trust: tuple[str, ...] = ()
    publish_to: str = ""

    def as_dict(self, overrides: Overrides) -> dict[str, Any]:
        """Return plain values, for JSON."""
        replicas = [replica.as_dict(overrides) for replica in self.replicas]
        rules = {"policy": self.policy.to_form(), "trust": list(self.trust), "publish_to": self.publish_to}
        return rules | {"replicas": replicas}


def read_stores(given: object, source: str) -> dict[str, Store]:
    """Read `[stores.<name>]` tables. Raises ConfigError."""
    return {name: _read_store(name, table, source) for name, table in as_table(given, "stores", source).items()}


def read_node(given: object, source: str) -> tuple[Site, Policy]:
    """Read the `[node]` table: where this node is, and its own policy. Raises ConfigError."""
    values = read_table(given, "node", source, {**_SITE, **_POLICY})
    return Site(**{key: values[key] for key in _SITE if key in values}), _policy_of(values, "node", source)


def read_site(value: object) -> Site:
    """Read `provider/region/jurisdiction`, of which each may be empty. Raises ValueError."""
    parts = str(value).lower().split("/")
    if len(parts) != len(_SITE) or not all(part == "" or _PLACE.fullmatch(part) for part in parts):
        raise ValueError("provider/region/jurisdiction, such as aws/eu-central-1/eu; each may be empty")
    return Site(*parts)


def _read_store(name: str, given: object, source: str) -> Store:
    table = f"stores.{name}"
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"setting {table!r:.200} in {source}: expected a name of {_NAME_FORM}", setting=table, source=source
        )
    fail = partial(_error, table, source)
    readers = {"trust": _read_trust, "publish_to": _read_name, "replicas": _read_tables}
    values = read_table(given, table, source, {**_POLICY, **readers})
    tables = values.get("replicas", [])
    if not tables:
        raise fail(f"has no replicas: expected a table [[{table}.replicas]] with url for each")
    replicas = [_read_replica(each, f"{table}.replicas #{n}", source) for n, each in enumerate(tables, 1)]
    names = [replica.name for replica in replicas]
    places = [(replica.url, replica.endpoint) for replica in replicas]
    for number, replica in enumerate(replicas):
        if replica.name in names[:number]:
            raise fail(f"has two replicas named {replica.name!r}: give each a name of its own")
        if places[number] in places[:number]:
            first = names[places.index(places[number])]
            raise fail(f"has one place twice, as {first!r} and {replica.name!r}: leave one out")
    writable = [replica.name for replica in replicas if replica.is_writable]
    publish_to = values.get("publish_to", writable[0] if writable else "")
    if publish_to and publish_to not in writable:
        raise fail(f'publishes to {publish_to!r}{nearest(publish_to, names)}: expected a replica with access = "write"')
    return Store(name, tuple(replicas), _policy_of(values, table, source), values.get("trust", ()), publish_to)


def _read_replica(given: object, table: str, source: str) -> Replica:
    values = read_table(given, table, source, _REPLICA)
    fail = partial(_error, table, source)
    if "url" not in values:
        raise fail("has no url: expected that of a registry's folder, such as s3://bucket/registry")
    url: Name = values["url"]
    endpoint = values.get("endpoint", "")
    for key in ("endpoint", "profile"):
        if key in values and url.scheme != "s3":
            raise fail(f"has {key}, which means nothing for {url}: expected an s3:// URL, or no {key}")
    if values.get("access", False) and url.scheme in _WEB:
        raise fail(f"is writable, which a web folder is not: {url}; leave access out")
    site = Site(**{key: values[key] for key in _SITE if key in values})
    host = (urlsplit(endpoint or url.root).hostname or "") if endpoint or url.scheme in _WEB else ""
    known = provider_of(url.scheme, host)
    if site.provider and known not in (UNKNOWN, site.provider):
        raise fail(
            f"has provider {site.provider!r}, but {host or url} is {known!r}: leave provider out, or add an endpoint"
        )
    if known != UNKNOWN:
        site = Site(known, site.region, site.jurisdiction)
    return Replica(
        name=values.get("name") or _made_name(site, host or url.scheme),
        url=url.root,
        endpoint=endpoint,
        site=site,
        egress_usd_per_gb=values.get("egress_usd_per_gb"),
        profile=values.get("profile", ""),
        is_writable=values.get("access", False),
        replicates_itself=values.get("replicates_itself", False),
    )


def _made_name(site: Site, otherwise: str) -> str:
    words = [word for word in (site.provider or otherwise, site.region) if word]
    return re.sub(r"[^a-z0-9._-]+", "-", "-".join(words)).strip("._-")[:63] or "replica"


def _policy_of(values: Mapping[str, Any], table: str, source: str) -> Policy:
    return Policy.from_form({key: values[key] for key in _POLICY if key in values}, f"[{table}] of {source}")


def _error(table: str, source: str, what: str) -> ConfigError:
    return ConfigError(f"[{table}] in {source} {what}", setting=table, source=source)


def _as_it_is(value: object) -> object:
    return value


def _read_name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(_NAME_FORM)
    return value


def _read_place(value: object) -> str:
    if not isinstance(value, str) or not _PLACE.fullmatch(value.lower()):
        raise ValueError("a name such as aws, eu-central-1 or eu")
    return value.lower()


def _read_profile(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("the name of a profile of the AWS configuration")
    return value


def _read_access(value: object) -> bool:
    if value not in ("read", "write"):
        raise ValueError('"read" or "write"')
    return value == "write"


def _read_tables(value: object) -> list[object]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise Unshown("expected tables, each below a title in two brackets: [[stores.NAME.replicas]]")
    return value


def _read_trust(value: object) -> tuple[str, ...]:
    # An empty list could mean nobody or everybody.
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(key, str) and _KEY.fullmatch(key) for key in value)
    ):
        raise Unshown("expected a list of public keys, each ed25519: and 64 hex digits; without any, leave trust out")
    return tuple(value)


def _read_url(value: object) -> Name:
    # Which schemes there are is only known where they are dialled.
    scheme = value.partition("://")[0].lower() if isinstance(value, str) and "://" in value else ""
    if not isinstance(value, str) or scheme == LOGICAL or not (scheme or value.startswith("/")):
        raise Unshown("expected the URL of a registry's folder, such as s3://bucket/registry, or an absolute path")
    try:
        name = parse_uri(value, [scheme], "/")
    except WeightcacheError as exc:
        raise Unshown(str(exc)) from None
    if name.file or name.model:
        raise Unshown(f"{name} names one {'file' if name.file else 'model'}: expected the folder of a registry")
    return name


def _read_endpoint(value: object) -> str:
    text = value if isinstance(value, str) else ""
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in _WEB and parts.hostname and parts.port != 0 and not re.search(r"[@?#\s]", text)
    except ValueError:  # it quotes what may be a password, and must not be this error's cause
        is_url = False
    if not is_url:
        raise Unshown("expected the URL of an S3 endpoint, such as https://t3.storage.dev, without user and query")
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


_NAME_FORM = "1 to 63 of a-z, 0-9, '.', '_' and '-', with a letter or digit first"
_POLICY: Mapping[str, Reader] = {"allow": _as_it_is, "deny": _as_it_is}  # which the policy reads
_SITE: Mapping[str, Reader] = {"provider": _read_place, "region": _read_place, "jurisdiction": _read_place}
_REPLICA: Mapping[str, Reader] = {
    **_SITE,
    "name": _read_name,
    "url": _read_url,
    "endpoint": _read_endpoint,
    "egress_usd_per_gb": read_usd,
    "profile": _read_profile,
    "access": _read_access,
    "replicates_itself": read_flag,
}
