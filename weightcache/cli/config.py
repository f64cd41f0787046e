"""Own the commands that look at the configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

import weightcache
from weightcache.cli.options import output_options
from weightcache.cli.output import Output, show_table

REPLICA_TITLES = ("replica", "url", "endpoint", "place", "access", "egress", "1000 GETs", "prices")


@click.group()
def config() -> None:
    """Look at the configuration.

    Example: weightcache config check
    """


@config.command()
@click.argument("file", required=False)
@output_options
@click.pass_obj
def check(output: Output, file: str | None) -> None:
    """Read the configuration, or FILE in its place, and show what of it differs from the defaults.

    Dials nothing: whether a store is there, and lets us in, shows when it is used.

    Example: weightcache config check ./weightcache.toml
    """
    facts = weightcache.configuration(file).as_dict()
    output.result(facts, lambda: _show(facts))


def _show(facts: Mapping[str, Any]) -> None:
    settings, stores = facts["settings"], facts["stores"]
    rows = [
        ("file", facts["file"] or "none"),
        ("node", _place(facts["node"])),
        ("policy", _policy(facts["policy"])),
        *((name, f"{_value(setting['value'])}, from {setting['from']}") for name, setting in settings.items()),
    ]
    show_table(("", ""), rows)
    for name, store in stores.items():
        print()
        show_table(("", ""), [("store", f"wc://{name}"), *_rules(store)])
        show_table(REPLICA_TITLES, map(_replica, store["replicas"]))


def _rules(store: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "policy", _policy(store["policy"])
    yield "trusts", ", ".join(store["trust"]) or "unsigned models too"
    yield "publishes to", store["publish_to"] or "none of its replicas"


def _replica(replica: Mapping[str, Any]) -> Sequence[str]:
    price = replica["price"]
    return (
        replica["name"],
        replica["url"],
        replica["endpoint"] + (f" (profile {replica['profile']})" if replica["profile"] else ""),
        _place(replica) + (", replicates itself" if replica["replicates_itself"] else ""),
        replica["access"],
        f"{price['egress_usd_per_gb']:g} USD a GB",
        f"{price['get_usd_per_1000']:g} USD",
        price["note"],
    )


def _place(site: Mapping[str, str]) -> str:
    parts = [site[key] for key in ("provider", "region", "jurisdiction")]
    return "/".join(part or "?" for part in parts) if any(parts) else "unknown"


def _policy(form: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    rules = [f"{side} {kind} {', '.join(names)}" for side, kinds in form.items() for kind, names in kinds.items()]
    return "; ".join(rules) or "every place"


def _value(value: Any) -> str:
    if isinstance(value, dict):  # of prices
        return "; ".join(
            f"{name}: {', '.join(f'{key} {usd:g}' for key, usd in of.items())}" for name, of in value.items()
        )
    return ", ".join(value) if isinstance(value, list) else str(value)
