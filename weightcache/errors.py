"""Own the error tree: every failure weightcache raises on purpose.

Never holds logic beyond a message, its facts and its exit code.

A message says what failed, on what, what was expected and what to do next. `code` is stable and made for
programs; `exit_code` is what the command line returns; `facts` are the message's values by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WeightcacheError(Exception):
    """Base of all errors raised on purpose."""

    code = "error"
    exit_code = 1

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


class ConfigError(WeightcacheError):
    """A setting that is unknown, malformed, or demands what cannot be honoured."""

    code = "config"
    exit_code = 2


class UriError(WeightcacheError):
    """A model name that cannot be understood."""

    code = "uri"
    exit_code = 2


class ModelNotFoundError(WeightcacheError):
    """Nothing loadable at the named place."""

    code = "not-found"
    exit_code = 3


class AccessDeniedError(WeightcacheError):
    """The origin refused these credentials, or there were none."""

    code = "access-denied"
    exit_code = 4


class FormatError(WeightcacheError):
    """A file or record that breaks its format."""

    code = "format"
    exit_code = 5


class IncompleteModelError(FormatError):
    """A checkpoint that names parts it does not have."""

    code = "incomplete"


class UnsafePathError(FormatError):
    """A name that would leave its folder, or is no regular file."""

    code = "unsafe-path"


class UnsafeFormatError(FormatError):
    """Weights in a format that can run code when read."""

    code = "unsafe-format"


class MismatchError(FormatError):
    """A model whose tensors do not fit the module they are loaded into."""

    code = "mismatch"


class IntegrityError(WeightcacheError):
    """Bytes that are not the bytes that were published or stored."""

    code = "integrity"
    exit_code = 6


class OriginError(WeightcacheError):
    """The origin failed and retries did not help."""

    code = "origin"
    exit_code = 7


class OriginUnreachableError(OriginError):
    """The origin did not answer rightly in as many attempts as are allowed, or in time."""

    code = "origin-unreachable"


class TransientOriginError(OriginError):
    """One failed attempt at the origin that is worth another."""

    code = "origin-transient"


class OriginChangedError(OriginError):
    """An object changed between describing the model and reading it."""

    code = "origin-changed"


class DeadlineError(OriginError):
    """The time allowed for a call ran out."""

    code = "deadline"


class OfflineError(WeightcacheError):
    """Bytes are missing on this node and dialling is forbidden."""

    code = "offline"
    exit_code = 8


class CapacityError(WeightcacheError):
    """Not enough memory or disk for what was asked."""

    code = "capacity"
    exit_code = 9


class InUseError(WeightcacheError):
    """Something that a process or an operator holds."""

    code = "in-use"
    exit_code = 12


class DeviceError(WeightcacheError):
    """A device that is missing or unfit."""

    code = "device"
    exit_code = 10


class CacheFormatError(WeightcacheError):
    """A cache folder written in a format this version does not know; it is left untouched."""

    code = "cache-format"
    exit_code = 11


class RegistryFormatError(WeightcacheError):
    """A registry written in a format this version does not know; it is left untouched."""

    code = "registry-format"
    exit_code = 11


class ResidencyError(WeightcacheError):
    """A residency policy forbids bytes to go there, or does not show that it allows it."""

    code = "residency"
    exit_code = 13


class SignatureError(WeightcacheError):
    """A revision that is not signed as the trust policy demands, or older than what was seen before."""

    code = "signature"
    exit_code = 14


class ConflictError(WeightcacheError):
    """Something in a registry that another publisher changed meanwhile."""

    code = "conflict"
    exit_code = 15


class DaemonError(WeightcacheError):
    """The node daemon is not there, refuses, or does not answer as it should."""

    code = "daemon"
    exit_code = 16


class ImageLostError(WeightcacheError):
    """An image in host memory that whoever filled it has given up; the load begins again without it."""

    code = "image-lost"


def of_code(code: str, message: str) -> WeightcacheError:
    """Return the error of a code, as another process had it."""
    classes = [WeightcacheError]
    for each in classes:
        classes += each.__subclasses__()
    return next((each for each in classes if each.code == code), DaemonError)(message)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean …?)` for the known name closest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
