"""Own the commands of the node daemon: daemon, status, ps, warm."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

import click

import weightcache
from weightcache.cli.load import show_report
from weightcache.cli.options import output_options, storage_option, uri_argument
from weightcache.cli.output import Output, ago, count, show_table, size, usd

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _read_duration(_: click.Context, __: click.Parameter, given: str | None) -> float | None:
    if given is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", given)
    if match is None:
        raise click.BadParameter("expected a duration such as 90s, 10m, 12h or 30d; 0 is for ever")
    return float(match[1]) * _UNITS[match[2] or "s"]


@click.command()
@click.option(
    "--log-format",
    type=click.Choice(["lines", "json"]),
    default="lines",
    show_default=True,
    help="How it logs to stderr: json is one object a line.",
)
@output_options
@click.pass_obj
def daemon(output: Output, log_format: str) -> None:
    """Run the node daemon, until SIGTERM or Ctrl-C.

    It keeps models in host memory for all processes of this node, which use it by themselves. SIGHUP has it read its
    configuration again.

    Example: weightcache daemon
    """
    output.log(1, as_json=log_format == "json")
    weightcache.serve()


@click.command()
@output_options
@click.pass_obj
def status(output: Output) -> None:
    """Show what the node daemon has and does.

    Example: weightcache status
    """
    state = weightcache.status()
    output.result(state, lambda: _show_state(state))


@click.command()
@output_options
@click.pass_obj
def ps(output: Output) -> None:
    """List the models in the node daemon's host memory, and what is on its way.

    Example: weightcache ps
    """
    state = weightcache.status()
    found = {
        "models": [model for model in state["models"] if model["tier"] == "host"],
        "transfers": state["transfers"],
    }
    output.result(found, lambda: _show_models(found))


@click.command()
@uri_argument
@click.option(
    "--tier", type=click.Choice(["host", "disk"]), default="host", show_default=True, help="Where it is brought to."
)
@click.option(
    "--until",
    "until_s",
    callback=_read_duration,
    metavar="DURATION",
    help="How long it stays in host memory, used or not: 90s, 10m, 12h, 30d; 0 is until it is evicted.",
)
@storage_option
@output_options
@click.pass_obj
def warm(output: Output, uri: str, tier: str, until_s: float | None, storage_options: Mapping[str, Any]) -> None:
    """Have the node daemon bring a model to host memory, or to disk.

    Example: weightcache warm s3://bucket/llama-3-8b --until 10m
    """
    with output.progress("warm") as progress:
        report = weightcache.warm(uri, tier, until_s=until_s, storage_options=storage_options, progress=progress)
    facts = report.as_dict()
    output.result(facts, lambda: show_report(facts))


def _show_state(state: Mapping[str, Any]) -> None:
    ledger = state["ledger"]
    rows = [
        ("daemon", f"process {state['pid']}, weightcache {state['version']}, since {ago(state['started_s'])}"),
        ("state", "ready" if state["is_ready"] else "starting or ending"),
        ("socket", state["socket"]),
        ("clients", f"{state['n_clients']}; {state['n_refused']} were refused"),
        *((tier["tier"], _use(tier)) for tier in state["tiers"]),
        *([("huge pages", state["huge_pages"])] if state["huge_pages"] else []),
        ("transfers", str(len(state["transfers"]))),
        (
            "spent",
            f"{usd(ledger['usd'])}, {size(int(ledger['received_bytes']))}, {count(int(ledger['n_gets']), 'GET')}",
        ),
    ]
    show_table(("", ""), rows)
    _show_models(state)


def _use(tier: Mapping[str, Any]) -> str:
    return f"{size(tier['used_bytes'])} of {size(tier['budget_bytes'])}, {size(tier['leased_bytes'])} in use"


def _show_models(state: Mapping[str, Any]) -> None:
    if state["models"]:
        titles = ["model", "tier", "state", "here", "of", "uses", "leases", "last use", "held"]
        show_table(titles, [_row(model) for model in state["models"]])
    else:
        print("no models in host memory")
    if state["transfers"]:
        titles = ["on its way", "to", "why", "done", "of", "rate"]
        rows = [
            (each["uri"], each["tier"], each["why"], size(each["done_bytes"]), size(each["total_bytes"]), _rate(each))
            for each in state["transfers"]
        ]
        show_table(titles, rows)


def _rate(transfer: Mapping[str, Any]) -> str:
    return f"{size(transfer['bytes_per_s'])}/s"


def _row(model: Mapping[str, Any]) -> tuple[str, ...]:
    until = f"for {int(model['until_s'] - time.time())} s" if model["until_s"] else ""
    return (
        model["uri"],
        model["tier"],
        model["state"],
        size(model["bytes"]),
        size(model["total_bytes"]),
        str(model["n_hits"]),
        str(model["n_leases"]),
        ago(model["last_use_s"]) if model["last_use_s"] else "never",
        "pinned" if model["pinned"] else until,
    )
