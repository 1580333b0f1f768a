"""The nightly schedule, and the sensor that sees each night through.

The schedule opens a night for each of its tables and asks for the first round of embedding; the
sensor asks for further rounds while rows are pending, then for the closing run: indexes, golden
set, full-scan checks. One table's trouble is its own: every table has runs of its own, and a
round that fails still leads to the checks.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC

import dagster as dg
import psycopg

from embedding_pipeline.clock import cron
from embedding_pipeline.components import names
from embedding_pipeline.components.decide_night import NightFacts, decide_night
from embedding_pipeline.components.processes import fail_dead_runs
from embedding_pipeline.components.sensor import (
    default_sensor_status,
    quality_request,
    run_request,
    table_facts,
)
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.nights import Night, close_night, open_night, open_nights
from embedding_pipeline.store.pauses import pause_of, pauses

FOLLOW_UP = "nightly_follow_up"
FOLLOW_UP_SECONDS = 15
LAUNCHING_SECONDS = 120.0
"""How long the schedule may take to launch what it asks for; until then its nights are its own."""
ASSET_JOB = "__ASSET_JOB"
"""Dagster's own job of all assets: any other has to have one partitioning, our tables have many."""
NIGHT_TAG = f"{names.OWNED}/night"
"""On every run of a night: when the schedule started it."""
ROUND_TAG = f"{names.OWNED}/nightly"
"""What a run of a night is for: `embedding 1`, `embedding 2`, …, `checks`."""
EMBEDDING, CHECKS = "embedding", "checks"


def nightly_definitions(tables: Sequence[TableSpec]) -> dg.Definitions:
    """The schedules of these tables, one for each time of day, and their follow-up sensor."""
    settings = load_settings()
    usual = (settings.nightly_at, settings.nightly_timezone)
    by_time: dict[tuple[str, str], list[TableSpec]] = defaultdict(list)
    for table in tables:
        if table.nightly.enabled:
            at = table.nightly.at or usual[0]
            by_time[at, table.nightly.timezone or usual[1]].append(table)
    if not by_time:
        return dg.Definitions()
    return dg.Definitions(
        schedules=[
            _schedule(schedule_name(at, zone, usual), at, zone, chosen)
            for (at, zone), chosen in by_time.items()
        ],
        sensors=[_follow_up([table for chosen in by_time.values() for table in chosen])],
    )


def schedule_name(at: str, zone: str, usual: tuple[str, str]) -> str:
    """`nightly`, or for another time its own: `nightly_0330_Europe_Madrid`."""
    if (at, zone) == usual:
        return "nightly"
    return "nightly_" + f"{at.replace(':', '')}_{zone}".translate(str.maketrans("/-+", "___"))


def _schedule(name: str, at: str, zone: str, tables: Sequence[TableSpec]) -> dg.ScheduleDefinition:
    listed = ", ".join(table.table for table in tables)

    @dg.schedule(
        name=name,
        cron_schedule=cron(at),
        execution_timezone=zone,
        job_name=ASSET_JOB,
        default_status=dg.DefaultScheduleStatus.RUNNING
        if default_sensor_status() is dg.DefaultSensorStatus.RUNNING
        else dg.DefaultScheduleStatus.STOPPED,
        description=(
            f"Every night at {at} ({zone}), for {listed}: embeds whatever is pending, in one run "
            "a table where it is not too much for one, then maintains the indexes, evaluates the "
            f"golden set and runs the full-scan checks. The sensor {FOLLOW_UP} sees each night "
            "through. One table's failure does not stop the others; what is paused is left alone."
        ),
    )
    def nightly(
        context: dg.ScheduleEvaluationContext,
    ) -> list[dg.RunRequest] | dg.SkipReason:
        scheduled_at = context.scheduled_execution_time.astimezone(UTC)
        environment = load_settings().embedding_pipeline_environment
        requests: list[dg.RunRequest] = []
        reasons: list[str] = []
        for table in tables:
            night = Night(table.asset_name, scheduled_at)
            with connect() as connection:
                open_night(connection, environment, night)
            step = _step(context.instance, table, night)
            for line in step.log:
                context.log.info(line)
            requests += step.requests
            reasons.append(f"{table.table}: {step.reason}")
        context.log.info("; ".join(reasons))
        return requests or dg.SkipReason("; ".join(reasons))

    return nightly


