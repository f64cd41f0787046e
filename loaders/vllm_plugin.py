"""Own weightcache's plugin of vLLM, which every process of vLLM calls once it has started.

Never imports vLLM, torch or a loader before it is called.
"""

from __future__ import annotations

import logging
from functools import cache

import weightcache

LOAD_FORMAT = "weightcache"


@cache  # vLLM may call it again, and warns of what is registered twice
def register() -> None:
    """Give vLLM the load format `weightcache`, and adapters by name where `loras` says in which place they are.

    Raises:
        ConfigError: A configuration that cannot be used.
    """
    from vllm import envs
    from vllm.model_executor.model_loader import register_model_loader

    from weightcache.loaders.vllm_loader import WeightcacheLoader

    own = logging.getLogger("weightcache")
    own.handlers = own.handlers or logging.getLogger("vllm").handlers  # else nobody hears its warnings in a worker
    register_model_loader(LOAD_FORMAT)(WeightcacheLoader)
    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:  # else vLLM asks no resolver
        _register_resolver()


def _register_resolver() -> None:
    settings = weightcache.configuration().settings
    if not settings.loras:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from weightcache.loaders.vllm_lora import WeightcacheLoRAResolver

    resolver = WeightcacheLoRAResolver(settings.loras, settings.dir / "vllm" / "loras")
    LoRAResolverRegistry.register_resolver(LOAD_FORMAT, resolver)
