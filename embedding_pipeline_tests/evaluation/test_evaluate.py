"""Whole evaluations against a real database; the geometry of the vectors is known."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql

from embedding_pipeline.embedders import TransientError
from embedding_pipeline.evaluation.errors import EvaluationError
from embedding_pipeline.evaluation.evaluate import evaluate_column
from embedding_pipeline.evaluation.golden_set import GoldenQuery, GoldenSet
from embedding_pipeline.evaluation.history import history, latest
from embedding_pipeline.evaluation.result import Evaluation
from embedding_pipeline.evaluation.verdict import golden_mrr_verdict, index_recall_verdict
from embedding_pipeline.store.column import Column
from embedding_pipeline_tests.evaluation.tables import (
    Connection,
    ScriptedEmbedder,
    build_index,
    direction,
    drop_index,
    fill,
    make_table,
    spec,
)

CREATE = "CREATE TABLE docs (id bigint PRIMARY KEY, body text, who text)"
TEXTS = [f"text {number}" for number in range(20)]
VECTORS = {text: direction(4 * number) for number, text in enumerate(TEXTS)}
QUERIES = {f"query {number}": direction(4 * number + 1) for number in range(20)}
"""Query n is nearest to row n, then n + 1, then n - 1."""


def golden(*queries: tuple[str, list[int]], tenant: str | None = None) -> GoldenSet:
    return GoldenSet(
        tuple(GoldenQuery(text, tuple((key,) for key in keys), tenant) for text, keys in queries)
    )


def evaluate(
    connection: Connection,
    column: Column,
    queries: GoldenSet,
    embedder: ScriptedEmbedder | None = None,
    **options: Any,
) -> Evaluation:
    embedder = embedder or ScriptedEmbedder(QUERIES)
    return asyncio.run(evaluate_column(connection, column, queries, embedder.factory(), **options))


@pytest.fixture
def column(connection: Connection) -> Column:
    """Twenty rows, 4° apart; every other one is tenant b's."""
    made = make_table(connection, spec(tenant_column="who"), CREATE)
    connection.cursor().executemany(
        "INSERT INTO docs (id, body, who) VALUES ($1, $2, $3)",
        [(number, text, "ab"[number % 2]) for number, text in enumerate(TEXTS)],
    )
    fill(connection, made, VECTORS)
    return made


EASY = golden(*((f"query {number}", [number]) for number in range(10)))


def test_figures_are_those_of_the_known_geometry(connection: Connection, column: Column) -> None:
    build_index(connection, column)
    queries = golden(
        ("query 3", [3]),  # rank 1
        ("query 4", [5]),  # rank 2
        ("query 5", [4, 19]),  # rank 3
        ("query 6", [19]),  # beyond the first ten
    )
    found = evaluate(connection, column, queries, run_id="a-run")
    assert [result.rank for result in found.results] == [1, 2, 3, None]
    assert found.mrr_at_5 == pytest.approx((1 + 1 / 2 + 1 / 3) / 4)
    assert found.hit_at_1 == 0.25
    assert (found.queries, found.scored, found.missing_expected) == (4, 4, 0)
    assert (found.index_mrr_at_5, found.index_recall) == (found.mrr_at_5, 1.0)
    assert found.coverage == 1.0
    assert found.run_id == "a-run"
    for low, high in ((found.p50_ms, found.p95_ms), (found.index_p50_ms, found.index_p95_ms)):
        assert low is not None
        assert high is not None
        assert 0 < low <= high
    lost = found.results[3]
    assert [row.key for row in lost.found] == [(6,), (7,), (5,)]
    assert lost.found[0].snippet == "text 6"
    assert lost.found[0].score == pytest.approx(0.99985, abs=1e-5)


def test_what_is_recorded_is_what_was_found(connection: Connection, column: Column) -> None:
    first = evaluate(connection, column, EASY)
    second = evaluate(connection, column, EASY)
    assert latest(connection, column) == second
    assert history(connection, column) == [second, first]
    assert history(connection, column, limit=1) == [second]
    noted = connection.execute(
        "SELECT evaluated_at FROM embedding_pipeline.embedding_column"
    ).fetchone()
    assert noted == (second.evaluated_at,)


