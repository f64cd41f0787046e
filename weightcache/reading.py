"""Own a model's files as ranges of bytes: described once, read in order, every chunk verified, in bounded memory.

Never holds more of a read than a few groups of chunks, and never interprets what it reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightcache.arrival import Counter, Passing
from weightcache.delivery import account, move, transfer_of
from weightcache.digest import Digest
from weightcache.errors import ImageLostError, ModelNotFoundError, OriginChangedError, UriError, nearest
from weightcache.layout import ChunkKey
from weightcache.manifest import Manifest, Role, Shard
from weightcache.origins.local import LocalOrigin
from weightcache.report import Report
from weightcache.runtime import Job
from weightcache.session import Request, Session, decide, describe_model, fall_back, look, open_session
from weightcache.tiers.host import SharedImage, host_tier
from weightcache.uri import Name

N_COMMIT_DIGITS = 40  # as git's
GROUP_NBYTES = 16 << 20  # one range: the first bytes are there after one, and in order they need not wait for more
GROUPS_AHEAD = 8  # under way or waiting to be taken, of one read


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model.

    Attributes:
        path: Name relative to the model's root, with `/`.
        nbytes: Its size.
        identity: 40 hex digits that change whenever its bytes do. No hash of the bytes: a plain folder's are not read.
    """

    path: str
    nbytes: int
    identity: str


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a model in one revision, ordered by path.

    Attributes:
        uri: What was asked for.
        revision: The state, `blake3:…`.
        files: Weights in whatever format, configuration, tokenizer, code.
    """

    uri: str
    revision: str
    files: tuple[ModelFile, ...]

    @property
    def commit(self) -> str:
        """How clients of the Hugging Face Hub call the revision: 40 hex digits."""
        return Digest.parse(self.revision).hex[:N_COMMIT_DIGITS]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        files = [{name: getattr(each, name) for name in ModelFile.__slots__} for each in self.files]
        return {"uri": self.uri, "revision": self.revision, "files": files}


class OpenModel:
    """A model described, whose files can be read until it is closed. Reads may run at the same time, each on one thread.

    Args:
        request: Of a model; one without safetensors will do.
        may_attach: Whether the node daemon may be asked for what it has in host memory; it itself may not.
    """

    def __init__(self, request: Request, *, may_attach: bool = True) -> None:
        # No tensors are named: the daemon is to fill no image for a file.
        self._request = replace(request, needs_weights=False, names=frozenset())
        self.report = Report(uri=request.uri)
        self._lock = threading.Lock()
        self._own: Session | None = None  # beside the one that is attached, for what the image has not
        self._turns: defaultdict[ChunkKey, asyncio.Lock] = defaultdict(asyncio.Lock)  # one flight is one leader
        self._first = self._open(may_attach=may_attach)
        self.listing = Listing(request.uri, self.report.revision, _files_of(self._first.manifest))
        self._indexes = {shard.path: index for index, shard in enumerate(self._first.manifest.shards)}

    @property
    def name(self) -> Name:
        """What the request's URI turned out to mean."""
        return self._first.name

    @property
    def in_place(self) -> LocalOrigin | None:
        """The folder of this machine whose files are read in place, if they are."""
        return self._first.in_place

    def shard(self, path: str) -> Shard:
        """Return what is known of a file. Raises ModelNotFoundError."""
        index = self._indexes.get(path)
        shard = None if index is None else self._first.manifest.shards[index]
        if shard is None or shard.role is Role.ARTEFACT:
            known = [each.path for each in self.listing.files]
            raise ModelNotFoundError(
                f"{self.name} has no file {path[:200]!r}{nearest(path, known)}: list_files shows those it has",
                uri=str(self.name),
            )
        return shard

    def read(
        self, path: str, start: int = 0, stop: int | None = None, n_ahead: int = GROUPS_AHEAD
    ) -> Generator[memoryview, None, None]:
        """Yield the bytes `[start, stop)` of a file in order, each verified; to its end without `stop`.

        A piece stays valid as long as it is held. Closing the iterator early stops what is under way.

        Args:
            n_ahead: Groups of some 16 MiB that are held at the same time, at most.

        Raises:
            ModelNotFoundError: There is no such file.
            UriError: A range that does not lie in it.
        """
        shard = self.shard(path)
        stop = shard.nbytes if stop is None else stop
        if not 0 <= start <= stop <= shard.nbytes:
            raise UriError(f"range [{start}, {stop}) of {path}: expected one within its {shard.nbytes} bytes")
        return self._read(self._indexes[path], shard, start, stop, n_ahead)

    def _read(self, index: int, shard: Shard, start: int, stop: int, n_ahead: int) -> Generator[memoryview, None, None]:
        left = deque(_groups(index, shard, start, stop))
        jobs: deque[tuple[list[ChunkKey], Session, Job[dict[ChunkKey, memoryview]]]] = deque()
        try:
            while left or jobs:
                while left and len(jobs) < n_ahead:
                    keys = left.popleft()
                    session = self._session_for(keys)
                    jobs.append((keys, session, session.threads.start(self._bring(session, keys))))
                keys, session, job = jobs[0]
                try:
                    views = job.result()
                except ImageLostError as exc:
                    self._leave_image(session, exc)
                    again = self._session_for(keys)
                    jobs[0] = (keys, again, again.threads.start(self._bring(again, keys)))
                    continue
                jobs.popleft()
                for key in keys:
                    chunk = shard.chunks[key[1]]
                    yield views.pop(key)[max(start - chunk.start, 0) : stop - chunk.start]
        finally:
            for _, _, job in jobs:
                job.cancel()

    async def _bring(self, session: Session, keys: Sequence[ChunkKey]) -> dict[ChunkKey, memoryview]:
        """Bring chunks to scratch memory, from where they are."""
        views: dict[ChunkKey, memoryview] = {}
        held: SharedImage | None = self._first.attached
        with contextlib.ExitStack() as holding:
            if held is None:
                held = host_tier.hold(session.key, str(session.manifest.revision), (), time.time())
                if held is not None:
                    holding.callback(host_tier.let_go, held)
            elif held.failure:
                held = None
            async with contextlib.AsyncExitStack() as turns:
                for key in keys:
                    await turns.enter_async_context(self._turns[key])
                passing = Passing(session, keys, views.__setitem__, Counter(None, 0))
                plan = decide(session, keys, look(session, keys), held.layout.chunks if held else ())
                # Waits for the disk: what waits to be written is held beside what was asked for, and is bounded so, too.
                await move(session, transfer_of(session, passing, held=held, wait_for_disk=True), plan)
        return views

    def close(self) -> None:
        """End the lease, and write down what was asked of the origin and learned. Nothing may be read meanwhile."""
        for session in (self._first, self._own):
            if session is not None:
                _close(session)

    def _open(self, *, may_attach: bool) -> Session:
        session = open_session(self._request, self.report, may_attach=may_attach)
        try:
            session.threads.run(describe_model(session))
        except BaseException:
            _close(session)
            raise
        return session

    def _session_for(self, keys: Sequence[ChunkKey]) -> Session:
        """Return the session that has chunks, or can have them; it is another where the daemon's image has not."""
        image = self._first.attached
        if image is None or not (image.failure or any(key not in image.layout.chunks for key in keys)):
            return self._first
        with self._lock:
            if self._own is None:
                own = self._open(may_attach=False)
                if own.manifest.revision != self._first.manifest.revision:
                    _close(own)
                    raise OriginChangedError(f"{self.name} is no longer what the daemon holds of it; read it again")
                self._own = own
            return self._own

    def _leave_image(self, session: Session, lost: ImageLostError) -> None:
        if session.attached is None:
            return  # of this process: it is not held a second time
        session.attached.failure = session.attached.failure or str(lost)
        fall_back(self.report, f"going on without the daemon's image: {lost}")


