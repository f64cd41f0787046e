"""Own equal registries as one origin: which is asked, when another is, and what of each was measured meanwhile.

Never retries: what fails here is asked again by resilient.py, and goes on elsewhere, from the last whole piece. Never asks
a replica that `authorize` does not let it ask, each time anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from weightcache.choosing import ASSUMED_BYTES_PER_S, Candidate, explain, rank
from weightcache.errors import (
    AccessDeniedError,
    ConfigError,
    FormatError,
    ModelNotFoundError,
    OriginChangedError,
    OriginError,
    ResidencyError,
    TransientOriginError,
    WeightcacheError,
)
from weightcache.ledger import Ledger
from weightcache.measurements import Measured
from weightcache.origins.base import PIECE_NBYTES, Origin, Small, Stat
from weightcache.origins.connection import ClosedIdleError
from weightcache.origins.pace import loop_time
from weightcache.policy import Verb

log = logging.getLogger(__name__)


CHUNKS = "chunks/"
PROBED = "weightcache.json"
PROBE_NBYTES = 1 << 20
PROBE_S = 2.0  # how long the slowest replica is waited for; the others are chosen among when half of it is over
N_FAILURES = 2  # in a row, and a replica is not asked for a while
FIRST_REST_S = 2.0
LONGEST_REST_S = 60.0
LOOK_S = 0.25
WINDOW_S = 1.0  # over which a rate is measured
SLOW_SHARE = 0.3  # of what a replica gave, or another is known to give: slower, and it is left
LEAST_UNDER_WAY = 4  # ranges; the last few of a load say nothing of a rate
SLOW_FOR_S = 30.0
WORTH_TRYING_S = 10.0  # so long a rest, and a replica that was never measured is tried, with LEAST_UNDER_WAY ranges
TRIED_WITHIN_S = 2.0  # if no range would end so soon, those under way are broken off for that


@dataclass(slots=True, eq=False)
class Member:
    """One replica as this load sees it.

    Attributes:
        name: Of the replica.
        origin: Its root folder.
        usd_per_gb: What a GB costs that leaves it.
        measured: What is remembered of it.
        is_watched: Whether its bytes are counted while they come, so that it can be seen to become slow.
        lacks: Files that it does not have, or that came wrong from it: they are read elsewhere.
        used_bytes: Of those received, which nobody threw away.
    """

    name: str
    origin: Origin
    usd_per_gb: float = 0.0
    measured: Measured = field(default_factory=Measured)
    is_watched: bool = True
    lacks: set[str] = field(default_factory=set)
    used_bytes: int = 0
    _is_out: bool = False  # refused for good, as far as this load is concerned
    _n_failures: int = 0
    _rest_s: float = FIRST_REST_S
    _rests_until: float = 0.0
    _slow_until: float = 0.0
    _under_way: list[int] = field(default_factory=list)  # bytes of each request
    _history: deque[tuple[float, int]] = field(default_factory=deque)
    _best: float = 0.0
    _active_s: float = 0.0

    def is_healthy(self, now: float) -> bool:
        """Tell whether it is worth asking; after a rest one request at a time is, until one succeeds."""
        is_tried = self._n_failures >= N_FAILURES and bool(self._under_way)
        return not self._is_out and now >= self._rests_until and not is_tried

    def is_slow(self, now: float) -> bool:
        """Tell whether it was left of late, because it was slow."""
        return now < self._slow_until

    @property
    def bytes_per_s(self) -> float | None:
        """What it gives: in this load, as far as that is known, else as it is remembered."""
        return self._best or self.measured.bytes_per_s

    def candidate(self, now: float) -> Candidate:
        return Candidate(
            self.name,
            self.measured.latency_s,
            self.bytes_per_s,
            self.usd_per_gb,
            is_healthy=self.is_healthy(now),
            is_slow=self.is_slow(now),
        )

    def failed(self, now: float, n_times: int = 1) -> None:
        """Count failures; after N_FAILURES in a row it rests, longer each time."""
        self._n_failures += n_times
        if self._n_failures >= N_FAILURES and now >= self._rests_until:
            self._rests_until = now + self._rest_s
            self._rest_s = min(LONGEST_REST_S, self._rest_s * 2)

    def left(self, now: float, seconds: float) -> None:
        """Be asked after the others for a while."""
        self._slow_until = now + seconds

    def refused(self) -> None:
        """Be asked no more, but where nobody else is left."""
        self._is_out = True

    def may_have(self, path: str) -> bool:
        return not self._is_out and path not in self.lacks

    def succeeded(self) -> None:
        self._n_failures, self._rest_s = 0, FIRST_REST_S


Members = list[Member]  # `list` is a method below


class Replicas:
    """Equal registries, asked as one. All on the loop thread.

    Args:
        uri: The store's name.
        members: Those that policy allows.
        authorize: Asked before each request, with why; raises ResidencyError.
        most_bytes_per_s: What this process takes at most; 0 is no limit.
        on_close: Told when what was measured is complete.
        clock: Seconds.

    Attributes:
        members: Those that are asked.
        nbytes: About how many bytes are going to be read.
        reason: Which of them was chosen first, and why.
        n_left: How often one was left for another because it had become slow.
        damage: By replica, the chunks to be repaired there.
    """

    def __init__(
        self,
        uri: str,
        members: Sequence[Member],
        authorize: Callable[[Verb, Member], object],
        most_bytes_per_s: int = 0,
        on_close: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = loop_time,
    ) -> None:
        self._uri = uri
        self.members = list(members)
        self._former: list[Member] = []
        self._authorize = authorize
        self._most_bytes_per_s = most_bytes_per_s or math.inf
        self._on_close = on_close
        self._clock = clock
        self._asked: dict[int, Members] = {}  # who is asked just now, by the views that are filled
        self._gave: dict[str, Members] = {}  # whose bytes may be in what was read last of a file
        self._probing = asyncio.Lock()
        self._answers: dict[Member | None, Small] = {}  # to the probe
        self._first: Member | None = None
        self._on_trial: Member | None = None
        self._watching: asyncio.Task[None] | None = None
        self.nbytes = 1 << 30
        self.reason = ""
        self.n_left = 0
        self.damage: dict[str, list[str]] = {}

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def ledger(self) -> Ledger:
        return self._order()[0].origin.ledger

    @property
    def ledgers(self) -> Sequence[Ledger]:
        return [member.origin.ledger for member in (*self.members, *self._former)]

    async def list(self) -> Sequence[Stat]:
        with self._asking("") as member:
            return await member.origin.list()

    async def get(self, name: str, limit_nbytes: int) -> Small:
        await self._probe()
        if name == PROBED and self._first in self._answers:
            return self._answers.pop(self._first)
        with self._asking(name) as member:
            began = self._clock()
            small = await member.origin.get(name, limit_nbytes)
        if name == PROBED:  # a larger file takes longer than an answer does
            member.measured.add_latency(self._clock() - began)
        member.used_bytes += len(small.content)
        self._gave[name] = [member]
        return small

    async def read_into(self, stat: Stat, start: int, views: Sequence[memoryview]) -> None:
        self._watch()
        givers = self._gave.setdefault(stat.path, [])
        if start == 0 and id(views) not in self._asked:
            givers.clear()
        with self._asking(stat.path, views) as member:
            if member not in givers:
                givers.append(member)
            try:
                await member.origin.read_into(stat, start, views)
            except WeightcacheError as exc:
                n_received = int(exc.facts.get("received_bytes", 0))  # type: ignore[call-overload]
                member.used_bytes += n_received // PIECE_NBYTES * PIECE_NBYTES
                raise
        member.used_bytes += sum(map(len, views))

    async def check_unchanged(self, stats: Sequence[Stat]) -> None:
        pass  # registries hold what does not change

    def reject(self, path: str, nbytes: int) -> bool:
        """Hear that what was read of a file is not what its name says. Who gave all of it is not asked for it again.

        Returns whether such a one was found, and another may have it.
        """
        givers = self._gave.pop(path, [])
        if len(givers) != 1:
            return False  # nobody knows whose bytes were wrong
        givers[0].used_bytes -= nbytes
        self._lacks(givers[0], path)
        return any(member.may_have(path) for member in self.members)

    def drop(self) -> None:
        for member in self.members:
            member.origin.drop()

    def restrict(self) -> None:
        """Ask only those any more whom `authorize` still lets ask. Raises its ResidencyError when that is none."""
        allowed: Members = []
        refusal: ResidencyError | None = None
        for member in self.members:
            try:
                self._authorize(Verb.READ, member)
                allowed.append(member)
            except ResidencyError as exc:
                refusal = refusal or exc
        if refusal is not None and not allowed:
            raise refusal
        self._former += [member for member in self.members if member not in allowed]
        self.members = allowed
        if self._first is not None:
            self._choose()

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        for member in (*self.members, *self._former):
            ledger = member.origin.ledger
            if member._active_s >= WINDOW_S and ledger.received_bytes:
                member.measured.add_rate(ledger.received_bytes / member._active_s)
            member._active_s = 0.0
            await member.origin.close()
            ledger.wasted_bytes = max(0, ledger.received_bytes - member.used_bytes)
        self._on_close()

    # -- choosing

    async def _probe(self) -> None:
        """Ask all at once for a small file, once: it shows who answers, and how soon."""
        async with self._probing:
            if self._first is not None:
                return
            if len(self.members) > 1:
                began = self._clock()
                tasks = {asyncio.create_task(self._ask(member)): member for member in self.members}
                try:
                    done, late = await asyncio.wait(tasks, timeout=PROBE_S / 2)
                    while late and not any(task.result() for task in done):
                        left_s = PROBE_S - (self._clock() - began)
                        if left_s <= 0:
                            break
                        done, late = await asyncio.wait(late, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                    for task in tasks.keys() - late:
                        task.result()  # raises what is no replica's failure
                    for task in late:  # so it is asked where no other answers
                        tasks[task].measured.add_latency(self._clock() - began)
                        tasks[task].left(self._clock(), SLOW_FOR_S)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
            self._choose()

    async def _ask(self, member: Member) -> bool:
        """Ask a member for a small file; tell whether it answered."""
        began = self._clock()
        try:
            self._authorize(Verb.PROBE, member)
            small = await member.origin.get(PROBED, PROBE_NBYTES)
        except ConfigError:
            raise
        except WeightcacheError as exc:
            log.debug("replica %s of %s does not answer: %s", member.name, self._uri, exc)
            if not isinstance(exc, TransientOriginError):
                member.refused()
            member.failed(self._clock(), N_FAILURES)
            return False
        member.measured.add_latency(self._clock() - began)
        member.used_bytes += len(small.content)
        self._answers[member] = small
        return True

    def _choose(self) -> None:
        """Say who is asked first, and why."""
        ranked, now = self._order(), self._clock()
        self._first = ranked[0]
        self.reason = explain([member.candidate(now) for member in ranked], self.nbytes)

    def _order(self) -> Members:
        """Return the members in the order in which they are to be asked."""
        if len(self.members) == 1:
            return self.members
        now = self._clock()
        by_name = {member.name: member for member in self.members}
        candidates = [member.candidate(now) for member in self.members]
        best = max(member._best for member in self.members)
        if best:  # whether one that nothing is known of is any better, a trial shows
            candidates = [each if each.bytes_per_s else replace(each, bytes_per_s=best) for each in candidates]
        return [by_name[each.name] for each in rank(candidates, self.nbytes)]

    @contextlib.contextmanager
    def _asking(self, path: str, views: Sequence[memoryview] | None = None) -> Iterator[Member]:
        """Choose who is asked for a file, have it allowed, and take note of how that ends."""
        asked = self._asked.setdefault(id(views), []) if views is not None else []
        try:
            member, verb = self._pick(path, asked)
            self._authorize(verb, member)
            asked.append(member)
            nbytes = sum(map(len, views or ()))
            member._under_way.append(nbytes)
            try:
                yield member
            except WeightcacheError as exc:
                told = self._judge(member, path, exc)
                if told is exc:
                    raise
                raise told from exc
            finally:
                member._under_way.remove(nbytes)
                asked.remove(member)
            member.succeeded()
        finally:
            if views is not None and not asked:
                del self._asked[id(views)]

    def _pick(self, path: str, asked: Sequence[Member]) -> tuple[Member, Verb]:
        """Return who is asked for a file, and why: beside those who are asked for it already, another, where one answers."""
        order, now = self._order(), self._clock()
        if self._on_trial is not None and len(self._on_trial._under_way) < LEAST_UNDER_WAY:
            order = [self._on_trial, *order]
        fit = [member for member in order if member.may_have(path)] or order
        if asked:
            free = (each for each in fit if each not in asked and each.is_healthy(now) and not each.is_slow(now))
            return next(free, fit[0]), Verb.HEDGE
        member = fit[0] if fit[0].is_healthy(now) else min(fit, key=lambda each: each._n_failures)
        return member, Verb.READ if member is self._first or self._first is None else Verb.FAIL_OVER

    def _judge(self, member: Member, path: str, exc: WeightcacheError) -> WeightcacheError:
        """Take note of a failure, and return what it is to whoever asked: transient, as long as another can be asked."""
        now = self._clock()
        if isinstance(exc, ClosedIdleError):
            return exc  # nobody's failure
        if member is self._on_trial:
            self._on_trial = None
        if isinstance(exc, TransientOriginError):
            if not exc.facts.get("is_left"):
                member.failed(now)
        elif isinstance(exc, (ModelNotFoundError, OriginChangedError)):  # nothing changes here: it is damaged
            self._lacks(member, path)
        elif isinstance(exc, (AccessDeniedError, OriginError, FormatError, ResidencyError)):
            member.refused()
        else:
            return exc
        others = [each for each in self.members if each is not member and each.may_have(path)]
        goes_elsewhere = any(each.is_healthy(now) for each in others)
        if isinstance(exc, TransientOriginError):
            exc.facts["goes_elsewhere"] = goes_elsewhere
            return exc
        # What is no chunk may rightly be absent: that others do not answer just now makes it no less so.
        if goes_elsewhere or (others and not (isinstance(exc, ModelNotFoundError) and not path.startswith(CHUNKS))):
            return TransientOriginError(f"{member.name}: {exc}", goes_elsewhere=goes_elsewhere)
        return exc

    def _lacks(self, member: Member, path: str) -> None:
        if path not in member.lacks and path.startswith(CHUNKS):  # a tag that is not there yet is no damage
            self.damage.setdefault(member.name, []).append(path)
        member.lacks.add(path)

    # -- leaving who has become slow

    def _watch(self) -> None:
        if self._watching is None:
            self._watching = asyncio.create_task(self._look_again())

    async def _look_again(self) -> None:
        while True:
            began = self._clock()
            await asyncio.sleep(LOOK_S)
            now = self._clock()
            # Who is on trial comes first: the others are held against it.
            for member in sorted(self.members, key=lambda each: each is not self._on_trial):
                if member._under_way:
                    member._active_s += now - began
                    if member.is_watched:
                        self._look_at(member, now)
                else:
                    member._history.clear()

    def _look_at(self, member: Member, now: float) -> None:
        """Leave a member that gives much less than it did, or than another is known to give; or try an unknown one."""
        history = member._history
        history.append((now, member.origin.ledger.received_bytes))
        while len(history) > 2 and history[1][0] <= now - WINDOW_S:
            history.popleft()
        (since, before), (_, received) = history[0], history[-1]
        if now - since < WINDOW_S:
            return
        rate = (received - before) / (now - since)
        known = member.bytes_per_s or 0.0
        member._best = max(member._best, rate)
        if member is self._on_trial:
            self._on_trial = None
        if rate and len(member._under_way) < LEAST_UNDER_WAY:
            return
        others = [
            each for each in self.members if each is not member and each.is_healthy(now) and not each.is_slow(now)
        ]
        if not others or member.is_slow(now):
            return  # who was left and is asked nevertheless has what nobody else has
        expected = min(self._most_bytes_per_s, max([known, *(each.bytes_per_s or 0.0 for each in others)]))
        if rate <= SLOW_SHARE * expected:  # silence is slow, whatever is expected
            log.warning(
                "replica %s of %s gives %.1f MB/s, expected %.1f MB/s: it is left for another",
                member.name,
                self._uri,
                rate / 1e6,
                expected / 1e6,
            )
            self.n_left += 1
            member._best = rate
            member.left(now, SLOW_FOR_S)
            member._history.clear()
            member.origin.drop()
        elif self._on_trial is None:
            unknown = [each for each in others if each.is_watched and each.bytes_per_s is None]
            half_since, half_before = history[len(history) // 2]
            lately = max(rate, (received - half_before) / (now - half_since))  # it may have begun just now
            if unknown and lately < ASSUMED_BYTES_PER_S and self._left_s(lately) > WORTH_TRYING_S:
                self._on_trial = unknown[0]
                if min(member._under_way) * len(member._under_way) > lately * TRIED_WITHIN_S:
                    member.origin.drop()

    def _left_s(self, rate: float) -> float:
        """Return how long the rest takes at a rate."""
        return (self.nbytes - sum(ledger.received_bytes for ledger in self.ledgers)) / max(rate, 1.0)
