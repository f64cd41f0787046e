"""docs/writing-a-loader.md holds a loader that works: its code runs, as it stands, over a real bucket."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Shapes, write_safetensors
from reference import assert_same, tensors_of
from servers import Bucket, S3Server

from weightcache import errors

DOCUMENT = Path(__file__).parents[2] / "docs" / "writing-a-loader.md"
MOST_LINES = 40
SHAPES: Shapes = {
    "up.weight": ("BF16", (64, 32)),
    "up.bias": ("BF16", (64,)),
    "down.weight": ("BF16", (32, 64)),
    "unused": ("F32", (8,)),
}
N_RANKS = 2


class Mystack(torch.nn.Module):
    """A rank's half of the model that a folder's configuration describes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        width = json.loads((folder / "config.json").read_text())["width"]
        self.up = torch.nn.Linear(width, 2 * width // N_RANKS, dtype=torch.bfloat16)
        self.down = torch.nn.Linear(2 * width // N_RANKS, width, bias=False, dtype=torch.bfloat16)


class Larger(Mystack):
    """One that needs what the checkpoint has not."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = torch.nn.Linear(1, 1)


@pytest.fixture(scope="module")
def code() -> str:
    [block] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return str(block)


@pytest.fixture
def load(code: str) -> Any:
    names: dict[str, Any] = {}
    exec(code, names)
    return names["load"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", SHAPES)
    (folder / "config.json").write_text('{"width": 32}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_example_is_short(code: str) -> None:
    assert len([line for line in code.splitlines() if line.strip()]) <= MOST_LINES


def test_example_fills_each_rank_with_its_slice(
    load: Any, folder: Path, s3: S3Server, bucket: Bucket, tmp_path: Path
) -> None:
    url, whole, seen = bucket.upload(folder, "model"), tensors_of(folder), []
    ranks = []
    for rank in range(N_RANKS):
        beside = tmp_path / f"rank-{rank}"
        model, report = load(url, beside, Mystack, rank, lambda *done: seen.append(done), s3.storage_options())
        ranks.append(dict(model.named_parameters()))
        assert (beside / "tokenizer.json").read_text() == "{}"
        assert report.n_tensors == len(SHAPES) - 1
    axes = {"up.weight": 0, "up.bias": 0, "down.weight": 1}
    joined = {name: torch.cat([each[name] for each in ranks], axis) for name, axis in axes.items()}
    assert_same(joined, {name: whole[name] for name in axes})
    assert max(done for done, _ in seen) == seen[0][1] > 0


def test_example_refuses_a_checkpoint_that_lacks_a_tensor(load: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.MismatchError, match=r"gate\.bias"):
        load(str(folder), tmp_path / "beside", Larger)
