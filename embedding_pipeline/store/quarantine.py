"""Quarantined rows: texts that a provider refused for good.

An exception is keyed by the row's key *and* the fingerprint of the text that was refused, so that
it stops applying when the text changes, and there is nothing to drift.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import SESSION

LONGEST_ERROR = 500

PAST_SHARE = "past max_quarantined_share"
"""Part of what a run says that stops because too many rows were refused."""


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
    query = sql.SQL(
        "INSERT INTO embedding_pipeline.quarantined_row AS q (table_schema, table_name,"
        " column_name, key, fingerprint, error, attempts, first_at, last_at)"
        " SELECT DISTINCT ON (4, 5) {schema}, {table}, {column}, {typed},"
        " r.fingerprint, r.error, 1, now(), now() FROM (SELECT k::jsonb AS refused_key,"
        " fingerprint, error FROM unnest($1::text[], $2::uuid[], $3::text[])"
        " AS u(k, fingerprint, error)) AS r"
        " ON CONFLICT (table_schema, table_name, column_name, key, fingerprint)"
        " DO UPDATE SET error = excluded.error, attempts = q.attempts + 1, last_at = now(),"
        " released_at = NULL"
    ).format(typed=typed_key(column, sql.Identifier("refused_key")), **_names(column))
    parameters = [
        [json_key(refusal.key) for refusal in refusals],
        [refusal.fingerprint for refusal in refusals],
        [storable(refusal.error, LONGEST_ERROR) for refusal in refusals],
    ]
    async with connection.transaction():
        await connection.execute(SESSION)
        await connection.execute(query, parameters)


def typed_key(column: Column, key: sql.Composable) -> sql.Composable:
    """A key given as a JSON array of strings, as the table's own types make it."""
    return sql.SQL("jsonb_build_array({})").format(
        sql.SQL(", ").join(
            sql.SQL("({} ->> {})::{}").format(key, sql.Literal(i), sql.SQL(type_))
            for i, type_ in enumerate(column.key_types)
        )
    )


def storable(text: str, most: int) -> str:
    """Somebody's words as a Postgres text column takes them: no NUL, no half of a surrogate."""
    plain = text.replace("\0", "�").encode("utf-8", "replace").decode()
    return plain[:most]


def release_quarantined(
    connection: "psycopg.Connection[Any]", column: Column, keys: Sequence[Sequence[Any]] | None
) -> int:
    """Let refused rows (all, or those of some keys) be tried again: they are pending now.

    Attempts and first time are kept, in case the provider refuses them once more.
    PipelineError for a key that the table's key type cannot have.
    """
    wanted = [json_key(tuple(map(str, key))) for key in keys] if keys is not None else None
    query = sql.SQL(
        "UPDATE embedding_pipeline.quarantined_row SET released_at = now()"
        " WHERE released_at IS NULL AND table_schema = {schema} AND table_name = {table}"
        " AND column_name = {column} AND ($1::text[] IS NULL OR key IN"
        " (SELECT {typed} FROM (SELECT k::jsonb AS wanted_key FROM unnest($1::text[]) AS u(k))"
        " AS w))"
    ).format(typed=typed_key(column, sql.Identifier("wanted_key")), **_names(column))
    try:
        with connection.transaction():
            connection.execute(SESSION)
            return connection.execute(query, [wanted]).rowcount
    except psycopg.DataError as error:
        raise PipelineError(f"{column}: not a key of this table: {error}") from None


def json_key(key: tuple[str, ...]) -> str:
    """A key as a JSON array of strings."""
    return json.dumps(list(key), ensure_ascii=False)


def _names(column: Column) -> dict[str, sql.Composable]:
    return {
        "schema": sql.Literal(column.facts.schema),
        "table": sql.Literal(column.facts.name),
        "column": sql.Literal(column.embedding.column),
    }
