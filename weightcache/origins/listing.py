"""Own the pages of an S3 listing: read strictly, without building a tree of what a hostile server sends.

Never asks for a page.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import unquote_plus
from xml.parsers import expat

from weightcache.errors import TransientOriginError
from weightcache.origins.base import Stat

DEPTH = 8  # real pages have 4
_KEPT = ("IsTruncated", "NextContinuationToken", "EncodingType")
_KEPT_OF_OBJECTS = ("Key", "Size", "ETag", "LastModified")


@dataclass(slots=True)
class Page:
    """One page: the objects by key, when each was written in the server's words, and the token of the next page or None."""

    objects: list[Stat] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    next_token: str | None = None


def parse_page(body: bytes) -> Page:
    """Read a ListObjectsV2 result. Raises TransientOriginError for what is none."""
    reader = _Reader()
    parser = expat.ParserCreate("utf-8", namespace_separator=" ")  # whatever is declared: S3 sends no other
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = _refuse  # and with it entities, which could grow without bounds
    try:
        parser.Parse(body, True)
    except expat.ExpatError as exc:
        raise TransientOriginError(f"the listing is not XML: {str(exc)[:100]}") from exc
    said = reader.said
    is_truncated, encoding = said.get("IsTruncated", "false"), said.get("EncodingType", "")
    if is_truncated not in ("true", "false") or encoding not in ("url", ""):
        raise TransientOriginError(
            f"the listing says IsTruncated {is_truncated[:40]!r}, EncodingType {encoding[:40]!r}"
        )
    token = said.get("NextContinuationToken") if is_truncated == "true" else None
    if is_truncated == "true" and not token:
        raise TransientOriginError("the listing is truncated and does not say how it goes on")
    decode = unquote_plus if encoding == "url" else str
    objects = [_stat(decode(each.get("Key", "")), each) for each in reader.objects]
    return Page(objects, [each.get("LastModified", "") for each in reader.objects], token)


def _stat(key: str, said: dict[str, str]) -> Stat:
    size, etag = said.get("Size", ""), said.get("ETag", "")
    if not key or not etag or not (size.isascii() and size.isdecimal() and len(size) <= 18):
        raise TransientOriginError(f"the listing says of {key[:200]!r} size {size[:40]!r} and ETag {etag[:80]!r}")
    return Stat(key, int(size), etag)


def _refuse(*_: object) -> None:
    raise TransientOriginError("the listing has a document type, which no S3 server sends")


class _Reader:
    """Gathers the few texts that count."""

    def __init__(self) -> None:
        self.objects: list[dict[str, str]] = []
        self.said: dict[str, str] = {}
        self._path: list[str] = []
        self._text: list[str] | None = None
        self._into: dict[str, str] = self.said

    def start(self, name: str, attributes: object) -> None:
        self._path.append(name.rpartition(" ")[2])
        if self._path[0] != "ListBucketResult":
            raise TransientOriginError(f"expected a listing, got a document of {self._path[0][:80]!r}")
        if len(self._path) > DEPTH:
            raise TransientOriginError(f"the listing is nested more than {DEPTH} deep")
        if self._text is not None:
            raise TransientOriginError(f"the listing has elements inside of {self._path[-2]}")
        match self._path[1:]:
            case ["Contents"]:
                self.objects.append({})
            case [name] if name in _KEPT:
                self._begin(self.said, name)
            case ["Contents", name] if name in _KEPT_OF_OBJECTS:
                self._begin(self.objects[-1], name)

    def text(self, piece: str) -> None:
        if self._text is not None:
            self._text.append(piece)

    def end(self, name: str) -> None:
        if self._text is not None:
            self._into[self._path[-1]] = "".join(self._text)
            self._text = None
        self._path.pop()

    def _begin(self, into: dict[str, str], name: str) -> None:
        if name in into:
            raise TransientOriginError(f"the listing says {name} twice")
        self._into, self._text = into, []
