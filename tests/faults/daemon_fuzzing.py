"""Messages at the daemon's socket that no client sends: random bytes, and real messages with something wrong in them.

python tests/faults/daemon_fuzzing.py N SEED      N messages at a daemon of its own, counted
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from nodes import Node, receive

EXAMPLES: list[dict[str, Any]] = [
    {"v": 1, "op": "status"},
    {"v": 1, "op": "evict", "uri": "s3://bucket/model", "options": {}},
    {"v": 1, "op": "report", "report": {"uri": "s3://bucket/model", "seconds": {}}},
    {
        "v": 1,
        "op": "attach",
        "uri": "/nowhere",
        "options": {},
        "offline": False,
        "place": [1, 2],
        "resident_only": True,
        "rules": "",
        "surroundings": {"places": {}, "credentials": {}},
        "token": "",
    },
    {"v": 1, "op": "warm", "uri": "/nowhere", "options": {}, "tier": "host", "rules": "", "surroundings": {}},
]
VALUES: list[Any] = [None, True, -1, 1 << 70, 1e308, "", "\0", "\ud800", "x" * 5000, [], {}, [[]], {"a": {"b": []}}]


@dataclass
class Tally:
    """What became of messages. `wrong` says what should not have been."""

    n: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def mutated(chance: random.Random) -> bytes:
    """Return a message, or what is none."""
    kind = chance.randrange(4)
    if kind == 0:
        return chance.randbytes(chance.randrange(64))
    form = dict(chance.choice(EXAMPLES))
    for _ in range(chance.randrange(3)):
        name = chance.choice([*form, "unknown"])
        if chance.random() < 0.3:
            form.pop(name, None)
        else:
            form[name] = chance.choice(VALUES)
    body = json.dumps(form).encode()
    if kind == 1:
        at = chance.randrange(len(body))
        body = body[:at] + chance.randbytes(chance.randrange(1, 5)) + body[at + 1 :]
    nbytes = len(body) if kind != 2 else max(0, len(body) + chance.randrange(-20, 20))
    return nbytes.to_bytes(4, "big") + body


def fuzz(node: Node, n_messages: int, seed: int) -> Tally:
    """Send so many messages, several a connection; the daemon must answer everybody else all the while."""
    chance, tally = random.Random(seed), Tally()
    descriptors = Path(f"/proc/{node.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    while tally.n < n_messages:
        with node.connect() as sock:
            sent = [mutated(chance) for _ in range(chance.randrange(1, 50))]
            tally.n += len(sent)
            try:
                for each in sent:
                    sock.sendall(each)
                sock.shutdown(socket.SHUT_WR)
                while True:
                    answer = receive(sock)
                    if "wait" not in answer:
                        tally.answers["ok" if answer.get("ok") else str(answer.get("code"))] += 1
            except (ConnectionError, BrokenPipeError):
                pass
            except (TimeoutError, ValueError) as exc:
                tally.wrong.append(f"after {tally.n} messages: {exc!r}")
        if tally.n % 1000 < 50 and not node.state()["is_ready"]:
            tally.wrong.append(f"not ready after {tally.n} messages")
    if node.process.poll() is not None:
        tally.wrong.append("it ended")
    state = node.state()
    if [model for model in state["models"] if model["tier"] == "host"]:
        tally.wrong.append(f"it holds models: {state['models']}")
    if len(list(descriptors.iterdir())) > before + 3:
        tally.wrong.append("it keeps descriptors")
    return tally


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WEIGHTCACHE_DIR"] = f"{folder}/cache"
        with Node() as node:
            print(fuzz(node, int(sys.argv[1]), int(sys.argv[2])))