def test_an_evaluation_of_another_version_can_be_read(
    connection: Connection, column: Column
) -> None:
    found = evaluate(connection, column, EASY)
    connection.execute(
        "UPDATE embedding_pipeline.golden_set_result SET details = details - 'requests'"
        " || jsonb_build_object('invented_later', 1)"
    )
    assert latest(connection, column) == replace(found, requests=0)


def test_history_keeps_former_recipes_and_latest_does_not(
    connection: Connection, column: Column
) -> None:
    evaluate(connection, column, EASY)
    other = Column(
        column.table, column.embedding.model_copy(update={"model": "other"}), column.facts
    )
    assert latest(connection, other) is None
    assert len(history(connection, other)) == 1


def test_evaluating_again_embeds_nothing(connection: Connection, column: Column) -> None:
    embedder = ScriptedEmbedder(QUERIES)
    first = evaluate(connection, column, EASY, embedder)
    assert (first.queries_embedded, first.requests, len(embedder.asked)) == (10, 1, 1)
    second = evaluate(connection, column, EASY, embedder)
    assert (second.queries_embedded, second.requests, len(embedder.asked)) == (0, 0, 1)
    assert len(embedder.made_for) == 1


def test_shuffled_vectors_are_seen(connection: Connection, column: Column) -> None:
    before = evaluate(connection, column, EASY)
    shuffled = {text: VECTORS[TEXTS[(number + 7) % 20]] for number, text in enumerate(TEXTS)}
    fill(connection, column, shuffled)
    after = evaluate(connection, column, EASY)
    assert before.mrr_at_5 == 1.0
    assert after.mrr_at_5 is not None
    assert after.mrr_at_5 < 0.5
    assert golden_mrr_verdict(before, None, floor=0.5, ratio=0.9).passed
    verdict = golden_mrr_verdict(after, before, floor=0.1, ratio=0.9, baseline_column="old")
    assert (verdict.status, verdict.severity) == ("failed", "error")


def test_without_an_index_its_figures_are_none(connection: Connection, column: Column) -> None:
    build_index(connection, column)
    assert evaluate(connection, column, EASY).index_recall == 1.0
    drop_index(connection, column)
    found = evaluate(connection, column, EASY)
    assert found.mrr_at_5 == 1.0
    figures = (
        found.index_mrr_at_5,
        found.index_recall,
        found.index_p50_ms,
        found.index_p95_ms,
        found.index,
    )
    assert figures == (None,) * 5
    assert found.index_reason == "docs.embedding has no HNSW index for cosine distance"
    assert index_recall_verdict(found.measured_index, 0.5, pending=0).status == "failed"


def test_an_index_that_is_not_valid_is_none(connection: Connection, column: Column) -> None:
    build_index(connection, column)
    connection.execute(
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = $1::regclass",
        [column.hnsw_index],
    )
    found = evaluate(connection, column, EASY)
    assert found.index_recall is None
    assert found.index_reason is not None
    assert "is not valid" in found.index_reason


def test_an_index_for_some_rows_only_serves_no_search(
    connection: Connection, column: Column
) -> None:
    connection.execute(
        "CREATE INDEX part ON docs USING hnsw (embedding vector_cosine_ops) WHERE id > 5"
    )
    found = evaluate(connection, column, EASY)
    assert found.index_recall is None
    assert found.index_reason is not None
    assert "cannot use the HNSW index part" in found.index_reason


def test_gone_rows_are_reported_apart_from_misses(connection: Connection, column: Column) -> None:
    queries = golden(
        ("query 1", [1]),
        ("query 2", [2]),  # to be deleted
        ("query 3", [2, 4]),  # one of two
        ("query 5", [19]),  # a miss
    )
    connection.execute("DELETE FROM docs WHERE id = 2")
    found = evaluate(connection, column, queries)
    assert (found.queries, found.scored) == (4, 3)
    assert (found.missing_expected, found.partly_missing) == (1, 1)
    assert found.mrr_at_5 == pytest.approx((1 + 1 / 2 + 0) / 3)
    gone = found.results[1]
    assert (gone.expected, gone.missing, gone.scored) == ((), ((2,),), False)
    assert found.results[2].missing == ((2,),)


