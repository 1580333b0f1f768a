"""The sensor of one table: asks for runs of what is pending, and for nothing else.

It gathers facts, lets `decide` choose and acts. What "in flight" means is a lease in the
database, because Dagster leaves a killed run STARTED for ever; a run whose lease has lapsed is
failed here, and its partitions go on.
"""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dagster as dg
import psycopg

from embedding_pipeline.brakes import held_back
from embedding_pipeline.components import names
from embedding_pipeline.components.decide import (
    ColumnFacts,
    EvaluationFacts,
    Request,
    RunInFlight,
    dead_leases,
    decide,
    due_for_evaluation,
)
from embedding_pipeline.components.processes import fail_dead_runs
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.identity import check_identity_cheaply
from embedding_pipeline.spec import EmbeddingSpec, TableSpec, dagster_name, undagster_name
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.lease import LeaseRow, read_leases, release_lapsed
from embedding_pipeline.store.pending import count_by_partition
from embedding_pipeline.store.results import note_pending

INTERVAL_SECONDS = 3
"""Shorter than the 5 s after which the daemon looks at its sensors again. It looks at them in
another order each time, and one that it comes to earlier than 5 s after its last tick would wait
for the look after that."""
BINDING_SECONDS = 300.0
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
SENSORS_VARIABLE = "EMBEDDING_PIPELINE_SENSORS"
"""Set to `on` (as `embedding-pipeline dev` does), sensors and schedules start switched on."""


def default_sensor_status() -> dg.DefaultSensorStatus:
    """Sensors spend unattended, so whoever merely opens the UI does not start them."""
    on = os.environ.get(SENSORS_VARIABLE, "").lower() in {"on", "1", "true"}
    return dg.DefaultSensorStatus.RUNNING if on else dg.DefaultSensorStatus.STOPPED


@dataclass
class _Binding:
    columns: list[Column]
    until: float


_bindings: dict[str, _Binding] = {}
"""Tables bound to the catalogue, kept for a while: looking it up costs more than a tick's query.
A query that fails drops its table's entry."""


def _bound(connection: "psycopg.Connection[Any]", table: TableSpec) -> list[Column]:
    binding = _bindings.get(table.table)
    if binding is None or binding.until < time.monotonic() or binding.columns[0].table != table:
        columns = bind_columns(connection, table)
        binding = _bindings[table.table] = _Binding(columns, time.monotonic() + BINDING_SECONDS)
    return binding.columns


