"""Own what the Hub's own client, and transformers, see of a Hub face: run as a process, which tells it as JSON.

Never imports weightcache. HF_ENDPOINT, which is read at import, names the face; the arguments are another face that fetches
from it, a folder of the model and a cache that it was laid out in.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
from reference import fingerprint, hashes
from transformers import AutoModelForCausalLM, AutoTokenizer


def named(work: Callable[[], object]) -> str:
    """Return the name of the client's own error for what cannot be had."""
    try:
        work()
    except (huggingface_hub.errors.HfHubHTTPError, ValueError, OSError) as exc:
        return type(exc).__name__
    return "nothing was raised"


def weights(name: str, **options: Any) -> str:
    return fingerprint(AutoModelForCausalLM.from_pretrained(name, **options).state_dict())


def seek() -> list[str]:
    """Read here and there in a file, as the client's file system does."""
    with HfFileSystem().open("org/tiny/tiny.gguf") as file:
        found = []
        for at in (18 << 20, 0, (16 << 20) - 10):
            file.seek(at)
            found.append(sha256(file.read(1000)).hexdigest())
    return found


def main(below: str, folder: str, laid: str) -> dict[str, Any]:
    api = HfApi()
    info = api.model_info("org/tiny", files_metadata=True)
    tokenizer = AutoTokenizer.from_pretrained("org/tiny")
    return {
        "sha": info.sha,
        "sizes": {each.rfilename: each.size for each in info.siblings or []},
        "tree": sorted(each.path for each in api.list_repo_tree("org/tiny", recursive=True)),
        "paths": [each.path for each in api.get_paths_info("org/tiny", ["sub/a b.txt", "sub", "none"])],
        "tags": {ref.name: ref.target_commit for ref in api.list_repo_refs("org/published").tags},
        "snapshot": hashes(snapshot_download("org/tiny")),
        "one of many": hashes(Path(hf_hub_download("org/any", "config.json")).parent),
        "tagged": hashes(snapshot_download("org/published", revision="v2")),
        "by commit": hashes(
            snapshot_download("org/published", revision=api.model_info("org/published", revision="v2").sha)
        ),
        "seek": seek(),
        "errors": {
            "repository": named(lambda: hf_hub_download("org/none", "config.json")),
            "file": named(lambda: hf_hub_download("org/tiny", "none.json")),
            "revision": named(lambda: hf_hub_download("org/tiny", "config.json", revision="v9")),
            "commit": named(lambda: snapshot_download("org/tiny", revision="0" * 40)),
            "published revision": named(lambda: api.model_info("org/published", revision="v9")),
            "tree": named(lambda: list(api.list_repo_tree("org/tiny", "none"))),
            "who": named(lambda: api.whoami("hf_none")),
            "upstream": named(lambda: hf_hub_download("org/none", "config.json", endpoint=below)),
        },
        "below": hashes(snapshot_download("org/tiny", endpoint=below, cache_dir=f"{laid}-below")),
        "weights": {"folder": weights(folder), "face": weights("org/tiny")},
        "tokens": tokenizer("hello world")["input_ids"],
    }


def offline(laid: str) -> dict[str, Any]:
    """Tell what is found in a cache, as with HF_HUB_OFFLINE=1, which is read at import."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    return {
        "offline": hashes(snapshot_download("org/laid", cache_dir=laid)),
        "offline weights": weights("org/laid", cache_dir=laid),
    }


if __name__ == "__main__":
    told = main(*sys.argv[1:]) | offline(sys.argv[3])
    sys.stdout.write(f"{json.dumps(told)}\n")
