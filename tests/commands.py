"""Own the command line as tests run it in their own process; the fixtures that give it are in integration/conftest.py.

Never starts a process.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

Run = Callable[..., subprocess.CompletedProcess[str]]
Answer = Callable[..., dict[str, Any]]
