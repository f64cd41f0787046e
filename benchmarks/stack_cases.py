"""Own what bench_loaders.py compares: the loaders of serving stacks, what they are made of, and the stacks without them.

Never decides what is compared with what. Stacks are imported before the clock. Tensors are touched, and held until its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import Job, Loaded

# -- weightcache, and its loaders


def stream(job: Job) -> Callable[[], Loaded]:
    """Take all tensors from weightcache's stream."""
    module = _weightcache_with_imports()
    return lambda: _taken(module.stream(job["uri"], "cpu", storage_options=job["storage_options"]))


def sglang_iterator(job: Job) -> Callable[[], Loaded]:
    """Take all tensors from SGLang's loader for `--load-format weightcache`."""
    import sglang_parts

    sglang_parts.make_importable(Path(job["options"]["wheels"]))
    _weightcache_with_imports()
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader
    from sglang.srt.plugins.hook_registry import HookRegistry

    from weightcache.loaders import sglang_loader

    sglang_loader.register()
    HookRegistry.apply_hooks()
    loader = get_model_loader(LoadConfig(load_format="weightcache", model_loader_extra_config=_extra_config(job)))
    return lambda: _taken(loader._get_weights_iterator(DefaultModelLoader.Source("model", revision=None)))


def vllm_iterator(job: Job) -> Callable[[], Loaded]:
    """Take all tensors from vLLM's loader for `--load-format weightcache`."""
    _weightcache_with_imports()
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from weightcache.loaders import vllm_plugin

    vllm_plugin.register()
    loader = get_model_loader(LoadConfig(load_format="weightcache", model_loader_extra_config=_extra_config(job)))
    return lambda: _taken(loader._get_weights_iterator(DefaultModelLoader.Source("model", revision=None)))


def transformers_uri(job: Job) -> Callable[[], Loaded]:
    """Load a model of transformers from a URI."""
    from transformers import AutoModelForCausalLM

    _weightcache_with_imports()
    from weightcache import loaders

    def run() -> Loaded:
        options = job["storage_options"]
        return _parameters(loaders.from_pretrained(job["uri"], AutoModelForCausalLM, storage_options=options))

    return run


# -- the stacks without weightcache


def transformers_folder(job: Job) -> Callable[[], Loaded]:
    """Load a model of transformers from a local folder, as it does by itself."""
    from transformers import AutoModelForCausalLM

    return lambda: _parameters(AutoModelForCausalLM.from_pretrained(job["uri"]))


def transformers_snapshot(job: Job) -> Callable[[], Loaded]:
    """Download all files of a prefix with boto3 and its default TransferConfig, then load the folder."""
    import boto3
    from transformers import AutoModelForCausalLM

    options = job["storage_options"]

    def run() -> Loaded:
        client = boto3.client(
            "s3",
            endpoint_url=options["endpoint_url"],
            aws_access_key_id=options["key"],
            aws_secret_access_key=options["secret"],
            region_name="us-east-1",
        )
        for entry in client.list_objects_v2(Bucket=job["bucket"], Prefix=f"{job['prefix']}/")["Contents"]:
            client.download_file(job["bucket"], entry["Key"], str(Path(job["target"], Path(entry["Key"]).name)))
        return _parameters(AutoModelForCausalLM.from_pretrained(job["target"]))

    return run


# -- what they share


def _weightcache_with_imports() -> Any:
    """Import all that a load would import, and have this checkout's loaders where they are installed otherwise."""
    import s3fs  # noqa: F401
    import uvloop  # noqa: F401

    import weightcache
    import weightcache.cache
    import weightcache.origins.s3
    import weightcache.tensors
    import weightcache.windows

    weightcache.__path__.insert(0, str(measuring.REPOSITORY))
    return weightcache


def _extra_config(job: Job) -> dict[str, Any]:
    return {"uri": job["uri"], "storage_options": job["storage_options"]}


def _taken(tensors: Iterable[tuple[str, torch.Tensor]]) -> Loaded:
    return Loaded(measuring.touch(dict(tensors)))


def _parameters(model: torch.nn.Module) -> Loaded:
    return Loaded(measuring.touch({name: parameter.detach() for name, parameter in model.named_parameters()}))


LOADERS = (stream, sglang_iterator, vllm_iterator, transformers_uri, transformers_folder, transformers_snapshot)
