"""Answer how well weightcache loads, beside what people use today, on this machine.

Questions (each runs alone with `--only`, by the beginning of its name):

    traffic-*       Does a cold load fetch each byte once, and a warm one no chunk? Counted by a proxy.
    herd            Do 8 processes at once on an empty cache cost the origin at most 1.05 times the bytes?
    disk-cold-*     With a cold page cache: from a folder, and from the disk tier, no slower than safetensors' load_file
                    with every page touched?
    disk-warm-*     With a warm page cache: no slower than load_file with each tensor cloned?
    origin-*        From SeaweedFS on loopback: cold, verified and written to disk behind, no slower than boto3, s3fs and
                    huggingface_hub downloads followed by load_file?
    plan-bind-*     Are 6,000 tensors planned in 0.5 s and bound in 20 ms?

    and in all of them: is the memory beside the tensors at most 256 MiB?

Models: Llama-3.2-1B's names and shapes with random bytes (2.5 GB, two shards; 0.25 GB with --quick), 6,000 small tensors
(0.2 GB), and the real all-MiniLM-L6-v2 (90 MB).

    python benchmarks/bench_load.py --quick                 about 8 minutes; shows that it works, not how fast
    python benchmarks/bench_load.py --out results.json      about 40 minutes, 22 GB of disk; for a quiet machine

Run:ai's streamer and fastsafetensors take part where they are installed (pip install runai-model-streamer
runai-model-streamer-s3 fastsafetensors).

How it is measured. Each run has a process of its own. The cases of a question take turns, and each round begins with
another one; a first round is thrown away. Imports are done before the clock starts, ours and the peers'; making a client
is not. The clock stops when a byte of every page of every tensor has been read. Cold means synced, dropped from the page
cache, and checked; the virtual disk below may have a cache of its own, which is why the first round is thrown away.
Before the clock, as much free memory as the model needs is touched and freed again: a host that takes back its guest's
free memory would otherwise decide the result (first_touch_s_per_gib in the machine's line: as found, and again at once).
After the clock, the bytes of all tensors are hashed: all loaders of a model must have delivered the same. Peak memory is
resident memory above that after the imports; mapped files count, which for load_file is the page cache's own memory.
weightcache's tensors from the disk tier are verified, from an origin verified and durable in the end (the column "until
stored", for peers with an fsync of what they downloaded); a plain folder is read in place, as by the peers, unverified.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measuring
from questions import QUESTIONS, Answer, Question
from rows import GB, format_table
from workshop import Workshop

DISK_NEEDED = {True: 5 * GB, False: 22 * GB}  # by --quick


def main() -> None:
    arguments = parse_arguments()
    chosen = [question for question in QUESTIONS if question.name.startswith(arguments.only)]
    if not chosen:
        sys.exit(f"no question begins with {arguments.only!r}: {', '.join(each.name for each in QUESTIONS)}")
    free, needed = shutil.disk_usage(arguments.work).free, DISK_NEEDED[arguments.quick]
    say(f"disk: {free / GB:.0f} GB free, up to {needed / GB:.0f} GB needed for the time of the run")
    if free < needed:
        sys.exit("not enough: pass --work FOLDER on a larger disk, or --quick")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    commit = measuring.describe_commit(Path(__file__).parent.parent)
    machine = measuring.describe_machine(arguments.work)
    print(f"commit {commit}\nmachine {machine}\nload average {os.getloadavg()[0]:.1f} at the start\n")
    rows: list[dict[str, Any]] = []
    n_misses = 0
    began = time.monotonic()
    with Workshop(arguments.work, quick=arguments.quick) as workshop:
        for question in chosen:
            answer = question.answer(workshop, arguments.repeats, say)
            show(question, answer, workshop.nbytes(question.model))
            n_misses += sum(not verdict.passed for verdict in answer.verdicts)
            rows += as_json(question, answer, {"commit": commit, "machine": machine, "quick": arguments.quick})
            if arguments.out is not None:  # after each question: a long run that breaks has not been for nothing
                text = json.dumps(rows, indent=1).replace(str(workshop.folder), "<work>")
                arguments.out.write_text(text + "\n")
    print(f"{n_misses} targets missed; {time.monotonic() - began:.0f} s in all")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=f"questions: {', '.join(each.name for each in QUESTIONS)}"
    )
    parser.add_argument("--quick", action="store_true", help="a Llama of 0.25 GB in place of 2.5 GB, and 1 repeat")
    parser.add_argument("--repeats", type=int, help="runs of each case, beside one thrown away (5; 1 with --quick)")
    parser.add_argument("--only", default="", metavar="NAME", help="only the questions whose names begin so")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write all rows there, too")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where to work: on a real disk")
    arguments = parser.parse_args()
    arguments.repeats = arguments.repeats or (1 if arguments.quick else 5)
    return arguments


def show(question: Question, answer: Answer, nbytes: int) -> None:
    """Print a question's table and verdicts."""
    print(f"{question.name} ({nbytes / GB:.3f} GB): {question.asks}")
    print(format_table(list(answer.rows.values())))
    for verdict in answer.verdicts:
        print(verdict)
    print(flush=True)


def as_json(question: Question, answer: Answer, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a question's rows, each complete by itself, and its verdicts as a last row."""
    rows = [
        {**common, "question": question.name, "model": question.model, **row.as_dict()} for row in answer.rows.values()
    ]
    verdicts = [
        {
            "what": verdict.what,
            "value": verdict.value,
            "limit": verdict.limit,
            "unit": verdict.unit.strip(),
            "passed": verdict.passed,
        }
        for verdict in answer.verdicts
    ]
    return [*rows, {**common, "question": question.name, "verdicts": verdicts}]


def say(line: str) -> None:
    """Report progress, beside the results."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