def test_with_all_expected_rows_gone_there_is_no_figure(
    connection: Connection, column: Column
) -> None:
    embedder = ScriptedEmbedder(QUERIES)
    found = evaluate(connection, column, golden(("query 1", [100]), ("query 2", [200])), embedder)
    assert (found.mrr_at_5, found.hit_at_1, found.p50_ms, found.index_recall) == (None,) * 4
    assert found.missing_expected == 2
    assert embedder.asked == []
    assert golden_mrr_verdict(found, None, floor=0, ratio=0).status == "not_evaluated"
    assert latest(connection, column) == found


def test_a_tenants_query_sees_the_tenants_rows_only(connection: Connection, column: Column) -> None:
    build_index(connection, column)
    queries = golden(("query 3", [6]), ("query 5", [5]), tenant="a")
    found = evaluate(connection, column, queries)
    first, other = found.results
    assert first.rank == 3  # rows 3 and 5, which are nearer, are tenant b's
    assert [row.key for row in first.found] == [(4,), (2,), (6,)]
    assert (other.missing, other.scored) == (((5,),), False)  # a row of another tenant
    assert found.index_recall == 1.0


def test_the_index_goes_on_until_it_has_ten_rows_of_a_small_tenant(
    connection: Connection, column: Column
) -> None:
    """Without iterative scans an index gives ef_search rows, then filters: often none are left."""
    connection.execute(
        "INSERT INTO docs (id, body, who) SELECT 1000 + n, 'crowd ' || n, 'crowd'"
        " FROM generate_series(1, 600) AS n"
    )
    fill(
        connection,
        column,
        {f"crowd {n}": direction(10 + n / 1000) for n in range(1, 601)},
    )
    build_index(connection, column)
    connection.execute("CREATE INDEX ON docs (who)")  # which the planner would rather use
    found = evaluate(connection, column, golden(("query 2", [18]), tenant="a"), ef_search=40)
    assert found.results[0].rank == 10
    assert (found.index_recall, found.results[0].index_rank) == (1.0, 10)


def test_an_empty_column_is_not_evaluated(connection: Connection) -> None:
    column = make_table(connection, spec(tenant_column="who"), CREATE)
    connection.execute("INSERT INTO docs VALUES (1, 'text', 'a')")
    embedder = ScriptedEmbedder(QUERIES)
    with pytest.raises(EvaluationError, match="has no embedded rows yet"):
        evaluate(connection, column, EASY, embedder)
    assert embedder.made_for == []
    assert history(connection, column) == []


def test_a_dead_provider_leaves_no_figure_behind(connection: Connection, column: Column) -> None:
    dead = ScriptedEmbedder(QUERIES, error=TransientError("connection refused"))
    with pytest.raises(
        EvaluationError, match=r"not evaluated: docs\.embedding: connection refused"
    ):
        evaluate(connection, column, EASY, dead)
    assert latest(connection, column) is None


def test_pending_rows_count_into_coverage_and_are_named(
    connection: Connection, column: Column
) -> None:
    connection.execute("UPDATE docs SET embedding = NULL WHERE id = 3")
    connection.execute("UPDATE docs SET body = 'edited' WHERE id = 4")
    connection.execute("UPDATE docs SET body = ' ' WHERE id = 19")  # not eligible any more
    found = evaluate(connection, column, golden(("query 3", [3, 4]), ("query 5", [5])))
    assert found.coverage == pytest.approx(17 / 19)
    assert found.results[0].pending == ((3,), (4,))
    assert found.results[0].rank == 1  # row 4 with its former vector
    assert found.results[1].pending == ()


def test_rows_equally_near_come_in_the_order_of_their_keys(
    connection: Connection, column: Column
) -> None:
    fill(connection, column, {text: [1.0, 0.0, 0.0] for text in TEXTS})
    build_index(connection, column)
    found = evaluate(connection, column, golden(("query 0", [2]), ("query 1", [15])))
    assert [row.key for row in found.results[0].found] == [(0,), (1,), (2,)]
    assert [result.rank for result in found.results] == [3, None]
    # which ten of the twenty the index gives is chance; all are as near as the exact ones
    assert found.index_recall == 1.0, found.index_reason


