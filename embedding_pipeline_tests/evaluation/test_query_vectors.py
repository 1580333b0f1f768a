"""The cache of query vectors: asked once, and never filled with what cannot be searched with."""

import asyncio
from typing import Any

import numpy as np
import psycopg
import pytest

from embedding_pipeline.embedders import EmbedResult, TransientError
from embedding_pipeline.evaluation.errors import EvaluationError
from embedding_pipeline.evaluation.query_vectors import (
    QueryVectors,
    query_hash,
    query_vectors,
    read_cached,
)
from embedding_pipeline.store.column import Column
from embedding_pipeline_tests.evaluation.tables import ScriptedEmbedder, make_table, spec

Connection = psycopg.Connection[Any]
CREATE = "CREATE TABLE docs (id bigint PRIMARY KEY, body text)"
VECTORS = {"a": [1.0, 0.0, 0.0], "b": [0.0, 1.0, 0.0], "é🎈": [0.1, 0.2, 0.3]}


@pytest.fixture
def column(connection: Connection) -> Column:
    return make_table(connection, spec(embedding={"prefix": "passage: "}), CREATE)


def ask(
    connection: Connection, column: Column, queries: list[str], embedder: ScriptedEmbedder
) -> QueryVectors:
    return asyncio.run(query_vectors(connection, column, queries, embedder.factory()))


def test_only_missing_queries_are_embedded(connection: Connection, column: Column) -> None:
    embedder = ScriptedEmbedder(VECTORS)
    first = ask(connection, column, ["a", "a", "é🎈"], embedder)
    assert (first.embedded, first.requests, first.tokens) == (2, 1, 2)
    second = ask(connection, column, ["b", "a", "é🎈"], embedder)
    assert embedder.asked == [["a", "é🎈"], ["b"]]
    assert second.embedded == 1
    for query, vector in VECTORS.items():
        np.testing.assert_array_equal(second.vectors[query], np.array(vector, np.float32))


def test_with_all_queries_cached_no_embedder_is_made(
    connection: Connection, column: Column
) -> None:
    ask(connection, column, ["a"], ScriptedEmbedder(VECTORS))
    idle = ScriptedEmbedder({})
    result = ask(connection, column, ["a"], idle)
    assert (result.requests, idle.made_for) == (0, [])


def test_another_recipe_has_vectors_of_its_own(connection: Connection, column: Column) -> None:
    ask(connection, column, ["a"], ScriptedEmbedder(VECTORS))
    other = Column(
        column.table, column.embedding.model_copy(update={"model": "other"}), column.facts
    )
    embedder = ScriptedEmbedder({"a": [0.0, 0.0, 1.0]})
    assert ask(connection, other, ["a"], embedder).vectors["a"].tolist() == [0, 0, 1]
    assert ask(connection, column, ["a"], embedder).vectors["a"].tolist() == [1, 0, 0]


def test_queries_go_without_the_prefix_of_documents(connection: Connection, column: Column) -> None:
    embedder = ScriptedEmbedder(VECTORS)
    ask(connection, column, ["a"], embedder)
    assert [embedding.prefix for embedding in embedder.made_for] == [""]
    assert embedder.closed == 1


@pytest.mark.parametrize(
    ("vector", "why"),
    [
        ([0.0, 0.0, 0.0], "all zeros"),
        ([1.0, float("nan"), 0.0], "NaN or infinity"),
        ([1.0, float("inf"), 0.0], "NaN or infinity"),
        ([1.0, 0.0], "has 2 dimensions, the column 3"),
    ],
)
def test_a_vector_that_cannot_be_searched_with_is_not_kept(
    connection: Connection, column: Column, vector: list[float], why: str
) -> None:
    with pytest.raises(EvaluationError, match=f"^not evaluated: .*{why}"):
        ask(connection, column, ["a"], ScriptedEmbedder({"a": vector}))
    assert read_cached(connection, column.embedding.recipe, 3, ["a"]) == {}


def test_a_refused_query_stops_the_evaluation_and_the_others_are_kept(
    connection: Connection, column: Column
) -> None:
    embedder = ScriptedEmbedder(VECTORS, refused={"b": "too rude"})
    with pytest.raises(EvaluationError, match="1 of 2 golden queries have no vector: 'b': too"):
        ask(connection, column, ["a", "b"], embedder)
    assert list(read_cached(connection, column.embedding.recipe, 3, ["a", "b"])) == ["a"]


def test_what_arrived_before_a_failure_is_kept(connection: Connection, column: Column) -> None:
    error = TransientError("the server is gone")
    error.partial = EmbedResult(
        vectors=np.array([[1, 0, 0], [np.nan] * 3], dtype=np.float32),
        done=np.array([True, False]),
    )
    embedder = ScriptedEmbedder(VECTORS, error=error)
    with pytest.raises(EvaluationError, match=r"^not evaluated: .*the server is gone"):
        ask(connection, column, ["a", "b"], embedder)
    assert embedder.closed == 1
    assert list(read_cached(connection, column.embedding.recipe, 3, ["a", "b"])) == ["a"]


def test_no_transaction_is_open_while_an_embedder_works(
    connection: Connection, column: Column
) -> None:
    seen: list[psycopg.pq.TransactionStatus] = []

    class Watching(ScriptedEmbedder):
        async def embed(
            self, texts: Any, *, retry: bool = True, may_repeat: Any = None
        ) -> EmbedResult:
            seen.append(connection.info.transaction_status)
            return await super().embed(texts, retry=retry)

    ask(connection, column, ["a"], Watching(VECTORS))
    assert seen == [psycopg.pq.TransactionStatus.IDLE]


def test_the_hash_is_that_of_postgres(connection: Connection) -> None:
    row = connection.execute("SELECT md5($1)::uuid", ["é🎈"]).fetchone()
    assert row == (query_hash("é🎈"),)
