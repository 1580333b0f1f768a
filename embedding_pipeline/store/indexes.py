"""The HNSW index of a column, and the care of its pending index.

The vectors are loaded first and the index is built afterwards: writing 10,000 rows of 1536
dimensions under a live HNSW index takes 32 s, without it 0.5 s and the build some seconds.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psycopg

from embedding_pipeline.store import ddl, sqlfiles
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.ddl import Report, Statement, quiet
from embedding_pipeline.store.index_plan import (
    Existing,
    Wanted,
    existing_indexes,
    leftovers,
    plan_index,
    wanted_hnsw,
    wanted_queues,
)
from embedding_pipeline.store.pending import estimated_rows

Connection = psycopg.Connection[Any]

BLOATED_BYTES = 1024 * 1024
"""A pending index smaller than this is not worth rebuilding."""
BLOATED_RATIO = 20
"""Rebuilt when it is so many times larger than its rows need."""
_ROW_BYTES = 100  # of a pending index: a generous guess for partition and key

OLD_SNAPSHOT_SECONDS = 10

SMALLEST_BUILD_BYTES = 64 * 1024**2
"""Of `maintenance_work_mem`, whatever the table: Postgres's own default."""

WORN_BYTES = 8 * 1024 * 1024
"""A smaller HNSW index is not worth replacing."""
WORN_RATIO = 1.7
"""Replaced when it is so many times larger than its rows need: most of its graph is dead rows
then, as after every row was embedded anew with the index in place (twice the size)."""


@dataclass(frozen=True)
class IndexState:
    """The HNSW index as the catalogue has it."""

    state: Literal["valid", "invalid", "missing"]
    name: str
    size_bytes: int
    rows: int
    """Rows in the index when it was built or last vacuumed."""


@dataclass(frozen=True)
class IndexReport:
    """What `build_hnsw` did."""

    index: str
    built: bool
    """False when the index was there and valid."""
    seconds: float
    size_bytes: int
    rows: int
    parallel: bool = False
    """Whether parallel workers were asked for; the server may still have granted none."""
    memory_mb: int = 0
    """`maintenance_work_mem` of a build."""
    notices: str = ""
    """What Postgres said meanwhile, such as that the graph no longer fitted into memory."""


def index_state(connection: Connection, column: Column) -> IndexState:
    """Whether the column has an HNSW index by cosine distance, with its size and rows.

    One that the user has built under another name counts.
    """
    wanted = wanted_hnsw(connection, column)
    return _state(wanted, existing_indexes(connection, column.facts.oid))


def _state(wanted: Wanted, existing: Sequence[Existing]) -> IndexState:
    mine = [index for index in existing if index.table_oid == wanted.column.facts.oid]
    fitting = [index for index in mine if index.valid and wanted.matches(index)]
    root = next(
        (index for index in [*fitting, *mine] if index in fitting or index.name == wanted.name),
        None,
    )
    if root is None:
        return IndexState("missing", wanted.name, 0, 0)
    parts, oids = [root], {root.oid}
    while more := [i for i in existing if i.parent_oid in oids and i.oid not in oids]:
        parts += more
        oids |= {index.oid for index in more}
    return IndexState(
        state="valid" if root in fitting else "invalid",
        name=root.name,
        size_bytes=sum(index.bytes for index in parts),
        rows=int(sum(max(0.0, index.tuples) for index in parts if not index.partitioned)),
    )


