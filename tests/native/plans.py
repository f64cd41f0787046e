"""Own the program of plans.c: build it, with mutants and sanitizers, and run it.

Never imports weightcache: the program is the engine's C without Python.
"""

from __future__ import annotations

import hashlib
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from standin import HERE, build_standin

EXT = HERE.parents[1] / "ext"
KERNELS = ("checksum", "copy", "cuda", "memory", "pool", "reader", "run", "shared", "stream")
WITH_BUGS = ("run", "stream", "plans")  # which ask for WC_BUG
FLAGS = ["-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{EXT}", f"-I{HERE}"]
MODES = ("late", "early", "random", "threads")
DEADLINE_S = 300.0  # for who waits for ever; a plan that does so says so before


class Plans:
    """The program, and the stand-in of the same flags.

    Args:
        folder: an existing one, where all builds of a session go.
        bug: which mutant; 0 for none.
        flags: more of gcc's, such as `-fsanitize=thread`.
    """

    def __init__(self, folder: Path, bug: int = 0, flags: tuple[str, ...] = ()) -> None:
        self._folder = folder
        self._flags = [*FLAGS, *flags]
        self._standin = build_standin(folder, flags=flags)
        name = hashlib.sha256(repr(flags).encode()).hexdigest()[:8]
        self.path = folder / f"plans-{name}-{bug}"
        if self.path.exists():
            return
        sources = {name: EXT / f"{name}.c" for name in KERNELS} | {"plans": HERE / "plans.c"}
        with ThreadPoolExecutor(2) as pool:
            objects = pool.map(
                lambda item: self._compile(item[1], folder / f"{item[0]}-{name}", bug if item[0] in WITH_BUGS else 0),
                sources.items(),
            )
            subprocess.run(["gcc", *self._flags, *map(str, objects), "-o", str(self.path)], check=True)

    def _compile(self, source: Path, stem: Path, bug: int) -> Path:
        target = stem.with_name(f"{stem.name}-{bug}.o")
        if not target.exists():
            subprocess.run(["gcc", *self._flags, f"-DWC_BUG={bug}", "-c", str(source), "-o", str(target)], check=True)
        return target

    def begin(self, mode: str, seed: int, n_plans: int, *wrapper: str) -> subprocess.Popen[str]:
        """Start it; what it prints comes out of `communicate`."""
        files = self._folder / f"files-{self.path.name}-{mode}-{seed}"
        files.mkdir(exist_ok=True)
        command = [*wrapper, str(self.path), str(self._standin), str(files), mode, str(seed), str(n_plans)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def run(self, mode: str, seed: int, n_plans: int, *wrapper: str) -> tuple[int, str, str]:
        """Return its exit status and what it printed, on standard output and standard error."""
        return finish(self.begin(mode, seed, n_plans, *wrapper))


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a program that was begun, as `Plans.run` does."""
    with process:
        try:
            printed, complaints = process.communicate(timeout=DEADLINE_S)
        finally:
            process.kill()
    return process.returncode, printed, complaints
