"""How many requests may be in flight: raised while it pays, halved on a throttle."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakKeyDictionary

from embedding_pipeline.embedders.budget import Clock, Sleep
from embedding_pipeline.embedders.port import Endpoint


class Limiter:
    """A window of requests in flight for one endpoint in this process and event loop.

    Additive increase, multiplicative decrease (Chiu and Jain 1989): +1 for each window of
    successes, halved on a throttle, at most once for each round trip.
    """

    def __init__(
        self, ceiling: int, *, sleep: Sleep = asyncio.sleep, clock: Clock = time.monotonic
    ) -> None:
        self.ceiling = ceiling
        self.window = float(min(4, ceiling))
        self.in_flight = 0
        self._sleep, self._clock = sleep, clock
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._paused_until = 0.0
        self._halved_at = float("-inf")

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one of the window's places."""
        while self.in_flight >= int(self.window):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            finally:
                if turn in self._waiting:
                    self._waiting.remove(turn)
        self.in_flight += 1
        try:
            while (wait := self._paused_until - self._clock()) > 0:
                await self._sleep(wait)
            yield
        finally:
            self.in_flight -= 1
            self._wake()

    def succeeded(self) -> None:
        """One request was answered."""
        self.window = min(float(self.ceiling), self.window + 1 / max(1.0, self.window))
        self._wake()

    def throttled(self, started: float, retry_after: float | None) -> None:
        """One request, sent at `started`, was answered 429."""
        if started > self._halved_at:
            self.window = max(1.0, self.window / 2)
            self._halved_at = self._clock()
        if retry_after:
            self._paused_until = max(self._paused_until, self._clock() + retry_after)

    def _wake(self) -> None:
        free = int(self.window) - self.in_flight
        while free > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                free -= 1


_limiters: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], Limiter]] = (
    WeakKeyDictionary()
)


def limiter_for(endpoint: Endpoint) -> Limiter:
    """The limiter that everyone in this event loop shares for one endpoint."""
    limiters = _limiters.setdefault(asyncio.get_running_loop(), {})
    return limiters.setdefault((endpoint.name, endpoint.base_url), Limiter(endpoint.concurrency))
