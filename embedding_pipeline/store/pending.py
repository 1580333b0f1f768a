"""Reading and counting pending rows, at a cost of what is pending, not of what is stored."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from embedding_pipeline.spec import MonthPartitions
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import PLANNER, SESSION
from embedding_pipeline.store.partitions import key_expression, key_from_database

PAGE_BYTES = 8 * 1024 * 1024
"""A page stops after this much text, so that memory stays flat when texts are megabytes long."""

SETTINGS = sql.SQL("; ").join([PLANNER, SESSION])
"""For every transaction here: the pending index is used, and keys are written in one way only."""


class PendingRow(NamedTuple):
    """A row to bring up to date. `text` and `fingerprint` are None when its vector must go."""

    key: tuple[str, ...]
    position: tuple[str, ...]
    text: str | None
    fingerprint: bytes | None
    """The uuid's 16 bytes: a `UUID` is hashed in Python each time that a run looks a row up."""


@dataclass(frozen=True)
class PendingCount:
    """Pending rows, quarantined ones already subtracted."""

    missing: int = 0
    stale: int = 0
    to_clear: int = 0
    quarantined: int = 0

    @property
    def pending(self) -> int:
        return self.missing + self.stale + self.to_clear


@dataclass(frozen=True)
class Coverage:
    """A column's rows, counted apart: they add up to `rows`."""

    rows: int
    embedded: int
    pending: PendingCount
    ineligible: int


def rows_source(column: Column, extra: sql.Composable | None = None) -> sql.Composed:
    """Rows as `row_key_<i>`, `row_fingerprint` (the expected one) and whatever `extra` names.

    A derived table, which the planner flattens: outside it no column of the user's can be
    confused with one of ours, whatever their names are.
    """
    columns: list[sql.Composable] = [
        sql.SQL("{} AS {}").format(sql.Identifier(name), sql.Identifier(f"row_key_{i}"))
        for i, name in enumerate(column.table.key_columns)
    ]
    columns.append(sql.SQL("{} AS row_fingerprint").format(column.expected))
    if extra is not None:
        columns.append(extra)
    return sql.SQL("SELECT {columns} FROM {relation}").format(
        columns=sql.SQL(", ").join(columns), relation=column.relation
    )


def _row_keys(column: Column) -> list[sql.Identifier]:
    return [sql.Identifier(f"row_key_{i}") for i in range(len(column.table.key_columns))]


def _allowed(column: Column) -> sql.Composable:
    """True for a row of `rows_source` unless the provider refused this very text for good."""
    return sql.SQL(
        "NOT EXISTS (SELECT FROM embedding_pipeline.quarantined_row AS q WHERE {mine}"
        " AND q.key = jsonb_build_array({keys}) AND q.fingerprint = row_fingerprint)"
    ).format(mine=_quarantined_here(column), keys=sql.SQL(", ").join(_row_keys(column)))


def _quarantined_here(column: Column) -> sql.Composable:
    return sql.SQL(
        "q.released_at IS NULL AND q.table_schema = {schema}"
        " AND q.table_name = {table} AND q.column_name = {column}"
    ).format(
        schema=sql.Literal(column.facts.schema),
        table=sql.Literal(column.facts.name),
        column=sql.Literal(column.embedding.column),
    )


