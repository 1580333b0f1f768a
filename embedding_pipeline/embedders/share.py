"""What one process has of an endpoint's limits, and when it has to talk to the others about them.

No lock, no clock, no database: `SharedBudget` brings these, and simulations their own.
"""

import math
from typing import Literal

from embedding_pipeline.embedders.tally import Tally
from embedding_pipeline.embedders.timeline import Turns, costs, per_second
from embedding_pipeline.store.endpoint_budget import Allotment, Limits, Shared, allot

CHUNK_SECONDS = 0.25
"""Of the timeline, reserved at once by a process that is busy."""
SYNC_SECONDS = 1.0
HURRIED_SYNC_SECONDS = 0.25
"""The same while others hold what is this process's share, or a rate is looked for."""

Task = Literal["sync", "note", "reserve"]


class Share:
    """Places for requests in flight, turns on the timeline, and what became of the requests."""

    def __init__(self, ceiling: int, given: Limits) -> None:
        self.ceiling = ceiling
        self.holders = 1
        """Processes that share the limits."""
        self.in_flight = 0
        self.turns = Turns(CHUNK_SECONDS)
        self.tally = Tally()
        self.to_tell: Limits | None = None
        """What a provider said, and nobody else knows yet."""
        self._given, self._learnt = given, Limits()
        self._places: int | None = None
        self._most_in_flight = 0
        self._short_of_places = self._hurry = True
        self._seconds_needed: float | None = None
        self._synced_at = -math.inf

    @property
    def limits(self) -> Limits:
        """What is kept: the YAML's limits, and where it has none what a provider has said."""
        return Limits(
            self._given.requests_per_minute or self._learnt.requests_per_minute,
            self._given.tokens_per_minute or self._learnt.tokens_per_minute,
        )

    @property
    def paced(self) -> bool:
        """Whether requests wait for a rate."""
        return bool(self.limits) or self.tally.found.per_second is not None

    @property
    def requests_a_second(self) -> float | None:
        """Of the limit that the YAML or the provider tells."""
        per_minute = self.limits.requests_per_minute
        return per_second(per_minute) if per_minute else None

    def learn(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        """A provider named its limits."""
        heard = Limits(
            requests_per_minute or self._learnt.requests_per_minute,
            tokens_per_minute or self._learnt.tokens_per_minute,
        )
        if heard != self._learnt:
            self._learnt = self.to_tell = heard

    def heard(self, learnt: Limits) -> None:
        """Somebody told the others what a provider said."""
        if learnt and self.to_tell is None:
            self._learnt = learnt

    # ---- places ------------------------------------------------------------------------------

    def has_place(self, *, alone: bool = False) -> bool:
        """Whether one more request may be in flight; `alone`: the others cannot be asked."""
        places = self._places
        if alone:
            places = self.ceiling if places is None else max(1, places)
        if places is not None and self.in_flight < places:
            return True
        if not self._short_of_places:
            self._short_of_places = self._hurry = True
        return False

    def enter(self) -> None:
        """One more request is in flight."""
        self.in_flight += 1
        self._most_in_flight = max(self._most_in_flight, self.in_flight)

    def leave(self, tokens: int, used: int | None) -> None:
        """One has ended; the provider counted so many tokens where so many were estimated."""
        self.in_flight -= 1
        limit = self.limits.tokens_per_minute
        if used is not None and limit:
            self.turns.correct_tokens((used - tokens) / per_second(limit))

    def claim(self, holder: str, shared: Shared) -> Allotment:
        """The places to hold from now on. Those to be given back are not used any more."""
        wanted = self.ceiling
        if not self._short_of_places:
            wanted = min(wanted, math.ceil(1.25 * self._most_in_flight) + 1)
        mine = allot(holder, wanted, self.in_flight, self.ceiling, shared)
        if self._places is not None:
            self._places = min(mine.allowed, self._places)
        return mine

    def claimed(self, mine: Allotment, holders: int, now: float) -> None:
        """The others know of it."""
        self._places, self.holders = mine.allowed, holders
        self._short_of_places = self.in_flight >= mine.allowed
        self._hurry = mine.allowed < mine.fair
        self._most_in_flight = self.in_flight
        self.synced(now)

    def synced(self, now: float) -> None:
        """What the others hold and know was asked for."""
        self._synced_at = now

    # ---- turns -------------------------------------------------------------------------------

    def turn(self, tokens: int, now: float) -> float | None:
        """When a request may be sent by what is reserved; None: something has to be, first."""
        if not self.paced:
            return now
        by_requests, by_tokens = costs(self.limits, tokens, self.tally.found.per_second)
        at = self.turns.take(now, by_requests, by_tokens)
        if at is None or at > now:
            self.tally.waited()
        if self._seconds_needed is None and self.turns.short(now):
            self._seconds_needed = self.turns.next_chunk(max(by_requests, by_tokens))
        return at

    @property
    def seconds_needed(self) -> float:
        """Of the timeline, to be reserved."""
        return self._seconds_needed or CHUNK_SECONDS

    def reserved(self, start: float, seconds: float) -> None:
        """They were, and begin then."""
        self.turns.add(start, seconds, self.holders)
        self._seconds_needed = None

    def forget_turns(self) -> None:
        """Nothing that was reserved holds any more."""
        self.turns.clear()
        self._seconds_needed = None

    # ---- what to do about it -----------------------------------------------------------------

    def begin(self) -> None:
        """It takes part again after a pause: everything has to be asked for anew."""
        self._places = None
        self._synced_at = -math.inf
        self._short_of_places = self._hurry = True
        self.forget_turns()

    @property
    def urgent(self) -> int:
        """How much there is that the next task should not be waited for."""
        return self._hurry + (self._seconds_needed is not None)

    def next_task(self, now: float) -> tuple[Task | None, float]:
        """What is to be done now, or nothing for so many seconds."""
        hurry = self._hurry or self.tally.found.hurried
        sync_at = self._synced_at + (HURRIED_SYNC_SECONDS if hurry else SYNC_SECONDS)
        if now >= sync_at:
            return "sync", 0.0
        if self._seconds_needed is not None:
            return "reserve", 0.0
        note_at = self.tally.due_at
        return ("note", 0.0) if now >= note_at else (None, min(sync_at, note_at) - now)
