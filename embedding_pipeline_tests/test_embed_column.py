"""One run of a column: identity, lease, forecast, and what it leaves in the books."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from embedding_pipeline import embed_column as subject
from embedding_pipeline.backfill import BackfillError, Options
from embedding_pipeline.embed_column import embed_column, forecast
from embedding_pipeline.errors import IdentityError, LeaseError, PipelineError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.store import bulk_load
from embedding_pipeline.store import lease as lease_module
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.indexes import build_hnsw, index_state
from embedding_pipeline.store.lease import Lease, read_leases
from embedding_pipeline.store.pending import count_kinds
from embedding_pipeline_tests.faults.server import FaultServer, Status
from embedding_pipeline_tests.rows import fill, make_column, rebind, wrong_rows
from embedding_pipeline_tests.tables import create_docs, spec

pytestmark = pytest.mark.timeout(90)
Connection = psycopg.Connection[Any]
PARTITIONS = ["(null)", "a", "b", "c"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """The `tei` provider."""
    with FaultServer(dimensions=4, model="test-model-4") as server:
        monkeypatch.setenv("EMBEDDING_SERVICE_URL", server.tei_url)
        load_settings.cache_clear()
        yield server
    load_settings.cache_clear()


@pytest.fixture
def column(connection: Connection, server: FaultServer) -> Column:
    create_docs(connection, 80)
    return make_column(connection, spec())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease_module, "LAPSE_SECONDS", 1.5)


def test_a_run_embeds_accounts_and_releases(
    database: str, connection: Connection, column: Column, server: FaultServer
) -> None:
    said: list[str] = []

    run = embed_column(database, column, PARTITIONS, Options(), run_id="run-1", report=said.append)

    assert wrong_rows(connection, column) == []
    assert run.remaining == {}
    assert run.held == {}
    assert run.outcome.total.embedded == 80
    assert "80 rows pending in 4 of 4 partitions" in said[0]
    row = connection.execute(
        "SELECT run_id, embedded, tokens, requests FROM embedding_pipeline.run_result"
    ).fetchone()
    assert row == ("run-1", 80, server.count.tokens, server.count.requests)
    assert not any(lease.live for lease in read_leases(connection, column).values())
    row = connection.execute(
        "SELECT pending_since FROM embedding_pipeline.embedding_column"
    ).fetchone()
    assert row == (None,)


def test_a_bulk_run_drops_an_index_of_an_empty_column_before_it_writes(
    database: str, connection: Connection, column: Column, monkeypatch: pytest.MonkeyPatch
) -> None:
    # left in place, an index that finds nothing makes the load several times slower
    monkeypatch.setattr(bulk_load, "BULK_ROWS", 50)
    connection.execute("ANALYZE docs")
    build_hnsw(connection, column)
    said: list[str] = []

    embed_column(database, column, PARTITIONS, Options(), report=said.append)

    assert index_state(connection, column).state == "missing"
    assert any("the index is built again once the rows are in" in line for line in said)
    assert wrong_rows(connection, column) == []
    assert build_hnsw(connection, column).built


def test_a_limited_run_says_what_remains(
    database: str, connection: Connection, column: Column
) -> None:
    run = embed_column(database, column, PARTITIONS, Options(limit=30))

    assert run.remaining == {"a": 10, "b": 20, "c": 20}
    assert run.outcome.stopped is not None
    row = connection.execute(
        "SELECT pending_since FROM embedding_pipeline.embedding_column"
    ).fetchone()
    assert row is not None
    assert row[0] is not None


def test_nothing_pending_asks_nobody(
    database: str, connection: Connection, column: Column, server: FaultServer
) -> None:
    fill(connection, column)
    run = embed_column(database, column, PARTITIONS, Options())

    assert run.outcome.total.read == 0
    assert server.count.requests == server.count.info == 0
    assert read_leases(connection, column) == {}


def test_a_key_that_is_no_partition_is_refused_before_anything_is_paid(
    database: str, connection: Connection, column: Column, server: FaultServer
) -> None:
    by_month = spec(partitions={"by": "month", "column": "created_at"})
    months = Column(by_month, column.embedding, column.facts)
    with pytest.raises(PipelineError, match="2025-13"):
        embed_column(database, months, ["2025-01", "2025-13"], Options())
    with pytest.raises(PipelineError, match="not a partition key"):
        embed_column(database, column, ["a", "%zz"], Options())
    assert server.count.requests == 0
    # a value that the data do not have is an empty partition, not an error
    assert embed_column(database, column, ["nobody"], Options()).outcome.total.read == 0


def test_another_recipe_is_refused(database: str, connection: Connection, column: Column) -> None:
    other = rebind(connection, column, model="another")
    with pytest.raises(IdentityError):
        embed_column(database, other, PARTITIONS, Options())


@pytest.mark.usefixtures("quick")
def test_partitions_of_a_live_run_are_left_out(
    database: str, connection: Connection, column: Column, server: FaultServer
) -> None:
    with Lease(database, column, ["a"], "other") as other:
        other.acquire()
        run = embed_column(database, column, PARTITIONS, Options())
        assert list(run.held) == ["a"]
        assert run.outcome.total.embedded == 60
        sent = server.count.requests
        with pytest.raises(LeaseError, match="run other"):
            embed_column(database, column, ["a"], Options())
    assert server.count.requests == sent, "nothing is paid for twice"
    assert embed_column(database, column, ["a"], Options()).outcome.total.embedded == 20


@pytest.mark.usefixtures("quick")
def test_a_dead_runs_partitions_are_waited_for(
    database: str, connection: Connection, column: Column
) -> None:
    Lease(database, column, ["a"], "dead").acquire()

    run = embed_column(database, column, PARTITIONS, Options())

    assert run.held == {}
    assert wrong_rows(connection, column) == []


def test_a_failed_run_is_accounted_for_and_backs_off(
    database: str, connection: Connection, column: Column, server: FaultServer
) -> None:
    server.rule = lambda number, _: Status(401, words="bad key") if number >= 2 else None

    with pytest.raises(BackfillError, match="bad key") as caught:
        embed_column(database, column, PARTITIONS, Options(batch_size=16, concurrency=1))

    row = connection.execute("SELECT embedded FROM embedding_pipeline.run_result").fetchone()
    assert row == (caught.value.outcome.total.embedded,)
    assert row[0] == 80 - count_kinds(connection, column).pending > 0
    leases = read_leases(connection, column)
    assert all(lease.waiting_seconds > 0 for lease in leases.values())
    assert all("bad key" in (lease.last_error or "") for lease in leases.values())


def test_a_run_that_failed_says_why_though_the_database_is_away(
    database: str, column: Column, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.rule = lambda *_: Status(401, words="bad key")

    def away(*_: Any) -> None:
        raise psycopg.OperationalError("the server is away")

    monkeypatch.setattr(subject, "record_run", away)
    monkeypatch.setattr(subject._account.retry, "stop", lambda _: True)
    said: list[str] = []
    with pytest.raises(BackfillError, match="bad key"):
        embed_column(database, column, PARTITIONS, Options(), report=said.append)
    assert any("could not be recorded" in line for line in said)


def test_too_many_refusals_stop_the_run_at_the_share_of_the_yaml(
    database: str, connection: Connection, column: Column, server: FaultServer
) -> None:
    server.poison = {f"text number {n}": Status(413) for n in range(1, 80)}
    with pytest.raises(BackfillError, match="max_quarantined_share"):
        embed_column(database, column, PARTITIONS, Options(batch_size=4, concurrency=1))
    first = count_kinds(connection, column).quarantined
    assert first > subject.REFUSALS_ALWAYS_ALLOWED
    with pytest.raises(BackfillError, match="max_quarantined_share"):
        embed_column(database, column, PARTITIONS, Options(batch_size=4, concurrency=1))
    again = count_kinds(connection, column).quarantined
    assert again < first + subject.REFUSALS_ALWAYS_ALLOWED, "not another twenty each time"


def test_a_forecast_reads_a_sample_and_counts_tokens(
    database: str, connection: Connection, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_docs(connection, 4000)
    column = make_column(connection, spec())
    fill_half = "UPDATE docs SET body = NULL, embedding_4 = '[1,1,1,1]' WHERE tenant IS NULL"
    connection.execute(fill_half.encode())
    read: list[str] = []
    original = subject.make_embedder

    def counting(embedding: Any) -> Any:
        embedder = original(embedding)

        def estimate(text: str) -> int:
            read.append(text)
            return 3

        monkeypatch.setattr(embedder, "estimate_tokens", estimate)
        return embedder

    monkeypatch.setattr(subject, "make_embedder", counting)

    seen = forecast(database, column)

    assert seen.rows == 4000
    assert len(read) <= 200
    assert seen.tokens == pytest.approx(9000, rel=0.05), "1,000 rows only lose their vectors"
    assert len(seen.samples) == 3
    assert forecast(database, column, ["a"]).rows == 1000
    assert server.count.requests == 0


def test_a_bulk_run_ends_with_a_vacuum(
    database: str,
    connection: Connection,
    column: Column,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right after a bulk fill, counting nothing read every page of the pending index."""
    vacuums = "SELECT vacuum_count FROM pg_stat_user_tables WHERE relid = $1"
    monkeypatch.setattr(subject, "BULK_ROWS", 81)
    embed_column(database, column, PARTITIONS, Options())
    connection.execute("SELECT pg_stat_clear_snapshot()")
    assert connection.execute(vacuums, [column.facts.oid]).fetchone() == (0,)

    clear = sql.SQL("UPDATE {} SET {} = NULL").format(column.relation, column.vector)
    connection.execute(clear)
    monkeypatch.setattr(subject, "BULK_ROWS", 80)
    embed_column(database, column, PARTITIONS, Options())
    assert wrong_rows(connection, column) == []
    assert connection.execute(vacuums, [column.facts.oid]).fetchone() == (1,)
