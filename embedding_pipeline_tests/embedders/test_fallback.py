"""Queries while a provider goes down and comes back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from embedding_pipeline.embedders import (
    FallbackEmbedder,
    InputError,
    QueryVector,
    TransientError,
)
from embedding_pipeline.embedders.fallback import PROBE_EVERY_SECONDS
from embedding_pipeline_tests.embedders.support import FakeTime, embedder_of, endpoint_of
from embedding_pipeline_tests.faults.server import FaultServer, Hang, Status

OTHER_MODEL = "text-embedding-3-small"


@asynccontextmanager
async def fallback_of(
    tei: FaultServer, other: FaultServer, query_seconds: float = 3.0
) -> AsyncIterator[FallbackEmbedder]:
    embedder = FallbackEmbedder(
        embedder_of(endpoint_of(tei, "tei"), tei),
        embedder_of(endpoint_of(other, "openai"), other),
        query_seconds=query_seconds,
        # as long as it takes: who answers first must not depend on the machine
        head_start_seconds=60,
    )
    try:
        yield embedder
    finally:
        await embedder.aclose()


@pytest.fixture
def other() -> FaultServer:
    return FaultServer(dimensions=16, model=OTHER_MODEL)


def assert_is_truth(answer: QueryVector, server: FaultServer, query: str) -> None:
    assert answer.model == server.model
    assert answer.dimensions == server.dimensions
    assert np.array_equal(answer.vector, server.truth([query])[0])


def test_tei_goes_down_and_comes_back_under_a_stream_of_queries(
    server: FaultServer, other: FaultServer
) -> None:
    """Search failed for as long as the embedding container took to restart; and after the first
    such night somebody wired in a fallback that searched the 384-dimensional column with another
    model's vector cut to 384."""

    async def main() -> None:
        async with fallback_of(server, other) as embedder:
            for number in range(5):
                assert_is_truth(await embedder.embed_query(f"up {number}"), server, f"up {number}")
            assert embedder.state.active == "test-tei"
            assert embedder.state.last_error is None
            up_since = embedder.state.since

            await asyncio.to_thread(server.stop)
            for number in range(5):
                answer = await embedder.embed_query(f"down {number}")
                assert_is_truth(answer, other, f"down {number}")
                assert answer.fell_back
            state = embedder.state
            assert state.active == "test-openai"
            assert state.model == OTHER_MODEL
            assert state.since > up_since
            assert state.last_error is not None
            assert state.last_error_at is not None
            assert state.latency_ms is not None

            await asyncio.to_thread(server.start)
            asked = other.count.requests
            for number in range(5):
                answer = await embedder.embed_query(f"back {number}")
                assert_is_truth(answer, server, f"back {number}")
                assert not answer.fell_back
            # the very next query after it is back uses TEI
            assert other.count.requests == asked
            assert embedder.state.active == "test-tei"

    with other:
        asyncio.run(main())


def test_at_most_one_request_fails_before_the_switch(
    server: FaultServer, other: FaultServer
) -> None:
    """While TEI loads its model it answers 503; each query retried for a minute first."""
    server.rule = lambda number, inputs: Status(503)

    async def main() -> None:
        async with fallback_of(server, other) as embedder:
            assert (await embedder.embed_query("first")).fell_back
            assert server.count.requests == 1
            assert embedder.state.active == "test-openai"

    with other:
        asyncio.run(main())


def test_a_tei_that_hangs_is_left_and_probed_once_at_a_time(
    server: FaultServer, other: FaultServer
) -> None:
    """A frozen container accepts connections and never answers: every query waited for it."""
    server.rule = lambda number, inputs: Hang()

    async def main() -> None:
        async with fallback_of(server, other, query_seconds=1.5) as embedder:
            embedder._head_start = 0.0
            assert (await embedder.embed_query("first")).fell_back
            for number in range(20):
                assert_is_truth(await embedder.embed_query(f"q{number}"), other, f"q{number}")
            # the first query's, and one probe that is still waiting or has just ended
            assert server.count.most_in_flight <= 2
            assert other.count.requests == 21

    with other:
        asyncio.run(main())


