"""Stored vectors that cannot be right are seen without a golden set."""

from typing import Any

import numpy as np
import pytest
from psycopg import sql

from embedding_pipeline.evaluation.vectors import index_recall, still_indexed, vectors_valid
from embedding_pipeline.evaluation.verdict import index_recall_verdict, vectors_valid_verdict
from embedding_pipeline.store.column import Column
from embedding_pipeline_tests.evaluation.tables import (
    Connection,
    build_index,
    drop_index,
    fill,
    make_table,
    random_unit,
    spec,
)

CREATE = "CREATE TABLE docs (id bigint PRIMARY KEY, body text, who text)"
TEXTS = [f"text {number}" for number in range(100)]
VECTORS = {text: row.tolist() for text, row in zip(TEXTS, random_unit(100, 3), strict=True)}


@pytest.fixture
def column(connection: Connection) -> Column:
    made = make_table(connection, spec(), CREATE)
    connection.execute("INSERT INTO docs SELECT n, 'text ' || n, 'a' FROM generate_series(0, 99) n")
    fill(connection, made, VECTORS)
    return made


def set_vector(connection: Connection, key: int, value: list[float]) -> None:
    connection.execute("UPDATE docs SET embedding = $1::real[]::vector WHERE id = $2", [value, key])


def test_sound_vectors_pass(connection: Connection, column: Column) -> None:
    found = vectors_valid(connection, column)
    assert (found.scope, found.rows, found.zero, found.not_unit) == ("all", 100, 0, 0)
    assert (found.identical, found.contradictory) == (0, 0)
    assert found.norm_min == pytest.approx(1, abs=1e-6)
    assert found.norm_max == pytest.approx(1, abs=1e-6)
    assert vectors_valid_verdict(found).passed


def test_zero_vectors_fail_and_are_named(connection: Connection, column: Column) -> None:
    set_vector(connection, 42, [0, 0, 0])
    set_vector(connection, 43, [0, 0, 0])
    found = vectors_valid(connection, column)
    assert (found.zero, found.zero_keys, found.norm_min) == (2, ((42,), (43,)), 0.0)
    assert found.identical == 0  # one finding, not two
    assert vectors_valid_verdict(found).status == "failed"


def test_norms_are_reported_and_no_failure(connection: Connection, column: Column) -> None:
    set_vector(connection, 1, [3, 4, 0])
    found = vectors_valid(connection, column)
    assert (found.not_unit, found.norm_max) == (1, 5.0)
    assert vectors_valid_verdict(found).passed


def test_a_constant_provider_fails(connection: Connection, column: Column) -> None:
    fill(connection, column, {text: [1.0, 0.0, 0.0] for text in TEXTS})
    found = vectors_valid(connection, column)
    assert (found.identical, found.identical_share) == (100, 1.0)
    assert found.identical_keys == ((0,), (1,), (2,), (3,), (4,))
    assert vectors_valid_verdict(found).status == "failed"


