"""Own a model's tensors on their way to a stack that asks for them by name, one by one, from several threads.

Never copies a tensor, and never keeps one that was handed over.
"""

from __future__ import annotations

import glob
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self

import weightcache
from weightcache import errors

if TYPE_CHECKING:
    import torch

# Of the memory that is free, what tensors may take before they are asked for: a stack builds its model while they arrive.
# Where it then converts what it gets in that order, this is what a load holds beside the converted model.
AHEAD_SHARE = 1 / 8

MOST_DEVICES = 32  # of a node; more would take turns

Placements = Mapping[str, Sequence[str]]
"""Device -> names of the tensors that go there."""


class Arriving:
    """Tensors on their way, by name. A context manager; what nobody took is dropped at its end. Thread-safe.

    The transfer starts at once, in the order in which stacks ask: by the names' parts, numbers as numbers.

    Attributes:
        reports: `weightcache.stream`'s, one a device, each whole when its last tensor was handed over.
    """

    def __init__(
        self,
        uri: str,
        place: str | Callable[[Sequence[str]], Placements],
        options: Mapping[str, Any],
        *,
        include: str | None = None,
        exclude: Sequence[str] = (),
        progress: weightcache.Progress | None = None,
    ) -> None:
        """Begin, and wait until the names are known.

        Args:
            place: The device of all tensors; or, told their names, says which go where.
            options: Of `weightcache.plan` and `weightcache.stream`.
            include: Of both, as is `exclude`.
            progress: Of the stream to each device.
        """
        revisions = set[str]()
        wanted: dict[str, Any] = {"include": include, "exclude": list(exclude) or None}
        if isinstance(place, str):
            wanted_there = {place: wanted}
        else:
            planned = weightcache.plan(uri, **wanted, **options)
            revisions.add(planned.revision)
            wanted_there = {
                device: {"include": [literally(name) for name in names]}
                for device, names in place(planned.names).items()
            }
        self._held = ExitStack()
        sources = []
        for device, there in wanted_there.items():
            stream = weightcache.stream(
                uri, device, order=_by_parts, ahead_share=AHEAD_SHARE, progress=progress, **there, **options
            )
            sources.append(_Source(uri, stream))
            self._held.callback(sources[-1].close)
        self.reports = [source.stream.report for source in sources]
        self._sources: dict[str, _Source] = {}
        try:
            with ThreadPoolExecutor(MOST_DEVICES, "weightcache-loader") as pool:
                described = (map if len(sources) == 1 else pool.map)(_Source.begin, sources)
                for source, names in zip(sources, described, strict=True):
                    self._sources |= dict.fromkeys(names, source)
            if len(revisions.union(report.revision for report in self.reports)) > 1:
                raise errors.OriginChangedError(
                    f"{uri} changed while it was loaded; load again when its writer is done"
                )
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def pending(self, prefix: str = "") -> dict[str, Pending]:
        """Return what can be asked for, by its name without the prefix."""
        there = sorted((name for name in self._sources if name.startswith(prefix)), key=_by_parts)
        return {name.removeprefix(prefix): Pending(self._sources[name], name) for name in there}


class _Source:
    """One stream, from which one of those who wait takes for all."""

    def __init__(self, uri: str, stream: Any) -> None:
        self.stream = stream
        self._uri = uri
        self._changed = threading.Condition()  # guards all below
        self._here: dict[str, torch.Tensor] = {}
        self._n_left = 0
        self._is_taken_from = False
        self._failure: BaseException | None = None

    def begin(self) -> tuple[str, ...]:
        """Return the names, once they are known."""
        names: tuple[str, ...] = self.stream.names
        self._n_left = len(names)
        return names

    def look(self, name: str) -> torch.Tensor:
        """Wait for a tensor, and leave it here. Raises what ended its transfer."""
        with self._changed:
            return self._wait(name)

    def take(self, name: str) -> torch.Tensor:
        """Wait for a tensor, and hand it over, once. Raises what ended its transfer."""
        with self._changed:
            self._wait(name)
            return self._here.pop(name)

    def close(self) -> None:
        """Stop, once nobody takes from the stream any more, and drop what is here."""
        with self._changed:
            self._failure = errors.WeightcacheError(f"the load of {self._uri} has ended; load again")
            self._changed.wait_for(lambda: not self._is_taken_from)
            self._here.clear()
            self.stream.close()  # which yields nothing from now on

    def _wait(self, name: str) -> torch.Tensor:
        while name not in self._here:
            if self._failure is not None:
                raise self._failure
            if self._is_taken_from:
                self._changed.wait()
            else:
                self._take_next(name)
        return self._here[name]

    def _take_next(self, wanted: str) -> None:
        """Take a tensor from the stream, whichever it is, and let others in meanwhile."""
        self._is_taken_from = True
        self._changed.release()
        try:
            name, tensor = next(self.stream)
            self._n_left -= 1
            if not self._n_left:
                next(
                    self.stream, None
                )  # ends it well: its report is whole, and the origin was asked whether it changed
        except StopIteration:
            self._failure = errors.WeightcacheError(
                f"tensor {wanted!r} of {self._uri} was handed over before; load again"
            )
        except BaseException as exc:
            self._failure = exc
            raise
        finally:
            self._changed.acquire()
            self._is_taken_from = False
            self._changed.notify_all()
        if self._failure is None:
            self._here[name] = tensor


class Pending:
    """A tensor on its way: `[...]` waits for it and hands it over, once; its attributes wait, and leave it there."""

    __slots__ = ("_name", "_source")

    def __init__(self, source: _Source, name: str) -> None:
        self._source = source
        self._name = name

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._source.take(self._name)
        return tensor if index is Ellipsis else tensor[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source.look(self._name), name)


def literally(name: str) -> str:
    """Return the pattern that matches a name alone."""
    return glob.escape(name)


def _by_parts(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
