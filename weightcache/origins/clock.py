"""Own signatures by another clock than this machine's: a server that finds ours wrong is asked by its own.

Never reads a clock: the difference is handed in.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from botocore.auth import AUTH_TYPE_MAPS, SIGV4_TIMESTAMP, S3SigV4Auth, S3SigV4QueryAuth

_SIGNER = "weightcache-s3v4"
_SKEW = "weightcache_skew_s"


class _BySkew:
    """Moves a request's time stamp before anything is derived from it."""

    def _modify_request_before_signing(self, request: Any) -> None:
        ours = datetime.strptime(request.context["timestamp"], SIGV4_TIMESTAMP).replace(tzinfo=UTC)
        theirs = ours + timedelta(seconds=request.context[_SKEW])
        request.context["timestamp"] = theirs.strftime(SIGV4_TIMESTAMP)
        super()._modify_request_before_signing(request)  # type: ignore[misc]


class _SkewedAuth(_BySkew, S3SigV4Auth):  # type: ignore[misc]
    """Signs headers."""


class _SkewedQueryAuth(_BySkew, S3SigV4QueryAuth):  # type: ignore[misc]
    """Signs URLs."""


def sign_with_skew(client: Any, skew_s: float) -> None:
    """Make an aiobotocore client sign by a clock that is `skew_s` seconds ahead of this machine's."""
    AUTH_TYPE_MAPS.setdefault(_SIGNER, _SkewedAuth)
    AUTH_TYPE_MAPS.setdefault(_SIGNER + "-query", _SkewedQueryAuth)

    def choose(signature_version: Any, context: dict[str, Any], **_: Any) -> str | None:
        if not isinstance(signature_version, str) or "v4" not in signature_version or "v4a" in signature_version:
            return None
        context[_SKEW] = skew_s
        return _SIGNER + ("-query" if signature_version.endswith("-query") else "")

    client.meta.events.register("choose-signer.s3", choose)
