"""What a sensor tick should do, decided without touching anything.

The sensor gathers facts (pending rows, leases, runs in flight) and acts on the decision; what is
decided from what is here, and tested here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from embedding_pipeline.store.lease import LeaseRow

STARTING_SECONDS = 300.0
"""A run that was requested and has not taken its lease after this long no longer counts: its
process died before it began."""
SHARED_RUN_ROWS = 500
"""Up to so many rows, columns of a table share a run."""
QUALITY_EVERY_SECONDS = 600.0
"""A live writer brings a column to zero pending again and again; evaluating costs a full scan."""


@dataclass(frozen=True)
class RunInFlight:
    """A run of ours that Dagster does not show as finished."""

    run_id: str
    partitions: frozenset[str]
    age_seconds: float
    """Since it was created."""
    alive: bool = False
    """It holds a live lease on some column, so it will come to its other columns."""


@dataclass(frozen=True)
class ColumnFacts:
    """What a tick knows of one embedding column."""

    column: str
    pending: Mapping[str, int]
    """Partition → pending rows, only those that have some."""
    leases: Mapping[str, LeaseRow] = field(default_factory=dict)
    in_flight: Sequence[RunInFlight] = ()
    problem: str | None = None
    """Why the column's runs are stopped (another recipe, a failed query); pending is not known."""
    held: str | None = None
    """The brake that is on: a pause, or a cost cap that is reached."""


@dataclass(frozen=True)
class Request:
    """A run to ask for: a contiguous range of partitions, of one column or of several."""

    columns: tuple[str, ...]
    partitions: tuple[str, ...]
    rows: int
    """Of the column that has most."""


@dataclass(frozen=True)
class Decision:
    """What to do, and why not more."""

    requests: list[Request]
    reasons: list[str]


def dead_leases(facts: ColumnFacts) -> list[tuple[str, LeaseRow]]:
    """Leases whose holders are gone: their runs must be failed and their partitions freed."""
    return [(key, lease) for key, lease in sorted(facts.leases.items()) if lease.lapsed]


def decide(
    columns: Sequence[ColumnFacts], order: Sequence[str], rows_per_run: int, *, few: bool = False
) -> Decision:
    """Which runs to request for a table.

    `order` is Dagster's order of the table's partitions, in which ranges are contiguous. Pending
    partitions that lie side by side become one run, up to `rows_per_run` rows; with `few` also
    those that do not, and the partitions between them, where nothing is pending, cost nothing.
    """
    requests: list[Request] = []
    reasons: list[str] = []
    for facts in columns:
        if facts.problem is not None:
            reasons.append(f"{facts.column}: stopped: {facts.problem}")
            continue
        if facts.held is not None:
            reasons.append(f"{facts.column}: {facts.held} ({_rows(facts)} pending)")
            continue
        if not facts.pending:
            reasons.append(f"{facts.column}: nothing pending")
            continue
        free, why = _free(facts, order)
        reasons += why
        pending = {key: facts.pending[key] for key in free}
        requests += ranges(facts.column, pending, order, rows_per_run, few=few)
    return Decision(_together(requests), reasons)


def _rows(facts: ColumnFacts) -> str:
    count = sum(facts.pending.values())
    return f"{count:,} row{'s' * (count != 1)}"


def _together(requests: Sequence[Request]) -> list[Request]:
    """Let columns share a run where their few rows lie in the same partitions.

    A run takes seconds to start, and an edited row is pending in every column. Many rows stay
    apart, so that the columns are filled side by side.
    """
    merged: dict[tuple[str, ...], Request] = {}
    apart: list[Request] = []
    for request in requests:
        if request.rows > SHARED_RUN_ROWS:
            apart.append(request)
            continue
        other = merged.get(request.partitions)
        if other is not None:
            request = Request(
                other.columns + request.columns,
                request.partitions,
                max(other.rows, request.rows),
            )
        merged[request.partitions] = request
    return [*merged.values(), *apart]