def test_fewer_rows_than_ten_are_compared_as_they_are(
    connection: Connection, column: Column
) -> None:
    connection.execute("DELETE FROM docs WHERE id > 2")
    build_index(connection, column)
    found = evaluate(connection, column, golden(("query 1", [0])))
    assert (found.results[0].rank, found.index_recall) == (3, 1.0)


def test_a_zero_vector_is_found_by_nobody(connection: Connection, column: Column) -> None:
    fill(connection, column, {"text 3": [0.0, 0.0, 0.0]})
    build_index(connection, column)
    connection.execute("DELETE FROM docs WHERE id > 5")
    found = evaluate(connection, column, golden(("query 3", [3])))
    assert found.mrr_at_5 == 0.0
    assert (3,) not in [row.key for row in found.results[0].found]
    assert found.index_recall == 1.0


def test_composite_keys_in_a_schema_with_odd_names(connection: Connection) -> None:
    table = spec(
        table='"My Docs"."select"', id_column=["Lang", "n o"], text="query", tenant_column="ord"
    )
    column = make_table(
        connection,
        table,
        'CREATE SCHEMA "My Docs"; CREATE TABLE "My Docs"."select" ("Lang" char(2), "n o" numeric,'
        ' query text, ord integer, PRIMARY KEY ("Lang", "n o"))',
    )
    connection.cursor().executemany(
        'INSERT INTO "My Docs"."select" VALUES ($1, $2, $3, $4)',
        [("de" if n % 2 else "fr", f"{n}.50", text, n % 3) for n, text in enumerate(TEXTS)],
    )
    fill(connection, column, VECTORS)
    build_index(connection, column)
    queries = GoldenSet(
        (
            GoldenQuery("query 3", (("de", "3.50"),)),
            GoldenQuery("query 4", (("fr", "4.5"), ("de", "4.5")), tenant="1"),
            GoldenQuery("query 5", (("de", "5.5"),), tenant="1"),
        )
    )
    found = evaluate(connection, column, queries)
    assert [result.rank for result in found.results] == [1, 1, None]
    assert found.results[0].expected == (("de", "3.50"),)
    assert found.results[1].missing == (("de", "4.5"),)
    assert found.missing_expected == 1  # row 5 is tenant 2's
    assert found.index_recall == 1.0


def test_uuid_keys_match_however_they_are_written(connection: Connection) -> None:
    column = make_table(connection, spec(), "CREATE TABLE docs (id uuid PRIMARY KEY, body text)")
    key = "6d5f136d-c6ed-432f-af73-72e34526ac50"
    connection.execute("INSERT INTO docs VALUES ($1, 'text 0')", [key])
    fill(connection, column, VECTORS)
    queries = GoldenSet((GoldenQuery("query 0", ((key.upper(),), (key.replace("-", ""),))),))
    found = evaluate(connection, column, queries)
    assert found.results[0].expected == ((key,),)
    assert (found.results[0].rank, found.partly_missing) == (1, 0)


@pytest.mark.parametrize(
    ("query", "why"),
    [
        (GoldenQuery("q", (("seven",),), None, 2), r"\(seven\) does not fit docs.* bigint"),
        (GoldenQuery("q", ((10**30,),), None, 2), "out of range for type bigint"),
        (GoldenQuery("q", ((1,),), "x", 2), "its tenant 'x' does not fit docs.*for type integer"),
    ],
)
def test_a_key_or_tenant_that_cannot_be_one_names_its_line(
    connection: Connection, query: GoldenQuery, why: str
) -> None:
    column = make_table(
        connection,
        spec(tenant_column="who"),
        "CREATE TABLE docs (id bigint PRIMARY KEY, body text, who integer)",
    )
    connection.execute("INSERT INTO docs VALUES (1, 'text 1', 7)")
    fill(connection, column, VECTORS)
    queries = GoldenSet((GoldenQuery("query 1", ((1,),), "7", 1), query), Path("golden.jsonl"))
    with pytest.raises(EvaluationError, match=r"golden\.jsonl:2: .*" + why):
        evaluate(connection, column, queries)


