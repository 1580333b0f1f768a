"""Processes that ask a limited endpoint for as much as it gives, in virtual time.

The limiter, the budget of a process and what processes find together are the product's own; the
endpoint, the network, the database's round trips and the machine's stalls are simulated.
"""

import asyncio
import contextlib
import math
import random
from dataclasses import dataclass, field

from embedding_pipeline.embedders.budget import Budget, TokenBucket
from embedding_pipeline.embedders.found_rate import FoundRate, noted
from embedding_pipeline.embedders.limiter import Limiter
from embedding_pipeline.embedders.share import Share
from embedding_pipeline.embedders.tally import Event
from embedding_pipeline.store.endpoint_budget import Limits
from embedding_pipeline_tests.embedders.support import run_in_virtual_time

REFUSED_IN = 0.005
DATABASE_TRIP = 0.003
WAITED_AT_MOST = 1.0


@dataclass
class Endpoint:
    """An endpoint that answers after `latency` ± `jitter`, and what limits it."""

    latency: float = 0.1
    jitter: float = 0.2
    rate: float | None = None
    """Requests a second; one more is answered 429."""
    burst: float = 1.0
    permits: int | None = None
    """Requests in flight; one more is answered 429."""
    servers: int | None = None
    """Requests worked on at once; more wait their turn."""
    turned_away: float = 0.0
    """The share that is answered 429 whatever the load."""
    retry_after: bool = False
    on_the_way: float = 0.002
    """At most so long a request takes to get there: they arrive in another order."""
    rate_later: tuple[float, float] | None = None
    """(seconds after the beginning, rate from then on)."""
    shut: tuple[float, float] | None = None
    """From when to when everything is answered 429."""
    seed: int = 1

    def begin(self) -> None:
        """To be called in the event loop that it is asked in."""
        self._began = asyncio.get_running_loop().time()
        self._rng = random.Random(self.seed)
        self._in_flight, self._level, self._filled_at = 0, self.burst, self._began
        self._working = asyncio.Semaphore(self.servers or 10_000)

    async def answer(self) -> tuple[bool, float | None]:
        """(answered, Retry-After where it was not)."""
        await asyncio.sleep(self._rng.uniform(0.0, self.on_the_way))
        self._in_flight += 1
        try:
            full = self.permits is not None and self._in_flight > self.permits
            shut = self.shut is not None and self.shut[0] <= self._age < self.shut[1]
            if full or shut or self._rng.random() < self.turned_away:
                await asyncio.sleep(REFUSED_IN)
                return False, None
            if self.rate is not None and (wait := self._over_the_rate(self.rate)) > 0:
                await asyncio.sleep(REFUSED_IN)
                return False, wait if self.retry_after else None
            async with self._working:
                await asyncio.sleep(self.latency * (1 + self._rng.uniform(-1, 1) * self.jitter))
            return True, None
        finally:
            self._in_flight -= 1

    @property
    def _age(self) -> float:
        return asyncio.get_running_loop().time() - self._began

    def _over_the_rate(self, rate: float) -> float:
        if self.rate_later is not None and self._age >= self.rate_later[0]:
            rate = self.rate_later[1]
        now = asyncio.get_running_loop().time()
        self._level = min(self.burst, self._level + (now - self._filled_at) * rate)
        self._filled_at = now
        if self._level < 1:
            return (1 - self._level) / rate
        self._level -= 1
        return 0.0


@dataclass
class Stalls:
    """A machine that is busy with something else: so often a second nothing of a process runs."""

    a_second: float = 0.0
    longest: float = 0.0


class Machine:
    """Where one process runs."""

    def __init__(self, stalls: Stalls, seed: int) -> None:
        self._stalls, self._rng = stalls, random.Random(seed)
        self._until, self._next = 0.0, math.inf
        if stalls.a_second:
            began = asyncio.get_running_loop().time()
            self._next = began + self._rng.expovariate(stalls.a_second)

    async def sleep(self, seconds: float) -> None:
        """As the process does it: late, where it is stalled."""
        # virtual time stands still for less than the loop's resolution
        await asyncio.sleep(max(seconds, 1e-6))
        now = asyncio.get_running_loop().time()
        while now >= self._next:
            self._until = self._next + self._rng.uniform(0.0, self._stalls.longest)
            self._next = self._until + self._rng.expovariate(self._stalls.a_second)
        if now < self._until:
            await asyncio.sleep(self._until - now)


@dataclass
class Database:
    """What processes share."""

    free_at: float = 0.0
    found: FoundRate = field(default_factory=FoundRate)
    changes: list[tuple[float, FoundRate]] = field(default_factory=list)
    """When another rate was found, and what was known before."""


