"""Facts from Dagster's instance: how the ticks of sensors and schedules go."""

import time
from collections.abc import Sequence

import dagster as dg
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorTick,
    InstigatorType,
    ScheduleInstigatorData,
    TickStatus,
)
from dagster._utils.schedules import get_latest_completed_cron_tick

from embedding_pipeline.alerts.facts import TickFacts
from embedding_pipeline.alerts.rules import TICK_FAILURES
from embedding_pipeline.components import names
from embedding_pipeline.spec import TableSpec

QUIET_SECONDS = 180.0
"""A sensor whose ticks are far apart may be silent for six of them."""
LATE_SECONDS = 600.0
"""How late a schedule's tick may come."""

Instigator = dg.SensorDefinition | dg.ScheduleDefinition


def look_at_ticks(
    instance: dg.DagsterInstance,
    repository: dg.RepositoryDefinition,
    location: str | None,
    tables: Sequence[TableSpec],
    *,
    myself: str,
    now: float | None = None,
) -> list[TickFacts]:
    """Every sensor and schedule of this project but the one that asks.

    Stored states of other code locations of the same instance are left out where `location` says
    which is ours.
    """
    states = {
        (state.instigator_type, state.instigator_name): state
        for state in instance.all_instigator_state()
        if location is None or state.repository_selector.location_name == location
    }
    cared_for = {names.sensor_name(table): table for table in tables}
    found = []
    instigators: list[Instigator] = [*repository.sensor_defs, *repository.schedule_defs]
    for instigator in instigators:
        if instigator.name == myself:
            continue
        is_schedule = isinstance(instigator, dg.ScheduleDefinition)
        kind = InstigatorType.SCHEDULE if is_schedule else InstigatorType.SENSOR
        state = states.get((kind, instigator.name))
        found.append(
            _facts(
                instance,
                instigator,
                state,
                f"locations/{location or 'embedding_pipeline'}/"
                f"{'schedules' if is_schedule else 'sensors'}/{instigator.name}",
                cared_for.get(instigator.name),
                time.time() if now is None else now,
            )
        )
    return found


def _facts(
    instance: dg.DagsterInstance,
    instigator: Instigator,
    state: InstigatorState | None,
    link: str,
    table: TableSpec | None,
    now: float,
) -> TickFacts:
    on_by_default = instigator.default_status.value == "RUNNING"
    ticks: Sequence[InstigatorTick] = (
        instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=TICK_FAILURES)
        if state is not None
        else []
    )
    failed = [tick for tick in ticks if tick.status is not TickStatus.STARTED]
    failures = 0
    while failures < len(failed) and failed[failures].status is TickStatus.FAILURE:
        failures += 1
    latest = ticks[0].timestamp if ticks else None
    if isinstance(instigator, dg.ScheduleDefinition):
        silent: float | None = _missed(instigator, state, latest, now)
        quiet = LATE_SECONDS
    else:
        silent = None if latest is None else now - latest
        quiet = max(QUIET_SECONDS, 6.0 * (instigator.minimum_interval_seconds or 30))
    return TickFacts(
        name=instigator.name,
        is_schedule=isinstance(instigator, dg.ScheduleDefinition),
        wanted=on_by_default or (state is not None and (state.is_running or bool(ticks))),
        running=_is_running(state, on_by_default),
        silent_seconds=silent,
        quiet_seconds=quiet,
        link=link,
        failures=failures,
        error=_error(failed[0]) if failures else "",
        table=table.table if table else None,
        columns=frozenset(f"{table.table}.{each.column}" for each in table.embeddings)
        if table
        else frozenset(),
    )


def _is_running(state: InstigatorState | None, on_by_default: bool) -> bool:
    if state is None or state.status is InstigatorStatus.DECLARED_IN_CODE:
        return on_by_default
    return state.status is not InstigatorStatus.STOPPED


def _missed(
    schedule: dg.ScheduleDefinition,
    state: InstigatorState | None,
    latest: float | None,
    now: float,
) -> float:
    """Seconds since the due time that a schedule has missed; 0 when it has missed none."""
    from datetime import UTC, datetime

    data = state.instigator_data if state is not None else None
    began = data.start_timestamp if isinstance(data, ScheduleInstigatorData) else None
    crons = schedule.cron_schedule
    due = max(
        get_latest_completed_cron_tick(
            cron, datetime.fromtimestamp(now, UTC), schedule.execution_timezone or "UTC"
        ).timestamp()
        for cron in ([crons] if isinstance(crons, str) else crons)
    )
    if began is None or began > due or (latest is not None and latest >= due - 1):
        return 0.0
    return now - due


def _error(tick: InstigatorTick) -> str:
    error = tick.error
    while error is not None and error.cause is not None:
        error = error.cause
    return " ".join((error.message if error is not None else "nothing was said").split())
