"""Measure what the engine does with a real GPU, beside the link, the disk and today's loaders, in 8 minutes, offline.

    python benchmarks/gpu.py --out gpu.json       wants torch with CUDA and numpy, and weightcache's engine built in place
    python benchmarks/gpu.py --quick              two minutes; shows that it works, not how fast

Steps, each a process with a budget of its own; what cannot be measured is said with its reason, and the file is written
anew with each row, so that a run that is killed keeps what it has:

    link            page-locked copies to the card in pieces of 1 to 256 MiB, by torch (CUDA events) and by the engine
    register        seconds to page-lock a GB by kind of page; copies from read-only pages, and across registrations
    ring            page cache -> VRAM by slots a thread, slot size and threads; what was best is used from here on
    paths           page cache, host image (through the ring; registered) and disk -> VRAM; disk -> host as the limit
    loader          weightcache.load_model, stream and load_model of a prefetched model, and the peers that are there:
                    safetensors, Run:ai's streamer, fastsafetensors, InstantTensor; warm and cold
    tests           python -m pytest tests/gpu

on models of 2.5, 16 and 61 GB (real names and shapes, random bytes) as far as disk, memory, VRAM and time go. Cold is
synced, dropped from the page cache and checked. Imports, contexts and a first small load are done before the clock
starts, and it stops when the device is synchronised; torch's cached device memory is given back before each load. Bytes
on the device are compared with the files' after the clock.

Targets: host image -> VRAM 0.95 times the link's best, page cache -> VRAM 0.85, disk -> VRAM 0.9 times the slower of disk
and link, the prefetched 2.5 GB in 50 ms; and load_model no slower than each peer.

With WEIGHTCACHE_LIBCUDA naming a stand-in for libcuda the engine's part runs on host memory: it shows that this command
works, its numbers mean nothing. Exit status 1: wrong bytes arrived; 2: there is no GPU, or no engine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import gpu_parts as parts
    import gpu_steps as steps
    import measuring
    from rows import GB, Verdict

    from weightcache import _engine
except ImportError as missing:
    print(f"no measurement: {missing}; build the engine with `python setup.py build_ext --inplace`", file=sys.stderr)
    sys.exit(2)

TOTAL_S = {False: 470, True: 150}  # by --quick
TESTS_S = {False: 60, True: 20}  # kept for the tests, of that
LEAST_S = 6.0  # a step with less than this is not begun: torch alone takes most of it
BIG_MODELS = {False: ("llama-1b", "llama-8b", "qwen3-30b-a3b"), True: ("one-layer",)}
SMALL_MODEL = "one-layer-less"
HOSTED_LIMIT_S = 0.050


@dataclass
class Report:
    """What is written: the machine, and each step with its rows and how it ended."""

    about: dict[str, Any]
    out: Path
    steps: list[dict[str, Any]] = field(default_factory=list)

    def begin(self, name: str, model: str = "") -> dict[str, Any]:
        self.steps.append({"step": name, "model": model, "rows": []})
        return self.steps[-1]

    def write(self) -> None:
        """Write all of it, in one move."""
        verdicts = [verdict.as_dict() for verdict in self.verdicts()]
        part = self.out.with_suffix(".part")
        part.write_text(json.dumps({**self.about, "verdicts": verdicts, "steps": self.steps}, indent=1) + "\n")
        part.replace(self.out)

    def best(self, case: str, model: str = "") -> dict[str, Any]:
        """Return the fastest row of a case; an empty one where there is none."""
        rows = [row for step in self.steps for row in step["rows"] if step["model"] == model or not model]
        measured = [row for row in rows if row.get("case") == case and "gb_per_s" in row]
        return max(measured, key=lambda row: row["gb_per_s"], default={})

    def verdicts(self) -> Iterator[Verdict]:
        """Hold what was measured against the targets; nothing of a stand-in is."""
        peak = self.best(steps.LINK_TORCH).get("gb_per_s")
        for model in [] if self.about["is_stand_in"] else {step["model"]: None for step in self.steps if step["model"]}:
            disk = self.best(steps.DISK_HOST, model).get("gb_per_s")
            limits = [
                (steps.HOST_REGISTERED, peak, 0.95),
                (steps.HOST_RING, peak, 0.95),
                (steps.CACHED, peak, 0.85),
                (steps.DISK, min(disk, peak) if disk and peak else None, 0.9),
            ]
            for case, limit, least in limits:
                if (row := self.best(case, model)) and limit:
                    yield Verdict(f"{model}: {case} / its limit", row["gb_per_s"] / limit, least, "x", is_least=True)
            if model == BIG_MODELS[False][0] and (row := self.best(steps.HOSTED, model)):
                yield Verdict(f"{model}: {steps.HOSTED}", row["seconds"]["median"], HOSTED_LIMIT_S, " s")
            for state in (steps.WARM, steps.COLD):
                ours = self.best(steps.OURS + state, model)
                for peer in parts.LOADERS:
                    if ours and peer != steps.OURS and (row := self.best(peer + state, model)):
                        ratio = ours["gb_per_s"] / row["gb_per_s"]
                        yield Verdict(f"{model}: speed of load_model / {peer}{state}", ratio, 1.0, "x", is_least=True)


@dataclass
class Session:
    """A run: the report, the clock, and what every step is told."""

    report: Report
    job: dict[str, Any]
    end_s: float

    def run(self, name: str, budget_s: float, model: str = "", **job: Any) -> bool:
        """Run a step within its budget and what is left of the time; return whether it came to its end."""
        step = self.report.begin(name, model)
        step |= {"loader": job["loader"]} if "loader" in job else {}
        say(f"{name} {model} {job.get('loader', '')}".rstrip())
        left_s = min(budget_s, self.end_s - time.monotonic())
        if left_s < LEAST_S:
            return self._end(step, "skipped", "no time left")
        job = {**self.job, "step": name, "model": model, **job}
        began = time.monotonic()
        job["until_s"] = began + left_s - LEAST_S / 3  # to end by itself
        for row in hear(job, began + left_s):
            step["rows"].append(row)
            step["seconds"] = round(time.monotonic() - began, 1)
            show(row)
            self.report.write()
        return self._end(step, *step["rows"][-1]["end"])

    def skip(self, name: str, model: str, reason: str) -> None:
        self._end(self.report.begin(name, model), "skipped", reason)

    def _end(self, step: dict[str, Any], how: str, reason: str = "") -> bool:
        step["rows"] = [row for row in step["rows"] if "end" not in row]
        step |= {"ended": how, "reason": reason}
        if reason:
            say(f"  {step['step']} {how}: {reason}")
        self.report.write()
        return how == "done"


def hear(job: Mapping[str, Any], until_s: float) -> Iterator[dict[str, Any]]:
    """Run a step's process and yield its rows as they come, and at last how it ended; kill it when its time is over."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_steps.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job).encode() + b"\n")
        process.stdin.close()
        heard = b""
        try:
            while select.select([process.stdout], [], [], max(0.0, until_s - time.monotonic()))[0]:
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    rc = process.wait()
                    yield {"end": ("done", "") if rc == 0 else ("failed", f"exit status {rc}")}
                    return
                *lines, heard = (heard + piece).split(b"\n")
                for line in lines:
                    if line.startswith(b'{"case"'):  # libraries print, too
                        yield json.loads(line)
            yield {"end": ("out of time", "killed")}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def measure(session: Session, work: Path, quick: bool) -> None:
    """Go through the steps; models that are done with make room for the next."""
    small = work / SMALL_MODEL
    session.run("make", 30, SMALL_MODEL, folder=str(small))
    session.run("link", 40)
    session.run("register", 45)
    for number, model in enumerate(BIG_MODELS[quick]):
        folder, nbytes = work / model, parts.model_nbytes(model)
        reason = what_is_missing(nbytes, work, session.job["vram_nbytes"])
        if reason:
            session.skip("make", model, reason)
            continue
        try:
            if not session.run("make", 30 + 1.2 * nbytes / GB, model, folder=str(folder)):
                continue
            if number == 0:
                session.run("ring", 40, model, folder=str(folder))
                session.job["best"] = session.report.best(steps.RING).get("facts", {}).get("ring", {})
            at = {"folder": str(folder), "small": str(small)}
            states = [["warm", "cold"]] if nbytes < 4 * GB else [["warm"], ["cold"]]  # reading it back takes long
            _load(session, model, at, states[0], 25 + nbytes / GB)
            session.run("paths", 25 + 2 * nbytes / GB, model, **at)
            for cold in states[1:]:
                _load(session, model, at, cold, 15 + nbytes / GB)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _load(session: Session, model: str, at: Mapping[str, str], states: Sequence[str], budget_s: float) -> None:
    for name in parts.LOADERS:
        if session.report.about["is_stand_in"]:
            session.skip("loader", model, f"{name}: {parts.STAND_IN}")
        elif name != steps.OURS and importlib.util.find_spec(name) is None:
            session.skip("loader", model, f"{name} is not installed")
        else:
            session.run("loader", budget_s, model, loader=name, states=states, **at)


