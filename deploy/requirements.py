"""Print what weightcache needs to run as a daemon: what pyproject.toml wants, and some of its extras, without torch.

The daemon hands out bytes and never makes a tensor; torch would be most of its image.

    python deploy/requirements.py cli daemon > requirements.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
UNWANTED = "torch"


def requirements(*extras: str) -> list[str]:
    """Return the requirements of the package and these extras, as pip reads them."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    wanted = [*project["dependencies"], *(each for extra in extras for each in project["optional-dependencies"][extra])]
    return [each for each in wanted if re.split(r"[^\w.-]", each)[0] != UNWANTED]


if __name__ == "__main__":
    sys.stdout.write("".join(f"{each}\n" for each in requirements(*sys.argv[1:])))
