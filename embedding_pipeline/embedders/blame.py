"""Whether it is our own load that is being throttled, or whether throttles come whatever we do.

At a limit, what is too much is refused: asked for as much as was let in before, an endpoint lets
in everything. Where it refuses the same share again and again, however often less was asked for,
asking for less only loses what would have been answered: a gateway that turns away three requests
in ten drove a run down to one request every two seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

TIMES, TIMES_A_FEW = 3, 4
"""In a row the share must be about the same; more often where it is small."""
A_FEW = 0.1
ABOUT = 2.5
"""Times that the largest of them may be the smallest."""
TELLING = 0.25
"""Of the requests must be let in: of fewer nothing is concluded, for little is known of what
would be let in."""
RECENT = 60
"""Requests whose share of answers is compared with the one that we put up with."""


@dataclass(frozen=True)
class Level:
    """How a load was answered: requests a second, and the share that was let in."""

    load: float
    share: float


def whatever_the_load(levels: Sequence[Level]) -> Level | None:
    """The heaviest of the last loads, each lighter than the one before, if that did not help."""
    times = TIMES if levels and levels[-1].share < 1 - A_FEW else TIMES_A_FEW
    last = list(levels)[-times:]
    refused = [1 - level.share for level in last]
    if len(last) < times or max(refused) > min(1 - TELLING, ABOUT * min(refused)):
        return None
    return Level(last[0].load, 1 - sum(refused) / times)


def is_worse(share: float, usual: float) -> bool:
    """Whether clearly less is let in than usual: then something else is limited as well."""
    return share < 0.75 * usual or 1 - share > 2 * (1 - usual) + 0.05
