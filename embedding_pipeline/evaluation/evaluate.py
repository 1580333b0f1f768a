"""Evaluate one embedding column against its golden set."""

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import psycopg

from embedding_pipeline.evaluation.errors import NothingToEvaluateError
from embedding_pipeline.evaluation.golden_set import GoldenSet
from embedding_pipeline.evaluation.history import record
from embedding_pipeline.evaluation.metrics import QueryScore, mean_scores, score_rankings
from embedding_pipeline.evaluation.nearest import (
    EF_SEARCH,
    Nearest,
    Neighbour,
    Searcher,
    percentile,
)
from embedding_pipeline.evaluation.query_vectors import (
    EmbedderFactory,
    QueryVectors,
    query_vectors,
)
from embedding_pipeline.evaluation.result import Evaluation, Found, QueryResult
from embedding_pipeline.evaluation.rows import Expected, find_expected, snippets
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.pending import coverage as count_coverage

FOUND_KEPT = 3
"""Rows kept for each query, to show what was found instead of the expected one."""

Progress = Callable[[int, int], None]
"""Called with (queries searched, queries in all), from another thread."""

T = TypeVar("T")


async def evaluate_column(
    connection: "psycopg.Connection[Any]",
    column: Column,
    golden: GoldenSet,
    make_embedder: EmbedderFactory,
    *,
    run_id: str | None = None,
    coverage: float | None = None,
    ef_search: int = EF_SEARCH,
    progress: Progress | None = None,
) -> Evaluation:
    """Search the column for every golden query, score what is found, and record the result.

    Each query is searched exactly and through the HNSW index (`nearest.Searcher` says how they
    are made and timed), within its tenant if it has one. Queries none of whose expected rows
    exist any more are counted in `missing_expected` and left out of every mean.

    `connection` is in autocommit mode, outside a transaction, and used by nobody else
    meanwhile; its queries run in a thread, one after another, so that the event loop stays
    free. `coverage` (share of eligible rows with a current vector) is counted, by a full scan,
    where it is not given. Writes a row of `golden_set_result` and the column's `evaluated_at`,
    which is the time of the start: what is written meanwhile may not have been seen.

    Raises EvaluationError ("not evaluated: …") when there is no figure to give: nothing is
    embedded yet, a query cannot be embedded, a golden key does not fit the table.
    """
    prepared = await _in_thread(connection, lambda: _prepare(connection, column, golden, coverage))
    asked = [
        query.query
        for query, rows in zip(golden.queries, prepared.expected, strict=True)
        if rows.existing
    ]
    embedded = await query_vectors(connection, column, asked, make_embedder)
    return await _in_thread(
        connection,
        lambda: _search_and_record(
            connection, column, golden, prepared, embedded, run_id, ef_search, progress
        ),
    )


def measure_coverage(connection: "psycopg.Connection[Any]", column: Column) -> float | None:
    """Share of the eligible rows that have a current vector; None when none is eligible."""
    counts = count_coverage(connection, column)
    kinds = counts.pending
    eligible = counts.embedded + kinds.missing + kinds.stale + kinds.quarantined
    return counts.embedded / eligible if eligible else None


@dataclass(frozen=True)
class _Prepared:
    started_at: datetime
    coverage: float
    expected: Sequence[Expected]


def _prepare(
    connection: "psycopg.Connection[Any]",
    column: Column,
    golden: GoldenSet,
    coverage: float | None,
) -> _Prepared:
    clock = connection.execute("SELECT clock_timestamp()").fetchone()
    assert clock is not None
    if coverage is None:
        coverage = measure_coverage(connection, column)
    if not coverage:
        raise NothingToEvaluateError(f"{column} has no embedded rows yet; materialise it first")
    return _Prepared(clock[0], coverage, find_expected(connection, column, golden))


