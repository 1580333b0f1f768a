"""What a misbehaving endpoint may cost: time, never a row, a vector or a second payment."""

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from embedding_pipeline.embedders import EmbedResult, GlobalError, TransientError
from embedding_pipeline.embedders.engine import ProviderEmbedder
from embedding_pipeline_tests.embedders.support import (
    DIALECTS,
    Dialect,
    FakeTime,
    embedder_of,
    endpoint_of,
    texts,
)
from embedding_pipeline_tests.faults.server import (
    Drip,
    Edit,
    Fault,
    FaultServer,
    HalfResponse,
    Hang,
    RawBody,
    Reset,
    Status,
    Vectors,
    WrongModel,
    bad_value,
    fewer,
    reordered,
    wrong_width,
)

both_dialects = pytest.mark.parametrize("dialect", DIALECTS)


async def embed_all(embedder: ProviderEmbedder, wanted: Sequence[str]) -> EmbedResult:
    try:
        return await embedder.embed(wanted)
    finally:
        await embedder.aclose()


def assert_is_truth(result: EmbedResult, server: FaultServer, wanted: Sequence[str]) -> None:
    assert result.done.all()
    assert result.refused == {}
    assert np.array_equal(result.vectors, server.truth(wanted))


@both_dialects
@pytest.mark.parametrize("headers", [{}, {"retry-after": "2"}, {"retry-after-ms": "1500"}])
def test_a_storm_of_429_costs_time_and_nothing_else(
    server: FaultServer, dialect: Dialect, headers: dict[str, str]
) -> None:
    """A provider that throttles for half a minute made scripts die with RateLimitError, or retry
    so eagerly, in the client and again around it, that they kept themselves throttled."""
    wanted, time = texts(200), FakeTime()
    server.script(*[Status(429, headers)] * 6)

    async def main() -> None:
        result = await embed_all(embedder_of(endpoint_of(server, dialect), server, time), wanted)
        assert_is_truth(result, server, wanted)
        assert result.throttled == server.count.statuses[429] == 6
        assert result.requests == server.count.requests == 7 + 6
        assert server.count.answered == 7

    asyncio.run(main())
    assert max(time.slept) >= {"retry-after": 2.0, "retry-after-ms": 1.5}.get(
        next(iter(headers), ""), 0.25
    )


@both_dialects
def test_a_third_of_all_answers_is_500(server: FaultServer, dialect: Dialect) -> None:
    """With 30 % errors a batch fails ten times in a row once in 170,000; tools that give up after
    two or three tries leave holes in the table, and some exit 0."""
    rng = random.Random(7)
    wanted = texts(1000)
    server.rule = lambda number, inputs: Status(500) if rng.random() < 0.3 else None

    async def main() -> None:
        result = await embed_all(embedder_of(endpoint_of(server, dialect), server), wanted)
        assert_is_truth(result, server, wanted)
        assert result.requests == server.count.requests
        # nothing that was answered was asked for again
        assert set(server.count.texts) - {"a"} == set(wanted)

    asyncio.run(main())


@both_dialects
@pytest.mark.parametrize(
    "fault",
    [Reset(), HalfResponse(), Status(503), Status(408), Status(502), Status(424), RawBody(b"{")],
    ids=repr,
)
def test_a_broken_answer_is_asked_for_again(
    server: FaultServer, dialect: Dialect, fault: Fault
) -> None:
    """A load balancer that drops connections in mid-answer: the half that had arrived was parsed
    as if it were all."""
    wanted = texts(40)
    server.script(fault, None, fault)

    async def main() -> None:
        result = await embed_all(embedder_of(endpoint_of(server, dialect), server), wanted)
        assert_is_truth(result, server, wanted)
        assert result.requests == server.count.requests == 4
        assert result.retried == 2

    asyncio.run(main())


