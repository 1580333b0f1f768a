"""Two evaluations on one golden set, query by query."""

from dataclasses import dataclass

import numpy as np

from embedding_pipeline.evaluation.errors import EvaluationError
from embedding_pipeline.evaluation.result import Evaluation, QueryResult

PERMUTATIONS = 10_000


@dataclass(frozen=True)
class QueryComparison:
    """One query in both columns."""

    query: str
    tenant: str | None
    candidate: QueryResult
    baseline: QueryResult

    @property
    def difference(self) -> float:
        """Reciprocal rank at 5, candidate minus baseline."""
        assert self.candidate.reciprocal_rank is not None
        assert self.baseline.reciprocal_rank is not None
        return self.candidate.reciprocal_rank - self.baseline.reciprocal_rank


@dataclass(frozen=True)
class Comparison:
    """A candidate column against its baseline over the queries that were scored in both."""

    queries: int
    candidate_mrr: float | None
    baseline_mrr: float | None
    wins: int
    """Queries that the candidate ranks better."""
    losses: int
    ties: int
    p_value: float | None
    """Two-sided, of the mean difference; None without a query."""
    worst: tuple[QueryComparison, ...]
    """Queries by difference, the candidate's greatest losses first; losses only."""

    @property
    def ratio(self) -> float | None:
        """Candidate's MRR@5 / baseline's; None where the baseline's is 0 or there is no query."""
        if self.candidate_mrr is None or not self.baseline_mrr:
            return None
        return self.candidate_mrr / self.baseline_mrr


def compare(candidate: Evaluation, baseline: Evaluation, *, seed: int = 0) -> Comparison:
    """Pair the queries that were scored in both and compare their reciprocal ranks at 5.

    EvaluationError when the two were not evaluated on the same golden set: their figures say
    nothing about each other then.
    """
    if candidate.golden_set_hash != baseline.golden_set_hash:
        raise EvaluationError(
            f"{candidate.column_name} and {baseline.column_name} were evaluated on different "
            "golden sets; evaluate both again"
        )
    others = {result.name: result for result in baseline.results if result.scored}
    pairs = [
        QueryComparison(result.query, result.tenant, result, others[result.name])
        for result in candidate.results
        if result.scored and result.name in others
    ]
    differences = np.array([pair.difference for pair in pairs])
    losses = sorted(
        (pair for pair in pairs if pair.difference < 0),
        key=lambda pair: (pair.difference, pair.query, pair.tenant or ""),
    )
    return Comparison(
        queries=len(pairs),
        candidate_mrr=_mean([pair.candidate for pair in pairs]),
        baseline_mrr=_mean([pair.baseline for pair in pairs]),
        wins=int((differences > 0).sum()),
        losses=len(losses),
        ties=int((differences == 0).sum()),
        p_value=randomisation_p_value(differences, seed=seed),
        worst=tuple(losses),
    )


def randomisation_p_value(
    differences: np.ndarray[tuple[int], np.dtype[np.float64]],
    *,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> float | None:
    """Paired randomisation test of the mean difference being 0, two-sided.

    Under the null hypothesis the two columns' figures of a query could as well be exchanged, so
    every difference's sign is drawn anew; p is the share of draws at least as extreme as what
    was seen, the observation counted among them (Smucker, Allan and Carterette, CIKM 2007,
    recommend it for retrieval metrics; the +1 keeps p above 0). Same seed, same p.
    """
    moved = differences[differences != 0]  # a sign does nothing to a zero
    if len(differences) == 0:
        return None
    if len(moved) == 0:
        return 1.0
    observed = abs(moved.sum())
    generator = np.random.default_rng(seed)
    extreme = 0
    left = permutations
    while left:  # in pieces: 10,000 draws of 10,000 queries would be 800 MB
        piece = min(left, max(1, 1_000_000 // len(moved)))
        signs = generator.integers(0, 2, size=(piece, len(moved)), dtype=np.int8) * 2 - 1
        # the tolerance: sums of the same numbers in another order differ in the last bits
        extreme += int((np.abs(signs @ moved) >= observed - 1e-9).sum())
        left -= piece
    return (extreme + 1) / (permutations + 1)


def _mean(results: list[QueryResult]) -> float | None:
    figures = [r.reciprocal_rank for r in results if r.reciprocal_rank is not None]
    return float(np.mean(figures)) if figures else None
