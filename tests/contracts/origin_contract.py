"""Own what every origin must do; an origin's tests inherit it.

Never knows where an origin's bytes lie: a `Place` writes them there by other means.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

import pytest

from weightcache.errors import ModelNotFoundError, OriginChangedError
from weightcache.origins.base import Origin, Stat

T = TypeVar("T")
BODY = random.Random(5).randbytes(300_007)
OTHER_BODY = random.Random(6).randbytes(300_007)


class Place(Protocol):
    """A folder at an origin, as its owner sees it."""

    def put(self, name: str, content: bytes) -> None:
        """Write one file; replacing one makes a new state of it."""

    def remove(self, name: str) -> None:
        """Delete one file."""

    def open(self, *, missing: bool = False) -> Origin:
        """Return a new origin for the folder, or for one that is not there. Called on the loop."""


def use(place: Place, work: Callable[[Origin], Awaitable[T]], *, missing: bool = False) -> T:
    """Open an origin, work with it on a loop of its own, and close it."""

    async def run() -> T:
        origin = place.open(missing=missing)
        try:
            return await work(origin)
        finally:
            await origin.close()

    return asyncio.run(run())


async def stat_of(origin: Origin, name: str) -> Stat:
    [stat] = [stat for stat in await origin.list() if stat.path == name]
    return stat


async def read(origin: Origin, stat: Stat, start: int, sizes: Sequence[int]) -> list[bytes]:
    """Read adjacent pieces of these sizes into views of one memory that is a little larger on both sides."""
    memory = bytearray(b"\xaa" * (sum(sizes) + 14))
    views, at = [], 7
    for size in sizes:
        views.append(memoryview(memory)[at : at + size])
        at += size
    await origin.read_into(stat, start, views)
    assert memory[:7] == memory[-7:] == b"\xaa" * 7
    return [bytes(view) for view in views]


async def read_unchanged(origin: Origin, stat: Stat) -> bytes:
    """Read a whole file as a load does: asking at the end where a state cannot be named in the request."""
    [content] = await read(origin, stat, 0, [stat.nbytes])
    await origin.check_unchanged([stat])
    return content


class OriginContract:
    """A subclass gives the fixture `place`, an empty folder."""

    def test_lists_every_file_with_its_size(self, place: Place) -> None:
        files = {
            "config.json": b"{}",
            "model.safetensors": BODY,
            "unet/sub/weights.safetensors": b"12345",
            "empty": b"",
        }
        for name, content in files.items():
            place.put(name, content)
        listed = use(place, lambda origin: origin.list())
        assert {stat.path: stat.nbytes for stat in listed} == {name: len(content) for name, content in files.items()}
        assert all(stat.etag for stat in listed)

    def test_names_need_not_be_plain(self, place: Place) -> None:
        names = ["a b.json", "a+b&c=d.json", "100%.json", "größe.json", "x(1)[2].json"]
        for name in names:
            place.put(name, name.encode())

        async def work(origin: Origin) -> dict[str, bytes]:
            return {stat.path: await read_unchanged(origin, stat) for stat in await origin.list()}

        assert use(place, work) == {name: name.encode() for name in names}

    def test_a_new_state_of_a_file_has_another_etag(self, place: Place) -> None:
        place.put("kept", BODY)
        place.put("changed", BODY)

        async def work(origin: Origin) -> tuple[dict[str, str], dict[str, str]]:
            before = {stat.path: stat.etag for stat in await origin.list()}
            place.put("changed", OTHER_BODY)
            return before, {stat.path: stat.etag for stat in await origin.list()}

        before, after = use(place, work)
        assert before["kept"] == after["kept"]
        assert before["changed"] != after["changed"]

    def test_etags_do_not_depend_on_who_asks(self, place: Place) -> None:
        place.put("weights", BODY)
        assert use(place, lambda origin: origin.list()) == use(place, lambda origin: origin.list())

    def test_a_folder_that_is_not_there_is_not_found(self, place: Place) -> None:
        place.put("weights", BODY)
        with pytest.raises(ModelNotFoundError) as caught:
            use(place, lambda origin: origin.list(), missing=True)
        assert "expected" in str(caught.value) or "check" in str(caught.value)

    @pytest.mark.parametrize("start", [0, 1, 4095, 77_777])
    def test_a_range_is_scattered_over_views(self, place: Place, start: int) -> None:
        place.put("sub/weights", BODY)
        sizes = [1, 4096, 3, 65_537, 100]

        async def work(origin: Origin) -> list[bytes]:
            return await read(origin, await stat_of(origin, "sub/weights"), start, sizes)

        pieces = use(place, work)
        assert b"".join(pieces) == BODY[start : start + sum(sizes)]
        assert [len(piece) for piece in pieces] == sizes

    @pytest.mark.parametrize(("start", "nbytes"), [(0, len(BODY)), (0, 1), (len(BODY) - 1, 1)])
    def test_the_ends_of_a_file_can_be_read(self, place: Place, start: int, nbytes: int) -> None:
        place.put("weights", BODY)

        async def work(origin: Origin) -> list[bytes]:
            return await read(origin, await stat_of(origin, "weights"), start, [nbytes])

        assert use(place, work) == [BODY[start : start + nbytes]]

    def test_many_ranges_are_read_at_once(self, place: Place) -> None:
        place.put("weights", BODY)
        starts = range(0, 300_000, 15_001)

        async def work(origin: Origin) -> list[list[bytes]]:
            stat = await stat_of(origin, "weights")
            return await asyncio.gather(*(read(origin, stat, start, [10_000, 7]) for start in starts))

        assert use(place, work) == [[BODY[at : at + 10_000], BODY[at + 10_000 : at + 10_007]] for at in starts]

    @pytest.mark.parametrize("content", [OTHER_BODY, BODY + b"more", BODY[:-1]], ids=["same size", "longer", "shorter"])
    def test_g05_a_changed_object_is_not_read(self, place: Place, content: bytes) -> None:
        place.put("weights", BODY)

        async def work(origin: Origin) -> None:
            stat = await stat_of(origin, "weights")
            assert await read_unchanged(origin, stat) == BODY
            place.put("weights", content)
            with pytest.raises(OriginChangedError):
                await read_unchanged(origin, stat)

        use(place, work)

    def test_an_object_that_is_gone_is_a_clear_error(self, place: Place) -> None:
        place.put("weights", BODY)
        place.put("other", BODY)

        async def work(origin: Origin) -> None:
            stat = await stat_of(origin, "weights")
            place.remove("weights")
            with pytest.raises((ModelNotFoundError, OriginChangedError)):
                await read_unchanged(origin, stat)

        use(place, work)

    def test_close_may_be_called_twice_and_before_any_use(self, place: Place) -> None:
        place.put("weights", BODY)

        async def close(origin: Origin) -> None:
            await origin.close()
            await origin.close()

        async def list_and_close(origin: Origin) -> None:
            await origin.list()
            await origin.close()
            await origin.close()

        use(place, close)
        use(place, list_and_close)

    def test_the_uri_names_the_folder(self, place: Place) -> None:
        async def uri_of(origin: Origin) -> str:
            return origin.uri

        assert use(place, uri_of) == use(place, uri_of)
        assert not use(place, uri_of).endswith("/")
