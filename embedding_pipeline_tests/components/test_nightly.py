"""The nightly schedule and the sensor that sees its nights through, with real runs."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest

from embedding_pipeline.components import names
from embedding_pipeline.components import nightly as subject
from embedding_pipeline.components.nightly import NIGHT_TAG, ROUND_TAG, nightly_definitions
from embedding_pipeline.errors import SettingsError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.lease import Lease
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline.store.pauses import pause
from embedding_pipeline_tests.components.dagster_project import DagsterProject, checks_of
from embedding_pipeline_tests.faults.server import FaultServer, Status
from embedding_pipeline_tests.project import fresh_settings, set_variables, use_database
from embedding_pipeline_tests.tables import create_docs, embedding, spec

pytestmark = pytest.mark.timeout(120)
Connection = psycopg.Connection[Any]
TWO = datetime(2026, 3, 2, 2, 0, tzinfo=UTC)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, database: str) -> Iterator[FaultServer]:
    """The `tei` provider, and the follow-up sensor without its patience."""
    with FaultServer(dimensions=4, model="test-model-4") as server, fresh_settings():
        use_database(monkeypatch, database)
        set_variables(monkeypatch, EMBEDDING_SERVICE_URL=server.tei_url)
        monkeypatch.setattr(subject, "LAUNCHING_SECONDS", 0.0)
        yield server


def make_project(connection: Connection, folder: Path, *tables: TableSpec) -> DagsterProject:
    for table in tables:
        create_docs(connection, 40, table=table.table)
    migrate(connection, list(tables))
    files = [TableFile(table, folder / table.table / "defs.yaml") for table in tables]
    return DagsterProject(files, nightly_definitions(tables))


@pytest.fixture
def project(connection: Connection, server: FaultServer, tmp_path: Path) -> DagsterProject:
    """Two tables, forty pending rows each."""
    return make_project(connection, tmp_path, spec("docs"), spec("notes"))


def what(request: dg.RunRequest) -> tuple[str, str]:
    return request.tags[names.TABLE_TAG], request.tags[ROUND_TAG]


def follow(project: DagsterProject) -> list[dg.RunRequest]:
    return project.tick(subject.FOLLOW_UP)[0]


def night(project: DagsterProject, at: datetime = TWO) -> list[dg.ExecuteInProcessResult]:
    """A whole night: every run that schedule and sensor ask for."""
    requests, _ = project.start_schedule("nightly", at)
    return [project.launch(request) for request in requests] + project.settle(subject.FOLLOW_UP)


def pending(connection: Connection, table: str) -> int:
    row = connection.execute(
        f"SELECT count(*) FROM {table} WHERE embedding_4 IS NULL".encode()
    ).fetchone()
    assert row is not None
    return int(row[0])


def test_a_night_embeds_what_is_pending_then_builds_indexes_evaluates_and_checks(
    project: DagsterProject, connection: Connection
) -> None:
    requests, _ = project.start_schedule("nightly", TWO)
    assert [what(request) for request in requests] == [
        ("docs", "embedding 1"),
        ("notes", "embedding 1"),
    ]
    assert {request.tags[NIGHT_TAG] for request in requests} == {"2026-03-02T02:00+00:00"}
    assert all(project.launch(request).success for request in requests)
    assert (pending(connection, "docs"), pending(connection, "notes")) == (0, 0)

    closing = follow(project)
    assert [what(request) for request in closing] == [("docs", "checks"), ("notes", "checks")]
    for request in closing:
        done = project.launch(request)
        assert done.success
        made = {
            event.asset_key.path[-1]
            for event in done.all_events
            if event.is_step_materialization and event.asset_key
        }
        assert made == {"embedding_4_index", "retrieval_quality"}
        said = checks_of(done)
        assert {check for _, check in said} == {
            "coverage",
            "golden_mrr",
            "vectors_valid",
            "index_recall",
        }
        assert said["embedding_4", "coverage"].passed
        assert said["embedding_4", "coverage"].metadata["rows_estimated"].value is False
    requests, why = project.tick(subject.FOLLOW_UP)
    assert (requests, why) == ([], "no night is open")


def test_a_night_with_nothing_pending_is_one_run_a_table(project: DagsterProject) -> None:
    night(project)
    requests, _ = project.start_schedule("nightly", TWO.replace(day=3))
    assert [what(request) for request in requests] == [("docs", "checks"), ("notes", "checks")]
    assert project.tick(subject.FOLLOW_UP) == ([], "no night is open")


def test_what_is_too_much_for_one_run_gets_further_rounds(
    connection: Connection, server: FaultServer, tmp_path: Path
) -> None:
    project = make_project(connection, tmp_path, spec("docs", rows_per_run=6))
    results = night(project)
    assert all(result.success for result in results)
    assert pending(connection, "docs") == 0
    rounds = {result.dagster_run.tags[ROUND_TAG] for result in results}
    assert rounds == {"embedding 1", "embedding 2", "checks"}


def test_one_tables_failure_stops_neither_the_others_nor_its_own_checks(
    project: DagsterProject, connection: Connection, server: FaultServer
) -> None:
    connection.execute("UPDATE docs SET body = 'refused ' || id")
    server.rule = lambda _, texts: (
        Status(401, words="bad key") if texts[0].startswith("refused") else None
    )

    results = night(project)

    ended = {
        (run.dagster_run.tags[names.TABLE_TAG], run.dagster_run.tags[ROUND_TAG]): run.success
        for run in results
    }
    assert ended == {
        ("docs", "embedding 1"): False,
        ("notes", "embedding 1"): True,
        ("docs", "checks"): True,
        ("notes", "checks"): True,
    }
    assert (pending(connection, "docs"), pending(connection, "notes")) == (40, 0)


def test_a_table_that_is_gone_stops_no_other(
    project: DagsterProject, connection: Connection
) -> None:
    connection.execute("ALTER TABLE docs RENAME TO dogs")
    results = night(project)
    ended = {
        (run.dagster_run.tags[names.TABLE_TAG], run.dagster_run.tags[ROUND_TAG]): run.success
        for run in results
    }
    assert ended == {
        ("docs", "checks"): False,  # which is what tells somebody
        ("notes", "embedding 1"): True,
        ("notes", "checks"): True,
    }


def test_a_paused_table_has_no_night(project: DagsterProject, connection: Connection) -> None:
    facts = bind_columns(connection, project.files[0].spec)[0].facts
    pause(connection, facts, None, by="anna", reason="their migration")
    requests, _ = project.start_schedule("nightly", TWO)
    assert [what(request) for request in requests] == [("notes", "embedding 1")]
    assert (
        connection.execute("SELECT outcome FROM embedding_pipeline.night WHERE asset_name = 'docs'")
        .fetchall()[0][0]
        .endswith("by anna: their migration")
    )
    pause(connection, bind_columns(connection, project.files[1].spec)[0].facts, None, by="anna")
    requests, why = project.start_schedule("nightly", TWO.replace(day=3))
    assert requests == []
    assert "docs: left alone: the whole table is paused since" in why


def test_rows_that_another_run_holds_are_waited_for(
    project: DagsterProject, database: str, connection: Connection
) -> None:
    column = bind_columns(connection, project.files[0].spec)[0]
    with Lease(database, column, ["(null)", "a", "b", "c"], "the sensor's run") as lease:
        lease.acquire()
        requests, _ = project.start_schedule("nightly", TWO)
        assert [what(request) for request in requests] == [("notes", "embedding 1")]
        requests, _ = project.tick(subject.FOLLOW_UP)
        assert "docs" not in {request.tags[names.TABLE_TAG] for request in requests}
    assert ("docs", "embedding 1") in map(what, follow(project))


def test_a_run_that_comes_second_by_a_hair_is_no_failure(
    project: DagsterProject, database: str, connection: Connection, server: FaultServer
) -> None:
    """Schedule and sensor look in the same second: the lease lets one of their runs through."""
    requests, _ = project.start_schedule("nightly", TWO)
    column = bind_columns(connection, project.files[0].spec)[0]
    with Lease(database, column, ["(null)", "a", "b", "c"], "the sensor's run") as lease:
        lease.acquire()
        done = project.launch(requests[0])
    assert done.success
    assert server.count.requests == 0
    [check] = checks_of(done).values()
    assert check.severity == dg.AssetCheckSeverity.WARN


def test_the_sensor_leaves_a_night_to_the_schedule_while_it_begins(
    project: DagsterProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subject, "LAUNCHING_SECONDS", 120.0)
    project.start_schedule("nightly", TWO)
    requests, why = project.tick(subject.FOLLOW_UP)
    assert requests == []
    assert "docs: the schedule is about to begin" in why
    monkeypatch.setattr(subject, "LAUNCHING_SECONDS", 0.0)
    assert len(follow(project)) == 2, "a schedule that died in between is stood in for"


def test_asked_for_twice_a_run_has_one_key(project: DagsterProject) -> None:
    """Dagster launches a run key once."""
    first, _ = project.start_schedule("nightly", TWO)
    again, _ = project.start_schedule("nightly", TWO)
    later, _ = project.start_schedule("nightly", TWO.replace(day=3))
    assert [request.run_key for request in first] == [request.run_key for request in again]
    assert not {request.run_key for request in first} & {request.run_key for request in later}


# ---- when -------------------------------------------------------------------------------------


def listed(description: str | None) -> set[str]:
    """The tables that a schedule's description says it is for."""
    found = re.search(r", for ([^:]+):", description or "")
    assert found is not None, description
    return set(found[1].split(", "))


