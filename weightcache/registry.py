"""Own the registry's layout: what lies where below its root, how it is read, and how a tag moves.

Never decides what is published or removed. Everything but tags is immutable; a revision's name is its manifest's digest.

    weightcache.json                            format version, chunk limit, residency policy
    models/<name>/revisions/<hex>.json          manifest
    models/<name>/signatures/<hex>.<key>.json   signatures of it, each by one key
    models/<name>/tags/<tag>.json               the revision it names; moved by conditional PUT
    chunks/<first two>/<hex>                    stored bytes of a chunk
    publishers/<token>.json, sweep.json         who is at work, see presence.py
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from weightcache.digest import ALGORITHM, Digest
from weightcache.errors import (
    AccessDeniedError,
    ConflictError,
    FormatError,
    IntegrityError,
    ModelNotFoundError,
    RegistryFormatError,
    nearest,
)
from weightcache.manifest import CHUNK_LIMIT_NBYTES
from weightcache.origins.base import Entry
from weightcache.origins.chunked import chunk_name
from weightcache.origins.replicas import CHUNKS
from weightcache.origins.resilient import Resilient, ResilientWriter
from weightcache.published import MAX_MANIFEST_NBYTES, Published, read_form
from weightcache.residency import Policy
from weightcache.runtime import all_of

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
ABOUT = "weightcache.json"
MODELS = "models/"
SMALL_NBYTES = 1 << 20  # of a tag, a signature or the registry's own file


@dataclass(frozen=True, slots=True)
class About:
    """What a registry says of itself."""

    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True, slots=True)
class Tag:
    """A mutable name for a revision.

    Attributes:
        revision: What it names.
        moves: How often it was moved, its making included: what replicas compare.
        previous: What it named before.
        moved_s: When, in seconds since 1970 by the clock of who moved it.
        etag: This state of it, as its store names it.
    """

    name: str
    revision: Digest
    moves: int
    previous: Digest | None
    moved_s: float
    etag: str = ""


def revision_name(model: str, revision: Digest) -> str:
    return f"{MODELS}{model}/revisions/{revision.hex}.json"


def signature_name(model: str, revision: Digest, key_id: str) -> str:
    return f"{MODELS}{model}/signatures/{revision.hex}.{key_id}.json"


def tag_name(model: str, tag: str) -> str:
    return f"{MODELS}{model}/tags/{tag}.json"


class Registry:
    """A registry as it is read. All methods run on the loop thread.

    Args:
        origin: The folder that is its root.
    """

    def __init__(self, origin: Resilient) -> None:
        self.origin = origin

    @property
    def uri(self) -> str:
        return self.origin.uri

    async def about(self) -> About:
        """Return what the registry says of itself.

        Raises:
            ModelNotFoundError: There is no registry.
            RegistryFormatError: One of a version this code does not know.
        """
        try:
            small = await self.origin.get(ABOUT, SMALL_NBYTES)
        except ModelNotFoundError as exc:
            raise ModelNotFoundError(
                f"no registry at {self.uri} (it has no {ABOUT}): check the name; weightcache publish makes one",
                uri=self.uri,
            ) from exc
        form = _read(small.content, f"{self.uri}/{ABOUT}")
        try:
            return About(Policy.from_form(form["policy"], f"{self.uri}/{ABOUT}"))
        except (KeyError, TypeError) as exc:
            raise FormatError(f"{self.uri}/{ABOUT} is not valid: {exc!r:.200}") from exc

    async def is_there(self, folder: str = "") -> bool:
        """Tell whether there is a registry, or one in a folder below the root."""
        try:
            await self.origin.get(folder + ABOUT, SMALL_NBYTES)
        except (ModelNotFoundError, AccessDeniedError, FormatError):
            return False
        return True

    async def tag(self, model: str, tag: str) -> Tag:
        """Return what a tag names now. Raises ModelNotFoundError, with the nearest tag."""
        try:
            return await self._tag(model, tag)
        except ModelNotFoundError as exc:
            tags = await self._names(f"{MODELS}{model}/tags/")
            known = f"; its tags: {', '.join(tags[:10])}" if tags else "; weightcache tags shows those there are"
            raise ModelNotFoundError(
                f"no tag {tag!r} of a model {model!r} in {self.uri}{nearest(tag, tags)}{known}", uri=self.uri
            ) from exc

    async def _tag(self, model: str, tag: str) -> Tag:
        name = tag_name(model, tag)
        small = await self.origin.get(name, SMALL_NBYTES)
        form = _read(small.content, f"{self.uri}/{name}")
        try:
            moves = form["moves"]
            if type(moves) is not int or moves < 1:
                raise ValueError(f"{moves!r:.40} moves")
            previous = form["previous"]
            return Tag(
                tag,
                Digest.parse(form["revision"]),
                moves,
                None if previous is None else Digest.parse(previous),
                datetime.fromisoformat(form["moved"]).timestamp(),
                small.etag,
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise FormatError(f"{self.uri}/{name} is not valid: {exc!r:.200}") from exc

    async def find(self, model: str, pointer: str) -> tuple[Digest, Tag | None]:
        """Return the revision that `blake3:…` or a tag names, and the tag."""
        if pointer.startswith(f"{ALGORITHM}:"):
            return Digest.parse(pointer), None
        tag = await self.tag(model, pointer)
        return tag.revision, tag

    async def revision(self, model: str, revision: Digest) -> Published:
        """Return a revision.

        Raises:
            ModelNotFoundError: It is not there.
            IntegrityError, FormatError: What lies there is not it.
        """
        name = revision_name(model, revision)
        while True:
            try:
                small = await self.origin.get(name, MAX_MANIFEST_NBYTES)
            except ModelNotFoundError as exc:
                raise ModelNotFoundError(
                    f"no revision {revision} of {model} in {self.uri}: weightcache revisions shows those there are",
                    uri=self.uri,
                ) from exc
            try:
                return read_form(small.content, revision)
            except IntegrityError as exc:
                if not self.origin.discard_small(name, len(small.content)):
                    raise
                log.warning("%s; it is read from another replica", exc)

    async def signatures(self, model: str, revision: Digest, key_ids: Sequence[str]) -> list[bytes]:
        """Return the signatures of a revision by these keys, those there are."""

        async def read(key_id: str) -> bytes | None:
            try:
                return (await self.origin.get(signature_name(model, revision, key_id), SMALL_NBYTES)).content
            except ModelNotFoundError:
                return None

        found = await all_of(read(key_id) for key_id in key_ids)
        return [each for each in found if each is not None]

    async def _names(self, prefix: str) -> list[str]:
        """Return the names of the JSON files directly below a folder, where the origin can list."""
        if not isinstance(self.origin, ResilientWriter):
            return []
        entries = await self.origin.entries(prefix)
        return sorted(entry.name.removeprefix(prefix).removesuffix(".json") for entry in entries)


class WritableRegistry(Registry):
    """A registry that is listed and written to."""

    origin: ResilientWriter

    def __init__(self, origin: ResilientWriter) -> None:
        super().__init__(origin)

    async def make(self, policy: Policy) -> About:
        """Return what the registry says of itself, after making it if there is none."""
        try:
            return await self.about()
        except ModelNotFoundError:
            form = {"version": FORMAT_VERSION, "chunk_limit_bytes": CHUNK_LIMIT_NBYTES, "policy": policy.to_form()}
            try:
                await self.origin.put(ABOUT, _dump(form), only_if="")
            except ConflictError:
                pass  # another was faster
            return await self.about()

    async def no_model(self, model: str) -> ModelNotFoundError:
        """Return the error that says so, with the nearest name."""
        return ModelNotFoundError(
            f"no model {model!r} in {self.uri}{nearest(model, await self.models())}: weightcache tags shows those there are",
            uri=self.uri,
        )

    async def models(self) -> list[str]:
        entries = await self.origin.entries(MODELS)
        return sorted({entry.name.removeprefix(MODELS).partition("/")[0] for entry in entries})

    async def tags(self, model: str) -> list[Tag]:
        """Return a model's tags, the last moved first."""
        names = await self._names(f"{MODELS}{model}/tags/")
        return sorted(await all_of(self._tag(model, name) for name in names), key=lambda tag: -tag.moved_s)

    async def revisions(self, model: str) -> list[tuple[Digest, float]]:
        """Return a model's revisions with the times they were written at, the last first."""
        prefix = f"{MODELS}{model}/revisions/"
        found = [(_digest_in(entry.name), entry.modified_s) for entry in await self.origin.entries(prefix)]
        return sorted(((digest, when) for digest, when in found if digest), key=lambda each: -each[1])

    async def chunks(self) -> dict[Digest, Entry]:
        """Return every chunk that is there."""
        entries = await self.origin.entries(CHUNKS)
        return {digest: entry for entry in entries if (digest := _digest_in(entry.name)) is not None}

    async def all_signatures(self, model: str, revision: Digest) -> list[tuple[str, bytes]]:
        """Return every signature of a revision, with its file's name."""
        entries = await self.origin.entries(f"{MODELS}{model}/signatures/{revision.hex}.")
        return [(entry.name, (await self.origin.get(entry.name, SMALL_NBYTES)).content) for entry in entries]

    async def put_chunk(self, digest: Digest, content: memoryview) -> None:
        """Write a chunk; one that another wrote meanwhile is as good."""
        try:
            await self.origin.put(chunk_name(digest.hex), content, only_if="")
        except ConflictError:
            pass

    async def put_revision(self, model: str, published: Published) -> None:
        try:
            await self.origin.put(revision_name(model, published.manifest.revision), published.raw, only_if="")
        except ConflictError:
            pass

    async def put_signature(self, model: str, revision: Digest, key_id: str, content: bytes) -> None:
        """Write a key's signature of a revision, over an older one by the same key."""
        await self.origin.put(signature_name(model, revision, key_id), content)

    async def move_tag(self, model: str, tag: str, revision: Digest, seen: Tag | None) -> Tag:
        """Let a tag name another revision.

        Args:
            seen: What it was when the caller decided that; None if it was not there.

        Raises:
            ConflictError: Another moved it since; it stays as it is.
        """
        moves, previous = (seen.moves + 1, seen.revision) if seen else (1, None)
        return await self.put_tag(model, Tag(tag, revision, moves, previous, time.time()), seen)

    async def put_tag(self, model: str, tag: Tag, seen: Tag | None) -> Tag:
        """Write a tag as it is, or was at another replica. Raises ConflictError, as `move_tag` does."""
        name, revision = tag_name(model, tag.name), tag.revision
        content = _dump(
            {
                "version": FORMAT_VERSION,
                "revision": str(revision),
                "previous": str(tag.previous) if tag.previous else None,
                "moves": tag.moves,
                "moved": datetime.fromtimestamp(tag.moved_s, UTC).isoformat(timespec="milliseconds"),
                "writer": secrets.token_hex(8),
            }
        )
        try:
            await self.origin.put(name, content, only_if=seen.etag if seen else "")
        except ConflictError as exc:
            if (await self.origin.get(name, SMALL_NBYTES)).content != content:  # else an answer was lost
                now = await self._tag(model, tag.name)
                raise ConflictError(
                    f"tag {tag.name!r} of {model} in {self.uri} was moved to {now.revision} by another meanwhile; it stays so. "
                    f"The revision of this call is {revision}: weightcache tag moves the tag to it",
                    tag=tag.name,
                    revision=str(revision),
                    now=str(now.revision),
                ) from exc
        return await self._tag(model, tag.name)


def _digest_in(name: str) -> Digest | None:
    hex_digits = name.rpartition("/")[2].partition(".")[0]
    return Digest(hex_digits) if re.fullmatch("[0-9a-f]{64}", hex_digits) else None


def _read(content: bytes, source: str) -> Mapping[str, Any]:
    """Read a small file of the registry. Raises FormatError, RegistryFormatError."""
    try:
        form: Mapping[str, Any] = json.loads(content)
        version = form["version"]
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise FormatError(
            f"{source} is no file of a registry: {exc!r:.200}; a tag is removed by weightcache rm"
        ) from exc
    if version != FORMAT_VERSION:
        raise RegistryFormatError(
            f"{source} has format version {version!r:.40}, expected {FORMAT_VERSION}: update weightcache", source=source
        )
    return form


def _dump(form: Mapping[str, Any]) -> bytes:
    return json.dumps(form, separators=(",", ":"), sort_keys=True).encode()
