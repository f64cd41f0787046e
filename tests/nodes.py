"""Own a node daemon as a process, and processes that are its clients.

Never imports weightcache: what runs is what a user runs.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

READY_TIMEOUT_S = 60.0
END_TIMEOUT_S = 60.0

# Loads, prints what it got as JSON, and holds it until its input ends.
CLIENT = """if True:
    import json, os, sys
    sys.path.insert(0, sys.argv[1])
    from reference import fingerprint
    import weightcache

    model = weightcache.load_model(sys.argv[2], "cpu", storage_options=json.loads(sys.argv[3]))
    files = {name: str(path) for name, path in model.files.items()}
    print(json.dumps({"tensors": fingerprint(model), "files": files, "report": model.report.as_dict()}), flush=True)
    sys.stdin.read()
    print(fingerprint(model), flush=True)
    model.close()
"""


class Node:
    """A daemon of the cache folder that the environment names, started by the constructor and ready when it returns."""

    def __init__(self, configuration: str = "", arguments: Sequence[str] = ()) -> None:
        self.arguments = arguments
        self.folder = Path(os.environ["WEIGHTCACHE_DIR"])
        self.socket = Path(os.environ.get("WEIGHTCACHE_SOCKET", str(self.folder / "daemon" / "socket")))
        self.log = self.folder.with_name("daemon.log")
        self.configuration = self.folder.with_name("weightcache.toml")
        self.write(configuration)
        os.environ["WEIGHTCACHE_CONFIG"] = str(self.configuration)
        self.start()

    def write(self, configuration: str) -> None:
        """Write the configuration; a page is served on no port unless it says so."""
        page = "" if "[daemon]" in configuration else '[daemon]\nhttp = ""\n'
        self.configuration.write_text(f"{configuration}{page}")

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "weightcache", "daemon", *self.arguments], stderr=log
            )
        wait_until(self._is_ready, READY_TIMEOUT_S)

    def _is_ready(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the daemon ended with {self.process.returncode}:\n{self.log.read_text()}")
        try:
            return bool(self.ask({"op": "status"})["state"]["is_ready"])
        except OSError:
            return False

    def connect(self) -> socket.socket:
        folder = os.open(self.socket.parent, os.O_PATH)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        try:
            sock.connect(f"/proc/self/fd/{folder}/{self.socket.name}")
        except OSError:
            sock.close()
            raise
        finally:
            os.close(folder)
        return sock

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Ask for something, by the bytes that a client sends."""
        with self.connect() as sock:
            body = json.dumps({"v": 1, **message}).encode()
            sock.sendall(len(body).to_bytes(4, "big") + body)
            return receive(sock)

    def state(self) -> dict[str, Any]:
        state = self.ask({"op": "status"})["state"]
        assert isinstance(state, dict)
        return state

    def images(self) -> dict[str, dict[str, Any]]:
        """Return what is in host memory, by URI."""
        return {model["uri"]: model for model in self.state()["models"] if model["tier"] == "host"}

    def image(self, uri: str) -> dict[str, Any]:
        """Return what is said of a model in host memory; nothing where it is not, or is not told of yet."""
        return self.images().get(uri, {})

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(END_TIMEOUT_S)

    def stop(self) -> int:
        """End it as a service manager does; returns its exit code."""
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        return self.process.wait(END_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop()


class ClientProcess:
    """A process that loads a model and holds it."""

    def __init__(self, url: str, options: Mapping[str, str], environment: Mapping[str, str] | None = None) -> None:
        arguments = [str(Path(__file__).parent), url, json.dumps(options)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def result(self) -> dict[str, Any]:
        """Wait until the model is loaded; returns what was got."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the client ended with {self.process.wait(END_TIMEOUT_S)}"
        loaded = json.loads(line)
        assert isinstance(loaded, dict)
        return loaded

    def end(self) -> str:
        """Let it close the model and end; returns the fingerprint of what it still had."""
        told, _ = self.process.communicate(timeout=END_TIMEOUT_S)
        assert self.process.returncode == 0
        return told.strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=END_TIMEOUT_S)


@contextmanager
def clients(*each: ClientProcess) -> Iterator[None]:
    """Have clients gone at the end of the block, however it ends."""
    try:
        yield
    finally:
        for client in each:
            if client.process.poll() is None:
                client.kill()


def receive(sock: socket.socket) -> dict[str, Any]:
    """Return the next message."""
    body = exactly(sock, int.from_bytes(exactly(sock, 4), "big"))
    message = json.loads(body)
    assert isinstance(message, dict)
    return message


def exactly(sock: socket.socket, nbytes: int) -> bytes:
    content = b""
    while len(content) < nbytes:
        received = sock.recv(nbytes - len(content))
        if not received:
            raise ConnectionError("the daemon closed the connection")
        content += received
    return content


def wait_until(is_so: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Wait until something is so. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it was not so within {timeout_s} s")
        time.sleep(0.02)
