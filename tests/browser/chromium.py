"""Own a headless Chromium as tests drive it: pages opened, keys pressed, what was asked for and drawn, over a pipe.

Never downloads a browser, and lets the one that is installed dial nothing but 127.0.0.1.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_S = 30.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--no-first-run",
    "--remote-debugging-pipe",
)
# DevTools speaks at descriptors 3 and 4 of the process it is told to start with.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def find_chromium() -> str | None:
    """Return the browser of this machine, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Chromium:
    """A running browser. For one thread."""

    def __init__(self, program: str, folder: Path) -> None:
        self._numbers = itertools.count(1)
        self._received = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        theirs_in, self._out = _pipe()
        self._in, theirs_out = _pipe()
        arguments = [program, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, str(theirs_in), str(theirs_out), *arguments],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)  # its children, too, in the session that we began
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open_tab(self, width: int = 1280, height: int = 900, **media: str) -> Tab:
        """Return a new tab of this size; `media` are features such as prefers_color_scheme."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, target, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            tab.call(f"{domain}.enable")
        tab.resize(width, height)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        tab.call("Emulation.setEmulatedMedia", features=features)
        return tab

    def call(self, method: str, session: str = "", **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol, and return its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + PATIENCE_S
        while number not in self._answers:
            self._receive(deadline_s, method)
        answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def events(self, session: str, method: str) -> list[dict[str, Any]]:
        """Return what a tab has told of this kind so far."""
        return [each["params"] for each in self._events if (each.get("sessionId"), each["method"]) == (session, method)]

    def wait(self, session: str, method: str, number: int) -> None:
        """Wait until a tab has told of so many events of this kind."""
        deadline_s = time.monotonic() + PATIENCE_S
        while len(self.events(session, method)) < number:
            self._receive(deadline_s, method)

    def _receive(self, deadline_s: float, method: str) -> None:
        readable, _, _ = select.select([self._in], [], [], max(0.0, deadline_s - time.monotonic()))
        assert readable, f"{method}: no answer in {PATIENCE_S} s"
        piece = os.read(self._in, 1 << 20)
        assert piece, f"{method}: the browser is gone"
        *messages, self._received = (self._received + piece).split(b"\0")
        for message in map(json.loads, messages):
            if "id" in message:
                self._answers[message["id"]] = message
            else:
                self._events.append(message)


class Tab:
    """One page of a browser."""

    def __init__(self, browser: Chromium, target: str, session: str) -> None:
        self._browser, self._target, self._session = browser, target, session

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def resize(self, width: int, height: int) -> None:
        """Make the window this large, in pixels of CSS."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def go(self, url: str, until: str = "true") -> None:
        """Open a page, and wait until it is loaded and an expression of its is true."""
        n_loaded = len(self._browser.events(self._session, "Page.loadEventFired"))
        self.call("Page.navigate", url=url)
        self._browser.wait(self._session, "Page.loadEventFired", n_loaded + 1)
        self.wait(until)

    def run(self, expression: str) -> Any:
        """Return the value of an expression, a promise's when it has one."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        look = f"() => ({expression}) ? done(true) : Date.now() > end ? done(false) : setTimeout(look, 20)"
        end = f"Date.now() + {PATIENCE_S * 500}"  # before the command's own deadline
        is_true = self.run(f"new Promise(done => {{ const end = {end}; const look = {look}; look(); }})")
        assert is_true, f"not in {PATIENCE_S / 2} s: {expression}"

    def press(self, key: str) -> None:
        """Press a key: Tab, Enter or Space."""
        known = {"Tab": (9, "\t"), "Enter": (13, "\r"), "Space": (32, " ")}
        code, text = known[key]
        facts = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **facts, **({} if key == "Tab" else {"text": text}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def requested(self) -> list[str]:
        """Return the URLs that the page has asked for."""
        return [each["request"]["url"] for each in self._browser.events(self._session, "Network.requestWillBeSent")]

    def complaints(self) -> list[str]:
        """Return what the browser held against the page: exceptions, and what its policy forbade."""
        thrown = self._browser.events(self._session, "Runtime.exceptionThrown")
        logged = self._browser.events(self._session, "Log.entryAdded")
        said = self._browser.events(self._session, "Runtime.consoleAPICalled")
        return [
            *(str(each["exceptionDetails"]) for each in thrown),
            *(each["entry"]["text"] for each in logged if each["entry"]["level"] == "error"),
            *(str(each["args"]) for each in said if each["type"] == "error"),
        ]

    def shoot(self, height: int | None = None) -> bytes:
        """Return a picture of the page as PNG, whole or down to a height."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {
            "x": 0,
            "y": 0,
            "width": size["width"],
            "height": min(size["height"], height or size["height"]),
            "scale": 1,
        }
        return base64.b64decode(self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"])


OpenPage = Callable[..., Tab]


def _pipe() -> tuple[int, int]:
    """Return a pipe whose ends have numbers above those that the browser wants."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]
