"""Own the choice of an origin: which implementation serves a place, with which options, to read or to write.

The one module that chooses among concrete origins. Never dials.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from weightcache.access import Access
from weightcache.config import Settings
from weightcache.errors import ConfigError, ResidencyError
from weightcache.ledger import place_of
from weightcache.measurements import Measurements
from weightcache.origins.base import Origin, WritableOrigin
from weightcache.origins.local import LocalOrigin
from weightcache.origins.pace import throttle
from weightcache.origins.plane import Wiring
from weightcache.origins.replicas import Member, Replicas
from weightcache.origins.resilient import ResilientWriter
from weightcache.origins.web import WebOrigin
from weightcache.policy import Verb
from weightcache.residency import Site
from weightcache.runtime import Runtime
from weightcache.stores import Replica
from weightcache.uri import Name, parse_uri

WEB = ("http", "https")
N_THREADS = 16  # of an fsspec file system, which blocks one for each call


def make_origin(name: Name, settings: Settings, options: Mapping[str, Any], threads: Runtime, access: Access) -> Origin:
    """Make what reads a folder, or a registry's root. Raises ConfigError for options that mean nothing there."""
    if name.scheme == "file":
        _check_no_options(name, options)
        return LocalOrigin(Path(name.root), threads.workers, name.file)
    limit = throttle(settings.max_bytes_per_s)
    if name.scheme == "s3":
        from weightcache.origins.s3 import S3Origin

        return S3Origin(name.root, options, _wiring(name, settings, options, access), limit, name.file)
    if name.scheme in WEB:
        return WebOrigin(name.root, options, _wiring(name, settings, options, access), limit, name.file)
    from weightcache.origins.generic import FsspecOrigin

    return FsspecOrigin(name.scheme, name.root, options, limit, min(settings.connections, N_THREADS), name.file)


def make_replicas(
    name: Name, settings: Settings, options: Mapping[str, Any], threads: Runtime, access: Access
) -> Replicas:
    """Make what reads a store of the configuration: those of its replicas that policy allows.

    Raises:
        ResidencyError: It allows none.
    """
    store = settings.stores[name.store]
    remembered = Measurements(settings.dir)
    members: list[Member] = []
    refusal: ResidencyError | None = None
    sites: dict[str, Site] = {}
    for replica in store.replicas:
        try:
            access.check_read(Verb.READ, replica.site, replica.name)
        except ResidencyError as exc:
            refusal = refusal or exc
            continue
        root = name_of(replica)
        origin = make_origin(root, settings, replica.opened_with(options), threads, access)
        place = origin.ledger.replica = place_of(replica.url, replica.endpoint)
        price = replica.price(settings.prices).egress_usd_per_gb
        is_watched = root.scheme in (*WEB, "s3")
        members.append(Member(replica.name, origin, price, remembered.of(place), is_watched))
        sites[replica.name] = replica.site
    if not members:
        assert refusal is not None  # a store has replicas
        raise refusal

    def check(verb: Verb, member: Member) -> None:
        access.check_read(verb, sites[member.name], member.name)

    return Replicas(
        name.root,
        members,
        check,
        most_bytes_per_s=settings.max_bytes_per_s,
        on_close=lambda: threads.writers.submit(remembered.save),
    )


def name_of(replica: Replica) -> Name:
    """Return the root of a replica as a place."""
    return parse_uri(f"{replica.url}/", fsspec.available_protocols(), "/")


def open_writable(
    name: Name, settings: Settings, options: Mapping[str, Any], threads: Runtime, access: Access
) -> ResilientWriter:
    """Open what writes to a registry's root. Raises ConfigError where nothing can be written."""
    return ResilientWriter(
        _make_writable(name, settings, options, threads, access), attempts=settings.attempts, most=settings.connections
    )


def _make_writable(
    name: Name, settings: Settings, options: Mapping[str, Any], threads: Runtime, access: Access
) -> WritableOrigin:
    if name.scheme == "file":
        from weightcache.origins.local_writer import WritableFolder

        _check_no_options(name, options)
        return WritableFolder(Path(name.root), threads.workers)
    limit = throttle(settings.max_bytes_per_s)
    if name.scheme == "s3":
        from weightcache.origins.s3_writer import WritableS3

        return WritableS3(name.root, options, _wiring(name, settings, options, access), limit)
    if name.scheme in WEB:
        raise ConfigError(
            f"{name.root} is a web folder: models are loaded from it, but it is not listed or written to; name the registry "
            "by the URL of its object store, as in s3://bucket/registry"
        )
    from weightcache.origins.generic_writer import WritableFsspec

    return WritableFsspec(name.scheme, name.root, options, limit, min(settings.connections, N_THREADS))


def _wiring(name: Name, settings: Settings, options: Mapping[str, Any], access: Access) -> Wiring:
    def check_region(region: str) -> None:
        from weightcache.origins.s3 import endpoint_of

        if not endpoint_of(options):  # else it is the same host, by whatever name of a region requests are signed
            access.check_region(name, region)

    return Wiring(
        settings.request_timeout_s,
        redirect_hosts=settings.redirect_hosts,
        check_redirect=access.check_redirect,
        check_region=check_region,
    )


def _check_no_options(name: Name, options: Mapping[str, Any]) -> None:
    if options:
        raise ConfigError(f"storage_options mean nothing for the local folder {name.root}: leave them out")
