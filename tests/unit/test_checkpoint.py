"""Reading a folder: which files are the model, what each file is to a load, and what makes a folder no model."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import models
import pytest

from weightcache.checkpoint import FIRST_READ_NBYTES, MAX_FILE_NBYTES, MAX_INDEX_NBYTES, describe, select
from weightcache.errors import (
    FormatError,
    IncompleteModelError,
    ModelNotFoundError,
    UnsafeFormatError,
    UnsafePathError,
)
from weightcache.layout import want
from weightcache.manifest import Manifest, Role, Shard
from weightcache.origins.base import Stat
from weightcache.origins.local import LocalOrigin

ONE: models.Shapes = {"one": ("F32", (4,))}
TWO: models.Shapes = {"two": ("F32", (4,)), "three": ("U8", (5,))}


class Memory:
    """Remembers in a dictionary what it is told to."""

    def __init__(self) -> None:
        self.shards: dict[Stat, Shard] = {}
        self.n_recalled = 0

    def recall(self, stat: Stat, prefix: str) -> Shard | None:
        self.n_recalled += stat in self.shards
        return self.shards.get(stat)

    def remember(self, stat: Stat, shard: Shard) -> None:
        self.shards[stat] = shard


def read(folder: Path, file: str | None = None, memory: Memory | None = None) -> Manifest:
    with ThreadPoolExecutor(2) as workers:
        return asyncio.run(describe(LocalOrigin(folder, workers, file), memory or Memory()))


def write(folder: Path, **files: Any) -> Path:
    """Write files: tensors by shape, JSON by value, bytes; `__` in a name is a dot, `___` a slash."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors" and isinstance(content, dict):
            models.write_safetensors(path, content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def write_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> Path:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def names(manifest: Manifest) -> list[str]:
    return [name for name, _, _ in manifest.tensors()]


def roles(manifest: Manifest) -> dict[str, str]:
    return {shard.path: str(shard.role) for shard in manifest.shards}


# Which files are the model


def test_single_file_is_a_model(tmp_path: Path) -> None:
    manifest = read(write(tmp_path, model__safetensors=TWO, config__json={}))
    assert roles(manifest) == {"config.json": "file", "model.safetensors": "weights"}
    assert names(manifest) == ["two", "three"]


def test_sharded_model_is_what_its_index_says(tmp_path: Path) -> None:
    models.write_tiny_sharded(tmp_path, 3)
    write(tmp_path, extra__safetensors=ONE)
    manifest = read(tmp_path)
    assert sorted(names(manifest)) == sorted(models.llama_shapes(models.TINY_CONFIG))
    assert [shard.path for shard in manifest.weights] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert roles(manifest)["extra.safetensors"] == "foreign"
    assert roles(manifest)["modeling_tiny.py"] == "file"


def test_several_files_without_an_index_are_one_model(tmp_path: Path) -> None:
    manifest = read(write(tmp_path, a__safetensors=ONE, b__safetensors=TWO))
    assert names(manifest) == ["one", "two", "three"]


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "adapter_model"])
def test_canonical_name_is_chosen_among_variants(tmp_path: Path, stem: str) -> None:
    write(
        tmp_path, **{f"{stem}__safetensors": ONE, f"{stem}__fp16__safetensors": ONE, "consolidated__safetensors": ONE}
    )
    assert roles(read(tmp_path)) == {
        f"{stem}.safetensors": "weights",
        f"{stem}.fp16.safetensors": "foreign",
        "consolidated.safetensors": "foreign",
    }


def test_canonical_index_is_chosen_before_a_file_of_that_name(tmp_path: Path) -> None:
    write(tmp_path, model__safetensors=TWO, part__safetensors=ONE)
    assert names(read(write_index(tmp_path, {"one": "part.safetensors"}))) == ["one"]


def test_canonical_index_is_chosen_among_variants(tmp_path: Path) -> None:
    write(tmp_path, part__safetensors=ONE, half__safetensors=ONE)
    write_index(tmp_path, {"one": "half.safetensors"}, "model.safetensors.index.fp16.json")
    write_index(tmp_path, {"one": "half.safetensors"}, "model.fp16.safetensors.index.json")
    write_index(tmp_path, {"one": "part.safetensors"})
    assert [shard.path for shard in read(tmp_path).weights] == ["part.safetensors"]


def test_only_index_is_chosen_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path, part__safetensors=ONE, rest__safetensors=TWO)
    write_index(tmp_path, {"one": "part.safetensors"}, "mine.safetensors.index.json")
    assert names(read(tmp_path)) == ["one"]


