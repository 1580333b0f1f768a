"""A provider that misbehaves costs time, never a row, a wrong vector or a second payment."""

import math
import random
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.pending import count_by_partition
from embedding_pipeline_tests.faults.runs import KEY, Pipeline, provider
from embedding_pipeline_tests.faults.server import (
    Fault,
    FaultServer,
    HalfResponse,
    Hang,
    Reset,
    Status,
    WrongModel,
    bad_value,
    fewer,
    reordered,
    tokens_of,
    wrong_width,
)
from embedding_pipeline_tests.faults.truth import assert_exact, embedded
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]
both_dialects = pytest.mark.parametrize("dialect", ["tei", "openai"])

TOKENS_A_ROW = tokens_of("text number 1")
"""What the provider charges for a row of `create_docs`."""


def make_column(
    pipeline: Pipeline,
    connection: Connection,
    server: FaultServer,
    dialect: str = "openai",
    *,
    rows: int,
    endpoint: dict[str, Any] | None = None,
    **changes: Any,
) -> Column:
    create_docs(connection, rows)
    pipeline.declare(faulty=provider(server, dialect, **(endpoint or {})))
    model = {"provider": "faulty", "model": server.model, **changes}
    return pipeline.column(spec(embeddings=[embedding("vector_8", server.dimensions, **model)]))


def sometimes(share: float, fault: Fault, seed: int = 7) -> Callable[[int, list[str]], Fault]:
    """A rule by which a share of all requests meets the fault."""
    rng = random.Random(seed)
    return lambda number, inputs: fault if rng.random() < share else None


@both_dialects
@pytest.mark.parametrize(
    ("refusals", "headers"),
    [(20, {}), (4, {"retry-after": "1"}), (8, {"retry-after-ms": "200"})],
    ids=str,
)
def test_a_storm_of_429_costs_time_only(
    pipeline: Pipeline,
    connection: Connection,
    server: FaultServer,
    dialect: str,
    refusals: int,
    headers: dict[str, str],
) -> None:
    """A script that met its API's limit at row 40,000 died with RateLimitError and left no trace
    of where; another retried in the client and around it, and kept itself throttled."""
    column = make_column(pipeline, connection, server, dialect, rows=400)
    server.script(None, None, *[Status(429, headers, words=f"slow down, {KEY}")] * refusals)

    run = pipeline.run(column, batch_size=16)

    assert run.outcome.total.embedded == 400
    assert run.outcome.stopped is None
    assert run.outcome.throttled == server.count.statuses[429] == refusals
    assert run.outcome.requests == server.count.requests == 25 + refusals
    assert run.outcome.tokens == server.count.tokens == 400 * TOKENS_A_ROW
    assert_exact(connection, column)


@both_dialects
@pytest.mark.parametrize(
    ("share", "fault"),
    [
        pytest.param(0.3, Status(500, words=f"backend of {KEY} failed"), id="500"),
        pytest.param(0.3, Reset(), id="reset"),
        pytest.param(0.3, HalfResponse(), id="half a response"),
        # whatever the rate: a gateway's, which drove the rate to a request every two seconds
        pytest.param(0.3, Status(429), id="429"),
    ],
)
def test_a_third_of_all_requests_fails(
    pipeline: Pipeline,
    connection: Connection,
    server: FaultServer,
    dialect: str,
    share: float,
    fault: Fault,
) -> None:
    """With 30 % errors a tool that gives a batch three tries leaves 3 % of them out, and a popular
    one deletes such a batch from its queue and exits 0: the rows were found by a customer."""
    column = make_column(pipeline, connection, server, dialect, rows=800)
    server.rule = sometimes(share, fault)

    run = pipeline.run(column, batch_size=16)

    assert run.outcome.total.embedded == 800
    assert run.remaining == {}
    assert run.outcome.requests == server.count.requests >= 50
    assert run.outcome.retried > 5
    # each row was answered, and so paid for, once
    probes = server.count.texts["a"]
    assert 0 <= server.count.tokens - 800 * TOKENS_A_ROW <= probes
    assert_exact(connection, column)


