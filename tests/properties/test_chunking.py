"""The cut: every byte once, large tensors by themselves, and a change that stays where it was made."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, in_a_row, sizes

from weightcache.chunking import PACKED_BELOW_NBYTES, cut_file, cut_safetensors
from weightcache.header import TensorEntry
from weightcache.manifest import CHUNK_LIMIT_NBYTES, Chunk

LIMITS = (7, 4096, PACKED_BELOW_NBYTES, 3 * PACKED_BELOW_NBYTES, CHUNK_LIMIT_NBYTES)


@dataclass(frozen=True)
class File:
    """A safetensors file as the cut sees it."""

    limit: int
    data_start: int
    nbytes: tuple[int, ...]

    @property
    def alone_from(self) -> int:
        return min(PACKED_BELOW_NBYTES, self.limit)

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        return in_a_row(self.data_start, [("U8", (nbytes,)) for nbytes in self.nbytes])

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return cut_safetensors(self.data_start, self.tensors, self.limit)

    def large(self) -> list[TensorEntry]:
        return [entry for entry in self.tensors if entry.nbytes >= self.alone_from]

    def within(self, start: int, stop: float = float("inf")) -> list[tuple[int, int]]:
        """Return the chunks in a range, relative to its start."""
        return [(each.start - start, each.nbytes) for each in self.chunks if start <= each.start < stop]


@st.composite
def files(draw: st.DrawFn) -> File:
    limit = draw(st.sampled_from(LIMITS))
    nbytes = draw(st.lists(sizes(limit, min(PACKED_BELOW_NBYTES, limit)), max_size=20))
    return File(limit, draw(st.integers(10, 2 * limit + 10)), tuple(nbytes))


def check_cover(chunks: tuple[Chunk, ...], nbytes: int, limit: int) -> None:
    at = 0
    for chunk in chunks:
        assert chunk.start == at
        assert 0 < chunk.nbytes <= limit
        at = chunk.stop
    assert at == nbytes


@examples
@given(files())
def test_every_byte_is_in_exactly_one_chunk_in_order(file: File) -> None:
    check_cover(file.chunks, file.data_start + sum(file.nbytes), file.limit)


@examples
@given(st.integers(0, 100), st.integers(1, 30))
def test_file_without_tensors_is_covered_in_full_pieces(nbytes: int, limit: int) -> None:
    chunks = cut_file(nbytes, limit)
    check_cover(chunks, nbytes, limit)
    assert all(chunk.nbytes == limit for chunk in chunks[:-1])


@examples
@given(files())
def test_cut_follows_from_sizes_alone(file: File) -> None:
    renamed = [replace(entry, name=entry.name * 2, dtype="I8") for entry in file.tensors]
    assert cut_safetensors(file.data_start, renamed, file.limit) == file.chunks


@examples
@given(files())
def test_large_tensor_is_cut_by_itself_from_its_own_start(file: File) -> None:
    for entry in file.large():
        full, rest = divmod(entry.nbytes, file.limit)
        sizes_expected = [file.limit] * full + [rest] * (rest > 0)
        assert [nbytes for _, nbytes in file.within(entry.start, entry.stop)] == sizes_expected


@examples
@given(files())
def test_small_tensor_lies_in_one_chunk(file: File) -> None:
    for entry in file.tensors:
        if 0 < entry.nbytes < file.alone_from:
            assert [c for c in file.chunks if c.start < entry.stop and entry.start < c.stop] == [
                c for c in file.chunks if c.start <= entry.start and entry.stop <= c.stop
            ]


@examples
@given(files())
def test_pack_ends_only_where_the_next_tensor_does_not_fit(file: File) -> None:
    small = [0 < entry.nbytes < file.alone_from for entry in file.tensors]
    after = {entry.start: entry for entry, is_small in zip(file.tensors, small, strict=True) if is_small}
    packed = {chunk for chunk in file.chunks if chunk.start in after}
    for chunk in packed:
        if chunk.stop in after:
            assert chunk.nbytes + after[chunk.stop].nbytes > file.limit


@examples
@given(files())
def test_header_shares_no_chunk_with_tensors(file: File) -> None:
    assert file.data_start in {chunk.stop for chunk in file.chunks}


@examples
@given(files(), st.integers(10, 10_000), st.data())
def test_large_tensor_keeps_its_cut_whatever_its_neighbours_become(
    file: File, data_start: int, data: st.DataObject
) -> None:
    nbytes = file.alone_from + data.draw(st.integers(0, 2 * file.limit))
    place = data.draw(st.integers(0, len(file.nbytes)))
    inserted = replace(file, nbytes=(*file.nbytes[:place], nbytes, *file.nbytes[place:]))
    alone = replace(file, nbytes=(nbytes,), data_start=data_start)
    here, there = inserted.tensors[place], alone.tensors[0]
    assert inserted.within(here.start, here.stop) == alone.within(there.start, there.stop)


@examples
@given(files(), st.data())
def test_packed_tensor_that_grows_moves_no_cut_beyond_the_next_large_one(file: File, data: st.DataObject) -> None:
    before = data.draw(st.lists(st.integers(0, file.alone_from - 1), max_size=5))
    packed = data.draw(st.integers(0, file.alone_from - 1))
    grown = data.draw(st.integers(0, file.alone_from - 1))
    large = file.alone_from + data.draw(st.integers(0, file.limit))
    old = replace(file, nbytes=(*before, packed, large, *file.nbytes))
    new = replace(file, nbytes=(*before, grown, large, *file.nbytes))
    at = len(before) + 1
    assert new.within(new.tensors[at].start) == old.within(old.tensors[at].start)


@examples
@given(files(), st.integers(0, 100))
def test_longer_header_moves_no_cut_relative_to_the_tensors(file: File, longer: int) -> None:
    moved = replace(file, data_start=file.data_start + longer)
    assert moved.within(moved.data_start) == file.within(file.data_start)
