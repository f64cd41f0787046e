"""Own a model's tensors on their way to a stack that asks for them by name, one by one, from several threads.

Never copies a tensor, and never keeps one that was handed over.
"""

from __future__ import annotations

import glob
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import weightcache
from weightcache import errors

if TYPE_CHECKING:
    import torch

# What may lie here before it is asked for: two of the stream's groups. Where a stack converts what it gets, this is
# what a load holds beside the converted model.
AHEAD_NBYTES = 512 << 20

MOST_DEVICES = 32  # of a node; more would take turns

Placements = Mapping[str, Sequence[str]]
"""Device -> names of the tensors that go there."""


class Arriving:
    """Tensors on their way, by name. A context manager; what nobody took is dropped at its end. Thread-safe.

    The transfer starts at once, in the order in which stacks ask: by the names' parts, numbers as numbers.

    Attributes:
        reports: `weightcache.stream`'s, one a device, each whole when its last tensor arrived.
        here_nbytes: Of the tensors that nobody has taken yet.
    """

    def __init__(
        self,
        uri: str,
        place: Callable[[Sequence[str]], Placements],
        options: Mapping[str, Any],
        *,
        include: str | None = None,
        exclude: Sequence[str] = (),
        progress: weightcache.Progress | None = None,
    ) -> None:
        """Begin.

        Args:
            place: Told the names, says where they go; called on another thread.
            options: Of `weightcache.plan` and `weightcache.stream`.
            include: Of both, as is `exclude`.
            progress: Of the stream to each device.
        """
        self.reports: list[Any] = []
        self._uri = uri
        self._place = place
        self._options = dict(options)
        self._wanted: dict[str, Any] = {"include": include, "exclude": list(exclude) or None}
        self._progress = progress
        self._changed = threading.Condition()  # guards all below
        self._names: tuple[str, ...] | None = None
        self._here: dict[str, torch.Tensor] = {}
        self.here_nbytes = 0
        self._n_waiting = 0
        self._is_closed = False
        self._pool = ThreadPoolExecutor(MOST_DEVICES + 1, "weightcache-loader")
        self._job = self._pool.submit(self._run)
        self._job.add_done_callback(self._tell)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_closed = True
            self._here.clear()
            self.here_nbytes = 0
            self._changed.notify_all()
        self._pool.shutdown()

    def pending(self, prefix: str = "") -> dict[str, Pending]:
        """Wait until the names are known, and return what can be asked for, by its name without the prefix."""
        with self._changed:
            self._changed.wait_for(lambda: self._names is not None or self._job.done())
        if self._names is None:
            self._job.result()  # raises
        return {name.removeprefix(prefix): Pending(self, name) for name in self._names or () if name.startswith(prefix)}

    def look(self, name: str) -> torch.Tensor:
        """Wait for a tensor, and leave it here. Raises what ended its transfer."""
        with self._changed:
            return self._wait(name)

    def take(self, name: str) -> torch.Tensor:
        """Wait for a tensor, and hand it over, once. Raises what ended its transfer."""
        with self._changed:
            tensor = self._wait(name)  # which lets others in
            del self._here[name]
            self.here_nbytes -= tensor.nbytes
            self._changed.notify_all()
            return tensor

    def _wait(self, name: str) -> torch.Tensor:
        self._n_waiting += 1
        self._changed.notify_all()
        try:
            self._changed.wait_for(lambda: name in self._here or self._job.done())
        finally:
            self._n_waiting -= 1
        if name not in self._here:
            self._job.result()  # raises
            raise errors.OriginChangedError(
                f"tensor {name!r} of {self._uri} did not arrive: the model changed while it was loaded, or it was asked "
                "for twice; load again",
                tensor=name,
            )
        return self._here[name]

    def _tell(self, _: Future[None]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        names = sorted(weightcache.plan(self._uri, **self._wanted, **self._options).names, key=_by_parts)
        placements = self._place(names)
        with self._changed:
            self._names = tuple(names)
            self._changed.notify_all()
        if len(placements) == 1:
            self._stream(next(iter(placements)), names, self._wanted)
            return
        jobs = [
            self._pool.submit(self._stream, device, there, {"include": [literally(name) for name in there]})
            for device, there in placements.items()
        ]
        for job in jobs:
            job.result()

    def _stream(self, device: str, names: Sequence[str], wanted: Mapping[str, Any]) -> None:
        stream = weightcache.stream(self._uri, device, order=names, progress=self._progress, **wanted, **self._options)
        self.reports.append(stream.report)
        try:
            for name, tensor in stream:
                with self._changed:
                    self._here[name] = tensor
                    self.here_nbytes += tensor.nbytes
                    del tensor
                    self._changed.notify_all()
                    self._changed.wait_for(self._may_go_on)
                    if self._is_closed:
                        return
        finally:
            stream.close()

    def _may_go_on(self) -> bool:
        """Whether to take more: always, while somebody waits for what is still to come."""
        return self._is_closed or self._n_waiting > 0 or self.here_nbytes < AHEAD_NBYTES


class Pending:
    """A tensor on its way: `[...]` waits for it and hands it over, once; its attributes wait, and leave it there."""

    __slots__ = ("_arriving", "_name")

    def __init__(self, arriving: Arriving, name: str) -> None:
        self._arriving = arriving
        self._name = name

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._arriving.take(self._name)
        return tensor if index is Ellipsis else tensor[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._arriving.look(self._name), name)


def literally(name: str) -> str:
    """Return the pattern that matches a name alone."""
    return glob.escape(name)


def _by_parts(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
