"""A child process of test_crash.py: prefetches a folder again and again, each time killed one step later.

Usage: crashing.py FOLDER CACHES STEP

Every attempt has a cache folder of its own, CACHES/STEP-<n>, and is killed by SIGKILL before the n-th call of STEP;
the last one is not killed. Prints the number of attempts that were.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

# Imported here, so that the processes forked below start at once.
import uvloop  # noqa: F401

import weightcache
import weightcache.cache
import weightcache.origins.local
from weightcache.tiers.catalogue import Catalogue

STEPS: dict[str, list[tuple[Any, str]]] = {
    "sync": [(os, "fsync")],
    "rename": [(os, "rename")],
    "catalogue": [(Catalogue, "set"), (Catalogue, "add"), (Catalogue, "delete")],
}


def die_before(n: int, places: list[tuple[Any, str]]) -> None:
    """Arrange that the n-th call of these functions, counted together, is not made."""
    left = [n]

    def armed(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **kwargs)

        return step

    for owner, name in places:
        setattr(owner, name, armed(getattr(owner, name)))


def attempt(folder: str, cache: str, step: str, n: int) -> int:
    """Prefetch in a process of its own; return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.environ["WEIGHTCACHE_DIR"] = cache
            die_before(n, STEPS[step])
            weightcache.prefetch(folder)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    folder, caches, step = sys.argv[1:]
    n = 1
    while (status := attempt(folder, f"{caches}/{step}-{n}", step, n)) == -signal.SIGKILL:
        n += 1
    if status:
        raise SystemExit(f"attempt {n} ended with {status}")
    print(json.dumps(n - 1), flush=True)


if __name__ == "__main__":
    main()
