"""A child process of test_registry_races.py, and by itself a long race: two publishers and a sweeper over one registry.

Usage: registry_racing.py child
       registry_racing.py race ROUNDS        for a long one by hand, in a folder under /tmp

A child hears {"do": "publish" | "gc", …} and tells {"revision": …} or {"error": code}.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import weightcache

N_VARIANTS = 4


def serve() -> None:
    for line in sys.stdin:
        wish = json.loads(line)
        try:
            if wish["do"] == "publish":
                done = weightcache.publish(wish["folder"], wish["to"], destination_options=wish["options"])
                told = {"revision": done.revision, "uploaded_bytes": done.uploaded_bytes}
            else:
                garbage = weightcache.gc(
                    wish["registry"], dry=False, grace_s=0.0, untagged_s=0.0, storage_options=wish["options"]
                )
                told = {"chunks": len(garbage.chunks), "revisions": len(garbage.revisions)}
        except weightcache.WeightcacheError as exc:
            told = {"error": exc.code, "said": str(exc)}
        print(json.dumps(told), flush=True)


@dataclass
class Tally:
    """What a race came to."""

    rounds: int = 0
    published: int = 0
    conflicts: int = 0
    chunks_removed: int = 0
    revisions_removed: int = 0
    wrong: list[str] = field(default_factory=list)


def race(registry: str, options: Mapping[str, Any], folders: Sequence[Path], rounds: int, seed: int) -> Tally:
    """Let two publishers and a sweeper go at the same moment, again and again, and look each time whether all is right.

    Each round publishes two of the models to one tag, while revisions that no tag names, and their chunks, are removed.
    """
    from children import Child

    tally, chosen = Tally(), random.Random(seed)
    wish = {"options": dict(options), "registry": registry, "do": "gc"}
    moves = 0
    revisions: dict[str, int] = {}
    # Or the sweeper may find no registry.
    weightcache.publish(folders[0], f"{registry}/first", destination_options=options)
    weightcache.remove(f"{registry}/first", storage_options=options)
    with ExitStack() as stack:
        publishers = [stack.enter_context(Child(Path(__file__), "child")) for _ in range(2)]
        sweeper = stack.enter_context(Child(Path(__file__), "child"))
        for number in range(rounds):
            variants = chosen.sample(range(len(folders)), 2)
            for publisher, variant in zip(publishers, variants, strict=True):
                to = f"{registry}/raced@v1"
                publisher.tell({**wish, "do": "publish", "folder": str(folders[variant]), "to": to})
            sweeper.tell(wish)
            told = [publisher.hear() for publisher in publishers]
            swept = sweeper.hear()
            tally.rounds += 1
            tally.chunks_removed += swept.get("chunks", 0)
            tally.revisions_removed += swept.get("revisions", 0)
            tally.published += sum("revision" in each for each in told)
            tally.conflicts += sum(each.get("error") == "conflict" for each in told)
            revisions |= {
                each["revision"]: variant for each, variant in zip(told, variants, strict=True) if "revision" in each
            }
            others = [each for each in (*told, swept) if each.get("error") not in (None, "conflict")]
            tally.wrong += [f"round {number}: {each}" for each in others]
            check = weightcache.check(registry, deep=True, storage_options=options)
            if not check.sound:
                tally.wrong.append(f"round {number}: {check.as_dict()}")
            if not any("revision" in each for each in told):
                tally.wrong.append(f"round {number}: both publishers were refused: {told}")
            [tag] = weightcache.tags(f"{registry}/raced", storage_options=options)
            if tag.revision not in {each.get("revision") for each in told}:
                tally.wrong.append(f"round {number}: the tag names {tag.revision}, the publishers told {told}")
            if not moves <= tag.moves <= moves + 2:
                tally.wrong.append(f"round {number}: {tag.moves} moves after {moves}, by {told}")
            moves = tag.moves
            if weightcache.diff(
                f"{registry}/raced@v1", f"{registry}/raced@{tag.revision}", storage_options=options
            ).new_bytes:
                tally.wrong.append(f"round {number}: the tag's revision is not itself")
    return tally


def write_variants(below: Path) -> list[Path]:
    """Write models that share chunks with each other."""
    from models import write_safetensors

    folders = []
    for variant in range(N_VARIANTS):
        folder = below / f"variant-{variant}"
        folder.mkdir(parents=True)
        for part in range(4):
            # Of each part there are two forms; a variant's number says which of them it has.
            shapes = {f"part{part}.weight": ("BF16", (512, 1024))}
            write_safetensors(folder / f"part-{part}.safetensors", shapes, seed=(variant >> (part % 2)) & 1)
        (folder / "config.json").write_text(json.dumps({"variant": variant}))
        folders.append(folder)
    return folders


if __name__ == "__main__":
    if sys.argv[1] == "child":
        serve()
    else:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        with tempfile.TemporaryDirectory() as folder:
            below = Path(folder)
            print(race(str(below / "registry"), {}, write_variants(below), int(sys.argv[2]), seed=1))
