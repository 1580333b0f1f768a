"""trec_eval's figures against the formulas written out."""

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.evaluation.metrics import mean_scores, ranked, score_rankings

DOCUMENTS = st.integers(0, 25)
RANKINGS = st.lists(DOCUMENTS, unique=True, max_size=15)
RELEVANT = st.sets(DOCUMENTS, max_size=14)


def reference_mrr(ranking: list[int], relevant: set[int]) -> float:
    return next((1 / r for r, doc in enumerate(ranking[:5], start=1) if doc in relevant), 0.0)


def reference_ndcg(ranking: list[int], relevant: set[int]) -> float:
    """Järvelin and Kekäläinen 2002, with the discount log2(rank + 1) from rank 1."""
    gained = sum(
        1 / math.log2(rank + 1) for rank, doc in enumerate(ranking[:10], start=1) if doc in relevant
    )
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(relevant), 10) + 1))
    return gained / ideal


@given(st.lists(st.tuples(RANKINGS, RELEVANT), max_size=6))
def test_figures_are_those_of_the_formulas(cases: list[tuple[list[int], set[int]]]) -> None:
    scores = score_rankings([ranking for ranking, _ in cases], [wanted for _, wanted in cases])
    assert len(scores) == len(cases)
    for (ranking, relevant), score in zip(cases, scores, strict=True):
        if not relevant:
            assert score is None
            continue
        assert score is not None
        assert score.reciprocal_rank == pytest.approx(reference_mrr(ranking, relevant))
        assert score.hit == float(ranking[:1] != [] and ranking[0] in relevant)
        assert score.ndcg == pytest.approx(reference_ndcg(ranking, relevant))
        places = [rank for rank, doc in enumerate(ranking, start=1) if doc in relevant]
        assert score.rank == (places[0] if places else None)


@given(st.lists(st.tuples(RANKINGS, RELEVANT), max_size=6))
def test_the_mean_is_over_the_queries_that_could_find_something(
    cases: list[tuple[list[int], set[int]]],
) -> None:
    scores = score_rankings([ranking for ranking, _ in cases], [wanted for _, wanted in cases])
    mean = mean_scores(scores)
    known = [(ranking, relevant) for ranking, relevant in cases if relevant]
    assert mean.queries == len(known)
    if not known:
        assert (mean.mrr_at_5, mean.hit_at_1, mean.ndcg_at_10) == (None, None, None)
    else:
        total = sum(reference_mrr(ranking, relevant) for ranking, relevant in known)
        assert mean.mrr_at_5 == pytest.approx(total / len(known))


def test_a_query_that_found_nothing_scores_zero_and_is_not_dropped() -> None:
    # trec_eval leaves queries out that are not in the run
    scores = score_rankings([[], ["a"]], [["x"], ["a"]])
    assert [score and score.reciprocal_rank for score in scores] == [0.0, 1.0]
    assert mean_scores(scores).mrr_at_5 == 0.5


def test_rank_six_is_beyond_mrr_at_5_but_within_ndcg_at_10() -> None:
    (score,) = score_rankings([[0, 1, 2, 3, 4, 5]], [[5]])
    assert score is not None
    assert (score.reciprocal_rank, score.rank) == (0.0, 6)
    assert score.ndcg == pytest.approx(1 / math.log2(7))


def test_scores_that_differ_only_in_double_precision_keep_their_order() -> None:
    # trec_eval itself compares in single precision and would put "b" before "a"
    assert ranked([("b", 0.5), ("a", 0.5 + 1e-12)]) == ["a", "b"]
    (score,) = score_rankings([["a", "b"]], [["a"]])
    assert score is not None
    assert score.reciprocal_rank == 1.0


@given(st.dictionaries(DOCUMENTS, st.sampled_from([0.1, 0.2, 0.3])), st.randoms())
def test_ties_go_by_key_whatever_order_rows_came_in(
    scores: dict[int, float], random: Random
) -> None:
    rows = list(scores.items())
    shuffled = random.sample(rows, len(rows))
    order = ranked(shuffled)
    assert order == ranked(rows)
    assert [(-scores[doc], doc) for doc in order] == sorted((-s, doc) for doc, s in rows)


def test_a_document_twice_in_a_ranking_counts_once() -> None:
    (score,) = score_rankings([["a", "a", "b"]], [["b"]])
    assert score is not None
    assert score.rank == 2
