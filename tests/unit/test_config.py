"""Settings: what wins, what is read from where, and that a demand is never guessed at."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from weightcache.config import (
    FILE_ONLY,
    MIB,
    Configuration,
    Settings,
    read_bytes,
    read_configuration,
    read_hub_cache,
    read_settings,
)
from weightcache.errors import ConfigError
from weightcache.residency import Policy, Site
from weightcache.stores import Replica, Store

TABLES = ("prices", "policy", "stores", "daemon", "warm", "hub")
N_ENVIRONMENT_NAMES = 12  # as the design allows


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment that holds nothing but a home folder."""
    return {"HOME": str(tmp_path)}


def write_toml(home: Mapping[str, str], text: str | bytes) -> Path:
    path = Path(home["HOME"]) / ".config" / "weightcache.toml"
    path.parent.mkdir()
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_defaults_lie_below_home(home: dict[str, str], tmp_path: Path) -> None:
    assert read_settings(home) == Settings(dir=tmp_path / ".cache" / "weightcache")


def test_environment_beats_file_beats_default(home: dict[str, str]) -> None:
    write_toml(home, "connections = 5\nthreads = 3\n")
    settings = read_settings({**home, "WEIGHTCACHE_CONNECTIONS": "7"})
    assert (settings.connections, settings.threads, settings.attempts) == (7, 3, 3)


def test_every_setting_is_read_from_the_file(home: dict[str, str], tmp_path: Path) -> None:
    write_toml(
        home,
        'dir = "/somewhere"\noffline = true\ndisk_budget_bytes = "20GB"\nconnections = 1\nrange_bytes = "8MiB"\n'
        "threads = 2\nattempts = 1\nrequest_timeout_s = 1.5\ntimeout_s = 60\n",
    )
    assert read_settings(home) == Settings(
        dir=Path("/somewhere"),
        offline=True,
        disk_budget_bytes=20 * 10**9,
        connections=1,
        range_bytes=8 * MIB,
        threads=2,
        attempts=1,
        request_timeout_s=1.5,
        timeout_s=60.0,
    )


def test_every_setting_is_read_from_the_environment(home: dict[str, str]) -> None:
    values = {
        "dir": ("/somewhere", Path("/somewhere")),
        "offline": ("yes", True),
        "disk_budget_bytes": ("1.5 GiB", 3 << 29),
        "connections": ("512", 512),
        "range_bytes": ("1048576", MIB),
        "threads": ("64", 64),
        "request_timeout_s": ("0.25", 0.25),
        "socket": ("/run/weightcache/socket", "/run/weightcache/socket"),
        "node": ("aws/eu-central-1/EU", Site("aws", "eu-central-1", "eu")),
    }
    environment = {f"WEIGHTCACHE_{name.upper()}": text for name, (text, _) in values.items()}
    settings = read_settings({**home, **environment})
    assert {name: getattr(settings, name) for name in values} == {name: v for name, (_, v) in values.items()}


def test_every_setting_but_tables_can_be_set_in_the_environment(home: dict[str, str]) -> None:
    n_names = 1  # WEIGHTCACHE_CONFIG
    for field in dataclasses.fields(Settings):
        value = {"node": "//eu", "socket": "none"}.get(field.name, "1")
        given = {**home, f"WEIGHTCACHE_{field.name.upper()}": value} | {"WEIGHTCACHE_RANGE_BYTES": "1MiB"}
        if field.name in (*TABLES, *FILE_ONLY):
            with pytest.raises(ConfigError, match=r"unknown setting|in the configuration file"):
                read_settings(given)
        else:
            assert getattr(read_settings(given), field.name) != getattr(read_settings(home), field.name)
            n_names += 1
    assert n_names <= N_ENVIRONMENT_NAMES


def test_setting_of_the_file_alone_says_so_in_the_environment(home: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"'WEIGHTCACHE_ATTEMPTS' in the environment: .*in the configuration file"):
        read_settings({**home, "WEIGHTCACHE_ATTEMPTS": "1"})


def test_empty_environment_value_counts_as_not_set(home: dict[str, str]) -> None:
    assert read_settings({**home, "WEIGHTCACHE_CONNECTIONS": ""}).connections == 64


def test_named_file_is_read_in_place_of_the_usual_one(home: dict[str, str], tmp_path: Path) -> None:
    write_toml(home, "connections = 5")
    (tmp_path / "mine.toml").write_text("threads = 4")
    settings = read_settings({**home, "WEIGHTCACHE_CONFIG": str(tmp_path / "mine.toml")})
    assert (settings.connections, settings.threads) == (64, 4)


def test_xdg_folders_are_honoured_when_absolute(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "weightcache.toml").write_text("threads = 4")
    settings = read_settings({**home, "XDG_CACHE_HOME": "/caches", "XDG_CONFIG_HOME": str(tmp_path)})
    assert (settings.dir, settings.threads) == (Path("/caches/weightcache"), 4)
    settings = read_settings({**home, "XDG_CACHE_HOME": "caches", "XDG_CONFIG_HOME": "configs"})
    assert (settings.dir, settings.threads) == (tmp_path / ".cache/weightcache", 0)


