"""What goes over the wire in each dialect, and what start-up costs."""

import asyncio
import subprocess
import sys

import numpy as np
import pytest
from pydantic import SecretStr

from embedding_pipeline.embedders import Embedder, GlobalError, create_embedder
from embedding_pipeline.embedders.openai import takes_dimensions
from embedding_pipeline.embedders.tokens import token_counter
from embedding_pipeline_tests.embedders.support import (
    DIALECTS,
    Dialect,
    FakeTime,
    embedder_of,
    endpoint_of,
    texts,
)
from embedding_pipeline_tests.faults.server import FaultServer, Status


def test_tei_is_told_not_to_truncate(server: FaultServer) -> None:
    """TEI cuts silently unless told not to."""

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server), server)
        await embedder.embed(texts(3))
        assert server.count.bodies == [{"truncate": False, "normalize": True}]
        await embedder.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("model", "dimensions"),
    [
        ("text-embedding-3-small", 512),
        ("text-embedding-ada-002", 1536),
        ("all-minilm-l6-v2-layers", 1536),
        ("sentence-transformers/all-MiniLM-L6-v2", 384),
    ],
)
def test_openai_is_asked_for_base64_and_for_a_width_where_it_has_a_choice(
    model: str, dimensions: int
) -> None:
    with FaultServer(dimensions=dimensions, model=model) as server:

        async def main() -> None:
            embedder = embedder_of(endpoint_of(server, "openai"), server)
            result = await embedder.embed(texts(3))
            assert result.vectors.shape == (3, dimensions)
            assert result.vectors.dtype == np.float32
            expected = {"model": model, "encoding_format": "base64"}
            if takes_dimensions(model):
                expected |= {"dimensions": dimensions}  # type: ignore[dict-item]
            assert server.count.bodies == [expected]
            await embedder.aclose()

        asyncio.run(main())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_key_is_sent_as_bearer_and_none_where_there_is_none(
    server: FaultServer, dialect: Dialect
) -> None:
    async def main() -> None:
        endpoint = endpoint_of(server, dialect, api_key=SecretStr("sk-test"))
        embedder = embedder_of(endpoint, server)
        await embedder.embed(texts(1))
        assert server.count.authorizations == {"Bearer sk-test"}
        await embedder.aclose()

    asyncio.run(main())


def test_limits_are_the_lower_of_ours_and_infos(server: FaultServer) -> None:
    """The server's operator lowered the batch size; every request was answered 413."""
    server.info |= {
        "max_client_batch_size": 8,
        "max_input_length": 128,
        "max_concurrent_requests": 24,
    }

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server, concurrency=16), server)
        await embedder.start()
        assert embedder.endpoint.max_inputs == 8
        assert embedder.endpoint.max_tokens_per_input == 128
        # a permit for each input: three full requests at once
        assert embedder.endpoint.concurrency == 3
        result = await embedder.embed(texts(50))
        assert result.done.all()
        assert max(server.count.sizes) == 8
        await embedder.aclose()

    asyncio.run(main())


def test_an_address_that_is_not_tei_is_said_to_be_none(server: FaultServer) -> None:
    async def main() -> None:
        endpoint = endpoint_of(server, "tei")
        server.info.pop("model_id")
        with pytest.raises(GlobalError, match="not a TEI server"):
            await embedder_of(endpoint, server).embed(texts(1))

    asyncio.run(main())


def test_batches_are_packed_by_count_tokens_and_bytes(server: FaultServer) -> None:
    async def sizes(**limits: int) -> list[int]:
        server.reset()
        embedder = embedder_of(endpoint_of(server, "openai", concurrency=1, **limits), server)
        result = await embedder.embed(["word " * 20] * 10)
        assert result.done.all()
        await embedder.aclose()
        return server.count.sizes

    async def main() -> None:
        assert await sizes(max_inputs=4) == [4, 4, 2]
        # 100 letters and spaces are estimated at 34 tokens and 2 special ones
        assert await sizes(max_tokens_per_request=36 * 3) == [3, 3, 3, 1]
        assert await sizes(max_bytes_per_request=103 * 5) == [5, 5]

    asyncio.run(main())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_overlong_texts_are_cut_by_the_models_tokenizer_and_counted(
    server: FaultServer, dialect: Dialect
) -> None:
    """A silent cut: half of a contract was never searchable and nobody could say which rows."""
    counter = token_counter("all-minilm-l6-v2")
    long, short = "many words in a row " * 200, "few words"

    async def main() -> None:
        endpoint = endpoint_of(server, dialect, max_tokens_per_input=64)
        embedder = embedder_of(endpoint, server, counter=counter, prefix="passage: ")
        result = await embedder.embed([short, long, short, long])
        assert result.truncated == [1, 3]
        assert result.done.all()
        (cut,) = set(server.count.texts) - {"passage: few words"}
        assert cut.startswith("passage: many words")
        assert counter.count(cut) == 64
        assert np.array_equal(result.vectors[1], server.truth([cut])[0])
        assert embedder.estimate_tokens(long) == 64
        assert embedder.estimate_tokens(short) == 6
        await embedder.aclose()

    asyncio.run(main())