def _search_and_record(
    connection: "psycopg.Connection[Any]",
    column: Column,
    golden: GoldenSet,
    prepared: _Prepared,
    embedded: QueryVectors,
    run_id: str | None,
    ef_search: int,
    progress: Progress | None,
) -> Evaluation:
    searcher = Searcher(connection, column, ef_search=ef_search)
    expected = prepared.expected
    nearest: list[Nearest | None] = []
    for number, (query, rows) in enumerate(zip(golden.queries, expected, strict=True), start=1):
        known = bool(rows.existing)
        nearest.append(
            searcher.search(embedded.vectors[query.query], query.tenant) if known else None
        )
        if progress is not None:
            progress(number, len(golden))
    asked = [each for each in nearest if each is not None]
    by_index = [each for each in asked if each.index is not None]
    if len(by_index) < len(asked):  # an index that serves a part of the queries serves none
        by_index = []
    exact_scores = _scores(expected, [each.exact if each else None for each in nearest])
    index_scores: list[QueryScore | None] = [None] * len(nearest)
    if by_index:
        index_scores = _scores(expected, [each.index if each else None for each in nearest])
    recalls = [each.recall for each in by_index if each.recall is not None]
    means = mean_scores(exact_scores)
    evaluation = Evaluation(
        table_schema=column.facts.schema,
        table_name=column.facts.name,
        column_name=column.embedding.column,
        model=column.embedding.model,
        evaluated_at=prepared.started_at,
        run_id=run_id,
        queries=len(golden),
        missing_expected=sum(not rows.existing for rows in expected),
        mrr_at_5=means.mrr_at_5,
        hit_at_1=means.hit_at_1,
        ndcg_at_10=means.ndcg_at_10,
        p50_ms=percentile([each.exact_ms for each in asked], 50),
        p95_ms=percentile([each.exact_ms for each in asked], 95),
        index_mrr_at_5=mean_scores(index_scores).mrr_at_5,
        index_recall=statistics.fmean(recalls) if recalls else None,
        index_p50_ms=percentile([each.index_ms for each in by_index if each.index_ms], 50),
        index_p95_ms=percentile([each.index_ms for each in by_index if each.index_ms], 95),
        coverage=prepared.coverage,
        recipe=column.embedding.recipe,
        golden_set_hash=golden.hash,
        partly_missing=sum(bool(rows.existing and rows.missing) for rows in expected),
        index=searcher.index.name,
        index_reason=searcher.index.reason,
        ef_search=ef_search,
        results=_results(connection, column, golden, expected, nearest, exact_scores, index_scores),
        queries_embedded=embedded.embedded,
        requests=embedded.requests,
    )
    record(connection, evaluation)
    return evaluation


def _scores(
    expected: Sequence[Expected], rankings: Sequence[Sequence[Neighbour] | None]
) -> list[QueryScore | None]:
    return score_rankings(
        [[row.key for row in ranking or ()] for ranking in rankings],
        [rows.existing for rows in expected],
    )


def _results(
    connection: "psycopg.Connection[Any]",
    column: Column,
    golden: GoldenSet,
    expected: Sequence[Expected],
    nearest: Sequence[Nearest | None],
    exact_scores: Sequence[QueryScore | None],
    index_scores: Sequence[QueryScore | None],
) -> tuple[QueryResult, ...]:
    kept = [
        near.exact[: 1 if score.rank == 1 else FOUND_KEPT] if near and score else []
        for near, score in zip(nearest, exact_scores, strict=True)
    ]
    texts = snippets(connection, column, [row.key for rows in kept for row in rows])
    return tuple(
        QueryResult(
            query=query.query,
            tenant=query.tenant,
            expected=rows.existing,
            missing=rows.missing,
            pending=rows.pending,
            rank=exact.rank if exact else None,
            reciprocal_rank=exact.reciprocal_rank if exact else None,
            hit=exact.hit if exact else None,
            ndcg=exact.ndcg if exact else None,
            index_rank=indexed.rank if indexed else None,
            index_reciprocal_rank=indexed.reciprocal_rank if indexed else None,
            index_recall=near.recall if near and indexed else None,
            found=tuple(Found(row.key, row.score, texts.get(row.key, "")) for row in found),
        )
        for query, rows, near, exact, indexed, found in zip(
            golden.queries, expected, nearest, exact_scores, index_scores, kept, strict=True
        )
    )


async def _in_thread(connection: "psycopg.Connection[Any]", work: Callable[[], T]) -> T:
    """Run database work in a thread; when the task is cancelled, the query is, too."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():  # again, since the thread may have been between two queries
            connection.cancel_safe()
            await asyncio.wait([task], timeout=0.2)
        task.exception()
        raise
