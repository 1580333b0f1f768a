"""What grows with the table: time, memory, the pending index, and what users' own writes cost."""

import time
from collections.abc import Callable
from functools import partial

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

WIDTH = 384
WRITTEN = 2_000
"""Rows of a user's own INSERT and UPDATE."""


def growth(lab: Lab, sizes: Sizes) -> list[Table]:
    """Each size: embedded, vacuumed, and written to by a user."""
    return [_embedding(lab, sizes), _users_writes(lab, sizes)]


def _embedding(lab: Lab, sizes: Sizes) -> Table:
    spec = table_spec(WIDTH)
    rows: list[dict[str, Cell]] = []
    for count in sizes.growth_rows:
        fill = partial(make_documents, spec=spec, rows=count)
        with lab.database(f"growth-{count}", fill) as url, Endpoint(WIDTH) as endpoint:
            lab.forget(f"growth-{count}")
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
    """A user's INSERT and UPDATE with 0, 1 and 2 embedding columns."""
    rows: list[dict[str, Cell]] = []
    for count in sizes.growth_rows:
        seconds: dict[int, tuple[float, float]] = {}
        for columns in (0, 1, 2):
            widths = list(range(WIDTH, WIDTH + columns))
            fill: Callable[[str], None]
            if columns:
                spec = table_spec(widths)
                fill = partial(make_documents, spec=spec, rows=count, embedded=True)
            else:
                fill = partial(_plain, rows=count)
            name = f"writes-{count}-{columns}"
            with lab.database(name, fill) as url:
                lab.forget(name)
                seconds[columns] = _writes(url, count, sizes.rounds)
        rows.append(
            {"rows": count}
            | {
                f"{what}, {columns} column{'s' * (columns > 1)}": times(
                    seconds[columns][number] / seconds[0][number]
                )
                for number, what in enumerate(("INSERT", "UPDATE"))
                for columns in (1, 2)
            }
        )
    return Table(
        f"A user's own writes of {WRITTEN:,} texts, relative to a table without embedding columns",
        list(rows[0]),
        rows,
    )


def _plain(url: str, rows: int) -> None:
    with connect(url) as connection:
        load_documents(connection, rows)


def _writes(url: str, rows: int, rounds: int) -> tuple[float, float]:
    inserts: list[float] = []
    updates: list[float] = []
    written = min(WRITTEN, rows)
    with connect(url) as connection:
        connection.execute("CREATE TEMPORARY TABLE texts (n bigint, body text)")
        with connection.cursor() as cursor, cursor.copy("COPY texts FROM STDIN") as copy:
            for number in range(written):
                copy.write_row((number, corpus.text(number, 1)))
        for number in range(max(3, rounds)):
            first = rows + 1 + number * written
            began = time.perf_counter()
            connection.execute(
                sql.SQL("INSERT INTO {} (id, body) SELECT {} + n, body FROM texts").format(
                    sql.Identifier(TABLE), sql.Literal(first)
                )
            )
            between = time.perf_counter()
            connection.execute(
                sql.SQL(
                    "UPDATE {table} SET body = texts.body || {tail} FROM texts"
                    " WHERE {table}.id = 1 + n"
                ).format(table=sql.Identifier(TABLE), tail=sql.Literal(f" {number}"))
            )
            inserts.append(between - began)
            updates.append(time.perf_counter() - between)
    return middle(inserts), middle(updates)
