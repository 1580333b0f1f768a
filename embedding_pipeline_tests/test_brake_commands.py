"""Pausing from the command line and from the UI, and who honours it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest
from click.testing import CliRunner, Result

from embedding_pipeline.cli import main
from embedding_pipeline.components import names
from embedding_pipeline.components.brake_jobs import pause_embedding, resume_embedding
from embedding_pipeline.embedders import endpoints
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline_tests.components.dagster_project import DagsterProject, checks_of
from embedding_pipeline_tests.faults.server import FaultServer
from embedding_pipeline_tests.project import (
    fresh_settings,
    set_variables,
    use_database,
    write_tables,
)
from embedding_pipeline_tests.tables import create_docs, embedding, spec

pytestmark = pytest.mark.timeout(120)
Connection = psycopg.Connection[Any]


@pytest.fixture
def table(
    connection: Connection,
    database: str,
    server: FaultServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[TableSpec]:
    """Forty pending rows in two columns; the second one's cost a dollar a token."""
    create_docs(connection, 40)
    providers = tmp_path / "providers.yaml"
    entry = f"{{dialect: openai, address: '{server.openai_url}'"
    providers.write_text(
        "providers:\n"
        f"  free: {entry}}}\n"
        f"  paid: {entry}, price_per_million_tokens: {{test-model: 1000000}}}}\n"
    )
    monkeypatch.setattr(endpoints, "PROVIDERS_FILE", providers)
    table = spec(
        embeddings=[
            embedding("first", provider="free", model="test-model"),
            embedding("second", provider="paid", model="test-model", batch_size=4, concurrency=1),
        ]
    )
    with fresh_settings():
        use_database(monkeypatch, database)
        write_tables(tmp_path / "defs", table)
        set_variables(monkeypatch, EMBEDDING_PIPELINE_DEFS=str(tmp_path / "defs"))
        migrate(connection, [table])
        yield table


@pytest.fixture
def project(table: TableSpec, tmp_path: Path) -> DagsterProject:
    return DagsterProject([TableFile(table, tmp_path / "defs/docs/defs.yaml")])


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments])


def states() -> dict[str, dict[str, Any]]:
    done = command("status", "--table", "docs", "--json")
    assert done.exit_code == 0, done.output
    return {row["column"]: row for row in json.loads(done.stdout)}


# ---- the commands -----------------------------------------------------------------------------


@pytest.mark.usefixtures("table")
def test_pause_and_resume_say_who_when_and_why() -> None:
    done = command("pause", "docs", "first", "--by", "anna", "--reason", "the disk is full")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("docs.first: paused since 20")
    assert "by anna: the disk is full" in done.output
    assert "embedding-pipeline resume docs first" in done.output
    assert "(it was already)" in command("pause", "docs", "first").output

    found = states()
    assert found["second"]["paused"] is None
    held = found["first"]["paused"]
    assert (held["by"], held["reason"], held["whole_table"]) == ("anna", "the disk is full", False)
    said = command("status", "--table", "docs").output
    assert "docs.first: paused since" in said
    assert "by anna: the disk is full" in said

    done = command("resume", "docs", "first")
    assert "docs.first: resumed; it was paused since" in done.output
    assert states()["first"]["paused"] is None
    assert command("resume", "docs").output == "docs was not paused\n"


@pytest.mark.usefixtures("table")
def test_the_whole_table_is_paused_by_its_name() -> None:
    done = command("pause", "docs")
    assert "docs: paused since" in done.output
    assert all(row["paused"]["whole_table"] for row in states().values())
    refused = command("resume", "docs", "first")
    assert refused.exit_code == 2
    assert "resume the whole table" in refused.output
    assert command("resume", "docs").exit_code == 0
    assert {row["paused"] for row in states().values()} == {None}


@pytest.mark.usefixtures("table")
def test_a_name_that_does_not_exist_is_told() -> None:
    for arguments in (["pause", "dogs"], ["pause", "docs", "third"], ["resume", "dogs"]):
        done = command(*arguments)
        assert done.exit_code == 2
        assert "there is no" in done.output


@pytest.mark.usefixtures("table")
def test_the_jobs_in_the_ui_do_the_same(project: DagsterProject) -> None:
    def run(job: dg.JobDefinition, op: str, **config: Any) -> dg.ExecuteInProcessResult:
        return job.execute_in_process(
            run_config={"ops": {op: {"config": config}}},
            instance=project.instance,
            raise_on_error=False,
        )

    assert not run(pause_embedding, "pause_table_or_column", table="dogs").success
    done = run(pause_embedding, "pause_table_or_column", table="docs", column="first", reason="x")
    assert done.output_for_node("pause_table_or_column").endswith(
        "by somebody in the Dagster UI: x"
    )
    assert states()["first"]["paused"]["reason"] == "x"
    [note] = [
        event.asset_observation_data.asset_observation
        for event in done.all_events
        if event.event_type_value == "ASSET_OBSERVATION"
    ]
    assert note.asset_key == dg.AssetKey(["docs", "first"])
    assert "paused since" in (note.description or "")

    done = run(resume_embedding, "resume_table_or_column", table="docs")
    assert done.output_for_node("resume_table_or_column") == 1
    assert states()["first"]["paused"] is None


