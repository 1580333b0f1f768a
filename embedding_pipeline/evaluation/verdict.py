"""What the checks say of a column. Pure: figures in, a verdict out.

A check that could not be made is "not_evaluated", with the reason; it never passes.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from embedding_pipeline.evaluation.compare import compare
from embedding_pipeline.evaluation.result import Evaluation, IndexRecall, QueryResult
from embedding_pipeline.evaluation.vectors import VectorsValid
from embedding_pipeline.store.pending import Coverage

MIN_COVERAGE = 0.95
"""Below this share of embedded rows a golden set judges what is missing, not the model: expected
rows are absent, and so are the rows that compete with them."""

MIN_SCORED_SHARE = 0.5
"""Below this share of queries whose expected rows still exist the mean is no longer the set's."""

MAX_IDENTICAL_SHARE = 0.05
"""Rows that share a vector although their texts differ. Some do rightly (cut to the model's
length, alike but for capitals); a provider that answers with a constant makes all of them do."""

Status = Literal["passed", "failed", "not_evaluated"]
Severity = Literal["warn", "error"]


@dataclass(frozen=True)
class Verdict:
    """What a check says."""

    status: Status
    severity: Severity
    """Of what is not passed; only errors alert."""
    summary: str
    """One sentence or two: what was found, and what to do about it."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Figures and names, as JSON values."""

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def not_evaluated(reason: str, **metadata: Any) -> Verdict:
    """The verdict where no judgement can be made."""
    return Verdict("not_evaluated", "warn", f"not evaluated: {reason}", _present(metadata))


def golden_mrr_verdict(
    evaluation: Evaluation | None,
    baseline: Evaluation | None,
    floor: float,
    ratio: float,
    *,
    baseline_column: str | None = None,
    golden_set_hash: str | None = None,
    recipe: str | None = None,
    reason: str | None = None,
    min_coverage: float = MIN_COVERAGE,
) -> Verdict:
    """Exact MRR@5 against a floor and against `ratio` × the baseline's.

    `evaluation` and `baseline` are the latest of their columns, None where there is none;
    `baseline_column` is the baseline that the YAML names: with one, a missing baseline
    evaluation leaves the check not evaluated. Where `golden_set_hash` or `recipe` (the present
    ones) are given, an evaluation of others does not count. `reason` says why `evaluation` is
    None, e.g. that the table has no golden set.

    A failure that rows still pending may explain is not one: the check is then not evaluated.
    """
    if evaluation is None:
        return not_evaluated(reason or "the golden set has not been evaluated on this column yet")
    metadata = _golden_metadata(evaluation, floor)
    obstacle = _unfit(evaluation, golden_set_hash, recipe, min_coverage)
    if obstacle is not None:
        return not_evaluated(obstacle, **metadata)
    assert evaluation.mrr_at_5 is not None
    mrr = evaluation.mrr_at_5
    if mrr < floor:
        if _best_case_mrr(evaluation.results) >= floor:
            return not_evaluated(_pending_explains(evaluation, f"the floor {floor:g}"), **metadata)
        return Verdict(
            "failed",
            "error",
            f"MRR@5 is {mrr:.3f}, below the floor of {floor:g}; see what was found instead in "
            "the retrieval_quality report",
            metadata,
        )
    if baseline is None:
        if baseline_column is not None:
            return not_evaluated(
                f"the baseline {baseline_column} has not been evaluated yet", **metadata
            )
        return Verdict("passed", "error", f"MRR@5 is {mrr:.3f}, the floor {floor:g}", metadata)
    obstacle = _unfit(baseline, evaluation.golden_set_hash, None, min_coverage)
    if obstacle is not None:
        return not_evaluated(f"the baseline {baseline.column_name}: {obstacle}", **metadata)
    return _against_baseline(evaluation, baseline, floor, ratio, metadata)


def _against_baseline(
    evaluation: Evaluation,
    baseline: Evaluation,
    floor: float,
    ratio: float,
    metadata: dict[str, Any],
) -> Verdict:
    comparison = compare(evaluation, baseline)
    if comparison.candidate_mrr is None or comparison.baseline_mrr is None:
        return not_evaluated(
            f"no query was scored in both this column and {baseline.column_name}", **metadata
        )
    wanted = ratio * comparison.baseline_mrr
    metadata = metadata | _present(
        {
            "baseline": baseline.column_name,
            "baseline_mrr_at_5": comparison.baseline_mrr,
            "ratio_to_baseline": comparison.ratio,
            "required_ratio": ratio,
            "queries_compared": comparison.queries,
            "wins": comparison.wins,
            "losses": comparison.losses,
            "ties": comparison.ties,
            "p_value": comparison.p_value,
        }
    )
    found = (
        f"MRR@5 is {comparison.candidate_mrr:.3f}, the baseline {baseline.column_name}'s "
        f"{comparison.baseline_mrr:.3f}"
    )
    # the tolerance: a ratio of exactly 0.9 is enough, whatever the last bit of the mean says
    if comparison.candidate_mrr < wanted - 1e-9:
        of_both = {pair.name for pair in baseline.results if pair.scored}
        compared = tuple(result for result in evaluation.results if result.name in of_both)
        if _best_case_mrr(compared) >= wanted:
            return not_evaluated(
                _pending_explains(evaluation, f"{ratio:g} × the baseline's"), **metadata
            )
        return Verdict(
            "failed",
            "error",
            f"{found}: less than {ratio:g} × ({comparison.losses} queries worse, "
            f"{comparison.wins} better, p = {comparison.p_value:.3f})",
            metadata,
        )
    return Verdict("passed", "error", f"{found}; the floor is {floor:g}", metadata)


