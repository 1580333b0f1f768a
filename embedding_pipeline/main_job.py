"""The main job, headless: schema, rows, every column, indexes, evaluation, checks.

What it launches are real Dagster runs in the project's instance, executed in this process: they
show in the UI like any other. The command line prints what this returns.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import dagster as dg

from embedding_pipeline.backfill import Progress
from embedding_pipeline.components import names
from embedding_pipeline.components.assets import listeners
from embedding_pipeline.components.decide import ColumnFacts, dead_leases, ranges
from embedding_pipeline.components.sensor import quality_checks, reap
from embedding_pipeline.settings import PROJECT_ROOT, load_settings
from embedding_pipeline.spec import EmbeddingSpec, dagster_name
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.lease import read_leases
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline.store.pending import count_by_partition
from embedding_pipeline.store.registry import verify

Report = Callable[[str], None]


@dataclass
class ColumnResult:
    """What the job did for one column."""

    table: str
    column: str
    embedded: int = 0
    tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    passed: int = 0
    checks: int = 0
    failed_checks: list[str] = field(default_factory=list)
    """Failed with severity ERROR: what makes the job fail."""
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def use_project_instance() -> dg.DagsterInstance:
    """The project's Dagster instance; DAGSTER_HOME is the project's folder unless it is set."""
    os.environ.setdefault("DAGSTER_HOME", str(PROJECT_ROOT))
    return dg.DagsterInstance.get()


def prepare(files: Sequence[TableFile], samples: bool | None, report: Report) -> None:
    """Sample rows (on the embedded server, or where asked for), then the schema."""
    wanted = load_settings().database_url is None if samples is None else samples
    with connect() as connection:
        if wanted:
            from embedding_pipeline.local.samples import load_samples

            load_samples(connection, report)
        migrate(connection, [file.spec for file in files], report=report)


def pending_partitions(
    instance: dg.DagsterInstance, column: Column, report: Report
) -> dict[str, int]:
    """A column's pending rows by partition, after freeing what dead runs hold."""
    with connect() as connection:
        verify(connection, column, load_settings().embedding_pipeline_environment)
        facts = ColumnFacts(column.embedding.column, {}, read_leases(connection, column))
        for line in reap(connection, instance, column, dead_leases(facts)):
            report(line)
        counts = count_by_partition(connection, column)
    names.add_partitions(instance, column.table, sorted(counts))
    return counts


def bound_column(file: TableFile, embedding: EmbeddingSpec) -> Column:
    with connect() as connection:
        return next(
            column
            for column in bind_columns(connection, file.spec)
            if column.embedding.column == embedding.column
        )


def embed(
    instance: dg.DagsterInstance,
    job: dg.JobDefinition,
    file: TableFile,
    embedding: EmbeddingSpec,
    partitions: dict[str, int],
    config: dict[str, int | float],
    result: ColumnResult,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Run a column's pending partitions; `result` gets the figures and errors."""
    table = file.spec
    key = names.column_key(table, embedding)
    order = names.known_partitions(instance, table)
    left = config.get("limit")
    for request in ranges(embedding.column, partitions, order, table.rows_per_run):
        run_config: dict[str, int | float] = dict(config)
        if left is not None:
            if left <= 0:
                return
            run_config["limit"] = left
        outcome = _execute(
            instance,
            job,
            [key],
            [dg.AssetCheckKey(key, "coverage")],
            {
                **names.range_tags(request.partitions[0], request.partitions[-1]),
                names.TABLE_TAG: table.asset_name,
                names.COLUMN_TAG: dagster_name(embedding.column),
            },
            {"ops": {key.to_python_identifier(): {"config": run_config}}} if run_config else {},
            on_progress,
        )
        written, seconds = 0.0, 0.0
        for event in outcome.all_events:
            if event.is_step_materialization and event.asset_key == key:
                figures = event.step_materialization_data.materialization.metadata
                written += sum(_number(figures, name) for name in ("embedded", "reused", "cleared"))
                result.tokens += int(_number(figures, "tokens"))
                result.cost += _number(figures, "cost_usd")
                seconds = _number(figures, "run_seconds")
            if event.is_failure and event.is_step_event:
                result.errors.append(_step_error(event))
        result.embedded += int(written)
        if left is not None:
            left -= written
        result.seconds += seconds
        if not outcome.success:
            return


def evaluate_and_check(
    instance: dg.DagsterInstance,
    job: dg.JobDefinition,
    file: TableFile,
    results: dict[tuple[str, str], ColumnResult],
) -> list[str]:
    """Indexes, golden set and thorough checks of one table, in one run; returns its errors."""
    table = file.spec
    outcome = _execute(
        instance,
        job,
        [
            *(names.index_key(table, embedding) for embedding in table.embeddings),
            names.quality_key(table),
        ],
        [check for embedding in table.embeddings for check in quality_checks(table, embedding)],
        {names.TABLE_TAG: table.asset_name},
        {},
    )
    columns = {names.column_key(table, e): e.column for e in table.embeddings}
    for evaluation in outcome.get_asset_check_evaluations():
        column = columns.get(evaluation.asset_key)
        result = results.get((table.table, column)) if column else None
        if result is None:
            continue
        result.checks += 1
        line = f"{evaluation.check_name}: {evaluation.description}"
        if evaluation.passed:
            result.passed += 1
        elif evaluation.severity == dg.AssetCheckSeverity.ERROR:
            result.failed_checks.append(line)
        else:
            result.warnings.append(line)
    return [
        _step_error(event)
        for event in outcome.all_events
        if event.is_failure and event.is_step_event
    ]


def _execute(
    instance: dg.DagsterInstance,
    job: dg.JobDefinition,
    assets: list[dg.AssetKey],
    checks: list[dg.AssetCheckKey],
    tags: dict[str, str],
    run_config: dict[str, object],
    on_progress: Callable[[Progress], None] | None = None,
) -> dg.ExecuteInProcessResult:
    subset = job.get_subset(asset_selection=set(assets), asset_check_selection=set(checks))
    if on_progress is not None:
        listeners.append(on_progress)
    try:
        return subset.execute_in_process(
            instance=instance,
            run_config=run_config,
            tags=tags,
            raise_on_error=False,
        )
    finally:
        if on_progress is not None:
            listeners.remove(on_progress)


def _number(figures: Mapping[str, dg.MetadataValue], name: str) -> float:
    value = figures.get(name)
    return (
        float(value.value)
        if isinstance(value, dg.FloatMetadataValue | dg.IntMetadataValue)
        and value.value is not None
        else 0.0
    )


def _step_error(event: dg.DagsterEvent) -> str:
    data = event.step_failure_data
    if data.user_failure_data is not None and data.user_failure_data.description:
        return str(data.user_failure_data.description)
    error = data.error
    while error is not None and error.cause is not None:
        error = error.cause
    return (error.message if error is not None else event.message or "").strip()