def page_query(
    column: Column, partition: str, after: tuple[str, ...] | None, limit: int
) -> tuple[sql.Composed, list[Any]]:
    """The next pending rows of a partition in the pending index's order, with its parameters.

    Keys travel as text both ways and are cast on the parameter's side, so that any key type
    works and the index stays usable. Rows are always ordered by the partition column first: in
    the NULL partition the planner does not see that it is constant, and would sort.
    """
    condition = column.partition(partition)
    parameters: list[Any] = list(condition.parameters)
    keys = _row_keys(column)
    order: list[sql.Identifier] = [sql.Identifier("row_partition"), *keys]
    position, types, page_order = keys, column.key_types, order
    if isinstance(column.table.partitions, MonthPartitions) and condition.parameters:
        position, types = order, [column.partition_type, *types]
    elif condition.parameters:
        page_order = keys  # `= value`: nothing is left to sort by, but only the inner query knows
    seek: sql.Composable = sql.SQL("")
    if after is not None:
        first = len(parameters) + 1
        parameters += after
        bounds = [
            sql.SQL("{}::text::{}").format(sql.SQL(f"${number}"), sql.SQL(type_))
            for number, type_ in enumerate(types, first)
        ]
        seek = sql.SQL(" AND ({}) > ({})").format(_commas(position), _commas(bounds))
    parameters.append(limit)
    query = sql.SQL(
        "SELECT {keys}, {position}, row_text, uuid_send(row_fingerprint) FROM ("
        " SELECT *, sum(row_bytes) OVER (ORDER BY {page_order} ROWS UNBOUNDED PRECEDING)"
        "  AS page_bytes FROM (SELECT *, coalesce(octet_length(row_text), 0) AS row_bytes FROM ("
        "  SELECT * FROM ({source} WHERE {pending} AND {condition}) AS rows"
        "  WHERE {allowed}{seek} ORDER BY {order} LIMIT {limit}) AS page) AS weighed)"
        " AS measured WHERE page_bytes - row_bytes <= {most} ORDER BY {page_order}"
    ).format(
        # named: ORDER BY would take a column of the same name for the text
        keys=_commas(
            [
                sql.SQL("{}::text AS {}").format(key, sql.Identifier(f"page_key_{i}"))
                for i, key in enumerate(keys)
            ]
        ),
        # elsewhere it is the key once more
        position=(
            sql.SQL("ARRAY[{}]").format(_as_text(position)) if position is order else sql.NULL
        ),
        source=rows_source(
            column,
            sql.SQL("({})::text AS row_text, {} AS row_partition").format(
                column.text, column.partition_index_expression
            ),
        ),
        pending=column.pending,
        condition=condition.condition,
        seek=seek,
        allowed=_allowed(column),
        order=_commas(order),
        page_order=_commas(page_order),
        limit=sql.SQL(f"${len(parameters)}::bigint"),
        most=sql.Literal(PAGE_BYTES),
    )
    return query, parameters


def _commas(items: Sequence[sql.Composable]) -> sql.Composable:
    return sql.SQL(", ").join(items)


def _as_text(names: Sequence[sql.Composable]) -> sql.Composable:
    return _commas([sql.SQL("{}::text").format(name) for name in names])


async def read_page(
    connection: "psycopg.AsyncConnection[Any]",
    column: Column,
    partition: str,
    after: tuple[str, ...] | None,
    limit: int,
) -> list[PendingRow]:
    """Up to `limit` pending rows after a position; an empty list means there are none."""
    query, parameters = page_query(column, partition, after, limit)
    async with connection.transaction():
        await connection.execute(SETTINGS)
        cursor = await connection.execute(query, parameters)
        rows = await cursor.fetchall()
    return pending_rows(rows)


def pending_rows(rows: Iterable[tuple[Any, ...]]) -> list[PendingRow]:
    """What `page_query` found."""
    found = []
    for row in rows:
        key, (position, text, fingerprint) = row[:-3], row[-3:]
        at = key if position is None else tuple(position)
        found.append(PendingRow(key, at, text, fingerprint))
    return found


def partition_counts_query(column: Column) -> sql.Composed:
    """Pending rows a partition, quarantined ones included: read from the pending index alone."""
    return sql.SQL(
        "SELECT {key} AS partition, count(*) FROM {relation} WHERE {pending} GROUP BY 1"
    ).format(
        key=key_expression(column.table, column.partition_type),
        relation=column.relation,
        pending=column.pending,
    )


def quarantined_counts_query(column: Column) -> sql.Composed:
    """Pending rows a partition whose text is still the one that was refused.

    Only pending ones: a vector may have been adopted for a refused text.
    """
    same_key = sql.SQL(" AND ").join(
        sql.SQL("{} = (q.key ->> {})::{}").format(name, sql.Literal(i), sql.SQL(type_))
        for i, (name, type_) in enumerate(zip(_row_keys(column), column.key_types, strict=True))
    )
    partition = sql.SQL("{} AS row_partition").format(
        key_expression(column.table, column.partition_type)
    )
    return sql.SQL(
        "SELECT row_partition, count(*) FROM embedding_pipeline.quarantined_row AS q"
        " JOIN ({source} WHERE {pending}) AS rows ON {same_key}"
        " WHERE {mine} AND row_fingerprint = q.fingerprint GROUP BY 1"
    ).format(
        source=rows_source(column, partition),
        pending=column.pending,
        same_key=same_key,
        mine=_quarantined_here(column),
    )


def count_by_partition(connection: "psycopg.Connection[Any]", column: Column) -> dict[str, int]:
    """Partition key → pending rows, quarantined ones subtracted; empty partitions are left out.

    Sent as one string, which Postgres executes as one transaction: one round trip, not five.
    """
    queries = [SETTINGS, partition_counts_query(column), quarantined_counts_query(column)]
    cursor = connection.execute(sql.SQL("; ").join(queries))
    cursor.set_result(-2)
    counts = {key_from_database(column.table, value): count for value, count in cursor}
    cursor.set_result(-1)
    for value, count in cursor:
        key = key_from_database(column.table, value)
        counts[key] = counts.get(key, 0) - count
    return {key: count for key, count in sorted(counts.items()) if count > 0}


