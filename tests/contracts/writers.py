"""A child process of test_disk_tier.py: four processes write the same chunks at the same time.

Usage: writers.py CACHE_FOLDER BUDGET_BYTES; prints for each whether all its writes succeeded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tier_contract import content_of

from weightcache.digest import Digest, checksum
from weightcache.tiers.disk import DiskTier

N_PROCESSES = 4
ALL_STORED, SOME_REFUSED, FAILED = 0, 2, 1


def write(root: Path, budget_bytes: int, number: int) -> bool:
    """Write six chunks, each process beginning with another one; tell whether every write succeeded."""
    tier = DiskTier(root, budget_bytes)
    seeds = [(number + step) % 6 for step in range(6)] * 3
    contents = [content_of(100_000 + seed, seed) for seed in seeds]
    stored = [tier.write(Digest.of(content), checksum(content), memoryview(content)) for content in contents]
    tier.close()
    return all(stored)


def main() -> None:
    root, budget_bytes = Path(sys.argv[1]), int(sys.argv[2])
    ready, go = os.pipe()
    pids = []
    for number in range(N_PROCESSES):
        pid = os.fork()
        if pid == 0:
            status = FAILED
            try:
                os.close(go)
                os.read(ready, 1)  # returns when the parent closes its end: all start at once
                status = ALL_STORED if write(root, budget_bytes, number) else SOME_REFUSED
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(go)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert set(statuses) <= {ALL_STORED, SOME_REFUSED}, statuses
    print(json.dumps([status == ALL_STORED for status in statuses]), flush=True)


if __name__ == "__main__":
    main()
