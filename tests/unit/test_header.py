"""What a safetensors header may say, and the error for each thing it may not (PROMISES: bad input, G21)."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable

import pytest

from weightcache import dtypes
from weightcache.errors import FormatError
from weightcache.header import (
    LENGTH_NBYTES,
    MAX_ENTRY_NBYTES,
    MAX_HEADER_NBYTES,
    MAX_METADATA_KEYS,
    MAX_METADATA_NBYTES,
    MAX_RANK,
    MAX_TENSORS,
    Header,
    TensorEntry,
    header_stop,
    parse_header,
)

SOURCE = "s3://models/llama/model-00001-of-00002.safetensors"
ONE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def encode(members: object) -> bytes:
    return json.dumps(members, separators=(",", ":")).encode()


def parse(header: object, data_nbytes: int = 1) -> Header:
    """Parse a header given as bytes or as what JSON makes of it, before `data_nbytes` of data."""
    raw = header if isinstance(header, bytes) else encode(header)
    return parse_header(raw, LENGTH_NBYTES + len(raw) + data_nbytes, source=SOURCE)


def one(**fields: object) -> bytes:
    """Return a header of one tensor `w`, of one byte but for `fields`."""
    return encode({"w": {**ONE, **fields}})


def refusal(call: Callable[[], object]) -> FormatError:
    """Return the error of a call, having checked that it is one line and names the file."""
    with pytest.raises(FormatError) as caught:
        call()
    error = caught.value
    assert type(error) is FormatError
    assert str(error).startswith(f"{SOURCE}: ")
    assert "\n" not in str(error)
    assert len(str(error)) < 700
    assert error.facts["file"] == SOURCE
    return error


# What is accepted


def test_offsets_become_file_offsets_in_file_order() -> None:
    raw = encode(
        {
            "second": {"dtype": "F32", "shape": [2, 1], "data_offsets": [4, 12]},
            "first": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        }
    )
    at = LENGTH_NBYTES + len(raw)
    header = parse_header(raw, at + 12, source=SOURCE)
    assert header == Header(
        at,
        (
            TensorEntry("first", "BF16", (2,), at, at + 4),
            TensorEntry("second", "F32", (2, 1), at + 4, at + 12),
        ),
        {},
    )
    assert [tensor.nbytes for tensor in header.tensors] == [4, 8]


def test_empty_tensors_come_first_and_by_name() -> None:
    empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
    header = parse({"full": ONE, "b": empty, "a": empty})
    assert [tensor.name for tensor in header.tensors] == ["a", "b", "full"]


def test_scalar_has_an_empty_shape() -> None:
    assert parse(one(shape=[])).tensors[0].shape == ()


@pytest.mark.parametrize("raw", [b"{}", b"{ }", b"{}   ", b'{"__metadata__":{}}'])
def test_header_without_tensors(raw: bytes) -> None:
    assert parse(raw, 0) == Header(LENGTH_NBYTES + len(raw), (), {})


def test_metadata_is_returned() -> None:
    metadata = {"format": "pt", "": "", "é😀": 'line\n"{}"', "__metadata__": "\0"}
    assert parse({"__metadata__": metadata, "w": ONE}).metadata == metadata
    assert parse({"w": ONE, "__metadata__": metadata}).metadata == metadata
    raw = json.dumps({"__metadata__": metadata, "é😀": ONE}, ensure_ascii=False, indent=4).encode()
    assert parse(raw).metadata == metadata


def test_metadata_may_hold_braces_and_field_names_without_counting_as_tensors() -> None:
    tags = '"data_offsets' * (MAX_TENSORS + 1)
    assert len(parse({"__metadata__": {"tags": tags}, "w": ONE}).metadata["tags"]) == len(tags)


@pytest.mark.parametrize(
    "name", ["", "é", "😀", 'a"b', "a\\", "}", '":{', "../x", "a\nb", "\x7f", "x" * 1000, "data_offsets"]
)
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_any_name_without_nul_is_read(name: str, ensure_ascii: bool) -> None:
    header = parse(json.dumps({name: ONE}, ensure_ascii=ensure_ascii).encode())
    assert header.tensors[0].name == name


def test_fields_come_in_any_order_and_indented() -> None:
    for order in (["shape", "data_offsets", "dtype"], ["data_offsets", "dtype", "shape"]):
        raw = json.dumps({"w": {field: ONE[field] for field in order}}, indent=8).encode()
        assert parse(raw).tensors[0].shape == (1,)


def test_trailing_spaces_are_padding() -> None:
    raw = one() + b" " * 100
    assert parse(raw).tensors[0].start == LENGTH_NBYTES + len(raw)


def test_rank_and_tensor_count_up_to_the_limit_are_read() -> None:
    assert parse(one(shape=[1] * MAX_RANK)).tensors[0].shape == (1,) * MAX_RANK
    empty = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    raw = "{" + ",".join(f'"{i}":{empty}' for i in range(MAX_TENSORS)) + "}"
    assert len(parse(raw.encode(), 0).tensors) == MAX_TENSORS


def test_packed_dtypes_fill_whole_bytes() -> None:
    assert parse(one(dtype="F4", shape=[3, 2], data_offsets=[0, 3]), 3).tensors[0].nbytes == 3
    assert parse(one(dtype="F6_E2M3", shape=[4], data_offsets=[0, 3]), 3).tensors[0].nbytes == 3


# The length field


def test_header_stop_is_length_field_plus_length() -> None:
    assert header_stop(b"\x02" + bytes(7), 10, source=SOURCE) == 10
    at_limit = MAX_HEADER_NBYTES.to_bytes(8, "little")
    assert header_stop(at_limit + b"{", 1 << 40, source=SOURCE) == MAX_HEADER_NBYTES + LENGTH_NBYTES


@pytest.mark.parametrize(
    ("prefix", "file_nbytes", "words"),
    [
        pytest.param(b"", 0, ["0 bytes", "at least 8"], id="file empty"),
        pytest.param(bytes(7), 7, ["7 bytes", "at least 8"], id="file shorter than 8 bytes"),
        pytest.param(bytes(8), 100, ["length is 0", "at least 2"], id="header length 0"),
        pytest.param(b"\x01" + bytes(7), 100, ["length is 1", "at least 2"], id="header length 1"),
        pytest.param(b"\x03" + bytes(7), 10, ["byte 11", "10 bytes"], id="header length past the file"),
        pytest.param(b"\xff" * 8, 10, [str(2**64 + 7), "10 bytes"], id="header length 2**64-1"),
        pytest.param(
            (MAX_HEADER_NBYTES + 1).to_bytes(8, "little"),
            1 << 40,
            [str(MAX_HEADER_NBYTES + 1), f"limit is {MAX_HEADER_NBYTES}", "max_header_nbytes"],
            id="header length past the limit",
        ),
        pytest.param(b"version https://git-lfs", 130, ["git lfs pull"], id="git-lfs pointer"),
        pytest.param(b"PK\x03\x04\0\0\x08\x08", 1 << 40, ["convert it"], id="torch.save file"),
        pytest.param(b"<!DOCTYPE html>", 300, ["web page"], id="web page"),
        pytest.param(b'{"w":{"dtype"', 300, ["8-byte length"], id="JSON without length"),
    ],
)
def test_bad_length_is_refused(prefix: bytes, file_nbytes: int, words: list[str]) -> None:
    error = refusal(lambda: header_stop(prefix, file_nbytes, source=SOURCE))
    assert error.facts["rule"] == "length"
    assert all(word in str(error) for word in words), str(error)


def test_cut_file_is_not_taken_for_a_pickle() -> None:
    error = refusal(lambda: header_stop((0x280).to_bytes(8, "little"), 100, source=SOURCE))
    assert "fetch it again" in str(error)


def test_header_limit_is_the_callers() -> None:
    prefix = (100).to_bytes(8, "little")
    error = refusal(lambda: header_stop(prefix, 1000, source=SOURCE, max_header_nbytes=99))
    assert "limit is 99" in str(error)


def test_header_longer_than_the_file_is_refused() -> None:
    error = refusal(lambda: parse_header(b"{}", 9, source=SOURCE))
    assert error.facts["rule"] == "length"


# Bad input. A case is a header, the rule it breaks, what the message must say, and the data's size.

W = "tensor 'w'"
META = "__metadata__ "
OVER = 1 << 63
BAD: dict[str, tuple[bytes, str, list[str], int]] = {
    "not starting with {": (b'["w"]', "start", ["b'[\"w\"]'", "expected '{'"], 0),
    "leading space": (b" " + one(), "start", ["expected '{'"], 1),
    "empty": (b"", "start", ["expected '{'"], 0),
    "BOM": (b"\xef\xbb\xbf" + one(), "start", ["byte order mark"], 1),
    "not UTF-8 in a name": (one().replace(b"w", b"\xff"), "utf-8", ["0xff", "header byte 2"], 1),
    "not UTF-8, name cut short": (one().replace(b"w", b"\xc3"), "utf-8", ["0xc3"], 1),
    "not UTF-8, surrogate": (one().replace(b"w", b"\xed\xa0\x80"), "utf-8", ["0xed"], 1),
    "not UTF-8 in a tensor": (one().replace(b"U8", b"\xff8"), "utf-8", ["0xff"], 1),
    "not UTF-8 in metadata": (b'{"__metadata__":{"a":"\xe9"}}', "utf-8", ["0xe9", "header byte 22"], 0),
    "not JSON": (b"{dtype: U8}", "json", ["quoted name", "b'dtype: U8}'"], 0),
    "not JSON, no colon": (b'{"w",1}', "json", ["colon"], 0),
    "not JSON, open": (b"{", "json", ["quoted name"], 0),
    "not JSON, open after a tensor": (one()[:-1], "entry", [W, "after it"], 1),
    "not JSON, trailing comma": (one()[:-1] + b",}", "json", ["quoted name"], 1),
    "not JSON, comma in a tensor": (one()[:-2] + b",}}", "json", [W], 1),
    "not JSON, comma in a shape": (one().replace(b"[1]", b"[1,]"), "json", [W], 1),
    "not JSON, leading zero": (one().replace(b"[1]", b"[01]"), "json", [W], 1),
    "not JSON, single quotes": (one().replace(b'"', b"'"), "json", ["quoted name"], 1),
    "not JSON, control character in a name": (one().replace(b"w", b"\n"), "json", ["quoted name"], 1),
    "not JSON, unknown escape": (one().replace(b"w", b"\\x"), "json", ["escape"], 1),
    "not JSON, half a surrogate pair": (one().replace(b"w", b"\\udc00"), "json", ["surrogate"], 1),
    "not JSON, two objects": (one() + one(), "padding", ["nothing but spaces"], 1),
    "trailing newline": (one() + b"\n", "padding", ["spaces", "b'\\n'"], 1),
    "trailing NUL": (one() + b" \0", "padding", ["spaces"], 1),
    "NaN as tensor": (b'{"w":NaN}', "entry", [W, "NaN"], 0),
    "NaN as dimension": (one().replace(b"[1]", b"[NaN]"), "shape", [W, "nan in shape"], 1),
    "Infinity as offset": (one().replace(b"[0,", b"[-Infinity,"), "offsets", [W, "-inf"], 1),
    "null as tensor": (b'{"w":null}', "entry", [W, "null"], 0),
    "list as tensor": (b'{"w":["U8",[1],[0,1]]}', "entry", [W], 1),
    "unknown field": (one(strides=[1]), "fields", [W, "'strides'"], 1),
    "unknown field, near": (one(offsets=[0, 1]), "fields", [W, "did you mean 'data_offsets'?"], 1),
    "unknown field, object": (one(extra={"a": 1}), "json", [W], 1),
    "missing dtype": (b'{"w":{"shape":[1],"data_offsets":[0,1]}}', "fields", [W, "lacks dtype"], 1),
    "missing shape": (b'{"w":{"dtype":"U8","data_offsets":[0,1]}}', "fields", [W, "lacks shape"], 1),
    "missing offsets": (b'{"w":{"dtype":"U8","shape":[1]}}', "fields", [W, "lacks data_offsets"], 1),
    "missing all": (b'{"w":{}}', "fields", [W, "lacks dtype and shape and data_offsets"], 1),
    "float as offset": (one(data_offsets=[0, 1.0]), "offsets", [W, "1.0 in data_offsets"], 1),
    "exponent as offset": (one().replace(b"[0,1]", b"[0,1e0]"), "offsets", [W, "1.0"], 1),
    "negative offset": (one(data_offsets=[-1, 0]), "offsets", [W, "-1 in data_offsets"], 1),
    "boolean as offset": (one(data_offsets=[False, True]), "offsets", [W, "False"], 1),
    "string as offset": (one(data_offsets=["0", "1"]), "offsets", [W, "'0'"], 1),
    "one offset": (one(data_offsets=[1]), "offsets", [W, "[1]", "[begin, end]"], 1),
    "three offsets": (one(data_offsets=[0, 1, 1]), "offsets", [W, "[0, 1, 1]"], 1),
    "offsets past 2**63": (one(data_offsets=[0, 10**30]), "offsets", [W, "2**63"], 1),
    "float as dimension": (one(shape=[1.0]), "shape", [W, "1.0 in shape"], 1),
    "negative dimension": (one(shape=[-1]), "shape", [W, "-1 in shape"], 1),
    "boolean as dimension": (one(shape=[True]), "shape", [W, "True in shape"], 1),
    "minus zero as dimension": (one(shape=[0]).replace(b"[0]", b"[-0]"), "entry", [W, "-0"], 0),
    "number as shape": (one(shape=1), "shape", [W, "shape 1"], 1),
    "deep list as shape": (one(shape=[[[[[[1]]]]]]), "shape", [W, "in shape"], 1),
    "duplicate tensor name": (one()[:-1] + b"," + one()[1:], "duplicate", [W, "twice"], 1),
    "duplicate name by escape": (one()[:-1] + b',"\\u0077"' + one()[4:], "duplicate", [W, "twice"], 1),
    "duplicate field": (one()[:-2] + b',"dtype":"U8"}}', "duplicate", [W, "dtype twice"], 1),
    "duplicate metadata": (
        b'{"__metadata__":{},"__metadata__":{}}',
        "duplicate",
        ["tensor '__metadata__'", "twice"],
        0,
    ),
    "duplicate metadata key": (
        b'{"__metadata__":{"a":"b","a":"b"}}',
        "duplicate",
        [META, "'a' twice"],
        0,
    ),
    "metadata null": (encode({"__metadata__": None}), "metadata", [META, "object of strings"], 0),
    "metadata list": (encode({"__metadata__": ["a"]}), "metadata", [META, "object of strings"], 0),
    "metadata a tensor": (encode({"__metadata__": ONE}), "metadata", [META, "[1]"], 1),
    "metadata value a number": (encode({"__metadata__": {"a": 1}}), "metadata", [META, "'1}}'"], 0),
    "metadata value an object": (encode({"__metadata__": {"a": {}}}), "metadata", [META], 0),
    "metadata open": (b'{"__metadata__":{"a":"b', "metadata", [META, "Unterminated"], 0),
    "metadata without a colon": (b'{"__metadata__":{"a"}}', "metadata", [META], 0),
    "metadata, trailing comma": (b'{"__metadata__":{"a":"b",}}', "metadata", [META], 0),
    "metadata, nothing after": (b'{"__metadata__":{"a":"b"}', "metadata", [META], 0),
    "metadata, half a surrogate pair": (
        b'{"__metadata__":{"a":"\\ud83d"}}',
        "metadata",
        [META, "surrogate"],
        0,
    ),
    "metadata past its limit": (
        encode({"__metadata__": {"a": "x" * MAX_METADATA_NBYTES}}),
        "metadata",
        [META, str(MAX_METADATA_NBYTES)],
        0,
    ),
    "metadata with too many keys": (
        encode({"__metadata__": {str(i): "" for i in range(MAX_METADATA_KEYS + 1)}}),
        "metadata",
        [META, str(MAX_METADATA_KEYS)],
        0,
    ),
    "NUL in a name": (encode({"a\0b": ONE}), "name", ["tensor 'a\\x00b'", "NUL"], 1),
    "name past its limit": (encode({"x" * MAX_ENTRY_NBYTES: ONE}), "json", [str(MAX_ENTRY_NBYTES)], 1),
    "tensor past its limit": (
        one().replace(b"[1]", b"[" + b" " * MAX_ENTRY_NBYTES + b"1]"),
        "entry",
        [W, str(MAX_ENTRY_NBYTES)],
        1,
    ),
    "escape in a field's name": (one().replace(b"dtype", b"\\u0064type"), "entry", [W, "escapes"], 1),
    "rank over 16": (one(shape=[1] * 17), "rank", [W, "rank 17", "limit is 16"], 1),
    "dtype unknown": (one(dtype="F23"), "dtype", [W, "'F23'", "did you mean"], 1),
    "dtype in small letters": (one(dtype="bfloat16"), "dtype", [W, "'bfloat16'", "BF16"], 1),
    "dtype empty": (one(dtype=""), "dtype", [W, "''"], 1),
    "dtype a number": (one(dtype=8), "dtype", [W, "dtype 8"], 1),
    "dtype a list": (one(dtype=["U8"]), "dtype", [W, "['U8']"], 1),
    "dtype an object": (one(dtype={"U8": None}), "json", [W], 1),
    "shape product overflow": (
        one(shape=[2**62, 2**62]),
        "overflow",
        [W, str(2**62), "2**63"],
        1,
    ),
    "shape product overflow to the right size": (
        one(shape=[2**32, 2**32, 1], data_offsets=[0, 0]),
        "overflow",
        [W, "2**63"],
        0,
    ),
    "shape product overflow in an empty tensor": (
        one(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
        "overflow",
        [W, "2**63"],
        0,
    ),
    "dimension past 2**63": (one(shape=[10**30]), "shape", [W, "2**63"], 1),
    "dimension of thousands of digits": (
        one().replace(b"[1]", b"[" + b"9" * 3900 + b"]"),
        "shape",
        [W, "2**63"],
        1,
    ),
    "size smaller than shape x dtype": (
        one(dtype="F32"),
        "size",
        [W, "[0, 1]", "4 bytes", "F32"],
        1,
    ),
    "size larger than shape x dtype": (
        one(data_offsets=[0, 2]),
        "size",
        [W, "[0, 2]", "expected 1 bytes"],
        2,
    ),
    "begin past end": (one(shape=[0], data_offsets=[1, 0]), "offsets", [W, "[1, 0]"], 1),
    "packed dtype not whole bytes": (one(dtype="F4", shape=[3]), "size", [W, "12 bits"], 1),
    "tensors overlap": (
        encode({"w": ONE, "v": {**ONE, "shape": [2], "data_offsets": [0, 2]}}),
        "layout",
        ["tensor 'v' at data_offsets [0, 2)", "overlaps 'w' at data_offsets [0, 1)"],
        2,
    ),
    "tensors overlap exactly": (
        encode({"w": ONE, "v": ONE}),
        "layout",
        ["tensor 'w' at data_offsets [0, 1)", "overlaps 'v' at data_offsets [0, 1)"],
        1,
    ),
    "an empty tensor inside another": (
        encode(
            {
                "w": {**ONE, "shape": [2], "data_offsets": [0, 2]},
                "v": {**ONE, "shape": [0], "data_offsets": [1, 1]},
            }
        ),
        "layout",
        ["tensor 'v' at data_offsets [1, 1)", "overlaps 'w' at data_offsets [0, 2)"],
        2,
    ),
    "hole between tensors": (
        encode({"w": ONE, "v": {**ONE, "data_offsets": [3, 4]}}),
        "layout",
        ["'v' at data_offsets [3, 4)", "hole of 2 bytes after 'w' at data_offsets [0, 1)"],
        4,
    ),
    "hole before the first tensor": (
        one(data_offsets=[1, 2]),
        "layout",
        [W, "[1, 2)", "hole of 1 bytes after the start of the data"],
        2,
    ),
    "ending before the file": (one(), "layout", [W, "[0, 1)", "byte 62 of 64", "no tensor's"], 3),
    "ending after the file": (one(), "layout", [W, "[0, 1)", "byte 62 of 61", "fetch"], 0),
    "data without tensors": (b"{}", "layout", ["byte 10 of 11"], 1),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_header_is_refused(case: str) -> None:
    raw, rule, words, data_nbytes = BAD[case]
    error = refusal(lambda: parse(raw, data_nbytes))
    assert error.facts["rule"] == rule, str(error)
    assert all(word in str(error) for word in words), str(error)
    if words[0] == W:
        assert error.facts["tensor"] == "w"


# G21: hostile headers

MIB = 1 << 20


def fill(start: bytes, unit: bytes) -> bytes:
    return (start + unit * (MAX_HEADER_NBYTES // len(unit)))[:MAX_HEADER_NBYTES]


def tensors(count: int) -> bytes:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    return ("{" + ",".join(f'"{i}":' + entry % (i, i + 1) for i in range(count)) + "}").encode()


HOSTILE: dict[str, Callable[[], bytes]] = {
    "lists in lists": lambda: fill(b'{"w":', b"["),
    "objects in objects": lambda: fill(b"", b'{"w":'),
    "lists in a shape": lambda: one().replace(b"[1]", b"[" * 1900 + b"]" * 1900),
    "one integer": lambda: fill(b'{"w":{"dtype":"U8","shape":[', b"9"),
    "one shape": lambda: fill(b'{"w":{"dtype":"U8","shape":[', b"1,"),
    "one name": lambda: fill(b'{"', b"a"),
    "one escaped name": lambda: fill(b'{"', b"\\u0041"),
    "tiny members": lambda: fill(b"{", b'"w":1,'),
    "tiny objects": lambda: fill(b"{", b'"w":{},'),
    "fields": lambda: fill(b'{"w":{', b'"dtype":"U8",'),
    "too many tensors": lambda: tensors(MAX_TENSORS + 1),
    "spaces": lambda: fill(b"{", b" "),
    "spaces behind": lambda: fill(b"{}", b" ")[:-1] + b"x",
    "zeros": lambda: fill(b"{", b"\0"),
    "emoji": lambda: fill(b'{"', "😀".encode()),
    "metadata without end": lambda: fill(b'{"__metadata__":{"":"', b"a"),
    "metadata of quotes": lambda: fill(b'{"__metadata__":{"":"', b'\\"'),
    "metadata of escapes": lambda: fill(b'{"__metadata__":{"":"', b"\\u00e9"),
    "metadata of emoji": lambda: fill(b'{"__metadata__":{"":"', "😀".encode()),
    "metadata of tiny keys": lambda: b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(1 << 18)),
    "metadata widened by an emoji, then a fault": lambda: (
        b'{"__metadata__":{"":"' + b"a" * (MAX_METADATA_NBYTES - 50) + "😀".encode() + b'"},"w":1}'
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_g21_hostile_header_is_refused_within_64_mib(case: str) -> None:
    raw = HOSTILE[case]()

    def parse() -> None:
        refusal(lambda: parse_header(raw, 1 << 40, source=SOURCE))

    tracemalloc.start()
    try:
        parse()
        assert tracemalloc.get_traced_memory()[1] < 64 * MIB
    finally:
        tracemalloc.stop()


def test_deep_nesting_is_refused_when_the_stack_is_nearly_used_up() -> None:
    raw = one().replace(b"[1]", b"[" * 900 + b"]" * 900)

    def deeper(levels: int) -> FormatError:
        return deeper(levels - 1) if levels else refusal(lambda: parse(raw))

    assert {deeper(levels).facts["rule"] for levels in range(0, 600, 50)} <= {"json", "shape"}


def test_six_thousand_tensors_are_parsed() -> None:
    members: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for i in range(6000):
        shape = [2048, 768] if i % 2 else [2048]
        nbytes = math.prod(shape) * 2
        name = f"model.layers.{i // 100}.mlp.experts.{i % 100}.down_proj.weight"
        members[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = encode(members)
    assert len(parse(raw, at).tensors) == 6000


# dtypes


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [("F32", (), 4), ("F64", (2, 3), 48), ("BOOL", (0, 9), 0), ("F4", (2,), 1), ("F6_E3M2", (2, 2), 3)],
)
def test_tensor_nbytes(dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
    assert dtypes.tensor_nbytes(dtype, shape) == nbytes


def test_tensor_nbytes_refuses_what_is_no_whole_number_of_bytes() -> None:
    with pytest.raises(ValueError, match=r"F6_E2M3 of shape \[3\] takes 18 bits"):
        dtypes.tensor_nbytes("F6_E2M3", [3])
    with pytest.raises(ValueError, match="did you mean 'BF16'"):
        dtypes.tensor_nbytes("B16", [3])


def test_alignment_is_the_elements_size() -> None:
    expected = {"U8": 1, "BF16": 2, "F32": 4, "I64": 8, "C64": 8, "F4": 1, "F6_E2M3": 1, "BOOL": 1}
    assert {dtype: dtypes.alignment_bytes(dtype) for dtype in expected} == expected
    with pytest.raises(ValueError, match="unknown dtype"):
        dtypes.alignment_bytes("F128")
