"""Own what an HTTP response must be before its body may become data: checked against what was asked, field by field.

Never reads from a connection, and never shows a query: it may hold a signature.
"""

from __future__ import annotations

import email.utils
import re
import time
from dataclasses import dataclass

from weightcache.errors import (
    AccessDeniedError,
    ModelNotFoundError,
    OriginChangedError,
    OriginError,
    TransientOriginError,
    WeightcacheError,
)
from weightcache.origins.base import Stat

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)
LONGEST_RETRY_AFTER_S = 3600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A response's status and headers, and its body where that was not data; `headers` have names in lower case."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes = b""

    def get(self, name: str) -> str | None:
        """Return a header's value, None where it is absent.

        Raises:
            TransientOriginError: It is there more than once, with different values.
        """
        values = {value for key, value in self.headers if key == name.encode()}
        if len(values) > 1:
            raise TransientOriginError(f"the server answered with several values of {name}: {len(values)}")
        return values.pop().decode("latin-1").strip() if values else None

    @property
    def content_length(self) -> int | None:
        """The announced size of the body in bytes; None where it is not announced."""
        value = self.get("content-length")
        return int(value) if value is not None else None  # its form was checked with the head's

    @property
    def retry_after_s(self) -> float | None:
        """How long the server asks to be left alone, in seconds."""
        value = self.get("retry-after") or ""
        if value.isascii() and value.isdecimal():
            return min(float(value[:9]), LONGEST_RETRY_AFTER_S)
        when = http_time(value)
        return None if when is None else min(max(0.0, when - time.time()), LONGEST_RETRY_AFTER_S)


def http_time(date: str) -> float | None:
    """Return the seconds since 1970 of a date in a header; None for what is none."""
    try:
        when = email.utils.parsedate_tz(date)
        return None if when is None else float(email.utils.mktime_tz(when))
    except (ValueError, OverflowError, IndexError, TypeError):  # dates far away, and what its parser trips over
        return None


def is_part(answer: Answer, stat: Stat, start: int, stop: int, state: str | None) -> bool:
    """Tell whether the body is the bytes `[start, stop)` of a file, or else a refusal that its status explains.

    Args:
        answer: The head.
        stat: The file as it was described.
        start, stop: What was asked for.
        state: What of the response names the file's state, to be `stat.etag`; None where it names none.

    Raises:
        TransientOriginError: A success that is not what was asked for; it never becomes data.
        OriginChangedError: The file is in another state.
    """
    if answer.status >= 300:
        return False
    content_range = answer.get("content-range")
    got = _CONTENT_RANGE.fullmatch(content_range or "")
    is_whole = answer.status == 200 and content_range is None and (start, stop) == (0, stat.nbytes)
    asked = f"asked for [{start}, {stop}) of {stat.nbytes} bytes, the server"
    if not is_whole and (
        answer.status != 206 or got is None or (int(got[1]), int(got[2]) + 1, int(got[3])) != (start, stop, stat.nbytes)
    ):
        raise TransientOriginError(f"{asked} answered {answer.status} with range {content_range!r:.80}")
    encoding = answer.get("content-encoding")
    if answer.get("transfer-encoding") or (encoding or "identity").lower() != "identity":
        raise TransientOriginError(f"{asked} sends them encoded ({encoding or 'chunked'!r:.40})")
    if answer.content_length != stop - start:
        raise TransientOriginError(f"{asked} announced {answer.content_length} bytes")
    if stat.etag and state != stat.etag:
        if state is None:
            raise TransientOriginError(f"{asked} does not say of which state they are: expected {stat.etag:.80}")
        raise OriginChangedError(f"{stat.path} is in state {state:.80}, expected {stat.etag:.80}; load again")
    return True


def refusal(status: int, uri: str, said: str, retry_after_s: float | None) -> WeightcacheError:
    """Return the error that a status means.

    Args:
        status: 300 or more.
        uri: What was asked for, free of secrets.
        said: In the server's words, short.
        retry_after_s: How long the server asks to be left alone.
    """
    told = f"{said}, {status}" if said else str(status)
    match status:
        case 404 | 410:
            return ModelNotFoundError(
                f"nothing at {uri} ({told}): check the name and the endpoint", uri=uri, status=status
            )
        case 401 | 403 | 407:
            return AccessDeniedError(
                f"{uri} refused these credentials ({told}): check the key, its permissions and the endpoint",
                uri=uri,
                status=status,
            )
        case 412 | 416:
            return OriginChangedError(
                f"a file of {uri} changed since the model was described ({told}); load again when its writer is done",
                uri=uri,
            )
    # S3 says 409 to a write on a condition while another writes the same: the next attempt will see what that wrote.
    if status in (408, 409, 425, 429) or (status >= 500 and status not in (501, 505)):
        is_throttled = status in (429, 503)
        return TransientOriginError(told, status=status, is_throttled=is_throttled, retry_after_s=retry_after_s)
    return OriginError(f"{uri} answered {told}: look at the server", uri=uri, status=status)
