"""Integrations with serving stacks, installed as `weightcache.loaders`.

A loader imports the public face of weightcache alone, and nothing of its stack before it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os

    import weightcache

__all__ = ["from_pretrained"]


def from_pretrained(
    uri: str | os.PathLike[str],
    cls: Any,
    *,
    cache: str = "auto",
    offline: bool | None = None,
    storage_options: Mapping[str, Any] | None = None,
    timeout_s: float | None = None,
    progress: weightcache.Progress | None = None,
    **kwargs: Any,
) -> Any:
    """Do `cls.from_pretrained(folder, **kwargs)`, of transformers or diffusers, with a model from a URI.

    What comes of it is equal to the bit. Tensors go straight to their devices; a model's is the memory that they arrived
    in, unless its class converts them.

    Args:
        uri: What `weightcache.load_model` takes.
        cls: A model's class or an Auto class; a tokenizer's, a processor's or a configuration's, for which no weight is
            read; a pipeline's or a component's of diffusers.
        kwargs: The class's own (`device_map`, `dtype`, `subfolder`, `output_loading_info`, …), components to take
            instead of the pipeline's included. `trust_remote_code=True` runs code that lies beside the weights, verified
            like them, and no other; without it none runs, and nobody is asked at the terminal.
        cache, offline, storage_options, timeout_s, progress: As in `weightcache.load_model`; time and progress are those
            of the tensors to one device.

    Returns:
        What the class returns; a model has `weightcache_reports`, one a device.

    Raises:
        ConfigError: A class that loads nothing, or an argument that cannot be honoured here.
        WeightcacheError: Another of `weightcache.errors`. What the stack itself raises comes as it is.
    """
    options = {"cache": cache, "offline": offline, "storage_options": storage_options, "timeout_s": timeout_s}
    stacks = {each.__module__.partition(".")[0] for each in getattr(cls, "__mro__", ())}
    if "diffusers" in stacks:
        from weightcache.loaders import diffusers_loader

        return diffusers_loader.load(str(uri), cls, options, progress, kwargs)
    from weightcache.loaders import transformers_loader

    return transformers_loader.load(str(uri), cls, options, progress, kwargs)
