"""What grows with the table: time, memory, the pending index, and what users' own writes cost."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
from psycopg import sql

from benchmarks import corpus
from benchmarks.endpoint import Endpoint
from benchmarks.lab import TABLE, Lab, column_of, load_documents, make_documents, table_spec
from benchmarks.report import Cell, Table, middle, times
from benchmarks.sizes import Sizes
from benchmarks.truth import check_rows
from benchmarks.worker import measure
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.indexes import reindex_pending_if_bloated, vacuum
from embedding_pipeline.store.pending import count_by_partition

Connection = psycopg.Connection[Any]

WIDTH = 384
WRITTEN = 2_000
"""Rows of a user's own INSERT or UPDATE in one statement, at most."""
SINGLE = 300
"""Of a user's own statements of one row each, at most."""
MIN_ROUNDS = 5
MOST = 2
"""Embedding columns."""


def growth(lab: Lab, sizes: Sizes) -> list[Table]:
    """Each size: embedded, vacuumed, and written to by a user."""
    return [_embedding(lab, sizes), _users_writes(lab, sizes)]


def _embedding(lab: Lab, sizes: Sizes) -> Table:
    spec = table_spec(WIDTH)
    rows: list[dict[str, Cell]] = []
    for count in sizes.growth_rows:
        with lab.empty_database() as url, Endpoint(WIDTH) as endpoint:
            make_documents(url, spec, count)
            with connect(url) as connection:
                connection.execute("VACUUM ANALYZE")
                connection.execute("CHECKPOINT")
            task = {
                "job": "core", "url": url, "spec": spec.model_dump(mode="json"),
                "endpoint": endpoint.url, "batch": 64, "concurrency": 8,
            }  # fmt: skip
            usage = measure(lab, task)
            column = column_of(url, spec)
            check_rows(url, column, rows=count)
            with connect(url) as connection:

                def size() -> float:
                    row = connection.execute(
                        "SELECT pg_relation_size($1::regclass)",
                        [column.pending_index],  # noqa: B023
                    ).fetchone()
                    assert row is not None
                    return float(row[0]) / 1024

                def counting() -> float:
                    began = time.perf_counter()
                    assert not count_by_partition(connection, column)  # noqa: B023
                    return 1000 * (time.perf_counter() - began)

                before, counted = size(), counting()
                began = time.perf_counter()
                vacuum(connection, column)
                reindex_pending_if_bloated(connection, column)
                tidied = time.perf_counter() - began
                counting()
                client, server = usage.per_thousand(count)
                rows.append(
                    {
                        "rows": count,
                        "µs a row": 1e6 * usage.seconds / count,
                        "client CPU-s / 1,000": client,
                        "server CPU-s / 1,000": server,
                        "peak MB above bare": usage.above_mb,
                        "pending index, KB": before,
                        "count, ms": counted,
                        "VACUUM and REINDEX, share of the run": f"{tidied / usage.seconds:.0%}",
                        "index after, KB": size(),
                        "count after, ms": middle(counting() for _ in range(5)),
                    }
                )
    return Table(f"Growth: every row embedded at {WIDTH} dimensions", list(rows[0]), rows)


def _users_writes(lab: Lab, sizes: Sizes) -> Table:
    """A user's INSERT and UPDATE with 0, 1 and 2 embedding columns, in turns."""
    rows = [row for count in sizes.growth_rows for row in _written(lab, count, sizes.rounds)]
    return Table(
        "A user's own writes of texts of 100 to 200 words, relative to a table without embedding "
        "columns",
        list(rows[0]),
        rows,
        [
            f"*At once*: one statement writes {WRITTEN:,} rows that lie in a table on the server, "
            "the cheapest write there is. *One by one*: a statement and a commit for each row, as "
            "an application writes.",
            "`µs more` is what the first embedding column adds to a row; where each row is a "
            "statement and a commit, that is less than these vary by.",
        ],
    )