@both_dialects
def test_requests_that_hang_are_left_after_the_timeout(
    pipeline: Pipeline, connection: Connection, server: FaultServer, dialect: str
) -> None:
    """A load balancer took requests and never answered them; without a total timeout the night's
    run was still waiting in the morning. (20 seconds there, one here.)"""
    column = make_column(
        pipeline, connection, server, dialect, rows=200, endpoint={"timeout_seconds": 1.0}
    )
    server.script(None, Hang(), None, Hang(), Hang())

    run = pipeline.run(column, batch_size=16)

    assert run.outcome.total.embedded == 200
    assert run.outcome.requests == server.count.requests >= 13 + 3
    assert_exact(connection, column)


@pytest.mark.slow
def test_requests_that_hang_for_20_seconds_hold_nobody_up(
    pipeline: Pipeline, connection: Connection, server: FaultServer
) -> None:
    """A model server stood still over four of its requests for 20 seconds each (it moved its model
    between two cards), and answered the others as ever. A script with a short timeout gave up its
    batch, sent it again and paid twice; one that sent batches in order stood still as well. With
    the product's own timeouts the four are waited for, and the rest is done meanwhile."""
    create_docs(connection, 2_000)
    defaults = provider(server)
    for key in ("concurrency", "timeout_seconds", "give_up_after_seconds"):
        del defaults[key]
    pipeline.declare(faulty=defaults)
    column = pipeline.column(
        spec(embeddings=[embedding("vector_8", 8, provider="faulty", model=server.model)])
    )
    answered_when_hung: list[int] = []

    def rule(number: int, inputs: list[str]) -> Fault:
        if number in (2, 5, 9, 14):
            return Hang(20.0)
        answered_when_hung.append(server.count.in_flight)
        return None

    server.rule = rule

    run = pipeline.run(column, batch_size=16)

    assert run.outcome.total.embedded == 2_000
    assert run.outcome.requests == server.count.requests == 125, "nothing was sent twice"
    assert set(server.count.texts.values()) == {1}
    # from the fifteenth on, each of the others was taken while all four hung, none after them
    assert len(answered_when_hung) == 121
    assert min(answered_when_hung[15:]) > 4
    assert_exact(connection, column)


