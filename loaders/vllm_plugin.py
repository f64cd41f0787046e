"""Own weightcache's plugin of vLLM, which every process of vLLM calls once it has started.

Never imports vLLM, torch or a loader before it is called.
"""

from __future__ import annotations

import logging
from functools import cache

LOAD_FORMAT = "weightcache"


@cache  # vLLM may call it again, and warns of a format that is registered twice
def register() -> None:
    """Give vLLM the load format `weightcache`."""
    from vllm.model_executor.model_loader import register_model_loader

    from weightcache.loaders.vllm_loader import WeightcacheLoader

    own = logging.getLogger("weightcache")
    own.handlers = own.handlers or logging.getLogger("vllm").handlers  # else nobody hears its warnings in a worker
    register_model_loader(LOAD_FORMAT)(WeightcacheLoader)
