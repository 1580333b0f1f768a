"""Evaluations made up for tests of what only reads them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from embedding_pipeline.evaluation.keys import Key
from embedding_pipeline.evaluation.metrics import QueryScore, mean_scores, score_rankings
from embedding_pipeline.evaluation.result import Evaluation, Found, QueryResult


def query_result(
    query: str,
    rank: int | None,
    *,
    expected: Key = (1,),
    tenant: str | None = None,
    pending: bool = False,
    missing: bool = False,
    snippet: str = "another row",
) -> QueryResult:
    """A query whose one expected row was found at `rank`, in the exact way and by index."""
    if missing:
        return QueryResult(
            query=query,
            tenant=tenant,
            expected=(),
            missing=(expected,),
            pending=(),
            rank=None,
            reciprocal_rank=None,
            hit=None,
            ndcg=None,
            index_rank=None,
            index_reciprocal_rank=None,
            index_recall=None,
            found=(),
        )
    ranking: list[Key] = [(f"other {place}",) for place in range(1, 11)]
    if rank is not None:
        ranking[rank - 1] = expected
    (score,) = score_rankings([ranking], [[expected]])
    assert score is not None
    return QueryResult(
        query=query,
        tenant=tenant,
        expected=(expected,),
        missing=(),
        pending=(expected,) if pending else (),
        rank=rank,
        reciprocal_rank=score.reciprocal_rank,
        hit=score.hit,
        ndcg=score.ndcg,
        index_rank=rank,
        index_reciprocal_rank=score.reciprocal_rank,
        index_recall=1.0,
        found=tuple(Found(key, 0.9 - 0.1 * i, snippet) for i, key in enumerate(ranking[:3])),
    )


def evaluation(
    ranks: Sequence[int | None] = (1, 1, 2), *, column: str = "embedding_384", **changes: Any
) -> Evaluation:
    """One query for each rank, unless `results` are given."""
    results = changes.pop("results", None) or tuple(
        query_result(f"query {number}", rank) for number, rank in enumerate(ranks)
    )
    scored = [each for each in results if each.scored]
    means = mean_scores(
        [
            QueryScore(each.reciprocal_rank, each.hit, each.ndcg, each.rank)
            if each.scored
            else None
            for each in results
        ]
    )
    values: dict[str, Any] = {
        "table_schema": "public",
        "table_name": "docs",
        "column_name": column,
        "model": "a-model",
        "evaluated_at": datetime(2026, 3, 1, 12, 30, tzinfo=UTC),
        "run_id": None,
        "queries": len(results),
        "missing_expected": len(results) - len(scored),
        "mrr_at_5": means.mrr_at_5,
        "hit_at_1": means.hit_at_1,
        "ndcg_at_10": means.ndcg_at_10,
        "p50_ms": 1.5,
        "p95_ms": 2.5,
        "index_mrr_at_5": means.mrr_at_5,
        "index_recall": 1.0,
        "index_p50_ms": 0.5,
        "index_p95_ms": 0.7,
        "coverage": 1.0,
        "recipe": "a-recipe",
        "golden_set_hash": "0123456789abcdef",
        "partly_missing": 0,
        "index": "docs_hnsw",
        "index_reason": None,
        "ef_search": 100,
        "results": results,
    }
    return Evaluation(**values | changes)
