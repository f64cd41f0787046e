"""A fork beside an open model: the child works, and its end takes nothing from its parent."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
from children import Child
from reference import fingerprint, tensors_of

FORKING = Path(__file__).with_name("forking.py")


@pytest.mark.parametrize("mode", ["disk", "none"])
def test_g16_a_fork_beside_an_open_model_harms_neither(tmp_path: Path, mode: str) -> None:
    models.write_tiny_sharded(tmp_path / "model")
    expected = fingerprint(tensors_of(tmp_path / "model"))
    in_use = [True] if mode == "disk" else []
    with Child(FORKING, tmp_path / "model", mode) as child:
        for what in ("its tensors in the child", "a load in the child", "after the child", "another load"):
            assert child.hear() == [what, expected, True, in_use]
        assert child.wait() == 0
