"""Own the command that starts vLLM on a model from here: `weightcache vllm serve`.

Never imports vLLM: it becomes vLLM.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

import weightcache
from weightcache import errors
from weightcache.cli.options import output_options, storage_option, uri_argument
from weightcache.cli.output import Output

log = logging.getLogger(__name__)

NAME = "--served-model-name"
OWN = ("--load-format", "--model-loader-extra-config", "--model", "--model-weights")  # set here, from the URI


@click.group()
def vllm() -> None:
    """Run vLLM on a model from here."""


# What stands behind the URI is vLLM's, to the last word.
@vllm.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@uri_argument
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[VLLM'S ARGUMENTS]...")
@storage_option
@output_options
@click.pass_obj
def serve(output: Output, /, uri: str, arguments: Sequence[str], storage_options: Mapping[str, Any]) -> None:
    """Serve a model with vLLM, its weights streamed from where they are.

    Brings configuration, tokenizer and the weights' headers into a folder below the cache folder, and runs `vllm serve` on
    it, whose weights come by the load format weightcache. Options of weightcache stand before the URI, those of vLLM behind it.

    Example: weightcache vllm serve s3://bucket/llama-3-8b --port 8000
    """
    check_arguments(arguments)
    found = find_spec("vllm")
    if found is None or found.origin is None:  # a folder of that name passes for a package, but has no origin
        raise errors.ConfigError(f"vLLM is not installed for {sys.executable}: install it there, with pip install vllm")
    name = name_of(uri)
    kept = weightcache.configuration().settings.dir / "vllm"
    try:
        kept.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=kept))
    except OSError as exc:
        raise errors.ConfigError(
            f"cannot write below the cache folder, where vLLM finds its configuration: {kept} ({exc.strerror}); name "
            "another by WEIGHTCACHE_DIR"
        ) from exc
    try:
        with output.progress("pull") as progress:
            report = weightcache.pull(
                uri, staging, weights=False, headers=True, storage_options=storage_options, progress=progress
            )
        folder = kept / f"{name}-{report.revision.partition(':')[2][:16]}"
        try:
            staging.rename(folder)  # never over another: a server that runs may read its files again
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    command = serve_command(folder, pinned(uri, report.revision), storage_options, name, arguments)
    log.info("running %s", " ".join(command))
    os.execv(command[0], command)


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse what the URI says already. Raises ConfigError."""
    for given in _flags(arguments):
        if given in OWN:
            raise errors.ConfigError(
                f"{given} is set by weightcache vllm serve itself: leave it out, or run vllm serve with --load-format "
                "weightcache yourself; options for the origin are given before the URI, as --storage-option KEY=VALUE"
            )


def name_of(uri: str) -> str:
    """Return what a model is called: the last part of its URI, without a tag."""
    return uri.rstrip("/.").rpartition("/")[2].partition("@")[0] or "model"


def pinned(uri: str, revision: str) -> str:
    """Return the URI of exactly this revision of a registry's model: a tag may move before all ranks have read it."""
    place, at, tag = uri.rpartition("@")
    if uri.startswith("wc://"):
        return f"{place if at else uri}@{revision}"
    return f"{place}@{revision}" if at and "/" not in tag and not uri.startswith("hf://") else uri


def serve_command(
    folder: Path, uri: str, storage_options: Mapping[str, Any], name: str, arguments: Sequence[str]
) -> list[str]:
    """Return the command line that serves a model whose files beside the weights are in a folder."""
    extra = {"uri": uri} | ({"storage_options": storage_options} if storage_options else {})
    # By this interpreter, not by PATH: where weightcache is, so is the plugin. As vLLM's own script does it, without the
    # working folder, whose packages would hide those that are installed (-P).
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", str(folder)]
    command += ["--load-format", "weightcache", "--model-loader-extra-config", json.dumps(extra)]
    if NAME not in _flags(arguments):
        command += [NAME, name]
    return [*command, *arguments]


def _flags(arguments: Sequence[str]) -> list[str]:
    """Return the names of the options among arguments, spelled as vLLM's help has them (`--load_format=…` is one, too)."""
    names = [each.partition("=")[0].partition(".")[0] for each in arguments if each.startswith("--")]
    return [name.replace("_", "-") for name in names]