def test_a_provider_that_repeats_itself_within_a_batch_fails(
    connection: Connection, column: Column
) -> None:
    fill(connection, column, {text: VECTORS[TEXTS[n // 10 * 10]] for n, text in enumerate(TEXTS)})
    assert vectors_valid(connection, column).identical == 100


def test_equal_texts_rightly_share_a_vector(connection: Connection, column: Column) -> None:
    connection.execute("UPDATE docs SET body = 'text 1' WHERE id < 50")
    fill(connection, column, VECTORS)
    found = vectors_valid(connection, column)
    assert (found.rows, found.identical, found.contradictory) == (100, 0, 0)


def test_a_shuffle_shows_where_equal_texts_differ(connection: Connection, column: Column) -> None:
    connection.execute("UPDATE docs SET body = 'text 1' WHERE id IN (5, 6, 7)")
    fill(connection, column, VECTORS)
    set_vector(connection, 6, VECTORS["text 60"])
    nearly = np.array(VECTORS["text 1"], dtype=np.float32) * np.float32(1.0000001)
    set_vector(connection, 7, nearly.tolist())  # another batch's numerics
    found = vectors_valid(connection, column)
    assert found.contradictory == 1
    assert found.identical == 2  # rows 6 and 60
    assert vectors_valid_verdict(found).status == "failed"


def test_only_the_given_rows_are_looked_at(connection: Connection, column: Column) -> None:
    set_vector(connection, 42, [0, 0, 0])
    found = vectors_valid(connection, column, keys=[("1",), ("2",), ("999",)])
    assert (found.scope, found.rows, found.zero) == ("keys", 2, 0)
    assert vectors_valid(connection, column, keys=[("42",)]).zero == 1
    assert vectors_valid(connection, column, keys=[]).rows == 0


def test_a_sample_is_about_as_large_as_asked_and_the_same_each_time(
    connection: Connection, column: Column
) -> None:
    connection.execute(
        "INSERT INTO docs SELECT n, 'text ' || n % 100 FROM generate_series(100, 3999) n"
    )
    fill(connection, column, VECTORS)
    found = vectors_valid(connection, column, sample=500)
    assert found.scope == "sample"
    assert 300 < found.rows < 800
    assert vectors_valid(connection, column, sample=500) == found


def test_an_empty_column_has_no_valid_vectors(connection: Connection) -> None:
    column = make_table(connection, spec(), CREATE)
    connection.execute("INSERT INTO docs VALUES (1, 'text', 'a')")
    found = vectors_valid(connection, column)
    assert (found.rows, found.norm_min) == (0, None)
    assert vectors_valid_verdict(found).status == "not_evaluated"


def test_composite_keys_and_pgvector_elsewhere(connection: Connection) -> None:
    connection.execute("CREATE SCHEMA extensions; ALTER EXTENSION vector SET SCHEMA extensions")
    column = make_table(
        connection,
        spec(id_column=["k", "key"], text="digest"),
        "CREATE TABLE docs (k int, key date, digest text, norm int, stored int, ord int,"
        " PRIMARY KEY (k, key))",
    )
    connection.execute(
        "INSERT INTO docs SELECT n, '2026-01-01', 'text ' || n FROM generate_series(0, 29) n"
    )
    fill(connection, column, {**VECTORS, "text 3": [0, 0, 0]})
    found = vectors_valid(connection, column, keys=[("3", "2026-01-01"), ("4", "2026-01-01")])
    assert (found.rows, found.zero_keys) == (2, ((3, "2026-01-01"),))
    assert vectors_valid(connection, column).rows == 30
    build_index(connection, column)
    assert index_recall(connection, column, sample=10).recall == 1.0


def wide(connection: Connection, rows: int, **changes: Any) -> Column:
    """Random vectors of 32 dimensions, which an index of bad parameters cannot find its way in."""
    column = make_table(connection, spec(embedding={"dimensions": 32}, **changes), CREATE)
    connection.execute(
        "INSERT INTO docs SELECT n, 'text ' || n, CASE WHEN n % 50 = 0 THEN 'few' ELSE 'many' END"
        " FROM generate_series(1, $1::int) n",
        [rows],
    )
    drawn = random_unit(rows, 32)
    fill(connection, column, {f"text {n + 1}": row.tolist() for n, row in enumerate(drawn)})
    return column


def test_recall_of_a_good_and_of_a_bad_index(connection: Connection) -> None:
    column = wide(connection, 2000)
    build_index(connection, column)
    good = index_recall(connection, column, sample=20)
    assert good.recall is not None
    assert good.recall > 0.9
    assert 15 <= good.queries <= 20
    assert good.index == column.hnsw_index
    assert index_recall_verdict(good, 0.9, pending=0).passed

    drop_index(connection, column)
    connection.execute(
        sql.SQL(
            "CREATE INDEX bad ON docs USING hnsw (embedding vector_cosine_ops)"
            " WITH (m = 2, ef_construction = 4)"
        )
    )
    # a session that prefers indexes must not get its "exact" rows from one
    connection.execute("SET enable_seqscan = off")
    bad = index_recall(connection, column, sample=20, ef_search=40)  # pgvector's default
    assert bad.recall is not None
    assert bad.recall < 0.8
    assert index_recall_verdict(bad, 0.9, pending=0).status == "failed"


def test_recall_is_measured_within_tenants(connection: Connection) -> None:
    column = wide(connection, 1000, tenant_column="who")
    build_index(connection, column)
    found = index_recall(connection, column, sample=200)
    assert found.recall is not None
    assert found.recall > 0.9


def test_without_an_index_recall_is_none(connection: Connection, column: Column) -> None:
    found = index_recall(connection, column)
    assert (found.recall, found.index) == (None, None)
    assert found.reason == "docs.embedding has no HNSW index for cosine distance"
    assert index_recall_verdict(found, 0.9, pending=0).status == "failed"


def test_an_earlier_measurement_counts_only_while_the_index_is_there(
    connection: Connection, column: Column
) -> None:
    build_index(connection, column)
    measured = index_recall(connection, column)
    assert still_indexed(connection, column, measured) == measured
    drop_index(connection, column)
    now = still_indexed(connection, column, measured)
    assert now.recall is None
    assert index_recall_verdict(now, 0.9, pending=0).status == "failed"


def test_a_single_row_has_no_neighbours(connection: Connection, column: Column) -> None:
    build_index(connection, column)
    connection.execute("DELETE FROM docs WHERE id > 0")
    found = index_recall(connection, column)
    assert (found.recall, found.queries) == (None, 0)
    assert index_recall_verdict(found, 0.9, pending=0).status == "not_evaluated"
