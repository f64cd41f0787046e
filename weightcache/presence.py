"""Own who is at work in a registry: publishers that rely on what is there, and sweeps that remove what nobody needs.

Never locks: each side writes first that it is there, and then looks for the other, so at least one of them sees the other
(Dekker, 1965). A publisher names chunks before it looks whether they exist; a sweep says that it runs before it looks what
is needed. A publisher that finds a sweep running waits for its end; a sweep takes what publishers named for needed. This
holds on stores whose reads see every write that ended before them, as S3, GCS, R2, Azure and local folders do.

The dead are told by age, on the store's own clock: publishers after PRESENCE_S, sweeps after SWEEP_S.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from weightcache.digest import Digest
from weightcache.errors import ConflictError, FormatError, InUseError, ModelNotFoundError, OriginError, WeightcacheError
from weightcache.origins.resilient import ResilientWriter

PUBLISHERS = "publishers/"
SWEEP = "sweep.json"
CLOCK = "clock-"
PRESENCE_S = 3600.0
SWEEP_S = 120.0
ROUND_S = 60.0  # a sweep removes nothing later than so long after it began or renewed its sign
POLL_S = 0.25
MARKER_DIGESTS = 2000  # of one file, which is written anew with every few that are added
MARKER_NBYTES = 1 << 20


class Presence:
    """One publisher's sign that it is at work. All on the loop thread; `end` it in every case."""

    def __init__(self, origin: ResilientWriter) -> None:
        self._origin = origin
        self._token = secrets.token_hex(12)
        self._parts: list[list[str]] = [[]]
        self._revision: tuple[str, Digest] | None = None
        self._waiting: dict[Digest, asyncio.Future[None]] = {}
        self._named: set[Digest] = set()
        self._writing: asyncio.Task[None] | None = None
        self._beating: asyncio.Task[None] | None = None
        self._written_s = 0.0
        self._last_sweep: str | None = None
        self.was_stopped = False
        self.n_sweeps = 0  # seen so far: what was listed before the last of them may be gone

    async def begin(self) -> None:
        """Be seen, and wait for the end of a sweep that runs."""
        self._written_s = time.monotonic()
        await self._write(0)
        self._beating = asyncio.create_task(self._beat())

    async def rely_on(self, digest: Digest) -> None:
        """Name a chunk: once this returns, it stays if it is there. Those named at the same time are written together."""
        if digest in self._named:
            return
        future = self._waiting.setdefault(digest, asyncio.get_running_loop().create_future())
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())
        await asyncio.shield(future)

    async def rely_on_revision(self, model: str, revision: Digest) -> None:
        """Name a revision: once this returns, it stays if it is there."""
        self._revision = (model, revision)
        await self._write(len(self._parts) - 1)

    def check_alive(self) -> None:
        """Raise InUseError if a sweep may have taken this publisher for dead, because it was stopped for long."""
        self.was_stopped = self.was_stopped or time.monotonic() - self._written_s > PRESENCE_S / 2
        if self.was_stopped:
            raise InUseError(
                f"this process was stopped for so long that a sweep of {self._origin.uri} may have removed what it found "
                "there: run the command again, what was uploaded is not uploaded again",
                uri=self._origin.uri,
            )

    async def end(self) -> None:
        """Be gone. May be called twice."""
        tasks = [task for task in (self._writing, self._beating) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for part in range(len(self._parts)):
            await self._origin.delete(self._name(part))

    async def _write_all(self) -> None:
        """Write what waits to be named, until nothing does."""
        batch: dict[Digest, asyncio.Future[None]] = {}
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, {}
                if len(self._parts[-1]) + len(batch) > MARKER_DIGESTS:
                    self._parts.append([])
                self._parts[-1] += map(str, batch)
                failure: WeightcacheError | None = None
                try:
                    await self._write(len(self._parts) - 1)
                except WeightcacheError as exc:
                    failure = exc
                else:
                    self._named |= batch.keys()
                for future in batch.values():
                    if failure is not None:
                        future.set_exception(failure)
                    else:
                        future.set_result(None)
        finally:
            for future in (*batch.values(), *self._waiting.values()):
                future.cancel()  # does nothing to one that is done
            self._writing = None

    async def _beat(self) -> None:
        """Write every sign anew before it counts as a dead one's."""
        while True:
            await asyncio.sleep(PRESENCE_S / 8)
            self.was_stopped = self.was_stopped or time.monotonic() - self._written_s > PRESENCE_S / 2
            with contextlib.suppress(OriginError):  # seen by check_alive, if it goes on
                for part in range(len(self._parts)):
                    await self._put(part)
                self._written_s = time.monotonic()

    async def _write(self, part: int) -> None:
        await self._put(part)
        await self._wait_for_sweep()

    async def _put(self, part: int) -> None:
        named = [self._revision[0], str(self._revision[1])] if self._revision else None
        form = {"version": 1, "digests": self._parts[part], "revision": named}
        await self._origin.put(self._name(part), json.dumps(form, separators=(",", ":")).encode())

    async def _wait_for_sweep(self) -> None:
        while True:
            sweep = await read_sweep(self._origin)
            identity, is_running = sweep or ("", False)
            if is_running and await _age_s(self._origin, SWEEP) < SWEEP_S:
                await asyncio.sleep(POLL_S)
                continue
            if self._last_sweep is not None and identity != self._last_sweep:
                self.n_sweeps += 1
            self._last_sweep = identity
            return

    def _name(self, part: int) -> str:
        return f"{PUBLISHERS}{self._token}.{part}.json"


@asynccontextmanager
async def sweeping(origin: ResilientWriter) -> AsyncIterator[Sweep]:
    """Be seen sweeping for the length of the block. One sweep at a time.

    Raises:
        InUseError: Another sweep runs.
    """
    sweep = Sweep(origin)
    await sweep.begin()
    try:
        yield sweep
    finally:
        await sweep.end()


class Sweep:
    """One sweep's sign that it runs."""

    def __init__(self, origin: ResilientWriter) -> None:
        self._origin = origin
        self._identity = secrets.token_hex(12)
        self._began_s = 0.0

    async def begin(self) -> None:
        running = await read_sweep(self._origin)
        etag = ""
        if running is not None:
            if running[1] and await _age_s(self._origin, SWEEP) < SWEEP_S:
                raise InUseError(
                    f"another sweep of {self._origin.uri} runs: try again in a minute", uri=self._origin.uri
                )
            etag = (await self._origin.get(SWEEP, MARKER_NBYTES)).etag
        self._began_s = time.monotonic()
        try:
            await self._write("running", etag)
        except ConflictError as exc:
            now = await read_sweep(self._origin)
            if now is None or now[0] != self._identity:  # else an answer was lost
                raise InUseError(f"another sweep of {self._origin.uri} began: try again in a minute") from exc

    @property
    def may_remove(self) -> bool:
        """Whether publishers still wait for this sweep. To be asked before each removal."""
        return time.monotonic() - self._began_s < ROUND_S

    async def end(self) -> None:
        await self._write("done", None)

    async def needed(self) -> tuple[set[Digest], set[tuple[str, Digest]], list[str]]:
        """Return the chunks and revisions that living publishers rely on, and the signs of dead ones."""
        digests: set[Digest] = set()
        revisions: set[tuple[str, Digest]] = set()
        dead: list[str] = []
        now_s = await now_s_at(self._origin)
        for entry in await self._origin.entries(PUBLISHERS):
            if now_s - entry.modified_s > PRESENCE_S:
                dead.append(entry.name)
                continue
            try:
                form = json.loads((await self._origin.get(entry.name, MARKER_NBYTES)).content)
                digests |= {Digest.parse(text) for text in form["digests"]}
                if form["revision"] is not None:
                    revisions.add((str(form["revision"][0]), Digest.parse(form["revision"][1])))
            except ModelNotFoundError:
                continue  # done meanwhile: what it published is there
            except (ValueError, TypeError, KeyError) as exc:
                raise FormatError(f"{self._origin.uri}/{entry.name} is no publisher's sign: {exc!r:.200}") from exc
        return digests, revisions, dead

    async def _write(self, state: str, only_if: str | None) -> None:
        form = {"version": 1, "sweep": self._identity, "state": state}
        await self._origin.put(SWEEP, json.dumps(form).encode(), only_if)


async def read_sweep(origin: ResilientWriter) -> tuple[str, bool] | None:
    """Return the last sweep's identity and whether it says that it runs; None if there never was one."""
    try:
        form = json.loads((await origin.get(SWEEP, MARKER_NBYTES)).content)
        return str(form["sweep"]), form["state"] == "running"
    except ModelNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as exc:
        raise FormatError(f"{origin.uri}/{SWEEP} is no sweep's sign: {exc!r:.200}; remove it") from exc


async def _age_s(origin: ResilientWriter, name: str) -> float:
    """Return a file's age by the store's clock; infinite if it is gone."""
    now_s = await now_s_at(origin)
    written = [entry.modified_s for entry in await origin.entries(name) if entry.name == name]
    return now_s - written[0] if written else float("inf")


async def now_s_at(origin: ResilientWriter) -> float:
    """Return the time by the store's clock: that of a file written just now."""
    name = f"{CLOCK}{secrets.token_hex(8)}"
    await origin.put(name, b"{}")
    try:
        return max(entry.modified_s for entry in await origin.entries(name))
    finally:
        await origin.delete(name)
