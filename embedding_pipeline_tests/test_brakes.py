"""Pauses and daily cost caps: a run in progress stops, keeps what it has, and goes on later."""

import asyncio
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from embedding_pipeline.backfill import Options
from embedding_pipeline.brakes import RunBrake, held_back
from embedding_pipeline.embed_column import ColumnRun, embed_column, make_embedder
from embedding_pipeline.embedders import endpoints
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.pauses import pause, pauses, resume
from embedding_pipeline.store.pending import count_kinds
from embedding_pipeline.store.spending import (
    ALL,
    DailyCaps,
    Spending,
    cap_in_the_way,
    reached,
    spending_today,
)
from embedding_pipeline_tests.faults.server import FaultServer, HalfResponse, Status
from embedding_pipeline_tests.project import fresh_settings, set_variables, use_database
from embedding_pipeline_tests.rows import make_column, wrong_rows
from embedding_pipeline_tests.tables import create_docs, embedding, spec

pytestmark = pytest.mark.timeout(90)
Connection = psycopg.Connection[Any]
PARTITIONS = ["(null)", "a", "b", "c"]
BATCH, CONCURRENCY = 4, 2
PROVIDERS = """
providers:
  paid:
    dialect: openai
    address: {address}
    price_per_million_tokens: {{test-model: 1000000}}
    give_up_after_seconds: {patience}
{cap}
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """Provider `paid`: a dollar a token, three tokens a row, nothing capped so far."""
    with FaultServer(dimensions=4) as server:
        monkeypatch.setattr(endpoints, "PROVIDERS_FILE", tmp_path / "providers.yaml")
        declare(tmp_path, server)
        yield server


def declare(
    folder: Path, server: FaultServer, cap: float | None = None, patience: float = 0.5
) -> None:
    written = f"    daily_cost_cap: {cap}" if cap is not None else ""
    (folder / "providers.yaml").write_text(
        PROVIDERS.format(address=server.openai_url, cap=written, patience=patience)
    )


@pytest.fixture
def table(
    connection: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[TableSpec]:
    create_docs(connection, 80)
    with fresh_settings():
        use_database(monkeypatch, database)
        yield spec(embeddings=[embedding(provider="paid", model="test-model")])


@pytest.fixture
def column(connection: Connection, server: FaultServer, table: TableSpec) -> Column:
    """Eighty pending rows in four partitions; each costs three dollars."""
    return make_column(connection, table)


def embed(database: str, column: Column, *partitions: str, **options: Any) -> ColumnRun:
    options = {"batch_size": BATCH, "concurrency": CONCURRENCY} | options
    return embed_column(database, column, partitions or PARTITIONS, Options(**options))


def spent(connection: Connection) -> dict[str, float]:
    return {name: today.usd for name, today in spending_today(connection, "UTC").items()}


# ---- pause ------------------------------------------------------------------------------------


def test_a_pause_in_mid_run_stops_it_at_the_next_request_and_loses_nothing(
    database: str, connection: Connection, column: Column, server: FaultServer
) -> None:
    def pause_at_the_fifth(number: int, _: list[str]) -> None:
        if number == 4:
            with connect(database) as other:
                pause(other, column.facts, None, by="anna", reason="the disk is full")

    server.rule = pause_at_the_fifth

    run = embed(database, column)

    held = run.outcome.held
    assert held is not None
    assert held.by == "pause"
    assert "by anna: the disk is full" in held.reason
    assert run.outcome.stopped == held.reason
    # only what had leave already when the pause was committed
    assert 5 <= server.count.requests <= 5 + CONCURRENCY - 1
    assert run.outcome.total.embedded == server.count.inputs
    assert 80 - count_kinds(connection, column).pending == server.count.inputs
    assert sum(run.remaining.values()) == 80 - server.count.inputs

    server.rule = None
    again = embed(database, column)
    assert again.outcome.total.read == 0, "still paused"
    assert again.outcome.held is not None

    resume(connection, column.facts, None)
    rest = embed(database, column)
    assert rest.outcome.held is None
    assert wrong_rows(connection, column) == []
    assert server.count.inputs == 80, "nothing was paid for twice"


def test_a_paused_run_is_not_a_failed_one(
    database: str, connection: Connection, column: Column, server: FaultServer
) -> None:
    """It holds no lease, backs off from nothing, and its spending is in the books."""
    pause(connection, column.facts, None, by="anna")
    run = embed(database, column)
    assert run.outcome.stopped is not None
    assert "paused since" in run.outcome.stopped
    assert server.count.requests == 0
    assert connection.execute("SELECT count(*) FROM embedding_pipeline.lease").fetchone() == (0,)


def test_one_column_of_a_table_can_be_paused(
    database: str, connection: Connection, server: FaultServer
) -> None:
    table = spec(
        embeddings=[
            embedding("first", provider="paid", model="test-model"),
            embedding("second", provider="paid", model="test-model"),
        ]
    )
    create_docs(connection, 8)
    make_column(connection, table)
    first, second = bind_columns(connection, table)
    held, new = pause(connection, first.facts, "first", by="anna", reason="costs")
    assert (held.column, held.by, held.reason, new) == ("first", "anna", "costs", True)

    found = held_back(connection, first)
    assert found is not None
    assert str(found).endswith("by anna: costs")
    assert held_back(connection, second) is None


def test_pausing_twice_keeps_who_was_first(connection: Connection, column: Column) -> None:
    first, _ = pause(connection, column.facts, None, by="anna", reason="costs")
    second, new = pause(connection, column.facts, None, by="bruno")
    assert (second, new) == (first, False)
    third, _ = pause(connection, column.facts, None, by="bruno", reason="disk")
    assert (third.by, third.reason, third.since) == ("anna", "disk", first.since)
    assert len(pauses(connection, column.facts)) == 1


def test_resuming_lifts_what_was_asked_for(connection: Connection, column: Column) -> None:
    assert resume(connection, column.facts, None) == []
    pause(connection, column.facts, None, by="anna")
    pause(connection, column.facts, "embedding_4", by="anna")
    with pytest.raises(PipelineError, match="resume the whole table"):
        resume(connection, column.facts, "embedding_4")
    assert [each.column for each in resume(connection, column.facts, None)] == ["", "embedding_4"]
    assert pauses(connection, column.facts) == []


# ---- daily cost caps --------------------------------------------------------------------------


def test_a_run_stops_before_it_would_pass_its_providers_cap(
    database: str,
    connection: Connection,
    column: Column,
    server: FaultServer,
    tmp_path: Path,
) -> None:
    declare(tmp_path, server, cap=100)

    run = embed(database, column)

    assert 0 < server.count.tokens <= 100
    # what a request can come to at most is what the tokens of its bytes can
    most = BATCH * make_embedder(column.embedding).most_tokens("text number 80")
    assert server.count.tokens > 100 - most
    held = run.outcome.held
    assert held is not None
    assert held.by == "daily_cost_cap"
    assert f"provider paid is reached: ${server.count.tokens:.4f} of $100 spent" in held.reason
    assert spent(connection) == {ALL: server.count.tokens, "paid": server.count.tokens}
    assert run.outcome.total.embedded == 80 - count_kinds(connection, column).pending

    # nobody starts another run for the little that is left
    assert held_back(connection, column) is not None
    before = server.count.requests
    assert embed(database, column).outcome.held is not None
    assert server.count.requests == before

    # a higher cap opens it again
    declare(tmp_path, server, cap=1000)
    assert held_back(connection, column) is None
    assert embed(database, column).outcome.held is None
    assert wrong_rows(connection, column) == []


def test_the_cap_of_all_providers_holds_too(
    database: str,
    connection: Connection,
    column: Column,
    server: FaultServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_variables(monkeypatch, EMBEDDING_DAILY_COST_CAP="100")
    run = embed(database, column)
    assert 0 < server.count.tokens <= 100
    assert run.outcome.held is not None
    assert "cap of all providers is reached" in run.outcome.held.reason


def test_a_provider_that_costs_nothing_is_not_held_by_a_cap(
    database: str,
    connection: Connection,
    server: FaultServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    table: TableSpec,
) -> None:
    (tmp_path / "providers.yaml").write_text(
        f"providers:\n  paid:\n    dialect: openai\n    address: {server.openai_url}\n"
    )
    set_variables(monkeypatch, EMBEDDING_DAILY_COST_CAP="0")
    column = make_column(connection, table)
    assert held_back(connection, column) is None
    assert embed(database, column).outcome.total.embedded == 80


def test_concurrent_runs_cannot_together_pass_a_cap(
    database: str, connection: Connection, column: Column, server: FaultServer, tmp_path: Path
) -> None:
    """Four runs at once, each of which could spend half of the cap by itself."""
    declare(tmp_path, server, cap=120)
    server.delay = 0.02

    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda key: embed(database, column, key), PARTITIONS))

    assert server.count.tokens <= 120
    assert sum(run.outcome.total.embedded for run in runs) * 3 == server.count.tokens
    assert any(run.outcome.held is not None for run in runs)
    assert spent(connection)["paid"] == server.count.tokens


def test_many_reservations_at_once_stay_within_the_cap(
    database: str, connection: Connection, column: Column
) -> None:
    """A request more than fits, from eight sessions that all begin with an empty day."""
    caps = DailyCaps("paid", own=100, all=1000, zone="UTC")

    def draw(_: int) -> int:
        async def main() -> int:
            brake, given = RunBrake(database, column, caps), 0
            for _ in range(20):
                try:
                    await brake.reserve(1.0)
                    given += 1
                except Exception:  # noqa: BLE001 - refused
                    break
            await brake.close()
            return given

        return asyncio.run(main())

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(draw, range(8))) == 100
    assert spent(connection) == {ALL: 100, "paid": 100}


def test_what_a_killed_run_had_in_flight_stays_counted(
    database: str, connection: Connection, column: Column
) -> None:
    caps = DailyCaps("paid", own=10, all=None, zone="UTC")

    async def die_after_reserving() -> None:
        brake = RunBrake(database, column, caps)
        await brake.reserve(9.0)
        await brake._connection.close()

    asyncio.run(die_after_reserving())
    assert spent(connection) == {ALL: 9, "paid": 9}
    assert reached(caps, spending_today(connection, "UTC")) is None, "a dollar is left"


def test_requests_that_fail_give_back_what_they_reserved(
    database: str, connection: Connection, column: Column, server: FaultServer
) -> None:
    server.rule = lambda *_: Status(401, words="bad key")
    with pytest.raises(PipelineError, match="bad key"):
        embed(database, column)
    assert spent(connection) == {ALL: 0, "paid": 0}


def test_requests_that_are_perhaps_billed_count_as_spent(
    tmp_path: Path, database: str, connection: Connection, column: Column, server: FaultServer
) -> None:
    """A proxy cut every other answer in half. The provider had done its work and counted it; the
    day's spending showed half of the bill."""
    declare(tmp_path, server, patience=60)
    server.rule = lambda number, _: HalfResponse() if number < 4 else None

    run = embed(database, column)

    assert run.outcome.total.embedded == 80
    # three dollars a row, and the four that were cut: of four rows each, at the most they can be
    assert run.outcome.unconfirmed_tokens >= 4 * 3 * BATCH
    billed = 240 + run.outcome.unconfirmed_tokens
    assert spent(connection) == {ALL: billed, "paid": billed}


