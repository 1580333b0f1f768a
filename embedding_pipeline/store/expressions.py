"""Whether a table's `text` and `eligible` can stand in an index predicate.

The pending index holds them, so an expression that is not immutable cannot be indexed, and one
that fails for some row would make the user's own INSERT fail. Postgres itself is asked, on an
empty temporary clone inside a transaction that is rolled back: the live table is only read.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import errors, sql

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.store.column import Column

Connection = psycopg.Connection[Any]

SAMPLE_ROWS = 1_000
"""Existing rows on which the expressions are tried."""


@contextmanager
def clone(connection: Connection, columns: Sequence[Column]) -> Iterator[sql.Identifier]:
    """An empty temporary table with the columns of the real one, gone at the end.

    It has the real one's name, for expressions that qualify their columns with it. Embedding
    columns that are still to be added are there too; their type does not matter to a predicate
    that asks only whether they are NULL.
    """
    facts = columns[0].facts
    missing: list[sql.Composable] = []
    for column in columns:
        if column.embedding.column not in facts.columns:
            missing.append(sql.SQL(", {} bytea").format(column.vector))
        if column.embedding.fingerprint_column not in facts.columns:
            missing.append(sql.SQL(", {} uuid").format(column.fingerprint))
    name = sql.Identifier("pg_temp", facts.name)
    with connection.transaction(force_rollback=True):
        connection.execute(b"SET LOCAL lock_timeout = 2000")
        connection.execute(
            sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {}{})").format(
                sql.Identifier(facts.name), columns[0].relation, sql.SQL("").join(missing)
            )
        )
        yield name


def check(connection: Connection, columns: Sequence[Column]) -> None:
    """SchemaError when an expression does not parse, is not immutable, or fails for some row."""
    table = columns[0].table
    column = columns[0]
    for name, expression in (("text", table.text), ("eligible", table.eligible)):
        if expression is None:
            continue
        fragment = column.text if name == "text" else sql.SQL("({})").format(column.eligible)
        cast = sql.SQL("::text" if name == "text" else "::boolean")
        _try(
            connection,
            lambda fragment=fragment, cast=cast: _parse(connection, column, fragment, cast),  # type: ignore[misc]
            f"table {table.table}: {name}: {expression!r} is not an SQL expression over its rows",
        )
    with clone(connection, columns) as temporary:
        try:
            connection.execute(
                sql.SQL("CREATE INDEX ON {} ({}) WHERE {}").format(
                    temporary, column.keys, column.pending
                )
            )
        except errors.InvalidObjectDefinition as error:
            raise SchemaError(
                f"table {table.table}: text or eligible is not immutable: {_primary(error)}. It "
                "stands in an index, so the same row must always give the same text: use || and "
                "coalesce (not concat, concat_ws or format), no now(), no cast of dates or "
                "enums to text"
            ) from None
        except psycopg.DatabaseError as error:
            raise SchemaError(
                f"table {table.table}: text or eligible cannot stand in an index: {_primary(error)}"
            ) from None
    _total(connection, column)


def _parse(connection: Connection, column: Column, fragment: sql.Composable, cast: sql.SQL) -> None:
    # asked for in binary form, a query takes the extended protocol, which refuses two statements
    connection.execute(
        sql.SQL("SELECT ({}){} FROM {} LIMIT 0").format(fragment, cast, column.relation),
        binary=True,
    )


def _total(connection: Connection, column: Column) -> None:
    table = column.table.table
    for what, source in (
        (
            "a row of NULLs",
            sql.SQL("(SELECT) AS embedding_pipeline_one LEFT JOIN {} ON false").format(
                column.relation
            ),
        ),
        (
            "a row of the table",
            sql.SQL("(SELECT * FROM {} LIMIT {}) AS {}").format(
                column.relation, sql.Literal(SAMPLE_ROWS), sql.Identifier(column.facts.name)
            ),
        ),
    ):
        _try(
            connection,
            lambda source=source: connection.execute(  # type: ignore[misc]
                sql.SQL("SELECT count({}), count({}) FROM {}").format(
                    column.expected, column.partition_index_expression, source
                )
            ),
            f"table {table}: text or eligible fails for {what}, and since they stand in an index, "
            "a user's INSERT would fail too; write them so that every row gives a text or NULL",
        )


def _try(connection: Connection, action: Callable[[], object], problem: str) -> None:
    try:
        with connection.transaction(force_rollback=True):
            action()
    except psycopg.DatabaseError as error:
        hint = f" ({error.diag.message_hint})" if error.diag.message_hint else ""
        raise SchemaError(f"{problem}: {_primary(error)}{hint}") from None


def _primary(error: psycopg.Error) -> str:
    return error.diag.message_primary or str(error).strip()
