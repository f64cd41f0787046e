"""Own the forecast of when models are used next, from the idle times between their uses. Pure: clocks are handed in.

Never fetches anything, and promises no more than what a model's own past shows.

The hybrid histogram of Shahrad et al., "Serverless in the Wild" (USENIX ATC 2020), on a node's models: idle times in bins
of a minute, the newest WINDOW of each model, none longer than RANGE_MIN. What remains of a histogram once a model has been
idle for a while says when its next use is to be expected: shortly before, the model is due, and until then it need not be
here. A model without enough of a past, or whose past foretold nothing, is kept for a standard time after each use.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightcache.errors import FormatError

VERSION = 1
WINDOW = 64  # idle times of a model
RANGE_MIN = 8 * 24 * 60  # a week and a day: what idles for longer is not foretold
LEAST_IDLE = 3  # times, before anything is foretold
MARGIN_SHARE = 0.1  # of the idle time, by which a use may be early or late (Shahrad et al., section 4.2)
MARGIN_MIN = 3.0  # at least; also how long before a use a model is due: a prefetch takes its time
LEAST_CHANCE = 0.7  # of a use within the margins, for a model to be due; 0.5 wastes too much (docs/decisions/018)
LEAST_SKILL = 0.5  # share of a model's uses that were foretold, for it not to be kept in between
SKILL_NEWS = 0.2  # of one use in that share: an exponentially weighted mean
STANDARD_KEEP_S = 4 * 3600.0  # the range of the histogram in the paper
WASTE_LIMIT = 0.1  # of all bytes fetched
WASTE_HALF_S = 7 * 86400.0  # in which what was fetched and wasted counts half
MOST_MODELS = 1000


@dataclass(frozen=True, slots=True)
class Due:
    """A model that should be here now, and why."""

    model: str
    n_uses: int
    why: str
    expected_from_s: float
    expected_until_s: float


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What a model's past says of the moment: the chance that it is used about now, and the idle times that say so."""

    chance: float
    soon: list[int]
    n_left: int


@dataclass(slots=True)
class _Habit:
    """What is known of one model: its last use, and its idle times in minutes, as they came and in order.

    Attributes:
        skill: Share of its uses that were foretold.
        ahead_bytes: Fetched ahead of a use that has not come yet.
    """

    last_s: float
    idle: list[int] = field(default_factory=list)
    ordered: list[int] = field(default_factory=list)
    skill: float = 0.0
    ahead_bytes: int = 0

    def used(self, now_s: float) -> None:
        idle_min = (now_s - self.last_s) / 60
        if idle_min >= 1:
            self.skill += SKILL_NEWS * ((self.outlook(now_s).chance >= LEAST_CHANCE) - self.skill)
            self.idle.append(min(int(idle_min), RANGE_MIN))
            insort(self.ordered, self.idle[-1])
            if len(self.idle) > WINDOW:
                self.ordered.remove(self.idle.pop(0))
        self.last_s = max(self.last_s, now_s)
        self.ahead_bytes = 0

    def outlook(self, now_s: float) -> _Outlook:
        """Look at those of its idle times that this one may still turn out to be."""
        idle_min = max(0.0, now_s - self.last_s) / 60
        margin = _margin_min(idle_min)
        first = bisect_left(self.ordered, idle_min - margin)
        soon = self.ordered[first : bisect_right(self.ordered, idle_min + margin)]
        n_left = len(self.ordered) - first
        if len(self.ordered) < LEAST_IDLE or idle_min + margin >= RANGE_MIN:
            return _Outlook(0.0, [], n_left)
        if soon and idle_min < soon[0] - MARGIN_MIN:
            return _Outlook(0.0, [], n_left)
        return _Outlook(len(soon) / (n_left + 1), soon, n_left)  # one more than were seen: it may never come again


def _margin_min(idle_min: float) -> float:
    return max(MARGIN_MIN, MARGIN_SHARE * idle_min)


