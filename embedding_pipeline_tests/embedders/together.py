"""Processes that share limits through a database, in virtual time: what `SharedBudget` does, with
its round trips but without the database, a thread or a socket."""

import asyncio
import contextlib
from dataclasses import dataclass, field, replace

from embedding_pipeline.embedders.found_rate import FoundRate, Outcomes, noted
from embedding_pipeline.embedders.timeline import Turns, costs
from embedding_pipeline.store.endpoint_budget import Limits

CHUNK, TRIP, SYNC, HURRIED, HURRIED_SYNC = 0.25, 0.003, 1.0, 0.1, 0.25


@dataclass
class Row:
    """What the database keeps."""

    free_at: float = 0.0
    found: FoundRate = field(default_factory=FoundRate)
    changes: list[tuple[float, float | None]] = field(default_factory=list)
    """When the found rate was changed, and to what."""

    def note(self, outcomes: Outcomes, now: float) -> None:
        after = noted(self.found, outcomes, now)
        if after.generation != self.found.generation:
            self.changes.append((now, after.per_second))
        self.found = after


class Process:
    """One process's `Budget`; `run` does what its thread does."""

    def __init__(self, row: Row, holders: int, limits: Limits) -> None:
        self._row, self._holders, self.limits = row, holders, limits
        self._found = row.found
        self._turns = Turns(CHUNK)
        self._seconds_needed: float | None = None
        self._reserved = asyncio.Event()
        self._hurry = asyncio.Event()
        self._outcomes = Outcomes(0)
        self._limited = False
        self._counted_from = 0.0
        self.ended = False

    @property
    def generation(self) -> int | None:
        return self._found.generation

    @property
    def paced(self) -> bool:
        return bool(self.limits) or self._found.per_second is not None

    @property
    def places_are_not_why(self) -> bool:
        return self._found.measuring or self._found.usual is not None

    async def acquire(self, tokens: int) -> None:
        clock = asyncio.get_running_loop().time
        while self.paced:
            cost = costs(self.limits, tokens, self._found.per_second)
            at = self._turns.take(clock(), *cost)
            if self._turns.short(clock()) and self._seconds_needed is None:
                self._seconds_needed = self._turns.next_chunk(max(cost))
                self._hurry.set()
            if at is not None:
                self._limited = self._limited or at > clock()
                await asyncio.sleep(at - clock())
                return
            self._limited = True
            self._reserved.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reserved.wait(), SYNC)

    def release(self, tokens: int, used: int | None) -> None:
        pass

    def learn(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self.limits = Limits(requests_per_minute, tokens_per_minute)

    def note(self, generation: int, *, answered: bool) -> None:
        if generation != self._outcomes.generation:
            return
        so_far = self._outcomes
        self._outcomes = replace(
            so_far, answered=so_far.answered + answered, throttled=so_far.throttled + (not answered)
        )
        if not answered:
            self._hurry.set()

    async def run(self) -> None:
        clock = asyncio.get_running_loop().time
        synced_at = hurried_at = clock()
        while not self.ended:
            sync_at = synced_at + (HURRIED_SYNC if self._found.measuring else SYNC)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), max(0.0, sync_at - clock()))
            self._hurry.clear()
            await asyncio.sleep(TRIP)
            now = clock()
            if self._seconds_needed is not None:
                begins = max(self._row.free_at, now)
                self._row.free_at = begins + self._seconds_needed
                self._turns.add(begins, self._seconds_needed, self._holders)
                self._seconds_needed = None
                self._take_over()
                self._reserved.set()
            urgent = (
                self._outcomes.throttled or self._found.throttled
            ) and now >= hurried_at + HURRIED
            if urgent or now >= synced_at + (HURRIED_SYNC if self._found.measuring else SYNC):
                synced_at = hurried_at = now
                given = self.limits.requests_per_minute
                outcomes = replace(
                    self._outcomes,
                    seconds=now - self._counted_from,
                    holders=self._holders,
                    limited=self._limited,
                    given=given / 60 if given else None,
                )
                self._row.note(outcomes, now)
                self._counted_from = now
                self._outcomes, self._limited = Outcomes(self._found.generation), False
                self._take_over()
                self._reserved.set()

    def _take_over(self) -> None:
        self._found = self._row.found
        if self._found.generation != self._outcomes.generation:
            self._outcomes = Outcomes(self._found.generation)
            self._counted_from = asyncio.get_running_loop().time()