def _unfit(
    evaluation: Evaluation, golden_set_hash: str | None, recipe: str | None, min_coverage: float
) -> str | None:
    """Why an evaluation cannot be judged by, None when it can."""
    if recipe is not None and evaluation.recipe != recipe:
        return "the last evaluation was of another recipe; evaluate again"
    if golden_set_hash is not None and evaluation.golden_set_hash != golden_set_hash:
        return "the last evaluation was on another golden set; evaluate again"
    if evaluation.mrr_at_5 is None or evaluation.scored == 0:
        return (
            f"none of the rows that the golden set's {evaluation.queries} queries expect exist "
            "any more; bring the golden set up to date"
        )
    if evaluation.scored < MIN_SCORED_SHARE * evaluation.queries:
        return (
            f"the expected rows of {evaluation.missing_expected} of {evaluation.queries} queries "
            "do not exist any more; bring the golden set up to date"
        )
    if evaluation.coverage is None or evaluation.coverage < min_coverage:
        share = "an unknown share" if evaluation.coverage is None else f"{evaluation.coverage:.1%}"
        return (
            f"{share} of the rows was embedded when the golden set was evaluated, and "
            f"{min_coverage:.0%} is what a judgement needs; it follows when the rest is embedded"
        )
    return None


def _best_case_mrr(results: tuple[QueryResult, ...]) -> float:
    """MRR@5 if every query with a pending expected row found it first."""
    figures = [
        1.0 if result.pending else result.reciprocal_rank
        for result in results
        if result.reciprocal_rank is not None
    ]
    return sum(figures) / len(figures) if figures else 0.0


def _pending_explains(evaluation: Evaluation, bound: str) -> str:
    waiting = sum(bool(result.pending) for result in evaluation.results)
    return (
        f"MRR@5 is {evaluation.mrr_at_5:.3f}, below {bound}, but the expected rows of {waiting} "
        "queries are pending, which may explain it; evaluate again when they are embedded"
    )


def _golden_metadata(evaluation: Evaluation, floor: float) -> dict[str, Any]:
    return _present(
        {
            "mrr_at_5": evaluation.mrr_at_5,
            "hit_at_1": evaluation.hit_at_1,
            "ndcg_at_10": evaluation.ndcg_at_10,
            "index_mrr_at_5": evaluation.index_mrr_at_5,
            "floor": floor,
            "queries": evaluation.queries,
            "missing_expected": evaluation.missing_expected,
            "partly_missing": evaluation.partly_missing,
            "coverage": evaluation.coverage,
            "model": evaluation.model,
            "evaluated_at": evaluation.evaluated_at.isoformat(),
            "golden_set": evaluation.golden_set_hash[:12],
        }
    )


def index_recall_verdict(
    measured: IndexRecall | None,
    floor: float,
    *,
    pending: int,
    reason: str | None = None,
) -> Verdict:
    """HNSW recall against a floor.

    Without a usable index the check fails once no row is pending; before that the index is not
    due yet, and the check is not evaluated. `measured` is None (for `reason`) when nothing was
    looked at, e.g. because the column is empty.
    """
    if measured is None:
        return not_evaluated(reason or "the index has not been looked at yet", pending=pending)
    metadata = _present(
        {
            "index_recall": measured.recall,
            "floor": floor,
            "queries": measured.queries,
            "index": measured.index,
            "pending": pending,
        }
    )
    if measured.recall is None:
        why = measured.reason or "there was nothing to look for"
        if measured.index is None and measured.reason is not None and pending == 0:
            return Verdict(
                "failed",
                "error",
                f"{why}, so every search reads the whole table; materialise the index asset",
                metadata,
            )
        return not_evaluated(why, **metadata)
    found = f"the index finds {measured.recall:.1%} of the exact top 10"
    if measured.recall < floor:
        return Verdict(
            "failed",
            "error",
            f"{found}, less than {floor:.0%}; rebuild it (materialise the index asset) or raise "
            "hnsw.ef_search",
            metadata,
        )
    return Verdict("passed", "error", f"{found}; the floor is {floor:.0%}", metadata)


