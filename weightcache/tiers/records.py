"""Own what this node remembers of models: shard records (header, cut, learned digests) and model records.

Never holds weight bytes; every record is a JSON file that appears whole or not at all.

    shards/<aa>/<key>.json       one shard of one state, keyed by (URL, size, ETag): shared by all models that name it
    models/<key>/record.json     one model: its URI and shards; its modification time is the model's last use
    models/<key>/manifest.json   of a published model, with its signatures
    models/<key>/files/…         its configuration and tokenizer as real files
    models/<key>/pinned          there while an operator pins the model
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightcache.digest import Digest
from weightcache.errors import FormatError
from weightcache.files import publish_bytes
from weightcache.manifest import FORMAT_VERSION, Shard, check_path, shard_from_json, shard_to_json

log = logging.getLogger(__name__)

PUBLISHED = "manifest.json"
MOST_RECALLED = 50_000  # tensors and chunks, of 0.3 KB each, that a process remembers the records of


def model_key(uri: str, endpoint: str) -> str:
    """Return the name of a model's folder: the same URI at another endpoint is another model."""
    return Digest.of(json.dumps([uri, endpoint]).encode()).hex[:32]


def shard_key(url: str, nbytes: int, etag: str) -> str:
    """Return the name of a shard's record."""
    return Digest.of(json.dumps([url, nbytes, etag]).encode()).hex[:32]


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """What is remembered of a model: its shards as (key, path, prefix)."""

    key: str
    uri: str
    endpoint: str
    shards: tuple[tuple[str, str, str], ...]
    last_use_s: float = 0.0
    pinned: bool = False


class _Recalled:
    """The shards that this process has recalled of late, by file and its state: reading one takes 5 us a tensor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._shards: dict[tuple[Path, str, str], tuple[tuple[int, ...], Shard]] = {}

    def get(self, name: tuple[Path, str, str], state: tuple[int, ...]) -> Shard | None:
        with self._lock:
            known = self._shards.get(name)
        return known[1] if known is not None and known[0] == state else None

    def put(self, name: tuple[Path, str, str], state: tuple[int, ...], shard: Shard) -> None:
        with self._lock:
            self._shards.pop(name, None)
            self._shards[name] = state, shard
            while sum(len(each.tensors) + len(each.chunks) for _, each in self._shards.values()) > MOST_RECALLED:
                del self._shards[next(iter(self._shards))]

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()


_recalled = _Recalled()
os.register_at_fork(after_in_child=_recalled.after_fork_in_child)


class Records:
    """The records below one cache folder. Safe to use from threads and processes."""

    def __init__(self, root: Path, staging: Path) -> None:
        self._shards = root / "shards"
        self._models = root / "models"
        self._staging = staging
        for folder in (self._shards, self._models):
            folder.mkdir(mode=0o700, exist_ok=True)

    def remember_shard(self, key: str, shard: Shard) -> None:
        publish_bytes(_dump(shard_to_json(shard)), self._shard_path(key), self._staging)

    def recall_shard(self, key: str, *, path: str, prefix: str = "") -> Shard | None:
        """Return the shard, or None when nothing valid is remembered. Raises CacheFormatError."""
        file = self._shard_path(key)
        try:
            found = file.stat()
            state = found.st_ino, found.st_mtime_ns, found.st_size
            shard = _recalled.get((file, path, prefix), state)
            if shard is None:
                shard = shard_from_json(json.loads(file.read_bytes()), path=path, prefix=prefix)
                _recalled.put((file, path, prefix), state, shard)
            return shard
        except FileNotFoundError:
            return None
        except (FormatError, ValueError) as exc:
            log.warning("a damaged record of %s is dropped: %s", path, exc)
            file.unlink(missing_ok=True)
            return None

    def forget_shard(self, key: str) -> None:
        self._shard_path(key).unlink(missing_ok=True)

    def remember_model(self, record: ModelRecord) -> None:
        """Write the record, unless what is there says the same."""
        known = self.recall_model(record.key)
        if known is not None and known.shards == record.shards:
            return
        form = {
            "version": FORMAT_VERSION,
            "uri": record.uri,
            "endpoint": record.endpoint,
            "shards": record.shards,
        }
        publish_bytes(_dump(form), self._models / record.key / "record.json", self._staging)

    def recall_model(self, key: str) -> ModelRecord | None:
        """Return the model's record, or None when nothing valid is remembered."""
        path = self._models / key / "record.json"
        try:
            form = json.loads(path.read_bytes())
            shards = tuple((str(shard), check_path(str(name)), str(prefix)) for shard, name, prefix in form["shards"])
            if form["version"] != FORMAT_VERSION:
                return None
            pinned = (self._models / key / "pinned").exists()
            return ModelRecord(key, str(form["uri"]), str(form["endpoint"]), shards, path.stat().st_mtime, pinned)
        except FileNotFoundError:
            return None
        except (FormatError, ValueError, KeyError, TypeError) as exc:
            log.warning("the damaged model record %s is ignored: %s", path, exc)
            return None

    def models(self) -> Iterator[ModelRecord]:
        for folder in sorted(self._models.iterdir()):
            record = self.recall_model(folder.name)
            if record is not None:
                yield record

    def touch(self, key: str, now_s: float) -> None:
        """Note a use of the model."""
        path = self._models / key / "record.json"
        if path.exists():
            os.utime(path, (now_s, now_s))

    def remember_published(self, key: str, raw: bytes, signatures: Sequence[bytes]) -> None:
        """Keep the manifest of a model that was published, and its signatures."""
        form = {
            "version": FORMAT_VERSION,
            "manifest": raw.decode(),
            "signatures": [each.decode() for each in signatures],
        }
        publish_bytes(_dump(form), self._models / key / PUBLISHED, self._staging)

    def recall_published(self, key: str) -> tuple[bytes, list[bytes]] | None:
        """Return the manifest of a model that was published as it was when it was last described, and its signatures."""
        path = self._models / key / PUBLISHED
        try:
            form = json.loads(path.read_bytes())
            if form["version"] != FORMAT_VERSION:
                return None
            return form["manifest"].encode(), [each.encode() for each in form["signatures"]]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            log.warning("the damaged record %s is ignored: %s", path, exc)
            return None

    def pin(self, key: str, *, pinned: bool) -> None:
        marker = self._models / key / "pinned"
        if pinned:
            marker.touch(mode=0o600)
        else:
            marker.unlink(missing_ok=True)

    def files_folder(self, key: str, revision: Digest | None = None) -> Path:
        """Return where a model's files lie: those of one revision, or of all."""
        folder = self._models / key / "files"
        return folder / revision.hex[:16] if revision else folder

    def forget_model(self, key: str) -> None:
        """Remove the record first, then what belongs to it."""
        (self._models / key / "record.json").unlink(missing_ok=True)
        shutil.rmtree(self._models / key, ignore_errors=True)

    def _shard_path(self, key: str) -> Path:
        return self._shards / key[:2] / f"{key}.json"


def _dump(form: Any) -> bytes:
    return json.dumps(form, separators=(",", ":"), sort_keys=True).encode()
