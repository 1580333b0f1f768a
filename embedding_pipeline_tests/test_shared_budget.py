"""One endpoint's limits kept by several processes, through a real database."""

import asyncio
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_pipeline.embedders.budget import SHARE
from embedding_pipeline.embedders.found_rate import FoundRate
from embedding_pipeline.embedders.port import Endpoint
from embedding_pipeline.embedders.tally import Event
from embedding_pipeline.shared_budget import SharedBudget
from embedding_pipeline.store import endpoint_budget as store
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.endpoint_budget import (
    EndpointKey,
    Holding,
    Limits,
    Shared,
    allot,
    fair_places,
)
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline_tests.embedders.load import Load, LoadProcess
from embedding_pipeline_tests.faults.server import FaultServer, WatchedRateLimit
from embedding_pipeline_tests.sessions import wait_until

Connection = psycopg.Connection[Any]


@pytest.fixture
def url(database: str, connection: Connection) -> str:
    """A database with the project's tables."""
    migrate(connection, [])
    return database


def endpoint(**limits: Any) -> Endpoint:
    return Endpoint(
        name="limited", dialect="openai", base_url="http://user:secret@127.0.0.1:9/v1", **limits
    )


@pytest.fixture
def make(url: str) -> Iterator[Callable[..., SharedBudget]]:
    """Budgets as several processes would have them; closed at the end."""
    with ExitStack() as opened:

        def budget(**limits: Any) -> SharedBudget:
            model = limits.pop("model", "")
            made = SharedBudget(url, endpoint(**limits), model)
            opened.callback(made.close)
            return made

        yield budget


# ---- who gets how many places -----------------------------------------------------------------

wants = st.lists(st.integers(0, 60), min_size=1, max_size=8)


