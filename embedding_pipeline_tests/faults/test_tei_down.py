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
from embedding_pipeline_tests.faults.server import FaultServer, Hang
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


SWITCHED_SECONDS = 5.0


def test_queries_switch_within_five_seconds_from_a_tei_that_hangs(
    pipeline: Pipeline, server: FaultServer, other: FaultServer
) -> None:
    """A container whose process was stopped (`docker pause`) still took connections: each query
    waited for the backfill's timeout of a minute before anybody else was asked."""
    # with the product's own timeouts and deadlines
    endpoints = {"tei_here": provider(server, "tei"), "elsewhere": provider(other)}
    for declared in endpoints.values():
        del declared["timeout_seconds"], declared["give_up_after_seconds"]
    pipeline.declare(**endpoints)
    first, second = (
        EmbeddingSpec.model_validate(embedding("vector_8", 8, provider=name, model=each.model))
        for name, each in (("tei_here", server), ("elsewhere", other))
    )
    failed: list[Exception] = []

    async def main() -> None:
        second_embedder = make_embedder(second)
        queries = FallbackEmbedder(make_embedder(first), second_embedder)

        async def ask(query: str) -> QueryVector | None:
            try:
                async with asyncio.timeout(SWITCHED_SECONDS):
                    return await queries.embed_query(query)
            except PipelineError as error:
                failed.append(error)
                return None

        try:
            await second_embedder.start()  # its client's import is not what is waited for
            before = await ask("up")
            assert before is not None
            assert before.model == server.model
            server.rule = lambda number, inputs: Hang()
            answers = await asyncio.gather(*(ask(f"hangs {number}") for number in range(8)))
            assert queries.state.active == "elsewhere"
            assert all(answer is None or answer.model == other.model for answer in answers)
            # those that come later do not wait for it again
            asked = server.count.requests
            for number in range(20):
                answer = await ask(f"still hangs {number}")
                assert answer is not None
                assert answer.model == other.model
            assert server.count.requests <= asked + 20
            server.rule = None
            async with asyncio.timeout(60):  # the next probe may be half a second away
                while (back := await ask("back")) is None or back.model != server.model:
                    await asyncio.sleep(0.05)
            assert queries.state.active == "tei_here"
        finally:
            await queries.aclose()

    asyncio.run(main())
    assert len(failed) <= 1


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
