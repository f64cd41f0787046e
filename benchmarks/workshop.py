"""Own what the runs need: models on disk, the same models in a bucket, cache folders, servers; and running one job.

Never measures: that is the subprocess's, see cases.py. All it makes lies below one folder, which `close` removes.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import measuring
from children import Child
from hub import Hub, HubFile
from models import (
    LLAMA_1B_CONFIG,
    llama_shapes,
    minilm_folder,
    tensor_nbytes,
    write_llama_1b,
    write_many_small,
    write_safetensors,
    write_sharded,
)
from servers import Bucket, Proxy, S3Server

CASES = Path(__file__).with_name("cases.py")
RUN_TIMEOUT_S = 600.0
SIGNED_FOR_S = 6 * 3600
HIDDEN_PREFIXES = ("AWS_", "WEIGHTCACHE_", "HF_", "RUNAI_")
N_HERD = 8
SINGLE_N_TENSORS = {False: 120, True: 8}  # of 16 MiB; by `quick`
BACKED_SHARE = 1.25  # of a model's bytes: free memory made sure of before the clock, see measuring.back_memory,
BACKED_NBYTES = 256 << 20  # and this beside
PROCESS_NBYTES = 400 << 20  # a process with torch and the S3 client, generously
GB = 10**9

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One way to load.

    Attributes:
        name: In the table.
        loader: The function of cases.py.
        source: What it loads from: `folder` (this disk), `tier` (a filled cache folder, the bucket behind it), `origin`
            (the bucket, an empty cache folder), `proxy` (as origin, through the counting proxy).
        page_cache: State of the files it reads from this disk: `cold`, `warm`, or empty where it reads none.
        needs: The module, or the `program` behind a colon, an optional peer needs.
        options: For the loader, as its part of the job.
    """

    name: str
    loader: str
    source: str
    page_cache: str = ""
    needs: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_installed(self) -> bool:
        if self.needs.startswith(":"):
            return shutil.which(self.needs[1:]) is not None
        return not self.needs or importlib.util.find_spec(self.needs) is not None


class CaseFailed(Exception):
    """A run ended with an error; its message says which."""