def test_the_definitions_have_the_jobs() -> None:
    from embedding_pipeline.definitions import defs

    for name in ("pause_embedding", "resume_embedding"):
        assert len((defs().get_job_def(name).description or "").split()) > 12


# ---- who honours it ---------------------------------------------------------------------------


def test_the_sensor_leaves_a_paused_column_alone_and_says_why(
    project: DagsterProject, server: FaultServer
) -> None:
    command("pause", "docs", "first", "--by", "anna", "--reason", "the disk is full")
    requests, _ = project.tick("docs_pending")
    assert {key.path[-1] for request in requests for key in request.asset_selection or []} == {
        "second"
    }
    command("pause", "docs", "--by", "anna")
    requests, why = project.tick("docs_pending")
    assert requests == []
    assert "first: the whole table is paused since" in why
    assert "by anna (40 rows pending)" in why
    command("resume", "docs")
    assert project.tick("docs_pending")[0]


def test_a_run_of_a_paused_column_does_nothing_and_alarms_nobody(
    project: DagsterProject, server: FaultServer, connection: Connection
) -> None:
    """Somebody materialises it by hand, or it was asked for just before the pause."""
    requests, _ = project.tick("docs_pending")
    command("pause", "docs", "--by", "anna", "--reason", "the disk is full")
    connection.execute(
        "UPDATE embedding_pipeline.embedding_column SET pending_since = now() - interval '1 day'"
    )
    for request in requests:
        done = project.launch(request)
        assert done.success
        for check in checks_of(done).values():
            assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
            assert "by anna: the disk is full" in (check.description or "")
        for event in done.all_events:
            if event.is_step_materialization:
                figures = event.step_materialization_data.materialization.metadata
                assert figures["held_by"].value == "pause"
                assert "the disk is full" in str(figures["stopped"].value)
    assert server.count.requests == 0

    command("resume", "docs")
    [check] = checks_of(project.launch(nightly_check(project, "first"))).values()
    assert check.severity == dg.AssetCheckSeverity.ERROR, "a day is a day without the pause"


def nightly_check(project: DagsterProject, column: str) -> dg.RunRequest:
    table = project.files[0].spec
    key = names.column_key(table, table.embedding(column))
    return dg.RunRequest(asset_selection=[], asset_check_keys=[dg.AssetCheckKey(key, "coverage")])


def test_a_paused_tables_index_is_left_alone(
    project: DagsterProject, connection: Connection
) -> None:
    table = project.files[0].spec
    project.settle("docs_pending")
    connection.execute(_drop_hnsw(connection))
    request = dg.RunRequest(asset_selection=[names.index_key(table, table.embedding("first"))])
    command("pause", "docs")
    assert project.launch(request).success
    assert _hnsw(connection) == ["second"]
    command("resume", "docs")
    assert project.launch(request).success
    assert _hnsw(connection) == ["first", "second"]


def _hnsw(connection: Connection) -> list[str]:
    rows = connection.execute(
        "SELECT a.attname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid"
        " JOIN pg_am m ON m.oid = c.relam JOIN pg_attribute a ON a.attrelid = i.indrelid"
        " AND a.attnum = i.indkey[0] WHERE m.amname = 'hnsw' ORDER BY 1"
    ).fetchall()
    return [name for (name,) in rows]


def _drop_hnsw(connection: Connection) -> str:
    row = connection.execute(
        "SELECT 'DROP INDEX ' || i.indexrelid::regclass FROM pg_index i"
        " JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam"
        " JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]"
        " WHERE m.amname = 'hnsw' AND a.attname = 'first'"
    ).fetchone()
    assert row is not None
    return str(row[0])


# ---- the daily cost cap -----------------------------------------------------------------------


def test_at_the_cap_the_sensor_stands_still_and_the_free_column_goes_on(
    project: DagsterProject,
    server: FaultServer,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_variables(monkeypatch, EMBEDDING_DAILY_COST_CAP="80")
    results = project.settle("docs_pending")

    assert all(result.success for result in results)
    _, why = project.tick("docs_pending")
    assert "second: the daily cost cap of all providers is reached" in why
    assert "after midnight (UTC)" in why
    assert "rows pending)" in why
    found = states()
    assert found["first"]["pending"] == 0
    assert found["first"]["daily_cost_cap_reached"] is None
    second = found["second"]
    assert 0 < second["cost_usd"] <= 80
    assert second["pending"] == 40 - second["cost_usd"] / 3
    assert second["all_spent_today_usd"] == second["spent_today_usd"] == second["cost_usd"]
    assert second["all_daily_cost_cap_usd"] == 80
    assert second["daily_cost_cap_usd"] is None
    assert "cap of all providers is reached" in second["daily_cost_cap_reached"]
    said = command("status", "--table", "docs").output
    assert f"spent today (UTC): paid ${second['cost_usd']:.4f} (no cap), all providers" in said
    assert " of $80" in said

    # rows that wait for midnight are no alarm
    connection.execute(
        "UPDATE embedding_pipeline.embedding_column SET pending_since = now() - interval '1 day'"
    )
    [check] = checks_of(project.launch(nightly_check(project, "second"))).values()
    assert check.severity == dg.AssetCheckSeverity.WARN
    assert "daily cost cap" in (check.description or "")

    # yesterday's spending
    connection.execute("UPDATE embedding_pipeline.daily_spending SET day = day - 1")
    requests, _ = project.tick("docs_pending")
    assert requests
