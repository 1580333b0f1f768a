"""Source tables for tests: made, migrated, filled, and embedded by whatever the test says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from embedding_pipeline.embedders import Embedder, EmbedResult
from embedding_pipeline.evaluation.nearest import vector_literal
from embedding_pipeline.spec import EmbeddingSpec, TableSpec
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.migrate import migrate

Connection = psycopg.Connection[Any]
Vectors = Mapping[str, Sequence[float]]


def direction(degrees: float) -> list[float]:
    """A unit vector of three dimensions, so many degrees from the first axis."""
    return [float(np.cos(np.radians(degrees))), float(np.sin(np.radians(degrees))), 0.0]


@dataclass
class ScriptedEmbedder:
    """Answers with the vectors that it was given, and counts."""

    vectors: Vectors
    error: Exception | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    made_for: list[EmbeddingSpec] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)
    closed: int = 0

    def factory(self) -> "Callable[[EmbeddingSpec], Embedder]":
        def make(embedding: EmbeddingSpec) -> Embedder:
            self.made_for.append(embedding)
            return self  # type: ignore[return-value]

        return make

    async def start(self) -> None:
        pass

    async def embed(
        self, texts: Sequence[str], *, retry: bool = True, may_repeat: Any = None
    ) -> EmbedResult:
        self.asked.append(list(texts))
        if self.error is not None:
            raise self.error
        width = self.made_for[-1].dimensions
        rows = [[np.nan] * width if text in self.refused else self.vectors[text] for text in texts]
        return EmbedResult(
            vectors=np.array(rows, dtype=np.float32).reshape(len(texts), -1),
            done=np.array([text not in self.refused for text in texts]),
            refused={i: self.refused[text] for i, text in enumerate(texts) if text in self.refused},
            tokens=len(texts),
            requests=1,
        )

    async def aclose(self) -> None:
        self.closed += 1


def spec(**changes: Any) -> TableSpec:
    """`docs(id, body)` with a column of three dimensions, unless told otherwise."""
    embedding = {"column": "embedding", "dimensions": 3, "provider": "local", "model": "a-model"}
    values: dict[str, Any] = {
        "table": "docs",
        "text": "body",
        "embeddings": [embedding | changes.pop("embedding", {})],
    }
    return TableSpec.model_validate(values | changes)


def make_table(connection: Connection, table: TableSpec, create: str) -> Column:
    """Run the user's DDL, migrate, and bind the table's first embedding column."""
    connection.execute(create.encode())
    migrate(connection, [table])
    return bind_columns(connection, table)[0]


def fill(connection: Connection, column: Column, vectors: Vectors) -> None:
    """Give every row the vector of its text, with the fingerprint that says so.

    Rows whose text is not among `vectors` stay pending.
    """
    query = sql.SQL(
        "UPDATE {relation} SET {vector} = given.value::{type}, {fingerprint} = {expected}"
        " FROM unnest($1::text[], $2::text[]) AS given(content, value)"
        " WHERE ({text})::text = given.content"
    ).format(
        relation=column.relation,
        vector=column.vector,
        type=column.vector_type,
        fingerprint=column.fingerprint,
        expected=column.expected,
        text=column.text,
    )
    literals = [vector_literal(np.array(v, dtype=np.float32)) for v in vectors.values()]
    connection.execute(query, [list(vectors), literals])
    connection.execute(sql.SQL("ANALYZE {}").format(column.relation))


def build_index(connection: Connection, column: Column) -> None:
    """An HNSW index as the index asset builds it, without its precautions.

    CONCURRENTLY, as there: after an update in place, an index built otherwise serves only
    transactions that began when no older one was open anywhere on the server. (A partitioned
    table's can only be built so.)
    """
    connection.execute(
        sql.SQL("CREATE INDEX {how} {name} ON {relation} USING hnsw ({vector} {opclass})").format(
            how=sql.SQL("" if column.facts.is_partitioned else "CONCURRENTLY"),
            name=sql.Identifier(column.hnsw_index),
            relation=column.relation,
            vector=column.vector,
            opclass=sql.Identifier(column.facts.vector_schema, "vector_cosine_ops"),
        )
    )


def drop_index(connection: Connection, column: Column) -> None:
    connection.execute(
        sql.SQL("DROP INDEX {}").format(sql.Identifier(column.facts.schema, column.hnsw_index))
    )


def random_unit(
    count: int, dimensions: int, seed: int = 0
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Unit vectors in random directions, shape (count, dimensions)."""
    drawn = np.random.default_rng(seed).normal(size=(count, dimensions))
    unit = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return np.asarray(unit, dtype=np.float32)
