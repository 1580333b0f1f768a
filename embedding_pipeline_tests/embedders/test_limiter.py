"""The limiter against simulated endpoints, in virtual time."""

import asyncio
import random
import statistics
from dataclasses import dataclass

import pytest

from embedding_pipeline.embedders.limiter import Limiter
from embedding_pipeline_tests.embedders.support import run_in_virtual_time


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

    def __post_init__(self) -> None:
        self._rng = random.Random(1)
        self._in_flight, self._level, self._filled_at = 0, self.burst, 0.0
        self._working = asyncio.Semaphore(self.servers or 10_000)

    async def answer(self) -> tuple[bool, float | None]:
        """(answered, Retry-After where it was not)."""
        self._in_flight += 1
        try:
            if self._rng.random() < self.turned_away:
                await asyncio.sleep(0.005)
                return False, None
            if self.permits is not None and self._in_flight > self.permits:
                await asyncio.sleep(0.005)
                return False, None
            if self.rate is not None and (wait := self._over_the_rate(self.rate)) > 0:
                await asyncio.sleep(0.005)
                return False, wait if self.retry_after else None
            async with self._working:
                await asyncio.sleep(self.latency * (1 + self._rng.uniform(-1, 1) * self.jitter))
            return True, None
        finally:
            self._in_flight -= 1

    def _over_the_rate(self, rate: float) -> float:
        now = asyncio.get_running_loop().time()
        self._level = min(self.burst, self._level + (now - self._filled_at) * rate)
        self._filled_at = now
        if self._level < 1:
            return (1 - self._level) / rate
        self._level -= 1
        return 0.0


@dataclass
class Outcome:
    """How the middle of a simulated run went (the first quarter and the last tenth left out)."""

    rate: float
    throttled_share: float
    window: float


