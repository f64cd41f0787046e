"""Own the daemon's socket: who may connect, what he may ask, and the answers.

Never trusts a client: messages are bounded and validated, a wrong one ends its connection alone, and nobody waits for a
client that does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fnmatch
import hmac
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightcache import meters
from weightcache.cache import Kept
from weightcache.config import Settings, read_surroundings
from weightcache.daemon.residents import Residents
from weightcache.daemon.settings import TIERS, ClientClass
from weightcache.daemon.wire import BEAT_S, HEAD, MOST_REQUEST_NBYTES, body_nbytes, decode, encode, frame
from weightcache.errors import AccessDeniedError, ConfigError, DaemonError, WeightcacheError
from weightcache.manifest import Role
from weightcache.session import Request
from weightcache.tiers.host import host_tier
from weightcache.tiers.node import CREDENTIALS, describe, identity, read_token, rules_of

log = logging.getLogger(__name__)

MOST_CLIENTS = 2000
FIRST_WORD_S = 5.0  # a client that connects and says nothing is let go
WRITE_S = 10.0  # a client that does not read is let go
TELL_S = 0.01  # how often those who wait for an image hear what has arrived
STATE_S = 0.05  # how old a state may be that is told: it takes a few milliseconds to put together
DAY_S = 86400.0
WHOEVER = ClientClass("whoever", "")


@dataclass(eq=False)
class Client:
    """One connection: whose it is, and the image it holds."""

    sock: socket.socket
    pid: int
    uid: int
    kept: Kept | None = None
    telling: asyncio.Task[None] | None = None
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)


class Server:
    """Answers on a Unix socket. All on one loop, which is not that of the loads.

    Args:
        settings: Of the daemon; `reread` replaces them.
        residents: The models.
        state: Returns the daemon's state, for JSON.
        evict: Removes a model by its name, and returns the bytes freed; called on a thread.
    """

    def __init__(
        self,
        settings: Settings,
        residents: Residents,
        state: Callable[[], Mapping[str, Any]],
        evict: Callable[[str], int],
    ) -> None:
        self._residents = residents
        self._state = state
        self._evict = evict
        self._told: dict[str, tuple[float, bytes]] = {}  # by class: when, and the state as it was told last
        self._prefetched: dict[str, tuple[float, int]] = {}  # by class: since when, and how many bytes
        self._described: dict[str, bytes] = {}  # by revision
        self.clients: set[Client] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.n_refused = 0
        self.is_draining = False
        self.reread(settings)

    def reread(self, settings: Settings) -> None:
        """Take other settings from now on. Raises DaemonError for a token that cannot be read; all stays then."""
        tokens = [(read_token(each.token_file), each) for each in settings.daemon.clients]
        self._tokens, self._settings, self._told = tokens, settings, {}
        self._rules, self._surroundings = rules_of(settings), read_surroundings()

    async def serve(self, listening: socket.socket) -> None:
        """Accept clients until cancelled."""
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        while True:
            try:
                sock, _ = await loop.sock_accept(listening)
            except OSError as exc:
                if exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED):
                    raise
                log.warning("a client could not be accepted: %s", exc.strerror)
                await asyncio.sleep(0.1)
                continue
            sock.setblocking(False)
            task = asyncio.create_task(self._serve(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Let go of all clients; what they have attached stays theirs."""
        telling = [client.telling for client in self.clients if client.telling is not None]
        for task in (*self._tasks, *telling):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- one client

    async def _serve(self, sock: socket.socket) -> None:
        pid, uid, _ = CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
        client = Client(sock, pid, uid)
        self.clients.add(client)
        try:
            if uid not in (os.geteuid(), 0, *self._settings.daemon.uids):
                raise AccessDeniedError(f"user {uid} may not use this daemon: it is user {os.geteuid()}'s")
            if len(self.clients) > MOST_CLIENTS:
                raise DaemonError(f"the daemon has {MOST_CLIENTS} clients already")
            message = await self._receive(client, FIRST_WORD_S)
            while message is not None:
                await self._answer(client, message)
                message = await self._receive(client, None)
        except WeightcacheError as exc:
            self.n_refused += 1
            log.info("client %d (user %d) is let go: %s", pid, uid, exc)
            with contextlib.suppress(OSError, TimeoutError):
                await self._send(client, _refusal(exc))
        except (OSError, TimeoutError) as exc:
            log.debug("client %d (user %d) is gone: %s", pid, uid, exc)
        finally:
            self._let_go(client)
            if client.telling is not None:
                # Not cancelled: the error would hold its frame, and that the image, until garbage is collected.
                await asyncio.wait([client.telling], timeout=WRITE_S)
            self.clients.discard(client)
            sock.close()

    def _let_go(self, client: Client) -> None:
        kept, client.kept = client.kept, None
        if kept is not None:
            kept.held.last_use_s = time.time()
            host_tier.let_go(kept.held)

    async def _receive(self, client: Client, timeout_s: float | None) -> dict[str, Any] | None:
        """Return the next message, None where there is none any more. Raises DaemonError."""
        loop = asyncio.get_running_loop()

        async def exactly(nbytes: int) -> bytes:
            content = bytearray()
            while len(content) < nbytes:
                received = await loop.sock_recv(client.sock, nbytes - len(content))
                if not received:
                    return b""
                content += received
            return bytes(content)

        async with asyncio.timeout(timeout_s):
            first = await exactly(1)
        if not first:
            return None
        async with asyncio.timeout(FIRST_WORD_S):
            rest = await exactly(HEAD.size - 1)
            if not rest:
                return None
            body = await exactly(body_nbytes(first + rest, MOST_REQUEST_NBYTES))
        return decode(body)

    async def _send(self, client: Client, *messages: bytes, fd: int = -1) -> None:
        """Send messages; a descriptor goes with the first byte of the second."""
        loop = asyncio.get_running_loop()
        async with client.sending, asyncio.timeout(WRITE_S):
            for number, message in enumerate(messages):
                if number == 1 and fd >= 0:
                    await self._send_fd(client, fd)
                await loop.sock_sendall(client.sock, message)

    @staticmethod
    async def _send_fd(client: Client, fd: int) -> None:
        while True:
            try:
                socket.send_fds(client.sock, [b"\0"], [fd])
                return
            except BlockingIOError:
                await asyncio.sleep(TELL_S)

    async def _answer(self, client: Client, message: Mapping[str, Any]) -> None:
        """Answer a message. What is wrong with it is told; what is no message ends the connection."""
        began, op = time.monotonic(), message.get("op")
        answers = {
            "attach": self._attach,
            "warm": self._warm,
            "evict": self._drop,
            "status": self._tell_state,
            "report": self._hear_report,
        }
        if not isinstance(op, str) or op not in answers:
            raise DaemonError(f"a request for {op!r:.40}: expected one of {', '.join(answers)}")
        outcome = "ok"
        try:
            await answers[op](client, message)
        except WeightcacheError as exc:
            outcome = "refused"
            await self._send(client, _refusal(exc))
        except (KeyError, TypeError, ValueError) as exc:
            outcome = "wrong"
            raise DaemonError(f"a request to {op} that is not as it should be: {exc!r:.200}") from exc
        finally:
            meters.add("weightcache_requests_total", 1, op=op, outcome=outcome)
            meters.observe("weightcache_request_seconds", time.monotonic() - began, op=op)

    # -- what may be asked

    async def _attach(self, client: Client, message: Mapping[str, Any]) -> None:
        if client.kept is not None:
            raise DaemonError("a connection holds one model: connect again for another")
        request, _ = self._request(message)
        self._check_surroundings(message)
        place = message["place"]
        if request.uri.startswith(("/", "file:")) and (place is None or identity(Path(request.uri)) != place):
            raise DaemonError(f"{request.uri} is not the same folder to this daemon as to its client")
        resident_only = message["resident_only"] is not False
        kept = await self._while_beating(client, self._residents.attach(request, resident_only=resident_only))
        client.kept = kept
        there = _ranges(kept.held.there)
        await self._send(
            client,
            encode(
                {
                    "ok": True,
                    "pid": os.getpid(),
                    "revision": kept.held.revision,
                    "is_padded": kept.held.layout.padded,
                    "files_at": _carried(kept),
                    "files": [str(kept.files), identity(kept.files)] if kept.files is not None else None,
                    "pages": kept.held.pages(),
                    "there": there,
                }
            ),
            frame(self._describe(kept)),
            fd=kept.held.fd,
        )
        if not kept.held.is_full or there != [[0, len(kept.held.there)]]:
            client.telling = asyncio.create_task(self._tell(client, kept, there))

    def _describe(self, kept: Kept) -> bytes:
        revision = kept.held.revision
        if revision not in self._described:
            kept_revisions = {held.revision for held in host_tier.images()}
            self._described = {name: each for name, each in self._described.items() if name in kept_revisions}
            self._described[revision] = describe(kept.manifest)
        return self._described[revision]

    async def _tell(self, client: Client, kept: Kept, told: list[list[int]]) -> None:
        """Tell a client which chunks arrive, until all have; between them, that the daemon is alive."""
        held, said_s = kept.held, time.monotonic()
        before = bytearray(len(held.there))
        for first, stop in told:
            before[first:stop] = b"\1" * (stop - first)
        try:
            while client.kept is kept and not all(before):
                failure, now = held.failure, bytes(held.there)
                new = _ranges(bytes(a > b for a, b in zip(now, before, strict=True)))
                if new or failure or time.monotonic() - said_s > BEAT_S:
                    is_lost = bool(failure) and not new
                    await self._send(client, encode({"lost": failure} if is_lost else {"there": new}))
                    said_s, before = time.monotonic(), bytearray(now)
                    if is_lost:
                        return
                await asyncio.sleep(TELL_S)
        except (OSError, TimeoutError):
            log.debug("client %d waits no longer", client.pid)

    async def _warm(self, client: Client, message: Mapping[str, Any]) -> None:
        request, its_class = self._request(message)
        self._check_surroundings(message)
        tier, until_s = message["tier"], float(message.get("until_s", -1.0))
        if tier not in TIERS:
            raise ConfigError(f"tier {tier!r:.40}: expected one of {', '.join(TIERS)}")
        self._check_quota(its_class)
        done = [0, 0]

        def progress(n_done: int, total: int) -> None:
            done[:] = n_done, total

        report = await self._while_beating(
            client, self._residents.bring(request, "request", tier, progress), lambda: {"progress": list(done)}
        )
        self._count(its_class, report.bytes["origin"])
        if until_s >= 0:
            host_tier.until_s[request.uri] = time.time() + until_s if until_s else 0.0
        await self._send(client, encode({"ok": True, "report": report.as_dict()}))

    async def _drop(self, client: Client, message: Mapping[str, Any]) -> None:
        uri, _ = self._uri(message)
        await self._while_beating(client, self._residents.settled(uri))
        freed = await asyncio.get_running_loop().run_in_executor(None, self._evict, uri)
        await self._send(client, encode({"ok": True, "freed_bytes": freed}))

    async def _tell_state(self, client: Client, message: Mapping[str, Any]) -> None:
        its_class = self._class_of(message)
        told_s, answer = self._told.get(its_class.name, (-math.inf, b""))
        if time.monotonic() - told_s > STATE_S:
            answer = encode({"ok": True, "state": self._state_for(its_class)})
            self._told[its_class.name] = time.monotonic(), answer
        await self._send(client, answer)

    def _state_for(self, its_class: ClientClass) -> dict[str, Any]:
        """Return what a class of clients may know of the state."""
        state = dict(self._state())
        state["loads"] = [{**load, "report": {**load["report"], "spans": []}} for load in state["loads"]]
        for part in ("models", "transfers", "loads", "decisions", "forecast"):
            state[part] = [
                each for each in state[part] if _may_have(its_class, each.get("uri") or each["report"]["uri"])
            ]
        return state

    async def _hear_report(self, client: Client, message: Mapping[str, Any]) -> None:
        report = message["report"]
        if not isinstance(report, dict) or client.kept is None:
            raise DaemonError("a report of no load: expected that of the model that is attached")
        if report.get("uri") is None or not isinstance(report.get("seconds"), dict):
            raise DaemonError("a report without uri and seconds")
        self._residents.enter(report, "client", client.pid)

    # -- what a client may

    def _class_of(self, message: Mapping[str, Any]) -> ClientClass:
        """Return the class of a client. Raises AccessDeniedError for a wrong token, or none where one is needed."""
        if not self._tokens:
            return WHOEVER
        token = message.get("token")
        given = token.encode() if isinstance(token, str) else b""
        found = [each for expected, each in self._tokens if hmac.compare_digest(expected.encode(), given)]
        if not given or not found:
            raise AccessDeniedError("this daemon wants a token: set token_file in [daemon] of weightcache.toml")
        return found[0]

    def _uri(self, message: Mapping[str, Any]) -> tuple[str, ClientClass]:
        uri, its_class = message["uri"], self._class_of(message)
        if not isinstance(uri, str):
            raise ValueError("uri is no text")
        if not _may_have(its_class, uri):
            raise AccessDeniedError(f"clients of class {its_class.name} may not have {uri}")
        return uri, its_class

    def _request(self, message: Mapping[str, Any]) -> tuple[Request, ClientClass]:
        uri, its_class = self._uri(message)
        options = message["options"]
        if not isinstance(options, dict):
            raise ValueError("options are no object")
        if self.is_draining:
            raise DaemonError("this daemon is about to end")
        return Request(uri, options, offline=message.get("offline") is True or None), its_class

    def _check_surroundings(self, message: Mapping[str, Any]) -> None:
        """Raise DaemonError unless the client would ask the same places, by the same rules, as the same one."""
        if message["rules"] != self._rules:
            raise DaemonError("its policies, stores or place are not those of this process")
        theirs, given = message["surroundings"], {"key", "secret"} <= message["options"].keys()
        groups = ("places",) if self._settings.daemon.any_credentials or given else ("places", "credentials")
        for group in groups:
            names = theirs[group].keys() | self._surroundings[group].keys()
            other = sorted(name for name in names if theirs[group].get(name) != self._surroundings[group].get(name))
            if other:
                raise DaemonError(f"its {', '.join(other)} differs from this process's")

    def _check_quota(self, its_class: ClientClass) -> None:
        since_s, nbytes = self._prefetched.get(its_class.name, (time.time(), 0))
        if time.time() - since_s > DAY_S:
            del self._prefetched[its_class.name]
        elif its_class.prefetch_bytes_per_day and nbytes >= its_class.prefetch_bytes_per_day:
            raise AccessDeniedError(
                f"clients of class {its_class.name} have had {nbytes} bytes prefetched within a day, at most "
                f"{its_class.prefetch_bytes_per_day} are allowed"
            )

    def _count(self, its_class: ClientClass, nbytes: int) -> None:
        since_s, before = self._prefetched.get(its_class.name, (time.time(), 0))
        self._prefetched[its_class.name] = since_s, before + nbytes

    async def _while_beating(
        self,
        client: Client,
        work: Any,
        beat: Callable[[], Mapping[str, Any]] = dict,
    ) -> Any:
        """Wait for work, telling the client now and then that it is under way."""
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                await asyncio.wait([task], timeout=BEAT_S)
                if not task.done():
                    await self._send(client, encode({"wait": True, **beat()}))
            return task.result()
        finally:
            if not task.done():  # the client is gone: what was begun goes on, and is let go of
                task.add_done_callback(_forget)


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled() and task.exception() is None and isinstance(task.result(), Kept):
        host_tier.let_go(task.result().held)


def _refusal(exc: WeightcacheError) -> bytes:
    return encode({"ok": False, "code": exc.code, "error": str(exc)})


def _may_have(its_class: ClientClass, uri: str) -> bool:
    return any(fnmatch.fnmatchcase(uri, pattern) for pattern in its_class.models)


def _carried(kept: Kept) -> list[int]:
    """Return the shards that an image carries beside its tensors, in order."""
    chunks, shards = kept.held.layout.chunks, enumerate(kept.manifest.shards)
    return [number for number, shard in shards if shard.role is Role.FILE and (number, 0) in chunks]


def _ranges(flags: bytes | bytearray) -> list[list[int]]:
    """Return where flags are set, as ranges."""
    found: list[list[int]] = []
    at = flags.find(1)
    while at >= 0:
        stop = flags.find(0, at)
        stop = len(flags) if stop < 0 else stop
        found.append([at, stop])
        at = flags.find(1, stop)
    return found
