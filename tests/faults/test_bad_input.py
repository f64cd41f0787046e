"""Every row of the table of bad input, through the public face: the right error, one line, and nothing kept.

Full disks are in test_crash.py.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import models
import pytest
import torch
from servers import Bucket, HttpServer, Proxy, S3Server

import weightcache
from weightcache.errors import (
    AccessDeniedError,
    CapacityError,
    ConfigError,
    DeviceError,
    FormatError,
    IncompleteModelError,
    ModelNotFoundError,
    UnsafeFormatError,
    UnsafePathError,
    UriError,
    WeightcacheError,
)
from weightcache.header import MAX_METADATA_NBYTES

MIB = 1 << 20
ONE: models.Shapes = {"one": ("F32", (4,))}
Refuse = Callable[..., WeightcacheError]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for the model."""
    path = tmp_path / "model"
    path.mkdir()
    return path


def kept(tmp_path: Path) -> list[Path]:
    """Return what lies in the cache folder as a chunk."""
    return list((tmp_path / "cache").glob("chunks/??/*"))


@pytest.fixture
def refuse(tmp_path: Path) -> Refuse:
    """Check that a load is refused: by this very error, in one line that holds these words, keeping nothing."""

    def check(uri: str | Path, error: type[WeightcacheError], *words: object, **options: Any) -> WeightcacheError:
        with pytest.raises(WeightcacheError) as caught:
            weightcache.load_model(uri, **{"device": "cpu", "cache": "disk"} | options)
        message = str(caught.value)
        assert (type(caught.value), [word for word in words if str(word) not in message]) == (error, []), message
        assert message.isprintable()
        assert len(message) < 1000
        assert kept(tmp_path) == []
        return caught.value

    return check


def write_header(path: Path, header: object, n_data_bytes: int = 0) -> Path:
    """Write a file of a header, JSON or as it is, and zeroes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(n_data_bytes))
    return path


def entry(begin: Any, end: Any, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    """Return a tensor's description."""
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


# Headers


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has 0 bytes, expected at least 8"),
        (b"1234567", "has 7 bytes, expected at least 8"),
        (bytes(8), "length is 0, expected at least 2"),
        (bytes(100), "length is 0, expected at least 2"),
        ((3).to_bytes(8, "little") + b"{}", "ends at byte 11, past the file's 10 bytes"),
        (b"\xff" * 8 + b"{}", "past the file's 10 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ],
)
def test_file_without_a_whole_header_is_refused(folder: Path, refuse: Refuse, content: bytes, says: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    refuse(folder, FormatError, path, says)


def test_header_beyond_the_limit_is_refused(folder: Path, refuse: Refuse) -> None:
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write((32 * MIB + 1).to_bytes(8, "little"))
        file.truncate(40 * MIB)
    refuse(folder, FormatError, path, "length is 33554433, the limit is 33554432")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'[{"a":1}]', "starts with"),
        (b' {"a":{}}', "starts with"),
        (b"\xef\xbb\xbf{}", "a byte order mark"),
        (b'{"\xff":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "expected UTF-8"),
        (b'{"a":', "expected"),
        (b"{a: 1}", "expected a quoted name"),
        (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', "expected an integer"),
        (b'{"a":{"dtype":"U8","shape":[0.0],"data_offsets":[0,0]}}', "0.0 in shape, expected an integer"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1.0]}}', "1.0 in data_offsets"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}', "-1 in data_offsets"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":0}}', "unknown field 'x'"),
        (b'{"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}}', "the field shape twice"),
        (b"{" + b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},' * 2 + b'"b":{}}', "'a' is named twice"),
        (b'{"__metadata__":{"a":1}}', "__metadata__"),
    ],
)
def test_header_that_breaks_its_form_is_refused(folder: Path, refuse: Refuse, text: bytes, says: str) -> None:
    path = write_header(folder / "model.safetensors", text, 1)
    refuse(folder, FormatError, path, says)