def table_sensor(file: TableFile) -> dg.SensorDefinition:
    """The sensor `<table>_pending`."""
    table = file.spec
    keys = [names.column_key(table, embedding) for embedding in table.embeddings]
    quality = [
        *(names.index_key(table, embedding) for embedding in table.embeddings),
        names.quality_key(table),
    ]

    @dg.sensor(
        name=names.sensor_name(table),
        target=dg.AssetSelection.assets(*keys, *quality),
        minimum_interval_seconds=INTERVAL_SECONDS,
        default_status=default_sensor_status(),
        description=(
            f"Embeds new and changed rows of {table.table} within seconds of their commit. Each "
            "tick counts pending rows by partition (at a cost of what is pending), requests runs "
            "for partitions that nobody works on, takes over from runs that died, and evaluates "
            "what is complete once nothing is being filled. What is paused or has reached its "
            "daily cost cap is left alone. A tick that requests nothing says why."
        ),
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        tick = _tick(context.instance, table)
        for line in tick.log:
            context.log.info(line)
        if tick.requests:
            return dg.SensorResult(run_requests=tick.requests)
        if tick.errors:
            raise dg.Failure(
                "Not known what is pending (which is not the same as nothing): "
                + "; ".join(tick.errors)
            )
        return dg.SkipReason("; ".join(tick.reasons))

    return sensor


@dataclass
class _Tick:
    requests: list[dg.RunRequest]
    reasons: list[str]
    errors: list[str]
    log: list[str]


def _tick(instance: dg.DagsterInstance, table: TableSpec) -> _Tick:
    log: list[str] = []
    errors: list[str] = []
    log += fail_dead_runs(instance, table)
    try:
        with connect() as connection:
            facts, order = table_facts(connection, instance, table, log, errors)
            decision = decide(facts, order, table.rows_per_run)
            requests = [run_request(table, request) for request in decision.requests]
            reasons = decision.reasons
            if not requests and (due := _due_for_evaluation(connection, instance, table, facts)):
                requests = [quality_request(table, due)]
                reasons = [*reasons, f"complete, evaluating: {', '.join(due)}"]
    except (PipelineError, psycopg.Error) as error:
        _bindings.pop(table.table, None)
        return _Tick([], [], [str(error).strip()], log)
    if errors:
        _bindings.pop(table.table, None)
    return _Tick(requests, reasons, errors, log)


def table_facts(
    connection: "psycopg.Connection[Any]",
    instance: dg.DagsterInstance,
    table: TableSpec,
    log: list[str],
    errors: list[str],
) -> tuple[list[ColumnFacts], list[str]]:
    """What is known of each column of a table, and its partitions in Dagster's order.

    On the way it makes new partitions known and takes over from runs that died (said in `log`);
    `errors` gets what could not be read.
    """
    # before the rows: a run that ends in between is then in flight, not pending work
    runs = _unfinished_runs(instance, table)
    columns = _bound(connection, table)
    facts = [_column_facts(connection, instance, column, log, errors) for column in columns]
    new = {key for item in facts for key in item.pending}
    # a thousand tenants' keys, of which a tick with nothing to do needs none
    order = names.known_partitions(instance, table) if new or runs else []
    if not new <= set(order) and (added := names.add_partitions(instance, table, sorted(new))):
        log.append(f"new partitions: {', '.join(added[:20])}")
        order = names.known_partitions(instance, table)
    return _with_runs(facts, runs, order), order


def _column_facts(
    connection: "psycopg.Connection[Any]",
    instance: dg.DagsterInstance,
    column: Column,
    log: list[str],
    errors: list[str],
) -> ColumnFacts:
    name = column.embedding.column
    try:
        check_identity_cheaply(connection, column)
    except PipelineError as error:
        return ColumnFacts(name, {}, problem=str(error))
    try:
        leases = read_leases(connection, column)
        facts = ColumnFacts(name, {}, leases)
        for line in reap(connection, instance, column, dead_leases(facts)):
            log.append(line)
        if any(lease.lapsed for lease in leases.values()):
            leases = read_leases(connection, column)
        pending = count_by_partition(connection, column)
        note_pending(connection, column, bool(pending))
        held = held_back(connection, column)
    except psycopg.Error as error:
        message = f"{name}: {str(error).strip()}"
        errors.append(message)
        return ColumnFacts(name, {}, problem=f"its pending rows could not be read: {error}")
    return ColumnFacts(name, pending, leases, held=str(held) if held else None)


def reap(
    connection: "psycopg.Connection[Any]",
    instance: dg.DagsterInstance,
    column: Column,
    dead: list[tuple[str, LeaseRow]],
) -> Iterator[str]:
    """Fail the runs of lapsed leases and free their partitions; yields what was done."""
    by_run: dict[str | None, list[str]] = {}
    for partition, lease in dead:
        by_run.setdefault(lease.run_id, []).append(partition)
    for run_id, partitions in by_run.items():
        message = "the run died: its lease lapsed without being released"
        freed = release_lapsed(connection, column, partitions, message)
        if not freed:
            continue
        run = instance.get_run_by_id(run_id) if run_id else None
        if run is not None and not run.is_finished:
            instance.report_run_failed(
                run,
                message=f"{column}: {message} (killed, or its machine is gone). What it had "
                "written is kept; the sensor goes on with the rest.",
            )
        yield f"{column}: run {run_id or 'outside Dagster'} died; {len(freed)} partitions freed"


def _unfinished_runs(instance: dg.DagsterInstance, table: TableSpec) -> list[dg.RunRecord]:
    filters = dg.RunsFilter(tags={names.TABLE_TAG: table.asset_name}, statuses=UNFINISHED)
    # for records Dagster looks its own tables up in the catalogue first: five queries, not one
    if not instance.get_runs_count(filters):
        return []
    return list(instance.get_run_records(filters, limit=500))


def _with_runs(
    facts: list[ColumnFacts], runs: list[dg.RunRecord], order: list[str]
) -> list[ColumnFacts]:
    """The same facts with each column's runs in flight."""
    alive = {lease.run_id for item in facts for lease in item.leases.values() if lease.live}
    in_flight: dict[str, list[RunInFlight]] = {item.column: [] for item in facts}
    for record in runs:
        run = record.dagster_run
        known = RunInFlight(
            run.run_id,
            frozenset(names.partitions_of_range(run.tags, order)),
            time.time() - record.create_timestamp.timestamp(),
            run.run_id in alive,
        )
        for column in map(undagster_name, run.tags.get(names.COLUMN_TAG, "").split(",")):
            if column in in_flight:
                in_flight[column].append(known)
    return [replace(item, in_flight=in_flight[item.column]) for item in facts]


def run_request(table: TableSpec, request: Request) -> dg.RunRequest:
    keys = [names.column_key(table, table.embedding(column)) for column in request.columns]
    return dg.RunRequest(
        asset_selection=keys,
        asset_check_keys=[dg.AssetCheckKey(key, "coverage") for key in keys],
        tags={
            **names.range_tags(request.partitions[0], request.partitions[-1]),
            names.TABLE_TAG: table.asset_name,
            names.COLUMN_TAG: ",".join(map(dagster_name, request.columns)),
        },
    )


QUALITY_TAG = f"{names.OWNED}/quality"


def quality_checks(table: TableSpec, embedding: EmbeddingSpec) -> list[dg.AssetCheckKey]:
    """The checks that need a full scan or a finished evaluation."""
    key = names.column_key(table, embedding)
    return [
        dg.AssetCheckKey(key, name)
        for name in ("coverage", "golden_mrr", "vectors_valid", "index_recall")
    ]


def quality_request(table: TableSpec, columns: Sequence[str] | None = None) -> dg.RunRequest:
    """A run of indexes, evaluation and full-scan checks, of some columns or of all."""
    chosen = [each for each in table.embeddings if columns is None or each.column in columns]
    return dg.RunRequest(
        asset_selection=[
            *(names.index_key(table, embedding) for embedding in chosen),
            names.quality_key(table),
        ],
        asset_check_keys=[
            check for embedding in chosen for check in quality_checks(table, embedding)
        ],
        tags={names.TABLE_TAG: table.asset_name, QUALITY_TAG: "evaluate"},
    )


def _due_for_evaluation(
    connection: "psycopg.Connection[Any]",
    instance: dg.DagsterInstance,
    table: TableSpec,
    facts: list[ColumnFacts],
) -> list[str]:
    columns = _bound(connection, table)
    rows = connection.execute(
        "SELECT column_name, coalesce(written_at > coalesce(evaluated_at, '-infinity'), false),"
        " extract(epoch FROM now() - evaluated_at)::float8,"
        " extract(epoch FROM now() - pending_since)::float8"
        " FROM embedding_pipeline.embedding_column"
        " WHERE table_schema = $1 AND table_name = $2 AND column_name = ANY($3)",
        [
            columns[0].facts.schema,
            columns[0].facts.name,
            [column.embedding.column for column in columns],
        ],
    ).fetchall()
    known = {column: EvaluationFacts(*values) for column, *values in rows}
    if not any(each.changed for each in known.values()):
        return []
    latest = instance.get_run_records(
        dg.RunsFilter(tags={names.TABLE_TAG: table.asset_name, QUALITY_TAG: "evaluate"}), limit=1
    )
    requested = time.time() - latest[0].create_timestamp.timestamp() if latest else None
    return due_for_evaluation(facts, known, requested)