def test_relative_and_home_folders_become_absolute(home: dict[str, str]) -> None:
    assert read_settings({**home, "WEIGHTCACHE_DIR": "here"}).dir == Path.cwd() / "here"
    assert read_settings({**home, "WEIGHTCACHE_DIR": "~/here"}).dir == Path("~/here").expanduser()


def test_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCACHE_THREADS", "9")
    assert read_settings().threads == 9
    assert read_settings() == read_settings(dict(os.environ))


def test_unknown_name_in_the_environment_is_an_error_with_the_nearest(home: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"'WEIGHTCACHE_CONECTIONS' in the environment.*CONNECTIONS'\?"):
        read_settings({**home, "WEIGHTCACHE_CONECTIONS": "7"})


def test_unknown_name_in_the_file_is_an_error_with_the_nearest(home: dict[str, str]) -> None:
    path = write_toml(home, "ofline = true")
    with pytest.raises(ConfigError, match=rf"'ofline' in {path} \(did you mean 'offline'\?\)") as caught:
        read_settings(home)
    assert caught.value.facts == {"setting": "ofline", "source": str(path)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connections", "0"),
        ("connections", "513"),
        ("connections", "-1"),
        ("connections", "4.0"),
        ("threads", "65"),
        ("node", "aws"),
        ("node", "aws/eu-central-1/eu/de"),
        ("node", "aws/eu central/eu"),
        ("offline", "maybe"),
        ("range_bytes", "1MB"),
        ("range_bytes", "65MiB"),
        ("disk_budget_bytes", "-5"),
        ("disk_budget_bytes", "much"),
        ("disk_budget_bytes", "5 XB"),
        ("request_timeout_s", "nan"),
        ("request_timeout_s", "inf"),
        ("request_timeout_s", "-1"),
        ("request_timeout_s", "soon"),
        ("socket", "here"),
    ],
)
def test_value_that_cannot_be_honoured_is_an_error(home: dict[str, str], name: str, value: str) -> None:
    spelled = f"WEIGHTCACHE_{name.upper()}"
    with pytest.raises(ConfigError, match=f"{spelled}.*is {value!r}: expected") as caught:
        read_settings({**home, spelled: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "dir = 5",
        'dir = ""',
        "connections = true",
        "connections = [1]",
        "attempts = 0",
        "attempts = 11",
        "node = 5",
        'node = "aws/eu-central-1/eu"',
        "stores = []",
        "offline = 1",
        "timeout_s = true",
        "disk_budget_bytes = true",
        "range_bytes = {}",
    ],
)
def test_value_of_the_wrong_type_in_the_file_is_an_error(home: dict[str, str], line: str) -> None:
    write_toml(home, line)
    with pytest.raises(ConfigError, match=line.partition(" ")[0]):
        read_settings(home)


