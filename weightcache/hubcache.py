"""Own what is laid out in the Hugging Face cache of this machine: blobs, a snapshot of links to them, the name of it.

Never shows half a snapshot, and never removes what others have downloaded there.

    models--org--name/blobs/<identity>              a file's bytes
    models--org--name/snapshots/<commit>/<path>     a link to its blob
    models--org--name/refs/main                     the commit, without a line's end
    models--org--name/.weightcache.json             the commits that were laid here: of which models, with which blobs
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightcache.arrival import Counter
from weightcache.config import read_hub_cache
from weightcache.daemon.settings import COMMIT, REPO
from weightcache.errors import CapacityError, ModelNotFoundError, UriError
from weightcache.files import publish, staged, sync_folder, write_all
from weightcache.locks import exclusive
from weightcache.origins.base import Stat
from weightcache.reading import ModelFile, OpenModel
from weightcache.session import Request

RECORD = ".weightcache.json"
STAGING = ".weightcache-staging"


@dataclass(frozen=True, slots=True)
class Materialised:
    """A model in the Hugging Face cache.

    Attributes:
        repo: `org/name`.
        uri: The model.
        revision: Its state, `blake3:…`.
        commit: How the state is called there.
        path: The snapshot's folder.
        n_files: In it.
        bytes: Of all files.
        written_bytes: Of those that were not there before.
    """

    repo: str
    uri: str
    revision: str
    commit: str
    path: Path
    n_files: int
    bytes: int
    written_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {name: getattr(self, name) for name in self.__slots__} | {"path": str(self.path)}


@dataclass(frozen=True, slots=True)
class Removed:
    """What was removed of a repository: snapshots by their commits, and the bytes of blobs that nothing links to any more."""

    repo: str
    commits: tuple[str, ...]
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"repo": self.repo, "commits": list(self.commits), "bytes": self.bytes}


def materialise(request: Request, repo: str, cache: Path | None) -> Materialised:
    """Lay a model out; see `weightcache.materialise`."""
    folder = _folder(repo, cache)
    model = OpenModel(request)
    try:
        files, commit = model.listing.files, model.listing.commit
        snapshot = folder / "snapshots" / commit
        try:
            with _alone(folder):
                written = _write_blobs(model, folder, Counter(request.progress, sum(file.nbytes for file in files)))
                laid = {"uri": request.uri, "blobs": [file.identity for file in files]}
                _write(folder, RECORD, json.dumps(_read_record(folder) | {commit: laid}))
                _link(files, folder, snapshot)
                _write(folder, "refs/main", commit)
        except OSError as exc:
            raise CapacityError(
                f"cannot write {repo} into {folder}: {exc.strerror or exc}; free some space, or name another cache folder",
                path=str(folder),
            ) from exc
    finally:
        model.close()
    return Materialised(
        repo,
        request.uri,
        model.listing.revision,
        commit,
        snapshot,
        len(files),
        sum(file.nbytes for file in files),
        written,
    )


def _write_blobs(model: OpenModel, folder: Path, counter: Counter) -> int:
    """Write the files that are not there. Returns their bytes."""
    written = 0
    for file in model.listing.files:
        blob = folder / "blobs" / file.identity
        if not (blob.is_file() and blob.stat().st_size == file.nbytes):
            with staged(folder / STAGING) as (fd, path):
                _fill(model, file, fd)
                os.fchmod(fd, 0o644)
                publish(fd, path, blob, folder_mode=0o777)
            written += file.nbytes
        counter.add(file.nbytes)
    return written


def _fill(model: OpenModel, file: ModelFile, fd: int) -> None:
    source = model.in_place
    if source is not None and source.copy_to(Stat(file.path, file.nbytes, model.shard(file.path).etag), fd):
        return
    os.ftruncate(fd, 0)
    with contextlib.closing(model.read(file.path)) as pieces:
        for piece in pieces:
            write_all(fd, piece)


def _write(folder: Path, name: str, text: str) -> None:
    with staged(folder / STAGING) as (fd, path):
        write_all(fd, text.encode())
        os.fchmod(fd, 0o644)
        publish(fd, path, folder / name, folder_mode=0o777)


def _link(files: tuple[ModelFile, ...], folder: Path, snapshot: Path) -> None:
    """Make the snapshot appear whole; one that a client has in part is completed."""
    making = snapshot if snapshot.is_dir() else folder / STAGING / f"{snapshot.name}-{secrets.token_hex(4)}"
    for file in files:
        link = making / file.path
        if link.is_file():
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # to a blob that is gone
        depth = file.path.count("/") + 2
        link.symlink_to(Path(*[".."] * depth, "blobs", file.identity))
    if making != snapshot:
        making.mkdir(parents=True, exist_ok=True)  # a model always has files; but so it is whole without
        snapshot.parent.mkdir(exist_ok=True)
        making.rename(snapshot)
        sync_folder(snapshot.parent)


def remove(repo: str, cache: Path | None) -> Removed:
    """Remove what was laid out; see `weightcache.remove_materialised`."""
    folder = _folder(repo, cache)
    if not (folder / RECORD).is_file():
        raise ModelNotFoundError(
            f"nothing of {repo} was laid out in {folder.parent} by weightcache; what huggingface_hub downloaded there is "
            "removed with hf cache rm",
            uri=repo,
        )
    try:
        with _alone(folder):
            laid = _read_record(folder)
            commits = tuple(laid)
            for ref in (folder / "refs").rglob("*"):
                if ref.is_file() and ref.read_text() in commits:
                    ref.unlink()
            for commit in commits:
                shutil.rmtree(folder / "snapshots" / commit, ignore_errors=True)
            used = {path.resolve().name for path in (folder / "snapshots").rglob("*") if path.is_symlink()}
            names = {name for each in laid.values() for name in each["blobs"]} - used
            gone = [blob for name in names if (blob := folder / "blobs" / name).is_file()]
            nbytes = sum(blob.stat().st_size for blob in gone)
            for blob in gone:
                blob.unlink()
            (folder / RECORD).unlink()
        for below in ("refs", "snapshots", "blobs", ""):
            with contextlib.suppress(OSError):  # something of others is there
                (folder / below).rmdir()
    except OSError as exc:
        raise CapacityError(f"cannot remove {repo} from {folder}: {exc.strerror or exc}", path=str(folder)) from exc
    return Removed(repo, commits, nbytes)


def _folder(repo: str, cache: Path | None) -> Path:
    if not REPO.fullmatch(repo):
        raise UriError(
            f"not a repository's name: {repo[:200]!r}; expected org/name of letters, digits, '.', '_' and '-'"
        )
    return (cache or read_hub_cache()) / f"models--{repo.replace('/', '--')}"


def _read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was laid out, by commits. What it names is removed, and anybody's tools write there: it is validated."""
    try:
        found = json.loads((folder / RECORD).read_bytes())
        return {commit: each for commit, each in found.items() if all(map(COMMIT.fullmatch, [commit, *each["blobs"]]))}
    except (FileNotFoundError, ValueError, AttributeError, LookupError, TypeError, RecursionError):
        return {}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only one to lay out or remove a repository for the length of the block; what the dead had begun goes."""
    lock = folder.parent / ".locks" / folder.name / "weightcache.lock"  # where huggingface_hub has its own
    lock.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(lock):
        shutil.rmtree(folder / STAGING, ignore_errors=True)
        (folder / STAGING).mkdir(parents=True)
        try:
            yield
        finally:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
