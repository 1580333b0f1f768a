"""The compare-and-swap write: vectors reach only the rows whose text still calls for them.

A batch is one statement. Its keys, fingerprints and vectors are parameters, arrays in binary: the
rows still wanted are locked in key order with SKIP LOCKED, so that we neither wait for a user nor
deadlock with one, and those whose expected fingerprint is still the staged one are updated. A
transaction lasts one batch, and the batch's size adapts so that it holds row locks for at most
`TARGET_SECONDS`.

Beside COPY into a temporary table and an UPDATE from it: no vector is written twice (0 to 15 % less
of the server's CPU at 1536 dimensions, 128 rows a batch), a round trip instead of three, no entries
in the catalogue, and no TEMP privilege.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import psycopg
from psycopg import sql
from psycopg.adapt import Dumper
from psycopg.pq import Format

from embedding_pipeline.store.column import Column
from embedding_pipeline.store.quarantine import json_key

TARGET_SECONDS = 0.1
SMALLEST_BATCH, LARGEST_BATCH = 16, 256
"""Rows a batch. More than the largest gains nothing: rows of 128 cost as much as rows of 512, and
everything in a batch waits for the last of it."""


class StagedRow(NamedTuple):
    """A key, the fingerprint that its text must still call for, and what to write then.

    With a vector (float32, the column's width) vector and fingerprint are written; without one
    both are cleared: the text is not eligible any more (no fingerprint), or was refused.
    """

    key: tuple[str, ...]
    fingerprint: bytes | None
    """The uuid's 16 bytes."""
    vector: "np.ndarray[Any, np.dtype[np.float32]] | None"


@dataclass(frozen=True)
class Written:
    """What became of a batch, as positions in it; together they are the whole batch."""

    written: frozenset[int]
    """Rows that are now as they should be, because of us."""
    superseded: frozenset[int]
    """Rows whose text changed meanwhile; they stay pending."""
    locked: frozenset[int]
    """Rows that somebody holds; they stay pending."""
    gone: frozenset[int]
    """Rows deleted or re-keyed meanwhile."""
    unchanged: frozenset[int] = frozenset()
    """Rows that were as they should be already: somebody else brought them up."""


class Writer:
    """Writes batches of one column over one connection and adapts their size."""

    def __init__(self, column: Column) -> None:
        self.column = column
        self.batch_rows = 128
        self._write, self._existing = _statements(column)
        self._known: tuple[int, bytes, bytes] | None = None

    async def write(
        self, connection: "psycopg.AsyncConnection[Any]", rows: Sequence[StagedRow]
    ) -> Written:
        """Write one batch in one transaction.

        Raises psycopg errors as they are; none leaves anything half-written, and repeating the
        batch is harmless.
        """
        connection.adapters.register_dumper(_Binary, _BinaryDumper)
        if self._known is None:
            self._known = (
                await self._find_vector_oid(connection),
                # put together once: that takes as long as sending a batch
                self._write.as_bytes(connection),
                self._existing.as_bytes(connection),
            )
        vector_oid, write, existing_query = self._known
        keys = [
            _array(_TEXT, [row.key[i].encode() for row in rows]) for i in range(len(rows[0].key))
        ]
        fingerprints = [row.fingerprint for row in rows]
        stored = [
            None if row.vector is None else fingerprint
            for row, fingerprint in zip(rows, fingerprints, strict=True)
        ]
        vectors = _vectors(vector_oid, [row.vector for row in rows])
        async with connection.transaction():
            await connection.execute(_PLANNER)
            parameters = [*keys, _array(_UUID, fingerprints), _array(_UUID, stored), vectors]
            result = await (await connection.execute(write, parameters)).fetchone()
            assert result is not None
            held, wanted, written = map(frozenset, result[:3])
            free = frozenset(range(len(rows))) - held
            existing: frozenset[int] = frozenset()
            if free:
                found = await (await connection.execute(existing_query, keys)).fetchone()
                assert found is not None
                existing = frozenset(found[0])
        self._adapt(len(rows), result[3])
        return Written(written, held - wanted, free & existing, free - existing, wanted - written)

    async def _find_vector_oid(self, connection: "psycopg.AsyncConnection[Any]") -> int:
        """An array names its elements' type, and an extension's oid differs between databases."""
        name = sql.Identifier(self.column.facts.vector_schema, "vector").as_string(connection)
        row = await (await connection.execute("SELECT $1::text::regtype::oid", [name])).fetchone()
        assert row is not None
        return int(row[0])

    def _adapt(self, rows: int, seconds: float) -> None:
        """Shrink when locks were held too long; grow at most twofold, from full batches only."""
        fitting = int(rows * TARGET_SECONDS * 0.8 / max(seconds, 1e-4))
        if seconds > TARGET_SECONDS:
            self.batch_rows = max(SMALLEST_BATCH, min(self.batch_rows, fitting))
        elif rows >= self.batch_rows and fitting > self.batch_rows:
            self.batch_rows = min(LARGEST_BATCH, fitting, self.batch_rows * 2)


_PLANNER = sql.SQL(
    "SELECT set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),"
    " set_config('enable_mergejoin', 'off', true), set_config('enable_bitmapscan', 'off', true)"
)
"""For the transaction: left to itself the planner, which knows little of a table that is just being
filled, reads all of it for a batch's few keys."""


def _statements(column: Column) -> tuple[sql.Composed, sql.Composed]:
    """The write and the question which rows exist; keys are parameters $1 to $n (text[]), for the
    write follow what the texts must call for and what is to be stored as fingerprint (uuid[]),
    and the vectors (vector[])."""
    names = column.table.key_columns
    keys = [sql.SQL("${}::text[]").format(sql.SQL(str(i + 1))) for i in range(len(names))]
    fingerprints, stored = (
        sql.SQL("(${}::uuid[])").format(sql.SQL(str(len(names) + n))) for n in (1, 2)
    )
    vectors = sql.SQL("(${}::{}[])").format(
        sql.SQL(str(len(names) + 3)), sql.Identifier(column.facts.vector_schema, "vector")
    )
    staged_keys = [sql.Identifier(f"staged_key_{i}") for i in range(len(names))]
    # an element of an array is found by walking past those before it, a microsecond for 256 of
    # 6 kB: so each vector is looked up once, and none is copied into a tuple store
    staged = sql.SQL("unnest({keys}) WITH ORDINALITY AS staged({names}, staged_position)").format(
        keys=sql.SQL(", ").join(keys), names=sql.SQL(", ").join(staged_keys)
    )

    def same_key(values: Sequence[sql.Composable]) -> sql.Composable:
        return sql.SQL(" AND ").join(
            sql.SQL("t.{} = ({})::{}").format(sql.Identifier(name), value, sql.SQL(type_))
            for name, value, type_ in zip(names, values, column.key_types, strict=True)
        )

    def staged_value(array: sql.Composable) -> sql.Composable:
        return sql.SQL("{}[held.staged_position]").format(array)

    same_as_staged = same_key([sql.SQL("staged.{}").format(key) for key in staged_keys])
    # one order of locks for all: two of our own writers never wait for each other crosswise.
    # A row that is held is looked at as it is now and cannot change until we are done with it
    write = sql.SQL(
        "WITH held AS MATERIALIZED ("
        " SELECT {staged_keys}, staged.staged_position::int,"
        "  {expected} IS NOT DISTINCT FROM {fingerprints}[staged.staged_position::int] AS wanted"
        "  FROM {relation} AS t JOIN {staged} ON {same_as_staged}"
        "  ORDER BY {order} FOR NO KEY UPDATE OF t SKIP LOCKED),"
        " written AS ("
        "  UPDATE {relation} AS t SET {vector} = {new_vector}, {fingerprint} = {new_fingerprint}"
        "  FROM held WHERE held.wanted AND {same_as_held} AND"
        "  (t.{fingerprint} IS DISTINCT FROM {new_fingerprint}"
        "   OR (t.{vector} IS NULL) <> ({new_fingerprint} IS NULL))"
        "  RETURNING held.staged_position)"
        " SELECT (SELECT coalesce(array_agg(staged_position - 1), '{{}}') FROM held),"
        "  (SELECT coalesce(array_agg(staged_position - 1), '{{}}') FROM held WHERE wanted),"
        "  (SELECT coalesce(array_agg(staged_position - 1), '{{}}') FROM written),"
        # of the server's own clock: a slow line to it holds no locks
        "  extract(epoch FROM clock_timestamp() - statement_timestamp())::float8"
    ).format(
        relation=column.relation,
        staged=staged,
        same_as_staged=same_as_staged,
        staged_keys=sql.SQL(", ").join(sql.SQL("staged.{}").format(key) for key in staged_keys),
        same_as_held=same_key([sql.SQL("held.{}").format(key) for key in staged_keys]),
        order=sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(name)) for name in names),
        vector=column.vector,
        fingerprint=column.fingerprint,
        expected=column.expected,
        fingerprints=fingerprints,
        new_vector=staged_value(vectors),
        new_fingerprint=staged_value(stored),
    )
    existing = sql.SQL(
        "SELECT coalesce(array_agg(staged.staged_position - 1), '{{}}')"
        " FROM {staged} JOIN {relation} AS t ON {same_key}"
    ).format(staged=staged, relation=column.relation, same_key=same_as_staged)
    return write, existing


