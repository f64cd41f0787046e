"""Own what the Hugging Face Hub's HTTP API looks like: what a path asks for, what a range means, what answers hold. Pure.

Never opens a file: a path in a question is only ever looked up among a model's files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import parse_qs, unquote

from weightcache.daemon.settings import REPO
from weightcache.reading import ModelFile

MAIN = "main"
# Without a slash: what is put behind a repository's URI must not lead out of it.
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
MOST_PATH_CHARS = 4096
_RANGE = re.compile(r"bytes=\s*(\d{0,19})\s*-\s*(\d{0,19})\s*", re.ASCII)


class Kind(StrEnum):
    """What is asked of a repository."""

    INFO = "revision"
    TREE = "tree"
    PATHS = "paths-info"
    REFS = "refs"
    FILE = "resolve"


@dataclass(frozen=True, slots=True)
class Question:
    """What a request asks for.

    Attributes:
        kind: What.
        repo: Of which repository, `org/name` or `name`.
        revision: In which state: `main`, a tag, or a commit.
        path: Which file or folder; empty is the root.
    """

    kind: Kind
    repo: str
    revision: str = MAIN
    path: str = ""


def read_question(raw_path: str) -> Question | None:
    """Return what the path of a request asks for, as it came, still quoted; None where it asks for nothing known."""
    if len(raw_path) > MOST_PATH_CHARS:
        return None
    # What is quoted is unquoted once, within its part: a revision may hold a slash so.
    parts = [unquote(part, errors="surrogateescape") for part in raw_path.split("/")[1:]]
    if parts[:2] == ["api", "models"]:
        return _read_api(parts[2:])
    n_of_name = 1 if parts[1:2] == [Kind.FILE] else 2
    repo, rest = _repo(parts[:n_of_name]), parts[n_of_name:]
    if repo is None or len(rest) < 3 or rest[0] != Kind.FILE:
        return None
    return Question(Kind.FILE, repo, rest[1], "/".join(rest[2:]))


def _read_api(parts: Sequence[str]) -> Question | None:
    n_of_name = 1 if parts[1:2] == [] or parts[1] in tuple(Kind) else 2
    repo, rest = _repo(parts[:n_of_name]), parts[n_of_name:]
    if repo is None:
        return None
    match rest:
        case [] | ["revision", _]:
            return Question(Kind.INFO, repo, *rest[1:])
        case ["refs"]:
            return Question(Kind.REFS, repo)
        case ["paths-info", revision]:
            return Question(Kind.PATHS, repo, revision)
        case ["tree", revision, *path]:
            return Question(Kind.TREE, repo, revision, "/".join(path).strip("/"))
    return None


def _repo(parts: Sequence[str]) -> str | None:
    repo = "/".join(parts)
    return repo if REPO.fullmatch(repo) else None


class UnsatisfiableRange(Exception):
    """A range of which a file has no byte."""


def read_range(header: str | None, nbytes: int) -> tuple[int, int] | None:
    """Return the range `[start, stop)` of a file that a Range header asks for; None is all of it.

    Several ranges, and what is no range of bytes, count as none: RFC 9110 lets a server pass over them (14.2).

    Raises:
        UnsatisfiableRange: It lies behind the file's end.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, stop = max(nbytes - int(match[2]), 0), nbytes
    else:
        start, stop = int(match[1]), min(int(match[2]) + 1, nbytes) if match[2] else nbytes
        if match[2] and int(match[2]) < start:
            return None
    if start >= stop:
        raise UnsatisfiableRange
    return start, stop


def read_paths(body: bytes, content_type: str) -> list[str]:
    """Return the paths that the body of a request names, which is a form or JSON; what cannot be read names none."""
    if content_type != "application/json":
        return parse_qs(body.decode(errors="replace")).get("paths", [])
    try:
        paths = json.loads(body)["paths"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return []
    return [path for path in paths if isinstance(path, str)] if isinstance(paths, list) else []


def info_form(repo: str, commit: str, files: Iterable[ModelFile], *, with_sizes: bool) -> dict[str, Any]:
    """Return what is told of a repository."""
    siblings = [
        {"rfilename": file.path} | ({"size": file.nbytes, "blobId": file.identity} if with_sizes else {})
        for file in files
    ]
    return {
        "_id": commit[:24],
        "id": repo,
        "modelId": repo,
        "author": repo.rpartition("/")[0],
        "sha": commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
    }


def refs_form(commit: str, tags: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return what is told of a repository's names of states: its one branch, and tags with their commits."""
    found = [{"name": name, "ref": f"refs/tags/{name}", "targetCommit": of} for name, of in tags]
    branch = {"name": MAIN, "ref": f"refs/heads/{MAIN}", "targetCommit": commit}
    return {"branches": [branch], "converts": [], "tags": found, "pullRequests": []}


def tree_form(files: Sequence[ModelFile], folder: str, *, recursive: bool) -> list[dict[str, Any]] | None:
    """Return what is told of a folder's files and folders; None where there is no such folder."""
    base = f"{folder}/" if folder else ""
    below = [file for file in files if file.path.startswith(base)]
    if folder and not below:
        return None
    found: dict[str, dict[str, Any]] = {}
    for file in below:
        names = file.path[len(base) :].split("/")
        for depth in range(1, len(names)):
            if recursive or depth == 1:
                path = base + "/".join(names[:depth])
                found[path] = _folder_form(path, files)
        if recursive or len(names) == 1:
            found[file.path] = file_form(file)
    return list(found.values())


def paths_form(files: Sequence[ModelFile], paths: Iterable[str]) -> list[dict[str, Any]]:
    """Return what is told of some files and folders; those that are not there are left out."""
    by_path = {file.path: file for file in files}
    found: list[dict[str, Any]] = []
    for path in (each.strip("/") for each in paths):
        if path in by_path:
            found.append(file_form(by_path[path]))
        elif path and any(file.path.startswith(f"{path}/") for file in files):
            found.append(_folder_form(path, files))
    return found


def file_form(file: ModelFile) -> dict[str, Any]:
    # Without "lfs", whose oid is a SHA-256 that nobody has computed, and without "xetHash": plain HTTP is what is spoken.
    return {"type": "file", "oid": file.identity, "size": file.nbytes, "path": file.path}


def _folder_form(path: str, files: Iterable[ModelFile]) -> dict[str, Any]:
    first = next(file for file in files if file.path.startswith(f"{path}/"))
    return {"type": "directory", "oid": first.identity, "size": 0, "path": path}