class Process:
    """A budget that talks to the others as `SharedBudget` does; `run` is its thread."""

    def __init__(self, database: Database, holders: int, limits: Limits, machine: Machine) -> None:
        self._database, self._machine = database, machine
        self._share = Share(1_000_000, limits)
        self._share.holders = holders
        self._changed, self._woken = asyncio.Event(), asyncio.Event()
        self.ended = False

    @property
    def generation(self) -> int:
        return self._share.tally.found.generation

    @property
    def paced(self) -> bool:
        return self._share.paced

    @property
    def places_are_not_why(self) -> bool:
        return self._share.tally.found.places_are_not_why

    async def acquire(self, tokens: int) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            at = self._share.turn(tokens, clock())
            self._changed.set()
            if at is not None:
                if at > clock():
                    await self._machine.sleep(at - clock())
                return
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), WAITED_AT_MOST)

    def release(self, tokens: int, used: int | None) -> None:
        pass

    def learn(self, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self._share.learn(requests_per_minute, tokens_per_minute)

    def note(self, generation: int, event: Event) -> None:
        if self._share.tally.note(generation, event):
            self._changed.set()

    async def run(self) -> None:
        clock, share, database = asyncio.get_running_loop().time, self._share, self._database
        while not self.ended:
            task, wait = share.next_task(clock())
            if task is None:
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), max(wait, 1e-6))
                continue
            if task == "note":
                outcomes = share.tally.collect(clock(), share.holders, share.requests_a_second)
            await self._machine.sleep(DATABASE_TRIP)
            now = clock()
            if task == "reserve":
                begins = max(database.free_at, now)
                database.free_at = begins + share.seconds_needed
                share.reserved(begins, share.seconds_needed)
            elif task == "note":
                before, database.found = database.found, noted(database.found, outcomes, now)
                if before.generation != database.found.generation:
                    database.changes.append((now, before))
            else:
                share.synced(now)
            share.tally.take_over(database.found, now)
            self._woken.set()


@dataclass
class Outcome:
    """How a simulated run went, once settled."""

    rate: float
    """Answers a second."""
    throttled_share: float
    windows: list[float]
    changes: list[tuple[float, FoundRate]]


def simulate(
    endpoint: Endpoint,
    *,
    processes: int | None = None,
    ceiling: int = 32,
    limits: Limits | None = None,
    stalls: Stalls | None = None,
    limited: bool = True,
    settle: float = 5.0,
    measured: float = 30.0,
    calls: int = 4,
    pieces: int = 16,
) -> Outcome:
    """Ask for as much as it gives.

    `processes` share what they find; None: one that has no database. `limited`: no throttle slows
    them down where it is False, as a client without a limiter. Each makes so many calls at
    a time, as `ProviderEmbedder.embed` does: of so many requests, all of which must have been
    answered before the next call.
    """

    async def main() -> Outcome:
        loop = asyncio.get_running_loop()
        began, events, database = loop.time(), list[tuple[float, bool]](), Database()
        endpoint.begin()

        async def piece(limiter: Limiter, budget: Budget, machine: Machine) -> None:
            failures = 0
            while loop.time() < began + settle + measured:
                if failures:
                    longest = min(30.0, 0.5 * 2 ** (failures - 1))
                    await machine.sleep(longest * (0.5 + 0.5 * rng.random()))
                sent = await limiter.enter(lambda: budget.acquire(1))
                answered, retry_after = await endpoint.answer()
                await machine.sleep(0.0)
                # in the order that `ProviderEmbedder` has
                if answered:
                    limiter.leave()
                    limiter.succeeded(sent)
                else:
                    failures += 1
                    if limited:
                        limiter.throttled(sent, retry_after)
                    limiter.leave()
                events.append((loop.time() - began, answered))
                if answered:
                    return

        async def call(limiter: Limiter, budget: Budget, machine: Machine) -> None:
            while loop.time() < began + settle + measured:
                async with asyncio.TaskGroup() as group:
                    for _ in range(pieces):
                        group.create_task(piece(limiter, budget, machine))

        rng = random.Random(100 + endpoint.seed)
        limiters: list[Limiter] = []
        threads: list[Process] = []
        async with asyncio.TaskGroup() as group:
            work = []
            for number in range(processes or 1):
                machine = Machine(stalls or Stalls(), 100 * endpoint.seed + number)
                if processes is None:
                    given = limits or Limits()
                    budget: Budget = TokenBucket(
                        given.requests_per_minute,
                        given.tokens_per_minute,
                        sleep=machine.sleep,
                        clock=loop.time,
                    )
                else:
                    thread = Process(database, processes, limits or Limits(), machine)
                    threads.append(thread)
                    group.create_task(thread.run())
                    budget = thread
                limiter = Limiter(ceiling // (processes or 1), sleep=machine.sleep, clock=loop.time)
                limiter.follow(budget)
                limiters.append(limiter)
                work += [group.create_task(call(limiter, budget, machine)) for _ in range(calls)]
            await asyncio.gather(*work)
            for thread in threads:
                thread.ended = True
        settled = [ok for at, ok in events if settle <= at < settle + measured]
        return Outcome(
            sum(settled) / measured,
            1 - sum(settled) / max(1, len(settled)),
            [limiter.window for limiter in limiters],
            database.changes,
        )

    return run_in_virtual_time(main())
