"""The manifest: its identity, its JSON form, what its validation refuses, and names that stay in their folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, in_a_row, manifests

from weightcache.chunking import cut_safetensors
from weightcache.digest import Digest
from weightcache.errors import CacheFormatError, FormatError, UnsafePathError
from weightcache.header import MAX_RANK
from weightcache.manifest import (
    CHUNK_LIMIT_NBYTES,
    Chunk,
    Manifest,
    Role,
    Shard,
    check_path,
    check_paths,
    shard_from_json,
    shard_to_json,
)

DIGEST = Digest.of(b"content")


def make_shard(path: str = "a.safetensors") -> Shard:
    tensors = in_a_row(100, [("BF16", (2, 3)), ("F4", (4,)), ("I64", ()), ("F32", (0, 7))])
    stop = tensors[-1].stop
    chunks = cut_safetensors(100, tensors)
    return Shard(path, stop, "etag", Role.WEIGHTS, chunks, tensors, "unet/", {"format": "pt"})


def make_file(path: str, nbytes: int = 3, etag: str = "1") -> Shard:
    return Shard(path, nbytes, etag, Role.FILE, (Chunk(0, nbytes),))


# Identity


def test_plain_manifest_orders_its_shards() -> None:
    manifest = Manifest.plain([make_file("b"), make_file("a/c"), make_file("a.b")])
    assert [shard.path for shard in manifest.shards] == ["a.b", "a/c", "b"]


def test_revision_does_not_move_when_digests_are_learned() -> None:
    shard = make_shard()
    learned = shard.with_digests({0: DIGEST})
    assert learned.chunks[0].digest == DIGEST
    assert Manifest.plain([shard]).revision == Manifest.plain([learned]).revision


@pytest.mark.parametrize("other", [make_file("b"), make_file("a", 4), make_file("a", 3, "2")])
def test_revision_moves_with_name_size_and_state(other: Shard) -> None:
    assert Manifest.plain([make_file("a")]).revision != Manifest.plain([other]).revision


def test_tensors_carry_the_folder_of_their_component() -> None:
    manifest = Manifest.plain([make_shard(), make_file("config.json")])
    assert [name for name, _, _ in manifest.tensors()] == ["unet/t0", "unet/t1", "unet/t2", "unet/t3"]
    assert manifest.tensor_nbytes == 12 + 2 + 8


# JSON form


@examples
@given(manifests(4096), st.dictionaries(st.text(max_size=3), st.text(max_size=3)))
def test_shard_survives_json(manifest: Manifest, metadata: dict[str, str]) -> None:
    for drawn in manifest.shards:
        shard = Shard(
            drawn.path, drawn.nbytes, drawn.etag, drawn.role, drawn.chunks, drawn.tensors, "p/", metadata
        ).with_digests({0: DIGEST})
        form = json.loads(json.dumps(shard_to_json(shard)))
        assert shard_from_json(form, path=shard.path, prefix="p/") == shard


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_g18_unknown_version_is_refused(version: object) -> None:
    form = {**shard_to_json(make_shard()), "version": version, "chunks": "of another form"}
    with pytest.raises(CacheFormatError, match=r"record of a has format version .*, expected 1.*update"):
        shard_from_json(form, path="a")


Change = Callable[[dict[str, Any]], Any]


def put(value: object, *way: str | int) -> Change:
    """Return a change that puts a value at the end of a way into a form."""

    def change(form: Any) -> None:
        for step in way[:-1]:
            form = form[step]
        form[way[-1]] = value

    return change


HOSTILE: dict[str, Change] = {
    "no chunks": lambda form: form.pop("chunks"),
    "no tensors": lambda form: form.pop("tensors"),
    "no size": lambda form: form.pop("nbytes"),
    "unknown role": put("code", "role"),
    "metadata that is a list": put([], "metadata"),
    "metadata of numbers": put({"a": 1}, "metadata"),
    "etag that is no text": put(3, "etag"),
    "chunks that are a number": put(3, "chunks"),
    "chunk of two fields": put([0, 100], "chunks", 0),
    "chunk with a float": put(0.5, "chunks", 1, 0),
    "chunk with text": put("100", "chunks", 1, 0),
    "chunk with a flag": put(True, "chunks", 1, 1),
    "empty chunk": put(0, "chunks", 0, 1),
    "negative chunk": put(-100, "chunks", 0, 1),
    "chunk beyond the limit": put(CHUNK_LIMIT_NBYTES + 1, "chunks", 0, 1),
    "hole between chunks": put(101, "chunks", 1, 0),
    "chunks that overlap": put(99, "chunks", 1, 0),
    "chunks past the file": put(100, "nbytes"),
    "chunks short of the file": put(1000, "nbytes"),
    "size with a float": put(122.0, "nbytes"),
    "digest of another algorithm": put("sha256:" + "0" * 64, "chunks", 0, 2),
    "digest cut short": put("blake3:00", "chunks", 0, 2),
    "empty digest": put("", "chunks", 0, 2),
    "digest that is a number": put(7, "chunks", 0, 2),
    "tensor of four fields": put(["t", "U8", [1], 100], "tensors", 0),
    "tensor name that is no text": put(None, "tensors", 0, 0),
    "unknown dtype": put("F33", "tensors", 0, 1),
    "dtype that is no text": put(["U8"], "tensors", 0, 1),
    "shape of another size": put([2, 4], "tensors", 0, 2),
    "shape with negatives": put([-2, -3], "tensors", 0, 2),
    "shape with a float": put([2.0, 3.0], "tensors", 0, 2),
    "shape that is text": put("23", "tensors", 0, 2),
    "shape of half a byte": put([3], "tensors", 1, 2),
    "shape that overflows": put([2**62, 2**62, 0], "tensors", 3, 2),
    "rank beyond the limit": put([2, 3] + [1] * MAX_RANK, "tensors", 0, 2),
    "tensor before the file": put(["t0", "U8", [12], -12, 0], "tensors", 0),
    "tensor past the file": put(["t2", "I64", [], 200, 208], "tensors", 2),
    "tensor that ends before it starts": put(["t3", "U8", [0], 122, 121], "tensors", 3),
    "tensors that overlap": put(["t1", "U8", [2], 111, 113], "tensors", 1),
    "tensors out of order": lambda form: form["tensors"].reverse(),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_g21_hostile_form_is_refused(change: Change) -> None:
    form = copy.deepcopy(shard_to_json(make_shard()))
    change(form)
    with pytest.raises(FormatError, match=r"some/name\.safetensors") as caught:
        shard_from_json(json.loads(json.dumps(form)), path="some/name.safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("form", [None, 3, "version", [], {}, [["version", 1]]])
def test_form_that_is_no_object_is_refused(form: object) -> None:
    with pytest.raises(FormatError, match="record of a is not valid"):
        shard_from_json(form, path="a")


# Names

SAFE = [
    "a",
    "model-00001-of-00002.safetensors",
    ".gitattributes",
    "unet/config.json",
    "a b/ü.json",
    "..a/b..",
    "a" * 255,
    "/".join(["a" * 200] * 5),
    "weightcache.json",
]
UNSAFE = [
    "",
    "/",
    "/etc/passwd",
    "..",
    "../a",
    "a/../../b",
    "a/..",
    "./a",
    "a/.",
    "a//b",
    "a/",
    "a\0b",
    "a\nb",
    "a\x7f",
    "..\\a",
    "a\\b",
    "\ud800",
    "a" * 256,
    "ü" * 128,
    "/".join(["a" * 200] * 6),
    ".weightcache-files.json",
    "a/.weightcache-files.json",
    ".weightcache-staging/a",
]


@pytest.mark.parametrize("path", SAFE)
def test_safe_name_passes(path: str) -> None:
    assert check_path(path) == path


@pytest.mark.parametrize("path", UNSAFE)
def test_g20_unsafe_name_is_refused(path: str) -> None:
    with pytest.raises(UnsafePathError, match="unsafe file name") as caught:
        check_path(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UnsafePathError):
        Manifest.plain([make_file("config.json"), make_file(path)])


@pytest.mark.parametrize(
    "paths",
    [
        ["a", "a"],
        ["a", "a/b"],
        ["a/b", "a"],
        ["a/b", "a/b/c/d"],
        ["a/b/c/d", "a/b"],
        ["\xe9", "e\u0301"],
        ["\xe9/a", "e\u0301"],
        ["e\u0301", "\xe9/a"],
    ],
)
def test_g20_colliding_names_are_refused(paths: list[str]) -> None:
    with pytest.raises(UnsafePathError, match="file names collide"):
        check_paths(paths)


def test_names_side_by_side_pass() -> None:
    check_paths(["a", "ab", "b/a", "b/a.b", "b.a", "A"])


@examples
@given(st.text(st.sampled_from("a./\\\0 é"), max_size=12))
def test_g20_name_that_passes_stays_below_any_folder(path: str) -> None:
    try:
        check_path(path)
    except UnsafePathError:
        return
    assert not path.startswith("/")
    assert not {"", ".", ".."} & set(path.split("/"))
