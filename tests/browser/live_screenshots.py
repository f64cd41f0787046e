"""Take two of the pictures in docs/images of a daemon that runs: in the middle of a real cold load, and at rest behind it.

python tests/browser/live_screenshots.py      3 GB of models in a temporary folder, an S3 server, a daemon, its clients
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import models
import screenshots
from chromium import Chromium, find_chromium
from nodes import ClientProcess, Node, clients, wait_until
from servers import Bucket, S3Server

from weightcache.forecast import Forecast

COLD = "llama-3.2-1b"
OTHERS: dict[str, models.Shapes] = {
    "qwen2.5-0.5b-instruct": {f"model.layers.{at}.weight": ("BF16", (4096, 1024)) for at in range(48)},
    "whisper-small": {f"decoder.layers.{at}.weight": ("F16", (2048, 1024)) for at in range(48)},
    "all-minilm-l6-v2": {f"encoder.layer.{at}.weight": ("F32", (512, 1024)) for at in range(40)},
}
ORIGIN_BYTES_PER_S = "150MB"  # so that the load is seen
SEEN_AT = 0.4
PATIENCE_S = 300.0


def publish(s3: S3Server, folder: Path) -> None:
    """Put the models into a bucket."""
    s3.client().create_bucket(Bucket="models")
    for name, shapes in OTHERS.items():
        models.write_sharded(folder / name, shapes, 2)
    models.write_llama_1b(folder / COLD)
    for name in (*OTHERS, COLD):
        Bucket(s3, "models").upload(folder / name, name)


def configure(s3: S3Server, folder: Path, port: int) -> str:
    """Set the environment, and the past of a model that is due; return the configuration."""
    options = s3.storage_options()
    os.environ |= {
        "WEIGHTCACHE_DIR": str(folder / "cache"),
        "AWS_ENDPOINT_URL": options["endpoint_url"],
        "AWS_ACCESS_KEY_ID": options["key"],
        "AWS_SECRET_ACCESS_KEY": options["secret"],
        "AWS_REGION": "us-east-1",
    }
    forecast = Forecast()
    for n_hours in range(12, 0, -1):
        forecast.used("s3://models/whisper-small", time.time() - n_hours * 3600 + 60)
    past = folder / "cache" / "daemon" / "forecast.json"
    past.parent.mkdir(mode=0o700, parents=True)
    past.write_text(json.dumps(forecast.to_form()))
    return (
        'host_budget_bytes = "6GB"\ndisk_budget_bytes = "20GB"\n'
        f'[daemon]\nhttp = "127.0.0.1:{port}"\nforecast = true\n'
        '[[warm]]\nmodel = "s3://models/qwen2.5-0.5b-instruct"\ntier = "host"\nuntil = "2h"\n'
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def load_and_close(name: str) -> None:
    client = ClientProcess(f"s3://models/{name}", {})
    with clients(client):
        client.result()
        client.end()


def main() -> None:
    program = find_chromium()
    if program is None:
        raise SystemExit("no chromium is on PATH: apt-get install chromium")
    with tempfile.TemporaryDirectory(prefix="weightcache-") as named, S3Server() as s3:
        folder, port = Path(named), free_port()
        publish(s3, folder / "published")
        configuration = configure(s3, folder, port)
        with Node(configuration) as node, Chromium(program, folder / "browser") as browser:
            wait_until(lambda: len(node.images()) == 2 and not node.state()["transfers"], PATIENCE_S)
            for _ in range(2):
                load_and_close("all-minilm-l6-v2")
            holding = [ClientProcess("s3://models/qwen2.5-0.5b-instruct", {}) for _ in range(2)]
            with clients(*holding):
                for client in holding:
                    client.result()
                node.write(f'max_bytes_per_s = "{ORIGIN_BYTES_PER_S}"\n{configuration}')
                loading = [ClientProcess(f"s3://models/{COLD}", {}) for _ in range(2)]
                with clients(*loading):
                    wait_until(lambda: _share_done(node) >= SEEN_AT, PATIENCE_S)
                    screenshots.shoot(browser, f"http://127.0.0.1:{port}", "page-cold-load", screenshots.WIDE, "dark")
                    for client in loading:
                        client.result()
                    wait_until(lambda: not node.state()["transfers"], PATIENCE_S)
                    screenshots.shoot(browser, f"http://127.0.0.1:{port}", "page-at-rest", screenshots.WIDE, "light")


def _share_done(node: Node) -> float:
    return max((each["done_bytes"] / each["total_bytes"] for each in node.state()["transfers"]), default=0.0)


main()