def _half_of_the_indexes_twice(data: list[Any]) -> list[Any]:
    return [item | {"index": item["index"] // 2} for item in data]


def _shifted(data: list[Any]) -> list[Any]:
    return [item | {"index": item["index"] + 1} for item in data]


@pytest.mark.parametrize(
    ("dialect", "fault"),
    [
        pytest.param(dialect, fault, id=f"{dialect}: {name}")
        for dialect, name, fault in [
            ("tei", "fewer vectors than inputs", fewer()),
            ("openai", "fewer vectors than inputs", fewer(3)),
            ("tei", "NaN", bad_value(float("nan"), 3)),
            ("openai", "NaN", bad_value(float("nan"), 3)),
            ("tei", "Inf", bad_value(float("inf"), 1)),
            ("openai", "Inf", bad_value(float("inf"), 1)),
            ("tei", "all-zero", bad_value(0.0, 2)),
            ("openai", "all-zero", bad_value(0.0, 2)),
            ("openai", "indexes twice", reordered(_half_of_the_indexes_twice)),
            ("openai", "indexes shifted", reordered(_shifted)),
        ]
    ],
)
def test_a_bad_answer_never_becomes_a_vector(
    pipeline: Pipeline, connection: Connection, server: FaultServer, dialect: str, fault: Fault
) -> None:
    """A server that answered 63 vectors for 64 texts shifted each row's vector to its neighbour;
    NaN from a broken fp16 kernel ended an INSERT of a whole batch, and all-zero vectors were
    stored and then never found by any cosine search."""
    column = make_column(pipeline, connection, server, dialect, rows=400)
    server.rule = sometimes(0.3, fault)

    run = pipeline.run(column, batch_size=16)

    assert run.outcome.total.embedded == 400
    assert run.outcome.retried > 0
    assert run.outcome.requests == server.count.requests
    assert_exact(connection, column)


def test_answers_in_another_order_are_put_right(
    pipeline: Pipeline, connection: Connection, server: FaultServer
) -> None:
    """A proxy that embeds in parallel returned `data` in the order of completion; who zips it with
    the inputs gives every row another row's vector."""
    column = make_column(pipeline, connection, server, rows=400)
    rng = random.Random(3)
    server.rule = lambda number, inputs: reordered(lambda data: rng.sample(data, len(data)))

    run = pipeline.run(column)

    assert run.outcome.total.embedded == 400
    assert run.outcome.retried == 0
    assert_exact(connection, column)


@both_dialects
def test_another_width_in_mid_run_stops_it_before_a_row_is_written(
    pipeline: Pipeline, connection: Connection, server: FaultServer, dialect: str
) -> None:
    """Somebody changed the deployment's `dimensions` during a run; one tool cut the wider vectors
    to the column's width, which nobody could tell from good ones."""
    column = make_column(pipeline, connection, server, dialect, rows=400)
    server.rule = lambda number, inputs: wrong_width(5) if number >= 8 else None

    said, outcome = pipeline.failing_run(column, batch_size=16)

    assert "5 dimensions" in said
    assert "the column has 8" in said
    assert 0 < outcome.total.embedded == embedded(connection, column) <= 8 * 16
    assert outcome.total.quarantined == 0
    server.rule = None
    assert pipeline.run(column).remaining == {}
    assert_exact(connection, column)


@both_dialects
def test_a_key_that_is_revoked_in_mid_run_stops_it_at_once(
    pipeline: Pipeline, connection: Connection, server: FaultServer, dialect: str
) -> None:
    """A key was rotated at 2 a.m.: the script marked the remaining 180,000 rows as failed, one
    request each, and the account was blocked for the morning."""
    column = make_column(pipeline, connection, server, dialect, rows=2000)
    server.rule = lambda number, inputs: (
        Status(401, words=f"Incorrect API key provided: {KEY}") if number >= 40 else None
    )

    said, outcome = pipeline.failing_run(column, batch_size=16, concurrency=4)

    assert "401" in said
    assert "set a valid one" in said
    # stops at once: only what was in flight beside the first refusal
    assert server.count.statuses[401] <= 4
    assert server.count.requests <= 40 + 4
    # what was finished is kept, no row is charged
    assert outcome.total.embedded == embedded(connection, column) == 40 * 16
    assert outcome.total.quarantined == 0
    assert sum(count_by_partition(connection, column).values()) == 2000 - 40 * 16
    server.rule = None
    assert pipeline.run(column).remaining == {}
    assert server.count.tokens == 2000 * TOKENS_A_ROW
    assert_exact(connection, column)


@both_dialects
def test_one_poisoned_text_in_ten_thousand(
    pipeline: Pipeline, connection: Connection, server: FaultServer, dialect: str
) -> None:
    """A nightly backfill stopped for weeks at the one batch with a text that the provider answers
    with 400: neither the 63 rows beside it nor the 6,000 behind it got their vectors."""
    server.info["max_client_batch_size"] = 64
    column = make_column(pipeline, connection, server, dialect, rows=10_000)
    poisoned = "text number 4711"
    server.poison = {poisoned: Status(400, words="this text cannot be embedded")}

    run = pipeline.run(column, batch_size=64)

    total = run.outcome.total
    assert (total.embedded, total.quarantined) == (9_999, 1)
    assert run.remaining == {}
    ideal = math.ceil(10_000 / 64)
    # each halving costs two requests, one for the half that is embedded and one for the other
    assert ideal <= server.count.requests - 2 * math.log2(64) <= ideal + 1
    assert server.count.tokens == 9_999 * TOKENS_A_ROW
    (error,) = connection.execute(
        "SELECT error FROM embedding_pipeline.quarantined_row"
    ).fetchone() or ("",)
    assert "this text cannot be embedded" in error
    assert_exact(connection, column, refused={poisoned})
    # and it is not asked again
    asked = server.count.requests
    assert pipeline.run(column).outcome.requests == 0
    assert server.count.requests == asked


def test_too_many_refusals_stop_the_run(
    pipeline: Pipeline, connection: Connection, server: FaultServer
) -> None:
    """A content filter switched on at the provider refused every third text of the table; the
    run went on, halving its way through 190,000 rows, and left them all in quarantine."""
    column = make_column(pipeline, connection, server, rows=2000)
    poisoned = {f"text number {i}" for i in range(0, 2001, 3)}
    server.poison = {text: Status(400, words="content policy") for text in poisoned}

    said, outcome = pipeline.failing_run(column)

    assert "max_quarantined_share" in said
    assert "content policy" in said
    assert "embedding-pipeline retry docs vector_8" in said
    assert 20 < outcome.total.quarantined < 600
    server.poison = {}
    connection.execute("DELETE FROM embedding_pipeline.quarantined_row")
    assert pipeline.run(column).remaining == {}
    assert_exact(connection, column)


@pytest.mark.parametrize("policy", ["truncate", "quarantine"])
def test_over_long_texts_are_cut_or_put_aside_as_the_yaml_says(
    pipeline: Pipeline, connection: Connection, server: FaultServer, policy: str
) -> None:
    """TEI cuts what is too long and says nothing: a table of contracts was searched for a year by
    their first pages. OpenAI refuses, and one contract stopped the whole run."""
    most = 40
    column = make_column(
        pipeline,
        connection,
        server,
        rows=300,
        endpoint={"max_tokens_per_input": most},
        overlong=policy,
    )
    long = {f"contract {i} " + "word " * (60 + i) for i in range(3)}
    for text in long:
        connection.execute("INSERT INTO docs SELECT max(id) + 1, $1::text, 'a' FROM docs", [text])
    server.rule = lambda number, inputs: (
        Status(400, words=f"maximum context length is {most} tokens, please reduce your prompt")
        if any(tokens_of(text) > most for text in inputs)
        else None
    )

    run = pipeline.run(column)

    total = run.outcome.total
    assert run.remaining == {}
    if policy == "quarantine":
        assert (total.embedded, total.quarantined, total.truncated) == (300, 3, 0)
        assert_exact(connection, column, refused=long)
        return
    assert (total.embedded, total.quarantined, total.truncated) == (303, 0, 3)
    sent = {
        text: next(other for other in server.count.texts if text.startswith(other)) for text in long
    }
    assert all(20 <= tokens_of(shorter) <= most for shorter in sent.values())
    assert_exact(connection, column, sent_as=sent)


# -- another model


def test_a_tei_server_of_another_model_is_refused_before_the_first_row(
    pipeline: Pipeline, connection: Connection, server: FaultServer
) -> None:
    """The container's `MODEL_ID` was changed to another model of the same width. Nothing failed;
    half of the table was then in another space, where the same text has cosine 0.02."""
    column = make_column(pipeline, connection, server, "tei", rows=200)
    server.info["model_id"] = "intfloat/e5-small"

    with pytest.raises(PipelineError, match=r"serves intfloat/e5-small, not test-model"):
        pipeline.run(column)

    assert server.count.requests == 0
    assert embedded(connection, column) == 0
    texts = {f"text number {i}" for i in range(1, 201)}
    assert_exact(connection, column, pending=texts)
    server.info["model_id"] = server.model
    assert pipeline.run(column).remaining == {}
    assert_exact(connection, column)


def test_an_answer_of_another_model_is_refused_before_the_first_row(
    pipeline: Pipeline, connection: Connection, server: FaultServer
) -> None:
    """A gateway with a fallback of its own answered for a model that was down with another one's
    vectors; only the answer's `model` said so."""
    column = make_column(pipeline, connection, server, rows=200)
    server.rule = lambda number, inputs: WrongModel("text-embedding-ada-002")

    said, outcome = pipeline.failing_run(column)

    assert "serves text-embedding-ada-002, not test-model" in said
    assert outcome.total.written == embedded(connection, column) == 0
    texts = {f"text number {i}" for i in range(1, 201)}
    assert_exact(connection, column, pending=texts)
    server.rule = None
    assert pipeline.run(column).remaining == {}
    assert_exact(connection, column)
