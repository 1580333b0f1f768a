"""How many requests and tokens a minute an endpoint may be asked for.

`Budget` is the seam: `TokenBucket` counts in this process; a shared one (a row in Postgres) can
take its place without the engine noticing. Both also find a rate that nobody tells (`found_rate`).
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from embedding_pipeline.embedders.found_rate import FoundRate, noted
from embedding_pipeline.embedders.port import Endpoint
from embedding_pipeline.embedders.tally import Event, Tally

Sleep = Callable[[float], Awaitable[None]]
Clock = Callable[[], float]


class Budget(Protocol):
    """A ceiling per minute that everyone who asks this endpoint draws from."""

    async def acquire(self, tokens: int) -> None:
        """Wait until one request of so many (estimated) tokens may be sent."""
        ...

    def release(self, tokens: int, used: int | None) -> None:
        """That request has ended, once for each `acquire` that returned.

        `used` is the provider's count of its tokens: 0 when it was not sent after all, None when
        it failed and nobody knows.
        """
        ...

    def learn(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        """Take over limits that the provider named in an answer; what the YAML sets stays."""
        ...

    @property
    def generation(self) -> int:
        """Which rate holds now, of those that were found by being throttled."""
        ...

    @property
    def paced(self) -> bool:
        """Whether requests wait for a rate here."""
        ...

    @property
    def places_are_not_why(self) -> bool:
        """Whether it is known, or being found out, that something else than requests in flight is
        limited."""
        ...

    def note(self, generation: int, event: Event) -> None:
        """What happened to a request of this generation."""
        ...


SHARE = 0.98
"""Of a limit that is drawn: the provider's clock and count are not ours."""

BURST_SECONDS = 0.05
"""How much may be drawn at once after a pause. Limits per minute are enforced over less than a
minute: OpenAI's rate-limit guide says that 60,000 may mean 1,000 a second."""


class _Bucket:
    """Fills evenly up to a burst; may go below zero, a debt that later requests wait for."""

    def __init__(self, rate: float, now: float) -> None:
        self.rate = rate
        self._burst = max(1.0, rate * BURST_SECONDS)
        self._level = self._burst
        self._filled_at = now

    def wait_for(self, amount: float, now: float) -> float:
        """Seconds until so much may be used; more than the burst only needs a full bucket."""
        level = self._level + (now - self._filled_at) * self.rate
        return max(0.0, (min(amount, self._burst) - level) / self.rate)

    def draw(self, amount: float, at: float) -> None:
        """Take the amount at a time that may lie ahead."""
        level = self._level + (at - self._filled_at) * self.rate
        self._level, self._filled_at = min(self._burst, level) - amount, at

    def give_back(self, amount: float) -> None:
        """Correct what was drawn; a negative amount draws more."""
        self._level += amount


class TokenBucket:
    """Requests and tokens a minute, counted in this process (any thread, any event loop)."""

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        *,
        found: FoundRate | None = None,
        sleep: Sleep = asyncio.sleep,
        clock: Clock = time.monotonic,
    ) -> None:
        self._sleep, self._clock = sleep, clock
        self._lock = threading.Lock()
        self._learns = (requests_per_minute is None, tokens_per_minute is None)
        self._requests = self._renewed(None, _a_second(requests_per_minute))
        self._tokens = self._renewed(None, _a_second(tokens_per_minute))
        self._tally = Tally(found, clock())
        self._found = self._renewed(None, self._tally.found.per_second)

    async def acquire(self, tokens: int) -> None:
        """First come, first served: each waits for the debt that it finds."""
        with self._lock:
            drawn = [(self._requests, 1), (self._tokens, tokens), (self._found, 1)]
            now = self._clock()
            waits = [bucket.wait_for(amount, now) for bucket, amount in drawn if bucket]
            wait = max(waits, default=0.0)
            for bucket, amount in drawn:
                if bucket:
                    bucket.draw(amount, now + wait)
            if wait > 0:
                self._tally.waited()
        if wait > 0:
            await self._sleep(wait)

    def release(self, tokens: int, used: int | None) -> None:
        """Correct the tokens by the provider's own count."""
        if used is None:
            return
        with self._lock:
            if self._tokens is not None:
                self._tokens.give_back(tokens - used)

    def learn(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        """Fill the gaps that the YAML leaves; a changed limit replaces what was learnt."""
        with self._lock:
            if self._learns[0] and requests_per_minute:
                self._requests = self._renewed(self._requests, _a_second(requests_per_minute))
            if self._learns[1] and tokens_per_minute:
                self._tokens = self._renewed(self._tokens, _a_second(tokens_per_minute))

    @property
    def generation(self) -> int:
        """See `Budget.generation`."""
        return self._tally.found.generation

    @property
    def paced(self) -> bool:
        """See `Budget.paced`."""
        return any(bucket is not None for bucket in (self._requests, self._tokens, self._found))

    @property
    def places_are_not_why(self) -> bool:
        """See `Budget.places_are_not_why`."""
        return self._tally.found.places_are_not_why

    def note(self, generation: int, event: Event) -> None:
        """See `Budget.note`."""
        with self._lock:
            self._tally.note(generation, event)
            now = self._clock()
            if now >= self._tally.due_at:
                given = self._requests.rate if self._requests is not None else None
                outcomes = self._tally.collect(now, 1, given)
                self._tally.take_over(noted(self._tally.found, outcomes, now), now)
                self._found = self._renewed(self._found, self._tally.found.per_second)

    def _renewed(self, bucket: _Bucket | None, rate: float | None) -> _Bucket | None:
        if rate is None:
            return None
        same = bucket is not None and bucket.rate == rate
        return bucket if same else _Bucket(rate, self._clock())


def _a_second(per_minute: int | None) -> float | None:
    return SHARE * per_minute / 60 if per_minute else None


_lock = threading.Lock()
_budgets: dict[tuple[str, str], Budget] = {}


def budget_for(endpoint: Endpoint, model: str) -> Budget:
    """The budget that everyone in this process shares for what is limited together."""
    with _lock:
        return _budgets.setdefault(
            (endpoint.counted_as(model), endpoint.base_url),
            TokenBucket(endpoint.requests_per_minute, endpoint.tokens_per_minute),
        )
