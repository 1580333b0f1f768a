"""What runs did, kept in the database: for status, costs, and for how long a column is pending."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import psycopg

from embedding_pipeline.store import sqlfiles
from embedding_pipeline.store.column import Column

if TYPE_CHECKING:
    from embedding_pipeline.backfill import Outcome


@dataclass(frozen=True)
class RunResult:
    """One run of one column."""

    run_id: str | None
    started_at: datetime
    outcome: "Outcome"
    forecast: float


@dataclass(frozen=True)
class LastRun:
    """The latest run of a column that wrote anything, for the closing table."""

    tokens: int
    cost: float
    rows: int
    seconds: float


def record_run(connection: "psycopg.Connection[Any]", column: Column, result: RunResult) -> None:
    """Add a row to `run_result` and note that the column was written."""
    total = result.outcome.total
    connection.execute(
        "INSERT INTO embedding_pipeline.run_result (table_schema, table_name, column_name, run_id,"
        " started_at, finished_at, partitions, embedded, reused, superseded, locked, quarantined,"
        " cleared, tokens, requests, throttled, cost_usd, forecast_usd, provider, model)"
        " VALUES ($1, $2, $3, $4, $5, now(), $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16,"
        " $17, $18, $19)",
        [
            *_names(column),
            result.run_id,
            result.started_at,
            len(result.outcome.partitions),
            total.embedded,
            total.reused,
            total.superseded,
            total.locked,
            total.quarantined,
            total.cleared,
            result.outcome.tokens,
            result.outcome.requests,
            result.outcome.throttled,
            result.outcome.cost,
            result.forecast,
            column.embedding.provider,
            column.embedding.model,
        ],
    )
    if total.written:
        connection.execute(
            "UPDATE embedding_pipeline.embedding_column SET written_at = now()"
            " WHERE table_schema = $1 AND table_name = $2 AND column_name = $3",
            list(_names(column)),
        )


def written_at(connection: "psycopg.Connection[Any]", column: Column) -> datetime | None:
    """When a run last wrote to the column; None when none ever did."""
    row = connection.execute(
        "SELECT written_at FROM embedding_pipeline.embedding_column"
        " WHERE table_schema = $1 AND table_name = $2 AND column_name = $3",
        list(_names(column)),
    ).fetchone()
    return row[0] if row else None


@dataclass(frozen=True)
class Spent:
    """What all runs of a column have used."""

    tokens: int
    cost: float
    """US dollars."""
    last_run_at: datetime | None
    """When the latest run ended; None before the first."""


def spent(connection: "psycopg.Connection[Any]", column: Column) -> Spent:
    """Tokens, cost and the end of the latest run, over every run recorded for a column."""
    row = connection.execute(
        "SELECT coalesce(sum(tokens), 0)::bigint, coalesce(sum(cost_usd), 0)::float8,"
        " max(finished_at) FROM embedding_pipeline.run_result"
        " WHERE table_schema = $1 AND table_name = $2 AND column_name = $3",
        list(_names(column)),
    ).fetchone()
    assert row is not None
    return Spent(*row)


def note_pending(
    connection: "psycopg.Connection[Any]", column: Column, pending: bool
) -> datetime | None:
    """Remember since when a column has been pending without a break; None when it is not.

    Writes only on a change, so that a sensor may call it every tick.
    """
    row = connection.execute(
        sqlfiles.query("registry/note_pending"), [*_names(column), pending]
    ).fetchone()
    return row[0] if row else None


def _names(column: Column) -> tuple[str, str, str]:
    return column.facts.schema, column.facts.name, column.embedding.column
