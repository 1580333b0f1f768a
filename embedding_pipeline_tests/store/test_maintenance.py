"""VACUUM where many rows were written, bloated indexes rebuilt, and nothing otherwise."""

from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from embedding_pipeline.backfill import Counts, Outcome
from embedding_pipeline.store import maintenance as subject
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.indexes import build_hnsw, index_state
from embedding_pipeline.store.maintenance import maintain, needed_bytes, rows_written_since_vacuum
from embedding_pipeline.store.results import RunResult, record_run
from embedding_pipeline_tests.rows import make_column, pretend_filled
from embedding_pipeline_tests.sessions import open_transaction, value, wait_until
from embedding_pipeline_tests.tables import create_docs, embedding, spec

pytestmark = pytest.mark.timeout(90)
Connection = psycopg.Connection[Any]
OTHER_VECTORS = (
    "UPDATE docs SET embedding_64 = (SELECT array_agg(random()) FROM generate_series(1, 64)"
    " WHERE docs.id = docs.id)::vector(64)"
)


@pytest.fixture
def column(connection: Connection) -> Column:
    """Two hundred rows with vectors and an index."""
    create_docs(connection, 200)
    column = make_column(connection, spec(embeddings=[embedding("embedding_64", 64)]))
    pretend_filled(connection, column)
    connection.execute(OTHER_VECTORS)
    build_hnsw(connection, column)
    return column


def written(connection: Connection, column: Column, rows: int) -> None:
    """As if a run had written so many rows."""
    outcome = Outcome({"a": Counts(embedded=rows)})
    record_run(connection, column, RunResult(None, datetime.now(UTC), outcome, 0.0))


def vacuums(connection: Connection, column: Column) -> int:
    connection.execute("SELECT pg_stat_force_next_flush()")
    return int(
        value(
            connection,
            "SELECT vacuum_count FROM pg_stat_user_tables WHERE relid = $1",
            [column.facts.oid],
        )
    )


def test_many_small_runs_add_up_to_a_vacuum(connection: Connection, column: Column) -> None:
    written(connection, column, 6000)
    assert not maintain(connection, column).vacuumed
    written(connection, column, 4000)
    said: list[str] = []
    assert maintain(connection, column, report=said.append).vacuumed
    assert any("10,000 rows written since the last VACUUM" in line for line in said)

    def counted() -> bool:
        return rows_written_since_vacuum(connection, column) == 0

    wait_until(counted, "the statistics of the VACUUM")
    assert vacuums(connection, column) == 1
    assert not maintain(connection, column).vacuumed, "once is enough"


def test_a_column_in_order_is_left_alone(connection: Connection, column: Column) -> None:
    before = value(connection, "SELECT pg_current_wal_insert_lsn()::text")
    done = maintain(connection, column)
    assert (done.vacuumed, done.pending_index_rebuilt, done.hnsw_index_rebuilt) == (
        False,
        False,
        False,
    )
    assert vacuums(connection, column) == 0
    assert before is not None


def bloat(connection: Connection, column: Column, monkeypatch: pytest.MonkeyPatch) -> int:
    """Write every vector again and again under the index; its size then."""
    monkeypatch.setattr(subject, "BLOATED_HNSW_BYTES", 8192)
    for _ in range(5):
        connection.execute(OTHER_VECTORS)
    connection.execute("VACUUM (INDEX_CLEANUP off) docs")
    connection.execute("ANALYZE docs")
    connection.execute(
        "UPDATE pg_class SET reltuples = 200 WHERE relname = $1", [column.hnsw_index]
    )
    return index_state(connection, column).size_bytes


def test_a_bloated_hnsw_index_is_rebuilt(
    connection: Connection, column: Column, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = index_state(connection, column).size_bytes
    bloated = bloat(connection, column, monkeypatch)
    assert bloated > 2 * fresh
    said: list[str] = []
    assert maintain(connection, column, report=said.append).hnsw_index_rebuilt
    assert any("rebuild docs_embedding_64_hnsw" in line for line in said)
    after = index_state(connection, column)
    assert after.state == "valid"
    assert after.size_bytes < bloated / 2
    assert not maintain(connection, column).hnsw_index_rebuilt


def test_a_rebuild_that_would_wait_for_an_old_transaction_is_left_for_later(
    database: str, connection: Connection, column: Column, monkeypatch: pytest.MonkeyPatch
) -> None:
    bloat(connection, column, monkeypatch)
    with open_transaction(
        database, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ", "SELECT 1"
    ) as old:
        monkeypatch.setattr(subject, "OLD_SNAPSHOT_SECONDS", 0)
        said: list[str] = []
        assert not maintain(connection, column, report=said.append).hnsw_index_rebuilt
        assert f"the open transaction of pid {old.info.backend_pid}" in "".join(said)


@pytest.mark.parametrize(("dimensions", "per_row"), [(1536, 8192), (384, 2048)])
def test_what_a_fresh_index_takes(dimensions: int, per_row: int) -> None:
    """As measured: a page a row at 1536 dimensions, a quarter of one at 384."""
    assert needed_bytes(1000, dimensions) == pytest.approx(1000 * per_row, rel=0.1)
    assert needed_bytes(0, dimensions) == 0


def test_the_estimate_fits_an_index_that_pgvector_has_built(
    connection: Connection, column: Column
) -> None:
    state = index_state(connection, column)
    estimated = needed_bytes(200, 64)
    assert state.size_bytes / 2 < estimated + 2 * 8192 < state.size_bytes * 2
