"""What runs cost: counted from the provider's answers, summed by `status`, capped by the YAML."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from embedding_pipeline.backfill import Options
from embedding_pipeline.cli import main
from embedding_pipeline.components.assets import EmbedConfig
from embedding_pipeline.embed_column import embed_column
from embedding_pipeline.embedders import endpoints
from embedding_pipeline.spec import EmbeddingSpec, TableSpec
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline_tests.faults.server import FaultServer
from embedding_pipeline_tests.project import (
    fresh_settings,
    set_variables,
    use_database,
    write_tables,
)
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]
NINE = [
    "table",
    "column",
    "model",
    "dimensions",
    "rows",
    "embedded",
    "pending",
    "quarantined",
    "ineligible",
]
PROVIDERS = """
providers:
  paid:
    dialect: openai
    address: {address}
    max_inputs: 4
    price_per_million_tokens: {{test-model: 1000000}}
"""


@pytest.fixture
def table(
    connection: Connection,
    database: str,
    server: FaultServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[TableSpec]:
    """Forty pending rows of three tokens each, at one dollar a token and three dollars a run."""
    create_docs(connection, 40)
    column = embedding(provider="paid", model="test-model", max_cost=60, batch_size=4)
    table = spec(embeddings=[column])
    providers = tmp_path / "providers.yaml"
    providers.write_text(PROVIDERS.format(address=server.openai_url))

    monkeypatch.setattr(endpoints, "PROVIDERS_FILE", providers)
    with fresh_settings():
        use_database(monkeypatch, database)
        write_tables(tmp_path / "defs", table)
        set_variables(monkeypatch, EMBEDDING_PIPELINE_DEFS=str(tmp_path / "defs"))
        migrate(connection, [table])
        yield table


def config(**values: Any) -> EmbedConfig:
    return EmbedConfig.model_validate(values)


def status(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["status", "--table", "docs", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_status_sums_what_every_run_used(
    database: str, connection: Connection, table: TableSpec, server: FaultServer
) -> None:
    [row] = json.loads(status("--json"))
    assert list(row)[:9] == NINE
    assert (row["tokens"], row["cost_usd"], row["last_run_at"]) == (0, 0, None)

    column = bind_columns(connection, table)[0]
    for _ in range(2):
        options = config().options(table, column.embedding)
        run = embed_column(database, column, ["a", "b", "c", "(null)"], options)
        assert run.outcome.stopped == "max_cost of $60 would be passed"
        assert 40 < run.outcome.cost <= 60

    [row] = json.loads(status("--json"))
    assert list(row)[:9] == NINE
    assert row["tokens"] == server.count.tokens == 3 * row["embedded"]
    assert row["cost_usd"] == server.count.tokens
    ended = datetime.fromisoformat(row["last_run_at"])
    assert timedelta(0) <= datetime.now(UTC) - ended < timedelta(minutes=5)
    assert f"${row['cost_usd']:.4f}" in status()


def test_what_a_run_is_given_wins_over_the_yaml() -> None:
    column = EmbeddingSpec.model_validate(embedding(max_cost=3))
    table = spec(embeddings=[column.model_dump()])
    assert config().options(table, column).max_cost == 3
    assert config(max_cost=5).options(table, column).max_cost == 5
    unlimited = EmbeddingSpec.model_validate(embedding())
    assert config().options(table, unlimited).max_cost is None


def test_a_cap_that_no_row_fits_in_spends_nothing(
    database: str, connection: Connection, table: TableSpec, server: FaultServer
) -> None:
    column = bind_columns(connection, table)[0]
    run = embed_column(database, column, ["a"], Options(max_cost=1.0))
    assert (run.outcome.cost, server.count.requests) == (0, 0)
    assert run.remaining == {"a": 10}
