"""Reading and counting pending rows, at a cost of what is pending, not of what is stored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql

from embedding_pipeline.spec import MonthPartitions
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import PLANNER, SESSION
from embedding_pipeline.store.partitions import key_expression, key_from_database

PAGE_BYTES = 8 * 1024 * 1024
"""A page stops after this much text, so that memory stays flat when texts are megabytes long."""


@dataclass(frozen=True, slots=True)
class PendingRow:
    """A row to bring up to date. `text` and `fingerprint` are None when its vector must go."""

    key: tuple[str, ...]
    position: tuple[str, ...]
    text: str | None
    fingerprint: UUID | None


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


def _row_keys(column: Column) -> list[sql.Composable]:
    return [sql.Identifier(f"row_key_{i}") for i in range(len(column.table.key_columns))]


def _allowed(column: Column) -> sql.Composable:
    """True for a row of `rows_source` unless the provider refused this very text for good."""
    return sql.SQL(
        "NOT EXISTS (SELECT FROM embedding_pipeline.quarantined_row AS q WHERE {mine}"
        " AND q.key = jsonb_build_array({keys}) AND q.fingerprint = row_fingerprint)"
    ).format(mine=_quarantined_here(column), keys=sql.SQL(", ").join(_row_keys(column)))


def _quarantined_here(column: Column) -> sql.Composable:
    return sql.SQL(
        "q.table_schema = {schema} AND q.table_name = {table} AND q.column_name = {column}"
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
    works and the index stays usable.
    """
    condition = column.partition(partition)
    parameters: list[Any] = list(condition.parameters)
    order = _row_keys(column)
    types = list(column.key_types)
    by_month = isinstance(column.table.partitions, MonthPartitions) and condition.parameters
    extra = sql.SQL("({})::text AS row_text").format(column.text)
    if by_month:
        order.insert(0, sql.Identifier("row_moment"))
        types.insert(0, column.partition_type)
        extra += sql.SQL(", {} AS row_moment").format(column.partition_index_expression)
    seek: sql.Composable = sql.SQL("")
    if after is not None:
        bounds = []
        for value, type_ in zip(after, types, strict=True):
            parameters.append(value)
            bounds.append(
                sql.SQL("{}::text::{}").format(sql.SQL(f"${len(parameters)}"), sql.SQL(type_))
            )
        seek = sql.SQL(" AND ({}) > ({})").format(
            sql.SQL(", ").join(order), sql.SQL(", ").join(bounds)
        )
    parameters.append(limit)

    def as_text(names: list[sql.Composable]) -> sql.Composable:
        return sql.SQL(", ").join(sql.SQL("{}::text").format(name) for name in names)

    query = sql.SQL(
        "SELECT row_key, row_position, row_text, row_fingerprint FROM ("
        " SELECT *, sum(row_bytes) OVER (ORDER BY row_number) AS page_bytes FROM ("
        "  SELECT row_number() OVER () AS row_number, ARRAY[{keys}] AS row_key,"
        "   ARRAY[{position}] AS row_position, row_fingerprint, row_text,"
        "   coalesce(octet_length(row_text), 0) AS row_bytes FROM ("
        "   SELECT * FROM ({source} WHERE {pending} AND {condition}) AS rows"
        "   WHERE {allowed}{seek} ORDER BY {order} LIMIT {limit}) AS page) AS numbered) AS measured"
        " WHERE page_bytes - row_bytes <= {most} ORDER BY row_number"
    ).format(
        keys=as_text(_row_keys(column)),
        position=as_text(order),
        source=rows_source(column, extra),
        pending=column.pending,
        condition=condition.condition,
        seek=seek,
        allowed=_allowed(column),
        order=sql.SQL(", ").join(order),
        limit=sql.SQL(f"${len(parameters)}::bigint"),
        most=sql.Literal(PAGE_BYTES),
    )
    return query, parameters


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
        await connection.execute(PLANNER)
        await connection.execute(SESSION)
        cursor = await connection.execute(query, parameters)
        rows = await cursor.fetchall()
    return [PendingRow(tuple(key), tuple(position), text, fp) for key, position, text, fp in rows]


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
    """Quarantined rows a partition whose text is still the one that was refused."""
    same_key = sql.SQL(" AND ").join(
        sql.SQL("{} = (q.key ->> {})::{}").format(name, sql.Literal(i), sql.SQL(type_))
        for i, (name, type_) in enumerate(zip(_row_keys(column), column.key_types, strict=True))
    )
    partition = sql.SQL("{} AS row_partition").format(
        key_expression(column.table, column.partition_type)
    )
    return sql.SQL(
        "SELECT row_partition, count(*) FROM embedding_pipeline.quarantined_row AS q"
        " JOIN ({source}) AS rows ON {same_key}"
        " WHERE {mine} AND row_fingerprint = q.fingerprint GROUP BY 1"
    ).format(
        source=rows_source(column, partition), same_key=same_key, mine=_quarantined_here(column)
    )


