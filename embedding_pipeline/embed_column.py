"""One run of one embedding column: identity check, lease, backfill, accounting. No Dagster.

What an asset does, and what the command line's dry run announces.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg
from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_exponential

from embedding_pipeline.backfill import BackfillError, Counts, Options, Outcome, Progress, backfill
from embedding_pipeline.brakes import RunBrake, daily_caps, held_back
from embedding_pipeline.embedders import Embedder, create_embedder, load_endpoints
from embedding_pipeline.embedders.budget import budget_for
from embedding_pipeline.errors import LeaseError, PipelineError, SpecError
from embedding_pipeline.settings import load_settings
from embedding_pipeline.shared_budget import shared_budgets
from embedding_pipeline.spec import EmbeddingSpec
from embedding_pipeline.store.bulk_load import prepare_load
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import DatabaseUnreachableError, connect
from embedding_pipeline.store.indexes import reindex_pending_if_bloated, vacuum
from embedding_pipeline.store.lease import LAPSE_SECONDS, Lease, LeaseRow, describe_holders
from embedding_pipeline.store.pending import (
    count_by_partition,
    count_kinds,
    estimated_rows,
    sample_pending,
)
from embedding_pipeline.store.registry import verify
from embedding_pipeline.store.results import RunResult, note_pending, record_run

SAMPLED_TEXTS = 200
"""Pending texts whose tokens are counted for a forecast."""
REFUSALS_ALWAYS_ALLOWED = 20
"""Below this many a share says nothing: one bad row in a table of ten is 10 %."""
BULK_ROWS = 10_000
"""A run that wrote so many rows ends with a VACUUM of the table."""
ACCOUNTING_SECONDS = 15.0
"""How long a run that is done waits for a database that went away."""


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


def make_embedder(embedding: EmbeddingSpec, url: str | None = None) -> Embedder:
    """The embedder that a column's YAML names, not started yet.

    With a database's `url` it keeps the endpoint's limits together with every other process.
    """
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
        budgets=shared_budgets(url) if url else budget_for,
    )


def forecast(url: str, column: Column, partitions: Sequence[str] | None = None) -> Forecast:
    """Rows, tokens and cost of what is pending; reads a sample of the texts, writes nothing."""
    with connect(url) as connection:
        counts = count_by_partition(connection, column)
        chosen = counts if partitions is None else _among(counts, partitions)
        return _forecast(connection, column, chosen)


def _among(counts: Mapping[str, int], partitions: Sequence[str]) -> dict[str, int]:
    return {key: counts[key] for key in dict.fromkeys(partitions) if key in counts}


def _forecast(
    connection: "psycopg.Connection[Any]", column: Column, counts: Mapping[str, int]
) -> Forecast:
    rows = sum(counts.values())
    if not rows:
        return Forecast(0, 0, 0.0, [])
    sample = sample_pending(connection, column, list(counts), SAMPLED_TEXTS)
    embedder = make_embedder(column.embedding)
    texts = [(row.key, row.text) for row in sample if row.text and row.fingerprint]
    # rows that only lose their vector are part of the sample, and cost nothing
    mean = sum(embedder.estimate_tokens(text) for _, text in texts) / max(1, len(sample))
    tokens = round(mean * rows)
    return Forecast(rows, tokens, embedder.cost(tokens), texts[:3])


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
    when live runs hold all the partitions, PipelineError for a key that is no partition of this
    table, and BackfillError when the run had to stop; what was finished by then is kept and
    accounted for.
    """
    started = datetime.now(UTC)
    _refuse_unknown(column, partitions)
    with connect(url) as connection:
        verify(connection, column, load_settings().embedding_pipeline_environment)
        counts = count_by_partition(connection, column)
        pending = _among(counts, partitions)
        if not pending:
            note_pending(connection, column, bool(counts))
            report(f"{column}: nothing is pending")
            return ColumnRun(Outcome({key: Counts() for key in partitions}), {}, {}, 0.0)
        held_by = held_back(connection, column)
        if held_by is not None:
            report(f"{column}: nothing is embedded: {held_by}")
            idle = Outcome({key: Counts() for key in partitions}, stopped=str(held_by))
            idle.held = held_by
            return ColumnRun(idle, pending, {}, 0.0)
        estimate = _forecast(connection, column, pending)
        most_refused = _most_refused(connection, column)
    report(
        f"{column}: {estimate.rows:,} rows pending in {len(pending)} of {len(partitions)} "
        f"partitions, about {estimate.tokens:,} tokens, ${estimate.cost:.4f}"
    )
    with Lease(url, column, partitions, run_id) as lease:
        held = lease.acquire_waiting(report)
        if not lease.partitions:
            raise LeaseError(
                f"{column}: {describe_holders(held)}. That run goes on; this one has nothing to "
                f"do. Wait for it, or end it (its lease lapses after {LAPSE_SECONDS:g} s)."
            )
        if held:
            report(f"{column}: leaving out {describe_holders(held)}")
        expected = sum(_among(counts, lease.partitions).values())
        with connect(url) as connection:
            prepare_load(connection, column, expected, report=report)
        work = _backfill(url, column, lease, options, expected, most_refused, on_progress)
        try:
            outcome = asyncio.run(work)
        except BackfillError as error:
            result = RunResult(run_id, started, error.outcome, estimate.cost)
            try:
                _account(url, column, result)
            except (PipelineError, psycopg.Error) as other:
                report(f"{column}: what the run did could not be recorded: {other}")
            raise
        lease.emptied = outcome.swept
        remaining = _account(url, column, RunResult(run_id, started, outcome, estimate.cost))
        if outcome.total.written >= BULK_ROWS:
            _tidy(url, column, report)
    return ColumnRun(outcome, _among(remaining, lease.partitions), held, estimate.cost)


