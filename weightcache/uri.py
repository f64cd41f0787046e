"""Own the names of models: what a URI may look like and what it means. Pure.

Never dials and never looks at a disk.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from weightcache.errors import UnsafeFormatError, UriError, nearest

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# A secret with a slash in it (`key:abc/def@bucket`, where a port has digits), or a user before the host.
_CREDENTIALS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(?:[^/?#:\[]*:(?!\d*(?:[/?#]|$)).*|[^/?#]*)@", re.DOTALL)
# Azure's own form: a container, not a user, stands before the host.
_CONTAINER = re.compile(r"(?:abfss?|wasbs?)://[a-z0-9$-]+@[A-Za-z0-9.-]+(?:/|$)")
_WITHOUT_QUERY = ("s3", "http", "https")
_OWN_REVISIONS = ("hf",)  # hf://org/name@revision is the Hub's
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_WORD = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"blake3:[0-9a-f]{64}")
LATEST = "latest"
LOGICAL = "wc"


@dataclass(frozen=True, slots=True)
class Name:
    """A model's place.

    Attributes:
        scheme: `file` for paths, `wc` for logical names.
        root: The plain folder, or the registry that the model is in: an absolute path for `file`, else a URL without a
            trailing slash; `wc://store` for a logical name.
        file: The one safetensors file of the folder that was named.
        model: The model's name in the registry; empty for a plain folder, and for a store as a whole.
        revision: The model's tag, or its digest, `blake3:` and 64 hex digits.
    """

    scheme: str
    root: str
    file: str | None = None
    model: str = ""
    revision: str = ""

    @property
    def store(self) -> str:
        """The store of a logical name; empty for others."""
        return self.root.removeprefix(f"{LOGICAL}://") if self.scheme == LOGICAL else ""

    def __str__(self) -> str:
        within = f"{self.model}@{self.revision}" if self.model else self.file
        if within:
            return f"{'' if self.root == '/' else self.root}/{within}"
        return f"{self.root}/" if _has_revision(self.scheme, self.root) else self.root


def parse_uri(uri: str, known_schemes: Collection[str], absolute: str, stores: Collection[str] = ()) -> Name:
    """Understand a model's name.

    Args:
        uri: What the user wrote: a URL or a path.
        known_schemes: Schemes there is an origin for.
        absolute: The folder that relative paths start from.
        stores: The names of the stores that are configured.

    Raises:
        UriError: Credentials in the URI, an unknown scheme, an unknown logical name, an empty or broken name.
        UnsafeFormatError: A single pickled file.
    """
    stripped = uri.strip()
    credentials = _CREDENTIALS.match(stripped)
    if credentials and not _CONTAINER.match(stripped):
        shown = f"{credentials[1]}://…@{stripped[credentials.end() :][:200]}"
        raise UriError(
            f"credentials in the URI {shown!r}: they end up in logs; use the standard credential chain or "
            "storage_options instead",
            uri=shown,
        )
    if not uri or "\0" in uri or uri != stripped:
        raise UriError(
            f"not a model's name: {uri[:200]!r}; expected a path or a URL such as s3://bucket/model", uri=uri
        )
    match = _SCHEME.match(uri)
    if match is None:
        return _split("file", _clean_path(uri if uri.startswith("/") else f"{absolute}/{uri}"), _is_folder(uri))
    scheme = match[1].lower()
    try:
        urlsplit(uri)
    except ValueError as exc:
        raise UriError(f"not a URL: {uri[:200]!r} ({str(exc)[:80]})", uri=uri) from exc
    rest = uri[match.end() :]
    if scheme == LOGICAL:
        return _split_logical(rest, stores)
    if scheme in ("file", "local"):
        return _split("file", _clean_path(rest or "/"), _is_folder(rest))
    if scheme not in known_schemes:
        raise UriError(f"unknown scheme in {uri[:200]!r}{nearest(scheme, known_schemes)}", uri=uri)
    is_folder = _is_folder(rest)
    rest = rest.rstrip("/")
    place = re.split("[?#]", rest)[0] if scheme in _WITHOUT_QUERY else rest
    if not place or place != rest:
        shown = f"{scheme}://{place[:200]}" + ("…" if place != rest else "")  # a query may hold a token
        raise UriError(f"{shown!r} names no folder; expected {scheme}://bucket/model and no query", uri=shown)
    return _split(scheme, f"{scheme}://{rest}", is_folder)


def _is_folder(path: str) -> bool:
    return path.endswith(("/", "/."))


def _clean_path(path: str) -> str:
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _has_revision(scheme: str, root: str) -> bool:
    """Tell whether the last part of a place has an `@`; what stands before the first `/` of a URL is a host or bucket."""
    _, slash, last = root.removeprefix(f"{scheme}://").rpartition("/")
    return bool(slash) and "@" in last and scheme not in _OWN_REVISIONS


def _split(scheme: str, root: str, is_folder: bool) -> Name:
    folder, _, last = root.rpartition("/")
    if last.endswith(".safetensors"):
        return Name(scheme, folder or "/", last)
    if last.endswith(_PICKLED):
        raise UnsafeFormatError(
            f"{root} is a pickle file, which can run code when read: expected safetensors; convert it once with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')",
            uri=root,
        )
    if is_folder or not _has_revision(scheme, root):
        return Name(scheme, root)
    model, _, revision = last.partition("@")
    hint = "; write a slash behind it if it is a folder whose name has an @"
    return _checked(Name(scheme, folder or "/", None, model, revision), root, hint)


def _split_logical(rest: str, stores: Collection[str]) -> Name:
    place = re.split("[?#]", rest)[0]
    told = place + ("…" if place != rest else "")  # a query may hold a token
    written = f"{LOGICAL}://{told}"
    store, _, path = told.partition("/")
    if store not in stores:
        how = (
            "no stores are configured; add [[stores.NAME.replicas]], with the url of each replica, to weightcache.toml"
        )
        known = f"there is no store {store[:80]!r}{nearest(store, stores)}; configured are {', '.join(sorted(stores))[:200]}"
        raise UriError(f"unknown logical name {written[:200]!r}: {known if stores else how}", uri=written[:200])
    root = f"{LOGICAL}://{store}"
    if not path:
        return Name(LOGICAL, root)
    model, at, revision = path.partition("@")
    return _checked(Name(LOGICAL, root, None, model, revision if at else LATEST), written)


def _checked(name: Name, written: str, hint: str = "") -> Name:
    """Return the name of a model in a registry if that can be one. Raises UriError."""
    if _WORD.fullmatch(name.model) and (_WORD.fullmatch(name.revision) or _DIGEST.fullmatch(name.revision)):
        return name
    raise UriError(
        f"not a model in a registry: {written[:200]!r}; expected MODEL@TAG, each of letters, digits, '.', '_' and '-', or "
        f"MODEL@blake3: and 64 hex digits{hint}",
        uri=written[:200],
    )


def latest_of(name: Name) -> Name | None:
    """Return the registry's model that a folder's name may mean, at its tag `latest`; None where it can mean none."""
    folder, _, last = name.root.rpartition("/")
    if name.model or name.file or name.scheme in (LOGICAL, *_OWN_REVISIONS):
        return None
    if not _WORD.fullmatch(last) or folder.endswith("/") or (not folder and name.scheme != "file"):
        return None
    return Name(name.scheme, folder or "/", None, last, LATEST)
