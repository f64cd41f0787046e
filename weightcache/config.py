"""Own the settings: one frozen value, read from a TOML file and a few environment names.

Never opens anything else; the only module that reads the process environment.

Precedence, highest first: environment, TOML file, default. A setting is a demand: what cannot be read or is not
known is a ConfigError, with the nearest right name.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from weightcache.daemon.settings import DaemonSettings, HubSettings, Warm, read_daemon, read_hub, read_warm
from weightcache.digest import Digest
from weightcache.errors import ConfigError
from weightcache.prices import Overrides, read_overrides
from weightcache.residency import Policy, Site
from weightcache.stores import Store, read_node, read_site, read_stores
from weightcache.tables import Reader, Unshown, read_flag, read_table

MIB = 1 << 20
ENVIRONMENT = "the environment"
ENVIRONMENT_PREFIX = "WEIGHTCACHE_"
NO_SOCKET = "none"
# What decides where an origin is asked, and as whom.
_PLACES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_CA_BUNDLE")
_CREDENTIALS = (
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
    *("AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS"),
    "AZURE_STORAGE_ACCOUNT",
)
FILE_ONLY = frozenset({"attempts", "loras", "max_bytes_per_s", "redirect_hosts", "timeout_s", "vllm_uris"})
SERVICE_NAMES = (
    *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
    *("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"),
)
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

    Tables stand in the TOML file alone; but WEIGHTCACHE_NODE is this node's place, `provider/region/jurisdiction`.

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
        attempts: Most tries of one request. In the file only.
        request_timeout_s: Longest silence on a connection before its request counts as failed; less than 1 KiB/s is
            silence.
        timeout_s: Longest time a whole load may take; 0 means no limit. In the file only.
        host_budget_bytes: Most bytes of images that this process keeps in host memory; 0 means half of what is
            available. Freed memory kept for the next load is at most an eighth of that, and no more than this.
        libcuda: The driver to open; another one is for tests.
        loras: Where adapters are that vLLM is asked for by name, each at `{loras}/{name}`; empty is nowhere. In the file only.
        vllm_uris: Whether vLLM's models at s3://, gs:// and az:// are loaded from here. In the file only.
        socket: The node daemon's; without it, `daemon/socket` below the cache folder. A load uses a daemon that
            answers there. "none": no daemon.
        prices: A table for each provider or host whose prices are not those of `weightcache.prices`.
        node: Where this node is, by `[node]`.
        policy: Where this node's bytes may lie and come from, by `[node]`.
        stores: What logical names stand for, by `[stores.<name>]`.
        daemon: How the node daemon works, by `[daemon]`.
        warm: What it brings here before it is asked for, by `[[warm]]`.
        hub: The Hugging Face Hub that it answers as, by `[hub]`; None where there is no such table.
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
    loras: str = ""
    vllm_uris: bool = False
    socket: str = ""
    prices: Overrides = field(default_factory=dict)
    node: Site = field(default_factory=Site)
    policy: Policy = field(default_factory=Policy)
    stores: Mapping[str, Store] = field(default_factory=dict)
    daemon: DaemonSettings = field(default_factory=DaemonSettings)
    warm: tuple[Warm, ...] = ()
    hub: HubSettings | None = None

    @property
    def socket_path(self) -> Path | None:
        """Where the node daemon's socket is; None where none is wanted."""
        if self.socket == NO_SOCKET:
            return None
        return Path(self.socket) if self.socket else self.dir / "daemon" / "socket"


@dataclass(frozen=True, slots=True)
class Configuration:
    """The settings of a process, and where they are from.

    Attributes:
        file: The file that was read; None if there is none.
        settings: What holds.
        sources: For each setting that differs from its default, where it is from.
    """

    file: Path | None
    settings: Settings
    sources: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        settings = self.settings
        told = {
            name: getattr(settings, name)
            for name in self.sources
            if name not in ("node", "policy", "stores", "daemon", "warm", "hub")
        }
        values = {name: {"value": _plain(value), "from": self.sources[name]} for name, value in told.items()}
        stores = {name: store.as_dict(settings.prices) for name, store in settings.stores.items()}
        node, policy = asdict(settings.node), settings.policy.to_form()
        file = None if self.file is None else str(self.file)
        hub = asdict(settings.hub) if settings.hub is not None else None
        daemon = {"daemon": asdict(settings.daemon), "warm": [asdict(each) for each in settings.warm], "hub": hub}
        return {"file": file, "settings": values, "node": node, "policy": policy, "stores": stores} | daemon


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """Read the settings of this process; see `read_configuration`."""
    return read_configuration(environment).settings


