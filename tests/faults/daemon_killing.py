"""Daemons and clients that are killed at random moments under load: maps stay, leases go, nothing is wrong or left.

python tests/faults/daemon_killing.py N SEED      N kills, counted
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import models
from hosted import Hosted, host
from nodes import ClientProcess, Node, clients, wait_until
from reference import fingerprint
from servers import Proxy, S3Server

N_CLIENTS = 2
LEASE_S = 5.0  # a killed process's socket is closed when the kernel gets to it
RESTART_S = 2.0


@dataclass
class Tally:
    """What was killed, and what came of it. `wrong` says what should not have been."""

    n_daemons: int = 0
    n_clients: int = 0
    n_attached: int = 0
    n_lost: int = 0  # loads that went on by themselves
    slowest_restart_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


def kill_at_random(node: Node, hosted: Hosted, n_kills: int, seed: int) -> Tally:
    """Kill so often, the daemon or a client, while clients load; the others must end right."""
    chance, tally, expected = random.Random(seed), Tally(), fingerprint(hosted.tensors)
    for number in range(n_kills):
        node.ask({"op": "evict", "uri": hosted.url, "options": {}})  # so that something moves
        loading = [ClientProcess(hosted.url, hosted.options) for _ in range(N_CLIENTS)]
        with clients(*loading):
            time.sleep(chance.uniform(0.0, 3.0))
            if chance.random() < 0.5:
                node.kill()
                tally.n_daemons += 1
                began = time.monotonic()
                node.start()
                tally.slowest_restart_s = max(tally.slowest_restart_s, time.monotonic() - began)
            else:
                loading.pop().kill()
                tally.n_clients += 1
            for client in loading:
                loaded = client.result()
                report = loaded["report"]
                tally.n_attached += report["choices"].get("daemon", "").startswith("attached")
                tally.n_lost += any("without it" in warning for warning in report["warnings"])
                if loaded["tensors"] != expected or client.end() != expected:
                    tally.wrong.append(f"kill {number}: wrong bytes")
            try:
                wait_until(lambda: all(not model["n_leases"] for model in node.images().values()), LEASE_S)
            except TimeoutError:
                tally.wrong.append(f"kill {number}: a lease is left: {node.images()}")
    node.kill()
    node.start()
    last = ClientProcess(hosted.url, hosted.options)
    with clients(last):
        last.result()
        last.end()
    try:
        wait_until(lambda: not list((node.folder / "staging").iterdir()), LEASE_S)
    except TimeoutError:
        tally.wrong.append(f"litter: {sorted((node.folder / 'staging').iterdir())[:5]}")
    return tally


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, S3Server() as s3:
        os.environ["WEIGHTCACHE_DIR"] = f"{folder}/cache"
        checkpoint = Path(folder, "model")
        checkpoint.mkdir()
        shapes: models.Shapes = {f"layer.{number}.weight": ("F32", (512, 1024)) for number in range(8)}
        models.write_safetensors(checkpoint / "model.safetensors", shapes)
        with Proxy(s3.address, (s3.key, s3.secret)) as proxy, Node() as daemon:
            hosting = host(checkpoint, s3.create_bucket(), proxy)
            print(kill_at_random(daemon, hosting, int(sys.argv[1]), int(sys.argv[2])))
