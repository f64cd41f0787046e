"""The Dockerfile: what it copies is there and let in, nobody is root, torch stays out, and its health check is the daemon's."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CONFIGURATION = DEPLOY / "weightcache.toml"
NO_BYTE_CODE = ("weightcache/__pycache__/cli.pyc", "weightcache/_engine.abi3.so")


def instructions() -> list[tuple[str, str]]:
    """Return (instruction, what follows it) of the Dockerfile, lines joined."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    split = [line.partition(" ") for line in "\n".join(lines).replace("\\\n", " ").splitlines()]
    return [(name, rest.strip()) for name, _, rest in split]


def all_of(name: str) -> list[str]:
    return [rest for each, rest in instructions() if each == name]


def test_every_line_is_an_instruction() -> None:
    known = {
        *("FROM", "RUN", "COPY", "ENV", "WORKDIR", "USER", "VOLUME"),
        *("STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"),
    }
    assert {name for name, _ in instructions()} <= known


def copied() -> list[str]:
    """Return what is copied from the build's context."""
    copies = [shlex.split(rest)[:-1] for rest in all_of("COPY")]
    return [word for words in copies if not words[0].startswith("--from=") for word in words]


def is_let_in(path: str) -> bool:
    """Tell whether .dockerignore lets a path in: the last pattern that fits it, or a folder above it, decides."""
    let_in = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if pattern and not pattern.startswith("#"):
            above = [path, *map(str, Path(path).parents)]
            if any(fnmatch(each, pattern.lstrip("!").replace("**/", "*")) for each in above):
                let_in = pattern.startswith("!")
    return let_in


@pytest.mark.parametrize("path", copied())
def test_what_is_copied_is_there_and_let_in(path: str) -> None:
    assert (ROOT / path).exists()
    assert is_let_in(path)


@pytest.mark.parametrize("path", [".git/config", ".venv/bin/python", "tests/conftest.py", "build/x.whl", *NO_BYTE_CODE])
def test_what_is_not_needed_is_kept_out(path: str) -> None:
    assert not is_let_in(path)


def test_wheel_can_be_built_of_what_is_copied() -> None:
    """What setup.py and pyproject.toml name must be in the build's context."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = [project["project"]["readme"], *project["project"]["license-files"], "setup.py", "pyproject.toml", "ext"]
    packages = {each.partition(".")[0] for each in project["tool"]["setuptools"]["packages"]}
    assert {*named, *packages, *project["tool"]["setuptools"]["package-dir"].values()} <= set(copied())


def test_stages_are_of_one_python_that_the_package_supports() -> None:
    images = [rest.partition(" ")[0] for rest in all_of("FROM")]
    assert len(images) == 2 and len(set(images)) == 1  # the second runs the virtual environment of the first
    version = re.fullmatch(r"python:(\d+)\.(\d+)-slim", images[0])
    assert version and (int(version[1]), int(version[2])) >= (3, 11)


def test_daemon_is_not_root_and_owns_its_folders() -> None:
    assert all_of("USER") == ["10001:10001"]
    (made,) = [rest for rest in all_of("RUN") if "useradd" in rest]
    assert "--uid 10001" in made and "--gid 10001" in made
    folders = set(json.loads(all_of("VOLUME")[0]))
    environment = dict(each.split("=", 1) for each in shlex.split(all_of("ENV")[0]))
    socket = tomllib.loads(CONFIGURATION.read_text())["socket"]
    assert folders == {environment["WEIGHTCACHE_DIR"], str(Path(socket).parent)}
    assert re.search(r"install -d -m 0700 -o weightcache -g weightcache (.*)$", made)
    assert folders <= set(made.split())


@pytest.mark.parametrize("command", all_of("RUN"))
def test_shell_understands_every_command(command: str) -> None:
    subprocess.run(["sh", "-n", "-c", command], check=True, timeout=60)


def test_container_is_asked_for_its_health_where_its_configuration_serves_it() -> None:
    command = json.loads(all_of("HEALTHCHECK")[0].partition("CMD ")[2])
    http = tomllib.loads(CONFIGURATION.read_text())["daemon"]["http"]
    assert f"'http://{http}/healthz'" in command[-1]
    assert subprocess.run([sys.executable, *command[1:]], capture_output=True, timeout=60).returncode != 0  # none runs


def test_command_is_the_daemon_in_the_foreground() -> None:
    assert [json.loads(*all_of(name)) for name in ("ENTRYPOINT", "CMD")] == [["weightcache"], ["daemon"]]
    assert all_of("STOPSIGNAL") == ["SIGTERM"]


def test_requirements_are_the_project_s_without_torch(tmp_path: Path) -> None:
    extras = ["cli", "daemon", "signing"]
    assert any(f"deploy/requirements.py {' '.join(extras)} > requirements.txt" in rest for rest in all_of("RUN"))
    done = subprocess.run(
        [sys.executable, DEPLOY / "requirements.py", *extras], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])}
    (left_out,) = wanted - set(done.stdout.splitlines())
    assert left_out.startswith("torch>=") and set(done.stdout.splitlines()) < wanted


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it is an ImportError
import weightcache
weightcache.prefetch(sys.argv[1], tier="host")
print(weightcache.metrics())
"""


def test_prefetch_to_host_memory_works_where_there_is_no_torch(tmp_path: Path) -> None:
    import models

    (tmp_path / "model").mkdir()
    models.write_safetensors(tmp_path / "model" / "model.safetensors", {"a": ("F32", (64, 32))})
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "model")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "weightcache_load_bytes_total" in done.stdout