@pytest.mark.parametrize(
    ("tensors", "nbytes", "says"),
    [
        ({"a": entry(0, 4), "b": entry(3, 6)}, 6, ["'b'", "[3, 6)", "overlaps", "'a'", "[0, 4)"]),
        ({"a": entry(0, 4), "b": entry(6, 8)}, 8, ["'b'", "[6, 8)", "hole of 2 bytes", "'a'", "[0, 4)"]),
        ({"a": entry(2, 4)}, 4, ["'a'", "[2, 4)", "hole of 2 bytes"]),
        ({"a": entry(0, 4)}, 3, ["'a'", "[0, 4)", "at byte 72 of 71"]),
        ({"a": entry(0, 4)}, 5, ["'a'", "[0, 4)", "at byte 72 of 73"]),
    ],
)
def test_tensors_that_do_not_cover_the_file_are_refused(
    folder: Path, refuse: Refuse, tensors: Any, nbytes: int, says: list[str]
) -> None:
    path = write_header(folder / "model.safetensors", tensors, nbytes)
    refuse(folder, FormatError, path, *says)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (entry(0, 8, "F32", [2**62, 4]), "2**63 bits"),
        (entry(0, 0, "F32", [2**62, 4, 0]), "2**63 bits"),
        (entry(0, 8, "U8", [1] * 17), "rank 17, the limit is 16"),
        (entry(0, 8, "F33", [2]), "unknown dtype 'F33' (did you mean 'F32'?)"),
        (entry(0, 8, "F32", [3]), "expected 12 bytes for F32"),
        (entry(0, 8, "F4", [3]), "does not fill whole bytes"),
    ],
)
def test_tensor_that_is_not_its_shape_is_refused(folder: Path, refuse: Refuse, tensor: Any, says: str) -> None:
    path = write_header(folder / "model.safetensors", {"t": tensor}, 8)
    refuse(folder, FormatError, path, "tensor 't'", says)


def test_shard_that_is_broken_is_named_among_others(folder: Path, refuse: Refuse) -> None:
    models.write_tiny_sharded(folder, 3)
    path = folder / "model-00002-of-00003.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    refuse(folder, FormatError, path, "at byte")


def test_broken_shard_at_a_bucket_is_named(s3: S3Server, bucket: Bucket, refuse: Refuse) -> None:
    bucket.put("m/model.safetensors", b"1234")
    uri = f"{bucket.url}/m"
    refuse(uri, FormatError, f"{uri}/model.safetensors", "has 4 bytes", storage_options=s3.storage_options())


