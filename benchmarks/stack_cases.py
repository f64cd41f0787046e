"""Own the loaders of SGLang and vLLM that are compared, as far as tensors pass through them (loader_cases.py has the rest).

Never decides what is compared with what. Stacks are imported before the clock. Tensors are touched, and held until its end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import measuring
from measuring import Job, Loaded


def stream_alone(job: Job) -> Callable[[], Loaded]:
    """Take all tensors from weightcache's stream, in an environment that needs no stack."""
    _weightcache_with_imports()
    import weightcache

    return lambda: Loaded(
        measuring.touch(dict(weightcache.stream(job["uri"], "cpu", storage_options=job["storage_options"])))
    )


def sglang_iterator(job: Job) -> Callable[[], Loaded]:
    """Take all tensors from SGLang's loader for `--load-format weightcache`."""
    import sglang_parts

    sglang_parts.make_importable(Path(job["options"]["wheels"]))
    _weightcache_with_imports()
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.model_loader.loader import get_model_loader
    from sglang.srt.plugins.hook_registry import HookRegistry

    from weightcache.loaders import sglang_loader

    sglang_loader.register()
    HookRegistry.apply_hooks()
    loader = get_model_loader(LoadConfig(load_format="weightcache", model_loader_extra_config=_extra_config(job)))
    return lambda: _taken(loader)


def vllm_iterator(job: Job) -> Callable[[], Loaded]:
    """Take all tensors from vLLM's loader for `--load-format weightcache`."""
    _weightcache_with_imports()
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    from weightcache.loaders import vllm_plugin

    vllm_plugin.register()
    loader = get_model_loader(LoadConfig(load_format="weightcache", model_loader_extra_config=_extra_config(job)))
    return lambda: _taken(loader)


def _weightcache_with_imports() -> None:
    """Import all that a load would import, and have this checkout's loaders where they are installed otherwise."""
    import s3fs  # noqa: F401
    import uvloop  # noqa: F401

    import weightcache
    import weightcache.cache
    import weightcache.origins.s3
    import weightcache.tensors
    import weightcache.windows

    weightcache.__path__.insert(0, str(measuring.REPOSITORY))


def _extra_config(job: Job) -> dict[str, Any]:
    return {"uri": job["uri"], "storage_options": job["storage_options"]}


def _taken(loader: Any) -> Loaded:
    from_uri = type(loader).Source("model", revision=None)
    return Loaded(measuring.touch(dict(loader._get_weights_iterator(from_uri))))


LOADERS = (stream_alone, sglang_iterator, vllm_iterator)
