"""Own the reading of a safetensors header: bytes in, checked tensor ranges out.

Never touches a file, never allocates for a length it has not checked.

A header is an 8-byte little-endian length, that many bytes of JSON, then the tensors' data without a hole.
What this module accepts, safetensors 0.8 accepts with the same result; the reverse does not hold, and
tests/properties/test_header_differential.py lists where we are stricter.

One regular expression is the only way in for a tensor; JSON is parsed for metadata, and to say what is wrong.
Tensors are walked one by one, each within MAX_ENTRY_NBYTES, so the first fault ends the walk and 32 MiB of
junk cost what its first bad entry costs. A header that is right up to its last entry costs what a legal one
of its size costs: nothing but MAX_TENSORS bounds that.
"""

from __future__ import annotations

import codecs
import json
import math
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final

from weightcache.dtypes import BITS, tensor_nbytes
from weightcache.errors import FormatError, nearest

LENGTH_NBYTES: Final = 8
MAX_HEADER_NBYTES: Final = 32 << 20
MAX_TENSORS: Final = 200_000
MAX_RANK: Final = 16
# A tensor's name and description together: 16 dimensions of 19 digits, one a line, take a fifth of it.
MAX_ENTRY_NBYTES: Final = 4096
# Free text takes four times its bytes in memory once it holds an emoji, and is there twice while it is read, beside the
# whole header: 3 MiB is what 64 MiB can bear.
MAX_METADATA_NBYTES: Final = 3 << 20
MAX_METADATA_KEYS: Final = 10_000

_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
# torch keeps sizes and strides in int64, safetensors counts a tensor's bits in uint64.
_LIMIT = 1 << 63

