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
        self._create, self._copy, self._write, self._existing = _statements(column)

    async def write(
        self, connection: "psycopg.AsyncConnection[Any]", rows: Sequence[StagedRow]
    ) -> Written:
        """Write one batch in one transaction.

        Raises psycopg errors as they are; none leaves anything half-written, and repeating the
        batch is harmless.
        """
        # one order for all: two of our own writers never wait for each other crosswise
        async with connection.transaction():
            await connection.execute("SET LOCAL enable_seqscan = off")
            await connection.execute(self._create)
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
        """Aim at 80 % of the target; grow at most twofold a step, from full batches only."""
        fitting = int(rows * TARGET_SECONDS * 0.8 / max(seconds, 1e-4))
        if fitting < self.batch_rows:
            self.batch_rows = max(SMALLEST_BATCH, fitting)
        elif rows >= self.batch_rows:
            self.batch_rows = min(LARGEST_BATCH, fitting, self.batch_rows * 2)


def _statements(
    column: Column,
) -> tuple[sql.Composed, sql.Composed, sql.Composed, sql.Composed]:
    keys = column.table.key_columns
    staged_keys = [sql.Identifier(f"staged_key_{i}") for i in range(len(keys))]
    same_key = sql.SQL(" AND ").join(
        sql.SQL("t.{} = s.{}::{}").format(sql.Identifier(name), staged, sql.SQL(type_))
        for name, staged, type_ in zip(keys, staged_keys, column.key_types, strict=True)
    )
    create = sql.SQL(
        "CREATE TEMPORARY TABLE embedding_pipeline_staged (staged_position int, {keys},"
        " staged_fingerprint uuid, staged_vector {vector_type}) ON COMMIT DROP"
    ).format(
        keys=sql.SQL(", ").join(sql.SQL("{} text").format(key) for key in staged_keys),
        vector_type=column.vector_type,
    )
    copy = sql.SQL("COPY pg_temp.embedding_pipeline_staged FROM STDIN (FORMAT BINARY)").format()
    write = sql.SQL(
        "WITH held AS MATERIALIZED ("
        " SELECT s.staged_position AS held_position FROM {relation} AS t"
        "  JOIN pg_temp.embedding_pipeline_staged AS s ON {same_key}"
        "  ORDER BY {order} FOR NO KEY UPDATE OF t SKIP LOCKED),"
        " written AS ("
        "  UPDATE {relation} AS t SET {vector} = s.staged_vector,"
        "   {fingerprint} = s.staged_fingerprint"
        "  FROM pg_temp.embedding_pipeline_staged AS s JOIN held"
        "   ON s.staged_position = held.held_position"
        "  WHERE {same_key} AND {expected} IS NOT DISTINCT FROM s.staged_fingerprint"
        "   AND {pending} RETURNING s.staged_position)"
        " SELECT (SELECT coalesce(array_agg(held_position), '{{}}') FROM held),"
        "  (SELECT coalesce(array_agg(staged_position), '{{}}') FROM written)"
    ).format(
        relation=column.relation,
        same_key=same_key,
        order=sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(name)) for name in keys),
        vector=column.vector,
        fingerprint=column.fingerprint,
        expected=column.expected,
        pending=column.pending,
    )
    existing = sql.SQL(
        "SELECT coalesce(array_agg(s.staged_position), '{{}}')"
        " FROM pg_temp.embedding_pipeline_staged AS s JOIN {relation} AS t ON {same_key}"
    ).format(relation=column.relation, same_key=same_key)
    return create, copy, write, existing


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


def reuse_query(column: Column) -> sql.Composed:
    """Copy vectors already stored for the same fingerprint, inside the server.

    `$1`: keys as JSON arrays of text (text[]), `$2`: their expected fingerprints (uuid[]).
    Returns the positions (from 1) that were written.
    """
    keys = column.table.key_columns
    same_key = sql.SQL(" AND ").join(
        sql.SQL("t.{} = (wanted_key ->> {})::{}").format(
            sql.Identifier(name), sql.Literal(i), sql.SQL(type_)
        )
        for i, (name, type_) in enumerate(zip(keys, column.key_types, strict=True))
    )
    return sql.SQL(
        "WITH wanted AS MATERIALIZED ("
        "  SELECT wanted_position, wanted_json::jsonb AS wanted_key, wanted_fingerprint"
        "  FROM unnest($1::text[], $2::uuid[]) WITH ORDINALITY"
        "   AS u(wanted_json, wanted_fingerprint, wanted_position)),"
        " found AS MATERIALIZED ("
        "  SELECT DISTINCT ON (wanted_fingerprint) wanted_fingerprint AS found_fingerprint,"
        "   s.found_vector FROM wanted CROSS JOIN LATERAL ("
        "   SELECT o.{vector} AS found_vector FROM {relation} AS o"
        "   WHERE o.{fingerprint} = wanted_fingerprint AND o.{vector} IS NOT NULL LIMIT 1) AS s),"
        " held AS MATERIALIZED ("
        "  SELECT wanted_position AS held_position FROM {relation} AS t"
        "  JOIN wanted ON {same_key} JOIN found ON found_fingerprint = wanted_fingerprint"
        "  ORDER BY {order} FOR NO KEY UPDATE OF t SKIP LOCKED),"
        " written AS (UPDATE {relation} AS t SET {vector} = found_vector,"
        "   {fingerprint} = wanted_fingerprint FROM wanted"
        "  JOIN held ON held_position = wanted_position"
        "  JOIN found ON found_fingerprint = wanted_fingerprint"
        "  WHERE {same_key} AND {expected} = wanted_fingerprint AND {pending}"
        "  RETURNING wanted_position)"
        " SELECT wanted_position FROM written"
    ).format(
        relation=column.relation,
        vector=column.vector,
        fingerprint=column.fingerprint,
        same_key=same_key,
        order=sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(name)) for name in keys),
        expected=column.expected,
        pending=column.pending,
    )
