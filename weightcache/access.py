"""Own what one request may touch: the sites at the ends of its ways, the policies that rule on them, and whom it trusts.

Never dials, and decides nothing itself: every way is `policy.authorize`'s to allow, and every signature `signatures.verify`'s.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from weightcache import audit
from weightcache.config import Settings, read_settings
from weightcache.digest import Digest
from weightcache.errors import ConfigError, FormatError, SignatureError, nearest
from weightcache.ledger import place_of
from weightcache.origins.plane import Host
from weightcache.policy import Edge, Owned, Ruling, Verb, authorize
from weightcache.prices import UNKNOWN, Price, price_of, provider_of
from weightcache.residency import Policy, Site
from weightcache.signatures import PublicKey, Seen, Signature, verify
from weightcache.spending import read_since
from weightcache.stores import Store
from weightcache.uri import Name

NODE = "this node"
MOST_RULINGS = 10_000  # of one request, that are remembered one by one


class Access:
    """The rules of one request. Rulings are collected for the audit log, in memory until `close`.

    Args:
        settings: This process's.
        name: What is asked for; a logical name has its store's rules.
        verb: Why bytes of it move.
    """

    def __init__(self, settings: Settings, name: Name, verb: Verb = Verb.READ) -> None:
        self._settings = settings
        self._model = str(name)
        self._verb = verb
        self.store: Store | None = settings.stores[name.store] if name.store else None
        self._policies: list[Owned] = [(NODE, settings.policy)]
        if self.store is not None:
            self._policies.append((f"store {self.store.name}", self.store.policy))
        self._rulings: Counter[Ruling] = Counter()

    def add(self, owner: str, policy: Policy) -> None:
        """Let another policy rule from now on."""
        if (owner, policy) not in self._policies:
            self._policies.append((owner, policy))

    def join(self, other: Access) -> None:
        """Let the policies of another request rule from now on: what it reads is what moves here."""
        for owner, policy in other._policies:
            self.add(owner, policy)

    def check_read(self, verb: Verb, source: Site, source_name: str) -> None:
        """Raise ResidencyError unless bytes may come from there to this node, for this."""
        verb = self._verb if verb is Verb.READ else verb
        self._authorize(Edge(verb, self._model, source, self._settings.node, source_name, NODE))

    def check_write(self, verb: Verb, target: Site, target_name: str) -> None:
        """Raise ResidencyError unless bytes may go from this node to there."""
        self._authorize(Edge(verb, self._model, self._settings.node, target, NODE, target_name))

    def check_redirect(self, host: Host) -> None:
        """Raise ResidencyError unless bytes may come from a host that another one named."""
        provider = provider_of(host.scheme, host.name)
        self.check_read(Verb.REDIRECT, Site(provider), host.authority)

    def check_region(self, name: Name, region: str) -> None:
        """Raise ResidencyError unless bytes may come from the region that a bucket turned out to be in."""
        site = self.site_of(name, "")
        if site.region != region:
            # Who said another region may be as wrong about the jurisdiction.
            found = Site(site.provider, region, "" if site.region else site.jurisdiction)
            self.check_read(Verb.REDIRECT, found, f"{place_of(name.root)} in {region}")

    def check_keep(self) -> None:
        """Raise ResidencyError unless this node may keep what it reads."""
        self.check_write(Verb.KEEP, self._settings.node, "the cache of this node")

    def site_of(self, name: Name, endpoint: str) -> Site:
        """Return where a place lies: as a replica of it is configured, else what its host says of its provider."""
        place = place_of(name.root, endpoint)
        around = [
            replica
            for store in self._settings.stores.values()
            for replica in store.replicas
            if (name.scheme == "file" or place_of(replica.url, replica.endpoint) == place)
            and f"{name.root}/".startswith(f"{replica.url}/")
        ]
        if around:
            return max(around, key=lambda replica: len(replica.url)).site
        if name.scheme == "file":
            return self._settings.node
        parts = urlsplit(place)
        provider = provider_of(parts.scheme, parts.hostname or "" if parts.scheme in ("http", "https") else "")
        return Site("" if provider == UNKNOWN else provider)

    def price_of(self, place: str) -> Price:
        """Return what traffic from a place costs: as a replica of it is configured, else by the prices."""
        overrides = self._settings.prices
        for store in self._settings.stores.values():
            for replica in store.replicas:
                if place_of(replica.url, replica.endpoint) == place:
                    return replica.price(overrides)
        return price_of(place, overrides)

    def check_signed(self, model: str, tag: str | None, revision: Digest, signatures: Sequence[bytes]) -> None:
        """Raise SignatureError unless the store's trust is satisfied: signed by one of its keys, and not rolled back."""
        if self.store is None or not self.store.trust:
            return
        trusted = [PublicKey.parse(text) for text in self.store.trust]
        serials: list[int] = []
        refusal: SignatureError | None = None
        for content in signatures:
            try:
                serials.append(verify(_read_signature(content, model, revision), model, revision, trusted))
            except SignatureError as exc:
                refusal = exc
        if not serials:
            if refusal is not None:
                raise refusal
            verify(None, model, revision, trusted)
        if tag is not None:
            Seen(self._settings.dir).check_and_note(self.store.name, model, tag, max(serials))

    @property
    def refusals(self) -> list[Ruling]:
        """What was forbidden so far."""
        return [ruling for ruling in self._rulings if not ruling.allowed]

    @property
    def key_ids(self) -> list[str]:
        """The keys of which one must have signed what is read; none where signatures are not demanded."""
        return [PublicKey.parse(text).key_id for text in self.store.trust] if self.store is not None else []

    def close(self) -> None:
        """Write what was ruled into the audit log, where any policy or store is configured. May be called twice."""
        rulings, self._rulings = self._rulings, Counter()
        if rulings and (self.store is not None or any(policy != Policy() for _, policy in self._policies)):
            with contextlib.suppress(OSError):  # said by the log, which cannot be written then
                self._settings.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            audit.append(self._settings.dir, rulings.elements(), time.time())

    def _authorize(self, edge: Edge) -> None:
        authorize(edge, self._policies, self._note)

    def _note(self, ruling: Ruling) -> None:
        if ruling in self._rulings or len(self._rulings) < MOST_RULINGS:
            self._rulings[ruling] += 1


def _read_signature(content: bytes, model: str, revision: Digest) -> Signature:
    source = f"the signature of {model}@{revision}"
    try:
        form = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise SignatureError(f"{source} is not JSON: sign the revision again") from exc
    try:
        return Signature.from_form(form, source)
    except FormatError as exc:
        raise SignatureError(str(exc), **exc.facts) from exc


def rulings(since: str | None) -> list[dict[str, Any]]:
    """Return what was ruled on this node; see `weightcache.rulings`."""
    root = read_settings().dir
    return [json.loads(entry.to_line()) for entry in audit.read(root, read_since(since, time.time()) if since else 0.0)]


def trusted_keys(store: str, key: str | None) -> list[str]:
    """Return whom a store trusts, and one more; see `weightcache.trusted_keys`."""
    stores = read_settings().stores
    if store not in stores:
        raise ConfigError(
            f"no store {store!r} is configured{nearest(store, stores)}: see [stores.NAME] in weightcache.toml"
        )
    known = list(stores[store].trust)
    if key is None:
        return known
    try:
        return list(dict.fromkeys([*known, str(PublicKey.parse(key))]))
    except ValueError as exc:
        raise ConfigError(f"{exc}; weightcache keygen prints one") from exc
