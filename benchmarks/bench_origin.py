"""Answer how fast weightcache receives from origins, and what that costs a client, beside others and plain sockets.

Questions (each runs alone with `--only`, by the beginning of its name) and their targets:

    nginx-8, -16    One file of 2 GB from nginx on loopback, in ranges of 8 and 16 MiB over keep-alive connections, into
                    an image that was populated before: 0.25 client CPU s/GB, and 0.55 with BLAKE3 of every range on two
                    threads beside; 1.5 times as fast as obstore and aiohttp, 3 times as fast as aiobotocore and s3fs, as
                    fast as blocking sockets in C with as many connections.
    tls-8, -16      The same over TLS 1.3: 1.1 client CPU s/GB, 0.6 of obstore's; as fast as obstore.
    s3-receive      A model of 2.5 GB from SeaweedFS into fresh memory, unverified: no slower than obstore and Run:ai's
                    streamer; 256 MiB of memory beside the image.
    link-*          Over links of 20 ms and 1 Gbit/s, and of 80 ms and 200 Mbit/s: 0.9 times as fast as blocking sockets
                    in C with as many connections, each of them one TCP stream or asking range by range, which is faster.
    cold-load       A model of 2.5 GB from SeaweedFS to tensors, verified and cached on disk: in 0.9 of the time in which
                    8 threads of obstore fill one buffer, twice as fast as Run:ai's streamer, 1.4 times as fast as
                    tensorizer; no slower than boto3 and huggingface_hub with load_file.
    faults          The same through a proxy, while 1 % of the requests for weights fail or stall: in 1.15 of the time that
                    the same load takes through the same proxy without faults, for at most 15 % more bytes.

    python benchmarks/bench_origin.py --quick     a few minutes, 4 GB of disk; shows that it works, not how fast
    python benchmarks/bench_origin.py             about 50 minutes, 22 GB of disk; for a quiet machine; writes
                                                  benchmarks/results/<date>-origin.json

What it needs beside benchmarks/peers.txt: nginx and openssl (apt-get install nginx-light openssl), gcc for the client in C
and the links; and root for the links, which are network namespaces behind the wire of wire.c. What is missing is said, and
its questions are skipped.

How it is measured stands at the top of bench_load.py, whose parts these are. Beside that: clients are made and folders
listed before the clock, connections are dialled within it. CPU seconds are the client's alone; the server's, on the same
processors, stand in the rows. Images lie in private huge pages, ours and the peers'.
"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import suite
import web
from questions import OURS_COLD, Comparison
from rows import (
    GB,
    Judge,
    cpu_at_most,
    cpu_share,
    extra_bytes_at_most,
    little_memory,
    no_slower,
    times_as_fast,
)
from workshop import Case

DISK_NEEDED = {True: 4 * GB, False: 22 * GB}  # by --quick
MIB = 1 << 20
N_CONNECTIONS = 16  # of everybody; weightcache's default
N_OBSTORE_THREADS = 8  # of the cold load's peer: what a careful hand would write
OBSTORE_RANGE_NBYTES = 16 * MIB

OURS = "weightcache, received"
OURS_DIGESTED = "weightcache, received, BLAKE3 beside"
C_CLIENT = "C, blocking sockets"
TCP = "C, plain TCP streams"
OBSTORE = "obstore get_range"
AIOHTTP = "aiohttp"
AIOBOTOCORE = "aiobotocore"
S3FS = "s3fs cat_ranges"
RUNAI = "runai streamer"
BOTO3 = "boto3 + load_file"
HUB = "huggingface_hub + load_file"
TENSORIZER = "tensorizer"
OBSTORE_BUFFER = f"obstore, {N_OBSTORE_THREADS} threads, one buffer, no tensors"
CLEAN = "weightcache, through the proxy"
FAULTY = "weightcache, 1 % of requests fail or stall"


def _case(name: str, loader: str, source: str, range_nbytes: int, needs: str = "", **more: Any) -> Case:
    options = {"range_nbytes": range_nbytes, "connections": N_CONNECTIONS, "is_fresh": False, "is_digested": False}
    return Case(name, loader, source, needs=needs, options=options | more)


def _from_nginx(range_mib: int) -> Comparison:
    def case(name: str, loader: str, needs: str = "", **more: Any) -> Case:
        return _case(name, loader, "nginx", range_mib * MIB, needs, **more)

    return Comparison(
        name=f"nginx-{range_mib}",
        asks=f"From nginx on loopback, in ranges of {range_mib} MiB: is receiving cheap, and faster than others?",
        model="single",
        cases=(
            case(OURS, "receive"),
            case(OURS_DIGESTED, "receive", is_digested=True),
            case(C_CLIENT, "c_client", ":gcc"),
            case(OBSTORE, "obstore_ranges", "obstore"),
            case(AIOHTTP, "aiohttp_ranges", "aiohttp"),
            case(AIOBOTOCORE, "aiobotocore_ranges"),
            case(S3FS, "s3fs_ranges"),
        ),
        judges=(
            cpu_at_most(OURS, 0.25),
            cpu_at_most(OURS_DIGESTED, 0.55),
            *_each_as_fast(OURS, 1.5, OBSTORE, AIOHTTP),
            *_each_as_fast(OURS, 3.0, AIOBOTOCORE, S3FS),
            times_as_fast(OURS, [C_CLIENT], 1.0),
        ),
        obstacle=web.obstacle,
    )


def _from_tls(range_mib: int) -> Comparison:
    def case(name: str, loader: str, needs: str = "", **more: Any) -> Case:
        return _case(name, loader, "nginx-tls", range_mib * MIB, needs, **more)

    return Comparison(
        name=f"tls-{range_mib}",
        asks=f"By TLS 1.3 from nginx on loopback, in ranges of {range_mib} MiB: is receiving cheap, and no slower?",
        model="single",
        cases=(
            case(OURS, "receive"),
            case(OURS_DIGESTED, "receive", is_digested=True),
            case(OBSTORE, "obstore_ranges", "obstore"),
            case(AIOHTTP, "aiohttp_ranges", "aiohttp"),
        ),
        judges=(
            cpu_at_most(OURS, 1.1),
            cpu_share(OURS, OBSTORE, 0.6),
            times_as_fast(OURS, [OBSTORE], 1.0),
        ),
        obstacle=web.tls_obstacle,
    )


def _over_link(rtt_ms: int, mbit: int) -> Comparison:
    source = f"nginx-{rtt_ms}ms-{mbit}mbit"
    return Comparison(
        name=f"link-{rtt_ms}ms",
        asks=f"Over a link of {rtt_ms} ms and {mbit} Mbit/s: does weightcache fill it as plain sockets do?",
        model=f"single-{mbit}mbit",
        cases=(
            _case(OURS, "receive", source, 8 * MIB),
            _case(TCP, "c_client", source, 8 * MIB, ":gcc", one_range_each=True),
            _case(C_CLIENT, "c_client", source, 8 * MIB, ":gcc"),
        ),
        judges=(times_as_fast(OURS, [TCP, C_CLIENT], 0.9),),
        obstacle=web.link_obstacle,
    )


def _each_as_fast(ours: str, least: float, *peers: str) -> list[Judge]:
    return [times_as_fast(ours, [peer], least) for peer in peers]


QUESTIONS = (
    _from_nginx(8),
    _from_nginx(16),
    _from_tls(8),
    _from_tls(16),
    Comparison(
        name="s3-receive",
        asks="From an S3 server on loopback into fresh memory: is receiving no slower, and bounded in memory?",
        model="llama",
        cases=(
            _case(OURS, "receive", "origin", 16 * MIB, is_fresh=True),
            _case(C_CLIENT, "c_client", "origin", 16 * MIB, ":gcc", is_fresh=True),
            _case(OBSTORE, "obstore_ranges", "origin", 16 * MIB, "obstore", is_fresh=True),
            Case(RUNAI, "runai_streamer", "origin", needs="runai_model_streamer_s3"),
        ),
        judges=(no_slower(OURS, OBSTORE), no_slower(OURS, RUNAI), little_memory),
    ),
    _over_link(20, 1000),
    _over_link(80, 200),
    Comparison(
        name="cold-load",
        asks="From an S3 server on loopback to tensors, verified and stored: is it faster than receiving alone elsewhere?",
        model="llama",
        cases=(
            Case(OURS_COLD, "weightcache", "origin"),
            _case(
                OBSTORE_BUFFER,
                "obstore_ranges",
                "origin",
                OBSTORE_RANGE_NBYTES,
                "obstore",
                is_fresh=True,
                connections=N_OBSTORE_THREADS,
            ),
            Case(RUNAI, "runai_streamer", "origin", needs="runai_model_streamer_s3"),
            Case(TENSORIZER, "tensorizer", "origin", needs="tensorizer"),
            Case(BOTO3, "boto3", "origin"),
            Case(HUB, "hub", "origin"),
        ),
        judges=(
            no_slower(OURS_COLD, OBSTORE_BUFFER, 0.9),
            times_as_fast(OURS_COLD, [RUNAI], 2.0),
            times_as_fast(OURS_COLD, [TENSORIZER], 1.4),
            no_slower(OURS_COLD, BOTO3),
            no_slower(OURS_COLD, HUB),
        ),
    ),
    Comparison(
        name="faults",
        asks="While 1 % of the requests fail or stall: is a cold load hardly slower than without?",
        model="llama",
        cases=(Case(CLEAN, "weightcache", "proxy"), Case(FAULTY, "weightcache", "faults")),
        judges=(no_slower(FAULTY, CLEAN, 1.15), extra_bytes_at_most(FAULTY, CLEAN, 0.15)),
    ),
)

if __name__ == "__main__":
    today = datetime.datetime.now(datetime.UTC).date()
    suite.main(
        __doc__,
        QUESTIONS,
        DISK_NEEDED,
        out=Path(__file__).parent / "results" / f"{today}-origin.json",
        quick_throws_away=0,
    )