def vectors_valid_verdict(
    found: VectorsValid | None,
    *,
    max_identical_share: float = MAX_IDENTICAL_SHARE,
    reason: str | None = None,
) -> Verdict:
    """Zero vectors, vectors that contradict each other, and too many that are alike."""
    if found is None:
        return not_evaluated(reason or "the vectors have not been looked at yet")
    if found.rows == 0:
        return not_evaluated(reason or "there are no vectors yet", scope=found.scope, rows=0)
    metadata = _present(
        {
            "scope": found.scope,
            "rows": found.rows,
            "zero": found.zero,
            "not_unit": found.not_unit,
            "norm_min": found.norm_min,
            "norm_max": found.norm_max,
            "identical": found.identical,
            "identical_share": found.identical_share,
            "max_identical_share": max_identical_share,
            "contradictory": found.contradictory,
            "zero_keys": [list(key) for key in found.zero_keys] or None,
            "identical_keys": [list(key) for key in found.identical_keys] or None,
        }
    )
    problems = []
    if found.zero:
        problems.append(
            f"{found.zero} vectors are all zeros, which a cosine index leaves out silently"
        )
    if found.contradictory:
        problems.append(f"{found.contradictory} rows differ from another row with the same text")
    if found.identical_share > max_identical_share:
        problems.append(
            f"{found.identical} of {found.rows} rows share a vector with a row of another text"
        )
    if problems:
        return Verdict(
            "failed",
            "error",
            "; ".join(problems) + ". Check the provider, set those rows' vectors to NULL and "
            "materialise again",
            metadata,
        )
    alike = f", {found.identical} rows share theirs with another text" if found.identical else ""
    looked_at = {"all": "vectors", "keys": "vectors of this run", "sample": "sampled vectors"}
    return Verdict(
        "passed", "error", f"{found.rows} {looked_at[found.scope]} are valid{alike}", metadata
    )


def coverage_verdict(
    counts: Coverage | None,
    *,
    pending_since: datetime | None,
    now: datetime,
    max_pending_minutes: float,
    max_quarantined_share: float,
    in_flight: bool = False,
    limited: bool = False,
    held: str | None = None,
    reason: str | None = None,
) -> Verdict:
    """Missing and stale rows, and how long they have been pending.

    `pending_since` is when the column was last seen without a pending row, None when nobody
    noted it (taken as: just now). Pending rows are a warning while a run is at work on them
    (`in_flight`), while a brake is on that somebody chose (`held`: a pause, a cost cap), after a
    run that was asked for a part only (`limited`), and until `max_pending_minutes` have passed;
    then an error. Quarantined rows are an error past their share of the eligible ones. `counts`
    is None (for `reason`) when counting failed.
    """
    if counts is None:
        return not_evaluated(reason or "the rows could not be counted")
    kinds = counts.pending
    eligible = counts.embedded + kinds.missing + kinds.stale + kinds.quarantined
    share = kinds.quarantined / eligible if eligible else 0.0
    waiting = None
    if kinds.pending and pending_since is not None:
        waiting = max(now - pending_since, timedelta())
    metadata = _present(
        {
            "rows": counts.rows,
            "embedded": counts.embedded,
            "pending": kinds.pending,
            "missing": kinds.missing,
            "stale": kinds.stale,
            "to_clear": kinds.to_clear,
            "quarantined": kinds.quarantined,
            "quarantined_share": share,
            "max_quarantined_share": max_quarantined_share,
            "ineligible": counts.ineligible,
            "coverage": counts.embedded / eligible if eligible else None,
            "pending_minutes": waiting.total_seconds() / 60 if waiting is not None else None,
            "max_pending_minutes": max_pending_minutes,
        }
    )
    if share > max_quarantined_share:
        return Verdict(
            "failed",
            "error",
            f"{kinds.quarantined} rows ({share:.1%}) are quarantined, more than "
            f"{max_quarantined_share:.1%}; read their errors, then mend the texts or retry them",
            metadata,
        )
    if kinds.pending == 0:
        left_out = f", {kinds.quarantined} quarantined" if kinds.quarantined else ""
        return Verdict(
            "passed", "error", f"all {counts.embedded} rows are embedded{left_out}", metadata
        )
    pending = (
        f"{kinds.pending} rows are pending ({kinds.missing} missing, {kinds.stale} stale, "
        f"{kinds.to_clear} to clear)"
    )
    if in_flight:
        return Verdict("failed", "warn", f"{pending}; a run is at work on them", metadata)
    if held:
        return Verdict("failed", "warn", f"{pending}; {held}", metadata)
    if limited:
        return Verdict("failed", "warn", f"{pending}; the run was limited to a part", metadata)
    if waiting is None or waiting <= timedelta(minutes=max_pending_minutes):
        calm = f"{pending}, for less than {max_pending_minutes:g} minutes so far"
        return Verdict("failed", "warn", calm, metadata)
    minutes = waiting.total_seconds() / 60
    return Verdict(
        "failed",
        "error",
        f"{pending}, and some have been for {minutes:.0f} minutes, more than "
        f"{max_pending_minutes:g}; look at the table's sensor and its last runs",
        metadata,
    )


def _present(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if value is not None}
