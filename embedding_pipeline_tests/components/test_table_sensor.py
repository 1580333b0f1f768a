"""The sensor of one table in Dagster: which runs follow when a column is complete."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest

from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline.store.pauses import pause
from embedding_pipeline_tests.components.dagster_project import DagsterProject, checks_of
from embedding_pipeline_tests.faults.server import FaultServer
from embedding_pipeline_tests.project import fresh_settings, set_variables, use_database
from embedding_pipeline_tests.tables import create_docs, embedding, spec

pytestmark = pytest.mark.timeout(120)
Connection = psycopg.Connection[Any]


@pytest.fixture
def project(
    connection: Connection, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DagsterProject]:
    """One table with two columns, forty pending rows each."""
    table = spec(embeddings=[embedding("embedding_4"), embedding("other_4")])
    with FaultServer(dimensions=4, model="test-model-4") as server, fresh_settings():
        use_database(monkeypatch, database)
        set_variables(monkeypatch, EMBEDDING_SERVICE_URL=server.tei_url)
        create_docs(connection, 40)
        migrate(connection, [table])
        yield DagsterProject([TableFile(table, tmp_path / "defs.yaml")])


def made(run: dg.ExecuteInProcessResult) -> set[str]:
    return {
        event.asset_key.path[-1]
        for event in run.all_events
        if event.is_step_materialization and event.asset_key
    }


def test_when_all_columns_are_complete_they_are_evaluated_together(
    project: DagsterProject,
) -> None:
    *_, last = project.settle(project.sensor("docs"))
    assert last.success
    assert made(last) == {"embedding_4_index", "other_4_index", "retrieval_quality"}
    assert {column for column, _ in checks_of(last)} == {"embedding_4", "other_4"}


def test_a_complete_column_is_checked_while_its_neighbour_is_paused(
    project: DagsterProject, connection: Connection
) -> None:
    """One paused or stopped column kept the table's other columns from ever being looked at."""
    facts = bind_columns(connection, project.files[0].spec)[0].facts
    pause(connection, facts, "other_4", by="anna")
    *embedding_runs, last = project.settle(project.sensor("docs"))
    assert [made(run) for run in embedding_runs] == [{"embedding_4"}]
    assert last.success
    assert made(last) == {"embedding_4_index", "retrieval_quality"}
    said = checks_of(last)
    assert {column for column, _ in said} == {"embedding_4"}
    assert said["embedding_4", "coverage"].passed
    assert said["embedding_4", "vectors_valid"].passed
    assert said["embedding_4", "index_recall"].check_name == "index_recall"
    _, why = project.tick(project.sensor("docs"))
    assert "embedding_4: nothing pending" in why
    assert "other_4: paused since" in why


def test_a_tick_with_nothing_to_do_takes_five_statements_a_column(
    project: DagsterProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten of them made a tick of eight columns 80 ms long, with the same rows 30 ms now."""
    project.settle(project.sensor("docs"))
    statements: list[Any] = []
    execute = psycopg.RawCursor.execute
    ours = threading.get_ident()

    def noted(cursor: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        # what embedded the rows still renews its places, in a thread of its own
        if threading.get_ident() == ours:
            statements.append(query)
        return execute(cursor, query, *arguments, **options)

    monkeypatch.setattr(psycopg.RawCursor, "execute", noted)
    _, why = project.tick(project.sensor("docs"))
    assert why == "embedding_4: nothing pending; other_4: nothing pending"
    # of the table: what is due for evaluation
    assert len(statements) == 5 * 2 + 1, statements
