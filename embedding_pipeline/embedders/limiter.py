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
- `rate`, requests a second, unknown until a throttle shows that it is limited. It becomes 95 %
  of the rate at which answers came in just before, or half of what it was where that is not
  known yet. After 200 calm answers it is tried 5 % higher, then more. As long as nothing at all
  is answered it falls no further than to a sixteenth: a door that is shut says nothing of how
  many may pass, and what it fell to must not outlast the storm.

Throttles that come whatever the load is are not answered with less load (`Blame`).

Settled, one request in about 200 is throttled, and 94 to 100 % of what the limit allows is
used (simulated for 1 to 200 requests a second, bursts of a tenth of a second to ten seconds,
1 to 16 permits; a server that allows no burst at all at 200 a second is used to 77 %).
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from embedding_pipeline.embedders.blame import Blame
from embedding_pipeline.embedders.budget import Budget, Clock, Sleep
from embedding_pipeline.embedders.port import Endpoint

Permission = Callable[[], Awaitable[None]]

FIRST_WINDOW = 32.0
NARROWEST_START = 4.0
"""What the first answers may narrow the window to."""
MARGIN = 0.95
"""Of the measured limit."""
HOLD = 200
"""Answers without a throttle before more is tried; half as many before the next try."""
SAMPLE = 50
"""Answers that the measured rate is taken from; fewer than 10 do not count."""
DEEPEST_FALL = 16
"""Times that the rate may become lower without one answer in between."""
LOWEST_RATE = 0.5
"""Requests a second; slower than that the requests' own back-off waits."""
CATCH_UP_SECONDS = 0.002
"""How much too early a request may be after one that was late; timers are late by as much."""


@dataclass(frozen=True)
class Sent:
    """A request that the limiter let go."""

    at: float
    beside: int
    """Requests in flight, this one included."""
    generation: int | None = None
    """Of the rate that all processes have found; None: this one finds it."""


