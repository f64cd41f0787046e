"""Own the count of what one load asked of one replica: requests and bytes, and the replica's name.

Never knows a price, and never holds a secret: a replica's name has no user, no query and no key.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from urllib.parse import urlsplit


@dataclass(slots=True)
class Ledger:
    """What one load asked of one replica. Written on the loop thread alone.

    Attributes:
        replica: Its place, as `place_of` spells it.
        n_gets: GET and HEAD requests sent, those that failed included.
        n_lists: Listing requests sent, a page each; stores price them like writes.
        n_retries: Requests that were sent because an earlier one failed.
        n_hedges: Requests that were sent because an earlier one was slow.
        received_bytes: Of bodies, wasted or not.
        wasted_bytes: Received and not used: broken answers, lost races.
    """

    replica: str = ""
    n_gets: int = 0
    n_lists: int = 0
    n_retries: int = 0
    n_hedges: int = 0
    received_bytes: int = 0
    wasted_bytes: int = 0

    @property
    def n_requests(self) -> int:
        return self.n_gets + self.n_lists

    def counts(self) -> dict[str, int]:
        """Return everything counted, by name."""
        return {name: getattr(self, name) for name in COUNTS}


COUNTS = tuple(field.name for field in fields(Ledger) if field.name != "replica")


def place_of(url: str, endpoint: str = "") -> str:
    """Name the replica that holds a folder: `https://host/bucket`, `s3://bucket` where no endpoint is set, or a path itself.

    Args:
        url: The folder's URL, or an absolute path.
        endpoint: Where its bucket is found; empty where the scheme says it. One that is no URL is not repeated: nothing
            can be asked of it.
    """
    if url.startswith("/"):
        return url
    parts = urlsplit(url)
    bucket = _without_user(parts.netloc, parts.scheme)
    if not endpoint:
        return f"{parts.scheme}://{bucket}"
    try:
        at = urlsplit(endpoint)
    except ValueError:
        at = urlsplit("")
    if not at.netloc:
        return f"unknown/{bucket}"
    return f"{at.scheme}://{_without_user(at.netloc)}{at.path.rstrip('/')}/{bucket}"


def _without_user(netloc: str, scheme: str = "") -> str:
    # Azure's own form has a container, not a user, before the host.
    return netloc if scheme.startswith(("abfs", "wasb")) else netloc.rpartition("@")[2]