_WS = r"[ \t\n\r]*+"
_COLON = rf"{_WS}:{_WS}"
_COMMA = rf"{_WS},{_WS}"
_COMMA_OR_CLOSE = rf"{_WS}([,}}])"
_INT = r"(?!0[0-9])[0-9]{1,19}+"
_CHARS = r'[^"\\\x00-\x1f]*+'
# The empty group marks where the value starts.
_KEY = rf'{_WS}"({_CHARS}(?:\\.{_CHARS})*+)"{_COLON}()'
_FIELD = (
    rf'(?:"dtype"{_COLON}"([A-Z0-9_]++)"'
    rf'|"shape"{_COLON}\[{_WS}((?:{_INT}(?:{_COMMA}{_INT}){{0,{MAX_RANK - 1}}})?){_WS}\]'
    rf'|"data_offsets"{_COLON}\[{_WS}({_INT}){_COMMA}({_INT}){_WS}\])'
    rf"{_WS}(?:,{_WS}(?!\}})|(?=\}}))"
)
# Three fields in any order; a group without a match says that one is missing and another there twice.
_TENSOR = re.compile(rf"{_KEY}\{{{_WS}(?:{_FIELD}){{3}}\}}{_WS}[,}}]".encode())
_MEMBER = re.compile(_KEY.encode())
_NO_MEMBER = re.compile(rf"\{{{_WS}\}}".encode())
_PADDING = re.compile(rb" *+")
_TEXT_QUOTE = re.compile(rf'{_WS}(")')
_TEXT_COLON = re.compile(_COLON)
_TEXT_CLOSE = re.compile(rf"{_WS}(\}})")
_TEXT_COMMA_OR_CLOSE = re.compile(_COMMA_OR_CLOSE)
# Objects come as a tuple of pairs: duplicates stay visible, and nothing else in JSON becomes a tuple.
_JSON = json.JSONDecoder(object_pairs_hook=tuple)
# Bounds what a message quotes, in length and in depth.
_QUOTE = reprlib.Repr()
_QUOTE.maxlevel, _QUOTE.maxstring, _QUOTE.maxother = 2, 80, 80
_CLOSE = ord("}")
# How many dtypes and shapes are remembered: a model repeats a few dozen, a hostile header none.
_MAX_KINDS = 1024
_LOOKALIKES = (
    (b"version ", "it looks like a git-lfs pointer: run `git lfs pull` where it was published"),
    (b"PK\x03\x04", "it looks like a zip or torch.save file: convert it to safetensors"),
    (b"\x80", "it looks like a pickle: convert it to safetensors"),
    (b"\x1f\x8b", "it looks like a gzip file: decompress it"),
    (b"GGUF", "it looks like a GGUF file: convert it to safetensors"),
    (b"<", "it looks like a web page or XML: check the URL and the credentials"),
    (b"{", "it looks like JSON without the 8-byte length before it"),
)
_Kind = tuple[str, tuple[int, ...], int]  # dtype, shape, nbytes


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: bytes `[start, stop)` of the file hold `shape` elements of `dtype`, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Return the bytes the tensor takes in the file."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: `tensors` cover `[data_start, end of file)` without hole or overlap.

    Tensors are ordered by start; at one start the empty ones come first, by name.
    """

    data_start: int
    tensors: tuple[TensorEntry, ...]
    metadata: Mapping[str, str]


def header_stop(prefix: bytes, file_nbytes: int, *, source: str, max_header_nbytes: int = MAX_HEADER_NBYTES) -> int:
    """Return the offset where the header ends and the data starts.

    Args:
        prefix: the file's first 8 bytes; more are ignored.
        file_nbytes: the size of the whole file.
        source: what messages call the file.
        max_header_nbytes: the longest header that may be read into memory.

    Raises:
        FormatError: the file is too short, or the length is below 2, past the file or past the limit.
    """
    available = min(len(prefix), file_nbytes)
    if available < LENGTH_NBYTES:
        message = f"the file has {available} bytes, expected at least {LENGTH_NBYTES} for the header's length"
        raise _fault(source, "length", f"{message}; fetch or publish it again")
    nbytes = int.from_bytes(prefix[:LENGTH_NBYTES], "little")
    stop = LENGTH_NBYTES + nbytes
    if nbytes < 2:
        message = f"the header's length is {nbytes}, expected at least 2"
        raise _fault(source, "length", f"{message}; the file may be an unfinished download: fetch it again")
    if stop > file_nbytes:
        message = f"the header ends at byte {stop}, past the file's {file_nbytes} bytes"
        advice = _lookalike(prefix) or "fetch it again if it was cut short"
        raise _fault(source, "length", f"{message}; {advice}")
    if nbytes > max_header_nbytes:
        message = f"the header's length is {nbytes}, the limit is {max_header_nbytes}"
        advice = _lookalike(prefix) or "raise max_header_nbytes only for a file you trust"
        raise _fault(source, "length", f"{message}; {advice}")
    return stop


def parse_header(raw: bytes, file_nbytes: int, *, source: str) -> Header:
    """Read and check a header.

    Args:
        raw: the header's JSON: the bytes between the length field and the data.
        file_nbytes: the size of the whole file.
        source: what messages call the file.

    Raises:
        FormatError: a rule of the format or one of our limits is broken. The fact `rule` says which, the
            fact `tensor` names the tensor where one is concerned.
    """
    data_start = LENGTH_NBYTES + len(raw)
    if data_start > file_nbytes:
        message = f"the header ends at byte {data_start}, past the file's {file_nbytes} bytes"
        raise _fault(source, "length", message)
    if not raw.startswith(b"{"):
        got = "a byte order mark" if raw.startswith(codecs.BOM_UTF8) else _QUOTE.repr(raw[:16])
        raise _fault(source, "start", f"the header starts with {got}, expected '{{'; write the file again")
    # Every tensor has this text once, and a string holds it only as a whole, for quotes inside are escaped:
    # counting it spares the walk over the first 200,000 of a million tensors.
    count = raw.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise _fault(source, "count", f"the header has {count} tensors, the limit is {MAX_TENSORS}")
    tensors, metadata, stop = _read_members(raw, source)
    if _PADDING.fullmatch(raw, stop) is None:
        raise _fault(
            source,
            "padding",
            f"expected nothing but spaces after the header's object, got {_quote(raw, stop)}",
        )
    tensors.sort(key=attrgetter("start", "stop", "name"))
    _check_layout(tensors, data_start, file_nbytes, source)
    return Header(data_start, tuple(tensors), metadata)


def _read_members(raw: bytes, source: str) -> tuple[list[TensorEntry], dict[str, str], int]:
    """Walk the outer object; return its tensors, its metadata and the offset after its closing brace."""
    data_start = LENGTH_NBYTES + len(raw)
    tensors: list[TensorEntry] = []
    kinds: dict[tuple[bytes, ...], _Kind] = {}
    names: set[str] = set()
    metadata: dict[str, str] = {}
    nothing = _NO_MEMBER.match(raw, 0, MAX_ENTRY_NBYTES)
    if nothing is not None:
        return tensors, metadata, nothing.end()
    at = 1
    while True:
        limit = at + MAX_ENTRY_NBYTES
        tensor = _TENSOR.match(raw, at, limit)
        member = tensor or _MEMBER.match(raw, at, limit)
        if member is None:
            message = f"expected a quoted name and a colon within {MAX_ENTRY_NBYTES} bytes"
            raise _fault(source, "json", f"{message}, got {_quote(raw, at)}")
        name = _read_name(member[1], member.start(1), source)
        if name in names:
            raise _fault(source, "duplicate", "is named twice", tensor=name)
        names.add(name)
        if name == _METADATA:
            metadata, at = _read_metadata(raw, member.start(2), source)
        elif tensor is None or None in (groups := tensor.groups()):
            raise _explain(name, raw, member.start(2), limit, source)
        else:
            dtype_text, shape_text, begin_text, end_text = groups[2:]
            kind = kinds.get((dtype_text, shape_text))
            if kind is None:
                if len(kinds) == _MAX_KINDS:
                    kinds.clear()
                kind = kinds[dtype_text, shape_text] = _read_kind(name, dtype_text, shape_text, source)
            dtype, shape, nbytes = kind
            begin, end = int(begin_text), int(end_text)
            if end - begin != nbytes:
                rule = "offsets" if begin > end else "size"
                expected = f"expected {nbytes} bytes for {dtype} of shape {list(shape)}"
                raise _fault(source, rule, f"has data_offsets [{begin}, {end}], {expected}", tensor=name)
            tensors.append(TensorEntry(name, dtype, shape, data_start + begin, data_start + end))
            at = tensor.end()
        if raw[at - 1] == _CLOSE:
            return tensors, metadata, at


def _read_name(text: bytes, at: int, source: str) -> str:
    """Decode what stands between a name's quotes; `at` is where in the header."""
    name = text.decode() if text.isascii() else _decode(text, at, source)
    if "\\" in name:
        try:
            name, _ = _read_string(f'"{name}"', 0)
        except ValueError as exc:
            raise _fault(source, "json", f"the name at header byte {at} breaks at {exc}") from exc
        if "\0" in name:
            raise _fault(source, "name", "has a NUL in its name", tensor=name)
    return name


