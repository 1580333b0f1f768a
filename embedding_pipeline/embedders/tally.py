"""What one process counts of its requests, for the rate that throttles show (`found_rate`)."""

import math
from dataclasses import replace
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
        self._outcomes = Outcomes(self.found.generation)
        self._counted_from = self._added_at = now

    def note(self, generation: int, event: Event) -> bool:
        """What happened to a request; True: the first throttle, which is to be added soon."""
        so_far = self._outcomes
        if generation != so_far.generation:
            return False
        self._outcomes = replace(so_far, **{event: getattr(so_far, event) + 1})
        return event == "throttled" and not so_far.throttled

    def waited(self) -> None:
        """A request waited for the rate."""
        if not self._outcomes.limited:
            self._outcomes = replace(self._outcomes, limited=True)

    @property
    def due_at(self) -> float:
        """When the outcomes are to be added; infinity: they would tell nothing."""
        if self._outcomes.throttled or (self.found.judging and not self.found.measuring):
            return self._added_at + THROTTLED_SECONDS
        if not self.found.active:
            return math.inf
        return self._added_at + (HURRIED_SECONDS if self.found.hurried else CALM_SECONDS)

    def collect(self, now: float, holders: int, given: float | None) -> Outcomes:
        """The outcomes, as they are to be added; counting begins anew.

        `holders`: processes that count. `given`: requests a second, where the limit is known.
        """
        outcomes = replace(
            self._outcomes, seconds=now - self._counted_from, holders=holders, given=given
        )
        self._outcomes, self._counted_from = Outcomes(outcomes.generation), now
        self._added_at = now
        return outcomes

    def take_over(self, found: FoundRate, now: float) -> None:
        """What is known now."""
        if found.generation != self.found.generation:
            self._outcomes, self._counted_from = Outcomes(found.generation), now
        self.found = found
