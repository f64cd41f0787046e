"""Own what is configured of the node daemon: the tables `[daemon]`, `[[warm]]` and `[hub]`, and their reading. Pure.

Never holds a token: only the files that tokens are read from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from weightcache.errors import ConfigError
from weightcache.tables import Reader, Unshown, read_flag, read_table

TIERS = ("disk", "host")
START = "start"
DEFAULT_HTTP = ("127.0.0.1", 7677)
DEFAULT_HUB = ("127.0.0.1", 8377)
REPO = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]{0,95}(?:/\w[\w.-]{0,95})?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
ANY_NAME = "{name}"
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class ClientClass:
    """Clients that show one token: the models they may have, and how much may be prefetched for them.

    Attributes:
        name: Of the class.
        token_file: What its clients must show.
        models: Patterns (`*`, `?`, `[…]`) of names of models.
        prefetch_bytes_per_day: 0 is no limit.
    """

    name: str
    token_file: str
    models: tuple[str, ...] = ("*",)
    prefetch_bytes_per_day: int = 0


@dataclass(frozen=True, slots=True)
class Warm:
    """A model that is brought to a tier before it is asked for.

    Attributes:
        model: Its name. One with a tag is fetched again whenever the tag has moved.
        tier: `disk` or `host`.
        at: Times of the day, `"07:30"` by this machine's clock, or `"start"`.
        until_s: How long it stays there, used or not; 0 is for as long as it is used.
    """

    model: str
    tier: str = "disk"
    at: tuple[str, ...] = (START,)
    until_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DaemonSettings:
    """The table `[daemon]`.

    Attributes:
        http: Where the page, metrics and health are served; None is nowhere.
        ready_bytes: Shared memory that is populated before it is asked for.
        huge_bytes: Huge pages that are reserved at the start, for images; no more than `host_budget_bytes`.
        prefetch_bytes_per_s: Most bytes a second that prefetches take from origins; 0 is no limit but that of loads.
        idle_host_s: An image that nobody used for so long leaves host memory; 0: only for want of room.
        idle_disk_s: A model that nobody used for so long leaves the disk; 0: only for want of room.
        watch_s: How often tags of `[[warm]]` are looked at; 0 is never.
        forecast: Fetch what is likely to be asked for soon.
        waste: Most of the bytes fetched by forecast that may turn out not to have been wanted, 0 to 1.
        uids: Other users whose processes may connect.
        any_credentials: Serve clients whose credentials for origins differ from the daemon's.
        token_file: What this process shows a daemon as a client.
        clients: Classes of clients; with any, a client without a token gets nothing.
    """

    http: tuple[str, int] | None = DEFAULT_HTTP
    ready_bytes: int = 0
    huge_bytes: int = 0
    prefetch_bytes_per_s: int = 0
    idle_host_s: float = 0.0
    idle_disk_s: float = 0.0
    watch_s: float = 60.0
    forecast: bool = False
    waste: float = 0.1
    uids: tuple[int, ...] = ()
    any_credentials: bool = False
    token_file: str = ""
    clients: tuple[ClientClass, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class HubSettings:
    """The table `[hub]`.

    Attributes:
        address: Where it is served; None is nowhere.
        upstream: The Hub that repositories come from which are not among `models`; empty: they are not found.
        models: The URIs of repositories by their names, `org/name`; `org/*` stands for all names of one organisation, and
            `{name}` in its URI for the name.
    """

    address: tuple[str, int] | None = DEFAULT_HUB
    upstream: str = ""
    models: Mapping[str, str] = field(default_factory=dict)

    def uri_of(self, repo: str) -> str:
        """Return which model a repository is; empty where it is none of these."""
        if repo in self.models:
            return self.models[repo]
        org, _, name = repo.rpartition("/")
        return self.models.get(f"{org}/*", "").replace(ANY_NAME, name)


def read_hub(given: object, source: str) -> HubSettings:
    """Read the table `[hub]`. Raises ConfigError."""
    readers: dict[str, Reader] = {"address": read_address, "upstream": read_endpoint, "models": _read_models}
    return HubSettings(**read_table(given, "hub", source, readers))


def read_daemon(given: object, source: str, read_bytes: Reader) -> DaemonSettings:
    """Read the table `[daemon]`. Raises ConfigError."""
    readers: dict[str, Reader] = {
        "http": read_address,
        "ready_bytes": read_bytes,
        "huge_bytes": read_bytes,
        "prefetch_bytes_per_s": read_bytes,
        "idle_host": read_duration,
        "idle_disk": read_duration,
        "watch": read_duration,
        "forecast": read_flag,
        "waste": _read_share,
        "uids": _read_uids,
        "credentials": _read_credentials,
        "token_file": _read_file,
        "clients": partial(_read_clients, source=source, read_bytes=read_bytes),
    }
    values = read_table(given, "daemon", source, readers)
    renamed = {
        "idle_host": "idle_host_s",
        "idle_disk": "idle_disk_s",
        "watch": "watch_s",
        "credentials": "any_credentials",
    }
    return DaemonSettings(**{renamed.get(name, name): value for name, value in values.items()})


def read_warm(given: object, source: str) -> tuple[Warm, ...]:
    """Read the tables `[[warm]]`. Raises ConfigError."""
    readers: dict[str, Reader] = {"model": _read_text, "tier": _read_tier, "at": _read_times, "until": read_duration}
    found: list[Warm] = []
    for number, each in enumerate(_read_tables(given, "warm", source), 1):
        values = read_table(each, f"warm #{number}", source, readers)
        if "model" not in values:
            raise ConfigError(f"[[warm]] #{number} in {source} names no model", setting="warm", source=source)
        if "until" in values:
            values["until_s"] = values.pop("until")
        found.append(Warm(**values))
    return tuple(found)


def read_duration(value: object) -> float:
    """Read a duration: `"90s"`, `"10m"`, `"12h"`, `"30d"`, or seconds. Raises ValueError."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)\s*([smhd]?)", str(value).strip().lower())
    if isinstance(value, bool) or match is None:
        raise ValueError("a duration such as 90s, 10m, 12h or 30d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def _read_clients(value: object, source: str, read_bytes: Reader) -> tuple[ClientClass, ...]:
    readers: dict[str, Reader] = {
        "name": _read_text,
        "token_file": _read_file,
        "models": _read_patterns,
        "prefetch_bytes_per_day": read_bytes,
    }
    found: list[ClientClass] = []
    for number, each in enumerate(_read_tables(value, "daemon.clients", source), 1):
        values = read_table(each, f"daemon.clients #{number}", source, readers)
        if not {"name", "token_file"} <= values.keys():
            what = f"[[daemon.clients]] #{number} in {source} needs name and token_file"
            raise ConfigError(what, setting="daemon.clients", source=source)
        found.append(ClientClass(**values))
    return tuple(found)


def _read_tables(value: object, name: str, source: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        what = f"setting {name!r} in {source}: expected tables, each below a title in two brackets: [[{name}]]"
        raise ConfigError(what, setting=name, source=source)
    return value


def read_address(value: object) -> tuple[str, int] | None:
    """Read `host:port`; nothing is nowhere. Raises ValueError."""
    if value == "":
        return None
    match = re.fullmatch(r"\[?([0-9A-Za-z.:-]+?)\]?:(\d{1,5})", str(value))
    if match is None or int(match[2]) > 65535:
        raise ValueError(f'an address such as "{DEFAULT_HTTP[0]}:{DEFAULT_HTTP[1]}", or "" for none')
    return match[1], int(match[2])


def read_endpoint(value: object) -> str:
    """Read the address of a Hub; nothing is none. Raises ValueError."""
    if value == "":
        return ""
    if not re.fullmatch(r"https?://[\w.:\[\]-]+(/[\w./-]*)?", str(value)):
        raise ValueError('the address of a Hub such as "https://huggingface.co", or "" for none')
    return str(value).rstrip("/")


def _read_models(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError('URIs by names of repositories: "org/name" = "s3://bucket/model"')
    return {read_repo(repo): check_model(repo, uri) for repo, uri in value.items()}


def read_repo(value: object) -> str:
    """Read the name of a repository, `org/name`, `name` or `org/*`. Raises ValueError."""
    repo = str(value)
    if not REPO.fullmatch(repo.removesuffix("*") + "x" if repo.endswith("/*") else repo):
        raise ValueError(f'names of repositories such as "org/name", not {repo[:100]!r}')
    return repo


def check_model(repo: str, uri: object) -> str:
    """Return the URI of a repository. Raises ValueError."""
    if not isinstance(uri, str) or not uri:
        raise ValueError(f"the URI of a model for {repo!r}")
    if repo.endswith("/*") != (ANY_NAME in uri):
        raise ValueError(f"{ANY_NAME!r} in the URI of {repo!r}, if its name ends in /*, and only then")
    return uri


def _read_text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("text")
    return value


def _read_file(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/"):
        raise Unshown("expected the absolute path of a file that holds a token")  # it may be the token
    return value


def _read_tier(value: object) -> str:
    if value not in TIERS:
        raise ValueError(" or ".join(f'"{tier}"' for tier in TIERS))
    return str(value)


def _read_times(value: object) -> tuple[str, ...]:
    times = value if isinstance(value, list) else [value]
    if not times or not all(each == START or re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", str(each)) for each in times):
        raise ValueError('"start", a time such as "07:30", or a list of them')
    return tuple(str(each) for each in times)


def _read_patterns(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise ValueError('a list of patterns such as ["s3://bucket/team-a/*"]')
    return tuple(value)


def _read_uids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(each) is int and 0 <= each < 1 << 32 for each in value):
        raise ValueError("a list of numbers of users")
    return tuple(value)


def _read_credentials(value: object) -> bool:
    if value not in ("same", "any"):
        raise ValueError('"same" or "any"')
    return value == "any"


def _read_share(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError("a share from 0 to 1")
    return float(value)