class Workshop:
    """Makes models, servers, buckets and caches when they are first asked for; a context manager.

    Args:
        work: Where its folder is made.
        quick: A Llama of 0.25 GB in place of 2.5 GB.
    """

    def __init__(self, work: Path, *, quick: bool) -> None:
        self._held = ExitStack()
        self._quick = quick
        self._seen: dict[str, str] = {}  # fingerprint of each model
        hide_settings()
        try:
            self.folder = work / f"weightcache-bench-{os.getpid()}"
            self.folder.mkdir()
            self._held.callback(shutil.rmtree, self.folder, ignore_errors=True)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._held.close()

    # -- servers

    @cached_property
    def _server(self) -> S3Server:
        return self._held.enter_context(S3Server(self.folder / "server"))

    @cached_property
    def proxy(self) -> Proxy:
        return self._held.enter_context(Proxy(self._server.address))

    @cached_property
    def _bucket(self) -> Bucket:
        return self._server.create_bucket()

    @cached_property
    def _hub(self) -> Hub:
        return self._held.enter_context(Hub({}))

    # -- models

    def model(self, name: str) -> Path:
        """Return the folder of a model, written if need be: llama, herd, small, minilm or single."""
        folder = self.folder / "models" / name
        if folder.exists():
            return folder
        if name == "minilm":
            shutil.copytree(minilm_folder(), folder)
        elif name == "small":
            write_many_small(folder)
        elif name == "single":
            folder.mkdir(parents=True)
            n_tensors = SINGLE_N_TENSORS[self._quick]
            shapes = {f"layers.{number:03}.weight": ("BF16", (4096, 2048)) for number in range(n_tensors)}
            write_safetensors(folder / "model.safetensors", shapes)
        elif name == "llama" and not self._quick:
            write_llama_1b(folder)
        else:
            n_layers = 1 if self._quick else self._herd_layers()
            vocabulary = 32_000 if self._quick else LLAMA_1B_CONFIG["vocab_size"]
            config = LLAMA_1B_CONFIG | {"num_hidden_layers": n_layers, "vocab_size": vocabulary}
            write_sharded(folder, llama_shapes(config), n_shards=2)
        for path in measuring.files_below(folder):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return folder

    def weights(self, name: str) -> list[Path]:
        """Return a model's weight files."""
        return sorted(self.model(name).rglob("*.safetensors"))

    def nbytes(self, name: str) -> int:
        """Return the size of a model's weight files."""
        return sum(path.stat().st_size for path in self.weights(name))

    def _herd_layers(self) -> int:
        """Return of how many layers a Llama may be so that N_HERD processes can hold one each in this memory."""
        room = measuring.available_memory_nbytes() * 3 // 4 // N_HERD - PROCESS_NBYTES
        for n_layers in range(LLAMA_1B_CONFIG["num_hidden_layers"], 1, -1):
            shapes = llama_shapes(LLAMA_1B_CONFIG | {"num_hidden_layers": n_layers})
            if sum(tensor_nbytes(*shape) for shape in shapes.values()) <= room:
                break
        return n_layers

    # -- the bucket and the caches

    def uri(self, name: str) -> str:
        """Return where a model lies in the bucket, uploaded if need be."""
        uri = f"{self._bucket.url}/{name}"
        if not self._bucket.keys(f"{name}/"):
            self._bucket.upload(self.model(name), name)
            for path in self.weights(name):
                key = f"{name}/{path.name}"
                etag = self._bucket.client.head_object(Bucket=self._bucket.name, Key=key)["ETag"].strip('"')
                file = HubFile(path.stat().st_size, etag, self._signed(key))
                self._hub.files[f"bench/{name}/{path.name}"] = file
            os.sync()
        return uri

    def filled_cache(self, name: str) -> Path:
        """Return a cache folder whose disk tier holds a model, loaded into it if need be."""
        cache = self.folder / "caches" / name
        if not cache.exists():
            cache.mkdir(parents=True)
            with self._child() as child:
                job = self._job(Case("", "weightcache", "origin"), name, cache, cache)
                child.tell(job)
                hear(child)
                child.tell()
                self._check(name, hear(child))
            os.sync()
        return cache

    def _signed(self, key: str) -> str:
        place = {"Bucket": self._bucket.name, "Key": key}
        url: str = self._bucket.client.generate_presigned_url("get_object", place, ExpiresIn=SIGNED_FOR_S)
        return url

    # -- runs

    def run(self, case: Case, name: str, cache: Path | None = None) -> Result:
        """Run a case once, in a subprocess.

        Args:
            cache: The cache folder to use, as it is; without it a filled or an empty one, as the case's source wants.
        """
        [result] = self.run_at_once(case, name, 1, cache)
        return result

    def run_at_once(self, case: Case, name: str, n: int, cache: Path | None = None) -> list[Result]:
        """Run a case in n subprocesses that begin at the same moment, over one cache folder."""
        with self._scratch() as scratch, ExitStack() as running:
            if case.source == "tier":
                cache = self.filled_cache(name)
            job = self._job(case, name, cache or scratch / "cache", scratch)
            if n == 1:
                job["back_nbytes"] = int(BACKED_SHARE * self.nbytes(name)) + BACKED_NBYTES
            if case.source in ("origin", "proxy"):
                served = measuring.make_warm(list((self.folder / "server").rglob("*.dat")))
                os.sync()  # what an earlier run wrote must not be written back in this one's time
            children = [running.enter_context(self._child()) for _ in range(n)]
            for child in children:
                child.tell(job)
            for child in children:
                hear(child)
            for child in children:
                child.tell()
            is_served = case.source in ("origin", "proxy")
            busy_s = measuring.cpu_s(self._server.pid) if is_served else 0.0
            results = [hear(child) for child in children]
            busy_s = measuring.cpu_s(self._server.pid) - busy_s if is_served else 0.0
        for result in results:
            self._check(name, result)
            if is_served:
                result["page_cache"] = f"cache folder empty; server's files {served}"
                result["facts"]["server_cpu_s"] = busy_s
            elif case.source == "tier" and not case.page_cache:
                result["page_cache"] = "cache folder filled, its pages as they were"
        return results

    def _check(self, name: str, result: Result) -> None:
        """Raise RuntimeError unless what was loaded is what the other loaders of this model delivered."""
        seen = result.pop("fingerprint")
        if seen and self._seen.setdefault(name, seen) != seen:
            raise RuntimeError(f"two loaders delivered different bytes for {name}: the benchmark measures nothing")

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        scratch = self.folder / "scratch"
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch)

    def _child(self) -> Child:
        return Child(CASES)

    def _job(self, case: Case, name: str, cache: Path, scratch: Path) -> dict[str, Any]:
        """Return all a subprocess is told."""
        weights = self.weights(name)
        names = [path.name for path in weights]
        job: dict[str, Any] = {
            "loader": case.loader,
            "page_cache": case.page_cache,
            "back_nbytes": 0,
            "reads": "",
            "files": [str(path) for path in weights],
            "names": names,
            "uri": str(self.model(name)),
            "storage_options": {},
            "options": case.options,
            "stores": case.source in ("origin", "proxy"),
            "environment": {
                "WEIGHTCACHE_DIR": str(cache),
                "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        }
        if case.source == "folder":
            return job | {"reads": str(self.model(name)) if case.page_cache else ""}
        uri = self.uri(name)
        job |= {
            "reads": str(cache) if case.page_cache else "",
            "uri": uri,
            "objects": [f"{uri}/{each}" for each in names],
            "bucket": self._bucket.name,
            "prefix": name,
            "repository": f"bench/{name}",
            "sizes": {path.name: path.stat().st_size for path in weights},
            "signed_urls": {each: self._signed(f"{name}/{each}") for each in names},
            "storage_options": self._server.storage_options(self.proxy.endpoint if case.source == "proxy" else None),
            "target": str(scratch),
        }
        job["environment"] |= {
            "HF_ENDPOINT": self._hub.endpoint,
            "HF_HOME": str(scratch / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        if case.loader == "runai_streamer":  # it takes no options; the others must not see these
            job["environment"] |= {
                "AWS_ACCESS_KEY_ID": self._server.key,
                "AWS_SECRET_ACCESS_KEY": self._server.secret,
                "AWS_ENDPOINT_URL": self._server.endpoint,
                "AWS_REGION": "us-east-1",
                "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            }
        return job


def hear(child: Child) -> Any:
    """Return what a run says next.

    Raises:
        CaseFailed: It failed.
    """
    said = child.hear(RUN_TIMEOUT_S)
    if isinstance(said, dict) and "failed" in said:
        raise CaseFailed(said["failed"])
    return said


def hide_settings() -> None:
    """Take the developer's settings and credentials out of this process's environment."""
    for name in list(os.environ):
        if name.startswith(HIDDEN_PREFIXES):
            del os.environ[name]
