"""What runs leave behind: their figures, and since when a column has been pending."""

from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from embedding_pipeline.backfill import Counts, Outcome
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.results import RunResult, note_pending, record_run
from embedding_pipeline_tests.rows import make_column
from embedding_pipeline_tests.tables import create_docs, spec

Connection = psycopg.Connection[Any]


@pytest.fixture
def column(connection: Connection) -> Column:
    create_docs(connection, 4)
    return make_column(connection, spec())


def written_at(connection: Connection) -> datetime | None:
    row = connection.execute(
        "SELECT written_at FROM embedding_pipeline.embedding_column"
    ).fetchone()
    assert row is not None
    found: datetime | None = row[0]
    return found


def test_a_run_is_recorded_with_the_sums_of_its_partitions(
    connection: Connection, column: Column
) -> None:
    outcome = Outcome(
        {"a": Counts(embedded=3, reused=1, locked=2), "b": Counts(embedded=4, quarantined=1)},
        tokens=70,
        requests=2,
        cost=0.5,
    )
    record_run(connection, column, RunResult("run-1", datetime.now(UTC), outcome, 0.75))

    row = connection.execute(
        "SELECT run_id, partitions, embedded, reused, locked, quarantined, tokens, requests,"
        " cost_usd, forecast_usd FROM embedding_pipeline.run_result"
    ).fetchone()
    assert row == ("run-1", 2, 7, 1, 2, 1, 70, 2, 0.5, 0.75)
    assert written_at(connection) is not None


def test_a_run_that_wrote_nothing_does_not_ask_for_another_evaluation(
    connection: Connection, column: Column
) -> None:
    outcome = Outcome({"a": Counts(locked=2)})
    record_run(connection, column, RunResult(None, datetime.now(UTC), outcome, 0.0))

    assert written_at(connection) is None


def test_pending_since_is_kept_until_nothing_is_pending(
    connection: Connection, column: Column
) -> None:
    assert note_pending(connection, column, False) is None
    first = note_pending(connection, column, True)
    assert first is not None
    assert note_pending(connection, column, True) == first
    assert note_pending(connection, column, False) is None
    again = note_pending(connection, column, True)
    assert again is not None
    assert again > first
