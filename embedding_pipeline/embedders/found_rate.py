"""The rate that throttles have shown an endpoint to be limited to, found by all processes together.

One value in the database: each process adds the outcomes of its requests, and what follows from
them holds for all. A change begins a new generation; outcomes of requests that were sent before
it are not counted, so that one event lowers the rate once, whoever notices it, and all try a
higher one together.

The rules are those of `Limiter`, which finds a rate by itself where there is no database. A
process alone sees the others' load in its own throttles: three at one endpoint took it for
throttles that come anyhow, and 12 to 19 % of their requests were refused.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from embedding_pipeline.embedders.blame import (
    ENOUGH,
    RECENT,
    WORSE,
    Level,
    heavier_and_as_good,
    lowering_is_in_vain,
)

MARGIN = 0.95
"""Of the measured limit."""
HOLD = 200
"""Answers without a throttle before more is tried; half as many before the next try."""
DEEPEST_FALL = 16
"""Times that the rate may become lower without one answer in between."""
LOWEST_RATE = 0.5
"""Requests a second; slower than that the requests' own back-off waits."""
MEASURED_SECONDS = 1.0
"""Over which the rate of answers is measured after the first throttle."""
JUDGED_SECONDS = 0.25
"""The same after a throttle at a found rate: the outcomes of the one that noticed it tell less."""
LONGEST_SECONDS = 3.0
"""For that; a process may have died."""
RECOVERY_SECONDS, RECOVERY_REQUESTS = 0.5, 20
"""After the rate was lowered, in which throttles say nothing: what is saved up at the other end is
used up."""
ENOUGH_ANSWERS = 10
"""For a measured rate."""
STRAY = 0.05
"""Of the requests may be throttled where the limit is known: a clock, or somebody else's key."""
LARGEST_STEP = 1.25
FIRST_STEP, FIRST_HOLD = 1.1, 25
"""Until a rate that was tried was too much: a first measurement, in the middle of back-offs, is
often too low."""
REMEMBERED_LEVELS = 24
CALM = 50
"""Answers in a row, after which it was right to lower the rate."""


@dataclass(frozen=True)
class Outcomes:
    """What became of requests that were sent in one generation."""

    generation: int
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
    """When this generation's counts began."""
    given: float | None = None
    """The limit that was known when something was first throttled."""
    measuring: bool = False
    """Something was throttled, and the rate of answers is being measured."""
    seconds: float = 0.0
    """In which all processes together counted: three of them three in a second."""
    answered: int = 0
    throttled: int = 0
    too_much: float | None = None
    """The lowest rate that is known, or being tried, to be too much is below this."""
    calm_at: float | None = None
    """The last rate that a higher one was tried from."""
    answered_at: float | None = None
    """The last rate at which anything was answered."""
    step: float = 1 / MARGIN
    hold: int = HOLD
    usual: float | None = None
    """The share that is answered whatever the load; None while throttles are our doing."""
    lowered: int = 0
    """Times in a row, without a calm one in between."""
    levels: tuple[Level, ...] = ()
    """How loads were answered at which something was throttled."""

    @property
    def active(self) -> bool:
        """Whether outcomes are to be counted: the rate is limited, or is about to be found."""
        return self.per_second is not None or self.measuring

    def to_json(self) -> dict[str, Any]:
        """As it is kept in the database."""
        levels = [[round(level.load, 3), round(level.share, 3)] for level in self.levels]
        return {**asdict(self), "levels": levels}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> "FoundRate":
        """The other way round."""
        levels = tuple(Level(load, share, 0.0) for load, share in kept.get("levels", ()))
        return cls(**{**kept, "levels": levels})


