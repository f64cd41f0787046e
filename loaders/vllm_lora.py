"""Own LoRA adapters that vLLM is asked for by name: from a bucket or registry into a folder below the cache folder.

Never takes a name for a place: adapters lie below the one place that is configured. Imported inside vLLM alone.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver

import weightcache
from weightcache import errors
from weightcache.loaders.vllm_folders import bring

log = init_logger("vllm.weightcache.lora")

NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*(@[A-Za-z0-9][\w.:-]*)?", re.ASCII)
CONFIG = "adapter_config.json"  # what makes a folder an adapter, to vLLM and PEFT


class WeightcacheLoRAResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is not followed
    """Finds the adapter `name` at `{place}/{name}`; in a registry the name may have a tag, `name@tag`.

    Args:
        place: A folder, prefix or registry.
        kept: The folder below which adapters are kept, a folder for each revision; vLLM may read them again at any time.
    """

    def __init__(self, place: str, kept: Path) -> None:
        self._place = place
        self._kept = kept

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Bring an adapter to this node; None where there is none of this name.

        Raises:
            WeightcacheError: It may be there, but cannot be had.
        """
        if not NAME.fullmatch(lora_name):
            return None
        folder = await asyncio.to_thread(self._bring, lora_name)
        if folder is None:
            return None
        return LoRARequest(lora_name=lora_name, lora_int_id=abs(hash(lora_name)), lora_path=str(folder))

    def _bring(self, name: str) -> Path | None:
        folder: Path
        uri = f"{self._place}/{name}"
        try:
            if CONFIG not in [file.path for file in weightcache.list_files(uri).files]:
                log.warning("%s is no LoRA adapter: it has no %s", uri, CONFIG)  # and may be a model, of any size
                return None
            folder, report = bring(uri, self._kept)
        except errors.ModelNotFoundError:
            return None
        log.info("LoRA adapter %s: %.3f GB in %.2f s", uri, sum(report.bytes.values()) / 1e9, report.total_s)
        return folder