def test_requests_that_are_perhaps_billed_do_not_pass_a_cap_when_they_are_repeated(
    tmp_path: Path, database: str, connection: Connection, column: Column, server: FaultServer
) -> None:
    """Each try of a request that broke was within what its first try had reserved."""
    declare(tmp_path, server, cap=100, patience=60)
    server.rule = lambda *_: HalfResponse()

    run = embed(database, column)

    held = run.outcome.held
    assert held is not None
    assert held.by == "daily_cost_cap"
    assert 0 < spent(connection)["paid"] == run.outcome.unconfirmed_tokens <= 100
    assert sum(server.count.sizes) * 3 <= 100, "what was sent would have passed the cap"
    assert run.outcome.total.embedded == 0


def test_yesterdays_spending_does_not_count(connection: Connection, column: Column) -> None:
    connection.execute(
        "INSERT INTO embedding_pipeline.daily_spending (day, provider, usd, stopped_cap_usd)"
        " VALUES ((now() AT TIME ZONE 'UTC')::date - 1, 'paid', 500, 1)"
    )
    caps = DailyCaps("paid", own=1, all=None, zone="UTC")
    assert reached(caps, spending_today(connection, "UTC")) is None


def test_a_day_begins_at_midnight_of_the_schedules_time_zone(
    database: str, connection: Connection, column: Column
) -> None:
    """The two ends of the world never have the same date."""
    days: list[date] = []
    for zone in ("Pacific/Kiritimati", "Pacific/Niue"):
        caps = DailyCaps("paid", own=None, all=None, zone=zone)

        async def spend(caps: DailyCaps = caps) -> None:
            brake = RunBrake(database, column, caps)
            days.append((await brake.reserve(1.0)).day or date.min)
            await brake.close()

        asyncio.run(spend())
        assert spending_today(connection, zone)["paid"].usd == 1
    assert days[0] - days[1] >= timedelta(days=1)