def test_pgvector_may_live_in_another_schema(connection: Connection) -> None:
    connection.execute("CREATE SCHEMA extensions; ALTER EXTENSION vector SET SCHEMA extensions")
    column = make_table(connection, spec(), "CREATE TABLE docs (id bigint PRIMARY KEY, body text)")
    assert column.facts.vector_schema == "extensions"
    connection.execute("INSERT INTO docs SELECT n, 'text ' || n FROM generate_series(0, 19) AS n")
    fill(connection, column, VECTORS)
    build_index(connection, column)
    found = evaluate(connection, column, EASY)
    assert (found.mrr_at_5, found.index_recall) == (1.0, 1.0)


def test_settings_of_the_role_do_not_decide_how_is_searched(
    connection: Connection, column: Column
) -> None:
    build_index(connection, column)
    connection.execute(
        "SET enable_seqscan = off; SET enable_indexscan = off; SET enable_sort = off"
    )
    found = evaluate(connection, column, EASY)
    assert (found.mrr_at_5, found.index_recall) == (1.0, 1.0)


def test_nothing_of_the_session_is_changed(connection: Connection, column: Column) -> None:
    build_index(connection, column)
    names = [
        "enable_indexscan",
        "enable_seqscan",
        "hnsw.ef_search",
        "hnsw.iterative_scan",
        "TimeZone",
    ]
    query = sql.SQL("SELECT {}").format(
        sql.SQL(", ").join(sql.SQL("current_setting({})").format(name) for name in names)
    )
    connection.execute("SELECT '[1]'::vector <=> '[1]'")  # loads pgvector and its settings
    before = connection.execute(query).fetchone()
    evaluate(connection, column, golden(("query 3", [4]), tenant="a"))
    assert connection.execute(query).fetchone() == before


def test_a_partitioned_table_is_searched_through_its_partitions_indexes(
    connection: Connection,
) -> None:
    column = make_table(
        connection,
        spec(),
        "CREATE TABLE docs (id bigint PRIMARY KEY, body text) PARTITION BY RANGE (id);"
        "CREATE TABLE docs_1 PARTITION OF docs FOR VALUES FROM (0) TO (10);"
        "CREATE TABLE docs_2 PARTITION OF docs FOR VALUES FROM (10) TO (99);",
    )
    connection.execute("INSERT INTO docs SELECT n, 'text ' || n FROM generate_series(0, 19) AS n")
    fill(connection, column, VECTORS)
    build_index(connection, column)
    found = evaluate(connection, column, golden(("query 9", [10]), ("query 3", [3])))
    assert [result.rank for result in found.results] == [2, 1]
    assert (found.index, found.index_recall) == (column.hnsw_index, 1.0)


def test_a_cancelled_evaluation_stops_its_query(connection: Connection, column: Column) -> None:
    """Ctrl-C in the command line must not wait for the rest of a long scan."""

    async def cancel_while_searching() -> None:
        searching = asyncio.Event()
        loop = asyncio.get_running_loop()

        def block(done: int, _total: int) -> None:
            loop.call_soon_threadsafe(searching.set)
            connection.execute("SELECT pg_sleep(250)")

        task = asyncio.create_task(
            evaluate_column(
                connection, column, EASY, ScriptedEmbedder(QUERIES).factory(), progress=block
            )
        )
        await searching.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel_while_searching())
    assert history(connection, column) == []


def test_details_are_plain_json(connection: Connection, column: Column) -> None:
    found = evaluate(connection, column, EASY)
    row = connection.execute("SELECT details FROM embedding_pipeline.golden_set_result").fetchone()
    assert row is not None
    assert row[0]["golden_set_hash"] == EASY.hash == found.golden_set_hash
    assert row[0]["results"][0]["found"][0]["key"] == [0]
    json.dumps(row[0], allow_nan=False)
