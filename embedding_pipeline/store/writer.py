"""The compare-and-swap write: vectors reach only the rows whose text still calls for them.

Vectors go by binary COPY into a temporary table; the rows still wanted are locked in key order
with SKIP LOCKED, so that we neither wait for a user nor deadlock with one; one UPDATE writes
those whose expected fingerprint is still the staged one. A transaction lasts one batch, and the
batch's size adapts so that it holds row locks for at most `TARGET_SECONDS`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import numpy as np
import psycopg
from psycopg import sql

from embedding_pipeline.store.column import Column
from embedding_pipeline.store.quarantine import json_key

TARGET_SECONDS = 0.1
SMALLEST_BATCH, LARGEST_BATCH = 16, 2000


@dataclass(frozen=True, slots=True)
class StagedRow:
    """A key with its new vector (float32, the column's width) and fingerprint; None clears it."""

    key: tuple[str, ...]
    fingerprint: UUID | None
    vector: "np.ndarray[Any, np.dtype[np.float32]] | None"


@dataclass(frozen=True)
class Written:
    """What became of a batch, as positions in it; together they are the whole batch."""

    written: frozenset[int]
    superseded: frozenset[int]
    """Rows whose text changed meanwhile (they stay pending), or that somebody else brought up."""
    locked: frozenset[int]
    """Rows that somebody holds; they stay pending."""
    gone: frozenset[int]
    """Rows deleted or re-keyed meanwhile."""


class Writer:
    """Writes batches of one column over one connection and adapts their size."""

    def __init__(self, column: Column) -> None:
        self.column = column
        self.batch_rows = 128
        self._prepare, self._copy, self._write, self._existing = _statements(column)

    async def write(
        self, connection: "psycopg.AsyncConnection[Any]", rows: Sequence[StagedRow]
    ) -> Written:
        """Write one batch in one transaction.

        Raises psycopg errors as they are; none leaves anything half-written, and repeating the
        batch is harmless.
        """
        async with connection.transaction():
            await connection.execute(self._prepare)
            async with connection.cursor() as cursor, cursor.copy(self._copy) as copy:
                await copy.write(_binary_rows(rows))
            locking = time.perf_counter()
            result = await (await connection.execute(self._write)).fetchone()
            assert result is not None
            held, written = map(frozenset, result)
            free = frozenset(range(len(rows))) - held
            existing: frozenset[int] = frozenset()
            if free:
                found = await (await connection.execute(self._existing)).fetchone()
                assert found is not None
                existing = frozenset(found[0])
        self._adapt(len(rows), time.perf_counter() - locking)
        return Written(written, held - written, free & existing, free - existing)

    def _adapt(self, rows: int, seconds: float) -> None:
        """Shrink when locks were held too long; grow at most twofold, from full batches only."""
        fitting = int(rows * TARGET_SECONDS * 0.8 / max(seconds, 1e-4))
        if seconds > TARGET_SECONDS:
            self.batch_rows = max(SMALLEST_BATCH, min(self.batch_rows, fitting))
        elif rows >= self.batch_rows and fitting > self.batch_rows:
            self.batch_rows = min(LARGEST_BATCH, fitting, self.batch_rows * 2)


def _statements(
    column: Column,
) -> tuple[sql.Composed, sql.Composed, sql.Composed, sql.Composed]:
    keys = column.table.key_columns
    staged_keys = [sql.Identifier(f"staged_key_{i}") for i in range(len(keys))]

    def same_key(staged: str) -> sql.Composable:
        return sql.SQL(" AND ").join(
            sql.SQL("t.{} = {}.{}::{}").format(
                sql.Identifier(name), sql.Identifier(staged), key, sql.SQL(type_)
            )
            for name, key, type_ in zip(keys, staged_keys, column.key_types, strict=True)
        )

    # nothing is known of a temporary table's size: left to itself the planner reads all of a
    # large table for a batch's few keys
    prepare = sql.SQL(
        "SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off;"
        " SET LOCAL enable_mergejoin = off; SET LOCAL enable_bitmapscan = off;"
        " CREATE TEMPORARY TABLE embedding_pipeline_staged (staged_position int, {keys},"
        " staged_fingerprint uuid, staged_vector {vector_type}) ON COMMIT DROP"
    ).format(
        keys=sql.SQL(", ").join(sql.SQL("{} text").format(key) for key in staged_keys),
        vector_type=column.vector_type,
    )
    copy = sql.SQL("COPY pg_temp.embedding_pipeline_staged FROM STDIN (FORMAT BINARY)").format()
    # one order of locks for all: two of our own writers never wait for each other crosswise
    write = sql.SQL(
        "WITH held AS MATERIALIZED ("
        " SELECT s.* FROM {relation} AS t"
        "  JOIN pg_temp.embedding_pipeline_staged AS s ON {same_as_staged}"
        "  ORDER BY {order} FOR NO KEY UPDATE OF t SKIP LOCKED),"
        " written AS ("
        "  UPDATE {relation} AS t SET {vector} = held.staged_vector,"
        "   {fingerprint} = held.staged_fingerprint FROM held"
        "  WHERE {same_as_held} AND {expected} IS NOT DISTINCT FROM held.staged_fingerprint"
        "   AND {pending} RETURNING held.staged_position)"
        " SELECT (SELECT coalesce(array_agg(staged_position), '{{}}') FROM held),"
        "  (SELECT coalesce(array_agg(staged_position), '{{}}') FROM written)"
    ).format(
        relation=column.relation,
        same_as_staged=same_key("s"),
        same_as_held=same_key("held"),
        order=sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(name)) for name in keys),
        vector=column.vector,
        fingerprint=column.fingerprint,
        expected=column.expected,
        pending=column.pending,
    )
    existing = sql.SQL(
        "SELECT coalesce(array_agg(s.staged_position), '{{}}')"
        " FROM pg_temp.embedding_pipeline_staged AS s JOIN {relation} AS t ON {same_key}"
    ).format(relation=column.relation, same_key=same_key("s"))
    return prepare, copy, write, existing


