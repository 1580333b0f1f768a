"""The rate that throttles have shown an endpoint to be limited to.

One value, in the database where processes share one: each adds the outcomes of its requests, and
what follows from them holds for all. A process alone sees the others' load in its own throttles:
three at one endpoint took it for throttles that come anyhow, and 12 to 19 % of their requests were
refused. A change begins a new generation; outcomes of requests that were sent before it are not
counted, so that one event lowers the rate once, whoever notices it, and all try a higher one
together.

An endpoint that is asked for too much answers as many requests a second as its limit allows. So
the rate of answers while something is throttled is the limit, whatever the endpoint had saved up
before and however evenly we send:

1. *Measuring*, after the first throttle: requests go on as they come, for a second. That gives
   a lower bound, since many of them are backing off.
2. *Searching*: from there it is raised every 25 answers, until something is throttled.
3. *Judging*, each time that happens: the share of what is throttled from then on says how far the
   rate is above the limit. One throttle in two hundred requests changes nothing: clocks, the
   network, somebody else's key.
4. Otherwise, after two hundred answers without a throttle, a little more is tried.

Throttles that come whatever the load is are not answered with less load (`blame`).

Simulated (`test_found_rate`, 20 and 100 requests a second, one process and three, also on a machine
that stands still for up to 150 ms twice a second): after 8 s 95 to 100 % of the limit is used and
0.3 to 1 % of the requests are throttled. An endpoint that lets nothing through at once refuses what
comes a millisecond too early: one process uses 63 to 86 % of it after a minute, three less, and in
two of eight runs they took its refusals for throttles that come whatever the load is.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from embedding_pipeline.embedders.blame import (
    A_FEW,
    RECENT,
    TELLING,
    Level,
    is_worse,
    whatever_the_load,
)

MARGIN = 0.98
"""Of the measured limit."""
STEP, ROUGH_STEP, LARGEST_STEP = 1.02, 1.05, 1.1
"""By which a higher rate is tried; squared each time that nothing was throttled. The second one
where more than a tenth was refused: the share of a few dozen requests is a rough measure."""
SEARCHING_STEP, SHUT_STEP = 1.15, 1.05
"""The same while nothing has been throttled yet at a rate that was tried; the smaller one where
nearly all was refused before: then there were always enough requests for what was let in."""
HOLD, SEARCHING_HOLD = 200, 25
"""Answers without a throttle before that."""
USED = 0.8
"""Of the rate must have been asked for meanwhile."""
MEASURED_SECONDS, MEASURED_ANSWERS = 1.0, 10
"""At least, for a first measurement."""
JUDGED_SECONDS, JUDGED_REQUESTS = 0.25, 32
"""At least, for the share that is throttled."""
LONGEST_SECONDS = 3.0
"""For all processes to add their outcomes; one may have died."""
STRAY_REQUESTS = 200
"""Of so many, one may be throttled."""
STRAY = 0.05
"""Of the requests may be throttled where the limit is known: a clock, or somebody else's key."""
BACK_SHARE, BACK_STEP, BACK_ANSWERS = 0.9, 1.5, 10
"""Lowered to less than this share of a rate that had been good, it is raised again by such steps,
each after so many answers: a machine that stands still for a moment sends what it has to send all
at once."""
DEEPEST_FALL = 16
"""Times that the rate may become lower without one answer in between."""
LOWEST_RATE = 0.5
"""Requests a second; slower than that the requests' own back-off waits."""
REMEMBERED_LEVELS = 8


@dataclass(frozen=True)
class Outcomes:
    """What became of requests that were sent in one generation."""

    generation: int
    sent: int = 0
    answered: int = 0
    throttled: int = 0
    seconds: float = 0.0
    """In which this process did so."""
    holders: int = 1
    """Processes that do."""
    limited: bool = False
    """Some request waited for the rate."""
    given: float | None = None
    """Requests a second, where the YAML or the provider tells the limit."""


