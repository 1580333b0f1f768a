"""Four checks on every embedding column. What a check costs decides when it scans.

In a run that also materialises the column, a check looks only at what costs the pending rows,
the latest evaluation, or a sample; run by itself (nightly, at zero pending, or by hand) it scans
and evaluates.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import dagster as dg
import psycopg
from psycopg import sql

from embedding_pipeline.brakes import held_back
from embedding_pipeline.components import names
from embedding_pipeline.components.assets import bind_column
from embedding_pipeline.components.descriptions import check_descriptions
from embedding_pipeline.components.table_metadata import COUNTED_ROWS
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.spec import EmbeddingSpec, TableSpec
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import SESSION, connect
from embedding_pipeline.store.lease import LeaseRow, read_leases
from embedding_pipeline.store.pending import (
    Coverage,
    count_by_partition,
    count_kinds,
    coverage,
    estimated_rows,
)
from embedding_pipeline.store.results import note_pending, written_at

if TYPE_CHECKING:
    # numpy and the metrics: only a check that runs needs them, loading the definitions does not
    from embedding_pipeline.evaluation.golden_set import GoldenSet
    from embedding_pipeline.evaluation.keys import Key
    from embedding_pipeline.evaluation.result import Evaluation
    from embedding_pipeline.evaluation.verdict import Verdict

ABOUT_TO_START = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
]
BETWEEN_RUNS = timedelta(minutes=5)
"""How long one run of a backfill may take to follow another."""

SAMPLED_ROWS = 10_000
"""Up to this size every check looks at all vectors."""

SAMPLED_KEYS = 2_000
"""Of a larger table a run looks at the vectors of so many rows."""


@dataclass(frozen=True)
class Occasion:
    """On what occasion a check runs: what it may cost, and what its run explains."""

    run_id: str
    thorough: bool
    """False in a run that materialises the column: it must not cost a scan of the table."""
    partitions: frozenset[str] = frozenset()
    """That this run covered."""
    more_to_come: bool = False
    """Further runs of the column are about to start: this is the middle of a backfill."""
    stopped: bool = False
    """This run ended before its partitions were empty, and said why (a limit, a cost cap)."""


Measure = Callable[["psycopg.Connection[Any]", Column, Occasion], "Verdict"]


def column_checks(file: TableFile, embedding: EmbeddingSpec) -> list[dg.AssetChecksDefinition]:
    """`coverage`, `golden_mrr`, `vectors_valid` and `index_recall` of one column.

    Two steps, the second after the evaluation: a step costs a run a quarter of a second of events.
    """
    says = check_descriptions(embedding)
    rows = [
        _Check("coverage", says["coverage"], _coverage),
        _Check("vectors_valid", says["vectors_valid"], _vectors_valid),
    ]
    retrieval = [
        _Check("golden_mrr", says["golden_mrr"], partial(_golden_mrr, file)),
        _Check("index_recall", says["index_recall"], partial(_index_recall, file)),
    ]
    return [
        _checks(file, embedding, "rows", rows, []),
        _checks(file, embedding, "retrieval", retrieval, [names.quality_key(file.spec)]),
    ]


@dataclass(frozen=True)
class _Check:
    name: str
    description: str
    measure: Measure


def _checks(
    file: TableFile,
    embedding: EmbeddingSpec,
    what: str,
    checks: list[_Check],
    after: list[dg.AssetKey],
) -> dg.AssetChecksDefinition:
    """Checks of one column as one step, any of which can be selected alone."""
    key = names.column_key(file.spec, embedding)
    specs = [
        dg.AssetCheckSpec(
            check.name, asset=key, description=check.description, additional_deps=after
        )
        for check in checks
    ]

    @dg.multi_asset_check(
        name=f"{key.to_python_identifier()}_{what}_checks", specs=specs, can_subset=True
    )
    def run_checks(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        from embedding_pipeline.evaluation.verdict import not_evaluated

        selected = {check.name for check in context.selected_asset_check_keys}
        occasion = _occasion(context, file.spec, key)
        for check in checks:
            if check.name not in selected:
                continue
            try:
                column = bind_column(file.spec, embedding.column)
                with connect() as connection:
                    verdict = check.measure(connection, column, occasion)
            except PipelineError as error:
                verdict = not_evaluated(str(error))
            except psycopg.Error as error:
                verdict = not_evaluated(f"the database said: {str(error).strip()}")
            yield check_result(verdict, key, check.name)

    return run_checks


def _occasion(
    context: dg.AssetCheckExecutionContext, table: TableSpec, key: dg.AssetKey
) -> Occasion:
    run = context.run
    event = context.instance.get_latest_materialization_event(key)
    materialised = event.asset_materialization if event and event.run_id == run.run_id else None
    selected = run.asset_selection
    if materialised is None and (selected is None or key not in selected):
        return Occasion(
            run.run_id, thorough=True, more_to_come=more_to_come(context.instance, table, key)
        )
    order = names.known_partitions(context.instance, table)
    return Occasion(
        run.run_id,
        thorough=False,
        partitions=frozenset(names.partitions_of_range(run.tags, order)),
        more_to_come=more_to_come(context.instance, table, key),
        stopped=materialised is not None and "stopped" in materialised.metadata,
    )


def more_to_come(instance: dg.DagsterInstance, table: TableSpec, key: dg.AssetKey) -> bool:
    """Whether another run of the column is about to start."""
    runs = instance.get_runs(
        dg.RunsFilter(tags={names.TABLE_TAG: table.asset_name}, statuses=ABOUT_TO_START), limit=100
    )
    return any(key.path[-1] in run.tags.get(names.COLUMN_TAG, "").split(",") for run in runs)


def check_result(verdict: "Verdict", key: dg.AssetKey, name: str) -> dg.AssetCheckResult:
    """A verdict as Dagster records it: "not evaluated" is a failed check of severity WARN."""
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=name,
        passed=verdict.passed,
        severity=dg.AssetCheckSeverity.ERROR
        if verdict.severity == "error"
        else dg.AssetCheckSeverity.WARN,
        description=verdict.summary,
        metadata={
            "evaluated": verdict.status != "not_evaluated",
            **{
                name: round(value, 6) if isinstance(value, float) else value
                for name, value in verdict.metadata.items()
            },
        },
    )


def counted(
    connection: "psycopg.Connection[Any]", column: Column, thorough: bool
) -> tuple[Coverage, bool]:
    """A column's coverage and whether its totals are exact.

    Unless `thorough`, a large table's totals come from the planner's estimate; what is pending is
    always exact.
    """
    rows = estimated_rows(connection, column)
    if thorough or rows <= COUNTED_ROWS:
        return coverage(connection, column), True
    kinds = count_kinds(connection, column)
    embedded = max(0, rows - kinds.pending - kinds.quarantined)
    return Coverage(rows, embedded, kinds, 0), False


def _coverage(
    connection: "psycopg.Connection[Any]", column: Column, occasion: Occasion
) -> "Verdict":
    from embedding_pipeline.evaluation.verdict import coverage_verdict

    counts, exact = counted(connection, column, occasion.thorough)
    waiting = count_by_partition(connection, column)
    since = note_pending(connection, column, bool(waiting))
    leases = read_leases(connection, column)
    elsewhere = bool(occasion.partitions) and not occasion.partitions & waiting.keys()
    held = held_back(connection, column)
    verdict = coverage_verdict(
        counts,
        pending_since=oldest_pending(since, waiting, leases),
        now=datetime.now(UTC),
        max_pending_minutes=column.embedding.max_pending_minutes,
        max_quarantined_share=column.embedding.max_quarantined_share,
        in_flight=any(key in leases and leases[key].live for key in waiting)
        or (occasion.more_to_come and just_written(connection, column)),
        limited=occasion.stopped or elsewhere,
        held=str(held) if held else None,
    )
    verdict.metadata["rows_estimated"] = not exact
    return verdict


def just_written(connection: "psycopg.Connection[Any]", column: Column) -> bool:
    """Whether a run has just ended: a backfill of several runs is then between two of them.

    A run that only waits in the queue explains nothing: nobody may ever start it.
    """
    written = written_at(connection, column)
    return written is not None and datetime.now(UTC) - written < BETWEEN_RUNS


def oldest_pending(
    noted: datetime | None, waiting: Iterable[str], leases: Mapping[str, LeaseRow]
) -> datetime | None:
    """Since when, at the earliest, one of these partitions' rows can have been pending.

    A table that is written to all the time is never seen without a pending row, though none
    waits for long: what a partition's last run found has been dealt with, what is pending there
    now came later.
    """
    if noted is None:
        return None
    emptied = [lease.emptied_at if (lease := leases.get(key)) else None for key in waiting]
    return min((max(noted, at or noted) for at in emptied), default=noted)


def _golden_mrr(
    file: TableFile, connection: "psycopg.Connection[Any]", column: Column, occasion: Occasion
) -> "Verdict":
    from embedding_pipeline.components.quality import evaluation_of_run, golden_set
    from embedding_pipeline.evaluation.history import latest
    from embedding_pipeline.evaluation.verdict import golden_mrr_verdict, not_evaluated

    golden = golden_set(file)
    if golden is None:
        return not_evaluated("the table's YAML names no golden set")
    evaluation = _evaluation(connection, column, golden, occasion)
    name = column.embedding.baseline
    baseline = None
    if name is not None and evaluation is not None:
        baseline_column = bind_column(file.spec, name)
        if occasion.thorough:
            baseline = evaluation_of_run(connection, baseline_column, golden, occasion.run_id)
        else:
            baseline = latest(connection, baseline_column)
    return golden_mrr_verdict(
        evaluation,
        baseline,
        column.embedding.mrr_floor,
        column.embedding.baseline_ratio,
        baseline_column=name,
        golden_set_hash=golden.hash,
        recipe=column.embedding.recipe,
        reason=FOLLOWS,
    )


FOLLOWS = (
    "rows were written since the golden set was last evaluated; it is evaluated once the column "
    "is complete, and nightly"
)


def _evaluation(
    connection: "psycopg.Connection[Any]", column: Column, golden: "GoldenSet", occasion: Occasion
) -> "Evaluation | None":
    """This run's evaluation; without one, the latest, unless the column was written since.

    What judges vectors that have been replaced must not pass for a judgement of the new ones.
    """
    from embedding_pipeline.components.quality import evaluation_of_run
    from embedding_pipeline.evaluation.history import latest

    if occasion.thorough:
        return evaluation_of_run(connection, column, golden, occasion.run_id)
    known = latest(connection, column)
    if known is None or known.run_id == occasion.run_id:
        return known
    written = written_at(connection, column)
    return known if written is None or written <= known.evaluated_at else None


def _vectors_valid(
    connection: "psycopg.Connection[Any]", column: Column, occasion: Occasion
) -> "Verdict":
    from embedding_pipeline.evaluation.vectors import vectors_valid
    from embedding_pipeline.evaluation.verdict import vectors_valid_verdict

    if occasion.thorough or estimated_rows(connection, column) <= SAMPLED_ROWS:
        return vectors_valid_verdict(vectors_valid(connection, column))
    with connection.transaction():
        connection.execute(BY_KEY)
        keys = _sampled_keys(connection, column)
        found = vectors_valid(connection, column, keys=keys)
    return vectors_valid_verdict(replace(found, scope="sample"))


BY_KEY = sql.SQL(
    "SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off;"
    " SET LOCAL enable_mergejoin = off"
)


def _sampled_keys(connection: "psycopg.Connection[Any]", column: Column) -> "list[Key]":
    """Keys of some rows, from a few of the table's pages, other ones each time."""
    from embedding_pipeline.evaluation.keys import key_from_json

    share = 100 * SAMPLED_KEYS / max(SAMPLED_KEYS, estimated_rows(connection, column))
    query = sql.SQL("SELECT {}::text FROM {} TABLESAMPLE SYSTEM ({}) LIMIT {}").format(
        column.key_json, column.relation, sql.Literal(share), sql.Literal(SAMPLED_KEYS)
    )
    connection.execute(SESSION)
    return [key_from_json(key) for (key,) in connection.execute(query)]


def _index_recall(
    file: TableFile, connection: "psycopg.Connection[Any]", column: Column, occasion: Occasion
) -> "Verdict":
    from embedding_pipeline.components.quality import golden_set
    from embedding_pipeline.evaluation.nearest import find_index
    from embedding_pipeline.evaluation.result import IndexRecall
    from embedding_pipeline.evaluation.vectors import index_recall
    from embedding_pipeline.evaluation.verdict import index_recall_verdict

    golden = golden_set(file)
    measured: IndexRecall | None = None
    if golden is not None:
        evaluation = _evaluation(connection, column, golden, occasion)
        measured = evaluation.measured_index if evaluation is not None else None
    elif occasion.thorough:
        measured = index_recall(connection, column)
    if measured is not None and (gone := find_index(connection, column).reason) is not None:
        measured = IndexRecall(None, 0, None, gone)
    return index_recall_verdict(
        measured,
        column.embedding.recall_floor,
        pending=count_kinds(connection, column).pending,
        reason="the index is measured once the column is complete, and nightly",
    )
