"""TEI goes down and comes back: queries go elsewhere meanwhile, rows wait."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import psycopg
import pytest

from embedding_pipeline.embed_column import make_embedder
from embedding_pipeline.embedders import FallbackEmbedder, InputError, QueryVector
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.spec import EmbeddingSpec
from embedding_pipeline_tests.faults.runs import KEY, Pipeline, provider
from embedding_pipeline_tests.faults.server import FaultServer
from embedding_pipeline_tests.faults.truth import assert_exact, embedded
from embedding_pipeline_tests.tables import create_docs, embedding, spec

ROWS = 600


@pytest.fixture
def other() -> Iterator[FaultServer]:
    """The provider that answers queries while TEI is down: another model, the same width."""
    with FaultServer(dimensions=8, model="other-model", api_key=KEY) as other:
        yield other


def test_rows_wait_for_tei_while_queries_are_answered(
    pipeline: Pipeline,
    connection: "psycopg.Connection[Any]",
    server: FaultServer,
    other: FaultServer,
) -> None:
    """The embedding container was restarted under load. Search failed until it was back; after
    that somebody wired a fallback into the backfill too, and for one night a column of one model
    was filled with another's vectors of the same width."""
    create_docs(connection, ROWS)
    pipeline.declare(
        tei_here=provider(server, "tei", give_up_after_seconds=1.0), elsewhere=provider(other)
    )
    column = pipeline.column(
        spec(embeddings=[embedding("vector_8", 8, provider="tei_here", model=server.model)])
    )
    second = EmbeddingSpec.model_validate(
        embedding("other_8", 8, provider="elsewhere", model=other.model)
    )
    answered: list[tuple[str, QueryVector]] = []
    failed: list[Exception] = []

    async def ask(queries: FallbackEmbedder, what: str, count: int = 10) -> None:
        for number in range(count):
            query = f"{what} {number}"
            try:
                answered.append((query, await queries.embed_query(query)))
            except PipelineError as error:
                failed.append(error)

    async def main() -> tuple[str, int]:
        queries = FallbackEmbedder(
            make_embedder(column.embedding), make_embedder(second), head_start_seconds=30
        )
        try:
            await ask(queries, "up")
            assert queries.state.active == "tei_here"
            # part of the rows, then TEI dies under the run and under a stream of queries
            server.rule = lambda number, inputs: None
            server.delay = 0.05
            run = asyncio.create_task(
                asyncio.to_thread(pipeline.failing_run, column, batch_size=16, concurrency=2)
            )
            while server.count.inputs < 150:
                await ask(queries, "rows are embedded", 1)
            await asyncio.to_thread(server.stop)
            await ask(queries, "down")
            assert queries.state.active == "elsewhere"
            assert queries.state.last_error is not None
            pipeline.shown.append(repr(queries.state))
            said, outcome = await run
            await ask(queries, "still down")
            await asyncio.to_thread(server.start)
            await ask(queries, "back")
            assert queries.state.active == "tei_here"
            return said, outcome.total.embedded
        finally:
            await queries.aclose()

    said, written = asyncio.run(main())

    assert len(failed) <= 1
    for query, answer in answered:
        from_other = query.startswith(("down", "still"))
        assert answer.fell_back == from_other
        asked = other if from_other else server
        assert answer.model == asked.model
        assert np.array_equal(answer.vector, asked.truth([query])[0])
    # the run says what it waits for, and no row got the other model's vector
    assert "tei_here" in said
    assert "a later run goes on from there" in said
    assert 0 < written == embedded(connection, column) < ROWS
    assert not any(text.startswith("text number") for text in other.count.texts)
    server.delay = 0.0
    run = pipeline.run(column)
    assert run.outcome.total.embedded == ROWS - written
    assert_exact(connection, column)


def test_queries_with_nul_and_half_a_pair(pipeline: Pipeline, server: FaultServer) -> None:
    """A browser cut a query in the middle of an emoji; UnicodeEncodeError came back as a 500, and
    the circuit breaker took the provider for dead."""
    pipeline.declare(tei_here=provider(server, "tei"))
    here = EmbeddingSpec.model_validate(
        embedding("vector_8", 8, provider="tei_here", model=server.model)
    )

    async def main() -> None:
        queries = FallbackEmbedder(make_embedder(here))
        try:
            for query in ("half \ud83d of a pair", "\udc00", "", "\u3000 \n"):
                with pytest.raises(InputError, match="not sent"):
                    await queries.embed_query(query)
            for query in ("a\x00b", "😀", "'; DROP TABLE docs; --"):
                answer = await queries.embed_query(query)
                assert np.array_equal(answer.vector, server.truth([query])[0])
            assert queries.state.last_error is None
        finally:
            await queries.aclose()

    asyncio.run(main())
