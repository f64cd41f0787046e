"""Own the folders below the cache folder that vLLM reads: one a revision, there as a whole or not at all, and never changed.

Never imports vLLM.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import weightcache


def bring(uri: str, kept: Path, **what: Any) -> tuple[Path, Any]:
    """Pull what is wanted of a model into the folder of its revision below a folder, and return that and the report.

    Args:
        what: Of `weightcache.pull`; the same for all that is kept in one folder.

    Raises:
        WeightcacheError: It cannot be had.
    """
    kept.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=kept))
    try:
        report = weightcache.pull(uri, staging, **what)
        folder = kept / report.revision.replace(":", "-")
        try:
            staging.rename(folder)
        except OSError:  # it is there, from an earlier time or another process
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder, report
