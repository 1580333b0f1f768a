"""The rule for bulk loads, and what it does to a real index."""

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from embedding_pipeline.store import bulk_load, indexes
from embedding_pipeline.store.bulk_load import LoadFacts, load_facts, plan_load, prepare_load
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.rows import make_column, pretend_filled
from embedding_pipeline_tests.tables import embedding, spec

Connection = psycopg.Connection[Any]

EMPTY = LoadFacts(rows=100_000, to_write=100_000, without_vector=100_000, index="ours")


@pytest.mark.parametrize(
    ("facts", "how", "why"),
    [
        (replace(EMPTY, index="missing"), "load, then build", "no index yet"),
        (EMPTY, "drop, load, build", "0 of 100,000 rows have a vector"),
        # an index of a few rows is what a build before the load leaves
        (replace(EMPTY, to_write=95_000, without_vector=95_000), "drop, load, build", "5,000 of"),
        (replace(EMPTY, to_write=80_000, without_vector=80_000), "in place", "search is served"),
        # embedded anew because the text changed: the old vectors are what search finds meanwhile
        (replace(EMPTY, without_vector=0), "in place", "100,000 rows have a vector"),
        (replace(EMPTY, to_write=500, without_vector=500), "in place", "are few"),
        # rows that are not eligible have no vector either, and nothing is written to them
        (replace(EMPTY, to_write=2_000, without_vector=99_000), "in place", "2,000 of 100,000"),
        (replace(EMPTY, index="of the user"), "in place", "drop it, and materialise"),
        (replace(EMPTY, may_drop=False), "in place", "only the table's owner"),
        # a table that was never analysed is at least as large as what is pending in it
        (replace(EMPTY, rows=0), "drop, load, build", "0 of 100,000"),
    ],
)
def test_the_rule(facts: LoadFacts, how: str, why: str) -> None:
    plan = plan_load(facts)
    assert plan.how == how
    assert why in plan.why


def set_up(connection: Connection, rows: int, dimensions: int = 4) -> Column:
    table = spec(
        embeddings=[embedding(f"embedding_{dimensions}", dimensions)],
        partitions={"by": "hash", "buckets": 2},
    )
    column = make_column(connection, table, "CREATE TABLE docs (id bigint PRIMARY KEY, body text)")
    connection.execute(
        "INSERT INTO docs SELECT i, 'text number ' || i FROM generate_series(1, $1) AS i", [rows]
    )
    connection.execute("ANALYZE docs")
    return column


def test_an_index_that_was_built_too_early_is_dropped_before_the_load(
    connection: Connection,
) -> None:
    column = set_up(connection, 2_000)
    indexes.build_hnsw(connection, column)
    said: list[str] = []
    plan = prepare_load(connection, column, 2_000, report=said.append)
    assert plan is not None
    assert plan.how == "drop, load, build"
    assert indexes.index_state(connection, column).state == "missing"
    assert "built again once the rows are in" in said[-1]


def test_an_index_that_serves_search_stays(connection: Connection) -> None:
    column = set_up(connection, 2_000)
    pretend_filled(connection, column)
    indexes.build_hnsw(connection, column)
    connection.execute("UPDATE docs SET body = body || ' changed'")
    connection.execute("ANALYZE docs")
    facts = load_facts(connection, column)
    assert (facts.to_write, facts.without_vector, facts.index) == (2_000, 0, "ours")
    said: list[str] = []
    plan = prepare_load(connection, column, 2_000, report=said.append)
    assert plan is not None
    assert plan.how == "in place"
    assert indexes.index_state(connection, column).state == "valid"
    assert "2,000 rows have a vector" in said[-1]


def test_a_small_run_asks_nothing(connection: Connection) -> None:
    column = set_up(connection, 10)
    connection.close()  # whatever it asked would fail
    assert prepare_load(connection, column, bulk_load.BULK_ROWS - 1) is None


