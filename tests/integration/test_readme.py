"""The README's Python runs as it stands, on a small model in a real bucket and the devices of a stand-in driver."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
from hosted import host
from servers import Bucket, Proxy
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
    server = bucket.server
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names = {"weightcache": weightcache, "uri": hosted.url, "module": Module()}
    for block in blocks:
        exec(block.replace("s3://bucket/llama-3-8b", hosted.url), names)
    assert (tmp_path / "folder" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    names["model"].close()
