import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.evaluation.compare import compare, randomisation_p_value
from embedding_pipeline.evaluation.errors import EvaluationError
from embedding_pipeline_tests.evaluation.factories import evaluation, query_result

RANKS = st.lists(st.none() | st.integers(1, 10), min_size=1, max_size=12)


def test_wins_losses_ties_and_the_worst_queries() -> None:
    candidate = evaluation([1, 3, None, 2], column="new")
    baseline = evaluation([2, 1, 1, 2], column="old")
    comparison = compare(candidate, baseline)
    assert (comparison.wins, comparison.losses, comparison.ties) == (1, 2, 1)
    assert [pair.query for pair in comparison.worst] == ["query 2", "query 1"]
    assert comparison.worst[0].difference == -1.0
    assert comparison.candidate_mrr == pytest.approx((1 + 1 / 3 + 0 + 1 / 2) / 4)
    assert comparison.baseline_mrr == pytest.approx((1 / 2 + 1 + 1 + 1 / 2) / 4)
    assert comparison.ratio == pytest.approx((11 / 6) / 3)


def test_only_queries_scored_in_both_are_paired() -> None:
    gone = query_result("query 0", None, missing=True)
    candidate = evaluation(results=(gone, query_result("query 1", 1)))
    comparison = compare(candidate, evaluation([1, 2]))
    assert comparison.queries == 1
    assert (comparison.candidate_mrr, comparison.baseline_mrr) == (1.0, 0.5)


def test_the_same_query_of_two_tenants_is_two_queries() -> None:
    a, b = (query_result("q", rank, tenant=who) for who, rank in (("x", 1), ("y", 2)))
    comparison = compare(evaluation(results=(a, b)), evaluation(results=(b, a)))
    assert (comparison.queries, comparison.ties) == (2, 2)


def test_nothing_in_common_gives_no_figures() -> None:
    gone = (query_result("query 0", None, missing=True),)
    comparison = compare(evaluation(results=gone), evaluation([1]))
    assert (comparison.queries, comparison.ratio, comparison.p_value) == (0, None, None)


def test_different_golden_sets_are_not_compared() -> None:
    with pytest.raises(EvaluationError, match="different golden sets"):
        compare(evaluation(), evaluation(golden_set_hash="another"))


def test_a_baseline_of_zero_has_no_ratio() -> None:
    assert compare(evaluation([1, 1]), evaluation([None, None])).ratio is None


@given(RANKS, RANKS)
def test_exchanging_the_columns_exchanges_wins_and_losses(
    first: list[int | None], second: list[int | None]
) -> None:
    one = compare(evaluation(first), evaluation(second))
    two = compare(evaluation(second), evaluation(first))
    assert (one.wins, one.losses, one.ties) == (two.losses, two.wins, two.ties)
    assert one.wins + one.losses + one.ties == one.queries == min(len(first), len(second))
    assert one.p_value == two.p_value
    assert one.p_value is not None
    assert 0 < one.p_value <= 1


@given(st.lists(st.sampled_from([-1.0, -0.5, 0.0, 1 / 3, 0.5, 1.0]), min_size=1, max_size=9))
def test_p_is_near_that_of_all_permutations(differences: list[float]) -> None:
    signs = itertools.product((-1, 1), repeat=len(differences))
    seen = abs(sum(differences))
    sums = [abs(np.dot(sign, differences)) for sign in signs]
    exact = sum(total >= seen - 1e-9 for total in sums) / len(sums)
    p = randomisation_p_value(np.array(differences), seed=7)
    assert p == pytest.approx(exact, abs=0.03)  # 6 standard deviations at 10,000 draws


def test_the_seed_decides_p() -> None:
    differences = np.array([0.5, -0.25, 1.0, 0.5, -0.5, 0.75])
    assert randomisation_p_value(differences, seed=1) == randomisation_p_value(differences, seed=1)


def test_no_difference_at_all_is_no_evidence() -> None:
    assert randomisation_p_value(np.zeros(5)) == 1.0
    assert randomisation_p_value(np.array([])) is None