def _read_kind(name: str, dtype_text: bytes, shape_text: bytes, source: str) -> _Kind:
    """Check a dtype and a shape, which are in the right form."""
    dtype = dtype_text.decode()
    bits = BITS.get(dtype)
    if bits is None:
        raise _fault(source, "dtype", _unknown_dtype(dtype), tensor=name)
    shape = tuple(map(int, shape_text.split(b","))) if shape_text else ()
    # An empty tensor has strides too: its other dimensions must multiply to something that can be counted.
    if bits * math.prod(dim or 1 for dim in shape) >= _LIMIT:
        message = f"has shape {list(shape)} of {dtype}: with 0 counted as 1 that passes the limit of 2**63 bits"
        raise _fault(source, "overflow", message, tensor=name)
    try:
        return dtype, shape, tensor_nbytes(dtype, shape)
    except ValueError as exc:
        raise _fault(source, "size", f"does not fill whole bytes: {exc}", tensor=name) from exc


def _explain(name: str, raw: bytes, start: int, limit: int, source: str) -> FormatError:
    """Say what is wrong with the form of a tensor's description, which starts at `start`."""

    def fault(rule: str, message: str) -> FormatError:
        return _fault(source, rule, message, tensor=name)

    expected = f"expected an object of {', '.join(_FIELDS)} within {MAX_ENTRY_NBYTES} bytes"
    stop = raw.find(b"}", start, limit) + 1
    if not raw.startswith(b"{", start) or not stop:
        return fault("entry", f"is {_quote(raw, start)}, {expected}")
    try:
        pairs, _ = _JSON.raw_decode(_decode(raw[start:stop], start, source))
    except (ValueError, RecursionError) as exc:
        # A ValueError also for an integer of more digits than Python converts.
        return fault("json", f"is {_quote(raw, start)}, {expected}: {exc}")
    fields: dict[str, Any] = dict(pairs)
    for field in fields:
        if field not in _FIELDS:
            hint = nearest(field, _FIELDS) or f", expected {', '.join(_FIELDS)}"
            return fault("fields", f"has the unknown field {_QUOTE.repr(field)}{hint}")
    missing = [field for field in _FIELDS if field not in fields]
    if missing:
        return fault("fields", f"lacks {' and '.join(missing)}, expected {', '.join(_FIELDS)}")
    if len(pairs) > len(fields):
        names = [field for field, _ in pairs]
        return fault("duplicate", f"has the field {max(fields, key=names.count)} twice")
    dtype, shape, offsets = (fields[field] for field in _FIELDS)
    if type(dtype) is not str or dtype not in BITS:
        return fault("dtype", _unknown_dtype(dtype))
    if type(shape) is not list:
        return fault("shape", f"has shape {_QUOTE.repr(shape)}, expected a list of integers")
    if len(shape) > MAX_RANK:
        return fault("rank", f"has a shape of rank {len(shape)}, the limit is {MAX_RANK}")
    if type(offsets) is not list or len(offsets) != 2:
        return fault("offsets", f"has data_offsets {_QUOTE.repr(offsets)}, expected [begin, end]")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        for number in numbers:
            if type(number) is not int or not 0 <= number < _LIMIT:
                rule = "offsets" if numbers is offsets else "shape"
                message = f"has {_QUOTE.repr(number)} in {field}, expected an integer in [0, 2**63)"
                return fault(rule, message)
    return fault("entry", f"is {_quote(raw, start)}, {expected}, without -0, escapes or junk after it")


