"""Answer what the node daemon costs and saves: attaching, many clients at once, doing nothing, being asked a lot.

Questions (each runs alone with `--only`, by the beginning of its name) and their targets:

    attach          A resident Llama of 2.5 GB, and 6,000 tensors, in a new process to the CPU, after its imports: 50 ms
                    and 80 ms.
    herd            8 processes load one cold model at the same moment: 1.00 of its bytes from the origin and to the disk,
                    1.00 of it and 64 MiB of host memory, the last is done in 1.1 of the time that one alone needs.
    idle            A daemon that has a model and nothing to do: less than 1 % of a core, less than 120 MB beside images.
    asked           200 requests a second for its state while a cold load runs: 99 % answered within 20 ms, the load at most
                    5 % slower than without them.

    python benchmarks/bench_daemon.py --quick     a minute; shows that it works, not how fast
    python benchmarks/bench_daemon.py             about 8 minutes, 10 GB of disk; for a quiet machine

Everything is real: an S3 server (SeaweedFS), the daemon as a process, clients as processes. Cases of one question alternate;
the first round is thrown away. Times are those of `load_model` in the client, after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import measuring
from checkpoints import Checkpoints
from rows import MIB, Spread, Verdict
from workshop import hide_settings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from nodes import Node
from servers import S3Server

N_HERD = 8
IDLE_S = 20.0
ASKED_PER_S = 200
SERVER_MEMORY = "6GiB"

# Imports, waits for a line, loads, tells, waits for the end.
CLIENT = """if True:
    import json, sys, time
    import torch, uvloop, weightcache, weightcache.cache, weightcache.tensors, weightcache.tiers.device

    def anonymous():
        status = open("/proc/self/status").read()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    before = anonymous()
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    model = weightcache.load_model(sys.argv[1], "cpu", storage_options=json.loads(sys.argv[2]))
    took = time.perf_counter() - began
    told = {"seconds": took, "private_bytes": anonymous() - before, "report": model.report.as_dict(), "n": len(model)}
    print(json.dumps(told), flush=True)
    sys.stdin.readline()
"""

# Asks for the state so often, until its input ends; prints how long each answer took.
ASKER = """if True:
    import json, socket, sys, time
    sys.path.insert(0, sys.argv[1])
    from nodes import receive

    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[2])
    body = json.dumps({"v": 1, "op": "status"}).encode()
    message = len(body).to_bytes(4, "big") + body
    print("ready", flush=True)
    took, due, end = [], time.perf_counter(), None
    import select
    while not select.select([sys.stdin], [], [], max(0, due - time.perf_counter()))[0]:
        due = max(due + 1 / float(sys.argv[3]), time.perf_counter() - 1)
        began = time.perf_counter()
        sock.sendall(message)
        receive(sock)
        took.append(time.perf_counter() - began)
    print(json.dumps(took))
