"""The Python of docs/stacks/transformers.md and diffusers.md runs as it stands, and prints what stands below it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from models import minilm_folder
from servers import Bucket
from stack_models import write_llama, write_lora, write_stable_diffusion, write_unet

import weightcache

STACKS = Path(__file__).parents[2] / "docs" / "stacks"
PART = re.compile(r"```python\n(?P<code>.*?)```(?:\n\n```text\n(?P<printed>.*?)```)?", re.DOTALL)


@pytest.mark.parametrize("name", ["transformers", "diffusers"])
def test_a_page_runs_as_it_stands(name: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    if name == "transformers":
        write_llama(made / "llama")
        bucket.upload(minilm_folder(), "minilm")
    else:
        write_stable_diffusion(made / "stable")
        write_unet(made / "tuned", seed=7)
        write_lora(made / "lora")
    bucket.upload(made, "")
    for variable, value in bucket.server.environment().items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "weightcache": weightcache}
    blocks = list(PART.finditer((STACKS / f"{name}.md").read_text()))
    assert len(blocks) >= 3
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block["code"].replace("s3://models", bucket.url), names)
        assert printed.getvalue() == (block["printed"] or ""), block["code"]
