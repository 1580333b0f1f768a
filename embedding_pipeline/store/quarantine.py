"""Quarantined rows: texts that a provider refused for good.

An exception is keyed by the row's key *and* the fingerprint of the text that was refused, so that
it stops applying when the text changes, and there is nothing to drift.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql

from embedding_pipeline.store.column import Column

LONGEST_ERROR = 500


@dataclass(frozen=True)
class Refusal:
    """A row that the provider refused, with its words."""

    key: tuple[str, ...]
    fingerprint: UUID
    error: str


async def quarantine(
    connection: "psycopg.AsyncConnection[Any]", column: Column, refusals: Sequence[Refusal]
) -> None:
    """Record refusals; one that was recorded before counts another attempt."""
    if not refusals:
        return
    typed = sql.SQL(", ").join(
        sql.SQL("(r.refused_key ->> {})::{}").format(sql.Literal(i), sql.SQL(type_))
        for i, type_ in enumerate(column.key_types)
    )
    query = sql.SQL(
        "INSERT INTO embedding_pipeline.quarantined_row AS q (table_schema, table_name,"
        " column_name, key, fingerprint, error, attempts, first_at, last_at)"
        " SELECT DISTINCT ON (4, 5) {schema}, {table}, {column}, jsonb_build_array({typed}),"
        " r.fingerprint, r.error, 1, now(), now() FROM (SELECT k::jsonb AS refused_key,"
        " fingerprint, error FROM unnest($1::text[], $2::uuid[], $3::text[])"
        " AS u(k, fingerprint, error)) AS r"
        " ON CONFLICT (table_schema, table_name, column_name, key, fingerprint)"
        " DO UPDATE SET error = excluded.error, attempts = q.attempts + 1, last_at = now()"
    ).format(typed=typed, **_names(column))
    await connection.execute(
        query,
        [
            [json_key(refusal.key) for refusal in refusals],
            [refusal.fingerprint for refusal in refusals],
            [refusal.error.replace("\0", "�")[:LONGEST_ERROR] for refusal in refusals],
        ],
    )


def count_quarantined(connection: "psycopg.Connection[Any]", column: Column) -> int:
    """Recorded refusals of a column, those whose text has changed since included."""
    query = sql.SQL(
        "SELECT count(*) FROM embedding_pipeline.quarantined_row WHERE table_schema = {schema}"
        " AND table_name = {table} AND column_name = {column}"
    ).format(**_names(column))
    row = connection.execute(query).fetchone()
    return int(row[0]) if row else 0


def release_quarantined(
    connection: "psycopg.Connection[Any]", column: Column, keys: Sequence[Sequence[Any]] | None
) -> int:
    """Forget refusals (all, or those of some keys), so that the rows are pending again."""
    query = sql.SQL(
        "DELETE FROM embedding_pipeline.quarantined_row WHERE table_schema = {schema}"
        " AND table_name = {table} AND column_name = {column}"
        " AND ($1::jsonb[] IS NULL OR key = ANY($1::jsonb[]))"
    ).format(**_names(column))
    wanted = None
    if keys is not None:
        # both spellings of a key, 7 and "7": the caller cannot know the column's type
        spellings = [json_key(tuple(str(part) for part in key)) for key in keys]
        spellings += [_as_numbers(key) for key in keys]
        wanted = spellings
    return connection.execute(query, [wanted]).rowcount


def json_key(key: tuple[str, ...]) -> str:
    """A key as a JSON array of strings."""
    import json

    return json.dumps(list(key), ensure_ascii=False)


def _as_numbers(key: Sequence[Any]) -> str:
    import json

    parts: list[Any] = []
    for part in key:
        try:
            parts.append(int(part))
        except ValueError:
            parts.append(str(part))
    return json.dumps(parts, ensure_ascii=False)


def _names(column: Column) -> dict[str, sql.Composable]:
    return {
        "schema": sql.Literal(column.facts.schema),
        "table": sql.Literal(column.facts.name),
        "column": sql.Literal(column.embedding.column),
    }