_SIGNATURE = b"PGCOPY\n\xff\r\n\0" + b"\0" * 8
_TRAILER = b"\xff\xff"
_NULL = b"\xff\xff\xff\xff"


def _binary_rows(rows: Sequence[StagedRow]) -> bytes:
    """A whole binary COPY stream (PostgreSQL manual, "COPY", Binary Format).

    A `vector` is int16 dimensions, int16 unused, then big-endian float4 (pgvector, vector_send).
    Built here rather than through per-value dumpers: those cost more than the COPY itself.
    """
    parts: list[bytes] = [_SIGNATURE]
    for position, row in enumerate(rows):
        parts.append((3 + len(row.key)).to_bytes(2, "big"))
        parts.append(b"\0\0\0\4" + position.to_bytes(4, "big"))
        for value in row.key:
            raw = value.encode()
            parts.append(len(raw).to_bytes(4, "big") + raw)
        if row.fingerprint is None or row.vector is None:
            parts.append(_NULL + _NULL)
        else:
            data = row.vector.astype(">f4").tobytes()
            parts.append(b"\0\0\0\x10" + row.fingerprint.bytes)
            parts.append((4 + len(data)).to_bytes(4, "big"))
            parts.append((len(data) // 4).to_bytes(2, "big") + b"\0\0")
            parts.append(data)
    parts.append(_TRAILER)
    return b"".join(parts)


def stored_vectors_query(column: Column, *, by_key: bool) -> sql.Composed:
    """Vectors that the column already holds: rows of fingerprint and vector (binary).

    `$1`: fingerprints (uuid[]). With `by_key`, `$2` names for each a row that was given its
    vector (keys as JSON arrays of text, text[]); else any row with that fingerprint will do,
    which needs the index that `reuse: true` makes. A fingerprint that is not found any more is
    left out.
    """
    if not by_key:
        return sql.SQL(
            "SELECT wanted, found FROM unnest($1::uuid[]) AS u(wanted) CROSS JOIN LATERAL ("
            " SELECT t.{vector} AS found FROM {relation} AS t WHERE t.{fingerprint} = wanted"
            " AND t.{vector} IS NOT NULL LIMIT 1) AS stored"
        ).format(vector=column.vector, relation=column.relation, fingerprint=column.fingerprint)
    same_key = sql.SQL(" AND ").join(
        sql.SQL("t.{} = (place::jsonb ->> {})::{}").format(
            sql.Identifier(name), sql.Literal(i), sql.SQL(type_)
        )
        for i, (name, type_) in enumerate(
            zip(column.table.key_columns, column.key_types, strict=True)
        )
    )
    return sql.SQL(
        "SELECT wanted, t.{vector} FROM unnest($1::uuid[], $2::text[]) AS u(wanted, place)"
        " JOIN {relation} AS t ON {same_key}"
        " WHERE t.{fingerprint} = wanted AND t.{vector} IS NOT NULL"
    ).format(
        vector=column.vector,
        relation=column.relation,
        same_key=same_key,
        fingerprint=column.fingerprint,
    )


async def stored_vectors(
    connection: "psycopg.AsyncConnection[Any]",
    column: Column,
    fingerprints: Sequence[UUID],
    places: Sequence[tuple[str, ...]] | None = None,
) -> "dict[UUID, np.ndarray[Any, np.dtype[np.float32]]]":
    """Fingerprint → vector, for those that the column holds; see `stored_vectors_query`."""
    parameters: list[Any] = [list(fingerprints)]
    if places is not None:
        parameters.append([json_key(key) for key in places])
    query = stored_vectors_query(column, by_key=places is not None)
    async with connection.transaction():
        await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off")
        cursor = await connection.execute(query, parameters, binary=True)
        return {fingerprint: _vector(data) for fingerprint, data in await cursor.fetchall()}


def _vector(data: bytes) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """A `vector` from its binary form, see `_binary_rows`."""
    return np.frombuffer(data, dtype=">f4", offset=4).astype(np.float32)
