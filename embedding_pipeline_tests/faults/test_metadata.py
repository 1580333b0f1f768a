"""What a run with faults leaves in Dagster: every row, token and dollar of it is accounted for."""

from typing import Any

import dagster as dg
import psycopg
import pytest

from embedding_pipeline.components import names
from embedding_pipeline.components.assets import embedding_asset
from embedding_pipeline.store.partitions import key_from_database
from embedding_pipeline_tests.faults.runs import Pipeline, provider
from embedding_pipeline_tests.faults.server import FaultServer, Status
from embedding_pipeline_tests.faults.truth import assert_exact
from embedding_pipeline_tests.project import fresh_settings, use_database
from embedding_pipeline_tests.tables import create_docs, embedding, spec

ROWS, MOST_TOKENS = 40, 40
POISONED = {"text number 3", "text number 6"}
LONG = "contract " + "word " * 60
PARTITIONS = ["a", "b", "c", None]


def test_a_materialisation_counts_what_became_of_every_row(
    pipeline: Pipeline,
    connection: "psycopg.Connection[Any]",
    server: FaultServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run said "success, 40 rows". Two of them had been refused, one had lost the second half of
    its text, and what it had cost stood on the invoice at the end of the month."""
    create_docs(connection, ROWS)
    connection.execute(
        "INSERT INTO docs (id, body, tenant) VALUES (41, $1, 'a'), (42, 'text number 4', 'b'),"
        " (43, '  ', 'c')",
        [LONG],
    )
    pipeline.declare(
        faulty=provider(
            server,
            max_tokens_per_input=MOST_TOKENS,
            price_per_million_tokens={server.model: 250_000},
        )
    )
    table = spec(embeddings=[embedding("vector_8", 8, provider="faulty", model=server.model)])
    column = pipeline.column(table)
    # a row that had a vector and has no text any more
    connection.execute(
        "UPDATE docs SET vector_8 = '[1,0,0,0,0,0,0,0]', vector_8_fingerprint ="
        " '00000000-0000-0000-0000-000000000001' WHERE id = 43"
    )
    server.script(Status(429), Status(500))
    server.poison = {text: Status(400, words="not this one") for text in POISONED}

    with (
        fresh_settings(),
        dg.DagsterInstance.ephemeral() as instance,
    ):
        use_database(monkeypatch, pipeline.url)
        partitions = [key_from_database(table, each) for each in PARTITIONS]
        names.add_partitions(instance, table, partitions)
        order = names.known_partitions(instance, table)
        result = dg.materialize(
            [embedding_asset(table, table.embeddings[0])],
            instance=instance,
            tags=names.range_tags(order[0], order[-1]),
        )
        pipeline.shown += [dg.serialize_value(each) for each in instance.all_logs(result.run_id)]
    figures = {
        event.partition: {
            name: value.value
            for name, value in event.step_materialization_data.materialization.metadata.items()
        }
        for event in result.get_asset_materialization_events()
    }

    assert figures.keys() == set(partitions)

    def by_partition(name: str) -> list[Any]:
        return [figures[partition][name] for partition in partitions]

    # `create_docs` gives each ten; 3 and 6 are in the last two, 41 to 43 in the first three
    assert by_partition("embedded") == [11, 10, 9, 9]
    assert by_partition("quarantined") == [0, 0, 1, 1]
    assert by_partition("truncated") == [1, 0, 0, 0]
    assert by_partition("cleared") == [0, 0, 1, 0]
    assert by_partition("reused") == [0, 1, 0, 0]
    for name in ("superseded", "locked", "remaining"):
        assert by_partition(name) == [0, 0, 0, 0], name
    assert sum(by_partition("tokens")) == pytest.approx(server.count.tokens, abs=2)
    assert sum(by_partition("cost_usd")) == pytest.approx(server.count.tokens / 4)
    assert sum(by_partition("forecast_usd")) > 0
    for each in figures.values():
        assert each["run_tokens"] == server.count.tokens > 0
        assert each["run_cost_usd"] == server.count.tokens / 4
        assert each["run_requests"] == server.count.requests
        assert each["run_throttled"] == 1
        assert each["run_retried"] == 2
        assert each["pending"] == 0
    said = "\n".join(pipeline.shown)
    assert "1 were cut to what the model takes" in said
    assert "2 were refused and are quarantined" in said
    (cut,) = (text for text in server.count.texts if text.startswith("contract"))
    assert_exact(connection, column, refused=POISONED, sent_as={LONG: cut})
