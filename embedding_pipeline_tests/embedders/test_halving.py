"""Refused texts are found by halving; everything else is embedded."""

import asyncio

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedding_pipeline.embedders import GlobalError
from embedding_pipeline_tests.embedders.support import (
    DIALECTS,
    Dialect,
    embedder_of,
    endpoint_of,
    texts,
)
from embedding_pipeline_tests.faults.server import FaultServer, Status

POISONED = Status(400, words="this text cannot be embedded")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_one_poisoned_text_is_charged_alone_and_its_63_neighbours_are_embedded(
    server: FaultServer, dialect: Dialect
) -> None:
    """A team's nightly backfill stopped for weeks at the one batch of 64 that held a text which
    the provider answers with 400: the other 63 rows never got their vectors."""
    server.info["max_client_batch_size"] = 64
    wanted = texts(64)
    server.poison = {wanted[37]: POISONED}

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server, dialect, max_inputs=64), server)
        result = await embedder.embed(wanted)
        assert list(result.refused) == [37]
        assert POISONED.words in result.refused[37]
        good = np.arange(64) != 37
        assert np.array_equal(result.done, good)
        assert np.array_equal(result.vectors[good], server.truth(wanted)[good])
        assert np.isnan(result.vectors[37]).all()
        assert result.requests == server.count.requests <= 2 * 6 + 1
        await embedder.aclose()

    asyncio.run(main())


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(count=st.integers(1, 80), poisoned=st.sets(st.integers(0, 79), max_size=6))
def test_any_set_of_poisoned_texts_is_found_exactly(
    server: FaultServer, count: int, poisoned: set[int]
) -> None:
    server.reset()
    wanted = texts(count)
    expected = {index for index in poisoned if index < count}
    server.poison = {wanted[index]: POISONED for index in expected}

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server), server)
        result = await embedder.embed(wanted)
        assert set(result.refused) == expected
        assert result.done.sum() == count - len(expected)
        assert np.array_equal(result.vectors[result.done], server.truth(wanted)[result.done])
        assert result.requests == server.count.requests
        # each culprit costs at most two requests a level of its batch of 32; and plain texts
        batches = -(-count // 32)
        assert result.requests <= batches + (2 * 5 + 1) * len(expected)
        await embedder.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_server_that_refuses_everything_charges_no_row(server: FaultServer, status: int) -> None:
    """A wrong `dimensions` parameter made the provider answer 400 to every request, and a tool
    that halves on 400 wrote all 190,000 rows of the table into its quarantine, one request each."""
    server.rule = lambda number, inputs: Status(status, words="unknown parameter: 'dimensions'")

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server, "openai"), server)
        with pytest.raises(GlobalError, match=r"refuses every text.*unknown parameter") as caught:
            await embedder.embed(texts(32))
        assert caught.value.partial is not None
        assert caught.value.partial.refused == {}
        # 32, 16, 8, 4, 2, 1, and a plain text to be sure
        assert server.count.requests == 7
        await embedder.aclose()

    asyncio.run(main())


def test_a_first_text_that_is_refused_alone_is_still_its_own_fault(server: FaultServer) -> None:
    """The very first query of a new service was refused, and the service declared the provider
    misconfigured; a plain text would have told them apart."""
    server.poison = {"bad": POISONED}

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server), server)
        result = await embedder.embed(["bad"])
        assert list(result.refused) == [0]
        assert result.requests == server.count.requests == 2
        await embedder.aclose()

    asyncio.run(main())


def test_a_request_larger_than_the_accounts_minute_is_halved(server: FaultServer) -> None:
    """A new account has 40,000 tokens a minute. OpenAI answers 429 to a request of 64,000, as it
    does to one that comes too soon, and a script waited for this one to pass until the morning."""
    wanted = texts(64)
    server.rule = lambda number, inputs: (
        Status(
            429,
            words=f"Request too large for test-model in organization org-1 on tokens per min (TPM):"
            f" Limit 40, Requested {3 * len(inputs)}. The input or output tokens must be reduced",
            code="rate_limit_exceeded",
        )
        if 3 * len(inputs) > 40
        else None
    )

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server, "openai", max_inputs=64), server)
        result = await embedder.embed(wanted)
        assert result.refused == {}
        assert result.truncated == []
        assert np.array_equal(result.vectors, server.truth(wanted))
        # 64, 32 and 16 are too large, 8 are not
        assert sorted(server.count.sizes) == [8] * 8 + [16] * 4 + [32] * 2 + [64]
        assert result.throttled == 0
        await embedder.aclose()

    asyncio.run(main())


def test_blank_and_broken_texts_are_never_sent(server: FaultServer) -> None:
    """OpenAI refuses a whole request for one empty string; a lone surrogate cannot even be
    encoded, and the client's UnicodeEncodeError ended the run."""

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server, "openai"), server, prefix="passage: ")
        result = await embedder.embed(["", "good", " \n\t\u00a0", "half \ud83d of a pair"])
        assert sorted(result.refused) == [0, 2, 3]
        assert server.count.texts.keys() == {"passage: good"}
        assert np.array_equal(result.vectors[1], server.truth(["passage: good"])[0])
        nothing = await embedder.embed([])
        assert nothing.vectors.shape == (0, server.dimensions)
        assert server.count.requests == 1
        await embedder.aclose()

    asyncio.run(main())


def test_unusual_texts_arrive_as_they_are(server: FaultServer) -> None:
    """Emoji, right-to-left, SQL and control characters; a NUL is legal in JSON."""
    odd = [
        "😀😀",
        "שלום עולם",
        "'; DROP TABLE rows; --",
        'q"\\\n\t\r',
        "a\x00b\x07c",
        "ﷺ",
        "e\u0301",
    ]

    async def main() -> None:
        for dialect in DIALECTS:
            embedder = embedder_of(endpoint_of(server, dialect), server)
            result = await embedder.embed(odd)
            assert result.done.all()
            assert np.array_equal(result.vectors, server.truth(odd))
            await embedder.aclose()

    asyncio.run(main())


def test_a_provider_that_begins_to_refuse_everything_charges_three_rows(
    server: FaultServer,
) -> None:
    """In mid-run a gateway began to answer 400 to whatever it was asked: a policy had changed.
    The rest of the table went into quarantine."""
    server.rule = lambda number, inputs: Status(400, words="policy") if number >= 4 else None

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server, concurrency=1), server)
        with pytest.raises(GlobalError, match=r"refuses every text.*policy") as caught:
            await embedder.embed(texts(400))
        partial = caught.value.partial
        assert partial is not None
        assert partial.done.sum() == 128
        assert len(partial.refused) <= 3
        await embedder.aclose()

    asyncio.run(main())
