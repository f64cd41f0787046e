"""A child process with SGLang's own loading code in it, on a CPU and without its kernels: `sglang_host.py WHEELS ABOUT`.

WHEELS is a folder of `sglang_parts.fetch`, ABOUT one that holds our distribution's entry points. It starts as a scheduler
does: plugins, command line, published configuration, groups of one rank.

Told {"serve": command line}, it loads, and says which loader that was and what is in the model's parameters. Told
{"draft": path}, it loads that beside it, as a draft for speculation. Told {"reload": path}, it updates the first one's
weights, as the server's `/update_weights_from_disk` does. What fails is said in words.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from reference import fingerprint
from sglang_parts import make_importable


def main() -> None:
    warnings.simplefilter("ignore")  # of others' code
    make_importable(Path(sys.argv[1]))
    sys.path.insert(0, sys.argv[2])
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
    import torch
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