@given(st.integers(1, 64), wants)
def test_places_are_shared_fairly_and_none_is_left(ceiling: int, wanted: list[int]) -> None:
    holders = {f"p{n}": Holding(0, want, 0.0, float(n)) for n, want in enumerate(wanted)}
    fair = fair_places(ceiling, holders)
    assert sum(fair.values()) == ceiling
    for name, each in holders.items():
        assert fair[name] >= min(max(1, each.wanted), ceiling // len(holders))


@settings(max_examples=200)
@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.booleans()), max_size=60),
)
def test_no_order_of_events_passes_the_ceiling(
    ceiling: int, events: list[tuple[int, int, bool]]
) -> None:
    """Processes sync, start requests, end them and die, in any order."""
    holders: dict[str, Holding] = {}
    in_flight = dict.fromkeys((f"p{n}" for n in range(5)), 0)
    for now, (number, wanted, dies) in enumerate(events):
        name = f"p{number}"
        if dies:
            holders.pop(name, None)  # as its lapse does, once what it had sent has ended
            in_flight[name] = 0
            continue
        mine = allot(name, wanted, in_flight[name], ceiling, Shared(now, 0, Limits(), holders))
        holders = {**holders, name: mine.held}
        in_flight[name] = min(max(in_flight[name] // 2, wanted), mine.allowed)
        assert sum(in_flight.values()) <= sum(each.places for each in holders.values()) <= ceiling


def test_who_came_first_goes_on_when_there_are_fewer_places_than_processes() -> None:
    holders = {f"p{n}": Holding(0, 9, 0.0, float(n)) for n in range(5)}
    assert fair_places(3, holders) == {"p0": 1, "p1": 1, "p2": 1, "p3": 0, "p4": 0}


# ---- the timeline -----------------------------------------------------------------------------


def test_reservations_follow_each_other_and_need_one_statement(url: str) -> None:
    key = EndpointKey.of("e", "http://host")
    with connect(url) as first, connect(url) as second:
        one = store.reserve(first, key, 100, Limits())
        assert one.begins - one.now == pytest.approx(0, abs=0.1)
        two = store.reserve(second, key, 10, Limits(requests_per_minute=60))
        assert two.begins == pytest.approx(one.begins + 100, abs=1e-3)
        three = store.reserve(first, key, 1, Limits(tokens_per_minute=7))
        assert three.begins == pytest.approx(one.begins + 110, abs=1e-3)
        assert three.learnt == Limits(60, 7)
        other = store.reserve(first, EndpointKey.of("f", "http://host"), 1, Limits())
        assert other.begins == pytest.approx(other.now, abs=0.1)


def test_limits_learnt_long_ago_are_forgotten(url: str, connection: Connection) -> None:
    key = EndpointKey.of("e", "http://host")
    store.reserve(connection, key, 0, Limits(60, 7))
    connection.execute(
        "UPDATE embedding_pipeline.endpoint_budget SET learnt_at = now() - interval '2 days'"
    )
    assert store.reserve(connection, key, 0, Limits()).learnt == Limits()


def test_two_models_of_one_vendor_do_not_wait_for_each_other(
    make: Callable[..., SharedBudget], connection: Connection
) -> None:
    """OpenAI's limits are per model: a backfill of one model took half of what the other may."""
    small = make(requests_per_minute=600, model="small")
    large = make(requests_per_minute=600, model="large")
    store.reserve(connection, small._rate_key, 1000, Limits())

    async def main() -> None:
        waiting = asyncio.create_task(small.acquire(1))
        await asyncio.wait_for(large.acquire(1), 30)
        large.release(1, 1)
        assert not waiting.done(), "its own timeline is taken for a quarter of an hour"
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(main())


def test_two_processes_together_send_no_more_than_is_allowed(
    make: Callable[..., SharedBudget],
) -> None:
    """Each of two runs kept 3,000 requests a minute, which made 6,000."""
    budgets = [make(requests_per_minute=3000), make(requests_per_minute=3000)]

    async def main() -> float:
        began = time.monotonic()

        async def one(budget: SharedBudget) -> None:
            for _ in range(60):
                await budget.acquire(1)
                budget.release(1, 1)

        await asyncio.gather(*map(one, budgets))
        return time.monotonic() - began

    assert asyncio.run(main()) > 0.85 * 120 / (SHARE * 50)


def test_tokens_are_kept_too_and_corrected_by_the_providers_count(
    make: Callable[..., SharedBudget],
) -> None:
    """1,000 tokens a second; what is estimated at 100 turns out to be 50."""
    budget = make(tokens_per_minute=60_000)

    async def main() -> float:
        began = time.monotonic()
        for _ in range(40):
            await budget.acquire(100)
            budget.release(100, 50)
        return time.monotonic() - began

    seconds = asyncio.run(main())
    assert seconds > 1.5, "2,000 tokens in less than their two seconds"


def test_what_one_process_learns_holds_for_all(make: Callable[..., SharedBudget]) -> None:
    first, second = make(), make()

    async def use(budget: SharedBudget) -> None:
        await budget.acquire(1)
        budget.release(1, 1)

    asyncio.run(use(second))
    assert not second.limits
    first.learn(6000, 1_000_000)
    asyncio.run(use(first))
    wait_until(lambda: bool(second.limits), "the limit to be known to the other process")
    assert second.limits == Limits(6000, 1_000_000)
    other = make(model="another")
    asyncio.run(use(other))
    assert not other.limits, "each of OpenAI's models has limits of its own"
    given = make(requests_per_minute=60)
    given.learn(6000, None)
    assert given.limits.requests_per_minute == 60


def test_a_rate_that_was_found_is_one_for_all_processes(
    make: Callable[..., SharedBudget], url: str, connection: Connection
) -> None:
    first, second = make(), make()

    async def use(budget: SharedBudget, became: Event, times: int = 1) -> None:
        for _ in range(times):
            await budget.acquire(1)
            budget.note(budget.generation, "sent")
            budget.note(budget.generation, became)
            budget.release(1, 1)

    asyncio.run(use(second, "answered"))
    asyncio.run(use(first, "throttled"))
    wait_until(lambda: first.places_are_not_why, "the rate to be measured")
    wait_until(lambda: second.places_are_not_why, "the other one to take part")

    def both_use_it() -> bool:
        asyncio.run(use(first, "answered", times=8))
        asyncio.run(use(second, "throttled", times=2))
        return first.paced and second.paced

    wait_until(both_use_it, "a rate to be found", 30)
    wait_until(lambda: first.generation == second.generation, "one generation")
    key = first._rate_key
    shared = store.read(connection, key)
    assert shared is not None
    assert shared.found.per_second is not None
    # only from the version that was read
    found = store.replace_found_rate(connection, key, shared.found_version - 1, shared.found)
    assert not found
    after = store.read(connection, key)
    assert after is not None
    assert after.found.generation >= shared.found.generation


def test_a_rate_found_long_ago_is_forgotten(url: str, connection: Connection) -> None:
    key = EndpointKey.of("e", "http://host")
    store.create(connection, key)
    shared = store.read(connection, key)
    assert shared is not None
    for since, kept in ((shared.now - 3600, 5.0), (shared.now - 100_000, None)):
        shared = store.read(connection, key)
        assert shared is not None
        found = FoundRate(per_second=5.0, generation=3, since=since)
        assert store.replace_found_rate(connection, key, shared.found_version, found)
        again = store.read(connection, key)
        assert again is not None
        assert again.found.per_second == kept
        assert store.reserve(connection, key, 0, Limits()).found.per_second == kept


# ---- the ceiling ------------------------------------------------------------------------------


def test_the_ceiling_holds_for_all_and_a_newcomer_gets_its_share(
    make: Callable[..., SharedBudget], url: str
) -> None:
    # of two models: each has limits of its own a minute, the endpoint takes four at once
    first, second = make(concurrency=4, model="small"), make(concurrency=4, model="large")
    most = flying = 0

    async def request(budget: SharedBudget) -> None:
        nonlocal most, flying
        await budget.acquire(1)
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.02)
        flying -= 1
        budget.release(1, 1)

    async def main() -> None:
        served = asyncio.Event()

        async def never_stops() -> None:
            while not served.is_set():
                await request(first)

        alone = [asyncio.create_task(never_stops()) for _ in range(8)]
        await asyncio.sleep(0)
        newcomer = asyncio.gather(*(request(second) for _ in range(60)))
        try:
            await asyncio.wait_for(newcomer, 60)
        finally:
            served.set()
        await asyncio.gather(*alone)

    asyncio.run(main())
    assert most == 4
    first.close()
    second.close()
    with connect(url) as connection:
        row = connection.execute(
            "SELECT holders, endpoint, address_hash FROM embedding_pipeline.endpoint_budget"
        ).fetchall()
    assert row == [({}, "limited", EndpointKey.of("", endpoint().address).address_hash)]


def test_a_cancelled_wait_holds_nothing(make: Callable[..., SharedBudget]) -> None:
    budget = make(concurrency=1, requests_per_minute=6000)

    async def main() -> None:
        await budget.acquire(1)
        waiting = asyncio.create_task(budget.acquire(1))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        budget.release(1, 1)
        await asyncio.wait_for(budget.acquire(1), 10)
        budget.release(1, 1)

    asyncio.run(main())


# ---- a database that is away ------------------------------------------------------------------


def test_without_a_database_each_process_keeps_the_limit_itself_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    budget = SharedBudget(
        "postgresql://nobody:hidden@127.0.0.1:9/none", endpoint(requests_per_minute=3000)
    )

    async def main() -> float:
        began = time.monotonic()
        for _ in range(50):
            await budget.acquire(1)
            budget.release(1, 1)
        return time.monotonic() - began

    with caplog.at_level(logging.WARNING):
        seconds = asyncio.run(main())
    budget.close()
    assert seconds > 0.8
    assert len(caplog.messages) == 1
    assert "cannot connect" in caplog.text
    assert "hidden" not in caplog.text
    assert "secret" not in caplog.text


def test_without_a_database_a_rate_is_found_alone() -> None:
    budget = SharedBudget("postgresql://nobody:hidden@127.0.0.1:9/none", endpoint())

    async def main() -> None:
        while not budget.paced:
            await budget.acquire(1)
            budget.note(budget.generation, "sent")
            budget.note(budget.generation, "throttled" if random.random() < 0.5 else "answered")
            budget.release(1, 1)
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(main(), 30))
    assert budget._away
    assert not budget.limits
    budget.close()


