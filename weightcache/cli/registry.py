"""Own the commands on registries: publish, tags, revisions, tag, diff, rm, gc, check, replicate, keygen, sign, trust, audit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

import weightcache
from weightcache import errors
from weightcache.cli.options import options_reader, output_options, storage_option, timeout_option
from weightcache.cli.output import Output, ago, count, show_table, size, usd

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}

destination_option = click.option(
    "--destination-option",
    "destination_options",
    multiple=True,
    metavar="KEY=VALUE",
    callback=options_reader,
    help="As --storage-option, for the registry.",
)
replica_option = click.option(
    "--replica", default="", help="Of a store, which replica; the default is the one written to."
)


def _read_age(ctx: click.Context, parameter: click.Parameter, given: str | None) -> float | None:
    """Read an age such as 30m, 12h, 7d."""
    if given is None:
        return None
    number, unit = given[:-1], given[-1:]
    if unit not in UNITS_S or not number.isdecimal():
        raise click.BadParameter(f"{given!r}: expected a number and s, m, h, d or w, such as 12h", ctx, parameter)
    return int(number) * UNITS_S[unit]


def _read_named(ctx: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for each in given:
        name, _, value = each.partition("=")
        if not (name and value):
            raise click.BadParameter(f"{each!r}: expected {parameter.metavar}", ctx, parameter)
        if name in named:
            raise click.BadParameter(f"{name!r} is given twice", ctx, parameter)
        named[name] = value
    return named


def _policy(allow: Mapping[str, str], deny: Mapping[str, str]) -> dict[str, Any] | None:
    sides = {"allow": allow, "deny": deny}
    form = {side: {kind: names.split(",") for kind, names in given.items()} for side, given in sides.items() if given}
    return form or None


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("--base", default="", metavar="URI", help="The revision this one was made from; recorded.")
@click.option(
    "--allow",
    multiple=True,
    metavar="KIND=NAME,...",
    callback=_read_named,
    help="Where the model's bytes may be: jurisdictions=eu, regions=eu-*, providers=tigris; part of the revision.",
)
@click.option("--deny", multiple=True, metavar="KIND=NAME,...", callback=_read_named, help="Where they may not be.")
@click.option(
    "--artefact",
    "artefacts",
    multiple=True,
    metavar="NAME=FOLDER",
    callback=_read_named,
    help="Compiled code to carry beside the weights, for machines like this one.",
)
@click.option(
    "--fact",
    "facts",
    multiple=True,
    metavar="NAME=VALUE",
    callback=_read_named,
    help="What the artefacts are for, in place of this machine.",
)
@click.option(
    "--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="How many must have it at the end."
)
@timeout_option
@storage_option
@destination_option
@output_options
@click.pass_obj
def publish(
    output: Output,
    /,
    source: str,
    destination: str,
    allow: Mapping[str, str],
    deny: Mapping[str, str],
    facts: Mapping[str, str],
    **options: Any,
) -> None:
    """Publish a model to a registry, as DESTINATION registry/model@tag; only what is missing there is uploaded.

    Example: weightcache publish ./tuned s3://bucket/registry/llama-3-8b@tuned
    """
    policy = _policy(allow, deny)
    with output.progress("publish") as progress:
        done = weightcache.publish(
            source, destination, policy=policy, facts=facts or None, progress=progress, **options
        ).as_dict()
    output.result(done, lambda: _show_publication(done))


def _show_publication(done: Mapping[str, Any]) -> None:
    share = done["saved_bytes"] / done["bytes"] if done["bytes"] else 1.0
    rows = [
        ("published", done["uri"]),
        ("revision", done["revision"]),
        ("bytes", f"{size(done['bytes'])} in {count(done['n_chunks'], 'chunk')}"),
        ("uploaded", size(done["uploaded_bytes"])),
        ("saved", f"{size(done['saved_bytes'])} ({share:.0%}) that the registry had"),
        ("time", f"{done['seconds']:.2f} s"),
        *((("to replicas", size(done["copied_bytes"])),) if done["copied_bytes"] else ()),
        *(("warning", text) for text in done["warnings"]),
    ]
    show_table(("", ""), rows)


@click.command()
@click.argument("uri")
@storage_option
@output_options
@click.pass_obj
def tags(output: Output, uri: str, storage_options: Mapping[str, Any]) -> None:
    """List the tags of a model, or of all models of a registry, the last moved first.

    Example: weightcache tags s3://bucket/registry
    """
    rows = [row.as_dict() for row in weightcache.tags(uri, storage_options=storage_options)]
    table = [
        (row["model"], row["tag"], row["revision"], str(row["moves"]), ago(row["moved_s"]), row["previous"] or "")
        for row in rows
    ]
    titles = ("model", "tag", "revision", "moves", "moved", "before")
    output.result({"tags": rows}, lambda: show_table(titles, table) if table else print("no tags"))


@click.command()
@click.argument("uri")
@storage_option
@output_options
@click.pass_obj
def revisions(output: Output, uri: str, storage_options: Mapping[str, Any]) -> None:
    """List the revisions of a model, or of all models of a registry, the last written first.

    Example: weightcache revisions s3://bucket/registry/llama-3-8b
    """
    rows = [row.as_dict() for row in weightcache.revisions(uri, storage_options=storage_options)]
    table = [
        (
            row["model"],
            row["revision"],
            ", ".join(row["tags"]),
            size(row["bytes"]),
            str(row["n_tensors"]),
            ago(row["written_s"]),
            row["base"],
        )
        for row in rows
    ]
    titles = ("model", "revision", "tags", "bytes", "tensors", "written", "base")
    output.result({"revisions": rows}, lambda: show_table(titles, table) if table else print("no revisions"))


@click.command()
@click.argument("uri")
@click.argument("revision")
@storage_option
@output_options
@click.pass_obj
def tag(output: Output, uri: str, revision: str, storage_options: Mapping[str, Any]) -> None:
    """Let a tag (registry/model@tag) name a REVISION: blake3:..., or another tag of the model, for what that names now.

    Example: weightcache tag s3://bucket/registry/llama-3-8b@stable v3
    """
    row = weightcache.tag(uri, revision, storage_options=storage_options).as_dict()
    rows = [("tag", f"{row['model']}@{row['tag']}"), ("revision", row["revision"])]
    rows += [("before", row["previous"])] if row["previous"] else []
    output.result(row, lambda: show_table(("", ""), rows))


@click.command()
@click.argument("uri")
@click.argument("other")
@storage_option
@output_options
@click.pass_obj
def diff(output: Output, uri: str, other: str, storage_options: Mapping[str, Any]) -> None:
    """Show which tensors, files and bytes the revision OTHER has that URI has not.

    Example: weightcache diff s3://bucket/registry/llama@v1 s3://bucket/registry/llama@tuned
    """
    found = weightcache.diff(uri, other, storage_options=storage_options).as_dict()
    output.result(found, lambda: _show_diff(found))


def _show_diff(found: Mapping[str, Any]) -> None:
    rows = [
        (mark, name, size(nbytes))
        for mark, key in (("+", "added"), ("-", "removed"), ("~", "changed"))
        for name, nbytes in sorted(found[key].items())
    ]
    rows += [
        (mark, name, "file")
        for mark, key in (("+", "files_added"), ("-", "files_removed"), ("~", "files_changed"))
        for name in found[key]
    ]
    show_table(("", "", ""), rows)
    shared, new = size(found["shared_bytes"]), size(found["new_bytes"])
    print(f"{found['n_same']} tensors are equal; {shared} of chunks are shared, {new} are new")


@click.command()
@click.argument("uri")
@replica_option
@storage_option
@output_options
@click.pass_obj
def rm(output: Output, /, uri: str, **options: Any) -> None:
    """Remove from a registry a tag (model@tag), a revision that no tag names (model@blake3:...), or a whole model.

    Chunks stay until gc removes them, and other replicas of a store keep what they have.

    Example: weightcache rm s3://bucket/registry/llama-3-8b@old
    """
    removed = weightcache.remove(uri, **options)
    output.result({"removed": removed}, lambda: show_table(("", ""), [("removed", removed)]))


@click.command()
@click.argument("uri")
@click.option("--delete", is_flag=True, help="Remove; without it only what would be removed is shown.")
@click.option(
    "--grace", "grace_s", default="1h", show_default=True, callback=_read_age, help="Chunks younger than this stay."
)
@click.option(
    "--untagged",
    "untagged_s",
    callback=_read_age,
    metavar="AGE",
    help="Revisions of no tag go, too, when older than this.",
)
@replica_option
@storage_option
@output_options
@click.pass_obj
def gc(output: Output, /, uri: str, delete: bool, **options: Any) -> None:
    """Remove from a registry the chunks that no revision needs. Safe beside publishers and readers.

    Example: weightcache gc s3://bucket/registry --untagged 30d --delete
    """
    found = weightcache.gc(uri, dry=not delete, **options).as_dict()
    output.result(found, lambda: _show_garbage(found))


def _show_garbage(found: Mapping[str, Any]) -> None:
    did = "would be removed, with --delete" if found["is_dry"] else "removed"
    chunks, revisions = count(len(found["chunks"]), "chunk"), count(len(found["revisions"]), "revision")
    print(f"{chunks}, {size(found['bytes'])}, and {revisions} {did}")
    show_table(("", ""), [("revision", name) for name in found["revisions"]])
    print(f"kept: {count(found['kept_chunks'], 'chunk')} that are needed, {found['kept_young']} that are young")


@click.command()
@click.argument("uri")
@click.option(
    "--deep", is_flag=True, help="Read every chunk and compute its digest, not only look at presence and size."
)
@click.option(
    "--repair",
    "repair_from",
    multiple=True,
    metavar="REPLICA",
    help="Write what is lost or rotten anew from this replica of the store, or this registry; may be repeated.",
)
@replica_option
@storage_option
@output_options
@click.pass_obj
def check(output: Output, /, uri: str, **options: Any) -> int:
    """Check a registry: every tag, revision and chunk.

    Exits with 6 if something is wrong, and not repaired.

    Example: weightcache check wc://prod --deep --repair frankfurt
    """
    with output.progress("check") as progress:
        found = weightcache.check(uri, progress=progress, **options).as_dict()
    output.result(found, lambda: _show_check(found))
    return 0 if found["sound"] else errors.IntegrityError.exit_code


def _show_check(found: Mapping[str, Any]) -> None:
    how = "digests recomputed" if found["deep"] else "presence and size; --deep recomputes digests"
    verdict = "sound" if found["sound"] else "NOT SOUND"
    looked_at = ", ".join(count(found[f"n_{what}s"], what) for what in ("model", "tag", "revision", "chunk"))
    print(f"{verdict}: {looked_at}, {size(found['n_bytes'])} ({how})")
    rows = [(state, digest) for state in ("lost", "rotten", "repaired") for digest in found[state]]
    show_table(("", ""), [*rows, *(("problem", text) for text in found["problems"])])
    if found["n_unneeded"]:
        print(
            f"no revision needs {count(found['n_unneeded'], 'chunk')}, {size(found['unneeded_bytes'])}: weightcache gc"
        )


@click.command()
@click.argument("uri")
@click.option(
    "--source", default="", metavar="REPLICA", help="Copy from it; the default is the one that is written to."
)
@click.option(
    "--to", default="", metavar="REPLICA", help="Copy to it; the default is all others that can be written to."
)
@click.option("--dry", is_flag=True, help="Only show what would be copied, how far behind it is, and what that costs.")
@click.option(
    "--watch", "watch_s", callback=_read_age, metavar="EVERY", help="Copy again and again, so often (30s, 5m)."
)
@storage_option
@output_options
@click.pass_obj
def replicate(output: Output, /, uri: str, watch_s: float | None, **options: Any) -> None:
    """Copy what other replicas of a store (wc://store or wc://store/model) lack, verified, tags last.

    Example: weightcache replicate wc://prod --dry
    """
    while True:
        with output.progress("replicate") as progress:
            done = [each.as_dict() for each in weightcache.replicate(uri, progress=progress, **options)]
        output.result({"replications": done}, lambda done=done: _show_replications(done))  # type: ignore[misc]
        if watch_s is None:
            return
        time.sleep(watch_s)


def _show_replications(done: Sequence[Mapping[str, Any]]) -> None:
    for each in done:
        if not (each["revisions"] or each["tags"] or each["conflicts"]):
            print(f"{each['source']} to {each['target']}: nothing is missing")
            continue
        did = "would be copied" if each["is_dry"] else "copied"
        print(f"{each['source']} to {each['target']}: {count(each['n_chunks'], 'chunk')}, {size(each['bytes'])}, {did}")
        rows = [("revision", name) for name in each["revisions"]] + [("tag", name) for name in each["tags"]]
        show_table(("", ""), [*rows, *(("conflict", text) for text in each["conflicts"])])
        if each["tags"]:
            print(f"behind by {each['lag_s']:.0f} s; costs {usd(each['usd'])} of egress")


@click.command()
@click.argument("path")
@output_options
@click.pass_obj
def keygen(output: Output, path: str) -> None:
    """Make a key to sign revisions with: the private one in PATH, the public one is printed.

    Example: weightcache keygen ~/.config/weightcache-key.pem
    """
    public = weightcache.keygen(path)
    output.result(
        {"private": path, "public": public}, lambda: show_table(("", ""), [("private", path), ("public", public)])
    )


@click.command()
@click.argument("uri")
@click.option("--key", required=True, metavar="PATH", help="The private key.")
@storage_option
@output_options
@click.pass_obj
def sign(output: Output, uri: str, key: str, storage_options: Mapping[str, Any]) -> None:
    """Sign a published revision.

    Example: weightcache sign wc://prod/llama-3-8b@v3 --key ~/.config/weightcache-key.pem
    """
    revision, serial = weightcache.sign(uri, key, storage_options=storage_options)
    rows = [("signed", revision), ("serial", str(serial))]
    output.result({"revision": revision, "serial": serial}, lambda: show_table(("", ""), rows))


@click.command()
@click.argument("store")
@click.argument("key", required=False)
@output_options
@click.pass_obj
def trust(output: Output, store: str, key: str | None) -> None:
    """Show the keys that a STORE of the configuration trusts, or print the line that adds a public KEY.

    The configuration file is yours: this command does not write into it.

    Example: weightcache trust prod ed25519:...
    """
    keys = weightcache.trusted_keys(store, key)
    line = f"trust = [{', '.join(repr(each) for each in keys)}]".replace("'", '"')

    def show() -> None:
        if key is None:
            show_table(
                ("", ""), [("trusted", each) for each in keys] or [("trusted", "no key: signatures are not demanded")]
            )
        else:
            print(f"in weightcache.toml, below [stores.{store}]:\n{line}")

    output.result({"store": store, "trust": keys, "line": line}, show)


@click.command()
@click.option("--since", metavar="WHEN", help="An age (7d, 12h, 2w), or a month or day to begin with (2026-11).")
@click.option("--forbidden", is_flag=True, help="Only what was forbidden.")
@output_options
@click.pass_obj
def audit(output: Output, since: str | None, forbidden: bool) -> None:
    """Show what residency policies allowed and forbade on this node.

    Example: weightcache audit --since 7d --forbidden
    """
    rows = [row for row in weightcache.rulings(since) if not (forbidden and row["allowed"])]
    table = [
        (
            row["time"],
            "allowed" if row["allowed"] else "FORBIDDEN",
            f"{row['verb']} x{row['n_times']}",
            row["model"],
            _end(row["source"]),
            _end(row["target"]),
            row["rule"],
        )
        for row in rows
    ]
    titles = ("time", "", "what", "model", "from", "to", "rule")
    output.result({"rulings": rows}, lambda: show_table(titles, table) if table else print("nothing was ruled on"))


def _end(end: Mapping[str, str]) -> str:
    place = "/".join(end[name] or "?" for name in ("provider", "region", "jurisdiction"))
    return f"{end['name']} ({place})"
