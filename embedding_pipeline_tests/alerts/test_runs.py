"""Runs that fail, that are killed, and that heal before anybody needs to know."""

import uuid

import dagster as dg

from embedding_pipeline.components import names
from embedding_pipeline_tests.alerts.world import World
from embedding_pipeline_tests.faults.server import FaultServer, Status

KILLED = "run docs: embedding_4"


def start_and_kill(world: World) -> str:
    """A run that holds its lease and was killed a minute ago; Dagster shows it as started."""
    job = world.definitions.get_implicit_global_asset_job_def()
    run = world.instance.create_run_for_job(
        job.get_subset(asset_selection={world.key}),
        asset_selection=frozenset({world.key}),
        tags={
            names.TABLE_TAG: "docs",
            names.COLUMN_TAG: "embedding_4",
            **names.range_tags("a", "a"),
        },
        status=dg.DagsterRunStatus.STARTED,
    )
    world.sql(
        "UPDATE embedding_pipeline.lease SET run_id = $1, holder = $2, released_at = NULL,"
        " heartbeat_at = now() - interval '1 min' WHERE partition_key = 'a'",
        run.run_id,
        uuid.uuid4().hex,
    )
    return run.run_id


def test_a_killed_run_is_told_once_and_recovers_with_the_next_one(world: World) -> None:
    """Dagster itself would show it as started for ever; the table's sensor fails it."""
    world.sql("UPDATE docs SET body = 'edited ' || id WHERE tenant = 'a'")
    run = start_and_kill(world)
    assert world.tick() == [], "nobody has noticed yet"
    world.table_sensor()
    status = world.instance.get_run_by_id(run)
    assert status is not None
    assert status.status is dg.DagsterRunStatus.FAILURE

    [alert] = world.tick()
    assert alert.title == f"[ALERT] {KILLED}"
    assert "died" in alert.body
    assert alert.line("table") == "docs"
    assert alert.line("column") == "embedding_4"
    assert "its lease lapsed" in alert.body
    assert alert.line("link") == f"http://dagster.example:3000/runs/{run}"
    assert world.tick(3) == []

    world.back_off_is_over()
    assert world.embed().success
    [recovery] = world.tick()
    assert recovery.title == f"[RECOVERED] {KILLED}"
    assert world.tick(3) == [], "the run that died is not told again"


def test_a_killed_run_is_told_although_the_next_one_was_quicker_than_the_alert(
    world: World,
) -> None:
    """Something kills processes: that is news even when its work was taken over."""
    world.sql("UPDATE docs SET body = 'edited ' || id WHERE tenant = 'a'")
    start_and_kill(world)
    world.table_sensor()
    world.back_off_is_over()
    assert world.embed().success

    assert [message.title for message in world.tick(2)] == [
        f"[ALERT] {KILLED}",
        f"[RECOVERED] {KILLED}",
    ]
    assert world.tick(3) == []


def test_what_noticed_a_killed_run_says_how_it_was_killed(world: World) -> None:
    """Dagster's code server sees its run worker's signal and fails the run without a reason."""
    world.sql("UPDATE docs SET body = 'edited ' || id WHERE tenant = 'a'")
    run = world.instance.get_run_by_id(start_and_kill(world))
    assert run is not None
    world.instance.report_engine_event("terminated by signal 9 (SIGKILL)", run)
    world.instance.report_run_failed(run)
    [alert] = world.tick()
    assert "terminated by signal 9 (SIGKILL)" in alert.body


def test_a_run_whose_retry_succeeds_is_no_news(world: World) -> None:
    world.sql("UPDATE docs SET body = 'edited ' || id WHERE tenant = 'a'")
    world.server.rule = lambda _, __: Status(401)
    assert not world.embed().success
    world.server.rule = None
    assert world.tick() == []
    assert world.embed().success
    assert world.tick(7) == []
    assert world.incidents() == []


def test_runs_that_keep_failing_are_one_incident(world: World) -> None:
    """The provider answers a trial, but refuses what the rows are about."""
    world.sql("UPDATE docs SET body = 'edited ' || id WHERE tenant = 'a'")

    def only_the_trial(_: int, texts: list[str]) -> Status | None:
        return None if texts == ["hello"] else Status(401, words="not for this content")

    world.server.rule = only_the_trial
    assert not world.embed().success
    assert world.tick() == []
    assert not world.embed().success
    [alert] = world.tick()
    assert alert.title == "[ALERT] run docs.embedding_4"
    assert alert.line("value") == "2 failures in a row"
    assert "not for this content" in alert.body
    assert not world.embed().success
    assert world.tick(8) == []

    world.server.rule = None
    assert world.embed().success
    [recovery] = world.tick()
    assert recovery.title == "[RECOVERED] run docs.embedding_4"
    assert world.tick(2) == []


def test_a_run_that_nobody_retries_is_told_after_two_minutes(world: World) -> None:
    """Sensors off, or the machine asleep."""
    world.sql("UPDATE docs SET body = 'edited ' || id WHERE tenant = 'a'")
    world.server.rule = lambda _, texts: None if texts == ["hello"] else Status(401)
    assert not world.embed().success
    assert world.tick() == []
    world.sql("UPDATE embedding_pipeline.lease SET heartbeat_at = now() - interval '3 min'")
    [alert] = world.tick()
    assert alert.title == "[ALERT] run docs.embedding_4"


def test_a_provider_that_is_down_is_one_incident_with_its_failed_runs(
    world: World, server: FaultServer
) -> None:
    world.sql("UPDATE docs SET body = 'edited ' || id WHERE tenant = 'a'")
    server.rule = lambda _, __: Status(401)
    for _ in range(3):
        assert not world.embed().success
    assert [each.title for each in world.tick()] == ["[ALERT] provider tei"]
    assert world.tick(8) == []

    backing_off = "SELECT count(*)::int FROM embedding_pipeline.lease WHERE not_before > now()"
    assert world.sql(backing_off) == [(4,)], "every partition of the runs"
    server.rule = None
    assert [each.title for each in world.tick()] == ["[RECOVERED] provider tei"]
    assert world.sql(backing_off) == [(0,)], "the sensor goes on at once"
    assert world.tick(8) == [], "its rows are being caught up"
    assert world.embed().success
    assert world.tick(2) == []


def test_a_run_that_another_one_kept_out_is_no_failure(world: World) -> None:
    world.sql("UPDATE docs SET body = 'edited ' || id WHERE tenant = 'a'")
    world.sql(
        "UPDATE embedding_pipeline.lease SET released_at = NULL, holder = 'somebody',"
        " heartbeat_at = now() + interval '1 h'"
    )
    assert not world.embed().success
    assert world.tick(8) == []


def test_two_things_at_once_are_two_alerts_and_two_recoveries(world: World) -> None:
    world.sql("UPDATE docs SET embedding_4 = '[0,0,0,0]' WHERE id = 30")
    world.sql(f'DROP INDEX "{world.column.hnsw_index}"')
    world.check("vectors_valid", "index_recall")
    assert sorted(each.title for each in world.tick()) == [
        "[ALERT] check docs.embedding_4: index_recall",
        "[ALERT] check docs.embedding_4: vectors_valid",
    ]
    assert world.tick(2) == []

    world.sql("UPDATE docs SET embedding_4 = NULL WHERE id = 30")
    world.embed()
    world.evaluate()
    assert sorted(each.title for each in world.tick()) == [
        "[RECOVERED] check docs.embedding_4: index_recall",
        "[RECOVERED] check docs.embedding_4: vectors_valid",
    ]
    assert world.tick(2) == []