# Indexes


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"one": "a.safetensors", "two": "b.safetensors"}, "1 of 2 shards that are not there: b.safetensors"),
        ({"one": "other.safetensors"}, "'one' is in other.safetensors, but no shard has it"),
        ({"one": "a.safetensors", "two": "a.safetensors"}, "'two' is in a.safetensors, but no shard has it"),
    ],
)
def test_index_that_does_not_fit_its_shards_is_refused(
    folder: Path, refuse: Refuse, weight_map: dict[str, str], says: str
) -> None:
    models.write_safetensors(folder / "a.safetensors", ONE)
    models.write_safetensors(folder / "other.safetensors", {"three": ("U8", (1,))})
    (folder / models.INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    refuse(folder, IncompleteModelError, models.INDEX_NAME, says)


@pytest.fixture
def unlisted(folder: Path, http_folder: Callable[[Path], HttpServer]) -> Iterator[str]:
    """The URL of the folder at a web server that shows no listings."""
    with Proxy(http_folder(folder).address) as proxy:
        proxy.script(r"\w+ /?$", "404 404 404 404")
        yield proxy.endpoint


def test_index_that_misses_a_shard_is_refused_where_nothing_is_listed(
    folder: Path, unlisted: str, refuse: Refuse
) -> None:
    models.write_safetensors(folder / "a.safetensors", ONE)
    weight_map = {"one": "a.safetensors", "two": "b.safetensors"}
    (folder / models.INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    refuse(unlisted, IncompleteModelError, models.INDEX_NAME, "not there: b.safetensors")


def test_index_that_is_none_is_refused_where_nothing_is_listed(folder: Path, unlisted: str, refuse: Refuse) -> None:
    (folder / models.INDEX_NAME).write_text("[]")
    refuse(unlisted, FormatError, models.INDEX_NAME, "is no index")


def test_g20_index_naming_files_outside_is_refused_where_nothing_is_listed(
    folder: Path, unlisted: str, refuse: Refuse
) -> None:
    (folder / models.INDEX_NAME).write_text(json.dumps({"weight_map": {"one": "../a.safetensors"}}))
    refuse(unlisted, UnsafePathError, "unsafe file name '../a.safetensors'")


# Names


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's path may be 107 bytes long
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


def link_out(path: Path) -> None:
    (path.parent.parent / "outside").write_bytes(b"secret")
    path.symlink_to("../outside")


def link_to_folder(path: Path) -> None:
    (path.parent / "below").mkdir()
    path.symlink_to("below")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (make_fifo, "is no regular file"),
        (make_socket, "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
        (link_out, "is a link that leaves the model's folder"),
        (link_to_folder, "is no regular file"),
        (lambda path: path.symlink_to("nowhere"), "is a link to nothing"),
        (lambda path: path.symlink_to(path), "cannot be looked at"),
    ],
    ids=["fifo", "socket", "device", "link out", "link to folder", "dangling link", "loop"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_g20_file_that_is_none_is_refused(
    folder: Path, refuse: Refuse, make: Callable[[Path], None], says: str, name: str
) -> None:
    models.write_safetensors(folder / "other.safetensors", ONE)
    make(folder / name)
    refuse(folder, UnsafePathError, folder / name, says)
    if name == "model.safetensors":
        refuse(folder / name, UnsafePathError, folder / name, says)


@pytest.mark.parametrize(
    "names",
    [
        ["new\nline"],
        ["back\\slash"],
        [".weightcache-files.json"],
        [b"\xff".decode(errors="surrogateescape")],
        ["\xe9.json", "e\u0301.json"],
        ["/".join("a" * 600)],
    ],
    ids=["control", "backslash", "reserved", "no text", "colliding", "deep"],
)
def test_g20_unsafe_name_on_disk_is_refused(folder: Path, refuse: Refuse, names: list[str]) -> None:
    models.write_safetensors(folder / "model.safetensors", ONE)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    refuse(folder, UnsafePathError, "file name")


def test_folders_nested_without_end_are_refused(folder: Path, refuse: Refuse) -> None:
    models.write_safetensors(folder / "model.safetensors", ONE)
    deep = str(folder)
    for _ in range(1200):
        deep += "/a"
        os.mkdir(deep)  # noqa: PTH102 - a Path would have 1200 parents of its own
    refuse(folder, UnsafePathError, folder, "1024 bytes")
    subprocess.run(["rm", "-r", str(folder / "a")], check=True)  # Python's own way is recursive


@pytest.fixture
def listing(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Store a model, and objects under any names, at fsspec's memory file system; give back its URL."""
    memory = fsspec.filesystem("memory")

    def put(*names: str) -> str:
        models.write_safetensors(tmp_path / "one.safetensors", ONE)
        memory.pipe("/m/model.safetensors", (tmp_path / "one.safetensors").read_bytes())
        for name in names:
            memory.store[f"/m/{name}"] = memory.store["/m/model.safetensors"]
        return "memory://m"

    yield put
    memory.store.clear()


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "a//evil", "./evil", "ev\0il", "evil" * 64])
def test_g20_unsafe_name_in_a_listing_is_refused(
    tmp_path: Path, refuse: Refuse, listing: Callable[..., str], name: str
) -> None:
    uri = listing(name)
    refuse(uri, UnsafePathError, "unsafe file name")
    with pytest.raises(UnsafePathError, match="unsafe file name"):
        weightcache.pull(uri, tmp_path / "pulled")
    assert [path for path in tmp_path.rglob("*") if "evil" in path.name] == []


def test_g20_colliding_names_in_a_listing_are_refused(refuse: Refuse, listing: Callable[..., str]) -> None:
    refuse(listing("a", "a/b"), UnsafePathError, "file names collide: 'a' and 'a/b'")


def test_g20_pull_does_not_write_through_a_link(tmp_path: Path, folder: Path) -> None:
    models.write_diffusers(folder)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "pulled").mkdir()
    (tmp_path / "pulled" / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError, match="would leave"):
        weightcache.pull(folder, tmp_path / "pulled")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert [path.name for path in (tmp_path / "pulled").iterdir()] == ["unet"]


def test_link_inside_the_folder_is_followed(folder: Path) -> None:
    models.write_safetensors(folder / "weights", ONE)
    (folder / "model.safetensors").symlink_to("weights")
    with weightcache.load_model(folder, "cpu") as model:
        assert list(model) == ["one"]


def make_snapshot(root: Path) -> Path:
    """Lay a model out as the Hugging Face cache does; return its snapshot's folder."""
    snapshot = root / "models--org--name" / "snapshots" / "0123abc"
    blobs = root / "models--org--name" / "blobs"
    for path in (snapshot, blobs):
        path.mkdir(parents=True)
    models.write_safetensors(blobs / "f00d", ONE)
    (blobs / "beef").write_text('{"model_type": "tiny"}')
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    (snapshot / "config.json").symlink_to("../../blobs/beef")
    return snapshot


def test_snapshot_of_the_hugging_face_cache_is_followed_to_its_blobs(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path)
    for uri in (snapshot, snapshot / "model.safetensors"):
        with weightcache.load_model(uri, "cpu") as model:
            assert list(model) == ["one"]
    with weightcache.load_model(snapshot, "cpu") as model:
        assert model.config == {"model_type": "tiny"}


def test_g20_snapshot_is_not_followed_to_another_models_blobs(tmp_path: Path, refuse: Refuse) -> None:
    snapshot = make_snapshot(tmp_path)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "cafe").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../../models--org--other/blobs/cafe")
    refuse(snapshot, UnsafePathError, snapshot / "tokenizer.json", "leaves the model's folder")


