"""Registries end to end, on a real S3 server and in a folder: publish, read, tag, compare, remove, sweep, check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Shapes, minilm_folder, write_diffusers, write_safetensors, write_tiny_sharded
from reference import assert_same, tensors_of
from safetensors.torch import load_file, save_file
from servers import Bucket

import weightcache
from weightcache import errors

# Three tensors that are chunks of their own, and small neighbours packed together.
SHAPES: Shapes = {
    **{f"layers.{number}.weight": ("BF16", (1024, 1024)) for number in range(3)},
    **{f"norms.{number}.weight": ("F32", (64,)) for number in range(5)},
}


@dataclass
class Place:
    """A registry that is not there yet, and how it is reached."""

    uri: str
    options: dict[str, Any] = field(default_factory=dict)

    def publish(self, folder: Path | str, name: str, **more: Any) -> Any:
        return weightcache.publish(folder, f"{self.uri}/{name}", destination_options=self.options, **more)

    def load(self, name: str, **more: Any) -> Any:
        return weightcache.load_model(f"{self.uri}/{name}", "cpu", storage_options=self.options, **more)


@pytest.fixture(params=["s3", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "folder":
        yield Place(str(tmp_path / "registry"))
        return
    bucket: Bucket = request.getfixturevalue("bucket")
    yield Place(f"{bucket.url}/registry", bucket.server.storage_options())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", SHAPES)
    (folder / "config.json").write_text('{"model_type": "layers"}')
    (folder / "empty").write_bytes(b"")
    return folder


def tune(model: Path, to: Path, *names: str) -> Path:
    """Copy a model with other bytes in some tensors."""
    shutil.copytree(model, to)
    tensors = load_file(to / "model.safetensors")
    for name in names:
        tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_published_tensors_are_the_models(place: Place, model: Path) -> None:
    published = place.publish(model, "tiny@v1")
    assert published.uploaded_bytes == published.bytes > 6 << 20
    with place.load("tiny@v1") as loaded:
        assert_same(loaded, tensors_of(model))
        assert loaded.report.revision == published.revision
        assert loaded.config == {"model_type": "layers"}


@pytest.mark.parametrize("write", [write_tiny_sharded, write_diffusers])
def test_layouts_load_equal_as_plain_and_as_published(place: Place, tmp_path: Path, write: Any) -> None:
    folder = tmp_path / "laid-out"
    write(folder)
    place.publish(folder, "laid-out")
    with weightcache.load_model(folder, "cpu") as plain, place.load("laid-out@latest") as published:
        assert_same(published, plain)


def test_the_real_model_loads_equal_and_is_pulled_bit_for_bit(place: Place, tmp_path: Path) -> None:
    folder = Path(minilm_folder())
    place.publish(folder, "minilm@v1")
    with place.load("minilm@v1") as loaded:
        assert_same(loaded, tensors_of(folder))
    weightcache.pull(f"{place.uri}/minilm@v1", tmp_path / "pulled", storage_options=place.options)
    assert contents(tmp_path / "pulled") == contents(folder)


def test_a_name_without_a_tag_is_the_latest(place: Place, model: Path) -> None:
    place.publish(model, "tiny")
    with place.load("tiny") as loaded:
        assert_same(loaded, tensors_of(model))
        assert place.load("tiny@latest").report.revision == loaded.report.revision


def test_a_revision_is_loaded_by_its_digest(place: Place, model: Path, tmp_path: Path) -> None:
    first = place.publish(model, "tiny@v1")
    place.publish(tune(model, tmp_path / "tuned", "layers.0.weight"), "tiny@v1")
    with place.load(f"tiny@{first.revision}") as loaded:
        assert_same(loaded, tensors_of(model))


def test_publishing_again_uploads_nothing_and_moves_nothing(place: Place, model: Path) -> None:
    first = place.publish(model, "tiny@v1")
    again = place.publish(model, "tiny@v1")
    assert (again.revision, again.uploaded_bytes) == (first.revision, 0)
    assert [tag.moves for tag in weightcache.tags(place.uri, storage_options=place.options)] == [1]


def test_a_fine_tune_costs_what_differs(place: Place, model: Path, tmp_path: Path) -> None:
    place.publish(model, "tiny@v1")
    tuned = place.publish(tune(model, tmp_path / "tuned", "layers.1.weight"), "tiny@tuned")
    assert 2 << 20 <= tuned.uploaded_bytes < (2 << 20) + 8192  # the tensor, and the header that save_file wrote
    with place.load("tiny@tuned") as loaded:
        assert_same(loaded, tensors_of(tmp_path / "tuned"))


def test_a_cached_base_leaves_only_what_differs_to_fetch(place: Place, model: Path, tmp_path: Path) -> None:
    place.publish(model, "tiny@v1")
    place.publish(tune(model, tmp_path / "tuned", "layers.1.weight"), "tiny@tuned")
    weightcache.prefetch(f"{place.uri}/tiny@v1", storage_options=place.options)
    report = weightcache.prefetch(f"{place.uri}/tiny@tuned", storage_options=place.options)
    assert 2 << 20 <= report.bytes["origin"] < (2 << 20) + 8192


def test_a_revision_is_published_from_another_registry(place: Place, model: Path, tmp_path: Path) -> None:
    first = place.publish(model, "tiny@v1")
    other = tmp_path / "other"
    copied = weightcache.publish(
        f"{place.uri}/tiny@v1", f"{other}/copy@v1", storage_options=place.options, destination_options={}
    )
    assert copied.revision == first.revision
    with weightcache.load_model(f"{other}/copy@v1", "cpu") as loaded:
        assert_same(loaded, tensors_of(model))


def test_tags_move_and_say_what_they_named(place: Place, model: Path, tmp_path: Path) -> None:
    first = place.publish(model, "tiny@v1")
    second = place.publish(tune(model, tmp_path / "tuned", "layers.0.weight"), "tiny@v1")
    [row] = weightcache.tags(f"{place.uri}/tiny", storage_options=place.options)
    assert (row.tag, row.revision, row.previous, row.moves) == ("v1", second.revision, first.revision, 2)
    back = weightcache.tag(f"{place.uri}/tiny@v1", first.revision, storage_options=place.options)
    assert (back.revision, back.previous, back.moves) == (first.revision, second.revision, 3)
    weightcache.tag(f"{place.uri}/tiny@stable", "v1", storage_options=place.options)
    with place.load("tiny@stable") as loaded:
        assert loaded.report.revision == first.revision


def test_revisions_are_listed_with_their_tags(place: Place, model: Path, tmp_path: Path) -> None:
    first = place.publish(model, "tiny@v1")
    second = place.publish(tune(model, tmp_path / "tuned", "layers.0.weight"), "tiny@v2", base="tiny@v1")
    rows = {row.revision: row for row in weightcache.revisions(place.uri, storage_options=place.options)}
    assert {revision: row.tags for revision, row in rows.items()} == {first.revision: ("v1",), second.revision: ("v2",)}
    assert rows[second.revision].base == f"tiny@{first.revision}"
    assert rows[first.revision].n_tensors == len(SHAPES)


def test_diff_names_what_differs(place: Place, model: Path, tmp_path: Path) -> None:
    place.publish(model, "tiny@v1")
    tuned = tune(model, tmp_path / "tuned", "layers.1.weight", "norms.3.weight")
    (tuned / "config.json").write_text("{}")
    (tuned / "empty").unlink()
    place.publish(tuned, "tiny@tuned")
    found = weightcache.diff(f"{place.uri}/tiny@v1", f"{place.uri}/tiny@tuned", storage_options=place.options)
    # save_file sorts and pads by dtype, so the norms lie in another chunk: told apart by their bytes alone.
    assert found.changed == {"layers.1.weight": 2 << 20, "norms.3.weight": 256}
    assert found.n_same == len(SHAPES) - 2
    assert (found.added, found.removed) == ({}, {})
    assert (found.files_changed, found.files_removed, found.files_added) == (["config.json"], ["empty"], [])
    assert found.shared_bytes == 4 << 20


def test_a_tag_is_removed_and_its_revision_stays(place: Place, model: Path) -> None:
    first = place.publish(model, "tiny@v1")
    weightcache.remove(f"{place.uri}/tiny@v1", storage_options=place.options)
    with pytest.raises(errors.ModelNotFoundError, match="no tag 'v1'"):
        place.load("tiny@v1")
    with place.load(f"tiny@{first.revision}") as loaded:
        assert_same(loaded, tensors_of(model))


def test_a_revision_that_a_tag_names_is_not_removed(place: Place, model: Path) -> None:
    first = place.publish(model, "tiny@v1")
    with pytest.raises(errors.InUseError, match="tag v1 names it"):
        weightcache.remove(f"{place.uri}/tiny@{first.revision}", storage_options=place.options)
    weightcache.remove(f"{place.uri}/tiny@v1", storage_options=place.options)
    weightcache.remove(f"{place.uri}/tiny@{first.revision}", storage_options=place.options)
    with pytest.raises(errors.ModelNotFoundError):
        place.load(f"tiny@{first.revision}")


def test_gc_removes_what_nothing_needs_and_nothing_else(place: Place, model: Path, tmp_path: Path) -> None:
    place.publish(model, "tiny@v1")
    tuned = place.publish(tune(model, tmp_path / "tuned", "layers.1.weight"), "tiny@tuned")
    options = {"storage_options": place.options}
    assert weightcache.gc(place.uri, grace_s=0.0, **options).chunks == {}
    weightcache.remove(f"{place.uri}/tiny@tuned", **options)
    weightcache.remove(f"{place.uri}/tiny@{tuned.revision}", **options)
    dry = weightcache.gc(place.uri, grace_s=0.0, **options)
    assert dry.is_dry
    assert dry.bytes == tuned.uploaded_bytes
    assert weightcache.gc(place.uri, dry=False, grace_s=3600.0, **options).chunks == {}
    assert weightcache.gc(place.uri, dry=False, grace_s=0.0, **options).chunks == dry.chunks
    assert weightcache.gc(place.uri, grace_s=0.0, **options).chunks == {}
    check = weightcache.check(place.uri, deep=True, **options)
    assert check.sound
    assert check.n_unneeded == 0
    with place.load("tiny@v1") as loaded:
        assert_same(loaded, tensors_of(model))


def test_gc_removes_revisions_of_no_tag_when_asked(place: Place, model: Path, tmp_path: Path) -> None:
    first = place.publish(model, "tiny@v1")
    second = place.publish(tune(model, tmp_path / "tuned", "layers.1.weight"), "tiny@v1")
    garbage = weightcache.gc(place.uri, dry=False, grace_s=0.0, untagged_s=0.0, storage_options=place.options)
    assert garbage.revisions == [f"tiny@{first.revision}"]
    assert 2 << 20 <= garbage.bytes < (2 << 20) + 8192
    [row] = weightcache.revisions(place.uri, storage_options=place.options)
    assert row.revision == second.revision


def test_a_lost_chunk_is_said_by_the_load_and_by_the_check(bucket: Bucket, model: Path) -> None:
    place = Place(f"{bucket.url}/registry", bucket.server.storage_options())
    place.publish(model, "tiny@v1")
    key = max(bucket.keys("registry/chunks/"))
    bucket.client.delete_object(Bucket=bucket.name, Key=key)
    with pytest.raises(errors.OriginError, match=r"missing or cut short in .*weightcache check"):
        place.load("tiny@v1")
    check = weightcache.check(place.uri, storage_options=place.options)
    assert check.lost == [f"blake3:{key.rpartition('/')[2]}"]
    assert not check.sound


def test_a_rotten_chunk_is_found_by_a_deep_check_and_repaired(bucket: Bucket, model: Path, tmp_path: Path) -> None:
    place = Place(f"{bucket.url}/registry", bucket.server.storage_options())
    place.publish(model, "tiny@v1")
    other = Place(f"{bucket.url}/other", place.options)
    other.publish(model, "tiny@v1")
    key = max(bucket.keys("registry/chunks/"))
    bucket.put(key, bucket.get(key)[:-1] + b"!")
    assert weightcache.check(place.uri, storage_options=place.options).sound
    deep = weightcache.check(place.uri, deep=True, storage_options=place.options)
    assert deep.rotten == [f"blake3:{key.rpartition('/')[2]}"]
    with pytest.raises(errors.IntegrityError):
        place.load("tiny@v1")
    repaired = weightcache.check(place.uri, deep=True, repair_from=[other.uri], storage_options=place.options)
    assert (repaired.sound, repaired.repaired) == (True, deep.rotten)
    with place.load("tiny@v1") as loaded:
        assert_same(loaded, tensors_of(model))


def test_a_published_model_is_loaded_offline(place: Place, model: Path) -> None:
    if not place.options:
        pytest.skip("a registry in a folder of this machine is there offline")
    place.publish(model, "tiny@v1")
    weightcache.prefetch(f"{place.uri}/tiny@v1", storage_options=place.options)
    with place.load("tiny@v1", offline=True) as loaded:
        assert_same(loaded, tensors_of(model))
        assert loaded.report.n_requests == 0


def test_a_warm_load_asks_for_the_tag_alone(place: Place, model: Path) -> None:
    if not place.options:
        pytest.skip("a registry in a folder of this machine is read where it is")
    place.publish(model, "tiny@v1")
    weightcache.prefetch(f"{place.uri}/tiny@v1", storage_options=place.options)
    with place.load("tiny@v1") as loaded:
        assert loaded.report.bytes["origin"] == 0
        assert loaded.report.n_requests == 2  # the registry's own file, and the tag


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("tiny@nope", errors.ModelNotFoundError, "no tag 'nope'"),
        ("nothing@v1", errors.ModelNotFoundError, "no tag 'v1' of a model 'nothing'"),
        ("tiny@blake3:" + "0" * 64, errors.ModelNotFoundError, "no revision"),
    ],
)
def test_what_is_not_there_is_said(place: Place, model: Path, name: str, error: type[Exception], said: str) -> None:
    place.publish(model, "tiny@v1")
    with pytest.raises(error, match=said):
        place.load(name)


def test_a_registry_of_another_version_is_refused_untouched(bucket: Bucket, model: Path) -> None:
    place = Place(f"{bucket.url}/registry", bucket.server.storage_options())
    place.publish(model, "tiny@v1")
    key = "registry/weightcache.json"
    bucket.put(key, json.dumps(json.loads(bucket.get(key)) | {"version": 2}).encode())
    before = sorted(bucket.keys())
    with pytest.raises(errors.RegistryFormatError, match="version 2, expected 1"):
        place.load("tiny@v1")
    with pytest.raises(errors.RegistryFormatError):
        place.publish(model, "tiny@v2")
    with pytest.raises(errors.RegistryFormatError):
        weightcache.gc(place.uri, dry=False, grace_s=0.0, storage_options=place.options)
    assert sorted(bucket.keys()) == before


def test_nothing_is_left_beside_what_was_published(bucket: Bucket, model: Path) -> None:
    place = Place(f"{bucket.url}/registry", bucket.server.storage_options())
    place.publish(model, "tiny@v1")
    tops = {key.removeprefix("registry/").partition("/")[0] for key in bucket.keys("registry/")}
    assert tops == {"weightcache.json", "models", "chunks"}
