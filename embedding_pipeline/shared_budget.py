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
whatever the number of requests; 13 µs a request. All of it in a thread of its own, on one
connection, which is closed after five idle seconds.

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
from dataclasses import replace
from typing import Any

import psycopg

from embedding_pipeline.embedders.budget import Budget, Clock, TokenBucket
from embedding_pipeline.embedders.found_rate import FoundRate, Outcomes, noted
from embedding_pipeline.embedders.port import Endpoint
from embedding_pipeline.embedders.timeline import (
    RemoteClock,
    Turns,
    costs,
    local_start,
    per_second,
)
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.store import endpoint_budget as store
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.endpoint_budget import EndpointKey, Limits, Shared

logger = logging.getLogger(__name__)

CHUNK_SECONDS = 0.25
"""Of the timeline, reserved at once by a process that is busy."""
SYNC_SECONDS = 1.0
HURRIED_SYNC_SECONDS = 0.25
"""The same while others hold what is this process's share."""
NOTE_SECONDS = 0.1
"""At most so often a throttle is written down at once."""
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
        self._ceiling = endpoint.concurrency
        self._given = Limits(endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self._learnt = Limits()
        self._to_tell: Limits | None = None
        # all of the state: under the lock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._worker: threading.Thread | None = None
        self._closing = False
        self._places: int | None = None
        self._holders = 1
        self._in_flight = self._most_in_flight = 0
        self._short_of_places = self._hurry = True
        self._turns = Turns(CHUNK_SECONDS)
        self._database_clock = RemoteClock()
        self._seconds_needed: float | None = None
        self._asked_at = clock()
        self._busy_since: float | None = None
        self._synced_at = -math.inf
        self._away = False
        self._told = False
        self._own: TokenBucket | None = None
        self._found = FoundRate()
        self._outcomes = Outcomes(0)
        self._counted_from = self._noted_at = -math.inf

    # ---- what the engine calls ---------------------------------------------------------------

    async def acquire(self, tokens: int) -> None:
        """See `Budget.acquire`. First come, first served within the process."""
        while True:
            with self._lock:
                self._ensure_worker()
                self._asked_at = self._clock()
                away = self._is_away()
                own = self._own_budget() if away else None
                at = None
                if self._has_place(away):
                    at = self._clock() if own else self._turn(tokens)
                if at is not None:
                    self._in_flight += 1
                    self._most_in_flight = max(self._most_in_flight, self._in_flight)
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
            self._in_flight -= 1
            limit = self.limits.tokens_per_minute
            if used is not None and limit:
                self._turns.correct_tokens((used - tokens) / per_second(limit))
            if used is not None and self._own is not None:
                self._own.release(tokens, used)
            self._wake()

    def learn(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        """See `Budget.learn`; every process takes it over with its next round trip."""
        with self._lock:
            known = self._learnt
            heard = Limits(
                requests_per_minute or known.requests_per_minute,
                tokens_per_minute or known.tokens_per_minute,
            )
            if heard != known:
                self._learnt = self._to_tell = heard

    @property
    def generation(self) -> int | None:
        """See `Budget.generation`."""
        return None if self._away else self._found.generation

    @property
    def paced(self) -> bool:
        """See `Budget.paced`."""
        return bool(self.limits) or self._found.per_second is not None

    @property
    def places_are_not_why(self) -> bool:
        """See `Budget.places_are_not_why`."""
        return self._found.measuring or self._found.usual is not None

    def note(self, generation: int, *, answered: bool) -> None:
        """See `Budget.note`; written with the next round trip, after a throttle soon."""
        with self._lock:
            so_far = self._outcomes
            if generation != so_far.generation:
                return
            if answered:
                self._outcomes = replace(so_far, answered=so_far.answered + 1)
                return
            self._outcomes = replace(so_far, throttled=so_far.throttled + 1)
            if not so_far.throttled:
                self._changed.notify_all()

    @property
    def limits(self) -> Limits:
        """What is kept: the YAML's limits, and where it has none what a provider has said."""
        return Limits(
            self._given.requests_per_minute or self._learnt.requests_per_minute,
            self._given.tokens_per_minute or self._learnt.tokens_per_minute,
        )

    def lower_ceiling(self, ceiling: int) -> None:
        """The endpoint says that it takes fewer at once."""
        with self._lock:
            self._ceiling = min(self._ceiling, ceiling)

    def close(self) -> None:
        """Give the places back; a later `acquire` would take some again."""
        with self._lock:
            self._closing, worker = True, self._worker
            self._changed.notify_all()
        if worker is not None:
            worker.join(timeout=PATIENCE_SECONDS)

    # ---- under the lock ----------------------------------------------------------------------

    def _has_place(self, away: bool) -> bool:
        places = self._places
        if away:
            places = self._ceiling if places is None else max(1, places)
        if places is not None and self._in_flight < places:
            return True
        if not self._short_of_places:
            self._short_of_places = self._hurry = True
            self._changed.notify_all()
        return False

    def _turn(self, tokens: int) -> float | None:
        """When a request may be sent by what is reserved; None: something has to be, first."""
        now, limits = self._clock(), self.limits
        if not self.paced:
            return now
        by_requests, by_tokens = costs(limits, tokens, self._found.per_second)
        at = self._turns.take(now, by_requests, by_tokens)
        if (at is None or at > now) and not self._outcomes.limited:
            self._outcomes = replace(self._outcomes, limited=True)
        if self._turns.short(now):
            self._need(max(by_requests, by_tokens))
        return at

    def _need(self, seconds: float) -> None:
        if self._seconds_needed is None:
            self._seconds_needed = self._turns.next_chunk(seconds)
            self._changed.notify_all()

    def _is_away(self) -> bool:
        stuck = self._busy_since is not None and self._clock() - self._busy_since > PATIENCE_SECONDS
        if stuck and not self._away:
            self._set_away("it does not answer")
        return self._away

    def _set_away(self, why: str) -> None:
        self._away = True
        self._turns.clear()
        self._seconds_needed = None
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
            requests, tokens = self.limits.requests_per_minute, self.limits.tokens_per_minute
            if self._found.per_second is not None:
                found = math.ceil(60 * self._found.per_second)
                requests = found if requests is None else min(requests, found)
            self._own = TokenBucket(
                *(
                    None if limit is None else max(1, limit // self._holders)
                    for limit in (requests, tokens)
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
            self._short_of_places = self._hurry = True
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
                        self._note(connection)
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
                idle = self._in_flight == 0 and now - self._asked_at > IDLE_SECONDS
                if idle or self._closing:
                    self._worker, self._places, self._told = None, None, False
                    self._synced_at = -math.inf
                    self._turns.clear()
                    self._seconds_needed = None
                    return None
                if now >= retry_at:
                    hurry = self._hurry or self._found.measuring
                    sync_at = self._synced_at + (HURRIED_SYNC_SECONDS if hurry else SYNC_SECONDS)
                    if now >= sync_at:
                        return "sync"
                    if self._seconds_needed is not None:
                        return "reserve"
                    if self._outcomes.throttled or self._found.throttled:
                        note_at = self._noted_at + NOTE_SECONDS
                        if now >= note_at:
                            return "note"
                        sync_at = min(sync_at, note_at)
                    wait = sync_at - now
                else:
                    wait = retry_at - now
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
            seconds, tell = self._seconds_needed or CHUNK_SECONDS, self._to_tell
            self._to_tell = None
        sent = self._clock()
        reserved = store.reserve(connection, self._rate_key, seconds, tell or Limits())
        received = self._clock()
        with self._lock:
            self._take_over(reserved.learnt, reserved.found)
            start = local_start(self._database_clock, sent, received, reserved)
            self._turns.add(start, seconds, self._holders)
            self._seconds_needed = None

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
                wanted = self._ceiling
                if not self._short_of_places:
                    wanted = min(wanted, math.ceil(1.25 * self._most_in_flight) + 1)
                mine = store.allot(self._holder, wanted, self._in_flight, self._ceiling, shared)
                if self._places is not None:
                    self._places = min(mine.allowed, self._places)
            holders = {**shared.holders, self._holder: mine.held}
            if store.replace_holders(connection, self._places_key, shared.version, holders):
                with self._lock:
                    self._places, self._holders = mine.allowed, len(holders)
                    self._short_of_places = self._in_flight >= mine.allowed
                    self._hurry = mine.allowed < mine.fair
                    self._most_in_flight = self._in_flight
                    self._synced_at = self._clock()
                return
            time.sleep(0.01 * random.random())  # noqa: S311 - jitter, not a secret
        raise PipelineError("too many processes change it at once")

    def _note(self, connection: "psycopg.Connection[Any]") -> None:
        """Add what became of this process's requests, where it tells something about the rate."""
        with self._lock:
            now = self._clock()
            given = self.limits.requests_per_minute
            outcomes = replace(
                self._outcomes,
                seconds=now - self._counted_from,
                holders=self._holders,
                given=per_second(given) if given else None,
            )
            tells = self._found.active or outcomes.throttled
            self._outcomes, self._counted_from = Outcomes(outcomes.generation), now
            self._noted_at = now
        for _ in range(20 if tells else 0):
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
        if learnt and self._to_tell is None:
            self._learnt = learnt
        if found.generation != self._found.generation:
            self._outcomes, self._counted_from = Outcomes(found.generation), self._clock()
        self._found = found

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
