"""SGLang's own loading code, over weightcache: the same parameters as with its default loader, first and reloaded.

Its wheel is fetched and unpacked beside pip's cache, once; it needs no GPU for this, and no kernel of it is run. Another
release: `make test-sglang SGLANG=0.5.21`.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import sglang_parts
from children import Child
from models import write_tiny_sharded
from servers import Bucket, S3Server

import weightcache
from weightcache import errors
from weightcache.loaders import sglang_loader

ANSWER_TIMEOUT_S = 300.0
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheels() -> Path:
    """Return the folder that SGLang lies in."""
    pytest.importorskip("transformers", reason="NOT TESTED: SGLang needs transformers")
    try:
        return sglang_parts.fetch()
    except sglang_parts.NotToBeHad as exc:
        pytest.skip(f"NOT TESTED: {exc}")


@pytest.fixture(scope="module")
def sglang(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Child]:
    """A process with SGLang, which finds our entry point as pyproject.toml has it."""
    about = tmp_path_factory.mktemp("about")
    distribution = about / "weightcache-0.dist-info"
    distribution.mkdir()
    (distribution / "METADATA").write_text("Metadata-Version: 2.1\nName: weightcache\nVersion: 0\n")
    project = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]
    [(name, place)] = project["entry-points"]["sglang.srt.plugins"].items()
    (distribution / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {place}\n")
    with Child(TESTS / "sglang_host.py", wheels, about) as child:
        assert child.hear(ANSWER_TIMEOUT_S) == "ready"
        yield child


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two folders of equal models with other weights."""
    folder = tmp_path_factory.mktemp("models")
    for seed in range(2):
        write_tiny_sharded(folder / str(seed), seed=seed)
    return folder / "0", folder / "1"


class Failed(Exception):
    """What SGLang said when it gave up."""


def ask(child: Child, command: str, given: object) -> Any:
    child.tell({command: given})
    answer = child.hear(ANSWER_TIMEOUT_S)
    if "failed" in answer:
        raise Failed(answer["failed"])
    return answer


def serve(child: Child, model: Path, extra: object = None) -> Any:
    """Load by SGLang's own loader, or by ours where there is an extra config."""
    ours = [] if extra is None else ["--load-format", "weightcache", "--model-loader-extra-config", json.dumps(extra)]
    return ask(child, "serve", ["--model-path", str(model), *ours])


def small_files(model: Path, folder: Path) -> Path:
    """Return a folder of a model's configuration and tokenizer."""
    weightcache.pull(model, folder, weights=False)
    return folder


def test_parameters_are_those_of_the_default_loader(
    sglang: Child, models: tuple[Path, Path], s3: S3Server, bucket: Bucket, tmp_path: Path
) -> None:
    expected = serve(sglang, models[0])
    assert expected["loader"] == "DefaultModelLoader"
    extra = {"uri": bucket.upload(models[0], "llama"), "storage_options": s3.storage_options()}
    ours = serve(sglang, small_files(models[0], tmp_path / "small"), extra)
    assert ours == {"loader": "WeightcacheModelLoader", "parameters": expected["parameters"]}


def test_reload_brings_the_model_of_its_path_and_not_that_of_the_extra_config(
    sglang: Child, models: tuple[Path, Path], tmp_path: Path
) -> None:
    expected = serve(sglang, models[1])["parameters"]
    first = serve(sglang, small_files(models[0], tmp_path / "small"), {"uri": str(models[0])})
    assert first["parameters"] != expected
    assert ask(sglang, "reload", str(models[1])) == {
        "reload": [True, "Succeeded to update model weights."],
        "parameters": expected,
    }


def test_reload_of_what_has_no_weights_leaves_those_that_are_there(
    sglang: Child, models: tuple[Path, Path], tmp_path: Path
) -> None:
    beside = small_files(models[0], tmp_path / "small")
    first = serve(sglang, beside, {"uri": str(models[0])})
    answer = ask(sglang, "reload", str(beside))
    done, told = answer["reload"]
    assert not done
    assert told.startswith("Failed to get weights iterator: ")
    assert answer["parameters"] == first["parameters"]


def test_draft_has_the_weights_of_its_own_path(sglang: Child, models: tuple[Path, Path], tmp_path: Path) -> None:
    expected = serve(sglang, models[1])["parameters"]
    serve(sglang, small_files(models[0], tmp_path / "small"), {"uri": str(models[0])})
    assert ask(sglang, "draft", str(models[1])) == {"loader": "WeightcacheModelLoader", "parameters": expected}


def test_unknown_key_is_refused_with_the_nearest_one(sglang: Child, models: tuple[Path, Path]) -> None:
    with pytest.raises(Failed, match=r"ConfigError: unknown key 'url' .* \(did you mean 'uri'\?\)"):
        serve(sglang, models[0], {"url": "s3://bucket/llama"})


@pytest.mark.parametrize("version", ["0.5.20", "0.6.0"])
def test_another_release_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(errors.ConfigError, match=f"SGLang is {version}, known are 0.5.21 to 0.5.23"):
        sglang_loader.register()
