"""Own the commands that serve stacks which take models from a Hugging Face Hub, or from its cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

import weightcache
from weightcache.cli.options import (
    cache_option,
    offline_option,
    output_options,
    storage_option,
    timeout_option,
    uri_argument,
)
from weightcache.cli.output import Output, count, show_table, size


@click.group()
def hub() -> None:
    """Have stacks that only know the Hugging Face Hub take models from here."""


def _read_models(ctx: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for each in given:
        repo, separator, uri = each.partition("=")
        if not (repo and separator and uri):
            raise click.BadParameter(f"expected ORG/NAME=URI, not {each!r}", ctx, parameter)
        models[repo] = uri
    return models


@hub.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="ORG/NAME=URI",
    callback=_read_models,
    help="A repository and the model that it is; may be repeated. Those of [hub.models] are there, too.",
)
@click.option("--address", metavar="HOST:PORT", help="Where to answer.  [default: that of [hub], else 127.0.0.1:8377]")
@click.option("--upstream", metavar="URL", help="The Hub that other repositories come from, through this node's cache.")
@output_options
@click.pass_obj
def serve(output: Output, models: dict[str, str], address: str | None, upstream: str | None) -> None:
    """Answer as a Hugging Face Hub, until SIGTERM or Ctrl-C.

    Example: weightcache hub serve --model org/llama=s3://bucket/llama-3-8b
    """
    output.log(1)

    def tell(url: str) -> None:
        output.result({"url": url}, lambda: print(f"HF_ENDPOINT={url}"))
        sys.stdout.flush()  # whoever waits for it reads it through a pipe

    weightcache.serve_hub(models, address=address, upstream=upstream, on_ready=tell)


repo_option = click.option("--repo", required=True, metavar="ORG/NAME", help="The name that stacks ask for it by.")
cache_dir_option = click.option(
    "--cache-dir",
    metavar="FOLDER",
    help="The Hugging Face cache.  [default: HF_HUB_CACHE, or hub below HF_HOME]",
)


@hub.command()
@uri_argument
@repo_option
@cache_dir_option
@cache_option
@offline_option
@timeout_option
@storage_option
@output_options
@click.pass_obj
def materialise(output: Output, /, uri: str, repo: str, **options: Any) -> None:
    """Lay a model out in the Hugging Face cache, where every stack finds it offline.

    Example: weightcache hub materialise s3://bucket/llama-3-8b --repo org/llama
    """
    with output.progress("materialise") as progress:
        facts = weightcache.materialise(uri, repo, progress=progress, **options).as_dict()
    rows = [
        ("repository", facts["repo"]),
        ("model", f"{facts['uri']} at {facts['revision']}"),
        ("snapshot", facts["path"]),
        (
            "files",
            f"{facts['n_files']}, {size(facts['bytes'])}, of which {size(facts['written_bytes'])} were not there",
        ),
    ]
    output.result(facts, lambda: show_table(("", ""), rows))


@hub.command()
@repo_option
@cache_dir_option
@output_options
@click.pass_obj
def remove(output: Output, repo: str, cache_dir: str | None) -> None:
    """Remove from the Hugging Face cache what was materialised there; what others downloaded stays.

    Example: weightcache hub remove --repo org/llama
    """
    facts = weightcache.remove_materialised(repo, cache_dir=cache_dir).as_dict()
    told = f"removed {count(len(facts['commits']), 'snapshot')} of {repo}, {size(facts['bytes'])}"
    output.result(facts, lambda: print(told))