@dataclass(frozen=True)
class FoundRate:
    """What is known. Times are of the database's clock, rates in requests a second."""

    per_second: float | None = None
    """None: not limited as far as is known."""
    generation: int = 0
    since: float = 0.0
    """When the present counts began."""
    given: float | None = None
    """The limit that was known when something was first throttled."""
    measuring: bool = False
    """Something was throttled, and the rate of answers is being measured."""
    searching: bool = False
    """The rate was not too much so far."""
    judging: bool = False
    """Counts are of requests after a throttle; in measuring, after an answer."""
    seconds: float = 0.0
    """In which all processes together counted: three of them three in a second."""
    sent: int = 0
    answered: int = 0
    throttled: int = 0
    good: float | None = None
    """The last rate at which nothing was throttled for long enough."""
    back_to: float | None = None
    """A good rate that is to be tried once more."""
    answered_at: float | None = None
    """The last rate at which anything was answered."""
    step: float = STEP
    usual: float | None = None
    """The share that is answered whatever the load; None while throttles are our doing."""
    lowered: int = 0
    """Times in a row, without a calm time in between."""
    levels: tuple[Level, ...] = ()
    """How loads were answered at which something was throttled."""

    @property
    def active(self) -> bool:
        """Whether outcomes are to be counted: the rate is limited, or is about to be found."""
        return self.per_second is not None or self.measuring

    @property
    def let_in(self) -> int:
        """Requests that were not refused. Answers come later than refusals: how many there are
        says less."""
        return max(0, self.sent - self.throttled)

    @property
    def hurried(self) -> bool:
        """Whether the next step is not to be waited for."""
        return self.measuring or self.searching or self.back_to is not None

    @property
    def places_are_not_why(self) -> bool:
        """Whether it is known, or being found out, that something else than requests in flight is
        limited."""
        return self.measuring or self.usual is not None

    def to_json(self) -> dict[str, Any]:
        """As it is kept in the database."""
        levels = [[round(level.load, 3), round(level.share, 3)] for level in self.levels]
        return {**asdict(self), "levels": levels}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "FoundRate":
        """The other way round. What another version of this project wrote is not made use of."""
        if set(kept) != {each.name for each in fields(cls)}:
            return cls(generation=kept["generation"])
        levels = tuple(Level(load, share) for load, share in kept["levels"])
        return cls(**{**kept, "levels": levels})


def noted(found: FoundRate, outcomes: Outcomes, now: float) -> FoundRate:
    """What is known after these outcomes."""
    if outcomes.generation != found.generation:
        return found
    if not found.active:
        if not outcomes.throttled:
            return found
        return _begin(found, now, measuring=True, given=outcomes.given)
    if outcomes.given is not None and found.given is None:
        # what was throttled before the limit was known says nothing of how well it is kept
        return FoundRate(generation=found.generation + 1)
    tells = outcomes.answered if found.measuring else outcomes.throttled
    if tells and not found.judging and found.usual is None:
        return replace(found, **_COUNTED_ANEW, since=now, judging=True)
    if not (found.measuring or found.judging or outcomes.limited or outcomes.throttled):
        return found  # who did not wait for the rate says nothing about it
    found = replace(
        found,
        sent=found.sent + outcomes.sent,
        answered=found.answered + outcomes.answered,
        throttled=found.throttled + outcomes.throttled,
        seconds=found.seconds + outcomes.seconds,
    )
    rate = found.per_second
    if rate is None:
        return _measured(found, outcomes, now)
    if found.answered:
        found = replace(found, answered_at=rate)
    if found.usual is not None:
        return _usual(found, rate, outcomes, now)
    if found.judging:
        return _judged(found, rate, outcomes, now)
    return _raised(found, rate, outcomes, now)


_COUNTED_ANEW: dict[str, Any] = {"seconds": 0.0, "sent": 0, "answered": 0, "throttled": 0}


def _begin(found: FoundRate, now: float, **changes: Any) -> FoundRate:
    begun = {"generation": found.generation + 1, "since": now, "measuring": False, "judging": False}
    return replace(found, **{**begun, **_COUNTED_ANEW, **changes})


def _measured(found: FoundRate, outcomes: Outcomes, now: float) -> FoundRate:
    """After the first throttles: the rate at which answers come, once there are enough."""
    enough = found.seconds >= MEASURED_SECONDS * outcomes.holders
    if not enough or found.answered < MEASURED_ANSWERS:
        return found  # a door that is shut says nothing of how many may pass
    stray = found.throttled <= (1 if outcomes.given is None else STRAY * found.sent)
    if stray:
        return _begin(found, now)
    # of a second that begins with a wave of requests: it is cut off at one end or the other
    let_in = max(found.let_in, found.answered)
    rate = max(LOWEST_RATE, let_in / found.seconds * outcomes.holders)
    shut = found.throttled >= 4 * let_in
    return _begin(
        found,
        now,
        per_second=rate,
        searching=True,
        step=SHUT_STEP if shut else SEARCHING_STEP,
        answered_at=rate,
    )