def test_a_database_that_comes_back_is_used_again(
    url: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedding_pipeline import shared_budget

    monkeypatch.setattr(shared_budget, "RETRY_SECONDS", 0.05)
    budget = SharedBudget(url, endpoint(requests_per_minute=6000))
    connection.execute("ALTER TABLE embedding_pipeline.endpoint_budget RENAME TO elsewhere")

    async def use() -> None:
        await budget.acquire(1)
        budget.release(1, 1)

    asyncio.run(use())
    assert budget._away
    connection.execute("ALTER TABLE embedding_pipeline.elsewhere RENAME TO endpoint_budget")
    wait_until(lambda: not budget._away, "the database to be used again")
    asyncio.run(use())
    budget.close()


# ---- real processes ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("headers", [False, True], ids=["from the YAML", "from the headers"])
def test_three_processes_use_what_one_limit_allows(url: str, headers: bool) -> None:
    """Three nightly runs on one API key spent a third of their requests on being throttled."""
    limit = WatchedRateLimit(per_second=20, burst=4, headers=headers)
    with FaultServer(rate_limit=limit, delay=0.05) as server, ExitStack() as opened:
        load = Load(server.openai_url, database=url, requests_per_minute=None if headers else 1200)
        runs = [opened.enter_context(LoadProcess(load)) for _ in range(3)]
        for run in runs:
            run.begin()
        wait_until(lambda: limit.passed >= 60, "the processes to settle", 60)
        limit.restart()
        wait_until(lambda: limit.passed >= 160, "eight seconds' worth of requests", 60)
        passed, refused, unused = limit.passed, limit.refused, limit.unused
        assert refused < 0.02 * (passed + refused)
        assert passed >= 0.9 * (passed + unused)


@pytest.mark.slow
def test_three_processes_find_one_limit_that_nobody_tells(url: str, connection: Connection) -> None:
    """Each found it out for itself and was throttled for the others' load. The bounds allow for a
    busy machine; `test_found_rate` has the narrow ones."""
    limit = WatchedRateLimit(per_second=20, burst=4)
    with FaultServer(rate_limit=limit, delay=0.05) as server, ExitStack() as opened:
        load = Load(server.openai_url, database=url)
        runs = [opened.enter_context(LoadProcess(load)) for _ in range(3)]
        for run in runs:
            run.begin()
        wait_until(lambda: limit.passed >= 200, "the processes to settle", 60)
        limit.restart()
        wait_until(lambda: limit.passed >= 300, "fifteen seconds' worth of requests", 90)
        passed, refused, unused = limit.passed, limit.refused, limit.unused
        row = connection.execute(
            "SELECT (found_rate ->> 'per_second')::float8 FROM embedding_pipeline.endpoint_budget"
            " WHERE found_rate IS NOT NULL"
        ).fetchall()
    assert refused < 0.05 * (passed + refused)
    assert passed >= 0.7 * (passed + unused)
    assert len(row) == 1
    assert 10 <= row[0][0] <= 30


@pytest.mark.slow
def test_three_processes_keep_one_ceiling_and_a_killed_ones_places_are_free(url: str) -> None:
    """TEI takes 64 inputs at once; three processes with 8 requests of 8 sent 192."""
    with FaultServer(permits=64, delay=0.05, info={"max_concurrent_requests": 64}) as server:
        count = server.count
        load = Load(server.tei_url, dialect="tei", database=url, inputs=8)
        with ExitStack() as opened:
            runs = [opened.enter_context(LoadProcess(load)) for _ in range(3)]
            for run in runs:
                run.begin()
            wait_until(lambda: count.most_in_flight == 8, "the ceiling to be reached", 60)
            with connect(url) as connection:
                wait_until(lambda: len(places(connection)) == 3, "every process to take part")
                wait_until(lambda: sorted(places(connection)) == [2, 3, 3], "fair shares")
                os.kill(runs[0].process.pid, signal.SIGKILL)
                wait_until(lambda: sorted(places(connection)) == [4, 4], "its places", 60)
            asked = count.requests
            count.most_in_flight = 0
            wait_until(lambda: count.requests >= asked + 200, "200 more requests", 60)
            assert count.most_in_flight <= 8
    assert count.statuses[429] == 0


def places(connection: Connection) -> list[int]:
    rows = connection.execute(
        "SELECT (value ->> 'places')::int FROM embedding_pipeline.endpoint_budget,"
        " jsonb_each(holders)"
    )
    return [row[0] for row in rows]
