"""A check that could not be made never passes; one that fails says what to do."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.evaluation.result import IndexRecall
from embedding_pipeline.evaluation.vectors import VectorsValid
from embedding_pipeline.evaluation.verdict import (
    Verdict,
    coverage_verdict,
    golden_mrr_verdict,
    index_recall_verdict,
    vectors_valid_verdict,
)
from embedding_pipeline.store.pending import Coverage, PendingCount
from embedding_pipeline_tests.evaluation.factories import evaluation, query_result

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def outcome(verdict: Verdict) -> tuple[str, str]:
    return verdict.status, verdict.severity


class TestGoldenMrr:
    def test_above_the_floor_passes_where_no_baseline_is_named(self) -> None:
        verdict = golden_mrr_verdict(evaluation([1, 2]), None, floor=0.75, ratio=0.9)
        assert verdict.passed
        assert verdict.metadata["mrr_at_5"] == 0.75
        assert verdict.metadata["hit_at_1"] == 0.5

    def test_below_the_floor_fails(self) -> None:
        verdict = golden_mrr_verdict(evaluation([1, None]), None, floor=0.6, ratio=0.9)
        assert outcome(verdict) == ("failed", "error")
        assert "0.500, below the floor of 0.6" in verdict.summary

    def test_as_good_as_the_ratio_asks_passes_and_less_fails(self) -> None:
        baseline = evaluation([1] * 10, column="old")
        nine = evaluation([1] * 9 + [None])
        verdict = golden_mrr_verdict(nine, baseline, floor=0.1, ratio=0.9, baseline_column="old")
        assert verdict.passed  # exactly 0.9
        eight = evaluation([1] * 8 + [None] * 2)
        verdict = golden_mrr_verdict(eight, baseline, floor=0.1, ratio=0.9, baseline_column="old")
        assert outcome(verdict) == ("failed", "error")
        assert "2 queries worse, 0 better" in verdict.summary
        assert verdict.metadata["ratio_to_baseline"] == pytest.approx(0.8)

    def test_a_floor_missed_fails_even_without_the_baseline(self) -> None:
        verdict = golden_mrr_verdict(
            evaluation([None]), None, floor=0.3, ratio=0.9, baseline_column="old"
        )
        assert outcome(verdict) == ("failed", "error")

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"coverage": 0.9}, "90.0% of the rows was embedded"),
            ({"coverage": None}, "an unknown share"),
            ({"recipe": "former"}, "of another recipe"),
            ({"golden_set_hash": "former"}, "on another golden set"),
        ],
    )
    def test_an_unfit_evaluation_is_not_judged_by(self, changes: dict[str, Any], why: str) -> None:
        for ranks in ([1], [None]):
            verdict = golden_mrr_verdict(
                evaluation(ranks, **changes),
                None,
                floor=0.3,
                ratio=0.9,
                recipe="a-recipe",
                golden_set_hash="0123456789abcdef",
            )
            assert outcome(verdict) == ("not_evaluated", "warn")
            assert why in verdict.summary

    def test_no_evaluation_is_said_with_its_reason(self) -> None:
        verdict = golden_mrr_verdict(None, None, floor=0.3, ratio=0.9, reason="no golden set")
        assert verdict.summary == "not evaluated: no golden set"
        assert not golden_mrr_verdict(None, None, floor=0.3, ratio=0.9).passed

    def test_expected_rows_that_are_all_gone_are_not_misses(self) -> None:
        gone = tuple(query_result(f"q{i}", None, missing=True) for i in range(3))
        verdict = golden_mrr_verdict(evaluation(results=gone), None, floor=0.3, ratio=0.9)
        assert verdict.status == "not_evaluated"
        assert "none of the rows" in verdict.summary

    def test_a_mean_over_few_of_the_queries_is_not_the_sets(self) -> None:
        left = (query_result("q", 1), *(query_result(f"q{i}", None, missing=True) for i in (1, 2)))
        verdict = golden_mrr_verdict(evaluation(results=left), None, floor=0.3, ratio=0.9)
        assert verdict.status == "not_evaluated"
        assert "2 of 3 queries" in verdict.summary

    @pytest.mark.parametrize(
        ("baseline", "why"),
        [
            (None, "the baseline old has not been evaluated yet"),
            ({"golden_set_hash": "other"}, "the baseline old: the last evaluation was on another"),
            ({"coverage": 0.5}, "the baseline old: 50.0% of the rows"),
        ],
    )
    def test_an_unfit_baseline_leaves_it_undecided(
        self, baseline: dict[str, Any] | None, why: str
    ) -> None:
        old = None if baseline is None else evaluation([1], column="old", **baseline)
        verdict = golden_mrr_verdict(
            evaluation([1]), old, floor=0.3, ratio=0.9, baseline_column="old"
        )
        assert verdict.status == "not_evaluated"
        assert why in verdict.summary

    def test_a_miss_that_pending_rows_explain_is_no_failure(self) -> None:
        results = (query_result("a", 1), query_result("b", None, pending=True))
        candidate = evaluation(results=results, coverage=0.97)
        verdict = golden_mrr_verdict(candidate, None, floor=0.8, ratio=0.9)
        assert verdict.status == "not_evaluated"
        assert "1 queries are pending" in verdict.summary
        baseline = evaluation(results=(query_result("a", 1), query_result("b", 1)), column="old")
        verdict = golden_mrr_verdict(candidate, baseline, floor=0.3, ratio=0.9)
        assert verdict.status == "not_evaluated"

    def test_a_miss_that_pending_rows_do_not_explain_is_one(self) -> None:
        results = (query_result("a", None), query_result("b", None, pending=True))
        verdict = golden_mrr_verdict(evaluation(results=results), None, floor=0.8, ratio=0.9)
        assert verdict.status == "failed"

    def test_a_baseline_that_finds_nothing_leaves_the_floor(self) -> None:
        baseline = evaluation([None, None], column="old")
        assert golden_mrr_verdict(evaluation([1, 1]), baseline, floor=0.3, ratio=0.9).passed


class TestIndexRecall:
    def test_floor(self) -> None:
        good = IndexRecall(0.95, 30, "docs_hnsw", None)
        assert index_recall_verdict(good, 0.95, pending=0).passed
        verdict = index_recall_verdict(good, 0.96, pending=0)
        assert outcome(verdict) == ("failed", "error")

    def test_without_an_index_it_fails_once_rows_are_in(self) -> None:
        none = IndexRecall(None, 0, None, "docs has no HNSW index")
        verdict = index_recall_verdict(none, 0.9, pending=0)
        assert outcome(verdict) == ("failed", "error")
        assert "docs has no HNSW index" in verdict.summary
        verdict = index_recall_verdict(none, 0.9, pending=5)
        assert outcome(verdict) == ("not_evaluated", "warn")

    def test_nothing_to_look_for_is_not_evaluated(self) -> None:
        for measured in (None, IndexRecall(None, 0, "docs_hnsw", None)):
            assert index_recall_verdict(measured, 0.0, pending=0).status == "not_evaluated"


def valid(**changes: Any) -> VectorsValid:
    values: dict[str, Any] = {
        "scope": "all",
        "rows": 100,
        "zero": 0,
        "not_unit": 0,
        "norm_min": 1.0,
        "norm_max": 1.0,
        "identical": 0,
        "contradictory": 0,
        "zero_keys": (),
        "identical_keys": (),
    }
    return VectorsValid(**values | changes)


class TestVectorsValid:
    def test_sound_vectors_pass(self) -> None:
        assert vectors_valid_verdict(valid()).passed
        assert vectors_valid_verdict(valid(not_unit=100, norm_max=3.0)).passed
        alike = vectors_valid_verdict(valid(identical=2))
        assert alike.passed
        assert "2 rows share" in alike.summary

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"zero": 1, "zero_keys": ((7,),)}, "1 vectors are all zeros"),
            ({"identical": 100}, "100 of 100 rows share a vector"),
            ({"contradictory": 1}, "1 rows differ from another row with the same text"),
        ],
    )
    def test_unsound_vectors_fail(self, changes: dict[str, Any], why: str) -> None:
        verdict = vectors_valid_verdict(valid(**changes))
        assert outcome(verdict) == ("failed", "error")
        assert why in verdict.summary

    def test_no_vectors_are_not_valid_vectors(self) -> None:
        assert vectors_valid_verdict(valid(rows=0)).status == "not_evaluated"
        assert vectors_valid_verdict(None, reason="the scan failed").status == "not_evaluated"


def counts(embedded: int = 100, **kinds: int) -> Coverage:
    pending = PendingCount(**kinds)
    return Coverage(embedded + pending.pending + pending.quarantined, embedded, pending, 0)


def judge(found: Coverage | None, minutes: float | None = None, **changes: Any) -> Verdict:
    values: dict[str, Any] = {
        "pending_since": None if minutes is None else NOW - timedelta(minutes=minutes),
        "now": NOW,
        "max_pending_minutes": 60,
        "max_quarantined_share": 0.01,
    }
    return coverage_verdict(found, **values | changes)


class TestCoverage:
    def test_none_pending_passes(self) -> None:
        assert judge(counts()).passed
        assert judge(counts(), minutes=1000).passed  # the note is older than the last rows
        assert judge(counts(quarantined=1)).passed

    def test_pending_rows_are_a_warning_at_first_and_an_error_later(self) -> None:
        some = counts(missing=3, stale=1)
        for minutes in (None, 0, 60, -5):
            assert outcome(judge(some, minutes)) == ("failed", "warn")
        verdict = judge(some, 61)
        assert outcome(verdict) == ("failed", "error")
        assert "4 rows are pending (3 missing, 1 stale, 0 to clear)" in verdict.summary

    def test_a_run_at_work_or_a_limited_one_stays_calm(self) -> None:
        some = counts(missing=50)
        assert outcome(judge(some, 1000, in_flight=True)) == ("failed", "warn")
        assert outcome(judge(some, 1000, limited=True)) == ("failed", "warn")

    def test_too_many_quarantined_rows_are_an_error_even_in_flight(self) -> None:
        verdict = judge(counts(embedded=98, quarantined=2), in_flight=True)
        assert outcome(verdict) == ("failed", "error")
        assert "2 rows (2.0%) are quarantined" in verdict.summary

    def test_what_could_not_be_counted_has_not_passed(self) -> None:
        assert outcome(judge(None, reason="no connection")) == ("not_evaluated", "warn")


@given(
    st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5), st.booleans(),
    st.booleans(), st.none() | st.floats(0, 1000),
)  # fmt: skip
def test_coverage_passes_only_when_nothing_is_pending(
    missing: int, stale: int, to_clear: int, quarantined: int, in_flight: bool, limited: bool,
    minutes: float | None,
) -> None:  # fmt: skip
    found = counts(
        embedded=10, missing=missing, stale=stale, to_clear=to_clear, quarantined=quarantined
    )
    verdict = judge(found, minutes, in_flight=in_flight, limited=limited)
    assert verdict.passed == (missing + stale + to_clear + quarantined == 0)
    assert verdict.metadata["missing"] == missing
