"""The rate that several processes find together, against simulated endpoints in virtual time."""

import asyncio
import json
import random
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest

from embedding_pipeline.embedders.found_rate import FoundRate, Outcomes, noted
from embedding_pipeline.embedders.limiter import Limiter
from embedding_pipeline.store.endpoint_budget import Limits
from embedding_pipeline_tests.embedders.support import run_in_virtual_time
from embedding_pipeline_tests.embedders.test_limiter import Endpoint
from embedding_pipeline_tests.embedders.together import Process, Row

SETTLE, MEASURED = 10, 30
PLACES, WORKERS = 32, 32


async def _sleep(seconds: float) -> None:
    # virtual time stands still for less than the loop's resolution
    await asyncio.sleep(max(seconds, 1e-6))


def simulate(
    endpoint: Endpoint, processes: int, seed: int = 1, limits: Limits | None = None
) -> tuple[float, float]:
    """(answers a second, share of requests throttled), of all processes, once settled."""

    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        endpoint._rng = random.Random(seed)
        rng = random.Random(100 + seed)
        began, events, row = loop.time(), list[tuple[float, bool]](), Row()

        async def worker(limiter: Limiter, budget: Process) -> None:
            await asyncio.sleep(0.05 * rng.random())
            failures = 0
            while loop.time() < began + SETTLE + MEASURED:
                if failures:
                    longest = min(30.0, 0.5 * 2 ** (failures - 1))
                    await asyncio.sleep(longest * (0.5 + 0.5 * rng.random()))
                sent = await limiter.enter(lambda: budget.acquire(1))
                answered, retry_after = await endpoint.answer()
                if answered:
                    limiter.succeeded(sent)
                    failures = 0
                else:
                    limiter.throttled(sent, retry_after)
                    failures += 1
                limiter.leave()
                events.append((loop.time() - began, answered))

        async with asyncio.TaskGroup() as group:
            budgets, work = [], []
            for _ in range(processes):
                budget = Process(row, processes, limits or Limits())
                limiter = Limiter(PLACES // processes, sleep=_sleep, clock=loop.time)
                limiter.follow(budget)
                budgets.append(budget)
                group.create_task(budget.run())
                work += [group.create_task(worker(limiter, budget)) for _ in range(WORKERS)]
            await asyncio.gather(*work)
            for budget in budgets:
                budget.ended = True
        settled = [ok for at, ok in events if SETTLE <= at < SETTLE + MEASURED]
        return sum(settled) / MEASURED, 1 - sum(settled) / len(settled)

    return run_in_virtual_time(main())


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("rate", [20, 100])
def test_an_unknown_limit_is_used_to_90_percent_with_under_2_percent_throttled(
    rate: float, processes: int
) -> None:
    """Each of three processes found the limit by itself and saw the others' load in its own
    throttles: one in 20 runs stayed at 12 to 19 % throttled."""
    outcomes = [
        simulate(Endpoint(rate=rate, burst=max(4, rate / 10), latency=0.05), processes, seed)
        for seed in range(5)
    ]
    assert statistics.median(answered for answered, _ in outcomes) >= 0.9 * rate
    assert min(answered for answered, _ in outcomes) >= 0.8 * rate
    assert max(throttled for _, throttled in outcomes) < 0.02


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_throttles_that_come_at_any_load_do_not_slow_down(share: float, processes: int) -> None:
    answered, throttled = simulate(Endpoint(turned_away=share, latency=0.05), processes)
    # each worker is away for about 0.4 s after a throttle, longer after several
    workers = WORKERS * processes / (0.05 + share * 0.6 / (1 - share))
    most = min(PLACES // processes * processes / 0.05 * (1 - share), workers)
    assert answered >= 0.25 * most
    assert throttled == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_limit_that_is_told_is_kept_without_a_throttle(processes: int) -> None:
    endpoint = Endpoint(rate=100, burst=10, latency=0.05)
    answered, throttled = simulate(endpoint, processes, limits=Limits(6000))
    assert answered >= 0.95 * 100
    assert throttled < 0.001


@pytest.mark.parametrize("processes", [1, 3])
def test_a_limit_that_is_told_too_high_is_found(processes: int) -> None:
    """Another team used the same key: half of what the YAML said was left."""
    endpoint = Endpoint(rate=50, burst=5, latency=0.05)
    answered, throttled = simulate(endpoint, processes, limits=Limits(6000))
    assert answered >= 0.9 * 50
    assert throttled < 0.02


@pytest.mark.parametrize(
    ("endpoint", "processes", "allowed"),
    [
        pytest.param(lambda: Endpoint(permits=16), 1, 160, id="16 permits"),
        pytest.param(lambda: Endpoint(permits=16, rate=50, burst=10), 3, 50, id="both"),
    ],
)
def test_places_that_are_limited_are_still_found(
    endpoint: Callable[[], Endpoint], processes: int, allowed: float
) -> None:
    answered, throttled = simulate(endpoint(), processes)
    assert answered >= 0.9 * allowed
    assert throttled < 0.02


# ---- one step at a time -----------------------------------------------------------------------

PACED = FoundRate(per_second=100.0, generation=7, since=50.0, too_much=100 / 0.95)


def test_one_event_lowers_the_rate_once_whoever_notices_it() -> None:
    notice = Outcomes(7, answered=30, throttled=2, seconds=1.0, holders=1)
    once = noted(PACED, notice, 51.0)
    assert once.per_second is not None
    assert once.per_second < 95
    assert once.generation == 8
    assert noted(once, notice, 51.1) == once, "sent before the rate was lowered"


def test_one_processs_throttles_wait_for_what_the_others_saw() -> None:
    """The one that is throttled is heard first: two of its three requests, none of the others'."""
    first = noted(PACED, Outcomes(7, answered=1, throttled=2, seconds=0.1, holders=3), 50.1)
    assert first.per_second == 100
    others = Outcomes(7, answered=60, seconds=1.0, holders=3)
    lowered = noted(first, others, 50.7)
    assert lowered.generation == 8
    assert 85 <= (lowered.per_second or 0) < 95


def test_what_was_throttled_before_the_limit_was_told_is_forgotten() -> None:
    """The first burst left before an answer had named the limit; at 63 % of it a run went on."""
    told = Outcomes(7, answered=1, given=200.0)
    assert noted(PACED, told, 51.0) == FoundRate(generation=8)


def test_nothing_is_counted_where_nothing_is_throttled() -> None:
    """An endpoint without limits: no row is written for it."""
    idle = FoundRate(generation=3)
    assert noted(idle, Outcomes(3, answered=1000, seconds=1.0), 60.0) is idle


def test_it_survives_the_database() -> None:
    after = noted(PACED, Outcomes(7, answered=50, throttled=10, seconds=1.0), 51.0)
    assert len(after.levels) == 1
    back = FoundRate.from_json(json.loads(json.dumps(after.to_json())))
    assert replace(back, levels=()) == replace(after, levels=())
    assert back.levels[0].share == pytest.approx(after.levels[0].share, abs=0.001)
