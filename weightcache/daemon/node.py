"""Own the daemon's life: its socket, its threads, what it does by itself, and how it ends.

Never imports torch, and never leaves a socket behind that nobody answers: one daemon has a folder, by a kernel lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import itertools
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvloop

from weightcache import _engine, meters, upkeep
from weightcache._version import __version__
from weightcache.config import Settings, read_settings, take_service_environment
from weightcache.daemon import hugepages, web
from weightcache.daemon.hub import Hub
from weightcache.daemon.listening import Listener
from weightcache.daemon.residents import Residents, describe_image
from weightcache.daemon.server import Server
from weightcache.daemon.service import ServiceManager, inherited_socket
from weightcache.daemon.settings import DEFAULT_HTTP
from weightcache.daemon.warming import Warming
from weightcache.errors import ConfigError, DaemonError, ModelNotFoundError, WeightcacheError
from weightcache.machine import memory_available_bytes
from weightcache.tiers.host import host_budget_bytes, host_tier

log = logging.getLogger(__name__)

DISK_LOOK_S = 5.0  # how old what is said of the disk may be
TELL_S = 10.0  # how often the service manager hears how things are, where it sets no watchdog
PREPARED_NBYTES = 256 << 20  # at once
DRAIN_S = 30.0  # longest wait for what is under way when it ends
END_S = 2.0  # after which the process ends without threads that hang in a library or the kernel


class Daemon:
    """The daemon of one node.

    Args:
        settings: Of this process.
        manager: Who started it.
    """

    def __init__(self, settings: Settings, manager: ServiceManager) -> None:
        self.settings = settings
        self._manager = manager
        self.residents = Residents()
        self.server = Server(settings, self.residents, self.state, upkeep.evict_here)
        self.warming = Warming(settings, self.residents)
        self._started_s = time.time()
        self._disk: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])  # its tier, its models
        self._disk_is_wanted = asyncio.Event()
        self._is_ready = False
        self._huge_pages = ""

    def run(self, listening: socket.socket | None = None) -> None:
        """Serve until SIGTERM or SIGINT. `listening`: a socket that the service manager opened.

        Raises:
            DaemonError: Another daemon serves this socket, or it cannot be made.
        """
        path = self.settings.socket_path
        if path is None:
            raise ConfigError(
                'socket is "none", and a daemon needs one: leave it out, or name a path (WEIGHTCACHE_SOCKET)'
            )
        self._own_socket = path if listening is None else None
        _raise_limits()
        folder_mode = 0o711 if self.settings.daemon.uids else 0o700
        with _alone(path, folder_mode), contextlib.closing(listening or _listen(path, self.settings)) as sock:
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(self._serve(sock))
            finally:
                if listening is None:
                    path.unlink(missing_ok=True)

    def _leave(self, exit_code: int) -> None:
        """End the process where it does not end by itself: a library or the kernel keeps a thread."""
        log.warning("threads hang that cannot be stopped: ending without them, as a kill would, which harms no bytes")
        if self._own_socket is not None:
            self._own_socket.unlink(missing_ok=True)
        os._exit(exit_code)

    async def _serve(self, sock: socket.socket) -> None:
        loop, ended, hurried = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, lambda: (hurried if ended.is_set() else ended).set())
        loop.add_signal_handler(signal.SIGHUP, self._reread)
        works = (self.server.serve(sock), self.warming.run(), self._look(), self._tell_manager())
        tasks = [asyncio.create_task(each) for each in works]
        page = await self._open_page()
        hub = await self._open_hub()
        self._manager.ready()
        preparing = asyncio.create_task(self._prepare())
        waited: list[asyncio.Task[Any]] = [asyncio.create_task(ended.wait()), *tasks]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()  # raises
        finally:
            preparing.cancel()
            await self._drain(hurried)
            last = threading.Timer(END_S, self._leave, (0 if ended.is_set() else 1,))
            last.daemon = True
            last.start()
            for each in waited:
                each.cancel()
            await asyncio.gather(preparing, *waited, return_exceptions=True)
            for face in (page, hub):  # first: the models that it reads are closed by what ends next
                if face is not None:
                    await face.close()
            await loop.run_in_executor(None, self.residents.close)
            await self.server.close()

    async def _prepare(self) -> None:
        """Reserve huge pages, and touch memory once: its first use costs a virtual machine ten times what clearing does."""
        loop, huge_bytes = asyncio.get_running_loop(), self.settings.daemon.huge_bytes
        if huge_bytes:
            reservation = await loop.run_in_executor(None, hugepages.reserve, huge_bytes)
            self._huge_pages = str(reservation)
            log.log(logging.INFO if reservation.is_whole else logging.WARNING, "%s", reservation)
        nbytes = min(self.settings.daemon.ready_bytes, memory_available_bytes() * 3 // 4)
        began = time.monotonic()
        with contextlib.suppress(OSError):
            memory = _engine.SharedMemory(nbytes, "weightcache-ready")
            for start in range(0, nbytes, PREPARED_NBYTES):
                stop = min(nbytes, start + PREPARED_NBYTES)
                await loop.run_in_executor(None, memory.populate, start, stop)
        if nbytes:
            log.info("%d bytes of memory are ready after %.1f s", nbytes, time.monotonic() - began)
        # What is there now stays: walked each time garbage is collected, it held answers up in the middle of loads.
        gc.collect()
        gc.freeze()
        self._is_ready = True
        log.info("the daemon %d serves on %s", os.getpid(), self.settings.socket_path)

    async def _drain(self, hurried: asyncio.Event) -> None:
        """Begin nothing new, and wait for what is under way, until there is a hurry."""
        self.server.is_draining = self.warming.is_draining = True
        self._is_ready = False
        self._manager.stopping()
        log.info("ending: %d transfers are under way", len(self.residents.moving))
        deadline = time.monotonic() + DRAIN_S
        while self.residents.moving and not hurried.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if self.residents.moving:
            log.warning("ending: %d transfers are broken off", len(self.residents.moving))

    async def _open_page(self) -> Listener | None:
        """Serve the page, metrics and health. Raises ConfigError where they cannot be served as was asked."""
        address = self.settings.daemon.http
        if address is None:
            return None
        try:
            return await web.serve(self.state, self.metrics, self.why_not_ready, address)
        except ConfigError as exc:
            if address != DEFAULT_HTTP:
                raise
            log.warning("no page and no metrics: %s", exc)
            return None

    async def _open_hub(self) -> Hub | None:
        """Answer as a Hugging Face Hub where that is configured. Raises ConfigError where it cannot be."""
        settings = self.settings.hub
        if settings is None or settings.address is None:
            return None
        hub = Hub(settings, may_attach=False)
        port = await hub.serve(settings.address)
        log.info("the Hub face answers at %s:%d", settings.address[0], port)
        return hub

    def _reread(self) -> None:
        """Take the configuration as it is now; what is wrong with it changes nothing."""
        self._manager.reloading()
        try:
            settings = read_settings()
            if (settings.dir, settings.socket_path) != (self.settings.dir, self.settings.socket_path):
                raise ConfigError("dir and socket cannot change while the daemon runs: restart it")
            self.server.reread(settings)
            self.warming.reread(settings)
            self.settings = settings
            log.info("the configuration was read again")
        except WeightcacheError as exc:
            log.error("the configuration was not taken: %s", exc)
        finally:
            self._manager.ready()

    async def _tell_manager(self) -> None:
        """Put off the watchdog for as long as this loop runs, and say how things are."""
        while True:
            images = host_tier.images()
            nbytes = sum(held.nbytes for held in images)
            self._manager.status(f"{len(images)} models, {nbytes} bytes in memory; {len(self.server.clients)} clients")
            self._manager.alive()
            await asyncio.sleep(self._manager.watchdog_s or TELL_S)

    # -- what it says of itself

    def why_not_ready(self) -> str:
        """Say why it does not serve; empty where it does."""
        return "" if self._is_ready else "it is starting or ending"

    def metrics(self) -> str:
        """Return all meters in Prometheus's text format, gauges as things are now."""
        state = self.state()
        meters.set("weightcache_build_info", 1, version=__version__)
        meters.set("weightcache_clients", state["n_clients"])
        meters.set("weightcache_leases", sum(model["n_leases"] for model in state["models"] if model["tier"] == "host"))
        for tier in state["tiers"]:
            meters.set("weightcache_tier_used_bytes", tier["used_bytes"], tier=tier["tier"])
            meters.set("weightcache_tier_budget_bytes", tier["budget_bytes"], tier=tier["tier"])
        found = Counter((model["tier"], model["state"]) for model in state["models"])
        for tier, is_now in itertools.product(meters.TIERS, meters.STATES):
            meters.set("weightcache_models", found[tier, is_now], tier=tier, state=is_now)
        return meters.text()

    def state(self) -> dict[str, Any]:
        """Return everything there is to know, for JSON."""
        now_s, images = time.time(), host_tier.images()
        budget = host_budget_bytes(self.settings.host_budget_bytes)
        leased = sum(held.nbytes for held in images if held.n_users)
        host = {"tier": "host", "used_bytes": host_tier.used_bytes(), "budget_bytes": budget, "leased_bytes": leased}
        disk_tiers, disk_models = self._disk
        self._disk_is_wanted.set()
        return {
            "version": __version__,
            "pid": os.getpid(),
            "started_s": self._started_s,
            "now_s": now_s,
            "socket": str(self.settings.socket_path),
            "dir": str(self.settings.dir),
            "is_ready": self._is_ready,
            "n_clients": len(self.server.clients),
            "n_refused": self.server.n_refused,
            "huge_pages": self._huge_pages,
            "tiers": [host, *disk_tiers],
            "models": [*(describe_image(held, host_tier.until_s.get(held.uri)) for held in images), *disk_models],
            "transfers": [each.as_dict(now_s) for each in self.residents.moving.values() if each.total_bytes],
            "loads": list(self.residents.loads),
            "limits": self.residents.limits,
            "decisions": [each.as_dict() for each in self.residents.decisions],
            "forecast": self.warming.expected(now_s),
            "ledger": self.residents.ledger,
        }

    async def _look(self) -> None:
        """Look at the disk tier now and then, while somebody asks."""
        while True:
            await self._disk_is_wanted.wait()
            self._disk_is_wanted.clear()
            with contextlib.suppress(WeightcacheError, OSError):
                self._disk = await asyncio.get_running_loop().run_in_executor(None, self._look_at_disk)
            await asyncio.sleep(DISK_LOOK_S)

    def _look_at_disk(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        try:
            used_bytes, budget_bytes = upkeep.disk_use()
            found = upkeep.disk_models()
        except ModelNotFoundError:
            return [], []
        leased = sum(model.bytes for model in found if model.in_use)
        tier = {"tier": "disk", "used_bytes": used_bytes, "budget_bytes": budget_bytes, "leased_bytes": leased}
        return [tier], [
            {
                "uri": model.uri,
                "revision": "",
                "tier": "disk",
                "state": "resident",
                "bytes": model.bytes,
                "total_bytes": model.total_bytes,
                "n_hits": 0,
                "n_leases": int(model.in_use),
                "last_use_s": model.last_use_s,
                "pinned": model.pinned,
                "until_s": None,
                "pages": "",
            }
            for model in found
        ]


def serve() -> None:
    """Run the daemon in the foreground; see `weightcache.serve`."""
    passed = take_service_environment()
    Daemon(read_settings(), ServiceManager(passed)).run(inherited_socket(passed))


@contextlib.contextmanager
def _alone(path: Path, folder_mode: int) -> Iterator[None]:
    """Be the only daemon of a socket for the length of the block. Raises DaemonError."""
    try:
        path.parent.mkdir(mode=folder_mode, parents=True, exist_ok=True)
        fd = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise DaemonError(f"the socket {path} cannot be made: {exc.strerror or exc}", path=str(path)) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(fd)
        raise DaemonError(f"another daemon serves on {path}: weightcache status shows it", path=str(path)) from exc
    try:
        yield
    finally:
        os.close(fd)


def _listen(path: Path, settings: Settings) -> socket.socket:
    """Open the socket. What lies there is of a daemon that has died: this one has the lock."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177 if not settings.daemon.uids else 0o111)
    folder = -1
    try:
        path.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sock.bind(f"/proc/self/fd/{folder}/{path.name}")  # a path may be longer than a socket's name
        sock.listen(512)
    except OSError as exc:
        sock.close()
        raise DaemonError(f"the socket {path} cannot be made: {exc.strerror or exc}", path=str(path)) from exc
    finally:
        os.umask(before)
        if folder >= 0:
            os.close(folder)
    return sock


def _raise_limits() -> None:
    """Let it have as many descriptors as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
