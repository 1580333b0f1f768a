"""Four checks on every embedding column. What a check costs decides when it scans.

In a run that also materialises the column, a check looks only at what costs the pending rows,
the latest evaluation, or a sample; run by itself (nightly, at zero pending, or by hand) it scans
and evaluates.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dagster as dg
import psycopg

from embedding_pipeline.components import names
from embedding_pipeline.components.assets import COUNTED_ROWS, bind_column
from embedding_pipeline.components.quality import evaluation_of_run, golden_set
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.evaluation.history import latest
from embedding_pipeline.evaluation.vectors import index_recall, vectors_valid
from embedding_pipeline.evaluation.verdict import (
    Verdict,
    coverage_verdict,
    golden_mrr_verdict,
    index_recall_verdict,
    not_evaluated,
    vectors_valid_verdict,
)
from embedding_pipeline.spec import EmbeddingSpec
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.lease import read_leases
from embedding_pipeline.store.pending import Coverage, count_kinds, coverage, estimated_rows
from embedding_pipeline.store.results import note_pending

SAMPLED_ROWS = 10_000

Measure = Callable[["psycopg.Connection[Any]", Column, bool, str], Verdict]
"""(connection, column, thorough, run id) → verdict."""


def column_checks(file: TableFile, embedding: EmbeddingSpec) -> list[dg.AssetChecksDefinition]:
    """`coverage`, `golden_mrr`, `vectors_valid` and `index_recall` of one column.

    Two steps, the second after the evaluation: a step costs a run a quarter of a second of events.
    """
    minutes = embedding.max_pending_minutes
    against = (
        f" and {embedding.baseline_ratio:g} × {embedding.baseline}" if embedding.baseline else ""
    )
    rows = [
        _Check(
            "coverage",
            "Every eligible row has the vector that its text calls for. Missing and stale rows "
            f"are a warning at first and an error once they have been pending for {minutes:g} "
            "minutes; a quarantined share above "
            f"{embedding.max_quarantined_share:.1%} is an error.",
            lambda connection, column, thorough, _: _coverage(connection, column, thorough),
        ),
        _Check(
            "vectors_valid",
            "No vector is all zeros (a cosine index leaves those out silently), and texts that "
            "differ have vectors that differ.",
            lambda connection, column, thorough, _: _vectors_valid(connection, column, thorough),
        ),
    ]
    retrieval = [
        _Check(
            "golden_mrr",
            f"MRR@5 on the golden set is at least {embedding.mrr_floor:g}{against}.",
            lambda connection, column, thorough, run_id: _golden_mrr(
                file, connection, column, thorough, run_id
            ),
        ),
        _Check(
            "index_recall",
            f"The HNSW index finds at least {embedding.recall_floor:.0%} of what an exact search "
            "finds.",
            lambda connection, column, thorough, run_id: _index_recall(
                file, connection, column, thorough, run_id
            ),
        ),
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
        selected = {check.name for check in context.selected_asset_check_keys}
        thorough = key not in (context.run.asset_selection or ())
        for check in checks:
            if check.name not in selected:
                continue
            try:
                column = bind_column(file.spec, embedding.column)
                with connect() as connection:
                    verdict = check.measure(connection, column, thorough, context.run.run_id)
            except PipelineError as error:
                verdict = not_evaluated(str(error))
            except psycopg.Error as error:
                verdict = not_evaluated(f"the database said: {str(error).strip()}")
            yield check_result(verdict, key, check.name)

    return run_checks


def check_result(verdict: Verdict, key: dg.AssetKey, name: str) -> dg.AssetCheckResult:
    """A verdict as Dagster records it: "not evaluated" is a failed check of severity WARN."""
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=name,
        passed=verdict.passed,
        severity=dg.AssetCheckSeverity.ERROR
        if verdict.severity == "error"
        else dg.AssetCheckSeverity.WARN,
        description=verdict.summary,
        metadata={"evaluated": verdict.status != "not_evaluated", **verdict.metadata},
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


def _coverage(connection: "psycopg.Connection[Any]", column: Column, thorough: bool) -> Verdict:
    counts, exact = counted(connection, column, thorough)
    since = note_pending(connection, column, counts.pending.pending > 0)
    in_flight = any(lease.live for lease in read_leases(connection, column).values())
    verdict = coverage_verdict(
        counts,
        pending_since=since,
        now=datetime.now(UTC),
        max_pending_minutes=column.embedding.max_pending_minutes,
        max_quarantined_share=column.embedding.max_quarantined_share,
        in_flight=in_flight,
    )
    verdict.metadata["rows_estimated"] = not exact
    return verdict


def _golden_mrr(
    file: TableFile,
    connection: "psycopg.Connection[Any]",
    column: Column,
    thorough: bool,
    run_id: str,
) -> Verdict:
    golden = golden_set(file)
    if golden is None:
        return not_evaluated("the table's YAML names no golden set")
    if thorough:
        evaluation = evaluation_of_run(connection, column, golden, run_id)
    else:
        known = latest(connection, column)
        if known is None:
            return not_evaluated(
                "the golden set is evaluated once the column is complete, and nightly"
            )
        evaluation = known
    name = column.embedding.baseline
    baseline = None
    if name is not None:
        baseline_column = bind_column(file.spec, name)
        baseline = (
            evaluation_of_run(connection, baseline_column, golden, run_id)
            if thorough
            else latest(connection, baseline_column)
        )
    return golden_mrr_verdict(
        evaluation,
        baseline,
        column.embedding.mrr_floor,
        column.embedding.baseline_ratio,
        baseline_column=name,
        golden_set_hash=golden.hash,
        recipe=column.embedding.recipe,
    )


def _vectors_valid(
    connection: "psycopg.Connection[Any]", column: Column, thorough: bool
) -> Verdict:
    small = estimated_rows(connection, column) <= SAMPLED_ROWS
    sample = None if thorough or small else SAMPLED_ROWS
    return vectors_valid_verdict(vectors_valid(connection, column, sample=sample))


def _index_recall(
    file: TableFile,
    connection: "psycopg.Connection[Any]",
    column: Column,
    thorough: bool,
    run_id: str,
) -> Verdict:
    golden = golden_set(file)
    pending = count_kinds(connection, column).pending
    if golden is not None:
        evaluation = (
            evaluation_of_run(connection, column, golden, run_id)
            if thorough
            else latest(connection, column)
        )
        measured = evaluation.measured_index if evaluation is not None else None
    else:
        measured = index_recall(connection, column) if thorough else None
    return index_recall_verdict(
        measured,
        column.embedding.recall_floor,
        pending=pending,
        reason="the index is measured once the column is complete, and nightly",
    )
