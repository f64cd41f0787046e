"""Our header parser against safetensors: what we accept it accepts with the same result, and where we are
stricter is written down here.

`deliberate` is that list: it finds the reasons in a file by other means than the parser does.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from weightcache.dtypes import BITS, alignment_bytes, tensor_nbytes
from weightcache.errors import FormatError
from weightcache.header import LENGTH_NBYTES, MAX_RANK, Header, header_stop, parse_header

Pairs = list[tuple[str, Any]]  # a JSON object that may name a key twice

FIELDS = ("dtype", "shape", "data_offsets")
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


# Both readers


def ours(file: bytes) -> Header:
    stop = header_stop(file[:LENGTH_NBYTES], len(file), source="file")
    return parse_header(file[LENGTH_NBYTES:stop], len(file), source="file")


def theirs(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Return what safetensors reads: name to dtype, shape and bytes; None if it refuses."""
    try:
        tensors = safetensors.deserialize(file)
    except safetensors.SafetensorError:
        return None
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in tensors}


def same(header: Header, file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {tensor.name: (tensor.dtype, tensor.shape, file[tensor.start : tensor.stop]) for tensor in header.tensors}


def deliberate(file: bytes) -> set[str]:
    """Return the rules that a file breaks for us but not for safetensors, which accepts it.

    start      whitespace before the object
    padding    whitespace other than spaces behind it
    duplicate  a tensor or a metadata key named twice (it takes the last)
    fields     fields beside the three
    entry      a tensor written as a list; a field's name or a dtype written with escapes
    json       a dtype written as an object, or an object in an unknown field
    dtype      a dtype written as anything else but a string
    rank       more than 16 dimensions
    overflow   an empty tensor whose other dimensions multiply to 2**63 bits or more, or a dimension past it
    name       NUL in a name
    metadata   null for metadata

    Limits, tested in tests/unit/test_header.py: 32 MiB a header, 200,000 tensors, 4096 bytes a tensor, 6 MiB
    and 10,000 keys of metadata. safetensors has one, 100 MB a header.
    """
    nbytes = int.from_bytes(file[:LENGTH_NBYTES], "little")
    text = file[LENGTH_NBYTES : LENGTH_NBYTES + nbytes].decode()
    members: Pairs = json.loads(text, object_pairs_hook=tuple)
    rules = set()
    if not text.startswith("{"):
        rules.add("start")
    if text.rstrip("\t\n\r ") != text.rstrip(" "):
        rules.add("padding")
    if len(dict(members)) < len(members):
        rules.add("duplicate")
    for name, value in members:
        if "\0" in name:
            rules.add("name")
        if name == "__metadata__":
            if value is None:
                rules.add("metadata")
            elif len(dict(value)) < len(value):
                rules.add("duplicate")
        elif isinstance(value, list):
            rules.add("entry")
        else:
            rules |= deliberate_in_tensor(dict(value), text)
    return rules


def deliberate_in_tensor(fields: dict[str, Any], text: str) -> set[str]:
    rules = set()
    if fields.keys() != set(FIELDS):
        rules |= {"fields", "json"}
    if not isinstance(fields["dtype"], str):
        rules |= {"dtype", "json"}
    if re.search(r"\\u00", text):
        rules.add("entry")
    if len(fields["shape"]) > MAX_RANK:
        rules.add("rank")
    if any(dim >= 2**63 for dim in fields["shape"]):
        rules |= {"shape", "overflow"}
    if 0 in fields["shape"] and math.prod(dim or 1 for dim in fields["shape"]) * 64 >= 2**63:
        rules.add("overflow")
    return rules


def check(file: bytes) -> str:
    """Compare both readers on a file; return what came out."""
    expected = theirs(file)
    try:
        header = ours(file)
    except FormatError as error:
        assert str(error).startswith("file: ")
        assert "\n" not in str(error)
        if expected is None:
            return "both refuse"
        rule = error.facts["rule"]
        assert rule in deliberate(file), f"refused alone, without a reason that is listed: {error}"
        return f"refused alone: {rule}"
    assert expected is not None, "accepted alone"
    assert same(header, file) == expected
    assert header.data_start == LENGTH_NBYTES + int.from_bytes(file[:LENGTH_NBYTES], "little")
    assert b"".join(file[tensor.start : tensor.stop] for tensor in header.tensors) == file[header.data_start :]
    return "both accept"


# Where we are stricter, each by hand

ONE = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
ALONE = {
    "start": f' {{"w":{ONE}}}',
    "padding": f'{{"w":{ONE}}}\n',
    "duplicate": f'{{"w":{ONE},"w":{ONE}}}',
    "duplicate in metadata": f'{{"w":{ONE},"__metadata__":{{"a":"b","a":"c"}}}}',
    "fields": '{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}}',
    "json, object in an unknown field": '{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":{}}}',
    "json, dtype as object": '{"w":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}',
    "entry as list": '{"w":["U8",[1],[0,1]]}',
    "entry with an escape": '{"w":{"\\u0064type":"U8","shape":[1],"data_offsets":[0,1]}}',
    "rank": '{"w":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}',
    "overflow": f'{{"w":{ONE},"v":{{"dtype":"U8","shape":[0,{2**62},{2**62}],"data_offsets":[0,0]}}}}',
    "shape": f'{{"w":{ONE},"v":{{"dtype":"U8","shape":[0,{2**64 - 1}],"data_offsets":[0,0]}}}}',
    "name": f'{{"w\\u0000":{ONE}}}',
    "metadata": f'{{"w":{ONE},"__metadata__":null}}',
}


@pytest.mark.parametrize("case", ALONE)
def test_what_we_refuse_alone(case: str) -> None:
    file = build(ALONE[case].encode(), 1)
    rule = re.split("[ ,]", case)[0]
    assert theirs(file) is not None
    assert rule in deliberate(file)
    assert check(file).startswith("refused alone")


# Valid files


def dump(value: object, *, ascii_only: bool = True, space: str = "") -> str:
    """Write JSON; tuples of pairs are objects, so that keys may come twice; `space` goes between tokens."""
    if not isinstance(value, tuple | list):
        return json.dumps(value, ensure_ascii=ascii_only)
    items = (
        [dump(item, ascii_only=ascii_only, space=space) for pair in value for item in pair]
        if isinstance(value, tuple)
        else [dump(item, ascii_only=ascii_only, space=space) for item in value]
    )
    if isinstance(value, list):
        return f"[{space}" + f"{space},{space}".join(items) + f"{space}]"
    members = (f"{key}{space}:{space}{item}" for key, item in zip(items[::2], items[1::2], strict=True))
    return f"{{{space}" + f"{space},{space}".join(members) + f"{space}}}"


def build(text: bytes, data_nbytes: int) -> bytes:
    """Put the length before a header and data behind it that differs from place to place."""
    data = bytes((i * 197 + i // 256) % 256 for i in range(data_nbytes))
    return len(text).to_bytes(LENGTH_NBYTES, "little") + text + data


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Pairs, int]:
    """Return the members of a valid header, tensors in any order in the file, and the data's size."""
    names = draw(st.lists(NAMES, unique=True, max_size=5))
    members: Pairs = []
    at = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        if BITS[dtype] % 8:
            shape.append(draw(st.sampled_from([0, 4, 8])))
            shape[-1] += shape[-1] % (8 // math.gcd(8, BITS[dtype]))
        nbytes = tensor_nbytes(dtype, shape)
        fields = [("dtype", dtype), ("shape", shape), ("data_offsets", [at, at + nbytes])]
        members.append((name, tuple(draw(st.permutations(fields)))))
        at += nbytes
    if draw(st.booleans()):
        metadata = draw(st.dictionaries(TEXT, TEXT, max_size=3))
        members.append(("__metadata__", tuple(metadata.items())))
    return draw(st.permutations(members)), at


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
NAMES = TEXT.filter(lambda name: "\0" not in name) | st.sampled_from(["dtype", "__metadata", "w{}", 'a"b\\'])
FORMS = st.fixed_dictionaries({"ascii_only": st.booleans(), "space": st.text(" \t\n\r", max_size=2)})


@given(tensors(), FORMS, st.integers(0, 9))
@settings(SETTINGS, max_examples=150)
def test_valid_file_is_read_alike(drawn: tuple[Pairs, int], form: dict[str, Any], padding: int) -> None:
    members, data_nbytes = drawn
    file = build(dump(tuple(members), **form).encode() + b" " * padding, data_nbytes)
    assert check(file) == "both accept"
    metadata = dict(dict(members).get("__metadata__", ()))
    assert ours(file).metadata == metadata


@given(drawn=st.lists(tensors(), min_size=1, max_size=3))
@settings(SETTINGS, max_examples=30)
def test_safe_open_agrees(tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[Pairs, int]]) -> None:
    path = tmp_path_factory.getbasetemp() / "differential.safetensors"
    for members, data_nbytes in drawn:
        file = build(dump(tuple(members)).encode(), data_nbytes)
        path.write_bytes(file)
        header = ours(file)
        with safetensors.safe_open(path, framework="numpy") as opened:
            assert (opened.metadata() or {}) == header.metadata
            assert sorted(opened.keys()) == sorted(tensor.name for tensor in header.tensors)
            for tensor in header.tensors:
                part = opened.get_slice(tensor.name)
                assert (part.get_dtype(), tuple(part.get_shape())) == (tensor.dtype, tensor.shape)


def test_file_written_by_safetensors_is_read_alike() -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3,), (2, 3)]
    written = {
        f"{dtype}{shape}": np.ones(shape, dtype)
        for dtype in ("float64", "float32", "float16", "int64", "uint8", "bool", "complex64")
        for shape in shapes
    }
    file = safetensors.numpy.save(written, {"format": "np"})
    assert check(file) == "both accept"
    assert ours(file).metadata == {"format": "np"}
    assert all(tensor.start % alignment_bytes(tensor.dtype) == 0 for tensor in ours(file).tensors)