def kinds_query(column: Column) -> sql.Composed:
    """Missing, stale, to be cleared and quarantined rows, counted from the pending index.

    OFFSET 0 keeps the planner from flattening: fingerprint and quarantine are worked out once a
    row instead of six times (10,000 rows of 1 KB: 0.40 s flattened, 0.06 s so).
    """
    has_vector = sql.SQL("{} IS NOT NULL AS row_has_vector").format(column.vector)
    return sql.SQL(
        "SELECT count(*) FILTER (WHERE row_fingerprint IS NOT NULL AND NOT row_has_vector"
        " AND allowed), count(*) FILTER (WHERE row_fingerprint IS NOT NULL AND row_has_vector"
        " AND allowed), count(*) FILTER (WHERE row_fingerprint IS NULL),"
        " count(*) FILTER (WHERE row_fingerprint IS NOT NULL AND NOT allowed)"
        " FROM (SELECT *, {allowed} AS allowed FROM ({source} WHERE {pending} OFFSET 0) AS rows"
        " OFFSET 0) AS pending"
    ).format(
        allowed=_allowed(column),
        source=rows_source(column, has_vector),
        pending=column.pending,
    )


def count_kinds(connection: "psycopg.Connection[Any]", column: Column) -> PendingCount:
    """Pending rows of the whole column by kind, from the pending index."""
    with connection.transaction():
        connection.execute(SETTINGS)
        return PendingCount(*_one(connection, kinds_query(column)))


def coverage(connection: "psycopg.Connection[Any]", column: Column) -> Coverage:
    """Every row of the column counted: a full scan of the table, for nightly checks and status."""
    scan = sql.SQL("SELECT count(*), count({}) FROM {}").format(column.fingerprint, column.relation)
    outdated = sql.SQL("SELECT count({}) FROM {} WHERE {}").format(
        column.fingerprint, column.relation, column.pending
    )
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        # the scan first: what follows turns sequential scans off until the transaction ends
        rows, with_fingerprint = _one(connection, scan)
        kinds = count_kinds(connection, column)
        embedded = with_fingerprint - _one(connection, outdated)[0]
    ineligible = rows - embedded - kinds.pending - kinds.quarantined
    return Coverage(rows, embedded, kinds, ineligible)


def _one(connection: "psycopg.Connection[Any]", query: sql.Composed) -> tuple[Any, ...]:
    row = connection.execute(query).fetchone()
    assert row is not None
    return tuple(row)


def estimated_rows(connection: "psycopg.Connection[Any]", column: Column) -> int:
    """About how many rows the table has: free, and good enough for shares and sizes.

    As the planner reckons: rows a page at the last ANALYZE or VACUUM, times the pages now. A table
    that neither has seen counts as empty up to 1,000 pages, and beyond as 8 rows a page.
    """
    row = connection.execute(
        "SELECT coalesce(sum(CASE WHEN c.reltuples > 0 AND c.relpages > 0"
        "  THEN c.reltuples / c.relpages * pages WHEN pages > 1000 THEN pages * 8 ELSE 0 END),"
        "  0)::bigint"
        " FROM (SELECT $1::oid AS relid UNION"
        "  SELECT relid FROM pg_partition_tree($1::oid) WHERE isleaf) AS tree"
        " JOIN pg_class AS c ON c.oid = tree.relid"
        " CROSS JOIN LATERAL (SELECT pg_relation_size(c.oid)"
        "  / current_setting('block_size')::int AS pages) AS size",
        [column.facts.oid],
    ).fetchone()
    return int(row[0]) if row else 0


def partitions_in_data(connection: "psycopg.Connection[Any]", column: Column) -> Mapping[str, int]:
    """All partition keys that the table's rows make, with their rows: a full scan."""
    query = sql.SQL("SELECT {key}, count(*) FROM {relation} GROUP BY 1").format(
        key=key_expression(column.table, column.partition_type), relation=column.relation
    )
    with connection.transaction():
        connection.execute(SESSION)
        rows = connection.execute(query).fetchall()
    return {key_from_database(column.table, value): count for value, count in sorted(rows, key=str)}


def sample_pending(
    connection: "psycopg.Connection[Any]", column: Column, partitions: Sequence[str], most: int
) -> list[PendingRow]:
    """Up to about `most` pending rows, spread over the partitions."""
    rows: list[PendingRow] = []
    each = max(1, most // max(1, len(partitions)))
    with connection.transaction():
        connection.execute(SETTINGS)
        for partition in partitions:
            found = connection.execute(*page_query(column, partition, None, each))
            rows += pending_rows(found)
            if len(rows) >= most:
                break
    return rows