@both_dialects
@pytest.mark.parametrize("fault", [Hang(), Drip()], ids=["hangs", "drips"])
def test_a_server_that_hangs_is_left_after_the_timeout(
    server: FaultServer, dialect: Dialect, fault: Fault
) -> None:
    """A request without a total timeout once hung a run for the whole night; one with a timeout for
    each read, as HTTP clients have it, waited for a proxy that sent a byte now and then."""
    wanted = texts(40)
    server.script(fault)

    async def main() -> None:
        endpoint = endpoint_of(server, dialect, timeout_seconds=1.5)
        result = await embed_all(embedder_of(endpoint, server), wanted)
        assert_is_truth(result, server, wanted)
        assert result.requests == 3

    asyncio.run(main())


def change_data(change: Any) -> Edit:
    return reordered(change)


def duplicate_index(data: list[Any]) -> list[Any]:
    return [data[0] | {"index": 1}, *data[1:]]


BAD_ANSWERS: list[tuple[str, Fault]] = [
    ("fewer vectors than inputs", fewer()),
    ("NaN", bad_value(float("nan"), 3)),
    ("infinity", bad_value(float("inf"), 1)),
    ("all-zero", bad_value(0.0, 2)),
    (
        "beyond float32",
        Edit(lambda answer: json.loads(json.dumps(answer).replace("0.", "1e39", 1))),
    ),
    ("no list", RawBody(b'{"hello": 1}')),
    ("null", RawBody(b"null")),
    ("not JSON", RawBody(b"<html>gateway</html>")),
    ("a lone surrogate and NUL", RawBody(b'["\\ud800\\u0000"]')),
]
BAD_OPENAI_ANSWERS: list[tuple[str, Fault]] = [
    ("an index twice", change_data(duplicate_index)),
    ("an index out of range", change_data(lambda d: [d[0] | {"index": 99}, *d[1:]])),
    ("an index missing", change_data(lambda d: [{"embedding": d[0]["embedding"]}, *d[1:]])),
    ("an index that is true", change_data(lambda d: [d[1] | {"index": True}, *d[1:]])),
    ("broken base64", change_data(lambda d: [d[0] | {"embedding": "!!!"}, *d[1:]])),
    ("half a float", change_data(lambda d: [d[0] | {"embedding": "AAAA"}, *d[1:]])),
    ("one vector cut short", change_data(lambda d: [d[0] | {"embedding": "AACAPw=="}, *d[1:]])),
    ("an embedding that is null", change_data(lambda d: [d[0] | {"embedding": None}, *d[1:]])),
    ("no model", Edit(lambda answer: {k: v for k, v in answer.items() if k != "model"})),
]
CASES = [
    *(pytest.param(d, fault, id=f"{d}: {name}") for d in DIALECTS for name, fault in BAD_ANSWERS
      if not (d == "openai" and name == "beyond float32")),
    *(pytest.param("openai", fault, id=f"openai: {name}") for name, fault in BAD_OPENAI_ANSWERS),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "fault"), CASES)
def test_a_bad_answer_is_an_error_of_the_batch_and_never_a_vector(
    server: FaultServer, dialect: Dialect, fault: Fault
) -> None:
    """A server that answered 63 vectors for 64 texts shifted every following row by one; nobody
    noticed until search results made no sense."""
    wanted = texts(8)
    server.script(fault)

    async def main() -> None:
        result = await embed_all(embedder_of(endpoint_of(server, dialect), server), wanted)
        assert_is_truth(result, server, wanted)
        assert result.requests == server.count.requests == 2
        assert result.retried == 1

    asyncio.run(main())


@pytest.mark.parametrize(("dialect", "fault"), CASES)
def test_an_endpoint_that_only_gives_bad_answers_is_given_up_and_says_why(
    server: FaultServer, dialect: Dialect, fault: Fault
) -> None:
    """TEI with a broken fp16 kernel answered NaN for everything; a tool that charges the text
    would have quarantined the table."""
    server.rule = lambda number, inputs: fault if len(inputs) > 1 else Status(500)

    async def main() -> None:
        with pytest.raises(TransientError, match="Given up") as caught:
            await embed_all(embedder_of(endpoint_of(server, dialect), server), texts(8))
        partial = caught.value.partial
        assert partial is not None
        assert not partial.done.any()
        assert partial.refused == {}
        assert np.isnan(partial.vectors).all()
        assert partial.requests == server.count.requests

    asyncio.run(main())


