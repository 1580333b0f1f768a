"""What comes next in a table's night, decided without touching anything.

Rounds of embedding until nothing is pending, then one run that maintains the indexes, evaluates
the golden set and scans for the checks. A round that fails ends the rounds, never the night.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from embedding_pipeline.components.decide import ColumnFacts, Request, decide

MOST_ROUNDS = 100
"""A table that is written to faster than it is embedded must come to its checks all the same."""
MOST_WAITING_SECONDS = 7200.0
"""How long a night waits for runs that others started on its rows."""


@dataclass(frozen=True)
class NightFacts:
    """What is known of a table's night."""

    columns: Sequence[ColumnFacts]
    order: Sequence[str]
    """The table's partitions in Dagster's order."""
    rows_per_run: int
    age_seconds: float = 0.0
    paused: str | None = None
    """Why the whole table is to be left alone."""
    rounds: int = 0
    """Rounds of embedding so far."""
    unfinished: int = 0
    """Of the night's runs."""
    failed: int = 0
    """Runs of the latest round that failed, or that somebody cancelled."""


@dataclass(frozen=True)
class NightStep:
    """What to do next, and why."""

    what: Literal["embed", "wait", "check", "skip"]
    reason: str
    requests: list[Request] = field(default_factory=list)


def decide_night(facts: NightFacts) -> NightStep:
    """The next step of a table's night."""
    if facts.paused is not None:
        return NightStep("skip", facts.paused)
    if facts.unfinished:
        plural = "s" * (facts.unfinished > 1)
        return NightStep("wait", f"{facts.unfinished} run{plural} under way")
    decision = decide(facts.columns, facts.order, facts.rows_per_run, few=True)
    reasons = "; ".join(decision.reasons)
    if facts.failed:
        return NightStep("check", f"round {facts.rounds} of embedding failed")
    if decision.requests:
        if facts.rounds < MOST_ROUNDS:
            rows = sum(request.rows for request in decision.requests)
            return NightStep("embed", f"{rows:,} rows pending", decision.requests)
        return NightStep("check", f"rows are still pending after {facts.rounds} rounds")
    if _held_by_others(facts) and facts.age_seconds < MOST_WAITING_SECONDS:
        return NightStep("wait", reasons)
    return NightStep("check", reasons)


def _held_by_others(facts: NightFacts) -> bool:
    """Whether live runs work on what is pending, so that it will not be for long."""
    return any(
        item.held is None
        and item.problem is None
        and any(
            (key in item.leases and item.leases[key].live)
            or any(key in run.partitions for run in item.in_flight)
            for key in item.pending
        )
        for item in facts.columns
    )
