"""Own the reservation of huge pages when the daemon starts.

Never gives a page back, and never fails a start: images for which there are too few lie in other pages, as each says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weightcache.machine import memory_available_bytes

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")  # vm.nr_hugepages is of the default size, which may be another
PAGE_NBYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Reservation:
    """What came of it: pages that were wanted, those that are reserved and free now, and why they are not more."""

    n_wanted: int
    n_free: int
    why_not: str = ""

    @property
    def is_whole(self) -> bool:
        return self.n_free >= self.n_wanted

    def __str__(self) -> str:
        wanted = f"of {self.n_wanted} huge pages of 2 MiB that huge_bytes wants"
        what = f"{wanted}, {self.n_free} were reserved and free at the start"
        if self.is_whole:
            return what
        return f"{what}: {self.why_not}; reserve them at boot (hugepages={self.n_wanted}), or lower huge_bytes"


def reserve(nbytes: int, pool: Path = POOL) -> Reservation:
    """Have as many huge pages reserved and free as hold so many bytes, and no more than memory is left for.

    The kernel looks for them as long as it takes, and may find fewer. They stay reserved when this process has ended.
    """
    n_wanted, n_free = -(-nbytes // PAGE_NBYTES), 0
    try:
        n_free = _free(pool)
        if n_free >= n_wanted:
            return Reservation(n_wanted, n_free)
        n_more = min(n_wanted - n_free, memory_available_bytes() * 3 // 4 // PAGE_NBYTES)
        (pool / "nr_hugepages").write_text(str(_read(pool, "nr_hugepages") + n_more))
        return Reservation(n_wanted, _free(pool), "free memory is too little, or in pieces")
    except OSError as exc:
        return Reservation(n_wanted, n_free, f"{exc.filename or pool} ({exc.strerror or exc})")


def _free(pool: Path) -> int:
    """Return the pages that no mapping has, or is promised."""
    return _read(pool, "free_hugepages") - _read(pool, "resv_hugepages")


def _read(pool: Path, name: str) -> int:
    return int((pool / name).read_text())
