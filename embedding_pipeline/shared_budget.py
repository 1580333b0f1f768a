"""One endpoint's limits, kept by all processes that share the database.

Requests and tokens a minute: the endpoint (of OpenAI's dialect: each of its models) has one
timeline, and a process reserves the next quarter of a second of it at a time (`timeline`), so that
all together send as evenly as one would, and a request costs no round trip. A killed process takes
at most what it had reserved with it.

A limit that nobody tells: the rate that throttles have shown (`found_rate`) stands in the same row,
and everybody's requests take their turns by it. Outcomes are added to it once a second, after a
throttle within a tenth of one; nothing is written for an endpoint that throttles nobody.

The ceiling of requests in flight: each process holds places and renews them every second; the
places of one that does not (killed, or cut off) are free after `LAPSE_SECONDS`. What a process
does not use goes to those who wait.

Cost: two round trips a second and process, for OpenAI's dialect three (0.3 ms of its CPU together),
and where a rate is limited four to eight more a second for all processes together (0.13 ms each),
whatever the number of requests; 7 µs a request, the limiter included. The round trips are made in
a thread of its own, on one connection, which is closed after five idle seconds.

While the database is away each process keeps the share that it had. That is told once.
"""

import asyncio
import atexit
import logging
import math
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psycopg

from embedding_pipeline.embedders.budget import Budget, Clock, TokenBucket
from embedding_pipeline.embedders.found_rate import FoundRate, noted
from embedding_pipeline.embedders.port import Endpoint
from embedding_pipeline.embedders.share import SYNC_SECONDS, Share
from embedding_pipeline.embedders.tally import Event
from embedding_pipeline.embedders.timeline import (
    RemoteClock,
    local_start,
)
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.store import endpoint_budget as store
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.endpoint_budget import EndpointKey, Limits, Shared

logger = logging.getLogger(__name__)

IDLE_SECONDS = 5.0
"""Without a request, after which a process gives its places back and closes its connection."""
RETRY_SECONDS = 5.0
"""Between attempts to reach a database that is away."""
PATIENCE_SECONDS = 5.0
"""For one answer of the database; longer, and it counts as away."""


