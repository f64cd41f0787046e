"""Own the settings: one frozen value, read from a TOML file and a few environment names.

Never opens anything else; the only module that reads the process environment.

Precedence, highest first: environment, TOML file, default. A setting is a demand: what cannot be read or is not
known is a ConfigError, with the nearest right name.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from weightcache.errors import ConfigError, nearest
from weightcache.prices import KEYS, PROVIDERS, Overrides, is_host

MIB = 1 << 20
ENVIRONMENT_PREFIX = "WEIGHTCACHE_"
FILE_ONLY = frozenset({"max_bytes_per_s", "redirect_hosts"})
PRICES = "prices"
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set. Names of TOML keys and, in capitals after WEIGHTCACHE_, of the environment.

    Tables stand in the TOML file alone.

    Attributes:
        dir: The cache folder, on a local file system.
        offline: Never dial; what is not on this node is an OfflineError.
        disk_budget_bytes: Most bytes the disk tier may occupy; 0 means 80 % of what its file system has free or
            the cache already holds.
        connections: Most ranges asked of an origin at the same time. A load begins with 16 and takes more while that
            brings more bytes a second.
        max_bytes_per_s: Most bytes a second that this process takes from origins; 0 means no limit. In the file only.
        redirect_hosts: Hosts that an origin may redirect to, beside itself; they get no credentials. In the file only.
        range_bytes: Largest range of one request; 8 to 16 MiB is where object stores are efficient.
        threads: Threads that read and verify; 0 means the processors this process may use, between 2 and 8.
        attempts: Most tries of one request.
        request_timeout_s: Longest silence on a connection before its request counts as failed; less than 1 KiB/s is
            silence.
        timeout_s: Longest time a whole load may take; 0 means no limit.
        host_budget_bytes: Most bytes of images that this process keeps in host memory; 0 means half of what is
            available. Freed memory kept for the next load is at most an eighth of that, and no more than this.
        libcuda: The driver to open; another one is for tests.
        prices: A table for each provider or host whose prices are not those of `weightcache.prices`.
    """

    dir: Path
    offline: bool = False
    disk_budget_bytes: int = 0
    connections: int = 64
    max_bytes_per_s: int = 0
    redirect_hosts: tuple[str, ...] = ()
    range_bytes: int = 16 * MIB
    threads: int = 0
    attempts: int = 3
    request_timeout_s: float = 15.0
    timeout_s: float = 0.0
    host_budget_bytes: int = 0
    libcuda: str = "libcuda.so.1"
    prices: Overrides = field(default_factory=dict)


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the settings of this process.

    Args:
        environment: Used in place of the process environment.

    Raises:
        ConfigError: A file, name or value that cannot be used.
    """
    env = os.environ if environment is None else environment
    home = Path(env.get("HOME") or "~").expanduser()
    settings = Settings(dir=_folder(env.get("XDG_CACHE_HOME"), home / ".cache") / "weightcache")
    named = env.get(ENVIRONMENT_PREFIX + "CONFIG")
    path = Path(named) if named else _folder(env.get("XDG_CONFIG_HOME"), home / ".config") / "weightcache.toml"
    if named or path.is_file():
        given = dict(_read_toml(path))
        settings = replace(settings, prices=_read_prices(given.pop(PRICES, {}), str(path)))
        settings = _apply(settings, given, str(path), lambda name: name, tables=[PRICES])
    overrides = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in env.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name != ENVIRONMENT_PREFIX + "CONFIG" and value != ""
    }
    return _apply(settings, overrides, "the environment", lambda name: ENVIRONMENT_PREFIX + name.upper())


def _folder(named: str | None, default: Path) -> Path:
    # The XDG base directory specification says that a relative path counts as not set.
    return Path(named) if named and Path(named).is_absolute() else default


def _read_toml(path: Path) -> Mapping[str, object]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as exc:
        raise ConfigError(f"cannot read the configuration {path}: {exc.strerror}", path=str(path)) from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the configuration {path} is not TOML: {exc}", path=str(path)) from exc


def _apply(
    settings: Settings,
    given: Mapping[str, object],
    source: str,
    spell: Callable[[str], str],
    tables: Sequence[str] = (),
) -> Settings:
    known = _READERS
    values: dict[str, object] = {}
    for name, value in given.items():
        if name in FILE_ONLY and spell(name) != name:
            raise ConfigError(
                f"setting {spell(name)!r} in {source}: {name} is set in the configuration file", setting=name
            )
        if name not in known:
            close = nearest(spell(name), [spell(each) for each in (*known, *tables)])
            raise ConfigError(f"unknown setting {spell(name)!r} in {source}{close}", setting=name, source=source)
        try:
            values[name] = known[name](value)
        except (TypeError, ValueError) as exc:
            raise ConfigError(
                f"setting {spell(name)!r} in {source} is {value!r}: expected {exc}", setting=name, source=source
            ) from exc
    return replace(settings, **values)  # type: ignore[arg-type]


def _read_prices(given: object, source: str) -> Overrides:
    """Read `[prices.<provider or host>]` tables."""
    prices: dict[str, dict[str, float]] = {}
    for name, table in _table(given, PRICES, source).items():
        spelled = f"{PRICES}.{name}"
        if name not in PROVIDERS and not is_host(name):
            close = nearest(name, PROVIDERS)
            raise ConfigError(
                f"unknown provider {spelled!r} in {source}{close}: expected {', '.join(PROVIDERS)} or a host, as in "
                '[prices."minio.example.com"]',
                setting=spelled,
                source=source,
            )
        for key, value in _table(table, spelled, source).items():
            if key not in KEYS:
                raise ConfigError(
                    f"unknown setting {f'{spelled}.{key}'!r} in {source}{nearest(key, KEYS)}",
                    setting=f"{spelled}.{key}",
                    source=source,
                )
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 10**6:
                raise ConfigError(
                    f"setting {f'{spelled}.{key}'!r} in {source} is {value!r}: expected a number of USD",
                    setting=f"{spelled}.{key}",
                    source=source,
                )
            prices.setdefault(name.lower(), {})[key] = float(value)
    return prices


def _table(value: object, name: str, source: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ConfigError(f"setting {name!r} in {source} is {value!r}: expected a table", setting=name, source=source)
    return value


def _read_path(value: object) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError("a folder")
    return Path(value).expanduser().absolute()


def _read_flag(value: object) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError("true or false")
    return words[value.lower()]


def _read_count(low: int, high: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        text = str(value)
        if isinstance(value, bool) or not text.isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return int(text)

    return read


def read_bytes(value: object) -> int:
    """Read a number of bytes: `1500000`, `"20GB"`, `"64 MiB"`. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,6})?)\s*([kmgt]i?)?b?", str(value).strip().lower())
    if isinstance(value, bool) or match is None:
        raise ValueError("a number of bytes such as 500GB or 64MiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _read_seconds(value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = -1.0
    if isinstance(value, bool) or not 0 <= seconds < 10**7:
        raise ValueError("a number of seconds")
    return seconds


def _read_hosts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(
        isinstance(each, str) and re.fullmatch(r"[\w.:-]+", each) for each in value
    ):
        raise ValueError("a list of host names")
    return tuple(value)


def _read_library(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("the name or path of a shared library")
    return value


def _read_range_bytes(value: object) -> int:
    nbytes = read_bytes(value)
    if not MIB <= nbytes <= 64 * MIB:
        raise ValueError("between 1 MiB and 64 MiB")
    return nbytes


_READERS: Mapping[str, Callable[[object], object]] = {
    "dir": _read_path,
    "offline": _read_flag,
    "disk_budget_bytes": read_bytes,
    "connections": _read_count(1, 512),
    "max_bytes_per_s": read_bytes,
    "redirect_hosts": _read_hosts,
    "range_bytes": _read_range_bytes,
    "threads": _read_count(0, 64),
    "attempts": _read_count(1, 10),
    "request_timeout_s": _read_seconds,
    "timeout_s": _read_seconds,
    "host_budget_bytes": read_bytes,
    "libcuda": _read_library,
}
