"""The limiter against simulated endpoints, in virtual time."""

import asyncio
import statistics

import pytest

from embedding_pipeline.embedders.budget import TokenBucket
from embedding_pipeline.embedders.limiter import Limiter
from embedding_pipeline_tests.embedders.simulated import Endpoint, simulate
from embedding_pipeline_tests.embedders.support import run_in_virtual_time


@pytest.mark.parametrize(
    ("endpoint", "allowed", "seconds"),
    [
        pytest.param(Endpoint(rate=200, burst=200, latency=0.25), 200, 10, id="200/s"),
        pytest.param(Endpoint(rate=100, burst=10, jitter=0.8), 100, 10, id="jitter"),
        pytest.param(Endpoint(rate=50, burst=5, retry_after=True), 50, 10, id="Retry-After"),
        pytest.param(Endpoint(rate=50, burst=500), 50, 30, id="10 s of burst"),
        pytest.param(Endpoint(rate=5, burst=4, latency=0.05), 5, 60, id="5/s"),
        pytest.param(Endpoint(rate=1, burst=60), 1, 100, id="60 a minute"),
        pytest.param(Endpoint(permits=16), 160, 10, id="16 permits"),
        pytest.param(Endpoint(permits=16, on_the_way=0.0), 160, 10, id="16, in order"),
        pytest.param(Endpoint(permits=5, latency=1.0), 5, 60, id="5 slow permits"),
        pytest.param(Endpoint(permits=1), 10, 30, id="1 permit"),
        pytest.param(Endpoint(permits=16, rate=50, burst=10), 50, 10, id="both"),
    ],
)
def test_a_limit_is_used_to_90_percent_with_under_2_percent_throttled(
    endpoint: Endpoint, allowed: float, seconds: float
) -> None:
    """Scripts either crawl along at one request at a time or send as much as they can and spend a
    third of their requests on 429, some of which count against the limit themselves."""
    outcome = simulate(endpoint, ceiling=64, calls=8, settle=seconds, measured=2 * seconds)
    assert outcome.rate >= 0.9 * allowed
    assert outcome.throttled_share < 0.02


@pytest.mark.parametrize("on_the_way", [0.002, 0.02, 0.05])
def test_requests_that_overtake_each_other_do_not_pass_for_places(on_the_way: float) -> None:
    """32 requests left at once and ten were let in; the first to be refused was the second to have
    left. So two at a time were taken for too many, and for 15 s one went after the other."""
    outcomes = [
        simulate(
            Endpoint(rate=100, burst=10, latency=0.05, on_the_way=on_the_way, seed=seed),
            settle=8,
            measured=10,
        )
        for seed in range(10)
    ]
    assert min(outcome.rate for outcome in outcomes) >= 0.9 * 100


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("processes", [None, 1, 3])
def test_throttles_that_come_at_any_load_do_not_slow_down(
    share: float, processes: int | None
) -> None:
    """A gateway answered 429 to three requests in ten, whatever was sent. Each was taken for a
    limit on the rate, which fell to a request every two seconds and stayed there."""
    rates = {
        limited: statistics.median(
            simulate(
                Endpoint(turned_away=share, latency=0.05, seed=seed),
                processes=processes,
                limited=limited,
                settle=60,
            ).rate
            for seed in range(3)
        )
        for limited in (True, False)
    }
    assert rates[True] >= 0.5 * rates[False]


def test_a_limit_that_appears_where_throttles_were_usual_is_kept() -> None:
    endpoint = Endpoint(turned_away=0.3, rate=40, burst=4, latency=0.05)
    outcome = simulate(endpoint, ceiling=16, settle=20)
    unlimited = simulate(endpoint, ceiling=16, settle=20, limited=False)
    assert outcome.rate >= 0.6 * unlimited.rate
    assert outcome.throttled_share < unlimited.throttled_share


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
    outcome = simulate(Endpoint(latency=0.25), ceiling=32)
    assert outcome.windows == [32]
    assert outcome.rate >= 0.9 * 32 / 0.25


def test_a_window_too_narrow_for_a_known_rate_is_widened() -> None:
    """What was answered while most was throttled left four places, and who waits for a turn was
    not taken for waiting for a place: a run went on at two thirds of what was allowed."""

    async def main() -> float:
        clock = asyncio.get_running_loop().time
        limiter, budget = Limiter(32, clock=clock), TokenBucket(6000, clock=clock)
        limiter.follow(budget)
        limiter.window = 4.0
        answered: list[float] = []

        async def worker() -> None:
            while clock() < began + 20:
                sent = await limiter.enter(lambda: budget.acquire(1))
                await asyncio.sleep(0.055)
                limiter.leave()
                limiter.succeeded(sent)
                answered.append(clock())

        began = clock()
        await asyncio.gather(*(worker() for _ in range(64)))
        return sum(began + 10 <= at < began + 20 for at in answered) / 10

    assert run_in_virtual_time(main()) >= 0.95 * 100


def test_concurrency_stays_low_where_more_does_not_pay() -> None:
    """A model server on two cores answers 32 requests no sooner than two, and every one of them
    waits for all: timeouts, and a search query behind the queue."""
    outcome = simulate(Endpoint(servers=2), ceiling=32, measured=150)
    assert outcome.windows[0] <= 6
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