def test_answers_in_another_order_are_put_right_by_their_index(server: FaultServer) -> None:
    """OpenAI does not promise the order of `data`; a proxy in front of it did reorder it."""
    wanted = texts(20)
    server.rule = lambda number, inputs: reordered(lambda data: data[::-1])

    async def main() -> None:
        result = await embed_all(embedder_of(endpoint_of(server, "openai"), server), wanted)
        assert_is_truth(result, server, wanted)
        assert result.requests == 1

    asyncio.run(main())


def test_a_server_that_ignores_base64_is_understood(server: FaultServer) -> None:
    """Several servers of OpenAI's dialect send lists of numbers whatever they are asked for."""
    wanted = texts(5)

    def as_lists(answer: dict[str, Any]) -> dict[str, Any]:
        rows = server.truth(wanted)
        data = [d | {"embedding": rows[d["index"]].tolist()} for d in answer["data"]]
        return {**answer, "data": data}

    server.script(Edit(as_lists))

    async def main() -> None:
        result = await embed_all(embedder_of(endpoint_of(server, "openai"), server), wanted)
        assert_is_truth(result, server, wanted)

    asyncio.run(main())


@both_dialects
@pytest.mark.parametrize("fault", [wrong_width(7), wrong_width(9)], ids=["narrow", "wide"])
def test_another_width_for_every_text_stops_at_once(
    server: FaultServer, dialect: Dialect, fault: Fault
) -> None:
    """A server was restarted with a larger model; every batch of the night failed at the database
    after having been paid for."""
    server.rule = lambda number, inputs: fault

    async def main() -> None:
        endpoint = endpoint_of(server, dialect, concurrency=1)
        with pytest.raises(GlobalError, match="dimensions") as caught:
            await embed_all(embedder_of(endpoint, server), texts(500))
        assert caught.value.partial is not None
        assert not caught.value.partial.done.any()
        assert server.count.requests == 1

    asyncio.run(main())


def test_an_answer_that_names_another_model_is_refused(server: FaultServer) -> None:
    """A gateway fell back to another model of the same width: cosine between the two models'
    vectors of the same text is 0.02, and nothing but the answer's `model` tells."""
    server.script(None, WrongModel("other-model"))

    async def main() -> None:
        endpoint = endpoint_of(server, "openai", concurrency=1)
        with pytest.raises(GlobalError, match=r"other-model.*model_aliases") as caught:
            await embed_all(embedder_of(endpoint, server), texts(96))
        partial = caught.value.partial
        assert partial is not None
        # what the right model had answered before is kept
        assert partial.done.sum() == 32
        assert np.array_equal(partial.vectors[:32], server.truth(texts(96))[:32])
        assert server.count.requests == 2

    asyncio.run(main())


def test_an_info_that_names_another_model_is_refused_before_the_first_row(
    server: FaultServer,
) -> None:
    """`EMBEDDING_SERVICE_URL` pointed at the new team's TEI with another 384-dimensional model."""
    server.info["model_id"] = "intfloat/e5-small"

    async def main() -> None:
        with pytest.raises(GlobalError, match="serves intfloat/e5-small, not test-model"):
            await embed_all(embedder_of(endpoint_of(server), server), texts(3))
        assert server.count.requests == 0

    asyncio.run(main())


@both_dialects
def test_an_alias_of_the_model_is_accepted(server: FaultServer, dialect: Dialect) -> None:
    """TEI started from a folder calls its model `/data/model`; a dated name is an alias too."""
    server.info["model_id"] = "/data/model"
    server.script(WrongModel("/data/model"))

    async def main() -> None:
        endpoint = endpoint_of(server, dialect, model_aliases={"test-model": ["/data/model"]})
        result = await embed_all(embedder_of(endpoint, server), texts(3))
        assert_is_truth(result, server, texts(3))

    asyncio.run(main())


