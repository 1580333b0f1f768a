"""What one process counts of its requests, for the rate that throttles show (`found_rate`)."""

import math
from typing import Literal

from embedding_pipeline.embedders.found_rate import FoundRate, Outcomes

THROTTLED_SECONDS = 0.1
"""Between two additions of outcomes while something is throttled."""
HURRIED_SECONDS = 0.25
"""The same while the rate is being looked for."""
CALM_SECONDS = 1.0


Event = Literal["sent", "answered", "throttled"]


class Tally:
    """The outcomes since they were last added, and what was found when they were."""

    def __init__(self, found: FoundRate | None = None, now: float = -math.inf) -> None:
        self.found = found or FoundRate()
        self._counts: dict[Event, int] = {"sent": 0, "answered": 0, "throttled": 0}
        self._waited = False
        self._counted_from = self._added_at = now

    def note(self, generation: int, event: Event) -> bool:
        """What happened to a request; True: the first throttle, which is to be added soon."""
        if generation != self.found.generation:
            return False
        self._counts[event] += 1
        return event == "throttled" and self._counts[event] == 1

    def waited(self) -> None:
        """A request waited for the rate."""
        self._waited = True

    @property
    def due_at(self) -> float:
        """When the outcomes are to be added; infinity: they would tell nothing."""
        found = self.found
        if self._counts["throttled"] or (found.judging and not found.measuring):
            return self._added_at + THROTTLED_SECONDS
        if not found.active:
            return math.inf
        return self._added_at + (HURRIED_SECONDS if found.hurried else CALM_SECONDS)

    def collect(self, now: float, holders: int, given: float | None) -> Outcomes:
        """The outcomes, as they are to be added; counting begins anew.

        `holders`: processes that count. `given`: requests a second, where the limit is known.
        """
        outcomes = Outcomes(
            self.found.generation,
            **self._counts,
            seconds=now - self._counted_from,
            holders=holders,
            limited=self._waited,
            given=given,
        )
        self._begin(now)
        self._added_at = now
        return outcomes

    def take_over(self, found: FoundRate, now: float) -> None:
        """What is known now."""
        if found.generation != self.found.generation:
            self._begin(now)
        self.found = found

    def _begin(self, now: float) -> None:
        self._counts = dict.fromkeys(self._counts, 0)
        self._waited, self._counted_from = False, now
