"""VACUUM where many rows were written, a bloated pending index rebuilt, nothing otherwise."""

from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from embedding_pipeline.backfill import Counts, Outcome
from embedding_pipeline.store import indexes
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.maintenance import (
    Maintained,
    maintain,
    rows_written_since_vacuum,
)
from embedding_pipeline.store.results import RunResult, record_run
from embedding_pipeline_tests.rows import make_column, pretend_filled
from embedding_pipeline_tests.sessions import value, wait_until
from embedding_pipeline_tests.tables import create_docs, embedding, spec

pytestmark = pytest.mark.timeout(90)
Connection = psycopg.Connection[Any]


@pytest.fixture
def column(connection: Connection) -> Column:
    """Two hundred rows with vectors."""
    create_docs(connection, 200)
    column = make_column(connection, spec(embeddings=[embedding()]))
    pretend_filled(connection, column)
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
    assert maintain(connection, column) == Maintained(False, False)
    assert vacuums(connection, column) == 0


def test_a_bloated_pending_index_is_rebuilt_after_the_vacuum(
    connection: Connection, column: Column, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexes, "BLOATED_BYTES", 8192)
    monkeypatch.setattr(indexes, "BLOATED_RATIO", 0.01)
    connection.execute("UPDATE docs SET body = body || '!' WHERE id <= 100")
    written(connection, column, 10_000)
    assert maintain(connection, column) == Maintained(True, True)