def _tidy(url: str, column: Column, report: Callable[[str], None]) -> None:
    """What a bulk run owes the table: without it, counting what is pending stays slow.

    Not worth failing a run for: the rows are written, and the next bulk run tidies again.
    """
    try:
        with connect(url) as connection:
            vacuum(connection, column, report=report)
            reindex_pending_if_bloated(connection, column, report=report)
    except (PipelineError, psycopg.Error) as error:
        report(f"{column}: could not be vacuumed: {str(error).strip()}")


def _refuse_unknown(column: Column, partitions: Sequence[str]) -> None:
    for key in partitions:
        try:
            column.partition(key)
        except ValueError as error:
            raise PipelineError(f"{column}: {error}") from None


def _most_refused(connection: "psycopg.Connection[Any]", column: Column) -> int:
    """How many more rows may be quarantined before a run stops."""
    kinds = count_kinds(connection, column)
    rows = max(estimated_rows(connection, column), kinds.pending)
    most = max(int(rows * column.embedding.max_quarantined_share), REFUSALS_ALWAYS_ALLOWED)
    return max(0, most - kinds.quarantined)


async def _backfill(
    url: str,
    column: Column,
    lease: Lease,
    options: Options,
    expected: int,
    most_refused: int,
    on_progress: Callable[[Progress], None] | None,
) -> Outcome:
    embedder = make_embedder(column.embedding, url)
    settings = load_settings()
    caps = daily_caps(column.embedding, settings, load_endpoints(settings))
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
            brake=RunBrake(url, column, caps),
        )
    finally:
        await embedder.aclose()


@retry(
    retry=retry_if_exception_type((DatabaseUnreachableError, psycopg.OperationalError)),
    wait=wait_exponential(0.1, max=2),
    stop=stop_after_delay(ACCOUNTING_SECONDS),
    reraise=True,
)
def _account(url: str, column: Column, result: RunResult) -> dict[str, int]:
    """Record what a run did; returns what is pending in each partition now."""
    with connect(url) as connection:
        remaining = count_by_partition(connection, column)
        with connection.transaction():
            record_run(connection, column, result)
            note_pending(connection, column, bool(remaining))
    return remaining


__all__ = ["ColumnRun", "Forecast", "count_kinds", "embed_column", "forecast", "make_embedder"]
