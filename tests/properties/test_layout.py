"""The image: chunks on pages, tensors whole and aligned, and every byte where its tensor is read."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, in_a_row, manifests

from weightcache.dtypes import alignment_bytes
from weightcache.errors import FormatError
from weightcache.layout import (
    DEVICE_ALIGNMENT_NBYTES,
    PAGE_NBYTES,
    Layout,
    lay_out,
    lay_out_in_place,
    pack,
    pages,
    want,
    windows,
)
from weightcache.manifest import Chunk, Manifest, Role, Shard

MODELS = st.sampled_from([PAGE_NBYTES, 2 * PAGE_NBYTES]).flatmap(manifests)


@st.composite
def models_and_choices(draw: st.DrawFn) -> tuple[Manifest, frozenset[str]]:
    """Draw a model and some of its tensors' names."""
    manifest = draw(MODELS)
    names = [name for name, _, _ in manifest.tensors()]
    return manifest, draw(st.frozensets(st.sampled_from(names))) if names else frozenset()


def ranges(layout: Layout, manifest: Manifest) -> list[tuple[int, int]]:
    """Return where something is written: each chunk, and each tensor that is copied."""
    chunks = [
        (offset, offset + manifest.shards[shard].chunks[chunk].nbytes)
        for (shard, chunk), offset in layout.chunks.items()
    ]
    copies = [(each.offset, each.offset + each.entry.nbytes) for each in layout.tensors if each.copied_from is not None]
    return sorted((start, stop) for start, stop in chunks + copies if start < stop)


@examples
@given(MODELS)
def test_chunks_start_on_pages(manifest: Manifest) -> None:
    assert all(offset % PAGE_NBYTES == 0 for offset in lay_out(manifest, want(manifest)).chunks.values())


@examples
@given(MODELS)
def test_nothing_overlaps_and_all_lies_inside(manifest: Manifest) -> None:
    layout = lay_out(manifest, want(manifest))
    taken = ranges(layout, manifest)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(taken))
    assert all(start >= 0 and stop <= layout.nbytes for start, stop in taken)


@examples
@given(MODELS)
def test_image_is_no_larger_than_pages_of_chunks_and_the_copies(manifest: Manifest) -> None:
    layout = lay_out(manifest, want(manifest))
    chunks = sum(pages(manifest.shards[shard].chunks[chunk].nbytes) for shard, chunk in layout.chunks)
    copies = sum(pages(each.entry.nbytes) for each in layout.tensors if each.copied_from is not None)
    assert layout.nbytes <= chunks + copies


def contents_of(manifest: Manifest) -> list[bytes]:
    """Return random bytes for each shard."""
    return [random.Random(index).randbytes(shard.nbytes) for index, shard in enumerate(manifest.shards)]


@examples
@given(models_and_choices())
def test_in_place_chunks_lie_as_in_their_files(drawn: tuple[Manifest, frozenset[str]]) -> None:
    manifest, chosen = drawn
    layout = lay_out_in_place(manifest, want(manifest, chosen.__contains__))
    taken = ranges(layout, manifest)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(taken))
    assert all(start >= 0 and stop <= layout.nbytes for start, stop in taken)
    for (shard, chunk), offset in layout.chunks.items():
        piece = manifest.shards[shard].chunks[chunk]
        assert offset % PAGE_NBYTES == piece.start % PAGE_NBYTES
        if (shard, chunk + 1) in layout.chunks:
            assert layout.chunks[shard, chunk + 1] == offset + piece.nbytes


@examples
@given(models_and_choices())
def test_packed_bytes_lie_aligned_where_each_tensor_is_read(drawn: tuple[Manifest, frozenset[str]]) -> None:
    manifest, chosen = drawn
    packing = pack(manifest, want(manifest, chosen.__contains__))
    contents = contents_of(manifest)
    memory, n_written = bytearray(packing.nbytes), 0
    for (shard, chunk), spans in packing.spans.items():
        piece = manifest.shards[shard].chunks[chunk]
        assert joined_in_order(spans)
        for start, to, nbytes in spans:
            at = piece.start + start
            memory[to : to + nbytes] = contents[shard][at : at + nbytes]
            n_written += nbytes
    shard_of = {name: manifest.shards.index(shard) for name, shard, _ in manifest.tensors()}
    for each in packing.tensors:
        expected = contents[shard_of[each.name]][each.entry.start : each.entry.stop]
        assert memory[each.offset : each.offset + each.entry.nbytes] == expected
        assert each.offset % DEVICE_ALIGNMENT_NBYTES == 0
    assert n_written == sum(each.entry.nbytes for each in packing.tensors)
    assert packing.nbytes <= n_written + DEVICE_ALIGNMENT_NBYTES * len(packing.tensors)