# The table of dtypes


def test_dtypes_are_those_of_the_installed_safetensors() -> None:
    text = dump((("w", (("dtype", "?"), ("shape", []), ("data_offsets", [0, 0]))),))
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(build(text.encode(), 0))
    known = set(re.findall(r"`(\w+)`", str(caught.value).partition("expected")[2]))
    assert known == set(BITS)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_element_size_is_that_of_safetensors(dtype: str) -> None:
    sizes = [
        nbytes
        for nbytes in range(100)
        if theirs(
            build(
                dump((("w", (("dtype", dtype), ("shape", [8]), ("data_offsets", [0, nbytes]))),)).encode(),
                nbytes,
            )
        )
        is not None
    ]
    assert sizes == [tensor_nbytes(dtype, [8])] == [BITS[dtype]]


# Changed files

CHANGES = [
    *("twice", "gone", "renamed", "value", "list"),
    *("field twice", "field gone", "field more", "field value", "dtype", "shape", "offsets"),
]
VALUES = st.sampled_from([None, True, 0, 1, -1, 1.0, 1e3, "", "0", [], [0], [1, 2, 3], (), 2**63, 2**64, 10**30])
DIMS = st.sampled_from([0, 1, 2, 3, 2**31, 2**61, 2**62, 2**63, 2**64 - 1, 2**64, -1, 1.0, True, None, "1"])
SHAPES = st.lists(DIMS, max_size=3) | st.sampled_from([[1] * 17, [0] + [2] * 15, [0] + [2] * 16])
MOVES = st.sampled_from([-8, -1, 0, 0, 1, 8, 2**63])
TOKENS = [
    *(b" ", b"\n", b"\0", b"\xef\xbb\xbf", b"\xff", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\"),
    *(b"-", b"0", b"1", b"1.0", b"e1", b"NaN", b"null", b"{}"),
]


@st.composite
def changed_members(draw: st.DrawFn) -> tuple[str, Pairs, int]:
    """Change a valid header's members; return how, the members and the data's size."""
    members, data_nbytes = draw(tensors().filter(lambda drawn: bool(drawn[0])))
    place = draw(st.integers(0, len(members) - 1))
    name, fields = members[place]
    how = draw(st.sampled_from(CHANGES))
    if how == "twice":
        members.insert(draw(st.integers(0, len(members))), members[place])
    elif how == "gone":
        del members[place]
    elif how == "renamed":
        name = draw(st.sampled_from(["__metadata__", "a\0", "", members[0][0], name + "x"]))
        members[place] = (name, fields)
    elif how == "value":
        members[place] = (name, draw(VALUES))
    elif how == "list":
        members[place] = (name, [dict(fields).get(field) for field in FIELDS])
    elif fields:
        members[place] = (name, tuple(draw(changed_fields(how, list(fields)))))
    return how, members, data_nbytes


@st.composite
def changed_fields(draw: st.DrawFn, how: str, fields: Pairs) -> Pairs:
    """Change a tensor's fields, or a metadata's keys."""
    at = draw(st.integers(0, len(fields) - 1))
    key, value = fields[at]
    if how == "field twice":
        fields.insert(draw(st.integers(0, len(fields))), fields[at])
    elif how == "field gone":
        del fields[at]
    elif how == "field more":
        fields.insert(at, (draw(st.sampled_from(["x", "Dtype", "offsets"])), draw(VALUES)))
    elif how == "field value":
        as_object = ((value, None),) if isinstance(value, str) else ()
        fields[at] = (key, draw(VALUES | st.sampled_from([as_object, [value]])))
    elif key == "shape" and how == "shape":
        fields[at] = (key, draw(SHAPES | st.just(value + [1] * 14)))
    elif key == "dtype" and how == "dtype":
        fields[at] = (key, draw(st.sampled_from([*sorted(BITS), "f32", "F128"])))
    elif key == "data_offsets" and how == "offsets":
        fields[at] = (key, [offset + draw(MOVES) for offset in value])
    return fields


@given(changed_members(), FORMS, st.sampled_from([0, 0, 0, -1, 1]))
@settings(SETTINGS, max_examples=400)
def test_changed_members_are_judged_alike(
    drawn: tuple[str, Pairs, int], form: dict[str, Any], more_nbytes: int
) -> None:
    how, members, data_nbytes = drawn
    outcome = check(build(dump(tuple(members), **form).encode(), max(0, data_nbytes + more_nbytes)))
    event(f"{how}: {outcome}")


@given(tensors(), FORMS, st.data())
@settings(SETTINGS, max_examples=400)
def test_changed_text_is_judged_alike(drawn: tuple[Pairs, int], form: dict[str, Any], data: st.DataObject) -> None:
    members, data_nbytes = drawn
    text = bytearray(dump(tuple(members), **form).encode())
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(text)))
        junk = data.draw(st.sampled_from(TOKENS) | st.binary(max_size=2))
        how = data.draw(st.sampled_from(["insert", "replace", "delete", "escape", "flip", "before", "behind"]))
        if how == "insert":
            text[at:at] = junk
        elif how == "replace":
            text[at : at + len(junk)] = junk
        elif how == "delete":
            del text[at : at + data.draw(st.integers(1, 8))]
        elif how == "escape":
            text[at : at + 1] = b"".join(b"\\u%04x" % byte for byte in text[at : at + 1])
        elif how == "flip" and at < len(text):
            text[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "before":
            text[:0] = junk
        elif how == "behind":
            text += junk
    event(check(build(bytes(text), data_nbytes)))


@given(tensors(), st.data())
@settings(SETTINGS, max_examples=100)
def test_changed_file_is_judged_alike(drawn: tuple[Pairs, int], data: st.DataObject) -> None:
    members, data_nbytes = drawn
    file = bytearray(build(dump(tuple(members)).encode(), data_nbytes))
    how = data.draw(st.sampled_from(["cut", "longer", "length"]))
    if how == "cut":
        del file[data.draw(st.integers(0, len(file))) :]
    elif how == "longer":
        file += data.draw(st.binary(min_size=1, max_size=9))
    else:
        at = data.draw(st.integers(0, LENGTH_NBYTES - 1))
        file[at] ^= 1 << data.draw(st.integers(0, 7))
    event(check(bytes(file)))
