"""What keeps a column's indexes fit: VACUUM after many writes, and bloated indexes rebuilt.

Looks first and does nothing where nothing is to be done, so it may be called at any time.
"""

import math
from dataclasses import dataclass
from typing import Any

import psycopg

from embedding_pipeline.store import ddl, sqlfiles
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.ddl import Report, Statement, quiet
from embedding_pipeline.store.index_plan import Existing, existing_indexes, wanted_hnsw
from embedding_pipeline.store.indexes import (
    OLD_SNAPSHOT_SECONDS,
    reindex_pending_if_bloated,
    vacuum,
)

Connection = psycopg.Connection[Any]

MANY_ROWS = 10_000
"""Written since the last VACUUM, by however many runs: one run of so many vacuums by itself."""
BLOATED_HNSW_RATIO = 2.0
"""An HNSW index is rebuilt when it is so many times larger than its rows need."""
BLOATED_HNSW_BYTES = 8 * 1024 * 1024
"""A smaller one is not worth it."""

_PAGE_BYTES, _USABLE_BYTES, _NEIGHBOUR_BYTES = 8192, 8160, 320
"""pgvector keeps an element and its neighbours (m = 16: some 300 bytes) within one page each."""


@dataclass(frozen=True)
class Maintained:
    """What was done."""

    vacuumed: bool
    pending_index_rebuilt: bool
    hnsw_index_rebuilt: bool


def maintain(connection: Connection, column: Column, *, report: Report = quiet) -> Maintained:
    """VACUUM the table where runs have written many rows since, and rebuild bloated indexes.

    Raises SchemaError as index builds do.
    """
    vacuumed = False
    written = rows_written_since_vacuum(connection, column)
    if written >= MANY_ROWS:
        report(f"{column}: {written:,} rows written since the last VACUUM")
        vacuumed = vacuum(connection, column, report=report)
    return Maintained(
        vacuumed,
        reindex_pending_if_bloated(connection, column, report=report),
        reindex_hnsw_if_bloated(connection, column, report=report),
    )


def rows_written_since_vacuum(connection: Connection, column: Column) -> int:
    """Rows that runs have written to the column's table since anybody vacuumed it."""
    row = connection.execute(
        sqlfiles.query("maintenance/written_since_vacuum"),
        [column.facts.schema, column.facts.name, column.facts.oid],
    ).fetchone()
    assert row is not None
    return int(row[0])


def needed_bytes(rows: float, dimensions: int) -> int:
    """About what an HNSW index of so many `vector` rows takes when it has just been built."""
    per_page = max(1, _USABLE_BYTES // (4 * dimensions + _NEIGHBOUR_BYTES))
    return math.ceil(max(0.0, rows) / per_page) * _PAGE_BYTES


def reindex_hnsw_if_bloated(
    connection: Connection, column: Column, *, report: Report = quiet
) -> bool:
    """Rebuild the HNSW index CONCURRENTLY when dead entries make up most of it.

    Search goes on with the old one meanwhile. Left for the next time (False, and a report) while
    an old transaction is open, which the rebuild would wait for.
    """
    wanted = wanted_hnsw(connection, column)

    def bloated() -> list[Existing]:
        return [
            index
            for index in existing_indexes(connection, column.facts.oid)
            if wanted.matches(index)
            and index.valid
            and not index.partitioned
            and index.bytes > BLOATED_HNSW_BYTES
            and index.bytes
            > BLOATED_HNSW_RATIO * needed_bytes(index.tuples, column.embedding.dimensions)
        ]

    found = bloated()
    if not found:
        return False
    row = connection.execute(
        sqlfiles.query("catalogue/old_snapshot"), [OLD_SNAPSHOT_SECONDS]
    ).fetchone()
    if row is not None:
        report(
            f"{column}: the HNSW index is bloated, but rebuilding it would wait for the open "
            f"transaction of pid {row[0]} ({row[1]}); left for the next time"
        )
        return False
    steps = [
        Statement(
            sqlfiles.compose("index/reindex", index=index.identifier).as_string(connection),
            f"rebuild {index.name} ({index.bytes:,} bytes)",
            concurrently=True,
            table=column.table.table,
            table_oid=column.facts.oid,
        )
        for index in found
    ]
    what = f"table {column.table.table}"
    ddl.carry_out(connection, column.facts.oid, what, lambda: steps, report=report)
    return True
