"""Own the doctor's command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

import weightcache
from weightcache.cli.options import output_options
from weightcache.cli.output import Output, show_table

BROKEN_EXIT_CODE = 1


@click.command()
@output_options
@click.pass_obj
def doctor(output: Output) -> int:
    """Look at what decides here how fast loading is.

    Writes and reads 128 MiB in the cache folder to measure its disk. Exits with 1 if something is broken.

    Example: weightcache doctor
    """
    findings = [finding.as_dict() for finding in weightcache.doctor()]
    broken = [finding["name"] for finding in findings if not finding["ok"]]
    output.result({"findings": findings, "broken": broken}, lambda: _show(findings))
    return BROKEN_EXIT_CODE if broken else 0


def _show(findings: Sequence[Mapping[str, Any]]) -> None:
    rows: list[tuple[str, str, str]] = []
    for each in findings:
        rows.append((_mark(each), each["name"], each["value"]))
        if each["advice"]:
            rows.append(("", "", f"-> {each['advice']}"))
    show_table(("", "", ""), rows)


def _mark(finding: Mapping[str, Any]) -> str:
    if not finding["ok"]:
        return "BROKEN"
    return "hint" if finding["advice"] else "ok"
