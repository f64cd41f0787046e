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
    """Give vLLM the load format `weightcache`, and what settings ask for: URIs as models, and adapters by name.

    Raises:
        ConfigError: A configuration that cannot be used.
    """
    from vllm import envs
    from vllm.model_executor.model_loader import register_model_loader

    from weightcache.loaders.vllm_loader import WeightcacheLoader

    own = logging.getLogger("weightcache")
    own.handlers = own.handlers or logging.getLogger("vllm").handlers  # else nobody hears its warnings in a worker
    register_model_loader(LOAD_FORMAT)(WeightcacheLoader)
    settings = weightcache.configuration().settings
    kept = settings.dir / "vllm"
    if settings.vllm_uris:
        from weightcache.loaders.vllm_uris import take_uris

        take_uris(LOAD_FORMAT, kept)
    if settings.loras and envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:  # else vLLM asks no resolver
        from vllm.lora.resolver import LoRAResolverRegistry

        from weightcache.loaders.vllm_lora import WeightcacheLoRAResolver

        LoRAResolverRegistry.register_resolver(LOAD_FORMAT, WeightcacheLoRAResolver(settings.loras, kept / "loras"))
