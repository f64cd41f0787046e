"""Own the form of `--model-loader-extra-config`, which vLLM and SGLang hand over as they got it.

Never opens what it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from weightcache import errors


@dataclass(frozen=True, slots=True)
class LoaderConfig:
    """Where a stack's weights come from.

    Attributes:
        uri: The model, as `weightcache.stream` takes it; empty where it is the stack's own model path.
        storage_options: For its origin; not shown, for it may hold a secret.
    """

    uri: str = ""
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)


def read_extra_config(form: object) -> LoaderConfig:
    """Read what was given as JSON or as a dict.

    Raises:
        ConfigError: No table, an unknown key, or a value of another kind. No value is repeated in it.
    """
    name = "--model-loader-extra-config"
    if not isinstance(form, Mapping):
        raise errors.ConfigError(f'{name} is no JSON object; expected {{"uri": "s3://bucket/model"}}', setting=name)
    known = [each.name for each in fields(LoaderConfig)]
    for key in form:
        if key not in known:
            hint = errors.nearest(str(key), known) or f"; known are {', '.join(known)}"
            raise errors.ConfigError(f"unknown key {key!r} in {name}{hint}", setting=str(key))
    if not isinstance(form.get("uri", ""), str):
        raise errors.ConfigError(f'"uri" in {name} is no text; expected a model\'s URI', setting="uri")
    if not isinstance(form.get("storage_options", {}), Mapping):
        raise errors.ConfigError(f'"storage_options" in {name} is no table; expected {{…}}', setting="storage_options")
    return LoaderConfig(**form)
