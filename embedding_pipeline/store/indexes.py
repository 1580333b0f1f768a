"""The HNSW index of a column, and the care of its pending index.

The vectors are loaded first and the index is built afterwards: writing 10,000 rows of 1536
dimensions under a live HNSW index takes 32 s, without it 0.5 s and the build some seconds.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
from psycopg import errors, sql

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.store import ddl, sqlfiles
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.ddl import Report, Statement, quiet
from embedding_pipeline.store.index_plan import Existing, existing_indexes, plan_index, wanted_hnsw

Connection = psycopg.Connection[Any]


@dataclass(frozen=True)
class IndexState:
    """The HNSW index as the catalogue has it."""

    state: Literal["valid", "invalid", "missing"]
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
    notices: str = ""
    """What Postgres said meanwhile, such as that the graph no longer fitted into memory."""


def index_state(connection: Connection, column: Column) -> IndexState:
    """Whether the column has its HNSW index, with its size and rows."""
    wanted = wanted_hnsw(column)
    existing = existing_indexes(connection, column.facts.oid)
    root = next(
        (i for i in existing if i.table_oid == column.facts.oid and i.name == wanted.name), None
    )
    if root is None:
        return IndexState("missing", 0, 0)
    parts = _tree(existing, root)
    return IndexState(
        "valid" if root.valid and wanted.matches(root) else "invalid",
        sum(index.bytes for index in parts),
        int(sum(max(0.0, index.tuples) for index in parts if not index.partitioned)),
    )


def _tree(existing: list[Existing], root: Existing) -> list[Existing]:
    found, oids = [root], {root.oid}
    while more := [i for i in existing if i.parent_oid in oids and i.oid not in oids]:
        found += more
        oids |= {index.oid for index in more}
    return found


def build_hnsw(
    connection: Connection,
    column: Column,
    *,
    report: Report = quiet,
    maintenance_work_mem: str = "512MB",
    parallel_workers: int = 2,
) -> IndexReport:
    """Build the column's HNSW index CONCURRENTLY where it is missing or invalid.

    A valid one is left alone. The settings belong to the session, so behind a transaction pooler
    they may not reach the build, which is then slower, not wrong. Raises SchemaError.
    """
    started = time.monotonic()
    notices: list[str] = []
    executed: list[Statement] = []

    def steps() -> list[Statement]:
        return plan_index(
            connection, wanted_hnsw(column), existing_indexes(connection, column.facts.oid)
        )

    if steps():
        settings = {
            "maintenance_work_mem": maintenance_work_mem,
            "max_parallel_maintenance_workers": str(parallel_workers),
            # the vectors are out of line, so the heap looks too small for parallel workers
            "min_parallel_table_scan_size": "0",
        }

        def note(diagnostic: psycopg.errors.Diagnostic) -> None:
            notices.append(diagnostic.message_primary or "")

        connection.add_notice_handler(note)
        try:
            with ddl.turn(connection, column.facts.oid, str(column), report=report):
                for name, value in settings.items():
                    connection.execute("SELECT set_config($1, $2, false)", [name, value])
                for step in steps():
                    report(step.why)
                    ddl.execute(connection, step, report=report)
                    executed.append(step)
        finally:
            connection.remove_notice_handler(note)
            for name in settings:
                connection.execute(sql.SQL("RESET {}").format(sql.Identifier(name)))
    state = index_state(connection, column)
    return IndexReport(
        index=column.hnsw_index,
        built=bool(executed),
        seconds=round(time.monotonic() - started, 3),
        size_bytes=state.size_bytes,
        rows=state.rows,
        notices="; ".join(notices),
    )


def drop_hnsw(connection: Connection, column: Column, *, report: Report = quiet) -> bool:
    """Drop the column's HNSW index CONCURRENTLY; False when there was none."""
    wanted = wanted_hnsw(column)
    with ddl.turn(connection, column.facts.oid, str(column), report=report):
        for index in existing_indexes(connection, column.facts.oid):
            if index.table_oid == column.facts.oid and index.name == wanted.name:
                ddl.execute(
                    connection,
                    ddl.statement(
                        connection,
                        sqlfiles.compose(
                            "index/drop" if index.partitioned else "index/drop_concurrently",
                            index=index.identifier,
                        ),
                        f"drop the index {index.name}",
                        concurrently=not index.partitioned,
                        table=str(column),
                        table_oid=column.facts.oid,
                    ),
                    report=report,
                )
                return True
    return False


def vacuum(connection: Connection, column: Column) -> None:
    """VACUUM the table, so that counting what is pending is quick again after a bulk run."""
    connection.execute(sqlfiles.compose("index/vacuum", table=column.relation))


def reindex_pending_if_bloated(
    connection: Connection, column: Column, *, report: Report = quiet
) -> bool:
    """Rebuild the pending index CONCURRENTLY when it is far larger than what it holds."""
    index = next(
        (
            i
            for i in existing_indexes(connection, column.facts.oid)
            if i.name == column.pending_index and i.table_oid == column.facts.oid
        ),
        None,
    )
    if index is None or index.partitioned or index.bytes < 64 * 8192:
        return False
    if index.bytes < 1000 * max(0.0, index.tuples):
        return False
    try:
        connection.execute(sqlfiles.compose("index/reindex", index=index.identifier))
    except errors.InsufficientPrivilege as error:
        raise SchemaError(f"{column}: not allowed to rebuild {index.name}: {error}") from None
    report(f"rebuilt {index.name}")
    return True