def _unknown_dtype(dtype: object) -> str:
    hint = nearest(dtype.upper(), BITS) if isinstance(dtype, str) else ""
    return f"has the unknown dtype {_QUOTE.repr(dtype)}{hint or ', expected one of ' + ', '.join(BITS)}"


def _read_metadata(raw: bytes, start: int, source: str) -> tuple[dict[str, str], int]:
    """Read the metadata's object; return it and the offset after the comma or brace that follows it."""

    def fault(rule: str, message: str) -> FormatError:
        return _fault(source, rule, f"{_METADATA} {message}", field=_METADATA)

    expected = f"expected an object of strings within {MAX_METADATA_NBYTES} bytes"
    stop = start + MAX_METADATA_NBYTES
    text = _decode(raw[start:stop], start, source, cut=stop < len(raw))
    if not text.startswith("{"):
        raise fault("metadata", f"is {_quote(raw, start)}, {expected}")
    metadata: dict[str, str] = {}
    closed = _TEXT_CLOSE.match(text, 1)
    at = closed.end() if closed else 1
    try:
        while closed is None:
            key, at = _read_string(text, at)
            value, at = _read_string(text, _expect(_TEXT_COLON, text, at).end())
            if key in metadata:
                raise fault("duplicate", f"has the key {_QUOTE.repr(key)} twice")
            if len(metadata) == MAX_METADATA_KEYS:
                raise fault("metadata", f"has more keys than the limit, {MAX_METADATA_KEYS}")
            metadata[key] = value
            closed = _TEXT_CLOSE.match(text, at)
            at = _expect(_TEXT_COMMA_OR_CLOSE, text, at).end()
        at = _expect(_TEXT_COMMA_OR_CLOSE, text, at).end()
    except ValueError as exc:
        raise fault("metadata", f"breaks after {len(metadata)} keys at {exc}, {expected}") from exc
    return metadata, start + _utf8_nbytes(text, at)


