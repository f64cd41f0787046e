"""Own the options that several commands share, and how their values are read.

Never decides what a value means: that is the library's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from weightcache.cli.output import Output

F = TypeVar("F", bound=Callable[..., Any])


def output_options(command: F) -> F:
    """Add --json and --verbose, which reach the command as what its Output does."""
    as_json = click.option(
        "--json",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_choose_json,
        help="Print one JSON object on stdout, and no progress.",
    )
    verbose = click.option(
        "-v",
        "--verbose",
        count=True,
        is_eager=True,
        expose_value=False,
        callback=_choose_verbosity,
        help="Log to stderr what is done; -vv in detail.",
    )
    return as_json(verbose(command))


def _choose_json(ctx: click.Context, _: click.Parameter, chosen: bool) -> None:
    output: Output = ctx.obj
    output.as_json = output.as_json or chosen


def _choose_verbosity(ctx: click.Context, _: click.Parameter, count: int) -> None:
    output: Output = ctx.obj
    output.log(count)


def options_reader(ctx: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[str, Any]:
    """Read `KEY=VALUE`s: a value is JSON if it can be, else text; dots in a key lead into nested options."""
    options: dict[str, Any] = {}
    for pair in given:
        key, separator, text = pair.partition("=")
        *outer, last = key.split(".")
        if not (separator and all((*outer, last))):
            raise click.BadParameter("expected KEY=VALUE", ctx, parameter)  # not quoted: it may be a secret
        inner = options
        for name in outer:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise click.BadParameter(f"{key!r} leads into {name!r}, which has a value of its own", ctx, parameter)
        inner[last] = _read_json(text)
    return options


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _list_or_none(_: click.Context, __: click.Parameter, given: Sequence[str]) -> list[str] | None:
    return list(given) or None


uri_argument = click.argument("uri")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
include_option = click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    callback=_list_or_none,
    help="Only tensors whose names match (*, ?, [...]); may be repeated.",
)
exclude_option = click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    callback=_list_or_none,
    help="No tensors whose names match; may be repeated.",
)
cache_option = click.option(
    "--cache",
    type=click.Choice(["auto", "disk", "none"]),
    default="auto",
    show_default=True,
    help="Keep what is fetched on this node's disk, or not; auto keeps what does not lie there already.",
)
offline_option = click.option(
    "--offline", is_flag=True, default=None, help="Never dial; fail if something is not on this node."
)
timeout_option = click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Longest time for all of it.",
)
storage_option = click.option(
    "--storage-option",
    "storage_options",
    multiple=True,
    metavar="KEY=VALUE",
    callback=options_reader,
    help="For the origin, as in fsspec: endpoint_url=http://host:9000, anon=true, client_kwargs.region_name=eu-west-1. "
    "Other users of this machine can see it: keep secrets in the environment.",
)
