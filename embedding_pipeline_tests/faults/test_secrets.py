"""No secret in what Dagster keeps. Every other test of this folder ends with such a search too."""

import traceback
from collections.abc import Iterator
from typing import Any

import dagster as dg
import psycopg
import pytest

from embedding_pipeline.components import names
from embedding_pipeline.components.assets import embedding_asset
from embedding_pipeline.settings import load_settings
from embedding_pipeline_tests.faults.runs import KEY, PASSWORD, Pipeline, provider
from embedding_pipeline_tests.faults.server import FaultServer, HalfResponse, Status
from embedding_pipeline_tests.faults.truth import assert_exact
from embedding_pipeline_tests.tables import create_docs, embedding, spec


@pytest.fixture
def settings(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DATABASE_URL", pipeline.url)
    load_settings.cache_clear()
    yield
    load_settings.cache_clear()


@pytest.mark.usefixtures("settings")
def test_no_secret_in_a_runs_events_and_metadata(
    pipeline: Pipeline, connection: "psycopg.Connection[Any]", server: FaultServer
) -> None:
    """OpenAI's 401 quotes the key. It stood in the run's event log, which everybody in the company
    can read, and in the alert that was posted to a channel with guests in it."""
    create_docs(connection, 200)
    pipeline.declare(faulty=provider(server))
    table = spec(
        partitions={"by": "hash", "buckets": 2},
        embeddings=[embedding("vector_8", 8, provider="faulty", model=server.model)],
    )
    column = pipeline.column(table)
    asset = embedding_asset(table, table.embeddings[0])
    server.script(None, Status(500, words=KEY), HalfResponse(), None)
    server.rule = lambda number, inputs: Status(401, words=f"Incorrect API key provided: {KEY}")
    with dg.DagsterInstance.ephemeral() as instance:
        ok = []
        for _ in range(2):
            for partition in names.partitions_definition(table).get_partition_keys():
                result = dg.materialize(
                    [asset],
                    partition_key=partition,
                    instance=instance,
                    run_config={"ops": {asset.op.name: {"config": {"batch_size": 16}}}},
                    raise_on_error=False,
                )
                ok.append(result.success)
                events = instance.all_logs(result.run_id)
                assert events
                pipeline.shown += [dg.serialize_value(event) for event in events]
            server.rule = None
        connection.execute("INSERT INTO docs (id, body) VALUES (201, 'poison')")
        server.poison = {"poison": Status(400, words=f"{KEY} may not send this")}
    assert ok == [False, False, True, True]
    pipeline.run(column)

    everything = "\n".join(pipeline.shown)
    assert "Incorrect API key provided" in everything
    assert "[key]" in everything
    assert KEY not in everything
    assert PASSWORD not in everything
    assert_exact(connection, column, refused={"poison"})


def test_a_database_that_cannot_be_reached_is_named_without_its_password(
    pipeline: Pipeline, server: FaultServer, connection: "psycopg.Connection[Any]"
) -> None:
    """libpq's message went into the alert together with the address that it was asked to reach."""
    create_docs(connection, 10)
    pipeline.declare(faulty=provider(server))
    column = pipeline.column(
        spec(embeddings=[embedding("vector_8", 8, provider="faulty", model=server.model)])
    )
    nowhere = Pipeline(
        f"postgresql://somebody:{PASSWORD}@127.0.0.1:1/nowhere", pipeline.providers_file
    )
    with pytest.raises(Exception, match="cannot connect to Postgres") as caught:
        nowhere.run(column)
    shown = "".join(traceback.format_exception(caught.value))
    assert "somebody" in shown or "127.0.0.1" in shown
    assert PASSWORD not in shown
    pipeline.run(column)
    assert_exact(connection, column)