@both_dialects
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Status(401, words="Incorrect API key provided"), "No key is set"),
        (Status(403), "No key is set"),
        (Status(404, words="no such model", code="model_not_found"), "does not serve test-model"),
        (Status(405), "is it a .* endpoint"),
        (Status(307, {"location": "http://elsewhere/"}), "redirects to http://elsewhere/"),
    ],
)
def test_what_no_text_can_help_stops_at_once_and_says_what_to_do(
    server: FaultServer, dialect: Dialect, fault: Status, words: str
) -> None:
    """A revoked key was retried for an hour, row by row, and every row was marked as failed."""
    server.script(None, None)
    server.rule = lambda number, inputs: fault

    async def main() -> None:
        endpoint = endpoint_of(server, dialect, concurrency=1)
        with pytest.raises(GlobalError, match=words) as caught:
            await embed_all(embedder_of(endpoint, server), texts(320))
        partial = caught.value.partial
        assert partial is not None
        assert partial.done.sum() == 64
        assert np.array_equal(partial.vectors[partial.done], server.truth(texts(320))[partial.done])
        assert partial.refused == {}
        assert server.count.requests == partial.requests == 3

    asyncio.run(main())


def test_a_quota_that_is_used_up_is_not_waited_for(server: FaultServer) -> None:
    """OpenAI answers 429 both when one is too fast and when the account is empty; scripts waited
    all night for the second kind to pass."""
    server.script(Status(429, words="You exceeded your current quota", code="insufficient_quota"))

    async def main() -> None:
        with pytest.raises(GlobalError, match="no credit left"):
            await embed_all(embedder_of(endpoint_of(server, "openai"), server), texts(3))
        assert server.count.requests == 1

    asyncio.run(main())


@both_dialects
def test_giving_up_is_bounded_and_keeps_what_was_finished(
    server: FaultServer, dialect: Dialect
) -> None:
    """A provider was down for a day; the run hung for a day, and then threw away the hour of work
    that it had paid for before."""
    time, wanted = FakeTime(), texts(160)
    server.rule = lambda number, inputs: Status(503) if number >= 3 else None

    async def main() -> None:
        endpoint = endpoint_of(server, dialect, concurrency=1, give_up_after_seconds=60)
        embedder = embedder_of(endpoint, server, time)
        with pytest.raises(TransientError, match="Given up") as caught:
            await embed_all(embedder, wanted)
        partial = caught.value.partial
        assert partial is not None
        assert partial.done.sum() == 96
        assert np.array_equal(partial.vectors[partial.done], server.truth(wanted)[partial.done])
        assert partial.requests == server.count.requests

    asyncio.run(main())
    assert time.now - 1000 <= 60


def test_a_wait_longer_than_our_patience_is_not_waited_for(server: FaultServer) -> None:
    """`Retry-After: 86400`, a daily quota: better to say so now than to sit there for a day."""
    time = FakeTime()
    server.rule = lambda number, inputs: Status(429, {"retry-after": "86400"})

    async def main() -> None:
        with pytest.raises(TransientError, match="86400 s") as caught:
            await embed_all(embedder_of(endpoint_of(server), server, time), texts(3))
        assert caught.value.retry_after == 86400

    asyncio.run(main())
    assert time.slept == []


@both_dialects
def test_without_retry_the_first_failure_is_the_last(server: FaultServer, dialect: Dialect) -> None:
    """A query cannot wait for a back-off; its caller switches to another provider."""
    time = FakeTime()
    server.script(Status(503))

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server, dialect), server, time)
        with pytest.raises(TransientError):
            await embedder.embed(["query"], retry=False)
        result = await embedder.embed(["query"], retry=False)
        assert_is_truth(result, server, ["query"])
        await embedder.aclose()

    asyncio.run(main())
    assert time.slept == []


