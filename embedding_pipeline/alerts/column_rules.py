"""Which facts about columns and their checks are problems. Pure; see `rules`."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from embedding_pipeline.alerts.facts import CheckFacts, ColumnFacts
from embedding_pipeline.alerts.problems import Findings, Kind, Problem
from embedding_pipeline.alerts.rules import SIGHTINGS
from embedding_pipeline.store.quarantine import PAST_SHARE

if TYPE_CHECKING:
    from embedding_pipeline.evaluation.verdict import Verdict

FAILURES_IN_A_ROW = 2
"""An embedding run that failed is news when its retry has failed too …"""
RETRY_SECONDS = 120.0
"""… or when nothing has retried it for so long."""

COVERAGE = "coverage"

REMEDIES = {
    "golden_mrr": "Open the table's retrieval_quality report: the worst queries and what was found "
    "instead. Many wrong at once means wrong vectors: set them to NULL and materialise.",
    "vectors_valid": "The check's metadata names keys. Set those vectors to NULL and materialise; "
    "ask what the provider did.",
    "index_recall": "Materialise the column's index asset: it builds what is missing or invalid.",
    COVERAGE: "Open the table's sensor: each tick says why it requested nothing. Start it, or "
    "materialise the partitions.",
}


def column_problems(columns: Iterable[ColumnFacts]) -> Findings:
    """Stopped columns, rows that wait for too long, too many refused, runs that keep failing."""
    found = Findings()
    stopped: dict[str, list[ColumnFacts]] = {}
    for facts in columns:
        if facts.unknown is None and facts.stopped is not None:
            stopped.setdefault(facts.table, []).append(facts)
        found.add(_column(facts))
    found.problems += [_stopped_problem(table, several) for table, several in stopped.items()]
    return found


def _stopped_problem(table: str, columns: Sequence[ColumnFacts]) -> Problem:
    """One for a table: what stops one of its columns mostly stops them all."""
    reasons = list(dict.fromkeys(facts.stopped for facts in columns if facts.stopped))
    names = ", ".join(facts.column for facts in columns)
    return Problem(
        Kind.COLUMN,
        table,
        f"Nothing is embedded in {table} ({names}): {reasons[0]}",
        "Follow one of the ways out that the message names (`embedding-pipeline migrate --dry-run "
        f"--table {table}` shows it again), then reload the definitions.",
        table=table,
        column=names,
        value="stopped",
        link=f"assets/{columns[0].asset}",
        sightings=SIGHTINGS,
        affected=frozenset(facts.name for facts in columns),
    )


def _column(facts: ColumnFacts) -> Findings:
    found = Findings()
    of_coverage = (Kind.CHECK.value, _check_subject(facts.name, COVERAGE))
    of_quarantine = (Kind.QUARANTINE.value, facts.name)
    of_runs = (Kind.RUN.value, facts.name)
    if facts.unknown is not None or facts.stopped is not None:
        found.unknown |= {of_coverage, of_quarantine, of_runs}
        if facts.unknown is not None:
            found.unknown.add((Kind.COLUMN.value, facts.table))
        return found
    if facts.coverage is None:
        found.unknown |= {of_coverage, of_quarantine}
    elif facts.coverage.severity == "error" and not facts.coverage.passed:
        found.problems.append(_coverage_problem(facts, facts.coverage))
    elif facts.held is not None and not facts.coverage.passed:
        # its rows wait because somebody wants it so: neither news nor over
        found.unknown.add(of_coverage)
    found.problems += _failing_problem(facts)
    return found


def _coverage_problem(facts: ColumnFacts, verdict: "Verdict") -> Problem:
    figures = verdict.metadata
    refused = figures.get("quarantined_share", 0) > figures.get("max_quarantined_share", 1)
    if refused:
        return _quarantine_problem(
            facts,
            verdict.summary,
            value=f"{figures['quarantined']} rows, {figures['quarantined_share']:.1%}",
        )
    waited = figures.get("pending_minutes")
    return Problem(
        Kind.CHECK,
        _check_subject(facts.name, COVERAGE),
        verdict.summary,
        REMEDIES[COVERAGE],
        table=facts.table,
        column=facts.column,
        check=COVERAGE,
        value=f"pending for {waited:.0f} minutes" if waited is not None else None,
        threshold=f"{figures['max_pending_minutes']:g} minutes",
        since=facts.pending_since,
        link=_check_link(facts.asset, COVERAGE),
        affected=frozenset({facts.name}),
    )


def _quarantine_problem(facts: ColumnFacts, summary: str, value: str | None) -> Problem:
    share = facts.coverage.metadata.get("max_quarantined_share") if facts.coverage else None
    return Problem(
        Kind.QUARANTINE,
        facts.name,
        summary,
        f"embedding-pipeline retry {facts.table} {facts.column} --list shows the provider's words. "
        "So many are rarely the texts: mend the cause, then retry them.",
        table=facts.table,
        column=facts.column,
        check=COVERAGE,
        value=value,
        threshold=f"{share:.1%} of the rows" if share is not None else None,
        link=_check_link(facts.asset, COVERAGE),
        affected=frozenset({facts.name}),
    )


def _failing_problem(facts: ColumnFacts) -> list[Problem]:
    if not facts.failing:
        return []
    worst = max(facts.failing, key=lambda each: (each.failures, each.seconds_ago))
    if PAST_SHARE in worst.error:
        return [_quarantine_problem(facts, worst.error, value=None)]
    partitions = len(facts.failing)
    again = worst.failures >= FAILURES_IN_A_ROW
    if not again and worst.seconds_ago < RETRY_SECONDS:
        return []
    times = f"{worst.failures} runs in a row have" if again else "a run has"
    return [
        Problem(
            Kind.RUN,
            facts.name,
            f"{times} failed on {partitions} partition{'s' * (partitions > 1)} that "
            f"{'have' if partitions > 1 else 'has'} pending rows. The latest said: {worst.error}",
            "Open the run: its last lines have the provider's words. What it had finished is "
            "kept; the table's sensor tries again by itself, or materialise the partitions.",
            table=facts.table,
            column=facts.column,
            value=f"{worst.failures} failures in a row",
            threshold=f"{FAILURES_IN_A_ROW}, or one that nobody has retried for "
            f"{RETRY_SECONDS:.0f} s",
            link=f"runs/{worst.run_id}" if worst.run_id else f"assets/{facts.asset}",
            run_id=worst.run_id,
            affected=frozenset({facts.name}),
        )
    ]


def check_problems(checks: Iterable[CheckFacts], columns: Sequence[ColumnFacts]) -> Findings:
    """Checks whose latest judgement is an ERROR, and indexes that have gone since they passed.

    `coverage` is not among them: `column_problems` says what it would say now.
    """
    found = Findings()
    state = {facts.name: facts for facts in columns}
    for check in checks:
        subject = _check_subject(check.name, check.check)
        facts = state.get(check.name)
        gone = facts.index_missing if facts and check.check == "index_recall" else None
        if check.failed:
            found.problems.append(_check_problem(check, subject, check.summary))
        elif check.unjudged is not None:
            found.problems.append(
                _check_problem(check, subject, f"This check can no longer judge: {check.unjudged}")
            )
        elif gone is not None and check.known and facts is not None and not facts.pending:
            summary = f"{gone}, so every search reads the whole table"
            found.problems.append(_check_problem(check, subject, summary, sightings=SIGHTINGS))
        elif not check.known:
            found.unknown.add((Kind.CHECK.value, subject))
    return found


def _check_problem(check: CheckFacts, subject: str, summary: str, *, sightings: int = 1) -> Problem:
    value, threshold = _figures(check) if check.failed else (None, None)
    return Problem(
        Kind.CHECK,
        subject,
        summary,
        REMEDIES.get(check.check, "Open the check in the Dagster UI."),
        table=check.table,
        column=check.column,
        check=check.check,
        value=value,
        threshold=threshold,
        since=check.at if check.failed else None,
        link=_check_link(check.asset, check.check),
        run_id=check.run_id,
        sightings=sightings,
        affected=frozenset({check.name}),
    )


def _check_subject(column: str, check: str) -> str:
    return f"{column}: {check}"


def _check_link(asset: str, check: str) -> str:
    return f"assets/{asset}?view=checks&checkDetail={check}"


def _figures(check: CheckFacts) -> tuple[str | None, str | None]:
    """What was measured and its bound, in words, from the check's metadata."""
    figures = check.metadata
    if check.check == "golden_mrr":
        ratio, wanted = figures.get("ratio_to_baseline"), figures.get("required_ratio")
        if isinstance(ratio, float) and isinstance(wanted, float) and ratio < wanted:
            return f"{ratio:.3f} × the baseline's MRR@5", f"{wanted:g} × {figures.get('baseline')}"
        return f"MRR@5 {_short(figures.get('mrr_at_5'))}", f"{_short(figures.get('floor'))}"
    if check.check == "index_recall":
        recall = figures.get("index_recall")
        found = f"recall {_short(recall)}" if recall is not None else "no usable index"
        return found, f"{_short(figures.get('floor'))}"
    if check.check == "vectors_valid":
        if figures.get("zero"):
            return f"{figures['zero']} zero vectors of {figures.get('rows')}", "none"
        if figures.get("contradictory"):
            return f"{figures['contradictory']} rows unlike others of the same text", "none"
        return (
            f"{_short(figures.get('identical_share'))} share a vector with another text",
            f"{_short(figures.get('max_identical_share'))}",
        )
    return None, None


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
