"""Own a model's files as real files: configuration and tokenizer beside a load, and everything in a pull.

Never writes outside the folder it was given; each file appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from weightcache.checkpoint import select
from weightcache.digest import checksum
from weightcache.errors import CapacityError, UnsafePathError
from weightcache.files import publish, publish_bytes, staged
from weightcache.layout import ChunkKey
from weightcache.manifest import RESERVED_PREFIX, Manifest, Role, Shard
from weightcache.session import Session, fall_back

FILES_RECORD = RESERVED_PREFIX + "files.json"


CARRIED_NBYTES = 64 << 20  # of configuration and tokenizer, beside an image


def missing_file_keys(session: Session) -> list[ChunkKey]:
    """Return the chunks of configuration and tokenizer that must still be brought to this node."""
    if session.local is not None or _ready_files(session) is not None:
        return []
    return select(session.manifest, [Role.FILE])


def file_keys(manifest: Manifest) -> list[ChunkKey]:
    """Return the chunks of configuration and tokenizer that an image carries: all, or none where they are too large."""
    keys = select(manifest, [Role.FILE])
    nbytes = sum(shard.nbytes for shard in manifest.shards if shard.role is Role.FILE)
    return keys if nbytes <= CARRIED_NBYTES else []


def files_folder(session: Session) -> Path | None:
    """Return where the model's files lie on this node, or will."""
    return session.local or _folder(session)


def _folder(session: Session) -> Path | None:
    if session.attached is not None:
        return session.attached.files
    if session.disk is None:
        return None
    return session.disk.records.files_folder(session.key, session.manifest.revision)


def _ready_files(session: Session) -> dict[str, Path] | None:
    """Return the model's files if all of them lie, unspoilt, in the cache folder."""
    folder = _folder(session)
    if folder is None:
        return None
    try:
        sums = json.loads((folder / FILES_RECORD).read_bytes())
        wanted = {shard.path for shard in session.manifest.shards if shard.role is Role.FILE}
        if sums.keys() != wanted or any(checksum((folder / path).read_bytes()) != sums[path] for path in sums):
            return None
    except (OSError, ValueError, AttributeError):
        return None
    return {path: folder / path for path in sums}


def place_files(session: Session, pieces: Mapping[ChunkKey, memoryview]) -> dict[str, Path]:
    """Make the model's files real: in place for a local folder, else in the cache folder."""
    shards = [(index, shard) for index, shard in enumerate(session.manifest.shards) if shard.role is Role.FILE]
    if session.local is not None:
        return {shard.path: session.local / shard.path for _, shard in shards}
    if (ready := _ready_files(session)) is not None:
        return ready
    folder = _folder(session)
    if folder is not None and session.disk is not None:
        try:
            with session.disk.counting(folder):
                return _write_files(shards, pieces, folder, session.disk.staging)
        except OSError as exc:
            fall_back(session.report, f"the model's files cannot be kept in the cache ({exc.strerror or exc})")
    temporary = tempfile.mkdtemp(prefix="weightcache-files-")
    session.held.callback(_remove, temporary, os.getpid())
    session.report.choices["files"] = f"{temporary}: until the model is closed"
    return _write_files(shards, pieces, Path(temporary), Path(temporary))


def _remove(folder: str, owner_pid: int) -> None:
    """Remove a folder, unless this is a forked child of its owner."""
    if os.getpid() == owner_pid:
        shutil.rmtree(folder, ignore_errors=True)


def _write_files(
    shards: Sequence[tuple[int, Shard]], pieces: Mapping[ChunkKey, memoryview], folder: Path, staging: Path
) -> dict[str, Path]:
    sums: dict[str, int] = {}
    for index, shard in shards:
        content = b"".join(pieces[(index, number)] for number in range(len(shard.chunks)))
        publish_bytes(content, folder / shard.path, staging)
        sums[shard.path] = checksum(content)
    publish_bytes(json.dumps(sums).encode(), folder / FILES_RECORD, staging)
    return {path: folder / path for path in sums}


class PulledFiles:
    """Files being written into a folder; each appears whole, or not at all. `write` is called from worker threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._staging = folder / f"{RESERVED_PREFIX}staging"
        self._open = contextlib.ExitStack()
        self._shards: dict[int, tuple[Shard, int, Path, Path]] = {}  # by their indexes in the manifest

    def begin(self, manifest: Manifest, names: Mapping[int, str]) -> None:
        """Open a staged file for each shard that has a name. Raises UnsafePathError, CapacityError."""
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
            root = self._folder.resolve()
            for index, name in names.items():
                shard = manifest.shards[index]
                if not (self._folder / name).parent.resolve().is_relative_to(root):
                    raise UnsafePathError(f"{name} would leave {root} through a link there: remove the link", path=name)
                fd, path = self._open.enter_context(staged(self._staging))
                self._shards[index] = (shard, fd, path, self._folder / name)
        except OSError as exc:
            raise CapacityError(
                f"cannot write into {self._folder}: {exc.strerror or exc}", path=str(self._folder)
            ) from exc

    def write(self, key: ChunkKey, view: memoryview) -> None:
        shard, fd, _, _ = self._shards[key[0]]
        at = shard.chunks[key[1]].start
        try:
            while view:
                n_written = os.pwrite(fd, view, at)
                at, view = at + n_written, view[n_written:]
        except OSError as exc:
            raise CapacityError(
                f"cannot write {shard.path} into {self._folder}: {exc.strerror}; free some space and pull again",
                path=shard.path,
            ) from exc

    def publish(self) -> None:
        for _, fd, path, target in self._shards.values():
            os.fchmod(fd, 0o644)
            publish(fd, path, target, folder_mode=0o777)

    def close(self) -> None:
        self._open.close()
        with contextlib.suppress(OSError):
            self._staging.rmdir()