CAPS = DailyCaps("paid", own=10, all=100, zone="UTC")


@pytest.mark.parametrize(
    ("paid", "everything", "usd", "expected"),
    [
        (0, 0, 10, None),
        (0, 0, 10.01, "paid"),
        (9, 99, 1, None),
        (9, 99.5, 1, ALL),
        (9.5, 99.5, 1, "paid"),
    ],
)
def test_which_cap_is_in_the_way(
    paid: float, everything: float, usd: float, expected: str | None
) -> None:
    today = {"paid": Spending(paid), ALL: Spending(everything), "other": Spending(math.inf)}
    found = cap_in_the_way(CAPS, today, usd)
    assert (found and found[0]) == expected


def test_a_cap_at_which_a_run_stopped_stays_reached_until_it_is_raised() -> None:
    today = {"paid": Spending(9.9, stopped_cap=10)}
    words = reached(CAPS, today)
    assert words is not None
    assert "$9.9000 of $10" in words
    assert "after midnight (UTC)" in words
    assert reached(DailyCaps("paid", own=11, all=None, zone="UTC"), today) is None
    assert reached(DailyCaps("paid", own=9, all=None, zone="UTC"), today) is not None
    assert reached(DailyCaps("paid", own=None, all=None, zone="UTC"), today) is None