def _close(session: Session) -> None:
    async def close() -> None:
        account(session)
        await session.close_origin()

    try:
        session.threads.run(close())
    finally:
        wait_stored = session.settle()
        session.release()
    wait_stored(None)  # what was learned is known to who reads next


def _files_of(manifest: Manifest) -> tuple[ModelFile, ...]:
    return tuple(
        ModelFile(shard.path, shard.nbytes, identity_of(shard))
        for shard in manifest.shards
        if shard.role is not Role.ARTEFACT
    )


def identity_of(shard: Shard) -> str:
    # With the path: some web servers name states by size and time, which two files can share.
    return Digest.of(json.dumps([shard.path, shard.nbytes, shard.etag]).encode()).hex[:N_COMMIT_DIGITS]


def _groups(index: int, shard: Shard, start: int, stop: int) -> Iterator[list[ChunkKey]]:
    """Yield the chunks that hold `[start, stop)`, in groups of some GROUP_NBYTES."""
    group: list[ChunkKey] = []
    nbytes = 0
    for number, chunk in enumerate(shard.chunks):
        if chunk.stop <= start or chunk.start >= stop:
            continue
        if group and nbytes + chunk.nbytes > GROUP_NBYTES:
            yield group
            group, nbytes = [], 0
        group.append((index, number))
        nbytes += chunk.nbytes
    if group:
        yield group


def list_files(request: Request) -> Listing:
    """Tell a model's files; see `weightcache.list_files`."""
    model = OpenModel(request)
    model.close()
    return model.listing


def read(request: Request, path: str, start: int, stop: int | None) -> Generator[memoryview, None, None]:
    """Yield a range of a file; see `weightcache.read`."""
    model = OpenModel(request)
    try:
        yield from model.read(path, start, stop)
    finally:
        model.close()
