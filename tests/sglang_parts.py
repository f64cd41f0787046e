"""Own SGLang as it can be had on any machine: its wheel unpacked, and stand-ins for what it imports and does not need here.

Never runs its kernels: without them it reads its command line, builds a Llama on the CPU, and fills its parameters.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RELEASE = os.environ.get("SGLANG", "0.5.23")
BESIDE = (  # none of them large
    "dill",
    "einops",
    "msgspec",
    "openai",
    "orjson",
    "pillow",
    "psutil",
    "pybase64",
    "pyzmq",
    "requests",
    "starlette",
)
FETCH_TIMEOUT_S = 120.0
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


class NotToBeHad(Exception):
    """The wheel could not be fetched; the message says why."""


def fetch() -> Path:
    """Return the folder that SGLang lies in, beside pip's cache; fetched if it is not there yet."""
    folder = Path.home() / ".cache" / "weightcache-tests" / f"sglang-{RELEASE}"
    if not folder.exists():
        staging = folder.with_name(f"{folder.name}.{os.getpid()}")
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--target", str(staging)]
        try:
            for wanted in (("--no-deps", f"sglang=={RELEASE}"), BESIDE):
                subprocess.run([*pip, *wanted], check=True, timeout=FETCH_TIMEOUT_S, capture_output=True, text=True)
            staging.rename(folder)
        except (subprocess.SubprocessError, OSError) as exc:
            shutil.rmtree(staging, ignore_errors=True)
            if not folder.exists():  # as another process may have put it there meanwhile
                raise NotToBeHad(f"SGLang {RELEASE} was not to be had: {getattr(exc, 'stderr', None) or exc}") from exc
    return folder


def make_importable(folder: Path) -> None:
    """Let this process import SGLang from a folder of `fetch`."""
    import torch._inductor.compile_fx  # noqa: F401  (looks for triton, which must not be the stand-in)
    from transformers.utils.import_utils import is_torchvision_available

    is_torchvision_available()  # remembers that it is not there
    sys.path.append(str(folder))
    sys.meta_path.insert(0, StandIns())