def test_a_tei_that_is_back_is_found_while_older_probes_still_hang(
    server: FaultServer, other: FaultServer
) -> None:
    """A network came back after a minute. The one probe that it had swallowed was still waited
    for, and until its timeout every query went to the service that costs money."""
    server.script(Status(503))
    server.rule = lambda number, inputs: Hang()
    time = FakeTime()

    async def main() -> None:
        async with fallback_of(server, other, query_seconds=60) as embedder:
            embedder._clock, embedder._head_start = time.clock, 0.0
            assert (await embedder.embed_query("first")).fell_back
            assert (await embedder.embed_query("its probe hangs")).fell_back
            server.rule = None
            assert (await embedder.embed_query("too soon to ask again")).fell_back
            time.now += PROBE_EVERY_SECONDS
            embedder._head_start = 60
            assert_is_truth(await embedder.embed_query("back"), server, "back")
            assert embedder.state.active == "test-tei"
            assert server.count.requests == 3
            async with asyncio.timeout(10):  # half of a request's own timeout
                while server.count.in_flight:  # the probe that hangs is given up
                    await asyncio.sleep(0.01)

    with other:
        asyncio.run(main())


@pytest.mark.parametrize("fault", [Hang(), Status(500, words="other is broken")], ids=repr)
def test_a_tei_that_is_back_and_slow_is_waited_for_as_long_as_nobody_else_answers(
    server: FaultServer, other: FaultServer, fault: Hang | Status
) -> None:
    """TEI was back, on a machine where it takes half a second. The query went on to the other one
    after a tenth of it, which was down by then: an error, and TEI's answer was thrown away."""
    server.script(Status(503))

    async def main() -> None:
        async with fallback_of(server, other, query_seconds=60) as embedder:
            embedder._head_start = 0.0
            assert (await embedder.embed_query("down")).fell_back
            other.rule, server.delay = (lambda number, inputs: fault), 0.3
            assert_is_truth(await embedder.embed_query("back"), server, "back")
            assert embedder.state.active == "test-tei"

    with other:
        asyncio.run(main())


def test_a_tei_with_another_model_is_not_used_for_queries(
    server: FaultServer, other: FaultServer
) -> None:
    """The container was replaced by one with another model of the same width, between two queries
    and without one failed request: only `/info` tells."""

    async def main() -> None:
        async with fallback_of(server, other) as embedder:
            assert_is_truth(await embedder.embed_query("before"), server, "before")
            await asyncio.to_thread(server.stop)
            server.info["model_id"] = server.model = "intfloat/e5-small"
            await asyncio.to_thread(server.start)
            answer = await embedder.embed_query("after")
            assert_is_truth(answer, other, "after")
            assert "intfloat/e5-small" in str(embedder.state.last_error)

    with other:
        asyncio.run(main())


def test_when_nobody_answers_both_reasons_are_told(server: FaultServer, other: FaultServer) -> None:
    other.rule = lambda number, inputs: Status(500, words="other is broken")
    server.rule = lambda number, inputs: Status(500, words="tei is broken")

    async def main() -> None:
        async with fallback_of(server, other) as embedder:
            for _ in range(2):
                with pytest.raises(
                    TransientError,
                    match=r"test-tei: .*500: tei is broken\ntest-openai: .*500: other is broken",
                ):
                    await embedder.embed_query("query")
            other.rule = None
            assert (await embedder.embed_query("query")).fell_back

    with other:
        asyncio.run(main())


def test_a_query_that_is_refused_is_the_querys_fault(
    server: FaultServer, other: FaultServer
) -> None:
    """An over-long or blank query must not open the circuit for everybody else."""
    server.poison = {"poison": Status(400, words="cannot be embedded")}

    async def main() -> None:
        async with fallback_of(server, other) as embedder:
            for query in ("poison", "", " ", "half \udc00 of a pair"):
                with pytest.raises(InputError):
                    await embedder.embed_query(query)
            assert embedder.state.active == "test-tei"
            assert_is_truth(await embedder.embed_query("a\x00b"), server, "a\x00b")
            assert other.count.requests == 0

    with other:
        asyncio.run(main())


def test_without_a_second_provider_the_first_ones_error_is_told(server: FaultServer) -> None:
    """`EMBEDDING_MODE=server`: no silent fallback to a service that costs money."""
    server.script(Status(503, words="loading"))

    async def main() -> None:
        embedder = FallbackEmbedder(embedder_of(endpoint_of(server), server))
        with pytest.raises(TransientError, match="loading"):
            await embedder.embed_query("query")
        assert_is_truth(await embedder.embed_query("query"), server, "query")
        await embedder.aclose()

    asyncio.run(main())