class Forecast:
    """What is known of a node's models. For one thread.

    Args:
        keep_s: How long a model is kept after a use where its past says nothing better.
        waste: Share of the bytes fetched that may have been fetched in vain; beyond it nothing is due.
    """

    def __init__(self, keep_s: float = STANDARD_KEEP_S, waste: float = WASTE_LIMIT) -> None:
        self.keep_s = keep_s
        self.waste = waste
        self._habits: dict[str, _Habit] = {}  # those used last at the end
        self._fetched_bytes = 0.0  # both as they count at _counted_s
        self._wasted_bytes = 0.0
        self._counted_s = 0.0

    def used(self, model: str, now_s: float, base: str = "") -> None:
        """Note a use of a model, which is one of its base's bytes too."""
        for name in dict.fromkeys((base, model)):
            if name:
                habit = self._habits.pop(name, None) or _Habit(now_s)
                habit.used(now_s)
                self._habits[name] = habit
        while len(self._habits) > MOST_MODELS:
            del self._habits[next(iter(self._habits))]

    def due(self, now_s: float) -> list[Due]:
        """Return the models that should be here now, the surest first; none while too much was fetched in vain.

        A minute or two before they are used: where a fetch takes longer, ask for a moment as much later.
        """
        if self.wasted_share > self.waste:
            return []
        found = ((habit.outlook(now_s), name) for name, habit in self._habits.items())
        surest = sorted((each for each in found if each[0].chance >= LEAST_CHANCE), key=lambda each: -each[0].chance)
        return [_explain(name, self._habits[name], outlook) for outlook, name in surest]

    def expected_per_s(self, model: str, now_s: float) -> float | None:
        """Return the uses a second to be expected of a model just now; None where its past does not say.

        0 means that it may leave, since it will be due again in time: while nothing is due, nothing is worth so little.
        """
        habit = self._habits.get(model)
        if habit is None:
            return None
        outlook = habit.outlook(now_s)
        if outlook.chance >= LEAST_CHANCE:
            return outlook.chance / (60 * _margin_min((now_s - habit.last_s) / 60))
        may_leave = now_s > self.keep_until(model, now_s) and self.wasted_share <= WASTE_LIMIT
        return 0.0 if may_leave else None

    def keep_until(self, model: str, now_s: float) -> float:
        """Return until when a model should stay where it is, unless it is used again."""
        habit = self._habits.get(model)
        if habit is None:
            return now_s
        outlook = habit.outlook(now_s)
        if outlook.chance >= LEAST_CHANCE:
            return habit.last_s + 60 * (outlook.soon[-1] + _margin_min(outlook.soon[-1]))
        is_foretold = habit.skill >= LEAST_SKILL and outlook.n_left
        return habit.last_s + (60 * MARGIN_MIN if is_foretold else self.keep_s)

    def fetched(self, model: str, nbytes: int, now_s: float, *, is_ahead: bool) -> None:
        """Count bytes that were fetched, for a load or ahead of one."""
        self._age(now_s)
        self._fetched_bytes += nbytes
        if is_ahead and model in self._habits:
            self._habits[model].ahead_bytes += nbytes

    def wasted(self, model: str, now_s: float) -> int:
        """Note that a model has left. Returns the bytes of it that were fetched ahead of a use that did not come."""
        habit = self._habits.get(model)
        if habit is None:
            return 0
        nbytes, habit.ahead_bytes = habit.ahead_bytes, 0
        self._age(now_s)
        self._wasted_bytes += nbytes
        return nbytes

    @property
    def wasted_share(self) -> float:
        """Of all bytes fetched of late, those fetched ahead of a use that did not come."""
        return self._wasted_bytes / self._fetched_bytes if self._fetched_bytes else 0.0

    def _age(self, now_s: float) -> None:
        share = 0.5 ** (max(0.0, now_s - self._counted_s) / WASTE_HALF_S)
        self._fetched_bytes *= share
        self._wasted_bytes *= share
        self._counted_s = max(self._counted_s, now_s)

    # -- between processes

    def to_form(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        models = {
            name: [habit.last_s, habit.idle, habit.skill, habit.ahead_bytes] for name, habit in self._habits.items()
        }
        counted = [self._counted_s, self._fetched_bytes, self._wasted_bytes]
        return {"version": VERSION, "models": models, "counted": counted}

    @classmethod
    def from_form(cls, form: object, keep_s: float = STANDARD_KEEP_S, waste: float = WASTE_LIMIT) -> Forecast:
        """Take up a state that `to_form` returned. Raises FormatError for anything else."""
        forecast = cls(keep_s, waste)
        try:
            if not isinstance(form, Mapping) or form["version"] != VERSION:
                raise ValueError(f"expected version {VERSION}")
            if len(form["models"]) > MOST_MODELS:
                raise ValueError(f"more than {MOST_MODELS} models")
            for name, (last_s, idle, skill, ahead_bytes) in form["models"].items():
                if not isinstance(name, str) or len(idle) > WINDOW:
                    raise ValueError(f"{name!r:.80}: expected a name and at most {WINDOW} idle times")
                times = [_count(each, RANGE_MIN) for each in idle]
                habit = _Habit(_amount(last_s), times, sorted(times), _amount(skill, 1.0), _count(ahead_bytes, 1 << 62))
                forecast._habits[name] = habit
            counted_s, fetched_bytes, wasted_bytes = map(_amount, form["counted"])
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as exc:
            raise FormatError(f"this is no state of a forecast ({exc}): drop it, and the forecast begins anew") from exc
        forecast._counted_s, forecast._fetched_bytes, forecast._wasted_bytes = counted_s, fetched_bytes, wasted_bytes
        return forecast


def _explain(model: str, habit: _Habit, outlook: _Outlook) -> Due:
    first, last = outlook.soon[0], outlook.soon[-1]
    after = f"{first} minutes" if first == last else f"{first} to {last} minutes"
    why = f"of the {outlook.n_left} times that it was idle for as long as now, {len(outlook.soon)} ended after {after}"
    return Due(model, len(habit.idle) + 1, why, habit.last_s + 60 * first, habit.last_s + 60 * (last + 1))


def _amount(value: object, most: float = math.inf) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most or value == math.inf:
        raise ValueError(f"{value!r:.40} where a number from 0 is expected")
    return float(value)


def _count(value: object, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{value!r:.40} where a whole number up to {most} is expected")
    return value