"""


class Bench:
    """The models, the server, the daemon; and what is measured with them."""

    def __init__(self, work: Path, *, quick: bool, repeats: int) -> None:
        self.repeats = repeats
        self._open = ExitStack()
        self.folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=work)))
        self.checkpoints = Checkpoints(self.folder / "models", quick=quick)
        self.server = self._open.enter_context(S3Server(memory_limit=SERVER_MEMORY))
        self.bucket = self.server.create_bucket()
        os.environ["WEIGHTCACHE_DIR"] = str(self.folder / "cache")
        self.node = self._open.enter_context(Node())

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def url(self, name: str) -> str:
        """Return where a model is, uploading it if it is not there yet."""
        if not self.bucket.keys(name):
            self.bucket.upload(self.checkpoints.folder_of(name), name)
        return f"{self.bucket.url}/{name}"

    def nbytes(self, name: str) -> int:
        return sum(path.stat().st_size for path in self.checkpoints.folder_of(name).rglob("*.safetensors"))

    @contextmanager
    def clients(self, url: str, n: int) -> Iterator[list[subprocess.Popen[str]]]:
        """Have clients that have imported everything and wait."""
        arguments = [sys.executable, "-c", CLIENT, url, json.dumps(self.server.storage_options())]
        started = [
            subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(n)
        ]
        try:
            for client in started:
                assert client.stdout is not None
                assert client.stdout.readline() == "ready\n"
            yield started
        finally:
            for client in started:
                client.communicate(timeout=60)

    def load(self, url: str, n: int = 1) -> tuple[float, list[dict[str, Any]], dict[str, int]]:
        """Have so many clients load at once. Returns the seconds until the last was done, their answers, and memory."""
        with self.clients(url, n) as started:
            shared = meminfo("Shmem")
            began = time.perf_counter()
            for client in started:
                assert client.stdin is not None
                client.stdin.write("\n")
                client.stdin.flush()
            told = [json.loads(client.stdout.readline()) for client in started if client.stdout is not None]
            took = time.perf_counter() - began
            memory = {"shared": meminfo("Shmem") - shared, "private": sum(each["private_bytes"] for each in told)}
            for each in told:
                assert each["report"]["choices"]["daemon"].startswith("attached"), each["report"]["choices"]
        return took, told, memory

    def make_cold(self, url: str) -> None:
        """Have nothing of a model on this node."""
        time.sleep(0.5)
        answer = self.node.ask({"op": "evict", "uri": url, "options": {}})
        assert answer["ok"] or answer["code"] == "not-found", answer
        os.sync()

    def stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in Path(self.node.folder, "chunks").rglob("*/*"))

    def rounds(self) -> Iterator[bool]:
        """Yield, for each round, whether it counts."""
        for number in range(self.repeats + 1):
            yield number > 0


def attach(bench: Bench) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for name, limit_s in (("llama", 0.050), ("small", 0.080)):
        url = bench.url(name)
        bench.load(url)
        spread = Spread.of([bench.load(url)[1][0]["seconds"] for counts in bench.rounds() if counts])
        print(f"attach {name}: {bench.nbytes(name):,} bytes: {spread} s")
        verdicts.append(Verdict(f"seconds to attach and bind {name}", spread.median, limit_s, " s"))
    return verdicts


def herd(bench: Bench) -> list[Verdict]:
    name = "llama"
    url, nbytes = bench.url(name), bench.nbytes(name)
    alone: list[float] = []
    together: list[float] = []
    shares: list[dict[str, float]] = []
    for counts in bench.rounds():
        for n, found in ((1, alone), (N_HERD, together)):
            bench.make_cold(url)
            before, stored_before = bench.node.state(), bench.stored_bytes()
            took, _, memory = bench.load(url, n)
            after = bench.node.state()
            if not counts:
                continue
            found.append(took)
            if n == N_HERD:
                received = after["ledger"]["received_bytes"] - before["ledger"]["received_bytes"]
                time.sleep(2)  # what is written behind
                stored = bench.stored_bytes() - stored_before
                shares.append({"origin": received / nbytes, "disk": stored / nbytes, **memory})
    shared = max(each["shared"] + each["private"] for each in shares)
    print(f"herd: alone {Spread.of(alone)} s, the last of {N_HERD} {Spread.of(together)} s; {shares[-1]}")
    return [
        Verdict("origin bytes", max(each["origin"] for each in shares), 1.01, "x"),
        Verdict("bytes on disk", max(each["disk"] for each in shares), 1.01, "x"),
        Verdict("host memory above the model's bytes", (shared - nbytes) / MIB, 64, " MiB"),
        Verdict("time of the last / of one alone", statistics.median(together) / statistics.median(alone), 1.1, "x"),
    ]


def idle(bench: Bench) -> list[Verdict]:
    url, pid = bench.url("llama"), bench.node.process.pid
    bench.load(url)
    time.sleep(5)
    before = measuring.cpu_s(pid)
    time.sleep(IDLE_S)
    share = (measuring.cpu_s(pid) - before) / IDLE_S
    status = Path(f"/proc/{pid}/status").read_text()
    resident = sum(int(status.split(f"{name}:")[1].split()[0]) for name in ("RssAnon", "RssFile")) * 1024
    print(f"idle: {share:.2%} of a core, {resident / 1e6:.0f} MB")
    return [
        Verdict("share of a core, idle", share, 0.01),
        Verdict("resident beside images", resident / 1e6, 120, " MB"),
    ]


def asked(bench: Bench) -> list[Verdict]:
    url = bench.url("llama")
    quiet: list[float] = []
    busy: list[float] = []
    took: list[float] = []
    for counts in bench.rounds():
        for is_asked in (False, True):
            bench.make_cold(url)
            with ExitStack() as stack:
                answers: list[float] = []
                if is_asked:
                    stack.enter_context(asking(bench.node, answers))
                seconds = bench.load(url)[1][0]["seconds"]
            if counts:
                (busy if is_asked else quiet).append(seconds)
                took += answers
    p99 = statistics.quantiles(took, n=100)[-1]
    print(
        f"asked: load {Spread.of(quiet)} s, asked {Spread.of(busy)} s; {len(took)} answers, 99 % within {p99 * 1e3:.1f} ms"
    )
    return [
        Verdict("99 % of answers", p99 * 1e3, 20, " ms"),
        Verdict(
            "time of a load that is asked / of one that is not",
            statistics.median(busy) / statistics.median(quiet),
            1.05,
            "x",
        ),
    ]


@contextmanager
def asking(node: Node, answers: list[float]) -> Iterator[None]:
    """Ask for the state during the block."""
    arguments = [
        sys.executable,
        "-c",
        ASKER,
        str(Path(__file__).parents[1] / "tests"),
        str(node.socket),
        str(ASKED_PER_S),
    ]
    asker = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert asker.stdout is not None
        assert asker.stdout.readline() == "ready\n"
        yield
    finally:
        told, _ = asker.communicate(timeout=60)
        answers += json.loads(told)


def meminfo(name: str) -> int:
    """Return a line of /proc/meminfo, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


QUESTIONS: Sequence[Callable[[Bench], list[Verdict]]] = (attach, herd, idle, asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="models of a tenth of the size, and 1 repeat")
    parser.add_argument("--repeats", type=int, help="rounds, beside one thrown away (5; 1 with --quick)")
    parser.add_argument("--only", default="", metavar="NAME", help="only the questions whose names begin so")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the verdicts there, too")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where to work: on a real disk")
    given = parser.parse_args()
    hide_settings()
    commit, machine = measuring.describe_commit(measuring.REPOSITORY), measuring.describe_machine(given.work)
    print(f"commit {commit}\nmachine {machine}\nload average {os.getloadavg()[0]:.1f} at the start\n")
    results: list[dict[str, Any]] = []
    with Bench(given.work, quick=given.quick, repeats=given.repeats or (1 if given.quick else 5)) as bench:
        for question in QUESTIONS:
            if question.__name__.startswith(given.only):
                verdicts = question(bench)
                for verdict in verdicts:
                    print(verdict)
                common = {"commit": commit, "machine": machine, "quick": given.quick, "question": question.__name__}
                results.append({**common, "verdicts": [verdict.as_dict() for verdict in verdicts]})
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