def test_prices_are_read_by_provider_and_host(home: dict[str, str]) -> None:
    write_toml(
        home,
        'threads = 3\n[prices.aws]\negress_usd_per_gb = 0\n[prices."MinIO.example.com"]\n'
        "get_usd_per_1000 = 0.5\nlist_usd_per_1000 = 1\n[prices.r2]\n",
    )
    settings = read_settings(home)
    assert settings.threads == 3
    assert settings.prices == {
        "aws": {"egress_usd_per_gb": 0.0},
        "minio.example.com": {"get_usd_per_1000": 0.5, "list_usd_per_1000": 1.0},
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prices = 5", "setting 'prices' in .*: expected a table"),
        ("[prices]\naws = 0.09", "setting 'prices.aws' in .*: expected a table"),
        ("[prices.asw]\negress_usd_per_gb = 0", "unknown provider 'prices.asw' in .*did you mean 'aws'"),
        ('[prices."https://host"]', "unknown provider .* or a host"),
        ("[prices.aws]\negres_usd_per_gb = 0", r"'prices.aws.egres_usd_per_gb' in .*did you mean 'egress_usd_per_gb'"),
        (
            "[prices.aws]\negress_usd_per_gb = -1",
            "'prices.aws.egress_usd_per_gb' in .* is -1: expected a number of USD",
        ),
        ("[prices.aws]\negress_usd_per_gb = true", "expected a number of USD"),
        ("[prices.aws]\negress_usd_per_gb = nan", "expected a number of USD"),
        ('[prices.aws]\negress_usd_per_gb = "0.09"', "expected a number of USD"),
        ("[price.aws]\negress_usd_per_gb = 0", "unknown setting 'price' in .*did you mean 'prices'"),
    ],
)
def test_price_that_cannot_be_honoured_is_an_error(home: dict[str, str], text: str, says: str) -> None:
    path = write_toml(home, text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_settings(home)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_node_and_stores_are_read(home: dict[str, str]) -> None:
    write_toml(
        home,
        '[node]\nregion = "fra"\nallow = { jurisdictions = ["eu"] }\n[[stores.prod.replicas]]\nurl = "s3://bucket/registry"\n',
    )
    settings = read_settings(home)
    assert settings.node == Site("", "fra", "")
    assert settings.policy == Policy.from_form({"allow": {"jurisdictions": ["eu"]}}, "")
    assert settings.stores == {"prod": Store("prod", (Replica("aws", "s3://bucket/registry", site=Site("aws")),))}


def test_place_in_the_environment_beats_the_whole_one_of_the_file_and_leaves_its_policy(home: dict[str, str]) -> None:
    write_toml(home, '[node]\nprovider = "aws"\nregion = "us-east-1"\ndeny = { jurisdictions = ["us"] }')
    settings = read_settings({**home, "WEIGHTCACHE_NODE": "//eu"})
    assert settings.node == Site("", "", "eu")
    assert settings.policy == Policy.from_form({"deny": {"jurisdictions": ["us"]}}, "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[node]\nregoin = 'x'", r"unknown setting 'node.regoin' in .*did you mean 'region'"),
        ("[node]\nregion = 5", "setting 'node.region' in .* is 5: expected a name"),
        ("[node]\nallow = 5", r"\[node\] of "),
        ("[store.prod]", "unknown setting 'store' in .*did you mean 'stores'"),
        ("[stores.prod]", r"\[stores.prod\] in .* has no replicas"),
    ],
)
def test_node_or_store_that_cannot_be_one_is_an_error(home: dict[str, str], text: str, says: str) -> None:
    path = write_toml(home, text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_settings(home)
    assert str(path) in str(caught.value)


def test_configuration_says_what_differs_from_the_defaults_and_where_it_is_from(home: dict[str, str]) -> None:
    path = write_toml(
        home,
        'connections = 5\nthreads = 3\nattempts = 3\nredirect_hosts = ["h"]\n[prices.aws]\negress_usd_per_gb = 0\n[node]\n',
    )
    read = read_configuration(
        {**home, "WEIGHTCACHE_CONNECTIONS": "7", "WEIGHTCACHE_DIR": "/x", "WEIGHTCACHE_NODE": "//eu"}
    )
    environment = "the environment"
    assert read.file == path
    assert read.sources == {
        "connections": environment,
        "threads": str(path),
        "redirect_hosts": str(path),
        "prices": str(path),
        "dir": environment,
        "node": environment,
    }
    told = read.as_dict()
    assert told["settings"] == {
        "connections": {"value": 7, "from": environment},
        "threads": {"value": 3, "from": str(path)},
        "redirect_hosts": {"value": ["h"], "from": str(path)},
        "prices": {"value": {"aws": {"egress_usd_per_gb": 0.0}}, "from": str(path)},
        "dir": {"value": "/x", "from": environment},
    }
    assert told["node"] == {"provider": "", "region": "", "jurisdiction": "eu"}


def test_configuration_without_a_file_says_so(home: dict[str, str], tmp_path: Path) -> None:
    assert read_configuration(home) == Configuration(None, Settings(dir=tmp_path / ".cache" / "weightcache"), {})


def test_given_file_is_read_in_place_of_the_named_one(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("threads = 4")
    named = {**home, "WEIGHTCACHE_CONFIG": str(tmp_path / "absent.toml")}
    assert read_configuration(named, tmp_path / "mine.toml").settings.threads == 4


@pytest.mark.parametrize("text", ["connections 5", "a = 1\na = 2", b"\xff\xfe"])
def test_file_that_is_not_toml_is_an_error(home: dict[str, str], text: str | bytes) -> None:
    path = write_toml(home, text)
    with pytest.raises(ConfigError, match=f"{path} is not TOML"):
        read_settings(home)


def test_named_file_that_cannot_be_read_is_an_error(home: dict[str, str], tmp_path: Path) -> None:
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(ConfigError, match=f"cannot read the configuration {path}: "):
            read_settings({**home, "WEIGHTCACHE_CONFIG": str(path)})


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("1500000", 1_500_000),
        ("20GB", 20 * 10**9),
        ("64 MiB", 64 * MIB),
        (" 1.5k ", 1500),
        ("2ti", 2 << 40),
        (4096, 4096),
    ],
)
def test_bytes_are_read_in_decimal_and_binary_units(text: object, nbytes: int) -> None:
    assert read_bytes(text) == nbytes


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings(dir=Path("/")).offline = True  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "folder"),
    [
        ({}, ".cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/xdg", "HF_HOME": "/hf"}, "/hf/hub"),
        ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old"),
        ({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "/new"}, "/new"),
    ],
)
def test_hub_cache_is_where_the_hubs_client_has_it(given: dict[str, str], folder: str) -> None:
    assert read_hub_cache(given) == Path.home() / folder
