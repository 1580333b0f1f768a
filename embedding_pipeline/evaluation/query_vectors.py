"""Query vectors, cached in the database, so that evaluating again sends no request."""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
import psycopg

from embedding_pipeline.embedders.port import Embedder, EmbedResult
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.evaluation.errors import EvaluationError
from embedding_pipeline.evaluation.nearest import Vector
from embedding_pipeline.spec import EmbeddingSpec
from embedding_pipeline.store.column import Column

EmbedderFactory = Callable[[EmbeddingSpec], Embedder]
"""Makes an embedder, not yet started, for an embedding as it is given: model, dimensions,
over-long policy and prefix (empty for queries)."""


@dataclass(frozen=True)
class QueryVectors:
    """Vectors by query, and what getting them took."""

    vectors: Mapping[str, Vector]
    """Each float32 (dimensions,)."""
    embedded: int
    """Queries that were not in the cache."""
    requests: int
    tokens: int


async def query_vectors(
    connection: "psycopg.Connection[Any]",
    column: Column,
    queries: Iterable[str],
    make_embedder: EmbedderFactory,
) -> QueryVectors:
    """The queries' vectors from the cache; those it lacks are embedded and added to it.

    The cache is keyed by the column's recipe. No embedder is made when nothing is lacking, and
    no transaction is open while one works. The provider is asked once with the whole list; the
    document prefix is left off. EvaluationError when a query cannot be embedded: vectors that
    did arrive are kept for the next attempt, and nothing stands in for the others.
    """
    wanted = list(dict.fromkeys(queries))
    recipe = column.embedding.recipe
    dimensions = column.embedding.dimensions
    vectors = await asyncio.to_thread(read_cached, connection, recipe, dimensions, wanted)
    lacking = [query for query in wanted if query not in vectors]
    if not lacking:
        return QueryVectors(vectors, 0, 0, 0)
    spec = column.embedding.model_copy(update={"prefix": ""})
    failure: PipelineError | None = None
    result: EmbedResult | None
    embedder = make_embedder(spec)
    try:
        await embedder.start()
        result = await embedder.embed(lacking)
    except PipelineError as error:
        failure = error
        result = getattr(error, "partial", None)
    finally:
        await embedder.aclose()
    new: dict[str, Vector] = {}
    problems: list[str] = []
    if result is not None:
        new, problems = _usable(result, lacking, dimensions)
        await asyncio.to_thread(write_cached, connection, recipe, new)
    if failure is not None:
        raise EvaluationError(f"{column}: {failure}") from failure
    if problems:
        raise EvaluationError(
            f"{column}: {len(problems)} of {len(lacking)} golden queries have no vector: "
            + "; ".join(problems[:3])
        )
    assert result is not None
    return QueryVectors({**vectors, **new}, len(new), result.requests, result.tokens)


def _usable(
    result: EmbedResult, texts: Sequence[str], dimensions: int
) -> tuple[dict[str, Vector], list[str]]:
    """What of a result can be searched with, and what is wrong with the rest."""
    usable: dict[str, Vector] = {}
    problems = []
    for number, text in enumerate(texts):
        if result.done[number]:
            problem = why_unusable(result.vectors[number], dimensions)
        else:
            problem = result.refused.get(number, "the provider gave no vector")
        if problem is None:
            usable[text] = result.vectors[number]
        else:
            problems.append(f"{text[:60]!r}: {problem}")
    return usable, problems


def why_unusable(vector: Vector, dimensions: int) -> str | None:
    """Why a vector cannot be searched with, None when it can."""
    if vector.shape != (dimensions,):
        return f"its vector has {vector.size} dimensions, the column {dimensions}"
    if not np.isfinite(vector).all():
        return "its vector holds NaN or infinity"
    if not vector.any():
        return "its vector is all zeros, which has no direction"
    return None


def query_hash(query: str) -> UUID:
    """md5 of the query's UTF-8, as the cache is keyed."""
    return UUID(hashlib.md5(query.encode(), usedforsecurity=False).hexdigest())


def read_cached(
    connection: "psycopg.Connection[Any]", recipe: str, dimensions: int, queries: Sequence[str]
) -> dict[str, Vector]:
    """Cached vectors by query; what the cache lacks is left out."""
    by_hash = {query_hash(query): query for query in queries}
    cursor = connection.execute(
        "SELECT query_hash, vector FROM embedding_pipeline.query_vector"
        " WHERE recipe = $1 AND query_hash = ANY($2::uuid[])",
        [recipe, list(by_hash)],
        binary=True,
    )
    vectors = {by_hash[key]: np.array(values, dtype=np.float32) for key, values in cursor}
    return {q: v for q, v in vectors.items() if why_unusable(v, dimensions) is None}


def write_cached(
    connection: "psycopg.Connection[Any]", recipe: str, vectors: Mapping[str, Vector]
) -> None:
    """Add vectors to the cache. One that is there already is replaced."""
    with connection.transaction(), connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO embedding_pipeline.query_vector (recipe, query_hash, vector)"
            " VALUES ($1, $2, $3::real[])"
            " ON CONFLICT (recipe, query_hash) DO UPDATE SET vector = excluded.vector",
            [(recipe, query_hash(query), vector.tolist()) for query, vector in vectors.items()],
        )
