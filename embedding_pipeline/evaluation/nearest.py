"""The rows nearest to a query vector, found exactly and through the HNSW index, and timed."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from embedding_pipeline.evaluation.keys import Key, key_from_json
from embedding_pipeline.evaluation.metrics import ranked
from embedding_pipeline.store.column import Column
from embedding_pipeline.store.connection import SESSION

K = 10
"""Rows asked for: nDCG@10 needs ten, and recall is the customary recall@10."""

EF_SEARCH = 100
"""`hnsw.ef_search` of every index query here; pgvector's default is 40."""

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]

# Index scans off, so that no index can answer ORDER BY; bitmap scans stay on, because a filter
# on the tenant may well use its own index. Planner settings that would stand in the way of the
# one plan or the other are set whatever the role or the database says.
_EXACT = sql.SQL(
    "SET LOCAL enable_indexscan = off; SET LOCAL enable_indexonlyscan = off;"
    " SET LOCAL enable_seqscan = on; SET LOCAL enable_bitmapscan = on; SET LOCAL enable_sort = on"
)
# Only a plan that reads the rows in the index's order needs neither a sort nor a sequential or
# bitmap scan; on a small table the planner would rightly prefer to sort.
_INDEX = sql.SQL(
    "SET LOCAL enable_indexscan = on; SET LOCAL enable_seqscan = off;"
    " SET LOCAL enable_bitmapscan = off; SET LOCAL enable_sort = off;"
    " SET LOCAL hnsw.ef_search = {ef_search}"
)
_ITERATIVE = sql.SQL("SET LOCAL hnsw.iterative_scan = strict_order")


@dataclass(frozen=True)
class Neighbour:
    """A row and how near it is."""

    key: Key
    score: float
    """1 - cosine distance."""


@dataclass(frozen=True)
class Nearest:
    """The rows nearest to one query vector, best first; equal scores by key."""

    exact: list[Neighbour]
    exact_ms: float
    index: list[Neighbour] | None
    """None where the index was not asked."""
    index_ms: float | None

    @property
    def recall(self) -> float | None:
        """Share of the exact rows that the index found, too.

        A row as near as the last exact one counts, whichever of several such rows it is: equal
        texts have equal vectors, and which of them are among the ten is chance. None where the
        index was not asked or there is nothing to find.
        """
        if self.index is None or not self.exact:
            return None
        # the tolerance: none is needed for the same rows, whose distance is the same sum
        near_enough = sum(row.score >= self.exact[-1].score - 1e-9 for row in self.index)
        return min(1.0, near_enough / len(self.exact))

    def without(self, key: Key, k: int) -> "Nearest":
        """The first k rows of each ranking, one row left out."""

        def rest(ranking: list[Neighbour]) -> list[Neighbour]:
            return [row for row in ranking if row.key != key][:k]

        index = None if self.index is None else rest(self.index)
        return replace(self, exact=rest(self.exact), index=index)


@dataclass(frozen=True)
class UsableIndex:
    """The HNSW index that a column's cosine search uses, or why there is none."""

    name: str | None
    reason: str | None
    iterative: bool
    """pgvector ≥ 0.8 goes on searching when a filter leaves too few rows."""


def find_index(connection: "psycopg.Connection[Any]", column: Column) -> UsableIndex:
    """The column's valid HNSW index for cosine distance, whatever its name is."""
    extension = connection.execute(
        "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
    ).fetchone()
    version = tuple(int(part) for part in extension[0].split(".")[:2]) if extension else (0, 0)
    rows = connection.execute(
        "SELECT c.relname, i.indisvalid AND i.indisready"
        " FROM pg_index AS i"
        " JOIN pg_class AS c ON c.oid = i.indexrelid"
        " JOIN pg_am AS m ON m.oid = c.relam"
        " JOIN pg_opclass AS o ON o.oid = i.indclass[0]"
        " JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]"
        " WHERE i.indrelid = $1::oid AND a.attname = $2::text AND m.amname = 'hnsw'"
        " AND o.opcname = 'vector_cosine_ops' ORDER BY c.relname",
        [column.facts.oid, column.embedding.column],
    ).fetchall()
    valid = [name for name, is_valid in rows if is_valid]
    reason = None
    if not valid:
        reason = (
            f"the HNSW index {rows[0][0]} is not valid (its build failed or is under way)"
            if rows
            else f"{column} has no HNSW index for cosine distance"
        )
    return UsableIndex(valid[0] if valid else None, reason, version >= (0, 8))


