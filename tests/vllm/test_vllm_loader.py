"""vLLM with `--load-format weightcache` generates what it generates when it loads a model itself: from a bucket, from disk,
hot from the node daemon, on two ranks, and after another model was loaded into the place of the first.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import vllm_engine as engine
from hosted import Hosted, host
from nodes import Node, wait_until
from served_hub import ServedHub
from servers import Bucket, Proxy
from vllm_engine import Tokens

import weightcache

Make = Callable[..., Any]
Both = tuple[Tokens, Tokens]

END_TIMEOUT_S = 120.0


@pytest.fixture
def hosted(folders: tuple[Path, Path], bucket: Bucket, proxy: Proxy) -> Hosted:
    return host(folders[0], bucket, proxy, "models/one")


@pytest.fixture
def config(hosted: Hosted, tmp_path: Path) -> str:
    """What vLLM takes for the model: a folder that has no weights."""
    weightcache.pull(hosted.url, tmp_path / "config", weights=False, headers=True, storage_options=hosted.options)
    hosted.proxy.reset()
    return str(tmp_path / "config")


def test_from_a_bucket_and_then_offline_from_disk(
    hosted: Hosted, config: str, expected: Both, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.generate(make(model=config, uri=hosted.url, storage_options=hosted.options)) == expected[0]
    assert 0 < hosted.served_bytes() <= 1.01 * hosted.nbytes
    hosted.proxy.reset()
    monkeypatch.setenv("WEIGHTCACHE_OFFLINE", "1")
    assert engine.generate(make(model=config, uri=hosted.url, storage_options=hosted.options)) == expected[0]
    assert hosted.proxy.requests == []


def test_hot_from_the_node_daemon(hosted: Hosted, config: str, expected: Both, make: Make, node: Node) -> None:
    weightcache.warm(hosted.url, storage_options=hosted.options)
    hosted.proxy.reset()
    n_hits = node.image(hosted.url).get("n_hits", 0)
    assert engine.generate(make(model=config, uri=hosted.url, storage_options=hosted.options)) == expected[0]
    assert hosted.served_bytes() == 0
    wait_until(lambda: node.image(hosted.url).get("n_hits", 0) > n_hits)


def test_reloads_from_the_place_that_is_named_and_stays_there(
    hosted: Hosted, config: str, folders: tuple[Path, Path], expected: Both, make: Make
) -> None:
    other = hosted.bucket.upload(folders[1], "models/other")
    made = make(model=config, uri=hosted.url, storage_options=hosted.options)
    engine.reload(made)
    assert engine.generate(made) == expected[0]
    engine.reload(made, other)
    assert engine.generate(made) == expected[1]
    engine.reload(made)
    assert engine.generate(made) == expected[1]
    engine.reload(made, str(folders[0]))
    assert engine.generate(made) == expected[0]


def test_says_in_vllms_log_where_the_bytes_came_from(
    folders: tuple[Path, Path], make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    make(model=str(folders[0]), load_format="weightcache")
    (said,) = [record.getMessage() for record in caplog.records if record.name == "vllm.weightcache"]
    assert re.match(rf"weights of {folders[0]}: 39 tensors, 0.004 GB in .* 0.004 GB from the origin, ", said)


def test_refuses_an_extra_config_it_does_not_know(folders: tuple[Path, Path], make: Make) -> None:
    with pytest.raises(weightcache.errors.ConfigError, match="did you mean 'storage_options'"):
        make(model=str(folders[0]), load_format="weightcache", model_loader_extra_config={"storage_option": {}})


class Apart:
    """An engine in a process of its own, or in one a rank, made by the first question."""

    def __init__(self, log: Path) -> None:
        environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, engine.__file__],
                env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.log = log

    def ask(self, question: dict[str, Any]) -> Tokens:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(question), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-5000:]
        tokens: Tokens = json.loads(line)
        return tokens


@contextmanager
def apart(log: Path) -> Iterator[Apart]:
    started = Apart(log)
    try:
        yield started
    finally:
        started.process.communicate(timeout=END_TIMEOUT_S)


def test_two_ranks_read_the_origin_once_and_hold_one_image(
    hosted: Hosted, config: str, expected: Both, tmp_path: Path, start: Callable[..., Node]
) -> None:
    options = {"model": config, "uri": hosted.url, "storage_options": hosted.options, "tensor_parallel_size": 2}
    with apart(tmp_path / "ranks.log") as two:
        assert two.ask({"engine": options}) == expected[0]
        assert 0 < hosted.served_bytes() <= 1.01 * hosted.nbytes
        hosted.proxy.reset()
        node = start()
        assert two.ask({"reload": None}) == expected[0]
        assert hosted.served_bytes() == 0
        (image,) = node.images().values()
        assert image["uri"] == hosted.url
        assert image["n_hits"] >= 2


def test_takes_uris_for_models_where_that_is_set(
    hosted: Hosted, expected: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in hosted.environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "weightcache.toml").write_text("vllm_uris = true\n")
    monkeypatch.setenv("WEIGHTCACHE_CONFIG", str(tmp_path / "weightcache.toml"))
    with apart(tmp_path / "vllm.log") as one:
        assert one.ask({"engine": {"model": hosted.url}}) == expected[0]
        assert one.ask({"reload": None}) == expected[0]
    assert f"weights of {hosted.url}: 39 tensors" in (tmp_path / "vllm.log").read_text()
    assert hosted.served_bytes() <= 1.01 * hosted.nbytes + hosted.n_shards * engine.HEADER_NBYTES


@pytest.mark.parametrize("way", ["HF_ENDPOINT", "HF_HUB_OFFLINE"])
def test_finds_a_model_as_at_the_hub_without_any_of_our_code(
    way: str, hosted: Hosted, expected: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in hosted.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VLLM_PLUGINS", "")  # ours is not even imported
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with ServedHub({"org/one": hosted.url}) as face:
        if way == "HF_ENDPOINT":
            monkeypatch.setenv(way, face.url)
        else:
            weightcache.materialise(hosted.url, "org/one", cache_dir=tmp_path / "hf" / "hub")
            monkeypatch.setenv(way, "1")
        with apart(tmp_path / "vllm.log") as one:
            assert one.ask({"engine": {"model": "org/one"}}) == expected[0]


@pytest.mark.parametrize("release", ["0.31.2", "0.34.0", "1.0.0"])
def test_changes_no_release_that_it_does_not_know(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import vllm
    from vllm.config.vllm import VllmConfig

    from weightcache.loaders.vllm_uris import take_uris

    monkeypatch.setattr(vllm, "__version__", release)
    before = VllmConfig.try_verify_and_update_config
    take_uris("weightcache", tmp_path)
    assert VllmConfig.try_verify_and_update_config is before
    assert f"vLLM is {release}, known are 0.32.*, 0.33.*" in caplog.text
