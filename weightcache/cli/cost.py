"""Own the command that says what loads have cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

import weightcache
from weightcache.cli.options import output_options
from weightcache.cli.output import Output, show_table, size, usd

SUMMED = (
    "n_gets",
    "n_lists",
    "n_retries",
    "n_hedges",
    "received_bytes",
    "wasted_bytes",
    "usd",
    "saved_bytes",
    "saved_usd",
)


@click.command()
@click.option("--since", metavar="WHEN", help="An age (7d, 12h, 2w), or a month or day to begin with (2026-11).")
@click.option(
    "--by",
    type=click.Choice(["replica", "model", "month"]),
    default="replica",
    show_default=True,
    help="What to sum up.",
)
@output_options
@click.pass_obj
def cost(output: Output, since: str | None, by: str) -> None:
    """Sum up what this node's loads asked of origins, and what that cost.

    Priced as each load was made: by the list to the internet, first tier, free shares not deducted, or as the
    configuration says. Traffic inside one region of AWS is free: set its egress to 0 there.

    Example: weightcache cost --since 7d --by model
    """
    rows = [row.as_dict() for row in weightcache.cost(since, by)]
    total = {name: sum(row[name] for row in rows) for name in SUMMED}
    prices = sorted({each for row in rows for each in row["prices"]})
    facts = {"by": by, "since": since, "rows": rows, "total": total, "prices": prices}
    output.result(facts, lambda: _show(facts))


def _show(facts: Mapping[str, Any]) -> None:
    if not facts["rows"]:
        print("no load is known that dialled" + (f" since {facts['since']}" if facts["since"] else ""))
        return
    titles = [facts["by"], "gets", "lists", "retries", "hedges", "received", "wasted", "cost", "saved", "worth"]
    show_table(titles, [*map(_row, facts["rows"]), _row({"name": "total", **facts["total"]})])
    print(f"priced by: {'; '.join(facts['prices'])}. Free shares are not deducted.")


def _row(counts: Mapping[str, Any]) -> Sequence[str]:
    return (
        counts["name"],
        *(str(counts[name]) for name in ("n_gets", "n_lists", "n_retries", "n_hedges")),
        size(counts["received_bytes"]),
        size(counts["wasted_bytes"]),
        usd(counts["usd"]),
        size(counts["saved_bytes"]),
        usd(counts["saved_usd"]),
    )