def schedules(*tables: TableSpec) -> dict[str, tuple[str, str | None, set[str]]]:
    """Name → cron, time zone, tables."""
    found = nightly_definitions(tables)
    return {
        schedule.name: (
            str(schedule.cron_schedule),
            schedule.execution_timezone,
            listed(schedule.description),
        )
        for schedule in found.schedules or []
        if isinstance(schedule, dg.ScheduleDefinition)
    }


def test_hour_and_time_zone_are_settings_which_a_table_overrides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fresh_settings():
        set_variables(monkeypatch, NIGHTLY_AT="01:15", NIGHTLY_TIMEZONE="Europe/Madrid")
        found = schedules(
            spec("one"),
            spec("two", nightly={"at": "03:30"}),
            spec("three", nightly={"timezone": "America/Argentina/Buenos_Aires"}),
            spec("four", nightly=False),
            spec("five", nightly={"at": "01:15", "timezone": "Europe/Madrid"}),
        )
    assert found == {
        "nightly": ("15 1 * * *", "Europe/Madrid", {"one", "five"}),
        "nightly_0330_Europe_Madrid": ("30 3 * * *", "Europe/Madrid", {"two"}),
        "nightly_0115_America_Argentina_Buenos_Aires": (
            "15 1 * * *",
            "America/Argentina/Buenos_Aires",
            {"three"},
        ),
    }