def test_several_indexes_without_a_canonical_one_are_refused(tmp_path: Path) -> None:
    write(tmp_path, part__safetensors=ONE)
    for name in ("a", "b"):
        write_index(tmp_path, {"one": "part.safetensors"}, f"{name}.safetensors.index.json")
    with pytest.raises(FormatError, match=r"several indexes in the folder: a\.safetensors\.index\.json, b\."):
        read(tmp_path)


def test_shards_may_lie_below_their_index(tmp_path: Path) -> None:
    write(tmp_path, sub___part__safetensors=ONE)
    assert names(read(write_index(tmp_path, {"one": "sub/part.safetensors"}))) == ["one"]


def test_weights_at_the_root_leave_subfolders_alone(tmp_path: Path) -> None:
    write(tmp_path, model__safetensors=ONE, original___model__safetensors=ONE)
    manifest = read(tmp_path)
    assert roles(manifest)["original/model.safetensors"] == "foreign"
    assert names(manifest) == ["one"]


def test_diffusers_components_carry_their_folder(tmp_path: Path) -> None:
    models.write_diffusers(tmp_path)
    manifest = read(tmp_path)
    assert {name.partition("/")[0] for name in names(manifest)} == {"text_encoder", "unet", "vae"}
    assert "unet/conv_in.weight" in names(manifest)
    assert roles(manifest)["scheduler/scheduler_config.json"] == "file"


def test_diffusers_component_is_its_canonical_variant(tmp_path: Path) -> None:
    models.write_diffusers(tmp_path)
    write(tmp_path, unet___diffusion_pytorch_model__fp16__safetensors=ONE, text_encoder___model__fp16__safetensors=ONE)
    manifest = read(tmp_path)
    assert "unet/one" not in names(manifest)
    assert roles(manifest)["unet/diffusion_pytorch_model.fp16.safetensors"] == "foreign"


def test_diffusers_component_may_be_sharded(tmp_path: Path) -> None:
    write(tmp_path, model_index__json={}, unet___a__safetensors=ONE, unet___b__safetensors=TWO)
    write_index(
        tmp_path / "unet",
        {"one": "a.safetensors", "two": "b.safetensors", "three": "b.safetensors"},
        "diffusion_pytorch_model.safetensors.index.json",
    )
    assert names(read(tmp_path)) == ["unet/one", "unet/two", "unet/three"]


def test_whole_pipeline_in_one_file_beside_diffusers_components_is_foreign(tmp_path: Path) -> None:
    models.write_diffusers(tmp_path)
    write(tmp_path, v1_5_pruned__safetensors=ONE, v1_5_pruned_emaonly__safetensors=ONE)
    manifest = read(tmp_path)
    assert {name.partition("/")[0] for name in names(manifest)} == {"text_encoder", "unet", "vae"}
    assert roles(manifest)["v1_5_pruned.safetensors"] == "foreign"


def test_named_file_is_read_alone(tmp_path: Path) -> None:
    write(tmp_path, model__safetensors=ONE, other__safetensors=TWO, config__json={})
    manifest = read(tmp_path, "other.safetensors")
    assert roles(manifest) == {"other.safetensors": "weights"}
    assert names(manifest) == ["two", "three"]


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "a.pt", "a.pth", "a.pkl", "a.pickle", "a.ckpt", "a.gguf", "a.onnx", "a.msgpack", "a.npz"],
)
def test_weights_in_another_format_are_foreign(tmp_path: Path, name: str) -> None:
    write(tmp_path, model__safetensors=ONE)
    (tmp_path / name).write_bytes(b"x")
    assert roles(read(tmp_path))[name] == "foreign"


