"""What the commands that embed say they did: rows, tokens and dollars, failed runs included."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from rich.console import Console

from embedding_pipeline import main_job
from embedding_pipeline.cli.embedding import _closing_table, _not_as_they_are
from embedding_pipeline.embedders import endpoints
from embedding_pipeline.main_job import ColumnResult
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline_tests.components.dagster_project import DagsterProject
from embedding_pipeline_tests.faults.server import FaultServer, Status
from embedding_pipeline_tests.faults.truth import embedded
from embedding_pipeline_tests.project import fresh_settings, use_database
from embedding_pipeline_tests.tables import create_docs, embedding, spec

Connection = psycopg.Connection[Any]
ROWS, BATCH = 40, 4
DOLLARS_A_TOKEN = 0.25
MOST_TOKENS = 40


@pytest.fixture
def project(
    connection: Connection,
    database: str,
    server: FaultServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[DagsterProject]:
    """Forty pending rows in four partitions, one batch of four in flight."""
    create_docs(connection, ROWS)
    providers = tmp_path / "providers.yaml"
    providers.write_text(
        f"providers:\n  paid: {{dialect: openai, address: '{server.openai_url}',"
        f" max_tokens_per_input: {MOST_TOKENS},"
        f" price_per_million_tokens: {{test-model: {DOLLARS_A_TOKEN * 1_000_000}}}}}\n"
    )
    monkeypatch.setattr(endpoints, "PROVIDERS_FILE", providers)
    column = embedding(provider="paid", model="test-model", batch_size=BATCH, concurrency=1)
    table = spec(embeddings=[column])
    with fresh_settings():
        use_database(monkeypatch, database)
        migrate(connection, [table])
        yield DagsterProject([TableFile(table, tmp_path / "defs.yaml")])


def embed(project: DagsterProject, connection: Connection) -> ColumnResult:
    table = project.files[0].spec
    result = ColumnResult("docs", table.embeddings[0].column)
    [column] = bind_columns(connection, table)
    main_job.embed_pending(project.instance, project.job, column, {}, result, lambda _: None)
    return result


def closing_row(project: DagsterProject, result: ColumnResult) -> list[str]:
    """The cells of the column's line in the closing table."""
    out = io.StringIO()
    console = Console(file=out, width=240, markup=False, highlight=False)
    _closing_table(console, project.files, {(result.table, result.column): result})
    [line] = [line for line in out.getvalue().splitlines() if "docs.embedding_4" in line]
    return [cell.strip() for cell in line.strip("│ ").split("│")]


def test_the_closing_table_has_the_providers_tokens_and_what_they_cost(
    project: DagsterProject, connection: Connection, server: FaultServer
) -> None:
    result = embed(project, connection)

    tokens = server.count.tokens
    assert tokens == 3 * ROWS
    assert (result.embedded, result.tokens) == (ROWS, tokens)
    assert result.cost == tokens * DOLLARS_A_TOKEN
    assert closing_row(project, result)[:7] == [
        "docs.embedding_4", "40", "40", "0", "0", "120", "$30.0000",
    ]  # fmt: skip


def test_a_run_that_fails_says_what_it_wrote_and_what_that_cost(
    project: DagsterProject, connection: Connection, server: FaultServer
) -> None:
    """The key was revoked in mid-run: "0 rows written, 0 tokens, $0.0000", and an invoice."""
    server.rule = lambda number, inputs: Status(401) if number >= 6 else None

    result = embed(project, connection)

    written = embedded(connection, bind_columns(connection, project.files[0].spec)[0])
    assert written == 6 * BATCH
    assert [("401" in error, "stopped in partition" in error) for error in result.errors] == [
        (True, True)
    ]
    assert (result.embedded, result.tokens) == (written, 3 * written)
    assert result.cost == 3 * written * DOLLARS_A_TOKEN
    assert result.seconds > 0
    assert closing_row(project, result)[:7] == [
        "docs.embedding_4", "40", "24", "16", "0", "72", "$18.0000",
    ]  # fmt: skip
    server.rule = None
    again = embed(project, connection)
    assert (again.embedded, again.errors) == (ROWS - written, [])


@pytest.mark.parametrize("then", [None, Status(401)], ids=["the run succeeds", "the run fails"])
def test_rows_that_were_refused_or_cut_are_told(
    project: DagsterProject, connection: Connection, server: FaultServer, then: Status | None
) -> None:
    """A backfill said "38 rows written" and ended with 0; who counts 40 to the end?"""
    connection.execute("UPDATE docs SET body = repeat('word ', 60) WHERE id = 4")
    server.poison = {text: Status(400) for text in ("text number 8", "text number 12")}
    # of the first partition's ten rows all are known by then
    server.rule = lambda number, inputs: then if "text number 1" in inputs else None

    result = embed(project, connection)

    assert bool(result.errors) == (then is not None)
    assert (result.quarantined, result.truncated) == (2, 1)
    told = "\n".join(_not_as_they_are(result))
    assert "2 rows were refused" in told
    assert "embedding-pipeline retry docs embedding_4 --list" in told
    assert "1 texts were longer" in told
    assert _not_as_they_are(ColumnResult("docs", "embedding_4", embedded=40)) == []
