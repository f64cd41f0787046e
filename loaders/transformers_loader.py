"""Own loading with transformers: models of any of its classes, and what lies beside the weights, from a URI.

Never reads a weight from a file, and never runs a model's code unless the user trusts it.

transformers does all that it does with a folder, but for reading it: it gets a state dict of tensors on their way. It
asks for each of them once, by `[...]`, on up to four threads, in the natural order of their names, and makes a parameter
of what it gets. Where dtype and device are right already, that parameter is the tensor as it arrived: no copy. Where it
converts, or merges experts, what it was given is let go of one by one. docs/decisions/019-loaders.md says why so.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import weightcache
from weightcache import errors
from weightcache.loaders.arriving import Arriving, Pending, Placements, literally

log = logging.getLogger(__name__)

Device = int | str | torch.device

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

# What stacks take for a folder or the Hub and cannot be honoured here, and what is there instead.
REFUSED = {
    "revision": "name the revision in the URI: …/model@tag",
    "code_revision": "the code is the model's own",
    "token": "credentials of the origin go into storage_options",
    "cache_dir": "the cache folder is the setting `dir`, WEIGHTCACHE_DIR",
    "force_download": "weightcache.evict(uri) drops what this node keeps",
    "local_files_only": "pass offline=True",
    "proxies": "a web folder takes them in storage_options",
    "variant": "keep the variant in a folder of its own, and name that",
}
REFUSED_HERE = REFUSED | {
    "state_dict": "it comes from the URI",
    "gguf_file": "weightcache.pull the file, and let transformers read it",
    "adapter_kwargs": "load the adapter afterwards: docs/stacks/transformers.md",
    "from_tf": "convert the weights to safetensors",
    "from_flax": "convert the weights to safetensors",
    "tp_plan": "weightcache.pull the model, and let transformers divide it",
    "tp_size": "weightcache.pull the model, and let transformers divide it",
    "device_mesh": "weightcache.pull the model, and let transformers divide it",
    "distributed_config": "weightcache.pull the model, and let transformers divide it",
}
OF_THE_MODEL = ("dtype", "torch_dtype", "quantization_config", "generation_config")  # and not of its configuration


def load(
    uri: str, cls: Any, options: Mapping[str, Any], progress: weightcache.Progress | None, kwargs: dict[str, Any]
) -> Any:
    """Load what a class of transformers loads from a folder; see `weightcache.loaders.from_pretrained`."""
    check_kwargs(kwargs, REFUSED_HERE)
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise errors.ConfigError(f"transformers {transformers.__version__}: expected 5 or newer; upgrade it")
    subfolder = (kwargs.pop("subfolder", None) or "").strip("/")
    prefix = f"{subfolder}/" if subfolder else ""
    if not is_model_class(cls):
        return _load_beside(uri, cls, options, subfolder, kwargs)

    def begin(place: str | Callable[[Sequence[str]], Placements]) -> Arriving:
        include = f"{literally(prefix)}*" if prefix else None
        return stack.enter_context(Arriving(uri, place, options, include=include, progress=progress))

    with ExitStack() as stack:
        kwargs["device_map"] = device_map = _device_map(kwargs.get("device_map"))
        device = _only_device(device_map)
        arriving = begin(device) if device else None
        folder = stack.enter_context(pulled(uri, options)) / subfolder
        config, model_class, shell, kwargs = _describe(uri, cls, folder, kwargs)
        if arriving is None:
            shell = shell or _on_meta(lambda: model_class(config))
            kwargs["device_map"] = device_map = _divided(shell, device_map, kwargs)
            base = getattr(shell, "base_model_prefix", "")
            arriving = begin(lambda names: placements(names, prefix, base, device_map))
        model = _build(model_class, config, folder, uri, arriving.pending(prefix), kwargs)
    (model[0] if isinstance(model, tuple) else model).weightcache_reports = tuple(arriving.reports)
    return model


def build(uri: str, cls: Any, folder: Path, tensors: Mapping[str, Pending], kwargs: dict[str, Any]) -> Any:
    """Build a model of configuration and all else in a folder, and of tensors on their way to its one device."""
    config, model_class, _, kwargs = _describe(uri, cls, folder, kwargs)
    return _build(model_class, config, folder, uri, tensors, kwargs)


def is_model_class(cls: Any) -> bool:
    """Tell whether a class is of models, an Auto class included. Raises ConfigError when it loads nothing."""
    if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
        raise errors.ConfigError(
            f"{cls!r} loads nothing: expected a class with from_pretrained, of transformers or diffusers"
        )
    return hasattr(cls, "_model_mapping") or issubclass(cls, transformers.PreTrainedModel)


def check_kwargs(kwargs: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Raise ConfigError for an argument that would be given in vain; None and False give nothing."""
    for name in refused.keys() & {name for name, value in kwargs.items() if value is not None and value is not False}:
        raise errors.ConfigError(f"{name}= cannot be honoured here: {refused[name]}")
    if kwargs.get("use_safetensors") is False:
        raise errors.ConfigError("use_safetensors=False cannot be honoured here: weights are safetensors, never pickle")


