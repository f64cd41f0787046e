"""Own the way into SGLang: `--load-format weightcache`, known to it by the entry point `sglang.srt.plugins`.

Never imports SGLang before SGLang has called `register`, and never touches how it places tensors: of its default loader
only where the tensors come from is another.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

import weightcache
from weightcache import errors
from weightcache.loaders.extra_config import read_extra_config

if TYPE_CHECKING:
    import torch

LOAD_FORMAT = "weightcache"
FIRST, LAST = (0, 5, 21), (0, 5, 23)  # releases that tests/integration/test_sglang.py has passed with
VERIFY = "sglang.srt.configs.load_config.LoadConfig._verify_load_format"


def register() -> None:
    """Make the load format known to this process's SGLang. May be called again.

    Raises:
        ConfigError: A release of SGLang whose hooks are not known. SGLang logs it, and goes on without the load format.
    """
    version = metadata.version("sglang")
    numbers = tuple(int(each) for each in re.findall(r"\d+", version)[:3])
    if not FIRST <= numbers <= LAST:
        first, last = (".".join(map(str, each)) for each in (FIRST, LAST))
        raise errors.ConfigError(
            f"--load-format {LOAD_FORMAT} is not there: SGLang is {version}, known are {first} to {last}; "
            "install one of these, or serve a folder that `weightcache pull` has written",
            version=version,
        )
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import LOAD_FORMAT_CHOICES, add_load_format_choices

    if LOAD_FORMAT not in LOAD_FORMAT_CHOICES:
        add_load_format_choices([LOAD_FORMAT])
        HookRegistry.register(VERIFY, _verify_load_format, HookType.AROUND)


def _verify_load_format(original: Callable[[Any], None], load_config: Any) -> None:
    """Put our loader where SGLang's enumeration of load formats has no room for another one."""
    if load_config.load_format == LOAD_FORMAT:
        load_config.load_format = _loader_class()
    else:
        original(load_config)


@functools.cache
def _loader_class() -> type:
    from sglang.srt.model_loader.loader import BaseModelLoader, DefaultModelLoader
    from sglang.srt.runtime_context import get_model

    class WeightcacheModelLoader(DefaultModelLoader):  # type: ignore[misc]
        """SGLang's default loader over tensors from weightcache."""

        def __init__(self, load_config: Any) -> None:
            BaseModelLoader.__init__(self, load_config)  # the default loader's refuses extra config that is not its own
            self._given = read_extra_config(load_config.model_loader_extra_config or {})

        def _get_weights_iterator(self, source: Any) -> Any:
            if source.allow_patterns_overrides is not None:
                raise errors.ConfigError(
                    f"{source.model_or_path}: this architecture takes its weights from files of its own choice "
                    f"({', '.join(source.allow_patterns_overrides)}), which --load-format {LOAD_FORMAT} cannot tell "
                    "apart; serve a folder that `weightcache pull` has written",
                )
            weights = weightcache.stream(self._uri_of(source), "cpu", storage_options=self._given.storage_options)
            # What cannot be loaded must be said here: a reload still has all that it had.
            named = itertools.chain(list(itertools.islice(weights, 1)), weights)
            if self.load_config.draft_model_idx is not None:
                return self._filter_mtp_weights(named, source.prefix, self.load_config.draft_model_idx)
            return _prefixed(source.prefix, named)

        def _uri_of(self, source: Any) -> Any:
            """Return where a source's tensors lie: a draft with a path of its own, and a reload, are not what was given.

            (SGLang hands the same extra config to the draft, and none to a reload, whose path is the new model.)
            """
            config = source.model_config
            is_other = config is not None and config.is_draft_model and source.model_or_path != get_model().model_path
            return source.model_or_path if is_other or not self._given.uri else self._given.uri

    return WeightcacheModelLoader


def _prefixed(prefix: str, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors:
        yield prefix + name, tensor
        del tensor  # what nobody holds can go while the next one is waited for
