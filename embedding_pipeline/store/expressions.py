"""Whether a table's `text` and `eligible` can stand in an index predicate.

The pending index holds them, so an expression that is not immutable cannot be indexed, and one
that fails for some row would make the user's own INSERT fail. Postgres itself is asked, on an
empty temporary clone inside a transaction that is rolled back: the live table is only read.

Not everything can be found out: an expression is tried on a sample of the rows, on a row of NULLs
and on odd values of each column it reads (an empty text, a word where a number may be expected,
JSON of another shape, the largest number, …). One that fails only for a value that nobody thought
of passes, and so does a function that is declared IMMUTABLE but is not.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import errors, sql

from embedding_pipeline.errors import SchemaError
from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.ddl import primary

Connection = psycopg.Connection[Any]

SAMPLE_ROWS = 1_000
"""Existing rows on which the expressions are tried."""

_CLONE = "embedding_pipeline_clone"
_ODD_TEXTS = (
    "",
    " ",
    "word",
    "0",
    "-1.5e3",
    "99999999999999999999",
    "2025-02-30",
    "{",
    "ß𝄞\n\\'\"",
)
_ODD_NUMBERS = ("0", "-1", "1", "NaN", "Infinity", "9" * 20, str(2**63 - 1), str(2**31), "32767")
_ODD_TIMES = (
    "infinity",
    "-infinity",
    "0044-03-15 BC",
    "2024-02-29",
    "00:00",
    "24:00",
    "P1Y",
    "1 day",
)


def check(connection: Connection, columns: Sequence[Column]) -> None:
    """SchemaError when an expression does not parse, is not immutable, or fails for some row."""
    check_syntax(connection, columns[0])
    with clone(connection, columns) as temporary:
        build_on_clone(connection, columns[0], temporary)
    check_totality(connection, columns)


def check_syntax(connection: Connection, column: Column) -> None:
    """SchemaError unless `text` and `eligible` are expressions over the table's rows."""
    table = column.table
    for name, expression, fragment in (
        ("text", table.text, column.text),
        ("eligible", table.eligible, column.eligible if table.eligible else None),
    ):
        if expression is None or fragment is None:
            continue
        try:
            with connection.transaction():
                connection.execute(b"SET LOCAL lock_timeout = '2s'")
                # Under an alias, because the queries have aliases too. Asked for in binary form, a
                # query takes the extended protocol, which refuses a second statement.
                connection.execute(
                    sql.SQL("SELECT ({})::{} FROM {} AS embedding_pipeline_row LIMIT 0").format(
                        fragment,
                        sql.SQL("text" if name == "text" else "boolean"),
                        column.relation,
                    ),
                    binary=True,
                )
        except errors.LockNotAvailable as error:
            raise SchemaError(f"table {table.table}: it is locked: {primary(error)}") from None
        except psycopg.DatabaseError as error:
            hint = f" ({error.diag.message_hint})" if error.diag.message_hint else ""
            if isinstance(error, errors.UndefinedTable):
                hint = " (write columns without the table's name)"
            raise SchemaError(
                f"table {table.table}: {name}: {expression!r} is neither a column nor an SQL "
                f"expression over one row of the table: {primary(error)}{hint}"
            ) from None


@contextmanager
def clone(connection: Connection, columns: Sequence[Column]) -> Iterator[sql.Identifier]:
    """An empty temporary table with the columns of the real one, gone at the end.

    Embedding columns that are still to be added are there too; their type does not matter to a
    predicate that asks only whether they are NULL.
    """
    additions = sql.SQL(", ").join(
        sql.SQL("ADD COLUMN IF NOT EXISTS {} {}").format(name, sql.SQL(type_))
        for column in columns
        for name, type_ in ((column.vector, "bytea"), (column.fingerprint, "uuid"))
    )
    clone = sql.Identifier("pg_temp", _CLONE)
    with connection.transaction(force_rollback=True):
        connection.execute(b"SET LOCAL lock_timeout = '2s'")
        try:
            connection.execute(
                sql.SQL("CREATE TEMPORARY TABLE {} (LIKE {})").format(
                    sql.Identifier(_CLONE), columns[0].relation
                )
            )
            connection.execute(sql.SQL("ALTER TABLE {} {}").format(clone, additions))
        except errors.InsufficientPrivilege as error:
            raise SchemaError(
                f"table {columns[0].table.table}: {primary(error)}; the role needs SELECT on the "
                "table and TEMPORARY on the database"
            ) from None
        except errors.LockNotAvailable as error:
            raise SchemaError(
                f"table {columns[0].table.table} is locked by another session: {primary(error)}"
            ) from None
        yield clone


