"""The main job, headless: schema, rows, every column, indexes, evaluation, checks.

What it launches are real Dagster runs in the project's instance, executed in this process: they
show in the UI like any other. The command line prints what this returns.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import dagster as dg

from embedding_pipeline.backfill import TOO_DEAR, Progress
from embedding_pipeline.brakes import Held, held_back
from embedding_pipeline.components import names
from embedding_pipeline.components.assets import (
    HELD_BY,
    LEASE_HELD,
    LINE_LISTENERS,
    LISTENERS,
    RUN_WRITTEN,
    bind_column,
)
from embedding_pipeline.components.decide import ColumnFacts, dead_leases, ranges
from embedding_pipeline.components.processes import fail_dead_runs, process_tags
from embedding_pipeline.components.sensor import QUALITY_TAG, quality_checks, reap
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.identity import check_identity, price
from embedding_pipeline.settings import PROJECT_ROOT, load_settings
from embedding_pipeline.spec import EmbeddingSpec, TableSpec, dagster_name
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.lease import LeaseRow, describe_holders, read_leases
from embedding_pipeline.store.migrate import migrate
from embedding_pipeline.store.pending import count_by_partition

Report = Callable[[str], None]
Listener = TypeVar("Listener")

POLL_SECONDS = 1.0
"""How often a command looks whether a run that it waits for has ended."""
STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS, MOST_CONNECTIONS = 60_000, 300, 10


@dataclass
class ColumnResult:
    """What the job did for one column."""

    table: str
    column: str
    embedded: int = 0
    """Rows written: embedded, reused or cleared."""
    quarantined: int = 0
    truncated: int = 0
    tokens: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    passed: int = 0
    checks: int = 0
    failed_checks: list[str] = field(default_factory=list)
    """Failed with severity ERROR: what makes the job fail."""
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Pending:
    """A column's pending rows by partition, and which of the partitions other runs hold."""

    rows: dict[str, int]
    held: dict[str, LeaseRow]
    brake: Held | None = None
    """A pause, or a cost cap that is reached."""

    @property
    def free(self) -> dict[str, int]:
        return {key: count for key, count in self.rows.items() if key not in self.held}


def use_project_instance() -> dg.DagsterInstance:
    """The project's Dagster instance; DAGSTER_HOME is the project's folder unless it is set.

    It keeps its connections: Dagster's default opens one for each event, which was a third of the
    time of a run that had nothing to embed.
    """
    home = os.environ.setdefault("DAGSTER_HOME", str(PROJECT_ROOT))
    if not Path(home).is_absolute() or not Path(home).is_dir():
        raise PipelineError(
            f"DAGSTER_HOME is {home!r}, which is not the absolute path of a folder; make it and "
            "copy the project's dagster.yaml there, or unset the variable"
        )
    separate = load_settings().dagster_database_url
    if separate is not None:
        # asked first: Dagster tries for a quarter of a minute and ends with a stack
        try:
            with connect(separate.get_secret_value()):
                pass
        except PipelineError as error:
            raise PipelineError(
                str(error).replace("Check DATABASE_URL", "Check DAGSTER_DATABASE_URL")
            ) from None
    instance = dg.DagsterInstance.get()
    instance.optimize_for_webserver(STATEMENT_TIMEOUT_MS, RECYCLE_SECONDS, MOST_CONNECTIONS)
    return instance


def prepare(files: Sequence[TableFile], samples: bool | None, report: Report) -> str | None:
    """Sample rows (on the embedded server, or where asked for), then the schema.

    What could not be brought to what the YAML says is returned as a message: the rest is ready.
    """
    wanted = load_settings().database_url is None if samples is None else samples
    with connect() as connection:
        if wanted:
            from embedding_pipeline.local.samples import load_samples

            load_samples(connection, report)
        try:
            migrate(connection, [file.spec for file in files], report=report, cost=price)
        except PipelineError as error:
            return str(error)
    return None


