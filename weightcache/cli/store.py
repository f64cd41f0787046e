"""Own the commands that care for this node's cache: ls, verify, evict, pin, unpin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

import weightcache
from weightcache import errors
from weightcache.cli.options import output_options, storage_option, uri_argument
from weightcache.cli.output import Output, ago, show_table, size


@click.command()
@output_options
@click.pass_obj
def ls(output: Output) -> None:
    """List the models in the cache, most recently used first.

    Example: weightcache ls
    """
    models = [model.as_dict() for model in weightcache.models()]
    output.result({"models": models}, lambda: _show_models(models))


def _show_models(models: Sequence[Mapping[str, Any]]) -> None:
    if not models:
        print("no models in the cache")
        return
    titles = ["model", "tier", "here", "of", "last use", "held", "endpoint"]
    rows = [
        (
            model["uri"],
            model["tier"],
            size(model["bytes"]),
            size(model["total_bytes"]),
            ago(model["last_use_s"]),
            ", ".join(word for word in ("pinned", "in_use") if model[word]).replace("_", " "),
            model["endpoint"],
        )
        for model in models
    ]
    show_table(titles, rows)


@click.command()
@click.option("--deep", is_flag=True, help="Recompute every digest, not only look at presence and size.")
@click.option("--repair", is_flag=True, help="Fetch what is rotten or lost again.")
@storage_option
@output_options
@click.pass_obj
def verify(output: Output, deep: bool, repair: bool, storage_options: Mapping[str, Any]) -> int:
    """Check the chunks of the cache.

    Exits with 6 if some are rotten or lost, and not repaired.

    Example: weightcache verify --deep --repair
    """
    found = weightcache.verify(deep=deep, repair=repair, storage_options=storage_options).as_dict()
    output.result(found, lambda: _show_verification(found))
    return 0 if found["sound"] else errors.IntegrityError.exit_code


def _show_verification(found: Mapping[str, Any]) -> None:
    how = "digests recomputed" if found["deep"] else "presence and size; --deep recomputes digests"
    print(f"{'sound' if found['sound'] else 'NOT SOUND'}: {found['n_chunks']} chunks, {size(found['n_bytes'])} ({how})")
    rows = [(state, digest) for state in ("rotten", "lost", "repaired", "unrepaired") for digest in found[state]]
    show_table(("", ""), [*rows, *(("problem", text) for text in found["problems"])])


@click.command()
@click.argument("uris", metavar="URI...", nargs=-1, required=True)
@output_options
@click.pass_obj
def evict(output: Output, uris: Sequence[str]) -> None:
    """Remove models from the cache.

    Stops at the first that is held or not there.

    Example: weightcache evict s3://bucket/llama-3-8b
    """
    evicted = [{"uri": uri, "freed_bytes": weightcache.evict(uri)} for uri in uris]
    output.result({"evicted": evicted}, lambda: show_table(("", ""), [_freed(each) for each in evicted]))


def _freed(each: Mapping[str, Any]) -> tuple[str, str]:
    return each["uri"], f"{size(each['freed_bytes'])} freed"


@click.command()
@uri_argument
@output_options
@click.pass_obj
def pin(output: Output, uri: str) -> None:
    """Keep a model in the cache until it is unpinned.

    Example: weightcache pin s3://bucket/llama-3-8b
    """
    weightcache.pin(uri)
    output.result({"uri": uri, "pinned": True}, lambda: show_table(("", ""), [(uri, "pinned")]))


@click.command()
@uri_argument
@output_options
@click.pass_obj
def unpin(output: Output, uri: str) -> None:
    """Let a pinned model be evicted again.

    Example: weightcache unpin s3://bucket/llama-3-8b
    """
    weightcache.unpin(uri)
    output.result({"uri": uri, "pinned": False}, lambda: show_table(("", ""), [(uri, "not pinned")]))
