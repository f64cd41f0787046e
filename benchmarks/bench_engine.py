"""Answer how near the engine comes to the limits of this machine, and how far it is ahead of what people use today.

Questions (each runs alone with `--only`, by the beginning of its name) and their targets:

    image-cold      One file of 2 GB, verified in operations of 16 MiB, page cache cold, into a reused image: 0.9 times
                    as fast as the fastest raw O_DIRECT read of it, 3 times as fast as safetensors' load_file with each
                    tensor cloned, for a fifth of its CPU seconds.
    image-warm      The same with a warm page cache, on two threads: as fast as one thread's plain os.preadv into the
                    same memory, 4 times as fast as load_file with each tensor cloned in a fresh process, for a fifth of
                    its CPU seconds; 0.15 CPU s/GB.
    fresh-*         weightcache.load_model of a folder into a fresh image: 1.5 times as fast as fastsafetensors and
                    Run:ai's streamer from a cold page cache, twice from a warm one, and twice for 6,000 small tensors.
    hosted-*        weightcache.load_model of what this process has brought to host memory, from a folder or a bucket:
                    50 ms to the last tensor bound, without a copy (its pages are mapped as they are first read).

    python benchmarks/bench_engine.py --quick     a minute, 1 GB of disk; shows that it works, not how fast
    python benchmarks/bench_engine.py             about 10 minutes, 12 GB of disk; for a quiet machine; writes
                                                  benchmarks/results/<date>-engine.json

The raw reads of image-cold are fio's (apt-get install fio; huge-page buffers), the engine's with verification off, and
Python threads'. The peers come from benchmarks/peers.txt. How it is measured stands at the top of bench_load.py, whose
parts these are; but a reused image was populated before the clock started, and fio's seconds are its own.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import suite
from questions import OURS_FOLDER, Comparison
from rows import GB, at_most, cpu_at_most, cpu_share, little_memory, no_copy, times_as_fast
from workshop import Case

DISK_NEEDED = {True: 2 * GB, False: 12 * GB}  # by --quick
COLD_THREADS = 4  # sleeping in reads: more of them than processors
HOSTED_LIMIT_S = 0.050

VERIFIED = "engine, verified"
UNVERIFIED = "engine, unverified"
COPY = "plain preadv, one thread"
CLONED = "load_file, cloned"
RUNAI = "runai streamer"
FAST = "fastsafetensors"
RAW = ("fio", UNVERIFIED, "raw O_DIRECT, threads")


def _engine_case(name: str, page_cache: str, threads: int) -> Case:
    options = {"threads": threads, "verified": name == VERIFIED}
    return Case(name, "engine_image", "folder", page_cache, options=options)


def _fresh(model: str, page_cache: str, least: float) -> Comparison:
    return Comparison(
        name=f"fresh-{page_cache}-{model}",
        asks=f"Into fresh memory with a {page_cache} page cache: is load_model {least:g} times as fast as its peers?",
        model=model,
        cases=(
            Case(OURS_FOLDER, "weightcache", "folder", page_cache),
            Case(RUNAI, "runai_streamer", "folder", page_cache, "runai_model_streamer"),
            Case(FAST, "fastsafetensors", "folder", page_cache, "fastsafetensors"),
        ),
        judges=(*(times_as_fast(OURS_FOLDER, [peer], least) for peer in (FAST, RUNAI)), little_memory),
    )


def _hosted(source: str, where: str) -> Comparison:
    case = Case(f"weightcache, hosted, from a {where}", "weightcache_hosted", source)
    return Comparison(
        name=f"hosted-{where}-llama",
        asks=f"Is what this process has brought from a {where} to host memory loaded at once, without a copy?",
        model="llama",
        cases=(case,),
        judges=(at_most(case.name, HOSTED_LIMIT_S), no_copy(case.name)),
    )


QUESTIONS = (
    Comparison(
        name="image-cold",
        asks="From this disk into a reused image, verified: is it near the raw disk and far ahead of load_file?",
        model="single",
        cases=(
            _engine_case(VERIFIED, "cold", COLD_THREADS),
            _engine_case(UNVERIFIED, "cold", COLD_THREADS),
            Case("fio", "fio", "folder", "cold", ":fio"),
            Case("raw O_DIRECT, threads", "raw_direct", "folder", "cold"),
            Case(CLONED, "load_file_cloned", "folder", "cold"),
        ),
        judges=(
            times_as_fast(VERIFIED, RAW, 0.9),
            times_as_fast(VERIFIED, [CLONED], 3.0),
            cpu_share(VERIFIED, CLONED, 0.2),
        ),
    ),
    Comparison(
        name="image-warm",
        asks="From the page cache into a reused image, verified: is it as fast as a plain copy?",
        model="single",
        cases=(
            _engine_case(VERIFIED, "warm", 2),
            _engine_case(UNVERIFIED, "warm", 2),
            Case(COPY, "plain_copy", "folder", "warm"),
            Case(CLONED, "load_file_cloned", "folder", "warm"),
        ),
        judges=(
            times_as_fast(VERIFIED, [COPY], 1.0),
            cpu_at_most(VERIFIED, 0.15),
            times_as_fast(VERIFIED, [CLONED], 4.0),
            cpu_share(VERIFIED, CLONED, 0.2),
        ),
    ),
    _fresh("llama", "cold", 1.5),
    _fresh("llama", "warm", 2.0),
    _fresh("small", "cold", 2.0),
    _fresh("small", "warm", 2.0),
    _hosted("folder", "folder"),
    _hosted("tier", "bucket"),
)

if __name__ == "__main__":
    today = datetime.datetime.now(datetime.UTC).date()
    suite.main(
        __doc__,
        QUESTIONS,
        DISK_NEEDED,
        out=Path(__file__).parent / "results" / f"{today}-engine.json",
        quick_throws_away=0,
        slow=("fresh-cold-small", "hosted-bucket-llama"),  # the last starts a server and fills a cache
    )
