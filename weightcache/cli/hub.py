"""Own the commands that serve stacks which take models from a Hugging Face Hub, or from its cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

import weightcache
from weightcache.cli.options import output_options
from weightcache.cli.output import Output


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