_TEXT, _UUID = 25, 2950
"""Type oids, fixed by PostgreSQL's catalogue."""
_NULL = b"\xff\xff\xff\xff"


class _Binary:
    """A parameter in its binary form, whose type the statement's cast says."""

    __slots__ = ("data",)

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data


class _BinaryDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: _Binary) -> bytes | memoryview:
        return obj.data


def _array(element_oid: int, values: Sequence[bytes | None]) -> _Binary:
    """A one-dimensional array of values in their binary form (array_recv): dimensions, whether
    there are NULLs, the elements' type, length and lower bound, then each with its length."""
    parts = [_array_head(element_oid, len(values), None in values)]
    for value in values:
        parts.append(_NULL if value is None else len(value).to_bytes(4, "big") + value)
    return _Binary(b"".join(parts))


def _array_head(element_oid: int, length: int, nulls: bool) -> bytes:
    return b"".join(n.to_bytes(4, "big") for n in (1, nulls, element_oid, length, 1))


def _vectors(
    element_oid: int, vectors: "Sequence[np.ndarray[Any, np.dtype[np.float32]] | None]"
) -> _Binary:
    """The same for vectors: int16 dimensions, int16 unused, then big-endian float4 (pgvector's
    vector_send). In one piece where every row has one: value by value costs more than sending."""
    given = [vector for vector in vectors if vector is not None]
    widths = {len(vector) for vector in given}
    if len(given) < len(vectors) or len(widths) != 1:
        return _array(element_oid, [None if v is None else _vector_bytes(v) for v in vectors])
    (width,) = widths
    head = np.frombuffer(_array_head(element_oid, len(given), nulls=False), dtype=">u4")
    wire = np.empty(len(head) + len(given) * (2 + width), dtype=np.uint32)
    wire[: len(head)] = head
    rows = wire[len(head) :].reshape(len(given), 2 + width)
    rows[:, 0], rows[:, 1] = 4 + 4 * width, width << 16
    np.stack(given, out=rows.view(np.float32)[:, 2:])
    if sys.byteorder == "little":
        wire.byteswap(inplace=True)
    return _Binary(wire.data.cast("B"))


def _vector_bytes(vector: "np.ndarray[Any, np.dtype[np.float32]]") -> bytes:
    return len(vector).to_bytes(2, "big") + b"\0\0" + vector.astype(">f4").tobytes()


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
    fingerprints: Sequence[bytes],
    places: Sequence[tuple[str, ...]] | None = None,
) -> "dict[bytes, np.ndarray[Any, np.dtype[np.float32]]]":
    """Fingerprint → vector, for those that the column holds; see `stored_vectors_query`."""
    parameters: list[Any] = [[UUID(bytes=each) for each in fingerprints]]
    if places is not None:
        parameters.append([json_key(key) for key in places])
    query = stored_vectors_query(column, by_key=places is not None)
    async with connection.transaction():
        await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_hashjoin = off")
        cursor = await connection.execute(query, parameters, binary=True)
        return {wanted.bytes: _vector(data) for wanted, data in await cursor.fetchall()}


def _vector(data: bytes) -> "np.ndarray[Any, np.dtype[np.float32]]":
    """A `vector` from its binary form, see `_vectors`."""
    return np.frombuffer(data, dtype=">f4", offset=4).astype(np.float32)
