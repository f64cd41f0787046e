"""Show the main way on this machine: a real model from a real S3 bucket, cold, then from disk, then offline.

Starts its own S3 server on loopback, uploads the model with an ordinary S3 client, and ends by comparing a sentence
embedding computed from the loaded tensors with one from the original file, bit for bit. Needs no network.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from models import minilm_folder
from servers import S3Server

import weightcache

SENTENCE = "Weights near the GPU, and not on it."


def main() -> None:
    original = minilm_folder()
    with tempfile.TemporaryDirectory() as cache_folder, S3Server() as server:
        os.environ["WEIGHTCACHE_DIR"] = cache_folder
        client = server.client()
        client.create_bucket(Bucket="models")
        for path in sorted(original.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), "models", f"minilm/{path.relative_to(original)}")
        client.close()
        uri, options = "s3://models/minilm", server.storage_options()
        print(f"{uri} on {server.endpoint}: {sum(p.stat().st_size for p in original.rglob('*')):,} bytes uploaded\n")

        rows = [("cold", load(uri, storage_options=options)), ("warm", load(uri, storage_options=options))]
        server.stop()
        with weightcache.load_model(uri, device="cpu", storage_options=options, offline=True) as model:
            rows.append(("offline, server stopped", model.report))
            loaded = embedding(model.files["config.json"].parent, model)
        expected = embedding(original, reference(original))
    print(f"{'':24} {'origin bytes':>13} {'disk bytes':>13} {'seconds':>8} {'GB/s':>6}")
    for label, report in rows:
        seconds = report.total_s - report.seconds["import"]
        print(
            f"{label:24} {report.bytes['origin']:>13,} {report.bytes['disk']:>13,} {seconds:>8.3f} {report.gb_per_s:>6.2f}"
        )
    same = torch.equal(loaded, expected)
    print(f"\nembedding of {SENTENCE!r}: {[round(value, 4) for value in loaded[0, :4].tolist()]}…")
    print(f"equal, to the bit, to the one from the original file: {same}")
    if not same:
        sys.exit(1)


def load(uri: str, **options: Any) -> Any:
    """Load once, wait until the disk tier has it all, and return the report."""
    with weightcache.load_model(uri, device="cpu", **options) as model:
        model.wait_stored()
        return model.report


def reference(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors as everybody does."""
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def embedding(folder: Path, tensors: Any) -> torch.Tensor:
    """Compute the model's sentence embedding: mean over tokens, normalised."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    module = BertModel(BertConfig.from_pretrained(folder)).eval()
    module.load_state_dict({name: tensors[name] for name in module.state_dict()})
    tokens = AutoTokenizer.from_pretrained(folder)([SENTENCE], return_tensors="pt")
    with torch.no_grad():
        hidden = module(**tokens).last_hidden_state
    weights = tokens["attention_mask"].unsqueeze(-1)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=1)


if __name__ == "__main__":
    main()
