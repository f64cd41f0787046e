"""Own vLLM's load format `weightcache`: a model's tensors on their way from weightcache's stream to vLLM's parameters.

Never decides where bytes come from, and copies no tensor. Imported inside vLLM alone, by the plugin (`vllm_plugin`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

import weightcache
from weightcache.loaders.extra_config import read_extra_config

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig
    from vllm.config.load import LoadConfig

log = init_logger("vllm.weightcache")  # below vLLM's own name, whose handlers alone are heard in its workers

PROGRESS_S = 5.0  # from one line of progress to the next
FIRST = "first_model"  # where a load config says which model was loaded first by it; not the user's to say


class WeightcacheLoader(DefaultModelLoader):  # type: ignore[misc]  # vLLM is not followed
    """vLLM's own loader, with tensors from weightcache in place of files.

    What vLLM does around them stays: a check that every parameter was given, parts of a model that lie elsewhere,
    quantisation. A part that is chosen by the names of files, or named at a hub, is read by vLLM itself.

    Tensors are given in host memory, on GPUs too. vLLM narrows each to its rank's slice and copies that: of N ranks each
    takes 1/N of it over its bus, from an image that the node daemon holds once for all. And nothing of ours is allocated
    on the device, where sleep mode has a pool of its own, in which what only passes through would stay.

    Args:
        load_config: vLLM's. The weights of the first model that is loaded by it are at the `uri` of its extra config. Those
            of any other (`reload_weights(weights_path=…)`, a draft model) are where its own name says.

    Raises:
        ConfigError: An extra config that cannot be used.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        self._extra = load_config.model_loader_extra_config  # the next loader is given it, too: each reload makes one
        self._given = read_extra_config({key: value for key, value in self._extra.items() if key != FIRST})
        self._told: dict[str, str] = {}  # where vLLM itself says that a model's weights are
        super().__init__(replace(load_config, load_format="hf", model_loader_extra_config={}))

    def download_model(self, model_config: ModelConfig) -> None:
        """Bring a model to this node's disk."""
        uri = self._uri_of(model_config.model)
        if uri is None:
            super().download_model(model_config)
        else:
            weightcache.prefetch(uri, storage_options=self._given.storage_options)

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fill a model's parameters. After an error it may be partly filled."""
        self._extra.setdefault(FIRST, model_config.model)
        self.counter_before_loading_weights = time.perf_counter()  # vLLM's, which it logs and sets where it opens files
        super().load_weights(model, model_config)

    def get_all_weights(self, model_config: ModelConfig, model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield a model's tensors, verified, in no fixed order; those of parts that lie elsewhere after them."""
        self._told[model_config.model] = model_config.model_weights
        yield from super().get_all_weights(model_config, model)

    def _uri_of(self, model: str) -> str | None:
        """Return where a model's weights are; None for what is no URL or folder, but a name at a hub."""
        given: str = self._given.uri if model == self._extra.get(FIRST, model) else ""
        uri = self._told.get(model) or given
        if uri:
            return uri
        return model if "://" in model or Path(model).exists() else None

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, torch.Tensor]]:
        name = source.model_or_path
        uri = self._uri_of(name)
        if uri is None or source.subfolder or source.allow_patterns_overrides:
            log.warning("weights of %s are read by vLLM's own loader: weightcache has models as a whole", name)
            tensors: Iterator[tuple[str, torch.Tensor]] = super()._get_weights_iterator(source)
            return tensors
        return self._stream(uri, source.prefix)

    def _stream(self, uri: str, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        arrived = (0, 0)

        def note(done: int, total: int) -> None:
            nonlocal arrived
            arrived = done, total

        options = self._given.storage_options if "://" in uri else None  # which a folder has no use for
        tensors = weightcache.stream(uri, "cpu", storage_options=options, progress=note)
        began = resumed = logged = time.perf_counter()
        waited_s = 0.0
        try:
            for name, tensor in tensors:
                now = time.perf_counter()
                waited_s += now - resumed
                if now - logged > PROGRESS_S:
                    log.info("weights of %s: %.2f of %.2f GB", uri, *(nbytes / 1e9 for nbytes in arrived))
                    logged = now
                yield prefix + name, tensor
                del tensor  # what is not held here can go while the next one is waited for
                resumed = time.perf_counter()
        finally:
            tensors.close()
        report, spent_s = tensors.report, time.perf_counter() - began
        log.info(
            "weights of %s: %d tensors, %.3f GB in %.2f s (%.2f GB/s, %.2f s of it waiting for bytes; "
            "%.3f GB from the origin, %.3f GB from disk, %.3f GB from host memory)",
            uri,
            report.n_tensors,
            report.tensor_bytes / 1e9,
            spent_s,
            report.tensor_bytes / 1e9 / spent_s,
            waited_s,
            *(report.bytes[tier] / 1e9 for tier in ("origin", "disk", "host")),
        )