def noted(found: FoundRate, outcomes: Outcomes, now: float) -> FoundRate:
    """What is known after these outcomes."""
    if outcomes.generation != found.generation:
        return found
    if found.active and outcomes.given is not None and found.given is None:
        # what was throttled before the limit was known says nothing of how well it is kept
        return FoundRate(generation=found.generation + 1)
    if now < found.since:
        return found
    if not found.active:
        if not outcomes.throttled:
            return found
        return _begin(found, now, measuring=True, given=outcomes.given)
    counts = found.measuring or outcomes.limited or outcomes.throttled > 0 or found.throttled > 0
    found = replace(
        found,
        answered=found.answered + (outcomes.answered if counts else 0),
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
    if found.throttled:
        return _judged(found, rate, outcomes, now)
    return _raised(found, rate, outcomes, now)


def _begin(found: FoundRate, now: float, **changes: Any) -> FoundRate:
    return replace(
        found,
        **{
            "generation": found.generation + 1,
            "since": now,
            "measuring": False,
            "seconds": 0.0,
            "answered": 0,
            "throttled": 0,
            **changes,
        },
    )


def _measured(found: FoundRate, outcomes: Outcomes, now: float) -> FoundRate:
    """After the first throttles: the rate at which answers come, once there are enough."""
    enough = found.seconds >= MEASURED_SECONDS * outcomes.holders
    if not enough or found.answered < ENOUGH_ANSWERS:
        return found  # a door that is shut says nothing of how many may pass
    sent = found.answered + found.throttled
    stray = found.throttled <= (1 if outcomes.given is None else STRAY * sent)
    if stray:
        return _begin(found, now)
    return _lowered(found, sent / found.seconds * outcomes.holders, now)


def _judged(found: FoundRate, rate: float, outcomes: Outcomes, now: float) -> FoundRate:
    """Something was throttled in this generation."""
    sent, elapsed = found.answered + found.throttled, now - found.since
    everybody = found.seconds >= JUDGED_SECONDS * outcomes.holders or elapsed > LONGEST_SECONDS
    if not everybody or sent < (2 * ENOUGH if found.lowered else ENOUGH):
        return found
    return _lowered(found, rate, now)


def _lowered(found: FoundRate, before: float, now: float) -> FoundRate:
    sent = found.answered + found.throttled
    share = found.answered / sent
    level = Level(before, share, 0.0)
    heavier = heavier_and_as_good(found.levels, level)
    levels = (*found.levels, level)[-REMEMBERED_LEVELS:]
    if heavier is not None:
        return _begin(
            found,
            now,
            per_second=heavier.load,
            too_much=None,
            step=1 / MARGIN,
            hold=HOLD,
            lowered=0,
            usual=min(level.share, heavier.share),
            levels=(),
        )
    if lowering_is_in_vain(levels):
        # nothing heavier is known to compare with: then try it
        return _begin(found, now, per_second=2 * before, too_much=None, lowered=0, levels=(level,))
    # once is enough where the rate was a little too high; else it soon tells that it is not why
    lower = before * share * MARGIN ** (2 ** min(found.lowered, 4))
    too_much = min(before, before * share / MARGIN)
    if not found.answered:
        lower = before / 2
        too_much = found.too_much or before  # still the one that the silence began at
    elif not found.lowered and found.calm_at is not None and found.calm_at < before:
        lower, too_much = min(lower, found.calm_at), found.calm_at / MARGIN
    lowest = max((found.answered_at or before) / DEEPEST_FALL, LOWEST_RATE)
    return _begin(
        found,
        now,
        since=now + min(2.0, max(RECOVERY_SECONDS, RECOVERY_REQUESTS / max(lower, lowest))),
        per_second=min(before, max(lower, lowest)),
        answered_at=found.answered_at or before,
        too_much=too_much,
        calm_at=None,
        step=FIRST_STEP if found.measuring else 1 / MARGIN,
        hold=FIRST_HOLD if found.measuring else HOLD,
        lowered=found.lowered + 1,
        levels=levels,
    )


def _raised(found: FoundRate, rate: float, outcomes: Outcomes, now: float) -> FoundRate:
    """Nothing was throttled in this generation."""
    known_good = MARGIN * (found.too_much or rate / MARGIN)
    if rate < known_good:
        # lowered by more than was needed: back, but not to where it was too much
        steps = found.answered // 10
        higher = min(known_good, rate * 1.15**steps)
        return _begin(found, now, per_second=higher) if steps else found
    if found.answered < found.hold:
        return found if found.answered < CALM else replace(found, lowered=0)
    higher, searching = rate * found.step, found.hold == FIRST_HOLD
    if outcomes.given is not None and higher >= outcomes.given:
        return FoundRate(generation=found.generation + 1)
    return _begin(
        found,
        now,
        per_second=higher,
        too_much=higher / MARGIN,
        calm_at=rate,
        step=found.step if searching else min(found.step**2, LARGEST_STEP),
        hold=min(found.hold, HOLD // 2),
    )


def _usual(found: FoundRate, rate: float, outcomes: Outcomes, now: float) -> FoundRate:
    """Throttles come whatever the load is: more is tried as long as they are no more."""
    sent = found.answered + found.throttled
    if sent < RECENT:
        return found
    if not found.throttled:
        return _raised(replace(found, usual=None), rate, outcomes, now)
    assert found.usual is not None
    if found.answered / sent < WORSE * found.usual:
        if found.lowered:
            return _lowered(replace(found, usual=None, levels=()), rate, now)
        # it was the last step: there is a limit as well
        return _begin(found, now, per_second=rate / 2, too_much=rate, lowered=1)
    if not outcomes.limited:
        return replace(found, since=now, answered=0, throttled=0)
    if found.too_much is None or 2 * rate < found.too_much:
        return _begin(found, now, per_second=2 * rate, lowered=0)
    if found.answered < HOLD:
        return found
    return _begin(found, now, per_second=rate / MARGIN, lowered=0)
