"""Answer what the loaders of serving stacks cost beside what they are made of, and save beside the stacks without them.

Questions (each runs alone with `--only`, by the beginning of its name) and their targets:

    start           `import weightcache`, and a plugin's registration in a process that has its stack: 100 ms each.
    sglang          A Llama of 2.5 GB from a filled disk tier, page cache warm, through SGLang's iterator: at most 10 % and
                    300 ms more than through weightcache.stream, for the same bytes.
    vllm            The same through vLLM's; only with --vllm-python.
    transformers-warm    The same by `weightcache.loaders.from_pretrained`, and no slower than transformers' own load of the
                    folder, page cache warm too.
    transformers-hot    From host memory, as the node daemon keeps models there: no slower than that load of the folder.
    transformers-origin  From an S3 server on loopback, nothing cached: 2 times as fast as a download by boto3 or by
                    huggingface_hub, whichever is faster, and transformers' own load of the folder.

    python benchmarks/bench_loaders.py --quick     about 5 minutes; shows that it works, not how fast
    python benchmarks/bench_loaders.py             about 20 minutes, 18 GB of disk; for a quiet machine; writes
                                                   benchmarks/results/<date>-loaders.json

How it is measured stands at the top of bench_load.py, whose parts these are. Stacks are imported before the clock, too.
SGLang is its wheel's own code without its kernels, fetched as its test does (tests/sglang_parts.py). --vllm-python names
the interpreter of an environment that has vLLM and what weightcache needs.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import suite
from questions import Answer, Comparison, Question, Say
from rows import GB, Spread, Verdict, later_by_at_most, no_slower, times_as_fast
from workshop import Case, Workshop

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import sglang_parts

DISK_NEEDED = {True: 4 * GB, False: 18 * GB}  # by --quick
START_LIMIT_S = 0.1
STREAM = "weightcache.stream"
SGLANG = "SGLang's iterator"
VLLM = "vLLM's iterator"
URI = "from_pretrained(URI)"
FOLDER = "transformers, local folder"
BOTO3 = "boto3, then transformers"
HUB = "huggingface_hub, then transformers"

# What is timed, by what was done before the clock.
IMPORT = ("import sys, time", "import weightcache")
SGLANG_PLUGIN = (
    """import sys, time; from pathlib import Path; import sglang_parts
sglang_parts.make_importable(Path(sys.argv[1]))
import sglang.srt.server_args, sglang.srt.configs.load_config
from sglang.srt.plugins.hook_registry import HookRegistry""",
    """import weightcache; weightcache.__path__.insert(0, sys.path[0])
from weightcache.loaders import sglang_loader; sglang_loader.register(); HookRegistry.apply_hooks()""",
)
VLLM_PLUGIN = (
    "import sys, time, vllm.model_executor.model_loader",
    """import weightcache; weightcache.__path__.insert(0, sys.path[0])