def build_hnsw(
    connection: Connection,
    column: Column,
    *,
    report: Report = quiet,
    maintenance_work_mem: str | None = None,
    parallel_workers: int = 2,
    patience: float = ddl.PATIENCE_SECONDS,
) -> IndexReport:
    """Build the column's HNSW index CONCURRENTLY where it is missing, invalid, another or worn.

    A valid one is left alone, under whatever name, unless most of it is dead rows (`is_worn`):
    then a new one is built under a second name while the old one serves search, and takes its
    place. `maintenance_work_mem` is what `build_memory` reckons unless it is given; a server that
    grants more by itself keeps to that. Progress, and for whom the build waits, go to
    `report` as they change. Where the server's shared memory is too small for a parallel build
    (64 MB in many containers) it is built without. The settings belong to the session, so behind
    a transaction pooler they may not reach the build, which is then slower, not wrong.

    Raises SchemaError.
    """
    started = time.monotonic()
    wanted = wanted_hnsw(connection, column)

    def steps() -> list[Statement]:
        existing = existing_indexes(connection, column.facts.oid)
        state = _state(wanted, existing)
        worn = state.state == "valid" and _worn_out(connection, column, state)
        if state.state == "valid" and not worn:
            return []
        return plan_index(connection, wanted, existing, replace=worn)

    notices: list[str] = []

    def note(diagnostic: "psycopg.errors.Diagnostic") -> None:
        parts = (diagnostic.message_primary, diagnostic.message_detail, diagnostic.message_hint)
        said = ". ".join(filter(None, parts))
        notices.append(said)
        report(f"{column}: Postgres says: {said}")  # at once: a graph on disk may take hours

    def build(workers: int) -> list[Statement]:
        settings = {
            "max_parallel_maintenance_workers": str(workers),
            # The vectors are out of line, so that the heap looks too small for parallel workers.
            # Measured on 10,000 × 1536: 43 s, and 31 s with this.
            "min_parallel_table_scan_size": "0",
        }
        if memory > granted:
            settings["maintenance_work_mem"] = f"{memory // 1024}kB"
        with ddl.session_settings(connection, settings):
            return ddl.carry_out(
                connection,
                column.facts.oid,
                f"table {column.table.table}",
                steps,
                report=report,
                patience=patience,
            )

    granted, memory = _memory(connection, column, maintenance_work_mem)
    executed: list[Statement] = []
    parallel = parallel_workers > 0
    if steps_now := steps():
        connection.add_notice_handler(note)
        try:
            executed = build(parallel_workers)
        except ddl.SharedMemoryError as error:
            report(f"{error}; building it without parallel workers")
            parallel = False
            executed = build(0)
        finally:
            connection.remove_notice_handler(note)
    state = index_state(connection, column)
    return IndexReport(
        index=state.name,
        built=bool(executed),
        seconds=round(time.monotonic() - started, 3),
        size_bytes=state.size_bytes,
        rows=state.rows,
        parallel=bool(steps_now) and parallel,
        memory_mb=max(granted, memory) // 1024**2,
        notices="; ".join(dict.fromkeys(filter(None, notices))),
    )