@contextmanager
def pulled(uri: str, options: Mapping[str, Any]) -> Iterator[Path]:
    """Have a model's files, but for its weights, in a folder of the model's name until the block ends."""
    folder, remove = _pull(uri, options)
    try:
        yield folder
    finally:
        remove()


def _pull(uri: str, options: Mapping[str, Any]) -> tuple[Path, Callable[[], None]]:
    # Named after the model: transformers names the modules of trusted code after the folder that it finds them in.
    temporary = Path(tempfile.mkdtemp(prefix="weightcache-"))
    owner_pid = os.getpid()

    def remove() -> None:
        if os.getpid() == owner_pid:  # not a forked child
            shutil.rmtree(temporary, ignore_errors=True)

    folder = temporary / (uri.rstrip("/").rpartition("/")[2].partition("@")[0] or "model")
    try:
        weightcache.pull(uri, folder, weights=False, **options)
    except BaseException:
        remove()
        raise
    return folder, remove


def _load_beside(uri: str, cls: Any, options: Mapping[str, Any], subfolder: str, kwargs: dict[str, Any]) -> Any:
    """Load a tokenizer, a processor or a configuration. Its files stay as long as it does: some are read late."""
    folder, remove = _pull(uri, options)
    try:
        if "trust_remote_code" in kwargs or cls.__name__.startswith("Auto"):  # others would keep it as a setting
            kwargs["trust_remote_code"] = trusted(uri, folder / subfolder, kwargs)
        with refusals_named(uri):
            loaded = cls.from_pretrained(str(folder / subfolder), **kwargs)
        if hasattr(loaded, "name_or_path"):
            loaded.name_or_path = uri
        weakref.finalize(loaded[0] if isinstance(loaded, tuple) else loaded, remove)
    except BaseException:
        remove()
        raise
    return loaded


