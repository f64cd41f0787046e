"""The doctor: it finds, advises, never fails, never dials and never shows a secret."""

from __future__ import annotations

import resource
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from cache_folder import staged_files

from weightcache import diagnosis, machine
from weightcache.diagnosis import CHECKS, Finding, examine
from weightcache.files import write_all

SECRET = "notforyoureyes"


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "PROBE_NBYTES", 4 << 20)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def dial(*_: Any) -> None:
        raise AssertionError("the doctor dials")

    monkeypatch.setattr(socket.socket, "connect", dial)
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")


@pytest.fixture
def profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The AWS configuration file."""
    path = tmp_path / "aws"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(path))
    return path


def found(name: str) -> Finding:
    return diagnosis._examine(name, CHECKS[name])


def test_every_check_finds_something_on_this_machine() -> None:
    findings = examine()
    assert [finding.name for finding in findings] == list(CHECKS)
    assert all(finding.value for finding in findings)
    assert [finding for finding in findings if not finding.ok] == []
    assert all(finding.as_dict().keys() == {"name", "value", "ok", "advice"} for finding in findings)


def test_check_that_fails_is_a_finding_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> diagnosis._Seen:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr(diagnosis, "CHECKS", {"luck": fail, "open files": CHECKS["open files"]})
    broken, sound = examine()
    assert (broken.name, broken.ok, sound.ok) == ("luck", False, True)
    assert "of all things" in broken.value
    assert broken.advice


# -- disk


def test_disk_speed_leaves_nothing_behind(tmp_path: Path) -> None:
    seen = found("disk speed")
    assert seen.ok
    assert "GB/s" in seen.value
    assert staged_files(tmp_path / "cache") == []


def test_disk_that_returns_other_bytes_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "write_all", lambda fd, content: write_all(fd, bytes(len(content))))
    assert not found("disk speed").ok


@pytest.mark.parametrize("name", ["cache folder", "disk speed"])
def test_folder_that_cannot_be_written_is_broken(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("WEIGHTCACHE_DIR", str(tmp_path / "file" / "cache"))
    seen = found(name)
    assert not seen.ok
    assert str(tmp_path / "file" / "cache") in seen.value
    assert seen.advice


def test_setting_that_makes_no_sense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCACHE_OFLINE", "1")
    assert "did you mean 'WEIGHTCACHE_OFFLINE'?" in found("cache folder").value


def test_budget_beyond_the_disk_is_advised_against(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTCACHE_DISK_BUDGET_BYTES", "900TB")
    seen = found("cache folder")
    assert seen.ok
    assert "WEIGHTCACHE_DISK_BUDGET_BYTES" in seen.advice


# -- memory and processors


@pytest.mark.parametrize(
    ("setting", "mode", "advised"),
    [
        ("always madvise [never]\n", "never", True),
        ("always [madvise] never\n", "madvise", False),
        (None, "none", False),
    ],
)
def test_huge_page_mode_is_the_word_in_brackets(
    setting: str | None, mode: str, advised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "HUGE_PAGES", tmp_path)
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    seen = found("huge pages")
    assert seen.value.startswith(f"{mode}; ")
    assert ("echo madvise" in seen.advice) == advised


def join_cgroups(root: Path, monkeypatch: pytest.MonkeyPatch, membership: str, files: Mapping[str, str]) -> None:
    for name, text in {"membership": membership, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUPS", root)
    monkeypatch.setattr(machine, "CGROUP_MEMBERSHIP", root / "membership")


NO_LIMIT_V1 = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("membership", "files", "says"),
    [
        ("0::/a/b\n", {"a/memory.max": "1000000\n", "a/b/memory.max": "max\n"}, "cgroup limit 1.0 MB"),
        ("0::/of/the/host\n", {"memory.max": "2000000\n"}, "cgroup limit 2.0 MB"),
        ("0::/a\n", {"a/memory.max": "max\n"}, "no cgroup limit"),
        ("4:memory:/a\n", {"memory/a/memory.limit_in_bytes": "3000000\n"}, "cgroup limit 3.0 MB"),
        ("4:cpu,memory:/\n0::/\n", {"memory/memory.limit_in_bytes": NO_LIMIT_V1}, "no cgroup limit"),
        ("5:pids:/a\n", {}, "no cgroup limit"),
    ],
)
def test_least_memory_limit_of_all_cgroups_counts(
    membership: str, files: Mapping[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_cgroups(tmp_path, monkeypatch, membership, files)
    seen = found("memory")
    assert says in seen.value
    assert bool(seen.advice) == ("no cgroup limit" not in says)


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("0::/a\n", {"a/cpu.max": "50000 100000\n", "cpu.max": "max 100000\n"}),
        ("1:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_quota_us": "-1\n"}),
    ],
)
def test_processor_time_is_limited_by_cgroups(
    membership: str, files: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    join_cgroups(tmp_path, monkeypatch, membership, files)
    assert "the time of 0.5 by cgroup" in found("processors").value


def test_few_open_files_are_advised_against(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    seen = found("open files")
    assert seen.value == "256, can be raised to 4096"
    assert "ulimit -n" in seen.advice


# -- S3


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("profile_lines", "environment", "value"),
    [
        ("", {}, "none in the environment or in files"),
        ("", {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET}, "found: env"),
        (f"aws_access_key_id = key\naws_secret_access_key = {SECRET}", {}, "found: config-file"),
        ("role_arn = arn\ncredential_source = Ec2InstanceMetadata", {}, "found: assume-role, not tried"),
        ("credential_process = touch {witness}", {}, "found: custom-process, not tried"),
        (
            "",
            {"AWS_WEB_IDENTITY_TOKEN_FILE": "/no", "AWS_ROLE_ARN": "arn"},
            "found: assume-role-with-web-identity",
        ),
        ("", {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:1"}, "none in the environment or in files"),
    ],
)
def test_credentials_are_named_without_dialling_or_running(
    profile_lines: str,
    environment: Mapping[str, str],
    value: str,
    profile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    witness = tmp_path / "ran"
    profile.write_text("[default]\n" + profile_lines.replace("{witness}", str(witness)))
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    seen = found("s3 credentials")
    assert (seen.value, seen.ok) == (value, True)
    assert SECRET not in repr(seen)
    assert not witness.exists()


@pytest.mark.parametrize(
    "environment", [{"AWS_ACCESS_KEY_ID": SECRET}, {"AWS_PROFILE": "nobody"}, {"AWS_CONFIG_FILE": "/dev/zero/x"}]
)
def test_credentials_that_are_broken_say_so(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    seen = found("s3 credentials")
    assert SECRET not in repr(seen)
    assert seen.ok == ("AWS_CONFIG_FILE" in environment)  # a file that is not there is none
    assert seen.advice


@pytest.mark.usefixtures("no_network")
def test_endpoint_and_proxy_are_shown_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"https://user:{SECRET}@store.example:9000")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{SECRET}@proxy.example:3128")
    assert found("s3 endpoint").value == "https://store.example:9000, region eu-west-1"
    seen = found("proxy")
    assert seen.value == "http://proxy.example:3128 before the S3 endpoint"
    assert "store.example" in seen.advice
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://store.example:9000")
    monkeypatch.setenv("NO_PROXY", "store.example")
    assert found("proxy").value == "none before the S3 endpoint"


@pytest.mark.parametrize("name", ["s3 endpoint", "proxy"])
def test_endpoint_that_is_no_url_is_broken_and_not_quoted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"ht tp://user:{SECRET}@host")
    seen = found(name)
    assert not seen.ok
    assert SECRET not in repr(seen)