def test_large_file_beside_the_weights_is_foreign(tmp_path: Path) -> None:
    write(tmp_path, model__safetensors=ONE)
    for name, nbytes in (("at.txt", MAX_FILE_NBYTES), ("over.txt", MAX_FILE_NBYTES + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(nbytes)
    assert (roles(read(tmp_path))["at.txt"], roles(read(tmp_path))["over.txt"]) == ("file", "foreign")


def test_git_folder_is_not_part_of_a_model(tmp_path: Path) -> None:
    write(tmp_path, model__safetensors=ONE)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "model.safetensors").write_bytes(b"x")
    assert roles(read(tmp_path)) == {"model.safetensors": "weights"}


def test_empty_file_has_no_chunks(tmp_path: Path) -> None:
    write(tmp_path, model__safetensors=ONE, empty__txt=b"")
    manifest = read(tmp_path)
    assert [shard.chunks for shard in manifest.shards if shard.path == "empty.txt"] == [()]
    assert select(manifest, [Role.FILE]) == []
    assert len(select(manifest, list(Role))) == 2


# What is remembered


def test_shard_in_the_same_state_is_not_read_again(tmp_path: Path) -> None:
    write(tmp_path, model__safetensors=ONE, config__json={})
    memory = Memory()
    first = read(tmp_path, memory=memory)
    assert len(memory.shards) == 2
    assert (read(tmp_path, memory=memory), memory.n_recalled) == (first, 2)


def test_changed_shard_is_another_revision(tmp_path: Path) -> None:
    write(tmp_path, model__safetensors=ONE)
    memory = Memory()
    first = read(tmp_path, memory=memory)
    write(tmp_path, model__safetensors=TWO)
    second = read(tmp_path, memory=memory)
    assert names(second) == ["two", "three"]
    assert first.revision != second.revision


def test_header_longer_than_the_first_read_is_read_whole(tmp_path: Path) -> None:
    shapes = {f"layer.{number}": ("U8", (1,)) for number in range(4000)}
    models.write_safetensors(tmp_path / "model.safetensors", shapes)
    assert (tmp_path / "model.safetensors").stat().st_size > FIRST_READ_NBYTES
    assert names(read(tmp_path)) == list(shapes)


# What is no model


def test_folder_without_safetensors_is_not_found(tmp_path: Path) -> None:
    write(tmp_path, config__json={}, readme__md=b"x")
    with pytest.raises(
        ModelNotFoundError, match=r"no safetensors among the 2 files of .* \(config\.json, readme\.md\)"
    ):
        read(tmp_path)


def test_g19_folder_of_pickles_is_refused_with_how_to_convert(tmp_path: Path) -> None:
    write(tmp_path, config__json={}, pytorch_model__bin=b"x", sub___a__ckpt=b"x")
    with pytest.raises(UnsafeFormatError, match=r"\(pytorch_model\.bin, sub/a\.ckpt\).*convert.*save_file"):
        read(tmp_path)


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    manifest = read(write(tmp_path, a__safetensors=ONE, b__safetensors=ONE))
    with pytest.raises(FormatError, match=r"'one' is in both a\.safetensors and b\.safetensors"):
        want(manifest)


def test_index_naming_shards_that_are_not_there_is_incomplete(tmp_path: Path) -> None:
    write(tmp_path, a__safetensors=ONE)
    write_index(tmp_path, {"one": "a.safetensors", "two": "c.safetensors", "three": "b.safetensors"})
    with pytest.raises(
        IncompleteModelError, match=r"index\.json names 2 of 3 shards .*: b\.safetensors, c\.safetensors"
    ):
        read(tmp_path)


def test_index_naming_a_tensor_no_shard_has_is_incomplete(tmp_path: Path) -> None:
    write_index(write(tmp_path, a__safetensors=ONE), {"one": "a.safetensors", "four": "a.safetensors"})
    with pytest.raises(IncompleteModelError, match=r"'four' is in a\.safetensors, but no shard has it"):
        read(tmp_path)


def test_index_naming_the_wrong_shard_is_incomplete(tmp_path: Path) -> None:
    write(tmp_path, a__safetensors=ONE, b__safetensors=TWO)
    write_index(tmp_path, {"one": "b.safetensors", "two": "a.safetensors"})
    with pytest.raises(IncompleteModelError, match=r"'one' is in b\.safetensors, but it is in a\.safetensors"):
        read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"one": 1}}',
        b'{"weight_map": {"one": null}}',
        b"[" * 100_000,
        b'{"weight_map": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda content: content[:24].decode(errors="replace"),
)
def test_index_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, a__safetensors=ONE)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.safetensors\.index\.json is no index") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_index_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    write(tmp_path, a__safetensors=ONE)
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(MAX_INDEX_NBYTES + 1)
    with pytest.raises(FormatError, match=f"index.json has {MAX_INDEX_NBYTES + 1} bytes, expected at most"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "", "b\0.safetensors", "sub/../a.safetensors"])
def test_g20_index_naming_a_file_outside_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, a__safetensors=ONE)
    with pytest.raises(UnsafePathError, match="unsafe file name"):
        read(write_index(tmp_path, {"one": "a.safetensors", "two": name}))


def test_broken_header_names_the_file(tmp_path: Path) -> None:
    write(tmp_path, a__safetensors=ONE, b__safetensors=b"12345")
    with pytest.raises(FormatError, match=rf"{tmp_path}/b\.safetensors: the file has 5 bytes"):
        read(tmp_path)