def test_an_index_of_the_user_s_stays_and_the_run_says_what_it_costs(
    connection: Connection,
) -> None:
    column = set_up(connection, 2_000)
    connection.execute("CREATE INDEX mine ON docs USING hnsw (embedding_4 vector_cosine_ops)")
    said: list[str] = []
    plan = prepare_load(connection, column, 2_000, report=said.append)
    assert plan is not None
    assert plan.how == "in place"
    assert indexes.index_state(connection, column).name == "mine"
    assert "drop it, and materialise the index afterwards" in said[-1]


def test_a_drop_that_somebody_stands_in_the_way_of_is_left(
    connection: Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> bool:
        raise bulk_load.SchemaError("gave up after 5 s")

    column = set_up(connection, 2_000)
    indexes.build_hnsw(connection, column)
    monkeypatch.setattr(bulk_load, "drop_hnsw", refused)
    said: list[str] = []
    plan = prepare_load(connection, column, 2_000, report=said.append)
    assert plan is not None
    assert plan.how == "in place"
    assert "its index stays, so writing takes longer: gave up after 5 s" in said[-1]


def random_vectors(connection: Connection, column: Column, rows: int, seed: int) -> None:
    """Give every row a random unit vector."""
    dimensions = column.embedding.dimensions
    drawn = np.random.default_rng(seed).standard_normal((rows, dimensions)).astype(np.float32)
    with connection.transaction():
        connection.execute("CREATE TEMPORARY TABLE drawn (id bigint, v text) ON COMMIT DROP")
        with connection.cursor() as cursor, cursor.copy("COPY drawn FROM STDIN") as copy:
            for number, vector in enumerate(drawn, start=1):
                copy.write_row((number, "[" + ",".join(f"{value:.4f}" for value in vector) + "]"))
        connection.execute(
            sql.SQL(
                "UPDATE docs SET {} = v::vector, {} = {} FROM drawn WHERE drawn.id = docs.id"
            ).format(
                column.vector,
                column.fingerprint,
                sql.SQL("md5('x')::uuid"),
            )
        )


@pytest.mark.parametrize(("dimensions", "rows"), [(384, 6_000), (1536, 1_500)])
def test_a_worn_index_is_replaced_under_a_second_name_while_it_serves_search(
    connection: Connection, database: str, dimensions: int, rows: int
) -> None:
    column = set_up(connection, rows, dimensions)
    random_vectors(connection, column, rows, 1)
    connection.execute("ANALYZE docs")
    indexes.build_hnsw(connection, column)
    fresh = indexes.index_state(connection, column)
    assert fresh.size_bytes == pytest.approx(indexes.fresh_bytes(rows, dimensions), rel=0.15)
    assert not indexes.build_hnsw(connection, column).built

    random_vectors(connection, column, rows, 2)
    connection.execute("ANALYZE docs")
    assert indexes.index_state(connection, column).size_bytes > 1.8 * fresh.size_bytes

    done = threading.Event()
    valid: set[int] = set()

    def watch() -> None:
        with connect(database) as other:
            while not done.is_set():
                [(count,)] = other.execute(
                    "SELECT count(*) FROM pg_index JOIN pg_class AS c ON c.oid = indexrelid"
                    " JOIN pg_am ON pg_am.oid = c.relam"
                    " WHERE indrelid = 'docs'::regclass AND amname = 'hnsw' AND indisvalid"
                ).fetchall()
                valid.add(count)

    watching = threading.Thread(target=watch)
    watching.start()
    said: list[str] = []
    try:
        report = indexes.build_hnsw(connection, column, report=said.append)
    finally:
        done.set()
        watching.join()
    assert report.built
    assert report.index == fresh.name
    assert any("the new one takes its place" in line for line in said)
    # at no time without one
    assert 0 not in valid
    assert report.size_bytes == pytest.approx(fresh.size_bytes, rel=0.1)
    assert not indexes.build_hnsw(connection, column).built
