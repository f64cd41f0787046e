"""Own a checkpoint at an S3 server behind the counting proxy: what the tests of whole loads begin with.

Never imports weightcache.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from reference import tensors_of
from servers import Bucket, Proxy

WEIGHTS = r"\.safetensors(\?|$)"  # a signed address has a query


@dataclass
class Hosted:
    """A folder's files in a bucket; `options` lead to them through the proxy."""

    folder: Path
    bucket: Bucket
    prefix: str
    proxy: Proxy

    @property
    def url(self) -> str:
        return f"{self.bucket.url}/{self.prefix}"

    @property
    def options(self) -> dict[str, str]:
        return self.bucket.server.storage_options(self.proxy.endpoint)

    @property
    def environment(self) -> dict[str, str]:
        """What leads to them without options."""
        return self.bucket.server.environment(self.proxy.endpoint)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        """What a load must give."""
        return tensors_of(self.folder)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    @property
    def n_shards(self) -> int:
        return len(list(self.folder.rglob("*.safetensors")))

    def served_bytes(self) -> int:
        """Return the bytes of safetensors files that the proxy has sent since its last reset."""
        return self.proxy.body_bytes(WEIGHTS)


def host(folder: Path, bucket: Bucket, proxy: Proxy, prefix: str = "models/tiny") -> Hosted:
    """Upload a folder and forget what that took."""
    bucket.upload(folder, prefix)
    proxy.reset()
    return Hosted(folder, bucket, prefix, proxy)
