"""Own how tables of the configuration are read: which keys there are, and what each value may be. Pure.

Never guesses: what is unknown or of another kind is a ConfigError that names the setting, with the nearest right name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weightcache.errors import ConfigError, nearest

Reader = Callable[[object], Any]  # raises ValueError that says what was expected


class Unshown(ValueError):
    """What is wrong with a value that must not be repeated, for it may hold a secret."""


def read_table(given: object, name: str, source: str, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """Read the values of a table, each by the reader of its key.

    Args:
        given: The table.
        name: Its name, `stores.prod`; empty for what has none.
        source: Where it stands, for messages.
        readers: By key; one that reads a table of its own may raise ConfigError.

    Raises:
        ConfigError: No table, an unknown key, a value that its reader refuses.
    """
    values: dict[str, Any] = {}
    for key, value in as_table(given, name, source).items():
        spelled = f"{name}.{key}" if name else key
        if key not in readers:
            hint = nearest(key, readers)
            raise ConfigError(f"unknown setting {spelled!r} in {source}{hint}", setting=spelled, source=source)
        try:
            values[key] = readers[key](value)
        except Unshown as exc:
            raise ConfigError(f"setting {spelled!r} in {source}: {exc}", setting=spelled, source=source) from exc
        except ValueError as exc:
            raise ConfigError(
                f"setting {spelled!r} in {source} is {value!r}: expected {exc}", setting=spelled, source=source
            ) from exc
    return values


def as_table(given: object, name: str, source: str) -> Mapping[str, object]:
    """Return what is a table. Raises ConfigError for anything else, without repeating it: it may be a URL with a secret."""
    if not isinstance(given, dict):
        raise ConfigError(f"setting {name!r} in {source}: expected a table", setting=name, source=source)
    return given


def read_flag(value: object) -> bool:
    """Read true or false, which the environment may spell in other ways. Raises ValueError."""
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError("true or false")
    return words[value.lower()]


def read_usd(value: object) -> float:
    """Read an amount of money. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 10**6:
        raise ValueError("a number of USD")
    return float(value)
