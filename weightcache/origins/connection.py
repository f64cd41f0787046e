"""Own one keep-alive HTTP/1.1 connection: a request goes out, the head is judged, the body lands where it belongs.

Never holds a body on its way: the socket (or TLS) writes into the caller's memory. Never knows what is asked for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from typing import cast

import h11

from weightcache.errors import OriginError, TransientOriginError, WeightcacheError
from weightcache.origins.answers import Answer

HEAD_LIMIT_NBYTES = 64 << 10
N_INTERIM = 8  # 1xx responses before one answer
LEAST_BYTES_PER_S = 1024  # slower over a whole patience counts as stalled

Judge = Callable[[Answer], bool]
Throttle = Callable[[int], float]


class ClosedIdleError(TransientOriginError):
    """A kept connection that the server closed before it answered: any time is a good time for that."""


class _State(Enum):
    IDLE = auto()
    HEAD = auto()  # a request is out
    DATA = auto()  # the body lands in the views
    REFUSAL = auto()  # the body is collected
    CLOSED = auto()


class Connection(asyncio.BufferedProtocol):
    """One connection, one exchange at a time; all on the loop thread.

    Args:
        host: What requests name as Host.
        on_received: Told how many bytes of bodies came; returns the seconds to read nothing more.
        most_nbytes: Of one read.
    """

    def __init__(self, host: str, on_received: Throttle, most_nbytes: int) -> None:
        self._host = host
        self._on_received = on_received
        self._most_nbytes = most_nbytes
        self._is_paused = False
        self._transport: asyncio.Transport | None = None
        self._state = _State.IDLE
        self._head = memoryview(bytearray(HEAD_LIMIT_NBYTES))
        self._n_head = 0
        self._n_exchanges = 0
        self._n_sending = 0
        self._views: deque[memoryview] = deque()
        self._left = 0
        self._done: asyncio.Future[Answer] | None = None
        self._closed = asyncio.get_running_loop().create_future()
        self.received_bytes = 0  # of this exchange's data
        self._mark = (0.0, 0)  # when so many bytes had come

    # -- for its owner

    @property
    def is_idle(self) -> bool:
        """Whether another exchange can begin."""
        return self._state is _State.IDLE and self._transport is not None and not self._transport.is_closing()

    async def exchange(
        self,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]],
        views: Sequence[memoryview],
        judge: Judge,
        limit_nbytes: int,
        body: bytes | memoryview = b"",
    ) -> Answer:
        """Send a request and take its response.

        Args:
            method: GET, HEAD, PUT or DELETE.
            target: As it stands in the request line.
            headers: Beside Host.
            views: Where the body goes, filled one after the other, if `judge` says that it is data.
            judge: Told the head; raises what it cannot be, and is the one to compare the length with the views'.
            limit_nbytes: Most bytes of a body that is collected; what is beyond is cut off.
            body: What is sent; not copied, so it must not change before this returns.

        Raises:
            TransientOriginError: A broken connection or response; fact `received_bytes`: how much of the views is filled.
            OriginError: A request that HTTP cannot spell.
            ClosedIdleError: Nothing came, on a connection that was used before.

        Cancelled or failed, the connection is closed and the views are not written any more.
        """
        assert self.is_idle and self._transport is not None
        self._wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT_NBYTES)
        self._judge = judge
        self._limit_nbytes = limit_nbytes
        self._collected = bytearray()
        self._views = deque(view for view in views if len(view))
        self._left = sum(len(view) for view in self._views)
        self._n_head = self._n_interim = 0
        self._keep = True
        self.received_bytes = 0
        self._n_sending = len(body)
        self._mark = (asyncio.get_running_loop().time(), 0)
        self._done = asyncio.get_running_loop().create_future()
        self._state = _State.HEAD
        try:
            request = h11.Request(method=method, target=target, headers=[("Host", self._host), *headers])
            head = self._wire.send(request) or b""
            if body:
                self._wire.send_with_data_passthrough(h11.Data(data=body))  # type: ignore[arg-type]
            self._transport.write(head + (self._wire.send(h11.EndOfMessage()) or b""))
            if body:
                self._transport.write(body)
            return await self._done
        except (h11.LocalProtocolError, UnicodeEncodeError):  # their words would show a header's value
            self._keep = False
            raise OriginError(f"a request to {self._host} that cannot be spelt in HTTP: look at its headers") from None
        except BaseException:  # cancelled in the very moment of the answer, too: nobody would ever close it
            self._keep = False
            raise
        finally:
            self._n_exchanges += 1
            self._done = None
            if self._state is not _State.IDLE or not self._keep:
                self.abort()

    def check_progress(self, now: float, patience_s: float) -> None:
        """Fail the exchange under way when too little has come for too long."""
        if self._is_paused:
            return
        since, nbytes = self._mark
        if self._state is _State.HEAD:
            came = self._n_sent
        else:
            came = self._n_sending + (self.received_bytes if self._state is _State.DATA else len(self._collected))
        if came - nbytes >= LEAST_BYTES_PER_S * patience_s:
            self._mark = (now, came)
        elif now - since > patience_s:
            what = "no answer" if self._state is _State.HEAD else f"{came - nbytes} bytes"
            self.fail(TransientOriginError(f"the connection stalled: {what} in {now - since:.1f} s"))

    def abort(self) -> None:
        """Close at once; nothing is written into views afterwards."""
        self._state = _State.CLOSED
        self._views.clear()
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        await self._closed

    # -- for the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._state is _State.DATA:
            return self._views[0][: self._most_nbytes]
        return self._head[self._n_head if self._state is _State.HEAD else 0 :]

    def buffer_updated(self, nbytes: int) -> None:
        match self._state:
            case _State.DATA:
                self._took(nbytes)
                first = self._views[0]
                if nbytes == len(first):
                    self._views.popleft()
                else:
                    self._views[0] = first[nbytes:]
                if self._left == 0:
                    self._finish(self._answer)
            case _State.HEAD:
                self._n_head += nbytes
                self._read_head(self._n_head - nbytes)
            case _State.REFUSAL:
                self._collect(bytes(self._head[:nbytes]))
            case _:  # nobody asked: whatever it is, it must not be taken for the answer to the next request
                self.abort()

    def eof_received(self) -> bool:
        if self._state is _State.REFUSAL:  # a body may end so
            self._keep = False
            self._collect(b"", is_end=True)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        how = f"{type(exc).__name__}: {exc}" if exc is not None else "the server closed it"
        if self._state is _State.HEAD and not self._n_head and self._n_exchanges:
            self.fail(ClosedIdleError(f"the connection was closed before an answer ({how})"))
        elif self._state is _State.DATA:
            self.fail(TransientOriginError(f"the body ended {self._left} bytes before the end announced ({how})"))
        else:
            self.fail(TransientOriginError(f"the connection broke before the answer was whole ({how})"))
        self._state = _State.CLOSED
        self._views.clear()
        if not self._closed.done():
            self._closed.set_result(None)

    # -- small steps

    @property
    def _n_sent(self) -> int:
        """Bytes of the request's body that the socket has taken."""
        unsent = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return max(0, self._n_sending - unsent)

    def _took(self, nbytes: int) -> None:
        self.received_bytes += nbytes
        self._left -= nbytes
        pause_s = self._on_received(nbytes)
        if pause_s > 0 and self._transport is not None and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(pause_s, self._resume)

    def _resume(self) -> None:
        self._is_paused = False
        self._mark = (asyncio.get_running_loop().time(), self._n_sending + self.received_bytes)
        if self._state is not _State.CLOSED and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _read_head(self, seen: int) -> None:
        """Look for the end of the head, of which `seen` bytes were looked at before."""
        text = bytes(self._head[: self._n_head])
        end = text.find(b"\r\n\r\n", max(0, seen - 3)) + 4
        if end < 4:
            if self._n_head == HEAD_LIMIT_NBYTES:
                self.fail(TransientOriginError(f"a response head of more than {HEAD_LIMIT_NBYTES} bytes"))
            return
        try:
            self._wire.receive_data(text[:end])
            event = self._wire.next_event()
        except h11.RemoteProtocolError as exc:
            self.fail(TransientOriginError(f"not an HTTP response: {str(exc)[:200]}"))
            return
        if isinstance(event, h11.InformationalResponse):
            self._n_interim += 1
            if self._n_interim > N_INTERIM:
                self.fail(TransientOriginError(f"more than {N_INTERIM} interim responses"))
                return
            rest = text[end:]
            self._head[: len(rest)] = rest
            self._n_head = len(rest)
            if rest:
                self._read_head(0)
            return
        if not isinstance(event, h11.Response):
            self.fail(TransientOriginError(f"not an HTTP response: {text[:40]!r}"))
            return
        self._answer = Answer(event.status_code, tuple((bytes(key), bytes(value)) for key, value in event.headers))
        try:
            is_data = self._judge(self._answer)
        except WeightcacheError as exc:
            self.fail(exc)
            return
        self._keep = (
            event.http_version == b"1.1" and b"close" not in dict(event.headers).get(b"connection", b"").lower()
        )
        if is_data:
            self._begin_data(text[end:])
        else:
            self._state = _State.REFUSAL
            self._collect(text[end:])

    def _begin_data(self, early: bytes) -> None:
        """Take the first of the body, which came with the head."""
        self._state = _State.DATA
        rest = memoryview(early)
        if len(rest) > self._left:
            self._keep = False
            rest = rest[: self._left]
        self._took(len(rest))
        while rest:
            view = self._views[0]
            n_taken = min(len(view), len(rest))
            view[:n_taken] = rest[:n_taken]
            rest = rest[n_taken:]
            if n_taken == len(view):
                self._views.popleft()
            else:
                self._views[0] = view[n_taken:]
        if self._left == 0:
            self._finish(self._answer)

    def _collect(self, piece: bytes, *, is_end: bool = False) -> None:
        """Take a piece of a body that is no data."""
        try:
            if piece or is_end:  # an empty piece means the end to h11
                self._wire.receive_data(piece)
            while self._state is _State.REFUSAL:
                event = self._wire.next_event()
                if isinstance(event, h11.Data):
                    self._collected += event.data
                    self._on_received(len(event.data))
                    if len(self._collected) > self._limit_nbytes:
                        self._keep = False
                        self._finish(Answer(self._answer.status, self._answer.headers, bytes(self._collected)))
                elif isinstance(event, h11.EndOfMessage):
                    if self._wire.trailing_data[0]:
                        self._keep = False
                    self._finish(Answer(self._answer.status, self._answer.headers, bytes(self._collected)))
                else:
                    return
        except h11.RemoteProtocolError as exc:
            self.fail(TransientOriginError(f"a broken response: {str(exc)[:200]}"))

    def _finish(self, answer: Answer) -> None:
        if self._n_sent < self._n_sending:  # an answer before the request was whole
            self._keep = False
        self._state = _State.IDLE
        if self._done is not None and not self._done.done():
            self._done.set_result(answer)

    def fail(self, exc: Exception) -> None:
        """End the exchange under way with an error, and be used no more."""
        if isinstance(exc, TransientOriginError):
            exc.facts.setdefault("received_bytes", self.received_bytes)
        self._state = _State.CLOSED
        self._views.clear()
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc)
