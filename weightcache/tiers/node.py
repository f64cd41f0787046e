"""Own this process's side of the node daemon: a connection, and the image that is attached through it.

Never trusts what it is told further than the daemon: messages are validated, and an image that is not filled any more is
an error at once, not a wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightcache import _engine
from weightcache._version import __version__
from weightcache.config import Settings, read_surroundings
from weightcache.daemon.wire import (
    HEAD,
    MOST_ANSWER_NBYTES,
    MOST_REQUEST_NBYTES,
    STALL_S,
    body_nbytes,
    decode,
    encode,
)
from weightcache.digest import Digest
from weightcache.errors import DaemonError, FormatError
from weightcache.header import TensorEntry
from weightcache.layout import ChunkKey, Layout, Wanted, carry, lay_out, lay_out_in_place, want
from weightcache.manifest import (
    Manifest,
    Shard,
    check_path,
    check_paths,
    check_shard,
    read_text,
    shard_from_json,
    shard_to_json,
)
from weightcache.runtime import collection_paused
from weightcache.tiers.host import SharedImage

CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def rules_of(settings: Settings) -> str:
    """Return what tells apart settings that decide where bytes may go and come from."""
    stores = {name: store.as_dict(settings.prices) for name, store in settings.stores.items()}
    node = [settings.node.provider, settings.node.region, settings.node.jurisdiction]
    form = [node, settings.policy.to_form(), stores, list(settings.redirect_hosts)]
    return str(Digest.of(json.dumps(form, sort_keys=True, default=str).encode()))


def read_token(path: str) -> str:
    """Return the token that a file holds. Raises DaemonError."""
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise DaemonError(f"cannot read the token file {path}: {exc}", path=path) from exc


class Line:
    """A connection to the node daemon, used by one thread at a time.

    Args:
        path: Of its socket.

    Raises:
        DaemonError: Nobody answers there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self.sock.settimeout(STALL_S)
            with _within_reach(path) as near:
                self.sock.connect(near)
            self._check_peer()
        except OSError as exc:
            self.sock.close()
            is_anothers = isinstance(exc, PermissionError)
            advice = (
                "run as its user, or name this one in its uids" if is_anothers else "start it with weightcache daemon"
            )
            raise DaemonError(f"no daemon answers on {path} ({exc.strerror or exc}): {advice}", path=str(path)) from exc
        except BaseException:
            self.sock.close()
            raise

    def _check_peer(self) -> None:
        """Raise DaemonError unless whoever answers may be believed: root, this user, or who owns the socket's folder."""
        _, uid, _ = CREDENTIALS.unpack(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
        if uid not in (0, os.geteuid(), self.path.parent.stat().st_uid):
            raise DaemonError(f"user {uid} answers on {self.path}, whose folder is another's: not believed")

    def ask(
        self,
        op: str,
        on_wait: Callable[[Mapping[str, Any]], None] = lambda beat: None,
        patient_until_s: float = math.inf,
        **message: Any,
    ) -> dict[str, Any]:
        """Ask for something, and return the daemon's answer. Raises DaemonError, which a refusal is, too.

        Args:
            op: What.
            on_wait: Told what the daemon says while the caller waits.
            patient_until_s: When waiting ends, by `time.monotonic`.
            message: The rest of the request.
        """
        self.send(op, **message)
        while "wait" in (answer := self.receive()):
            if time.monotonic() > patient_until_s:
                raise DaemonError(f"the daemon on {self.path} did not answer within the time allowed")
            on_wait(answer)
        return answer

    def send(self, op: str, **message: Any) -> None:
        """Say something to the daemon. Raises DaemonError."""
        try:
            encoded = encode({"op": op, "pid": os.getpid(), "version": __version__, **message})
        except (TypeError, ValueError) as exc:
            raise DaemonError(f"storage_options that are not plain values cannot be told to the daemon: {exc}") from exc
        if len(encoded) > MOST_REQUEST_NBYTES:
            raise DaemonError(f"a request of {len(encoded)} bytes: the daemon takes at most {MOST_REQUEST_NBYTES}")
        try:
            self.sock.sendall(encoded)
        except OSError as exc:
            raise self._broken(exc) from exc

    def receive(self) -> dict[str, Any]:
        """Return the next message. Raises DaemonError, also for one that says that something failed."""
        message = decode(self.receive_body())
        if message.get("ok") is False:
            code, error = str(message.get("code", ""))[:40], str(message.get("error", ""))[:2000]
            raise DaemonError(error or "refused without a reason", code=code)
        return message

    def receive_body(self) -> bytes:
        return self._exactly(body_nbytes(self._exactly(HEAD.size), MOST_ANSWER_NBYTES))

    def receive_fd(self) -> int:
        """Return the descriptor that comes with the next byte, which is passed over. Raises DaemonError."""
        try:
            _, fds, flags, _ = socket.recv_fds(self.sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as exc:
            raise self._broken(exc) from exc
        if len(fds) != 1 or flags & socket.MSG_CTRUNC:
            for fd in fds:
                os.close(fd)
            raise DaemonError("the daemon sent no descriptor: this process may have no room for one more")
        return fds[0]

    def _exactly(self, nbytes: int) -> bytes:
        content = bytearray(nbytes)
        view = memoryview(content)
        try:
            while view:
                n_received = self.sock.recv_into(view)
                if not n_received:
                    raise DaemonError(f"the daemon on {self.path} ended in the middle of an answer")
                view = view[n_received:]
        except OSError as exc:
            raise self._broken(exc) from exc
        return bytes(content)

    def _broken(self, exc: OSError) -> DaemonError:
        why = f"is silent for {STALL_S:.0f} s" if isinstance(exc, TimeoutError) else f"broke off: {exc.strerror or exc}"
        return DaemonError(f"the daemon on {self.path} {why}", path=str(self.path))

    def close(self) -> None:
        self.sock.close()


@contextlib.contextmanager
def _within_reach(path: Path) -> Any:
    """Yield a name for a socket that the kernel takes: a path may have 107 bytes."""
    if len(os.fsencode(path)) < 108:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class NodeImage(SharedImage):
    """An image of the node daemon's, held as long as this is open.

    Attributes:
        manifest: Of the model.
        wanted: All its tensors.
        files: Where its configuration and tokenizer lie, if this process sees the daemon's folder.
        pid: The daemon's.
    """

    def __init__(
        self,
        line: Line,
        fd: int,
        uri: str,
        manifest: Manifest,
        wanted: list[Wanted],
        layout: Layout,
        answer: Mapping[str, Any],
    ) -> None:
        super().__init__(uri, str(manifest.revision), layout, os.fstat(fd).st_size)
        self.manifest = manifest
        self.wanted = wanted
        self.pid = answer["pid"]
        self.files = _same_folder(answer["files"])
        self._line = line
        self._fd = fd
        self._owner_pid = os.getpid()
        self._pages = read_text(answer["pages"])
        self._memory: _engine.SealedMemory | None = None
        self._listening: asyncio.Task[None] | None = None
        self._enter(answer["there"])

    @property
    def address(self) -> int:
        if self._memory is None:
            self._memory = self.attach()
        return self._memory.address

    def attach(self) -> _engine.SealedMemory:
        return _engine.SealedMemory(self._fd, partial=not self.is_full)

    def pages(self) -> str:
        return self._pages

    async def arriving(self, keys: Iterable[ChunkKey]) -> AsyncIterator[list[ChunkKey]]:
        if self._listening is None and not self.is_full:
            self._listening = asyncio.create_task(self._listen())
        async for here in super().arriving(keys):
            yield here

    def tell(self, report: Mapping[str, Any]) -> None:
        """Tell the daemon of a load, if it listens just now."""
        with contextlib.suppress(DaemonError):
            self._line.sock.settimeout(0)
            self._line.send("report", report=report)

    def close(self) -> None:
        """End the lease; what is attached stays valid. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._line.close()

    async def _listen(self) -> None:
        """Hear which chunks arrive, until all have or the daemon fails."""
        self._line.sock.settimeout(0)
        try:
            while not self.is_full:
                message = decode(await self._receive())
                if "lost" in message:
                    self.failure = read_text(message["lost"])
                    return
                self._enter(message.get("there", ()))
        except TimeoutError:
            self.failure = f"the daemon {self.pid} is silent for {STALL_S:.0f} s"
        except (OSError, DaemonError, ValueError, KeyError, TypeError) as exc:
            self.failure = f"the daemon {self.pid} is gone: {exc}"

    async def _receive(self) -> bytes:
        async with asyncio.timeout(STALL_S):
            head = await self._exactly(HEAD.size)
        async with asyncio.timeout(STALL_S):
            return await self._exactly(body_nbytes(head, MOST_REQUEST_NBYTES))

    async def _exactly(self, nbytes: int) -> bytes:
        loop, content = asyncio.get_running_loop(), b""
        while len(content) < nbytes:
            received = await loop.sock_recv(self._line.sock, nbytes - len(content))
            if not received:
                raise DaemonError("it closed the connection")
            content += received
        return content

    def _enter(self, ranges: Iterable[Any]) -> None:
        """Enter chunks that have arrived, by their numbers from first to before last."""
        for first, stop in ranges:
            if not (type(first) is type(stop) is int and 0 <= first < stop <= len(self.there)):
                raise ValueError(f"chunks {first!r:.20} to {stop!r:.20} of {len(self.there)}")
            self.there[first:stop] = b"\1" * (stop - first)


def attach(
    path: Path,
    settings: Settings,
    uri: str,
    options: Mapping[str, Any],
    *,
    offline: bool,
    local: Path | None,
    resident_only: bool,
    until_s: float,
) -> NodeImage:
    """Attach to the image of a model that the node daemon has, or begins to fill.

    Args:
        path: The daemon's socket.
        settings: This process's; one with other policies or stores is not served.
        uri: The model.
        options: For its origin.
        offline: Whether the origin must not be asked.
        local: The folder that it is, if it is one of this machine.
        resident_only: Fill none for this.
        until_s: When waiting for an image to attach to ends, by `time.monotonic`.

    Raises:
        DaemonError: Nobody answers, or he refuses; this process goes on by itself.
    """
    line = Line(path)
    fd = -1
    try:
        answer = line.ask(
            "attach",
            patient_until_s=until_s,
            uri=uri,
            options=dict(options),
            offline=offline,
            place=identity(local),
            resident_only=resident_only,
            **introduction(settings),
        )
        fd = line.receive_fd()
        with collection_paused():
            manifest = _read_manifest(json.loads(line.receive_body()), read_text(answer["revision"]))
            wanted = want(manifest)
            layout = _lay_out(manifest, wanted, answer["files_at"], is_padded=answer["is_padded"] is True)
        image = NodeImage(line, fd, uri, manifest, wanted, layout, answer)
        if image.nbytes < layout.nbytes:
            raise DaemonError(f"the daemon's image of {uri} has {image.nbytes} bytes, expected {layout.nbytes}")
    except BaseException as exc:
        line.close()
        if fd >= 0:
            os.close(fd)
        if isinstance(exc, (FormatError, KeyError, TypeError, ValueError)):
            raise DaemonError(f"the daemon's answer about {uri} cannot be understood: {exc!r:.300}") from exc
        raise
    return image


def introduction(settings: Settings) -> dict[str, Any]:
    """Return what a client says of itself: by which rules, and as whom, it asks. Raises DaemonError."""
    token = read_token(settings.daemon.token_file) if settings.daemon.token_file else ""
    return {"rules": rules_of(settings), "surroundings": read_surroundings(), "token": token}


def describe(manifest: Manifest) -> bytes:
    """Return a manifest as it is told to those who attach."""
    shards = [[shard.path, shard.prefix, shard_to_json(shard)] for shard in manifest.shards]
    return json.dumps(shards, separators=(",", ":")).encode()


def _read_manifest(form: Any, revision: str) -> Manifest:
    """Read a manifest that the daemon has validated tensor by tensor; here the shards are, whose tensors must lie in them."""
    shards = tuple(_read_shard(check_path(read_text(path)), read_text(prefix), each) for path, prefix, each in form)
    check_paths(shard.path for shard in shards)
    return Manifest(shards, Digest.parse(revision))


def _read_shard(path: str, prefix: str, form: Any) -> Shard:
    bare = shard_from_json({**form, "tensors": []}, path=path, prefix=prefix)
    tensors = tuple(
        TensorEntry(name, dtype, tuple(shape), start, stop) for name, dtype, shape, start, stop in form["tensors"]
    )
    shard = replace(bare, tensors=tensors)
    check_shard(shard)
    return shard


def _lay_out(manifest: Manifest, wanted: Iterable[Wanted], files_at: Any, *, is_padded: bool) -> Layout:
    """Lay an image out as whoever filled it did: all tensors, then the files that it carries."""
    layout = (lay_out if is_padded else lay_out_in_place)(manifest, wanted)
    keys = [(int(shard), chunk) for shard in files_at for chunk in range(len(manifest.shards[int(shard)].chunks))]
    return carry(layout, {key: manifest.shards[key[0]].chunks[key[1]].nbytes for key in keys})


def identity(path: Path | None) -> list[int] | None:
    """Return what tells a folder apart from all others of this machine, whatever it is called where."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return [found.st_dev, found.st_ino] if found is not None else None


def _same_folder(told: Any) -> Path | None:
    """Return a folder of the daemon's if this process sees the same one by that name."""
    if told is None:
        return None
    path, expected = Path(read_text(told[0])), told[1]
    return path if expected is not None and identity(path) == expected else None
