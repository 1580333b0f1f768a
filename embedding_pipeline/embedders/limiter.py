"""How much an endpoint is asked for at once: raised while it pays, lowered on a throttle.

Two things can be limited at the other end, and an answer 429 does not say which: how many
requests are in flight (TEI's permits), or how many arrive in a second (most APIs). The limiter
has a control for each:

- `window`, the places for requests in flight. It begins as wide as is allowed, up to
  `FIRST_WINDOW`, because every doubling of a narrow one costs a run two round trips; the first
  answers then say how many requests the endpoint really works on at once (its rate of answers
  times the time that an unhindered one takes), and twice that is kept. From there it doubles while
  the rate of answers rises with it, and is tried a quarter wider (or a fifth narrower) now and
  then. A throttle with more requests in flight than were ever answered side by side closes the
  place that was too many.
- the rate, requests a second: unknown until a throttle shows that it is limited, then found by
  the `Budget`, which hears of every answer and every throttle that is not for places (see
  `found_rate`).
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from embedding_pipeline.embedders.budget import Budget, Clock, Sleep
from embedding_pipeline.embedders.port import Endpoint

Permission = Callable[[], Awaitable[None]]

FIRST_WINDOW = 32.0
NARROWEST_START = 4.0
"""What the first answers may narrow the window to."""
HOLD, FIRST_HOLD = 200, 16
"""Answers without a throttle before more is tried; half as many before the next try. The first
time sooner: what a single event has shown is a guess."""
CATCH_UP_SECONDS = 0.002
"""How much too early a request may be after one that was late; timers are late by as much."""


@dataclass(frozen=True)
class Sent:
    """A request that the limiter let go."""

    at: float
    beside: int
    """Requests in flight, this one included."""
    generation: int
    """Of the rate that was found."""


class Limiter:
    """For one endpoint in one event loop. First come, first served."""

    def __init__(
        self, ceiling: int, *, sleep: Sleep = asyncio.sleep, clock: Clock = time.monotonic
    ) -> None:
        self.ceiling = float(ceiling)
        self.window = min(FIRST_WINDOW, self.ceiling)
        self.in_flight = 0
        self._sleep, self._clock = sleep, clock
        self._queued = 0
        self._waited_for_place = False
        self._line = asyncio.Lock()
        self._freed = asyncio.Event()
        self._latency: float | None = None
        self._next_send = self._paused_until = -math.inf
        self._failures_in_a_row = 0
        # the window, once a throttle has shown that places are limited
        self._places_limited = False
        self._most_beside = 0
        self._places_calm = 0
        self._places_step = 1
        self._places_hold = FIRST_HOLD
        self._crowded_at = -math.inf
        self._search = _Search()
        self._budget: Budget | None = None

    def follow(self, budget: Budget) -> None:
        """Tell it what is answered and what is throttled: it finds a limit on the rate."""
        self._budget = budget

    def lower_ceiling(self, ceiling: int) -> None:
        """The endpoint says that it takes fewer at once."""
        self.ceiling = min(self.ceiling, float(ceiling))
        self.window = min(self.window, self.ceiling)

    async def enter(self, permission: Permission | None = None) -> Sent:
        """Wait for a place and for the rate, then hold the place until `leave`.

        `permission` is awaited by whoever is first in line, so that nobody draws on a shared
        budget long before sending.
        """
        self._queued += 1
        try:
            async with self._line:
                if permission is not None:
                    await permission()
                now = await self._turn()
                self.in_flight += 1
                gap = self._gap()
                late = min(CATCH_UP_SECONDS, gap / 4)
                self._next_send = max(now - late, self._next_send) + gap
                generation = 0
                if self._budget is not None:
                    generation = self._budget.generation
                    self._budget.note(generation, "sent")
                return Sent(now, self.in_flight, generation)
        finally:
            self._queued -= 1

    def leave(self) -> None:
        """Give the place back."""
        self.in_flight -= 1
        self._freed.set()

    async def _turn(self) -> float:
        while True:
            if self.in_flight >= max(1, math.ceil(self.window)):
                self._waited_for_place = True
                self._freed.clear()
                await self._freed.wait()
                continue
            now = self._clock()
            wait = max(self._next_send, self._paused_until) - now
            if wait <= 0:
                return now
            await self._sleep(wait)

    def _gap(self) -> float:
        if self._places_limited and self._latency is not None:
            # spread over the round trip, so that a limit on the rate is not mistaken for places
            return 0.8 * self._latency / self.window
        return 0.0

    def succeeded(self, sent: Sent) -> None:
        """The request was answered."""
        now = self._clock()
        took = now - sent.at
        self._latency = took if self._latency is None else 0.9 * self._latency + 0.1 * took
        # more were sent than there are places now: nobody knows how many of them were let in
        self._most_beside = max(self._most_beside, min(sent.beside, math.ceil(self.window)))
        self._failures_in_a_row = 0
        if self._budget is not None:
            self._budget.note(sent.generation, "answered")
        waited, self._waited_for_place = self._waited_for_place, False
        if self._places_limited:
            if waited:
                self._try_more_places()
        else:
            # who waits for a rate does not wait for a place
            queued = self._queued > 0 and not (self._budget is not None and self._budget.paced)
            full = waited or queued or self.in_flight >= self.window
            searched = self._search.next(self.window, self.ceiling, full, sent.at, now)
            self.window = min(self.ceiling, searched)
        self._freed.set()

    def throttled(self, sent: Sent, retry_after: float | None) -> None:
        """The request was answered 429; `retry_after` holds everyone back."""
        now = self._clock()
        self._failures_in_a_row = 0
        if retry_after:
            self._paused_until = max(self._paused_until, now + retry_after)
        if self._places_limited and sent.at <= self._crowded_at:
            self._close_another_place()
            if self._places_limited:
                return
        elif self._budget is not None and self._budget.places_are_not_why:
            self.window, self._places_limited = self.ceiling, False
        elif self._too_many(sent, now):
            return
        if self._budget is not None:
            self._budget.note(sent.generation, "throttled")

    def _too_many(self, sent: Sent, now: float) -> bool:
        """Whether more were in flight than were ever answered side by side; then one place fewer.

        Requests arrive in another order than they were sent in: the one that is refused may have
        been the second to leave and the last to arrive.
        """
        crowd = max(sent.beside, self.in_flight)
        if crowd < 2 or crowd <= self._most_beside:
            return False
        self._places_hold = HOLD if self._places_limited else FIRST_HOLD
        self.window = float(crowd - 1)
        self._places_limited = True
        self._crowded_at = now
        self._places_calm, self._places_step = 0, 1
        return True

    def _close_another_place(self) -> None:
        """One more of a crowd was refused. If that leaves none, it is not places that are
        limited: one is always let in."""
        if self.window > 1:
            self.window -= 1
            return
        self.window, self._places_limited = self.ceiling, False
        self._most_beside = math.ceil(self.ceiling)

    def failed(self, retry_after: float | None = None) -> None:
        """No answer, or 5xx. As many failures in a row as there are places halve the window.

        One failure in between answers does not: it says nothing about load.
        """
        if retry_after:
            self._paused_until = max(self._paused_until, self._clock() + retry_after)
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= max(NARROWEST_START, self.window):
            self._failures_in_a_row = 0
            self.window = max(1.0, self.window / 2)
            self._places_limited = False
            self._search = _Search()

    def _try_more_places(self) -> None:
        self._places_calm += 1
        if self._places_calm >= self._places_hold:
            self._places_calm = self._places_hold // 2
            self.window = min(self.ceiling, self.window + self._places_step)
            self._places_step *= 2


class _Search:
    """The window that pays: measured once, then by comparing the rate of answers before and after
    a change.

    A change is judged over two windows' worth of answers, and only while requests wait for a
    place: an idle endpoint says nothing.
    """

    WIDER, A_BIT_WIDER, NARROWER = 2.0, 1.25, 0.8
    ROUNDS_BETWEEN_TRIES = 8

    def __init__(self) -> None:
        self._factor = self.WIDER
        self._first: list[float] | None = []
        self._first_sent = math.inf
        self._before: tuple[float, float] | None = None
        self._round_began: float | None = None
        self._answers = self._not_full = 0
        self._rest = 0

    def next(self, window: float, ceiling: float, full: bool, sent: float, now: float) -> float:
        """The window after one more answer, to a request that was sent then."""
        if self._first is not None:
            return self._measured(window, full, sent, now)
        # who waits gets the first place that is free; the others may be free for a moment
        self._not_full = 0 if full else self._not_full + 1
        if self._not_full > window:
            self._round_began = None
            return window
        if self._round_began is None:
            self._round_began, self._answers = now, 0
            return window
        self._answers += 1
        if self._answers < max(8, 2 * window):
            return window
        rate = self._answers / max(1e-9, now - self._round_began)
        self._round_began, self._answers = now, 0
        if self._rest > 0:
            self._rest -= 1
            return window
        if self._before is None:
            return self._change(window, ceiling, rate)
        window_before, rate_before = self._before
        if window > window_before:
            # a third of the gain that would be proportional
            pays = rate >= rate_before * (1 + 0.35 * (window / window_before - 1))
        else:
            pays = rate >= 0.97 * rate_before
        if pays and window > window_before:
            return self._change(window, ceiling, rate)
        if self._factor == self.WIDER:
            # twice as many do not pay, perhaps some more do
            self._before, self._factor = None, self.A_BIT_WIDER
        else:
            self._settle()
        return window if pays else window_before

    def _measured(self, window: float, full: bool, sent: float, now: float) -> float:
        """After the first windowful of answers: twice as many as were worked on at once."""
        assert self._first is not None
        if not full and len(self._first) < window / 2:
            return window  # not put to the test yet
        self._first_sent = min(self._first_sent, sent)
        self._first.append(now - sent)
        if len(self._first) < window:
            return window
        rate = len(self._first) / max(1e-9, now - self._first_sent)
        # the quickest waited for nobody; a tenth of them, for one may be quick by chance
        unhindered = sorted(self._first)[len(self._first) // 10]
        self._first = None
        return min(window, max(NARROWEST_START, math.ceil(2 * rate * unhindered)))

    def _change(self, window: float, ceiling: float, rate: float) -> float:
        changed = max(1.0, min(ceiling, window * self._factor))
        if changed == window:
            self._settle()
        else:
            self._before = (window, rate)
        return changed

    def _settle(self) -> None:
        self._before = None
        self._rest = self.ROUNDS_BETWEEN_TRIES
        self._factor = self.NARROWER if self._factor == self.A_BIT_WIDER else self.A_BIT_WIDER


_limiters: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], Limiter]] = (
    WeakKeyDictionary()
)


def limiter_for(endpoint: Endpoint, model: str) -> Limiter:
    """The limiter that everyone in this event loop shares for what is limited together."""
    limiters = _limiters.setdefault(asyncio.get_running_loop(), {})
    limiter = limiters.setdefault(
        (endpoint.counted_as(model), endpoint.base_url), Limiter(endpoint.concurrency)
    )
    limiter.lower_ceiling(endpoint.concurrency)
    return limiter