class Limiter:
    """For one endpoint in one event loop. First come, first served."""

    def __init__(
        self, ceiling: int, *, sleep: Sleep = asyncio.sleep, clock: Clock = time.monotonic
    ) -> None:
        self.ceiling = float(ceiling)
        self.window = min(FIRST_WINDOW, self.ceiling)
        self.rate: float | None = None
        self.in_flight = 0
        self._sleep, self._clock = sleep, clock
        self._queued = 0
        self._waited_for_place = self._waited_for_rate = False
        self._line = asyncio.Lock()
        self._freed = asyncio.Event()
        self._latency: float | None = None
        self._next_send = self._paused_until = self._reacted_at = -math.inf
        self._answered_at: deque[float] = deque(maxlen=SAMPLE)
        self._failures_in_a_row = 0
        # the window, once a throttle has shown that places are limited
        self._places_limited = False
        self._most_beside = 0
        self._places_calm = 0
        self._places_step = 1
        # the rate, once a throttle has shown that it is limited
        self._bad_rate = math.inf
        self._rate_when_answered = math.inf
        self._rate_calm = 0
        self._rate_step = 1 / MARGIN
        self._search = _Search()
        self._blame = Blame()
        self._budget: Budget | None = None

    def follow(self, budget: Budget) -> None:
        """Leave the rate to a budget, as long as it finds one for all processes."""
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
                shared = None if self._budget is None else self._budget.generation
                if shared is not None:
                    self.rate = None
                return Sent(now, self.in_flight, shared)
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
            self._waited_for_rate = self._waited_for_rate or self._next_send > self._paused_until
            await self._sleep(wait)

    def _gap(self) -> float:
        if self.rate is not None:
            return 1 / self.rate
        if self._places_limited and self._latency is not None:
            # spread over the round trip, so that a limit on the rate is not mistaken for places
            return 0.8 * self._latency / self.window
        return 0.0

    def succeeded(self, sent: Sent) -> None:
        """The request was answered."""
        now = self._clock()
        took = now - sent.at
        self._latency = took if self._latency is None else 0.9 * self._latency + 0.1 * took
        self._most_beside = max(self._most_beside, sent.beside)
        self._failures_in_a_row = 0
        if sent.generation is not None and self._budget is not None:
            self._budget.note(sent.generation, answered=True)
        else:
            self._answered_at.append(now)
            self._blame.note(answered=True, now=now)
        if self._places_limited:
            self._try_more_places()
        elif self.rate is None:
            # who waits for a rate does not wait for a place
            queued = self._queued > 0 and not (self._budget is not None and self._budget.paced)
            full = queued or self.in_flight >= self.window
            searched = self._search.next(self.window, self.ceiling, full, sent.at, now)
            self.window = min(self.ceiling, searched)
        if self.rate is not None:
            self._rate_when_answered = self.rate
            self._try_higher_rate(self.rate)
        self._freed.set()

    def throttled(self, sent: Sent, retry_after: float | None) -> None:
        """The request was answered 429; `retry_after` holds everyone back."""
        now = self._clock()
        self._failures_in_a_row = 0
        if retry_after:
            self._paused_until = max(self._paused_until, now + retry_after)
        if sent.generation is not None and self._budget is not None:
            self._throttled_together(sent, sent.generation, self._budget, now)
            return
        self._blame.note(answered=False, now=now)
        if sent.at <= self._reacted_at:
            return  # sent before the last throttle was known: the same event
        if self._blame.unexplained:
            if self.rate is not None and self._waited_for_rate and self._blame.tried:
                self._waited_for_rate = False
                self.rate *= 2
                self._bad_rate = self.rate / MARGIN
            return
        if self._blame.too_early(now):
            return
        self._reacted_at = now
        if (heavier := self._blame.heavier_and_as_good(now, self.window)) is not None:
            self.rate, self.window = heavier.load, max(self.window, heavier.window)
            self._bad_rate, self._rate_calm, self._rate_step = heavier.load / MARGIN, 0, 1 / MARGIN
            self._places_limited = False
            return
        if sent.beside > 1 and self._most_beside < sent.beside:
            self.window = float(sent.beside - 1)
            self._places_limited = True
            self._places_calm, self._places_step = 0, 1
            return
        if not self._places_limited:
            self.window = self.ceiling
        latency = self._latency or max(now - sent.at, 0.001)
        before = self.rate or self.window / latency
        lower = before / 2
        if len(self._answered_at) >= 10 and now > self._answered_at[0]:
            measured = (len(self._answered_at) - 1) / (now - self._answered_at[0])
            lower = max(lower, MARGIN * min(measured, before))
        if self.rate is None:
            self._rate_when_answered = before
        lowest = max(self._rate_when_answered / DEEPEST_FALL, LOWEST_RATE)
        self.rate = min(before, max(lower, lowest))
        if self._answered_at or self._bad_rate == math.inf:
            self._bad_rate = before  # else it is still the one that the silence began at
        self._rate_calm, self._rate_step = 0, 1 / MARGIN
        self._most_beside = 0
        self._answered_at.clear()

    def _throttled_together(self, sent: Sent, generation: int, budget: Budget, now: float) -> None:
        """The same where the rate is found by all processes: only places are judged here."""
        if sent.at <= self._reacted_at:
            return
        if budget.places_are_not_why:
            self.window, self._places_limited = self.ceiling, False
        elif sent.beside > 1 and self._most_beside < sent.beside:
            self._reacted_at = now
            self.window = float(sent.beside - 1)
            self._places_limited = True
            self._places_calm, self._places_step = 0, 1
            return
        budget.note(generation, answered=False)

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
        if not self._waited_for_place:
            return  # not what holds us back
        self._waited_for_place = False
        self._places_calm += 1
        if self._places_calm >= HOLD:
            self._places_calm = HOLD // 2
            self.window = min(self.ceiling, self.window + self._places_step)
            self._places_step *= 2

    def _try_higher_rate(self, rate: float) -> None:
        if not self._waited_for_rate:
            return
        self._waited_for_rate = False
        self._rate_calm += 1
        known_good = MARGIN * self._bad_rate
        if rate < known_good:
            # lowered by more than was needed: back, but not to where it was too much
            if self._rate_calm % 10 == 0:
                self.rate = min(1.15 * rate, known_good)
        elif self._rate_calm >= HOLD:
            self._rate_calm = HOLD // 2
            self.rate = rate * self._rate_step
            self._bad_rate = self.rate / MARGIN
            self._rate_step = min(self._rate_step**2, 2.0)


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
        self._answers = 0
        self._rest = 0

    def next(self, window: float, ceiling: float, full: bool, sent: float, now: float) -> float:
        """The window after one more answer, to a request that was sent then."""
        if self._first is not None:
            return self._measured(window, full, sent, now)
        if not full:
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