def _read_string(text: str, at: int) -> tuple[str, int]:
    """Decode the JSON string at `at`, whitespace before it or not; return it and the offset after it.

    Raises:
        ValueError: no string is there, it is broken, or it holds half a surrogate pair.
    """
    start = _expect(_TEXT_QUOTE, text, at).start(1)
    try:
        value, stop = _JSON.raw_decode(text, start)
    except json.JSONDecodeError as exc:
        raise ValueError(f"{_QUOTE.repr(text[start : start + 40])} ({exc.msg})") from exc
    try:
        _utf8_nbytes(value, len(value))
    except UnicodeEncodeError as exc:
        raise ValueError(f"{_QUOTE.repr(text[start : start + 40])} (half a surrogate pair)") from exc
    return value, stop


def _utf8_nbytes(text: str, stop: int) -> int:
    """Return the bytes `text[:stop]` takes in UTF-8, piece by piece to spare a copy that is 4 times as long.

    Raises:
        UnicodeEncodeError: the text holds half a surrogate pair.
    """
    if text.isascii():
        return stop
    return sum(len(text[i : min(i + 65536, stop)].encode()) for i in range(0, stop, 65536))


def _expect(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    found = pattern.match(text, at)
    if found is None:
        raise ValueError(_QUOTE.repr(text[at : at + 40]))
    return found


def _decode(text: bytes, at: int, source: str, *, cut: bool = False) -> str:
    """Decode a part of the header that starts at `at`; `cut` says that it may end inside a character."""
    try:
        return codecs.utf_8_decode(text, "strict", not cut)[0]
    except UnicodeDecodeError as exc:
        got = f"got byte {text[exc.start]:#04x} at header byte {at + exc.start}: {exc.reason}"
        raise _fault(source, "utf-8", f"expected UTF-8, {got}") from exc


def _check_layout(tensors: list[TensorEntry], data_start: int, file_nbytes: int, source: str) -> None:
    """Check that sorted tensors cover the data from its start to the file's end."""

    def offsets(tensor: TensorEntry) -> str:
        return f"at data_offsets [{tensor.start - data_start}, {tensor.stop - data_start})"

    last: TensorEntry | None = None
    at = data_start
    for tensor in tensors:
        if tensor.start != at:
            gap = tensor.start - at
            before = f"{_QUOTE.repr(last.name)} {offsets(last)}" if last else "the start of the data"
            what = f"leaves a hole of {gap} bytes after" if gap > 0 else "overlaps"
            message = f"{offsets(tensor)} {what} {before}; write the file again"
            raise _fault(source, "layout", message, tensor=tensor.name)
        last, at = tensor, tensor.stop
    if at != file_nbytes:
        advice = "the file is cut short: fetch it again" if at > file_nbytes else "what follows is no tensor's"
        message = f"ends at byte {at} of {file_nbytes}; {advice}"
        if last is None:
            raise _fault(source, "layout", f"the header names no tensor and {message}")
        raise _fault(source, "layout", f"{offsets(last)} is the last and {message}", tensor=last.name)


def _quote(raw: bytes, at: int) -> str:
    return f"{_QUOTE.repr(raw[at : at + 40])} at header byte {at}"


def _lookalike(prefix: bytes) -> str:
    if not any(prefix[4:LENGTH_NBYTES]):
        return ""  # a length below 4 GiB: as likely a header's as another format's first bytes
    return next((advice for magic, advice in _LOOKALIKES if prefix.startswith(magic)), "")


def _fault(source: str, rule: str, message: str, **facts: object) -> FormatError:
    on = f"tensor {_QUOTE.repr(facts['tensor'])} " if "tensor" in facts else ""
    return FormatError(f"{source}: {on}{message}", file=source, rule=rule, **facts)