def simulate(endpoint: Endpoint, requests: int, ceiling: int = 64) -> Outcome:
    async def main() -> Outcome:
        loop = asyncio.get_running_loop()
        limiter = Limiter(ceiling, sleep=asyncio.sleep, clock=loop.time)
        rng = random.Random(2)
        events: list[tuple[float, bool]] = []
        left = requests

        async def one() -> bool:
            sent = await limiter.enter()
            answered, retry_after = await endpoint.answer()
            if answered:
                limiter.succeeded(sent)
            else:
                limiter.throttled(sent, retry_after)
            limiter.leave()
            events.append((loop.time(), answered))
            return answered

        async def worker() -> None:
            nonlocal left
            while left > 0:
                left -= 1
                while not await one():
                    await asyncio.sleep(0.25 + 0.25 * rng.random())

        await asyncio.gather(*(worker() for _ in range(2 * ceiling)))
        settled = events[len(events) // 4 : len(events) * 9 // 10]
        seconds = settled[-1][0] - settled[0][0]
        answered = sum(answered for _, answered in settled)
        return Outcome(answered / seconds, 1 - answered / len(settled), limiter.window)

    return run_in_virtual_time(main())


@pytest.mark.parametrize(
    ("endpoint", "allowed", "requests"),
    [
        pytest.param(lambda: Endpoint(rate=200, burst=200, latency=0.25), 200, 20_000, id="200/s"),
        pytest.param(lambda: Endpoint(rate=200, burst=20, jitter=0.8), 200, 20_000, id="jitter"),
        pytest.param(lambda: Endpoint(rate=50), 50, 5_000, id="50/s, no burst"),
        pytest.param(lambda: Endpoint(rate=50, retry_after=True), 50, 5_000, id="Retry-After"),
        pytest.param(lambda: Endpoint(rate=50, burst=500), 50, 5_000, id="10 s of burst"),
        pytest.param(lambda: Endpoint(rate=5, latency=0.05), 5, 1_000, id="5/s"),
        pytest.param(lambda: Endpoint(rate=1, burst=60), 1, 600, id="60 a minute"),
        pytest.param(lambda: Endpoint(permits=16), 160, 5_000, id="16 permits"),
        pytest.param(lambda: Endpoint(permits=16, jitter=0.8), 160, 5_000, id="16, jitter"),
        pytest.param(lambda: Endpoint(permits=5, latency=1.0), 5, 3_000, id="5 slow permits"),
        pytest.param(lambda: Endpoint(permits=1), 10, 1_000, id="1 permit"),
        pytest.param(lambda: Endpoint(permits=16, rate=50, burst=10), 50, 5_000, id="both"),
    ],
)
def test_a_limit_is_used_to_90_percent_with_under_2_percent_throttled(
    endpoint: "type[Endpoint]", allowed: float, requests: int
) -> None:
    """Scripts either crawl along at one request at a time or send as much as they can and spend a
    third of their requests on 429, some of which count against the limit themselves."""
    outcome = simulate(endpoint(), requests)
    assert outcome.rate >= 0.9 * allowed
    assert outcome.throttled_share < 0.02


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("latency", [0.05, 0.25])
def test_throttles_that_come_at_any_load_do_not_slow_down(share: float, latency: float) -> None:
    """A gateway answered 429 to three requests in ten, whatever was sent. Each was taken for a
    limit on the rate, which fell to a request every two seconds and stayed there."""
    outcome = simulate(Endpoint(turned_away=share, latency=latency), 5_000, ceiling=16)
    # 32 workers wait 0.375 s each time before they send again; 16 requests at a time
    most = min(16 / latency * (1 - share), 32 / (latency + 0.375 * share / (1 - share)))
    assert outcome.rate >= 0.25 * most


@pytest.mark.parametrize("rate", [20, 100])
def test_three_processes_find_one_unknown_limit(rate: float) -> None:
    """Each of three found it out for itself and saw the others' load in its own throttles: 2 % of
    their requests. The median of five runs, 20 s to settle and 40 s measured."""

    async def main(seed: int) -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        endpoint = Endpoint(rate=rate, burst=max(4, rate / 10), latency=0.05)
        endpoint._rng = random.Random(seed)
        rng = random.Random(100 + seed)
        began, events = loop.time(), list[tuple[float, bool]]()

        async def worker(limiter: Limiter) -> None:
            answered = True
            while loop.time() < began + 60:
                if not answered:
                    await asyncio.sleep(0.25 + 0.25 * rng.random())
                sent = await limiter.enter()
                answered, retry_after = await endpoint.answer()
                if answered:
                    limiter.succeeded(sent)
                else:
                    limiter.throttled(sent, retry_after)
                limiter.leave()
                events.append((loop.time() - began, answered))

        limiters = [Limiter(32, clock=loop.time) for _ in range(3)]
        await asyncio.gather(*(worker(each) for each in limiters for _ in range(64)))
        settled = [answered for at, answered in events if 20 <= at < 60]
        return sum(settled) / (40 * rate), 1 - sum(settled) / len(settled)

    outcomes = [run_in_virtual_time(main(seed)) for seed in range(5)]
    assert statistics.median(share for share, _ in outcomes) >= 0.9
    assert statistics.median(throttled for _, throttled in outcomes) < 0.015


def test_a_limit_that_appears_where_throttles_were_usual_is_kept() -> None:
    endpoint = Endpoint(turned_away=0.3, rate=40, burst=4, latency=0.05)
    outcome = simulate(endpoint, 6_000, ceiling=16)
    assert outcome.rate >= 0.5 * 40
    assert outcome.throttled_share < 0.5


def test_the_first_requests_need_no_more_round_trips_than_there_are_places() -> None:
    """10,000 rows at an endpoint 250 ms away took two seconds instead of 1.3, because the window
    began at four and was doubled only when it had been compared with the one before."""

    async def main() -> float:
        clock = asyncio.get_running_loop().time
        limiter = Limiter(32, clock=clock)

        async def one() -> None:
            sent = await limiter.enter()
            await asyncio.sleep(0.25)
            limiter.succeeded(sent)
            limiter.leave()

        began = clock()
        await asyncio.gather(*(one() for _ in range(157)))
        return clock() - began

    assert run_in_virtual_time(main()) <= 5.2 * 0.25


def test_concurrency_is_raised_to_the_ceiling_while_it_pays() -> None:
    """An endpoint 250 ms away that answers any number at once: with four in flight a backfill
    would take eight times as long as it must."""
    outcome = simulate(Endpoint(latency=0.25), 5_000, ceiling=32)
    assert outcome.window == 32
    assert outcome.rate >= 0.9 * 32 / 0.25


def test_concurrency_stays_low_where_more_does_not_pay() -> None:
    """A model server on two cores answers 32 requests no sooner than two, and every one of them
    waits for all: timeouts, and a search query behind the queue."""
    outcome = simulate(Endpoint(servers=2), 3_000, ceiling=32)
    assert outcome.window <= 6
    assert outcome.rate >= 0.9 * 2 / 0.1


def test_errors_in_between_do_not_slow_down_but_an_outage_does() -> None:
    """One 500 in three says nothing about load; nothing but 500 does."""

    async def main() -> None:
        limiter = Limiter(32, clock=asyncio.get_running_loop().time)
        limiter.window = 32.0
        sent = await limiter.enter()
        for _ in range(100):
            limiter.failed()
            limiter.failed()
            limiter.succeeded(sent)
        assert limiter.window >= 32
        for _ in range(32 + 16 + 8 + 4 + 4):
            limiter.failed()
        assert limiter.window == 1

    run_in_virtual_time(main())


@pytest.mark.parametrize("storm", [5, 50, 500])
def test_a_storm_of_429_is_forgotten_when_it_is_over(storm: int) -> None:
    """A provider answered 429 to everything for some minutes. Each time the rate was halved, down
    to a request in half an hour; long after the storm the run looked hung."""

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        limiter = Limiter(16, clock=clock)

        async def one(answered: bool) -> None:
            sent = await limiter.enter()
            await asyncio.sleep(0.05)
            if answered:
                limiter.succeeded(sent)
            else:
                limiter.throttled(sent, None)
            limiter.leave()

        async def many(count: int, answered: bool) -> float:
            began = clock()
            await asyncio.gather(*(one(answered) for _ in range(count)))
            return clock() - began

        before = await many(1000, True)
        for _ in range(storm):
            await one(False)
        assert await many(1000, True) < 10 * before

    run_in_virtual_time(main())


def test_a_retry_after_holds_everyone_back() -> None:
    """Nineteen of twenty workers went on hammering while the twentieth waited as it was told."""

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        limiter = Limiter(8, clock=clock)
        began = clock()
        limiter.throttled(await limiter.enter(), retry_after=7.0)
        limiter.leave()
        await asyncio.gather(*(limiter.enter() for _ in range(2)))
        assert clock() - began >= 7.0

    run_in_virtual_time(main())


def test_places_are_given_in_order_and_returned_by_those_who_leave_the_line() -> None:
    async def main() -> None:
        limiter = Limiter(4, clock=asyncio.get_running_loop().time)
        order: list[int] = []

        async def enter(number: int) -> None:
            await limiter.enter()
            order.append(number)

        waiting = [asyncio.create_task(enter(number)) for number in range(10)]
        await asyncio.sleep(1)
        assert order == [0, 1, 2, 3]
        assert limiter.in_flight == 4
        waiting[4].cancel()
        waiting[6].cancel()
        for _ in range(4):
            limiter.leave()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert order == [0, 1, 2, 3, 5, 7, 8, 9]
        assert limiter.in_flight == 4

    run_in_virtual_time(main())
