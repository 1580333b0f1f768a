"""Quarantine: an exception for one key and one text, and for nothing else."""

from typing import Any
from uuid import UUID

import psycopg
import pytest

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.pending import PendingCount, count_by_partition, count_kinds, coverage
from embedding_pipeline.store.quarantine import Refusal, quarantine, release_quarantined
from embedding_pipeline_tests.rows import (
    fill,
    fingerprints,
    make_column,
    pending_keys,
    with_connection,
)
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]


@pytest.fixture
def column(connection: Connection) -> Column:
    """Four rows in one bucket; 1 and 2 are pending, the others current."""
    create_docs(connection, 4)
    column = make_column(connection, spec(partitions={"by": "hash", "buckets": 1}))
    fill(connection, column)
    connection.execute("UPDATE docs SET embedding_4 = NULL WHERE id IN (1, 2)")
    return column


def refuse(
    database: str, connection: Connection, column: Column, *keys: str, error: str = "no"
) -> None:
    known = fingerprints(connection, column)
    refusals = [Refusal((key,), UUID(bytes=known[key] or bytes(16)), error) for key in keys]
    with_connection(database, lambda c: quarantine(c, column, refusals))


def test_a_refused_row_is_neither_read_nor_counted_as_pending(
    database: str, connection: Connection, column: Column
) -> None:
    refuse(database, connection, column, "1")

    assert pending_keys(connection, column, "0") == [("2",)]
    assert count_by_partition(connection, column) == {"0": 1}
    assert count_kinds(connection, column) == PendingCount(missing=1, quarantined=1)
    seen = coverage(connection, column)
    assert (seen.embedded, seen.pending.quarantined, seen.ineligible) == (2, 1, 0)


def test_another_text_is_another_chance_and_the_old_one_is_still_refused(
    database: str, connection: Connection, column: Column
) -> None:
    refuse(database, connection, column, "1")
    connection.execute("UPDATE docs SET body = 'better' WHERE id = 1")
    assert pending_keys(connection, column, "0") == [("1",), ("2",)]
    assert count_by_partition(connection, column) == {"0": 2}

    connection.execute("UPDATE docs SET body = 'text number 1' WHERE id = 1")
    assert pending_keys(connection, column, "0") == [("2",)]


def test_a_refused_row_that_got_a_vector_by_hand_hides_no_other(
    database: str, connection: Connection, column: Column
) -> None:
    """It was once subtracted from its partition's pending rows though it was none of them."""
    refuse(database, connection, column, "1")
    fill(connection, column)
    connection.execute("UPDATE docs SET embedding_4 = NULL WHERE id = 2")

    assert count_by_partition(connection, column) == {"0": 1}
    assert count_kinds(connection, column) == PendingCount(missing=1)


def test_a_cleared_text_is_cleared_though_it_was_refused(
    database: str, connection: Connection, column: Column
) -> None:
    refuse(database, connection, column, "1")
    connection.execute("UPDATE docs SET body = '', embedding_4 = '[1,1,1,1]' WHERE id = 1")

    assert count_kinds(connection, column) == PendingCount(missing=1, to_clear=1)


def test_refusing_again_counts_attempts(
    database: str, connection: Connection, column: Column
) -> None:
    refuse(database, connection, column, "1", error="first")
    refuse(database, connection, column, "1", "2", error="second")

    rows = connection.execute(
        "SELECT key, error, attempts, last_at >= first_at"
        " FROM embedding_pipeline.quarantined_row ORDER BY key"
    ).fetchall()
    assert rows == [([1], "second", 2, True), ([2], "second", 1, True)]


@pytest.mark.parametrize(
    "words", ["nul \0 inside", "half \ud83d surrogate", "é" * 10_000, "", "\ufffe \x01"]
)
def test_a_providers_words_never_break_the_record(
    database: str, connection: Connection, column: Column, words: str
) -> None:
    refuse(database, connection, column, "1", error=words)

    row = connection.execute("SELECT error FROM embedding_pipeline.quarantined_row").fetchone()
    assert row is not None
    assert len(row[0]) <= 500
    assert pending_keys(connection, column, "0") == [("2",)]


def test_retrying_some_keys_or_all(database: str, connection: Connection, column: Column) -> None:
    refuse(database, connection, column, "1", "2")

    assert release_quarantined(connection, column, [["1"]]) == 1
    assert pending_keys(connection, column, "0") == [("1",)]
    assert release_quarantined(connection, column, [[2], [77]]) == 1
    refuse(database, connection, column, "1", "2")
    assert release_quarantined(connection, column, []) == 0
    with pytest.raises(PipelineError, match="not a key"):
        release_quarantined(connection, column, [["two"]])
    assert release_quarantined(connection, column, None) == 2


@pytest.mark.parametrize("zone", ["UTC", "America/Sao_Paulo"])
def test_keys_that_depend_on_the_session_are_recognised(
    database: str, connection: Connection, zone: str
) -> None:
    """A timestamptz in JSON is written in the session's zone, which a role may have set."""
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET TimeZone = '{zone}'".encode())
    table = TableSpec.model_validate(
        {
            "table": "visits",
            "id_column": ["at", "It's"],
            "text": "body",
            "partitions": {"by": "hash", "buckets": 1},
            "embeddings": [embedding()],
        }
    )
    column = make_column(
        connection,
        table,
        'CREATE TABLE visits (at timestamptz, "It\'s" text, body text, PRIMARY KEY (at, "It\'s"))',
    )
    connection.execute("INSERT INTO visits VALUES ('2025-07-01 12:00Z', '\"q\"', 'x')")
    (key,) = pending_keys(connection, column, "0")
    (fingerprint,) = fingerprints(connection, column).values()
    assert fingerprint is not None

    refusal = Refusal(key, UUID(bytes=fingerprint), "no")
    with_connection(database, lambda c: quarantine(c, column, [refusal]))

    assert pending_keys(connection, column, "0") == []
    assert count_by_partition(connection, column) == {}
    assert count_kinds(connection, column).quarantined == 1
    assert release_quarantined(connection, column, [key]) == 1
