"""A child process of test_fork.py: holds a model, forks, and says what is left when the grandchild has ended.

Usage: forking.py FOLDER CACHE_MODE; the folder is copied to memory, where the model is loaded from.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import fsspec
from reference import fingerprint

import weightcache
from weightcache.tensors import LoadedModel

URI = "memory://forking/model"


def open_model(mode: str) -> LoadedModel:
    model = weightcache.load_model(URI, "cpu", cache=mode)
    model.wait_stored()
    return model


def say(what: str, model: LoadedModel) -> None:
    files = all(path.exists() for path in model.files.values())
    in_use = [each.in_use for each in weightcache.models()]
    print(json.dumps([what, fingerprint(model), files, in_use]), flush=True)


def main() -> None:
    folder, mode = sys.argv[1:]
    memory = fsspec.filesystem("memory")
    for path in Path(folder).iterdir():
        memory.pipe_file(f"{URI}/{path.name}", path.read_bytes())
    model = open_model(mode)
    pid = os.fork()
    if pid == 0:
        say("its tensors in the child", model)
        with open_model(mode) as own:
            say("a load in the child", own)
        model.close()
        sys.exit(0)  # the whole way out, with all that is done at exit
    assert os.waitpid(pid, 0)[1] == 0
    say("after the child", model)
    with open_model(mode) as again:
        say("another load", again)
    model.close()


if __name__ == "__main__":
    main()
