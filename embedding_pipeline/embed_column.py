"""One run of one embedding column: identity check, lease, backfill, accounting. No Dagster.

What an asset does, and what the command line's dry run announces.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from embedding_pipeline.backfill import BackfillError, Counts, Options, Outcome, Progress, backfill
from embedding_pipeline.embedders import Embedder, create_embedder, load_endpoints
from embedding_pipeline.errors import LeaseError, SpecError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.spec import EmbeddingSpec
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import connect
from embedding_pipeline.store.lease import Lease, LeaseRow, describe_holders
from embedding_pipeline.store.pending import (
    count_by_partition,
    count_kinds,
    estimated_rows,
    sample_pending,
)
from embedding_pipeline.store.quarantine import count_quarantined
from embedding_pipeline.store.registry import verify
from embedding_pipeline.store.results import RunResult, note_pending, record_run


@dataclass(frozen=True)
class ColumnRun:
    """What a run did, partition by partition, and what it left."""

    outcome: Outcome
    remaining: dict[str, int]
    """Partition → rows still pending, empty partitions left out."""
    held: dict[str, LeaseRow]
    """Partitions that other runs hold; not touched."""
    forecast: float
    """US dollars that the pending rows were estimated to cost at the start."""


@dataclass(frozen=True)
class Forecast:
    """What a run would have to do. `cost` in US dollars, from a sample of the pending texts."""

    rows: int
    tokens: int
    cost: float
    samples: list[tuple[tuple[str, ...], str]]


def make_embedder(embedding: EmbeddingSpec) -> Embedder:
    """The embedder that a column's YAML names, not started yet."""
    endpoints = load_endpoints(load_settings())
    if embedding.provider not in endpoints:
        raise SpecError(
            f"{embedding.column}: provider {embedding.provider!r} is not declared; "
            f"known: {', '.join(sorted(endpoints))} (see embedding_pipeline/providers.yaml)"
        )
    return create_embedder(
        endpoints[embedding.provider],
        embedding.model,
        embedding.dimensions,
        overlong=embedding.overlong,
        prefix=embedding.prefix,
    )


def forecast(url: str, column: Column, partitions: Sequence[str] | None = None) -> Forecast:
    """Rows, tokens and cost of what is pending; reads a sample of the texts, writes nothing."""
    embedder = make_embedder(column.embedding)
    with connect(url) as connection:
        counts = count_by_partition(connection, column)
        wanted = {key: n for key, n in counts.items() if partitions is None or key in partitions}
        samples = sample_pending(connection, column, list(wanted), 200)
    rows = sum(wanted.values())
    if not samples:
        return Forecast(rows, 0, 0.0, [])
    mean = sum(embedder.estimate_tokens(text) for _, text in samples) / len(samples)
    tokens = round(mean * rows)
    return Forecast(rows, tokens, embedder.cost(tokens), samples[:3])


def embed_column(
    url: str,
    column: Column,
    partitions: Sequence[str],
    options: Options,
    *,
    run_id: str | None = None,
    report: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ColumnRun:
    """Bring partitions of a column up to date under a lease, and account for it.

    Raises IdentityError when the YAML asks for another recipe than the column holds, LeaseError
    when live runs hold all the partitions, and BackfillError when the run had to stop; what was
    finished by then is kept and accounted for.
    """
    settings = load_settings()
    started = datetime.now(UTC)
    with connect(url) as connection:
        verify(connection, column, settings.embedding_pipeline_environment)
        counts = count_by_partition(connection, column)
        quarantined = count_quarantined(connection, column)
        rows = estimated_rows(connection, column)
    expected = sum(counts.get(key, 0) for key in partitions)
    if not expected:
        report(f"{column}: nothing is pending")
        return ColumnRun(Outcome({key: Counts() for key in partitions}), {}, {}, 0.0)
    estimate = forecast(url, column, partitions)
    report(
        f"{column}: {expected:,} rows pending in {len(partitions)} partitions, "
        f"about {estimate.tokens:,} tokens, ${estimate.cost:.4f}"
    )
    lease = Lease(url, column, partitions, run_id)
    held = lease.acquire_waiting(report)
    if not lease.partitions:
        raise LeaseError(
            f"{column}: {describe_holders(held)}. That run goes on; this one has nothing to do. "
            "Wait for it, or end it (its lease lapses after 30 s)."
        )
    if held:
        report(f"{column}: leaving out {describe_holders(held)}")
    most_refused = int(max(rows, expected) * column.embedding.max_quarantined_share) - quarantined
    with lease:
        try:
            outcome = asyncio.run(
                _backfill(url, column, lease, options, expected, max(0, most_refused), on_progress)
            )
        except BackfillError as error:
            _account(url, column, run_id, started, error.outcome, estimate.cost)
            raise
        remaining = _account(url, column, run_id, started, outcome, estimate.cost)
    mine = {key: count for key, count in remaining.items() if key in lease.partitions}
    return ColumnRun(outcome, mine, held, estimate.cost)


async def _backfill(
    url: str,
    column: Column,
    lease: Lease,
    options: Options,
    expected: int,
    most_refused: int,
    on_progress: Callable[[Progress], None] | None,
) -> Outcome:
    embedder = make_embedder(column.embedding)
    try:
        await embedder.start()
        return await backfill(
            url,
            column,
            lease.partitions,
            embedder,
            options,
            check=lease.check,
            expected=expected,
            most_refused=most_refused,
            on_progress=on_progress,
        )
    finally:
        await embedder.aclose()


def _account(
    url: str,
    column: Column,
    run_id: str | None,
    started: datetime,
    outcome: Outcome,
    forecast_cost: float,
) -> dict[str, int]:
    """Record what a run did; returns what is pending in each partition now."""
    with connect(url) as connection:
        record_run(connection, column, RunResult(run_id, started, outcome, forecast_cost))
        remaining = count_by_partition(connection, column)
        note_pending(connection, column, sum(remaining.values()) > 0)
    return remaining


__all__ = ["ColumnRun", "Forecast", "count_kinds", "embed_column", "forecast", "make_embedder"]
