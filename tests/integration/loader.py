"""A child process that loads a model when told to, and says what it got: `loader.py URI STORAGE_OPTIONS_JSON`."""

from __future__ import annotations

import json
import os
import sys

from reference import fingerprint

import weightcache
import weightcache.tensors  # what takes long to import, before the start is given


def main(uri: str, options: str) -> None:
    say("ready")
    while request := sys.stdin.readline():
        order = json.loads(request)
        if order == "fork":
            child = os.fork()
            if child == 0:
                load(uri, options)
                sys.exit(0)
            say(os.waitpid(child, 0)[1])
        else:
            load(uri, options)


def load(uri: str, options: str) -> None:
    try:
        with weightcache.load_model(uri, device="cpu", storage_options=json.loads(options)) as model:
            model.wait_stored()
            say({"fingerprint": fingerprint(model), "bytes": model.report.bytes, "warnings": model.report.warnings})
    except KeyboardInterrupt:
        say("interrupted")


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
