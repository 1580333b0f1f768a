"""A run that is killed at any moment repeats what was in flight, and nothing else."""

import random
import time
from typing import Any

import psycopg
import pytest

from embedding_pipeline.store import lease
from embedding_pipeline_tests.faults.runs import Pipeline, provider
from embedding_pipeline_tests.faults.server import FaultServer
from embedding_pipeline_tests.faults.truth import assert_exact, embedded
from embedding_pipeline_tests.sessions import wait_until
from embedding_pipeline_tests.tables import create_docs, embedding, spec

ROWS, BATCH, CONCURRENCY, KILLS = 5_000, 16, 4, 20
LAPSE_SECONDS = 0.5


@pytest.mark.slow
def test_twenty_kills_in_a_backfill_of_5000_rows(
    pipeline: Pipeline,
    connection: "psycopg.Connection[Any]",
    server: FaultServer,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Any,
) -> None:
    """Spot instances: a run was killed every few minutes. One tool began again at the top each
    time and was never done; another, which notes its position before it writes, lost the rows in
    between; measured with a third, a kill costs 1.5 to 2 times the whole table again."""
    create_docs(connection, ROWS)
    pipeline.declare(faulty=provider(server))
    column = pipeline.column(
        spec(embeddings=[embedding("vector_8", 8, provider="faulty", model=server.model)])
    )
    monkeypatch.setattr(lease, "LAPSE_SECONDS", LAPSE_SECONDS)
    server.delay = 0.1
    rng = random.Random(11)
    kills = 0
    repeated: list[int] = []
    while kills < KILLS:
        run = pipeline.start(
            column, heartbeat=0.1, lapse=LAPSE_SECONDS, batch_size=BATCH, concurrency=CONCURRENCY
        )
        enough = server.count.inputs + rng.randrange(300)
        wait_until(
            lambda run=run, enough=enough: server.count.inputs >= enough or not run.is_running,  # type: ignore[misc]
            "the run to get on",
        )
        time.sleep(rng.uniform(0, 0.05))  # not waiting for anything: any moment will do
        kills += run.kill()
        # what was sent and not yet written will be sent again, nothing else
        not_written = server.count.inputs - sum(repeated) - embedded(connection, column)
        repeated.append(not_written)
        assert server.count.inputs < ROWS, "the backfill ended before it was killed often enough"

    last = pipeline.start(column, lapse=2.0, batch_size=BATCH, concurrency=CONCURRENCY).result()

    assert last.error is None, last.said
    record_property("inputs", server.count.inputs)
    record_property("repeated", str(repeated))
    assert server.count.inputs == ROWS + sum(repeated)
    # a batch is in flight from its sending until its rows are in the table
    in_flight = CONCURRENCY * BATCH
    assert max(repeated) <= in_flight, repeated
    assert server.count.inputs <= ROWS + in_flight * KILLS
    assert sum(repeated) > 0, "no kill found anything in flight: nothing was tested"
    assert_exact(connection, column)
    asked = server.count.requests
    assert pipeline.run(column).outcome.total.read == 0
    assert server.count.requests == asked