def joined_in_order(spans: tuple[tuple[int, int, int], ...]) -> bool:
    """Tell whether spans ascend without overlap, and none could be one with the next."""
    return all(a + n <= b and (a + n, to + n) != (b, go) for (a, to, n), (b, go, _) in pairwise(spans))


@examples
@given(MODELS, st.integers(1, 4 * PAGE_NBYTES))
def test_windows_keep_the_order_and_share_no_chunk(manifest: Manifest, limit: int) -> None:
    tensors = want(manifest)
    groups = list(windows(tensors, limit))
    assert [tensor for group in groups for tensor in group] == tensors
    owned = [{key for tensor in group for key in tensor.chunks} for group in groups]
    assert sum(map(len, owned)) == len(set().union(*owned))


@examples
@given(MODELS, st.integers(1, 4 * PAGE_NBYTES), st.randoms(use_true_random=False))
def test_windows_come_in_the_order_that_is_wanted(manifest: Manifest, limit: int, draw: random.Random) -> None:
    tensors = want(manifest)
    order = [tensor.name for tensor in tensors]
    draw.shuffle(order)
    del order[draw.randint(0, len(order)) :]
    groups = list(windows(tensors, limit, order))
    assert sorted(tensor.name for group in groups for tensor in group) == sorted(tensor.name for tensor in tensors)
    owned = [{key for tensor in group for key in tensor.chunks} for group in groups]
    assert sum(map(len, owned)) == len(set().union(*owned))
    came = {tensor.name: number for number, group in enumerate(groups) for tensor in group}
    first = [
        min(order.index(tensor.name) if tensor.name in order else len(order) for tensor in group) for group in groups
    ]
    assert first == sorted(first)
    if order:
        assert came[order[0]] == 0


@examples
@given(models_and_choices())
def test_arriving_bytes_lie_aligned_where_each_tensor_is_read(
    drawn: tuple[Manifest, frozenset[str]],
) -> None:
    manifest, chosen = drawn
    layout = lay_out(manifest, want(manifest, chosen.__contains__))
    contents = contents_of(manifest)
    image = bytearray(layout.nbytes)
    for (shard, chunk), offset in layout.chunks.items():
        piece = manifest.shards[shard].chunks[chunk]
        image[offset : offset + piece.nbytes] = contents[shard][piece.start : piece.stop]
    for each in layout.tensors:
        if each.copied_from is not None:
            arrived = image[each.copied_from : each.copied_from + each.entry.nbytes]
            image[each.offset : each.offset + each.entry.nbytes] = arrived
    shard_of = {name: manifest.shards.index(shard) for name, shard, _ in manifest.tensors()}
    for each in layout.tensors:
        expected = contents[shard_of[each.name]][each.entry.start : each.entry.stop]
        assert image[each.offset : each.offset + each.entry.nbytes] == expected
        assert each.offset % alignment_bytes(each.entry.dtype) == 0


@examples
@given(models_and_choices())
def test_only_the_chunks_of_wanted_tensors_are_laid_out(drawn: tuple[Manifest, frozenset[str]]) -> None:
    manifest, chosen = drawn
    layout = lay_out(manifest, want(manifest, chosen.__contains__))
    needed = {
        (manifest.shards.index(shard), index)
        for name, shard, entry in manifest.tensors()
        for index, chunk in enumerate(shard.chunks)
        if name in chosen and max(chunk.start, entry.start) < min(chunk.stop, entry.stop)
    }
    assert layout.chunks.keys() == needed
    assert [each.name for each in layout.tensors] == [name for name, _, _ in manifest.tensors() if name in chosen]


@examples
@given(MODELS)
def test_each_tensor_knows_exactly_its_chunks(manifest: Manifest) -> None:
    for each in lay_out(manifest, want(manifest)).tensors:
        pieces = [manifest.shards[shard].chunks[chunk] for shard, chunk in each.chunks]
        if each.entry.nbytes == 0:
            assert pieces == []
        else:
            assert pieces[0].start <= each.entry.start < pieces[0].stop
            assert pieces[-1].start < each.entry.stop <= pieces[-1].stop
            assert all(a.stop == b.start for a, b in pairwise(pieces))


def test_two_tensors_of_one_name_are_refused() -> None:
    tensors = in_a_row(10, [("U8", (4,))])
    shards = [Shard(path, 14, "1", Role.WEIGHTS, (Chunk(0, 14),), tensors) for path in ("a", "b")]
    with pytest.raises(FormatError, match="'t0' is in both a and b"):
        want(Manifest.plain(shards), lambda name: False)


def test_tensor_over_chunks_that_are_no_whole_pages_is_refused() -> None:
    tensors = in_a_row(10, [("U8", (90,))])
    shard = Shard("a", 100, "1", Role.WEIGHTS, (Chunk(0, 60), Chunk(60, 40)), tensors)
    manifest = Manifest.plain([shard])
    with pytest.raises(FormatError, match="'t0' of a"):
        lay_out(manifest, want(manifest))