def build_memory(rows: int, dimensions: int, cache_bytes: int) -> int:
    """Bytes of `maintenance_work_mem` in which the graph of so many rows is built.

    A row takes its vector and some 750 bytes: in memory the element, and for m = 16 at least 32
    neighbours of 16 bytes with their distances (pgvector, src/hnsw.h; 1,000,000 × 8 outgrew
    512 MB past 700,000 rows). A graph that does not fit is finished row by row on disk, ten times
    as slowly, so as much is taken as the server can be thought to have: half of
    `effective_cache_size`, and 512 MB at the least. A small graph takes no more than it needs, for
    a parallel build claims all of it as shared memory.
    """
    needed = max(rows, 1) * (4 * dimensions + 750) * 5 // 4
    return min(max(needed, SMALLEST_BUILD_BYTES), max(512 * 1024**2, cache_bytes // 2))


def _memory(connection: Connection, column: Column, given: str | None) -> tuple[int, int]:
    """Bytes that the session has by itself, and bytes that a build should have."""
    row = connection.execute(
        "SELECT pg_size_bytes(current_setting('maintenance_work_mem')),"
        " pg_size_bytes(current_setting('effective_cache_size')), pg_size_bytes($1)",
        [given],
    ).fetchone()
    assert row is not None
    granted, cache, memory = row
    if memory is None:
        rows = estimated_rows(connection, column)
        memory = build_memory(rows, column.embedding.dimensions, cache)
    return int(granted), int(memory)


def fresh_bytes(rows: int, dimensions: int) -> int:
    """About how large a fresh HNSW index of the `vector` type is.

    An element and its neighbours share a page where they fit (pgvector, src/hnsw.h): 72 bytes and
    the vector, and for m = 16 two lists of 16 pointers of 6 bytes; few rows have upper layers.
    """
    row = 72 + 8 + 4 * dimensions + 4 + 2 * 16 * 6 + 16
    return 8192 * -(-rows // max(1, 8120 // row))


def is_worn(index_bytes: int, rows: int, dimensions: int) -> bool:
    """Whether most of an index that holds so many live rows is dead ones."""
    most = WORN_RATIO * fresh_bytes(rows, dimensions)
    return rows > 0 and index_bytes > WORN_BYTES and index_bytes > most


def _worn_out(connection: Connection, column: Column, state: IndexState) -> bool:
    # rows without a vector count too: better a replacement too few than one every night
    rows = estimated_rows(connection, column)
    return (
        state.name == column.hnsw_index
        and not column.facts.is_partitioned
        and is_worn(state.size_bytes, rows, column.embedding.dimensions)
    )


def drop_hnsw(
    connection: Connection,
    column: Column,
    *,
    report: Report = quiet,
    patience: float = ddl.PATIENCE_SECONDS,
) -> bool:
    """Drop the column's HNSW index CONCURRENTLY; False when there was none of that name."""

    def steps() -> list[Statement]:
        return [
            Statement(
                sqlfiles.compose(
                    "index/drop" if index.partitioned else "index/drop_concurrently",
                    index=index.identifier,
                ).as_string(connection),
                f"drop the index {index.name}",
                concurrently=not index.partitioned,
                table=column.table.table,
                table_oid=column.facts.oid,
            )
            for index in existing_indexes(connection, column.facts.oid)
            if index.table_oid == column.facts.oid
            and index.name == column.hnsw_index
            and index.signature.method == "hnsw"
        ]

    if not steps():
        return False
    what = f"table {column.table.table}"
    return bool(
        ddl.carry_out(connection, column.facts.oid, what, steps, report=report, patience=patience)
    )


def vacuum(connection: Connection, column: Column, *, report: Report = quiet) -> bool:
    """VACUUM the table, as a bulk run ends: then counting what is pending is quick again.

    Waits for nobody. False (and a report) when Postgres skipped it because the role may not
    vacuum the table or another session is at it.
    """
    said: list[str] = []

    def note(diagnostic: "psycopg.errors.Diagnostic") -> None:
        if diagnostic.severity_nonlocalized == "WARNING":
            said.append(diagnostic.message_primary or "")

    connection.add_notice_handler(note)
    try:
        with ddl.session_settings(connection, {"statement_timeout": "0"}):
            connection.execute(sqlfiles.compose("index/vacuum", table=column.relation))
    finally:
        connection.remove_notice_handler(note)
    for message in said:
        report(f"{column}: {message}")
    return not said


def reindex_pending_if_bloated(
    connection: Connection, column: Column, *, report: Report = quiet
) -> bool:
    """Rebuild the pending index CONCURRENTLY when it is far larger than what it holds.

    VACUUM empties its pages but does not give them back. Call it after `vacuum`, which counts
    its rows. Not done (False, and a report) while an old transaction is open: the rebuild would
    wait for it.
    """
    existing = existing_indexes(connection, column.facts.oid)
    wanted = next(
        index for index in wanted_queues(connection, [column]) if index.name == column.pending_index
    )
    bloated = [
        index
        for index in existing
        if wanted.matches(index)
        and index.valid
        and not index.partitioned
        and index.bytes > BLOATED_BYTES
        and index.bytes > BLOATED_RATIO * _ROW_BYTES * max(0.0, index.tuples)
    ]
    old = leftovers(wanted, existing)
    if not bloated and not old:
        return False
    row = connection.execute(
        sqlfiles.query("catalogue/old_snapshot"), [OLD_SNAPSHOT_SECONDS]
    ).fetchone()
    if row is not None:
        report(
            f"{column}: the pending index is bloated, but rebuilding it would wait for the open "
            f"transaction of pid {row[0]} ({row[1]}); left for the next time"
        )
        return False

    def step(index: Existing, file: str, why: str) -> Statement:
        return Statement(
            sqlfiles.compose(file, index=index.identifier).as_string(connection),
            why,
            concurrently=True,
            table=column.table.table,
            table_oid=column.facts.oid,
        )

    steps = [
        *(
            step(index, "index/drop_concurrently", f"drop {index.name}, left by a failed rebuild")
            for index in old
        ),
        *(
            step(index, "index/reindex", f"rebuild {index.name} ({index.bytes:,} bytes)")
            for index in bloated
        ),
    ]
    what = f"table {column.table.table}"
    ddl.carry_out(connection, column.facts.oid, what, lambda: steps, report=report)
    return bool(bloated)
