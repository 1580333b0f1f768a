"""MRR@5, hit@1 and nDCG@10 over rankings, by trec_eval (package pytrec-eval-terrier).

trec_eval sorts a run itself: by score in single precision, ties by document id *descending*
(its `form_res_rels.c`). Two scores that differ only in double precision would so change places.
Rankings are therefore ordered here (score descending, then key) and handed over with their
ranks as scores, which leaves nothing to sort.
"""

import statistics
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

MRR_CUT = 5
NDCG_CUT = 10

Document = TypeVar("Document", bound=Hashable)


@dataclass(frozen=True)
class QueryScore:
    """One query's figures, each in [0, 1]."""

    reciprocal_rank: float
    """1 / rank of the first relevant row among the first 5, else 0."""
    hit: float
    """1 when the first row is relevant, else 0."""
    ndcg: float
    """Binary relevance, first 10 rows; the ideal has every relevant row (at most 10) in front."""
    rank: int | None
    """Rank of the first relevant row in the whole ranking, from 1; None when it has none."""


@dataclass(frozen=True)
class MeanScores:
    """Means over the queries that were scored; None when there was none."""

    queries: int
    mrr_at_5: float | None
    hit_at_1: float | None
    ndcg_at_10: float | None


def ranked(scored: Iterable[tuple[Any, float]]) -> list[Any]:
    """Documents by score descending, equal scores by document ascending."""
    return [document for document, _ in sorted(scored, key=lambda pair: (-pair[1], pair[0]))]


def score_rankings(
    rankings: Sequence[Sequence[Document]], relevant: Sequence[Collection[Document]]
) -> list[QueryScore | None]:
    """Score one ranking (best first) for each query against its relevant documents.

    None for a query without relevant documents: there is nothing it could have found. A
    document that stands twice in a ranking counts where it stands first.
    """
    import pytrec_eval

    judged: dict[str, dict[str, int]] = {}
    first_ten: dict[str, dict[str, float]] = {}
    first_ranks: dict[str, int | None] = {}
    for number, (ranking, wanted) in enumerate(zip(rankings, relevant, strict=True)):
        if not wanted:
            continue
        distinct = list(dict.fromkeys(ranking))
        # trec_eval's ids are strings: documents get numbers
        ids = {document: str(i) for i, document in enumerate(dict.fromkeys([*distinct, *wanted]))}
        query = str(number)
        judged[query] = {ids[document]: 1 for document in wanted}
        first_ten[query] = {
            ids[document]: float(NDCG_CUT - place)
            for place, document in enumerate(distinct[:NDCG_CUT])
        }
        found = (place for place, document in enumerate(distinct, start=1) if document in wanted)
        first_ranks[query] = next(found, None)
    first_five = {
        query: {document: score for document, score in run.items() if score > NDCG_CUT - MRR_CUT}
        for query, run in first_ten.items()
    }
    reciprocal = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(first_five)
    others = pytrec_eval.RelevanceEvaluator(judged, {"success.1", f"ndcg_cut.{NDCG_CUT}"}).evaluate(
        first_ten
    )
    scores: list[QueryScore | None] = [None] * len(rankings)
    for query, rank in first_ranks.items():
        scores[int(query)] = QueryScore(
            reciprocal_rank=reciprocal[query]["recip_rank"],
            hit=others[query]["success_1"],
            ndcg=others[query][f"ndcg_cut_{NDCG_CUT}"],
            rank=rank,
        )
    return scores


def mean_scores(scores: Sequence[QueryScore | None]) -> MeanScores:
    """Means over the scored queries."""
    kept = [score for score in scores if score is not None]
    if not kept:
        return MeanScores(0, None, None, None)
    return MeanScores(
        len(kept),
        statistics.fmean(score.reciprocal_rank for score in kept),
        statistics.fmean(score.hit for score in kept),
        statistics.fmean(score.ndcg for score in kept),
    )
