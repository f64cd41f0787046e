"""The tables [daemon], [[warm]] and [hub]: what they may say, and what is said of what they may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightcache.config import read_configuration, read_settings
from weightcache.daemon.settings import (
    DEFAULT_HTTP,
    DEFAULT_HUB,
    ClientClass,
    DaemonSettings,
    HubSettings,
    Warm,
    read_duration,
)
from weightcache.errors import ConfigError

WHOLE = """
socket = "/run/weightcache/socket"
host_budget_bytes = "8GiB"

[daemon]
http = "0.0.0.0:9000"
ready_bytes = "8GiB"
huge_bytes = "8GiB"
prefetch_bytes_per_s = "100MB"
idle_host = "30m"
idle_disk = "30d"
watch = "5m"
forecast = true
waste = 0.2
uids = [1000, 1001]
credentials = "any"
token_file = "/etc/weightcache/token"

[[daemon.clients]]
name = "team a"
token_file = "/etc/weightcache/team-a"
models = ["s3://bucket/team-a/*"]
prefetch_bytes_per_day = "1TB"

[[warm]]
model = "wc://prod/llama@v1"
tier = "host"
at = ["start", "07:30"]
until = "2h"
[[warm]]
model = "s3://bucket/model"
"""


def read(tmp_path: Path, text: str) -> tuple[DaemonSettings, tuple[Warm, ...]]:
    path = tmp_path / "weightcache.toml"
    path.write_text(text)
    settings = read_configuration({"HOME": str(tmp_path)}, path).settings
    return settings.daemon, settings.warm


def test_everything_can_be_said(tmp_path: Path) -> None:
    text = WHOLE.replace("wc://prod/llama@v1", "s3://bucket/registry/llama@v1")
    daemon, warm = read(tmp_path, text)
    assert daemon == DaemonSettings(
        http=("0.0.0.0", 9000),
        ready_bytes=8 << 30,
        huge_bytes=8 << 30,
        prefetch_bytes_per_s=100_000_000,
        idle_host_s=1800,
        idle_disk_s=30 * 86400,
        watch_s=300,
        forecast=True,
        waste=0.2,
        uids=(1000, 1001),
        any_credentials=True,
        token_file="/etc/weightcache/token",
        clients=(ClientClass("team a", "/etc/weightcache/team-a", ("s3://bucket/team-a/*",), 10**12),),
    )
    assert warm == (
        Warm("s3://bucket/registry/llama@v1", "host", ("start", "07:30"), 7200.0),
        Warm("s3://bucket/model"),
    )


def test_nothing_needs_to_be_said(tmp_path: Path) -> None:
    assert read(tmp_path, "") == (DaemonSettings(), ())
    assert DaemonSettings().http == DEFAULT_HTTP


def test_no_page_is_served_where_none_is_wanted(tmp_path: Path) -> None:
    assert read(tmp_path, '[daemon]\nhttp = ""\n')[0].http is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("daemon = 1", "expected a table"),
        ("[daemon]\nsocket = 1", "unknown setting 'daemon.socket'"),
        ('[daemon]\nhttp = "localhost"', "expected an address"),
        ('[daemon]\nhttp = "127.0.0.1:99999"', "expected an address"),
        ('[daemon]\nidle_host = "soon"', "expected a duration"),
        ("[daemon]\nwaste = 2", "expected a share"),
        ("[daemon]\nuids = [-1]", "numbers of users"),
        ('[daemon]\ncredentials = "some"', 'expected "same" or "any"'),
        ('[daemon]\ntoken_file = "sesame"', "absolute path of a file"),
        ('[[daemon.clients]]\nname = "a"', "needs name and token_file"),
        ('[[daemon.clients]]\nname = "a"\ntoken_file = "/t"\nmodels = []', "list of patterns"),
        ("[daemon]\nclients = 1", r"expected tables.*\[\[daemon.clients\]\]"),
        ("warm = 1", "expected tables"),
        ('[[warm]]\ntier = "host"', "names no model"),
        ('[[warm]]\nmodel = "m"\ntier = "device"', 'expected "disk" or "host"'),
        ('[[warm]]\nmodel = "m"\nat = "25:00"', "a time such as"),
        ('[[warm]]\nmodel = "m"\nmode = 1', "unknown setting"),
        ('socket = "here"', "absolute path of a socket"),
        ("[daemon]\nhuge_bytes = 1", "expected host_budget_bytes to be set"),
        ("host_budget_bytes = 1\n[daemon]\nhuge_bytes = 2", "no less than that; it is 1"),
        ("hub = 1", "expected a table"),
        ("[hub]\nport = 1", "unknown setting 'hub.port'"),
        ('[hub]\naddress = "here"', "expected an address"),
        ('[hub]\nupstream = "https://user:secret@host"', "expected the address of a Hub"),
        ('[hub.models]\n"org/../name" = "s3://b/m"', "names of repositories"),
        ('[hub.models]\n"org/name" = 1', "the URI of a model for 'org/name'"),
        ('[hub.models]\n"org/*" = "s3://b/m"', r"'\{name\}' in the URI of 'org/\*'"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read(tmp_path, text)


def test_hub_is_not_served_unless_there_is_its_table(tmp_path: Path) -> None:
    read(tmp_path, "")
    path = tmp_path / "weightcache.toml"
    assert read_configuration({"HOME": str(tmp_path)}, path).settings.hub is None
    path.write_text("[hub]")
    assert read_configuration({"HOME": str(tmp_path)}, path).settings.hub == HubSettings(address=DEFAULT_HUB)


@pytest.mark.parametrize(
    ("repo", "uri"),
    [("org/one", "./one"), ("org/two", "s3://b/two@v1"), ("other/two", ""), ("gpt2", "./gpt2"), ("one", "")],
)
def test_repository_is_the_model_of_its_name_or_of_its_organisation(repo: str, uri: str) -> None:
    settings = HubSettings(models={"org/*": "s3://b/{name}@v1", "org/one": "./one", "gpt2": "./gpt2"})
    assert settings.uri_of(repo) == uri


def test_a_token_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, '[daemon]\ntoken_file = "sesame"')
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("30d", 2592000), (7, 7), ("0", 0)]
)
def test_durations(given: object, seconds: float) -> None:
    assert read_duration(given) == seconds


def test_the_socket_lies_below_the_cache_folder_unless_it_is_given(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "WEIGHTCACHE_DIR": "/cache"}
    assert read_settings(home).socket_path == Path("/cache/daemon/socket")
    assert read_settings({**home, "WEIGHTCACHE_SOCKET": "/run/w/socket"}).socket_path == Path("/run/w/socket")
    assert read_settings({**home, "WEIGHTCACHE_SOCKET": "none"}).socket_path is None