@both_dialects
def test_a_server_that_is_down_is_waited_for(server: FaultServer, dialect: Dialect) -> None:
    """The TEI container restarts; the run started a second too early and failed."""
    server.stop()

    class ServerComesUp(FakeTime):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds)
            if len(self.slept) == 2:
                await asyncio.to_thread(server.start)

    async def main() -> None:
        endpoint = endpoint_of(server, dialect)
        result = await embed_all(embedder_of(endpoint, server, ServerComesUp()), texts(3))
        assert_is_truth(result, server, texts(3))

    asyncio.run(main())


@pytest.mark.parametrize("retry", [True, False])
def test_a_server_that_stays_down_is_named_in_the_error(server: FaultServer, retry: bool) -> None:
    """'Connection error.' was all that the client said: not to whom, and not what to do."""
    server.stop()

    async def main() -> None:
        for dialect in DIALECTS:
            embedder = embedder_of(endpoint_of(server, dialect), server)
            with pytest.raises(TransientError, match=r"127\.0\.0\.1:\d+.* is it running") as caught:
                await embedder.embed(["query"], retry=retry)
            assert caught.value.cause == "unreachable"
            await embedder.aclose()

    asyncio.run(main())


@both_dialects
@pytest.mark.parametrize(
    "fault",
    [Status(500, words="tokenizer panicked"), Reset(), bad_value(float("nan"), 0)],
    ids=["500", "reset", "NaN"],
)
def test_a_text_that_breaks_the_server_is_found_and_charged_alone(
    server: FaultServer, dialect: Dialect, fault: Fault
) -> None:
    """One text crashed the tokenizer's thread: its batch of 32 was answered 500 for ever, so every
    run ended at the same place with 31 good rows unembedded."""
    wanted = texts(64)
    server.rule = lambda number, inputs: fault if wanted[11] in inputs else None

    async def main() -> None:
        result = await embed_all(embedder_of(endpoint_of(server, dialect), server), wanted)
        assert list(result.refused) == [11]
        assert "while other texts are embedded" in result.refused[11]
        good = np.arange(64) != 11
        assert np.array_equal(result.done, good)
        assert np.array_equal(result.vectors[good], server.truth(wanted)[good])
        assert result.requests == server.count.requests

    asyncio.run(main())


def test_an_outage_charges_no_text_however_long_it_lasts(server: FaultServer) -> None:
    """The difference between a text that breaks the server and a server that is broken: a plain
    text. Without it an outage of an hour would have quarantined the rows of that hour."""
    server.rule = lambda number, inputs: Status(500) if number > 4 else None

    async def main() -> None:
        with pytest.raises(TransientError, match="Given up") as caught:
            await embed_all(embedder_of(endpoint_of(server), server), texts(400))
        assert caught.value.partial is not None
        assert caught.value.partial.refused == {}
        assert caught.value.partial.done.sum() == 160

    asyncio.run(main())


def test_a_cancelled_call_leaves_no_place_taken(server: FaultServer) -> None:
    """A run that was terminated in the UI while its requests hung must not starve the next one in
    the same process."""
    server.rule = lambda number, inputs: Hang()

    async def main() -> None:
        embedder = embedder_of(endpoint_of(server, concurrency=2), server)
        await embedder.start()
        call = asyncio.create_task(embedder.embed(texts(200)))
        while server.count.requests < 2:
            await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert embedder._limiter.in_flight == 0
        server.rule = None
        assert_is_truth(await embedder.embed(texts(64)), server, texts(64))
        await embedder.aclose()

    asyncio.run(main())


def test_vectors_edited_by_nobody_are_exact(server: FaultServer) -> None:
    """float32 survives JSON (TEI) and base64 (OpenAI) bit by bit."""
    tiny = np.float32(1e-38)

    def scaled(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = vectors * tiny
        return result

    server.rule = lambda number, inputs: Vectors(scaled)

    async def main() -> None:
        for dialect in DIALECTS:
            result = await embed_all(embedder_of(endpoint_of(server, dialect), server), texts(9))
            assert np.array_equal(result.vectors, server.truth(texts(9)) * tiny)

    asyncio.run(main())