def test_without_any_night_there_is_no_schedule_and_no_sensor() -> None:
    with fresh_settings():
        found = nightly_definitions([spec(nightly=False)])
    assert not found.schedules
    assert not found.sensors


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"NIGHTLY_TIMEZONE": "Mars/Olympus"}, "NIGHTLY_TIMEZONE: 'Mars/Olympus' is no time zone"),
        ({"NIGHTLY_AT": "25:00"}, "NIGHTLY_AT: must be a time of day"),
    ],
)
def test_a_wrong_hour_or_zone_is_told_at_the_start(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    with fresh_settings():
        set_variables(monkeypatch, **variables)
        with pytest.raises(SettingsError, match=said):
            nightly_definitions([spec()])


@pytest.mark.parametrize("switch", ["on", ""])
def test_it_starts_by_itself_only_where_the_sensors_do(
    monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv("EMBEDDING_PIPELINE_SENSORS", switch)
    with fresh_settings():
        found = nightly_definitions([spec()])
        load_settings()
    [schedule], [sensor] = list(found.schedules or []), list(found.sensors or [])
    assert isinstance(schedule, dg.ScheduleDefinition)
    assert (schedule.default_status is dg.DefaultScheduleStatus.RUNNING) == bool(switch)
    assert (sensor.default_status is dg.DefaultSensorStatus.RUNNING) == bool(switch)


def test_the_shipped_tables_have_their_night() -> None:
    from embedding_pipeline.definitions import defs

    # tables with different partitions, as a code server loads them
    dg.Definitions.validate_loadable(defs())
    repository = defs().get_repository_def()
    tables = listed(repository.get_schedule_def("nightly").description)
    assert tables == {"bora_docs", "knowledge_chunks", "lexicon", "phrases"}
    assert repository.has_sensor_def(subject.FOLLOW_UP)


def test_embedding_columns_of_a_table_share_a_run_where_they_have_few_rows(
    connection: Connection, server: FaultServer, tmp_path: Path
) -> None:
    table = spec("docs", embeddings=[embedding(), embedding("again", 4, model="test-model-4")])
    project = make_project(connection, tmp_path, table)
    requests, _ = project.start_schedule("nightly", TWO)
    assert len(requests) == 1
    assert len(requests[0].asset_selection or []) == 2


def test_a_run_that_somebody_cancels_is_not_asked_for_again(project: DagsterProject) -> None:
    requests, _ = project.start_schedule("nightly", TWO)
    run = project.instance.create_run_for_job(project.job, tags=dict(requests[0].tags))
    assert ("docs", "embedding 1") not in map(what, follow(project)), "it is under way"
    project.instance.report_run_canceled(run)
    assert ("docs", "checks") in map(what, follow(project))
