"""Evaluating a table's golden set on all its columns, as assets, checks and the CLI need it."""

import asyncio
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg

from embedding_pipeline.embed_column import make_embedder
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.evaluation.errors import NothingToEvaluateError
from embedding_pipeline.evaluation.evaluate import evaluate_column
from embedding_pipeline.evaluation.golden_set import GoldenSet, load_golden_set
from embedding_pipeline.evaluation.history import Point, history, latest, mrr_over_time
from embedding_pipeline.evaluation.plot import mrr_plot
from embedding_pipeline.evaluation.report import HISTORY, quality_report
from embedding_pipeline.evaluation.result import Evaluation
from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec_files import TableFile
from embedding_pipeline.store.catalogue import bind_columns
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.registry import verify

PLOTTED_EVALUATIONS = 100
"""So many of a column's newest evaluations stand in the plot of the report."""
PLOTTED = ("mrr_at_5", "hit_at_1", "ndcg_at_10", "p50_ms", "p95_ms", "index_recall")


def golden_set(file: TableFile) -> GoldenSet | None:
    """The table's golden set; None where its YAML names none."""
    path: Path | None = file.golden_set_path
    return load_golden_set(path, file.spec) if path is not None else None


def evaluate_one(
    connection: "psycopg.Connection[Any]", column: Column, golden: GoldenSet, run_id: str | None
) -> Evaluation:
    """Evaluate one column now and record it."""
    verify(connection, column, load_settings().embedding_pipeline_environment)
    return asyncio.run(evaluate_column(connection, column, golden, make_embedder, run_id=run_id))


def evaluation_of_run(
    connection: "psycopg.Connection[Any]", column: Column, golden: GoldenSet, run_id: str
) -> Evaluation:
    """The evaluation that this run made of a column; made now if it has not."""
    known = latest(connection, column)
    if known is not None and known.run_id == run_id:
        return known
    return evaluate_one(connection, column, golden, run_id)


def evaluate_table(
    file: TableFile, run_id: str | None
) -> dict[str, int | float | str | dg.MetadataValue]:
    """Evaluate every column of a table; returns the asset's metadata.

    Columns that cannot be evaluated are named in the report and do not stop the others. When none
    could be, the error of the first is raised, unless there is nothing to evaluate: no rows.
    """
    golden = golden_set(file)
    if golden is None:
        return {"report": dg.MetadataValue.md("This table has no golden set (`golden_set:`).")}
    metadata: dict[str, int | float | str | dg.MetadataValue] = {"queries": len(golden.queries)}
    evaluations: list[Evaluation] = []
    problems: dict[str, PipelineError] = {}
    histories: dict[str, list[Evaluation]] = {}
    plotted: dict[str, list[Point]] = {}
    with connect() as connection:
        for column in bind_columns(connection, file.spec):
            name = column.embedding.column
            try:
                evaluation = evaluate_one(connection, column, golden, run_id)
            except PipelineError as error:
                problems[name] = error
                continue
            evaluations.append(evaluation)
            histories[name] = history(connection, column, HISTORY)
            plotted[name] = mrr_over_time(connection, column, PLOTTED_EVALUATIONS)
            for figure in PLOTTED:
                value = getattr(evaluation, figure)
                if value is not None:
                    metadata[f"{name}_{figure}"] = round(float(value), 4)
    # without a vector there is nothing to judge; any other reason is somebody's to mend
    defects = [p for p in problems.values() if not isinstance(p, NothingToEvaluateError)]
    if defects and not evaluations:
        raise defects[0]
    if not evaluations:
        lines = [f"**`{name}`**: {problem}" for name, problem in problems.items()]
        return metadata | {"report": dg.MetadataValue.md("\n\n".join(lines))}
    baselines = {item.column: item.baseline for item in file.spec.embeddings if item.baseline}
    floors = {item.column: item.mrr_floor for item in file.spec.embeddings}
    report = quality_report(
        file.spec.table, evaluations, baselines, histories, plot=mrr_plot(plotted, floors)
    )
    for name, problem in problems.items():
        report += f"\n\n**`{name}`**: {problem}"
    metadata["report"] = dg.MetadataValue.md(report)
    return metadata