# Code


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt"])
def test_g19_pickle_is_refused_and_not_run(tmp_path: Path, folder: Path, refuse: Refuse, name: str) -> None:
    marker = tmp_path / "ran"
    (folder / name).write_bytes(pickle.dumps(Bomb(marker)))
    refuse(folder, UnsafeFormatError, folder, name, "safetensors.torch.save_file")
    refuse(folder / name, UnsafeFormatError, folder / name, "safetensors.torch.save_file")
    assert not marker.exists()


def test_g19_pickle_under_a_safe_name_is_refused_and_not_run(tmp_path: Path, folder: Path, refuse: Refuse) -> None:
    marker = tmp_path / "ran"
    (folder / "model.safetensors").write_bytes(pickle.dumps([Bomb(marker), "weights" * 1000]))
    refuse(folder, FormatError, folder / "model.safetensors", "looks like a pickle: convert it to safetensors")
    assert not marker.exists()


def test_g19_pickle_at_a_bucket_is_refused(s3: S3Server, bucket: Bucket, refuse: Refuse) -> None:
    bucket.put("m/pytorch_model.bin", b"x")
    uri = f"{bucket.url}/m"
    options = s3.storage_options()
    refuse(uri, UnsafeFormatError, uri, "(pytorch_model.bin)", storage_options=options)
    refuse(f"{uri}/pytorch_model.bin", UnsafeFormatError, storage_options=options)


def test_g19_code_and_pickles_beside_the_weights_are_carried_and_not_run(tmp_path: Path, folder: Path) -> None:
    models.write_tiny_sharded(folder)
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_tiny.Tiny"}}')
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with weightcache.load_model(folder, "cpu") as model:
        assert model.config["auto_map"] == {"AutoModel": "modeling_tiny.Tiny"}
        assert "modeling_tiny.py" in model.files
        assert "pytorch_model.bin" not in model.files
    weightcache.pull(folder, tmp_path / "pulled")
    pulled = {path.relative_to(tmp_path / "pulled"): path.read_bytes() for path in (tmp_path / "pulled").rglob("*")}
    assert pulled == {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")}
    assert not (tmp_path / "ran").exists()
    assert "modeling_tiny" not in sys.modules


# Places


def test_folder_without_weights_is_not_found(folder: Path, refuse: Refuse) -> None:
    (folder / "config.json").write_text("{}")
    refuse(folder, ModelNotFoundError, "no safetensors among the 1 files", folder, "config.json")


def test_empty_folder_is_not_found(folder: Path, refuse: Refuse) -> None:
    refuse(folder, ModelNotFoundError, folder, "is empty")


def test_place_that_is_not_there_is_not_found(tmp_path: Path, refuse: Refuse) -> None:
    for path in (tmp_path / "absent", tmp_path / "absent.safetensors", tmp_path / "absent" / "model.safetensors"):
        refuse(path, ModelNotFoundError, path)


def test_file_in_place_of_a_folder_is_not_found(folder: Path, refuse: Refuse) -> None:
    (folder / "weights").write_bytes(b"x")
    refuse(folder / "weights", ModelNotFoundError, folder / "weights")


def test_empty_prefix_is_not_found(s3: S3Server, bucket: Bucket, refuse: Refuse) -> None:
    bucket.put("llama-3/config.json", b"{}")
    for name in ("llama", "absent", "llama-3/absent"):
        uri = f"{bucket.url}/{name}"
        refuse(uri, ModelNotFoundError, uri, storage_options=s3.storage_options())


def test_object_that_is_not_there_is_not_found(s3: S3Server, bucket: Bucket, refuse: Refuse) -> None:
    refuse(f"{bucket.url}/a.safetensors", ModelNotFoundError, bucket.url, storage_options=s3.storage_options())


def test_bucket_that_is_not_there_is_not_found(s3: S3Server, refuse: Refuse) -> None:
    options = s3.storage_options()
    refuse("s3://no-such-bucket/m", ModelNotFoundError, "no bucket 'no-such-bucket'", storage_options=options)


@pytest.mark.parametrize("wrong", [{"secret": "HUSH"}, {"key": "unknown"}])
def test_wrong_credentials_are_denied_and_not_repeated(
    s3: S3Server, bucket: Bucket, refuse: Refuse, wrong: dict[str, str]
) -> None:
    uri = bucket.put("m/model.safetensors", b"x").rpartition("/")[0]
    error = refuse(uri, AccessDeniedError, uri, "credentials", storage_options=s3.storage_options() | wrong)
    assert s3.secret not in f"{error} {error.facts}" and "HUSH" not in f"{error} {error.facts}"


def test_no_credentials_are_denied_with_what_to_set(s3: S3Server, bucket: Bucket, refuse: Refuse) -> None:
    options = {"endpoint_url": s3.endpoint}
    refuse(f"{bucket.url}/m", AccessDeniedError, "AWS_ACCESS_KEY_ID", "'anon': True", storage_options=options)


def test_web_folder_that_is_not_there_is_not_found(
    folder: Path, http_folder: Callable[[Path], HttpServer], refuse: Refuse
) -> None:
    uri = f"{http_folder(folder).endpoint}/absent"
    refuse(uri, ModelNotFoundError, uri)


# URIs and arguments


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("s3://AKIA:HUSH@bucket/m", "s3://…@bucket/m"),
        ("https://HUSH@host/m", "https://…@host/m"),
        ("s4://bucket/m", "'s4://bucket/m' (did you mean 's3'?)"),
        ("wc://prod/llama@tag", "unknown logical name 'wc://prod/llama@tag'"),
        ("", "not a model's name"),
        ("s3://", "names no folder"),
    ],
)
def test_name_that_means_nothing_is_refused(refuse: Refuse, uri: str, says: str) -> None:
    error = refuse(uri, UriError, says)
    assert "HUSH" not in f"{error} {error.facts}"


