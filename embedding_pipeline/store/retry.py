"""Quarantined rows as a person sees them: listed, and made pending again."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg import sql

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import PLANNER, SESSION
from embedding_pipeline.store.partitions import key_expression, key_from_database
from embedding_pipeline.store.pending import rows_source
from embedding_pipeline.store.quarantine import json_key, release_quarantined, typed_key

Key = tuple[str, ...]


@dataclass(frozen=True)
class QuarantinedRow:
    """A row whose present text the provider refused."""

    key: Key
    partition: str
    error: str
    """The provider's words, at most 500 characters."""
    attempts: int
    first_at: datetime
    last_at: datetime


@dataclass(frozen=True)
class Retried:
    """What `retry` did."""

    rows: int
    """Rows that are pending again."""
    unknown: list[Key]
    """Keys that were asked for and are not quarantined."""


def parse_keys(text: str, width: int) -> list[Key]:
    """Keys as a person writes them: JSON, a key or a list of keys; plain text is one key.

    `width` is the number of key columns. With one, `7`, `"a b"`, `a-b` and `[7, 8]` are keys;
    with two, `["a", 7]` and `[["a", 7], ["b", 8]]`. PipelineError for what is neither.
    """
    try:
        # numbers keep their spelling: 1.50 may be a text key
        value = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except ValueError:
        value = text
    if isinstance(value, dict):
        given: list[Any] = [value]
    elif not isinstance(value, list):
        # what is no JSON string is taken as it was written: true, null, 2025-01-01
        given = [[value if isinstance(value, str) else text.strip()]]
    elif width > 1 and not any(isinstance(part, list) for part in value):
        given = [value]
    else:
        given = [[part] if isinstance(part, str) else part for part in value]
    keys = []
    for key in given:
        if (
            not isinstance(key, list)
            or len(key) != width
            or not all(isinstance(part, str) for part in key)
        ):
            columns = (
                "one column"
                if width == 1
                else f"{width} columns, such as " + json.dumps(["a", "b", "c", "d"][:width])
            )
            raise PipelineError(
                f"{json.dumps(key, ensure_ascii=False)} is not a key of this table: its keys have "
                f"{columns}. Write a JSON key, or a JSON list of keys"
            )
        keys.append(tuple(key))
    return keys


def quarantined_rows(
    connection: "psycopg.Connection[Any]",
    column: Column,
    *,
    keys: Sequence[Key] | None = None,
    partitions: Sequence[str] | None = None,
) -> list[QuarantinedRow]:
    """Rows left out because of what their present text is, the latest refusal first."""
    names = [sql.Identifier(f"row_key_{i}") for i in range(len(column.key_types))]
    query = sql.SQL(
        "SELECT ARRAY(SELECT jsonb_array_elements_text(q.key)), row_partition, q.error,"
        " q.attempts, q.first_at, q.last_at FROM embedding_pipeline.quarantined_row AS q"
        " JOIN ({source} WHERE {pending}) AS rows ON {same_key}"
        " WHERE q.released_at IS NULL AND q.table_schema = {schema} AND q.table_name = {table}"
        " AND q.column_name = {column} AND row_fingerprint = q.fingerprint"
        " AND ($1::jsonb[] IS NULL OR q.key = ANY($1::jsonb[])) ORDER BY q.last_at DESC, q.key"
    ).format(
        source=rows_source(
            column,
            sql.SQL("{} AS row_partition").format(
                key_expression(column.table, column.partition_type)
            ),
        ),
        pending=column.pending,
        same_key=sql.SQL(" AND ").join(
            sql.SQL("{} = (q.key ->> {})::{}").format(name, sql.Literal(i), sql.SQL(type_))
            for i, (name, type_) in enumerate(zip(names, column.key_types, strict=True))
        ),
        schema=sql.Literal(column.facts.schema),
        table=sql.Literal(column.facts.name),
        column=sql.Literal(column.embedding.column),
    )
    with connection.transaction():
        connection.execute(PLANNER)
        connection.execute(SESSION)
        wanted = None if keys is None else _typed(connection, column, keys)
        rows = [
            QuarantinedRow(tuple(key), key_from_database(column.table, partition), *rest)
            for key, partition, *rest in connection.execute(query, [wanted])
        ]
    return [row for row in rows if partitions is None or row.partition in partitions]


def retry(
    connection: "psycopg.Connection[Any]",
    column: Column,
    *,
    keys: Sequence[Key] | None = None,
    partitions: Sequence[str] | None = None,
) -> Retried:
    """Make quarantined rows pending again: all, or those of some keys or partitions.

    Nothing is sent here: the next run tries them. PipelineError for a value that the key's type
    cannot have.
    """
    rows = quarantined_rows(connection, column, keys=keys, partitions=partitions)
    unknown: list[Key] = []
    if keys is not None:
        found = {row.key for row in rows}
        typed = map(_strings, _typed(connection, column, keys))
        unknown = [key for key, wanted in zip(keys, typed, strict=True) if wanted not in found]
    if rows:
        everything = keys is None and partitions is None
        release_quarantined(connection, column, None if everything else [row.key for row in rows])
    return Retried(len(rows), unknown)


def _strings(key: str) -> Key:
    parts = json.loads(key, parse_int=str, parse_float=str)
    return tuple(part if isinstance(part, str) else json.dumps(part) for part in parts)


def _typed(connection: "psycopg.Connection[Any]", column: Column, keys: Sequence[Key]) -> list[str]:
    """Keys as the table's own types write them, as JSON: `007` of a bigint column is `[7]`."""
    query = sql.SQL(
        "SELECT ({})::text FROM unnest($1::text[]) WITH ORDINALITY AS u(k, n) ORDER BY n"
    ).format(typed_key(column, sql.SQL("k::jsonb")))
    try:
        with connection.transaction():
            return [row[0] for row in connection.execute(query, [[json_key(key) for key in keys]])]
    except psycopg.DataError as error:
        raise PipelineError(
            f"{column}: not a key of this table: {str(error).splitlines()[0]}"
        ) from None
