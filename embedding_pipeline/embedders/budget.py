"""How many requests and tokens a minute an endpoint may be asked for.

`Budget` is the seam: `TokenBucket` counts in this process; a shared one (a row in Postgres) can
take its place without the engine noticing.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from embedding_pipeline.embedders.port import Endpoint

Sleep = Callable[[float], Awaitable[None]]
Clock = Callable[[], float]


class Budget(Protocol):
    """A ceiling per minute that everyone who asks this endpoint draws from."""

    async def acquire(self, tokens: int) -> None:
        """Wait until one request of so many (estimated) tokens may be sent."""
        ...

    def settle(self, estimated: int, used: int) -> None:
        """Give back, or draw later, what the estimate was wrong by."""
        ...

    def learn(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        """Take over limits that the provider named in its headers, where none were set."""
        ...


class _Bucket:
    """Fills at `per_minute`/60 a second up to `burst`; may go below zero (a debt)."""

    def __init__(self, per_minute: float, burst_seconds: float, now: float) -> None:
        self.rate = per_minute / 60
        self.burst = max(1.0, self.rate * burst_seconds)
        self.level = self.burst
        self.filled_at = now

    def fill(self, now: float) -> None:
        self.level = min(self.burst, self.level + (now - self.filled_at) * self.rate)
        self.filled_at = now

    def wait_for(self, amount: float) -> float:
        """Seconds until `amount` is there; more than the burst only needs a full bucket."""
        return max(0.0, (min(amount, self.burst) - self.level) / self.rate)


class TokenBucket:
    """Requests and tokens a minute, counted in this process (any thread, any event loop)."""

    def __init__(
        self,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        *,
        burst_seconds: float = 1.0,
        sleep: Sleep = asyncio.sleep,
        clock: Clock = time.monotonic,
    ) -> None:
        self._sleep, self._clock, self._burst_seconds = sleep, clock, burst_seconds
        self._lock = threading.Lock()
        self._fixed = (requests_per_minute is not None, tokens_per_minute is not None)
        self._requests = self._bucket(requests_per_minute)
        self._tokens = self._bucket(tokens_per_minute)

    def _bucket(self, per_minute: int | None) -> _Bucket | None:
        return _Bucket(per_minute, self._burst_seconds, self._clock()) if per_minute else None

    async def acquire(self, tokens: int) -> None:
        """Wait for the place in the queue: first come, first served, by debt."""
        with self._lock:
            wait, now = 0.0, self._clock()
            for bucket, amount in ((self._requests, 1.0), (self._tokens, float(tokens))):
                if bucket is not None:
                    bucket.fill(now)
                    wait = max(wait, bucket.wait_for(amount))
                    bucket.level -= amount
        if wait > 0:
            await self._sleep(wait)

    def settle(self, estimated: int, used: int) -> None:
        """Correct the token bucket by the provider's own count."""
        with self._lock:
            if self._tokens is not None:
                self._tokens.level += estimated - used

    def learn(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        """What the YAML sets stays; what the headers say fills the gaps."""
        with self._lock:
            if requests_per_minute and not self._fixed[0] and self._requests is None:
                self._requests = self._bucket(requests_per_minute)
            if tokens_per_minute and not self._fixed[1] and self._tokens is None:
                self._tokens = self._bucket(tokens_per_minute)


_lock = threading.Lock()
_budgets: dict[tuple[str, str], Budget] = {}


def budget_for(endpoint: Endpoint) -> Budget:
    """The budget that everyone in this process shares for one endpoint."""
    with _lock:
        return _budgets.setdefault(
            (endpoint.name, endpoint.base_url),
            TokenBucket(endpoint.requests_per_minute, endpoint.tokens_per_minute),
        )
