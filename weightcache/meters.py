"""Own the process's counters, named as Prometheus names them.

Never goes down, never holds a secret, and never serves them: that is who asks for the text.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

Labels = tuple[tuple[str, str], ...]

_lock = threading.Lock()  # of _counters
_counters: dict[tuple[str, Labels], float] = {}


def add(name: str, amount: float, **labels: str) -> None:
    """Add to a counter, `weightcache_…_total`; labels tell its series apart, and are few. Thread-safe."""
    key = name, tuple(sorted(labels.items()))
    with _lock:
        _counters[key] = _counters.get(key, 0) + amount


def snapshot() -> Mapping[tuple[str, Labels], float]:
    """Return every series, by name and sorted labels, as it stands. Thread-safe."""
    with _lock:
        return dict(_counters)


def text() -> str:
    """Return every series in Prometheus's text format, sorted; a line each, after one that types its name."""
    lines: list[str] = []
    typed = ""
    for (name, labels), value in sorted(snapshot().items()):
        if name != typed:
            typed = name
            lines.append(f"# TYPE {name} counter\n")
        told = ",".join(f'{label}="{_escape(text)}"' for label, text in labels)
        lines.append(f"{name}{{{told}}} {value!r}\n" if told else f"{name} {value!r}\n")
    return "".join(lines)


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _after_fork_in_child() -> None:
    # What its parent did is not the child's, and the lock may be held by a thread that stayed there.
    global _lock
    _lock = threading.Lock()
    _counters.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
