"""Own writing below a prefix of a bucket: objects put whole, on conditions where the store keeps to them.

Never sends a body in parts: what registries write is a chunk at most, or a manifest.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from weightcache.errors import ConflictError, ModelNotFoundError, OriginChangedError, OriginError, TransientOriginError
from weightcache.origins.base import Entry
from weightcache.origins.s3 import S3Origin

TRIAL = "weightcache.trial"
N_PAGES = 10_000  # of a registry's listing, 1,000 chunks each: 80 TB of common chunks


class WritableS3(S3Origin):
    """A prefix of a bucket that is written to; signed by URL, so a body is not hashed before it is sent.

    Where the store keeps no conditions, `put` looks before it writes, and whoever writes between loses what was there.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._keeps_conditions: bool | None = None  # until it was tried
        self._trying = asyncio.Lock()

    async def entries(self, prefix: str) -> Sequence[Entry]:
        base = self._key("")
        found: list[Entry] = []
        async for page in self._pages(base + prefix, N_PAGES):
            for stat, written in zip(page.objects, page.written, strict=True):
                if stat.path.startswith(base) and not stat.path.endswith("/"):
                    found.append(Entry(stat.path.removeprefix(base), stat.nbytes, _time(written)))
        return found

    async def put(self, name: str, content: bytes | memoryview, only_if: str | None = None) -> None:
        if only_if is None or await self.has_conditions():
            await self._put(name, content, only_if)
            return
        try:
            found = (await self._ask("HEAD", "head_object", {"Key": self._key(name)}, name=name)).get("etag") or ""
        except ModelNotFoundError:
            found = ""
        if found != only_if:
            raise self._conflict(name)
        await self._put(name, content, None)

    async def _put(self, name: str, content: bytes | memoryview, only_if: str | None) -> None:
        conditions = {} if only_if is None else {"If-Match": only_if} if only_if else {"If-None-Match": "*"}
        try:
            await self._ask("PUT", "put_object", {"Key": self._key(name)}, headers=conditions, body=content, name=name)
        except (OriginChangedError, ModelNotFoundError) as exc:  # If-Match of what is gone is a 404
            if only_if is None or (not only_if and isinstance(exc, ModelNotFoundError)):
                raise  # the latter where there is no bucket
            raise self._conflict(name) from exc

    def _conflict(self, name: str) -> ConflictError:
        return ConflictError(
            f"{self._uri}/{name} was written by another meanwhile: look at what it is now, and try again",
            uri=self._uri,
            name=name,
        )

    async def delete(self, name: str) -> None:
        try:
            await self._ask("DELETE", "delete_object", {"Key": self._key(name)}, name=name)
        except ModelNotFoundError:
            pass

    async def has_conditions(self) -> bool:
        async with self._trying:
            if self._keeps_conditions is None:
                self._keeps_conditions = await self._try_conditions()
            return self._keeps_conditions

    async def _try_conditions(self) -> bool:
        name = f"{TRIAL}-{secrets.token_hex(8)}"
        try:
            await self._put(name, b"1", "")
            await self._put(name, b"2", "")
            return False
        except ConflictError:
            return True
        except OriginError as exc:
            if exc.facts.get("status") != 501:  # so some stores refuse a condition
                raise
            return False
        finally:
            await self.delete(name)


def _time(written: str) -> float:
    try:
        return datetime.fromisoformat(written).timestamp()
    except ValueError as exc:
        raise TransientOriginError(f"the listing says that an object was written at {written[:40]!r}") from exc
