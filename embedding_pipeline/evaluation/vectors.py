"""Whether stored vectors can be what they should be, without a golden set."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import psycopg
from psycopg import sql

from embedding_pipeline.evaluation.keys import (
    WANTED,
    Key,
    key_arrays,
    key_from_json,
    wanted_keys,
)
from embedding_pipeline.evaluation.nearest import EF_SEARCH, K, Searcher, find_index
from embedding_pipeline.evaluation.result import IndexRecall
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import SESSION
from embedding_pipeline.store.pending import estimated_rows

UNIT_TOLERANCE = 0.01
"""A norm this far from 1 counts as not normalised; single precision is off by some 1e-7."""

SAME_TEXT_DISTANCE = 0.01
"""Vectors of one text and recipe may differ by the numerics of another batch (1e-4 at OpenAI),
not by this cosine distance."""

EXAMPLES = 5
_MOST_GROUPS = 1000


@dataclass(frozen=True)
class VectorsValid:
    """Counts over a column's stored vectors."""

    scope: Literal["all", "keys", "sample"]
    rows: int
    """Rows that have a vector, among those looked at."""
    zero: int
    """All-zero vectors: a cosine index leaves them out without a word."""
    not_unit: int
    """Vectors whose norm is not 1; cosine distance does not mind, inner product does."""
    norm_min: float | None
    norm_max: float | None
    identical: int
    """Rows whose vector another row has, too, though their texts differ (zero ones apart)."""
    contradictory: int
    """Rows whose vector is far from that of another row with the very same text."""
    zero_keys: tuple[Key, ...]
    """Some of them."""
    identical_keys: tuple[Key, ...]
    """Some rows of the largest group that shares a vector."""

    @property
    def identical_share(self) -> float:
        return self.identical / self.rows if self.rows else 0.0


def vectors_valid(
    connection: "psycopg.Connection[Any]",
    column: Column,
    *,
    keys: Iterable[Key] | None = None,
    sample: int | None = None,
) -> VectorsValid:
    """Count vectors that cannot be right: of all rows, of given keys, or of a sample.

    All rows: one scan that reads every vector (20,000 of 1536 dimensions: 1.2–2 s). `keys`
    (a run's own rows) costs only those rows; `sample` takes about so many, the same ones each
    time. Vectors are compared by an md5 of their bytes, and texts by their fingerprints.
    Different texts may rightly share a vector (cut to the model's length, or alike but for
    capitals in an uncased model), so `identical` is a matter of how many.
    """
    assert keys is None or sample is None, "keys or a sample, not both"
    parameters: list[Any] = []
    condition: sql.Composable = sql.SQL("")
    source: sql.Composable = column.relation
    scope: Literal["all", "keys", "sample"] = "all"
    if keys is not None:
        scope = "keys"
        parameters = list(key_arrays(keys, len(column.table.key_columns)))
        condition = sql.SQL(" AND {}").format(_among_wanted(column))
    elif sample is not None:
        scope = "sample"
        source = sql.SQL("{} {}").format(column.relation, _sampling(connection, column, sample))
    schema = column.facts.vector_schema
    query = sql.SQL(
        "WITH stored AS MATERIALIZED (SELECT {key} AS key, {fingerprint} AS fingerprint,"
        " {norm}({vector}) AS norm, md5({send}({vector}))::uuid AS digest"
        " FROM {source} WHERE {vector} IS NOT NULL{condition}),"
        " same_vector AS (SELECT count(*) AS rows,"
        " (array_agg(key::text ORDER BY key))[1:{examples}] AS keys FROM stored WHERE norm > 0"
        " GROUP BY digest HAVING min(fingerprint::text) <> max(fingerprint::text)),"
        " same_text AS (SELECT fingerprint FROM stored WHERE norm > 0 GROUP BY fingerprint"
        " HAVING min(digest::text) <> max(digest::text) LIMIT {groups})"
        " SELECT count(*), count(*) FILTER (WHERE norm = 0),"
        " count(*) FILTER (WHERE abs(norm - 1) > {tolerance}), min(norm), max(norm),"
        " coalesce((SELECT sum(rows) FROM same_vector), 0)::bigint,"
        " (SELECT keys FROM same_vector ORDER BY rows DESC, keys LIMIT 1),"
        " ARRAY(SELECT key::text FROM stored WHERE norm = 0 ORDER BY key LIMIT {examples}),"
        " ARRAY(SELECT fingerprint FROM same_text WHERE fingerprint IS NOT NULL)"
        " FROM stored"
    ).format(
        key=column.key_json,
        fingerprint=column.fingerprint,
        norm=sql.Identifier(schema, "vector_norm"),
        send=sql.Identifier(schema, "vector_send"),
        vector=column.vector,
        source=source,
        condition=condition,
        examples=sql.Literal(EXAMPLES),
        groups=sql.Literal(_MOST_GROUPS),
        tolerance=sql.Literal(UNIT_TOLERANCE),
    )
    with connection.transaction():
        connection.execute(SESSION)
        row = connection.execute(query, parameters).fetchone()
        assert row is not None
        rows, zero, not_unit, low, high, identical, shared, zero_keys, same_text = row
        contradictory = _contradictory(connection, column, same_text) if same_text else 0
    return VectorsValid(
        scope=scope,
        rows=rows,
        zero=zero,
        not_unit=not_unit,
        norm_min=low,
        norm_max=high,
        identical=identical,
        contradictory=contradictory,
        zero_keys=tuple(map(key_from_json, zero_keys)),
        identical_keys=tuple(map(key_from_json, shared or ())),
    )