def _written(lab: Lab, count: int, rounds: int) -> list[dict[str, Cell]]:
    """A row for each kind of write into a table of `count` rows."""
    rounds = max(MIN_ROUNDS, rounds)
    at_once, single = min(WRITTEN, count // rounds), min(SINGLE, count // rounds)
    found: dict[str, dict[int, list[float]]] = {}
    with ExitStack() as stack:
        tables = {
            columns: stack.enter_context(_table(lab, count, columns)) for columns in range(MOST + 1)
        }
        for number in range(rounds):
            for columns, connection in tables.items():
                taken = {
                    "INSERT at once": _insert(connection, count + 1 + number * at_once, at_once),
                    "UPDATE at once": _update(connection, 1 + number * at_once, at_once),
                    "INSERT one by one": _insert_singly(
                        connection, 2 * count + 1 + number * single, single
                    ),
                    "UPDATE one by one": _update_singly(
                        connection, count - number * single, single
                    ),
                }
                for what, seconds in taken.items():
                    found.setdefault(what, {}).setdefault(columns, []).append(seconds)
    return [
        {
            "rows": count,
            "statement": what,
            "µs a row without": 1e6 * middle(by_columns[0]),
            "1 column": _ratio(by_columns[1], by_columns[0]),
            "2 columns": _ratio(by_columns[2], by_columns[0]),
            # a commit's wait for the disk varies by more than an index takes
            "µs more": 1e6
            * middle(one - none for one, none in _pairs(by_columns[1], by_columns[0]))
            if what.endswith("at once")
            else None,
        }
        for what, by_columns in found.items()
    ]


def _pairs(one: list[float], other: list[float]) -> list[tuple[float, float]]:
    """What was measured in the same round."""
    return list(zip(one, other, strict=True))


def _ratio(one: list[float], other: list[float]) -> str:
    return times(middle(a / b for a, b in _pairs(one, other)))


@contextmanager
def _table(lab: Lab, count: int, columns: int) -> Iterator[Connection]:
    """A connection to a table of `count` rows, every one up to date in so many columns."""
    with lab.empty_database() as url:
        if columns:
            spec = table_spec(list(range(WIDTH, WIDTH + columns)))
            make_documents(url, spec, count, embedded=True)
        with connect(url) as connection:
            if not columns:
                load_documents(connection, count)
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")
            connection.execute("CREATE TEMPORARY TABLE texts (n bigint PRIMARY KEY, body text)")
            with connection.cursor() as cursor, cursor.copy("COPY texts FROM STDIN") as copy:
                for number in range(WRITTEN):
                    copy.write_row((number, corpus.text(number, 1)))
            connection.execute("ANALYZE texts")
            yield connection


def _insert(connection: Connection, first: int, number: int) -> float:
    statement = sql.SQL(
        "INSERT INTO {} (id, body) SELECT {} + n, body FROM texts WHERE n < {}"
    ).format(sql.Identifier(TABLE), sql.Literal(first), sql.Literal(number))
    return _at_once(connection, statement, number)


def _update(connection: Connection, first: int, number: int) -> float:
    """Rows that nobody has edited before: each was up to date and becomes pending."""
    statement = sql.SQL(
        "UPDATE {table} SET body = texts.body FROM texts WHERE {table}.id = {first} + n AND n < {n}"
    ).format(table=sql.Identifier(TABLE), first=sql.Literal(first), n=sql.Literal(number))
    return _at_once(connection, statement, number)


def _at_once(connection: Connection, statement: sql.Composed, number: int) -> float:
    began = time.perf_counter()
    done = connection.execute(statement)
    seconds = time.perf_counter() - began
    assert done.rowcount == number
    return seconds / number


def _insert_singly(connection: Connection, first: int, number: int) -> float:
    statement = sql.SQL("INSERT INTO {} (id, body) VALUES ($1, $2)").format(sql.Identifier(TABLE))
    return _singly(connection, statement, [(first + n, corpus.text(n, 2)) for n in range(number)])


def _update_singly(connection: Connection, last: int, number: int) -> float:
    """Rows from the other end of the table than those that `_update` edits."""
    statement = sql.SQL("UPDATE {} SET body = $2 WHERE id = $1").format(sql.Identifier(TABLE))
    return _singly(connection, statement, [(last - n, corpus.text(n, 3)) for n in range(number)])


def _singly(
    connection: Connection, statement: sql.Composed, values: list[tuple[int, str]]
) -> float:
    """Seconds a row, each in a transaction of its own."""
    began = time.perf_counter()
    for row in values:
        done = connection.execute(statement, row)
        assert done.rowcount == 1
    return (time.perf_counter() - began) / len(values)
