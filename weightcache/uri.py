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
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True, slots=True)
class Name:
    """A model's place: `scheme` (`file` for paths), the folder's `root`, and `file` if one safetensors file was named.

    `root` is an absolute path for `file`, else the URL of the folder without a trailing slash.
    """

    scheme: str
    root: str
    file: str | None = None

    def __str__(self) -> str:
        return f"{self.root}/{self.file}" if self.file else self.root


def parse_uri(uri: str, known_schemes: Collection[str], absolute: str) -> Name:
    """Understand a model's name.

    Args:
        uri: What the user wrote: a URL or a path.
        known_schemes: Schemes there is an origin for.
        absolute: The folder that relative paths start from.

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
        return _split_file("file", _clean_path(uri if uri.startswith("/") else f"{absolute}/{uri}"))
    scheme = match[1].lower()
    try:
        urlsplit(uri)
    except ValueError as exc:
        raise UriError(f"not a URL: {uri[:200]!r} ({str(exc)[:80]})", uri=uri) from exc
    if scheme == "wc":
        raise UriError(f"unknown logical name {uri[:200]!r}: no stores are configured", uri=uri)
    if scheme in ("file", "local"):
        return _split_file("file", _clean_path(uri[match.end() :] or "/"))
    if scheme not in known_schemes:
        raise UriError(f"unknown scheme in {uri[:200]!r}{nearest(scheme, known_schemes)}", uri=uri)
    rest = uri[match.end() :].rstrip("/")
    place = re.split("[?#]", rest)[0] if scheme in _WITHOUT_QUERY else rest
    if not place or place != rest:
        shown = f"{scheme}://{place[:200]}" + ("…" if place != rest else "")  # a query may hold a token
        raise UriError(f"{shown!r} names no folder; expected {scheme}://bucket/model and no query", uri=shown)
    return _split_file(scheme, f"{scheme}://{rest}")


def _clean_path(path: str) -> str:
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def _split_file(scheme: str, root: str) -> Name:
    folder, _, last = root.rpartition("/")
    if last.endswith(".safetensors"):
        return Name(scheme, folder or "/", last)
    if last.endswith(_PICKLED):
        raise UnsafeFormatError(
            f"{root} is a pickle file, which can run code when read: expected safetensors; convert it once with "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')",
            uri=root,
        )
    return Name(scheme, root)
