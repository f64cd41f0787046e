"""Own what every origin that can be written to must do; each implementation inherits it with a fixture of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from weightcache.errors import ConflictError, FormatError, ModelNotFoundError
from weightcache.origins.base import Stat, WritableOrigin
from weightcache.runtime import all_of, runtime

T = TypeVar("T")
Open = Callable[[], WritableOrigin]


class WritableContract:
    """A subclass gives `origin`, a factory of origins over one empty folder, and says whether it keeps conditions."""

    keeps_conditions = True

    @pytest.fixture
    def run(self, origin: Open) -> Callable[[Callable[[WritableOrigin], Coroutine[Any, Any, T]]], T]:
        def run(work: Callable[[WritableOrigin], Coroutine[Any, Any, T]]) -> T:
            async def opened() -> T:
                writable = origin()
                try:
                    return await work(writable)
                finally:
                    await writable.close()

            return runtime().run(opened())

        return run

    def test_what_is_put_is_there(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> tuple[bytes, list[tuple[str, int]]]:
            await origin.put("a/b.json", b"content")
            entries = [(entry.name, entry.nbytes) for entry in await origin.entries("a/")]
            return (await origin.get("a/b.json", 100)).content, entries

        assert run(work) == (b"content", [("a/b.json", 7)])

    def test_a_large_file_arrives_as_it_was(self, run: Any) -> None:
        content = bytes(range(256)) * (64 << 10)

        async def work(origin: WritableOrigin) -> bytes:
            await origin.put("large", memoryview(content))
            view = memoryview(bytearray(len(content)))
            await origin.read_into(Stat("large", len(content), ""), 0, [view[:100], view[100:]])
            return bytes(view)

        assert run(work) == content

    def test_a_part_is_read_without_naming_a_state(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> bytes:
            await origin.put("x", b"0123456789")
            view = memoryview(bytearray(4))
            await origin.read_into(Stat("x", 10, ""), 3, [view])
            return bytes(view)

        assert run(work) == b"3456"

    def test_what_is_there_is_not_overwritten_by_what_must_be_new(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> bytes:
            await origin.put("x", b"first", only_if="")
            with pytest.raises(ConflictError, match="x was written by another"):
                await origin.put("x", b"second", only_if="")
            return (await origin.get("x", 100)).content

        assert run(work) == b"first"

    def test_a_known_state_is_overwritten_and_another_is_not(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> bytes:
            await origin.put("x", b"first")
            seen = (await origin.get("x", 100)).etag
            await origin.put("x", b"other, by another")
            with pytest.raises(ConflictError):
                await origin.put("x", b"mine", only_if=seen)
            await origin.put("x", b"then mine", only_if=(await origin.get("x", 100)).etag)
            return (await origin.get("x", 100)).content

        assert run(work) == b"then mine"

    def test_a_state_of_what_is_gone_is_a_conflict(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> None:
            await origin.put("x", b"first")
            seen = (await origin.get("x", 100)).etag
            await origin.delete("x")
            with pytest.raises(ConflictError):
                await origin.put("x", b"mine", only_if=seen)

        run(work)

    def test_of_many_that_must_be_new_one_wins(self, run: Any) -> None:
        if not self.keeps_conditions:
            pytest.skip("this file system cannot refuse to overwrite")

        async def work(origin: WritableOrigin) -> tuple[list[bool], bytes]:
            async def put(number: int) -> bool:
                try:
                    await origin.put("x", b"%d" % number, only_if="")
                except ConflictError:
                    return False
                return True

            won = await all_of(put(number) for number in range(8))
            return won, (await origin.get("x", 100)).content

        won, content = run(work)
        assert sum(won) == 1
        assert won[int(content)]

    def test_removing_twice_is_no_error(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> list[str]:
            await origin.put("a/x", b"1")
            await origin.delete("a/x")
            await origin.delete("a/x")
            return [entry.name for entry in await origin.entries("a/")]

        assert run(work) == []

    def test_what_is_not_there_is_said(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> None:
            with pytest.raises(ModelNotFoundError):
                await origin.get("nothing.json", 100)

        run(work)

    def test_a_file_larger_than_expected_is_refused(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> None:
            await origin.put("x", b"12345")
            with pytest.raises(FormatError, match="4"):
                await origin.get("x", 4)

        run(work)

    def test_entries_know_a_prefix_that_is_no_folder(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> list[str]:
            await all_of(origin.put(name, b"1") for name in ("a/x1", "a/x2", "a/y", "ab", "c/d/x"))
            return sorted(entry.name for entry in await origin.entries("a/x"))

        assert run(work) == ["a/x1", "a/x2"]

    def test_entries_of_nothing_are_none(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> list[object]:
            return list(await origin.entries("nothing/"))

        assert run(work) == []

    def test_later_writes_have_later_times(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> tuple[float, float]:
            await origin.put("one", b"1")
            await asyncio.sleep(1.1)  # S3 lists whole seconds
            await origin.put("two", b"2")
            times = {entry.name: entry.modified_s for entry in await origin.entries("")}
            return times["one"], times["two"]

        one, two = run(work)
        assert one < two

    def test_it_says_whether_it_keeps_conditions(self, run: Any) -> None:
        async def work(origin: WritableOrigin) -> tuple[bool, list[str]]:
            return await origin.has_conditions(), [entry.name for entry in await origin.entries("")]

        assert run(work) == (self.keeps_conditions, [])
