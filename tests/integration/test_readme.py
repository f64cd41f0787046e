"""The README's Python and its commands on registries run as they stand: on a small model in a real bucket, on the devices
of a stand-in driver, on a store of two buckets.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
from commands import Run
from hosted import host
from servers import Bucket, Proxy, S3Server
from standin import StandIn, build_standin

import weightcache
from weightcache.tiers.device import close_devices
from weightcache.tiers.host import host_tier

README = Path(__file__).parents[2] / "README.md"
SHAPES: models.Shapes = {
    "model.embed_tokens.weight": ("BF16", (64, 32)),
    "model.layers.0.mlp.weight": ("F32", (32, 32)),
}


class Module(torch.nn.Module):
    """A module of the small model's names and shapes."""

    def __init__(self) -> None:
        super().__init__()
        for name, (_, shape) in SHAPES.items():
            inner = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(inner, part):
                    inner.add_module(part, torch.nn.Module())
                inner = getattr(inner, part)
            inner.register_parameter(last, torch.nn.Parameter(torch.zeros(shape)))


@pytest.fixture
def driver(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = build_standin(tmp_path_factory.mktemp("standin"))
    monkeypatch.setenv("WEIGHTCACHE_LIBCUDA", str(library))
    standin = StandIn(library)
    standin.reset()
    standin.configure("devices=2")
    yield
    for image in host_tier.images():
        host_tier.drop(image.uri)
    close_devices()
    assert standin.violations() == []
    standin.reset()


def test_readme_python_runs(
    tmp_path: Path, bucket: Bucket, proxy: Proxy, driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    models.write_safetensors(folder / "model.safetensors", SHAPES)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    hosted = host(folder, bucket, proxy)
    for name, value in hosted.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names = {"weightcache": weightcache, "uri": hosted.url, "module": Module()}
    for block in blocks:
        exec(block.replace("s3://bucket/llama-3-8b", hosted.url), names)
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    names["model"].close()


def test_readme_publishes_once_and_reads_anywhere(
    tmp_path: Path, s3: S3Server, run_here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("llama", "tuned")):
        (tmp_path / name).mkdir()
        models.write_safetensors(tmp_path / name / "model.safetensors", SHAPES, seed)
    buckets = [s3.create_bucket() for _ in range(2)]
    replica = '[[stores.prod.replicas]]\nname = "{0}"\nurl = "s3://{0}/registry"\nendpoint = "{1}"\naccess = "write"\n'
    (tmp_path / "weightcache.toml").write_text("".join(replica.format(each.name, s3.endpoint) for each in buckets))
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", str(tmp_path / "weightcache.toml"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    monkeypatch.chdir(tmp_path)
    section = README.read_text().partition("## Publish once, read anywhere")[2]
    commands = section.partition("```bash\n")[2].partition("```")[0].splitlines()
    assert len(commands) == 5
    for command in commands:
        ran = run_here(*shlex.split(command, comments=True)[1:])
        assert (ran.returncode, ran.stderr) == (0, "")
    for bucket in buckets:
        bucket.remove()
