"""A child process with SGLang's own loading code in it, on a CPU and without its kernels: `sglang_host.py WHEELS ABOUT`.

WHEELS is a folder that they lie in unpacked, ABOUT one that holds our distribution's entry points. What SGLang imports
beside them, and does not need to fill a Llama's parameters, is a stand-in that does nothing. It starts as a scheduler
does: plugins, command line, published configuration, groups of one rank.

Told {"serve": command line}, it loads, and says which loader that was and what is in the model's parameters. Told
{"draft": path}, it loads that beside it, as a draft for speculation. Told {"reload": path}, it updates the first one's
weights, as the server's `/update_weights_from_disk` does. What fails is said in words.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # of others' code

import torch._inductor.compile_fx  # noqa: E402  (looks for triton, which must not be the stand-in)
from reference import fingerprint  # noqa: E402
from transformers.utils.import_utils import is_torchvision_available  # noqa: E402

STAND_INS = (
    "IPython",
    "compressed_tensors",
    "gguf",
    "partial_json_parser",
    "sentencepiece",
    "torchvision",
    "triton",
    "tvm_ffi",
    "vllm",
)


class _Shape(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing

    def __or__(cls, other: object) -> Any:
        return cls

    __ror__ = __or__


class Nothing(metaclass=_Shape):
    """Stands for any class, function or decorator."""

    def __new__(cls, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if arguments and isinstance(arguments[0], types.FunctionType) else object.__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **_: Any) -> Any:
        return arguments[0] if arguments else self

    def __getattr__(self, name: str) -> Any:
        return getattr(type(self), name)


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules that are not there."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> Any:
        if name.partition(".")[0] in STAND_INS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__dict__["__getattr__"] = _Shape.__getattr__.__get__(Nothing)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def main() -> None:
    sys.path[:] = [sys.argv[2], *sys.path, sys.argv[1]]
    is_torchvision_available()  # remembers that it is not there
    sys.meta_path.insert(0, StandIns())
    from sglang.srt.plugins import load_plugins

    load_plugins()
    say("ready")
    arguments, model = None, None
    for line in sys.stdin:
        [(command, given)] = json.loads(line).items()
        try:
            if command == "serve":
                arguments = configure(given)
                loader, model = load(arguments)
                say({"loader": loader, "parameters": parameters_of(model)})
            elif command == "draft":
                loader, draft = load(arguments, model_path=given, is_draft_model=True)
                say({"loader": loader, "parameters": parameters_of(draft)})
            else:
                say({"reload": reload(given, arguments, model), "parameters": parameters_of(model)})
        except (Exception, SystemExit) as exc:
            say({"failed": f"{type(exc).__name__}: {exc}"})


def configure(command_line: list[str]) -> Any:
    """Read a command line and publish what it says, as a scheduler's process does."""
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import prepare_server_args

    arguments = prepare_server_args(["--device", "cpu", *command_line])
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    _make_groups(arguments)
    return arguments


def load(arguments: Any, **of_model: Any) -> tuple[str, Any]:
    """Load as a model runner does. Returns the loader's name and the model."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner_components.load_model_utils import build_load_config
    from sglang.srt.model_loader.loader import get_model_loader

    model_config = ModelConfig.from_server_args(arguments, **of_model)
    load_config = build_load_config(
        server_args=arguments,
        tp_rank=0,
        remote_instance_weight_transporter_engine=None,
        remote_instance_weight_transporter_session_id="",
        draft_model_idx=None,
        weight_cache_mode="off",
        weight_cache_socket=None,
    )
    loader = get_model_loader(load_config, model_config)
    model = loader.load_model(model_config=model_config, device_config=DeviceConfig("cpu"))
    return type(loader).__name__, model


def reload(path: str, arguments: Any, model: Any) -> list[Any]:
    """Put another model's weights in, as the running server does: by its load format, and no extra config."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    updater = WeightUpdater(
        tp_rank=0,
        device="cpu",
        gpu_id=0,
        model_config=ModelConfig.from_server_args(arguments),
        custom_weight_loaders={},
        get_model=lambda: model,
        update_model_fields=lambda *_, **__: None,
        recapture_cuda_graph=lambda: None,
        get_model_runner=lambda: None,
    )
    return list(updater.update_weights_from_disk(path, arguments.load_format))


def _make_groups(arguments: Any) -> None:
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention

    if not torch.distributed.is_initialized():
        meeting = Path(tempfile.mkdtemp(), "meeting")
        init_distributed_environment(
            backend="gloo", world_size=1, rank=0, local_rank=0, distributed_init_method=f"file://{meeting}"
        )
        initialize_model_parallel()
        initialize_dp_attention(arguments)


def parameters_of(model: Any) -> str:
    return fingerprint(dict(model.state_dict()))


def say(value: object) -> None:
    print(json.dumps(value), file=answers, flush=True)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what SGLang prints is no answer
    logging.captureWarnings(True)
    main()
