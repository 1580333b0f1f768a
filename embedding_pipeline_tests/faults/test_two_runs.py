"""Two runs of one partition never pay twice."""

from typing import Any

import psycopg

from embedding_pipeline_tests.faults.runs import Pipeline, provider
from embedding_pipeline_tests.faults.server import FaultServer
from embedding_pipeline_tests.faults.truth import assert_exact
from embedding_pipeline_tests.sessions import wait_until
from embedding_pipeline_tests.tables import create_docs, embedding, spec

ROWS = 640


def test_of_three_runs_at_once_one_works_and_the_others_say_who(
    pipeline: Pipeline, connection: "psycopg.Connection[Any]", server: FaultServer
) -> None:
    """A schedule and an impatient colleague started the same backfill: both read the same pending
    rows, and the table was paid for twice."""
    create_docs(connection, ROWS)
    pipeline.declare(faulty=provider(server))
    column = pipeline.column(
        spec(
            partitions={"by": "hash", "buckets": 1},
            embeddings=[embedding("vector_8", 8, provider="faulty", model=server.model)],
        )
    )
    server.delay = 0.5  # until the others have given way
    runs = [pipeline.start(column, lapse=20.0, batch_size=16, concurrency=2) for _ in range(3)]
    wait_until(lambda: sum(run.is_running for run in runs) == 1, "two of three to give way")
    server.delay = 0.0

    ended = [run.result() for run in runs]

    (winner,) = (run for run, end in zip(runs, ended, strict=True) if end.error is None)
    said = [end.said for end in ended if end.error is not None]
    assert [end.error for end in ended].count("LeaseError") == 2
    for words in said:
        [error] = [line for line in words.splitlines() if "errors.LeaseError: " in line]
        assert f":{winner.process.pid}:" in error
        assert "That run goes on; this one has nothing to do" in error
    assert server.count.inputs == ROWS
    assert set(server.count.texts.values()) == {1}
    assert sum(end.counts.get("embedded", 0) for end in ended) == ROWS
    assert_exact(connection, column)