def test_choice_that_leaves_no_tensor_is_refused(folder: Path, refuse: Refuse) -> None:
    models.write_safetensors(folder / "model.safetensors", ONE)
    refuse(folder, ConfigError, "include='on'", "none of the 1 tensors", include="on")


def test_unknown_cache_mode_is_refused(folder: Path, refuse: Refuse) -> None:
    refuse(folder, ConfigError, "cache='dsik'", "did you mean 'disk'?", cache="dsik")


# Capacity


def test_device_that_is_not_there_is_refused(folder: Path, refuse: Refuse) -> None:
    models.write_safetensors(folder / "model.safetensors", ONE)
    n_devices = torch.cuda.device_count()
    refuse(folder, DeviceError, f"cuda:{n_devices}", f"{n_devices} CUDA devices", device=f"cuda:{n_devices}")


def test_cache_folder_that_cannot_be_used_is_refused_when_demanded(
    tmp_path: Path, folder: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.write_safetensors(folder / "model.safetensors", ONE)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("WEIGHTCACHE_DIR", str(tmp_path / "file" / "cache"))
    refuse(folder, CapacityError, tmp_path / "file" / "cache", "WEIGHTCACHE_DIR")


def test_cache_folder_that_cannot_be_used_is_gone_without_with_a_warning(
    listing: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_DIR", "/dev/null/cache")
    with weightcache.load_model(listing(), "cpu") as model:
        assert list(model) == ["one"]
        assert [text for text in model.report.warnings if "/dev/null/cache" in text]


@pytest.mark.parametrize("cache", ["disk", "auto"])
def test_budget_that_does_not_suffice_is_gone_without_with_a_warning(
    listing: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.setenv("WEIGHTCACHE_DISK_BUDGET_BYTES", "1")
    with weightcache.load_model(listing(), "cpu", cache=cache) as model:
        assert model.wait_stored(10.0)
        assert list(model) == ["one"]
        assert [text for text in model.report.warnings if "the disk tier failed" in text and "budget" in text]
    assert kept(tmp_path) == []


# What is measured in a process of its own, a fork of one that has imported everything.

ZYGOTE = """if True:
    import json, os, resource, sys
    from pathlib import Path
    import fsspec, torch, weightcache
    import weightcache.cache, weightcache.tensors

    def status(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    def refusal(good, bad, spare_bytes):
        weightcache.load_model(good, "cpu").close()  # threads and buffers are there from now on
        resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
        resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + spare_bytes, resource.RLIM_INFINITY))
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
        before = status("VmHWM")
        try:
            weightcache.load_model(bad, "cpu", cache="disk")
        except weightcache.WeightcacheError as exc:
            return [type(exc).__name__, str(exc), status("VmHWM") - before]
        return ["no error", "", 0]

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(json.dumps(refusal(*json.loads(line))), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print("[]", flush=True)
"""
Measure = Callable[..., tuple[str, str, int]]


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A process that measures a refusal for each line it reads."""
    environment = {**os.environ, "WEIGHTCACHE_DIR": str(tmp_path_factory.mktemp("zygote"))}
    command = [sys.executable, "-c", ZYGOTE]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


@pytest.fixture
def measure(tmp_path: Path, zygote: subprocess.Popen[str]) -> Measure:
    """Load what is bad; return the error's class, its message, and by how many bytes the resident peak grew.

    The processor time is bounded by 5 s, the address space by `spare_bytes` more than is in use.
    """

    def check(bad: Path, spare_bytes: int = 4 << 30) -> tuple[str, str, int]:
        good = tmp_path / "good.safetensors"
        models.write_safetensors(good, {"one": ("U8", (2 * MIB,))})
        assert zygote.stdin is not None and zygote.stdout is not None
        zygote.stdin.write(json.dumps([str(good), str(bad), spare_bytes]) + "\n")
        zygote.stdin.flush()
        error, message, grown_bytes = json.loads(zygote.stdout.readline())
        return error, message, grown_bytes

    return check


def test_host_memory_that_does_not_suffice_is_told(folder: Path, measure: Measure) -> None:
    path = write_header(folder / "model.safetensors", {"t": entry(0, 1 << 40)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 40))
    error, message, _ = measure(folder, 1 << 30)
    assert error == "CapacityError"
    assert f"no room for {1 << 40} bytes of host memory" in message


HOSTILE = {
    "junk": b"{" + b'"' * (32 * MIB - 1),
    "spaces": b"{" + b" " * (32 * MIB - 1),
    "nesting": b'{"a":' + b"[" * (32 * MIB - 5),
    "long name": b'{"' + b"a" * (32 * MIB - 2),
    "long number": b'{"a":{"dtype":"U8","shape":[' + b"9" * (32 * MIB - 28),
    "long text": b'{"__metadata__":{"a":"' + "\U0001f600".encode() + b"x" * (32 * MIB - 40),
    "longest text": b'{"__metadata__":{"a":"'
    + "\U0001f600".encode()
    + b"x" * (MAX_METADATA_NBYTES - 100)
    + b'"},"a":{}}'
    + b" " * (28 * MIB),
    "many tensors": b"{" + b'"":{"data_offsets":[],"":0},' * 1_150_000,
    "many dimensions": b'{"a":{"dtype":"U8","shape":[' + b"1," * (16 * MIB - 20),
    "many keys": b'{"__metadata__":{' + b",".join(b'"%d":""' % number for number in range(2_000_000)),
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_g21_hostile_header_is_refused_within_64_mib(folder: Path, measure: Measure, header: bytes) -> None:
    write_header(folder / "model.safetensors", header, 8)
    error, _, grown_bytes = measure(folder)
    assert error == "FormatError"
    assert grown_bytes <= 64 * MIB


def test_g21_announced_header_costs_nothing_before_it_is_checked(folder: Path, measure: Measure) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little"))
    with path.open("r+b") as file:
        file.truncate(1 << 41)
    error, _, grown_bytes = measure(folder)
    assert error == "FormatError"
    assert grown_bytes <= 4 * MIB


@pytest.mark.parametrize(
    "index",
    [b"[" * (32 * MIB), b"[" + b"[]," * (10 * MIB), b'{"weight_map":{' + b'"":"",' * (5 * MIB)],
    ids=["nesting", "many lists", "many names"],
)
def test_g21_hostile_index_is_refused_within_64_mib(folder: Path, measure: Measure, index: bytes) -> None:
    models.write_safetensors(folder / "a.safetensors", ONE)
    (folder / models.INDEX_NAME).write_bytes(index)
    error, _, grown_bytes = measure(folder)
    assert error == "FormatError"
    assert grown_bytes <= 64 * MIB
