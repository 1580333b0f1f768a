"""The budget: what a minute allows is drawn evenly, and never more than it allows."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.embedders.budget import SHARE, TokenBucket
from embedding_pipeline_tests.embedders.support import (
    FakeTime,
    embedder_of,
    endpoint_of,
    run_in_virtual_time,
    texts,
)
from embedding_pipeline_tests.faults.server import FaultServer, RateLimit


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=60),
    st.integers(10, 5000),
    st.integers(100, 20_000),
)
def test_no_window_of_time_holds_more_than_its_share(
    sizes: list[int], per_minute: int, tokens_per_minute: int
) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        budget = TokenBucket(per_minute, tokens_per_minute, sleep=asyncio.sleep, clock=loop.time)
        sent: list[tuple[float, int]] = []

        for tokens in sizes:
            # one after the other, as those in the limiter's line do
            await budget.acquire(tokens)
            sent.append((loop.time(), tokens))
        for i, (began, _) in enumerate(sent):
            for j in range(i, len(sent)):
                seconds = sent[j][0] - began
                requests = j - i + 1
                # what may go at once, and what the time in between lets through
                at_once = max(1.0, per_minute / 60 * 0.05)
                assert requests <= at_once + SHARE * per_minute / 60 * seconds + 1e-6
                tokens = sum(size for _, size in sent[i : j + 1])
                at_once = max(1.0, tokens_per_minute / 60 * 0.05)
                largest = max(size for _, size in sent[i : j + 1])
                drawn = at_once + largest + SHARE * tokens_per_minute / 60 * seconds
                assert tokens <= drawn + 1e-6

    run_in_virtual_time(main())


def test_the_providers_count_corrects_the_estimate() -> None:
    """Our estimate was twice the truth, so half of the paid rate limit lay idle."""

    async def main() -> float:
        loop = asyncio.get_running_loop()
        budget = TokenBucket(None, 6000, sleep=asyncio.sleep, clock=loop.time)
        began = loop.time()
        for _ in range(100):
            await budget.acquire(200)
            budget.release(200, 100)
        return loop.time() - began

    # 10,000 tokens at 6,000 a minute
    assert run_in_virtual_time(main()) == pytest.approx(10_000 / (SHARE * 100), rel=0.05)


def test_what_the_yaml_sets_is_not_overruled_by_headers() -> None:
    async def seconds(budget: TokenBucket, requests: int) -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(requests):
            await budget.acquire(1)
        return loop.time() - began

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        set_by_yaml = TokenBucket(60, None, clock=clock)
        set_by_yaml.learn(6000, None)
        assert await seconds(set_by_yaml, 31) == pytest.approx(30 / SHARE, rel=0.05)
        learnt = TokenBucket(None, None, clock=clock)
        assert await seconds(learnt, 31) == 0
        learnt.learn(60, None)
        assert await seconds(learnt, 31) == pytest.approx(30 / SHARE, rel=0.05)
        learnt.learn(120, None)
        assert await seconds(learnt, 31) == pytest.approx(15 / SHARE, rel=0.05)

    run_in_virtual_time(main())


def test_an_embedder_learns_its_limits_from_the_answers(server: FaultServer) -> None:
    """The limit of an account is in every answer of OpenAI; without reading it one finds it out
    by being throttled."""
    time = FakeTime()
    server.rate_limit = RateLimit(per_second=10, burst=1e9, headers=True)

    async def main() -> None:
        endpoint = endpoint_of(server, "openai", max_inputs=1, concurrency=1)
        embedder = embedder_of(endpoint, server, time)
        result = await embedder.embed(texts(50))
        assert result.done.all()
        assert result.requests == server.count.requests == 50
        await embedder.aclose()

    asyncio.run(main())
    # all but the first few at 10 a second
    assert 4.5 <= time.now - 1000 <= 5.5


def test_tokens_a_minute_from_the_yaml_are_kept(server: FaultServer) -> None:
    time = FakeTime()

    async def main() -> None:
        endpoint = endpoint_of(server, "openai", max_inputs=10, tokens_per_minute=600)
        embedder = embedder_of(endpoint, server, time)
        result = await embedder.embed(texts(100))
        assert result.tokens == server.count.tokens == 300
        await embedder.aclose()

    asyncio.run(main())
    # 300 tokens at 10 a second; the last request's own tokens are not waited for
    assert time.now - 1000 >= 0.8 * 300 / 10
