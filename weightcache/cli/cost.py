"""Own the command that says what loads have cost, or would cost."""

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
    help="What to sum up.  [default: replica]",
)
@click.option("--simulate", is_flag=True, help="Estimate a month of loads instead, store by store.")
@click.option("--model-gb", type=float, metavar="GB", help="Size of the simulated model.  [default: 140]")
@click.option("--loads", "n_loads", type=int, metavar="N", help="Simulated loads a month.  [default: 100]")
@click.option("--nodes", "n_nodes", type=int, metavar="N", help="Nodes that they happen on.  [default: 1]")
@click.option("--hit-share", type=float, metavar="SHARE", help="Share of loads that come from disk, from 0 to 1.")
@output_options
@click.pass_obj
def cost(output: Output, /, since: str | None, by: str | None, simulate: bool, **case: Any) -> None:
    """Sum up what this node's loads asked of origins, and what that cost; or with --simulate, what loads would cost.

    Priced as each load was made: by the list to the internet, first tier, free shares not deducted, or as the
    configuration says. Traffic inside one region of AWS is free: set its egress to 0 there.

    A simulation compares providers, and the configuration's replicas, for loads in another cloud: with every load cold,
    and with the disk cache, where each node loads cold once, or --hit-share says how many do not.

    \b
    Example: weightcache cost --since 7d --by model
             weightcache cost --simulate --model-gb 140 --loads 100 --nodes 4
    """
    given = {name: value for name, value in case.items() if value is not None}
    if simulate:
        if since or by:
            raise click.UsageError("--since and --by are about what was loaded: leave them out with --simulate")
        simulated = weightcache.simulate_cost(**given).as_dict()
        output.result(simulated, lambda: _show_simulation(simulated))
        return
    if given:
        raise click.UsageError("--model-gb, --loads, --nodes and --hit-share describe a simulation: add --simulate")
    by = by or "replica"
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


def _show_simulation(facts: Mapping[str, Any]) -> None:
    n_loads, n_cold, n_gets = facts["n_loads"], facts["n_cold"], facts["n_gets"]
    print(
        f"A {size(facts['model_bytes'])} model, {n_loads} loads a month to another cloud, {n_gets} GETs each if cold."
    )
    print(f"All of them cold; then with the disk cache, {n_cold} of them cold.")
    every, cached = ("storage", "egress", "requests", "in all"), ("cached: egress", "requests", "in all", "saved")
    show_table(("a month at", *every, *cached), map(_month, facts["months"]))
    print("\nPriced by:")
    show_table(("", ""), [(month["store"], month["priced_by"]) for month in facts["months"]])
    print("Other free shares, discounts, taxes, and the writes of publishing are not counted. A GB is 10^9 bytes.")


def _month(month: Mapping[str, Any]) -> Sequence[str]:
    every = ("storage_usd", "egress_usd", "requests_usd", "usd")
    cached = ("cached_egress_usd", "cached_requests_usd", "cached_usd", "saved_usd")
    return (month["store"], *(usd(month[name]) for name in (*every, *cached)))