from weightcache.loaders import vllm_plugin; vllm_plugin.register()""",
)


@dataclass(frozen=True, slots=True)
class Start:
    """What a process pays before it loads anything, each time in a process of its own."""

    name: str
    asks: str
    model: str
    wheels: Path | None
    vllm_python: str

    def answer(self, workshop: Workshop, repeats: int, say: Say) -> Answer:
        verdicts = [self._measure("import weightcache", sys.executable, IMPORT, repeats)]
        if self.wheels is not None:
            verdicts.append(self._measure("the plugin in SGLang", sys.executable, SGLANG_PLUGIN, repeats))
        if self.vllm_python:
            verdicts.append(self._measure("the plugin in vLLM", self.vllm_python, VLLM_PLUGIN, repeats))
        return Answer({}, verdicts)

    def _measure(self, what: str, python: str, parts: tuple[str, str], repeats: int) -> Verdict:
        before, timed = parts
        script = f"{before}\nbegan = time.perf_counter()\n{timed}\nprint(time.perf_counter() - began)"
        paths = f"import sys; sys.path[:0] = [{str(measuring.REPOSITORY)!r}, {str(measuring.REPOSITORY / 'tests')!r}]\n"
        found = []
        for _ in range(1 + repeats):
            done = subprocess.run(
                [python, "-c", paths + script, str(self.wheels)], capture_output=True, text=True, check=True
            )
            found.append(float(done.stdout.split()[-1]))
        spread = Spread.of(found[1:])
        return Verdict(f"{what} ({spread.low:.3f}–{spread.high:.3f})", spread.median, START_LIMIT_S, " s")


def questions(wheels: Path | None, obstacle: str, vllm_python: str) -> tuple[Question, ...]:
    """Return what can be asked with these stacks."""

    def overhead(name: str, stack: str, ours: Case, beside: Mapping[str, Any], obstacle: str) -> Comparison:
        return Comparison(
            name=name,
            asks=f"From the disk tier: does {stack} add at most 10 % and 300 ms to weightcache.stream?",
            model="llama",
            cases=(Case(STREAM, "stream_alone", "tier", "warm", options=beside), ours),
            judges=(no_slower(ours.name, STREAM, 1.1), later_by_at_most(ours.name, STREAM, 0.3)),
            obstacle=lambda: obstacle,
        )

    of_sglang = Case(SGLANG, "sglang_iterator", "tier", "warm", options={"wheels": str(wheels)})
    in_vllm = {"python": vllm_python} if vllm_python else {}
    return (
        Start("start", "What does a process pay before it loads anything?", "llama", wheels, vllm_python),
        overhead("sglang", "SGLang's loader", of_sglang, {}, obstacle),
        overhead(
            "vllm",
            "vLLM's loader",
            Case(VLLM, "vllm_iterator", "tier", "warm", options=in_vllm),
            in_vllm,
            "" if vllm_python else "no --vllm-python was given",
        ),
        Comparison(
            name="transformers-warm",
            asks="From the disk tier: is from_pretrained a URI no slower than transformers from a folder, pages touched?",
            model="llama",
            cases=(
                Case(STREAM, "stream", "tier", "warm", "transformers"),
                Case(URI, "transformers_loader", "tier", "warm", "transformers"),
                Case(FOLDER, "transformers_local", "folder", "warm", "transformers"),
            ),
            judges=(no_slower(URI, STREAM, 1.1), later_by_at_most(URI, STREAM, 0.3), no_slower(URI, FOLDER)),
        ),
        Comparison(
            name="transformers-hot",
            asks="From host memory: is from_pretrained a URI no slower than transformers from a folder, pages touched?",
            model="llama",
            cases=(
                Case(URI, "transformers_hosted", "tier", "warm", "transformers"),
                Case(FOLDER, "transformers_local", "folder", "warm", "transformers"),
            ),
            judges=(no_slower(URI, FOLDER),),
        ),
        Comparison(
            name="transformers-origin",
            asks="From an S3 server on loopback, nothing cached: twice as fast as downloading and then loading?",
            model="llama",
            cases=(
                Case(URI, "transformers_loader", "origin", needs="transformers"),
                Case(BOTO3, "transformers_boto3", "origin", needs="transformers"),
                Case(HUB, "transformers_snapshot", "origin", needs="transformers"),
            ),
            judges=(times_as_fast(URI, [BOTO3, HUB], 2.0),),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--vllm-python", default="")
    given, sys.argv[1:] = parser.parse_known_args()
    wheels, obstacle = None, ""
    try:
        wheels = sglang_parts.fetch()
    except sglang_parts.NotToBeHad as exc:
        obstacle = str(exc)
    out = Path(__file__).parent / "results" / f"{datetime.datetime.now(datetime.UTC).date()}-loaders.json"
    suite.main(__doc__, questions(wheels, obstacle, given.vllm_python), DISK_NEEDED, out=out)


if __name__ == "__main__":
    main()
