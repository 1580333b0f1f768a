"""Whether it is our own load that is being throttled, or whether throttles come whatever we do.

Less of a load that is too much is answered better: at half the rate, twice the share. Where less
is answered no better, sending less only loses what would have been answered: a gateway that turns
away three requests in ten drove a run down to one request every two seconds.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

ENOUGH = 12
"""Requests that tell how a level of load is answered."""
PATIENCE_SECONDS = 1.0
"""For them; at a slow rate they would take too long where it is our doing after all."""
REMEMBERED_LEVELS = 24
LIGHTER = 4.0
"""Times that a load must be lighter than another to be compared with it. With less the processes
that share a limit mistake each other's load for throttles that come anyhow (simulated)."""
OVERLOADED = 0.4
"""Of a load of which less was answered nothing is concluded: it can be far too much, and half of
it still too much."""
NEARLY_ALL = 0.9
TOO_MUCH_BETWEEN = 0.25
"""A load in between that was answered so much worse was too much: what was before it says nothing
of how things are now."""
RECENT = 60
"""Requests whose share of answers is compared with the one that we put up with."""
WORSE = 0.75


@dataclass(frozen=True)
class Level:
    """How a load was answered: requests a second, the share that was answered, the window."""

    load: float
    share: float
    window: float


class Blame:
    """Fed with every outcome; asked at each throttle."""

    def __init__(self) -> None:
        self._levels: deque[Level] = deque(maxlen=REMEMBERED_LEVELS)
        self._recent: deque[bool] = deque(maxlen=RECENT)
        self._since: float | None = None
        self._sent = self._answered = 0
        self._usual: float | None = None
        """The share that is answered whatever we do; None while throttles are our doing."""

    def note(self, answered: bool, now: float) -> None:
        """One request was answered, or throttled."""
        if self._since is None:
            self._since = now
        self._sent += 1
        self._answered += answered
        self._recent.append(answered)
        if self._usual is not None and len(self._recent) == RECENT and all(self._recent):
            self._usual = None

    @property
    def unexplained(self) -> bool:
        """No reason to send less: throttles are as many as they are at any load."""
        if self._usual is None:
            return False
        if len(self._recent) < RECENT:
            return True
        if sum(self._recent) / len(self._recent) >= WORSE * self._usual:
            return True
        self._usual = None
        self._levels.clear()
        return False

    def too_early(self, now: float) -> bool:
        """Whether a load that is answered at least in part was not tried for long enough."""
        trying = self._since is not None and now - self._since < PATIENCE_SECONDS
        return trying and self._answered > 0 and self._sent < ENOUGH

    @property
    def tried(self) -> bool:
        """Whether so many requests were sent since the load was last changed that more may be."""
        if self._sent < 2 * ENOUGH:
            return False
        self._since, self._sent, self._answered = None, 0, 0
        return True

    def heavier_and_as_good(self, now: float, window: float) -> Level | None:
        """Ends a level. A heavier load that was answered as well as this one, if there was one:
        then throttles are not of our making, and that one may be taken up again."""
        if self._since is None or self._sent < ENOUGH or now <= self._since:
            return None
        level = Level(self._sent / (now - self._since), self._answered / self._sent, window)
        self._since, self._sent, self._answered = now, 0, 0
        found = heavier_and_as_good(self._levels, level)
        self._levels.append(level)
        if found is None and lowering_is_in_vain(self._levels):
            # nothing heavier is known to compare with: then try it
            found = replace(level, load=2 * level.load)
            self._levels.clear()
            self._levels.append(level)
            return found
        if found is not None:
            self._usual = level.share
            self._recent.clear()
            self._levels.clear()
        return found


def heavier_and_as_good(levels: Sequence[Level], level: Level) -> Level | None:
    """The heaviest of the loads before that was answered as well as this one, if any was."""
    found = None
    for before in reversed(levels):
        if before.share < level.share - TOO_MUCH_BETWEEN:
            break
        if as_good(before, level) and (found is None or before.load > found.load):
            found = before
    return found


def lowering_is_in_vain(levels: Sequence[Level]) -> bool:
    """Three times in a row about the same load was answered in part, and no better."""
    last = list(levels)[-3:]
    loads = [level.load for level in last]
    return (
        len(last) == 3
        and all(OVERLOADED <= level.share < NEARLY_ALL for level in last)
        and max(loads) < 2 * min(loads)
    )


def as_good(heavy: Level, light: Level) -> bool:
    """Whether less of a load was answered no better."""
    ratio = heavy.load / light.load
    if ratio < LIGHTER or min(heavy.share, light.share) < OVERLOADED:
        return False
    if_our_doing = min(1.0, heavy.share * ratio)
    return light.share < (heavy.share + if_our_doing) / 2