def _contradictory(
    connection: "psycopg.Connection[Any]", column: Column, fingerprints: Sequence[Any]
) -> int:
    """Rows of these texts whose vector is far from the first row's of the same text."""
    schema = column.facts.vector_schema
    query = sql.SQL(
        "WITH stored AS MATERIALIZED (SELECT {fingerprint} AS fingerprint, {vector} AS vector,"
        " {key} AS key FROM {relation} WHERE {fingerprint} = ANY($1::uuid[])"
        " AND {vector} IS NOT NULL AND {norm}({vector}) > 0),"
        " first AS (SELECT DISTINCT ON (fingerprint) fingerprint, vector FROM stored"
        " ORDER BY fingerprint, key)"
        " SELECT count(*) FROM stored JOIN first USING (fingerprint)"
        " WHERE stored.vector OPERATOR({schema}.<=>) first.vector > {distance}"
    ).format(
        fingerprint=column.fingerprint,
        vector=column.vector,
        key=column.key_json,
        relation=column.relation,
        norm=sql.Identifier(schema, "vector_norm"),
        schema=sql.Identifier(schema),
        distance=sql.Literal(SAME_TEXT_DISTANCE),
    )
    row = connection.execute(query, [list(fingerprints)]).fetchone()
    assert row is not None
    return int(row[0])


def index_recall(
    connection: "psycopg.Connection[Any]",
    column: Column,
    *,
    sample: int = 30,
    k: int = K,
    ef_search: int = EF_SEARCH,
) -> IndexRecall:
    """HNSW against exact search for sampled stored vectors; for a column without a golden set.

    Each sampled row's nearest neighbours are looked for (within its tenant, as users search),
    the row itself left out: it would be found for nothing. Costs one exact search a row. The
    same rows each time, as long as the table stays the same.
    """
    searcher = Searcher(connection, column, k=k + 1, ef_search=ef_search)
    if searcher.index.reason is not None:
        return IndexRecall(None, 0, None, searcher.index.reason)
    recalls = []
    for key, vector, tenant in _sampled(connection, column, sample):
        nearest = searcher.search(vector, tenant).without(key, k)
        if nearest.index is None:
            return IndexRecall(None, 0, None, searcher.index.reason)
        if nearest.recall is not None:
            recalls.append(nearest.recall)
    if not recalls:
        return IndexRecall(None, 0, searcher.index.name, f"{column} has too few vectors to compare")
    return IndexRecall(statistics.fmean(recalls), len(recalls), searcher.index.name, None)


def still_indexed(
    connection: "psycopg.Connection[Any]", column: Column, measured: IndexRecall
) -> IndexRecall:
    """An earlier measurement, or none with the reason when the index has gone since: one query."""
    reason = find_index(connection, column).reason
    return measured if reason is None else IndexRecall(None, 0, None, reason)


def _sampled(
    connection: "psycopg.Connection[Any]", column: Column, sample: int
) -> list[tuple[Key, np.ndarray[tuple[int], np.dtype[np.float32]], str | None]]:
    """Key, vector and tenant of some rows whose vector is not zero."""
    tenant = column.table.tenant_column
    schema = column.facts.vector_schema
    query = sql.SQL(
        "SELECT {key}::text, {vector}::real[], {tenant} FROM {relation} {sampling}"
        " WHERE {vector} IS NOT NULL AND {norm}({vector}) > 0 LIMIT {sample}"
    ).format(
        key=column.key_json,
        vector=column.vector,
        tenant=sql.SQL("{}::text").format(sql.Identifier(tenant)) if tenant else sql.SQL("NULL"),
        relation=column.relation,
        sampling=_sampling(connection, column, sample),
        norm=sql.Identifier(schema, "vector_norm"),
        sample=sql.Literal(sample),
    )
    with connection.transaction():
        connection.execute(SESSION)
        rows = connection.execute(query, binary=True).fetchall()
    return [(key_from_json(k), np.array(v, dtype=np.float32), t) for k, v, t in rows]


def _sampling(connection: "psycopg.Connection[Any]", column: Column, sample: int) -> sql.Composable:
    """A TABLESAMPLE clause for about `sample` rows, the same ones each time.

    BERNOULLI rather than SYSTEM: a page holds rows that were written together. It reads the
    table's pages but not the vectors of the rows it leaves out, which are stored out of line.
    """
    rows = estimated_rows(connection, column)
    # an estimate of 0 also stands for a table never analysed: take all of what may be a small one
    percent = min(100.0, 110.0 * sample / rows) if rows else 100.0
    return sql.SQL("TABLESAMPLE BERNOULLI ({}) REPEATABLE (0)").format(sql.Literal(percent))


def _among_wanted(column: Column) -> sql.Composable:
    keys = column.table.key_columns
    return sql.SQL("({keys}) IN (SELECT {wanted} FROM {source})").format(
        keys=column.keys,
        wanted=sql.SQL(", ").join(
            sql.SQL("{}.{}::{}").format(WANTED, sql.Identifier(f"k{position}"), sql.SQL(key_type))
            for position, (_, key_type) in enumerate(zip(keys, column.key_types, strict=True))
        ),
        source=wanted_keys(column),
    )
