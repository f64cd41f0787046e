"""Own URIs of object stores as vLLM's model, `vllm serve s3://bucket/model`, where the setting `vllm_uris` asks for them.

vLLM has them loaded by its own streamers alone. Two of its functions are wrapped, which it documents nowhere; so this is
done for releases in which they were read, and where it is asked for. Imported inside vLLM alone, by the plugin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vllm
from vllm.config.vllm import VllmConfig
from vllm.logger import init_logger
from vllm.transformers_utils.runai_utils import ObjectStorageModel, is_runai_obj_uri

from weightcache import errors
from weightcache.loaders.vllm_folders import bring

log = init_logger("vllm.weightcache")

RELEASES = ("0.32.", "0.33.")


def take_uris(load_format: str, kept: Path) -> None:
    """Give vLLM's models at URIs to a load format, unless they are asked to be loaded by another.

    Args:
        kept: Below it is what vLLM reads of a model before it loads one.
    """
    if not vllm.__version__.startswith(RELEASES):
        log.warning(
            "vllm_uris is set, and not done: vLLM is %s, known are %s; use weightcache vllm serve, or unset it",
            vllm.__version__,
            ", ".join(f"{each}*" for each in RELEASES),
        )
        return

    def pull_files(self: Any, model_path: str = "", *_: Any, **__: Any) -> None:
        self.dir = str(bring(model_path, kept, weights=False, headers=True)[0])
        self._close = lambda: None  # which would remove the folder, of all servers of this revision, at the end

    ObjectStorageModel.pull_files = pull_files
    VllmConfig.try_verify_and_update_config = _given_to(load_format, VllmConfig.try_verify_and_update_config)


def _given_to(load_format: str, verify: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a check of vLLM's that takes a URI for a place like others, where the load format is ours or nobody's."""

    @functools.wraps(verify)
    def checked(self: Any) -> None:
        model, load = self.model_config, self.load_config
        uri = getattr(model, "model_weights", "") or ""
        if not is_runai_obj_uri(uri) or load.load_format not in ("auto", load_format):
            verify(self)
            return
        if (load.model_loader_extra_config or {}).get("uri"):
            raise errors.ConfigError(
                f'"uri" in --model-loader-extra-config, and the model {uri}: leave one of them out'
            )
        load.load_format = load_format
        model.model_weights = ""
        try:
            verify(self)
        finally:
            model.model_weights = uri

    return checked
