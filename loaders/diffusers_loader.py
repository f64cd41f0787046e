"""Own loading with diffusers: whole pipelines and single components, from a URI.

Never reads a weight from a file, and never runs a pipeline's code unless the user trusts it.

One transfer brings the tensors of all components (`unet/conv_in.weight`, …) that the user did not bring along. Each is
built without memory and takes its tensors where they arrived, unless they are converted; the pipeline is then put
together by diffusers, from the folder of its small files and the components that are there already.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device

import weightcache
from weightcache import errors
from weightcache.loaders import transformers_loader
from weightcache.loaders.arriving import Arriving, Pending, literally
from weightcache.loaders.transformers_loader import REFUSED, check_kwargs, device_name, pulled, refusals_named

log = logging.getLogger(__name__)

REFUSED_HERE = REFUSED | {
    "quantization_config": "weightcache.pull the pipeline, and let diffusers quantise it",
    "custom_pipeline": "its code would come from elsewhere: pass its class",
    "custom_revision": "name the revision in the URI: …/model@tag",
    "ignore_mismatched_sizes": "change the configuration, or pull the component and let diffusers load it",
    "output_loading_info": "what is missing is an error here, and what is unexpected a warning",
    "parallel_config": "weightcache.pull the component, and let diffusers divide it",
    "use_flashpack": "weights are safetensors",
    "use_onnx": "weights are safetensors",
}
# What says how diffusers reads files: nothing is read here.
MEANINGLESS = ("use_safetensors", "low_cpu_mem_usage", "disable_mmap", "offload_state_dict")


def load(
    uri: str, cls: Any, options: Mapping[str, Any], progress: weightcache.Progress | None, kwargs: dict[str, Any]
) -> Any:
    """Load what a class of diffusers loads from a folder; see `weightcache.loaders.from_pretrained`."""
    check_kwargs(kwargs, REFUSED_HERE)
    for name in MEANINGLESS:
        kwargs.pop(name, None)
    is_component = cls is diffusers.AutoModel or issubclass(cls, diffusers.ModelMixin)
    if not is_component and "Pipeline" not in cls.__name__:
        with pulled(uri, options) as folder:  # a scheduler, an image processor
            return cls.from_pretrained(str(folder), **kwargs)
    device = _device(kwargs.get("device_map"))
    subfolder = (kwargs.pop("subfolder", None) or "").strip("/")
    include = f"{literally(subfolder)}/*" if subfolder else None
    # Of what the user brings along, or does without, nothing is read.
    brought = [name for name, value in kwargs.items() if value is None or isinstance(value, torch.nn.Module)]
    exclude = [f"{literally(name)}/*" for name in brought]
    with Arriving(uri, device, options, include=include, exclude=exclude, progress=progress) as arriving:
        names = arriving.pending()
        with pulled(uri, options) as folder:
            if is_component:
                prefix = f"{subfolder}/" if subfolder else ""
                loaded = _component(uri, cls, folder / subfolder, arriving.pending(prefix), device, kwargs)
            else:
                loaded = _pipeline(
                    uri, cls, folder, arriving, {name.partition("/")[0] for name in names}, device, kwargs
                )
    loaded.weightcache_reports = tuple(arriving.reports)
    return loaded


def _device(device_map: Any) -> str:
    if isinstance(device_map, Mapping):
        if len(set(device_map.values())) != 1:
            raise errors.ConfigError(
                f"device_map={device_map!r}: expected one device for a component; for several, weightcache.pull it"
            )
        device_map = next(iter(device_map.values()))
    if device_map in transformers_loader.STRATEGIES:
        raise errors.ConfigError(
            f"device_map={device_map!r} of a pipeline cannot be honoured here: name a device, or load components to theirs, "
            "one by one, and pass them"
        )
    return "cpu" if device_map is None else device_name(device_map)


def _pipeline(
    uri: str, cls: Any, folder: Path, arriving: Arriving, components: set[str], device: str, kwargs: dict[str, Any]
) -> Any:
    index = folder / "model_index.json"
    if not index.is_file():
        raise errors.IncompleteModelError(
            f"{uri} has no model_index.json, which pipelines are put together by", uri=uri
        )
    named = json.loads(index.read_bytes())
    dtype = kwargs.get("dtype") if kwargs.get("dtype") is not None else kwargs.get("torch_dtype")
    built: dict[str, Any] = {}
    for name in sorted(components & {name for name, value in named.items() if isinstance(value, list)} - kwargs.keys()):
        own = {"dtype": dtype.get(name, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype}
        own |= {name: kwargs[name] for name in ("device_map", "trust_remote_code") if name in kwargs}
        tensors = arriving.pending(f"{name}/")
        built[name] = _component(uri, _class_of(uri, name, *named[name]), folder / name, tensors, device, own)
    with refusals_named(uri):
        pipeline = cls.from_pretrained(str(folder), **built, **kwargs)
    pipeline.register_to_config(_name_or_path=uri)
    return pipeline


def _class_of(uri: str, component: str, library: str, class_name: str) -> Any:
    """Return the class of a component: one of diffusers, of its pipelines or of transformers, and of nothing else."""
    libraries = {"diffusers": diffusers, "transformers": transformers}
    found = getattr(libraries.get(library) or getattr(diffusers.pipelines, library, None), class_name, None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin | transformers.PreTrainedModel)):
        raise errors.ConfigError(
            f"component {component!r} of {uri} is a {class_name} of {library}: expected a model of diffusers or "
            f"transformers; load it yourself and pass {component}=…",
            uri=uri,
        )
    return found


def _component(
    uri: str, cls: Any, folder: Path, tensors: dict[str, Pending], device: str, kwargs: dict[str, Any]
) -> Any:
    if not (folder / "config.json").is_file():
        raise errors.IncompleteModelError(f"{uri} has no config.json for its {folder.name}", uri=uri)
    if cls is diffusers.AutoModel:
        facts = json.loads((folder / "config.json").read_bytes())
        name = facts.get("_class_name") or next(iter(facts.get("architectures") or ()), "")
        cls = _class_of(uri, folder.name, "diffusers" if "_class_name" in facts else "transformers", name)
    if issubclass(cls, transformers.PreTrainedModel):
        return transformers_loader.build(uri, cls, folder, tensors, kwargs)
    config = cls.load_config(str(folder))
    if config.get("quantization_config"):
        raise errors.ConfigError(
            f"{uri}: its {folder.name} is quantised; weightcache.pull it, and load the folder", uri=uri
        )
    given = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype", "device_map")}
    given.pop("trust_remote_code", None)
    dtype = kwargs.get("dtype") if kwargs.get("dtype") is not None else kwargs.get("torch_dtype")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise errors.ConfigError(f"dtype={dtype!r}: diffusers expects a torch.dtype, such as torch.bfloat16")
    with refusals_named(uri), _default_dtype(dtype), init_empty_weights():
        model = cls.from_config(config, **given)
    model._fix_state_dict_keys_on_load(tensors)  # the names that attention had once
    _fill(uri, model, tensors, device, dtype)
    model.register_to_config(_name_or_path=uri)
    return model.eval()


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """As diffusers does: what a model computes when it is made, such as tables of positions, has its dtype too."""
    before = torch.get_default_dtype()
    if dtype is not None and dtype.itemsize > 1:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _fill(uri: str, model: Any, tensors: Mapping[str, Pending], device: str, dtype: torch.dtype | None) -> None:
    """Give a model without memory its tensors, each with the dtype that diffusers gives it."""
    targets = model.state_dict()
    missing, unexpected = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
    if missing:
        raise errors.MismatchError(
            f"{len(missing)} tensors that {type(model).__name__} needs are not in {uri}: {', '.join(missing[:3])}; "
            f"unexpected there: {', '.join(unexpected[:3]) or 'none'}",
            missing=missing,
            unexpected=unexpected,
        )
    if unexpected:
        log.warning(
            "%d tensors of %s fit nothing in %s: %s", len(unexpected), uri, type(model).__name__, unexpected[:3]
        )
    kept = set(model._keep_in_fp32_modules or ())
    for name, pending in tensors.items():
        if name not in targets:
            continue
        tensor, wanted = pending[...], dtype or targets[name].dtype
        if tensor.shape != targets[name].shape:
            raise errors.MismatchError(
                f"tensor {name!r} of {uri} has shape {tuple(tensor.shape)}, {type(model).__name__} expects "
                f"{tuple(targets[name].shape)}",
                tensor=name,
            )
        if dtype is not None and not tensor.is_floating_point():
            wanted = tensor.dtype
        elif dtype is not None and kept & set(name.split(".")):
            wanted = torch.float32
        set_module_tensor_to_device(model, name, device, value=tensor.to(wanted), dtype=wanted)