def count_by_partition(connection: "psycopg.Connection[Any]", column: Column) -> dict[str, int]:
    """Partition key → pending rows, quarantined ones subtracted; empty partitions are left out."""
    counts: dict[str, int] = {}
    with connection.transaction():
        connection.execute(PLANNER)
        connection.execute(SESSION)
        for value, count in connection.execute(partition_counts_query(column)):
            counts[key_from_database(column.table, value)] = count
        for value, count in connection.execute(quarantined_counts_query(column)):
            key = key_from_database(column.table, value)
            counts[key] = counts.get(key, 0) - count
    return {key: count for key, count in sorted(counts.items()) if count > 0}


def count_kinds(connection: "psycopg.Connection[Any]", column: Column) -> PendingCount:
    """Pending rows of the whole column by kind, from the pending index."""
    has_vector = sql.SQL("{} IS NOT NULL AS row_has_vector").format(column.vector)
    query = sql.SQL(
        "SELECT count(*) FILTER (WHERE row_fingerprint IS NOT NULL AND NOT row_has_vector"
        " AND allowed), count(*) FILTER (WHERE row_fingerprint IS NOT NULL AND row_has_vector"
        " AND allowed), count(*) FILTER (WHERE row_fingerprint IS NULL),"
        " count(*) FILTER (WHERE row_fingerprint IS NOT NULL AND NOT allowed)"
        " FROM (SELECT *, {allowed} AS allowed FROM ({source} WHERE {pending}) AS rows) AS pending"
    ).format(
        allowed=_allowed(column),
        source=rows_source(column, has_vector),
        pending=column.pending,
    )
    with connection.transaction():
        connection.execute(PLANNER)
        row = connection.execute(query).fetchone()
    assert row is not None
    return PendingCount(*row)


def coverage(connection: "psycopg.Connection[Any]", column: Column) -> Coverage:
    """Every row of the column counted: a full scan of the table, for nightly checks and status."""
    query = sql.SQL(
        "SELECT count(*), count({fingerprint}),"
        " (SELECT count({fingerprint}) FROM {relation} WHERE {pending}) FROM {relation}"
    ).format(fingerprint=column.fingerprint, relation=column.relation, pending=column.pending)
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        kinds = count_kinds(connection, column)
        row = connection.execute(query).fetchone()
    assert row is not None
    rows, with_fingerprint, outdated = row
    embedded = with_fingerprint - outdated
    ineligible = rows - embedded - kinds.pending - kinds.quarantined
    return Coverage(rows, embedded, kinds, ineligible)


def estimated_rows(connection: "psycopg.Connection[Any]", column: Column) -> int:
    """The planner's idea of the table's size: free, and good enough for shares and progress."""
    row = connection.execute(
        "SELECT greatest(reltuples, 0)::bigint FROM pg_class WHERE oid = $1", [column.facts.oid]
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
    connection: "psycopg.Connection[Any]", column: Column, partitions: list[str], most: int
) -> list[tuple[tuple[str, ...], str]]:
    """Keys and texts of some pending rows that have a text, spread over the partitions."""
    rows: list[tuple[tuple[str, ...], str]] = []
    each = max(1, most // max(1, len(partitions)))
    with connection.transaction():
        connection.execute(PLANNER)
        connection.execute(SESSION)
        for partition in partitions:
            query, parameters = page_query(column, partition, None, each)
            for key, _, text, fingerprint in connection.execute(query, parameters):
                if fingerprint is not None:
                    rows.append((tuple(key), text))
            if len(rows) >= most:
                break
    return rows