def build_on_clone(
    connection: Connection,
    column: Column,
    temporary: sql.Identifier,
    create: sql.Composed | None = None,
) -> None:
    """Build an index (the pending one by default) on the clone.

    Raises SchemaError in the user's words.
    """
    if create is None:
        create = sqlfiles.compose(
            "index/pending",
            name=sql.Identifier(f"{_CLONE}_pending"),
            table=temporary,
            partition=column.partition_index_expression,
            keys=column.keys,
            pending=column.pending,
            concurrently=sql.SQL(""),
            only=sql.SQL(""),
        )
    try:
        connection.execute(create)
    except (errors.InvalidObjectDefinition, errors.FeatureNotSupported) as error:
        raise SchemaError(
            f"table {column.table.table}: text or eligible cannot stand in an index: "
            f"{primary(error)}. The same row must always give the same text: use || and coalesce "
            "(not concat, concat_ws or format), no now(), no subquery, no cast of dates, numbers "
            "in locale formats or enums to text"
        ) from None
    except psycopg.DatabaseError as error:
        raise SchemaError(
            f"table {column.table.table}: its pending index cannot be built: {primary(error)}"
        ) from None


def check_totality(connection: Connection, columns: Sequence[Column]) -> None:
    """SchemaError when an expression fails for a row that exists or could exist."""
    column = columns[0]
    nobody = sql.SQL("(SELECT) AS embedding_pipeline_one LEFT JOIN {} AS t ON false").format(
        column.relation
    )

    def attempt(source: sql.Composable, what: str) -> None:
        _refuse_failure(
            connection,
            sql.SQL("SELECT count({}) FROM {}").format(column.expected, source),
            f"table {column.table.table}: text or eligible fails for {what}",
            "They stand in an index, so a user's INSERT or UPDATE of such a row would fail too; "
            "write them so that every row gives a text or NULL, for instance "
            "CASE WHEN a ~ '^[0-9]{1,9}$' THEN a::int END",
        )

    # An outer join that finds nothing gives a row of NULLs of the right types. OFFSET 0 keeps the
    # planner from folding constants into the expression: a guarded division by zero is no error.
    _refuse_failure(
        connection,
        sql.SQL("SELECT count({}) FROM {}").format(column.partition_index_expression, nobody),
        f"table {column.table.table}: its rows cannot be put into partitions",
        "Choose another key, or partitions by column or month",
    )
    attempt(nobody, "a row of NULLs")
    attempt(
        sql.SQL("(SELECT * FROM {} LIMIT {}) AS t").format(
            column.relation, sql.Literal(SAMPLE_ROWS)
        ),
        "a row of the table",
    )
    with clone(connection, columns) as temporary:
        build_on_clone(connection, column, temporary)
        for name, type_, category in _read_columns(connection, column, temporary):
            for value in _odd_values(column, type_, category):
                as_input = sql.SQL("{}::{}").format(sql.Literal(value), sql.SQL(type_))
                if not _is_input(connection, as_input):
                    continue
                row = sql.SQL(", ").join(
                    sql.SQL("{} AS {}").format(
                        as_input if other == name else sql.Identifier("t", other),
                        sql.Identifier(other),
                    )
                    for other in column.facts.columns
                )
                attempt(
                    sql.SQL("(SELECT {} FROM {} OFFSET 0) AS t").format(row, nobody),
                    f"a row whose {name} is {value!r}",
                )


def _read_columns(
    connection: Connection, column: Column, temporary: sql.Identifier
) -> list[tuple[str, str, str]]:
    """The user's columns that the predicate reads, with type and type category."""
    rows = connection.execute(
        sqlfiles.query("catalogue/predicate_columns"), [temporary.as_string(connection)]
    ).fetchall()
    own = {column.embedding.column, column.embedding.fingerprint_column}
    return [(name, column.facts.columns[name], kind) for name, kind in rows if name not in own]


def _odd_values(column: Column, type_: str, category: str) -> Sequence[str]:
    """Values that an unguarded expression fails for; those that the type refuses are left out."""
    if type_ in ("json", "jsonb"):
        # every text constant of the expression may be the name of a member that it reads
        constants = re.findall(r"'((?:[^']|'')*)'", f"{column.table.text} {column.table.eligible}")
        names = [constant.replace("''", "'") for constant in constants]
        values: list[Any] = [{}, [], "word", 1, None, [[]], True]
        odd_members: list[Any] = ["word", "", None, 0, [], {}, "9" * 20]
        for odd in odd_members:
            members = dict.fromkeys(names, odd)
            values += [members, dict.fromkeys(names, members), [members]]
        return [json.dumps(value) for value in values]
    if category == "A":
        return ("{}", "{NULL}", '{""}', "{0}", "[5:5]={7}")
    if category == "N":
        return _ODD_NUMBERS
    if category in ("D", "T"):
        return _ODD_TIMES
    if category == "B":
        return ("true", "false")
    if type_ == "bytea":
        return ("\\x", "\\xff", "\\x00")
    return _ODD_TEXTS


def _is_input(connection: Connection, value: sql.Composable) -> bool:
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(sql.SQL("SELECT {}").format(value))
    except psycopg.DatabaseError:
        return False
    return True


def _refuse_failure(connection: Connection, query: sql.Composed, problem: str, advice: str) -> None:
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(b"SET LOCAL lock_timeout = '2s'")
            connection.execute(query)
    except psycopg.OperationalError as error:
        raise SchemaError(f"cannot read the table to check it: {primary(error)}") from None
    except psycopg.DatabaseError as error:
        raise SchemaError(f"{problem}: {primary(error)}. {advice}") from None
