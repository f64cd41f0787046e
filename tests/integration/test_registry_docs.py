"""docs/registry.md runs: each command of its transcript, in order, prints what the document says it prints.

    python tests/integration/test_registry_docs.py --write     # what they print now goes into the document

A block whose first line is `# PATH` is that file. A comment `<!-- … -->` of EVENTS happens where it stands. The regions are
buckets of one real S3 server, each behind a proxy that can fail.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from servers import Bucket, Proxy, S3Server

from weightcache.measurements import Measurements

DOCUMENT = Path(__file__).parents[2] / "docs" / "registry.md"
# By region, seconds to the first byte and bytes a second.
MEASURED = {"frankfurt": (0.004, 60e6), "paris": (0.011, 30e6), "virginia": (0.092, 10e6)}
REGIONS = tuple(MEASURED)
COMMAND_TIMEOUT_S = 120.0
PART = re.compile(r"<!-- (?P<event>.+?) -->|```(?P<kind>console|toml|python)\n(?P<body>.*?)```", re.DOTALL)
# What is another in each run: the document and the run must agree on which of them are the same.
NAMES = re.compile(r"(?:blake3|ed25519):[0-9a-f]{64}|\b[0-9a-f]{16}\b")
# What differs from machine to machine, and from run to run.
VOLATILE = (
    (r", slow just now\b", ""),  # as a busy machine may find it
    (r"^choice of (memory|read|files|price) .*\n", ""),
    (r"^(time|speed|requests|asked of \S+) .*$", r"\1"),
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "TIME"),
    (r"\b(just now|\d+ (min|h) ago)\b", "AGO"),
    (r"\b\d+(\.\d+)? (s|ms|MB/s)(?=[ ,:;)]|$)", r"# \2"),
    (r"\bx\d+\b", "x#"),
    (r" {2,}", "  "),
    (r" +$", ""),
)


@dataclass
class Regions:
    """The regions of the document's store: a bucket each, and a proxy before it."""

    server: S3Server
    buckets: dict[str, Bucket]
    proxies: dict[str, Proxy]

    @classmethod
    @contextmanager
    def open(cls, server: S3Server) -> Iterator[Regions]:
        with ExitStack() as stack:
            buckets = {name: Bucket(server, f"models-{name}") for name in REGIONS}
            for bucket in buckets.values():
                server.client().create_bucket(Bucket=bucket.name)
                stack.callback(bucket.remove)
            proxies = {
                name: stack.enter_context(Proxy(server.address, (server.key, server.secret))) for name in REGIONS
            }
            yield cls(server, buckets, proxies)

    def fail(self) -> None:
        """Let Frankfurt serve some chunks, then hang."""
        self.proxies["frankfurt"].script("GET /models-frankfurt/registry/chunks/", "ok " * 8 + "stall " * 200)

    def recover(self) -> None:
        self.proxies["frankfurt"].reset()

    def rot(self) -> None:
        """Change a byte of a chunk in Paris."""
        bucket = self.buckets["paris"]
        key = min(bucket.keys("registry/chunks/"))
        content = bucket.get(key)
        bucket.put(key, bytes([content[0] ^ 1]) + content[1:])

    def forge(self) -> None:
        """Give a signature in Frankfurt another serial."""
        bucket = self.buckets["frankfurt"]
        [key] = bucket.keys("registry/models/minilm/signatures/")
        bucket.put(key, bucket.get(key).replace(b'"serial": 1', b'"serial": 2'))


EVENTS: dict[str, Callable[[Regions], None]] = {
    "Frankfurt hangs amid the next load": Regions.fail,
    "Frankfurt is back": Regions.recover,
    "a byte of a chunk changes in Paris": Regions.rot,
    "somebody changes a signature": Regions.forge,
}