class Searcher:
    """Runs one column's nearest-row queries, each vector in a transaction of its own.

    A transaction is one snapshot, so that exact and index search see the same rows while others
    write, and a short one, so that the snapshot holds back no vacuum. The connection must be in
    autocommit mode and not inside a transaction.
    """

    def __init__(
        self,
        connection: "psycopg.Connection[Any]",
        column: Column,
        *,
        k: int = K,
        ef_search: int = EF_SEARCH,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.connection = connection
        self.column = column
        self.k = k
        self.ef_search = ef_search
        self.index = find_index(connection, column)
        self._clock = clock
        self._index_plans: dict[bool, bool] = {}
        self._is_warm = False

    def search(self, vector: Vector, tenant: str | None = None, *, index: bool = True) -> Nearest:
        """The nearest rows, within the tenant if one is given; with `index`, both ways.

        Times are of warm queries, as the client sees them (round trip included). The exact
        way reads every vector, so the first query warms all later ones and only it is run
        twice; an index query walks a path of its own and is always run twice. The second is
        timed.
        """
        query = self.query(tenant is not None, exact=True)
        parameters = [vector_literal(vector), *([tenant] if tenant is not None else [])]
        with self.connection.transaction():
            self.connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            self.connection.execute(SESSION)
            self.connection.execute(_EXACT)
            if not self._is_warm:
                self._timed(query, parameters)
                self._is_warm = True
            exact, exact_ms = self._timed(query, parameters)
            found: list[Neighbour] | None = None
            index_ms: float | None = None
            query = self.query(tenant is not None, exact=False)
            if index and self._prepare_index(query, parameters):
                self._timed(query, parameters)
                found, index_ms = self._timed(query, parameters)
        return Nearest(exact, exact_ms, found, index_ms)

    def query(self, within_tenant: bool, *, exact: bool) -> sql.Composed:
        """Top k by cosine distance; $1 the vector as text, $2 the tenant as text.

        Rows come as (key as JSON text, distance). The exact query takes equally near rows in
        the order of their keys; for the index the order is by distance alone, because with the
        key in it no index could give it.
        """
        column = self.column
        tenant: sql.Composable = sql.SQL("")
        if within_tenant:
            name = column.table.tenant_column
            assert name is not None, "a query with a tenant on a table without a tenant column"
            tenant = sql.SQL(" AND {} = $2::text::{}").format(
                sql.Identifier(name),
                sql.SQL(column.facts.columns[name]),  # format_type quotes what needs it
            )
        schema = column.facts.vector_schema
        distance = sql.SQL("{} OPERATOR({}.<=>) $1::{}").format(
            column.vector, sql.Identifier(schema), sql.Identifier(schema, "vector")
        )
        return sql.SQL(
            "SELECT {key}::text, {distance} FROM {relation} WHERE {vector} IS NOT NULL{tenant}"
            " ORDER BY {distance}{then} LIMIT {k}"
        ).format(
            key=column.key_json,
            distance=distance,
            relation=column.relation,
            vector=column.vector,
            tenant=tenant,
            then=sql.SQL(", {}").format(column.keys) if exact else sql.SQL(""),
            k=sql.Literal(self.k),
        )

    def _timed(
        self, query: sql.Composed, parameters: Sequence[Any]
    ) -> tuple[list[Neighbour], float]:
        started = self._clock()
        rows = self.connection.execute(query, parameters).fetchall()
        elapsed = (self._clock() - started) * 1000
        # a zero vector has no direction: its distance is NaN, which sorts last
        scored = [(key_from_json(key), 1 - distance) for key, distance in rows]
        scores = {key: score for key, score in scored if score == score}
        return [Neighbour(key, scores[key]) for key in ranked(scores.items())], elapsed

    def _prepare_index(self, query: sql.Composed, parameters: Sequence[Any]) -> bool:
        """Set up the transaction for the index; False where the planner cannot use one."""
        if self.index.name is None:
            return False
        self.connection.execute(_INDEX.format(ef_search=sql.Literal(self.ef_search)))
        within_tenant = len(parameters) > 1
        if within_tenant and self.index.iterative:
            self.connection.execute(_ITERATIVE)
        if within_tenant not in self._index_plans:
            explained = self.connection.execute(
                sql.SQL("EXPLAIN (FORMAT JSON, COSTS off) {}").format(query), parameters
            ).fetchone()
            assert explained is not None
            uses = _reads_in_index_order(explained[0][0]["Plan"])
            self._index_plans[within_tenant] = uses
            if not uses:
                self.index = UsableIndex(
                    None,
                    f"the planner cannot use the HNSW index {self.index.name} for this search",
                    self.index.iterative,
                )
        return self._index_plans[within_tenant]


def _reads_in_index_order(plan: dict[str, Any]) -> bool:
    """True when every scan of the plan is an index scan that answers the ORDER BY."""
    children = plan.get("Plans", [])
    if children:
        return all(_reads_in_index_order(child) for child in children)
    return plan["Node Type"] == "Index Scan" and "Order By" in plan


def vector_literal(vector: Vector) -> str:
    """A vector in pgvector's text form, every float32 exact."""
    return "[" + ",".join(f"{value:.9g}" for value in vector.tolist()) + "]"


def percentile(milliseconds: Sequence[float], share: float) -> float | None:
    """The given percentile (linear interpolation), None of nothing."""
    return float(np.percentile(milliseconds, share)) if milliseconds else None
