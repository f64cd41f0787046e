"""Own a registry of two tiny models as its files, of which the second shares half its chunks with the first.

Never writes anything.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import cache

from reference_residency import PolicyForm
from strategies import in_a_row

from weightcache.chunking import cut_safetensors
from weightcache.digest import Digest
from weightcache.manifest import Role, Shard
from weightcache.origins.chunked import chunk_name
from weightcache.published import Published, publish_form
from weightcache.registry import ABOUT, revision_name, tag_name
from weightcache.residency import Policy

LIMIT = 4096  # of a chunk: a page, which tensors of several chunks must be cut at
TAG = "v1"
SIZES = (4096, 4096, 900, 4096, 100, 4096, 5000, 4096)  # of tensors


def _shard(content: bytes) -> Shard:
    tensors = in_a_row(500, [("U8", (size,)) for size in SIZES])
    chunks = cut_safetensors(500, tensors, LIMIT)
    shard = Shard("model.safetensors", tensors[-1].stop, "1", Role.WEIGHTS, chunks, tensors)
    digests = {index: Digest.of(content[chunk.start : chunk.stop]) for index, chunk in enumerate(chunks)}
    return shard.with_digests(digests)


NBYTES = 500 + sum(SIZES)
CONTENTS = {"llama": random.Random(1).randbytes(NBYTES)}
CONTENTS["tuned"] = CONTENTS["llama"][: NBYTES // 2] + random.Random(2).randbytes(NBYTES - NBYTES // 2)
SHARDS = {model: _shard(content) for model, content in CONTENTS.items()}


@cache
def _published(model: str, policy: str) -> Published:
    return publish_form([SHARDS[model]], policy=Policy.from_form(json.loads(policy), "a test"))


def published(model: str, policy: PolicyForm) -> Published:
    return _published(model, json.dumps(policy))


def chunks_of(model: str) -> dict[str, bytes]:
    pieces = {chunk.digest: CONTENTS[model][chunk.start : chunk.stop] for chunk in SHARDS[model].chunks}
    return {chunk_name(digest.hex): piece for digest, piece in pieces.items() if digest is not None}


CHUNKS = {model: chunks_of(model) for model in CONTENTS}


def registry_files(rules: PolicyForm, models: Mapping[str, PolicyForm]) -> dict[str, bytes]:
    """Return a registry with these models, each at TAG."""
    files = {ABOUT: json.dumps({"version": 1, "chunk_limit_bytes": 1 << 24, "policy": rules}).encode()}
    for model, policy in models.items():
        revision = published(model, policy)
        digest = revision.manifest.revision
        tag = {
            "version": 1,
            "revision": str(digest),
            "previous": None,
            "moves": 1,
            "moved": "2026-01-01T00:00:00+00:00",
        }
        files |= {revision_name(model, digest): revision.raw, tag_name(model, TAG): json.dumps(tag).encode()}
        files |= CHUNKS[model]
    return files