def _free(facts: ColumnFacts, order: Sequence[str]) -> tuple[list[str], list[str]]:
    """Pending partitions that nobody works on and that are not backing off; why not the others."""
    free: list[str] = []
    held: dict[str | None, int] = {}
    waiting: list[LeaseRow] = []
    known = set(order)
    unknown: list[str] = []
    for partition in facts.pending:
        lease = facts.leases.get(partition)
        starting = next(
            (
                run.run_id
                for run in facts.in_flight
                if partition in run.partitions
                and (run.alive or run.age_seconds < STARTING_SECONDS)
                and not (lease is not None and lease.run_id == run.run_id and not lease.live)
            ),
            None,
        )
        if lease is not None and lease.live:
            held[lease.run_id] = held.get(lease.run_id, 0) + 1
        elif starting is not None:
            held[starting] = held.get(starting, 0) + 1
        elif lease is not None and lease.waiting_seconds > 0:
            waiting.append(lease)
        elif partition not in known:
            unknown.append(partition)
        else:
            free.append(partition)
    reasons = [
        f"{facts.column}: {count} partition{'s' * (count > 1)} in flight "
        + (f"in run {run_id[:8]}" if run_id else "outside Dagster")
        for run_id, count in held.items()
    ]
    if unknown:
        reasons.append(
            f"{facts.column}: {len(unknown)} partition{'s' * (len(unknown) > 1)} that Dagster does "
            f"not know: {', '.join(unknown[:5])}"
        )
    if waiting:
        soonest = min(waiting, key=lambda lease: lease.waiting_seconds)
        reasons.append(
            f"{facts.column}: {len(waiting)} partition{'s' * (len(waiting) > 1)} backing off after "
            f"{soonest.failures} failure{'s' * (soonest.failures > 1)}, next try in "
            f"{soonest.waiting_seconds:.0f} s; last error: {soonest.last_error}"
        )
    return free, reasons


def ranges(
    column: str,
    pending: Mapping[str, int],
    order: Sequence[str],
    rows_per_run: int,
    *,
    few: bool = False,
) -> list[Request]:
    """Split pending partitions into runs of at most `rows_per_run` rows each.

    Of neighbours only; with `few`, of all that follow each other.
    """
    positions = {key: number for number, key in enumerate(order)}
    keys = sorted((key for key in pending if key in positions), key=positions.__getitem__)
    if not keys:
        return []
    groups: list[list[str]] = [[keys[0]]]
    rows = pending[keys[0]]
    for previous, key in pairwise(keys):
        neighbours = few or positions[key] == positions[previous] + 1
        if neighbours and rows + pending[key] <= rows_per_run:
            groups[-1].append(key)
            rows += pending[key]
        else:
            groups.append([key])
            rows = pending[key]
    return [
        Request((column,), tuple(group), sum(pending[key] for key in group)) for group in groups
    ]


@dataclass(frozen=True)
class EvaluationFacts:
    """What is known of one column's evaluations; times in seconds."""

    changed: bool
    """Something was written since the latest one, or there was none."""
    since_evaluated: float | None = None
    pending_for: float | None = None
    """None while nothing is pending."""


def due_for_evaluation(
    columns: Sequence[ColumnFacts],
    evaluations: Mapping[str, EvaluationFacts],
    seconds_since_requested: float | None,
) -> list[str]:
    """The columns whose index, evaluation and full scans are due: complete, and written since.

    The first evaluation comes at once, later ones at most every `QUALITY_EVERY_SECONDS`. A column
    that is being filled is waited for so long, because both are best compared in one evaluation;
    one that stands still (stopped, paused, backing off) holds nobody up.
    """
    if seconds_since_requested is not None and seconds_since_requested < QUALITY_EVERY_SECONDS:
        return []
    due = []
    for facts in columns:
        known = evaluations.get(facts.column)
        if known is None or facts.problem is not None or facts.held is not None:
            continue
        if facts.pending:
            if _is_worked_on(facts) and (known.pending_for or 0.0) < QUALITY_EVERY_SECONDS:
                return []
        elif known.changed and (
            known.since_evaluated is None or known.since_evaluated >= QUALITY_EVERY_SECONDS
        ):
            due.append(facts.column)
    return due


def _is_worked_on(facts: ColumnFacts) -> bool:
    return any(lease.live for lease in facts.leases.values()) or any(
        run.alive or run.age_seconds < STARTING_SECONDS for run in facts.in_flight
    )
