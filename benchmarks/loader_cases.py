"""Own the ways into transformers that are compared: weightcache's loader, the stream below it, and files.

Never imports a stack before it is asked for. The model is a Llama; its parameters are what is compared, byte by byte.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
from measuring import Job, Loaded


def stream(job: Job) -> Callable[[], Loaded]:
    """Take all tensors of weightcache's stream as they come: what a loader cannot do without."""
    module = _imports(job)[0]

    def run() -> Loaded:
        tensors = module.stream(job["uri"], "cpu", storage_options=job["storage_options"])
        return Loaded(measuring.touch(dict(tensors)), facts=lambda: {"report": tensors.report.as_dict()})

    return run


def transformers_loader(job: Job) -> Callable[[], Loaded]:
    """Load by weightcache's loader; the job's options may name a `dtype`."""
    _, loaders, cls = _imports(job)
    options = dict(job["options"])

    def run() -> Loaded:
        model = loaders.from_pretrained(job["uri"], cls, storage_options=job["storage_options"], **options)
        [report] = model.weightcache_reports
        return _loaded(model, facts=lambda: {"report": report.as_dict()})

    return run


def transformers_hosted(job: Job) -> Callable[[], Loaded]:
    """Load what this process has brought to host memory before, by weightcache's loader."""
    run = transformers_loader(job)
    _imports(job)[0].prefetch(job["uri"], tier="host", storage_options=job["storage_options"])
    return run


def transformers_local(job: Job) -> Callable[[], Loaded]:
    """Load the folder on this disk by transformers alone, and read a byte of every page."""
    cls = _imports(job)[2]
    folder, options = Path(job["files"][0]).parent, dict(job["options"])
    return lambda: _loaded(cls.from_pretrained(folder, **options))


def transformers_snapshot(job: Job) -> Callable[[], Loaded]:
    """Download the shards with huggingface_hub, at once, as snapshot_download does; then load that folder."""
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import hf_hub_download

    cls = _imports(job)[2]
    beside = Path(job["files"][0]).parent
    small = [path for path in beside.iterdir() if path.suffix == ".json"]

    def run() -> Loaded:
        with ThreadPoolExecutor(8) as pool:
            paths = list(pool.map(lambda name: hf_hub_download(job["repository"], name), job["names"]))
        for path in small:
            shutil.copy(path, Path(paths[0]).parent)
        return _loaded(cls.from_pretrained(Path(paths[0]).parent))

    return run


def transformers_boto3(job: Job) -> Callable[[], Loaded]:
    """Download the shards with boto3 and its default TransferConfig, one after the other; then load that folder."""
    import boto3

    cls = _imports(job)[2]
    beside, target, options = Path(job["files"][0]).parent, Path(job["target"]), job["storage_options"]

    def run() -> Loaded:
        client = boto3.client(
            "s3",
            endpoint_url=options["endpoint_url"],
            aws_access_key_id=options["key"],
            aws_secret_access_key=options["secret"],
            region_name="us-east-1",
        )
        for name in job["names"]:
            client.download_file(job["bucket"], f"{job['prefix']}/{name}", str(target / name))
        for path in beside.glob("*.json"):
            shutil.copy(path, target)
        return _loaded(cls.from_pretrained(target))

    return run


def _imports(job: Job) -> tuple[Any, Any, Any]:
    """Import all that a load would import, the code of the model included."""
    import s3fs  # noqa: F401
    import torch
    import transformers
    import uvloop  # noqa: F401

    import weightcache
    import weightcache.cache
    import weightcache.loaders.transformers_loader
    import weightcache.origins.local
    import weightcache.origins.s3
    import weightcache.tensors

    transformers.utils.logging.disable_progress_bar()
    cls = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        cls.from_config(transformers.AutoConfig.from_pretrained(Path(job["files"][0]).parent))
    return weightcache, weightcache.loaders, cls


def _loaded(model: Any, **options: Any) -> Loaded:
    """Take a model's parameters, each once: the names that the checkpoint has."""
    return Loaded(measuring.touch({name: each.detach() for name, each in model.named_parameters()}), **options)


LOADERS = (
    stream,
    transformers_loader,
    transformers_hosted,
    transformers_local,
    transformers_snapshot,
    transformers_boto3,
)
