"""What keeps a table's queries quick: VACUUM after many writes, a bloated pending index rebuilt.

Looks first and does nothing where nothing is to be done, so it may be called at any time. A worn
HNSW index is `indexes.build_hnsw`'s to replace.
"""

from dataclasses import dataclass
from typing import Any

import psycopg

from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.ddl import Report, quiet
from embedding_pipeline.store.indexes import reindex_pending_if_bloated, vacuum

Connection = psycopg.Connection[Any]

MANY_ROWS = 10_000
"""Written since the last VACUUM, by however many runs: one run of so many vacuums by itself."""


@dataclass(frozen=True)
class Maintained:
    """What was done."""

    vacuumed: bool
    pending_index_rebuilt: bool


def maintain(connection: Connection, column: Column, *, report: Report = quiet) -> Maintained:
    """VACUUM the table where runs have written many rows since, then look at the pending index.

    Raises SchemaError as index builds do.
    """
    vacuumed = False
    written = rows_written_since_vacuum(connection, column)
    if written >= MANY_ROWS:
        report(f"{column}: {written:,} rows written since the last VACUUM")
        vacuumed = vacuum(connection, column, report=report)
    return Maintained(vacuumed, reindex_pending_if_bloated(connection, column, report=report))


def rows_written_since_vacuum(connection: Connection, column: Column) -> int:
    """Rows that runs have written to the column's table since anybody vacuumed it."""
    row = connection.execute(
        sqlfiles.query("maintenance/written_since_vacuum"),
        [column.facts.schema, column.facts.name, column.facts.oid],
    ).fetchone()
    assert row is not None
    return int(row[0])
