"""Own what the runs need: models on disk, the same models in a bucket, cache folders, servers; and running one job.

Never measures: that is the subprocess's, see cases.py. All it makes lies below one folder, which `close` removes.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import measuring
from checkpoints import Checkpoints
from children import Child
from compiling import compile_program
from hub import Hub, HubFile
from regions import STORE, NeverBefell, Regions
from servers import Bucket, Proxy, S3Server
from web import SOURCES, Web

CASES = Path(__file__).with_name("cases.py")
RUN_TIMEOUT_S = 600.0
SIGNED_FOR_S = 6 * 3600
HIDDEN_PREFIXES = ("AWS_", "WEIGHTCACHE_", "HF_", "RUNAI_")
MOST_VAIN_RUNS = 3
FAULTS_SHARE = 0.01  # of requests for weights
FAILING_WORDS = ("503", "reset", "short")  # see tests/proxy.py
RANGE_NBYTES = 16 << 20  # of weightcache's requests
BACKED_SHARE = 1.25  # of a model's bytes: free memory made sure of before the clock, see measuring.back_memory,
BACKED_NBYTES = 256 << 20  # and this beside
GB = 10**9
MEMORY = Path("/dev/shm")

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One way to load.

    Attributes:
        name: In the table.
        loader: The function of cases.py.
        source: What it loads from: `folder` (this disk), `tier` (a filled cache folder, the bucket behind it), `origin`
            (the bucket, an empty cache folder), `proxy` (as origin, through the counting proxy), `faults` (as proxy, but
            FAULTS_SHARE of the requests fail or stall), one of web.SOURCES (an nginx), or `regions` (the model as it is
            published behind three links; options `replicas`: which of them are known, and `event`: what befalls the
            nearest half way).
        to: Where it publishes to what it reads from `folder`: `bucket` (an empty one, of a server of its own, for a
            server's heap and volumes grow with what it was sent before, and in memory, for a disk's moods would decide);
            empty where it loads.
        page_cache: State of the files it reads from this disk: `cold`, `warm`, or empty where it reads none.
        needs: The module, or the `program` behind a colon, an optional peer needs.
        options: For the loader, as its part of the job. `is_published`: it loads from the registry in the bucket.
            `python`: the interpreter it runs in, where that is another.
    """

    name: str
    loader: str
    source: str
    page_cache: str = ""
    needs: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    to: str = ""

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
        self._seen: dict[str, str] = {}  # fingerprint of each model
        self._webs: dict[str, Web] = {}
        self._publications: dict[str, Result] = {}
        self._n_faulty_runs = 0
        hide_settings()
        try:
            self.folder = work / f"weightcache-bench-{os.getpid()}"
            self.folder.mkdir()
            self._held.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self._models = Checkpoints(self.folder / "models", quick=quick)
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

    @cached_property
    def _regions(self) -> Regions:
        return self._held.enter_context(Regions(self._registry, self.folder / "regions"))

    @property
    def _registry(self) -> Path:
        return self.folder / "served" / "registry"

    def _web(self, source: str) -> Web:
        """Return the nginx of a source, over the folder of all models, started if need be."""
        if source not in self._webs:
            web = Web(SOURCES[source], self.folder / "models", self.folder / "web" / source)
            self._webs[source] = self._held.enter_context(web)
        return self._webs[source]

    # -- models

    def model(self, name: str) -> Path:
        """Return the folder of a model, see checkpoints.py."""
        return self._models.folder_of(name)

    def weights(self, name: str) -> list[Path]:
        """Return a model's weight files."""
        return sorted(self.model(name).rglob("*.safetensors"))

    def nbytes(self, name: str) -> int:
        """Return the size of a model's weight files."""
        return sum(path.stat().st_size for path in self.weights(name))

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

    def publish(self, name: str) -> Result:
        """Publish a model to the registry in the bucket, through the proxy, if it is not there; return how that went."""
        if name not in self._publications:
            uri, options = self._published_uri(name), self._server.storage_options(self.proxy.endpoint)
            self._publications[name] = self._publish(name, uri, options)
        return self._publications[name]

    def _published_uri(self, name: str) -> str:
        return f"{self._bucket.url}/registry/{name}@v1"

    def _publish(self, name: str, uri: str, options: Mapping[str, str]) -> Result:
        job = self._job(Case("", "publish", "folder"), name, self.folder / "caches", self.folder)
        result = self._carry_out(job | {"destination": uri, "storage_options": options})
        os.sync()
        return result

    def tensorized(self, name: str) -> str:
        """Return where a model lies in the bucket as tensorizer writes it, serialised and uploaded if need be."""
        key = f"tensorized/{name}.tensors"
        if not self._bucket.keys(key):
            from safetensors.torch import load_file
            from tensorizer import TensorSerializer

            with TemporaryDirectory(dir=self.folder) as folder:
                serializer = TensorSerializer(f"{folder}/{name}.tensors")
                for path in self.weights(name):
                    serializer.write_state_dict(load_file(path))
                serializer.close()
                self._bucket.upload(Path(folder), "tensorized")
        return f"{self._bucket.url}/{key}"

    def filled_cache(self, name: str) -> Path:
        """Return a cache folder whose disk tier holds a model, loaded into it if need be."""
        cache = self.folder / "caches" / name
        if not cache.exists():
            cache.mkdir(parents=True)
            self._check(name, self._carry_out(self._job(Case("", "weightcache", "origin"), name, cache, cache)))
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
        if case.to:
            return self._run_writing(case, name)
        for _ in range(MOST_VAIN_RUNS):
            with suppress(NeverBefell):
                [result] = self.run_at_once(case, name, 1, cache)
                return result
        raise CaseFailed(f"{MOST_VAIN_RUNS} runs in which nothing befell the nearest region")

    def _run_writing(self, case: Case, name: str) -> Result:
        """Run a case that publishes a model; what is in the bucket afterwards must be what the other cases put there."""
        with (
            self._scratch() as scratch,
            TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else scratch) as folder,
            S3Server(Path(folder)) as server,
            Child(CASES) as child,
        ):
            bucket = server.create_bucket()
            bucket.put("first", b"1")  # makes the server's volumes, which takes a second or two
            job = self._job(case, name, scratch / "cache", scratch) | {
                "destination": f"{bucket.url}/{name}@v1",
                "bucket": bucket.name,
                "prefix": "",
                "storage_options": server.storage_options(),
            }
            child.tell(job)
            hear(child)
            os.sync()
            server_began_s = measuring.cpu_s(server.pid)
            child.tell()
            result = hear(child)
            result["facts"]["server_cpu_s"] = measuring.cpu_s(server.pid) - server_began_s
            pages = bucket.client.get_paginator("list_objects_v2").paginate(Bucket=bucket.name, Prefix="chunks/")
            written = sorted((entry["ETag"], entry["Size"]) for page in pages for entry in page.get("Contents", ()))
            result["facts"]["n_objects"] = len(written)
            result["fingerprint"] = hashlib.sha256(repr(written).encode()).hexdigest()
        self._check(f"{name} in chunks", result)
        return result

    def run_at_once(self, case: Case, name: str, n: int, cache: Path | None = None) -> list[Result]:
        """Run a case in n subprocesses that begin at the same moment, over one cache folder."""
        with self._scratch() as scratch, ExitStack() as running:
            if case.source == "tier":
                cache = self.filled_cache(name)
            job = self._job(case, name, cache or scratch / "cache", scratch)
            if n == 1:
                job["back_nbytes"] = int(BACKED_SHARE * self.nbytes(name)) + BACKED_NBYTES
            is_proxied = case.source in ("proxy", "faults")
            busy_s, told = None, {}
            watching: AbstractContextManager[dict[str, Any]] = nullcontext({})
            if case.source == "regions":
                served = measuring.make_warm(measuring.files_below(self._registry))
                busy_s, told = self._regions.cpu_s, self._regions.describe()
                watching = self._regions.watching(case.options.get("event", ""), self.nbytes(name) // 2)
            elif case.source == "origin" or is_proxied:
                served = measuring.make_warm(list((self.folder / "server").rglob("*.dat")))
                busy_s = functools.partial(measuring.cpu_s, self._server.pid)
            elif case.source in SOURCES:
                served = measuring.make_warm(self.weights(name))
                busy_s = self._web(case.source).cpu_s
                told = self._web(case.source).describe()
            if busy_s is not None:
                os.sync()  # what an earlier run wrote must not be written back in this one's time
            python = case.options.get("python", sys.executable)
            children = [running.enter_context(Child(CASES, python=python)) for _ in range(n)]
            for child in children:
                child.tell(job)
            for child in children:
                hear(child)
            server_began_s = busy_s() if busy_s is not None else 0.0
            carried_before = self.proxy.body_bytes() if is_proxied else 0
            if case.source == "faults":
                self._script_faults(name)
            with watching as seen:
                for child in children:
                    child.tell()
                results = [hear(child) for child in children]
            server_cpu_s = busy_s() - server_began_s if busy_s is not None else 0.0
            carried = self.proxy.body_bytes() - carried_before if is_proxied else 0
        for result in results:
            self._check(name, result)
            if busy_s is not None:
                emptiness = "" if case.source in SOURCES else "cache folder empty; "
                result["page_cache"] = f"{emptiness}server's files {served}"
                result["facts"] |= {"server_cpu_s": server_cpu_s, **told, **seen}
                if is_proxied:
                    result["facts"]["proxy_bytes"] = carried
            elif case.source == "tier" and not case.page_cache:
                result["page_cache"] = "cache folder filled, its pages as they were"
        return results

    def _script_faults(self, name: str) -> None:
        """Let FAULTS_SHARE of a run's requests for weights fail or stall, every other one each, others in each run."""
        n_requests = -(-self.nbytes(name) // RANGE_NBYTES)
        random = Random(self._n_faulty_runs)
        words = ["ok"] * n_requests
        chosen = random.sample(range(n_requests), math.ceil(n_requests * FAULTS_SHARE))
        for number, at in enumerate(chosen):
            words[at] = random.choice(FAILING_WORDS) if number % 2 else "stall"
        self._n_faulty_runs += 1
        self.proxy.script(r"^GET .*\.safetensors", " ".join(words))

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

    def _carry_out(self, job: Mapping[str, Any]) -> Result:
        """Have a subprocess do a job, as it comes."""
        with Child(CASES) as child:
            child.tell(job)
            hear(child)
            child.tell()
            result: Result = hear(child)
            return result

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
            "certificate": "",
            "options": case.options,
            "stores": case.source in ("origin", "proxy", "faults", "regions"),
            "environment": {
                "WEIGHTCACHE_DIR": str(cache),
                "AWS_CONFIG_FILE": os.devnull,
                "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        }
        if case.source == "folder":
            return job | {"reads": str(self.model(name)) if case.page_cache else ""}
        if case.source == "regions":
            if not (self._registry / "models" / name).exists():
                self._publish(name, f"{self._registry}/{name}@v1", {})
                self._check(name, self._carry_out(self._job(Case("", "load_file", "folder"), name, cache, scratch)))
            configuration = scratch / "weightcache.toml"
            configuration.write_text(self._regions.configuration(case.options["replicas"]))
            job["environment"] |= {"WEIGHTCACHE_CONFIG": str(configuration)}
            return job | {"uri": f"wc://{STORE}/{name}@v1"}
        sizes = {path.name: path.stat().st_size for path in weights}
        if case.loader == "c_client":
            job |= {"client": str(compile_program("client", self.folder, is_shared=True))}
        if case.source in SOURCES:
            web = self._web(case.source)
            return job | {
                "uri": f"{web.endpoint}/{name}",
                "endpoint": web.endpoint,
                "bucket": name,  # as an S3 client would have it
                "urls": {each: f"{web.endpoint}/{name}/{each}" for each in names},
                "sizes": sizes,
                "certificate": web.authority,
                "storage_options": {"verify": web.authority} if web.authority else {},
            }
        if case.options.get("is_published"):
            self.publish(name)
            uri = self._published_uri(name)
        else:
            uri = self.uri(name)
        endpoint = self.proxy.endpoint if case.source in ("proxy", "faults") else None
        job |= {
            "reads": str(cache) if case.page_cache else "",
            "uri": uri,
            "objects": [f"{uri}/{each}" for each in names],
            "bucket": self._bucket.name,
            "prefix": name,
            "repository": f"bench/{name}",
            "sizes": sizes,
            "urls": {each: self._signed(f"{name}/{each}") for each in names},
            "storage_options": self._server.storage_options(endpoint),
            "target": str(scratch),
        }
        job["environment"] |= {
            "HF_ENDPOINT": self._hub.endpoint,
            "HF_HOME": str(scratch / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        if case.loader == "tensorizer":
            job["tensorized"] = self.tensorized(name)
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
