"""Publishing that is killed at random moments: a child of test_registry_races.py, and by itself a long trial.

Usage: registry_crashing.py FOLDER REGISTRY KILLS SEED

Publishes FOLDER in a process that is killed by SIGKILL after a random part of the time that it takes, until it was KILLS
times, each time into a registry of its own below REGISTRY; checks that registry deeply, publishes again, checks again and
compares. Prints what it found as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import uvloop  # noqa: F401  # imported here, so that the processes forked below start at once

import weightcache
import weightcache.registries
from weightcache.errors import ModelNotFoundError


def publish_in_child(folder: str, to: str, kill_after_s: float | None) -> bool:
    """Publish in a process of its own; tell whether it was killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            weightcache.publish(folder, to)
            status = 0
        finally:
            os._exit(status)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the publisher failed; see its standard error"
    return False


def main(folder: str, registry: str, n_kills: int, seed: int) -> dict[str, object]:
    chosen = random.Random(seed)
    publish_in_child(folder, f"{registry}/first/killed@v1", None)
    began = time.monotonic()
    publish_in_child(folder, f"{registry}/whole/killed@v1", None)
    takes_s = time.monotonic() - began
    number, killed, without_tag, wrong = 0, 0, 0, []
    while killed < n_kills:
        number += 1
        root = f"{registry}/{number}"
        # Whatever stage that hits: before the registry is there, among chunks, between manifest and tag, after all.
        killed += publish_in_child(folder, f"{root}/killed@v1", chosen.uniform(0, takes_s))
        if Path(root, "weightcache.json").exists():
            check = weightcache.check(root, deep=True)
            if not check.sound:
                wrong.append(f"{number}: after the kill {check.as_dict()}")
            try:
                weightcache.load_model(f"{root}/killed@v1", "cpu").close()
            except ModelNotFoundError:
                without_tag += 1
        done = weightcache.publish(folder, f"{root}/killed@v1")
        check = weightcache.check(root, deep=True)
        whole = weightcache.tags(f"{registry}/whole")
        if not check.sound or done.revision != whole[0].revision:
            wrong.append(f"{number}: after publishing again {check.as_dict()}")
        weightcache.load_model(f"{root}/killed@v1", "cpu").close()
    return {"kills": killed, "of": number, "without_tag": without_tag, "takes_s": takes_s, "wrong": wrong}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))), flush=True)
