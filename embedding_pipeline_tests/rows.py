"""Embedding columns for tests of the store and the backfill: made, filled, compared with truth."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect_async
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline.store.pending import SETTINGS, PendingRow, page_query, pending_rows
from embedding_pipeline_tests.faults.server import vector_for

Connection = psycopg.Connection[Any]
Result = TypeVar("Result")


def make_column(connection: Connection, table: TableSpec, create: str | None = None) -> Column:
    """Run the user's DDL, if any, migrate, and bind the table's first embedding column."""
    if create is not None:
        connection.execute(create.encode())
    migrate(connection, [table])
    return bind_columns(connection, table)[0]


def rebind(connection: Connection, column: Column, **changes: Any) -> Column:
    """The same column as another YAML would have it; nothing is migrated."""
    embedding = column.embedding.model_copy(update=changes)
    table = column.table.model_copy(update={"embeddings": [embedding]})
    return bind_columns(connection, table)[0]


def fill(connection: Connection, column: Column) -> None:
    """Give every row that should have a vector the true one, with its fingerprint."""
    rows = connection.execute(
        sql.SQL("SELECT {}, ({})::text FROM {} WHERE {} IS NOT NULL").format(
            column.key_json, column.text, column.relation, column.expected
        )
    ).fetchall()
    embedding = column.embedding
    with connection.cursor() as cursor:
        cursor.executemany(
            sql.SQL("UPDATE {} SET {} = $2::text::{}, {} = {} WHERE {} = $1::jsonb").format(
                column.relation,
                column.vector,
                column.vector_type,
                column.fingerprint,
                column.expected,
                column.key_json,
            ),
            [
                (
                    Jsonb(key),
                    str(vector_for(text, embedding.dimensions, embedding.model).tolist()),
                )
                for key, text in rows
            ],
        )


def pretend_filled(connection: Connection, column: Column) -> None:
    """Give every row some vector and its fingerprint, in one statement: for large tables."""
    ones = "[" + ",".join(["1"] * column.embedding.dimensions) + "]"
    connection.execute(
        sql.SQL("UPDATE {} SET {} = {}::{}, {} = {} WHERE {} IS NOT NULL").format(
            column.relation,
            column.vector,
            sql.Literal(ones),
            column.vector_type,
            column.fingerprint,
            column.expected,
            column.expected,
        )
    )


def wrong_rows(
    connection: Connection, column: Column, leave: Sequence[str] = ()
) -> list[tuple[Any, str]]:
    """Rows that are not exactly as they should be, and how; the truth is worked out in Python.

    `leave`: texts whose rows should have no vector.
    """
    embedding = column.embedding
    rows = connection.execute(
        sql.SQL("SELECT {}, ({})::text, {}::real[], {}, {} FROM {}").format(
            column.key_json,
            column.text,
            column.vector,
            column.fingerprint,
            column.expected,
            column.relation,
        ),
        binary=True,
    ).fetchall()
    wrong: list[tuple[Any, str]] = []
    for key, text, vector, fingerprint, expected in rows:
        if expected is None or text in leave:
            if vector is not None or (expected is None and fingerprint is not None):
                wrong.append((key, "has a vector"))
        elif vector is None or fingerprint != expected:
            wrong.append((key, "is pending"))
        elif not np.array_equal(
            np.array(vector, dtype=np.float32),
            vector_for(text, embedding.dimensions, embedding.model),
        ):
            wrong.append((key, "has another text's vector"))
    return wrong


def pages(
    connection: Connection, column: Column, partition: str, limit: int = 1000
) -> list[list[PendingRow]]:
    """Every page of a partition's pending rows."""
    found: list[list[PendingRow]] = []
    after: tuple[str, ...] | None = None
    while True:
        with connection.transaction():
            connection.execute(SETTINGS)
            rows = connection.execute(*page_query(column, partition, after, limit)).fetchall()
        page = pending_rows(rows)
        if not page:
            return found
        found.append(page)
        after = page[-1].position


def pending_keys(connection: Connection, column: Column, partition: str) -> list[tuple[str, ...]]:
    """Keys of a partition's pending rows, in the order in which they are read."""
    return [row.key for page in pages(connection, column, partition) for row in page]


def fingerprints(connection: Connection, column: Column) -> Mapping[str, bytes | None]:
    """First key column as text → the fingerprint that the row calls for."""
    rows = connection.execute(
        sql.SQL("SELECT {}::text, uuid_send({}) FROM {}").format(
            sql.Identifier(column.table.key_columns[0]), column.expected, column.relation
        )
    ).fetchall()
    return dict(rows)


def with_connection(
    url: str, work: "Callable[[psycopg.AsyncConnection[Any]], Awaitable[Result]]"
) -> Result:
    """Run asyncio code with one connection."""

    async def main() -> Result:
        async with connect_async(url) as connection:
            return await work(connection)

    return asyncio.run(main())