def what_is_missing(nbytes: int, work: Path, vram_nbytes: int) -> str:
    """Return why a model of this size cannot be measured here; nothing where it can."""
    wanted = {
        "disk": (nbytes * 1.02 + 2 * GB, shutil.disk_usage(work).free),
        "host memory": (nbytes * 1.1 + 2 * GB, memory_nbytes()),
        "VRAM": (nbytes * 1.05 + GB, vram_nbytes),
    }
    return "; ".join(
        f"{need / GB:.1f} GB of {what} wanted, {there / GB:.1f} there"
        for what, (need, there) in wanted.items()
        if there < need
    )


def memory_nbytes() -> int:
    """Return the host memory that this process may use."""
    limits = [measuring.available_memory_nbytes()]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if (text := measuring.read(path).strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def run_tests(session: Session, budget_s: float) -> None:
    """Run the tests that want a GPU and note their outcome."""
    step = session.report.begin("tests")
    say("tests")
    if not (measuring.REPOSITORY / "tests" / "gpu").is_dir():
        session._end(step, "skipped", "there is no folder tests/gpu")
        return
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    try:
        ran = subprocess.run(command, cwd=measuring.REPOSITORY, capture_output=True, text=True, timeout=budget_s)
    except subprocess.TimeoutExpired as late:
        session._end(step, "out of time", str(late.stdout)[-2000:])
        return
    step["tail"] = (ran.stdout + ran.stderr)[-4000:]
    say(step["tail"])
    session._end(step, "done" if ran.returncode == 0 else "failed", "" if ran.returncode == 0 else f"{ran.returncode}")


def describe(work: Path, driver: _engine.Driver, ordinal: int) -> dict[str, Any]:
    """Return the machine: the card, its link and driver, CPU, memory, disk, kernel and libraries."""
    import torch

    name, bus_id, nbytes = driver.describe(ordinal)
    smi: dict[str, str] = {}
    names = (
        "name",
        "driver_version",
        "pcie.link.gen.max",
        "pcie.link.gen.current",
        "pcie.link.width.max",
        "vbios_version",
    )
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", f"--id={ordinal}"]
        answer = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        smi = dict(zip(names, re.split(r",\s*", answer), strict=False))
    device = work.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    return {
        **measuring.describe_machine(work),
        "gpu": {"name": name, "vram_bytes": nbytes, "link": parts.pcie_link(bus_id), "cuda": driver.version(), **smi},
        "memory_for_us_gb": memory_nbytes() / GB,
        "disk": {
            "free_gb": shutil.disk_usage(work).free / GB,
            "device": block.resolve().name if block.exists() else "",
        },
        "torch_cuda": torch.version.cuda,
    }


def show(row: Mapping[str, Any]) -> None:
    """Print a row in a line."""
    if "gb_per_s" in row:
        facts = {name: value for name, value in row["facts"].items() if value not in ("", {})}
        say(
            f"  {row['case']}: {row['gb_per_s']:.2f} GB/s, {row['seconds']['median']:.4f} s {row['page_cache']} {facts}"
        )
    elif "end" not in row:
        say(f"  {row}")


def say(line: str) -> None:
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model and little memory: shows that it works")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), metavar="FILE.json", help="where the rows go")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()), help="where models go: on a real disk"
    )
    parser.add_argument("--seconds", type=float, help="for all of it (470; 150 with --quick)")
    parser.add_argument("--device", type=int, default=0, metavar="N", help="the card (0)")
    parser.add_argument("--commit", default="", help="the commit that is measured, where git cannot tell")
    arguments = parser.parse_args()
    end_s = time.monotonic() + (arguments.seconds or TOTAL_S[arguments.quick])
    library = os.environ.get("WEIGHTCACHE_LIBCUDA", "libcuda.so.1")
    try:
        driver = _engine.Driver(library)
        _, bus_id, vram_nbytes = driver.describe(arguments.device)
    except _engine.DriverError as error:
        print(f"no GPU: {error.args[1]}", file=sys.stderr)
        return 2
    if not driver.is_stand_in and not steps.torch.cuda.is_available():
        print(f"no GPU for torch: {steps.torch.__version__} has no CUDA or finds no device", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    with tempfile.TemporaryDirectory(prefix="weightcache-gpu-", dir=arguments.work) as folder:
        work = Path(folder)
        os.environ["WEIGHTCACHE_DIR"] = str(work / "cache")
        about = {
            "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": arguments.commit or measuring.describe_commit(measuring.REPOSITORY),
            "quick": arguments.quick,
            "is_stand_in": driver.is_stand_in,
            "machine": describe(work, driver, arguments.device),
        }
        say(json.dumps(about, indent=1))
        numa_node = int(parts.pcie_link(bus_id).get("numa_node", "-1"))
        job = {"library": library, "ordinal": arguments.device, "numa_node": numa_node, "quick": arguments.quick}
        tests_s = TESTS_S[arguments.quick]
        session = Session(
            Report(about, arguments.out), {**job, "vram_nbytes": vram_nbytes, "best": {}}, end_s - tests_s
        )
        measure(session, work, arguments.quick)
        run_tests(session, max(tests_s, end_s - time.monotonic()))
    for verdict in session.report.verdicts():
        say(str(verdict))
    wrong = [row["case"] for step in session.report.steps for row in step["rows"] if row.get("right") is False]
    if wrong:
        say(f"WRONG BYTES arrived: {', '.join(wrong)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