def find_pending(instance: dg.DagsterInstance, column: Column, report: Report) -> Pending:
    """What is pending in a column, after freeing what dead runs hold.

    Raises IdentityError when the YAML asks for another recipe than the column holds.
    """
    for line in fail_dead_runs(instance, column.table):
        report(line)
    with connect() as connection:
        check_identity(connection, column)
        facts = ColumnFacts(column.embedding.column, {}, read_leases(connection, column))
        for line in reap(connection, instance, column, dead_leases(facts)):
            report(line)
        counts = count_by_partition(connection, column)
        leases = read_leases(connection, column)
        brake = held_back(connection, column)
    names.add_partitions(instance, column.table, sorted(counts))
    held = {key: leases[key] for key in counts if key in leases and leases[key].live}
    return Pending(counts, held, brake)


def embed_pending(
    instance: dg.DagsterInstance,
    job: dg.JobDefinition,
    column: Column,
    config: dict[str, int | float],
    result: ColumnResult,
    report: Report,
    only: Sequence[str] = (),
    on_start: Callable[[int], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> None:
    """Bring a column up to date, waiting for runs that hold parts of it; fills `result`.

    `only` names partitions; `on_start` hears how many rows are pending. Ends when nothing is
    pending, at the limit, at an error, at a brake, or when a pass changed nothing (rows
    that a user's transaction holds): the checks say what is left.
    """
    waited_for: str | None = None
    started = False
    while True:
        pending = find_pending(instance, column, report)
        if only:
            rows = {key: count for key, count in pending.rows.items() if key in only}
            held = {k: v for k, v in pending.held.items() if k in rows}
            pending = Pending(rows, held, pending.brake)
        if not pending.rows:
            break
        if pending.brake is not None:
            started = True
            result.warnings.append(
                f"{sum(pending.rows.values()):,} rows stay pending: {pending.brake}"
            )
            break
        if not pending.free:
            holders = sorted({lease.run_id or "outside Dagster" for lease in pending.held.values()})
            if waited_for != str(holders):
                waited_for = str(holders)
                report(f"{column}: {describe_holders(pending.held)}; waiting for that run")
            time.sleep(POLL_SECONDS)
            continue
        if not started and on_start is not None:
            on_start(sum(pending.rows.values()))
        started = True
        before = result.embedded
        again = _embed(instance, job, column, pending.free, config, result, on_progress)
        if not again or (result.embedded == before and not pending.held):
            break
    if not started:
        report(f"{column}: nothing pending")


def _embed(
    instance: dg.DagsterInstance,
    job: dg.JobDefinition,
    column: Column,
    partitions: dict[str, int],
    config: dict[str, int | float],
    result: ColumnResult,
    on_progress: Callable[[Progress], None] | None,
) -> bool:
    """Run these partitions once, in ranges; whether looking for more makes sense."""
    table, embedding = column.table, column.embedding
    key = names.column_key(table, embedding)
    order = names.known_partitions(instance, table)
    limit, cap = config.get("limit"), config.get("max_cost")
    for request in ranges(embedding.column, partitions, order, table.rows_per_run):
        run_config: dict[str, int | float] = dict(config)
        if limit is not None:
            if result.embedded >= limit:
                return False
            run_config["limit"] = limit - result.embedded
        if cap is not None:
            # the command's, over all its runs; the YAML's is each run's own
            if result.cost >= cap:
                return False
            run_config["max_cost"] = cap - result.cost
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
        written, quarantined, truncated = 0, 0, 0
        used, held, too_dear, braked = None, False, False, False
        for event in outcome.all_events:
            if event.is_step_materialization and event.asset_key == key:
                used = event.step_materialization_data.materialization.metadata
                written += int(sum(_number(used, n) for n in ("embedded", "reused", "cleared")))
                quarantined += int(_number(used, "quarantined"))
                truncated += int(_number(used, "truncated"))
                too_dear = too_dear or TOO_DEAR in str(used.get("stopped"))
                braked = braked or HELD_BY in used
            if event.is_failure and event.is_step_event:
                held = _is_lease_error(event)
                if not held:
                    result.errors.append(_step_error(event))
                # materialisations of a failed run are only of the partitions that it completed
                if RUN_WRITTEN in (used := _failure_figures(event)):
                    written = int(_number(used, RUN_WRITTEN))
                    quarantined = int(_number(used, "quarantined"))
                    truncated = int(_number(used, "truncated"))
        result.embedded += written
        result.quarantined += quarantined
        result.truncated += truncated
        if used is not None:
            result.tokens += int(_number(used, "run_tokens"))
            result.cost += _number(used, "run_cost_usd")
            result.seconds += _number(used, "run_seconds")
        if too_dear:
            result.warnings.append(
                f"stopped at its cost cap with ${result.cost:.4f} spent; the rest stays pending"
            )
            return False
        if braked:
            return True  # the next look finds the brake and says so
        if not outcome.success:
            return held
    return limit is None or result.embedded < limit


def evaluate_and_check(
    instance: dg.DagsterInstance,
    job: dg.JobDefinition,
    table: TableSpec,
    embeddings: Sequence[EmbeddingSpec],
    results: dict[tuple[str, str], ColumnResult],
    say: Report,
) -> list[str]:
    """Indexes, golden set and thorough checks of a table's columns, in one run; its errors.

    What the index builds say, their progress too, goes to `say`.
    """
    outcome = _execute(
        instance,
        job,
        [
            *(names.index_key(table, embedding) for embedding in embeddings),
            names.quality_key(table),
        ],
        [check for embedding in embeddings for check in quality_checks(table, embedding)],
        {names.TABLE_TAG: table.asset_name, QUALITY_TAG: "evaluate"},
        {},
        say=say,
    )
    columns = {names.column_key(table, e): e.column for e in embeddings}
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
    say: Report | None = None,
) -> dg.ExecuteInProcessResult:
    subset = job.get_subset(asset_selection=set(assets), asset_check_selection=set(checks))
    with _listening(LISTENERS, on_progress), _listening(LINE_LISTENERS, say):
        outcome = subset.execute_in_process(
            instance=instance,
            # the events are for the UI; here the bars and the closing table speak
            run_config={
                **run_config,
                "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
            },
            tags={**tags, **process_tags()},
            raise_on_error=False,
        )
    # Dagster turns Ctrl-C into a failed step; here it ends the command
    if any(_is_interrupt(event) for event in outcome.all_events):
        raise KeyboardInterrupt
    return outcome


@contextmanager
def _listening(listeners: list[Listener], mine: Listener | None) -> Iterator[None]:
    if mine is None:
        yield
        return
    listeners.append(mine)
    try:
        yield
    finally:
        listeners.remove(mine)


def _is_interrupt(event: dg.DagsterEvent) -> bool:
    error = event.step_failure_data.error if event.is_step_failure else None
    while error is not None:
        if error.cls_name == dg.DagsterExecutionInterruptedError.__name__:
            return True
        error = error.cause
    return False


def _number(figures: Mapping[str, dg.MetadataValue], name: str) -> float:
    value = figures.get(name)
    return (
        float(value.value)
        if isinstance(value, dg.FloatMetadataValue | dg.IntMetadataValue)
        and value.value is not None
        else 0.0
    )


def _failure_figures(event: dg.DagsterEvent) -> Mapping[str, dg.MetadataValue]:
    data = event.step_failure_data.user_failure_data
    return data.metadata if data is not None else {}


def _is_lease_error(event: dg.DagsterEvent) -> bool:
    return LEASE_HELD in _failure_figures(event)


def _step_error(event: dg.DagsterEvent) -> str:
    data = event.step_failure_data
    if data.user_failure_data is not None and data.user_failure_data.description:
        return str(data.user_failure_data.description)
    error = data.error
    while error is not None and error.cause is not None:
        error = error.cause
    return (error.message if error is not None else event.message or "").strip()


__all__ = [
    "ColumnResult",
    "bind_column",
    "embed_pending",
    "evaluate_and_check",
    "find_pending",
    "prepare",
    "use_project_instance",
]
