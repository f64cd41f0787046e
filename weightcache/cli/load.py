"""Own the commands that bring a model somewhere: load, pull, prefetch, plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import IO, Any

import click

import weightcache
from weightcache.cli.options import (
    cache_option,
    device_option,
    exclude_option,
    include_option,
    offline_option,
    output_options,
    storage_option,
    timeout_option,
    uri_argument,
)
from weightcache.cli.output import Output, count, show_table, size, usd

FILE = click.File("w", encoding="utf-8", lazy=False)  # at once: what cannot be written is known before the load


@click.command()
@uri_argument
@device_option
@click.option(
    "--artefacts", metavar="FOLDER", help="Place compiled code there that a revision carries for this machine."
)
@click.option("--dtype", help="Convert floating-point tensors: bfloat16, float16, float32 or float64.")
@click.option("--trace", type=FILE, help="Write what happened when as a trace, for ui.perfetto.dev.")
@click.option("--report", type=FILE, help="Write a page with the load's waterfall and its bottleneck.")
@include_option
@exclude_option
@cache_option
@offline_option
@timeout_option
@storage_option
@output_options
@click.pass_obj
def load(
    output: Output, /, uri: str, device: str, trace: IO[str] | None, report: IO[str] | None, **options: Any
) -> None:
    """Load a model and report where the time went.

    Waits until everything that was fetched is on disk.

    Example: weightcache load s3://bucket/llama-3-8b --device cuda:0 --report load.html
    """
    with output.progress("load") as progress:
        model = weightcache.load_model(uri, device, progress=progress, **options)
    with model:
        model.wait_stored()
        facts = {**model.report.as_dict(), "files": sorted(model.files)}
    if trace is not None:
        json.dump(model.report.trace(), trace)
    if report is not None:
        report.write(model.report.html())
    output.result(facts, lambda: show_report(facts))


@click.command()
@uri_argument
@click.argument("folder")
@click.option("--no-weights", is_flag=True, help="Only what lies beside the weights: configuration, tokenizer, code.")
@cache_option
@offline_option
@timeout_option
@storage_option
@output_options
@click.pass_obj
def pull(output: Output, /, uri: str, folder: str, no_weights: bool, **options: Any) -> None:
    """Write all files of a model, bit for bit, into a folder.

    Example: weightcache pull s3://bucket/llama-3-8b ./llama
    """
    with output.progress("pull") as progress:
        facts = weightcache.pull(uri, folder, weights=not no_weights, progress=progress, **options).as_dict()
    output.result(facts, lambda: show_report(facts))


@click.command()
@uri_argument
@click.option("--tier", default="disk", show_default=True, help="The tier of this node to bring it to.")
@timeout_option
@storage_option
@output_options
@click.pass_obj
def prefetch(output: Output, /, uri: str, tier: str, **options: Any) -> None:
    """Bring a model to this node, so that the next load is warm.

    Example: weightcache prefetch s3://bucket/llama-3-8b
    """
    if tier == "host":
        raise weightcache.errors.ConfigError(
            "tier='host': host memory is kept by a process, and this command ends: use weightcache warm with a daemon, "
            "prefetch to 'disk', or call weightcache.prefetch(uri, tier='host') in the process that loads"
        )
    with output.progress("prefetch") as progress:
        facts = weightcache.prefetch(uri, tier, progress=progress, **options).as_dict()
    output.result(facts, lambda: show_report(facts))


@click.command()
@uri_argument
@include_option
@exclude_option
@cache_option
@offline_option
@timeout_option
@storage_option
@output_options
@click.pass_obj
def plan(output: Output, /, uri: str, **options: Any) -> None:
    """Show what a load would do, reading headers but no weights.

    Example: weightcache plan s3://bucket/llama-3-8b --include 'model.layers.0.*'
    """
    facts = weightcache.plan(uri, **options).as_dict()
    output.result(facts, lambda: _show_plan(facts))


def show_report(facts: Mapping[str, Any]) -> None:
    """Print a report's plain values."""
    seconds = dict(facts["seconds"])
    total_s = seconds.pop("total")
    rows = [
        ("model", facts["uri"]),
        ("revision", facts["revision"]),
        ("tensors", f"{facts['n_tensors']}, {size(facts['tensor_bytes'])}, on {facts['device']}"),
        ("time", f"{total_s:.2f} s: " + ", ".join(f"{stage} {spent_s:.2f}" for stage, spent_s in seconds.items())),
        ("bytes", ", ".join(f"{size(nbytes)} from {tier}" for tier, nbytes in facts["bytes"].items())),
        ("speed", f"{facts['gb_per_s']:.2f} GB/s"),
        ("requests", f"{facts['n_requests']}, {facts['n_retries']} of them retries"),
        *((f"asked of {place}", _asked(counts)) for place, counts in facts["replicas"].items()),
        ("stored", size(facts["stored_bytes"])),
        *((f"choice of {name}", reason) for name, reason in facts["choices"].items()),
        *(("warning", text) for text in facts["warnings"]),
    ]
    # A pull or a prefetch makes no tensors.
    show_table(("", ""), [row for row in rows if row[0] != "tensors" or facts["device"]])


def _asked(counts: Mapping[str, Any]) -> str:
    requests = f"{count(counts['n_gets'], 'GET')}, {count(counts['n_lists'], 'listing')}"
    return f"{requests}, {size(counts['received_bytes'])}, {usd(counts['usd'])} ({counts['provider']})"


def _show_plan(facts: Mapping[str, Any]) -> None:
    rows = [
        ("model", facts["uri"]),
        ("revision", facts["revision"]),
        ("tensors", f"{facts['n_tensors']}, {size(facts['tensor_bytes'])}, from {count(facts['n_shards'], 'shard')}"),
        ("files", str(facts["n_files"])),
        ("host memory", size(facts["image_bytes"])),
        ("from host memory", size(facts["host_bytes"])),
        ("from disk", f"{size(facts['disk_bytes'])} in {count(facts['n_reads'], 'read')}"),
        ("from origin", f"{size(facts['origin_bytes'])} in {count(facts['n_fetches'], 'range')}"),
        *((f"choice of {name}", reason) for name, reason in facts["choices"].items()),
    ]
    show_table(("", ""), rows)
