"""The systemd units: that systemd takes them, that service and socket agree, and what they promise to the node."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from weightcache.config import Settings, read_configuration, read_settings
from weightcache.errors import CacheFormatError, ConfigError

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
SYSTEM, USER = UNITS, UNITS / "user"
CONFIGURATION = ROOT / "deploy" / "weightcache.toml"
EXPOSURE = 20  # of 100, as `systemd-analyze security` counts; a unit without any care has 96
NOTIFY_RELOAD_SINCE = 253

Unit = dict[str, dict[str, list[str]]]


def read_unit(path: Path) -> Unit:
    """Read a unit file: by section and directive, all its values. Stricter than systemd, which ignores what it cannot read."""
    sections: Unit = {}
    for line in path.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if header := re.fullmatch(r"\[(Unit|Service|Socket|Install)\]", line):
            section: dict[str, list[str]] = sections.setdefault(header[1], defaultdict(list))
        else:
            name, value = re.fullmatch(r"([A-Z]\w+)=(\S.*\S|\S|)", line).groups()  # type: ignore[union-attr]
            section[name].append(value)
    return sections


def read_settings_of(path: Path) -> Settings:
    return read_configuration({}, path).settings


def only(values: list[str]) -> str:
    (value,) = values
    return value


@pytest.fixture(params=[SYSTEM, USER], ids=["system", "user"])
def folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


@pytest.fixture
def service(folder: Path) -> dict[str, list[str]]:
    return read_unit(folder / "weightcache.service")["Service"]


@pytest.fixture
def socket(folder: Path) -> dict[str, list[str]]:
    return read_unit(folder / "weightcache.socket")["Socket"]


# -- what systemd says


def systemd_analyze(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run systemd-analyze, which needs no systemd to be running."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("there is no systemd-analyze here to verify the units: apt-get install systemd")
    environment = os.environ | {"XDG_RUNTIME_DIR": "/run"}  # which units of users are verified with
    command = [program, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def systemd_version() -> int:
    return int(systemd_analyze("--version").stdout.split()[1])


@pytest.fixture
def installed(folder: Path, tmp_path: Path) -> Path:
    """The units beside each other in a folder, the service starting a program that is there."""
    for path in folder.glob("weightcache.*t"):
        shutil.copy(path, tmp_path)
    text = (folder / "weightcache.service").read_text()
    (tmp_path / "weightcache.service").write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", text))
    return tmp_path / "weightcache.service"


def test_systemd_takes_every_line(installed: Path, folder: Path) -> None:
    kind = ["--user"] if folder == USER else []
    socket = installed.with_suffix(".socket")
    verified = systemd_analyze("verify", "--man=no", *kind, installed, socket)
    ours = [line.partition(": ")[2] for line in verified.stderr.splitlines() if "weightcache" in line]
    too_old = (
        ["Failed to parse service type, ignoring: notify-reload"] if systemd_version() < NOTIFY_RELOAD_SINCE else []
    )
    assert (verified.returncode, ours) == (0, too_old)


def test_verifier_fires_on_a_line_that_systemd_does_not_know(installed: Path) -> None:
    installed.write_text(installed.read_text().replace("UMask", "Umask"))
    assert "Unknown key" in systemd_analyze("verify", "--man=no", installed).stderr


def test_service_is_little_exposed() -> None:
    unit = SYSTEM / "weightcache.service"
    judged = systemd_analyze("security", "--no-pager", "--offline=yes", f"--threshold={EXPOSURE}", unit)
    assert judged.returncode == 0, judged.stdout


# -- what the units say


def test_service_speaks_the_protocol_of_reloads_where_systemd_knows_it(service: dict[str, list[str]]) -> None:
    assert service["Type"] == ["notify", "notify-reload"]
    assert "ExecReload" not in service  # beside notify-reload it would be a second SIGHUP


def test_service_of_the_system_owns_the_folder_that_its_socket_lies_in() -> None:
    service, socket = (read_unit(SYSTEM / f"weightcache.{kind}")[kind.title()] for kind in ("service", "socket"))
    path = only(socket["ListenStream"])
    assert path == f"%t/{only(service['RuntimeDirectory'])}/daemon.sock"
    assert path.replace("%t", "/run") == str(read_settings_of(CONFIGURATION).socket_path)
    assert only(service["RuntimeDirectoryPreserve"]) == "yes"  # or a stop would take the socket from its unit
    assert (socket["SocketUser"], socket["SocketGroup"]) == (service["User"], service["Group"])


def test_socket_of_a_user_lies_where_processes_look_by_themselves(tmp_path: Path) -> None:
    path = only(read_unit(USER / "weightcache.socket")["Socket"]["ListenStream"])
    settings = read_settings({"HOME": str(tmp_path)})
    assert path.replace("%C", f"{tmp_path}/.cache") == str(settings.socket_path)


def test_g24_folders_and_socket_are_the_daemon_s_alone(
    service: dict[str, list[str]], socket: dict[str, list[str]]
) -> None:
    modes = {name: only(values) for name, values in service.items() if name.endswith("DirectoryMode")}
    assert {name.removesuffix("Mode") for name in modes} == {name for name in service if name.endswith("Directory")}
    assert {*modes.values(), only(socket["DirectoryMode"])} == {"0700"}
    assert only(socket["SocketMode"]) == "0600"
    assert only(service["UMask"]) == "0077"


def test_service_of_the_system_uses_the_folders_that_it_is_given(tmp_path: Path) -> None:
    service = read_unit(SYSTEM / "weightcache.service")["Service"]
    environment = dict(each.split("=", 1) for each in only(service["Environment"]).split())
    assert environment == {
        "WEIGHTCACHE_CONFIG": "%E/weightcache/weightcache.toml",
        "WEIGHTCACHE_DIR": f"%C/{only(service['CacheDirectory'])}",
    }
    user, *_ = re.findall(r"(?m)^u (\w+) - \".*\" (\S+)$", (SYSTEM / "weightcache.sysusers").read_text())
    assert user == (only(service["User"]), f"/var/lib/{only(service['StateDirectory'])}")


def test_service_that_hangs_or_dies_starts_again_but_not_one_that_is_misconfigured(
    service: dict[str, list[str]],
) -> None:
    assert int(only(service["WatchdogSec"])) > 0
    assert (only(service["Restart"]), only(service["RestartSec"])) == ("on-failure", "1")
    assert {*map(int, only(service["RestartPreventExitStatus"]).split())} == {
        ConfigError.exit_code,
        CacheFormatError.exit_code,
    }


def test_service_is_drained_before_it_is_killed(service: dict[str, list[str]]) -> None:
    assert (only(service["KillSignal"]), only(service["KillMode"])) == ("SIGTERM", "mixed")
    assert int(only(service["TimeoutStopSec"])) >= 30


def test_units_start_together_and_are_enabled_together(folder: Path) -> None:
    service, socket = (read_unit(folder / f"weightcache.{kind}") for kind in ("service", "socket"))
    assert only(service["Unit"]["Requires"]) == only(service["Install"]["Also"]) == "weightcache.socket"
    assert only(socket["Install"]["WantedBy"]) == "sockets.target"
    assert only(service["Install"]["WantedBy"]) == ("default.target" if folder == USER else "multi-user.target")


def test_weights_are_not_swapped_and_the_cache_goes_before_what_it_serves(service: dict[str, list[str]]) -> None:
    assert only(service["MemorySwapMax"]) == "0"
    assert 0 < int(only(service["OOMScoreAdjust"])) <= 1000
