"""Own the entry point of the command line, which says what to install where its extra is missing.

Never imports more than that needs: `weightcache --version` answers without click and rich.
"""

from __future__ import annotations

import sys

import weightcache


def main() -> int:
    """Run the command line with this process's arguments. Returns the exit code."""
    if sys.argv[1:] == ["--version"]:
        print(f"weightcache {weightcache.__version__}")
        return 0
    try:
        import click  # noqa: F401
        import rich  # noqa: F401
    except ModuleNotFoundError:
        print('weightcache\'s command line needs its extra: pip install "weightcache[cli]"', file=sys.stderr)
        return 2
    from weightcache.cli.app import run

    return run(sys.argv[1:])