def test_overlong_texts_are_quarantined_where_the_yaml_says_so(server: FaultServer) -> None:
    counter = token_counter("all-minilm-l6-v2")

    async def main() -> None:
        endpoint = endpoint_of(server, max_tokens_per_input=64)
        embedder = embedder_of(endpoint, server, counter=counter, overlong="quarantine")
        result = await embedder.embed(["short", "many words in a row " * 200])
        assert list(result.refused) == [1]
        assert "longer than 64 tokens" in result.refused[1]
        assert result.truncated == []
        assert server.count.inputs == 1
        await embedder.aclose()

    asyncio.run(main())


def test_without_the_tokenizer_the_provider_decides_what_is_too_long(server: FaultServer) -> None:
    """An estimate must not quarantine a text that the provider would take; nor may its refusal
    take neighbours along."""
    perhaps, surely = "perhaps too long " * 30, "surely too long " * 300
    server.poison = {surely: Status(400, words="maximum context length is 64 tokens")}

    async def main() -> None:
        endpoint = endpoint_of(server, "openai", max_tokens_per_input=64)
        embedder = embedder_of(endpoint, server, overlong="quarantine")
        result = await embedder.embed(["a b", perhaps, "c d", surely, "e f"])
        assert list(result.refused) == [3]
        assert "maximum context length" in result.refused[3]
        # those that may be too long travel alone
        assert sorted(server.count.sizes) == [1, 1, 1, 1, 1]
        await embedder.aclose()

    asyncio.run(main())


def test_a_text_that_is_still_too_long_after_the_estimate_is_cut_by_the_providers_count(
    server: FaultServer,
) -> None:
    """Random letters have more tokens than any estimate for prose; refused, the row would have
    been lost although the YAML says truncate."""
    long = "xqzj" * 90

    def refuse(number: int, inputs: list[str]) -> Status | None:
        tokens = max(len(text) // 2 for text in inputs)
        if tokens <= 64:
            return None
        return Status(400, words=f"maximum is 64 tokens, however you requested {tokens} tokens")

    server.rule = refuse

    async def main() -> None:
        endpoint = endpoint_of(server, "openai", max_tokens_per_input=64)
        embedder = embedder_of(endpoint, server)
        result = await embedder.embed(["short", long])
        assert result.done.all()
        assert result.refused == {}
        assert result.truncated == [1]
        (sent,) = [text for text in server.count.texts if text != "short" and len(text) <= 128]
        assert long.startswith(sent)
        assert len(sent) > 100
        assert np.array_equal(result.vectors[1], server.truth([sent])[0])
        await embedder.aclose()

    asyncio.run(main())


def test_a_text_larger_than_a_request_may_be_is_not_sent(server: FaultServer) -> None:
    async def main() -> None:
        endpoint = endpoint_of(server, max_bytes_per_request=1000, max_tokens_per_input=10_000)
        embedder = embedder_of(endpoint, server)
        result = await embedder.embed(["good", "x" * 2000])
        assert list(result.refused) == [1]
        assert "1000 a request" in result.refused[1]
        assert server.count.inputs == 1
        await embedder.aclose()

    asyncio.run(main())


def test_tokens_and_cost_are_the_providers_count(server: FaultServer) -> None:
    async def main() -> None:
        for dialect in DIALECTS:
            server.reset()
            endpoint = endpoint_of(server, dialect, price_per_million_tokens={"test-model": 0.5})
            embedder = embedder_of(endpoint, server)
            result = await embedder.embed(texts(100))
            assert result.tokens == server.count.tokens == 300
            assert embedder.cost(result.tokens) == pytest.approx(300 * 0.5 / 1e6)
            await embedder.aclose()

    asyncio.run(main())


def test_an_embedder_can_be_closed_and_started_again_in_another_loop(server: FaultServer) -> None:
    """Dagster's in-process executor runs one asyncio loop for each step."""
    embedders: list[Embedder] = [
        create_embedder(endpoint_of(server, dialect), server.model, server.dimensions)
        for dialect in DIALECTS
    ]

    async def main() -> None:
        for embedder in embedders:
            await embedder.start()
            results = await asyncio.gather(*(embedder.embed(texts(40)) for _ in range(8)))
            assert all(np.array_equal(r.vectors, server.truth(texts(40))) for r in results)
            await embedder.aclose()

    asyncio.run(main())
    asyncio.run(main())


def test_a_new_connection_is_asked_for_its_model(server: FaultServer) -> None:
    """The TEI container was replaced in mid-run by one with another model of the same width, with
    no failed request: its answers look like any others."""
    time = FakeTime()

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server), server, time)
        assert (await embedder.embed(texts(3))).done.all()
        await asyncio.to_thread(server.stop)
        server.info["model_id"] = "another-model"
        await asyncio.to_thread(server.start)
        with pytest.raises(GlobalError, match="another-model") as caught:
            await embedder.embed(texts(3))
        assert caught.value.partial is not None
        assert not caught.value.partial.done.any()
        await embedder.aclose()

    asyncio.run(main())


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Every Dagster run pays for every import: openai takes half a second."""
    code = (
        "import sys, embedding_pipeline.embedders\n"
        "print([m for m in ('openai', 'aiohttp', 'tokenizers', 'onnxruntime', 'jinja2')"
        " if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