def _judged(found: FoundRate, rate: float, outcomes: Outcomes, now: float) -> FoundRate:
    """Something was throttled a short while ago."""
    sent, elapsed = found.sent, now - found.since
    everybody = found.seconds >= JUDGED_SECONDS * outcomes.holders or elapsed > LONGEST_SECONDS
    if not everybody or sent < JUDGED_REQUESTS:
        return found
    tolerated = max(2.0, 2 * sent / STRAY_REQUESTS)
    if found.throttled > tolerated or (found.searching and found.throttled):
        return _lowered(found, rate, now)
    if sent < STRAY_REQUESTS and not found.searching:
        return found
    if found.throttled > sent / STRAY_REQUESTS:
        return _lowered(found, rate, now)
    return replace(found, **_COUNTED_ANEW, since=now, judging=False)


def _lowered(found: FoundRate, before: float, now: float) -> FoundRate:
    level = Level(before, found.let_in / found.sent)
    levels = (*found.levels, level)[-REMEMBERED_LEVELS:]
    begun: dict[str, Any] = {"searching": False, "good": None, "back_to": None, "step": STEP}
    if (usual := whatever_the_load(levels)) is not None:
        begun |= {"per_second": usual.load, "usual": usual.share, "lowered": 0, "levels": ()}
        return _begin(found, now, **begun)
    if level.share < 1 - A_FEW:
        begun["step"] = ROUGH_STEP
    lower = MARGIN * before * level.share if found.let_in else before / 2
    lowest = max((found.answered_at or before) / DEEPEST_FALL, LOWEST_RATE)
    lower = min(before, max(lower, lowest))
    back_to = None
    # next to nothing was let in, or had been until just now
    if any(each.share < TELLING for each in levels[-2:]):
        back_to = found.back_to or found.good or before
    elif found.good is not None and lower < BACK_SHARE * found.good and not found.lowered:
        back_to = found.good
    begun |= {
        "per_second": lower,
        "good": None if back_to is None else found.good,
        "back_to": back_to,
        "answered_at": found.answered_at or before,
        "lowered": found.lowered + 1,
        "levels": levels,
    }
    return _begin(found, now, **begun)


def _raised(found: FoundRate, rate: float, outcomes: Outcomes, now: float) -> FoundRate:
    """Nothing was throttled of late."""
    if found.back_to is not None:
        steps = found.answered // BACK_ANSWERS
        if not steps:
            return found
        higher = min(found.back_to, rate * BACK_STEP**steps)
        back_to = found.back_to if higher < found.back_to else None
        return _begin(found, now, per_second=higher, back_to=back_to)
    if found.answered < (SEARCHING_HOLD if found.searching else HOLD):
        return found
    if found.sent < USED * rate * found.seconds / outcomes.holders:
        return replace(found, **_COUNTED_ANEW, since=now)  # so many are not asked for
    higher = rate * found.step
    if outcomes.given is not None and higher >= outcomes.given:
        return FoundRate(generation=found.generation + 1)
    step = found.step if found.searching else min(found.step**2, LARGEST_STEP)
    good = None if found.searching else rate
    return _begin(found, now, per_second=higher, good=good, step=step, lowered=0, levels=())


def _usual(found: FoundRate, rate: float, outcomes: Outcomes, now: float) -> FoundRate:
    """Throttles come whatever the load is: more is tried as long as they are no more."""
    if found.sent < RECENT:
        return found
    if not found.throttled:
        return _raised(replace(found, usual=None), rate, outcomes, now)
    assert found.usual is not None
    if is_worse(found.let_in / found.sent, found.usual):
        if found.lowered:
            return _lowered(replace(found, usual=None, levels=()), rate, now)
        # it was the last step: there is a limit as well
        return _begin(found, now, per_second=rate / 2, good=rate / 2, lowered=1)
    if not outcomes.limited:
        return replace(found, since=now, **_COUNTED_ANEW)
    if found.good is None or 2 * rate < found.good:
        return _begin(found, now, per_second=2 * rate, lowered=0)
    if found.answered < 2 * HOLD:
        return found
    return _begin(found, now, per_second=rate * STEP, lowered=0)
