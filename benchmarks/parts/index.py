"""HNSW: building with and without workers, halfvec, writing in place against load-then-build."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from benchmarks.lab import TABLE, Lab, column_of, table_spec
from benchmarks.report import Cell, Table, middle, times
from benchmarks.sizes import Sizes
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.indexes import build_hnsw, drop_hnsw
from embedding_pipeline.store.migrate import migrate

Connection = psycopg.Connection[Any]
Matrix = np.ndarray[tuple[int, int], np.dtype[np.float32]]

DIMENSIONS = 1536
QUERIES = 50
K = 10


def clustered(count: int, seed: int) -> Matrix:
    """Unit vectors around 200 centres in a space of 64 dimensions, as texts' vectors are: vectors
    without any structure have no near neighbours to find."""
    draw = np.random.default_rng(seed)
    shape = np.random.default_rng(0)
    basis = shape.standard_normal((64, DIMENSIONS))
    centres = shape.standard_normal((200, 64))
    low = centres[draw.integers(0, 200, count)] + 0.7 * draw.standard_normal((count, 64))
    vectors = low @ basis + 0.3 * draw.standard_normal((count, DIMENSIONS))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors, dtype=np.float32)


def _fill(connection: Connection, vectors: Matrix, first: int = 1) -> None:
    """Rows with these vectors, by binary COPY into the table itself."""
    command = sql.SQL("COPY {} (id, body, {}) FROM STDIN (FORMAT BINARY)").format(
        sql.Identifier(TABLE), sql.Identifier(f"embedding_{DIMENSIONS}")
    )
    with connection.cursor() as cursor, cursor.copy(command) as copy:
        copy.set_types(["bigint", "text", "bytea"])
        head = DIMENSIONS.to_bytes(2, "big") + b"\0\0"
        for number, vector in enumerate(vectors, first):
            copy.write_row((number, f"row {number}", head + vector.astype(">f4").tobytes()))


def _table(url: str, rows: int) -> None:
    with connect(url) as connection:
        connection.execute(
            sql.SQL("CREATE TABLE {} (id bigint PRIMARY KEY, body text, tenant text)").format(
                sql.Identifier(TABLE)
            )
        )
        migrate(connection, [table_spec(DIMENSIONS)])
        _fill(connection, clustered(rows, 1))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def build(lab: Lab, sizes: Sizes) -> list[Table]:
    """The same index built in three ways, and as halfvec."""
    rows = sizes.index_rows
    spec = table_spec(DIMENSIONS)
    found: dict[str, list[float]] = {name: [] for name in ("none", "own", "ours", "halfvec")}
    sizes_of: dict[str, int] = {}
    recalls: dict[str, float] = {}
    with lab.database(f"vectors-{rows}", lambda url: _table(url, rows)) as url:
        column = column_of(url, spec)
        queries = clustered(QUERIES, 2)
        with connect(url) as connection:
            truth = [_nearest(connection, query, "exact") for query in queries]
            for number in range(sizes.rounds):
                last = number == sizes.rounds - 1
                for name, workers in (("none", 0), ("ours", 2)):
                    drop_hnsw(connection, column)
                    found[name].append(
                        _timed(lambda w=workers: build_hnsw(connection, column, parallel_workers=w))  # type: ignore[misc]
                    )
                if last:
                    sizes_of["ours"], recalls["ours"] = _judge(connection, queries, truth, "vector")
                drop_hnsw(connection, column)
                found["own"].append(_timed(lambda: _plain_build(connection)))
                connection.execute("DROP INDEX plain")
                found["halfvec"].append(_timed(lambda: _halfvec_build(connection)))
                if last:
                    sizes_of["halfvec"], recalls["halfvec"] = _judge(
                        connection, queries, truth, "halfvec"
                    )
                connection.execute("DROP INDEX plain")
    none = found["none"]
    table_rows: list[dict[str, Cell]] = []
    for name, words in (
        ("none", "vector, without parallel workers"),
        ("own", "vector, as Postgres plans it (`CREATE INDEX`, 512 MB)"),
        ("ours", "vector, as the product builds it"),
        ("halfvec", "halfvec, as the product would build it"),
    ):
        table_rows.append(
            {
                "index": words,
                "faster by": times(middle(a / b for a, b in zip(none, found[name], strict=True))),
                "MB": sizes_of[name] / 1024**2 if name in sizes_of else None,
                f"recall@{K}": recalls.get(name),
            }
        )
    return [
        Table(
            f"Building an HNSW index of {rows:,} × {DIMENSIONS}",
            list(table_rows[0]),
            table_rows,
            [
                f"recall@{K} of {QUERIES} queries against exact search, `ef_search` 40; vectors "
                "are made up, in 200 clusters: compare within this table only.",
            ],
            {f"{name} seconds": middle(values) for name, values in found.items()},
        )
    ]


def _plain_build(connection: Connection) -> None:
    connection.execute("SET maintenance_work_mem = '512MB'")
    connection.execute(
        f"CREATE INDEX CONCURRENTLY plain ON {TABLE} USING hnsw"
        f" (embedding_{DIMENSIONS} vector_cosine_ops)".encode()
    )
    connection.execute("RESET maintenance_work_mem")


def _halfvec_build(connection: Connection) -> None:
    connection.execute("SET maintenance_work_mem = '512MB'")
    connection.execute("SET min_parallel_table_scan_size = 0")
    connection.execute(
        f"CREATE INDEX CONCURRENTLY plain ON {TABLE} USING hnsw"
        f" ((embedding_{DIMENSIONS}::halfvec({DIMENSIONS})) halfvec_cosine_ops)".encode()
    )
    connection.execute("RESET min_parallel_table_scan_size")
    connection.execute("RESET maintenance_work_mem")


def _nearest(connection: Connection, query: Any, how: str) -> set[int]:
    column = f"embedding_{DIMENSIONS}"
    cast = f"::halfvec({DIMENSIONS})" if how == "halfvec" else ""
    kind = f"halfvec({DIMENSIONS})" if how == "halfvec" else "vector"
    text = "[" + ",".join(map(str, query.tolist())) + "]"
    with connection.transaction():
        exact = "on" if how == "exact" else "off"
        connection.execute(f"SET LOCAL enable_seqscan = {exact}".encode())
        connection.execute(
            f"SET LOCAL enable_indexscan = {'off' if how == 'exact' else 'on'}".encode()
        )
        found = connection.execute(
            f"SELECT id FROM {TABLE} ORDER BY {column}{cast} <=> $1::{kind} LIMIT {K}".encode(),
            [text],
        )
        return {key for (key,) in found}


def _judge(
    connection: Connection, queries: Matrix, truth: list[set[int]], how: str
) -> tuple[int, float]:
    """Bytes of the only HNSW index and its recall."""
    row = connection.execute(
        "SELECT pg_relation_size(indexrelid) FROM pg_index JOIN pg_class c ON c.oid = indexrelid"
        " JOIN pg_am ON pg_am.oid = relam WHERE indrelid = $1::regclass AND amname = 'hnsw'",
        [TABLE],
    ).fetchone()
    assert row is not None
    hits = sum(
        len(_nearest(connection, query, how) & wanted)
        for query, wanted in zip(queries, truth, strict=True)
    )
    return int(row[0]), hits / (K * len(queries))


def load(lab: Lab, sizes: Sizes) -> list[Table]:
    """Writing every row with the index in place, against load then build."""
    rows = max(200, sizes.index_rows // 5)
    spec = table_spec(DIMENSIONS)
    found: dict[str, list[float]] = {"in_place": [], "load": [], "build": []}
    for _ in range(sizes.rounds):
        for how in ("in_place", "load"):
            with lab.database(f"vectors-{rows}", lambda url: _table(url, rows)) as url:
                column = column_of(url, spec)
                with connect(url) as connection:
                    _prepare(connection, column, with_index=how == "in_place")
                    vectors = clustered(rows, 3)
                    found[how].append(_timed(lambda: _update(connection, vectors)))  # noqa: B023
                    if how == "load":
                        found["build"].append(
                            _timed(lambda: build_hnsw(connection, column))  # noqa: B023
                        )
                    _check(connection, vectors)
    pairs = list(zip(found["in_place"], found["load"], found["build"], strict=True))
    ratio = middle(in_place / (load + built) for in_place, load, built in pairs)
    share = middle(built / (in_place - load) for in_place, load, built in pairs)
    table_rows: list[dict[str, Cell]] = [
        {"way": "rows written with the index in place", "time": times(ratio)},
        {"way": "rows written without it, then built", "time": times(1.0)},
    ]
    return [
        Table(
            f"Writing {rows:,} × {DIMENSIONS} into a column with an HNSW index",
            list(table_rows[0]),
            table_rows,
            [
                f"Break-even: with less than {share:.0%} of the rows to write, writing in place is "
                "quicker than dropping the index and building it again (the rule of "
                "`store/bulk_load.py`).",
            ],
            {f"{name} seconds": middle(values) for name, values in found.items()}
            | {"break_even_share": share},
        )
    ]


def _prepare(connection: Connection, column: Column, *, with_index: bool) -> None:
    if with_index:
        build_hnsw(connection, column)
    connection.execute("CREATE TABLE incoming (id bigint PRIMARY KEY, new vector)")


def _update(connection: Connection, vectors: Matrix) -> None:
    with connection.transaction(), connection.cursor() as cursor:
        with cursor.copy("COPY incoming FROM STDIN (FORMAT BINARY)") as copy:
            copy.set_types(["bigint", "bytea"])
            head = DIMENSIONS.to_bytes(2, "big") + b"\0\0"
            for number, vector in enumerate(vectors, 1):
                copy.write_row((number, head + vector.astype(">f4").tobytes()))
        cursor.execute(
            f"UPDATE {TABLE} SET embedding_{DIMENSIONS} = new FROM incoming"
            f" WHERE incoming.id = {TABLE}.id".encode()
        )


def _check(connection: Connection, vectors: Matrix) -> None:
    """What was written is what is there."""
    query = f"SELECT id, embedding_{DIMENSIONS} FROM {TABLE} ORDER BY id".encode()
    for number, (key, vector) in enumerate(connection.execute(query, binary=True)):
        assert key == number + 1
        assert bytes(vector)[4:] == vectors[number].astype(">f4").tobytes(), key


def index(lab: Lab, sizes: Sizes) -> list[Table]:
    """Both."""
    return [*build(lab, sizes), *load(lab, sizes)]