def _follow_up(tables: Sequence[TableSpec]) -> dg.SensorDefinition:
    by_name = {table.asset_name: table for table in tables}

    @dg.sensor(
        name=FOLLOW_UP,
        job_name=ASSET_JOB,
        minimum_interval_seconds=FOLLOW_UP_SECONDS,
        default_status=default_sensor_status(),
        description=(
            "Sees through what the nightly schedule began: while rows of a table are pending it "
            "asks for another round of embedding, then for the closing run, which maintains the "
            "indexes, evaluates the golden set and runs the full-scan checks. By day it has "
            "nothing to do."
        ),
    )
    def follow_up(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        environment = load_settings().embedding_pipeline_environment
        try:
            with connect() as connection:
                nights = open_nights(connection, environment)
        except (PipelineError, psycopg.Error) as error:
            raise dg.Failure(f"Not known which nights are open: {error}") from None
        requests: list[dg.RunRequest] = []
        reasons: list[str] = []
        for night in nights:
            table = by_name.get(night.asset_name)
            if table is None:
                continue  # its YAML is gone, or of another deployment
            if night.age_seconds < LAUNCHING_SECONDS and not _runs_of(
                context.instance, table, night
            ):
                reasons.append(f"{table.table}: the schedule is about to begin")
                continue
            step = _step(context.instance, table, night)
            for line in step.log:
                context.log.info(line)
            requests += step.requests
            reasons.append(f"{table.table}: {step.reason}")
        if requests:
            return dg.SensorResult(run_requests=requests)
        return dg.SkipReason("; ".join(reasons) or "no night is open")

    return follow_up


@dataclass
class _Step:
    requests: list[dg.RunRequest]
    reason: str
    log: list[str]


def _step(instance: dg.DagsterInstance, table: TableSpec, night: Night) -> _Step:
    """Ask for what comes next in a table's night; closes the night with its last run.

    A table that cannot be looked at comes to its closing run all the same: that run fails and
    says why, which an exception here would do for all tables at once.
    """
    log = list(fail_dead_runs(instance, table))
    errors: list[str] = []
    try:
        facts = _facts(instance, table, night, log, errors)
    except (PipelineError, psycopg.Error) as error:
        return _close(table, night, str(error).strip(), log)
    step = decide_night(facts)
    if step.what == "wait":
        return _Step([], f"waiting: {step.reason}", log)
    if step.what == "embed":
        what = f"{EMBEDDING} {facts.rounds + 1}"
        requests = [
            _tagged(run_request(table, request), table, night, what, part)
            for part, request in enumerate(step.requests)
        ]
        return _Step(requests, f"{what}: {step.reason}", log)
    return _close(table, night, "; ".join([step.reason, *errors]), log, run=step.what == "check")


def _facts(
    instance: dg.DagsterInstance, table: TableSpec, night: Night, log: list[str], errors: list[str]
) -> NightFacts:
    """What is known of a table's night; PipelineError where the table cannot be looked at."""
    with connect() as connection:
        columns, order = table_facts(connection, instance, table, log, errors)
        whole = pause_of(pauses(connection, bind_columns(connection, table)[0].facts), "")
    runs = _runs_of(instance, table, night)
    latest = max(runs, default=0)
    return NightFacts(
        columns,
        order,
        table.rows_per_run,
        night.age_seconds,
        str(whole) if whole else None,
        rounds=latest,
        unfinished=sum(not run.is_finished for found in runs.values() for run in found),
        failed=sum(run.is_finished and not run.is_success for run in runs.get(latest, [])),
    )


def _close(
    table: TableSpec, night: Night, reason: str, log: list[str], *, run: bool = True
) -> _Step:
    """The end of a table's night, with its closing run where it gets one."""
    try:
        with connect() as connection:
            environment = load_settings().embedding_pipeline_environment
            close_night(connection, environment, night, reason)
    except (PipelineError, psycopg.Error):
        return _Step([], f"not known what is pending: {reason}", log)  # the next tick tries again
    if not run:
        return _Step([], f"left alone: {reason}", log)
    request = _tagged(quality_request(table), table, night, CHECKS)
    return _Step([request], f"indexes, golden set and checks: {reason}", log)


def _runs_of(
    instance: dg.DagsterInstance, table: TableSpec, night: Night
) -> dict[int, list[dg.DagsterRun]]:
    """The night's runs of embedding, by round."""
    rounds: dict[int, list[dg.DagsterRun]] = defaultdict(list)
    for run in instance.get_runs(
        dg.RunsFilter(tags={names.TABLE_TAG: table.asset_name, NIGHT_TAG: night.name}), limit=1000
    ):
        what, _, number = run.tags.get(ROUND_TAG, "").partition(" ")
        if what == EMBEDDING:
            rounds[int(number)].append(run)
    return dict(rounds)


def _tagged(
    request: dg.RunRequest, table: TableSpec, night: Night, what: str, part: int = 0
) -> dg.RunRequest:
    """The request with the night's tags; asked for twice, it is launched once."""
    return dg.RunRequest(
        run_key=f"{table.asset_name} {night.name} {what} {part}",
        asset_selection=request.asset_selection,
        asset_check_keys=request.asset_check_keys,
        tags={**request.tags, NIGHT_TAG: night.name, ROUND_TAG: what},
    )