def read_configuration(environment: Mapping[str, str] | None = None, file: Path | None = None) -> Configuration:
    """Read the settings of this process, and where they are from.

    Args:
        environment: Used in place of the process environment.
        file: Read in place of the one that the environment names, or the usual one.

    Raises:
        ConfigError: A file, name or value that cannot be used.
    """
    env = os.environ if environment is None else environment
    home = Path(env.get("HOME") or "~").expanduser()
    default = Settings(dir=_folder(env.get("XDG_CACHE_HOME"), home / ".cache") / "weightcache")
    named = file or env.get(ENVIRONMENT_PREFIX + "CONFIG")
    path = Path(named) if named else _folder(env.get("XDG_CONFIG_HOME"), home / ".config") / "weightcache.toml"
    is_read = bool(named) or path.is_file()
    values = _read_file(path) if is_read else {}
    sources = dict.fromkeys(values, str(path))
    given = _read_environment(env)
    sources |= dict.fromkeys(given, ENVIRONMENT)
    settings = replace(default, **values | given)
    if settings.daemon.huge_bytes > settings.host_budget_bytes:
        raise ConfigError(
            f"huge_bytes of [daemon] in {path} is {settings.daemon.huge_bytes}: expected host_budget_bytes to be set, and no "
            f"less than that; it is {settings.host_budget_bytes or 'not set'}",
            setting="daemon.huge_bytes",
            source=str(path),
        )
    changed = {name: source for name, source in sources.items() if getattr(settings, name) != getattr(default, name)}
    return Configuration(path if is_read else None, settings, changed)


def read_hub_cache(environment: Mapping[str, str] | None = None) -> Path:
    """Return where huggingface_hub keeps what it has downloaded, by the names that it reads itself."""
    env = os.environ if environment is None else environment
    below = env.get("XDG_CACHE_HOME", "~/.cache")
    home = env.get("HF_HOME", f"{below}/huggingface")
    named = env.get("HF_HUB_CACHE", env.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub"))
    return Path(os.path.expandvars(named)).expanduser().absolute()


def read_surroundings() -> dict[str, dict[str, str]]:
    """Return by which places and credentials this process asks origins, each value as a digest: they may be secret."""
    groups = {"places": _PLACES, "credentials": _CREDENTIALS}
    return {
        group: {name: Digest.of(os.environ[name].encode()).hex[:32] for name in names if os.environ.get(name)}
        for group, names in groups.items()
    }


def take_service_environment() -> dict[str, str]:
    """Return what a service manager passed to this process, and take it from the environment: it is not for children."""
    return {name: os.environ.pop(name) for name in SERVICE_NAMES if name in os.environ}


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


def _read_file(path: Path) -> dict[str, Any]:
    source = str(path)
    tables: dict[str, Reader] = {
        "prices": partial(read_overrides, source=source),
        "node": partial(read_node, source=source),
        "stores": partial(read_stores, source=source),
        "daemon": partial(read_daemon, source=source, read_bytes=read_bytes),
        "warm": partial(read_warm, source=source),
        "hub": partial(read_hub, source=source),
    }
    values = read_table(_read_toml(path), "", source, _READERS | tables)
    if "node" in values:
        values["node"], values["policy"] = values["node"]
    return values


def _read_environment(env: Mapping[str, str]) -> dict[str, Any]:
    given = {
        name.upper(): value
        for name, value in env.items()
        if name.startswith(ENVIRONMENT_PREFIX) and name != ENVIRONMENT_PREFIX + "CONFIG" and value != ""
    }
    readers = _READERS | dict.fromkeys(FILE_ONLY, _refuse) | {"node": read_site}
    spelled = {ENVIRONMENT_PREFIX + name.upper(): reader for name, reader in readers.items()}
    values = read_table(given, "", ENVIRONMENT, spelled)
    return {name.removeprefix(ENVIRONMENT_PREFIX).lower(): value for name, value in values.items()}


def _refuse(value: object) -> None:
    raise Unshown("this is set in the configuration file")


def _plain(value: object) -> object:
    """Return a setting's value as JSON can hold it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _read_path(value: object) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError("a folder")
    return Path(value).expanduser().absolute()


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


def _read_place(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a URL or folder")
    return value.rstrip("/")


def _read_socket(value: object) -> str:
    if not isinstance(value, str) or not (value == NO_SOCKET or Path(value).expanduser().is_absolute()):
        raise ValueError(f'the absolute path of a socket, or "{NO_SOCKET}"')
    return value if value == NO_SOCKET else str(Path(value).expanduser())


def _read_range_bytes(value: object) -> int:
    nbytes = read_bytes(value)
    if not MIB <= nbytes <= 64 * MIB:
        raise ValueError("between 1 MiB and 64 MiB")
    return nbytes


_READERS: dict[str, Reader] = {
    "dir": _read_path,
    "offline": read_flag,
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
    "loras": _read_place,
    "vllm_uris": read_flag,
    "socket": _read_socket,
}