class SharedBudget:
    """A `Budget` that processes share through the database; any thread, any event loop."""

    def __init__(
        self, url: str, endpoint: Endpoint, model: str = "", *, clock: Clock = time.monotonic
    ) -> None:
        self.name = endpoint.counted_as(model)
        self._url, self._clock = url, clock
        # places belong to the endpoint, limits a minute perhaps to each of its models
        self._places_key = EndpointKey.of(endpoint.name, endpoint.address)
        self._rate_key = EndpointKey.of(self.name, endpoint.address)
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:12]}"
        # all of the state: under the lock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._share = Share(
            endpoint.concurrency,
            Limits(endpoint.requests_per_minute, endpoint.tokens_per_minute),
        )
        self._database_clock = RemoteClock()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._worker: threading.Thread | None = None
        self._closing = False
        self._asked_at = clock()
        self._busy_since: float | None = None
        self._away = False
        self._told = False
        self._own: TokenBucket | None = None

    # ---- what the engine calls ---------------------------------------------------------------

    async def acquire(self, tokens: int) -> None:
        """See `Budget.acquire`. First come, first served within the process."""
        while True:
            with self._lock:
                self._ensure_worker()
                now = self._asked_at = self._clock()
                own = self._own_budget() if self._is_away() else None
                at, urgent = None, self._share.urgent
                if self._share.has_place(alone=own is not None):
                    at = now if own is not None else self._share.turn(tokens, now)
                if self._share.urgent > urgent:
                    self._changed.notify_all()
                if at is not None:
                    self._share.enter()
                    break
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiters.append((asyncio.get_running_loop(), waiter))
            # now and then anyhow: an answer of the database may never come
            await asyncio.wait({waiter}, timeout=SYNC_SECONDS)
        try:
            if own is not None:
                await own.acquire(tokens)
            elif (wait := at - self._clock()) > 0:
                await asyncio.sleep(wait)
        except BaseException:
            self.release(tokens, 0)
            raise

    def release(self, tokens: int, used: int | None) -> None:
        """See `Budget.release`."""
        with self._lock:
            self._share.leave(tokens, used)
            if used is not None and self._own is not None:
                self._own.release(tokens, used)
            self._wake()

    def learn(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        """See `Budget.learn`; every process takes it over with its next round trip."""
        with self._lock:
            self._share.learn(requests_per_minute, tokens_per_minute)

    @property
    def limits(self) -> Limits:
        """Requests and tokens a minute that are kept, from the YAML or from the provider."""
        return self._share.limits

    @property
    def generation(self) -> int:
        """See `Budget.generation`."""
        own = self._own
        return self._share.tally.found.generation if own is None else own.generation

    @property
    def paced(self) -> bool:
        """See `Budget.paced`."""
        own = self._own
        return self._share.paced if own is None else own.paced

    @property
    def places_are_not_why(self) -> bool:
        """See `Budget.places_are_not_why`."""
        own = self._own
        return self._share.tally.found.places_are_not_why if own is None else own.places_are_not_why

    def note(self, generation: int, event: Event) -> None:
        """See `Budget.note`; written with the next round trip, after a throttle soon."""
        with self._lock:
            if self._own is not None:
                self._own.note(generation, event)
            elif self._share.tally.note(generation, event):
                self._changed.notify_all()

    def lower_ceiling(self, ceiling: int) -> None:
        """The endpoint says that it takes fewer at once."""
        with self._lock:
            self._share.ceiling = min(self._share.ceiling, ceiling)

    def close(self) -> None:
        """Give the places back; a later `acquire` would take some again."""
        with self._lock:
            self._closing, worker = True, self._worker
            self._changed.notify_all()
        if worker is not None:
            worker.join(timeout=PATIENCE_SECONDS)

    # ---- under the lock ----------------------------------------------------------------------

    def _is_away(self) -> bool:
        stuck = self._busy_since is not None and self._clock() - self._busy_since > PATIENCE_SECONDS
        if stuck and not self._away:
            self._set_away("it does not answer")
        return self._away

    def _set_away(self, why: str) -> None:
        self._away = True
        self._share.forget_turns()
        if not self._told:
            self._told = True
            logger.warning(
                "%s: the limits that processes share cannot be kept in the database (%s); this "
                "one keeps its own share until it can be reached again",
                self.name,
                why,
            )
        self._wake()

    def _own_budget(self) -> TokenBucket:
        """For a database that is away: this process's share of the limits."""
        if self._own is None:
            limits, holders = self._share.limits, self._share.holders
            found = self._share.tally.found
            rate = found.per_second
            self._own = TokenBucket(
                *(
                    None if limit is None else max(1, limit // holders)
                    for limit in (limits.requests_per_minute, limits.tokens_per_minute)
                ),
                found=FoundRate(
                    per_second=None if rate is None else rate / holders,
                    generation=found.generation + 1,
                ),
                clock=self._clock,
            )
        return self._own

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            try:
                loop.call_soon_threadsafe(_done, waiter)
            except RuntimeError:
                continue  # its loop has ended

    def _ensure_worker(self) -> None:
        if self._worker is None:
            self._closing = False
            self._share.begin()
            self._worker = threading.Thread(
                target=self._work, name=f"shared-budget-{self.name}", daemon=True
            )
            self._worker.start()

    # ---- the thread that talks to the database -----------------------------------------------

    def _work(self) -> None:
        retry_at = -math.inf
        with ExitStack() as opened:
            connection: psycopg.Connection[Any] | None = None
            while (due := self._wait_for_work(retry_at)) is not None:
                try:
                    self._begin()
                    if connection is None:
                        connection = opened.enter_context(connect(self._url))
                    if due == "sync":
                        self._sync(connection)
                    elif due == "note":
                        self._note(connection)
                    else:
                        self._reserve(connection)
                    self._came_back()
                except (psycopg.Error, PipelineError) as error:
                    opened.close()
                    connection = None
                    retry_at = self._clock() + RETRY_SECONDS
                    with self._lock:
                        self._set_away(_first_line(error))
                finally:
                    self._end()
            if connection is not None:
                try:
                    self._leave(connection)
                except (psycopg.Error, PipelineError):
                    logger.debug("%s: places not given back; they lapse", self.name)

    def _wait_for_work(self, retry_at: float) -> str | None:
        """What is to be done next; None: end the thread."""
        with self._lock:
            while True:
                now = self._clock()
                idle = self._share.in_flight == 0 and now - self._asked_at > IDLE_SECONDS
                if idle or self._closing:
                    self._worker, self._told = None, False
                    return None
                wait = retry_at - now
                if wait <= 0:
                    task, wait = self._share.next_task(now)
                    if task is not None:
                        return task
                self._changed.wait(timeout=min(wait, IDLE_SECONDS))

    def _begin(self) -> None:
        with self._lock:
            self._busy_since = self._clock()

    def _end(self) -> None:
        with self._lock:
            self._busy_since = None

    def _came_back(self) -> None:
        with self._lock:
            if self._away:
                self._away, self._told, self._own = False, False, None
                logger.info("%s: its limits are shared with other processes again", self.name)
            self._wake()

    def _reserve(self, connection: "psycopg.Connection[Any]") -> None:
        with self._lock:
            seconds, tell = self._share.seconds_needed, self._share.to_tell
            self._share.to_tell = None
        sent = self._clock()
        reserved = store.reserve(connection, self._rate_key, seconds, tell or Limits())
        received = self._clock()
        with self._lock:
            self._take_over(reserved.learnt, reserved.found)
            start = local_start(self._database_clock, sent, received, reserved)
            self._share.reserved(start, seconds)

    def _sync(self, connection: "psycopg.Connection[Any]") -> None:
        for _ in range(20):
            shared = store.read(connection, self._places_key)
            if shared is None:
                store.create(connection, self._places_key)
                continue
            if self._rate_key == self._places_key:
                rate: Shared | None = shared
            else:
                rate = store.read(connection, self._rate_key)
            with self._lock:
                if rate is not None:
                    self._take_over(rate.learnt, rate.found)
                mine = self._share.claim(self._holder, shared)
            holders = {**shared.holders, self._holder: mine.held}
            if store.replace_holders(connection, self._places_key, shared.version, holders):
                with self._lock:
                    self._share.claimed(mine, len(holders), self._clock())
                return
            time.sleep(0.01 * random.random())  # noqa: S311 - jitter, not a secret
        raise PipelineError("too many processes change it at once")

    def _note(self, connection: "psycopg.Connection[Any]") -> None:
        """Add what became of this process's requests."""
        with self._lock:
            share = self._share
            outcomes = share.tally.collect(self._clock(), share.holders, share.requests_a_second)
        for _ in range(20):
            shared = store.read(connection, self._rate_key)
            if shared is None:
                store.create(connection, self._rate_key)
                continue
            after = noted(shared.found, outcomes, shared.now)
            if after == shared.found or store.replace_found_rate(
                connection, self._rate_key, shared.found_version, after
            ):
                with self._lock:
                    self._take_over(shared.learnt, after)
                    self._wake()
                return
            time.sleep(0.01 * random.random())  # noqa: S311 - jitter, not a secret

    def _take_over(self, learnt: Limits, found: FoundRate) -> None:
        self._share.heard(learnt)
        self._share.tally.take_over(found, self._clock())

    def _leave(self, connection: "psycopg.Connection[Any]") -> None:
        for _ in range(20):
            shared = store.read(connection, self._places_key)
            if shared is None or self._holder not in shared.holders:
                return
            with self._lock:
                if self._worker is not None:
                    return  # asked again meanwhile
            others = {name: each for name, each in shared.holders.items() if name != self._holder}
            if store.replace_holders(connection, self._places_key, shared.version, others):
                return


def _done(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)


def _first_line(error: Exception) -> str:
    words = str(error).strip().splitlines()
    if isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.InvalidSchemaName):
        return "its tables are not up to date: run embedding-pipeline migrate"
    return words[0] if words else type(error).__name__


_lock = threading.Lock()
_budgets: dict[tuple[int, str, EndpointKey], SharedBudget] = {}


def shared_budgets(url: str) -> Callable[[Endpoint, str], Budget]:
    """What gives a budget in this database: one a process and what is limited together."""

    def budget(endpoint: Endpoint, model: str) -> Budget:
        name = endpoint.counted_as(model)
        key = (os.getpid(), url, EndpointKey.of(name, endpoint.address))
        with _lock:
            found = _budgets.get(key)
            if found is None:
                found = _budgets[key] = SharedBudget(url, endpoint, model)
        found.lower_ceiling(endpoint.concurrency)
        return found

    return budget


@atexit.register
def close_all() -> None:
    """Give back the places of this process."""
    with _lock:
        mine = [budget for (pid, _, _), budget in _budgets.items() if pid == os.getpid()]
    for budget in mine:
        budget.close()