def _describe(uri: str, cls: Any, folder: Path, kwargs: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return configuration, class, the model on the meta device if it was made on the way, and what arguments are left."""
    if not (folder / "config.json").is_file():
        hint = "; it is an adapter: docs/stacks/transformers.md" if (folder / "adapter_config.json").is_file() else ""
        raise errors.IncompleteModelError(
            f"{uri} has no config.json, which transformers builds models by{hint}", uri=uri
        )
    if (folder / "adapter_config.json").is_file():
        raise errors.ConfigError(f"{uri} holds an adapter beside the model: keep it in a folder of its own", uri=uri)
    kwargs["trust_remote_code"] = is_trusted = trusted(uri, folder, kwargs)
    config, is_auto = kwargs.pop("config", None), hasattr(cls, "_model_mapping")
    with refusals_named(uri):
        if not isinstance(config, transformers.PretrainedConfig):
            kept = {name: kwargs.pop(name) for name in OF_THE_MODEL if name in kwargs}
            reader = transformers.AutoConfig if is_auto else cls.config_class
            config, kwargs = reader.from_pretrained(config or str(folder), return_unused_kwargs=True, **kwargs)
            kwargs |= {**kept, "trust_remote_code": is_trusted}
        # The one public way from an Auto class to the class it stands for.
        shell = _on_meta(lambda: cls.from_config(config, trust_remote_code=is_trusted)) if is_auto else None
    if shell is not None:
        cls, config = type(shell), shell.config
    return config, cls, shell, kwargs


@contextmanager
def refusals_named(uri: str) -> Iterator[None]:
    """Raise ConfigError where a stack raises ValueError: for a model it does not know, or whose code it may not run."""
    try:
        yield
    except ValueError as exc:
        said = " ".join(line.strip() for line in str(exc).splitlines()[:4])
        raise errors.ConfigError(f"{uri} cannot be built as asked for: {said}", uri=uri) from exc


def _on_meta(make: Callable[[], Any]) -> Any:
    """Make a model without memory, in less than a second for the largest."""
    with torch.device("meta"):
        return make()


def _build(
    cls: Any, config: Any, folder: Path, uri: str, tensors: Mapping[str, Pending], kwargs: dict[str, Any]
) -> Any:
    quantised = getattr(config, "quantization_config", None) or {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
    if method == "torchao":
        raise errors.ConfigError(
            f"{uri} is quantised with torchao, which reads the headers of files: weightcache.pull it, and load the folder"
        )
    loaded = cls.from_pretrained(None, config=config, state_dict=tensors, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.name_or_path = model.config.name_or_path = uri
    if model.can_generate() and kwargs.get("generation_config") is None:
        # As from_pretrained does it, from the folder that it was not told of.
        where = {"cache_dir": None, "force_download": False, "proxies": None, "local_files_only": True, "token": None}
        model.adjust_generation_fn(
            None,
            False,
            None,
            str(folder),
            **where,
            revision=None,
            subfolder="",
            trust_remote_code=kwargs["trust_remote_code"],
        )
    return loaded


def trusted(uri: str, folder: Path, kwargs: Mapping[str, Any]) -> bool:
    """Return whether the model's own code may run: what lies beside the weights in the same state, and nothing else.

    Raises:
        ConfigError: It needs code and the user has not said so, or code that is not its own.
    """
    is_trusted = bool(kwargs.get("trust_remote_code"))  # None would have transformers ask at the terminal
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        path = folder / name
        named = json.loads(path.read_bytes()).get("auto_map") if is_trusted and path.is_file() else None
        foreign = [each for each in _strings(named) if "--" in each]
        if foreign:
            raise errors.ConfigError(
                f"{name} of {uri} names code of another repository, {foreign[0]!r}: only the model's own files can be "
                "trusted; put that code beside them and name it without the part before --",
                uri=uri,
            )
    return is_trusted


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def _device_map(given: Any) -> Any:
    """Return a device map as transformers understands it: a mapping, the name of a strategy, or None for the CPU."""
    from transformers.integrations.accelerate import check_and_set_device_map

    try:
        return check_and_set_device_map(given)
    except (ValueError, RuntimeError) as exc:
        raise errors.DeviceError(f"device_map={given!r}: {exc}") from exc


def _only_device(device_map: Any) -> str | None:
    """Return the one device that tensors go to, or None where there are several, or a strategy will say."""
    if device_map is None:
        return "cpu"
    if isinstance(device_map, str):
        return None
    found = {device_name(each) for each in device_map.values()}
    return found.pop() if len(found) == 1 else None


def device_name(device: Device) -> str:
    """Return where weightcache puts what is for a device: there, or in host memory where it knows no way.

    Raises:
        DeviceError: A device that is not there.
    """
    if device == "disk":
        return "cpu"
    try:
        chosen = torch.device(device)  # a number is one of the accelerators
    except RuntimeError as exc:
        raise errors.DeviceError(f"no such device: {device!r} ({exc}); expected cpu, cuda:N or disk") from exc
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise errors.DeviceError(
            f"device {str(device)!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices; "
            "see weightcache doctor, or load with device_map='cpu'"
        )
    if chosen.type not in ("cpu", "cuda"):
        log.warning(
            "tensors reach %s through host memory, which is slower: weightcache fills CUDA devices alone", chosen
        )
        return "cpu"
    return str(chosen)


def _divided(shell: Any, device_map: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the mapping that a strategy comes to, as transformers decides it; before a tensor takes memory there."""
    if not isinstance(device_map, str):
        return device_map
    from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

    quantised = kwargs.get("quantization_config") or getattr(shell.config, "quantization_config", None)
    if quantised:
        log.warning("device_map=%r of a quantised model: its tensors reach devices through host memory", device_map)
        return device_map
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto"
    dtype = getattr(shell.config, "dtype", None) if dtype == "auto" else dtype
    max_memory, unsplit = kwargs.get("max_memory"), shell._no_split_modules
    if device_map == "sequential":
        memory = get_max_memory(max_memory)
    else:
        is_low = device_map == "balanced_low_0"
        memory = get_balanced_memory(shell, max_memory, unsplit, dtype=dtype, low_zero=is_low)
    return infer_auto_device_map(shell, memory, unsplit, dtype=dtype)


def placements(names: Sequence[str], prefix: str, base: str, device_map: Any) -> Placements:
    """Return which tensors go to which device.

    A checkpoint's names may lack the base model's name, or have it in vain. A name that the map does not cover, as those
    that transformers changes may be, goes to host memory, from where transformers brings it to its place.
    """
    places = {key: device_name(value) for key, value in device_map.items()} if isinstance(device_map, Mapping) else {}
    found: dict[str, list[str]] = {}
    for name in names:
        own = name.removeprefix(prefix)
        spelled = (own, f"{base}.{own}", own.removeprefix(f"{base}."))
        covering = next((key for each in spelled for key in _ancestors(each) if key in places), "")
        found.setdefault(places.get(covering, "cpu"), []).append(name)
    return found


def _ancestors(name: str) -> Iterator[str]:
    """Yield a name and those of the modules that hold it, the nearest first, the whole model's aside."""
    while name:
        yield name
        name = name.rpartition(".")[0]