@dataclass
class Terminal:
    """A shell in a folder that is its home, where the document is played.

    Attributes:
        called: What something is called in this run, by what the document calls it.
    """

    home: Path
    regions: Regions
    called: dict[str, str] = field(default_factory=dict)
    status: int = 0

    def __post_init__(self) -> None:
        for name, proxy in self.regions.proxies.items():
            self.called[f"https://{name[:3]}.s3.example"] = proxy.endpoint
        programs = self.home / "bin"
        programs.mkdir()
        for name, arguments in {"python": "", "weightcache": "-m weightcache "}.items():
            program = programs / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments}"$@"\n')
            program.chmod(0o755)

    def play(self, document: str) -> str:
        """Return the document with what its commands print in this run, and with this run's names."""
        return PART.sub(self._play, document)

    def _play(self, part: re.Match[str]) -> str:
        if part["event"]:
            if part["event"] in EVENTS:
                EVENTS[part["event"]](self.regions)
            return part[0]
        if part["kind"] == "console":
            steps = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", part["body"], re.MULTILINE)
            return "```console\n" + "".join(self._step(command, told) for command, told in steps) + "```"
        title = re.match(r"# (\S+)\n", part["body"])
        if title:
            path = self.home / title[1].removeprefix("~/")
            path.parent.mkdir(exist_ok=True)
            path.write_text(self._as_called(part["body"]))
        return part[0]

    def _step(self, command: str, told: str) -> str:
        command = self._as_called(command)
        printed = self._run(command)
        for here, there in zip(_distinct(told), _distinct(printed), strict=False):
            self.called.setdefault(here, there)
        return f"$ {command}\n{printed}"

    def _measure(self) -> None:
        """Let the node remember what MEASURED says: the choice among regions must not rest on how fast this machine is."""
        cache = self.home / ".cache/weightcache"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        (cache / "replicas.json").unlink(missing_ok=True)
        measurements = Measurements(cache)
        for name, (latency_s, bytes_per_s) in MEASURED.items():
            measured = measurements.of(f"{self.regions.proxies[name].endpoint}/{self.regions.buckets[name].name}")
            measured.add_latency(latency_s)
            measured.add_rate(bytes_per_s)
        measurements.save()

    def _run(self, command: str) -> str:
        self._measure()
        server = self.regions.server
        environment = {
            "HOME": str(self.home),
            "PATH": f"{self.home}/bin:/usr/bin:/bin",
            "AWS_ACCESS_KEY_ID": server.key,
            "AWS_SECRET_ACCESS_KEY": server.secret,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        ran = subprocess.run(
            ["bash", "-c", f"(exit {self.status}); {command}"],
            cwd=self.home,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        self.status = ran.returncode
        text = ran.stdout.replace(f"{self.home}/", "~/")
        for there, here in self.called.items():
            if there.startswith("https://"):
                text = text.replace(here, there)
        return text

    def _as_called(self, text: str) -> str:
        for here, there in self.called.items():
            text = text.replace(here, there)
        return text


def _distinct(text: str) -> list[str]:
    return list(dict.fromkeys(NAMES.findall(text)))


def normalised(document: str) -> str:
    """Return the parts of a document that are played, without what differs from run to run."""
    text = "\n".join(part[0] for part in PART.finditer(document))
    numbers: dict[str, int] = {}
    text = NAMES.sub(lambda name: f"NAME{numbers.setdefault(name[0], len(numbers))}", text)
    for pattern, word in VOLATILE:
        text = re.sub(pattern, word, text, flags=re.MULTILINE)
    return text


def test_every_command_of_the_document_prints_what_it_says(s3: S3Server, tmp_path: Path) -> None:
    document = DOCUMENT.read_text()
    with Regions.open(s3) as regions:
        played = Terminal(tmp_path, regions).play(document)
    assert normalised(played).splitlines() == normalised(document).splitlines()


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    with tempfile.TemporaryDirectory() as home, S3Server() as server, Regions.open(server) as regions:
        DOCUMENT.write_text(Terminal(Path(home), regions).play(DOCUMENT.read_text()))
